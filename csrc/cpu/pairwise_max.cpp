// Best match of N query features (B, D, N) over M support features (B, D, M).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

// Lengths of the columns of panel (depth, PANEL).
template <typename T>
FASTCAM_INLINE void norms(const T* panel, int64_t depth, T* norm) {
  T squares[PANEL<T>] = {};
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t n = 0; n < PANEL<T>; ++n) squares[n] += panel[d * PANEL<T> + n] * panel[d * PANEL<T> + n];
  for (int64_t n = 0; n < PANEL<T>; ++n) norm[n] = std::sqrt(squares[n]);
}
FASTCAM_MULTIVERSION void norms_f32(const float* panel, int64_t depth, float* norm) { norms(panel, depth, norm); }
FASTCAM_MULTIVERSION void norms_f64(const double* panel, int64_t depth, double* norm) { norms(panel, depth, norm); }

// Columns from[0], from[1], ... of x (depth, .), its rows `stride` apart -> panel (depth, PANEL), zeros where they end.
template <typename T>
FASTCAM_INLINE void gather(const T* x, int64_t stride, int64_t depth, int64_t columns, const int64_t* from, T* panel) {
  int64_t at[PANEL<T>] = {};
  std::copy_n(from, columns, at);
  for (int64_t d = 0; d < depth; ++d, x += stride, panel += PANEL<T>) {
    for (int64_t n = 0; n < PANEL<T>; ++n) panel[n] = x[at[n]];
    for (int64_t n = columns; n < PANEL<T>; ++n) panel[n] = 0;
  }
}
FASTCAM_MULTIVERSION void gather_f32(const float* x, int64_t stride, int64_t depth, int64_t columns,
                                     const int64_t* from, float* panel) {
  gather(x, stride, depth, columns, from, panel);
}
FASTCAM_MULTIVERSION void gather_f64(const double* x, int64_t stride, int64_t depth, int64_t columns,
                                     const int64_t* from, double* panel) {
  gather(x, stride, depth, columns, from, panel);
}

// Row m of the products (rows, PANEL) belongs to support first + m, column n to query n. A later one wins only if it is
// larger, or the first NaN. Places are of the type of the values, so that vectors of both are equally long.
template <typename T, typename Place>
FASTCAM_INLINE void update(const T* products, const T* s_norm, const T* q_norm, int64_t rows, Place first, bool cosine,
                           T eps, T* best, Place* place) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < PANEL<T>; ++n) {
      T v = products[m * PANEL<T> + n];
      if (cosine) v = v / (s_norm[m] * q_norm[n] + eps);
      const bool better = (v > best[n]) | ((v != v) & (best[n] == best[n]));
      best[n] = better ? v : best[n];
      place[n] = better ? first + static_cast<Place>(m) : place[n];
    }
}
FASTCAM_MULTIVERSION void update_f32(const float* products, const float* s_norm, const float* q_norm, int64_t rows,
                                     int32_t first, bool cosine, float eps, float* best, int32_t* place) {
  update(products, s_norm, q_norm, rows, first, cosine, eps, best, place);
}
FASTCAM_MULTIVERSION void update_f64(const double* products, const double* s_norm, const double* q_norm, int64_t rows,
                                     int64_t first, bool cosine, double eps, double* best, int64_t* place) {
  update(products, s_norm, q_norm, rows, first, cosine, eps, best, place);
}

template <typename Place, typename T, typename Norms, typename Gather, typename Update>
void forward(const T* query, const T* support, const bool* mask, T* value, int64_t* index, int64_t B, int64_t D,
             int64_t N, int64_t M, bool cosine, T eps, int threads, Norms norms, Gather gather, Update update) {
  constexpr int64_t P = PANEL<T>;
  std::vector<int64_t> used;
  for (int64_t b = 0; b < B; ++b) {
    used.clear();
    for (int64_t m = 0; m < M; ++m)
      if (!mask || mask[b * M + m]) used.push_back(m);
    const int64_t count = used.size(), parts = panels<T>(count);
    const auto packed = uninitialized<T>(parts * D * P), s_norm = uninitialized<T>(parts * P);
    parallel_for(parts, 1, threads, [&](int64_t i, int64_t) {
      const int64_t columns = std::min(P, count - i * P);
      T* to = packed.get() + i * D * P;
      if (used[i * P + columns - 1] - used[i * P] == columns - 1) {
        pack_tile(support + b * D * M + used[i * P], M, D, columns, to);
      } else {
        gather(support + b * D * M, M, D, columns, &used[i * P], to);
      }
      norms(to, D, s_norm.get() + i * P);
    });
    parallel_for(panels<T>(N), 1, threads, [&](int64_t i, int64_t) {
      const int64_t columns = std::min(P, N - i * P);
      alignas(64) T products[P * P];
      T q_norm[P], best[P];
      Place place[P];
      const auto q = uninitialized<T>(D * P);
      pack_tile(query + b * D * N + i * P, N, D, columns, q.get());
      norms(q.get(), D, q_norm);
      std::fill(best, best + P, count ? -std::numeric_limits<T>::infinity() : T(0));
      std::fill(place, place + P, Place(0));
      for (int64_t j = 0; j < parts; ++j) {
        std::fill(products, products + P * P, T(0));
        multiply_panels(packed.get() + j * D * P, q.get(), products, D);
        update(products, s_norm.get() + j * P, q_norm, std::min(P, count - j * P), static_cast<Place>(j * P), cosine,
               eps, best, place);
      }
      for (int64_t n = 0; n < columns; ++n) {
        value[b * N + i * P + n] = best[n];
        index[b * N + i * P + n] = count ? used[place[n]] : -1;
      }
    });
  }
}

// Squares of rows of x (D, N) added up: the squared lengths of its columns [begin, end).
template <typename T>
FASTCAM_INLINE void add_squares(const T* x, int64_t D, int64_t N, int64_t begin, int64_t end, T* squares) {
  std::fill(squares + begin, squares + end, T(0));
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = begin; n < end; ++n) squares[n] += x[d * N + n] * x[d * N + n];
}
FASTCAM_MULTIVERSION void add_squares_f32(const float* x, int64_t D, int64_t N, int64_t begin, int64_t end, float* s) {
  add_squares(x, D, N, begin, end, s);
}
FASTCAM_MULTIVERSION void add_squares_f64(const double* x, int64_t D, int64_t N, int64_t begin, int64_t end,
                                          double* s) {
  add_squares(x, D, N, begin, end, s);
}

// With c = q . s / d of a query and its best match: grad_q = near s - q_radial q, grad_s = near q - s_radial s, summed.
template <typename T, typename Squares>
void backward(const T* grad, const T* query, const T* support, const int64_t* index, T* grad_q, T* grad_s, int64_t B,
              int64_t D, int64_t N, int64_t M, bool cosine, T eps, int threads, Squares add_squares) {
  constexpr int64_t GRAIN = 256;
  std::vector<T> near(N), q_radial(N), slope(N), q_norm(N), s_radial(M), s_norm(M);
  for (int64_t b = 0; b < B;
       ++b, grad += N, index += N, query += D * N, support += D * M, grad_q += D * N, grad_s += D * M) {
    std::fill(s_radial.begin(), s_radial.end(), T(0));
    if (cosine) {
      parallel_for(M, GRAIN, threads, [&](int64_t begin, int64_t end) {
        add_squares(support, D, M, begin, end, s_norm.data());
        for (int64_t m = begin; m < end; ++m) s_norm[m] = std::sqrt(s_norm[m]);
      });
    }
    parallel_for(N, GRAIN, threads, [&](int64_t begin, int64_t end) {
      std::vector<T> product(end - begin);
      if (cosine) {
        add_squares(query, D, N, begin, end, q_norm.data());
        for (int64_t d = 0; d < D; ++d)
          for (int64_t n = begin; n < end; ++n)
            if (index[n] >= 0) product[n - begin] += query[d * N + n] * support[d * M + index[n]];
      }
      for (int64_t n = begin; n < end; ++n) {
        near[n] = index[n] < 0 ? 0 : grad[n];
        q_radial[n] = slope[n] = 0;
        if (!cosine || index[n] < 0) continue;
        q_norm[n] = std::sqrt(q_norm[n]);
        const T other = s_norm[index[n]], divisor = q_norm[n] * other + eps;
        slope[n] = near[n] * product[n - begin] / (divisor * divisor);
        near[n] /= divisor;
        q_radial[n] = q_norm[n] > 0 ? slope[n] * other / q_norm[n] : 0;
      }
    });
    if (cosine) {
      for (int64_t n = 0; n < N; ++n)
        if (index[n] >= 0 && s_norm[index[n]] > 0) s_radial[index[n]] += slope[n] * q_norm[n] / s_norm[index[n]];
    }
    parallel_for(D, 1, threads, [&](int64_t d, int64_t) {
      const T *q = query + d * N, *s = support + d * M;
      T *to_q = grad_q + d * N, *to_s = grad_s + d * M;
      for (int64_t m = 0; m < M; ++m) to_s[m] = -s_radial[m] * s[m];
      for (int64_t n = 0; n < N; ++n) {
        to_q[n] = index[n] < 0 ? 0 : near[n] * s[index[n]] - q_radial[n] * q[n];
        if (index[n] >= 0) to_s[index[n]] += near[n] * q[n];
      }
    });
  }
}

}  // namespace

void pairwise_max_fwd(const void* query, const void* support, const bool* mask, void* value, int64_t* index, bool f64,
                      int64_t B, int64_t D, int64_t N, int64_t M, bool cosine, double eps, int threads) {
  if (f64) {
    forward<int64_t>(static_cast<const double*>(query), static_cast<const double*>(support), mask,
                     static_cast<double*>(value), index, B, D, N, M, cosine, eps, threads, norms_f64, gather_f64,
                     update_f64);
  } else {
    forward<int32_t>(static_cast<const float*>(query), static_cast<const float*>(support), mask,
                     static_cast<float*>(value), index, B, D, N, M, cosine, static_cast<float>(eps), threads, norms_f32,
                     gather_f32, update_f32);
  }
}

void pairwise_max_bwd(const void* grad, const void* query, const void* support, const int64_t* index, void* grad_q,
                      void* grad_s, bool f64, int64_t B, int64_t D, int64_t N, int64_t M, bool cosine, double eps,
                      int threads) {
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(query), static_cast<const double*>(support),
             index, static_cast<double*>(grad_q), static_cast<double*>(grad_s), B, D, N, M, cosine, eps, threads,
             add_squares_f64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(query), static_cast<const float*>(support),
             index, static_cast<float*>(grad_q), static_cast<float*>(grad_s), B, D, N, M, cosine,
             static_cast<float>(eps), threads, add_squares_f32);
  }
}

}  // namespace fastcam
