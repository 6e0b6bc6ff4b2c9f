// Cosine similarity of N features with K prototypes: x (B, D, N), p (K, D) or (B, K, D), out (B, K, N).
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

// Prototypes (K, D) of length 1, or shorter where they are shorter than eps.
template <typename T>
struct Unit {
  std::vector<T> p_hat, norm;

  Unit(const T* p, int64_t K, int64_t D, T eps, int threads) : p_hat(K * D), norm(K) {
    parallel_for(K, 1, K * D < SMALL ? 1 : threads, [&](int64_t k, int64_t) {
      T squares = 0;
      multiply_rows(p + k * D, D, p + k * D, D, &squares, 1, 1, 1, D);
      norm[k] = std::sqrt(squares);
      const T divisor = norm[k] < eps ? eps : norm[k];
      for (int64_t d = 0; d < D; ++d) p_hat[k * D + d] = p[k * D + d] / divisor;
    });
  }
};

// sums (K, TILE) and squares (TILE) of `count` pixels -> similarities out (K, N) and r.
template <typename T>
FASTCAM_INLINE void finish(const T* sums, const T* squares, T* out, T* r, int64_t count, int64_t N, int64_t K,
                           bool relu, T eps) {
  for (int64_t n = 0; n < count; ++n) {
    const T norm = std::sqrt(squares[n]);
    r[n] = 1 / (norm < eps ? eps : norm);
  }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < count; ++n) {
      const T s = sums[k * TILE<T> + n] * r[n];
      out[k * N + n] = relu && s < 0 ? 0 : s;  // NaN stays NaN
    }
}
FASTCAM_MULTIVERSION void finish_f32(const float* sums, const float* squares, float* out, float* r, int64_t count,
                                     int64_t N, int64_t K, bool relu, float eps) {
  finish(sums, squares, out, r, count, N, K, relu, eps);
}
FASTCAM_MULTIVERSION void finish_f64(const double* sums, const double* squares, double* out, double* r, int64_t count,
                                     int64_t N, int64_t K, bool relu, double eps) {
  finish(sums, squares, out, r, count, N, K, relu, eps);
}

// For `count` pixels: weights = r * (gradient of the similarity before activation), and the factor of x in its own
// gradient, radial = r^2 sum_k grad_k s_k, 0 where eps was the divisor.
template <typename T>
FASTCAM_INLINE void weigh(const T* grad, const T* out, const T* r, T* weights, T* radial, int64_t count, int64_t N,
                          int64_t K, bool relu, T eps) {
  std::fill(radial, radial + count, T(0));
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < count; ++n) {
      const T s = out[k * N + n];
      const T g = relu && !(s > 0) ? 0 : grad[k * N + n];
      weights[k * N + n] = g * r[n];
      radial[n] += g * s;
    }
  for (int64_t n = 0; n < count; ++n) radial[n] = r[n] * eps < T(1 - 1e-6) ? radial[n] * r[n] * r[n] : 0;
}
FASTCAM_MULTIVERSION void weigh_f32(const float* grad, const float* out, const float* r, float* weights, float* radial,
                                    int64_t count, int64_t N, int64_t K, bool relu, float eps) {
  weigh(grad, out, r, weights, radial, count, N, K, relu, eps);
}
FASTCAM_MULTIVERSION void weigh_f64(const double* grad, const double* out, const double* r, double* weights,
                                    double* radial, int64_t count, int64_t N, int64_t K, bool relu, double eps) {
  weigh(grad, out, r, weights, radial, count, N, K, relu, eps);
}

// grad_x (rows, N) -= x radial.
template <typename T>
FASTCAM_INLINE void subtract(const T* x, const T* radial, T* grad_x, int64_t rows, int64_t N) {
  for (int64_t d = 0; d < rows; ++d)
    for (int64_t n = 0; n < N; ++n) grad_x[d * N + n] -= x[d * N + n] * radial[n];
}
FASTCAM_MULTIVERSION void subtract_f32(const float* x, const float* radial, float* grad_x, int64_t rows, int64_t N) {
  subtract(x, radial, grad_x, rows, N);
}
FASTCAM_MULTIVERSION void subtract_f64(const double* x, const double* radial, double* grad_x, int64_t rows, int64_t N) {
  subtract(x, radial, grad_x, rows, N);
}

template <typename T, typename Finish>
void forward(const T* x, const T* p, T* out, T* r, int64_t B, int64_t D, int64_t N, int64_t K, bool p_batched,
             bool relu, T eps, int threads, Finish finish) {
  const int64_t sets = p_batched ? B : 1, tiles = (N + TILE<T> - 1) / TILE<T>;
  std::vector<Blocks<T>> blocks;
  for (int64_t i = 0; i < sets; ++i) {
    const Unit<T> unit(p + i * K * D, K, D, eps, threads);
    blocks.emplace_back(K, D, threads, [&](int64_t k, int64_t d) { return unit.p_hat[k * D + d]; });
  }
  parallel_for(B * tiles, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / tiles, n = i % tiles * TILE<T>, count = std::min(TILE<T>, N - n);
    const Blocks<T>& a = blocks[p_batched ? b : 0];
    const auto packed = uninitialized<T>(DEPTH * TILE<T>), sums = uninitialized<T>(a.padded() * TILE<T>);
    T squares[TILE<T>];
    a.multiply_tile(x + b * D * N + n, N, count, packed.get(), sums.get(), squares);
    finish(sums.get(), squares, out + b * K * N + n, r + b * N + n, count, N, K, relu, eps);
  });
}

template <typename T, typename Weigh, typename Subtract>
void backward(const T* grad, const T* x, const T* p, const T* out, const T* r, T* grad_x, T* weights, T* grad_p,
              int64_t B, int64_t D, int64_t N, int64_t K, bool p_batched, bool relu, T eps, int threads, Weigh weigh,
              Subtract subtract) {
  const int64_t sets = p_batched ? B : 1, tiles = (N + TILE<T> - 1) / TILE<T>;
  std::vector<Unit<T>> units;
  std::vector<Blocks<T>> blocks;
  for (int64_t i = 0; i < sets; ++i) {
    units.emplace_back(p + i * K * D, K, D, eps, threads);
    blocks.emplace_back(D, K, threads, [&](int64_t d, int64_t k) { return units[i].p_hat[k * D + d]; });
  }
  const int64_t count = panels<T>(N) * K * PANEL<T>;
  const auto packed = uninitialized<T>(B * count), radial = uninitialized<T>(B * N);
  parallel_for(B * tiles, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / tiles, n = i % tiles * TILE<T>, columns = std::min(TILE<T>, N - n), at = b * K * N + n;
    weigh(grad + at, out + at, r + b * N + n, weights + at, radial.get() + b * N + n, columns, N, K, relu, eps);
    pack_tile(weights + at, N, K, columns, packed.get() + b * count + n * K);
  });
  // Gradients of whole rows of x, and of the unit prototypes, in whose place grad_p then comes.
  std::fill(grad_p, grad_p + sets * K * D, T(0));
  const int64_t height = block_height(D);
  parallel_for(D, 4 * height, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t d = begin; d < end; d += height) {
        const int64_t row = (b * D + d) * N;
        blocks[p_batched ? b : 0].multiply_row(d, packed.get() + b * count, grad_x + row, N, N);
        subtract(x + row, radial.get() + b * N, grad_x + row, std::min(height, end - d), N);
      }
      multiply_rows(weights + b * K * N, N, x + (b * D + begin) * N, N, grad_p + (p_batched ? b * K * D : 0) + begin, D,
                    K, end - begin, N);
    }
  });
  for (int64_t i = 0; i < sets; ++i)
    for (int64_t k = 0; k < K; ++k) {
      T* g = grad_p + (i * K + k) * D;
      const T *p_hat = units[i].p_hat.data() + k * D, norm = units[i].norm[k];
      T along = 0;
      multiply_rows(g, D, p_hat, D, &along, 1, 1, 1, D);
      const T radial = norm > eps ? along : 0, divisor = norm < eps ? eps : norm;
      for (int64_t d = 0; d < D; ++d) g[d] = (g[d] - radial * p_hat[d]) / divisor;
    }
}

}  // namespace

void prototype_similarity_fwd(const void* x, const void* p, void* out, void* r, bool f64, int64_t B, int64_t D,
                              int64_t N, int64_t K, bool p_batched, bool relu, double eps, int threads) {
  if (f64) {
    forward(static_cast<const double*>(x), static_cast<const double*>(p), static_cast<double*>(out),
            static_cast<double*>(r), B, D, N, K, p_batched, relu, eps, threads, finish_f64);
  } else {
    forward(static_cast<const float*>(x), static_cast<const float*>(p), static_cast<float*>(out),
            static_cast<float*>(r), B, D, N, K, p_batched, relu, static_cast<float>(eps), threads, finish_f32);
  }
}

void prototype_similarity_bwd(const void* grad, const void* x, const void* p, const void* out, const void* r,
                              void* grad_x, void* weights, void* grad_p, bool f64, int64_t B, int64_t D, int64_t N,
                              int64_t K, bool p_batched, bool relu, double eps, int threads) {
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(x), static_cast<const double*>(p),
             static_cast<const double*>(out), static_cast<const double*>(r), static_cast<double*>(grad_x),
             static_cast<double*>(weights), static_cast<double*>(grad_p), B, D, N, K, p_batched, relu, eps, threads,
             weigh_f64, subtract_f64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<const float*>(p),
             static_cast<const float*>(out), static_cast<const float*>(r), static_cast<float*>(grad_x),
             static_cast<float*>(weights), static_cast<float*>(grad_p), B, D, N, K, p_batched, relu,
             static_cast<float>(eps), threads, weigh_f32, subtract_f32);
  }
}

}  // namespace fastcam
