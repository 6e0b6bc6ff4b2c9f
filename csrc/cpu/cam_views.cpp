#include "cpu/cam_views.h"

#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BAND = 64;  // output rows that one task handles

FASTCAM_MULTIVERSION void extremes_f32(const Plan<float>& plan, int64_t bc, int64_t y0, int64_t y1,
                                       Workspace<float>& work, float* extremes) {
  with_reduction(plan, [&](auto reduce) __attribute__((always_inline)) {
    extremes_of_rows<reduce()>(plan, bc, y0, y1, work, extremes);
  });
}
FASTCAM_MULTIVERSION void extremes_f64(const Plan<double>& plan, int64_t bc, int64_t y0, int64_t y1,
                                       Workspace<double>& work, double* extremes) {
  with_reduction(plan, [&](auto reduce) __attribute__((always_inline)) {
    extremes_of_rows<reduce()>(plan, bc, y0, y1, work, extremes);
  });
}

template <typename T, typename Rows>
void extremes_of(const Plan<T>& plan, const bool* present, int64_t BC, int threads, T* extremes, Rows rows) {
  const int64_t bands = (plan.H + BAND - 1) / BAND;
  std::vector<T> parts(2 * BC * bands);
  parallel_for(BC * bands, 1, threads, [&](int64_t i, int64_t) {
    const int64_t bc = i / bands, y0 = i % bands * BAND, y1 = std::min(plan.H, y0 + BAND);
    if (present && !present[bc]) return;
    Workspace<T> work(plan, y0, y1);
    rows(plan, bc, y0, y1, work, &parts[2 * i]);
  });
  for (int64_t bc = 0; bc < BC; ++bc) {
    const T* part = &parts[2 * bc * bands];
    T *highest = extremes + 2 * bc, *lowest = highest + 1;
    *highest = part[0], *lowest = part[1];
    for (int64_t i = 1; i < bands; ++i) {
      if (part[2 * i] > *highest || std::isnan(part[2 * i])) *highest = part[2 * i];
      if (part[2 * i + 1] < *lowest || std::isnan(part[2 * i + 1])) *lowest = part[2 * i + 1];
    }
  }
}

}  // namespace

void extremes_of_maps(const Plan<float>& plan, const bool* present, int64_t BC, int threads, float* extremes) {
  extremes_of(plan, present, BC, threads, extremes, extremes_f32);
}
void extremes_of_maps(const Plan<double>& plan, const bool* present, int64_t BC, int threads, double* extremes) {
  extremes_of(plan, present, BC, threads, extremes, extremes_f64);
}

}  // namespace fastcam
