// Turns a failed launch into an exception that names the op.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastcam {

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace fastcam
