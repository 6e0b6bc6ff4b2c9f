// Views of class activation maps (BC, h, w), of any number and size, and their fusion at the size of the image: what
// cam_fuse and cam_label share.
//
// Bilinear interpolation is separable: source rows are stretched to the output's width once, an output row is a blend
// of two stretched rows for each size of views. Views of one size are added before that, for sums and means. A sum of
// blends is linear in y as long as no size changes its pair of rows: over such an interval of rows it is base + k *
// slope, k rows from the start, so that a row costs one multiplication and one addition whatever the number of sizes,
// and maximum and minimum lie on the first or last row of an interval, exactly, because rounding is monotone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cam_fuse.h"
#include "multiversion.h"
#include "vector.h"

namespace fastcam {

// How many of `threads` are worth waking, which takes as long as some thousand values.
inline int threads_for(int64_t values, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + values / 20000));
}

constexpr int64_t VECTORS = 4;  // vectors of an output row that are in registers at once

template <typename T>
constexpr int64_t block = VECTORS * Vector<T>::size;

// Output position x lies between source positions first[x] and first[x] + 1, weight[x] of the way to the latter.
template <typename T>
struct Axis {
  std::vector<int64_t> first;
  std::vector<T> weight;
  std::vector<int64_t> start;  // [start[j], start[j + 1]): the positions whose first is j
  T step;                      // of the weight from one position to the next, where first does not change

  // The first `count` of `grid` positions over n of the source, the last one repeated up to `padded`.
  Axis(int64_t n, int64_t grid, int64_t count, int64_t padded, bool align_corners)
      : first(padded), weight(padded + Vector<T>::size), start(n + 1, padded) {
    const double size = !align_corners ? double(n) / grid : grid > 1 ? double(n - 1) / (grid - 1) : 0;
    step = static_cast<T>(size);
    for (int64_t x = padded - 1; x >= 0; --x) {
      const double i = std::min(x, count - 1);
      const double source = align_corners ? i * size : std::max(0.0, (i + 0.5) * size - 0.5);
      first[x] = std::min(static_cast<int64_t>(source), n - 1);
      weight[x] = first[x] < n - 1 ? static_cast<T>(source - first[x]) : 0;
      start[first[x]] = x;
    }
    for (int64_t j = n - 1; j >= 0; --j) start[j] = std::min(start[j], start[j + 1]);
  }

  // Whether the weight goes on from position x - 1 to x as `step` says.
  bool continues(int64_t x) const { return first[x] == first[x - 1] && (weight[x - 1] > 0 || weight[x] == 0); }
};

template <typename T>
struct View {
  const T* data;
  T* grad;
  bool mirrored;
};

// Views of one size, added before they are resized. A group holds one view where each is needed at full size.
template <typename T>
struct Group {
  int64_t h, w;
  Axis<T> rows, columns;
  std::vector<View<T>> views;
};

// Rows [start, stop) of the output between the same stretched rows.
struct Interval {
  int64_t start, stop;
};

template <typename T>
struct Plan {
  int64_t H, W, padded;
  bool relu;           // of the views
  bool linear;         // the fused map is a sum of blends; if not, every interval is one row
  int reduce;          // of groups
  T floor;             // resized views are clipped here: 0 or -infinity
  T fused_floor;       // and the fused map here
  T scale;             // of each view: 1, or 1 / S for the mean
  int64_t widest = 0;  // numbers in the longest row of a view
  std::vector<Group<T>> groups;
  std::vector<Interval> interval;  // of every output row

  Plan(const int64_t* views, int64_t S, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation,
       int reduce, bool align_corners)
      : H(H),
        W(W),
        padded((W + block<T> - 1) / block<T> * block<T>),
        relu(activation == FUSE_RELU),
        linear(activation != FUSE_RESIZED_RELU && (reduce == FUSE_SUM || reduce == FUSE_MEAN)),
        reduce(reduce),
        floor(activation == FUSE_RESIZED_RELU ? T(0) : -std::numeric_limits<T>::infinity()),
        fused_floor(activation == FUSE_FUSED_RELU ? T(0) : -std::numeric_limits<T>::infinity()),
        scale(reduce == FUSE_MEAN ? T(1) / S : T(1)),
        interval(H) {
    for (const int64_t* v = views; v != views + 5 * S; v += 5) {
      const int64_t h = v[1], w = v[2];
      auto group =
          !linear ? groups.end()
                  : std::find_if(groups.begin(), groups.end(), [&](const Group<T>& g) { return g.h == h && g.w == w; });
      if (group == groups.end()) {
        groups.push_back({h, w, {h, grid_h, H, H, align_corners}, {w, grid_w, W, padded, align_corners}, {}});
        group = groups.end() - 1;
      }
      group->views.push_back({reinterpret_cast<const T*>(v[0]), reinterpret_cast<T*>(v[4]), v[3] != 0});
      widest = std::max(widest, w);
    }
    for (int64_t start = 0, stop; start < H; start = stop) {
      const auto continues = [&](const Group<T>& g) { return g.rows.continues(stop); };
      for (stop = start + 1; linear && stop < H && std::all_of(groups.begin(), groups.end(), continues);) ++stop;
      std::fill(interval.begin() + start, interval.begin() + stop, Interval{start, stop});
    }
  }

  // Source rows [begin, end) of a group that output rows [y0, y1) need.
  static int64_t begin(const Group<T>& g, int64_t y0) { return g.rows.first[y0]; }
  static int64_t end(const Group<T>& g, int64_t y1) { return std::min(g.rows.first[y1 - 1] + 2, g.h); }

  // Stretched rows that output rows [y0, y1) need, and the numbers in the source rows they come from.
  int64_t rows(int64_t y0, int64_t y1) const {
    int64_t count = 0;
    for (const Group<T>& g : groups) count += end(g, y1) - begin(g, y0);
    return count;
  }
  int64_t sources(int64_t y0, int64_t y1) const {
    int64_t count = 0;
    for (const Group<T>& g : groups) count += (end(g, y1) - begin(g, y0)) * g.w;
    return count;
  }
};

// The two stretched rows of a group that an interval lies between.
template <typename T>
struct Between {
  const T *upper, *lower;
  T weight, step;  // of `lower` in the first row, and more of it in each row after that
};

// What a task needs beside the plan, for output rows [y0, y1). `kept` is memory for the stretched rows, which another
// task goes on with, or null.
template <typename T>
struct Workspace {
  std::unique_ptr<T[]> low, own, row;
  T *wide, *base, *slope;  // the latter two of one interval
  std::vector<Between<T>> between;
  Workspace(const Plan<T>& plan, int64_t y0, int64_t y1, T* kept = nullptr)
      : low(new T[plan.widest + 1]),
        own(kept ? nullptr : new T[numbers(plan, y0, y1)]),
        row(new T[2 * plan.padded]),
        wide(kept ? kept : own.get()),
        base(row.get()),
        slope(base + plan.padded),
        between(plan.groups.size()) {}

  // Size of the stretched rows.
  static int64_t numbers(const Plan<T>& plan, int64_t y0, int64_t y1) {
    return plan.rows(y0, y1) * plan.padded + Vector<T>::size;
  }
};

// The output rows of a map in bands of at most `height`, and where a band's stretched rows begin if all are kept.
template <typename T>
struct Bands {
  int64_t count;
  std::vector<int64_t> row, kept;

  Bands(const Plan<T>& plan, int64_t height) : count((plan.H + height - 1) / height), row(count + 1), kept(count + 1) {
    for (int64_t i = 0; i < count; ++i) {
      row[i + 1] = std::min(plan.H, (i + 1) * height);
      kept[i + 1] = kept[i] + Workspace<T>::numbers(plan, row[i], row[i + 1]);
    }
  }
};

// low (w + 1), the last repeated -> wide (padded).
template <typename T>
FASTCAM_INLINE void stretch(const T* low, const Axis<T>& axis, int64_t w, int64_t padded, T* wide) {
  using V = typename Vector<T>::type;
  const int64_t *first = axis.first.data(), *start = axis.start.data();
  const T* weight = axis.weight.data();
  if (padded < 4 * w) {
    for (int64_t x = 0; x < padded; ++x) {
      const T a = low[first[x]], b = low[first[x] + 1];
      wide[x] = a + weight[x] * (b - a);
    }
    return;
  }
  for (int64_t j = 0; j < w; ++j) {
    const T a = low[j], d = low[j + 1] - a;
    // A store may run over the end of its interval: the next interval, or the next row, is written after it.
    for (int64_t x = start[j]; x < start[j + 1]; x += Vector<T>::size)
      *reinterpret_cast<V*>(wide + x) = a + *reinterpret_cast<const V*>(weight + x) * d;
  }
}

// Stretched rows of map bc that output rows [y0, y1) need, group after group.
template <typename T>
FASTCAM_INLINE void stretch_rows(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, Workspace<T>& work) {
  T *low = work.low.get(), *wide = work.wide;
  const bool relu = plan.relu;
  const T scale = plan.scale;
  for (const Group<T>& g : plan.groups)
    for (int64_t i = plan.begin(g, y0); i < plan.end(g, y1); ++i, wide += plan.padded) {
      const int64_t w = g.w;
      std::fill(low, low + w, T(0));
      for (const View<T>& view : g.views) {
        const T* row = view.data + (bc * g.h + i) * w;
        if (view.mirrored) {
          for (int64_t j = 0; j < w; ++j) low[j] += relu && row[w - 1 - j] < 0 ? 0 : row[w - 1 - j];
        } else {
          for (int64_t j = 0; j < w; ++j) low[j] += relu && row[j] < 0 ? 0 : row[j];
        }
      }
      for (int64_t j = 0; j < w; ++j) low[j] *= scale;
      low[w] = low[w - 1];
      stretch(low, g.columns, w, plan.padded, wide);
    }
}

// Where the stretched rows of row y's interval lie, in a workspace that begins with those for row y0 and ends with
// those for row y1 - 1.
template <typename T>
FASTCAM_INLINE void find_rows(const Plan<T>& plan, int64_t y0, int64_t y1, int64_t y, Workspace<T>& work) {
  const T* wide = work.wide;
  Between<T>* between = work.between.data();
  for (const Group<T>& g : plan.groups) {
    const int64_t first = plan.begin(g, y0), i = g.rows.first[y], start = plan.interval[y].start;
    const bool rests = g.rows.first[start] == 0 && g.rows.weight[start] == 0 && plan.interval[y].stop - start > 1 &&
                       g.rows.weight[start + 1] == 0;  // before the first source position
    *between++ = {wide + (i - first) * plan.padded, wide + (std::min(i + 1, g.h - 1) - first) * plan.padded,
                  g.rows.weight[start], rests ? 0 : g.rows.step};
    wide += (plan.end(g, y1) - first) * plan.padded;
  }
}

// a becomes the larger of both, NaN if one is. GCC takes comparisons of vectors apart in functions that are built for
// several instruction sets, except those that it knows as maximum or minimum.
template <typename V>
FASTCAM_INLINE void take_larger(V& a, const V& b) {
  // A comparison with NaN is false, so one of the two is NaN if an operand is.
  const V one = a > b ? a : b, other = b > a ? b : a;
  a = one * 0.5f + other * 0.5f;
}

// a, if it is not NaN, becomes no smaller than `floor`.
template <typename V, typename T>
FASTCAM_INLINE void clip(V& a, T floor) {
  const V b = V{} + floor;
  a = b > a ? b : a;
}

// base and slope of columns x .. x + block of an interval. REDUCE is FUSE_MEAN for plans that are linear.
template <int REDUCE, typename T>
FASTCAM_INLINE void fuse_block(const Plan<T>& plan, const Between<T>* between, int64_t x,
                               typename Vector<T>::type* base, typename Vector<T>::type* slope) {
  using V = typename Vector<T>::type;
  V before[VECTORS] = {};
  for (int64_t k = 0; k < VECTORS; ++k)
    base[k] = V{} - (REDUCE == FUSE_MAX ? std::numeric_limits<T>::infinity() : T(0)), slope[k] = V{};
  const int64_t groups = plan.groups.size();
  for (int64_t g = 0; g < groups; ++g) {
    const T *upper = between[g].upper + x, *lower = between[g].lower + x;
    const T weight = between[g].weight, step = between[g].step;
    for (int64_t k = 0; k < VECTORS; ++k) {
      const V a = *reinterpret_cast<const V*>(upper + k * Vector<T>::size);
      const V d = *reinterpret_cast<const V*>(lower + k * Vector<T>::size) - a;
      V v = a + weight * d;
      if (REDUCE == FUSE_MEAN) {
        base[k] += v;
        slope[k] += step * d;
        continue;
      }
      clip(v, plan.floor);
      if (REDUCE == FUSE_SUM) base[k] += v;
      if (REDUCE == FUSE_MAX) take_larger(base[k], v);
      if (REDUCE == FUSE_PAIR_MAX && g % 2 == 1) {
        take_larger(v, before[k]);
        base[k] += v;
      }
      before[k] = v;
    }
  }
}

// Calls f(start, y, stop, x, base, slope) for the blocks of all intervals in rows [y0, y1): row y + i is base + (y + i
// - start) * slope.
template <int REDUCE, typename T, typename F>
FASTCAM_INLINE void for_blocks(const Plan<T>& plan, int64_t y0, int64_t y1, Workspace<T>& work, F f) {
  using V = typename Vector<T>::type;
  for (int64_t y = y0, stop; y < y1; y = stop) {
    stop = std::min(plan.interval[y].stop, y1);
    find_rows(plan, y0, y1, y, work);
    for (int64_t x = 0; x < plan.W; x += block<T>) {
      V base[VECTORS], slope[VECTORS];
      fuse_block<REDUCE>(plan, work.between.data(), x, base, slope);
      f(plan.interval[y].start, y, stop, x, base, slope);
    }
  }
}

// Calls f(k, y) for all rows y in [y0, y1), the k-th ones of their intervals: row y is work.base + k * work.slope.
template <int REDUCE, typename T, typename F>
FASTCAM_INLINE void for_rows(const Plan<T>& plan, int64_t y0, int64_t y1, Workspace<T>& work, F f) {
  using V = typename Vector<T>::type;
  for_blocks<REDUCE>(plan, y0, y1, work,
                     [&](int64_t start, int64_t y, int64_t stop, int64_t x, const V* base, const V* slope)
                         __attribute__((always_inline)) {
                           for (int64_t k = 0; k < VECTORS; ++k) {
                             reinterpret_cast<V*>(work.base + x)[k] = base[k];
                             reinterpret_cast<V*>(work.slope + x)[k] = slope[k];
                           }
                           if (x + block<T> < plan.W) return;  // the interval has further blocks
                           for (; y < stop; ++y) f(y - start, y);
                         });
}

// Fused values of a vector in the k-th row of its interval.
template <typename T, typename V>
FASTCAM_INLINE void evaluate(const Plan<T>& plan, const V& base, const V& slope, int64_t k, V& value) {
  value = base + T(k) * slope;
  clip(value, plan.fused_floor);
}

// Maximum and minimum of output rows [y0, y1) of map bc before normalisation; NaN if one is.
template <int REDUCE, typename T>
FASTCAM_INLINE void extremes_of_rows(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, Workspace<T>& work,
                                     T* extremes) {
  using V = typename Vector<T>::type;
  stretch_rows(plan, bc, y0, y1, work);
  V highest = V{} - std::numeric_limits<T>::infinity(), lowest = -highest;
  V total = {};  // shows NaN, which comparisons pass over
  for_blocks<REDUCE>(plan, y0, y1, work,
                     [&](int64_t start, int64_t y, int64_t stop, int64_t, const V* base, const V* slope)
                         __attribute__((always_inline)) {
                           for (int64_t k = 0; k < VECTORS; ++k) {  // beyond the end of the row the last is repeated
                             V a, b;
                             evaluate(plan, base[k], slope[k], y - start, a);
                             evaluate(plan, base[k], slope[k], stop - 1 - start, b);
                             const V high = a > b ? a : b, low = a < b ? a : b;
                             highest = high > highest ? high : highest;
                             lowest = low < lowest ? low : lowest;
                             total += a + b;
                           }
                         });
  extremes[0] = highest[0], extremes[1] = lowest[0];
  for (int64_t i = 0; i < Vector<T>::size; ++i) {
    extremes[0] = std::max(extremes[0], T(highest[i]));
    extremes[1] = std::min(extremes[1], T(lowest[i]));
  }
  for (int64_t i = 0; i < Vector<T>::size; ++i)
    if (std::isnan(total[i])) extremes[0] = extremes[1] = std::numeric_limits<T>::quiet_NaN();
}

// Normalised value = (x - offset) * factor; under FUSE_BY_SEAM x below `least` counts as 0.
template <typename T>
struct Normalize {
  T offset, factor, least;
  Normalize(const T* extremes, int normalize, T eps)
      : offset(normalize == FUSE_BY_MINMAX || normalize == FUSE_BY_SEAM ? extremes[1] : T(0)),
        factor(normalize == FUSE_BY_NOTHING ? T(1) : 1 / (extremes[0] - offset + eps)),
        least(normalize == FUSE_BY_SEAM ? offset + eps : -std::numeric_limits<T>::infinity()) {
    if (normalize == FUSE_BY_SEAM) offset = least;
  }
};

// Calls the member `call` of F with the plan's reduction as its template argument.
template <typename T, typename F>
FASTCAM_INLINE void with_reduction(const Plan<T>& plan, F f) {
  if (plan.linear) {
    f(std::integral_constant<int, FUSE_MEAN>());
  } else if (plan.reduce == FUSE_MAX) {
    f(std::integral_constant<int, FUSE_MAX>());
  } else if (plan.reduce == FUSE_PAIR_MAX) {
    f(std::integral_constant<int, FUSE_PAIR_MAX>());
  } else {
    f(std::integral_constant<int, FUSE_SUM>());
  }
}

// Maxima and minima (count, 2) before normalisation of the maps first, first + 1, ...; 0 for absent ones. The stretched
// rows stay in `kept` (count, bands.kept.back()), unless that is null.
void extremes_of_maps(const Plan<float>& plan, const Bands<float>& bands, const bool* present, int64_t first,
                      int64_t count, int threads, float* kept, float* extremes);
void extremes_of_maps(const Plan<double>& plan, const Bands<double>& bands, const bool* present, int64_t first,
                      int64_t count, int threads, double* kept, double* extremes);

}  // namespace fastcam
