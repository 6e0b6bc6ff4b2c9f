// What the Python bindings call. Addresses are of device memory, except `views`. Arrays are contiguous; `stream` is a
// cudaStream_t.
#pragma once

#include <cstdint>

namespace fastcam {

// dtype: 0 float32, 1 float16, 2 bfloat16, of the views, the result and its gradient. views: host memory, S <= 64 rows
// of (address of (BC, h, w), h, w, mirrored, address of its gradient); reduce, normalize: csrc/cam_fuse.h; present may
// be null. extremes (BC, tiles, 2) and stats (BC, 2) are float32, tiles = cam_fuse_tiles(H, W).
int64_t cam_fuse_tiles(int64_t H, int64_t W);
void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, float* extremes, float* stats, int dtype,
                  int64_t S, int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, bool relu, int reduce,
                  int normalize, bool align_corners, double eps, void* stream);
// sums (BC, tiles, 4) and totals (BC, 4) are float32. dx (BC, H, W), float32, may be null unless normalize or reduce
// ask for it; winner (BC, H, W) may be null unless reduce is the maximum.
void cam_fuse_bwd(const void* grad, const int64_t* views, const float* stats, const bool* present, float* sums,
                  float* totals, float* dx, uint8_t* winner, int dtype, int64_t S, int64_t BC, int64_t H, int64_t W,
                  int64_t grid_h, int64_t grid_w, bool relu, int reduce, int normalize, bool align_corners, double eps,
                  void* stream);

}  // namespace fastcam
