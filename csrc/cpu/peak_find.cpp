// Local maxima of maps (BC, H, W). A pixel is a peak where it is larger than all before it in its window, in row-major
// order, and at least as large as all after it and its map's threshold. NaN counts as -inf, which is never a peak.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/memory.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BLOCK = 64;    // flags at a time
constexpr int64_t SMALL = 2048;  // maps whose median is selected directly
constexpr int64_t SAMPLE = 4096;
constexpr int BITS = 8;  // of the keys that a round of selection looks at

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
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    T v[BLOCK];
    uint8_t inside[BLOCK];
    int32_t less = 0;
    for (int64_t j = 0; j < BLOCK; ++j) v[j] = number(x[i + j]);
    for (int64_t j = 0; j < BLOCK; ++j) less += v[j] < low;
    for (int64_t j = 0; j < BLOCK; ++j) inside[j] = (v[j] >= low) & (v[j] <= high);
    below += less;
    each_flag(inside, [&](int64_t j) {
      between[count] = v[j];
      count += inside[j];
    });
  }
  for (; i < n; ++i) {
    between[count] = number(x[i]);
    below += between[count] < low;
    count += between[count] >= low && between[count] <= high;
  }
  return count;
}

// Sums and maxima of 16 interleaved parts.
template <typename T>
FASTCAM_INLINE void reduce(const T* x, int64_t n, double* sums, T* tops) {
  double sum[16] = {};
  T largest[16];
  std::fill(largest, largest + 16, -std::numeric_limits<T>::infinity());
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t j = 0; j < 16; ++j) largest[j] = larger(largest[j], number(x[i + j]));
    for (int64_t j = 0; j < 16; ++j) sum[j] += number(x[i + j]);
  }
  for (int64_t j = 0; i + j < n; ++j) {
    largest[j] = larger(largest[j], number(x[i + j]));
    sum[j] += number(x[i + j]);
  }
  std::copy(sum, sum + 16, sums);
  std::copy(largest, largest + 16, tops);
}

// Signed integers in the order of the numbers, and back: the bits of negative ones turned round.
template <typename T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename K>
FASTCAM_INLINE K turned(K bits) {
  return bits ^ ((bits >> (8 * sizeof(K) - 1)) & std::numeric_limits<K>::max());
}

// The number of a rank among n. Rounds of counting by the next bits in which they differ, without a branch on a number:
// what is left is one of 256 parts. `keys` (n + 1) is scratch.
template <typename T>
FASTCAM_INLINE T select(const T* x, int64_t n, int64_t rank, Key<T>* keys) {
  using K = Key<T>;
  using U = std::make_unsigned_t<K>;
  for (int64_t i = 0; i < n; ++i) {
    const T v = number(x[i]);
    K bits;
    std::memcpy(&bits, &v, sizeof(T));
    keys[i] = turned(bits);
  }
  for (;;) {
    K low = keys[0], high = keys[0];
    for (int64_t i = 1; i < n; ++i) low = keys[i] < low ? keys[i] : low;
    for (int64_t i = 1; i < n; ++i) high = keys[i] > high ? keys[i] : high;
    if (low == high) {
      const K bits = turned(low);
      T v;
      std::memcpy(&v, &bits, sizeof(T));
      return v;
    }
    int shift = 0;
    while ((U(high) - U(low)) >> shift >> BITS) ++shift;
    int32_t counts[1 << BITS] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[(U(keys[i]) - U(low)) >> shift];
    U part = 0;
    for (; rank >= counts[part]; ++part) rank -= counts[part];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const K key = keys[i];
      keys[left] = key;
      left += (U(key) - U(low)) >> shift == part;
    }
    n = left;
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

#define FASTCAM_PEAK_FIND(T, SUFFIX)                                                                                  \
  FASTCAM_MULTIVERSION int64_t partition_##SUFFIX(const T* x, int64_t n, T low, T high, T* between, int64_t& below) { \
    return partition(x, n, low, high, between, below);                                                                \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION T select_##SUFFIX(const T* x, int64_t n, int64_t rank, Key<T>* keys) {                         \
    return select(x, n, rank, keys);                                                                                  \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void reduce_##SUFFIX(const T* x, int64_t n, double* sum, T* largest) {                         \
    reduce(x, n, sum, largest);                                                                                       \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void load_row_##SUFFIX(const T* x, int64_t W, int64_t reach, T* padded, T* widest) {           \
    load_row(x, W, reach, padded, widest);                                                                            \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void flag_row_##SUFFIX(const T* padded, const T* ring, int64_t y, int64_t H, int64_t W,        \
                                              int64_t reach, T threshold, T* before, T* after, uint8_t* flags) {      \
    flag_row(padded, ring, y, H, W, reach, threshold, before, after, flags);                                          \
  }                                                                                                                   \
  struct Rows_##SUFFIX {                                                                                              \
    static constexpr auto partition = partition_##SUFFIX;                                                             \
    static constexpr auto select = select_##SUFFIX;                                                                   \
    static constexpr auto reduce = reduce_##SUFFIX;                                                                   \
    static constexpr auto load_row = load_row_##SUFFIX;                                                               \
    static constexpr auto flag_row = flag_row_##SUFFIX;                                                               \
  };

FASTCAM_PEAK_FIND(float, f32)
FASTCAM_PEAK_FIND(double, f64)

// The lower median of n numbers: of those between two numbers of a sample, between which it nearly surely lies; of all
// where it does not. `between` and `keys` hold n + 1.
template <typename T, typename Rows>
T median(const T* x, int64_t n, T* between, Key<T>* keys) {
  const int64_t rank = (n - 1) / 2;
  if (n > SMALL) {
    const int64_t m = std::min(SAMPLE, n / 16), step = n / m;
    for (int64_t i = 0; i < m; ++i) between[i] = x[i * step];
    const int64_t off = static_cast<int64_t>(2 * std::sqrt(static_cast<double>(m)));  // four standard deviations
    const T low = Rows::select(between, m, m / 2 - off, keys), high = Rows::select(between, m, m / 2 + off, keys);
    int64_t below;
    const int64_t count = Rows::partition(x, n, low, high, between, below);
    if (below <= rank && rank < below + count) return Rows::select(between, count, rank - below, keys);
  }
  return Rows::select(x, n, rank, keys);
}

template <typename T, typename Rows>
T threshold(const T* x, int64_t n, int rule, double constant, T* between, Key<T>* keys) {
  if (rule == CONSTANT) return rounded_up<T>(constant);
  if (rule == MEDIAN) return median<T, Rows>(x, n, between, keys);
  double sums[16], sum = 0;
  T largest[16];
  Rows::reduce(x, n, sums, largest);
  for (double part : sums) sum += part;
  const T top = *std::max_element(largest, largest + 16);
  const double mean = sum / static_cast<double>(n);
  return rule == MAXIMUM || mean > static_cast<double>(top) ? top : rounded_up<T>(mean);  // NaN: infinities cancel
}

template <typename T, typename Rows>
void find(const T* maps, int64_t* places, int64_t* counts, int64_t BC, int64_t H, int64_t W, int64_t most,
          int64_t window, int rule, double constant, int threads) {
  const int64_t reach = window / 2, wide = W + 2 * reach, blocks = (W + BLOCK - 1) / BLOCK * BLOCK;
  parallel_for(BC, 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t sorted = rule == MEDIAN ? H * W + 1 : 1;
    const Memory<T> rows = buffer<T>(window * (wide + W) + 2 * W), between = buffer<T>(sorted);
    const Memory<Key<T>> keys = buffer<Key<T>>(sorted);
    const Memory<uint8_t> flags = buffer<uint8_t>(blocks, 0);
    T *const padded = rows.get(), *const ring = padded + window * wide, *const before = ring + window * W;
    for (int64_t map = begin; map < end; ++map) {
      const T* x = maps + map * H * W;
      const T least = threshold<T, Rows>(x, H * W, rule, constant, between.get(), keys.get());
      int64_t* const to = places + map * (most + 1);
      int64_t count = 0, loaded = 0;
      for (int64_t y = 0; y < H && least == least; ++y) {
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
