// Mean field of the fully connected CRF (Krähenbühl and Koltun 2011, 2013): Q <- softmax(-U - sum_k mu_k(K_k Q)).
// Values lie in rows, one a pixel, the labels innermost and padded to row_width(K); padding has energy -inf, hence Q =
// 0.
#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/crf_terms.h"
#include "cpu/lattice.h"
#include "cpu/math.h"
#include "cpu/ops.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t TILE = 64;  // pixels of one image row that are updated together
constexpr double CUT = 4e-5;  // kernel FAST leaves out spatial weights below this: 4.5 standard deviations

enum Kernel { FAST, LATTICE, EXACT };

template <typename T, int W, int R>
struct RowMaximum {
  static FASTCAM_INLINE void run(int64_t c, const T* rows, T* result, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      auto m = lanes<T, W>(rows + i * width + c);
      for (int r = 1; r < R; ++r) {
        const auto other = lanes<T, W>(rows + i * width + c + r * W);
        m = other > m ? other : m;
      }
      T largest = result[i];
      for (int w = 0; w < W; ++w) largest = m[w] > largest ? m[w] : largest;
      result[i] = largest;
    }
  }
};

template <typename T, int W, int R>
struct RowSum {
  static FASTCAM_INLINE void run(int64_t c, const T* rows, T* result, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      auto s = lanes<T, W>(rows + i * width + c);
      for (int r = 1; r < R; ++r) s += lanes<T, W>(rows + i * width + c + r * W);
      T sum = result[i];
      for (int w = 0; w < W; ++w) sum += s[w];
      result[i] = sum;
    }
  }
};

// Rows of negative energies -> softmax, in place. `work` has room for `count` numbers. False where a row has no
// distribution.
template <typename T>
FASTCAM_INLINE bool softmax(T* rows, T* work, int64_t count, int64_t width) {
  std::fill(work, work + count, -std::numeric_limits<T>::infinity());
  each_block<RowMaximum, T>(width, static_cast<const T*>(rows), work, count, width);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < width; ++k) rows[i * width + k] -= work[i];
  for (int64_t i = 0; i < count * width; ++i) rows[i] = fast_exp(rows[i]);
  std::fill(work, work + count, T(0));
  each_block<RowSum, T>(width, static_cast<const T*>(rows), work, count, width);
  bool good = true;
  for (int64_t i = 0; i < count; ++i) {
    good &= work[i] > 0 && work[i] < std::numeric_limits<T>::infinity();
    const T inverse = 1 / work[i];
    for (int64_t k = 0; k < width; ++k) rows[i * width + k] *= inverse;
  }
  return good;
}

// energy -= mu(message) for rows; compat (width) or, as a matrix, (width, width), symmetric.
template <typename T>
FASTCAM_INLINE void add_compatible(const T* message, const T* compat, bool matrix, T sign, T* energy, int64_t count,
                                   int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = message + i * width;
    T* to = energy + i * width;
    if (matrix) {
      for (int64_t l = 0; l < width; ++l) {
        const T m = sign * from[l];
        for (int64_t k = 0; k < width; ++k) to[k] += m * compat[l * width + k];
      }
    } else {
      for (int64_t k = 0; k < width; ++k) to[k] += sign * compat[k] * from[k];
    }
  }
}

// g (rows) -> q * (<g, q> - g), the gradient of the energies, in place.
template <typename T>
FASTCAM_INLINE void softmax_gradient(const T* q, T* g, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    T dot = 0;
    for (int64_t k = 0; k < width; ++k) dot += g[i * width + k] * q[i * width + k];
    for (int64_t k = 0; k < width; ++k) g[i * width + k] = q[i * width + k] * (dot - g[i * width + k]);
  }
}

#define FASTCAM_CRF_LOOPS(T)                                                                                   \
  FASTCAM_MULTIVERSION bool softmax_rows(T* rows, T* work, int64_t count, int64_t width) {                     \
    return softmax(rows, work, count, width);                                                                  \
  }                                                                                                            \
  FASTCAM_MULTIVERSION void compatible_rows(const T* message, const T* compat, bool matrix, T sign, T* energy, \
                                            int64_t count, int64_t width) {                                    \
    add_compatible(message, compat, matrix, sign, energy, count, width);                                       \
  }                                                                                                            \
  FASTCAM_MULTIVERSION void gradient_rows(const T* q, T* g, int64_t count, int64_t width) {                    \
    softmax_gradient(q, g, count, width);                                                                      \
  }
FASTCAM_CRF_LOOPS(float)
FASTCAM_CRF_LOOPS(double)
#undef FASTCAM_CRF_LOOPS

// (x / sx, y / sy) and, with sigmas for them, the channels of image (3, H, W) over theirs, of the pixels in `size`.
template <typename F, typename T>
std::vector<F> features_of(const T* image, const double* sigma, int64_t d, Size size, int64_t H, int64_t W) {
  const int64_t N = size.h * size.w;
  std::vector<F> features(d * N);
  for (int64_t y = 0; y < size.h; ++y)
    for (int64_t x = 0; x < size.w; ++x) {
      features[y * size.w + x] = static_cast<F>(x) / static_cast<F>(sigma[0]);
      features[N + y * size.w + x] = static_cast<F>(y) / static_cast<F>(sigma[1]);
    }
  for (int64_t c = 2; c < d; ++c)
    for (int64_t y = 0; y < size.h; ++y)
      for (int64_t x = 0; x < size.w; ++x)
        features[c * N + y * size.w + x] = static_cast<F>(image[((c - 2) * H + y) * W + x]) / static_cast<F>(sigma[c]);
  return features;
}

// The problem of one image.
template <typename T>
class MeanField {
 public:
  // unary (K, H, W), of which the pixels in `size` are taken.
  MeanField(const T* unary, int64_t K, Size size, int64_t H, int64_t W, int threads)
      : K_(K), width_(row_width(K)), size_(size), H_(H), W_(W), threads_(threads), negative_(buffer<T>(room())) {
    load(unary, T(-1), -std::numeric_limits<T>::infinity(), negative_.get());
  }

  int64_t room() const { return size_.h * size_.w * width_; }

  void add(std::unique_ptr<Term<T>> term, const T* compat, bool matrix) {
    std::vector<T> padded(matrix ? width_ * width_ : width_, T(0));
    for (int64_t l = 0; l < (matrix ? K_ : 1); ++l) std::copy_n(compat + l * K_, K_, padded.data() + l * width_);
    terms_.push_back({std::move(term), std::move(padded), matrix});
  }

  // Planes (K, H, W) times `factor` -> rows, with `padding` behind the labels.
  void load(const T* planes, T factor, T padding, T* rows) const {
    each_tile([&](int64_t y, int64_t x, int64_t count, std::vector<T>&) {
      T* to = rows + (y * size_.w + x) * width_;
      for (int64_t k = 0; k < width_; ++k)
        for (int64_t i = 0; i < count; ++i)
          to[i * width_ + k] = k < K_ ? factor * planes[(k * H_ + y) * W_ + x + i] : padding;
    });
  }

  void store(const T* rows, T* planes) const {
    each_tile([&](int64_t y, int64_t x, int64_t count, std::vector<T>&) {
      const T* from = rows + (y * size_.w + x) * width_;
      for (int64_t k = 0; k < K_; ++k)
        for (int64_t i = 0; i < count; ++i) planes[(k * H_ + y) * W_ + x + i] = from[i * width_ + k];
    });
  }

  // One update of q into next, which may be q itself; the first of all (softmax of -U) if q is null.
  void update(const T* q, T* next) {
    if (q)
      for (Pairwise& p : terms_) p.term->prepare(q, width_, false, threads_);
    each_tile([&](int64_t y, int64_t x, int64_t count, std::vector<T>& work) {
      const int64_t begin = (y * size_.w + x) * width_, n = count * width_;
      T* energy = next + begin;
      std::copy_n(negative_.get() + begin, n, energy);
      work.resize(TILE * width_);
      if (q)
        for (const Pairwise& p : terms_) {
          p.term->messages(y, x, count, work.data());
          compatible_rows(work.data(), p.compat.data(), p.matrix, T(-1), energy, count, width_);
        }
      if (!softmax_rows(energy, work.data(), count, width_))
        throw std::invalid_argument(
            "crf_mean_field: expected unary without NaN and -inf, with a finite energy at every pixel, and messages "
            "that do "
            "not overflow");
    });
  }

  // g, the gradient of q = update(before) -> the gradient of the energies there, added to `total`; and, unless `first`,
  // on to the gradient of `before`. `scratch` has room() numbers.
  void backward(const T* q, T* g, T* total, T* scratch, bool first) {
    each_tile([&](int64_t y, int64_t x, int64_t count, std::vector<T>&) {
      const int64_t begin = (y * size_.w + x) * width_;
      gradient_rows(q + begin, g + begin, count, width_);
      for (int64_t i = begin; i < begin + count * width_; ++i) total[i] += g[i];
    });
    if (first) return;
    for (Pairwise& p : terms_) {
      each_tile([&](int64_t y, int64_t x, int64_t count, std::vector<T>&) {
        const int64_t begin = (y * size_.w + x) * width_;
        std::fill_n(scratch + begin, count * width_, T(0));
        compatible_rows(g + begin, p.compat.data(), p.matrix, T(1), scratch + begin, count, width_);
      });
      p.term->prepare(scratch, width_, true, threads_);
    }
    each_tile([&](int64_t y, int64_t x, int64_t count, std::vector<T>& work) {
      const int64_t begin = (y * size_.w + x) * width_, n = count * width_;
      std::fill_n(g + begin, n, T(0));
      work.resize(TILE * width_);
      for (const Pairwise& p : terms_) {
        p.term->messages(y, x, count, work.data());
        for (int64_t i = 0; i < n; ++i) g[begin + i] += work[i];
      }
    });
  }

 private:
  struct Pairwise {
    std::unique_ptr<Term<T>> term;
    std::vector<T> compat;  // padded to width_
    bool matrix;
  };

  // f(y, x, count, work) for all tiles; `work` is one a thread's part, to be sized by f.
  template <typename F>
  void each_tile(const F& f) const {
    const int64_t in_row = (size_.w + TILE - 1) / TILE;
    parallel_for(size_.h * in_row, 8, threads_, [&](int64_t begin, int64_t end) {
      std::vector<T> work;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t x = i % in_row * TILE;
        f(i / in_row, x, std::min(TILE, size_.w - x), work);
      }
    });
  }

  int64_t K_, width_;
  Size size_;
  int64_t H_, W_;
  int threads_;
  std::unique_ptr<T[]> negative_;  // -U in rows
  std::vector<Pairwise> terms_;
};

// Arguments that all images share.
template <typename T>
struct Shared {
  const T *unary, *image;
  const int64_t* sizes;
  const T *gaussian, *bilateral;  // compatibilities, null for no such term
  bool gaussian_matrix, bilateral_matrix;
  const double* sigma;  // sx, sy of the spatial term; sx, sy, sr, sg, sb
  int64_t K, H, W, iterations;
  Normalization normalization;
  Kernel kernel;

  Size size(int64_t b) const { return {sizes[2 * b], sizes[2 * b + 1]}; }

  MeanField<T> problem(int64_t b, int threads) const {
    const Size s = size(b);
    MeanField<T> field(unary + b * K * H * W, K, s, H, W, threads);
    if (gaussian) {
      if (kernel == LATTICE) {
        const std::vector<float> features = features_of<float>(image, sigma, 2, s, H, W);
        field.add(lattice_term<T>(features, s, normalization, threads), gaussian, gaussian_matrix);
      } else {
        field.add(spatial_term<T>(sigma, kernel == FAST ? CUT : 0.0, s, normalization), gaussian, gaussian_matrix);
      }
    }
    if (bilateral) {
      const T* rgb = image + b * 3 * H * W;
      if (kernel == EXACT) {
        field.add(exact_term<T>(features_of<T>(rgb, sigma + 2, 5, s, H, W), s, normalization, threads), bilateral,
                  bilateral_matrix);
      } else {
        const std::vector<float> features = features_of<float>(rgb, sigma + 2, 5, s, H, W);
        field.add(lattice_term<T>(features, s, normalization, threads), bilateral, bilateral_matrix);
      }
    }
    return field;
  }
};

// f(b, threads of that image) for every image that has pixels: images side by side if there are enough, else one by
// one.
template <typename F>
void each_image(int64_t B, int threads, const int64_t* sizes, const F& f) {
  const bool beside = B >= threads;
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (sizes[2 * b] > 0 && sizes[2 * b + 1] > 0) f(b, beside ? 1 : threads);
  };
  if (beside) {
    parallel_for(B, 1, threads, part);
  } else {
    part(0, B);
  }
}

template <typename T>
void forward(const Shared<T>& s, T* out, int64_t B, int threads) {
  std::fill_n(out, B * s.K * s.H * s.W, T(0));
  each_image(B, threads, s.sizes, [&](int64_t b, int own) {
    MeanField<T> field = s.problem(b, own);
    const auto q = buffer<T>(field.room());
    field.update(nullptr, q.get());
    for (int64_t i = 0; i < s.iterations; ++i) field.update(q.get(), q.get());
    field.store(q.get(), out + b * s.K * s.H * s.W);
  });
}

template <typename T>
void backward(const Shared<T>& s, const T* grad, T* out, int64_t B, int threads) {
  std::fill_n(out, B * s.K * s.H * s.W, T(0));
  each_image(B, threads, s.sizes, [&](int64_t b, int own) {
    MeanField<T> field = s.problem(b, own);
    const int64_t room = field.room();
    std::vector<std::unique_ptr<T[]>> q;
    for (int64_t i = 0; i <= s.iterations; ++i) {
      q.push_back(buffer<T>(room));
      field.update(i == 0 ? nullptr : q[i - 1].get(), q[i].get());
    }
    std::vector<T> g(room), total(room, T(0)), scratch(room);
    field.load(grad + b * s.K * s.H * s.W, T(1), T(0), g.data());
    for (int64_t i = s.iterations; i >= 0; --i)
      field.backward(q[i].get(), g.data(), total.data(), scratch.data(), i == 0);
    field.store(total.data(), out + b * s.K * s.H * s.W);
  });
}

template <typename T>
Shared<T> shared(const void* unary, const void* image, const int64_t* sizes, const void* gaussian,
                 const void* bilateral, bool gaussian_matrix, bool bilateral_matrix, const double* sigma, int64_t K,
                 int64_t H, int64_t W, int64_t iterations, int normalization, int kernel) {
  return {static_cast<const T*>(unary),
          static_cast<const T*>(image),
          sizes,
          static_cast<const T*>(gaussian),
          static_cast<const T*>(bilateral),
          gaussian_matrix,
          bilateral_matrix,
          sigma,
          K,
          H,
          W,
          iterations,
          static_cast<Normalization>(normalization),
          static_cast<Kernel>(kernel)};
}

}  // namespace

void crf_mean_field_fwd(const void* unary, const void* image, const int64_t* sizes, const void* gaussian,
                        const void* bilateral, bool gaussian_matrix, bool bilateral_matrix, const double* sigma,
                        void* out, bool f64, int64_t B, int64_t K, int64_t H, int64_t W, int64_t iterations,
                        int normalization, int kernel, int threads) {
  if (f64) {
    forward(shared<double>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, K, H, W,
                           iterations, normalization, kernel),
            static_cast<double*>(out), B, threads);
  } else {
    forward(shared<float>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, K, H, W,
                          iterations, normalization, kernel),
            static_cast<float*>(out), B, threads);
  }
}

void crf_mean_field_bwd(const void* grad, const void* unary, const void* image, const int64_t* sizes,
                        const void* gaussian, const void* bilateral, bool gaussian_matrix, bool bilateral_matrix,
                        const double* sigma, void* out, bool f64, int64_t B, int64_t K, int64_t H, int64_t W,
                        int64_t iterations, int normalization, int kernel, int threads) {
  if (f64) {
    backward(shared<double>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, K, H, W,
                            iterations, normalization, kernel),
             static_cast<const double*>(grad), static_cast<double*>(out), B, threads);
  } else {
    backward(shared<float>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, K, H, W,
                           iterations, normalization, kernel),
             static_cast<const float*>(grad), static_cast<float*>(out), B, threads);
  }
}

}  // namespace fastcam
