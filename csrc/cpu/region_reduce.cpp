// Sums, means, maxima and histograms of values (B, C, H, W) over the regions of labels (B, H, W).
//
// An image's labels are cut into runs of equal labels once; every channel walks them, adding up a run before it looks
// up the region. A channel is one task and adds in scan order, so bits do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

enum Reduce { MEAN, SUM, MAX };  // the order of REDUCTIONS in fastcam/ops/region_reduce.py

constexpr int64_t LONGEST = 1024;  // pixels of a run, whose sum is in the numbers' own precision

struct Run {
  int64_t begin, end;
  int64_t region;
};

// Runs of labels (P) that lie in a region. `outside` becomes a label of S and above, if there is one.
std::vector<Run> runs_of(const int64_t* labels, int64_t P, int64_t S, std::atomic<int64_t>& outside) {
  std::vector<Run> runs;
  for (int64_t p = 0; p < P;) {
    const int64_t begin = p, region = labels[p];
    const int64_t limit = std::min(P, begin + LONGEST);
    while (p < limit && labels[p] == region) ++p;
    if (region >= S) outside = region;
    if (region >= 0 && region < S) runs.push_back({begin, p, region});
  }
  return runs;
}

template <typename T>
FASTCAM_INLINE void add_runs(const T* x, const Run* runs, int64_t count, double* sums) {
  constexpr int64_t W = 8;
  for (int64_t r = 0; r < count; ++r) {
    T parts[W] = {};
    int64_t p = runs[r].begin;
    for (; p + W <= runs[r].end; p += W)
      for (int64_t i = 0; i < W; ++i) parts[i] += x[p + i];
    for (int64_t i = 0; i < runs[r].end - p; ++i) parts[i] += x[p + i];
    sums[runs[r].region] += across<Sum, T, W>(parts);
  }
}
FASTCAM_MULTIVERSION void add_runs_f32(const float* x, const Run* runs, int64_t count, double* sums) {
  add_runs(x, runs, count, sums);
}
FASTCAM_MULTIVERSION void add_runs_f64(const double* x, const Run* runs, int64_t count, double* sums) {
  add_runs(x, runs, count, sums);
}

// The first of the largest values of each region, a NaN above all; `at` is -1 where there is none yet.
template <typename T>
void largest(const T* x, const std::vector<Run>& runs, T* best, int64_t* at) {
  for (const Run& run : runs) {
    T top = best[run.region];
    int64_t where = at[run.region];
    for (int64_t p = run.begin; p < run.end; ++p)
      if (x[p] > top || (x[p] != x[p] && top == top) || where < 0) {
        top = x[p];
        where = p;
      }
    best[run.region] = top;
    at[run.region] = where;
  }
}

template <typename T, typename Add>
int64_t forward(const T* x, const int64_t* labels, T* out, int64_t* stat, int64_t B, int64_t C, int64_t P, int64_t S,
                int reduce, int threads, Add add_runs) {
  std::atomic<int64_t> outside{-1};
  std::vector<std::vector<Run>> runs(B);
  parallel_for(B, 1, threads, [&](int64_t b, int64_t) {
    runs[b] = runs_of(labels + b * P, P, S, outside);
    if (reduce == MAX) return;
    std::fill(stat + b * S, stat + (b + 1) * S, 0);
    for (const Run& run : runs[b]) stat[b * S + run.region] += run.end - run.begin;
  });
  if (outside >= 0) return outside;
  parallel_for(B * C, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / C, c = i % C;
    if (reduce == MAX) {
      std::vector<T> best(S, -std::numeric_limits<T>::infinity());
      std::vector<int64_t> at(S, -1);
      largest(x + i * P, runs[b], best.data(), at.data());
      for (int64_t s = 0; s < S; ++s) {
        out[(b * S + s) * C + c] = best[s];
        stat[(b * S + s) * C + c] = at[s];
      }
      return;
    }
    std::vector<double> sums(S);
    add_runs(x + i * P, runs[b].data(), runs[b].size(), sums.data());
    for (int64_t s = 0; s < S; ++s) {
      const double area = reduce == MEAN ? std::max<int64_t>(stat[b * S + s], 1) : 1;
      out[(b * S + s) * C + c] = static_cast<T>(sums[s] / area);
    }
  });
  return -1;
}

template <typename T>
void backward(const T* grad, const int64_t* labels, const int64_t* stat, T* grad_x, int64_t B, int64_t C, int64_t P,
              int64_t S, int reduce, int threads) {
  std::atomic<int64_t> outside{-1};
  std::vector<std::vector<Run>> runs(B);
  if (reduce != MAX)
    parallel_for(B, 1, threads, [&](int64_t b, int64_t) { runs[b] = runs_of(labels + b * P, P, S, outside); });
  parallel_for(B * C, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / C, c = i % C;
    T* const to = grad_x + i * P;
    std::fill(to, to + P, T(0));
    if (reduce == MAX) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t p = stat[(b * S + s) * C + c];
        if (p >= 0) to[p] = grad[(b * S + s) * C + c];
      }
      return;
    }
    for (const Run& run : runs[b]) {
      const int64_t s = b * S + run.region;
      const T share = reduce == MEAN ? grad[s * C + c] / static_cast<T>(stat[s]) : grad[s * C + c];
      std::fill(to + run.begin, to + run.end, share);
    }
  });
}

// bin(value) gives the bin of a value, or -1.
template <typename T, typename Bin>
int64_t histogram(const T* x, const int64_t* labels, int64_t* out, int64_t B, int64_t C, int64_t P, int64_t S,
                  int64_t bins, int threads, Bin bin) {
  std::atomic<int64_t> outside{-1};
  std::vector<std::vector<Run>> runs(B);
  parallel_for(B, 1, threads, [&](int64_t b, int64_t) { runs[b] = runs_of(labels + b * P, P, S, outside); });
  if (outside >= 0) return outside;
  parallel_for(B * C, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / C, c = i % C;
    const T* const from = x + i * P;
    for (const Run& run : runs[b]) {
      int64_t* const counts = out + ((b * S + run.region) * C + c) * bins;
      for (int64_t p = run.begin; p < run.end; ++p) {
        const int64_t at = bin(from[p]);
        if (at >= 0) ++counts[at];
      }
    }
  });
  return -1;
}

template <typename T>
int64_t histogram_of_floats(const T* x, const int64_t* labels, int64_t* out, int64_t B, int64_t C, int64_t P, int64_t S,
                            int64_t bins, double low, double high, int threads) {
  const T first = static_cast<T>(low), per_unit = static_cast<T>(bins / (high - low)), last = static_cast<T>(bins - 1);
  return histogram(x, labels, out, B, C, P, S, bins, threads, [=](T v) -> int64_t {
    if (v != v) return -1;
    const T at = (v - first) * per_unit;
    return at > 0 ? at < last ? static_cast<int64_t>(at) : bins - 1 : 0;
  });
}

}  // namespace

int64_t region_reduce_fwd(const void* x, const int64_t* labels, void* out, int64_t* stat, bool f64, int64_t B,
                          int64_t C, int64_t P, int64_t S, int reduce, int threads) {
  if (f64) {
    return forward(static_cast<const double*>(x), labels, static_cast<double*>(out), stat, B, C, P, S, reduce, threads,
                   add_runs_f64);
  }
  return forward(static_cast<const float*>(x), labels, static_cast<float*>(out), stat, B, C, P, S, reduce, threads,
                 add_runs_f32);
}

void region_reduce_bwd(const void* grad, const int64_t* labels, const int64_t* stat, void* grad_x, bool f64, int64_t B,
                       int64_t C, int64_t P, int64_t S, int reduce, int threads) {
  if (f64) {
    return backward(static_cast<const double*>(grad), labels, stat, static_cast<double*>(grad_x), B, C, P, S, reduce,
                    threads);
  }
  backward(static_cast<const float*>(grad), labels, stat, static_cast<float*>(grad_x), B, C, P, S, reduce, threads);
}

int64_t region_reduce_hist(const void* x, const int64_t* labels, int64_t* out, int kind, int64_t B, int64_t C,
                           int64_t P, int64_t S, int64_t bins, double low, double high, int threads) {
  if (kind == 0) {
    return histogram_of_floats(static_cast<const float*>(x), labels, out, B, C, P, S, bins, low, high, threads);
  }
  if (kind == 1) {
    return histogram_of_floats(static_cast<const double*>(x), labels, out, B, C, P, S, bins, low, high, threads);
  }
  return histogram(static_cast<const int64_t*>(x), labels, out, B, C, P, S, bins, threads,
                   [=](int64_t v) { return v >= 0 && v < bins ? v : -1; });
}

}  // namespace fastcam
