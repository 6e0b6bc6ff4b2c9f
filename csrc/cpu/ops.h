// What the Python bindings call. Arrays are contiguous; `f64` says whether they hold double or float.
#pragma once

#include <cstdint>

namespace fastcam {

void prototype_similarity_fwd(const void* x, const void* p_hat, void* out, void* r, bool f64, int64_t B, int64_t D,
                              int64_t N, int64_t K, bool p_batched, bool relu, double eps, int threads);
void prototype_similarity_bwd(const void* grad, const void* x, const void* p_hat, const void* out, const void* r,
                              void* grad_x, void* weights, void* grad_p_hat, bool f64, int64_t B, int64_t D, int64_t N,
                              int64_t K, bool p_batched, bool relu, double eps, int threads);

}  // namespace fastcam
