// Vectors of numbers, rows of them, and an exponential that compilers turn into vector code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

struct Sum {
  template <typename V>
  static FASTCAM_INLINE void combine(V& a, const V& b) {
    a += b;
  }
};

struct Maximum {
  template <typename V>
  static FASTCAM_INLINE void combine(V& a, const V& b) {
    a = b > a ? b : a;
  }
};

// All W numbers of a vector, combined two halves at a time.
template <typename Combine, typename T, int W>
FASTCAM_INLINE T across(const T* v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    constexpr int HALF = W / 2;
    typename Lanes<T, HALF>::type half = lanes<T, HALF>(v);
    Combine::combine(half, lanes<T, HALF>(v + HALF));
    return across<Combine, T, HALF>(reinterpret_cast<const T*>(&half));
  }
}

// How many numbers a row of n values takes: 1, 2, or a multiple of 4.
inline int64_t row_width(int64_t n) { return n <= 2 ? n : (n + 3) / 4 * 4; }

// A piece of a row in registers: R vectors of W numbers and, unless 0, one of Tail.
template <typename T, int W, int R, int Tail>
struct Row {
  typedef T Number;
  static constexpr int LAST = Tail > 0 ? Tail : 1;
  typename Lanes<T, W>::type body[R];
  typename Lanes<T, LAST>::type tail;

  static FASTCAM_INLINE Row zero() {
    Row row = {};
    return row;
  }
  static FASTCAM_INLINE Row load(const T* p) {
    Row row = {};
    for (int r = 0; r < R; ++r) row.body[r] = lanes<T, W>(p + r * W);
    if constexpr (Tail > 0) row.tail = lanes<T, LAST>(p + R * W);
    return row;
  }
  FASTCAM_INLINE void store(T* p) const {
    for (int r = 0; r < R; ++r) lanes<T, W>(p + r * W) = body[r];
    if constexpr (Tail > 0) lanes<T, LAST>(p + R * W) = tail;
  }
  FASTCAM_INLINE Row operator+(const Row& other) const {
    Row row = {};
    for (int r = 0; r < R; ++r) row.body[r] = body[r] + other.body[r];
    if constexpr (Tail > 0) row.tail = tail + other.tail;
    return row;
  }
  FASTCAM_INLINE Row operator*(const Row& other) const {
    Row row = {};
    for (int r = 0; r < R; ++r) row.body[r] = body[r] * other.body[r];
    if constexpr (Tail > 0) row.tail = tail * other.tail;
    return row;
  }
  FASTCAM_INLINE Row operator+(T number) const {
    Row row = {};
    for (int r = 0; r < R; ++r) row.body[r] = body[r] + number;
    if constexpr (Tail > 0) row.tail = tail + number;
    return row;
  }
  // All numbers of the row, combined.
  template <typename Combine>
  FASTCAM_INLINE T reduce() const {
    auto vector = body[0];
    for (int r = 1; r < R; ++r) Combine::combine(vector, body[r]);
    T result = across<Combine, T, W>(reinterpret_cast<const T*>(&vector));
    if constexpr (Tail > 0) Combine::combine(result, across<Combine, T, LAST>(reinterpret_cast<const T*>(&tail)));
    return result;
  }
  FASTCAM_INLINE Row operator*(T factor) const {
    Row row = {};
    for (int r = 0; r < R; ++r) row.body[r] = body[r] * factor;
    if constexpr (Tail > 0) row.tail = tail * factor;
    return row;
  }
};

// Op<Row>::run(c, args...) for the pieces, each from column c on, that make up a row.
template <template <typename> class Op, typename T, typename... Args>
FASTCAM_INLINE void each_piece(int64_t width, Args... args) {
  if (width == 1) return Op<Row<T, 1, 1, 0>>::run(0, args...);
  if (width == 2) return Op<Row<T, 2, 1, 0>>::run(0, args...);
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) Op<Row<T, 16, 2, 0>>::run(c, args...);
  if (width - c == 28) Op<Row<T, 8, 3, 4>>::run(c, args...);
  if (width - c == 24) Op<Row<T, 16, 1, 8>>::run(c, args...);
  if (width - c == 20) Op<Row<T, 16, 1, 4>>::run(c, args...);
  if (width - c == 16) Op<Row<T, 16, 1, 0>>::run(c, args...);
  if (width - c == 12) Op<Row<T, 8, 1, 4>>::run(c, args...);
  if (width - c == 8) Op<Row<T, 8, 1, 0>>::run(c, args...);
  if (width - c == 4) Op<Row<T, 4, 1, 0>>::run(c, args...);
}

template <typename Row>
struct ScaledRows {  // out[i] = scale[i] * rows[i]; out may be rows
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const T* rows, const T* scale, T* out, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) (Row::load(rows + i * width + c) * scale[i]).store(out + i * width + c);
  }
};

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
