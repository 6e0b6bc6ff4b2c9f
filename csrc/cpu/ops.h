// What the Python bindings call. Arrays are contiguous; `f64` says whether they hold double or float.
#pragma once

#include <cstdint>

namespace fastcam {

// views: S rows of (address of (BC, h, w), h, w, mirrored, address of its gradient); reduce and normalize as in
// csrc/cam_fuse.h; present may be null.
void cam_fuse_fwd(const int64_t* views, const bool* present, void* out, void* stats, bool f64, int64_t S, int64_t BC,
                  int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, bool relu, int reduce, int normalize,
                  bool align_corners, double eps, int threads);
void cam_fuse_bwd(const void* grad, const int64_t* views, const void* stats, const bool* present, bool f64, int64_t S,
                  int64_t BC, int64_t H, int64_t W, int64_t grid_h, int64_t grid_w, bool relu, int reduce,
                  int normalize, bool align_corners, double eps, int threads);

// x (B, C, N), f (B, D, N), between (steps - 1, B, C, N), divisor (B, N).
void correlation_propagate_fwd(const void* x, const void* f, void* out, void* between, void* divisor, bool f64,
                               int64_t B, int64_t C, int64_t D, int64_t N, int64_t steps, double eps, int threads);
void correlation_propagate_bwd(const void* grad, const void* x, const void* f, const void* out, const void* between,
                               const void* divisor, void* grad_x, void* grad_f, bool f64, int64_t B, int64_t C,
                               int64_t D, int64_t N, int64_t steps, double eps, int threads);

// unary, out, grad (B, K, H, W); image (B, 3, H, W) or null; sizes (B, 2); a compatibility (K) or (K, K) multiplies
// messages, null for no such term; sigma: sx, sy of the spatial term, then sx, sy, sr, sg, sb. normalization:
// symmetric, before, after, none; kernel: fast, lattice, exact.
void crf_mean_field_fwd(const void* unary, const void* image, const int64_t* sizes, const void* gaussian,
                        const void* bilateral, bool gaussian_matrix, bool bilateral_matrix, const double* sigma,
                        void* out, bool f64, int64_t B, int64_t K, int64_t H, int64_t W, int64_t iterations,
                        int normalization, int kernel, int threads);
void crf_mean_field_bwd(const void* grad, const void* unary, const void* image, const int64_t* sizes,
                        const void* gaussian, const void* bilateral, bool gaussian_matrix, bool bilateral_matrix,
                        const double* sigma, void* out, bool f64, int64_t B, int64_t K, int64_t H, int64_t W,
                        int64_t iterations, int normalization, int kernel, int threads);

// query (B, D, N), support (B, D, M), mask (B, M) or null, value and index (B, N); index -1: no support.
void pairwise_max_fwd(const void* query, const void* support, const bool* mask, void* value, int64_t* index, bool f64,
                      int64_t B, int64_t D, int64_t N, int64_t M, bool cosine, double eps, int threads);
void pairwise_max_bwd(const void* grad, const void* query, const void* support, const int64_t* index, void* grad_q,
                      void* grad_s, bool f64, int64_t B, int64_t D, int64_t N, int64_t M, bool cosine, double eps,
                      int threads);

// p (K, D), or (B, K, D) if p_batched; r (B, N), the reciprocal norms; weights (B, K, N) is scratch.
void prototype_similarity_fwd(const void* x, const void* p, void* out, void* r, bool f64, int64_t B, int64_t D,
                              int64_t N, int64_t K, bool p_batched, bool relu, double eps, int threads);
void prototype_similarity_bwd(const void* grad, const void* x, const void* p, const void* out, const void* r,
                              void* grad_x, void* weights, void* grad_p, bool f64, int64_t B, int64_t D, int64_t N,
                              int64_t K, bool p_batched, bool relu, double eps, int threads);

// x (B, D, N), w (B, K, N), out (B, K, D); stat (B, K): the logarithm of a softmax's divisor, else a factor of w;
// divisor: nothing, sum, area, softmax.
void region_pool_fwd(const void* x, const void* w, void* out, void* stat, bool f64, int64_t B, int64_t D, int64_t N,
                     int64_t K, int divisor, double eps, int threads);
void region_pool_bwd(const void* grad, const void* x, const void* w, const void* out, const void* stat, void* grad_x,
                     void* grad_w, bool f64, int64_t B, int64_t D, int64_t N, int64_t K, int divisor, int threads);

}  // namespace fastcam
