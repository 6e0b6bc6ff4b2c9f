// One pass over the pixel pairs of labels (B, H, W). Where a row differs from itself one pixel on, and from the row
// above, the pair is counted in a hash table; neighbouring pairs mostly repeat, and are counted at once.
#include "cpu/region_graph.h"

#include <algorithm>

#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t BAND = 128;  // rows of a task, which has tables of its own

// Counts of unordered pairs of labels, in a hash table at most half full.
class Pairs {
 public:
  explicit Pairs(size_t size = 4096) : slots_(size, Slot{EMPTY, 0}) {}

  void add(int32_t a, int32_t b, int64_t count) {
    const uint32_t low = std::min(a, b), high = std::max(a, b);
    add((static_cast<uint64_t>(low) << 32) | high, count);
  }
  void add(uint64_t key, int64_t count) {
    const size_t last = slots_.size() - 1;
    size_t at = (key * 0x9e3779b97f4a7c15u) >> 32 & last;
    while (slots_[at].key != key) {
      if (slots_[at].key == EMPTY) {
        slots_[at] = {key, count};
        if (2 * ++used_ > slots_.size()) grow();
        return;
      }
      at = (at + 1) & last;
    }
    slots_[at].count += count;
  }
  template <typename F>
  void each(F f) const {
    for (const Slot& slot : slots_)
      if (slot.key != EMPTY) f(slot.key, slot.count);
  }
  size_t size() const { return used_; }

 private:
  static constexpr uint64_t EMPTY = ~uint64_t(0);
  struct Slot {
    uint64_t key;
    int64_t count;
  };

  void grow() {
    Pairs wider(2 * slots_.size());
    each([&](uint64_t key, int64_t count) { wider.add(key, count); });
    *this = std::move(wider);
  }

  std::vector<Slot> slots_;
  size_t used_ = 0;
};

FASTCAM_MULTIVERSION
int32_t largest(const int32_t* labels, int64_t n) {
  int32_t most = -1;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, labels[i]);
  return most;
}

// Columns where two rows differ, to `where`; how many.
FASTCAM_MULTIVERSION
int64_t differing(const int32_t* a, const int32_t* b, int64_t W, int32_t* where) {
  int64_t count = 0;
  for (int64_t x = 0; x < W; ++x) {
    where[count] = static_cast<int32_t>(x);
    count += a[x] != b[x];
  }
  return count;
}

struct Band {
  Pairs pairs;
  std::vector<int64_t> area;
};

void count(const int32_t* labels, int64_t begin, int64_t end, int64_t W, Band& band) {
  std::vector<int32_t> where(W + 1);
  for (int64_t y = begin; y < end; ++y) {
    const int32_t* row = labels + y * W;
    const int64_t steps = differing(row, row + 1, W - 1, where.data());
    int64_t x = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t next = where[i] + 1;
      band.area[row[x]] += next - x;
      band.pairs.add(row[x], row[next], 1);
      x = next;
    }
    band.area[row[x]] += W - x;
    if (y == 0) continue;
    const int64_t sides = differing(row - W, row, W, where.data());
    for (int64_t i = 0; i < sides;) {
      const int32_t above = row[where[i] - W], below = row[where[i]];
      int64_t j = i + 1;
      while (j < sides && row[where[j] - W] == above && row[where[j]] == below) ++j;
      band.pairs.add(above, below, j - i);
      i = j;
    }
  }
}

}  // namespace

RegionGraph::RegionGraph(const int32_t* labels, int64_t B, int64_t H, int64_t W, int threads) : images_(B) {
  if (H * W == 0) return;
  const auto one = [&](int64_t b, int inner) { build(labels + b * H * W, H, W, inner, images_[b]); };
  if (B >= threads && B > 1) {
    parallel_for(B, 1, threads, [&](int64_t b, int64_t) { one(b, 1); });
  } else {
    for (int64_t b = 0; b < B; ++b) one(b, threads);
  }
}

void RegionGraph::build(const int32_t* labels, int64_t H, int64_t W, int threads, Image& image) {
  const int64_t S = largest(labels, H * W) + int64_t(1);
  // As many tables of areas as threads can use, fewer where they would be larger than the image.
  const int64_t parts = std::min({(H + BAND - 1) / BAND, std::max<int64_t>(threads, 1), H * W / S + 1});
  std::vector<Band> bands(parts);
  parallel_for(parts, 1, threads, [&](int64_t i, int64_t) {
    bands[i].area.resize(S);
    count(labels, H * i / parts, H * (i + 1) / parts, W, bands[i]);
  });
  for (int64_t i = 1; i < parts; ++i) {
    bands[i].pairs.each([&](uint64_t key, int64_t border) { bands[0].pairs.add(key, border); });
    for (int64_t s = 0; s < S; ++s) bands[0].area[s] += bands[i].area[s];
  }
  image.area = std::move(bands[0].area);
  image.perimeter.resize(S);
  for (int64_t x = 0; x < W; ++x) {
    ++image.perimeter[labels[x]];
    ++image.perimeter[labels[(H - 1) * W + x]];
  }
  for (int64_t y = 0; y < H; ++y) {
    ++image.perimeter[labels[y * W]];
    ++image.perimeter[labels[y * W + W - 1]];
  }
  image.edges.reserve(bands[0].pairs.size());
  bands[0].pairs.each([&](uint64_t key, int64_t border) {
    image.edges.push_back({key, border});
    image.perimeter[key >> 32] += border;
    image.perimeter[key & 0xffffffff] += border;
  });
  std::sort(image.edges.begin(), image.edges.end(), [](const Edge& a, const Edge& b) { return a.key < b.key; });
}

int64_t RegionGraph::edges() const {
  int64_t total = 0;
  for (const Image& image : images_) total += image.edges.size();
  return total;
}

int64_t RegionGraph::regions() const {
  int64_t total = 0;
  for (const Image& image : images_) total += image.area.size();
  return total;
}

void RegionGraph::copy_to(int64_t* edges, int64_t* border, int64_t* area, int64_t* perimeter, int64_t* counts) const {
  for (const Image& image : images_) {
    for (const Edge& edge : image.edges) {
      *edges++ = edge.key >> 32;
      *edges++ = edge.key & 0xffffffff;
      *border++ = edge.border;
    }
    area = std::copy(image.area.begin(), image.area.end(), area);
    perimeter = std::copy(image.perimeter.begin(), image.perimeter.end(), perimeter);
    *counts++ = image.edges.size();
    *counts++ = image.area.size();
  }
}

}  // namespace fastcam
