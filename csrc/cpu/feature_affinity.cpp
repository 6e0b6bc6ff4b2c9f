// exp(-mean over features of |f_i - f_j|) for the pairs of pixels within a radius: features (B, D, H, W), out
// (B, P, H, W). A task handles BLOCK pixels of a row; the rows it needs of one feature are copied beside each other,
// with a margin, so that every loop over pixels has the same length.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BLOCK = 64;

// The pairs of an image: P offsets (dy, dx), fewer than `radius` away; sources keep `margin` from the left, right and
// lower border.
struct Pairs {
  const int64_t* offsets;
  int64_t P, radius, margin, H, W;

  int64_t dy(int64_t p) const { return offsets[2 * p]; }
  int64_t dx(int64_t p) const { return offsets[2 * p + 1]; }
  int64_t width() const { return BLOCK + 2 * (radius - 1); }
  bool has_source(int64_t p, int64_t y, int64_t x) const {
    return y >= 0 && y < H - std::max(dy(p), margin) && x >= std::max(-dx(p), margin) &&
           x < W - std::max(dx(p), margin);
  }
};

// Row y of a feature from x - (radius - 1) on; zeros outside the image.
template <typename T>
FASTCAM_INLINE void copy_row(const T* plane, const Pairs& pairs, int64_t y, int64_t x, T* to) {
  const int64_t first = x - (pairs.radius - 1), width = pairs.width();
  if (y < 0 || y >= pairs.H) {
    std::fill(to, to + width, T(0));
    return;
  }
  const T* row = plane + y * pairs.W;
  const int64_t begin = std::min(std::max<int64_t>(0, -first), width);
  const int64_t end = std::max(begin, std::min(width, pairs.W - first));
  std::fill(to, to + begin, T(0));
  std::copy(row + first + begin, row + first + end, to + begin);
  std::fill(to + end, to + width, T(0));
}

// work: radius rows, then P * BLOCK sums.
template <typename T>
FASTCAM_INLINE void affinity_block(const T* f, const Pairs& pairs, T* out, T* work, int64_t D, int64_t y, int64_t x) {
  const int64_t width = pairs.width(), n = std::min(BLOCK, pairs.W - x);
  T *rows = work, *sums = work + pairs.radius * width;
  std::fill(sums, sums + pairs.P * BLOCK, T(0));
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t dy = 0; dy < pairs.radius; ++dy)
      copy_row(f + d * pairs.H * pairs.W, pairs, y + dy, x, rows + dy * width);
    const T* here = rows + pairs.radius - 1;
    for (int64_t p = 0; p < pairs.P; ++p) {
      const T* there = here + pairs.dy(p) * width + pairs.dx(p);
      T* sum = sums + p * BLOCK;
      for (int64_t j = 0; j < BLOCK; ++j) sum[j] += std::abs(here[j] - there[j]);
    }
  }
  for (int64_t p = 0; p < pairs.P; ++p) {
    T* sum = sums + p * BLOCK;
    for (int64_t j = 0; j < BLOCK; ++j) sum[j] = fast_exp(-sum[j] / T(D));
    for (int64_t j = 0; j < n; ++j)
      out[(p * pairs.H + y) * pairs.W + x + j] = pairs.has_source(p, y, x + j) ? sum[j] : T(0);
  }
}

// work: 2 * radius - 1 rows, then 2 P * BLOCK weights: of the pairs of which the pixels are sources, and destinations.
template <typename T>
FASTCAM_INLINE void gradient_block(const T* grad, const T* f, const T* out, const Pairs& pairs, T* grad_f, T* work,
                                   int64_t D, int64_t y, int64_t x) {
  const int64_t width = pairs.width(), reach = pairs.radius - 1, n = std::min(BLOCK, pairs.W - x);
  T *rows = work, *weights = work + (2 * reach + 1) * width;
  for (int64_t p = 0; p < pairs.P; ++p)
    for (int64_t j = 0; j < BLOCK; ++j)
      for (int64_t role = 0; role < 2; ++role) {
        const int64_t sy = y - role * pairs.dy(p), sx = x + j - role * pairs.dx(p),
                      i = (p * pairs.H + sy) * pairs.W + sx;
        weights[(2 * p + role) * BLOCK + j] = j < n && pairs.has_source(p, sy, sx) ? grad[i] * out[i] / T(D) : T(0);
      }
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t dy = -reach; dy <= reach; ++dy)
      copy_row(f + d * pairs.H * pairs.W, pairs, y + dy, x, rows + (reach + dy) * width);
    const T* here = rows + reach * width + reach;
    T sum[BLOCK] = {};
    for (int64_t p = 0; p < pairs.P; ++p)
      for (int64_t role = 0; role < 2; ++role) {
        const int64_t offset = pairs.dy(p) * width + pairs.dx(p);
        const T *there = role == 0 ? here + offset : here - offset, *weight = weights + (2 * p + role) * BLOCK;
        for (int64_t j = 0; j < BLOCK; ++j) {
          const T w = here[j] < there[j] ? weight[j] : T(0);
          sum[j] += here[j] > there[j] ? -weight[j] : w;
        }
      }
    std::copy(sum, sum + n, grad_f + (d * pairs.H + y) * pairs.W + x);
  }
}

FASTCAM_MULTIVERSION void affinity_block_f32(const float* f, const Pairs& pairs, float* out, float* work, int64_t D,
                                             int64_t y, int64_t x) {
  affinity_block(f, pairs, out, work, D, y, x);
}
FASTCAM_MULTIVERSION void affinity_block_f64(const double* f, const Pairs& pairs, double* out, double* work, int64_t D,
                                             int64_t y, int64_t x) {
  affinity_block(f, pairs, out, work, D, y, x);
}
FASTCAM_MULTIVERSION void gradient_block_f32(const float* grad, const float* f, const float* out, const Pairs& pairs,
                                             float* grad_f, float* work, int64_t D, int64_t y, int64_t x) {
  gradient_block(grad, f, out, pairs, grad_f, work, D, y, x);
}
FASTCAM_MULTIVERSION void gradient_block_f64(const double* grad, const double* f, const double* out, const Pairs& pairs,
                                             double* grad_f, double* work, int64_t D, int64_t y, int64_t x) {
  gradient_block(grad, f, out, pairs, grad_f, work, D, y, x);
}

// block(b, y, x, work) for every block of every image.
template <typename T, typename Block>
void each_block_of(const Pairs& pairs, int64_t B, int64_t scratch, int threads, Block block) {
  parallel_for(B * pairs.H, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> work(scratch);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t x = 0; x < pairs.W; x += BLOCK) block(i / pairs.H, i % pairs.H, x, work.data());
  });
}

template <typename T, typename Block>
void forward(const T* f, const Pairs& pairs, T* out, int64_t B, int64_t D, int threads, Block block) {
  const int64_t N = pairs.H * pairs.W, scratch = pairs.radius * pairs.width() + pairs.P * BLOCK;
  each_block_of<T>(pairs, B, scratch, threads, [&](int64_t b, int64_t y, int64_t x, T* work) {
    block(f + b * D * N, pairs, out + b * pairs.P * N, work, D, y, x);
  });
}

template <typename T, typename Block>
void backward(const T* grad, const T* f, const T* out, const Pairs& pairs, T* grad_f, int64_t B, int64_t D, int threads,
              Block block) {
  const int64_t N = pairs.H * pairs.W, scratch = 2 * (pairs.radius * pairs.width() + pairs.P * BLOCK);
  each_block_of<T>(pairs, B, scratch, threads, [&](int64_t b, int64_t y, int64_t x, T* work) {
    block(grad + b * pairs.P * N, f + b * D * N, out + b * pairs.P * N, pairs, grad_f + b * D * N, work, D, y, x);
  });
}

}  // namespace

void feature_affinity_fwd(const void* f, const int64_t* offsets, void* out, bool f64, int64_t B, int64_t D, int64_t P,
                          int64_t H, int64_t W, int64_t radius, int64_t margin, int threads) {
  const Pairs pairs{offsets, P, radius, margin, H, W};
  if (f64) {
    forward(static_cast<const double*>(f), pairs, static_cast<double*>(out), B, D, threads, affinity_block_f64);
  } else {
    forward(static_cast<const float*>(f), pairs, static_cast<float*>(out), B, D, threads, affinity_block_f32);
  }
}

void feature_affinity_bwd(const void* grad, const void* f, const void* out, const int64_t* offsets, void* grad_f,
                          bool f64, int64_t B, int64_t D, int64_t P, int64_t H, int64_t W, int64_t radius,
                          int64_t margin, int threads) {
  const Pairs pairs{offsets, P, radius, margin, H, W};
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(f), static_cast<const double*>(out), pairs,
             static_cast<double*>(grad_f), B, D, threads, gradient_block_f64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(f), static_cast<const float*>(out), pairs,
             static_cast<float*>(grad_f), B, D, threads, gradient_block_f32);
  }
}

}  // namespace fastcam
