#include "cpu/cam_views.h"

#include "parallel.h"

namespace fastcam {
namespace {

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
void extremes_of(const Plan<T>& plan, const Bands<T>& bands, const bool* present, int64_t first, int64_t count,
                 int threads, T* kept, T* extremes, Rows rows) {
  std::vector<T> parts(2 * count * bands.count);
  parallel_for(count * bands.count, 1, threads, [&](int64_t i, int64_t) {
    const int64_t map = i / bands.count, band = i % bands.count, y0 = bands.row[band], y1 = bands.row[band + 1];
    if (present && !present[first + map]) return;
    Workspace<T> work(plan, y0, y1, kept ? kept + map * bands.kept.back() + bands.kept[band] : nullptr);
    rows(plan, first + map, y0, y1, work, &parts[2 * i]);
  });
  for (int64_t map = 0; map < count; ++map) {
    const T* part = &parts[2 * map * bands.count];
    T *highest = extremes + 2 * map, *lowest = highest + 1;
    *highest = part[0], *lowest = part[1];
    for (int64_t i = 1; i < bands.count; ++i) {
      if (part[2 * i] > *highest || std::isnan(part[2 * i])) *highest = part[2 * i];
      if (part[2 * i + 1] < *lowest || std::isnan(part[2 * i + 1])) *lowest = part[2 * i + 1];
    }
  }
}

}  // namespace

void extremes_of_maps(const Plan<float>& plan, const Bands<float>& bands, const bool* present, int64_t first,
                      int64_t count, int threads, float* kept, float* extremes) {
  extremes_of(plan, bands, present, first, count, threads, kept, extremes, extremes_f32);
}
void extremes_of_maps(const Plan<double>& plan, const Bands<double>& bands, const bool* present, int64_t first,
                      int64_t count, int threads, double* kept, double* extremes) {
  extremes_of(plan, bands, present, first, count, threads, kept, extremes, extremes_f64);
}

}  // namespace fastcam
