// What the Python bindings call. Addresses are of device memory, except `views`. Arrays are contiguous; `stream` is a
// cudaStream_t.
#pragma once

#include <cstdint>

namespace fastcam {

// dtype: 0 float32, 1 float16, 2 bfloat16, of the views, the result and its gradient. views: host memory, S <= 64 rows
// of (address of (BC, h, w), h, w, mirrored, address of its gradient); activation, reduce, normalize: csrc/cam_fuse.h;
// present may be null. extremes (BC, tiles, 2) and stats (BC, 2) are float32, tiles = cam_fuse_tiles(H, W).
int64_t cam_fuse_tiles(int64_t H, int64_t W);
void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, float* extremes, float* stats, int dtype,
                  int64_t S, int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation,
                  int reduce, int normalize, bool align_corners, double eps, void* stream);
// sums (BC, tiles, 4) and totals (BC, 4) are float32. dx (BC, H, W), float32, may be null if there is nothing to
// prepare: no normalisation, no ReLU of fused maps. takers (BC, H, W), a bit a view, S <= 32, may be null unless views
// compete (a maximum, or a ReLU of resized views).
void cam_fuse_bwd(const void* grad, const int64_t* views, const float* stats, const bool* present, float* sums,
                  float* totals, float* dx, uint32_t* takers, int dtype, int64_t S, int64_t BC, int64_t H, int64_t W,
                  int64_t grid_h, int64_t grid_w, int activation, int reduce, int normalize, bool align_corners,
                  double eps, void* stream);

}  // namespace fastcam
