#include "bindings.h"
#include "cpu/ops.h"

PYBIND11_MODULE(_C, m) {
  using namespace fastcam;
  m.doc() = "C++ implementations of fastcam's ops, on addresses; fastcam.native calls them.";
  bind(m, "cam_fuse_fwd", cam_fuse_fwd);
  bind(m, "cam_fuse_bwd", cam_fuse_bwd);
  bind(m, "prototype_similarity_fwd", prototype_similarity_fwd);
  bind(m, "prototype_similarity_bwd", prototype_similarity_bwd);
}
