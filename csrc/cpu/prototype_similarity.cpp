// Cosine similarity of N features with K prototypes: x (B, D, N), p_hat (K, D) or (B, K, D) already of unit length, out
// (B, K, N).
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t TILE = 128;  // pixels that one task handles: a tile of x, of the sums and of their weights stay in L1
constexpr int64_t ROWS = 32;   // features, or prototypes, gathered at a time
constexpr int64_t BLOCK = 4;   // results a register block holds, times two vectors of pixels

template <typename T>
constexpr int64_t padded(T n) {
  return (n + BLOCK - 1) / BLOCK * BLOCK;
}

// a (R, C) -> blocks (ceil(R / BLOCK), C, BLOCK), zeros where R ends.
template <typename T>
std::vector<T> pack_rows(const T* a, int64_t R, int64_t C) {
  std::vector<T> blocks(padded(R) * C);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = 0; c < C; ++c) blocks[(r / BLOCK * C + c) * BLOCK + r % BLOCK] = a[r * C + c];
  return blocks;
}

// a (R, C) -> blocks of its transpose (ceil(C / BLOCK), R, BLOCK).
template <typename T>
std::vector<T> pack_columns(const T* a, int64_t R, int64_t C) {
  std::vector<T> blocks(padded(C) * R);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = 0; c < C; ++c) blocks[(c / BLOCK * R + r) * BLOCK + c % BLOCK] = a[r * C + c];
  return blocks;
}

// sums (BLOCK, TILE) += a (depth, BLOCK) transposed times b (depth, TILE).
template <typename T>
FASTCAM_INLINE void multiply(const T* a, const T* b, T* sums, int64_t depth) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = Vector<T>::size;
  for (int64_t n = 0; n < TILE; n += 2 * W) {
    V s[BLOCK][2];
    for (int i = 0; i < BLOCK; ++i)
      for (int j = 0; j < 2; ++j) s[i][j] = *reinterpret_cast<const V*>(sums + i * TILE + n + j * W);
    for (int64_t d = 0; d < depth; ++d) {
      const V b0 = *reinterpret_cast<const V*>(b + d * TILE + n),
              b1 = *reinterpret_cast<const V*>(b + d * TILE + n + W);
      for (int i = 0; i < BLOCK; ++i) {
        s[i][0] += a[d * BLOCK + i] * b0;
        s[i][1] += a[d * BLOCK + i] * b1;
      }
    }
    for (int i = 0; i < BLOCK; ++i)
      for (int j = 0; j < 2; ++j) *reinterpret_cast<V*>(sums + i * TILE + n + j * W) = s[i][j];
  }
}

// Similarities of the `count` <= TILE pixels from x and out on, whose rows are N apart. `sums` holds padded(K) * TILE
// numbers.
template <typename T>
FASTCAM_INLINE void similarity_tile(const T* x, const T* p_blocks, T* out, T* r, T* sums, int64_t count, int64_t D,
                                    int64_t N, int64_t K, bool relu, T eps) {
  T gathered[ROWS * TILE];
  T squares[TILE] = {};
  std::fill(sums, sums + padded(K) * TILE, T(0));
  std::fill(gathered, gathered + ROWS * TILE, T(0));
  for (int64_t d0 = 0; d0 < D; d0 += ROWS) {
    const int64_t depth = std::min(ROWS, D - d0);
    for (int64_t d = 0; d < depth; ++d) {
      const T* row = x + (d0 + d) * N;
      T* to = gathered + d * TILE;
      for (int64_t n = 0; n < count; ++n) {
        to[n] = row[n];
        squares[n] += row[n] * row[n];
      }
    }
    for (int64_t k = 0; k < K; k += BLOCK) multiply(p_blocks + k * D + d0 * BLOCK, gathered, sums + k * TILE, depth);
  }
  for (int64_t n = 0; n < count; ++n) {
    const T norm = std::sqrt(squares[n]);
    r[n] = 1 / (norm < eps ? eps : norm);
  }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < count; ++n) {
      const T s = sums[k * TILE + n] * r[n];
      out[k * N + n] = relu && s < 0 ? 0 : s;  // NaN stays NaN
    }
}

FASTCAM_MULTIVERSION void similarity_tile_f32(const float* x, const float* p, float* out, float* r, float* sums,
                                              int64_t count, int64_t D, int64_t N, int64_t K, bool relu, float eps) {
  similarity_tile(x, p, out, r, sums, count, D, N, K, relu, eps);
}
FASTCAM_MULTIVERSION void similarity_tile_f64(const double* x, const double* p, double* out, double* r, double* sums,
                                              int64_t count, int64_t D, int64_t N, int64_t K, bool relu, double eps) {
  similarity_tile(x, p, out, r, sums, count, D, N, K, relu, eps);
}

// Gradient of x, and weights = r * (gradient of the similarity before activation), for `count` <= TILE pixels.
// grad_x = sum_k p_hat_k weights_k - x r^2 sum_k grad_k s_k; the last term falls away where eps was the divisor. `tile`
// holds K * TILE numbers.
template <typename T>
FASTCAM_INLINE void gradient_tile(const T* grad, const T* x, const T* p_blocks, const T* out, const T* r, T* grad_x,
                                  T* weights, T* tile, int64_t count, int64_t D, int64_t N, int64_t K, bool relu,
                                  T eps) {
  T radial[TILE] = {};
  std::fill(tile, tile + K * TILE, T(0));
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < count; ++n) {
      const T s = out[k * N + n];
      const T g = relu && !(s > 0) ? 0 : grad[k * N + n];
      tile[k * TILE + n] = weights[k * N + n] = g * r[n];
      radial[n] += g * s;
    }
  for (int64_t n = 0; n < count; ++n) radial[n] = r[n] * eps < T(1 - 1e-6) ? radial[n] * r[n] * r[n] : 0;
  T sums[BLOCK * TILE];
  for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
    std::fill(sums, sums + BLOCK * TILE, T(0));
    multiply(p_blocks + d0 * K, tile, sums, K);
    for (int64_t d = d0; d < std::min(D, d0 + BLOCK); ++d)
      for (int64_t n = 0; n < count; ++n) grad_x[d * N + n] = sums[(d - d0) * TILE + n] - x[d * N + n] * radial[n];
  }
}

FASTCAM_MULTIVERSION void gradient_tile_f32(const float* grad, const float* x, const float* p, const float* out,
                                            const float* r, float* grad_x, float* weights, float* tile, int64_t count,
                                            int64_t D, int64_t N, int64_t K, bool relu, float eps) {
  gradient_tile(grad, x, p, out, r, grad_x, weights, tile, count, D, N, K, relu, eps);
}
FASTCAM_MULTIVERSION void gradient_tile_f64(const double* grad, const double* x, const double* p, const double* out,
                                            const double* r, double* grad_x, double* weights, double* tile,
                                            int64_t count, int64_t D, int64_t N, int64_t K, bool relu, double eps) {
  gradient_tile(grad, x, p, out, r, grad_x, weights, tile, count, D, N, K, relu, eps);
}

// grad_p_hat[k, d] (+)= sum_n weights[k, n] x[d, n] for `rows` <= BLOCK rows of x. One vector of partial sums a pair
// (k, d).
template <typename T>
FASTCAM_INLINE void prototype_gradient(const T* weights, const T* x, T* grad_p_hat, int64_t rows, int64_t D, int64_t N,
                                       int64_t K, bool add) {
  constexpr int64_t W = Vector<T>::size;
  using V = typename Vector<T>::type;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t d = 0; d < rows; ++d) {
      V partial = {};
      const T *w = weights + k * N, *row = x + d * N;
      int64_t n = 0;
      for (; n + W <= N; n += W) partial += *reinterpret_cast<const V*>(w + n) * *reinterpret_cast<const V*>(row + n);
      T sum = 0;
      for (; n < N; ++n) sum += w[n] * row[n];
      for (int64_t i = 0; i < W; ++i) sum += partial[i];
      grad_p_hat[k * D + d] = add ? grad_p_hat[k * D + d] + sum : sum;
    }
}

FASTCAM_MULTIVERSION void prototype_gradient_f32(const float* weights, const float* x, float* grad_p_hat, int64_t rows,
                                                 int64_t D, int64_t N, int64_t K, bool add) {
  prototype_gradient(weights, x, grad_p_hat, rows, D, N, K, add);
}
FASTCAM_MULTIVERSION void prototype_gradient_f64(const double* weights, const double* x, double* grad_p_hat,
                                                 int64_t rows, int64_t D, int64_t N, int64_t K, bool add) {
  prototype_gradient(weights, x, grad_p_hat, rows, D, N, K, add);
}

template <typename T, typename Tile>
void forward(const T* x, const T* p_hat, T* out, T* r, int64_t B, int64_t D, int64_t N, int64_t K, bool p_batched,
             bool relu, T eps, int threads, Tile tile) {
  const int64_t sets = p_batched ? B : 1, tiles = (N + TILE - 1) / TILE;
  std::vector<std::vector<T>> blocks;
  for (int64_t i = 0; i < sets; ++i) blocks.push_back(pack_rows(p_hat + i * K * D, K, D));
  parallel_for(B * tiles, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(padded(K) * TILE);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, n = i % tiles * TILE;
      tile(x + b * D * N + n, blocks[p_batched ? b : 0].data(), out + b * K * N + n, r + b * N + n, sums.data(),
           std::min(TILE, N - n), D, N, K, relu, eps);
    }
  });
}

template <typename T, typename Tile, typename Reduce>
void backward(const T* grad, const T* x, const T* p_hat, const T* out, const T* r, T* grad_x, T* weights, T* grad_p_hat,
              int64_t B, int64_t D, int64_t N, int64_t K, bool p_batched, bool relu, T eps, int threads, Tile tile,
              Reduce reduce) {
  const int64_t sets = p_batched ? B : 1, tiles = (N + TILE - 1) / TILE;
  std::vector<std::vector<T>> blocks;
  for (int64_t i = 0; i < sets; ++i) blocks.push_back(pack_columns(p_hat + i * K * D, K, D));
  parallel_for(B * tiles, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> weights_tile(K * TILE);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, n = i % tiles * TILE, wide = b * D * N + n, narrow = b * K * N + n;
      tile(grad + narrow, x + wide, blocks[p_batched ? b : 0].data(), out + narrow, r + b * N + n, grad_x + wide,
           weights + narrow, weights_tile.data(), std::min(TILE, N - n), D, N, K, relu, eps);
    }
  });
  std::fill(grad_p_hat, grad_p_hat + sets * K * D, T(0));
  parallel_for(D, BLOCK, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < B; ++b)
      reduce(weights + b * K * N, x + (b * D + begin) * N, grad_p_hat + (p_batched ? b * K * D : 0) + begin,
             end - begin, D, N, K, !p_batched && b > 0);
  });
}

}  // namespace

void prototype_similarity_fwd(const void* x, const void* p_hat, void* out, void* r, bool f64, int64_t B, int64_t D,
                              int64_t N, int64_t K, bool p_batched, bool relu, double eps, int threads) {
  if (f64) {
    forward(static_cast<const double*>(x), static_cast<const double*>(p_hat), static_cast<double*>(out),
            static_cast<double*>(r), B, D, N, K, p_batched, relu, eps, threads, similarity_tile_f64);
  } else {
    forward(static_cast<const float*>(x), static_cast<const float*>(p_hat), static_cast<float*>(out),
            static_cast<float*>(r), B, D, N, K, p_batched, relu, static_cast<float>(eps), threads, similarity_tile_f32);
  }
}

void prototype_similarity_bwd(const void* grad, const void* x, const void* p_hat, const void* out, const void* r,
                              void* grad_x, void* weights, void* grad_p_hat, bool f64, int64_t B, int64_t D, int64_t N,
                              int64_t K, bool p_batched, bool relu, double eps, int threads) {
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(x), static_cast<const double*>(p_hat),
             static_cast<const double*>(out), static_cast<const double*>(r), static_cast<double*>(grad_x),
             static_cast<double*>(weights), static_cast<double*>(grad_p_hat), B, D, N, K, p_batched, relu, eps, threads,
             gradient_tile_f64, prototype_gradient_f64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<const float*>(p_hat),
             static_cast<const float*>(out), static_cast<const float*>(r), static_cast<float*>(grad_x),
             static_cast<float*>(weights), static_cast<float*>(grad_p_hat), B, D, N, K, p_batched, relu,
             static_cast<float>(eps), threads, gradient_tile_f32, prototype_gradient_f32);
  }
}

}  // namespace fastcam
