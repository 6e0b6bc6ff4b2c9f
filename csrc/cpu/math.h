// Vectors of numbers, rows of them, and an exponential that compilers turn into vector code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "multiversion.h"

namespace fastcam {

template <typename T, int W>
struct Lanes {
  typedef T type __attribute__((vector_size(W * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <typename T, int W>
FASTCAM_INLINE typename Lanes<T, W>::type& lanes(T* p) {
  return *reinterpret_cast<typename Lanes<T, W>::type*>(p);
}
template <typename T, int W>
FASTCAM_INLINE const typename Lanes<T, W>::type& lanes(const T* p) {
  return *reinterpret_cast<const typename Lanes<T, W>::type*>(p);
}

// How many numbers a row of n values takes: 1, 2, 4, or a multiple of 8.
inline int64_t row_width(int64_t n) { return n <= 2 ? n : n <= 4 ? 4 : (n + 7) / 8 * 8; }

// Op<T, W, R>::run(c, args...) for consecutive blocks of R vectors of W numbers, from column c on, that make up a row.
template <template <typename, int, int> class Op, typename T, typename... Args>
FASTCAM_INLINE void each_block(int64_t width, Args... args) {
  if (width == 1) return Op<T, 1, 1>::run(0, args...);
  if (width == 2) return Op<T, 2, 1>::run(0, args...);
  if (width == 4) return Op<T, 4, 1>::run(0, args...);
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) Op<T, 16, 2>::run(c, args...);
  if (width - c == 24) Op<T, 8, 3>::run(c, args...);
  if (width - c == 16) Op<T, 16, 1>::run(c, args...);
  if (width - c == 8) Op<T, 8, 1>::run(c, args...);
}

// exp(x) for x <= 88, relative error below 2e-7; 0 below -87, where float would become subnormal; NaN stays NaN.
FASTCAM_INLINE float fast_exp(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits hold round(x / log 2)
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' polynomial for |r| <= log(2) / 2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const float y = p * scale;
  return x < -87.0f ? 0.0f : y;
}
FASTCAM_INLINE double fast_exp(double x) { return std::exp(x); }

}  // namespace fastcam
