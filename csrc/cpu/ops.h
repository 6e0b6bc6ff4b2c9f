// What the Python bindings call. Arrays are contiguous; `f64` says whether they hold double or float.
#pragma once

#include <cstdint>

namespace fastcam {

// q, out (B, H, N, d), k, v (B, H, M, d), lse (B, H, N); total, maps and grad_maps (B, rows, M - skip), total and
// grad_maps may be null; strides: of images, heads and rows of q, k, v and, backward, of grad.
void attention_maps_fwd(const void* q, const void* k, const void* v, const int64_t* strides, const void* total,
                        void* out, void* maps, void* lse, bool f64, int64_t B, int64_t H, int64_t N, int64_t M,
                        int64_t d, int64_t rows, int64_t skip, double scale, int threads);
void attention_maps_bwd(const void* grad, const void* grad_maps, const void* q, const void* k, const void* v,
                        const int64_t* strides, const void* lse, void* grad_q, void* grad_k, void* grad_v, bool f64,
                        int64_t B, int64_t H, int64_t N, int64_t M, int64_t d, int64_t rows, int64_t skip, double scale,
                        int threads);

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

// x (B, C, N), f (B, D, N), between (steps - 1, B, C, N), divisor (B, N).
void correlation_propagate_fwd(const void* x, const void* f, void* out, void* between, void* divisor, bool f64,
                               int64_t B, int64_t C, int64_t D, int64_t N, int64_t steps, double eps, int threads);
void correlation_propagate_bwd(const void* grad, const void* x, const void* f, const void* out, const void* between,
                               const void* divisor, void* grad_x, void* grad_f, bool f64, int64_t B, int64_t C,
                               int64_t D, int64_t N, int64_t steps, double eps, int threads);

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

// f (B, D, H, W), out, grad (B, P, H, W); offsets (P, 2): destinations (dy, dx), all nearer than radius; sources keep
// margin from the left, right and lower border.
void feature_affinity_fwd(const void* f, const int64_t* offsets, void* out, bool f64, int64_t B, int64_t D, int64_t P,
                          int64_t H, int64_t W, int64_t radius, int64_t margin, int threads);
void feature_affinity_bwd(const void* grad, const void* f, const void* out, const int64_t* offsets, void* grad_f,
                          bool f64, int64_t B, int64_t D, int64_t P, int64_t H, int64_t W, int64_t radius,
                          int64_t margin, int threads);

// edge (B, H, W), out, grad (B, P, H, W); offsets: (dy, dx) of the pixels of all paths, each from its destination to
// the source (0, 0); ends (P): where in them each path ends.
void path_affinity_fwd(const void* edge, const int64_t* offsets, const int64_t* ends, void* out, bool f64, int64_t B,
                       int64_t P, int64_t H, int64_t W, int threads);
void path_affinity_bwd(const void* grad, const void* edge, const int64_t* offsets, const int64_t* ends, void* grad_edge,
                       bool f64, int64_t B, int64_t P, int64_t H, int64_t W, int64_t radius, int threads);

// maps (BC, H, W), counts (BC); places (BC, most + 1): the pixels that are peaks, `most` of them at most. rule: median,
// mean, max, constant. peak_find_list turns them into peaks (n, 4): image, class, row, column.
void peak_find_fwd(const void* maps, int64_t* places, int64_t* counts, bool f64, int64_t BC, int64_t H, int64_t W,
                   int64_t most, int64_t window, int rule, double constant, int threads);
void peak_find_list(const int64_t* places, const int64_t* counts, int64_t* peaks, int64_t B, int64_t C, int64_t W,
                    int64_t most);

// masks, out, grad (B, C, H, W); image (B, K, H, W); offsets (P, 2): neighbours (dy, dx), none further than reach along
// either axis, and what is added to the weight of each: position (P).
void pixel_refine_fwd(const void* masks, const void* image, const int64_t* offsets, const double* position, void* out,
                      bool f64, int64_t B, int64_t C, int64_t K, int64_t P, int64_t reach, int64_t H, int64_t W,
                      bool pamr, int64_t iterations, int threads);
void pixel_refine_bwd(const void* grad, const void* image, const int64_t* offsets, const double* position,
                      void* grad_masks, bool f64, int64_t B, int64_t C, int64_t K, int64_t P, int64_t reach, int64_t H,
                      int64_t W, bool pamr, int64_t iterations, int threads);

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
// x, out (B, C, H, W); affinity (B, P, H, W), taken to the given power; offsets (P, 2). shares (degree + 1): of each
// Chebyshev polynomial in the result, or of each power.
void random_walk(const void* x, const void* affinity, const int64_t* offsets, const double* shares, void* out, bool f64,
                 int64_t B, int64_t C, int64_t P, int64_t H, int64_t W, int64_t radius, int64_t power, int64_t degree,
                 bool chebyshev, bool transposed, int threads);

// Graphs of B images one behind the other, as region_graph gives them; sizes (B, 2): edges and regions of each. sums
// (S, 3) of colours, hist (S, F) counts of `channels` histograms. weight, criterion: the orders of WEIGHTS and CRITERIA
// in fastcam/ops/region_merge.py. merges (S, 3): round, kept, absorbed; numbers (S, 2): value, threshold; counts (B):
// how many merges, from each image's first row on.
void region_merge_fwd(const int64_t* edges, const int64_t* border, const int64_t* area, const int64_t* perimeter,
                      const double* sums, const double* hist, const int64_t* sizes, int64_t* merges, double* numbers,
                      int64_t* counts, int64_t B, int64_t F, int64_t channels, int weight, int criterion, double start,
                      double stop, double factor, double fraction, double penalty, int threads);
// Adds the colours and counts of image (B, 3, P) by labels (B, P) to sums (S, 3) and hist (S, 3 bins).
void region_merge_describe(const uint8_t* image, const int32_t* labels, const int32_t* gamma, const int32_t* f,
                           const int64_t* sizes, double* sums, double* hist, int64_t B, int64_t P, int64_t bins,
                           int threads);

// x (B, C, P), labels (B, P), out (B, S, C); reduce: mean, sum, max; stat: areas (B, S), or for max the pixels (B, S,
// C). Return -1, or a label of S and above, which is refused.
int64_t region_reduce_fwd(const void* x, const int64_t* labels, void* out, int64_t* stat, bool f64, int64_t B,
                          int64_t C, int64_t P, int64_t S, int reduce, int threads);
void region_reduce_bwd(const void* grad, const int64_t* labels, const int64_t* stat, void* grad_x, bool f64, int64_t B,
                       int64_t C, int64_t P, int64_t S, int reduce, int threads);
// Adds to out (B, S, C, bins). kind: what x holds, 0 float, 1 double, 2 int64.
int64_t region_reduce_hist(const void* x, const int64_t* labels, int64_t* out, int kind, int64_t B, int64_t C,
                           int64_t P, int64_t S, int64_t bins, double low, double high, int threads);

// image (B, 3, H, W); gamma (256) and f: the tables of fastcam/_lab.py; a grid of rows x columns centres that look
// `reach` pixels to every side and, but for the last time, at every stride-th row. Labels to out (B, H, W).
void superpixel_slic_fwd(const uint8_t* image, const int16_t* cost, const int32_t* gamma, const int32_t* f,
                         int32_t* out, int64_t B, int64_t H, int64_t W, int64_t rows, int64_t columns, int64_t reach,
                         int64_t stride, double spread, int64_t iterations, bool connect, int threads);

// x, out, grad (B, K, H, W); labels (B, H, W), negative where there is none; rings (reach + 1): the weight at each
// chessboard distance; r (B, H, W): the reciprocal of the number of pixels (by_count) or of their weights.
void window_reduce_fwd(const void* x, const int32_t* labels, const double* rings, void* out, void* r, bool f64,
                       int64_t B, int64_t K, int64_t H, int64_t W, int64_t reach, bool by_count, int threads);
void window_reduce_bwd(const void* grad, const int32_t* labels, const double* rings, const void* r, void* grad_x,
                       bool f64, int64_t B, int64_t K, int64_t H, int64_t W, int64_t reach, int threads);

}  // namespace fastcam
