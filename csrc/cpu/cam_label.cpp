// Labels from class activation maps: views (B C, h, w) of any number and size -> labels (B, H, W). Maxima come first,
// as in cam_fuse, then a band of rows is fused class after class and only the best class of each pixel is kept.
#include <algorithm>

#include "cpu/cam_views.h"
#include "cpu/ops.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BAND = 32;  // output rows that one task handles: their best scores and labels stay in the cache

// best and winner (y1 - y0, padded): where map bc, normalised, is larger than best, it takes the pixel for `label`.
template <int REDUCE, typename T>
FASTCAM_INLINE void keep_best(const Plan<T>& plan, int64_t bc, int64_t y0, int64_t y1, const Normalize<T>& by, T label,
                              Workspace<T>& work, T* best, T* winner) {
  using V = typename Vector<T>::type;
  stretch_rows(plan, bc, y0, y1, work);
  for_rows<REDUCE>(plan, y0, y1, work, [&](int64_t k, int64_t y) __attribute__((always_inline)) {
    const V *base = reinterpret_cast<const V*>(work.base), *slope = reinterpret_cast<const V*>(work.slope);
    T *b = best + (y - y0) * plan.padded, *w = winner + (y - y0) * plan.padded;
    for (int64_t x = 0; x < plan.padded; x += Vector<T>::size) {
      T value[Vector<T>::size];
      evaluate(plan, base[x / Vector<T>::size], slope[x / Vector<T>::size], k, *reinterpret_cast<V*>(value));
      for (int64_t i = 0; i < Vector<T>::size; ++i) {
        T v = ((value[i] < by.least ? 0 : value[i]) - by.offset) * by.factor;
        v = v != v ? std::numeric_limits<T>::infinity() : v;
        w[x + i] = v > b[x + i] ? label : w[x + i];
        b[x + i] = v > b[x + i] ? v : b[x + i];
      }
    }
  });
}

FASTCAM_MULTIVERSION void keep_best_f32(const Plan<float>& plan, int64_t bc, int64_t y0, int64_t y1,
                                        const Normalize<float>& by, float label, Workspace<float>& work, float* best,
                                        float* winner) {
  with_reduction(plan, [&](auto reduce) __attribute__((always_inline)) {
    keep_best<reduce()>(plan, bc, y0, y1, by, label, work, best, winner);
  });
}
FASTCAM_MULTIVERSION void keep_best_f64(const Plan<double>& plan, int64_t bc, int64_t y0, int64_t y1,
                                        const Normalize<double>& by, double label, Workspace<double>& work,
                                        double* best, double* winner) {
  with_reduction(plan, [&](auto reduce) __attribute__((always_inline)) {
    keep_best<reduce()>(plan, bc, y0, y1, by, label, work, best, winner);
  });
}

template <typename T, typename Keep>
void label_maps(const Plan<T>& plan, const bool* present, const uint8_t* labels, T background, uint8_t* out, int64_t B,
                int64_t C, int normalize, T eps, int threads, Keep keep) {
  threads = threads_for(B * C * plan.H * plan.W, threads);
  std::vector<T> stats(2 * B * C);
  const Bands<T> bands(plan, BAND);
  if (normalize != FUSE_BY_NOTHING)
    extremes_of_maps(plan, Bands<T>(plan, 2 * BAND), present, 0, B * C, threads, nullptr, stats.data());
  parallel_for(B * bands.count, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / bands.count, y0 = bands.row[i % bands.count], y1 = bands.row[i % bands.count + 1];
    Workspace<T> work(plan, y0, y1);
    // A class must beat the background, which therefore is the score to start from.
    std::vector<T> best((y1 - y0) * plan.padded, background), winner(best.size(), T(0));
    for (int64_t c = 0; c < C; ++c) {
      const int64_t bc = b * C + c;
      if (present && !present[bc]) continue;
      keep(plan, bc, y0, y1, Normalize<T>(&stats[2 * bc], normalize, eps), labels[c], work, best.data(), winner.data());
    }
    for (int64_t y = y0; y < y1; ++y) {
      const T* from = &winner[(y - y0) * plan.padded];
      std::transform(from, from + plan.W, out + (b * plan.H + y) * plan.W,
                     [](T label) { return static_cast<uint8_t>(label); });
    }
  });
}

}  // namespace

void cam_label_fwd(const int64_t* views, const bool* present, const uint8_t* labels, double background, uint8_t* out,
                   bool f64, int64_t S, int64_t B, int64_t C, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w,
                   int activation, int reduce, int normalize, bool align_corners, double eps, int threads) {
  if (f64) {
    label_maps(Plan<double>(views, S, H, W, grid_h, grid_w, activation, reduce, align_corners), present, labels,
               background, out, B, C, normalize, eps, threads, keep_best_f64);
  } else {
    label_maps(Plan<float>(views, S, H, W, grid_h, grid_w, activation, reduce, align_corners), present, labels,
               static_cast<float>(background), out, B, C, normalize, static_cast<float>(eps), threads, keep_best_f32);
  }
}

}  // namespace fastcam
