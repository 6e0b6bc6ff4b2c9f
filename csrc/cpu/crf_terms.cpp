#include "cpu/crf_terms.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/lattice.h"
#include "cpu/math.h"
#include "multiversion.h"
#include "parallel.h"

namespace fastcam {
namespace {

constexpr int64_t ROWS = 32, COLUMNS = 128;  // a task's block of the vertical pass: what it reads stays in L1

// out[c] = sum_t taps[t] * rows[t * stride + c] for c in [0, n).
template <typename T>
FASTCAM_INLINE void weighted_rows(const T* taps, int64_t count, const T* rows, int64_t stride, T* out, int64_t n) {
  constexpr int W = 16, R = 4;
  int64_t c = 0;
  for (; c + W * R <= n; c += W * R) {
    typename Lanes<T, W>::type sum[R] = {};
    for (int64_t t = 0; t < count; ++t)
      for (int r = 0; r < R; ++r) sum[r] += taps[t] * lanes<T, W>(rows + t * stride + c + r * W);
    for (int r = 0; r < R; ++r) lanes<T, W>(out + c + r * W) = sum[r];
  }
  for (; c < n; ++c) {
    T sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += taps[t] * rows[t * stride + c];
    out[c] = sum;
  }
}

// out[c] = after[c] * (taps[0] * row[c] + sum_t taps[t] * (row[c - t stride] + row[c + t stride])) for c in [0, n).
template <typename T>
FASTCAM_INLINE void symmetric_taps(const T* taps, int64_t radius, const T* row, int64_t stride, const T* after, T* out,
                                   int64_t n) {
  constexpr int W = 16, R = 4;
  int64_t c = 0;
  for (; c + W * R <= n; c += W * R) {
    typename Lanes<T, W>::type sum[R];
    for (int r = 0; r < R; ++r) sum[r] = taps[0] * lanes<T, W>(row + c + r * W);
    for (int64_t t = 1; t <= radius; ++t)
      for (int r = 0; r < R; ++r)
        sum[r] += taps[t] * (lanes<T, W>(row + c + r * W - t * stride) + lanes<T, W>(row + c + r * W + t * stride));
    for (int r = 0; r < R; ++r) lanes<T, W>(out + c + r * W) = sum[r] * lanes<T, W>(after + c + r * W);
  }
  for (; c < n; ++c) {
    T sum = taps[0] * row[c];
    for (int64_t t = 1; t <= radius; ++t) sum += taps[t] * (row[c - t * stride] + row[c + t * stride]);
    out[c] = sum * after[c];
  }
}

template <typename T, int W, int R>
struct WeightedSum {  // out[c] += sum_j weight[j] * rows[j][c]
  static FASTCAM_INLINE void run(int64_t c, const T* weight, const T* rows, T* out, int64_t count, int64_t width) {
    typename Lanes<T, W>::type sum[R] = {};
    for (int64_t j = 0; j < count; ++j)
      for (int r = 0; r < R; ++r) sum[r] += weight[j] * lanes<T, W>(rows + j * width + c + r * W);
    for (int r = 0; r < R; ++r) lanes<T, W>(out + c + r * W) += sum[r];
  }
};

// out (width) = sum_j exp(-|f_i - f_j|^2 / 2) x_j over all N points; features (d, N).
template <typename T>
FASTCAM_INLINE void exact_row(const T* features, int64_t d, int64_t N, int64_t i, const T* x, T* out, int64_t width) {
  constexpr int64_t CHUNK = 256;
  T weight[CHUNK];
  std::fill(out, out + width, T(0));
  for (int64_t begin = 0; begin < N; begin += CHUNK) {
    const int64_t count = std::min(CHUNK, N - begin);
    std::fill(weight, weight + count, T(0));
    for (int64_t j = 0; j < d; ++j) {
      const T own = features[j * N + i];
      const T* others = features + j * N + begin;
      for (int64_t n = 0; n < count; ++n) weight[n] -= T(0.5) * (own - others[n]) * (own - others[n]);
    }
    for (int64_t n = 0; n < count; ++n) weight[n] = fast_exp(weight[n]);
    each_block<WeightedSum, T>(width, static_cast<const T*>(weight), x + begin * width, out, count, width);
  }
}

#define FASTCAM_TERM_LOOPS(T)                                                                                       \
  FASTCAM_MULTIVERSION void vertical(const T* taps, int64_t count, const T* rows, int64_t stride, const T* before,  \
                                     T* out, int64_t n) {                                                           \
    weighted_rows(taps, count, rows, stride, out, n);                                                               \
    for (int64_t c = 0; c < n; ++c) out[c] *= before[c];                                                            \
  }                                                                                                                 \
  FASTCAM_MULTIVERSION void horizontal(const T* taps, int64_t radius, const T* row, int64_t stride, const T* after, \
                                       T* out, int64_t n) {                                                         \
    symmetric_taps(taps, radius, row, stride, after, out, n);                                                       \
  }                                                                                                                 \
  FASTCAM_MULTIVERSION void exact_rows(const T* features, int64_t d, int64_t N, int64_t begin, int64_t end,         \
                                       const T* x, T* out, int64_t width) {                                         \
    for (int64_t i = begin; i < end; ++i) exact_row(features, d, N, i, x, out + i * width, width);                  \
  }
FASTCAM_TERM_LOOPS(float)
FASTCAM_TERM_LOOPS(double)
#undef FASTCAM_TERM_LOOPS

// What stands before and after the raw kernel, from the raw kernel of ones.
template <typename T>
struct Diagonals {
  std::vector<T> before, after;

  Diagonals(const T* norm, int64_t n, Normalization normalization) : before(n, T(1)), after(n, T(1)) {
    for (int64_t i = 0; i < n; ++i) {
      const T value = norm[i] + T(1e-20);
      if (normalization == SYMMETRIC) before[i] = after[i] = 1 / std::sqrt(value);
      if (normalization == BEFORE) before[i] = 1 / value;
      if (normalization == AFTER) after[i] = 1 / value;
    }
  }
};

template <typename T>
class LatticeTerm : public Term<T> {
 public:
  LatticeTerm(const std::vector<float>& features, Size size, Normalization normalization, int threads)
      : lattice_(features.data(), features.size() / (size.h * size.w), size.h * size.w, threads), w_(size.w) {
    const int64_t N = lattice_.points();
    const std::vector<T> ones(N, T(1));
    before_.assign(N, T(1));
    after_.assign(N, T(1));
    prepare(ones.data(), 1, false, threads);
    std::vector<T> norm(N);
    lattice_.slice(blurred_, norm.data(), 0, N, 1);
    const Diagonals<T> diagonals(norm.data(), N, normalization);
    before_ = diagonals.before;
    after_ = diagonals.after;
    weights_.reset();
  }

  void prepare(const T* q, int64_t width, bool adjoint, int threads) override {
    const int64_t room = (lattice_.vertices() + 1) * width;
    if (room > room_) {
      z_ = buffer<T>(room);
      other_ = buffer<T>(room);
      room_ = room;
    }
    if (!weights_ || adjoint != adjoint_) weights_ = lattice_.splat_weights((adjoint ? after_ : before_).data());
    adjoint_ = adjoint;
    width_ = width;
    lattice_.splat(q, weights_.get(), z_.get(), width, threads);
    blurred_ = lattice_.blur(z_.get(), other_.get(), width, adjoint, threads);
  }

  void messages(int64_t y, int64_t x, int64_t count, T* out) const override {
    const int64_t begin = y * w_ + x;
    lattice_.slice(blurred_, out, begin, begin + count, width_);
    const T* scale = (adjoint_ ? before_ : after_).data() + begin;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < width_; ++k) out[i * width_ + k] *= scale[i];
  }

 private:
  Lattice lattice_;
  int64_t w_, width_ = 0, room_ = 0;
  bool adjoint_ = false;
  std::vector<T> before_, after_;
  std::unique_ptr<T[]> weights_, z_, other_;
  const T* blurred_ = nullptr;
};

// exp(-x^2 / 2 sx^2 - y^2 / 2 sy^2): columns first, into rows padded with zeros left and right, then along them. The
// kernel of ones is a product of one number a column and one a row, and so are the diagonals.
template <typename T>
class SpatialTerm : public Term<T> {
 public:
  SpatialTerm(const double* sigma, double cut, Size size, Normalization normalization)
      : size_(size),
        taps_x_(taps(sigma[0], cut, size.w)),
        taps_y_(taps(sigma[1], cut, size.h)),
        along_x_(diagonals(taps_x_, size.w, normalization)),
        along_y_(diagonals(taps_y_, size.h, normalization)) {}

  void prepare(const T* q, int64_t width, bool adjoint, int threads) override {
    const int64_t radius_x = taps_x_.size() - 1, radius_y = taps_y_.size() - 1;
    const int64_t n = size_.w * width;
    if (width != width_) {
      width_ = width;
      stride_ = n + 2 * radius_x * width;
      rows_.assign(size_.h * stride_, T(0));
    }
    const auto spread = [&](const std::vector<T>& along) {
      std::vector<T> wide(n);
      for (int64_t i = 0; i < n; ++i) wide[i] = along[i / width];
      return wide;
    };
    const std::vector<T>& before_y = adjoint ? along_y_.after : along_y_.before;
    const std::vector<T>& after_y = adjoint ? along_y_.before : along_y_.after;
    const std::vector<T> before_x = spread(adjoint ? along_x_.after : along_x_.before);
    after_x_ = spread(adjoint ? along_x_.before : along_x_.after);
    parallel_for(size_.h, ROWS, threads, [&](int64_t begin, int64_t end) {
      std::vector<T> weights(2 * radius_y + 1);
      for (int64_t c = 0; c < n; c += COLUMNS)
        for (int64_t y = begin; y < end; ++y) {
          const int64_t top = std::max<int64_t>(0, y - radius_y), bottom = std::min(size_.h - 1, y + radius_y);
          for (int64_t i = top; i <= bottom; ++i)
            weights[i - top] = after_y[y] * taps_y_[std::abs(i - y)] * before_y[i];
          vertical(weights.data(), bottom - top + 1, q + top * n + c, n, before_x.data() + c,
                   rows_.data() + y * stride_ + radius_x * width + c, std::min(COLUMNS, n - c));
        }
    });
  }

  void messages(int64_t y, int64_t x, int64_t count, T* out) const override {
    const int64_t radius = taps_x_.size() - 1;
    horizontal(taps_x_.data(), radius, rows_.data() + y * stride_ + (x + radius) * width_, width_,
               after_x_.data() + x * width_, out, count * width_);
  }

 private:
  static std::vector<T> taps(double sigma, double cut, int64_t n) {
    std::vector<T> weights;
    for (int64_t i = 0; i < n; ++i) {
      const double weight = std::exp(-0.5 * (i / sigma) * (i / sigma));
      if (weight < cut) break;
      weights.push_back(static_cast<T>(weight));
    }
    return weights;
  }

  static Diagonals<T> diagonals(const std::vector<T>& taps, int64_t n, Normalization normalization) {
    std::vector<T> norm(n, T(0));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < static_cast<int64_t>(taps.size()); ++t) {
        if (t > 0 && i - t >= 0) norm[i] += taps[t];
        if (i + t < n) norm[i] += taps[t];
      }
    return Diagonals<T>(norm.data(), n, normalization);
  }

  Size size_;
  std::vector<T> taps_x_, taps_y_;
  Diagonals<T> along_x_, along_y_;
  int64_t width_ = 0, stride_ = 0;
  std::vector<T> rows_, after_x_;
};

// True Gaussian sums over all pairs of points, streaming.
template <typename T>
class ExactTerm : public Term<T> {
 public:
  ExactTerm(std::vector<T> features, Size size, Normalization normalization, int threads)
      : features_(std::move(features)), w_(size.w), N_(size.h * size.w), diagonals_(Diagonals<T>(nullptr, 0, NONE)) {
    const std::vector<T> ones(N_, T(1));
    sum(ones.data(), 1, threads);
    diagonals_ = Diagonals<T>(sums_.data(), N_, normalization);
  }

  void prepare(const T* q, int64_t width, bool adjoint, int threads) override {
    adjoint_ = adjoint;
    width_ = width;
    const std::vector<T>& scale = adjoint ? diagonals_.after : diagonals_.before;
    scaled_.resize(N_ * width);
    for (int64_t i = 0; i < N_; ++i)
      for (int64_t k = 0; k < width; ++k) scaled_[i * width + k] = scale[i] * q[i * width + k];
    sum(scaled_.data(), width, threads);
  }

  void messages(int64_t y, int64_t x, int64_t count, T* out) const override {
    const std::vector<T>& scale = adjoint_ ? diagonals_.before : diagonals_.after;
    const int64_t begin = y * w_ + x;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < width_; ++k) out[i * width_ + k] = scale[begin + i] * sums_[(begin + i) * width_ + k];
  }

 private:
  void sum(const T* x, int64_t width, int threads) {
    sums_.resize(N_ * width);
    const int64_t d = features_.size() / N_;
    parallel_for(N_, 16, threads, [&](int64_t begin, int64_t end) {
      exact_rows(features_.data(), d, N_, begin, end, x, sums_.data(), width);
    });
  }

  std::vector<T> features_;
  int64_t w_, N_, width_ = 0;
  bool adjoint_ = false;
  Diagonals<T> diagonals_;
  std::vector<T> sums_, scaled_;
};

}  // namespace

template <typename T>
std::unique_ptr<Term<T>> lattice_term(const std::vector<float>& features, Size size, Normalization normalization,
                                      int threads) {
  return std::make_unique<LatticeTerm<T>>(features, size, normalization, threads);
}

template <typename T>
std::unique_ptr<Term<T>> spatial_term(const double* sigma, double cut, Size size, Normalization normalization) {
  return std::make_unique<SpatialTerm<T>>(sigma, cut, size, normalization);
}

template <typename T>
std::unique_ptr<Term<T>> exact_term(std::vector<T> features, Size size, Normalization normalization, int threads) {
  return std::make_unique<ExactTerm<T>>(std::move(features), size, normalization, threads);
}

template std::unique_ptr<Term<float>> lattice_term(const std::vector<float>&, Size, Normalization, int);
template std::unique_ptr<Term<double>> lattice_term(const std::vector<float>&, Size, Normalization, int);
template std::unique_ptr<Term<float>> spatial_term(const double*, double, Size, Normalization);
template std::unique_ptr<Term<double>> spatial_term(const double*, double, Size, Normalization);
template std::unique_ptr<Term<float>> exact_term(std::vector<float>, Size, Normalization, int);
template std::unique_ptr<Term<double>> exact_term(std::vector<double>, Size, Normalization, int);

}  // namespace fastcam
