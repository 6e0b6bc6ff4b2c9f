// Fusion of class activation maps: views (BC, h, w) of any number and size -> one map (BC, H, W).
//
// Bilinear interpolation is separable. Source rows are stretched to the output's width once, each output row is then a
// blend of two neighbouring stretched rows for every size of views. Views of one size are added before that, for sums
// and means.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cam_fuse.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t BAND = 64;    // output rows that one task handles
constexpr int64_t VECTORS = 4;  // vectors of an output row that are in registers at once

template <typename T>
constexpr int64_t block = VECTORS * Vector<T>::size;

// Output position x lies between source positions first[x] and first[x] + 1, weight[x] of the way to the latter.
template <typename T>
struct Axis {
  std::vector<int64_t> first;
  std::vector<T> weight;
  std::vector<int64_t> start;  // [start[j], start[j + 1]): the positions whose first is j

  // The first `count` of `grid` positions over n of the source, the last one repeated up to `padded`.
  Axis(int64_t n, int64_t grid, int64_t count, int64_t padded, bool align_corners)
      : first(padded), weight(padded + Vector<T>::size), start(n + 1, padded) {
    const double step = !align_corners ? double(n) / grid : grid > 1 ? double(n - 1) / (grid - 1) : 0;
    for (int64_t x = padded - 1; x >= 0; --x) {
      const double i = std::min(x, count - 1);
      const double source = align_corners ? i * step : std::max(0.0, (i + 0.5) * step - 0.5);
      first[x] = std::min(static_cast<int64_t>(source), n - 1);
      weight[x] = first[x] < n - 1 ? static_cast<T>(source - first[x]) : 0;
      start[first[x]] = x;
    }
    for (int64_t j = n - 1; j >= 0; --j) start[j] = std::min(start[j], start[j + 1]);
  }
};

template <typename T>
struct View {
  const T* data;
  T* grad;
  bool mirrored;
};

// Views of one size, added before they are resized. Alone in its group if the maximum over views is asked for.
template <typename T>
struct Group {
  int64_t h, w;
  Axis<T> rows, columns;
  std::vector<View<T>> views;
};

template <typename T>
struct Plan {
  int64_t H, W, padded;
  bool relu, max;
  T scale;  // of each view: 1, or 1 / S for the mean
  std::vector<Group<T>> groups;

  Plan(const int64_t* views, int64_t S, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, bool relu, int reduce,
       bool align_corners)
      : H(H),
        W(W),
        padded((W + block<T> - 1) / block<T> * block<T>),
        relu(relu),
        max(reduce == FUSE_MAX),
        scale(reduce == FUSE_MEAN ? T(1) / S : T(1)) {
    for (const int64_t* v = views; v != views + 5 * S; v += 5) {
      const int64_t h = v[1], w = v[2];
      auto group =
          max ? groups.end()
              : std::find_if(groups.begin(), groups.end(), [&](const Group<T>& g) { return g.h == h && g.w == w; });
      if (group == groups.end()) {
        groups.push_back({h, w, {h, grid_h, H, H, align_corners}, {w, grid_w, W, padded, align_corners}, {}});
        group = groups.end() - 1;
      }
      group->views.push_back({reinterpret_cast<const T*>(v[0]), reinterpret_cast<T*>(v[4]), v[3] != 0});
    }
  }

  // Source rows [begin, end) of a group that output rows [y0, y1) need.
  static int64_t begin(const Group<T>& g, int64_t y0) { return g.rows.first[y0]; }
  static int64_t end(const Group<T>& g, int64_t y1) { return std::min(g.rows.first[y1 - 1] + 2, g.h); }

  // Numbers that the stretched rows for output rows [y0, y1) take.
  int64_t stretched_size(int64_t y0, int64_t y1) const {
    int64_t rows = 0;
    for (const Group<T>& g : groups) rows += end(g, y1) - begin(g, y0);
    return rows * padded + Vector<T>::size;
  }
};

// The two stretched rows of a group between which an output row lies.
template <typename T>
struct Between {
  const T *upper, *lower;
  T weight;
};

template <typename T>
FASTCAM_INLINE T at(const Between<T>& b, int64_t x) {
  return b.upper[x] + b.weight * (b.lower[x] - b.upper[x]);
}

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

// Stretched rows of map bc that output rows [y0, y1) need, group after group. low holds the widest group's w + 1
// numbers.
template <typename T>
FASTCAM_INLINE void stretch_rows(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, T* low, T* wide) {
  for (const Group<T>& g : plan.groups)
    for (int64_t i = plan.begin(g, y0); i < plan.end(g, y1); ++i, wide += plan.padded) {
      const int64_t w = g.w;
      const bool relu = plan.relu;
      const T scale = plan.scale;
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

// For output row y, where its stretched rows lie; `wide` begins with those for output row y0 and ends with those for
// row y1 - 1.
template <typename T>
FASTCAM_INLINE void find_rows(const Plan<T>& plan, const T* wide, int64_t y0, int64_t y1, int64_t y,
                              Between<T>* between) {
  for (const Group<T>& g : plan.groups) {
    const int64_t first = plan.begin(g, y0), i = g.rows.first[y];
    *between++ = {wide + (i - first) * plan.padded, wide + (std::min(i + 1, g.h - 1) - first) * plan.padded,
                  g.rows.weight[y]};
    wide += (plan.end(g, y1) - first) * plan.padded;
  }
}

// Fused values x .. x + block of an output row.
template <bool MAX, typename T>
FASTCAM_INLINE void fuse_block(const Between<T>* between, int64_t groups, int64_t x, typename Vector<T>::type* sum) {
  using V = typename Vector<T>::type;
  for (int64_t k = 0; k < VECTORS; ++k) sum[k] = V{} - (MAX ? std::numeric_limits<T>::infinity() : T(0));
  for (int64_t g = 0; g < groups; ++g) {
    const T *upper = between[g].upper + x, *lower = between[g].lower + x;
    const T weight = between[g].weight;
    for (int64_t k = 0; k < VECTORS; ++k) {
      const V a = *reinterpret_cast<const V*>(upper + k * Vector<T>::size);
      const V b = *reinterpret_cast<const V*>(lower + k * Vector<T>::size);
      const V v = a + weight * (b - a), so_far = sum[k];
      if (MAX) {
        // A comparison with NaN is false, so one of the two is NaN if an operand is. Any other use of a vector
        // comparison is taken apart by GCC in functions that are built for several instruction sets.
        const V one = v > so_far ? v : so_far, other = so_far > v ? so_far : v;
        sum[k] = one * T(0.5) + other * T(0.5);
      } else {
        sum[k] += v;
      }
    }
  }
}

// Output rows [y0, y1) of map bc before normalisation, and the maximum and minimum of them.
template <bool MAX, typename T>
FASTCAM_INLINE void fuse_rows(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, T* low, T* wide,
                              Between<T>* between, T* out, T* extremes) {
  using V = typename Vector<T>::type;
  stretch_rows(plan, bc, y0, y1, low, wide);
  const int64_t groups = plan.groups.size();
  V highest = V{} - std::numeric_limits<T>::infinity(), lowest = -highest;
  V total = {};  // shows NaN, which comparisons pass over
  for (int64_t y = y0; y < y1; ++y) {
    find_rows(plan, wide, y0, y1, y, between);
    T* row = out + (bc * plan.H + y) * plan.W;
    for (int64_t x = 0; x < plan.W; x += block<T>) {
      V sum[VECTORS];
      fuse_block<MAX>(between, groups, x, sum);
      for (int64_t k = 0; k < VECTORS; ++k) {  // beyond the end of the row the last value is repeated
        highest = sum[k] > highest ? sum[k] : highest;
        lowest = sum[k] < lowest ? sum[k] : lowest;
        total += sum[k];
      }
      if (x + block<T> <= plan.W) {
        for (int64_t k = 0; k < VECTORS; ++k) *reinterpret_cast<V*>(row + x + k * Vector<T>::size) = sum[k];
      } else {
        std::memcpy(row + x, sum, (plan.W - x) * sizeof(T));
      }
    }
  }
  extremes[0] = highest[0], extremes[1] = lowest[0];
  for (int64_t i = 0; i < Vector<T>::size; ++i) {
    extremes[0] = std::max(extremes[0], T(highest[i]));
    extremes[1] = std::min(extremes[1], T(lowest[i]));
  }
  for (int64_t i = 0; i < Vector<T>::size; ++i)
    if (std::isnan(total[i])) extremes[0] = extremes[1] = std::numeric_limits<T>::quiet_NaN();
}

template <typename T>
FASTCAM_INLINE void fuse_rows(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, T* low, T* wide,
                              Between<T>* between, T* out, T* extremes) {
  if (plan.max) {
    fuse_rows<true>(plan, bc, y0, y1, low, wide, between, out, extremes);
  } else {
    fuse_rows<false>(plan, bc, y0, y1, low, wide, between, out, extremes);
  }
}

FASTCAM_MULTIVERSION void fuse_rows_f32(const Plan<float>& plan, int64_t bc, int64_t y0, int64_t y1, float* low,
                                        float* wide, Between<float>* between, float* out, float* extremes) {
  fuse_rows(plan, bc, y0, y1, low, wide, between, out, extremes);
}
FASTCAM_MULTIVERSION void fuse_rows_f64(const Plan<double>& plan, int64_t bc, int64_t y0, int64_t y1, double* low,
                                        double* wide, Between<double>* between, double* out, double* extremes) {
  fuse_rows(plan, bc, y0, y1, low, wide, between, out, extremes);
}

// Maximum and minimum over the bands; NaN if one is.
template <typename T>
void reduce_extremes(const T* bands, int64_t count, T* extremes) {
  extremes[0] = bands[0], extremes[1] = bands[1];
  for (int64_t i = 1; i < count; ++i) {
    if (bands[2 * i] > extremes[0] || std::isnan(bands[2 * i])) extremes[0] = bands[2 * i];
    if (bands[2 * i + 1] < extremes[1] || std::isnan(bands[2 * i + 1])) extremes[1] = bands[2 * i + 1];
  }
}

// Normalised value = (x - offset) * factor.
template <typename T>
struct Normalize {
  T offset, factor;
  Normalize(const T* extremes, int normalize, T eps)
      : offset(normalize == FUSE_BY_MINMAX ? extremes[1] : T(0)),
        factor(normalize == FUSE_BY_NOTHING ? T(1) : 1 / (extremes[0] - offset + eps)) {}
};

template <typename T>
FASTCAM_INLINE void scale(T* x, int64_t n, T offset, T factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - offset) * factor;
}
FASTCAM_MULTIVERSION void scale_f32(float* x, int64_t n, float offset, float factor) { scale(x, n, offset, factor); }
FASTCAM_MULTIVERSION void scale_f64(double* x, int64_t n, double offset, double factor) { scale(x, n, offset, factor); }

// What a task needs beside the plan, for output rows [y0, y1).
template <typename T>
struct Workspace {
  std::unique_ptr<T[]> low, wide;
  std::vector<Between<T>> between;
  Workspace(const Plan<T>& plan, int64_t y0, int64_t y1) : between(plan.groups.size()) {
    int64_t w = 0;
    for (const Group<T>& g : plan.groups) w = std::max(w, g.w);
    low.reset(new T[w + 1]);
    wide.reset(new T[plan.stretched_size(y0, y1)]);
  }
};

template <typename T, typename Rows, typename Scale>
void forward(const Plan<T>& plan, const bool* present, T* out, T* stats, int64_t BC, int normalize, T eps, int threads,
             Rows fuse, Scale scale) {
  const int64_t bands = (plan.H + BAND - 1) / BAND;
  std::vector<T> extremes(2 * BC * bands);
  const auto make = [&](int64_t bc, int64_t band) {
    const int64_t y0 = band * BAND, y1 = std::min(plan.H, y0 + BAND);
    if (present && !present[bc]) {
      std::fill(out + (bc * plan.H + y0) * plan.W, out + (bc * plan.H + y1) * plan.W, T(0));
      return;
    }
    Workspace<T> work(plan, y0, y1);
    fuse(plan, bc, y0, y1, work.low.get(), work.wide.get(), work.between.data(), out,
         &extremes[2 * (bc * bands + band)]);
  };
  const auto finish = [&](int64_t bc, int64_t band) {
    T both[2] = {};
    if (normalize != FUSE_BY_NOTHING && !(present && !present[bc])) {
      reduce_extremes(&extremes[2 * bc * bands], bands, both);
      const Normalize<T> by(both, normalize, eps);
      const int64_t y0 = band * BAND, y1 = std::min(plan.H, y0 + BAND);
      scale(out + (bc * plan.H + y0) * plan.W, (y1 - y0) * plan.W, by.offset, by.factor);
    }
    if (band == 0) std::copy(both, both + 2, stats + 2 * bc);
  };
  if (BC >= 4 * threads) {  // a map a task: normalised while it is in the cache
    parallel_for(BC, 1, threads, [&](int64_t bc, int64_t) {
      for (int64_t band = 0; band < bands; ++band) make(bc, band);
      for (int64_t band = 0; band < bands; ++band) finish(bc, band);
    });
  } else {
    parallel_for(BC * bands, 1, threads, [&](int64_t i, int64_t) { make(i / bands, i % bands); });
    parallel_for(BC * bands, 1, threads, [&](int64_t i, int64_t) { finish(i / bands, i % bands); });
  }
}

// Gradient of the fused map, before normalisation: factor * (grad + at_highest [x = highest] + at_lowest [x = lowest]).
template <typename T>
struct Gradient {
  T highest, lowest, at_highest, at_lowest, factor;
};

template <typename T>
FASTCAM_INLINE void fuse_row(const Plan<T>& plan, const Between<T>* between, T* row) {
  using V = typename Vector<T>::type;
  for (int64_t x = 0; x < plan.padded; x += block<T>) {
    V* to = reinterpret_cast<V*>(row + x);
    if (plan.max) {
      fuse_block<true>(between, plan.groups.size(), x, to);
    } else {
      fuse_block<false>(between, plan.groups.size(), x, to);
    }
  }
}

// What the gradient of map bc needs to know of all its pixels. `wide` holds its stretched rows, `row` padded numbers.
template <typename T>
FASTCAM_INLINE Gradient<T> gradient_of_map(const Plan<T>& plan, const T* grad, const T* extremes, int normalize, T eps,
                                           const T* wide, Between<T>* between, T* row) {
  const Normalize<T> by(extremes, normalize, eps);
  double sum_g = 0, sum_gy = 0, highest = 0, lowest = 0;
  for (int64_t y = 0; y < plan.H; ++y) {
    constexpr int64_t N = 16;  // partial sums
    T g_part[N] = {}, gy_part[N] = {}, highest_part[N] = {}, lowest_part[N] = {};
    find_rows(plan, wide, 0, plan.H, y, between);
    fuse_row(plan, between, row);
    const T* g = grad + y * plan.W;
    const auto add = [&](int64_t x, int64_t i) __attribute__((always_inline)) {
      g_part[i] += g[x + i];
      gy_part[i] += g[x + i] * ((row[x + i] - by.offset) * by.factor);
      highest_part[i] += row[x + i] == extremes[0] ? 1 : 0;
      lowest_part[i] += row[x + i] == extremes[1] ? 1 : 0;
    };
    int64_t x = 0;
    for (; x + N <= plan.W; x += N)
      for (int64_t i = 0; i < N; ++i) add(x, i);
    for (int64_t i = 0; i < plan.W - x; ++i) add(x, i);
    for (int64_t i = 0; i < N; ++i) {
      sum_g += g_part[i];
      sum_gy += gy_part[i];
      highest += highest_part[i];
      lowest += lowest_part[i];
    }
  }
  const double at_highest = -sum_gy / highest, at_lowest = normalize == FUSE_BY_MINMAX ? (sum_gy - sum_g) / lowest : 0;
  return {extremes[0], extremes[1], static_cast<T>(at_highest), static_cast<T>(at_lowest), by.factor};
}

// Gradients of the views of map bc. `wide` and `grad_wide` take its stretched rows, `rows` 2 * padded numbers.
template <typename T>
FASTCAM_INLINE void gradient(const Plan<T>& plan, int64_t bc, const T* grad, const T* extremes, int normalize, T eps,
                             T* low, T* wide, T* grad_wide, Between<T>* between, T* rows) {
  T *row = rows, *g = rows + plan.padded;
  stretch_rows(plan, bc, 0, plan.H, low, wide);
  Gradient<T> d = {0, 0, 0, 0, 1};
  if (normalize != FUSE_BY_NOTHING) d = gradient_of_map(plan, grad, extremes, normalize, eps, wide, between, row);

  std::fill(grad_wide, grad_wide + plan.stretched_size(0, plan.H), T(0));
  for (int64_t y = 0; y < plan.H; ++y) {
    find_rows(plan, wide, 0, plan.H, y, between);
    const T* grad_row = grad + y * plan.W;
    if (normalize != FUSE_BY_NOTHING || plan.max) fuse_row(plan, between, row);
    for (int64_t x = 0; x < plan.W; ++x) {
      T sum = grad_row[x];
      if (normalize != FUSE_BY_NOTHING) {
        sum += row[x] == d.highest ? d.at_highest : 0;
        sum += row[x] == d.lowest ? d.at_lowest : 0;
      }
      g[x] = sum * d.factor;
    }
    for (size_t i = 0; i < plan.groups.size(); ++i) {
      const Between<T>& b = between[i];
      T *upper = grad_wide + (b.upper - wide), *lower = grad_wide + (b.lower - wide);
      for (int64_t x = 0; x < plan.W; ++x) {
        const bool mine = !plan.max || at(b, x) == row[x];  // the first of equals takes the gradient and leaves none
        const T share = mine ? g[x] : 0;
        if (plan.max && mine) g[x] = 0;
        upper[x] += share - b.weight * share;
        lower[x] += b.weight * share;
      }
    }
  }

  for (const Group<T>& group : plan.groups)
    for (int64_t i = 0; i < group.h; ++i) {
      std::fill(low, low + group.w + 1, T(0));
      if (i >= plan.begin(group, 0) && i < plan.end(group, plan.H)) {
        for (int64_t x = 0; x < plan.W; ++x) {
          const T lower = group.columns.weight[x] * grad_wide[x];
          low[group.columns.first[x]] += grad_wide[x] - lower;
          low[group.columns.first[x] + 1] += lower;
        }
        grad_wide += plan.padded;
      }
      for (const View<T>& view : group.views)
        for (int64_t j = 0; j < group.w; ++j) {
          const int64_t to = (bc * group.h + i) * group.w + (view.mirrored ? group.w - 1 - j : j);
          view.grad[to] = plan.relu && view.data[to] <= 0 ? 0 : low[j] * plan.scale;
        }
    }
}

FASTCAM_MULTIVERSION void gradient_f32(const Plan<float>& plan, int64_t bc, const float* grad, const float* extremes,
                                       int normalize, float eps, float* low, float* wide, float* grad_wide,
                                       Between<float>* between, float* rows) {
  gradient(plan, bc, grad, extremes, normalize, eps, low, wide, grad_wide, between, rows);
}
FASTCAM_MULTIVERSION void gradient_f64(const Plan<double>& plan, int64_t bc, const double* grad, const double* extremes,
                                       int normalize, double eps, double* low, double* wide, double* grad_wide,
                                       Between<double>* between, double* rows) {
  gradient(plan, bc, grad, extremes, normalize, eps, low, wide, grad_wide, between, rows);
}

// One map a task: its pixels are added up in one order, whatever the number of threads.
template <typename T, typename Map>
void backward(const Plan<T>& plan, const T* grad, const T* stats, const bool* present, int64_t BC, int normalize, T eps,
              int threads, Map map) {
  parallel_for(BC, 1, threads, [&](int64_t bc, int64_t) {
    if (present && !present[bc]) {
      for (const Group<T>& g : plan.groups)
        for (const View<T>& v : g.views) std::fill(v.grad + bc * g.h * g.w, v.grad + (bc + 1) * g.h * g.w, T(0));
      return;
    }
    Workspace<T> work(plan, 0, plan.H);
    std::unique_ptr<T[]> grad_wide(new T[plan.stretched_size(0, plan.H)]), rows(new T[2 * plan.padded]);
    map(plan, bc, grad + bc * plan.H * plan.W, stats + 2 * bc, normalize, eps, work.low.get(), work.wide.get(),
        grad_wide.get(), work.between.data(), rows.get());
  });
}

}  // namespace

void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, void* stats, bool f64, int64_t S, int64_t BC,
                  int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, bool relu, int reduce, int normalize,
                  bool align_corners, double eps, int threads) {
  if (f64) {
    forward(Plan<double>(views, S, H, W, grid_h, grid_w, relu, reduce, align_corners), present,
            static_cast<double*>(out), static_cast<double*>(stats), BC, normalize, eps, threads, fuse_rows_f64,
            scale_f64);
  } else {
    forward(Plan<float>(views, S, H, W, grid_h, grid_w, relu, reduce, align_corners), present, static_cast<float*>(out),
            static_cast<float*>(stats), BC, normalize, static_cast<float>(eps), threads, fuse_rows_f32, scale_f32);
  }
}

void cam_fuse_bwd(const void* grad, const int64_t* views, const void* stats, const bool* present, bool f64, int64_t S,
                  int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, bool relu, int reduce,
                  int normalize, bool align_corners, double eps, int threads) {
  if (f64) {
    backward(Plan<double>(views, S, H, W, grid_h, grid_w, relu, reduce, align_corners),
             static_cast<const double*>(grad), static_cast<const double*>(stats), present, BC, normalize, eps, threads,
             gradient_f64);
  } else {
    backward(Plan<float>(views, S, H, W, grid_h, grid_w, relu, reduce, align_corners), static_cast<const float*>(grad),
             static_cast<const float*>(stats), present, BC, normalize, static_cast<float>(eps), threads, gradient_f32);
  }
}

}  // namespace fastcam
