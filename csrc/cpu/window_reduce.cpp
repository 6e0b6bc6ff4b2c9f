// At every pixel of x (K, H, W), the weighted sum over the pixels of its window that have its label.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t BLOCK = 16;  // pixels of a row that are summed together
constexpr int64_t ROWS = 16;   // rows of a task: four planes of them stay in the second-level cache
constexpr int64_t OUTSIDE = -2, NOBODYS = -3;

// As wide as T, so that a comparison of labels chooses numbers.
template <typename T>
using Label = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Rows [top, bottom) of an image and `reach` pixels around them, as they lie in a task's copies.
struct Band {
  int64_t H, W, reach, top, bottom;

  int64_t stride() const { return (W + BLOCK - 1) / BLOCK * BLOCK + 2 * reach; }
  int64_t at(int64_t y, int64_t x) const { return (y - top + reach) * stride() + reach + x; }
  int64_t size() const { return (bottom - top + 2 * reach) * stride(); }
  // Copies a plane's rows with f(n), n their place in the plane; `outside` is what lies beyond the image.
  template <typename T, typename F>
  FASTCAM_INLINE void copy(T* to, T outside, F f) const {
    for (int64_t y = top - reach; y < bottom + reach; ++y, to += stride()) {
      const bool inside = y >= 0 && y < H;
      std::fill(to, to + (inside ? reach : stride()), outside);
      if (!inside) continue;
      for (int64_t x = 0; x < W; ++x) to[reach + x] = f(y * W + x);
      std::fill(to + reach + W, to + stride(), outside);
    }
  }
};

// The sums of BLOCK pixels of G planes, `size` apart. to: the places in a window, ring by ring; each ring is summed by
// itself, so that nearly all of the work is additions under a mask.
template <typename T, int G>
FASTCAM_INLINE void sum_chosen(const T* x, int64_t size, const Label<T>* labels, const T* rings, const int64_t* to,
                               int64_t reach, T* out) {
  using V = typename Vector<T>::type;
  using I = typename Vector<Label<T>>::type;
  constexpr int L = Vector<T>::size, R = BLOCK / L;
  I centre[R];
  V sum[G][R] = {};
  for (int r = 0; r < R; ++r) {
    const I label = lanes<Label<T>, L>(labels + r * L);
    centre[r] = label < 0 ? I{} + Label<T>(NOBODYS) : label;
  }
  for (int64_t d = 0; d <= reach; ++d) {
    V ring[G][R] = {};
    for (int64_t i = 0; i < (d == 0 ? 1 : 8 * d); ++i, ++to)
      for (int r = 0; r < R; ++r) {
        const auto same = lanes<Label<T>, L>(labels + *to + r * L) == centre[r];
        for (int g = 0; g < G; ++g) {
          const V there = lanes<T, L>(x + g * size + *to + r * L);
          ring[g][r] = same ? ring[g][r] + there : ring[g][r];
        }
      }
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) sum[g][r] += rings[d] * ring[g][r];
  }
  for (int g = 0; g < G; ++g)
    for (int r = 0; r < R; ++r) lanes<T, L>(out + g * BLOCK + r * L) = sum[g][r];
}

// G planes of a band. Forward, r multiplies the sums; backward, it multiplies what is summed.
template <typename T, int G>
FASTCAM_INLINE void reduce_planes(const T* x, const Label<T>* labels, const T* rings, const int64_t* to, const T* r,
                                  T* out, const Band& band, bool backward, T* padded) {
  const int64_t size = band.size();
  for (int g = 0; g < G; ++g) {
    const T* plane = x + g * band.H * band.W;
    band.copy(padded + g * size, T(0), [&](int64_t n) __attribute__((always_inline)) {
      return !backward ? plane[n] : r[n] > 0 ? plane[n] * r[n] : T(0);
    });
  }
  for (int64_t y = band.top; y < band.bottom; ++y)
    for (int64_t x0 = 0; x0 < band.W; x0 += BLOCK) {
      T sums[G * BLOCK];
      const int64_t at = band.at(y, x0), n = y * band.W + x0, count = std::min(BLOCK, band.W - x0);
      sum_chosen<T, G>(padded + at, size, labels + at, rings, to, band.reach, sums);
      for (int g = 0; g < G; ++g) {
        T* result = out + g * band.H * band.W + n;
        const T* from = sums + g * BLOCK;
        for (int64_t j = 0; j < count; ++j) result[j] = backward ? from[j] : r[n + j] > 0 ? from[j] * r[n + j] : T(0);
      }
    }
}

// A band of all K planes of x. The forward writes r.
template <typename T>
FASTCAM_INLINE void reduce_band(const T* x, const int32_t* labels, const T* rings, T* r, T* out, int64_t K,
                                const Band& band, bool backward, bool by_count) {
  std::vector<Label<T>> y(band.size());
  band.copy(y.data(), Label<T>(OUTSIDE),
            [&](int64_t n) __attribute__((always_inline)) { return Label<T>(std::max(labels[n], -1)); });
  std::vector<int64_t> to;
  for (int64_t d = 0; d <= band.reach; ++d)
    for (int64_t dy = -d; dy <= d; ++dy)
      for (int64_t dx = -d; dx <= d; dx += std::abs(dy) == d ? 1 : 2 * d) to.push_back(dy * band.stride() + dx);
  std::vector<T> padded(4 * band.size(), T(1));
  if (!backward) {
    const std::vector<T> alike(band.reach + 1, T(1));
    for (int64_t row = band.top; row < band.bottom; ++row)
      for (int64_t x0 = 0; x0 < band.W; x0 += BLOCK) {
        T sums[BLOCK];
        const int64_t at = band.at(row, x0);
        sum_chosen<T, 1>(padded.data() + at, 0, y.data() + at, by_count ? alike.data() : rings, to.data(), band.reach,
                         sums);
        for (int64_t j = 0; j < std::min(BLOCK, band.W - x0); ++j)
          r[row * band.W + x0 + j] = sums[j] > 0 ? 1 / sums[j] : T(0);
      }
  }
  const int64_t plane = band.H * band.W;
  int64_t k = 0;
  for (; k + 4 <= K; k += 4)
    reduce_planes<T, 4>(x + k * plane, y.data(), rings, to.data(), r, out + k * plane, band, backward, padded.data());
  for (; k < K; ++k)
    reduce_planes<T, 1>(x + k * plane, y.data(), rings, to.data(), r, out + k * plane, band, backward, padded.data());
}
FASTCAM_MULTIVERSION void reduce_band_f32(const float* x, const int32_t* labels, const float* rings, float* r,
                                          float* out, int64_t K, const Band& band, bool backward, bool by_count) {
  reduce_band(x, labels, rings, r, out, K, band, backward, by_count);
}
FASTCAM_MULTIVERSION void reduce_band_f64(const double* x, const int32_t* labels, const double* rings, double* r,
                                          double* out, int64_t K, const Band& band, bool backward, bool by_count) {
  reduce_band(x, labels, rings, r, out, K, band, backward, by_count);
}

template <typename T, typename Reduce>
void run(const void* x, const int32_t* labels, const double* rings, void* r, void* out, int64_t B, int64_t K, int64_t H,
         int64_t W, int64_t reach, bool backward, bool by_count, int threads, Reduce reduce) {
  if (B * H * W == 0) return;
  reach = std::min(reach, std::max(H, W) - 1);
  const std::vector<T> weights(rings, rings + reach + 1);
  const int64_t N = H * W, bands = (H + ROWS - 1) / ROWS;
  parallel_for(B * bands, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / bands, top = i % bands * ROWS;
      const Band band{H, W, reach, top, std::min(top + ROWS, H)};
      reduce(static_cast<const T*>(x) + b * K * N, labels + b * N, weights.data(), static_cast<T*>(r) + b * N,
             static_cast<T*>(out) + b * K * N, K, band, backward, by_count);
    }
  });
}

}  // namespace

void window_reduce_fwd(const void* x, const int32_t* labels, const double* rings, void* out, void* r, bool f64,
                       int64_t B, int64_t K, int64_t H, int64_t W, int64_t reach, bool by_count, int threads) {
  if (f64) {
    run<double>(x, labels, rings, r, out, B, K, H, W, reach, false, by_count, threads, reduce_band_f64);
  } else {
    run<float>(x, labels, rings, r, out, B, K, H, W, reach, false, by_count, threads, reduce_band_f32);
  }
}

void window_reduce_bwd(const void* grad, const int32_t* labels, const double* rings, const void* r, void* grad_x,
                       bool f64, int64_t B, int64_t K, int64_t H, int64_t W, int64_t reach, int threads) {
  void* const factors = const_cast<void*>(r);  // only read: the forward alone writes them
  if (f64) {
    run<double>(grad, labels, rings, factors, grad_x, B, K, H, W, reach, true, false, threads, reduce_band_f64);
  } else {
    run<float>(grad, labels, rings, factors, grad_x, B, K, H, W, reach, true, false, threads, reduce_band_f32);
  }
}

}  // namespace fastcam
