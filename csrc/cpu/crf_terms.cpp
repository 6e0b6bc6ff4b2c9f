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

// out[c] = sum_t taps[t] * (row[c - t stride] + row[c + t stride]) for blocks of W R columns from c on; where they end.
template <typename T, int W, int R>
FASTCAM_INLINE int64_t symmetric_taps(const T* taps, int64_t radius, const T* row, int64_t stride, T* out, int64_t c,
                                      int64_t n) {
  for (; c + W * R <= n; c += W * R) {
    typename Lanes<T, W>::type sum[R] = {};
    for (int64_t t = 0; t <= radius; ++t)
      for (int r = 0; r < R; ++r)
        sum[r] += taps[t] * (lanes<T, W>(row + c + r * W - t * stride) + lanes<T, W>(row + c + r * W + t * stride));
    for (int r = 0; r < R; ++r) lanes<T, W>(out + c + r * W) = sum[r];
  }
  return c;
}

template <typename T>
FASTCAM_INLINE void filter(const T* taps, int64_t radius, const T* row, int64_t stride, T* out, int64_t n) {
  int64_t c = symmetric_taps<T, 16, 4>(taps, radius, row, stride, out, 0, n);
  c = symmetric_taps<T, 16, 1>(taps, radius, row, stride, out, c, n);
  symmetric_taps<T, 1, 1>(taps, radius, row, stride, out, c, n);
}

template <typename Row>
struct WeightedSum {  // out[c] += sum_j weight[j] * rows[j][c]
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const T* weight, const T* rows, T* out, int64_t count, int64_t width) {
    Row sum = Row::load(out + c);
    for (int64_t j = 0; j < count; ++j) sum = sum + Row::load(rows + j * width + c) * weight[j];
    sum.store(out + c);
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
    each_piece<WeightedSum, T>(width, static_cast<const T*>(weight), x + begin * width, out, count, width);
  }
}

#define FASTCAM_TERM_LOOPS(T)                                                                                  \
  FASTCAM_MULTIVERSION void filter_row(const T* taps, int64_t radius, const T* row, int64_t stride, T* out,    \
                                       int64_t n) {                                                            \
    filter(taps, radius, row, stride, out, n);                                                                 \
  }                                                                                                            \
  FASTCAM_MULTIVERSION void scaled_rows(const T* rows, const T* scale, T* out, int64_t count, int64_t width) { \
    if (width > 1) return each_piece<ScaledRows, T>(width, rows, scale, out, count, width);                    \
    for (int64_t i = 0; i < count; ++i) out[i] = scale[i] * rows[i];                                           \
  }                                                                                                            \
  FASTCAM_MULTIVERSION void exact_rows(const T* features, int64_t d, int64_t N, int64_t begin, int64_t end,    \
                                       const T* x, T* out, int64_t width) {                                    \
    for (int64_t i = begin; i < end; ++i) exact_row(features, d, N, i, x, out + i * width, width);             \
  }
FASTCAM_TERM_LOOPS(float)
FASTCAM_TERM_LOOPS(double)
#undef FASTCAM_TERM_LOOPS

// What stands before and after the raw kernel, from the raw kernel of ones.
template <typename T>
struct Diagonals {
  std::vector<T> before, after;

  explicit Diagonals(int64_t n) : before(n, T(1)), after(n, T(1)) {}
  Diagonals(const std::vector<T>& norm, Normalization normalization) : Diagonals(norm.size()) {
    for (size_t i = 0; i < norm.size(); ++i) {
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
  LatticeTerm(const float* features, int64_t d, Size size, Normalization normalization, bool few, int threads)
      : lattice_(features, d, size.h * size.w, few, threads), diagonals_(lattice_.points()) {
    diagonals_ = Diagonals<T>(ones(threads), normalization);
  }

  void start(int64_t width, bool adjoint, int threads) override {
    const int64_t room = lattice_.rows() * width;
    if (room != room_) {  // also for less: the rows of absent neighbours must be 0
      sums_ = buffer<T>(room);
      blurred_ = buffer<T>(room, T(0));
      room_ = room;
    }
    width_ = width;
    adjoint_ = adjoint;
    parallel_for(room, 1 << 16, threads,
                 [&](int64_t begin, int64_t end) { std::fill(sums_.get() + begin, sums_.get() + end, T(0)); });
  }

  void feed(int64_t begin, int64_t end, const T* q) override {
    lattice_.splat(begin, end, q, (adjoint_ ? diagonals_.after : diagonals_.before).data(), sums_.get(), width_);
  }

  void finish(int threads) override {
    if (lattice_.blur(sums_.get(), blurred_.get(), width_, adjoint_, threads) == sums_.get())
      std::swap(sums_, blurred_);
  }

  void messages(int64_t begin, int64_t end, T* out, Scratch<T>&) const override {
    lattice_.slice(blurred_.get(), begin, end, (adjoint_ ? diagonals_.before : diagonals_.after).data(), out, width_);
  }

  std::vector<T> ones(int threads) override {
    const int64_t N = lattice_.points(), bands = (N + Lattice::BAND - 1) / Lattice::BAND;
    std::vector<T> sums(N);
    const auto each_band = [&](const auto& f) {
      parallel_for(bands, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t band = first; band < last; ++band)
          f(band * Lattice::BAND, std::min(N, (band + 1) * Lattice::BAND));
      });
    };
    start(1, false, threads);
    each_band([&](int64_t begin, int64_t end) {
      std::fill(sums.begin() + begin, sums.begin() + end, T(1));
      feed(begin, end, sums.data() + begin);
    });
    finish(threads);
    each_band([&](int64_t begin, int64_t end) {
      Scratch<T> scratch;
      messages(begin, end, sums.data() + begin, scratch);
    });
    return sums;
  }

 private:
  Lattice lattice_;
  Diagonals<T> diagonals_;
  int64_t width_ = 0, room_ = 0;
  bool adjoint_ = false;
  Memory<T> sums_, blurred_;  // what is fed, and what messages come from
};

// exp(-x^2 / 2 sx^2 - y^2 / 2 sy^2), along columns when an image row is first asked for, then along that row. What is
// fed lies between rows of zeros, and a row between zeros, so that borders are like all else.
template <typename T>
class SpatialTerm : public Term<T> {
 public:
  SpatialTerm(const double* sigma, double cut, Size size, Normalization normalization)
      : size_(size),
        taps_x_(taps(sigma[0], cut, size.w)),
        taps_y_(taps(sigma[1], cut, size.h)),
        diagonals_(size.h * size.w) {
    const std::vector<T> x = sums_of(taps_x_, size.w), y = sums_of(taps_y_, size.h);
    std::vector<T> norm(size.h * size.w);
    for (int64_t i = 0; i < size.h; ++i)
      for (int64_t j = 0; j < size.w; ++j) norm[i * size.w + j] = y[i] * x[j];
    diagonals_ = Diagonals<T>(norm, normalization);
  }

  void start(int64_t width, bool adjoint, int) override {
    const int64_t room = (size_.h + 2 * radius_y()) * size_.w * width;
    Fed& fed = fed_[1];
    if (room != fed.room) fed.rows = buffer<T>(room, T(0));
    fed.room = room;
    fed.width = width;
    fed.adjoint = adjoint;
  }

  void feed(int64_t begin, int64_t end, const T* q) override {
    const Fed& fed = fed_[1];
    scaled_rows(q, (fed.adjoint ? diagonals_.after : diagonals_.before).data() + begin,
                fed.rows.get() + (radius_y() * size_.w + begin) * fed.width, end - begin, fed.width);
  }

  void finish(int) override { std::swap(fed_[0], fed_[1]); }

  void messages(int64_t begin, int64_t end, T* out, Scratch<T>& scratch) const override {
    const Fed& fed = fed_[0];
    const int64_t width = fed.width, margin = radius_x() * width, stride = size_.w * width + 2 * margin;
    const T* scale = (fed.adjoint ? diagonals_.before : diagonals_.after).data();
    scratch.rows.resize(ROWS * stride);
    while (begin < end) {
      const int64_t y = begin / size_.w, x = begin % size_.w, count = std::min(end - begin, size_.w - x);
      if (y / ROWS != scratch.y / ROWS || scratch.y < 0) {
        scratch.y = y / ROWS * ROWS;
        filter_columns(fed.rows.get(), width, scratch);
      }
      const T* row = scratch.rows.data() + (y - scratch.y) * stride + margin + x * width;
      filter_row(taps_x_.data(), radius_x(), row, width, out, count * width);
      scaled_rows(out, scale + begin, out, count, width);
      begin += count;
      out += count * width;
    }
  }

  std::vector<T> ones(int) override {
    const int64_t N = size_.h * size_.w;
    std::vector<T> sums(N, T(1));
    Scratch<T> scratch;
    start(1, false, 1);
    feed(0, N, sums.data());
    finish(1);
    messages(0, N, sums.data(), scratch);
    return sums;
  }

 private:
  static constexpr int64_t ROWS = 4, COLUMNS = 512;

  struct Fed {
    Memory<T> rows;
    int64_t room = 0, width = 0;
    bool adjoint = false;
  };

  // Weights of 0, 1, ... steps; half of the first, which is added twice.
  static std::vector<T> taps(double sigma, double cut, int64_t n) {
    std::vector<T> weights;
    for (int64_t i = 0; i < n; ++i) {
      const double weight = std::exp(-0.5 * (i / sigma) * (i / sigma));
      if (weight < cut) break;
      weights.push_back(static_cast<T>(i == 0 ? 0.5 : weight));
    }
    return weights;
  }

  // The weights of all n places around each of them.
  static std::vector<T> sums_of(const std::vector<T>& taps, int64_t n) {
    std::vector<T> sums(n, T(0));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < static_cast<int64_t>(taps.size()); ++t)
        sums[i] += taps[t] * T((i - t >= 0) + (i + t < n));
    return sums;
  }

  // The rows of `scratch`, a few columns at a time, so that what they need stays in L1.
  void filter_columns(const T* fed, int64_t width, Scratch<T>& scratch) const {
    const int64_t n = size_.w * width, margin = radius_x() * width;
    for (int64_t c = 0; c < n; c += COLUMNS)
      for (int64_t y = scratch.y; y < std::min(scratch.y + ROWS, size_.h); ++y)
        filter_row(taps_y_.data(), radius_y(), fed + (y + radius_y()) * n + c, n,
                   scratch.rows.data() + (y - scratch.y) * (n + 2 * margin) + margin + c, std::min(COLUMNS, n - c));
  }

  int64_t radius_x() const { return taps_x_.size() - 1; }
  int64_t radius_y() const { return taps_y_.size() - 1; }

  Size size_;
  std::vector<T> taps_x_, taps_y_;
  Diagonals<T> diagonals_;
  Fed fed_[2];  // what messages come from, and what is fed
};

// True Gaussian sums over all pairs of points, streaming.
template <typename T>
class ExactTerm : public Term<T> {
 public:
  ExactTerm(Memory<T> features, int64_t d, Size size, Normalization normalization, int threads)
      : features_(std::move(features)), d_(d), N_(size.h * size.w), diagonals_(N_) {
    diagonals_ = Diagonals<T>(ones(threads), normalization);
  }

  void start(int64_t width, bool adjoint, int) override {
    next_width_ = width;
    adjoint_ = adjoint;
    fed_.resize(N_ * width);
  }

  void feed(int64_t begin, int64_t end, const T* q) override {
    scaled_rows(q, (adjoint_ ? diagonals_.after : diagonals_.before).data() + begin, fed_.data() + begin * next_width_,
                end - begin, next_width_);
  }

  void finish(int threads) override {
    width_ = next_width_;
    sums_.resize(N_ * width_);
    parallel_for(N_, 16, threads, [&](int64_t begin, int64_t end) {
      exact_rows(features_.get(), d_, N_, begin, end, fed_.data(), sums_.data(), width_);
    });
  }

  void messages(int64_t begin, int64_t end, T* out, Scratch<T>&) const override {
    scaled_rows(sums_.data() + begin * width_, (adjoint_ ? diagonals_.before : diagonals_.after).data() + begin, out,
                end - begin, width_);
  }

  std::vector<T> ones(int threads) override {
    std::vector<T> sums(N_, T(1));
    Scratch<T> scratch;
    start(1, false, threads);
    feed(0, N_, sums.data());
    finish(threads);
    messages(0, N_, sums.data(), scratch);
    return sums;
  }

 private:
  Memory<T> features_;
  int64_t d_, N_, next_width_ = 0, width_ = 0;
  bool adjoint_ = false;
  Diagonals<T> diagonals_;
  std::vector<T> fed_, sums_;
};

}  // namespace

template <typename T>
std::unique_ptr<Term<T>> lattice_term(const float* features, int64_t d, Size size, Normalization normalization,
                                      bool few, int threads) {
  return std::make_unique<LatticeTerm<T>>(features, d, size, normalization, few, threads);
}

template <typename T>
std::unique_ptr<Term<T>> spatial_term(const double* sigma, double cut, Size size, Normalization normalization) {
  return std::make_unique<SpatialTerm<T>>(sigma, cut, size, normalization);
}

template <typename T>
std::unique_ptr<Term<T>> exact_term(Memory<T> features, int64_t d, Size size, Normalization normalization,
                                    int threads) {
  return std::make_unique<ExactTerm<T>>(std::move(features), d, size, normalization, threads);
}

template std::unique_ptr<Term<float>> lattice_term(const float*, int64_t, Size, Normalization, bool, int);
template std::unique_ptr<Term<double>> lattice_term(const float*, int64_t, Size, Normalization, bool, int);
template std::unique_ptr<Term<float>> spatial_term(const double*, double, Size, Normalization);
template std::unique_ptr<Term<double>> spatial_term(const double*, double, Size, Normalization);
template std::unique_ptr<Term<float>> exact_term(Memory<float>, int64_t, Size, Normalization, int);
template std::unique_ptr<Term<double>> exact_term(Memory<double>, int64_t, Size, Normalization, int);

}  // namespace fastcam
