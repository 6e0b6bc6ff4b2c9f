// At every pixel of x (K, H, W), the weighted sum over the pixels of its window that have its label. Weights depend on
// the chessboard distance, so that where a whole window has one label the sum is one of a few box sums.
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
constexpr int64_t ROWS = 16;   // rows of a task: with those around them they stay in the first-level cache
constexpr int64_t OUTSIDE = -2, NOBODYS = -3;

// As wide as T, so that a comparison of labels chooses numbers.
template <typename T>
using Label = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Rows [top, bottom) of an image and `reach` pixels around them, as they lie in a task's copies.
struct Band {
  int64_t H, W, reach, top, bottom;

  int64_t blocks() const { return (W + BLOCK - 1) / BLOCK; }
  int64_t stride() const { return blocks() * BLOCK + 2 * reach; }
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

// Whether all pixels that the windows of a block touch have one label, or lie outside the image, where x is 0.
template <typename L>
FASTCAM_INLINE bool one_label(const L* labels, int64_t reach, int64_t stride) {
  if (labels[0] < 0) return false;
  const L first = labels[0];
  L others = 0;
  for (int64_t dy = -reach; dy <= reach; ++dy) {
    const L* row = labels + dy * stride - reach;
    for (int64_t i = 0; i < BLOCK + 2 * reach; ++i) others |= (row[i] != first) & (row[i] != L(OUTSIDE));
    if (others) return false;
  }
  return true;
}

// The sums of a block of G planes, `size` apart, that has several labels, or none. to: the places in a window, ring by
// ring; each ring is summed by itself, so that most of the work are additions under a mask.
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

// columns (reach + 1, stride): of the row at x, the sums over the rows up to each distance above and below.
template <typename T>
FASTCAM_INLINE void sum_columns(const T* x, int64_t reach, int64_t stride, T* columns) {
  std::copy(x, x + stride, columns);
  for (int64_t d = 1; d <= reach; ++d) {
    const T *above = x - d * stride, *below = x + d * stride;
    T* to = columns + d * stride;
    for (int64_t i = 0; i < stride; ++i) to[i] = to[i - stride] + (above[i] + below[i]);
  }
}

// The sums of a block in which all pixels count: steps[d] times the box of reach d, for all d.
template <typename T>
FASTCAM_INLINE void sum_boxes(const T* columns, const T* steps, int64_t reach, int64_t stride, T* out) {
  using V = typename Vector<T>::type;
  constexpr int L = Vector<T>::size, R = BLOCK / L;
  V sum[R] = {};
  for (int64_t d = 0; d <= reach; ++d) {
    if (steps[d] == 0) continue;
    const T* from = columns + d * stride + reach;
    V box[R];
    for (int r = 0; r < R; ++r) box[r] = lanes<T, L>(from + r * L);
    for (int64_t i = 1; i <= d; ++i)
      for (int r = 0; r < R; ++r) box[r] += lanes<T, L>(from - i + r * L) + lanes<T, L>(from + i + r * L);
    for (int r = 0; r < R; ++r) sum[r] += steps[d] * box[r];
  }
  for (int r = 0; r < R; ++r) lanes<T, L>(out + r * L) = sum[r];
}

// What all planes of a band share.
template <typename T>
struct Windows {
  std::vector<Label<T>> labels;
  std::vector<char> plain, any_plain;  // of every block, and every row: whether a sum of boxes will do
  std::vector<int64_t> to;             // places in a window, ring by ring
  std::vector<T> steps;                // from ring to ring
};

// G planes of a band. Forward, r multiplies the sums; backward, it multiplies what is summed.
template <typename T, int G>
FASTCAM_INLINE void reduce_planes(const T* x, const Windows<T>& windows, const T* rings, const T* r, T* out,
                                  const Band& band, bool backward, T* padded, T* columns) {
  const int64_t reach = band.reach, stride = band.stride(), blocks = band.blocks(), size = band.size();
  for (int g = 0; g < G; ++g) {
    const T* plane = x + g * band.H * band.W;
    band.copy(padded + g * size, T(0), [&](int64_t n) __attribute__((always_inline)) {
      return !backward ? plane[n] : r[n] > 0 ? plane[n] * r[n] : T(0);
    });
  }
  for (int64_t row = 0; row < band.bottom - band.top; ++row) {
    const T* first = padded + (row + reach) * stride;
    if (windows.any_plain[row])
      for (int g = 0; g < G; ++g) sum_columns(first + g * size, reach, stride, columns + g * (reach + 1) * stride);
    for (int64_t i = 0; i < blocks; ++i) {
      T sums[G * BLOCK];
      if (windows.plain[row * blocks + i]) {
        for (int g = 0; g < G; ++g)
          sum_boxes(columns + g * (reach + 1) * stride + i * BLOCK, windows.steps.data(), reach, stride,
                    sums + g * BLOCK);
      } else {
        const int64_t at = (row + reach) * stride + reach + i * BLOCK;
        sum_chosen<T, G>(padded + at, size, windows.labels.data() + at, rings, windows.to.data(), reach, sums);
      }
      const int64_t n = (band.top + row) * band.W + i * BLOCK, count = std::min(BLOCK, band.W - i * BLOCK);
      for (int g = 0; g < G; ++g) {
        T* to = out + g * band.H * band.W + n;
        const T* from = sums + g * BLOCK;
        for (int64_t j = 0; j < count; ++j) to[j] = backward ? from[j] : r[n + j] > 0 ? from[j] * r[n + j] : T(0);
      }
    }
  }
}

// A band of all K planes of x. The forward writes r.
template <typename T>
FASTCAM_INLINE void reduce_band(const T* x, const int32_t* labels, const T* rings, T* r, T* out, int64_t K,
                                const Band& band, bool backward, bool by_count) {
  const int64_t reach = band.reach, stride = band.stride(), blocks = band.blocks(), rows = band.bottom - band.top;
  Windows<T> windows{std::vector<Label<T>>(band.size()),
                     std::vector<char>(rows * blocks),
                     std::vector<char>(rows),
                     {},
                     std::vector<T>(reach + 1)};
  band.copy(windows.labels.data(), Label<T>(OUTSIDE),
            [&](int64_t n) __attribute__((always_inline)) { return Label<T>(std::max(labels[n], -1)); });
  for (int64_t d = 0; d <= reach; ++d) {
    windows.steps[d] = rings[d] - (d < reach ? rings[d + 1] : T(0));
    for (int64_t dy = -d; dy <= d; ++dy)
      for (int64_t dx = -d; dx <= d; dx += std::abs(dy) == d || d == 0 ? 1 : 2 * d)
        windows.to.push_back(dy * stride + dx);
  }
  const std::vector<T> ones(backward ? 0 : band.size(), T(1)), alike(reach + 1, T(1));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t at = (row + reach) * stride + reach + i * BLOCK;
      const Label<T>* here = windows.labels.data() + at;
      windows.any_plain[row] |= windows.plain[row * blocks + i] = one_label(here, reach, stride);
      if (backward) continue;
      T sums[BLOCK];
      sum_chosen<T, 1>(ones.data() + at, 0, here, by_count ? alike.data() : rings, windows.to.data(), reach, sums);
      T* to = r + (band.top + row) * band.W + i * BLOCK;
      for (int64_t j = 0; j < std::min(BLOCK, band.W - i * BLOCK); ++j) to[j] = sums[j] > 0 ? 1 / sums[j] : T(0);
    }
  std::vector<T> padded(4 * band.size()), columns(4 * (reach + 1) * stride);
  const int64_t plane = band.H * band.W;
  int64_t k = 0;
  for (; k + 4 <= K; k += 4)
    reduce_planes<T, 4>(x + k * plane, windows, rings, r, out + k * plane, band, backward, padded.data(),
                        columns.data());
  for (; k < K; ++k)
    reduce_planes<T, 1>(x + k * plane, windows, rings, r, out + k * plane, band, backward, padded.data(),
                        columns.data());
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
