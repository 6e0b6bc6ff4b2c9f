// Maps x (B, C, N) spread along the affinity of features f (B, D, N): y = (x R) / s with R = relu(g^T g) and s its
// column sums. R exists a tile of PANEL by PANEL pixels at a time,
// in the first-level cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

// scale[n] = 1 / (length of column n of panel (depth, PANEL) + eps), by which the panel is multiplied; norm[n] =
// length.
template <typename T>
FASTCAM_INLINE void normalize(T* panel, int64_t depth, T eps, T* norm) {
  T squares[PANEL<T>] = {}, scale[PANEL<T>];
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t n = 0; n < PANEL<T>; ++n) squares[n] += panel[d * PANEL<T> + n] * panel[d * PANEL<T> + n];
  for (int64_t n = 0; n < PANEL<T>; ++n) {
    norm[n] = std::sqrt(squares[n]);
    scale[n] = 1 / (norm[n] + eps);
  }
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t n = 0; n < PANEL<T>; ++n) panel[d * PANEL<T> + n] *= scale[n];
}
FASTCAM_MULTIVERSION void normalize_f32(float* panel, int64_t depth, float eps, float* norm) {
  normalize(panel, depth, eps, norm);
}
FASTCAM_MULTIVERSION void normalize_f64(double* panel, int64_t depth, double eps, double* norm) {
  normalize(panel, depth, eps, norm);
}

template <typename T>
FASTCAM_INLINE void relu(T* tile) {
  for (int64_t i = 0; i < PANEL<T> * PANEL<T>; ++i) tile[i] = tile[i] < 0 ? 0 : tile[i];  // NaN stays NaN
}
FASTCAM_MULTIVERSION void relu_f32(float* tile) { relu(tile); }
FASTCAM_MULTIVERSION void relu_f64(double* tile) { relu(tile); }

// The gradient is 0 where the affinity is.
template <typename T>
FASTCAM_INLINE void relu_gradient(const T* tile, T* grad) {
  for (int64_t i = 0; i < PANEL<T> * PANEL<T>; ++i) grad[i] = tile[i] > 0 ? grad[i] : 0;
}
FASTCAM_MULTIVERSION void relu_gradient_f32(const float* tile, float* grad) { relu_gradient(tile, grad); }
FASTCAM_MULTIVERSION void relu_gradient_f64(const double* tile, double* grad) { relu_gradient(tile, grad); }

// From the gradient (D, PANEL) of unit features g to that of the features.
template <typename T>
FASTCAM_INLINE void normalize_gradient(const T* g, const T* norm, T eps, int64_t D, T* grad) {
  T radial[PANEL<T>] = {}, scale[PANEL<T>];
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < PANEL<T>; ++n) radial[n] += grad[d * PANEL<T> + n] * g[d * PANEL<T> + n];
  for (int64_t n = 0; n < PANEL<T>; ++n) {
    radial[n] = norm[n] > 0 ? radial[n] * (norm[n] + eps) / norm[n] : 0;
    scale[n] = 1 / (norm[n] + eps);
  }
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < PANEL<T>; ++n)
      grad[d * PANEL<T> + n] = (grad[d * PANEL<T> + n] - g[d * PANEL<T> + n] * radial[n]) * scale[n];
}
FASTCAM_MULTIVERSION void normalize_gradient_f32(const float* g, const float* norm, float eps, int64_t D, float* grad) {
  normalize_gradient(g, norm, eps, D, grad);
}
FASTCAM_MULTIVERSION void normalize_gradient_f64(const double* g, const double* norm, double eps, int64_t D,
                                                 double* grad) {
  normalize_gradient(g, norm, eps, D, grad);
}

template <typename T>
struct Loops {
  void (*normalize)(T*, int64_t, T, T*);
  void (*relu)(T*);
  void (*relu_gradient)(const T*, T*);
  void (*normalize_gradient)(const T*, const T*, T, int64_t, T*);
};
constexpr Loops<float> LOOPS_F32 = {normalize_f32, relu_f32, relu_gradient_f32, normalize_gradient_f32};
constexpr Loops<double> LOOPS_F64 = {normalize_f64, relu_f64, relu_gradient_f64, normalize_gradient_f64};

// Unit features of all images in panels (B, count, D, PANEL), with zeros in the last one of an image where it ends.
template <typename T>
struct Affinity {
  int64_t B, D, N, count;
  int threads;
  const Loops<T>& loops;
  std::unique_ptr<T[], Release> g, norm;

  Affinity(const T* f, int64_t B, int64_t D, int64_t N, T eps, int threads, const Loops<T>& loops)
      : B(B), D(D), N(N), count(panels<T>(N)), threads(threads), loops(loops) {
    g = uninitialized<T>(B * count * D * PANEL<T>);
    norm = uninitialized<T>(B * count * PANEL<T>);
    parallel_for(B * count, 1, threads, [&](int64_t i, int64_t) {
      const int64_t n = i % count * PANEL<T>;
      pack_tile(f + i / count * D * N + n, N, D, columns(i), panel(i));
      loops.normalize(panel(i), D, eps, norm.get() + i * PANEL<T>);
    });
  }

  T* panel(int64_t i) const { return g.get() + i * D * PANEL<T>; }
  int64_t columns(int64_t i) const { return std::min(PANEL<T>, N - i % count * PANEL<T>); }

  // R of the pixels of panels i and j of one image.
  void tile(int64_t i, int64_t j, T* R) const {
    std::fill(R, R + PANEL<T> * PANEL<T>, T(0));
    multiply_panels(panel(i), panel(j), R, D);
    loops.relu(R);
  }

  // x (B, rows, N) R: done(j, sums, stride) for every panel of columns j, counted over all images, sums (rows, PANEL)
  // with rows `stride` apart. With `ones`, a last row holds the column sums of R. R is symmetric: a tile beside the
  // diagonal also serves, turned, for the one on its other side. TASKS tasks take rows of tiles, long ones and short
  // ones alike, and add up what they find by themselves, so that the order of a sum does not depend on the threads.
  template <typename Done>
  void multiply(const T* x, int64_t rows, bool ones, Done done) const {
    constexpr int64_t P = PANEL<T>, TASKS = 16;
    const int64_t tasks = std::min(TASKS, (count + 1) / 2), stride = count * P;
    for (int64_t b = 0; b < B; ++b) {
      const Blocks<T> a(rows + ones, N, threads,
                        [&](int64_t k, int64_t n) { return k < rows ? x[(b * rows + k) * N + n] : 1; });
      const int64_t size = a.padded() * stride;
      const auto sums = uninitialized<T>(tasks * size);
      parallel_for(tasks, 1, threads, [&](int64_t task, int64_t) {
        T* own = sums.get() + task * size;
        std::fill(own, own + size, T(0));
        alignas(64) T R[P * P], turned[P * P];
        for (int64_t i = 0; i < count; ++i) {
          const int64_t turn = i % (2 * tasks);
          if (std::min(turn, 2 * tasks - 1 - turn) != task) continue;
          for (int64_t j = i; j < count; ++j) {
            tile(b * count + i, b * count + j, R);
            a.multiply(i * P, columns(i), R, own + j * P, stride);
            if (i == j) continue;
            for (int64_t n = 0; n < P; ++n)
              for (int64_t m = 0; m < P; ++m) turned[n * P + m] = R[m * P + n];
            a.multiply(j * P, columns(j), turned, own + i * P, stride);
          }
        }
      });
      parallel_for(count, 1, threads, [&](int64_t j, int64_t) {
        T* total = sums.get() + j * P;
        for (int64_t task = 1; task < tasks; ++task)
          for (int64_t k = 0; k < rows + ones; ++k)
            for (int64_t n = 0; n < P; ++n) total[k * stride + n] += total[task * size + k * stride + n];
        done(b * count + j, total, stride);
      });
    }
  }
};

template <typename T>
void forward(const T* x, const T* f, T* out, T* between, T* divisor, int64_t B, int64_t C, int64_t D, int64_t N,
             int64_t steps, T eps, int threads, const Loops<T>& loops) {
  const Affinity<T> affinity(f, B, D, N, eps, threads, loops);
  for (int64_t t = 0; t < steps; ++t) {
    T* to = t == steps - 1 ? out : between + t * B * C * N;
    affinity.multiply(x, C, true, [&](int64_t j, const T* sums, int64_t stride) {
      const int64_t b = j / affinity.count, n0 = j % affinity.count * PANEL<T>;
      for (int64_t n = 0; n < affinity.columns(j); ++n) {
        const T s = divisor[b * N + n0 + n] = sums[C * stride + n] + eps;
        for (int64_t c = 0; c < C; ++c) to[(b * C + c) * N + n0 + n] = sums[c * stride + n] / s;
      }
    });
    x = to;
  }
}

// Rows of all images in panels (B, count, rows, PANEL): row(b, k) points to N numbers.
template <typename T, typename Row>
std::unique_ptr<T[], Release> pack_all(int64_t B, int64_t rows, int64_t N, int threads, Row row) {
  const int64_t count = panels<T>(N);
  auto to = uninitialized<T>(B * count * rows * PANEL<T>);
  parallel_for(B * count, 1, threads, [&](int64_t i, int64_t) {
    const int64_t n = i % count * PANEL<T>;
    for (int64_t k = 0; k < rows; ++k)
      pack_tile(row(i / count, k) + n, N, 1, std::min(PANEL<T>, N - n), to.get() + (i * rows + k) * PANEL<T>);
  });
  return to;
}

// With y_t the maps after step t and h_t = dy_t / s: dy_{t-1} = h_t R, for R is symmetric, and dR_ij = u_i . v_j, where
// u_i holds all y_{t-1,i} and a 1, and v_j all h_{t,j} and -sum_t y_{t,j} . h_{t,j}. Last, dg = g E with
// E_ij = (u_i . v_j + v_i . u_j) [R_ij > 0].
template <typename T>
void backward(const T* grad, const T* x, const T* f, const T* out, const T* between, const T* divisor, T* grad_x,
              T* grad_f, int64_t B, int64_t C, int64_t D, int64_t N, int64_t steps, T eps, int threads,
              const Loops<T>& loops) {
  constexpr int64_t P = PANEL<T>;
  const int64_t size = B * C * N, rows = steps * C + 1;
  const Affinity<T> affinity(f, B, D, N, eps, threads, loops);
  const int64_t count = affinity.count;
  const auto maps = [&](int64_t t) { return t == 0 ? x : t == steps ? out : between + (t - 1) * size; };
  std::vector<T> h(steps * size);  // h_t at t - 1
  for (int64_t i = 0; i < size; ++i) h[(steps - 1) * size + i] = grad[i] / divisor[i / (C * N) * N + i % N];
  for (int64_t t = steps - 1; t > 0; --t) {
    affinity.multiply(h.data() + t * size, C, false, [&](int64_t j, const T* sums, int64_t stride) {
      const int64_t b = j / count, n0 = j % count * P;
      for (int64_t c = 0; c < C; ++c)
        for (int64_t n = 0; n < affinity.columns(j); ++n)
          h[(t - 1) * size + (b * C + c) * N + n0 + n] = sums[c * stride + n] / divisor[b * N + n0 + n];
    });
  }
  const std::vector<T> ones(N, T(1));
  std::vector<T> last(B * N);
  for (int64_t t = 1; t <= steps; ++t)
    for (int64_t i = 0; i < size; ++i) last[i / (C * N) * N + i % N] -= maps(t)[i] * h[(t - 1) * size + i];
  const auto u = pack_all<T>(B, rows, N, threads, [&](int64_t b, int64_t k) {
    return k == steps * C ? ones.data() : maps(k / C) + (b * C + k % C) * N;
  });
  const auto v = pack_all<T>(B, rows, N, threads, [&](int64_t b, int64_t k) {
    return k == steps * C ? last.data() + b * N : h.data() + k / C * size + (b * C + k % C) * N;
  });
  // Features of a pixel side by side, P of them: (B, ceil(D / P), N, P), the left factor of g E.
  const int64_t strips = panels<T>(D);
  const auto turned = uninitialized<T>(B * strips * N * P);
  parallel_for(B * count, 1, threads, [&](int64_t i, int64_t) {
    for (int64_t d = 0; d < D; ++d)
      for (int64_t n = 0; n < affinity.columns(i); ++n)
        turned[((i / count * strips + d / P) * N + i % count * P + n) * P + d % P] = affinity.panel(i)[d * P + n];
  });
  std::vector<Blocks<T>> first;
  for (int64_t b = 0; b < B; ++b)
    first.emplace_back(C, N, threads, [&](int64_t c, int64_t n) { return h[(b * C + c) * N + n]; });

  parallel_for(B * count, 1, threads, [&](int64_t j, int64_t) {
    const int64_t b = j / count, n0 = j % count * P, columns = affinity.columns(j);
    std::vector<T> sums(first[b].padded() * P), g(D * P);
    alignas(64) T R[P * P], E[P * P];
    for (int64_t i = b * count; i < (b + 1) * count; ++i) {
      const int64_t m0 = i % count * P;
      affinity.tile(i, j, R);
      first[b].multiply(m0, affinity.columns(i), R, sums.data(), P);
      std::fill(E, E + P * P, T(0));
      multiply_panels(u.get() + i * rows * P, v.get() + j * rows * P, E, rows);
      multiply_panels(v.get() + i * rows * P, u.get() + j * rows * P, E, rows);
      loops.relu_gradient(R, E);
      for (int64_t d = 0; d < D; d += P)
        multiply_panel(turned.get() + ((b * strips + d / P) * N + m0) * P, P, E, g.data() + d * P, P,
                       std::min(P, D - d), affinity.columns(i));
    }
    loops.normalize_gradient(affinity.panel(j), affinity.norm.get() + j * P, eps, D, g.data());
    for (int64_t c = 0; c < C; ++c) std::copy_n(sums.data() + c * P, columns, grad_x + (b * C + c) * N + n0);
    for (int64_t d = 0; d < D; ++d) std::copy_n(g.data() + d * P, columns, grad_f + (b * D + d) * N + n0);
  });
}

}  // namespace

void correlation_propagate_fwd(const void* x, const void* f, void* out, void* between, void* divisor, bool f64,
                               int64_t B, int64_t C, int64_t D, int64_t N, int64_t steps, double eps, int threads) {
  if (f64) {
    forward(static_cast<const double*>(x), static_cast<const double*>(f), static_cast<double*>(out),
            static_cast<double*>(between), static_cast<double*>(divisor), B, C, D, N, steps, eps, threads, LOOPS_F64);
  } else {
    forward(static_cast<const float*>(x), static_cast<const float*>(f), static_cast<float*>(out),
            static_cast<float*>(between), static_cast<float*>(divisor), B, C, D, N, steps, static_cast<float>(eps),
            threads, LOOPS_F32);
  }
}

void correlation_propagate_bwd(const void* grad, const void* x, const void* f, const void* out, const void* between,
                               const void* divisor, void* grad_x, void* grad_f, bool f64, int64_t B, int64_t C,
                               int64_t D, int64_t N, int64_t steps, double eps, int threads) {
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(x), static_cast<const double*>(f),
             static_cast<const double*>(out), static_cast<const double*>(between), static_cast<const double*>(divisor),
             static_cast<double*>(grad_x), static_cast<double*>(grad_f), B, C, D, N, steps, eps, threads, LOOPS_F64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<const float*>(f),
             static_cast<const float*>(out), static_cast<const float*>(between), static_cast<const float*>(divisor),
             static_cast<float*>(grad_x), static_cast<float*>(grad_f), B, C, D, N, steps, static_cast<float>(eps),
             threads, LOOPS_F32);
  }
}

}  // namespace fastcam
