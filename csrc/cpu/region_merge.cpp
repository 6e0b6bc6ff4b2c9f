// Merging of neighbouring regions, most similar first: in rounds under a threshold that adapts, or one pair at a time.
//
// Every region keeps a list of its neighbours and of the borders to them; a merge appends one list to another. What
// regions are compared by adds up, so a merge costs the neighbours of two regions and no pixels.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/lab.h"
#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

// The orders of WEIGHTS and CRITERIA in fastcam/ops/region_merge.py.
enum Weight { CONTENT_BORDER, CONTENT, MEAN_COLOR };
enum Criterion { ADAPTIVE, BEST_FIRST };

constexpr double COLOR_SCALE = 20;
constexpr double STEPS = 1 << 20;  // similarities are counted in 1 / STEPS, so that rounding decides no order

// Sum of a[i] b[i] in a fixed order; n is a multiple of 8.
FASTCAM_MULTIVERSION
double dot(const double* a, const double* b, int64_t n) {
  double parts[8] = {};
  for (int64_t i = 0; i < n; i += 8)
    for (int64_t k = 0; k < 8; ++k) parts[k] += a[i + k] * b[i + k];
  return across<Sum, double, 8>(parts);
}

FASTCAM_MULTIVERSION
void add_roots(double* counts, const double* more, double* roots, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    counts[i] += more[i];
    roots[i] = std::sqrt(counts[i]);
  }
}

constexpr int64_t TILE = 1024;  // pixels whose colours are converted at once

FASTCAM_MULTIVERSION
void lab_tile(const uint8_t* rgb, int64_t P, const int32_t* gamma, const int32_t* f, int64_t n, uint16_t* l,
              uint16_t* a, uint16_t* b) {
  to_lab(rgb, rgb + P, rgb + 2 * P, gamma, f, n, l, a, b);
}

struct Settings {
  Weight weight;
  int64_t channels;  // of the histograms
  double start, stop, factor, fraction, penalty;
};

struct Border {
  int32_t i, j;                   // regions, i < j unless it is dead (i = j)
  double length, initial, pairs;  // sides; sum of the first similarities of the `pairs` pairs of superpixels along it
  double value;
};

struct Neighbour {
  int32_t region, border;
};

class Regions {
 public:
  // sums (S, 3), hist (S, F).
  Regions(const int64_t* edges, const int64_t* border, const int64_t* area, const int64_t* perimeter,
          const double* sums, const double* hist, int64_t E, int64_t S, int64_t F, const Settings& settings)
      : settings_(settings),
        width_((F + 7) / 8 * 8),
        area_(area, area + S),
        perimeter_(perimeter, perimeter + S),
        sums_(sums, sums + 3 * S),
        counts_(settings.weight == MEAN_COLOR ? 0 : S * width_),
        roots_(counts_.size()),
        neighbours_(S),
        borders_(E),
        mark_(S, -1) {
    const std::vector<double> none(width_);
    for (int64_t s = 0; s < S; ++s) {
      alive += area[s] > 0;
      if (settings.weight == MEAN_COLOR) continue;
      std::copy(hist + s * F, hist + (s + 1) * F, &counts_[s * width_]);
      add_roots(&counts_[s * width_], none.data(), &roots_[s * width_], width_);
    }
    for (int32_t e = 0; e < E; ++e) {
      const int32_t i = static_cast<int32_t>(edges[2 * e]), j = static_cast<int32_t>(edges[2 * e + 1]);
      neighbours_[i].push_back({j, e});
      neighbours_[j].push_back({i, e});
      borders_[e] = {i, j, static_cast<double>(border[e]), 0, 1, 0};
      borders_[e].initial = settings.weight == CONTENT_BORDER ? content(i, j) : 0;
      borders_[e].value = similarity(borders_[e]);
    }
  }

  int64_t size() const { return area_.size(); }
  const std::vector<Neighbour>& neighbours(int32_t region) const { return neighbours_[region]; }
  const Border& border(int32_t e) const { return borders_[e]; }
  int64_t borders() const { return borders_.size(); }

  // The larger region takes the lower number's place. `update` must follow before values are looked at.
  void merge(int32_t keep, int32_t gone) {
    double length = 0;
    for (const Neighbour& n : neighbours_[keep]) {
      mark_[n.region] = n.border;
      if (n.region == gone) length = borders_[n.border].length;
    }
    area_[keep] += area_[gone];
    perimeter_[keep] += perimeter_[gone] - 2 * length;
    for (int c = 0; c < 3; ++c) sums_[3 * keep + c] += sums_[3 * gone + c];
    if (settings_.weight != MEAN_COLOR)
      add_roots(&counts_[keep * width_], &counts_[gone * width_], &roots_[keep * width_], width_);
    for (const Neighbour& n : neighbours_[gone]) {
      Border& border = borders_[n.border];
      if (n.region == keep) {
        border.j = border.i;
        remove(neighbours_[keep], gone);
      } else if (mark_[n.region] >= 0) {
        Border& other = borders_[mark_[n.region]];
        other.length += border.length;
        other.initial += border.initial;
        other.pairs += border.pairs;
        border.j = border.i;
        remove(neighbours_[n.region], gone);
      } else {
        border.i = std::min(keep, n.region);
        border.j = std::max(keep, n.region);
        neighbours_[keep].push_back(n);
        for (Neighbour& back : neighbours_[n.region])
          if (back.region == gone) back.region = keep;
      }
    }
    for (const Neighbour& n : neighbours_[keep]) mark_[n.region] = -1;
    mark_[gone] = -1;
    neighbours_[gone].clear();
    --alive;
  }

  void update(int32_t region) {
    for (const Neighbour& n : neighbours_[region]) borders_[n.border].value = similarity(borders_[n.border]);
  }

  int64_t alive = 0;

 private:
  static void remove(std::vector<Neighbour>& list, int32_t region) {
    for (Neighbour& n : list)
      if (n.region == region) {
        n = list.back();
        return list.pop_back();
      }
  }

  double squared_distance(int32_t i, int32_t j) const {
    double sum = 0;
    for (int c = 0; c < 3; ++c) {
      const double d = sums_[3 * i + c] / area_[i] - sums_[3 * j + c] / area_[j];
      sum += d * d;
    }
    return sum;
  }
  double content(int32_t i, int32_t j) const {
    const double overlap = dot(&roots_[i * width_], &roots_[j * width_], width_) /
                           (settings_.channels * std::sqrt(static_cast<double>(area_[i]) * area_[j]));
    return 0.5 * overlap + 0.5 * std::exp(-squared_distance(i, j) / (COLOR_SCALE * COLOR_SCALE));
  }
  double similarity(const Border& border) const {
    const int32_t i = border.i, j = border.j;
    double value;
    if (settings_.weight == MEAN_COLOR) {
      value = 1 / (1 + std::sqrt(squared_distance(i, j)) / COLOR_SCALE);
    } else {
      value = content(i, j);
      if (settings_.weight == CONTENT_BORDER) {
        const double p = perimeter_[i], q = perimeter_[j];
        value += std::min(std::sqrt(border.length * (p + q) / (p * q)), 1.0) * (border.initial / border.pairs);
      }
    }
    return std::max(std::nearbyint(value * STEPS), 1.0) / STEPS;
  }

  const Settings& settings_;
  const int64_t width_;
  std::vector<double> area_, perimeter_, sums_, counts_, roots_;
  std::vector<std::vector<Neighbour>> neighbours_;
  std::vector<Border> borders_;
  std::vector<int32_t> mark_;
};

struct Pair {
  double value;
  int32_t i, j;
  bool operator<(const Pair& other) const {  // of lower priority
    if (value != other.value) return value < other.value;
    return i != other.i ? i > other.i : j > other.j;
  }
};

// Merges as they happened, to arrays of Python.
struct Log {
  int64_t* merges;  // (S, 3): round, kept, absorbed
  double* numbers;  // (S, 2): value, threshold
  int64_t count;

  void add(int64_t round, const Pair& pair, double threshold) {
    merges[3 * count] = round;
    merges[3 * count + 1] = pair.i;
    merges[3 * count + 2] = pair.j;
    numbers[2 * count] = pair.value;
    numbers[2 * count + 1] = threshold;
    ++count;
  }
};

// The pairs that a round would merge at a low threshold, in order: greedy over candidates, each region once.
std::vector<Pair> accepted(const Regions& regions, double penalty) {
  const int64_t S = regions.size();
  std::vector<Pair> best(S, Pair{-1, -1, -1});
  std::vector<Pair> candidates;
  for (int32_t r = 0; r < S; ++r)
    for (const Neighbour& n : regions.neighbours(r)) {
      const double value = regions.border(n.border).value;
      if (value > best[r].value || (value == best[r].value && n.region < best[r].j)) best[r] = {value, r, n.region};
    }
  for (int32_t r = 0; r < S; ++r) {
    if (best[r].j < 0) continue;
    const int32_t other = best[r].j;
    const bool mutual = best[other].j == r;
    if (mutual && other < r) continue;
    candidates.push_back({mutual ? best[r].value : penalty * best[r].value, std::min(r, other), std::max(r, other)});
  }
  std::sort(candidates.begin(), candidates.end(), [](const Pair& a, const Pair& b) { return b < a; });
  std::vector<char> taken(S);
  std::vector<Pair> pairs;
  for (const Pair& pair : candidates) {
    if (taken[pair.i] || taken[pair.j]) continue;
    taken[pair.i] = taken[pair.j] = 1;
    pairs.push_back(pair);
  }
  return pairs;
}

void merge_in_rounds(Regions& regions, const Settings& settings, Log& log) {
  double threshold = settings.start, factor = settings.factor;
  for (int64_t round = 0; threshold > settings.stop && regions.alive > 1; ++round) {
    const std::vector<Pair> pairs = accepted(regions, settings.penalty);
    const double wanted = std::max(1.0, settings.fraction * regions.alive);
    if (pairs.size() < wanted) return;  // no threshold would do
    size_t n = 0;
    const auto count = [&] {
      while (n < pairs.size() && pairs[n].value > threshold) ++n;
      return n;
    };
    while (count() < wanted && threshold > settings.stop) threshold /= factor;
    if (!(threshold > settings.stop)) return;
    for (size_t k = 0; k < n; ++k) {
      regions.merge(pairs[k].i, pairs[k].j);
      log.add(round, pairs[k], threshold);
    }
    for (size_t k = 0; k < n; ++k) regions.update(pairs[k].i);
    factor = std::max(1 + static_cast<double>(n) / (regions.alive + n), 1.01);
    threshold = std::min(threshold * factor, settings.start);
  }
}

// A pair as one number: 22 bits of similarity in steps, then its regions, the lower ones above. Comparing numbers takes
// no branch, and a heap does little else.
struct Packed {
  static constexpr int BITS = 21;
  static constexpr uint64_t LAST = (uint64_t(1) << BITS) - 1;

  static uint64_t pack(const Border& border) {
    return static_cast<uint64_t>(border.value * STEPS) << 2 * BITS | (LAST - border.i) << BITS | (LAST - border.j);
  }
  static Pair unpack(uint64_t key) {
    return {static_cast<double>(key >> 2 * BITS) / STEPS, static_cast<int32_t>(LAST - (key >> BITS & LAST)),
            static_cast<int32_t>(LAST - (key & LAST))};
  }
};

// The best pair of every region, and above them a tree of maxima: a merge changes few regions' best, a few nodes each.
class BestPairs {
 public:
  explicit BestPairs(const Regions& regions) : regions_(regions) {
    while (leaves_ < regions.size()) leaves_ *= 2;
    tree_.resize(2 * leaves_);
    for (int32_t r = 0; r < regions.size(); ++r) tree_[leaves_ + r] = best_of(r);
    for (int64_t at = leaves_ - 1; at > 0; --at) tree_[at] = std::max(tree_[2 * at], tree_[2 * at + 1]);
  }
  uint64_t best() const { return tree_[1]; }  // 0: there is no pair

  void merged(int32_t keep, int32_t gone) {
    set(gone, 0);
    set(keep, best_of(keep));
    for (const Neighbour& n : regions_.neighbours(keep)) {
      const uint64_t before = tree_[leaves_ + n.region], now = Packed::pack(regions_.border(n.border));
      const Pair pair = Packed::unpack(before);
      const int32_t other = pair.i == n.region ? pair.j : pair.i;
      if (other == keep || other == gone) {
        set(n.region, best_of(n.region));
      } else if (now > before) {
        set(n.region, now);
      }
    }
  }

 private:
  uint64_t best_of(int32_t region) const {
    uint64_t best = 0;
    for (const Neighbour& n : regions_.neighbours(region))
      best = std::max(best, Packed::pack(regions_.border(n.border)));
    return best;
  }
  void set(int32_t region, uint64_t key) {
    int64_t at = leaves_ + region;
    tree_[at] = key;
    for (at /= 2; at > 0; at /= 2) {
      const uint64_t most = std::max(tree_[2 * at], tree_[2 * at + 1]);
      if (tree_[at] == most) return;
      tree_[at] = most;
    }
  }

  const Regions& regions_;
  int64_t leaves_ = 1;
  std::vector<uint64_t> tree_;
};

void merge_best_first(Regions& regions, const Settings& settings, Log& log) {
  BestPairs pairs(regions);
  while (pairs.best() > 0) {
    const Pair pair = Packed::unpack(pairs.best());
    if (!(pair.value > settings.stop)) return;
    regions.merge(pair.i, pair.j);
    regions.update(pair.i);
    pairs.merged(pair.i, pair.j);
    log.add(log.count, pair, pair.value);
  }
}

}  // namespace

void region_merge_fwd(const int64_t* edges, const int64_t* border, const int64_t* area, const int64_t* perimeter,
                      const double* sums, const double* hist, const int64_t* sizes, int64_t* merges, double* numbers,
                      int64_t* counts, int64_t B, int64_t F, int64_t channels, int weight, int criterion, double start,
                      double stop, double factor, double fraction, double penalty, int threads) {
  const Settings settings = {static_cast<Weight>(weight), channels, start, stop, factor, fraction, penalty};
  std::vector<int64_t> first_edge(B + 1), first_region(B + 1);
  for (int64_t b = 0; b < B; ++b) {
    first_edge[b + 1] = first_edge[b] + sizes[2 * b];
    first_region[b + 1] = first_region[b] + sizes[2 * b + 1];
  }
  parallel_for(B, 1, threads, [&](int64_t b, int64_t) {
    const int64_t e = first_edge[b], s = first_region[b];
    Regions regions(edges + 2 * e, border + e, area + s, perimeter + s, sums + 3 * s, hist + F * s, sizes[2 * b],
                    sizes[2 * b + 1], F, settings);
    Log log = {merges + 3 * s, numbers + 2 * s, 0};
    if (criterion == ADAPTIVE) {
      merge_in_rounds(regions, settings, log);
    } else {
      merge_best_first(regions, settings, log);
    }
    counts[b] = log.count;
  });
}

void region_merge_describe(const uint8_t* image, const int32_t* labels, const int32_t* gamma, const int32_t* f,
                           const int64_t* sizes, double* sums, double* hist, int64_t B, int64_t P, int64_t bins,
                           int threads) {
  std::vector<int64_t> of_l(201), of_ab(512), first_region(B + 1);
  for (int64_t v = 0; v <= 200; ++v) of_l[v] = std::min(v * bins / 200, bins - 1);
  for (int64_t v = 0; v < 512; ++v) of_ab[v] = std::min(std::max<int64_t>(v - 56, 0) * bins / 400, bins - 1);
  for (int64_t b = 0; b < B; ++b) first_region[b + 1] = first_region[b] + sizes[2 * b + 1];
  parallel_for(B, 1, threads, [&](int64_t b, int64_t) {
    const uint8_t* rgb = image + 3 * b * P;
    double* const to_sums = sums + 3 * first_region[b];
    double* const to_hist = hist + 3 * bins * first_region[b];
    uint16_t lab[3][TILE];
    for (int64_t p = 0; p < P; p += TILE) {
      const int64_t n = std::min(TILE, P - p);
      lab_tile(rgb + p, P, gamma, f, n, lab[0], lab[1], lab[2]);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t region = labels[b * P + p + i];
        double* const colour = to_sums + 3 * region;
        double* const counts = to_hist + 3 * bins * region;
        for (int c = 0; c < 3; ++c) colour[c] += 0.5 * (lab[c][i] - (c == 0 ? 0 : 256));
        ++counts[of_l[lab[0][i]]];
        ++counts[bins + of_ab[lab[1][i]]];
        ++counts[2 * bins + of_ab[lab[2][i]]];
      }
    }
  });
}

}  // namespace fastcam
