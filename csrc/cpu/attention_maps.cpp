// Attention q (B, H, N, d), k and v (B, H, M, d), and the mean of its weights over the heads, summed into maps.
//
// A task holds the weights of PANEL queries with all keys, queries along the vectors: (M, PANEL). Written so, they are
// the right factor of the next product as they stand, the softmax goes along columns, and nothing of size N M leaves
// the cache but the maps.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t HEIGHT = MAX_HEIGHT;

// to[j, i] = factor from[i, j] for i < 8 and j < 8. Compilers make no shuffles of the plain loops.
template <typename T>
FASTCAM_INLINE void transpose_block(const T* from, int64_t ld_from, T factor, T* to, int64_t ld_to) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTCAM_SHUFFLE
#endif
#endif
#ifdef FASTCAM_SHUFFLE
  typename Lanes<T, 8>::type a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = factor * lanes<T, 8>(from + i * ld_from);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    lanes<T, 8>(to + i * ld_to) = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    lanes<T, 8>(to + (i + 4) * ld_to) = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  for (int64_t j = 0; j < 8; ++j)
    for (int64_t i = 0; i < 8; ++i) to[j * ld_to + i] = factor * from[i * ld_from + j];
#endif
}

// to[j, i] = factor from[i, j] for i < rows and j < columns.
template <typename T>
FASTCAM_INLINE void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t columns, T factor, T* to,
                              int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < columns; j += 8) {
      const T* a = from + i * ld_from + j;
      T* b = to + j * ld_to + i;
      if (rows - i >= 8 && columns - j >= 8) {
        transpose_block(a, ld_from, factor, b, ld_to);
      } else {
        for (int64_t y = 0; y < std::min<int64_t>(8, columns - j); ++y)
          for (int64_t x = 0; x < std::min<int64_t>(8, rows - i); ++x) b[y * ld_to + x] = factor * a[x * ld_from + y];
      }
    }
}
FASTCAM_MULTIVERSION void transpose_f32(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float factor,
                                        float* to, int64_t ld_to) {
  transpose(from, ld_from, rows, columns, factor, to, ld_to);
}
FASTCAM_MULTIVERSION void transpose_f64(const double* from, int64_t ld_from, int64_t rows, int64_t columns,
                                        double factor, double* to, int64_t ld_to) {
  transpose(from, ld_from, rows, columns, factor, to, ld_to);
}

// s (M, PANEL): scores -> exponentials; sum and log-sum-exp of every column.
template <typename T>
FASTCAM_INLINE void exponentials(T* s, int64_t M, T* sum, T* lse) {
  constexpr int64_t P = PANEL<T>;
  T high[P], total[P];
  std::fill(high, high + P, -std::numeric_limits<T>::infinity());
  std::fill(total, total + P, T(0));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < P; ++n) high[n] = s[m * P + n] > high[n] ? s[m * P + n] : high[n];
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < P; ++n) {
      const T e = fast_exp(s[m * P + n] - high[n]);
      s[m * P + n] = e;
      total[n] += e;
    }
  for (int64_t n = 0; n < P; ++n) {
    sum[n] = total[n];
    lse[n] = high[n] + std::log(total[n]);
  }
}
FASTCAM_MULTIVERSION void exponentials_f32(float* s, int64_t M, float* sum, float* lse) {
  exponentials(s, M, sum, lse);
}
FASTCAM_MULTIVERSION void exponentials_f64(double* s, int64_t M, double* sum, double* lse) {
  exponentials(s, M, sum, lse);
}

// mean (M, PANEL) += e / (heads sum).
template <typename T>
FASTCAM_INLINE void add_mean(const T* e, const T* sum, T heads, T* mean, int64_t M) {
  constexpr int64_t P = PANEL<T>;
  T share[P];
  for (int64_t n = 0; n < P; ++n) share[n] = 1 / (heads * sum[n]);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < P; ++n) mean[m * P + n] += e[m * P + n] * share[n];
}
FASTCAM_MULTIVERSION void add_mean_f32(const float* e, const float* sum, float heads, float* mean, int64_t M) {
  add_mean(e, sum, heads, mean, M);
}
FASTCAM_MULTIVERSION void add_mean_f64(const double* e, const double* sum, double heads, double* mean, int64_t M) {
  add_mean(e, sum, heads, mean, M);
}

// Scores s and gradient w of the weights, (M, PANEL) both -> weights and gradient of the products of q and k. `maps`
// (M - skip, stride) or null: what the maps add to w in `columns` columns, times `share`.
template <typename T>
FASTCAM_INLINE void softmax_gradient(T* s, T* w, const T* lse, const T* maps, int64_t stride, int64_t columns, T share,
                                     T scale, int64_t skip, int64_t M) {
  constexpr int64_t P = PANEL<T>;
  T inner[P];
  std::fill(inner, inner + P, T(0));
  for (int64_t m = 0; m < M; ++m) {
    if (maps && m >= skip)
      for (int64_t n = 0; n < columns; ++n) w[m * P + n] += share * maps[(m - skip) * stride + n];
    for (int64_t n = 0; n < P; ++n) {
      const T a = fast_exp(s[m * P + n] - lse[n]);
      s[m * P + n] = a;
      inner[n] += a * w[m * P + n];
    }
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < P; ++n) w[m * P + n] = s[m * P + n] * (w[m * P + n] - inner[n]) * scale;
}
FASTCAM_MULTIVERSION void softmax_gradient_f32(float* s, float* w, const float* lse, const float* maps, int64_t stride,
                                               int64_t columns, float share, float scale, int64_t skip, int64_t M) {
  softmax_gradient(s, w, lse, maps, stride, columns, share, scale, skip, M);
}
FASTCAM_MULTIVERSION void softmax_gradient_f64(double* s, double* w, const double* lse, const double* maps,
                                               int64_t stride, int64_t columns, double share, double scale,
                                               int64_t skip, int64_t M) {
  softmax_gradient(s, w, lse, maps, stride, columns, share, scale, skip, M);
}

template <typename T>
struct Loops;
template <>
struct Loops<float> {
  static constexpr auto transpose = transpose_f32;
  static constexpr auto exponentials = exponentials_f32;
  static constexpr auto add_mean = add_mean_f32;
  static constexpr auto softmax_gradient = softmax_gradient_f32;
};
template <>
struct Loops<double> {
  static constexpr auto transpose = transpose_f64;
  static constexpr auto exponentials = exponentials_f64;
  static constexpr auto add_mean = add_mean_f64;
  static constexpr auto softmax_gradient = softmax_gradient_f64;
};

// An input (B, H, rows, d): from one image, head and row to the next.
template <typename T>
struct Rows {
  const T* data;
  const int64_t* strides;

  const T* operator()(int64_t b, int64_t h, int64_t row) const {
    return data + b * strides[0] + h * strides[1] + row * strides[2];
  }
  int64_t stride() const { return strides[2]; }
};

// rows (M, d) -> blocks (ceil(M / HEIGHT), d, HEIGHT), the left factor of multiply_panel.
template <typename T>
void pack_rows(const T* rows, int64_t stride, int64_t M, int64_t d, T* to) {
  for (int64_t m = 0; m < M; m += HEIGHT, to += HEIGHT * d)
    Loops<T>::transpose(rows + m * stride, stride, std::min(HEIGHT, M - m), d, T(1), to, HEIGHT);
}

// rows (M, d), `stride` apart -> side by side. Heads interleaved in memory are a page apart for every row.
template <typename T>
void copy_rows(const T* rows, int64_t stride, int64_t M, int64_t d, T* to) {
  for (int64_t m = 0; m < M; ++m) std::copy_n(rows + m * stride, d, to + m * d);
}

// c (M, PANEL) = packed rows (M, d) times b (d, PANEL).
template <typename T>
void multiply_packed(const T* packed, const T* b, T* c, int64_t M, int64_t d) {
  constexpr int64_t P = PANEL<T>;
  std::fill(c, c + M * P, T(0));
  for (int64_t m = 0; m < M; m += HEIGHT)
    multiply_panel(packed + m * d, HEIGHT, b, c + m * P, P, std::min(HEIGHT, M - m), d);
}

// c (d, PANEL) = rows (M, d), transposed, times b (M, PANEL).
template <typename T>
void multiply_transposed(const T* rows, const T* b, T* c, int64_t M, int64_t d) {
  constexpr int64_t P = PANEL<T>;
  std::fill(c, c + d * P, T(0));
  for (int64_t m = 0; m < M; m += DEPTH)
    for (int64_t i = 0; i < d; i += HEIGHT)
      multiply_panel(rows + m * d + i, d, b + m * P, c + i * P, P, std::min(HEIGHT, d - i), std::min(DEPTH, M - m));
}

template <typename T>
void forward(Rows<T> q, Rows<T> k, Rows<T> v, const T* total, T* out, T* maps, T* lse, int64_t B, int64_t H, int64_t N,
             int64_t M, int64_t d, int64_t rows, int64_t skip, T scale, int threads) {
  constexpr int64_t P = PANEL<T>;
  const int64_t tiles = (N + P - 1) / P, head = (M + HEIGHT - 1) / HEIGHT * HEIGHT * d, columns = M - skip;
  if (B * H * N * M * d < SMALL) threads = 1;
  const auto keys = buffer<T>(B * H * head), values = buffer<T>(B * H * M * d);
  parallel_for(B * H, 1, threads, [&](int64_t i, int64_t) {
    pack_rows(k(i / H, i % H, 0), k.stride(), M, d, keys.get() + i * head);
    copy_rows(v(i / H, i % H, 0), v.stride(), M, d, values.get() + i * M * d);
  });
  parallel_for(B * tiles, 1, threads, [&](int64_t task, int64_t) {
    const int64_t b = task / tiles, n = task % tiles * P, count = std::min(P, N - n);
    const int64_t mapped = std::clamp<int64_t>(rows - n, 0, count);
    const auto s = uninitialized<T>(M * P), mean = uninitialized<T>(mapped ? M * P : 0);
    const auto left = uninitialized<T>(d * P), product = uninitialized<T>(d * P);
    T sum[P], logs[P];
    if (mapped) std::fill(mean.get(), mean.get() + M * P, T(0));
    std::fill(left.get(), left.get() + d * P, T(0));
    for (int64_t h = 0; h < H; ++h) {
      const int64_t row = (b * H + h) * N + n;
      Loops<T>::transpose(q(b, h, n), q.stride(), count, d, scale, left.get(), P);
      multiply_packed(keys.get() + (b * H + h) * head, left.get(), s.get(), M, d);
      Loops<T>::exponentials(s.get(), M, sum, logs);
      std::copy(logs, logs + count, lse + row);
      if (mapped) Loops<T>::add_mean(s.get() + skip * P, sum, T(H), mean.get() + skip * P, columns);
      multiply_transposed(values.get() + (b * H + h) * M * d, s.get(), product.get(), M, d);
      for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < P; ++j) product[i * P + j] /= sum[j];
      Loops<T>::transpose(product.get(), P, d, count, T(1), out + row * d, d);
    }
    T* to = maps + (b * rows + n) * columns;
    if (mapped) Loops<T>::transpose(mean.get() + skip * P, P, columns, mapped, T(1), to, columns);
    if (total)
      for (int64_t i = 0; i < mapped * columns; ++i) to[i] += total[(b * rows + n) * columns + i];
  });
}

// grad_maps (B, rows, M - skip) or null.
template <typename T>
void backward(Rows<T> grad, const T* grad_maps, Rows<T> q, Rows<T> k, Rows<T> v, const T* lse, T* grad_q, T* grad_k,
              T* grad_v, int64_t B, int64_t H, int64_t N, int64_t M, int64_t d, int64_t rows, int64_t skip, T scale,
              int threads) {
  constexpr int64_t P = PANEL<T>;
  const int64_t head = (M + HEIGHT - 1) / HEIGHT * HEIGHT * d, panels = (M + P - 1) / P, width = panels * P;
  if (B * H * N * M * d < SMALL) threads = 1;
  const int64_t columns = M - skip, area = grad_maps ? columns * rows : 0;
  const auto turned_maps = buffer<T>(B * area);  // queries along the vectors, as the weights
  parallel_for(grad_maps ? B : 0, 1, threads, [&](int64_t b, int64_t) {
    Loops<T>::transpose(grad_maps + b * area, columns, rows, columns, T(1), turned_maps.get() + b * area, rows);
  });
  parallel_for(B * H, 1, threads, [&](int64_t task, int64_t) {
    const int64_t b = task / H, h = task % H;
    const auto keys = uninitialized<T>(head), values = uninitialized<T>(head), rows_k = uninitialized<T>(M * d);
    const auto tile_q = uninitialized<T>(P * d), tile_g = uninitialized<T>(P * d);
    pack_rows(k(b, h, 0), k.stride(), M, d, keys.get());
    copy_rows(k(b, h, 0), k.stride(), M, d, rows_k.get());
    pack_rows(v(b, h, 0), v.stride(), M, d, values.get());
    const auto s = uninitialized<T>(width * P), w = uninitialized<T>(width * P), turned = uninitialized<T>(P * P);
    const auto left = uninitialized<T>(d * P), right = uninitialized<T>(d * P), product = uninitialized<T>(d * P);
    const auto sum_k = uninitialized<T>(d * width), sum_v = uninitialized<T>(d * width);
    for (T* x : {left.get(), right.get()}) std::fill(x, x + d * P, T(0));
    for (T* x : {sum_k.get(), sum_v.get()}) std::fill(x, x + d * width, T(0));
    for (T* x : {s.get(), w.get()}) std::fill(x + M * P, x + width * P, T(0));
    T logs[P];
    for (int64_t n = 0; n < N; n += P) {
      const int64_t count = std::min(P, N - n), row = task * N + n, mapped = std::clamp<int64_t>(rows - n, 0, count);
      if (count < P) {  // what an earlier tile left beyond the last query
        for (T* x : {left.get(), right.get()}) std::fill(x, x + d * P, T(0));
      }
      std::fill(std::copy(lse + row, lse + row + count, logs), logs + P, std::numeric_limits<T>::infinity());
      copy_rows(q(b, h, n), q.stride(), count, d, tile_q.get());
      copy_rows(grad(b, h, n), grad.stride(), count, d, tile_g.get());
      Loops<T>::transpose(tile_q.get(), d, count, d, scale, left.get(), P);
      Loops<T>::transpose(tile_g.get(), d, count, d, T(1), right.get(), P);
      multiply_packed(keys.get(), left.get(), s.get(), M, d);
      multiply_packed(values.get(), right.get(), w.get(), M, d);
      const T* maps = area && mapped ? turned_maps.get() + b * area + n : nullptr;
      Loops<T>::softmax_gradient(s.get(), w.get(), logs, maps, rows, mapped, 1 / T(H), scale, skip, M);
      multiply_transposed(rows_k.get(), w.get(), product.get(), M, d);
      Loops<T>::transpose(product.get(), P, d, count, T(1), grad_q + row * d, d);
      for (int64_t p = 0; p < panels; ++p) {
        const auto add = [&](const T* tile, const T* a, T* c) {
          Loops<T>::transpose(tile + p * P * P, P, P, P, T(1), turned.get(), P);
          for (int64_t i = 0; i < d; i += HEIGHT)
            multiply_panel(a + i, d, turned.get(), c + i * width + p * P, width, std::min(HEIGHT, d - i), count);
        };
        add(s.get(), tile_g.get(), sum_v.get());
        add(w.get(), tile_q.get(), sum_k.get());
      }
    }
    Loops<T>::transpose(sum_k.get(), width, d, M, T(1), grad_k + task * M * d, d);
    Loops<T>::transpose(sum_v.get(), width, d, M, T(1), grad_v + task * M * d, d);
  });
}

}  // namespace

void attention_maps_fwd(const void* q, const void* k, const void* v, const int64_t* strides, const void* total,
                        void* out, void* maps, void* lse, bool f64, int64_t B, int64_t H, int64_t N, int64_t M,
                        int64_t d, int64_t rows, int64_t skip, double scale, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](const void* x, int i) { return Rows<T>{static_cast<const T*>(x), strides + 3 * i}; };
    forward(input(q, 0), input(k, 1), input(v, 2), static_cast<const T*>(total), static_cast<T*>(out),
            static_cast<T*>(maps), static_cast<T*>(lse), B, H, N, M, d, rows, skip, static_cast<T>(scale), threads);
  };
  f64 ? run(0.0) : run(0.0f);
}

void attention_maps_bwd(const void* grad, const void* grad_maps, const void* q, const void* k, const void* v,
                        const int64_t* strides, const void* lse, void* grad_q, void* grad_k, void* grad_v, bool f64,
                        int64_t B, int64_t H, int64_t N, int64_t M, int64_t d, int64_t rows, int64_t skip, double scale,
                        int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](const void* x, int i) { return Rows<T>{static_cast<const T*>(x), strides + 3 * i}; };
    backward(input(grad, 3), static_cast<const T*>(grad_maps), input(q, 0), input(k, 1), input(v, 2),
             static_cast<const T*>(lse), static_cast<T*>(grad_q), static_cast<T*>(grad_k), static_cast<T*>(grad_v), B,
             H, N, M, d, rows, skip, static_cast<T>(scale), threads);
  };
  f64 ? run(0.0) : run(0.0f);
}

}  // namespace fastcam
