#include "bindings.h"
#include "cuda/ops.h"

PYBIND11_MODULE(_C_cuda, m) {
  using namespace fastcam;
  m.doc() = "CUDA implementations of fastcam's ops, on addresses; fastcam.native calls them.";
  bind(m, "cam_fuse_tiles", cam_fuse_tiles);
  bind(m, "cam_fuse_fwd", cam_fuse_fwd);
  bind(m, "cam_fuse_bwd", cam_fuse_bwd);
}
