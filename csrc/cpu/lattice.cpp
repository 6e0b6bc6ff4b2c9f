#include "cpu/lattice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/math.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int MAX_D = 15;
constexpr int64_t TILE = 64;      // points whose simplices are searched together
constexpr float LIMIT = 4194304;  // 2^22: larger coordinates have no fraction worth the name in float
constexpr int64_t GRAIN = 512;    // vertices a task handles
constexpr int64_t RANGE_PART = 1 << 14;

// What the search finds about TILE points, points innermost.
struct Simplices {
  float weight[MAX_D + 2][TILE];
  int32_t base[MAX_D + 1][TILE];  // coordinates of the vertex with remainder 0
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

// Widens low and high (d + 1) to the coordinates of `count` points. False if one is not finite or not below LIMIT.
FASTCAM_MULTIVERSION bool elevated_range(const float* features, const float* scale, int64_t N, int64_t d, int64_t count,
                                         float* low, float* high) {
  float elevated[MAX_D + 1][TILE], lows[TILE], highs[TILE];
  int32_t bad = 0;
  for (int64_t begin = 0; begin < count; begin += TILE) {
    const int64_t n = std::min(TILE, count - begin);
    elevate(features + begin, scale, N, d, n, elevated);
    for (int64_t j = 0; j <= d; ++j) {
      for (int64_t i = 0; i < n; ++i) bad |= !(elevated[j][i] > -LIMIT && elevated[j][i] < LIMIT);
      std::copy_n(elevated[j], n, lows);
      std::copy_n(elevated[j], n, highs);
      for (int64_t i = n; i < TILE; ++i) lows[i] = highs[i] = 0;
      for (int64_t half = TILE / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) {
          lows[i] = lows[i + half] < lows[i] ? lows[i + half] : lows[i];
          highs[i] = highs[i + half] > highs[i] ? highs[i + half] : highs[i];
        }
      low[j] = std::min(low[j], lows[0]);
      high[j] = std::max(high[j], highs[0]);
    }
  }
  return bad == 0;
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
      s.base[j][i] = (s.base[j][i] + wrap) * n;
      s.elevated[j][i] = (s.elevated[j][i] - static_cast<float>(s.base[j][i])) * inverse;
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
      "million, "
      "got larger or NaN");
}

// Keys -> 0, 1, 2, ... in the order in which they are first seen. Open addressing; grows to stay at most half full.
template <typename Key>
class Numbering {
 public:
  int32_t number(Key key) {
    int64_t at = find(key);
    if (slots_[at].id < 0) {
      if (2 * (static_cast<int64_t>(keys_.size()) + 1) > static_cast<int64_t>(slots_.size())) {
        grow();
        at = find(key);
      }
      slots_[at] = {key, static_cast<int32_t>(keys_.size())};
      keys_.push_back(key);
    }
    return slots_[at].id;
  }
  int32_t lookup(Key key) const { return slots_[find(key)].id; }
  void prefetch(Key key) const { __builtin_prefetch(&slots_[home(key)]); }
  const std::vector<Key>& keys() const { return keys_; }

 private:
  struct Slot {
    Key key;
    int32_t id;
  };

  int64_t home(Key key) const {
    uint64_t h = static_cast<uint64_t>(key);
    if constexpr (sizeof(Key) > 8) h ^= static_cast<uint64_t>(key >> 64) * 0xc2b2ae3d27d4eb4full;
    return static_cast<int64_t>((h * 0x9e3779b97f4a7c15ull) >> shift_);
  }
  int64_t find(Key key) const {
    const int64_t mask = static_cast<int64_t>(slots_.size()) - 1;
    int64_t at = home(key);
    while (slots_[at].id >= 0 && slots_[at].key != key) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    shift_ -= 2;
    slots_.assign(slots_.size() * 4, {0, -1});
    for (size_t i = 0; i < keys_.size(); ++i) slots_[find(keys_[i])] = {keys_[i], static_cast<int32_t>(i)};
  }

  int shift_ = 64 - 12;
  std::vector<Slot> slots_ = std::vector<Slot>(1 << 12, Slot{0, -1});
  std::vector<Key> keys_;
};

template <typename T, int W, int R>
struct Splat {
  static FASTCAM_INLINE void run(int64_t c, const int32_t* first, const int32_t* point, const T* weight, const T* x,
                                 T* z, int64_t begin, int64_t end, int64_t width) {
    for (int64_t v = begin; v < end; ++v) {
      typename Lanes<T, W>::type sum[R] = {};
      for (int64_t e = first[v]; e < first[v + 1]; ++e) {
        const T* row = x + point[e] * width + c;
        for (int r = 0; r < R; ++r) sum[r] += weight[e] * lanes<T, W>(row + r * W);
      }
      for (int r = 0; r < R; ++r) lanes<T, W>(z + v * width + c + r * W) = sum[r];
    }
  }
};

template <typename T, int W, int R>
struct Blur {
  static FASTCAM_INLINE void run(int64_t c, const int32_t* neighbour, const T* z, T* out, int64_t begin, int64_t end,
                                 int64_t width) {
    for (int64_t v = begin; v < end; ++v) {
      const T* plus = z + neighbour[2 * v] * width + c;
      const T* minus = z + neighbour[2 * v + 1] * width + c;
      const int64_t own = v * width + c;
      for (int r = 0; r < R; ++r)
        lanes<T, W>(out + own + r * W) =
            lanes<T, W>(z + own + r * W) + T(0.5) * (lanes<T, W>(plus + r * W) + lanes<T, W>(minus + r * W));
    }
  }
};

template <typename T, int W, int R>
struct Slice {
  static FASTCAM_INLINE void run(int64_t c, const int32_t* vertex, const float* weight, const T* z, T* out,
                                 int64_t count, int64_t corners, T alpha, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      typename Lanes<T, W>::type sum[R] = {};
      for (int64_t k = 0; k < corners; ++k) {
        const T* row = z + vertex[i * corners + k] * width + c;
        const T w = static_cast<T>(weight[i * corners + k]);
        for (int r = 0; r < R; ++r) sum[r] += w * lanes<T, W>(row + r * W);
      }
      for (int r = 0; r < R; ++r) lanes<T, W>(out + i * width + c + r * W) = alpha * sum[r];
    }
  }
};

#define FASTCAM_ROW_STEPS(T)                                                                                          \
  FASTCAM_MULTIVERSION void splat_rows(const int32_t* first, const int32_t* point, const T* weight, const T* x, T* z, \
                                       int64_t begin, int64_t end, int64_t width) {                                   \
    each_block<Splat, T>(width, first, point, weight, x, z, begin, end, width);                                       \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void blur_rows(const int32_t* neighbour, const T* z, T* out, int64_t begin, int64_t end,       \
                                      int64_t width) {                                                                \
    each_block<Blur, T>(width, neighbour, z, out, begin, end, width);                                                 \
  }                                                                                                                   \
  FASTCAM_MULTIVERSION void slice_rows(const int32_t* vertex, const float* weight, const T* z, T* out, int64_t count, \
                                       int64_t corners, T alpha, int64_t width) {                                     \
    each_block<Slice, T>(width, vertex, weight, z, out, count, corners, alpha, width);                                \
  }
FASTCAM_ROW_STEPS(float)
FASTCAM_ROW_STEPS(double)
#undef FASTCAM_ROW_STEPS

}  // namespace

Lattice::Lattice(const float* features, int64_t d, int64_t N, int threads) : d_(d), N_(N) {
  if (d < 1 || d > MAX_D)
    throw std::invalid_argument("Lattice: expected 1 to " + std::to_string(MAX_D) + " features, got " +
                                std::to_string(d));
  if (N < 1 || N > std::numeric_limits<int32_t>::max() / (d + 1) - 1)
    throw std::invalid_argument("Lattice: expected 1 to 2**31 / (d + 1) points, got " + std::to_string(N));
  vertex_ = buffer<int32_t>(N * (d + 1));
  weight_ = buffer<float>(N * (d + 1));

  // How many bits a key needs for each coordinate, from the range of the elevated coordinates; the point of zeros
  // included.
  const std::vector<float> scale = scales(d);
  const int64_t parts = (N + RANGE_PART - 1) / RANGE_PART;
  std::vector<float> lows(parts * (d + 1), 0), highs(parts * (d + 1), 0);
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i * RANGE_PART;
      if (!elevated_range(features + from, scale.data(), N, d, std::min(RANGE_PART, N - from), &lows[i * (d + 1)],
                          &highs[i * (d + 1)]))
        refuse_features();
    }
  });
  std::vector<int64_t> low(d);
  std::vector<int> bits(d);
  int sum = 0;
  for (int64_t j = 0; j < d; ++j) {
    float smallest = 0, largest = 0;
    for (int64_t i = 0; i < parts; ++i) {
      smallest = std::min(smallest, lows[i * (d + 1) + j]);
      largest = std::max(largest, highs[i * (d + 1) + j]);
    }
    const int64_t margin =
        3 * (d + 2);  // a point's vertices lie within d + 1 of it, and their neighbours within d of them
    low[j] = static_cast<int64_t>(std::floor(smallest)) - margin;
    const int64_t span = static_cast<int64_t>(std::ceil(largest)) + margin - low[j];
    while (bits[j] < 40 && (int64_t(1) << bits[j]) <= span) ++bits[j];
    sum += bits[j];
  }
  if (sum <= 64) {
    number_vertices<uint64_t>(low, bits, features, threads);
  } else if (sum <= 128) {
    number_vertices<unsigned __int128>(low, bits, features, threads);
  } else {
    throw std::invalid_argument("Lattice: expected features whose lattice coordinates fit 128 bits together, got " +
                                std::to_string(sum) + " bits; use larger standard deviations");
  }
}

template <typename Key>
void Lattice::number_vertices(const std::vector<int64_t>& low, const std::vector<int>& bits, const float* features,
                              int threads) {
  const int64_t d = d_, N = N_, corners = d + 1;
  std::vector<Key> unit(corners, 0);  // what one step along a coordinate adds to a key; the last coordinate is implied
  Key ones = 0;
  for (int64_t i = 0, shift = 0; i < d; shift += bits[i++]) {
    unit[i] = Key(1) << shift;
    ones += unit[i];
  }
  const std::vector<float> scale = scales(d);

  // Each point's vertex of remainder 0, and its coordinates by falling rank: they lead to the other vertices one by
  // one.
  struct Place {
    Key key;
    uint8_t falling[MAX_D + 1];
  };
  const auto search = [&](const float* from, int64_t stride, int64_t count, Place* places, float* weights) {
    Simplices s;
    find_simplices(from, scale.data(), stride, d, count, s);
    for (int64_t i = 0; i < count; ++i) {
      Key key = 0;
      for (int64_t j = 0; j < d; ++j) key += unit[j] * static_cast<uint64_t>(s.base[j][i] - low[j]);
      places[i].key = key;
      for (int64_t j = 0; j <= d; ++j) places[i].falling[d - s.rank[j][i]] = static_cast<uint8_t>(j);
      for (int64_t k = 0; k <= d; ++k) weights[i * corners + k] = s.weight[k][i];
    }
  };
  const auto places = buffer<Place>(N);
  parallel_for(N, TILE * 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += TILE)
      search(features + i, N, std::min(TILE, end - i), places.get() + i, weight_.get() + i * corners);
  });

  Numbering<Key> numbering;
  const auto keys_of = [&](const Place& p, Key* keys) {
    keys[0] = p.key;
    for (int64_t k = 1; k <= d; ++k) keys[k] = keys[k - 1] + ones - static_cast<Key>(d + 1) * unit[p.falling[k - 1]];
  };
  constexpr int64_t AHEAD = 8;
  Key keys[AHEAD][MAX_D + 1];
  for (int64_t begin = 0; begin < N; begin += AHEAD) {
    const int64_t count = std::min(AHEAD, N - begin);
    for (int64_t i = 0; i < count; ++i) {
      keys_of(places[begin + i], keys[i]);
      for (int64_t k = 0; k <= d; ++k) numbering.prefetch(keys[i][k]);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k <= d; ++k) vertex_[(begin + i) * corners + k] = numbering.number(keys[i][k]);
  }
  if (N % 4 != 0) {  // pydensecrf's x86 build fills the last group of four points with zeros, whose vertices enter too
    const float zeros[MAX_D] = {};
    Place place;
    float weights[MAX_D + 1];
    search(zeros, 1, 1, &place, weights);
    keys_of(place, keys[0]);
    for (int64_t k = 0; k <= d; ++k) numbering.number(keys[0][k]);
  }
  M_ = static_cast<int64_t>(numbering.keys().size());

  neighbour_.assign(corners * M_ * 2, static_cast<int32_t>(M_));
  parallel_for(M_, GRAIN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j <= d; ++j) {
      const Key delta = static_cast<Key>(d + 1) * unit[j] - ones;
      int32_t* of_axis = neighbour_.data() + j * M_ * 2;
      for (int64_t v = begin; v < end; ++v) {
        const int32_t u = numbering.lookup(numbering.keys()[v] + delta);
        if (u < 0) continue;
        of_axis[2 * v] = u;
        of_axis[2 * u + 1] = static_cast<int32_t>(v);  // nobody else has u one step ahead
      }
    }
  });

  first_.assign(M_ + 2, 0);  // counts, two places on, become ends one place on, become beginnings
  for (int64_t e = 0; e < N * corners; ++e) ++first_[vertex_[e] + 2];
  for (int64_t v = 2; v < M_ + 2; ++v) first_[v] += first_[v - 1];
  point_ = buffer<int32_t>(N * corners);
  for (int64_t i = 0; i < N; ++i)
    for (int64_t k = 0; k <= d; ++k) point_[first_[vertex_[i * corners + k] + 1]++] = static_cast<int32_t>(i);
}

void Lattice::copy_to(int32_t* vertex, float* weight, int32_t* neighbour) const {
  std::copy_n(vertex_.get(), N_ * (d_ + 1), vertex);
  std::copy_n(weight_.get(), N_ * (d_ + 1), weight);
  std::copy(neighbour_.begin(), neighbour_.end(), neighbour);
}

template <typename T>
std::unique_ptr<T[]> Lattice::splat_weights(const T* scale) const {
  auto weights = buffer<T>(N_ * (d_ + 1));
  std::vector<int32_t> next(first_.begin(), first_.begin() + M_);
  for (int64_t i = 0; i < N_; ++i)
    for (int64_t e = i * (d_ + 1); e < (i + 1) * (d_ + 1); ++e)
      weights[next[vertex_[e]]++] = static_cast<T>(weight_[e]) * (scale ? scale[i] : T(1));
  return weights;
}

template <typename T>
void Lattice::splat(const T* x, const T* weights, T* z, int64_t width, int threads) const {
  parallel_for(M_, GRAIN, threads, [&](int64_t begin, int64_t end) {
    splat_rows(first_.data(), point_.get(), weights, x, z, begin, end, width);
  });
  std::fill(z + M_ * width, z + (M_ + 1) * width, T(0));
}

template <typename T>
const T* Lattice::blur(T* z, T* other, int64_t width, bool reverse, int threads) const {
  std::fill(other + M_ * width, other + (M_ + 1) * width, T(0));
  for (int64_t i = 0; i <= d_; ++i) {
    const int32_t* of_axis = neighbour_.data() + (reverse ? d_ - i : i) * M_ * 2;
    parallel_for(M_, GRAIN * 4, threads,
                 [&](int64_t begin, int64_t end) { blur_rows(of_axis, z, other, begin, end, width); });
    std::swap(z, other);
  }
  return z;
}

template <typename T>
void Lattice::slice(const T* z, T* out, int64_t begin, int64_t end, int64_t width) const {
  const int64_t corners = d_ + 1;
  const T alpha = static_cast<T>(1 / (1 + std::pow(2.0, -static_cast<double>(d_))));
  slice_rows(vertex_.get() + begin * corners, weight_.get() + begin * corners, z, out, end - begin, corners, alpha,
             width);
}

namespace {

template <typename T>
void filter_planes(const Lattice& lattice, const T* x, T* out, int64_t V, bool reverse, int threads) {
  const int64_t N = lattice.points(), width = row_width(V), rows = lattice.vertices() + 1;
  const auto values = buffer<T>(N * width), z = buffer<T>(rows * width), other = buffer<T>(rows * width);
  parallel_for(N, TILE, threads, [&](int64_t begin, int64_t end) {
    std::fill(values.get() + begin * width, values.get() + end * width, T(0));
    for (int64_t v = 0; v < V; ++v)
      for (int64_t i = begin; i < end; ++i) values[i * width + v] = x[v * N + i];
  });
  lattice.splat(values.get(), lattice.splat_weights<T>(nullptr).get(), z.get(), width, threads);
  const T* blurred = lattice.blur(z.get(), other.get(), width, reverse, threads);
  parallel_for(N, TILE, threads, [&](int64_t begin, int64_t end) {
    lattice.slice(blurred, values.get() + begin * width, begin, end, width);
    for (int64_t v = 0; v < V; ++v)
      for (int64_t i = begin; i < end; ++i) out[v * N + i] = values[i * width + v];
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

template std::unique_ptr<float[]> Lattice::splat_weights(const float*) const;
template std::unique_ptr<double[]> Lattice::splat_weights(const double*) const;
template void Lattice::splat(const float*, const float*, float*, int64_t, int) const;
template void Lattice::splat(const double*, const double*, double*, int64_t, int) const;
template const float* Lattice::blur(float*, float*, int64_t, bool, int) const;
template const double* Lattice::blur(double*, double*, int64_t, bool, int) const;
template void Lattice::slice(const float*, float*, int64_t, int64_t, int64_t) const;
template void Lattice::slice(const double*, double*, int64_t, int64_t, int64_t) const;

}  // namespace fastcam
