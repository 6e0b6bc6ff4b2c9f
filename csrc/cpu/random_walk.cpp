// x (C, H, W) times a polynomial of T, whose entries are affinities of pairs within a radius to some power, each column
// divided by its sum. A step is y + sum_j a_ij (y_j - y_i) / sum_j a_ij: differences vanish where a map has become
// constant, while sums of products would make the same rounding error there at every step.
//
// Rows are stored with margins of radius - 1 pixels, so that no neighbour needs a check, and weights row by row: those
// of one row are contiguous. Steps overlap: while step s is at row y, step s + 1 is at row y - (radius - 1), which has
// all it needs; so the weights of some rows serve several steps before they leave the cache.
#include <algorithm>
#include <vector>

#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t CACHE = 1 << 20;  // bytes that the rows under work may take
constexpr int MOST = 4;             // channels that go through the steps together

template <typename T>
struct Stencil {
  const int64_t* offsets;  // P times (dy, dx)
  int64_t P, radius, H, W;
  int64_t stride, rows;               // of maps with margins
  std::vector<T> weights;             // (rows, P, stride): the pair of a pixel and its p-th destination
  std::vector<T> sums;                // (rows, stride): column sums, the pixel itself included
  std::vector<int64_t> to, reversed;  // steps in maps and weights to the p-th destination and back

  Stencil(const int64_t* offsets, int64_t P, int64_t radius, int64_t H, int64_t W)
      : offsets(offsets), P(P), radius(radius), H(H), W(W) {
    constexpr int64_t L = Vector<T>::size;
    stride = (W + L - 1) / L * L + 2 * (radius - 1);
    rows = H + 2 * (radius - 1);
    weights.resize(rows * P * stride);
    sums.assign(rows * stride, T(1));
    for (int64_t p = 0; p < P; ++p) {
      to.push_back(dy(p) * stride + dx(p));
      reversed.push_back((p - dy(p) * P) * stride - dx(p));
    }
  }
  int64_t dy(int64_t p) const { return offsets[2 * p]; }
  int64_t dx(int64_t p) const { return offsets[2 * p + 1]; }
  int64_t at(int64_t y, int64_t x) const { return (y + radius - 1) * stride + x + radius - 1; }
  T* weight(int64_t y, int64_t p) { return weights.data() + ((y + radius - 1) * P + p) * stride + radius - 1; }
};

// Row y of the affinities: clamped, to the power, 0 for pairs that leave the image.
template <typename T>
FASTCAM_INLINE void power_row(const T* affinity, Stencil<T>& s, int64_t y, int64_t power) {
  constexpr int64_t BLOCK = 64;
  for (int64_t p = 0; p < s.P; ++p) {
    const T* a = affinity + (p * s.H + y) * s.W;
    T* w = s.weight(y, p);
    const int64_t end = y + s.dy(p) < s.H ? s.W - std::max<int64_t>(0, s.dx(p)) : 0;
    for (int64_t x = std::max<int64_t>(0, -s.dx(p)); x < end; x += BLOCK) {
      const int64_t n = std::min(BLOCK, end - x);
      T base[BLOCK] = {}, result[BLOCK];
      for (int64_t j = 0; j < n; ++j) base[j] = a[x + j] < 0 ? T(0) : a[x + j] > 1 ? T(1) : a[x + j];
      std::fill(result, result + BLOCK, T(1));
      for (int64_t bits = power; bits > 0; bits >>= 1) {
        if (bits & 1)
          for (int64_t j = 0; j < BLOCK; ++j) result[j] *= base[j];
        for (int64_t j = 0; j < BLOCK; ++j) base[j] *= base[j];
      }
      std::copy(result, result + n, w + x);
    }
  }
}

// Row y of the column sums.
template <typename T>
FASTCAM_INLINE void sum_row(Stencil<T>& s, int64_t y) {
  T* __restrict__ sums = s.sums.data() + s.at(y, 0);
  for (int64_t p = 0; p < s.P; ++p) {
    const T *w = s.weight(y, p), *back = s.weight(y, 0) + s.reversed[p];
    for (int64_t x = 0; x < s.W; ++x) sums[x] += w[x] + back[x];
  }
}

// One step: difference = factor * (T - 1) now + keep * difference, next = now + difference, total += share * next.
// With factor 2 and keep 1 that is the recursion of Chebyshev's polynomials, 2 T T_k - T_{k-1}, in differences.
template <typename T>
struct Step {
  T factor, keep, share;
};

// G channels go together, `plane` numbers apart; of each there are four maps.
template <typename T>
struct Maps {
  const T* now;
  T *next, *difference, *total;

  Maps operator+(int64_t at) const { return {now + at, next + at, difference + at, total + at}; }
};

template <typename T, int G, int R>
FASTCAM_INLINE void step_block(const Stencil<T>& s, const T* weights, const T* sums, const Maps<T>& maps, int64_t plane,
                               Step<T> step) {
  constexpr int L = Vector<T>::size;
  typename Vector<T>::type here[G][R], out[G][R];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) {
      here[g][r] = lanes<T, L>(maps.now + g * plane + r * L);
      out[g][r] = typename Vector<T>::type{};
    }
  for (int64_t p = 0; p < s.P; ++p) {
    const int64_t to = s.to[p];
    const T *ahead = weights + p * s.stride, *back = weights + s.reversed[p];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < G; ++g) {
        out[g][r] += lanes<T, L>(ahead + r * L) * (lanes<T, L>(maps.now + g * plane + to + r * L) - here[g][r]);
        out[g][r] += lanes<T, L>(back + r * L) * (lanes<T, L>(maps.now + g * plane - to + r * L) - here[g][r]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) {
      auto& difference = lanes<T, L>(maps.difference + g * plane + r * L);
      difference = step.factor * out[g][r] / lanes<T, L>(sums + r * L) + step.keep * difference;
      const auto next = here[g][r] + difference;
      lanes<T, L>(maps.next + g * plane + r * L) = next;
      if (step.share != 0) lanes<T, L>(maps.total + g * plane + r * L) += step.share * next;
    }
}

template <typename T, int G>
FASTCAM_INLINE void step_row(const Stencil<T>& s, const Maps<T>& maps, int64_t y, Step<T> step) {
  constexpr int64_t L = Vector<T>::size;
  const int64_t plane = s.rows * s.stride, at = s.at(y, 0);
  const T *weights = s.weights.data() + (y + s.radius - 1) * s.P * s.stride + s.radius - 1, *sums = s.sums.data() + at;
  int64_t x = 0;
  for (; G <= 2 && x + L < s.W; x += 2 * L) step_block<T, G, 2>(s, weights + x, sums + x, maps + (at + x), plane, step);
  for (; x < s.W; x += L) step_block<T, G, 1>(s, weights + x, sums + x, maps + (at + x), plane, step);
}

template <typename T>
FASTCAM_INLINE void step_row(const Stencil<T>& s, int G, const Maps<T>& maps, int64_t y, Step<T> step) {
  if (G == 1) step_row<T, 1>(s, maps, y, step);
  if (G == 2) step_row<T, 2>(s, maps, y, step);
  if (G == 3) step_row<T, 3>(s, maps, y, step);
  if (G == 4) step_row<T, 4>(s, maps, y, step);
}

#define FASTCAM_WALK_ROWS(NAME, T)                                                                         \
  FASTCAM_MULTIVERSION void power_row_##NAME(const T* affinity, Stencil<T>& s, int64_t y, int64_t power) { \
    power_row(affinity, s, y, power);                                                                      \
  }                                                                                                        \
  FASTCAM_MULTIVERSION void sum_row_##NAME(Stencil<T>& s, int64_t y) { sum_row(s, y); }                    \
  FASTCAM_MULTIVERSION void step_row_##NAME(const Stencil<T>& s, int G, const Maps<T>& maps, int64_t y,    \
                                            Step<T> step) {                                                \
    step_row(s, G, maps, y, step);                                                                         \
  }
FASTCAM_WALK_ROWS(f32, float)
FASTCAM_WALK_ROWS(f64, double)

template <typename T>
struct Rows {
  void (*power)(const T*, Stencil<T>&, int64_t, int64_t);
  void (*sum)(Stencil<T>&, int64_t);
  void (*step)(const Stencil<T>&, int, const Maps<T>&, int64_t, Step<T>);
};

// All steps for G channels. `maps` holds four sets of them: two polynomials that follow each other, their difference,
// and the sum.
template <typename T>
void walk(const Stencil<T>& s, int G, std::vector<T>& maps, const double* shares, int64_t degree, bool chebyshev,
          const Rows<T>& rows) {
  const int64_t set = G * s.rows * s.stride, lag = std::max<int64_t>(1, s.radius - 1);
  const int64_t row_bytes = (s.P + 1 + 4 * G) * s.stride * sizeof(T);
  const int64_t at_once = std::clamp<int64_t>(CACHE / (row_bytes * lag) - 2, 1, 16);
  for (int64_t first = 1; first <= degree; first += at_once) {
    const int64_t count = std::min(at_once, degree - first + 1);
    for (int64_t front = 0; front < s.H + (count - 1) * lag; ++front)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t y = front - i * lag, k = first + i;
        if (y < 0 || y >= s.H) continue;
        T* const all = maps.data();
        const bool recursion = chebyshev && k > 1;
        rows.step(s, G, {all + (k + 1) % 2 * set, all + k % 2 * set, all + 2 * set, all + 3 * set}, y,
                  {T(recursion ? 2 : 1), T(recursion ? 1 : 0), T(shares[k])});
      }
  }
}

template <typename T>
void walk_image(const T* x, const T* affinity, T* out, Stencil<T>& s, int64_t C, int64_t power, const double* shares,
                int64_t degree, bool chebyshev, bool transposed, int threads, const Rows<T>& rows) {
  parallel_for(s.H, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) rows.power(affinity, s, y, power);
  });
  parallel_for(s.H, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) rows.sum(s, y);
  });
  const int64_t plane = s.rows * s.stride;
  const int64_t group = std::clamp<int64_t>((C + threads - 1) / threads, 1, MOST);
  parallel_for(C, group, threads, [&](int64_t begin, int64_t end) {
    const int G = static_cast<int>(end - begin);
    std::vector<T> maps(4 * G * plane);
    for (int g = 0; g < G; ++g)
      for (int64_t y = 0; y < s.H; ++y) {
        const T *from = x + ((begin + g) * s.H + y) * s.W, *sums = s.sums.data() + s.at(y, 0);
        T* to = maps.data() + g * plane + s.at(y, 0);
        for (int64_t i = 0; i < s.W; ++i) {
          to[i] = transposed ? from[i] / sums[i] : from[i];
          to[3 * G * plane + i] = T(shares[0]) * to[i];
        }
      }
    walk(s, G, maps, shares, degree, chebyshev, rows);
    for (int g = 0; g < G; ++g)
      for (int64_t y = 0; y < s.H; ++y) {
        const T *from = maps.data() + (3 * G + g) * plane + s.at(y, 0), *sums = s.sums.data() + s.at(y, 0);
        T* to = out + ((begin + g) * s.H + y) * s.W;
        for (int64_t i = 0; i < s.W; ++i) to[i] = transposed ? from[i] * sums[i] : from[i];
      }
  });
}

template <typename T>
void walk_images(const T* x, const T* affinity, const int64_t* offsets, const double* shares, T* out, int64_t B,
                 int64_t C, int64_t P, int64_t H, int64_t W, int64_t radius, int64_t power, int64_t degree,
                 bool chebyshev, bool transposed, int threads, const Rows<T>& rows) {
  const auto image = [&](int64_t b) {
    Stencil<T> s(offsets, P, radius, H, W);
    walk_image(x + b * C * H * W, affinity + b * P * H * W, out + b * C * H * W, s, C, power, shares, degree, chebyshev,
               transposed, threads, rows);
  };
  if (B >= threads) {
    parallel_for(B, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) image(b);
    });
  } else {
    for (int64_t b = 0; b < B; ++b) image(b);
  }
}

}  // namespace

void random_walk(const void* x, const void* affinity, const int64_t* offsets, const double* shares, void* out, bool f64,
                 int64_t B, int64_t C, int64_t P, int64_t H, int64_t W, int64_t radius, int64_t power, int64_t degree,
                 bool chebyshev, bool transposed, int threads) {
  if (f64) {
    walk_images(static_cast<const double*>(x), static_cast<const double*>(affinity), offsets, shares,
                static_cast<double*>(out), B, C, P, H, W, radius, power, degree, chebyshev, transposed, threads,
                {power_row_f64, sum_row_f64, step_row_f64});
  } else {
    walk_images(static_cast<const float*>(x), static_cast<const float*>(affinity), offsets, shares,
                static_cast<float*>(out), B, C, P, H, W, radius, power, degree, chebyshev, transposed, threads,
                {power_row_f32, sum_row_f32, step_row_f32});
  }
}

}  // namespace fastcam
