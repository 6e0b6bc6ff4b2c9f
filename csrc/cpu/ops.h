// What the Python bindings call. Arrays are contiguous; `f64` says whether they hold double or float.
#pragma once

#include <cstdint>

namespace fastcam {

// views: S rows of (address of (BC, h, w), h, w, mirrored, address of its gradient); activation, reduce and normalize
// as in csrc/cam_fuse.h; present may be null.
void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, void* stats, bool f64, int64_t S, int64_t BC,
                  int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation, int reduce, int normalize,
                  bool align_corners, double eps, int threads);
void cam_fuse_bwd(const void* grad, const int64_t* views, const void* stats, const bool* present, bool f64, int64_t S,
                  int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, int activation, int reduce,
                  int normalize, bool align_corners, double eps, int threads);

// As cam_fuse. labels (C), background: the score that a class must beat, out (B, H, W).
void cam_label_fwd(const int64_t* views, const bool* present, const uint8_t* labels, double background, uint8_t* out,
                   bool f64, int64_t S, int64_t B, int64_t C, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w,
                   int activation, int reduce, int normalize, bool align_corners, double eps, int threads);

// scores (B, n, P), target (B, P), thresholds ascending (T), labels (n) in [0, num_classes], present (B, n) or null.
// Adds to counts (num_classes + 1, num_classes + 1, T + 1). Returns ignore_index, or a true label out of range.
int64_t cam_sweep_fwd(const void* scores, const int64_t* target, const void* thresholds, const int64_t* labels,
                      const bool* present, int64_t* counts, bool f64, int64_t B, int64_t n, int64_t P,
                      int64_t num_classes, int64_t T, int64_t ignore_index, int threads);

// unary, out, grad (B, G, K, H, W): G problems on each image (B, 3, H, W), which may be null; sizes (B, 2); a
// compatibility (K) or (K, K) multiplies messages, null for no such term, and its gradient is added to *_grad unless
// that is null; sigma: sx, sy of the spatial term, then sx, sy, sr, sg, sb. normalization: symmetric, before, after,
// none; kernel: fast, lattice, exact.
void crf_mean_field_fwd(const void* unary, const void* image, const int64_t* sizes, const void* gaussian,
                        const void* bilateral, bool gaussian_matrix, bool bilateral_matrix, const double* sigma,
                        void* out, bool f64, int64_t B, int64_t G, int64_t K, int64_t H, int64_t W, int64_t iterations,
                        int normalization, int kernel, int threads);
void crf_mean_field_bwd(const void* grad, const void* unary, const void* image, const int64_t* sizes,
                        const void* gaussian, const void* bilateral, bool gaussian_matrix, bool bilateral_matrix,
                        const double* sigma, void* out, double* gaussian_grad, double* bilateral_grad, bool f64,
                        int64_t B, int64_t G, int64_t K, int64_t H, int64_t W, int64_t iterations, int normalization,
                        int kernel, int threads);

void prototype_similarity_fwd(const void* x, const void* p_hat, void* out, void* r, bool f64, int64_t B, int64_t D,
                              int64_t N, int64_t K, bool p_batched, bool relu, double eps, int threads);
void prototype_similarity_bwd(const void* grad, const void* x, const void* p_hat, const void* out, const void* r,
                              void* grad_x, void* weights, void* grad_p_hat, bool f64, int64_t B, int64_t D, int64_t N,
                              int64_t K, bool p_batched, bool relu, double eps, int threads);

}  // namespace fastcam
