// Fusion of class activation maps: views (BC, h, w) of any number and size -> one map (BC, H, W). Maxima come first,
// from the ends of intervals, then every value is written once, normalised.
#include <algorithm>
#include <cstring>

#include "cpu/cam_views.h"
#include "cpu/ops.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BAND = 64;       // output rows that one task handles
constexpr int64_t KEPT = 1 << 20;  // bytes of stretched rows that are kept

// Output rows [y0, y1) of map bc, normalised, from the stretched rows.
template <int REDUCE, typename T>
FASTCAM_INLINE void write_rows(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, const Normalize<T>& by,
                               Workspace<T>& work, T* out) {
  using V = typename Vector<T>::type;
  constexpr int64_t SIZE = Vector<T>::size;
  const bool lifts = by.least > -std::numeric_limits<T>::infinity() || std::isnan(by.least);
  const T *base = work.base, *slope = work.slope;  // copies, which stores cannot change
  const T offset = by.offset, factor = by.factor, least = by.least, floor = plan.fused_floor;
  const int64_t W = plan.W;
  for_rows<REDUCE>(plan, y0, y1, work, [&](int64_t row, int64_t y) __attribute__((always_inline)) {
    T* to = out + (bc * plan.H + y) * W;
    const T k = row;
    const auto fused = [&](int64_t x, V& v) __attribute__((always_inline)) {
      v = *reinterpret_cast<const V*>(base + x) + k * *reinterpret_cast<const V*>(slope + x);
      clip(v, floor);
      if (!lifts) v = (v - offset) * factor;
    };
    const auto store = [&](int64_t x) __attribute__((always_inline)) {
      V v;
      fused(x, v);
      *reinterpret_cast<V*>(to + x) = v;
    };
    if (W < SIZE) {
      V v;
      fused(0, v);
      std::memcpy(to, &v, W * sizeof(T));
    } else {  // whole cache lines, and what they leave at both ends
      store(0);
      for (int64_t x = SIZE - reinterpret_cast<uintptr_t>(to) / sizeof(T) % SIZE; x + SIZE <= W; x += SIZE) store(x);
      store(W - SIZE);
    }
    for (int64_t x = 0; lifts && x < W; ++x) to[x] = ((to[x] < least ? 0 : to[x]) - offset) * factor;
  });
}

FASTCAM_MULTIVERSION void write_rows_f32(const Plan<float>& plan, int64_t bc, int64_t y0, int64_t y1,
                                         const Normalize<float>& by, Workspace<float>& work, float* out) {
  with_reduction(
      plan, [&](auto reduce) __attribute__((always_inline)) { write_rows<reduce()>(plan, bc, y0, y1, by, work, out); });
}
FASTCAM_MULTIVERSION void write_rows_f64(const Plan<double>& plan, int64_t bc, int64_t y0, int64_t y1,
                                         const Normalize<double>& by, Workspace<double>& work, double* out) {
  with_reduction(
      plan, [&](auto reduce) __attribute__((always_inline)) { write_rows<reduce()>(plan, bc, y0, y1, by, work, out); });
}

FASTCAM_MULTIVERSION void stretch_rows_f32(const Plan<float>& plan, int64_t bc, int64_t y0, int64_t y1,
                                           Workspace<float>& work) {
  stretch_rows(plan, bc, y0, y1, work);
}
FASTCAM_MULTIVERSION void stretch_rows_f64(const Plan<double>& plan, int64_t bc, int64_t y0, int64_t y1,
                                           Workspace<double>& work) {
  stretch_rows(plan, bc, y0, y1, work);
}

template <typename T, typename Stretch, typename Rows>
void forward(const Plan<T>& plan, const bool* present, T* out, T* stats, int64_t BC, int normalize, T eps, int threads,
             Stretch stretch, Rows write) {
  threads = threads_for(BC * plan.H * plan.W, threads);
  const Bands<T> bands(plan, BAND);
  const int64_t size = bands.kept.back();
  // So many maps at a time that what was stretched for their extremes is still in the cache when they are written.
  const bool twice = normalize != FUSE_BY_NOTHING;
  const int64_t maps = twice ? std::clamp<int64_t>(KEPT / (size * sizeof(T)), std::min<int64_t>(threads, BC), BC) : BC;
  const std::unique_ptr<T[]> kept(twice ? new T[maps * size] : nullptr);
  if (!twice) std::fill(stats, stats + 2 * BC, T(0));
  for (int64_t first = 0; first < BC; first += maps) {
    const int64_t count = std::min(maps, BC - first);
    if (twice) extremes_of_maps(plan, bands, present, first, count, threads, kept.get(), stats + 2 * first);
    parallel_for(count * bands.count, 1, threads, [&](int64_t i, int64_t) {
      const int64_t bc = first + i / bands.count, band = i % bands.count;
      const int64_t y0 = bands.row[band], y1 = bands.row[band + 1];
      if (present && !present[bc]) {
        std::fill(out + (bc * plan.H + y0) * plan.W, out + (bc * plan.H + y1) * plan.W, T(0));
        return;
      }
      Workspace<T> work(plan, y0, y1, twice ? kept.get() + (bc - first) * size + bands.kept[band] : nullptr);
      if (!twice) stretch(plan, bc, y0, y1, work);
      write(plan, bc, y0, y1, Normalize<T>(stats + 2 * bc, normalize, eps), work, out);
    });
  }
}

// Sums over pixels that the gradient of a map needs: of g, of g y, and of pixels that hold the maximum, the minimum.
struct Sums {
  double g = 0, gy = 0, highest = 0, lowest = 0;
};

// Fused values of the rows [y, stop) of one interval, `padded` apart.
template <int REDUCE, typename T>
FASTCAM_INLINE void fuse_interval(const Plan<T>& plan, int64_t y, int64_t stop, const Between<T>* between, T* rows) {
  using V = typename Vector<T>::type;
  for (int64_t x = 0; x < plan.padded; x += block<T>) {
    V base[VECTORS], slope[VECTORS];
    fuse_block<REDUCE>(plan, between, x, base, slope);
    for (int64_t i = y; i < stop; ++i)
      for (int64_t k = 0; k < VECTORS; ++k)
        evaluate(plan, base[k], slope[k], i - plan.interval[y].start,
                 *reinterpret_cast<V*>(rows + (i - y) * plan.padded + x + k * Vector<T>::size));
  }
}

// What one task of the backward owns: rows [y0, y1) of map bc.
template <typename T>
struct Band {
  const Plan<T>& plan;
  int64_t bc, y0, y1;
  const T *grad, *extremes;  // of the map
  Normalize<T> by;
  int normalize;
};

template <int REDUCE, typename T>
FASTCAM_INLINE void sums_of_rows(const Band<T>& band, Workspace<T>& work, T* rows, Sums& sums) {
  const Plan<T>& plan = band.plan;
  const T highest = band.extremes[0], lowest = band.extremes[1];
  const Normalize<T> by = band.by;
  stretch_rows(plan, band.bc, band.y0, band.y1, work);
  for (int64_t y = band.y0, stop; y < band.y1; y = stop) {
    stop = std::min(plan.interval[y].stop, band.y1);
    find_rows(plan, band.y0, band.y1, y, work);
    fuse_interval<REDUCE>(plan, y, stop, work.between.data(), rows);
    for (int64_t i = y; i < stop; ++i) {
      constexpr int64_t N = 16;  // partial sums
      T g_part[N] = {}, gy_part[N] = {}, highest_part[N] = {}, lowest_part[N] = {};
      const T *g = band.grad + i * plan.W, *row = rows + (i - y) * plan.padded;
      const auto add = [&](int64_t x, int64_t n) __attribute__((always_inline)) {
        const T value = row[x + n] < by.least ? 0 : row[x + n];
        g_part[n] += g[x + n];
        gy_part[n] += g[x + n] * ((value - by.offset) * by.factor);
        highest_part[n] += row[x + n] == highest ? 1 : 0;
        lowest_part[n] += row[x + n] == lowest ? 1 : 0;
      };
      int64_t x = 0;
      for (; x + N <= plan.W; x += N)
        for (int64_t n = 0; n < N; ++n) add(x, n);
      for (int64_t n = 0; n < plan.W - x; ++n) add(x, n);
      for (int64_t n = 0; n < N; ++n) {
        sums.g += g_part[n];
        sums.gy += gy_part[n];
        sums.highest += highest_part[n];
        sums.lowest += lowest_part[n];
      }
    }
  }
}

// Gradient of the fused map before normalisation, of one row whose fused values are given, in place of g (padded):
// factor * (g + at_highest [x = highest] + at_lowest [x = lowest]).
template <typename T>
FASTCAM_INLINE void gradient_of_row(const Band<T>& band, const Sums& sums, const T* row, const T* grad, T* g) {
  const Plan<T>& plan = band.plan;
  std::fill(g + plan.W, g + plan.padded, T(0));
  if (band.normalize == FUSE_BY_NOTHING) {
    std::copy(grad, grad + plan.W, g);
  } else {
    const T highest = band.extremes[0], lowest = band.extremes[1];
    const T least = band.by.least, factor = band.by.factor;
    const T at_highest = static_cast<T>(-sums.gy / sums.highest);
    const T at_lowest = band.normalize == FUSE_BY_MAX ? 0 : static_cast<T>((sums.gy - sums.g) / sums.lowest);
    for (int64_t x = 0; x < plan.W; ++x) {
      T sum = row[x] < least ? 0 : grad[x];
      sum += row[x] == highest ? at_highest : 0;
      sum += row[x] == lowest ? at_lowest : 0;
      g[x] = sum * factor;
    }
  }
  if (plan.fused_floor == 0)
    for (int64_t x = 0; x < plan.W; ++x) g[x] = row[x] <= 0 ? 0 : g[x];
}

// Shares of g for the groups of an interval that is one row: value i of group takes it or not.
template <int REDUCE, typename T>
FASTCAM_INLINE void share(const Plan<T>& plan, const Between<T>* between, const T* wide, T* grad_wide, const T* row,
                          T* g, T* rest) {
  const int64_t groups = plan.groups.size();
  const T floor = plan.floor;
  const auto at = [&](int64_t i, int64_t x) __attribute__((always_inline)) {
    const T v = between[i].upper[x] + between[i].weight * (between[i].lower[x] - between[i].upper[x]);
    return v < floor ? floor : v;
  };
  for (int64_t i = 0; i < groups; ++i) {
    const Between<T>& b = between[i];
    T *upper = grad_wide + (b.upper - wide), *lower = grad_wide + (b.lower - wide);
    if (REDUCE == FUSE_PAIR_MAX && i % 2 == 0) std::copy(g, g + plan.padded, rest);
    for (int64_t x = 0; x < plan.padded; ++x) {
      const T v = at(i, x);
      T part = g[x];
      if (REDUCE == FUSE_MAX) {  // the first of equals takes the gradient and leaves none
        part = v == row[x] ? g[x] : 0;
        g[x] = v == row[x] ? 0 : g[x];
      }
      if (REDUCE == FUSE_PAIR_MAX && i % 2 == 0) {
        part = v >= at(i + 1, x) ? g[x] : 0;
        rest[x] -= part;
      }
      if (REDUCE == FUSE_PAIR_MAX && i % 2 == 1) part = rest[x];
      part = v <= floor ? 0 : part;
      upper[x] += part - b.weight * part;
      lower[x] += b.weight * part;
    }
  }
}

// Gradients of the source rows that rows [y0, y1) come from, one group after another, into `low`. `grad_wide` takes
// those of the stretched rows, `rows` as many rows as the longest interval, `sums_of_g` three more.
template <int REDUCE, typename T>
FASTCAM_INLINE void gradient_of_rows(const Band<T>& band, const Sums& sums, Workspace<T>& work, T* grad_wide, T* rows,
                                     T* g, T* low) {
  const Plan<T>& plan = band.plan;
  const int64_t padded = plan.padded;
  T *total = g + padded, *moment = g + 2 * padded;
  const bool needs_rows = band.normalize != FUSE_BY_NOTHING || REDUCE == FUSE_MAX || plan.fused_floor == 0;
  stretch_rows(plan, band.bc, band.y0, band.y1, work);
  const T* wide = work.wide;
  std::fill(grad_wide, grad_wide + plan.rows(band.y0, band.y1) * padded, T(0));
  for (int64_t y = band.y0, stop; y < band.y1; y = stop) {
    stop = std::min(plan.interval[y].stop, band.y1);
    find_rows(plan, band.y0, band.y1, y, work);
    if (needs_rows) fuse_interval<REDUCE>(plan, y, stop, work.between.data(), rows);
    std::fill(total, total + 2 * padded, T(0));
    for (int64_t i = y; i < stop; ++i) {
      const T* row = rows + (i - y) * padded;
      gradient_of_row(band, sums, row, band.grad + i * plan.W, g);
      if (REDUCE != FUSE_MEAN) {
        share<REDUCE>(plan, work.between.data(), wide, grad_wide, row, g, total);
        continue;
      }
      const T k = i - plan.interval[y].start;
      for (int64_t x = 0; x < padded; ++x) {
        total[x] += g[x];
        moment[x] += k * g[x];
      }
    }
    if (REDUCE != FUSE_MEAN) continue;
    for (const Between<T>& b : work.between) {
      T *upper = grad_wide + (b.upper - wide), *lower = grad_wide + (b.lower - wide);
      for (int64_t x = 0; x < padded; ++x) {
        const T below = b.weight * total[x] + b.step * moment[x];
        upper[x] += total[x] - below;
        lower[x] += below;
      }
    }
  }
  for (const Group<T>& group : plan.groups)
    for (int64_t i = plan.begin(group, band.y0); i < plan.end(group, band.y1); ++i, grad_wide += padded, low += group.w)
      for (int64_t j = 0; j < group.w; ++j) {
        T left = 0, right = 0;
        for (int64_t x = group.columns.start[j]; x < group.columns.start[j + 1]; ++x) {
          const T part = group.columns.weight[x] * grad_wide[x];
          left += grad_wide[x] - part;
          right += part;
        }
        low[j] = (j == 0 ? 0 : low[j]) + left;
        if (j + 1 < group.w) low[j + 1] = right;
      }
}

FASTCAM_MULTIVERSION void sums_of_rows_f32(const Band<float>& band, Workspace<float>& work, float* rows, Sums& sums) {
  with_reduction(band.plan,
                 [&](auto reduce) __attribute__((always_inline)) { sums_of_rows<reduce()>(band, work, rows, sums); });
}
FASTCAM_MULTIVERSION void sums_of_rows_f64(const Band<double>& band, Workspace<double>& work, double* rows,
                                           Sums& sums) {
  with_reduction(band.plan,
                 [&](auto reduce) __attribute__((always_inline)) { sums_of_rows<reduce()>(band, work, rows, sums); });
}
FASTCAM_MULTIVERSION void gradient_of_rows_f32(const Band<float>& band, const Sums& sums, Workspace<float>& work,
                                               float* grad_wide, float* rows, float* g, float* low) {
  with_reduction(band.plan, [&](auto reduce) __attribute__((always_inline)) {
    gradient_of_rows<reduce()>(band, sums, work, grad_wide, rows, g, low);
  });
}
FASTCAM_MULTIVERSION void gradient_of_rows_f64(const Band<double>& band, const Sums& sums, Workspace<double>& work,
                                               double* grad_wide, double* rows, double* g, double* low) {
  with_reduction(band.plan, [&](auto reduce) __attribute__((always_inline)) {
    gradient_of_rows<reduce()>(band, sums, work, grad_wide, rows, g, low);
  });
}

// Bands of a map meet in source rows: each leaves its share, and the shares are added from top to bottom, so that the
// result does not depend on the number of threads.
template <typename T, typename SumRows, typename GradientRows>
void backward(const Plan<T>& plan, const T* grad, const T* stats, const bool* present, int64_t BC, int normalize, T eps,
              int threads, SumRows sum_rows, GradientRows gradient_rows) {
  const int64_t bands = (plan.H + BAND - 1) / BAND;
  int64_t longest = 0;
  for (const Interval& i : plan.interval) longest = std::max(longest, i.stop - i.start);
  std::vector<int64_t> offset(bands + 1);
  for (int64_t band = 0; band < bands; ++band)
    offset[band + 1] = offset[band] + plan.sources(band * BAND, std::min(plan.H, (band + 1) * BAND));
  std::unique_ptr<T[]> shares(new T[BC * offset[bands]]);
  std::vector<Sums> sums(BC * bands);
  const auto band_of = [&](int64_t i) {
    const int64_t bc = i / bands, y0 = i % bands * BAND;
    return Band<T>{plan,
                   bc,
                   y0,
                   std::min(plan.H, y0 + BAND),
                   grad + bc * plan.H * plan.W,
                   stats + 2 * bc,
                   Normalize<T>(stats + 2 * bc, normalize, eps),
                   normalize};
  };
  if (normalize != FUSE_BY_NOTHING) {
    parallel_for(BC * bands, 1, threads, [&](int64_t i, int64_t) {
      const Band<T> band = band_of(i);
      if (present && !present[band.bc]) return;
      Workspace<T> work(plan, band.y0, band.y1);
      std::unique_ptr<T[]> rows(new T[longest * plan.padded]);
      sum_rows(band, work, rows.get(), sums[i]);
    });
    for (int64_t bc = 0; bc < BC; ++bc)
      for (int64_t i = 1; i < bands; ++i) {
        Sums& all = sums[bc * bands];
        const Sums& part = sums[bc * bands + i];
        all = {all.g + part.g, all.gy + part.gy, all.highest + part.highest, all.lowest + part.lowest};
      }
  }
  parallel_for(BC * bands, 1, threads, [&](int64_t i, int64_t) {
    const Band<T> band = band_of(i);
    if (present && !present[band.bc]) return;
    Workspace<T> work(plan, band.y0, band.y1);
    std::unique_ptr<T[]> grad_wide(new T[plan.rows(band.y0, band.y1) * plan.padded]);
    std::unique_ptr<T[]> rows(new T[(longest + 3) * plan.padded]);
    gradient_rows(band, sums[band.bc * bands], work, grad_wide.get(), rows.get(), rows.get() + longest * plan.padded,
                  shares.get() + band.bc * offset[bands] + offset[i % bands]);
  });
  parallel_for(BC, 1, threads, [&](int64_t bc, int64_t) {
    std::vector<const T*> share(bands);
    for (int64_t band = 0; band < bands; ++band) share[band] = shares.get() + bc * offset[bands] + offset[band];
    std::vector<T> low;
    for (const Group<T>& g : plan.groups) {
      low.assign(g.h * g.w, T(0));
      for (int64_t band = 0; band < bands && !(present && !present[bc]); ++band)
        for (int64_t i = plan.begin(g, band * BAND) * g.w; i < plan.end(g, std::min(plan.H, (band + 1) * BAND)) * g.w;
             ++i)
          low[i] += *share[band]++;
      for (const View<T>& view : g.views)
        for (int64_t i = 0; i < g.h; ++i)
          for (int64_t j = 0; j < g.w; ++j) {
            const int64_t to = (bc * g.h + i) * g.w + (view.mirrored ? g.w - 1 - j : j);
            view.grad[to] = plan.relu && view.data[to] <= 0 ? 0 : low[i * g.w + j] * plan.scale;
          }
    }
  });
}

}  // namespace

void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, void* stats, bool f64, int64_t S, int64_t BC,
                  int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation, int reduce, int normalize,
                  bool align_corners, double eps, int threads) {
  if (f64) {
    forward(Plan<double>(views, S, H, W, grid_h, grid_w, activation, reduce, align_corners), present,
            static_cast<double*>(out), static_cast<double*>(stats), BC, normalize, eps, threads, stretch_rows_f64,
            write_rows_f64);
  } else {
    forward(Plan<float>(views, S, H, W, grid_h, grid_w, activation, reduce, align_corners), present,
            static_cast<float*>(out), static_cast<float*>(stats), BC, normalize, static_cast<float>(eps), threads,
            stretch_rows_f32, write_rows_f32);
  }
}

void cam_fuse_bwd(const void* grad, const int64_t* views, const void* stats, const bool* present, bool f64, int64_t S,
                  int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation, int reduce,
                  int normalize, bool align_corners, double eps, int threads) {
  if (f64) {
    backward(Plan<double>(views, S, H, W, grid_h, grid_w, activation, reduce, align_corners),
             static_cast<const double*>(grad), static_cast<const double*>(stats), present, BC, normalize, eps, threads,
             sums_of_rows_f64, gradient_of_rows_f64);
  } else {
    backward(Plan<float>(views, S, H, W, grid_h, grid_w, activation, reduce, align_corners),
             static_cast<const float*>(grad), static_cast<const float*>(stats), present, BC, normalize,
             static_cast<float>(eps), threads, sums_of_rows_f32, gradient_of_rows_f32);
  }
}

}  // namespace fastcam
