// Superpixels by local k-means on whole numbers: image (B, 3, H, W) of 8 bits, and what it costs to cross each pixel
// (B, H, W), or null -> labels (B, H, W).
//
// Every centre looks at the windows of its own surroundings only, a row of 16 pixels at a time: once to offer itself to
// the pixels, once to sum up those it got. Bands of rows are independent in the first, centres in the second.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu/lab.h"
#include "cpu/math.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t LANES = 16;
constexpr uint16_t NOWHERE = 65535;  // the label of no centre
constexpr int16_t OUTSIDE = 31500;   // distance of places outside a window; colours add at most 1222
constexpr int16_t FARTHEST = 30200;  // distance of places inside, contours on the way included
constexpr int64_t BAND = 24;         // rows that a task assigns
constexpr int64_t SUMMED = 128;      // rows whose sums of 16 bits cannot overflow: colours are below 512
typedef Lanes<uint16_t, LANES>::type V;
typedef Lanes<int16_t, LANES>::type Signed;  // of distances: vector units before AVX-512 compare these only
typedef Lanes<uint32_t, LANES>::type V32;

struct Plan {
  int64_t H, W, pitch, rows, columns, reach, stride;
  int64_t patch_pitch;
  std::vector<int16_t> patch;  // place distances (2 reach + 1, patch_pitch), OUTSIDE beyond the window

  Plan(int64_t H, int64_t W, int64_t rows, int64_t columns, int64_t reach, int64_t stride, double spread)
      : H(H),
        W(W),
        pitch((W + 2 * LANES - 1) / LANES * LANES),
        rows(rows),
        columns(columns),
        reach(reach),
        stride(stride),
        patch_pitch(2 * reach + 1 + LANES),
        patch((2 * reach + 1) * patch_pitch, OUTSIDE) {
    for (int64_t dy = -reach; dy <= reach; ++dy)
      for (int64_t dx = -reach; dx <= reach; ++dx) {
        const double d = spread * static_cast<double>(std::abs(dy) + std::abs(dx)) + 0.5;
        patch[(dy + reach) * patch_pitch + dx + reach] = d < FARTHEST ? static_cast<int16_t>(d) : FARTHEST;
      }
  }
};

struct Centre {
  int32_t y, x;
  uint16_t colour[3];
};

// Planes of one image, rows `pitch` apart. Behind the last column `best` stays 0 and `label` stays NOWHERE.
struct Planes {
  Memory<uint16_t> memory;
  uint16_t *colour[3], *label;
  int16_t* best;

  explicit Planes(int64_t size)
      : memory(buffer<uint16_t>(std::max<int64_t>(5 * size, LARGE_PAGE / 2))) {  // large: kept for the next call
    for (int c = 0; c < 3; ++c) colour[c] = memory.get() + c * size;
    label = memory.get() + 3 * size;
    best = reinterpret_cast<int16_t*>(memory.get() + 4 * size);
  }
};

struct Rows {  // [begin, end), only those that are `phase` modulo `stride`
  int64_t begin, end, stride, phase;
  int64_t first(int64_t y) const {
    y = std::max(y, begin);
    return y + ((phase - y) % stride + stride) % stride;
  }
};

// distance += |colours - centre|
FASTCAM_INLINE void add_difference(Signed& distance, const uint16_t* colours, const Signed& centre) {
  const Signed d = reinterpret_cast<Signed>(lanes<uint16_t, LANES>(colours)) - centre;
  distance += d < 0 ? -d : d;
}

// Largest cost on the straight line from a centre to the pixel at distance (dy, dx), both included. Step s of n, the
// larger of both distances, is at round(s d / n) of each distance d, halves away from the centre.
int16_t worst_crossing(const int16_t* cost, int64_t W, const Centre& centre, int64_t dy, int64_t dx) {
  const int64_t rise = std::abs(dy), run = std::abs(dx), n = std::max(rise, run);
  const int64_t down = dy < 0 ? -W : W, right = dx < 0 ? -1 : 1;
  const int16_t* at = cost + centre.y * W + centre.x;
  int16_t worst = *at;
  for (int64_t s = 0, y = n, x = n; s < n; ++s) {
    if ((y += 2 * rise) >= 2 * n) {
      y -= 2 * n;
      at += down;
    }
    if ((x += 2 * run) >= 2 * n) {
      x -= 2 * n;
      at += right;
    }
    worst = std::max(worst, *at);
  }
  return worst;
}

// Place distances of `count` pixels of row y from column `begin` on, with what the contours on the way to them cost.
void add_crossings(const Plan& plan, const int16_t* cost, const Centre& centre, int64_t y, int64_t begin, int64_t count,
                   const int16_t* place, int16_t* out) {
  for (int64_t x = 0; x < count; ++x) {
    const int16_t crossing = worst_crossing(cost, plan.W, centre, y - centre.y, begin + x - centre.x);
    out[x] = static_cast<int16_t>(std::min<int32_t>(place[x] + crossing, FARTHEST));
  }
  std::fill_n(out + count, LANES, OUTSIDE);
}

// Centre k offers itself to the pixels of its window in `rows`. `cost` (H, W) may be null; `way` has a window's row.
FASTCAM_MULTIVERSION
void offer(const Plan& plan, const Planes& planes, const int16_t* cost, const Centre& centre, int64_t k, Rows rows,
           int16_t* way) {
  const Signed l = Signed{} + static_cast<int16_t>(centre.colour[0]);
  const Signed a = Signed{} + static_cast<int16_t>(centre.colour[1]);
  const Signed b = Signed{} + static_cast<int16_t>(centre.colour[2]);
  const V number = V{} + static_cast<uint16_t>(k);
  const int64_t begin = std::max<int64_t>(centre.x - plan.reach, 0);
  const int64_t count = std::min(centre.x + plan.reach + 1, plan.W) - begin;
  const int64_t last = std::min<int64_t>(rows.end, centre.y + plan.reach + 1);
  for (int64_t y = rows.first(centre.y - plan.reach); y < last; y += rows.stride) {
    const int64_t at = y * plan.pitch + begin;
    const int16_t* place = &plan.patch[(y - centre.y + plan.reach) * plan.patch_pitch + begin - centre.x + plan.reach];
    if (cost) {
      add_crossings(plan, cost, centre, y, begin, count, place, way);
      place = way;
    }
    const uint16_t *colour_l = planes.colour[0] + at, *colour_a = planes.colour[1] + at,
                   *colour_b = planes.colour[2] + at;
    int16_t* bests = planes.best + at;
    uint16_t* labels = planes.label + at;
    for (int64_t x = 0; x < count; x += LANES) {
      Signed distance = lanes<int16_t, LANES>(place + x);
      add_difference(distance, colour_l + x, l);
      add_difference(distance, colour_a + x, a);
      add_difference(distance, colour_b + x, b);
      Signed& best = lanes<int16_t, LANES>(bests + x);
      V& label = lanes<uint16_t, LANES>(labels + x);
      label = distance < best ? number : label;
      best = distance < best ? distance : best;
    }
  }
}

struct Sums {
  int64_t count = 0, y = 0, x = 0, colour[3] = {};
};

// The pixels of centre k's window in `rows` that carry its label.
FASTCAM_MULTIVERSION
void sum_up(const Plan& plan, const Planes& planes, const Centre& centre, int64_t k, Rows rows, Sums* sums) {
  const V number = V{} + static_cast<uint16_t>(k);
  const int64_t begin = std::max<int64_t>(centre.x - plan.reach, 0);
  const int64_t end = std::min(centre.x + plan.reach + 1, plan.W);
  const int64_t last = std::min<int64_t>(rows.end, centre.y + plan.reach + 1);
  const V lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t from = rows.first(centre.y - plan.reach); from < last; from += SUMMED * rows.stride) {
    const int64_t to = std::min(last, from + SUMMED * rows.stride);
    V32 counts = {}, columns = {}, lines = {}, colours[3] = {};
    V32 column = __builtin_convertvector(lane, V32);  // from the window's first
    for (int64_t x = begin; x < end; x += LANES) {
      const V inside = reinterpret_cast<V>(lane < static_cast<uint16_t>(std::min(LANES, end - x)));
      V count = {}, l = {}, a = {}, b = {}, line = {}, line_number = {};
      const int64_t step = rows.stride * plan.pitch, stop = to * plan.pitch + x;
      const uint16_t *labels = planes.label, *colour_l = planes.colour[0], *colour_a = planes.colour[1],
                     *colour_b = planes.colour[2];
      for (int64_t at = from * plan.pitch + x; at < stop; at += step) {
        const V mine = reinterpret_cast<V>(lanes<uint16_t, LANES>(labels + at) == number) & inside;
        count -= mine;  // a true comparison is -1
        l += mine & lanes<uint16_t, LANES>(colour_l + at);
        a += mine & lanes<uint16_t, LANES>(colour_a + at);
        b += mine & lanes<uint16_t, LANES>(colour_b + at);
        line += mine & line_number;
        line_number += 1;
      }
      const V32 wide = __builtin_convertvector(count, V32);
      counts += wide;
      columns += wide * column;
      column += LANES;
      lines += __builtin_convertvector(line, V32);
      colours[0] += __builtin_convertvector(l, V32);
      colours[1] += __builtin_convertvector(a, V32);
      colours[2] += __builtin_convertvector(b, V32);
    }
    const int64_t count = across<Sum, uint32_t, LANES>(reinterpret_cast<const uint32_t*>(&counts));
    sums->count += count;
    sums->y += from * count + rows.stride * across<Sum, uint32_t, LANES>(reinterpret_cast<const uint32_t*>(&lines));
    sums->x += begin * count + across<Sum, uint32_t, LANES>(reinterpret_cast<const uint32_t*>(&columns));
    for (int c = 0; c < 3; ++c)
      sums->colour[c] += across<Sum, uint32_t, LANES>(reinterpret_cast<const uint32_t*>(&colours[c]));
  }
}

FASTCAM_MULTIVERSION
void lab_row(const uint8_t* rgb, int64_t P, const int32_t* gamma, const int32_t* f, int64_t W, uint16_t* l, uint16_t* a,
             uint16_t* b) {
  to_lab(rgb, rgb + P, rgb + 2 * P, gamma, f, W, l, a, b);
}

std::vector<Centre> start(const Plan& plan, const Planes& planes) {
  const auto change = [&](int64_t y, int64_t x) {
    const int64_t up = std::max<int64_t>(y - 1, 0), down = std::min(y + 1, plan.H - 1);
    const int64_t left = std::max<int64_t>(x - 1, 0), right = std::min(x + 1, plan.W - 1);
    int64_t sum = 0;
    for (const uint16_t* c : planes.colour)
      sum += std::abs(c[down * plan.pitch + x] - c[up * plan.pitch + x]) +
             std::abs(c[y * plan.pitch + right] - c[y * plan.pitch + left]);
    return sum;
  };
  std::vector<Centre> centres;
  for (int64_t i = 0; i < plan.rows; ++i)
    for (int64_t j = 0; j < plan.columns; ++j) {
      const int64_t cy = (2 * i + 1) * plan.H / (2 * plan.rows), cx = (2 * j + 1) * plan.W / (2 * plan.columns);
      int64_t least = change(cy, cx), y = cy, x = cx;
      for (int64_t dy = -1; dy <= 1; ++dy)
        for (int64_t dx = -1; dx <= 1; ++dx) {
          const int64_t v = std::min(std::max<int64_t>(cy + dy, 0), plan.H - 1);
          const int64_t u = std::min(std::max<int64_t>(cx + dx, 0), plan.W - 1);
          const int64_t here = change(v, u);
          if (here >= least) continue;
          least = here;
          y = v;
          x = u;
        }
      const int64_t at = y * plan.pitch + x;
      centres.push_back({static_cast<int32_t>(y),
                         static_cast<int32_t>(x),
                         {planes.colour[0][at], planes.colour[1][at], planes.colour[2][at]}});
    }
  return centres;
}

void assign(const Plan& plan, const Planes& planes, const int16_t* cost, const std::vector<Centre>& centres,
            int64_t stride, int64_t phase, int threads) {
  const int64_t bands = (plan.H + BAND - 1) / BAND, K = centres.size();
  // Centres that reach into each band, in order.
  std::vector<std::vector<int32_t>> near(bands);
  for (int64_t k = 0; k < K; ++k) {
    const int64_t first = std::max<int64_t>(centres[k].y - plan.reach, 0) / BAND;
    const int64_t last = std::min(centres[k].y + plan.reach, plan.H - 1) / BAND;
    for (int64_t band = first; band <= last; ++band) near[band].push_back(static_cast<int32_t>(k));
  }
  parallel_for(bands, 1, threads, [&](int64_t band, int64_t) {
    const Rows rows = {band * BAND, std::min(plan.H, (band + 1) * BAND), stride, phase};
    for (int64_t y = rows.first(rows.begin); y < rows.end; y += stride)
      std::fill_n(planes.best + y * plan.pitch, plan.W, OUTSIDE);
    std::vector<int16_t> way(cost ? plan.patch_pitch : 0);
    for (const int32_t k : near[band]) offer(plan, planes, cost, centres[k], k, rows, way.data());
  });
}

void update(const Plan& plan, const Planes& planes, std::vector<Centre>& centres, int64_t stride, int64_t phase,
            int threads) {
  parallel_for(centres.size(), 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Sums sums;
      sum_up(plan, planes, centres[k], k, {0, plan.H, stride, phase}, &sums);
      if (sums.count == 0) continue;
      const auto mean = [&](int64_t sum) { return (sum + sums.count / 2) / sums.count; };
      centres[k].y = static_cast<int32_t>(mean(sums.y));
      centres[k].x = static_cast<int32_t>(mean(sums.x));
      for (int c = 0; c < 3; ++c) centres[k].colour[c] = static_cast<uint16_t>(mean(sums.colour[c]));
    }
  });
}

// First columns of the runs of equal labels in a row of W, to `begin`; how many.
FASTCAM_MULTIVERSION
int64_t runs_of(const uint16_t* row, int64_t W, int32_t* begin) {
  begin[0] = 0;
  int64_t count = 1;
  for (int64_t x = 1; x < W; ++x) {
    begin[count] = static_cast<int32_t>(x);
    count += row[x] != row[x - 1];
  }
  return count;
}

// Horizontal runs of equal labels, joined to 4-connected pieces. A piece goes by its first run in scan order, its root.
class Pieces {
 public:
  Pieces(const Plan& plan, const uint16_t* label)
      : plan_(plan),
        first_run_(plan.H + 1),
        begin_(buffer<int32_t>(plan.H * plan.W + 1)),
        root_(buffer<int32_t>(plan.H * plan.W + 1)),
        label_(buffer<uint16_t>(plan.H * plan.W + 1)) {
    for (int64_t y = 0; y < plan.H; ++y) {
      const uint16_t* row = label + y * plan.pitch;
      const int32_t here = first_run_[y];
      first_run_[y + 1] = static_cast<int32_t>(here + runs_of(row, plan.W, &begin_[here]));
      for (int32_t i = here; i < first_run_[y + 1]; ++i) {
        label_[i] = row[begin_[i]];
        root_[i] = i;
      }
      if (y == 0) continue;
      each_overlap(y, [&](int32_t i, int32_t j) {
        if (label_[i] != label_[j]) return;
        const int32_t a = find(i), b = find(j);
        root_[std::max(a, b)] = std::min(a, b);
      });
    }
    for (int32_t i = 0; i < runs(); ++i) root_[i] = root_[root_[i]];  // the root of an earlier run is final
  }

  // Numbers of pieces in scan order to out (H, W); those with less than H W / (4 K) pixels join others.
  void write(const std::vector<Centre>& centres, int32_t* out) {
    const int64_t K = centres.size();
    std::vector<int64_t> size(runs());
    each_run([&](int32_t i, int64_t, int64_t begin, int64_t end) { size[root_[i]] += end - begin; });
    std::vector<char> small(runs());
    for (int32_t i = 0; i < runs(); ++i) small[i] = size[root_[i]] * 4 * K < plan_.H * plan_.W;

    // For every small piece the large one beside it that is nearest in colour, the earlier one of two.
    std::vector<int64_t> nearest(runs(), NONE);
    const auto beside = [&](int32_t i, int32_t j) {
      if (small[i] == small[j]) return;
      if (small[j]) std::swap(i, j);
      const Centre &a = centres[label_[i]], &b = centres[label_[j]];
      int64_t distance = 0;
      for (int c = 0; c < 3; ++c) distance += std::abs(a.colour[c] - b.colour[c]);
      nearest[root_[i]] = std::min(nearest[root_[i]], distance << 32 | root_[j]);
    };
    for (int64_t y = 0; y < plan_.H; ++y) {
      for (int32_t i = first_run_[y]; i + 1 < first_run_[y + 1]; ++i) beside(i, i + 1);
      if (y > 0) each_overlap(y, beside);
    }

    // A small piece beside none but small ones joins the piece above its first pixel, or in the top row the one to the
    // left: an earlier one, so that following them comes to an end.
    std::vector<int32_t> joined(runs());
    int32_t above = 0;
    each_run([&](int32_t i, int64_t y, int64_t begin, int64_t) {
      if (root_[i] != i) return void(joined[i] = root_[i]);
      joined[i] = i;
      if (!small[i]) return;
      if (nearest[i] != NONE) {
        joined[i] = static_cast<int32_t>(nearest[i] & 0x7fffffff);
      } else if (y > 0) {
        above = std::max(above, first_run_[y - 1]);
        while (end(above, y - 1) <= begin) ++above;
        joined[i] = root_[above];
      } else if (i > 0) {
        joined[i] = root_[i - 1];
      }
    });
    std::vector<int32_t> number(runs(), -1);
    int32_t count = 0;
    each_run([&](int32_t i, int64_t y, int64_t begin, int64_t end) {
      int32_t root = joined[i];
      while (joined[root] != root) root = joined[root];
      if (number[root] < 0) number[root] = count++;
      std::fill(out + y * plan_.W + begin, out + y * plan_.W + end, number[root]);
    });
  }

 private:
  static constexpr int64_t NONE = INT64_MAX;

  int32_t runs() const { return first_run_[plan_.H]; }
  int64_t end(int32_t run, int64_t y) const { return run + 1 < first_run_[y + 1] ? begin_[run + 1] : plan_.W; }
  // f(run, row, first column, the one behind the last).
  template <typename F>
  void each_run(F f) {
    for (int64_t y = 0; y < plan_.H; ++y)
      for (int32_t i = first_run_[y]; i < first_run_[y + 1]; ++i) f(i, y, begin_[i], end(i, y));
  }
  // f(i, j) for all runs i of row y - 1 and j of row y that touch.
  template <typename F>
  void each_overlap(int64_t y, F f) {
    for (int32_t i = first_run_[y - 1], j = first_run_[y]; j < first_run_[y + 1];) {
      const int64_t i_end = end(i, y - 1), j_end = end(j, y);
      f(i, j);
      i += i_end <= j_end;
      j += j_end <= i_end;
    }
  }
  int32_t find(int32_t run) {
    while (root_[run] != run) run = root_[run] = root_[root_[run]];
    return run;
  }

  const Plan& plan_;
  std::vector<int32_t> first_run_;
  Memory<int32_t> begin_, root_;
  Memory<uint16_t> label_;
};

void segment(const Plan& plan, const uint8_t* image, const int16_t* cost, const int32_t* gamma, const int32_t* f,
             int32_t* out, int64_t iterations, bool connect, int threads) {
  const Planes planes(plan.H * plan.pitch);
  const int64_t P = plan.H * plan.W;
  std::vector<uint16_t> column(plan.W);
  for (int64_t x = 0; x < plan.W; ++x) column[x] = static_cast<uint16_t>(x * plan.columns / plan.W);
  parallel_for(plan.H, BAND, threads, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      const int64_t row = y * plan.pitch;
      lab_row(image + y * plan.W, P, gamma, f, plan.W, planes.colour[0] + row, planes.colour[1] + row,
              planes.colour[2] + row);
      const uint16_t cell = static_cast<uint16_t>(y * plan.rows / plan.H * plan.columns);
      for (int64_t x = 0; x < plan.W; ++x) planes.label[row + x] = cell + column[x];
      std::fill(planes.label + row + plan.W, planes.label + row + plan.pitch, NOWHERE);
      std::fill(planes.best + row + plan.W, planes.best + row + plan.pitch, int16_t(0));
    }
  });
  std::vector<Centre> centres = start(plan, planes);
  for (int64_t t = 0; t < iterations; ++t) {
    assign(plan, planes, cost, centres, plan.stride, t % plan.stride, threads);
    update(plan, planes, centres, plan.stride, t % plan.stride, threads);
  }
  assign(plan, planes, cost, centres, 1, 0, threads);
  if (connect) return Pieces(plan, planes.label).write(centres, out);
  for (int64_t y = 0; y < plan.H; ++y)
    for (int64_t x = 0; x < plan.W; ++x) out[y * plan.W + x] = planes.label[y * plan.pitch + x];
}

}  // namespace

void superpixel_slic_fwd(const uint8_t* image, const int16_t* cost, const int32_t* gamma, const int32_t* f,
                         int32_t* out, int64_t B, int64_t H, int64_t W, int64_t rows, int64_t columns, int64_t reach,
                         int64_t stride, double spread, int64_t iterations, bool connect, int threads) {
  const Plan plan(H, W, rows, columns, reach, stride, spread);
  const auto one = [&](int64_t b, int inner) {
    segment(plan, image + b * 3 * H * W, cost ? cost + b * H * W : nullptr, gamma, f, out + b * H * W, iterations,
            connect, inner);
  };
  if (B >= threads && B > 1) return parallel_for(B, 1, threads, [&](int64_t b, int64_t) { one(b, 1); });
  for (int64_t b = 0; b < B; ++b) one(b, threads);
}

}  // namespace fastcam
