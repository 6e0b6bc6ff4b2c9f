#include "cpu/lattice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/math.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int MAX_D = 15;
constexpr int64_t TILE = 64;      // points whose simplices are searched together
constexpr int64_t GROUP = 16;     // points whose tables lie together
constexpr float LIMIT = 4194304;  // 2^22: larger coordinates have no fraction worth the name in float
constexpr int64_t GRAIN = 4096;   // vertices a task handles
constexpr int64_t CHUNK = 256;    // vertices of a chain that are blurred together

// What the search finds about TILE points, points innermost.
struct Simplices {
  float weight[MAX_D + 2][TILE];
  int32_t base[MAX_D + 1][TILE];  // coordinates of the vertex with remainder 0, over d + 1
  int32_t rank[MAX_D + 1][TILE];
  float elevated[MAX_D + 1][TILE];
};

// What each feature is multiplied by, so that the blur has unit variance (Adams et al., section 3).
std::vector<float> scales(int64_t d) {
  std::vector<float> scale(d);
  const float step = static_cast<float>(std::sqrt(2.0 / 3) * (d + 1));
  for (int64_t j = 0; j < d; ++j) scale[j] = static_cast<float>(step / std::sqrt((j + 1.0) * (j + 2.0)));
  return scale;
}

// features (d, count), rows N apart -> coordinates on the hyperplane of sum 0.
FASTCAM_INLINE void elevate(const float* features, const float* scale, int64_t N, int64_t d, int64_t count,
                            float (*elevated)[TILE]) {
  float total[TILE] = {};
  for (int64_t j = d; j > 0; --j) {
    const float factor = scale[j - 1], times = static_cast<float>(j);
    const float* feature = features + (j - 1) * N;
    for (int64_t i = 0; i < count; ++i) {
      const float scaled = feature[i] * factor;
      elevated[j][i] = total[i] - times * scaled;
      total[i] += scaled;
    }
  }
  for (int64_t i = 0; i < count; ++i) elevated[0][i] = total[i];
}

// The simplex of each of `count` points, whose coordinates are below LIMIT (Adams et al., section 3).
FASTCAM_MULTIVERSION void find_simplices(const float* features, const float* scale, int64_t N, int64_t d, int64_t count,
                                         Simplices& s) {
  const float axes = static_cast<float>(d + 1), inverse = 1.0f / axes;
  elevate(features, scale, N, d, count, s.elevated);
  int32_t sum[TILE] = {};
  for (int64_t j = 0; j <= d; ++j)
    for (int64_t i = 0; i < count; ++i) {
      const float nearest = (s.elevated[j][i] * inverse + 12582912.0f) - 12582912.0f;  // rounds half to even
      s.weight[j][i] = s.elevated[j][i] - nearest * axes;
      s.base[j][i] = static_cast<int32_t>(nearest);
      s.rank[j][i] = 0;
      sum[i] += static_cast<int32_t>(nearest);
    }
  for (int64_t j = 0; j < d; ++j)
    for (int64_t k = j + 1; k <= d; ++k)
      for (int64_t i = 0; i < count; ++i) {
        const int32_t below = s.weight[j][i] < s.weight[k][i];
        s.rank[j][i] += below;
        s.rank[k][i] += 1 - below;
      }
  const int32_t n = static_cast<int32_t>(d + 1);
  for (int64_t j = 0; j <= d; ++j)
    for (int64_t i = 0; i < count; ++i) {
      const int32_t rank = s.rank[j][i] + sum[i];
      const int32_t wrap = (rank < 0) - (rank > d);
      s.rank[j][i] = rank + wrap * n;
      s.base[j][i] += wrap;
      s.elevated[j][i] = (s.elevated[j][i] - static_cast<float>(s.base[j][i] * n)) * inverse;
    }
  for (int64_t j = 0; j <= d + 1; ++j)
    for (int64_t i = 0; i < count; ++i) s.weight[j][i] = 0;
  for (int64_t j = 0; j <= d; ++j)
    for (int64_t i = 0; i < count; ++i) {
      s.weight[d - s.rank[j][i]][i] += s.elevated[j][i];
      s.weight[d + 1 - s.rank[j][i]][i] -= s.elevated[j][i];
    }
  for (int64_t i = 0; i < count; ++i) s.weight[0][i] += 1.0f + s.weight[d + 1][i];
}

[[noreturn]] void refuse_features() {
  throw std::invalid_argument(
      "crf_mean_field: expected finite lattice features (coordinates over sxy, image over srgb) of less than about a "
      "million, got larger or NaN");
}

// The bits of a float, made so that integers are ordered as the floats are, with NaN outside of all; and back.
FASTCAM_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Smallest and largest of n numbers; false if one is not finite or not below LIMIT.
FASTCAM_MULTIVERSION bool range_of(const float* x, int64_t n, float* smallest, float* largest) {
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits = ordered(bits);
    low = bits < low ? bits : low;
    high = bits > high ? bits : high;
  }
  low = ordered(low);
  high = ordered(high);
  std::memcpy(smallest, &low, sizeof low);
  std::memcpy(largest, &high, sizeof high);
  return *smallest > -LIMIT && *largest < LIMIT;
}

uint32_t look(const uint64_t* slots, int shift, int id_bits, const uint64_t* keys, int32_t* ids);
uint32_t look(const unsigned __int128* slots, int shift, int id_bits, const unsigned __int128* keys, int32_t* ids);

// Keys -> 0, 1, 2, ... in the order in which they are first seen. Open addressing; a slot holds key and number in one
// word, and the table grows to stay at most half full.
template <typename Word>
class Numbering {
 public:
  Numbering(int id_bits, int64_t expected) : id_bits_(id_bits) {
    while (shift_ > 64 - 40 && (int64_t(1) << (64 - shift_)) < 2 * expected) --shift_;
    slots_.assign(int64_t(1) << (64 - shift_), EMPTY);
  }

  int32_t number(Word key) {
    int64_t at = find(key);
    if (slots_[at] == EMPTY) {
      if (2 * (static_cast<int64_t>(keys_.size()) + 1) > static_cast<int64_t>(slots_.size())) {
        grow();
        at = find(key);
      }
      slots_[at] = slot(key, keys_.size());
      keys_.push_back(key);
    }
    return id(slots_[at]);
  }
  // -1 for an unknown key.
  int32_t lookup(Word key) const {
    const Word word = slots_[find(key)];
    return word == EMPTY ? -1 : id(word);
  }
  void prefetch(Word key) const { __builtin_prefetch(&slots_[home(key, shift_)]); }
  const std::vector<Word>& keys() const { return keys_; }

  static constexpr int32_t ABSENT = -1, ELSEWHERE = -2;

  // Numbers of GROUP keys by a look at their first slots: ABSENT for unknown keys, ELSEWHERE where another key has the
  // slot. Returns a bit for each of these.
  uint32_t first_look(const Word* keys, int32_t* ids) const { return look(slots_.data(), shift_, id_bits_, keys, ids); }

  static FASTCAM_INLINE uint32_t look_at(const Word* slots, int shift, int id_bits, const Word* keys, int32_t* ids) {
    for (int64_t i = 0; i < GROUP; ++i) {
      const Word word = slots[home(keys[i], shift)];
      const int32_t id = static_cast<int32_t>(word & ((Word(1) << id_bits) - 1));
      ids[i] = (word >> id_bits) == keys[i] ? id : word == EMPTY ? ABSENT : ELSEWHERE;
    }
    uint32_t missed = 0;
    for (int64_t i = 0; i < GROUP; ++i) missed |= (static_cast<uint32_t>(ids[i]) >> 31) << i;
    return missed;
  }

 private:
  static constexpr Word EMPTY = ~Word(0);

  Word slot(Word key, size_t number) const { return (key << id_bits_) | static_cast<Word>(number); }
  int32_t id(Word word) const { return static_cast<int32_t>(word & ((Word(1) << id_bits_) - 1)); }
  static FASTCAM_INLINE int64_t home(Word key, int shift) {
    uint64_t h = static_cast<uint64_t>(key);
    if constexpr (sizeof(Word) > 8) h ^= static_cast<uint64_t>(key >> 64) * 0xc2b2ae3d27d4eb4full;
    return static_cast<int64_t>((h * 0x9e3779b97f4a7c15ull) >> shift);
  }
  int64_t find(Word key) const {
    const int64_t mask = static_cast<int64_t>(slots_.size()) - 1;
    int64_t at = home(key, shift_);
    while (slots_[at] != EMPTY && (slots_[at] >> id_bits_) != key) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    shift_ -= 2;
    slots_.assign(slots_.size() * 4, EMPTY);
    for (size_t i = 0; i < keys_.size(); ++i) slots_[find(keys_[i])] = slot(keys_[i], i);
  }

  int id_bits_, shift_ = 64 - 12;
  std::vector<Word> slots_;
  std::vector<Word> keys_;
};

FASTCAM_MULTIVERSION uint32_t look(const uint64_t* slots, int shift, int id_bits, const uint64_t* keys, int32_t* ids) {
  return Numbering<uint64_t>::look_at(slots, shift, id_bits, keys, ids);
}
uint32_t look(const unsigned __int128* slots, int shift, int id_bits, const unsigned __int128* keys, int32_t* ids) {
  return Numbering<unsigned __int128>::look_at(slots, shift, id_bits, keys, ids);
}

// Where a vertex lies: its coordinates are (d + 1) q_j + r with a remainder r of its own (r - (d + 1) where the simplex
// wraps, which moves q_j). r takes the lowest bits of a key, q_j those from shift[j] on; the last coordinate is
// implied.
struct Packing {
  static constexpr int REMAINDER_BITS = 4;
  int64_t d;
  int32_t low[MAX_D];    // smallest q_j
  int shift[MAX_D + 1];  // the last: all bits

  Packing(const std::vector<double>& smallest, const std::vector<int>& bits) : d(bits.size()) {
    shift[0] = REMAINDER_BITS;
    for (int64_t j = 0; j < d; ++j) {
      low[j] = static_cast<int32_t>(smallest[j]);
      shift[j + 1] = shift[j] + bits[j];
    }
  }

  // What one more of q_j adds to a key.
  template <typename Word>
  Word unit(int64_t j) const {
    return j < d ? Word(1) << shift[j] : Word(0);
  }

  // What leads from a vertex to the next along an axis, d more on its coordinate and 1 less on all others; from one of
  // remainder 0, `wrapped`.
  template <typename Word>
  Word step(int64_t axis, bool wrapped) const {
    Word ones = 0;
    for (int64_t j = 0; j < d; ++j) ones += unit<Word>(j);
    return unit<Word>(axis) + (wrapped ? static_cast<Word>(d) - ones : ~Word(0));
  }
};

// Keys of all vertices of TILE points' simplices: keys[k][i].
template <typename Word>
FASTCAM_INLINE void pack(const Packing& packing, const Simplices& s, Word (*keys)[TILE]) {
  const int64_t d = packing.d;
  Word base[TILE] = {};
  for (int64_t j = 0; j < d; ++j)
    for (int64_t i = 0; i < TILE; ++i)
      base[i] += static_cast<Word>(static_cast<uint32_t>(s.base[j][i] - packing.low[j])) << packing.shift[j];
  for (int64_t j = 0; j <= d; ++j) {  // the coordinates by falling rank lead from vertex to vertex
    const Word unit = packing.unit<Word>(j);
    for (int64_t i = 0; i < TILE; ++i) keys[d - s.rank[j][i]][i] = unit;
  }
  for (int64_t k = 0; k <= d; ++k)
    for (int64_t i = 0; i < TILE; ++i) {
      const Word step = keys[k][i];
      keys[k][i] = base[i];
      base[i] += 1 - step;
    }
}
FASTCAM_MULTIVERSION void keys_of(const Packing& packing, const Simplices& s, uint64_t (*keys)[TILE]) {
  pack(packing, s, keys);
}
void keys_of(const Packing& packing, const Simplices& s, unsigned __int128 (*keys)[TILE]) { pack(packing, s, keys); }

template <typename Row>
struct Splat {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const int32_t* vertex, const float* weight, int64_t corners, int64_t begin,
                                 int64_t end, const T* x, const T* scale, T* z, int64_t width) {
    for (int64_t i = begin; i < end; ++i) {
      Row row = Row::load(x + (i - begin) * width + c);
      if (scale) row = row * scale[i];
      const int64_t at = i / GROUP * GROUP * corners + i % GROUP;
      for (int64_t k = 0; k < corners; ++k) {
        T* to = z + vertex[at + k * GROUP] * width + c;
        (Row::load(to) + row * static_cast<T>(weight[at + k * GROUP])).store(to);
      }
    }
  }
};

template <typename Row>
struct Slice {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const int32_t* vertex, const float* weight, int64_t corners, int64_t begin,
                                 int64_t end, const T* z, T alpha, const T* scale, T* out, int64_t width) {
    for (int64_t i = begin; i < end; ++i) {
      Row sum = Row::zero();
      const int64_t at = i / GROUP * GROUP * corners + i % GROUP;
      for (int64_t k = 0; k < corners; ++k)
        sum = sum + Row::load(z + vertex[at + k * GROUP] * width + c) * static_cast<T>(weight[at + k * GROUP]);
      (sum * (scale ? alpha * scale[i] : alpha)).store(out + (i - begin) * width + c);
    }
  }
};

template <typename Row>
struct Blur {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const int32_t* chains, int64_t begin, int64_t end, int32_t zero,
                                 int32_t waste, T* z, int64_t width) {
    Row previous = Row::zero(), own = Row::zero();
    for (int64_t e = begin; e < end; ++e) {
      const Row next = Row::load(z + chains[e + 1] * width + c);
      const int64_t to = chains[e] == zero ? waste : chains[e];
      (own + (previous + next) * T(0.5)).store(z + to * width + c);
      previous = own;
      own = next;
    }
  }
};

// Vertices [begin, end) and their neighbours, elsewhere.
template <typename Row>
struct BlurAway {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const int32_t* after, const int32_t* before, int64_t begin, int64_t end,
                                 const T* z, T* out, int64_t width) {
    for (int64_t v = begin; v < end; ++v) {
      const Row near = Row::load(z + before[v] * width + c) + Row::load(z + after[v] * width + c);
      (Row::load(z + v * width + c) + near * T(0.5)).store(out + v * width + c);
    }
  }
};

// The same for rows of one number: vectors run over the points or vertices.
template <typename T>
FASTCAM_INLINE void splat_numbers(const int32_t* vertex, const float* weight, int64_t corners, int64_t begin,
                                  int64_t end, const T* x, const T* scale, T* z) {
  for (int64_t group = begin; group < end; group += GROUP) {
    const int64_t n = std::min(GROUP, end - group);
    T value[GROUP] = {}, part[(MAX_D + 1) * GROUP];
    for (int64_t i = 0; i < n; ++i) value[i] = x[group - begin + i] * (scale ? scale[group + i] : T(1));
    const float* w = weight + group * corners;
    const int32_t* v = vertex + group * corners;
    for (int64_t k = 0; k < corners; ++k)
      for (int64_t i = 0; i < GROUP; ++i) part[k * GROUP + i] = value[i] * static_cast<T>(w[k * GROUP + i]);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < corners; ++k) z[v[k * GROUP + i]] += part[k * GROUP + i];
  }
}

template <typename T>
FASTCAM_INLINE void slice_numbers(const int32_t* vertex, const float* weight, int64_t corners, int64_t begin,
                                  int64_t end, const T* z, T alpha, const T* scale, T* out) {
  for (int64_t group = begin; group < end; group += GROUP) {
    T sum[GROUP] = {};
    for (int64_t k = 0; k < corners; ++k) {
      const int64_t at = group * corners + k * GROUP;
      for (int64_t i = 0; i < GROUP; ++i) sum[i] += z[vertex[at + i]] * static_cast<T>(weight[at + i]);
    }
    for (int64_t i = 0; i < std::min(GROUP, end - group); ++i)
      out[group - begin + i] = sum[i] * (scale ? alpha * scale[group + i] : alpha);
  }
}

template <typename T>
FASTCAM_INLINE void blur_numbers(const int32_t* chains, int64_t begin, int64_t end, int32_t zero, int32_t waste, T* z) {
  T old[CHUNK + 2] = {}, blurred[CHUNK];  // what stood in chains[e - 1], chains[e], ...
  for (int64_t e = begin; e < end; e += CHUNK) {
    const int64_t n = std::min(CHUNK, end - e);
    for (int64_t i = 0; i < n; ++i) old[i + 2] = z[chains[e + i + 1]];
    for (int64_t i = 0; i < n; ++i) blurred[i] = old[i + 1] + T(0.5) * (old[i] + old[i + 2]);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) z[chains[e + i] == zero ? waste : chains[e + i]] = blurred[i];
    old[0] = old[n];
    old[1] = old[n + 1];
  }
}

template <typename T>
FASTCAM_INLINE void blur_numbers_away(const int32_t* after, const int32_t* before, int64_t begin, int64_t end,
                                      const T* z, T* out) {
#pragma GCC ivdep
  for (int64_t v = begin; v < end; ++v) out[v] = z[v] + T(0.5) * (z[before[v]] + z[after[v]]);
}

#define FASTCAM_ROW_STEPS(T)                                                                                          \
  FASTCAM_MULTIVERSION void splat_rows(const int32_t* vertex, const float* weight, int64_t corners, int64_t begin,    \
                                       int64_t end, const T* x, const T* scale, T* z, int64_t width) {                \
    if (width == 1) return splat_numbers(vertex, weight, corners, begin, end, x, scale, z);                           \
    each_piece<Splat, T>(width, vertex, weight, corners, begin, end, x, scale, z, width);                             \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void slice_rows(const int32_t* vertex, const float* weight, int64_t corners, int64_t begin,    \
                                       int64_t end, const T* z, T alpha, const T* scale, T* out, int64_t width) {     \
    if (width == 1) return slice_numbers(vertex, weight, corners, begin, end, z, alpha, scale, out);                  \
    each_piece<Slice, T>(width, vertex, weight, corners, begin, end, z, alpha, scale, out, width);                    \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void blur_rows(const int32_t* chains, int64_t begin, int64_t end, int32_t zero, int32_t waste, \
                                      T* z, int64_t width) {                                                          \
    if (width == 1) return blur_numbers(chains, begin, end, zero, waste, z);                                          \
    each_piece<Blur, T>(width, chains, begin, end, zero, waste, z, width);                                            \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void blur_rows_away(const int32_t* after, const int32_t* before, int64_t begin, int64_t end,   \
                                           const T* z, T* out, int64_t width) {                                       \
    if (width == 1) return blur_numbers_away(after, before, begin, end, z, out);                                      \
    each_piece<BlurAway, T>(width, after, before, begin, end, z, out, width);                                         \
  }
FASTCAM_ROW_STEPS(float)
FASTCAM_ROW_STEPS(double)
#undef FASTCAM_ROW_STEPS

}  // namespace

Lattice::Lattice(const float* features, int64_t d, int64_t N, bool few, int threads) : d_(d), N_(N), few_(few) {
  if (d < 1 || d > MAX_D)
    throw std::invalid_argument("Lattice: expected 1 to " + std::to_string(MAX_D) + " features, got " +
                                std::to_string(d));
  if (N < 1 || N > std::numeric_limits<int32_t>::max() / (d + 1) / 2 - 1)
    throw std::invalid_argument("Lattice: expected 1 to 2**30 / (d + 1) points, got " + std::to_string(N));

  // How many bits a key needs for each coordinate: bounds of the elevated coordinates, from those of the features and
  // of the point of zeros.
  const std::vector<float> scale = scales(d);
  std::vector<double> smallest(d), largest(d), low(d);
  std::vector<int> bits(d);
  for (int64_t j = 0; j < d; ++j) {
    float a, b;
    if (!range_of(features + j * N, N, &a, &b)) refuse_features();
    smallest[j] = std::min(0.0f, a * scale[j]);
    largest[j] = std::max(0.0f, b * scale[j]);
  }
  int id_bits = 1, sum = Packing::REMAINDER_BITS;
  while ((int64_t(1) << id_bits) <= (N + 1) * (d + 1)) ++id_bits;
  double above_low = 0, above_high = 0;  // the part of the features after j
  for (int64_t j = d; j >= 0; --j) {
    const double a = above_low - (j > 0 ? j * largest[j - 1] : 0), b = above_high - (j > 0 ? j * smallest[j - 1] : 0);
    if (!(a > -LIMIT && b < LIMIT)) refuse_features();
    if (j < d) {
      constexpr double MARGIN = 4;  // a point's vertices lie within d + 1 of it, their neighbours within d of them
      low[j] = std::floor(a / (d + 1)) - MARGIN;
      const double span = std::ceil(b / (d + 1)) + MARGIN - low[j];
      while (std::ldexp(1.0, bits[j]) <= span) ++bits[j];
      sum += bits[j];
    }
    if (j > 0) {
      above_low += smallest[j - 1];
      above_high += largest[j - 1];
    }
  }
  if (sum + id_bits < 64) {
    build<uint64_t>(low, bits, id_bits, features, threads);
  } else if (sum + id_bits < 128) {
    build<unsigned __int128>(low, bits, id_bits, features, threads);
  } else {
    throw std::invalid_argument("Lattice: expected features whose lattice coordinates fit 128 bits together, got " +
                                std::to_string(sum + id_bits) + " bits; use larger standard deviations");
  }
}

template <typename Word>
void Lattice::build(const std::vector<double>& low, const std::vector<int>& bits, int id_bits, const float* features,
                    int threads) {
  const int64_t d = d_, N = N_, corners = d + 1, bands = (N + BAND - 1) / BAND;
  const Packing packing(low, bits);
  const std::vector<float> scale = scales(d);
  const int64_t room = (N + GROUP - 1) / GROUP * GROUP * corners;
  vertex_ = buffer<int32_t>(room);
  weight_ = buffer<float>(room);

  // Every band numbers the vertices it meets.
  std::vector<std::vector<Word>> met(bands);
  parallel_for(bands, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t band = first; band < last; ++band) {
      const int64_t end = std::min(N, (band + 1) * BAND);
      Numbering<Word> numbering(id_bits, end - band * BAND);
      Simplices s = {};
      Word keys[MAX_D + 1][TILE];
      for (int64_t begin = band * BAND; begin < end; begin += TILE) {
        const int64_t count = std::min(TILE, end - begin);
        find_simplices(features + begin, scale.data(), N, d, count, s);
        keys_of(packing, s, keys);
        for (int64_t group = 0; group < count; group += GROUP)
          for (int64_t k = 0; k < corners; ++k) {
            int32_t* ids = vertex_.get() + (begin + group) * corners + k * GROUP;
            uint32_t missed = numbering.first_look(keys[k] + group, ids);
            if (count - group < GROUP) missed &= (1u << (count - group)) - 1;
            for (; missed != 0; missed &= missed - 1) {
              const int i = __builtin_ctz(missed);
              ids[i] = numbering.number(keys[k][group + i]);
            }
            std::copy_n(s.weight[k] + group, GROUP, weight_.get() + (begin + group) * corners + k * GROUP);
          }
      }
      met[band] = numbering.keys();
    }
  });

  // A vertex gets its number from the first band that meets it; what a later band met is a copy.
  constexpr int64_t AHEAD = 16;
  int64_t expected = 0;
  for (const std::vector<Word>& keys : met) expected += keys.size();
  Numbering<Word> numbering(id_bits, expected);
  std::vector<std::vector<int32_t>> row(bands);  // of each vertex a band met; -1 - c for copy c
  std::vector<int32_t> owner;                    // of each copy
  for (int64_t band = 0; band < bands; ++band) {
    const std::vector<Word>& keys = met[band];
    row[band].resize(keys.size());
    for (int64_t i = 0; i < static_cast<int64_t>(keys.size()); ++i) {
      if (i + AHEAD < static_cast<int64_t>(keys.size())) numbering.prefetch(keys[i + AHEAD]);
      const int64_t known = numbering.keys().size();
      const int32_t id = numbering.number(keys[i]);
      row[band][i] = id;
      if (id < known) {
        row[band][i] = -1 - static_cast<int32_t>(owner.size());
        owner.push_back(id);
      }
    }
  }
  if (N % 4 != 0) {  // pydensecrf's x86 build fills the last group of four points with zeros, whose vertices enter too
    const float zeros[MAX_D] = {};
    Simplices s = {};
    Word keys[MAX_D + 1][TILE];
    find_simplices(zeros, scale.data(), 1, d, 1, s);
    keys_of(packing, s, keys);
    for (int64_t k = 0; k < corners; ++k) numbering.number(keys[k][0]);
  }
  M_ = numbering.keys().size();

  // Copies are sorted by owner: counts, two places on, become ends one place on, become beginnings.
  std::vector<int32_t> begin_of(M_ + 2, 0), copy_row(owner.size());
  for (const int32_t id : owner) ++begin_of[id + 2];
  for (int64_t v = 2; v < M_ + 2; ++v) begin_of[v] += begin_of[v - 1];
  for (size_t c = 0; c < owner.size(); ++c) copy_row[c] = static_cast<int32_t>(M_) + begin_of[owner[c] + 1]++;
  for (int64_t v = 0; v < M_; ++v)
    if (begin_of[v + 1] > begin_of[v]) {
      owners_.push_back(static_cast<int32_t>(v));
      copies_.push_back(static_cast<int32_t>(M_) + begin_of[v]);
    }
  zero_ = static_cast<int32_t>(M_ + owner.size());
  copies_.push_back(zero_);

  parallel_for(bands, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t band = first; band < last; ++band) {
      for (int32_t& r : row[band])
        if (r < 0) r = copy_row[-1 - r];
      const int64_t end = std::min(N, (band + 1) * BAND);
      for (int64_t begin = band * BAND; begin < end; begin += GROUP)
        for (int64_t k = 0; k < corners; ++k)
          for (int64_t i = 0; i < GROUP; ++i) {
            int32_t& v = vertex_[begin * corners + k * GROUP + i];
            v = begin + i < end ? row[band][v] : zero_;
          }
    }
  });
  for (int64_t i = N; i % GROUP != 0; ++i)
    for (int64_t k = 0; k < corners; ++k) weight_[i / GROUP * GROUP * corners + k * GROUP + i % GROUP] = 0;

  // Along each axis: who comes after each vertex (-1: nobody), hence chains.
  const int64_t M = M_, parts = (M + GRAIN - 1) / GRAIN;
  const auto after = buffer<int32_t>(corners * M);
  parallel_for(corners * parts, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t axis = part / parts, end = std::min(M, (part % parts + 1) * GRAIN);
      const Word step = packing.step<Word>(axis, false), wrapped = packing.step<Word>(axis, true);
      for (int64_t from = part % parts * GRAIN; from < end; from += GROUP) {
        const int64_t n = std::min(GROUP, end - from);
        Word key[GROUP] = {};
        int32_t ids[GROUP];
        for (int64_t i = 0; i < n; ++i) {
          const Word own = numbering.keys()[from + i];
          key[i] = own + ((own & ((1 << Packing::REMAINDER_BITS) - 1)) == 0 ? wrapped : step);
        }
        numbering.first_look(key, ids);
        for (int64_t i = 0; i < n; ++i)
          after[axis * M + from + i] = ids[i] == numbering.ELSEWHERE ? numbering.lookup(key[i]) : ids[i];
      }
    }
  });
  axes_.resize(corners);
  parallel_for(corners, 1, threads, [&](int64_t first, int64_t last) {
    std::vector<int32_t> starts(few_ ? 0 : M + 1);
    for (int64_t j = first; j < last; ++j) {
      const int32_t* next = after.get() + j * M;
      if (few_) {
        axes_[j].near = buffer<int32_t>(2 * M, zero_);
        int32_t* near = axes_[j].near.get();
        for (int64_t v = 0; v < M; ++v)
          if (next[v] >= 0) {
            near[v] = next[v];
            near[M + next[v]] = static_cast<int32_t>(v);
          }
        continue;
      }
      std::vector<uint8_t> follows(M + 1, 0);
      for (int64_t v = 0; v < M; ++v) follows[next[v] < 0 ? M : next[v]] = 1;
      int64_t count = 0;
      for (int64_t v = 0; v < M; ++v) {
        starts[count] = static_cast<int32_t>(v);
        count += next[v] >= 0 && !follows[v];
      }
      Axis& axis = axes_[j];
      axis.chains.resize(M + count + 1);
      axis.blocks.push_back(0);
      int32_t* to = axis.chains.data();
      *to++ = zero_;
      for (int64_t i = 0; i < count; ++i) {
        for (int32_t v = starts[i]; v >= 0; v = next[v]) *to++ = v;
        *to++ = zero_;
        const int64_t place = to - axis.chains.data() - 1;
        if (place - axis.blocks.back() >= GRAIN || (i == count - 1 && place > 0)) axis.blocks.push_back(place);
      }
      axis.chains.resize(to - axis.chains.data());
    }
  });
  for (const Axis& axis : axes_)
    if (!few_) blocks_ = std::max<int64_t>(blocks_, axis.blocks.size() - 1);
}

void Lattice::copy_to(int32_t* vertex, float* weight, int32_t* neighbour) const {
  std::vector<int32_t> number(zero_ + 1, -1);  // of each row's vertex, in the order in which the points meet them
  std::vector<int32_t> owner(zero_);
  std::iota(owner.begin(), owner.end(), 0);
  for (size_t i = 0; i < owners_.size(); ++i)
    std::fill(owner.begin() + copies_[i], owner.begin() + copies_[i + 1], owners_[i]);
  int32_t met = 0;
  const auto number_of = [&](int32_t row) {
    int32_t& n = number[owner[row]];
    if (n < 0) n = met++;
    return n;
  };
  for (int64_t i = 0; i < N_; ++i)
    for (int64_t k = 0; k <= d_; ++k) {
      const int64_t at = i / GROUP * GROUP * (d_ + 1) + k * GROUP + i % GROUP;
      vertex[i * (d_ + 1) + k] = number_of(vertex_[at]);
      weight[i * (d_ + 1) + k] = weight_[at];
    }
  for (int64_t v = 0; v < M_; ++v) number_of(static_cast<int32_t>(v));  // those of no point
  std::fill_n(neighbour, (d_ + 1) * M_ * 2, static_cast<int32_t>(M_));
  for (const Axis& axis : axes_) {
    for (size_t e = 0; e + 1 < axis.chains.size(); ++e) {
      if (axis.chains[e] == zero_ || axis.chains[e + 1] == zero_) continue;
      const int32_t v = number[axis.chains[e]], next = number[axis.chains[e + 1]];
      neighbour[2 * v] = next;
      neighbour[2 * next + 1] = v;
    }
    neighbour += 2 * M_;
  }
}

template <typename T>
void Lattice::splat(int64_t begin, int64_t end, const T* x, const T* scale, T* z, int64_t width) const {
  splat_rows(vertex_.get(), weight_.get(), d_ + 1, begin, end, x, scale, z, width);
}

template <typename T>
void Lattice::slice(const T* z, int64_t begin, int64_t end, const T* scale, T* out, int64_t width) const {
  const T alpha = static_cast<T>(1 / (1 + std::pow(2.0, -static_cast<double>(d_))));
  slice_rows(vertex_.get(), weight_.get(), d_ + 1, begin, end, z, alpha, scale, out, width);
}

template <typename T>
T* Lattice::blur(T* z, T* spare, int64_t width, bool reverse, int threads) const {
  const int64_t shared = owners_.size();
  parallel_for(shared, GRAIN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t row = copies_[i]; row < copies_[i + 1]; ++row)
        for (int64_t c = 0; c < width; ++c) z[owners_[i] * width + c] += z[row * width + c];
  });
  for (int64_t j = 0; j <= d_; ++j) {
    const Axis& axis = axes_[reverse ? d_ - j : j];
    if (few_) {
      parallel_for(M_, GRAIN, threads, [&](int64_t begin, int64_t end) {
        blur_rows_away(axis.near.get(), axis.near.get() + M_, begin, end, z, spare, width);
      });
      std::swap(z, spare);
      continue;
    }
    parallel_for(axis.blocks.size() - 1, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        blur_rows(axis.chains.data(), axis.blocks[b], axis.blocks[b + 1], zero_, static_cast<int32_t>(zero_ + 1 + b), z,
                  width);
    });
  }
  parallel_for(shared, GRAIN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t row = copies_[i]; row < copies_[i + 1]; ++row)
        for (int64_t c = 0; c < width; ++c) z[row * width + c] = z[owners_[i] * width + c];
  });
  return z;
}

namespace {

// Planes (V, N) -> planes, through rows. All bands splat, then all slice.
template <typename T>
void filter_planes(const Lattice& lattice, const T* x, T* out, int64_t V, bool reverse, int threads) {
  const int64_t N = lattice.points(), width = row_width(V);
  const Memory<T> z = buffer<T>(lattice.rows() * width, T(0));
  const auto each_tile = [&](const std::function<void(int64_t, int64_t, T*)>& f) {
    parallel_for((N + Lattice::BAND - 1) / Lattice::BAND, 1, threads, [&](int64_t first, int64_t last) {
      std::vector<T> rows(TILE * width, T(0));
      for (int64_t i = first * Lattice::BAND; i < std::min(N, last * Lattice::BAND); i += TILE)
        f(i, std::min(N, i + TILE), rows.data());
    });
  };
  each_tile([&](int64_t begin, int64_t end, T* rows) {
    for (int64_t v = 0; v < V; ++v)
      for (int64_t i = begin; i < end; ++i) rows[(i - begin) * width + v] = x[v * N + i];
    lattice.splat<T>(begin, end, rows, nullptr, z.get(), width);
  });
  lattice.blur(z.get(), static_cast<T*>(nullptr), width, reverse, threads);
  each_tile([&](int64_t begin, int64_t end, T* rows) {
    lattice.slice<T>(z.get(), begin, end, nullptr, rows, width);
    for (int64_t v = 0; v < V; ++v)
      for (int64_t i = begin; i < end; ++i) out[v * N + i] = rows[(i - begin) * width + v];
  });
}

}  // namespace

void Lattice::filter(const void* x, void* out, bool f64, int64_t V, bool reverse, int threads) const {
  if (V == 0) return;
  if (f64) {
    filter_planes(*this, static_cast<const double*>(x), static_cast<double*>(out), V, reverse, threads);
  } else {
    filter_planes(*this, static_cast<const float*>(x), static_cast<float*>(out), V, reverse, threads);
  }
}

template void Lattice::splat(int64_t, int64_t, const float*, const float*, float*, int64_t) const;
template void Lattice::splat(int64_t, int64_t, const double*, const double*, double*, int64_t) const;
template void Lattice::slice(const float*, int64_t, int64_t, const float*, float*, int64_t) const;
template void Lattice::slice(const double*, int64_t, int64_t, const double*, double*, int64_t) const;
template float* Lattice::blur(float*, float*, int64_t, bool, int) const;
template double* Lattice::blur(double*, double*, int64_t, bool, int) const;

}  // namespace fastcam
