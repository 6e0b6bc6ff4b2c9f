// Vectors of 64 bytes for loops that the compiler does not vectorise by itself. One is split where the CPU's are
// shorter.
#pragma once

#include <cstdint>

namespace fastcam {

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int64_t size = 64 / sizeof(T);
};

}  // namespace fastcam
