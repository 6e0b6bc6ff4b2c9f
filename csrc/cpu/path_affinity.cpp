// Affinity of pairs of pixels: 1 - the largest edge (B, H, W) on the path between them. A path is a list of offsets
// (dy, dx) from the source, the destination first; `ends[p]` says where the p-th ends in the list of all.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t ROWS = 32;   // sources that a task of the backward handles
constexpr int64_t BLOCK = 64;  // sources whose path the backward walks at a time

struct Path {
  const int64_t *first, *last;  // offsets, two numbers each

  int64_t dy() const { return first[0]; }
  // The columns of sources whose destination lies inside.
  int64_t left(int64_t W) const { return std::min(W, std::max<int64_t>(0, -first[1])); }
  int64_t right(int64_t W) const { return std::max(left(W), W - std::max<int64_t>(0, first[1])); }
};

Path path(const int64_t* offsets, const int64_t* ends, int64_t p) {
  return {offsets + 2 * (p > 0 ? ends[p - 1] : 0), offsets + 2 * ends[p]};
}

// Non-negative numbers are ordered as their bits are, and NaN above all: maxima of integers keep it.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Edges clamped to [0, 1], NaN without sign.
template <typename T>
FASTCAM_INLINE void clamp(const T* edge, T* e, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T v = edge[i] > 0 ? edge[i] : T(0);
    e[i] = edge[i] != edge[i] ? std::numeric_limits<T>::quiet_NaN() : v < 1 ? v : T(1);
  }
}

// out[x] = 1 - maximum over the path of the source x of a row, x in [x0, x1); e points to the row.
template <typename T>
FASTCAM_INLINE void affinity_row(const T* e, int64_t W, Path path, T* out, int64_t x0, int64_t x1) {
  using I = Bits<T>;
  using V = typename Vector<T>::type;
  using VI = typename Vector<I>::type;
  constexpr int64_t L = Vector<T>::size;
  const int64_t end = path.first[0] * W + path.first[1];
  if (x1 - x0 < L) {
    for (int64_t x = x0; x < x1; ++x) {
      T m = e[x + end];
      for (const int64_t* o = path.first + 2; o < path.last; o += 2) {
        const T v = e[x + o[0] * W + o[1]];
        m = m != m || m > v ? m : v;
      }
      out[x] = 1 - m;
    }
    return;
  }
  for (int64_t x = x0; x < x1; x += L) {
    const T* at = e + std::min(x, x1 - L);  // the last vector overlaps the one before
    VI m = *reinterpret_cast<const VI*>(at + end);
    for (const int64_t* o = path.first + 2; o < path.last; o += 2) {
      const VI v = *reinterpret_cast<const VI*>(at + o[0] * W + o[1]);
      m = m > v ? m : v;
    }
    *reinterpret_cast<V*>(out + (at - e)) = T(1) - reinterpret_cast<V>(m);
  }
}

// Adds the gradient of the pairs of the row's sources [x0, x1) to the pixels that hold the maxima; grad_e points to the
// row.
template <typename T>
FASTCAM_INLINE void gradient_row(const T* grad, const T* e, T* grad_e, int64_t W, Path path, int64_t x0, int64_t x1) {
  T largest[BLOCK], left[BLOCK];
  for (; x0 < x1; x0 += BLOCK) {
    const int64_t n = std::min(BLOCK, x1 - x0);
    for (int64_t j = 0; j < n; ++j) {
      largest[j] = e[x0 + j + path.first[0] * W + path.first[1]];
      left[j] = grad[x0 + j];
    }
    for (const int64_t* o = path.first + 2; o < path.last; o += 2) {
      const T* v = e + x0 + o[0] * W + o[1];
      for (int64_t j = 0; j < n; ++j) largest[j] = largest[j] != largest[j] || largest[j] > v[j] ? largest[j] : v[j];
    }
    for (const int64_t* o = path.first; o < path.last; o += 2) {
      const T* v = e + x0 + o[0] * W + o[1];
      T* to = grad_e + x0 + o[0] * W + o[1];
      for (int64_t j = 0; j < n; ++j) {
        const bool here = v[j] == largest[j];
        to[j] -= here ? left[j] : T(0);
        left[j] = here ? T(0) : left[j];
      }
    }
  }
}

FASTCAM_MULTIVERSION void affinity_row_f32(const float* e, int64_t W, Path path, float* out, int64_t x0, int64_t x1) {
  affinity_row(e, W, path, out, x0, x1);
}
FASTCAM_MULTIVERSION void affinity_row_f64(const double* e, int64_t W, Path path, double* out, int64_t x0, int64_t x1) {
  affinity_row(e, W, path, out, x0, x1);
}
FASTCAM_MULTIVERSION void gradient_row_f32(const float* grad, const float* e, float* grad_e, int64_t W, Path path,
                                           int64_t x0, int64_t x1) {
  gradient_row(grad, e, grad_e, W, path, x0, x1);
}
FASTCAM_MULTIVERSION void gradient_row_f64(const double* grad, const double* e, double* grad_e, int64_t W, Path path,
                                           int64_t x0, int64_t x1) {
  gradient_row(grad, e, grad_e, W, path, x0, x1);
}

template <typename T>
std::vector<T> clamped(const T* edge, int64_t n) {
  std::vector<T> e(n);
  clamp(edge, e.data(), n);
  return e;
}

template <typename T, typename Row>
void forward(const T* edge, const int64_t* offsets, const int64_t* ends, T* out, int64_t B, int64_t P, int64_t H,
             int64_t W, int threads, Row row) {
  const std::vector<T> e = clamped(edge, B * H * W);
  parallel_for(B * P, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Path way = path(offsets, ends, i % P);
      const int64_t x0 = way.left(W), x1 = way.right(W);
      for (int64_t y = 0; y < H; ++y) {
        T* to = out + (i * H + y) * W;
        if (y + way.dy() >= H) {
          std::fill(to, to + W, T(0));
          continue;
        }
        std::fill(to, to + x0, T(0));
        row(e.data() + (i / P * H + y) * W, W, way, to, x0, x1);
        std::fill(to + x1, to + W, T(0));
      }
    }
  });
}

// A task gathers the gradient of its rows of sources, and of those below that they reach, in an array of its own.
template <typename T, typename Row>
void backward(const T* grad, const T* edge, const int64_t* offsets, const int64_t* ends, T* grad_edge, int64_t B,
              int64_t P, int64_t H, int64_t W, int64_t radius, int threads, Row row) {
  const std::vector<T> e = clamped(edge, B * H * W);
  const int64_t bands = (H + ROWS - 1) / ROWS, reach = ROWS + radius - 1;
  std::vector<T> parts(B * bands * reach * W);
  parallel_for(B * bands, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / bands, first = i % bands * ROWS;
      for (int64_t y = first; y < std::min(first + ROWS, H); ++y)
        for (int64_t p = 0; p < P; ++p) {
          const Path way = path(offsets, ends, p);
          if (y + way.dy() < H)
            row(grad + ((b * P + p) * H + y) * W, e.data() + (b * H + y) * W,
                parts.data() + (i * reach + y - first) * W, W, way, way.left(W), way.right(W));
        }
    }
  });
  parallel_for(B * H, ROWS, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, y = i % H;
      T* to = grad_edge + i * W;
      std::fill(to, to + W, T(0));
      for (int64_t band = 0; band <= y / ROWS; ++band) {
        const int64_t at = y - band * ROWS;
        if (at >= reach) continue;
        const T* from = parts.data() + ((b * bands + band) * reach + at) * W;
        for (int64_t x = 0; x < W; ++x) to[x] += from[x];
      }
      for (int64_t x = 0; x < W; ++x) to[x] = edge[i * W + x] >= 0 && edge[i * W + x] <= 1 ? to[x] : 0;
    }
  });
}

}  // namespace

void path_affinity_fwd(const void* edge, const int64_t* offsets, const int64_t* ends, void* out, bool f64, int64_t B,
                       int64_t P, int64_t H, int64_t W, int threads) {
  if (f64) {
    forward(static_cast<const double*>(edge), offsets, ends, static_cast<double*>(out), B, P, H, W, threads,
            affinity_row_f64);
  } else {
    forward(static_cast<const float*>(edge), offsets, ends, static_cast<float*>(out), B, P, H, W, threads,
            affinity_row_f32);
  }
}

void path_affinity_bwd(const void* grad, const void* edge, const int64_t* offsets, const int64_t* ends, void* grad_edge,
                       bool f64, int64_t B, int64_t P, int64_t H, int64_t W, int64_t radius, int threads) {
  if (f64) {
    backward(static_cast<const double*>(grad), static_cast<const double*>(edge), offsets, ends,
             static_cast<double*>(grad_edge), B, P, H, W, radius, threads, gradient_row_f64);
  } else {
    backward(static_cast<const float*>(grad), static_cast<const float*>(edge), offsets, ends,
             static_cast<float*>(grad_edge), B, P, H, W, radius, threads, gradient_row_f32);
  }
}

}  // namespace fastcam
