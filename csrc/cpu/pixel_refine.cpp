// Masks (C, H, W) averaged again and again over P dilated neighbours, weighted by how alike the image (K, H, W) is
// there (PAMR, PAR). Weights are computed once and stored block by block of a row, in the order in which they are read.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/math.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"
#include "vector.h"

namespace fastcam {
namespace {

constexpr int64_t BLOCK = 32;        // pixels of a row whose weights are stored together
constexpr int64_t TILE_BLOCKS = 16;  // blocks and rows of a task: the maps around it stay in the second-level cache
constexpr int64_t TILE_ROWS = 16;

// Maps with margins as wide as the largest dilation.
struct Grid {
  const int64_t* offsets;  // P times (dy, dx)
  int64_t P, reach, H, W;

  int64_t blocks() const { return (W + BLOCK - 1) / BLOCK; }
  int64_t stride() const { return blocks() * BLOCK + 2 * reach; }
  int64_t plane() const { return (H + 2 * reach) * stride(); }
  int64_t at(int64_t y, int64_t x) const { return (y + reach) * stride() + x + reach; }
  std::vector<int64_t> jumps() const {
    std::vector<int64_t> to(P);
    for (int64_t p = 0; p < P; ++p) to[p] = offsets[2 * p] * stride() + offsets[2 * p + 1];
    return to;
  }
};

// Fills the margins of a padded plane from the nearest pixel, once row y is there.
template <typename T>
FASTCAM_INLINE void replicate(const Grid& grid, T* plane, int64_t y) {
  T* row = plane + grid.at(y, 0);
  std::fill(row - grid.reach, row, row[0]);
  std::fill(row + grid.W, row + grid.stride() - grid.reach, row[grid.W - 1]);
  const T* whole = row - grid.reach;
  if (y == 0)
    for (int64_t i = 1; i <= grid.reach; ++i)
      std::copy(whole, whole + grid.stride(), plane + grid.at(-i, 0) - grid.reach);
  if (y == grid.H - 1)
    for (int64_t i = 1; i <= grid.reach; ++i)
      std::copy(whole, whole + grid.stride(), plane + grid.at(y + i, 0) - grid.reach);
}

// weights (P, BLOCK) of the block of pixels at `image`, a place in the first of K padded planes. `centres` samples of
// the deviation are the pixel itself; `position` (P) is added to the weights.
template <typename T>
FASTCAM_INLINE void weight_block(const T* image, int64_t K, int64_t plane, const int64_t* to, int64_t P,
                                 int64_t centres, bool squared, const T* position, T* __restrict__ weights) {
  using V = typename Vector<T>::type;
  constexpr int L = Vector<T>::size, R = BLOCK / L;
  const T n = T(P + centres);
  std::fill(weights, weights + P * BLOCK, T(0));
  for (int64_t k = 0; k < K; ++k) {
    const T* here = image + k * plane;
    V mean[R], square[R];
    for (int r = 0; r < R; ++r) mean[r] = T(centres) * lanes<T, L>(here + r * L);
    for (int64_t p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) mean[r] += lanes<T, L>(here + to[p] + r * L);
    for (int r = 0; r < R; ++r) {
      mean[r] /= n;
      const V d = lanes<T, L>(here + r * L) - mean[r];
      square[r] = T(centres) * (d * d);
    }
    for (int64_t p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) {
        const V d = lanes<T, L>(here + to[p] + r * L) - mean[r];
        square[r] += d * d;
      }
    T scale[BLOCK];
    for (int r = 0; r < R; ++r) lanes<T, L>(scale + r * L) = square[r];
    for (int64_t j = 0; j < BLOCK; ++j) {
      const T std = std::sqrt(scale[j] / (n - 1));
      scale[j] = 1 / (squared ? T(0.3) * (std + T(1e-8)) : T(1e-8) + T(0.1) * std);
    }
    for (int64_t p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) {
        const V d = (lanes<T, L>(here + to[p] + r * L) - lanes<T, L>(here + r * L)) * lanes<T, L>(scale + r * L);
        lanes<T, L>(weights + p * BLOCK + r * L) -= squared ? d * d : d > -d ? d : -d;
      }
  }
  T most[BLOCK], sum[BLOCK] = {};
  std::copy(weights, weights + BLOCK, most);
  for (int64_t p = 1; p < P; ++p)
    for (int64_t j = 0; j < BLOCK; ++j) most[j] = most[j] > weights[p * BLOCK + j] ? most[j] : weights[p * BLOCK + j];
  const T share = T(1) / T(K);
  for (int64_t p = 0; p < P; ++p)
    for (int64_t j = 0; j < BLOCK; ++j) {
      weights[p * BLOCK + j] = fast_exp((weights[p * BLOCK + j] - most[j]) * share);
      sum[j] += weights[p * BLOCK + j];
    }
  for (int64_t j = 0; j < BLOCK; ++j) sum[j] = 1 / sum[j];
  for (int64_t p = 0; p < P; ++p)
    for (int64_t j = 0; j < BLOCK; ++j) weights[p * BLOCK + j] = weights[p * BLOCK + j] * sum[j] + position[p];
}

// The average of a block of pixels of G padded maps.
template <typename T, int G>
FASTCAM_INLINE void average_block(const T* maps, T* out, int64_t plane, const int64_t* to, int64_t P,
                                  const T* weights) {
  constexpr int L = Vector<T>::size, R = BLOCK / L;
  typename Vector<T>::type sum[G][R] = {};
  for (int64_t p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < G; ++g)
        sum[g][r] += lanes<T, L>(weights + p * BLOCK + r * L) * lanes<T, L>(maps + g * plane + to[p] + r * L);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) lanes<T, L>(out + g * plane + r * L) = sum[g][r];
}

// A tile of G maps: rows [top, bottom), blocks [first, last).
template <typename T, int G>
FASTCAM_INLINE void average_maps(const T* maps, T* out, const Grid& grid, const int64_t* to, const T* weights,
                                 int64_t top, int64_t bottom, int64_t first, int64_t last) {
  for (int64_t y = top; y < bottom; ++y)
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = grid.at(y, i * BLOCK);
      average_block<T, G>(maps + at, out + at, grid.plane(), to, grid.P,
                          weights + (y * grid.blocks() + i) * grid.P * BLOCK);
    }
}

template <typename T>
FASTCAM_INLINE void average_tile(const T* maps, T* out, int64_t C, const Grid& grid, const int64_t* to,
                                 const T* weights, int64_t top, int64_t bottom, int64_t first, int64_t last) {
  const int64_t plane = grid.plane();
  for (; C >= 4; C -= 4, maps += 4 * plane, out += 4 * plane)
    average_maps<T, 4>(maps, out, grid, to, weights, top, bottom, first, last);
  if (C == 3) average_maps<T, 3>(maps, out, grid, to, weights, top, bottom, first, last);
  if (C == 2) average_maps<T, 2>(maps, out, grid, to, weights, top, bottom, first, last);
  if (C == 1) average_maps<T, 1>(maps, out, grid, to, weights, top, bottom, first, last);
}

// The transposed average of one map: every pixel gives its gradient to its neighbours, margins included; what fell on
// the margins then belongs to the border. `padded` is zero before.
template <typename T>
FASTCAM_INLINE void spread(T* g, T* padded, const Grid& grid, const int64_t* to, const T* weights) {
  for (int64_t y = 0; y < grid.H; ++y)
    for (int64_t i = 0; i < grid.blocks(); ++i) {
      const T* from = g + (y * grid.blocks() + i) * BLOCK;
      const T* w = weights + (y * grid.blocks() + i) * grid.P * BLOCK;
      for (int64_t p = 0; p < grid.P; ++p) {
        T* sum = padded + grid.at(y, i * BLOCK) + to[p];
        for (int64_t j = 0; j < BLOCK; ++j) sum[j] += w[p * BLOCK + j] * from[j];
      }
    }
  const int64_t stride = grid.stride();
  for (int64_t y = 0; y < grid.H; ++y) {
    T* row = padded + grid.at(y, 0) - grid.reach;
    if (y == 0)
      for (int64_t r = 1; r <= grid.reach; ++r)
        for (int64_t x = 0; x < stride; ++x) row[x] += row[x - r * stride];
    if (y == grid.H - 1)
      for (int64_t r = 1; r <= grid.reach; ++r)
        for (int64_t x = 0; x < stride; ++x) row[x] += row[x + r * stride];
    row += grid.reach;
    for (int64_t x = 1; x <= grid.reach; ++x) row[0] += row[-x];
    for (int64_t x = grid.W; x < grid.W + grid.reach; ++x) row[grid.W - 1] += row[x];
    std::copy(row, row + grid.W, g + y * grid.blocks() * BLOCK);
  }
}

#define FASTCAM_REFINE(NAME, T)                                                                                        \
  FASTCAM_MULTIVERSION void weight_block_##NAME(const T* image, int64_t K, int64_t plane, const int64_t* to,           \
                                                int64_t P, int64_t centres, bool squared, const T* position,           \
                                                T* weights) {                                                          \
    weight_block(image, K, plane, to, P, centres, squared, position, weights);                                         \
  }                                                                                                                    \
  FASTCAM_MULTIVERSION void average_tile_##NAME(const T* maps, T* out, int64_t C, const Grid& grid, const int64_t* to, \
                                                const T* weights, int64_t top, int64_t bottom, int64_t first,          \
                                                int64_t last) {                                                        \
    average_tile(maps, out, C, grid, to, weights, top, bottom, first, last);                                           \
  }                                                                                                                    \
  FASTCAM_MULTIVERSION void spread_##NAME(T* g, T* padded, const Grid& grid, const int64_t* to, const T* weights) {    \
    spread(g, padded, grid, to, weights);                                                                              \
  }
FASTCAM_REFINE(f32, float)
FASTCAM_REFINE(f64, double)

template <typename T>
struct Kernels {
  void (*weights)(const T*, int64_t, int64_t, const int64_t*, int64_t, int64_t, bool, const T*, T*);
  void (*average)(const T*, T*, int64_t, const Grid&, const int64_t*, const T*, int64_t, int64_t, int64_t, int64_t);
  void (*spread)(T*, T*, const Grid&, const int64_t*, const T*);
};

// (N, H, W) -> padded planes.
template <typename T>
Memory<T> pad(const T* maps, int64_t N, const Grid& grid, int threads) {
  Memory<T> padded = buffer<T>(N * grid.plane());
  parallel_for(N, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t y = 0; y < grid.H; ++y) {
        const T* row = maps + (i * grid.H + y) * grid.W;
        std::copy(row, row + grid.W, padded.get() + i * grid.plane() + grid.at(y, 0));
        replicate(grid, padded.get() + i * grid.plane(), y);
      }
  });
  return padded;
}

template <typename T>
Memory<T> weights_of(const T* image, int64_t K, const Grid& grid, const std::vector<int64_t>& to, bool pamr,
                     const double* position, int threads, const Kernels<T>& kernels) {
  const Memory<T> padded = pad(image, K, grid, threads);
  const std::vector<T> added(position, position + grid.P);
  Memory<T> weights = buffer<T>(grid.H * grid.blocks() * grid.P * BLOCK);
  parallel_for(grid.H, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      for (int64_t i = 0; i < grid.blocks(); ++i)
        kernels.weights(padded.get() + grid.at(y, i * BLOCK), K, grid.plane(), to.data(), grid.P, pamr ? grid.P / 8 : 0,
                        !pamr, added.data(), weights.get() + (y * grid.blocks() + i) * grid.P * BLOCK);
  });
  return weights;
}

template <typename T>
void refine_image(const T* masks, const T* image, T* out, int64_t C, int64_t K, const Grid& grid, bool pamr,
                  const double* position, int64_t iterations, int threads, const Kernels<T>& kernels) {
  const std::vector<int64_t> to = grid.jumps();
  const Memory<T> weights = weights_of(image, K, grid, to, pamr, position, threads, kernels);
  Memory<T> now = pad(masks, C, grid, threads), next = buffer<T>(C * grid.plane());
  const int64_t across = (grid.blocks() + TILE_BLOCKS - 1) / TILE_BLOCKS, down = (grid.H + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0; i < iterations; ++i) {
    parallel_for(across * down, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t top = tile % down * TILE_ROWS, first = tile / down * TILE_BLOCKS;
        kernels.average(now.get(), next.get(), C, grid, to.data(), weights.get(), top,
                        std::min(top + TILE_ROWS, grid.H), first, std::min(first + TILE_BLOCKS, grid.blocks()));
      }
    });
    parallel_for(C, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t y = 0; y < grid.H; ++y) replicate(grid, next.get() + c * grid.plane(), y);
    });
    now.swap(next);
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t y = 0; y < grid.H; ++y) {
      const T* row = now.get() + c * grid.plane() + grid.at(y, 0);
      std::copy(row, row + grid.W, out + (c * grid.H + y) * grid.W);
    }
}

template <typename T>
void gradient_image(const T* grad, const T* image, T* grad_masks, int64_t C, int64_t K, const Grid& grid, bool pamr,
                    const double* position, int64_t iterations, int threads, const Kernels<T>& kernels) {
  const std::vector<int64_t> to = grid.jumps();
  const Memory<T> weights = weights_of(image, K, grid, to, pamr, position, threads, kernels);
  parallel_for(C, 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t width = grid.blocks() * BLOCK;
    std::vector<T> g(grid.H * width), padded(grid.plane());
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t y = 0; y < grid.H; ++y) {
        const T* row = grad + (c * grid.H + y) * grid.W;
        std::copy(row, row + grid.W, g.data() + y * width);
        std::fill(g.data() + y * width + grid.W, g.data() + (y + 1) * width, T(0));
      }
      for (int64_t i = 0; i < iterations; ++i) {
        std::fill(padded.begin(), padded.end(), T(0));
        kernels.spread(g.data(), padded.data(), grid, to.data(), weights.get());
      }
      for (int64_t y = 0; y < grid.H; ++y)
        std::copy(g.data() + y * width, g.data() + y * width + grid.W, grad_masks + (c * grid.H + y) * grid.W);
    }
  });
}

// image(b) for all images: side by side where there are enough for the threads.
template <typename Image>
void each_image(int64_t B, int threads, Image image) {
  if (B < threads) {
    for (int64_t b = 0; b < B; ++b) image(b);
    return;
  }
  parallel_for(B, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) image(b);
  });
}

template <typename T, typename Run>
void run(const void* in, const void* image, void* out, int64_t B, int64_t C, int64_t K, const Grid& grid, int threads,
         Run one) {
  const int64_t N = grid.H * grid.W;
  each_image(B, threads, [&](int64_t b) {
    one(static_cast<const T*>(in) + b * C * N, static_cast<const T*>(image) + b * K * N,
        static_cast<T*>(out) + b * C * N);
  });
}

constexpr Kernels<float> F32{weight_block_f32, average_tile_f32, spread_f32};
constexpr Kernels<double> F64{weight_block_f64, average_tile_f64, spread_f64};

}  // namespace

void pixel_refine_fwd(const void* masks, const void* image, const int64_t* offsets, const double* position, void* out,
                      bool f64, int64_t B, int64_t C, int64_t K, int64_t P, int64_t reach, int64_t H, int64_t W,
                      bool pamr, int64_t iterations, int threads) {
  const Grid grid{offsets, P, reach, H, W};
  if (f64) {
    run<double>(masks, image, out, B, C, K, grid, threads, [&](const double* m, const double* i, double* o) {
      refine_image(m, i, o, C, K, grid, pamr, position, iterations, threads, F64);
    });
  } else {
    run<float>(masks, image, out, B, C, K, grid, threads, [&](const float* m, const float* i, float* o) {
      refine_image(m, i, o, C, K, grid, pamr, position, iterations, threads, F32);
    });
  }
}

void pixel_refine_bwd(const void* grad, const void* image, const int64_t* offsets, const double* position,
                      void* grad_masks, bool f64, int64_t B, int64_t C, int64_t K, int64_t P, int64_t reach, int64_t H,
                      int64_t W, bool pamr, int64_t iterations, int threads) {
  const Grid grid{offsets, P, reach, H, W};
  if (f64) {
    run<double>(grad, image, grad_masks, B, C, K, grid, threads, [&](const double* g, const double* i, double* o) {
      gradient_image(g, i, o, C, K, grid, pamr, position, iterations, threads, F64);
    });
  } else {
    run<float>(grad, image, grad_masks, B, C, K, grid, threads, [&](const float* g, const float* i, float* o) {
      gradient_image(g, i, o, C, K, grid, pamr, position, iterations, threads, F32);
    });
  }
}

}  // namespace fastcam
