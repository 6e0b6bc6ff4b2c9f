// Weighted sums of features x (B, D, N) over regions w (B, K, N): out (B, K, D).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t GRAIN = 48;  // rows of features that a task sums

enum Divisor { BY_NOTHING, BY_SUM, BY_AREA, BY_SOFTMAX };  // the order of NAMES in fastcam/native/region_pool.py

// Sum of f(n) over n < N in a fixed order.
template <typename T, typename F>
FASTCAM_INLINE T sum(int64_t N, F f) {
  constexpr int64_t W = Vector<T>::size;
  T parts[W] = {};
  int64_t n = 0;
  for (; n + W <= N; n += W)
    for (int64_t i = 0; i < W; ++i) parts[i] += f(n + i);
  for (int64_t i = 0; i < N - n; ++i) parts[i] += f(n + i);
  T total = 0;
  for (int64_t i = 0; i < W; ++i) total += parts[i];
  return total;
}

template <typename T>
FASTCAM_INLINE T largest(const T* w, int64_t N) {
  constexpr int64_t W = Vector<T>::size;
  T parts[W];
  std::fill(parts, parts + W, -std::numeric_limits<T>::infinity());
  int64_t n = 0;
  for (; n + W <= N; n += W)
    for (int64_t i = 0; i < W; ++i) parts[i] = parts[i] < w[n + i] ? w[n + i] : parts[i];
  for (int64_t i = 0; i < N - n; ++i) parts[i] = std::max(parts[i], w[n + i]);
  return *std::max_element(parts, parts + W);
}

// What the weights w (N) of one region are divided by, and `stat`, which the backward wants to know: for a softmax
// m = exp(w - largest) and the logarithm of the divisor; else the reciprocal.
template <typename T>
FASTCAM_INLINE T divide(const T* w, T* m, T* stat, int64_t N, int divisor, T eps) {
  if (divisor == BY_SOFTMAX) {
    const T top = largest(w, N);
    for (int64_t n = 0; n < N; ++n) m[n] = fast_exp(w[n] - top);
    const T total = sum<T>(N, [&](int64_t n) __attribute__((always_inline)) { return m[n]; });
    *stat = top + std::log(total);
    return 1 / total;
  }
  *stat = 1;
  if (divisor == BY_AREA) *stat = T(1) / std::max<int64_t>(N, 1);
  if (divisor == BY_SUM) {
    *stat = 1 / (sum<T>(N, [&](int64_t n) __attribute__((always_inline)) { return w[n]; }) + eps);
  }
  return *stat;
}
FASTCAM_MULTIVERSION float divide_f32(const float* w, float* m, float* stat, int64_t N, int divisor, float eps) {
  return divide(w, m, stat, N, divisor, eps);
}
FASTCAM_MULTIVERSION double divide_f64(const double* w, double* m, double* stat, int64_t N, int divisor, double eps) {
  return divide(w, m, stat, N, divisor, eps);
}

// The weights that features are multiplied by, m (K, count), of w, whose rows are N apart.
template <typename T>
FASTCAM_INLINE void weigh(const T* w, const T* stat, T* m, int64_t K, int64_t count, int64_t N, bool softmax) {
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < count; ++n)
      m[k * count + n] = softmax ? fast_exp(w[k * N + n] - stat[k]) : w[k * N + n] * stat[k];
}
FASTCAM_MULTIVERSION void weigh_f32(const float* w, const float* stat, float* m, int64_t K, int64_t count, int64_t N,
                                    bool softmax) {
  weigh(w, stat, m, K, count, N, softmax);
}
FASTCAM_MULTIVERSION void weigh_f64(const double* w, const double* stat, double* m, int64_t K, int64_t count, int64_t N,
                                    bool softmax) {
  weigh(w, stat, m, K, count, N, softmax);
}

template <typename T, typename Divide>
void forward(const T* x, const T* w, T* out, T* stat, int64_t B, int64_t D, int64_t N, int64_t K, int divisor, T eps,
             int threads, Divide divide) {
  const bool softmax = divisor == BY_SOFTMAX;
  const auto m = uninitialized<T>(softmax ? B * K * N : 0);
  std::vector<T> factor(B * K);
  parallel_for(B * K, 1, B * K * N < SMALL ? 1 : threads, [&](int64_t i, int64_t) {
    factor[i] = divide(w + i * N, softmax ? m.get() + i * N : nullptr, stat + i, N, divisor, eps);
  });
  const T* weights = softmax ? m.get() : w;
  const int64_t parts = (D + GRAIN - 1) / GRAIN;
  parallel_for(B * parts, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / parts, d = i % parts * GRAIN, count = std::min(GRAIN, D - d);
    T* to = out + b * K * D + d;
    for (int64_t k = 0; k < K; ++k) std::fill(to + k * D, to + k * D + count, T(0));
    multiply_rows(weights + b * K * N, N, x + (b * D + d) * N, N, to, D, K, count, N);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < count; ++j) to[k * D + j] *= factor[b * K + k];
  });
}

template <typename T, typename Weigh>
void backward(const T* grad, const T* x, const T* w, const T* out, const T* stat, T* grad_x, T* grad_w, int64_t B,
              int64_t D, int64_t N, int64_t K, int divisor, int threads, Weigh weigh) {
  const bool softmax = divisor == BY_SOFTMAX;
  const int64_t tiles = (N + TILE<T> - 1) / TILE<T>;
  std::vector<Blocks<T>> regions, features;
  std::vector<T> along(B * K);  // g . out, which the divisor's gradient takes away
  for (int64_t b = 0; b < B; ++b) {
    const T* g = grad + b * K * D;
    regions.emplace_back(K, D, threads, [&](int64_t k, int64_t d) { return g[k * D + d]; });
    features.emplace_back(D, K, threads, [&](int64_t d, int64_t k) { return g[k * D + d]; });
    if (softmax || divisor == BY_SUM)
      for (int64_t k = 0; k < K; ++k)
        multiply_rows(g + k * D, D, out + (b * K + k) * D, D, &along[b * K + k], 1, 1, 1, D);
  }
  const int64_t count = panels<T>(N) * K * PANEL<T>;
  const auto weights = uninitialized<T>(B * count);  // what features are multiplied by, in panels
  parallel_for(B * tiles, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / tiles, n = i % tiles * TILE<T>, columns = std::min(TILE<T>, N - n);
    const Blocks<T>& a = regions[b];
    const auto m = uninitialized<T>(K * columns), packed = uninitialized<T>(DEPTH * TILE<T>);
    const auto sums = uninitialized<T>(a.padded() * TILE<T>);
    weigh(w + b * K * N + n, stat + b * K, m.get(), K, columns, N, softmax);
    pack_tile(m.get(), columns, K, columns, weights.get() + b * count + n * K);
    a.multiply_tile(x + b * D * N + n, N, columns, packed.get(), sums.get(), nullptr);
    for (int64_t k = 0; k < K; ++k) {
      T* to = grad_w + (b * K + k) * N + n;
      const T minus = along[b * K + k], factor = stat[b * K + k];
      for (int64_t j = 0; j < columns; ++j)
        to[j] = (sums[k * TILE<T> + j] - minus) * (softmax ? m[k * columns + j] : factor);
    }
  });
  const int64_t height = block_height(D), parts = (D + height - 1) / height;
  parallel_for(B * parts, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / parts, d = i % parts * height;
    features[b].multiply_row(d, weights.get() + b * count, grad_x + (b * D + d) * N, N, N);
  });
}

}  // namespace

void region_pool_fwd(const void* x, const void* w, void* out, void* stat, bool f64, int64_t B, int64_t D, int64_t N,
                     int64_t K, int divisor, double eps, int threads) {
  if (f64) {
    forward(static_cast<const double*>(x), static_cast<const double*>(w), static_cast<double*>(out),
            static_cast<double*>(stat), B, D, N, K, divisor, eps, threads, divide_f64);
  } else {
    forward(static_cast<const float*>(x), static_cast<const float*>(w), static_cast<float*>(out),
            static_cast<float*>(stat), B, D, N, K, divisor, static_cast<float>(eps), threads, divide_f32);
  }
}

void region_pool_bwd(const void* grad, const void* x, const void* w, const void* out, const void* stat, void* grad_x,
                     void* grad_w, bool f64, int64_t B, int64_t D, int64_t N, int64_t K, int divisor, int threads) {
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(x), static_cast<const double*>(w),
             static_cast<const double*>(out), static_cast<const double*>(stat), static_cast<double*>(grad_x),
             static_cast<double*>(grad_w), B, D, N, K, divisor, threads, weigh_f64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<const float*>(w),
             static_cast<const float*>(out), static_cast<const float*>(stat), static_cast<float*>(grad_x),
             static_cast<float*>(grad_w), B, D, N, K, divisor, threads, weigh_f32);
  }
}

}  // namespace fastcam
