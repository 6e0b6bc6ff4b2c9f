// Counts of (true label, best class, number of thresholds below its score): scores (B, n, P), target (B, P), thresholds
// ascending (T) -> counts (C + 1, C + 1, T + 1).
#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t TILE = 1024;       // pixels whose best scores are found at once
constexpr int64_t TASK = 64 * TILE;  // pixels of a task, which has counts of its own

// How many of T ascending thresholds lie below a score. A table over equal steps between the first and the last gives
// where to start: position() never falls as its argument grows, so a threshold of an earlier step lies below.
template <typename T>
class Exceeded {
 public:
  Exceeded(const T* thresholds, int64_t count) : thresholds_(thresholds), finite_(count), start_(STEPS + 1) {
    while (finite_ > 0 && !(thresholds[finite_ - 1] < std::numeric_limits<T>::infinity())) --finite_;  // nor NaN
    const T least = std::numeric_limits<T>::lowest();
    while (below_ < finite_ && thresholds[below_] < least) ++below_;  // -infinity
    if (below_ < finite_) {
      first_ = thresholds[below_];
      const T range = thresholds[finite_ - 1] - first_;
      if (range > 0 && range <= std::numeric_limits<T>::max()) per_step_ = STEPS / range;
      if (!(per_step_ <= std::numeric_limits<T>::max())) per_step_ = 0;
    }
    int64_t i = below_;
    for (int64_t step = 0; step <= STEPS; ++step) {
      while (i < finite_ && position(thresholds[i]) < step) ++i;
      start_[step] = i;
    }
  }

  int64_t operator()(T score) const {
    if (score == -std::numeric_limits<T>::infinity()) return 0;
    int64_t i = start_[position(score)];
    while (i < finite_ && thresholds_[i] < score) ++i;
    return i;
  }

 private:
  static constexpr int64_t STEPS = 1024;

  int64_t position(T score) const {
    const T at = (score - first_) * per_step_;
    return at > 0 ? at < STEPS ? static_cast<int64_t>(at) : STEPS : 0;
  }

  const T* thresholds_;
  int64_t finite_, below_ = 0;  // thresholds [below_, finite_) are finite
  T first_ = 0, per_step_ = 0;
  std::vector<int64_t> start_;
};

// Where the scores of a channel are larger than best, they take the pixel for `label`.
template <typename T>
FASTCAM_INLINE void keep_best(const T* scores, int64_t count, int32_t label, T* best, int32_t* winner) {
  for (int64_t i = 0; i < count; ++i) {
    const T v = scores[i] != scores[i] ? std::numeric_limits<T>::infinity() : scores[i];
    winner[i] = v > best[i] ? label : winner[i];
    best[i] = v > best[i] ? v : best[i];
  }
}
FASTCAM_MULTIVERSION void keep_best_f32(const float* scores, int64_t count, int32_t label, float* best,
                                        int32_t* winner) {
  keep_best(scores, count, label, best, winner);
}
FASTCAM_MULTIVERSION void keep_best_f64(const double* scores, int64_t count, int32_t label, double* best,
                                        int32_t* winner) {
  keep_best(scores, count, label, best, winner);
}

template <typename T, typename Keep>
int64_t sweep(const T* scores, const int64_t* target, const T* thresholds, const int64_t* labels, const bool* present,
              int64_t* counts, int64_t B, int64_t n, int64_t P, int64_t num_classes, int64_t T_count,
              int64_t ignore_index, int threads, Keep keep) {
  const Exceeded<T> exceeded(thresholds, T_count);
  const int64_t bins = T_count + 1, size = (num_classes + 1) * (num_classes + 1) * bins;
  const int64_t tasks = (P + TASK - 1) / TASK;
  std::atomic<int64_t> outside{ignore_index};
  std::mutex mutex;
  parallel_for(B * tasks, 1, threads, [&](int64_t task, int64_t) {
    const int64_t b = task / tasks, begin = task % tasks * TASK, end = std::min(P, begin + TASK);
    std::vector<uint32_t> mine(size);
    T best[TILE];
    int32_t winner[TILE];
    for (int64_t p = begin; p < end; p += TILE) {
      const int64_t count = std::min(TILE, end - p);
      std::fill(best, best + count, -std::numeric_limits<T>::infinity());
      std::fill(winner, winner + count, 0);
      for (int64_t c = 0; c < n; ++c)
        if (!present || present[b * n + c])
          keep(scores + (b * n + c) * P + p, count, static_cast<int32_t>(labels[c]), best, winner);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t label = target[b * P + p + i];
        if (label == ignore_index) continue;
        if (label < 0 || label > num_classes) {
          outside = label;
          return;
        }
        ++mine[(label * (num_classes + 1) + winner[i]) * bins + exceeded(best[i])];
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < size; ++i) counts[i] += mine[i];
  });
  return outside;
}

}  // namespace

int64_t cam_sweep_fwd(const void* scores, const int64_t* target, const void* thresholds, const int64_t* labels,
                      const bool* present, int64_t* counts, bool f64, int64_t B, int64_t n, int64_t P,
                      int64_t num_classes, int64_t T, int64_t ignore_index, int threads) {
  if (f64) {
    return sweep(static_cast<const double*>(scores), target, static_cast<const double*>(thresholds), labels, present,
                 counts, B, n, P, num_classes, T, ignore_index, threads, keep_best_f64);
  }
  return sweep(static_cast<const float*>(scores), target, static_cast<const float*>(thresholds), labels, present,
               counts, B, n, P, num_classes, T, ignore_index, threads, keep_best_f32);
}

}  // namespace fastcam
