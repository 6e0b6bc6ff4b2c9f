#include "bindings.h"

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "CUDA implementations of fastcam's ops, on addresses; fastcam.native calls them."; }
