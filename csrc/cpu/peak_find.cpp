// Local maxima of maps (BC, H, W). A pixel is a peak where it is larger than all before it in its window, in row-major
// order, and at least as large as all after it and its map's threshold. NaN counts as -inf, which is never a peak.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/memory.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BLOCK = 64;    // flags at a time
constexpr int64_t SMALL = 2048;  // maps whose median is selected directly
constexpr int64_t SAMPLE = 4096;

enum Rule { MEDIAN, MEAN, MAXIMUM, CONSTANT };

template <typename T>
FASTCAM_INLINE T number(T v) {
  return v == v ? v : -std::numeric_limits<T>::infinity();
}

template <typename T>
FASTCAM_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

// Calls emit(i) where flags (BLOCK) are set, and where they are not beside one that is: the caller adds the flag to its
// count. Most groups of eight have none.
template <typename F>
FASTCAM_INLINE void each_flag(const uint8_t* flags, F emit) {
  for (int64_t i = 0; i < BLOCK; i += 8) {
    uint8_t any = 0;
    for (int64_t j = 0; j < 8; ++j) any |= flags[i + j];
    if (any)
      for (int64_t j = 0; j < 8; ++j) emit(i + j);
  }
}

// Numbers of x in [low, high], written to `between` (n + 1), and how many are below.
template <typename T>
FASTCAM_INLINE int64_t partition(const T* x, int64_t n, T low, T high, T* between, int64_t& below) {
  int64_t count = 0;
  below = 0;
  for (int64_t i = 0; i < n; i += BLOCK) {
    const int64_t m = std::min(BLOCK, n - i);
    T v[BLOCK];
    uint8_t inside[BLOCK] = {};
    int32_t less = 0;
    for (int64_t j = 0; j < m; ++j) v[j] = number(x[i + j]);
    for (int64_t j = 0; j < m; ++j) less += v[j] < low;
    for (int64_t j = 0; j < m; ++j) inside[j] = (v[j] >= low) & (v[j] <= high);
    below += less;
    each_flag(inside, [&](int64_t j) {
      between[count] = v[j];
      count += inside[j];
    });
  }
  return count;
}

// Sums and maxima of 16 interleaved parts.
template <typename T>
FASTCAM_INLINE void reduce(const T* x, int64_t n, double* sum, T* largest) {
  for (int64_t j = 0; j < 16; ++j) sum[j] = 0;
  for (int64_t j = 0; j < 16; ++j) largest[j] = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t m = std::min<int64_t>(16, n - i);
    for (int64_t j = 0; j < m; ++j) sum[j] += number(x[i + j]);
    for (int64_t j = 0; j < m; ++j) largest[j] = larger(largest[j], number(x[i + j]));
  }
}

// A row with margins of -inf, `reach` wide, and the maxima of the windows' rows.
template <typename T>
FASTCAM_INLINE void load_row(const T* x, int64_t W, int64_t reach, T* padded, T* widest) {
  std::fill(padded, padded + reach, -std::numeric_limits<T>::infinity());
  std::fill(padded + reach + W, padded + W + 2 * reach, -std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < W; ++i) padded[reach + i] = number(x[i]);
  for (int64_t i = 0; i < W; ++i) widest[i] = larger(padded[i], padded[i + 1]);
  for (int64_t j = 2; j <= 2 * reach; ++j)
    for (int64_t i = 0; i < W; ++i) widest[i] = larger(widest[i], padded[i + j]);
}

// Flags of a row's peaks. `widest` of row y is in row y % (2 reach + 1) of the ring; `before` and `after` are scratch.
template <typename T>
FASTCAM_INLINE void flag_row(const T* padded, const T* ring, int64_t y, int64_t H, int64_t W, int64_t reach,
                             T threshold, T* __restrict__ before, T* __restrict__ after, uint8_t* __restrict__ flags) {
  const int64_t window = 2 * reach + 1;
  std::copy(padded, padded + W, before);
  std::fill(after, after + W, threshold);
  for (int64_t j = 1; j < reach; ++j)
    for (int64_t i = 0; i < W; ++i) before[i] = larger(before[i], padded[i + j]);
  for (int64_t j = reach + 1; j <= 2 * reach; ++j)
    for (int64_t i = 0; i < W; ++i) after[i] = larger(after[i], padded[i + j]);
  for (int64_t r = std::max<int64_t>(0, y - reach); r < y; ++r) {
    const T* above = ring + r % window * W;
    for (int64_t i = 0; i < W; ++i) before[i] = larger(before[i], above[i]);
  }
  for (int64_t r = y + 1; r <= std::min(H - 1, y + reach); ++r) {
    const T* below = ring + r % window * W;
    for (int64_t i = 0; i < W; ++i) after[i] = larger(after[i], below[i]);
  }
  for (int64_t i = 0; i < W; ++i) flags[i] = (padded[reach + i] > before[i]) & (padded[reach + i] >= after[i]);
}

// The smallest T that is not below t.
template <typename T>
T rounded_up(double t) {
  const T near = static_cast<T>(t);
  return static_cast<double>(near) < t ? std::nextafter(near, std::numeric_limits<T>::infinity()) : near;
}

#define FASTCAM_PEAK_FIND(T, SUFFIX)                                                                               \
  FASTCAM_MULTIVERSION int64_t partition_##SUFFIX(const T* x, int64_t n, T low, T high, T* between,                \
                                                  int64_t& below) {                                                \
    return partition(x, n, low, high, between, below);                                                             \
  }                                                                                                                \
  FASTCAM_MULTIVERSION void reduce_##SUFFIX(const T* x, int64_t n, double* sum, T* largest) {                      \
    reduce(x, n, sum, largest);                                                                                    \
  }                                                                                                                \
  FASTCAM_MULTIVERSION void load_row_##SUFFIX(const T* x, int64_t W, int64_t reach, T* padded, T* widest) {        \
    load_row(x, W, reach, padded, widest);                                                                         \
  }                                                                                                                \
  FASTCAM_MULTIVERSION void flag_row_##SUFFIX(const T* padded, const T* ring, int64_t y, int64_t H, int64_t W,     \
                                              int64_t reach, T threshold, T* before, T* after, uint8_t* flags) {   \
    flag_row(padded, ring, y, H, W, reach, threshold, before, after, flags);                                       \
  }                                                                                                                \
  struct Rows_##SUFFIX {                                                                                           \
    static constexpr auto partition = partition_##SUFFIX;                                                          \
    static constexpr auto reduce = reduce_##SUFFIX;                                                                \
    static constexpr auto load_row = load_row_##SUFFIX;                                                            \
    static constexpr auto flag_row = flag_row_##SUFFIX;                                                            \
  };

FASTCAM_PEAK_FIND(float, f32)
FASTCAM_PEAK_FIND(double, f64)

// The lower median of n numbers: between two numbers of a sample that it is nearly sure to lie between; by itself where
// it does not. `scratch` holds n + 1.
template <typename T, typename Rows>
T median(const T* x, int64_t n, T* scratch) {
  const int64_t rank = (n - 1) / 2;
  if (n > SMALL) {
    const int64_t m = std::min(SAMPLE, n / 16), step = n / m;
    for (int64_t i = 0; i < m; ++i) scratch[i] = number(x[i * step]);
    const int64_t off = static_cast<int64_t>(2 * std::sqrt(static_cast<double>(m)));  // four standard deviations
    const int64_t l = std::max<int64_t>(0, m / 2 - off), h = std::min(m - 1, m / 2 + off);
    std::nth_element(scratch, scratch + l, scratch + m);
    std::nth_element(scratch + l, scratch + h, scratch + m);
    const T low = scratch[l], high = scratch[h];
    int64_t below;
    const int64_t count = Rows::partition(x, n, low, high, scratch, below);
    if (below <= rank && rank < below + count) {
      if (low == high) return low;
      std::nth_element(scratch, scratch + rank - below, scratch + count);
      return scratch[rank - below];
    }
  }
  for (int64_t i = 0; i < n; ++i) scratch[i] = number(x[i]);
  std::nth_element(scratch, scratch + rank, scratch + n);
  return scratch[rank];
}

template <typename T, typename Rows>
T threshold(const T* x, int64_t n, int rule, double constant, T* scratch) {
  if (rule == CONSTANT) return rounded_up<T>(constant);
  if (rule == MEDIAN) return median<T, Rows>(x, n, scratch);
  double sums[16], sum = 0;
  T largest[16];
  Rows::reduce(x, n, sums, largest);
  for (double part : sums) sum += part;
  const T top = *std::max_element(largest, largest + 16);
  const double mean = sum / static_cast<double>(n);
  return rule == MAXIMUM || mean > static_cast<double>(top) ? top : rounded_up<T>(mean);
}

template <typename T, typename Rows>
void find(const T* maps, int64_t* places, int64_t* counts, int64_t BC, int64_t H, int64_t W, int64_t most,
          int64_t window, int rule, double constant, int threads) {
  const int64_t reach = window / 2, wide = W + 2 * reach, blocks = (W + BLOCK - 1) / BLOCK * BLOCK;
  parallel_for(BC, 1, threads, [&](int64_t begin, int64_t end) {
    const Memory<T> rows = buffer<T>(window * (wide + W) + 2 * W), scratch = buffer<T>(rule == MEDIAN ? H * W + 1 : 1);
    const Memory<uint8_t> flags = buffer<uint8_t>(blocks, 0);
    T *const padded = rows.get(), *const ring = padded + window * wide, *const before = ring + window * W;
    for (int64_t map = begin; map < end; ++map) {
      const T* x = maps + map * H * W;
      const T least = threshold<T, Rows>(x, H * W, rule, constant, scratch.get());
      int64_t* const to = places + map * (most + 1);
      int64_t count = 0, loaded = 0;
      for (int64_t y = 0; y < H; ++y) {
        for (; loaded <= std::min(H - 1, y + reach); ++loaded)
          Rows::load_row(x + loaded * W, W, reach, padded + loaded % window * wide, ring + loaded % window * W);
        Rows::flag_row(padded + y % window * wide, ring, y, H, W, reach, least, before, before + W, flags.get());
        for (int64_t i = 0; i < W; i += BLOCK)
          each_flag(flags.get() + i, [&](int64_t j) {
            to[count] = y * W + i + j;
            count += flags[i + j];
          });
      }
      counts[map] = count;
    }
  });
}

}  // namespace

void peak_find_fwd(const void* maps, int64_t* places, int64_t* counts, bool f64, int64_t BC, int64_t H, int64_t W,
                   int64_t most, int64_t window, int rule, double constant, int threads) {
  if (f64) {
    find<double, Rows_f64>(static_cast<const double*>(maps), places, counts, BC, H, W, most, window, rule, constant,
                           threads);
  } else {
    find<float, Rows_f32>(static_cast<const float*>(maps), places, counts, BC, H, W, most, window, rule, constant,
                          threads);
  }
}

void peak_find_list(const int64_t* places, const int64_t* counts, int64_t* peaks, int64_t B, int64_t C, int64_t W,
                    int64_t most) {
  for (int64_t map = 0; map < B * C; ++map)
    for (int64_t i = 0; i < counts[map]; ++i, peaks += 4) {
      const int64_t at = places[map * (most + 1) + i];
      peaks[0] = map / C;
      peaks[1] = map % C;
      peaks[2] = at / W;
      peaks[3] = at % W;
    }
}

}  // namespace fastcam
