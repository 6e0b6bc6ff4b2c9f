// The pairwise terms of a dense CRF: normalised Gaussian kernels over the pixels of an image.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fastcam {

enum Normalization { SYMMETRIC, BEFORE, AFTER, NONE };

struct Size {
  int64_t h, w;
};

// A normalised kernel K over the pixels, or its adjoint.
template <typename T>
class Term {
 public:
  virtual ~Term() = default;
  // Does what needs all pixels, for rows q (N, width). Afterwards messages() may be called for any pixels.
  virtual void prepare(const T* q, int64_t width, bool adjoint, int threads) = 0;
  // Rows of K q for `count` pixels from (y, x) on, all in image row y.
  virtual void messages(int64_t y, int64_t x, int64_t count, T* out) const = 0;
};

// On a permutohedral lattice. features (d, N).
template <typename T>
std::unique_ptr<Term<T>> lattice_term(const std::vector<float>& features, Size size, Normalization normalization,
                                      int threads);
// exp(-x^2 / 2 sx^2 - y^2 / 2 sy^2), separable; weights below `cut` left out. sigma: sx, sy.
template <typename T>
std::unique_ptr<Term<T>> spatial_term(const double* sigma, double cut, Size size, Normalization normalization);
// True Gaussian sums over all pairs of pixels, streaming. features (d, N).
template <typename T>
std::unique_ptr<Term<T>> exact_term(std::vector<T> features, Size size, Normalization normalization, int threads);

}  // namespace fastcam
