// The pairwise terms of a dense CRF: normalised Gaussian kernels over the pixels of an image.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/memory.h"

namespace fastcam {

enum Normalization { SYMMETRIC, BEFORE, AFTER, NONE };

struct Size {
  int64_t h, w;
};

// What a thread keeps between calls of a term's messages.
template <typename T>
struct Scratch {
  int64_t y = -1;
  std::vector<T> rows;  // image rows from y on, filtered along columns
};

// A normalised kernel K over the pixels, or its adjoint, in passes: start, rows of all pixels (which bands of
// Lattice::BAND pixels may do side by side), finish; then the messages of any pixels may be asked for, also while the
// next pass, with the same width and adjoint, is fed.
template <typename T>
class Term {
 public:
  virtual ~Term() = default;
  virtual void start(int64_t width, bool adjoint, int threads) = 0;
  // Rows q (end - begin, width) of the pixels [begin, end), all in one band.
  virtual void feed(int64_t begin, int64_t end, const T* q) = 0;
  virtual void finish(int threads) = 0;
  // Rows of K q of the pixels [begin, end). `scratch` is the caller's, fresh for every pass; it saves work if calls
  // come in the order of the pixels.
  virtual void messages(int64_t begin, int64_t end, T* out, Scratch<T>& scratch) const = 0;
  // K 1, for all pixels. Before the first pass.
  virtual std::vector<T> ones(int threads) = 0;
};

// On a permutohedral lattice, as Lattice takes features and `few`.
template <typename T>
std::unique_ptr<Term<T>> lattice_term(const float* features, int64_t d, Size size, Normalization normalization,
                                      bool few, int threads);
// exp(-x^2 / 2 sx^2 - y^2 / 2 sy^2), separable; weights below `cut` left out. sigma: sx, sy.
template <typename T>
std::unique_ptr<Term<T>> spatial_term(const double* sigma, double cut, Size size, Normalization normalization);
// True Gaussian sums over all pairs of pixels, streaming. features (d, N).
template <typename T>
std::unique_ptr<Term<T>> exact_term(Memory<T> features, int64_t d, Size size, Normalization normalization, int threads);

}  // namespace fastcam
