// Fusion of class activation maps on a GPU: views (BC, h, w) of any number and size -> one map (BC, H, W).
//
// Every pixel is computed twice, once for the maximum and minimum of its map and once to write it: the views are small
// and stay in the cache, so that only the result moves.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>

#include "cam_fuse.h"
#include "cuda/check.h"
#include "cuda/ops.h"

namespace fastcam {
namespace {

constexpr int TILE_W = 32, TILE_H = 8;  // threads of a block: a warp lies along a row
constexpr int ROWS = 4;                 // pixels of a thread, TILE_H apart
constexpr int THREADS = TILE_W * TILE_H;
constexpr int MOST_VIEWS = 64;      // kernel arguments hold 4 kB
constexpr int MOST_COMPETING = 32;  // bits of a pixel's takers

struct View {
  const void* data;
  void* grad;
  int h, w;
  bool mirrored;
};

struct Problem {
  View views[MOST_VIEWS];
  const bool* present;
  int S, H, W, grid_h, grid_w, activation, reduce, normalize;
  float scale, eps;
  bool align_corners;
  // Whether not every view takes the gradient of every pixel.
  __host__ __device__ bool compete() const {
    return reduce == FUSE_MAX || reduce == FUSE_PAIR_MAX || activation == FUSE_RESIZED_RELU;
  }
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float* to, float x) { *to = x; }
__device__ void store(__half* to, float x) { *to = __float2half(x); }
__device__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

struct Neighbours {
  int left, right;
  float weight;  // of the right one
};

// An explicit fma here and below: the same bits in every kernel, so that a maximum is found again.
__device__ Neighbours neighbours(int i, int n, int grid, bool align_corners) {
  const float source = align_corners ? __fmul_rn(i, grid > 1 ? __fdiv_rn(n - 1, grid - 1) : 0.0f)
                                     : fmaxf(__fmaf_rn(__fadd_rn(i, 0.5f), __fdiv_rn(n, grid), -0.5f), 0.0f);
  const int left = min(static_cast<int>(source), n - 1);
  return {left, min(left + 1, n - 1), left < n - 1 ? __fsub_rn(source, left) : 0.0f};
}

__device__ float lerp(float a, float b, float weight) { return __fmaf_rn(weight, __fsub_rn(b, a), a); }

// Fused value of a pixel of map bc before normalisation, and, a bit a view, the views that take its gradient.
template <typename T>
__device__ float fuse(const Problem& p, int64_t bc, int y, int x, uint32_t* takers) {
  float fused = 0, before = 0;
  uint32_t bit_before = 0;
  *takers = 0;
  for (int s = 0; s < p.S; ++s) {
    const View& v = p.views[s];
    const Neighbours rows = neighbours(y, v.h, p.grid_h, p.align_corners);
    Neighbours columns = neighbours(x, v.w, p.grid_w, p.align_corners);
    if (v.mirrored) columns = {v.w - 1 - columns.left, v.w - 1 - columns.right, columns.weight};
    const T* map = static_cast<const T*>(v.data) + bc * v.h * v.w;
    const auto at = [&](int i, int j) {
      const float value = to_float(map[static_cast<int64_t>(i) * v.w + j]);
      return p.activation == FUSE_RELU && value < 0 ? 0.0f : value;  // NaN stays
    };
    const float upper = lerp(at(rows.left, columns.left), at(rows.left, columns.right), columns.weight);
    const float lower = lerp(at(rows.right, columns.left), at(rows.right, columns.right), columns.weight);
    float value = lerp(upper, lower, rows.weight);
    uint32_t bit = s < MOST_COMPETING ? 1u << s : 0;
    if (p.activation == FUSE_RESIZED_RELU && value <= 0) value = 0, bit = 0;
    if (p.reduce == FUSE_MAX) {
      if (s == 0 || value > fused || isnan(value)) fused = value, *takers = bit;
    } else if (p.reduce == FUSE_PAIR_MAX && s % 2 == 0) {
      before = value, bit_before = bit;
    } else {
      if (p.reduce == FUSE_PAIR_MAX && !(value > before || isnan(value))) value = before, bit = bit_before;
      fused = __fadd_rn(fused, value);
      *takers |= bit;
    }
  }
  fused = __fmul_rn(fused, p.scale);
  return p.activation == FUSE_FUSED_RELU && fused < 0 ? 0.0f : fused;
}

// The sum (or other operation) of every thread's numbers, in a fixed order; the result is thread 0's.
template <int N, typename Operation>
__device__ void reduce_block(float (&value)[N], Operation operation) {
  __shared__ float shared[N][THREADS];
  const int thread = threadIdx.y * TILE_W + threadIdx.x;
  __syncthreads();
  for (int n = 0; n < N; ++n) shared[n][thread] = value[n];
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (int n = 0; n < N; ++n) shared[n][thread] = operation(n, shared[n][thread], shared[n][thread + half]);
    }
  }
  for (int n = 0; n < N; ++n) value[n] = shared[n][0];
}

struct Extreme {  // of numbers 0: maximum, 1: minimum; NaN if one is NaN
  __device__ float operator()(int n, float a, float b) const {
    if (isnan(a) || isnan(b)) return nanf("");
    return n == 0 ? fmaxf(a, b) : fminf(a, b);
  }
};
struct Sum {
  __device__ float operator()(int, float a, float b) const { return a + b; }
};

// Calls f(y, x) for this thread's pixels. A block owns TILE_H * ROWS by TILE_W pixels of map blockIdx.x, tile
// blockIdx.y.
template <typename F>
__device__ void for_pixels(const Problem& p, F f) {
  const int tiles_w = (p.W + TILE_W - 1) / TILE_W;
  const int x = blockIdx.y % tiles_w * TILE_W + threadIdx.x;
  for (int r = 0; r < ROWS; ++r) {
    const int y = (blockIdx.y / tiles_w * ROWS + r) * TILE_H + threadIdx.y;
    if (y < p.H && x < p.W) f(y, x);
  }
}

__device__ bool is_present(const Problem& p, int64_t bc) { return p.present == nullptr || p.present[bc]; }

// A block owns one tile of one map and writes its maximum and minimum.
template <typename T>
__global__ void extremes_kernel(const __grid_constant__ Problem p, float* extremes) {
  const int64_t bc = blockIdx.x;
  if (!is_present(p, bc)) return;
  float both[2] = {-INFINITY, INFINITY};
  for_pixels(p, [&](int y, int x) {
    uint32_t takers;
    const float value = fuse<T>(p, bc, y, x, &takers);
    for (int n = 0; n < 2; ++n) both[n] = Extreme()(n, both[n], value);
  });
  reduce_block(both, Extreme());
  if (threadIdx.x + threadIdx.y == 0)
    for (int n = 0; n < 2; ++n) extremes[2 * (bc * gridDim.y + blockIdx.y) + n] = both[n];
}

// A block owns one map: (BC, tiles, N) -> (BC, N), 0 for absent maps.
template <int N, typename Operation>
__global__ void reduce_tiles_kernel(const __grid_constant__ Problem p, const float* tiles, int64_t count, float* result,
                                    Operation operation) {
  const int64_t bc = blockIdx.x, thread = threadIdx.y * TILE_W + threadIdx.x;
  const bool present = is_present(p, bc);
  float value[N] = {};
  if (present) {
    for (int n = 0; n < N; ++n) value[n] = operation.start(n);
    for (int64_t i = thread; i < count; i += THREADS)
      for (int n = 0; n < N; ++n) value[n] = operation(n, value[n], tiles[(bc * count + i) * N + n]);
  }
  reduce_block(value, operation);
  if (thread == 0)
    for (int n = 0; n < N; ++n) result[bc * N + n] = value[n];
}

struct ExtremeOfTiles : Extreme {
  __device__ float start(int n) const { return n == 0 ? -INFINITY : INFINITY; }
};
struct SumOfTiles : Sum {
  __device__ float start(int) const { return 0; }
};

// Normalised value = (x - offset) / divisor; under FUSE_BY_SEAM x below the offset counts as 0.
struct Normalize {
  float offset, divisor;
  bool lifts;
  __device__ Normalize(const Problem& p, const float* stats, int64_t bc)
      : offset(p.normalize == FUSE_BY_MAX ? 0.0f : stats[2 * bc + 1]),
        divisor(stats[2 * bc] - offset + p.eps),
        lifts(p.normalize == FUSE_BY_SEAM) {
    if (lifts) offset += p.eps;
  }
  __device__ float operator()(float x) const { return ((lifts && x < offset ? 0.0f : x) - offset) / divisor; }
};

// A block owns one tile of one map and writes it, fused and normalised.
template <typename T>
__global__ void forward_kernel(const __grid_constant__ Problem p, const float* stats, T* out) {
  const int64_t bc = blockIdx.x;
  const bool present = is_present(p, bc);
  const Normalize by(p, stats, bc);
  for_pixels(p, [&](int y, int x) {
    float value = 0;
    uint32_t takers;
    if (present) {
      value = fuse<T>(p, bc, y, x, &takers);
      if (p.normalize != FUSE_BY_NOTHING) value = by(value);
    }
    store(&out[(bc * p.H + y) * p.W + x], value);
  });
}

// A block owns one tile of one map: sums of g and of g y, and how many pixels hold the maximum and the minimum.
template <typename T>
__global__ void sums_kernel(const __grid_constant__ Problem p, const T* grad, const float* stats, float* sums) {
  const int64_t bc = blockIdx.x;
  if (!is_present(p, bc)) return;
  const Normalize by(p, stats, bc);
  float sum[4] = {};
  for_pixels(p, [&](int y, int x) {
    uint32_t takers;
    const float value = fuse<T>(p, bc, y, x, &takers), g = to_float(grad[(bc * p.H + y) * p.W + x]);
    sum[0] += g;
    sum[1] += g * by(value);
    sum[2] += value == stats[2 * bc];
    sum[3] += value == stats[2 * bc + 1];
  });
  reduce_block(sum, Sum());
  if (threadIdx.x + threadIdx.y == 0)
    for (int n = 0; n < 4; ++n) sums[4 * (bc * gridDim.y + blockIdx.y) + n] = sum[n];
}

// A block owns one tile of one map: the gradient before normalisation, and the views that take it where they compete.
template <typename T>
__global__ void backward_kernel(const __grid_constant__ Problem p, const T* grad, const float* stats,
                                const float* totals, float* dx, uint32_t* takers) {
  const int64_t bc = blockIdx.x;
  if (!is_present(p, bc)) return;
  const Normalize by(p, stats, bc);
  for_pixels(p, [&](int y, int x) {
    const int64_t at = (bc * p.H + y) * p.W + x;
    uint32_t mine;
    const float value = fuse<T>(p, bc, y, x, &mine);
    float g = to_float(grad[at]);
    if (p.normalize != FUSE_BY_NOTHING) {
      const float* t = totals + 4 * bc;
      if (by.lifts && value < by.offset) g = 0;
      if (value == stats[2 * bc]) g -= t[1] / t[2];
      if (p.normalize != FUSE_BY_MAX && value == stats[2 * bc + 1]) g += (t[1] - t[0]) / t[3];
      g /= by.divisor;
    }
    dx[at] = p.activation == FUSE_FUSED_RELU && value <= 0 ? 0.0f : g;
    if (p.compete()) takers[at] = mine;
  });
}

struct Range {
  int begin, end;
};

// Output positions that source position i may contribute to.
__device__ Range support(int i, int n, int grid, int count, bool align_corners) {
  const float stride = align_corners ? static_cast<float>(grid - 1) / max(n - 1, 1) : static_cast<float>(grid) / n;
  const float first = align_corners ? (i - 1) * stride : (i - 0.5f) * stride - 0.5f;
  const int begin = static_cast<int>(floorf(first)) - 1;
  return {max(begin, 0), min(begin + static_cast<int>(2 * stride) + 5, count)};
}

__device__ float share(int i, int position, int n, int grid, bool align_corners) {
  const Neighbours near = neighbours(position, n, grid, align_corners);
  return (near.left == i ? 1 - near.weight : 0) + (near.right == i ? near.weight : 0);
}

// A warp owns one value of one view: its lanes take the columns that it reaches, and their sums are added in a fixed
// order. D is the dtype of dx.
template <typename T, typename D>
__global__ void gather_kernel(const __grid_constant__ Problem p, int s, const D* dx, const uint32_t* takers) {
  const View& v = p.views[s];
  const int64_t bc = blockIdx.x, value = static_cast<int64_t>(blockIdx.y) * TILE_H + threadIdx.y;
  if (value >= static_cast<int64_t>(v.h) * v.w) return;
  const int i = value / v.w, j = value % v.w;
  float total = 0;
  if (is_present(p, bc)) {
    const Range ys = support(i, v.h, p.grid_h, p.H, p.align_corners);
    const Range xs = support(j, v.w, p.grid_w, p.W, p.align_corners);
    for (int y = ys.begin; y < ys.end; ++y) {
      const float share_y = share(i, y, v.h, p.grid_h, p.align_corners);
      for (int x = xs.begin + threadIdx.x; x < xs.end; x += TILE_W) {
        const float both = share_y * share(j, x, v.w, p.grid_w, p.align_corners);
        const int64_t at = (bc * p.H + y) * p.W + x;
        if (both > 0 && (!p.compete() || takers[at] >> s & 1)) total += both * to_float(dx[at]);
      }
    }
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_down_sync(0xffffffff, total, step);
  if (threadIdx.x == 0) {
    const int64_t at = (bc * v.h + i) * v.w + (v.mirrored ? v.w - 1 - j : j);
    const bool clipped = p.activation == FUSE_RELU && to_float(static_cast<const T*>(v.data)[at]) <= 0;
    store(static_cast<T*>(v.grad) + at, clipped ? 0.0f : total * p.scale);
  }
}

Problem problem(const int64_t* views, const bool* present, int64_t S, int64_t H, int64_t W, int64_t grid_h,
                int64_t grid_w, int activation, int reduce, int normalize, bool align_corners, double eps) {
  if (S > MOST_VIEWS) throw std::invalid_argument("cam_fuse: expected at most 64 views, got " + std::to_string(S));
  Problem p = {};
  for (int64_t s = 0; s < S; ++s, views += 5) {
    p.views[s] = {reinterpret_cast<const void*>(views[0]), reinterpret_cast<void*>(views[4]),
                  static_cast<int>(views[1]), static_cast<int>(views[2]), views[3] != 0};
  }
  p.present = present;
  p.S = S, p.H = H, p.W = W, p.grid_h = grid_h, p.grid_w = grid_w;
  p.activation = activation, p.reduce = reduce, p.normalize = normalize;
  p.scale = reduce == FUSE_MEAN ? 1.0f / S : 1.0f;
  p.eps = eps;
  p.align_corners = align_corners;
  return p;
}

template <typename T>
void forward(const Problem& p, int64_t BC, T* out, float* extremes, float* stats, cudaStream_t stream) {
  const dim3 threads(TILE_W, TILE_H), blocks(BC, cam_fuse_tiles(p.H, p.W));
  if (p.normalize != FUSE_BY_NOTHING) {
    extremes_kernel<T><<<blocks, threads, 0, stream>>>(p, extremes);
    reduce_tiles_kernel<2><<<BC, threads, 0, stream>>>(p, extremes, blocks.y, stats, ExtremeOfTiles());
  }
  forward_kernel<T><<<blocks, threads, 0, stream>>>(p, stats, out);
  check_launch("cam_fuse_fwd");
}

template <typename T>
void backward(const Problem& p, int64_t BC, const T* grad, const float* stats, float* sums, float* totals, float* dx,
              uint32_t* takers, cudaStream_t stream) {
  const dim3 threads(TILE_W, TILE_H), blocks(BC, cam_fuse_tiles(p.H, p.W));
  if (p.normalize != FUSE_BY_NOTHING) {
    sums_kernel<T><<<blocks, threads, 0, stream>>>(p, grad, stats, sums);
    reduce_tiles_kernel<4><<<BC, threads, 0, stream>>>(p, sums, blocks.y, totals, SumOfTiles());
  }
  if (p.compete() && p.S > MOST_COMPETING) {
    throw std::invalid_argument("cam_fuse: expected at most 32 competing views, got " + std::to_string(p.S));
  }
  const bool prepare = p.normalize != FUSE_BY_NOTHING || p.compete() || p.activation == FUSE_FUSED_RELU;
  if (prepare) backward_kernel<T><<<blocks, threads, 0, stream>>>(p, grad, stats, totals, dx, takers);
  for (int s = 0; s < p.S; ++s) {
    const int64_t values = static_cast<int64_t>(p.views[s].h) * p.views[s].w;
    const dim3 warps(BC, (values + TILE_H - 1) / TILE_H);
    if (prepare) {
      gather_kernel<T><<<warps, threads, 0, stream>>>(p, s, static_cast<const float*>(dx), takers);
    } else {
      gather_kernel<T><<<warps, threads, 0, stream>>>(p, s, grad, takers);
    }
  }
  check_launch("cam_fuse_bwd");
}

}  // namespace

int64_t cam_fuse_tiles(int64_t H, int64_t W) {
  return (H + TILE_H * ROWS - 1) / (TILE_H * ROWS) * ((W + TILE_W - 1) / TILE_W);
}

void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, float* extremes, float* stats, int dtype,
                  int64_t S, int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation,
                  int reduce, int normalize, bool align_corners, double eps, void* stream) {
  if (BC == 0) return;
  const Problem p = problem(views, present, S, H, W, grid_h, grid_w, activation, reduce, normalize, align_corners, eps);
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == 0) forward(p, BC, static_cast<float*>(out), extremes, stats, on);
  if (dtype == 1) forward(p, BC, static_cast<__half*>(out), extremes, stats, on);
  if (dtype == 2) forward(p, BC, static_cast<__nv_bfloat16*>(out), extremes, stats, on);
}

void cam_fuse_bwd(const void* grad, const int64_t* views, const float* stats, const bool* present, float* sums,
                  float* totals, float* dx, uint32_t* takers, int dtype, int64_t S, int64_t BC, int64_t H, int64_t W,
                  int64_t grid_h, int64_t grid_w, int activation, int reduce, int normalize, bool align_corners,
                  double eps, void* stream) {
  if (BC == 0) return;
  const Problem p = problem(views, present, S, H, W, grid_h, grid_w, activation, reduce, normalize, align_corners, eps);
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == 0) backward(p, BC, static_cast<const float*>(grad), stats, sums, totals, dx, takers, on);
  if (dtype == 1) backward(p, BC, static_cast<const __half*>(grad), stats, sums, totals, dx, takers, on);
  if (dtype == 2) backward(p, BC, static_cast<const __nv_bfloat16*>(grad), stats, sums, totals, dx, takers, on);
}

}  // namespace fastcam
