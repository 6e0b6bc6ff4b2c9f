// Mean field of the fully connected CRF (Krähenbühl and Koltun 2011, 2013): Q <- softmax(-U - sum_k mu_k(K_k Q)).
// Values lie in rows, one a pixel, the labels innermost and padded to row_width(K); padding has energy -inf, hence Q =
// 0.
#include <algorithm>
#include <array>
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

constexpr int64_t TILE = 64;  // pixels that are updated together
constexpr int64_t FEW = 4;    // up to this many labels, vectors run over the pixels of a tile, else over the labels
constexpr double CUT = 4e-5;  // kernel FAST leaves out spatial weights below this: 4.5 standard deviations

enum Kernel { FAST, LATTICE, EXACT };

// What a term adds to the energies of a tile: compat times messages. Of two labels, one number is filtered: how far the
// first's probability lies above 1/2. So messages are half of K 1 and this more for the first and this less for the
// other. Where both have the same compat, half of K 1 changes nothing and is left out (`halves` is 0).
// compat of few labels: (K) or (K, K); of many, padded to row_width(K).
template <typename T>
struct Message {
  const T *rows, *halves, *compat;
  bool matrix;
};

// How many problems of K labels on one image are solved together: two of two labels are rows of two numbers, which cost
// splat, blur and slice little more than one.
inline int64_t together(int64_t K, int64_t problems) { return K == 2 && problems >= 2 ? 2 : 1; }

// negative, q: (K, TILE); the messages of a pixel lie WIDTH apart. False where a pixel has no distribution.
template <int K, int WIDTH, typename T>
FASTCAM_INLINE bool update_few(const T* negative, const Message<T>* terms, int64_t count, T* q) {
  T energy[K][TILE], sum[TILE];
  std::copy_n(negative, K * TILE, &energy[0][0]);
  for (int64_t t = 0; t < count; ++t) {
    T m[K][TILE];
    const Message<T>& term = terms[t];
    for (int k = 0; k < (K == 2 ? 1 : K); ++k)
      for (int64_t i = 0; i < TILE; ++i) m[k][i] = term.rows[i * WIDTH + k];
    if constexpr (K == 2)
      for (int64_t i = 0; i < TILE; ++i) {
        m[1][i] = term.halves[i] - m[0][i];
        m[0][i] = term.halves[i] + m[0][i];
      }
    for (int l = 0; l < K; ++l)
      for (int k = term.matrix ? 0 : l; k <= (term.matrix ? K - 1 : l); ++k) {
        const T c = term.compat[term.matrix ? l * K + k : l];
        for (int64_t i = 0; i < TILE; ++i) energy[l][i] -= c * m[k][i];
      }
  }
  for (int64_t i = 0; i < TILE; ++i) sum[i] = energy[0][i];
  for (int k = 1; k < K; ++k)
    for (int64_t i = 0; i < TILE; ++i) sum[i] = energy[k][i] > sum[i] ? energy[k][i] : sum[i];
  for (int k = 0; k < K; ++k)
    for (int64_t i = 0; i < TILE; ++i) q[k * TILE + i] = fast_exp(energy[k][i] - sum[i]);
  for (int64_t i = 0; i < TILE; ++i) sum[i] = q[i];
  for (int k = 1; k < K; ++k)
    for (int64_t i = 0; i < TILE; ++i) sum[i] += q[k * TILE + i];
  int32_t bad = 0;
  for (int64_t i = 0; i < TILE; ++i) {
    bad |= !(sum[i] > 0 && sum[i] < std::numeric_limits<T>::infinity());
    sum[i] = 1 / sum[i];
  }
  for (int k = 0; k < K; ++k)
    for (int64_t i = 0; i < TILE; ++i) q[k * TILE + i] *= sum[i];
  return bad == 0;
}

template <typename Row>
struct RowMaximum {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const T* rows, T* result, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      Maximum::combine(result[i], Row::load(rows + i * width + c).template reduce<Maximum>());
    }
  }
};

template <typename Row>
struct RowSum {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const T* rows, T* result, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) result[i] += Row::load(rows + i * width + c).template reduce<Sum>();
  }
};

template <typename Row>
struct ShiftedRows {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, T* rows, const T* less, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) (Row::load(rows + i * width + c) + -less[i]).store(rows + i * width + c);
  }
};

template <typename Row>
struct AddProducts {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const T* rows, const T* factors, T sign, const T* base, T* to,
                                 int64_t count, int64_t width) {
    const Row own = Row::load(factors + c) * sign;
    for (int64_t i = 0; i < count; ++i)
      (Row::load(base + i * width + c) + Row::load(rows + i * width + c) * own).store(to + i * width + c);
  }
};

template <typename Row>
struct AddMatrixProducts {
  typedef typename Row::Number T;
  static FASTCAM_INLINE void run(int64_t c, const T* rows, const T* matrix, T sign, const T* base, T* to, int64_t count,
                                 int64_t K, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      Row sum = Row::load(base + i * width + c);
      for (int64_t l = 0; l < K; ++l) sum = sum + Row::load(matrix + l * width + c) * (sign * rows[i * width + l]);
      sum.store(to + i * width + c);
    }
  }
};

// to = base + sign * mu(from) for rows of width row_width(K); compat (width) or, as a matrix, (K, width), symmetric.
template <typename T>
FASTCAM_INLINE void add_compatible(const T* from, const T* compat, bool matrix, T sign, const T* base, T* to,
                                   int64_t count, int64_t K) {
  const int64_t width = row_width(K);
  if (matrix) {
    each_piece<AddMatrixProducts, T>(width, from, compat, sign, base, to, count, K, width);
  } else {
    each_piece<AddProducts, T>(width, from, compat, sign, base, to, count, width);
  }
}

// Rows of negative energies -> softmax, in place. `work` has room for `count` numbers. False where a row has no
// distribution.
template <typename T>
FASTCAM_INLINE bool softmax(T* rows, T* work, int64_t count, int64_t width) {
  std::fill(work, work + count, -std::numeric_limits<T>::infinity());
  each_piece<RowMaximum, T>(width, static_cast<const T*>(rows), work, count, width);
  each_piece<ShiftedRows, T>(width, rows, static_cast<const T*>(work), count, width);
  for (int64_t i = 0; i < count * width; ++i) rows[i] = fast_exp(rows[i]);
  std::fill(work, work + count, T(0));
  each_piece<RowSum, T>(width, static_cast<const T*>(rows), work, count, width);
  bool good = true;
  for (int64_t i = 0; i < count; ++i) {
    good &= work[i] > 0 && work[i] < std::numeric_limits<T>::infinity();
    work[i] = 1 / work[i];
  }
  each_piece<ScaledRows, T>(width, static_cast<const T*>(rows), static_cast<const T*>(work), rows, count, width);
  return good;
}

// The same as update_few for any number of labels. negative, q: rows (count, row_width(K)).
template <typename T>
FASTCAM_INLINE bool update_many(const T* negative, const Message<T>* terms, int64_t terms_count, T* q, int64_t count,
                                int64_t K) {
  T work[TILE];
  if (terms_count == 0) std::copy_n(negative, count * row_width(K), q);
  for (int64_t t = 0; t < terms_count; ++t)
    add_compatible(terms[t].rows, terms[t].compat, terms[t].matrix, T(-1), t == 0 ? negative : q, q, count, K);
  return softmax(q, work, count, row_width(K));
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
  FASTCAM_MULTIVERSION bool update_tile(const T* negative, const Message<T>* terms, int64_t terms_count, T* q, \
                                        int64_t count, int64_t K, int64_t problems) {                          \
    if (K == 1) return update_few<1, 1>(negative, terms, 0, q);                                                \
    if (K == 2 && problems == 1) return update_few<2, 1>(negative, terms, terms_count, q);                     \
    if (K == 2) return update_few<2, 2>(negative, terms, terms_count, q);                                      \
    if (K == 3) return update_few<3, 4>(negative, terms, terms_count, q);                                      \
    if (K == 4) return update_few<4, 4>(negative, terms, terms_count, q);                                      \
    return update_many(negative, terms, terms_count, q, count, K);                                             \
  }                                                                                                            \
  FASTCAM_MULTIVERSION void compatible_rows(const T* g, const T* compat, bool matrix, T* to, int64_t count,    \
                                            int64_t K) {                                                       \
    add_compatible(g, compat, matrix, T(1), static_cast<const T*>(to), to, count, K);                          \
  }                                                                                                            \
  FASTCAM_MULTIVERSION void gradient_rows(const T* q, T* g, int64_t count, int64_t width) {                    \
    softmax_gradient(q, g, count, width);                                                                      \
  }
FASTCAM_CRF_LOOPS(float)
FASTCAM_CRF_LOOPS(double)
#undef FASTCAM_CRF_LOOPS

// (x / sx, y / sy) and, with sigmas for them, the channels of image (3, H, W) over theirs, of the pixels in `size`.
template <typename F, typename T>
Memory<F> features_of(const T* image, const double* sigma, int64_t d, Size size, int64_t H, int64_t W, int threads) {
  const int64_t N = size.h * size.w;
  Memory<F> features = buffer<F>(d * N);
  parallel_for(size.h, 64, threads, [&](int64_t first, int64_t last) {
    for (int64_t y = first; y < last; ++y) {
      F* to = features.get() + y * size.w;
      for (int32_t x = 0; x < static_cast<int32_t>(size.w); ++x) to[x] = static_cast<F>(x) / static_cast<F>(sigma[0]);
      std::fill_n(to + N, size.w, static_cast<F>(y) / static_cast<F>(sigma[1]));
      for (int64_t c = 2; c < d; ++c) {
        const T* from = image + ((c - 2) * H + y) * W;
        const F scale = static_cast<F>(sigma[c]);
        for (int64_t x = 0; x < size.w; ++x) to[c * N + x] = static_cast<F>(from[x]) / scale;
      }
    }
  });
  return features;
}

// The terms of one image, and problems (energies) on them, one or, where together() says so, two at a time.
template <typename T>
class MeanField {
 public:
  MeanField(int64_t K, Size size, int64_t H, int64_t W, int threads)
      : K_(K), width_(row_width(K)), N_(size.h * size.w), size_(size), H_(H), W_(W), threads_(threads) {}

  // How many numbers a problem takes, a row of labels for every pixel; so many that all of a tile's may be touched.
  int64_t room() const { return (N_ + TILE - 1) / TILE * TILE * width_; }

  // compat (K) or, as a matrix, (K, K).
  void add(std::unique_ptr<Term<T>> term, const T* compat, bool matrix) {
    const int64_t width = K_ <= FEW ? K_ : width_;
    std::vector<T> padded(matrix ? K_ * width : width, T(0)), rows(matrix ? K_ * width_ : width_, T(0));
    for (int64_t l = 0; l < (matrix ? K_ : 1); ++l) {
      std::copy_n(compat + l * K_, K_, padded.data() + l * width);
      std::copy_n(compat + l * K_, K_, rows.data() + l * width_);
    }
    std::vector<T> halves;
    if (K_ == 2 && (matrix || compat[0] != compat[1])) {
      halves = term->ones(threads_);
      for (T& half : halves) half /= 2;
    }
    terms_.push_back({std::move(term), std::move(padded), std::move(rows), std::move(halves), matrix});
  }

  // Takes energies (problems, K, H, W). Those of padding, of pixels and labels, are 0 and infinite.
  void set_unary(const T* unary, int64_t problems) {
    problems_ = problems;
    negative_ = buffer<T>(problems * room(), K_ <= FEW ? T(0) : -std::numeric_limits<T>::infinity());
    each_tile([&](int64_t begin, int64_t end, Work&) {
      for (int64_t p = 0; p < problems; ++p)
        for (int64_t k = 0; k < K_; ++k)
          each_row(begin, end, [&](int64_t i, int64_t plane, int64_t n) {
            const T* from = unary + (p * K_ + k) * H_ * W_ + plane;
            if (K_ <= FEW) {
              T* to = negative(p, begin) + k * TILE + i - begin;
              for (int64_t x = 0; x < n; ++x) to[x] = -from[x];
            } else {
              for (int64_t x = 0; x < n; ++x) negative_[(i + x) * width_ + k] = -from[x];
            }
          });
    });
  }

  // One update, the first of all (softmax of -U) if `first`. The result goes to out (problems, K, H, W) and, of a
  // single problem, rows (N, width), each unless null; to the terms unless `last`.
  void update(bool first, bool last, T* out, T* rows) {
    const int64_t inner = K_ == 2 ? problems_ : row_width(K_);
    if (!last)
      for (Pairwise& p : terms_) p.term->start(inner, false, threads_);
    each_tile([&](int64_t begin, int64_t end, Work& work) {
      const int64_t count = end - begin;
      Message<T> messages[MAX_TERMS];
      for (size_t t = 0; t < terms_.size() && !first; ++t) {
        const Pairwise& p = terms_[t];
        std::vector<T>& m = work.messages[t];
        m.resize(TILE * inner);
        p.term->messages(begin, end, m.data(), work.scratch[t]);
        if (!p.halves.empty()) std::copy_n(p.halves.data() + begin, count, work.halves[t].data());
        messages[t] = {m.data(), work.halves[t].data(), p.compat.data(), p.matrix};
      }
      work.q.resize(TILE * width_);
      T* q = work.q.data();
      for (int64_t p = 0; p < problems_; ++p) {
        for (size_t t = 0; t < terms_.size() && !first; ++t) messages[t].rows = work.messages[t].data() + p;
        if (!update_tile(negative(p, begin), messages, first ? 0 : terms_.size(), q, count, K_, problems_))
          throw std::invalid_argument(
              "crf_mean_field: expected unary without NaN and -inf, with a finite energy at every pixel, and messages "
              "that do not overflow");
        const int64_t along = K_ <= FEW ? 1 : width_,
                      across = K_ <= FEW ? TILE : 1;  // from pixel to pixel, label to label
        if (out)
          for (int64_t k = 0; k < K_; ++k)
            each_row(begin, end, [&](int64_t i, int64_t plane, int64_t n) {
              const T* from = q + (i - begin) * along + k * across;
              for (int64_t x = 0; x < n; ++x) out[(p * K_ + k) * H_ * W_ + plane + x] = from[x * along];
            });
        if (rows)
          for (int64_t i = 0; i < count; ++i)
            for (int64_t k = 0; k < width_; ++k)
              rows[(begin + i) * width_ + k] = k < K_ ? q[i * along + k * across] : T(0);
        if (K_ == 2)
          for (int64_t i = 0; i < TILE; ++i) work.rows[i * problems_ + p] = (q[i] - q[TILE + i]) / 2;
        if (K_ > 2 && K_ <= FEW)  // rows of FEW numbers
          for (int64_t i = 0; i < TILE; ++i)
            for (int64_t k = 0; k < FEW; ++k) work.rows[i * FEW + k] = k < K_ ? q[k * TILE + i] : T(0);
      }
      if (!last)
        for (Pairwise& p : terms_) p.term->feed(begin, end, K_ <= FEW ? work.rows.data() : q);
    });
    if (!last)
      for (Pairwise& p : terms_) p.term->finish(threads_);
  }

  // Planes (K, H, W) -> rows (N, width), 0 behind the labels.
  void load(const T* planes, T* rows) const {
    each_tile([&](int64_t begin, int64_t end, Work&) {
      for (int64_t k = 0; k < width_; ++k)
        each_row(begin, end, [&](int64_t i, int64_t plane, int64_t n) {
          for (int64_t x = 0; x < n; ++x) rows[(i + x) * width_ + k] = k < K_ ? planes[k * H_ * W_ + plane + x] : T(0);
        });
    });
  }

  void store(const T* rows, T* planes) const {
    each_tile([&](int64_t begin, int64_t end, Work&) {
      for (int64_t k = 0; k < K_; ++k)
        each_row(begin, end, [&](int64_t i, int64_t plane, int64_t n) {
          for (int64_t x = 0; x < n; ++x) planes[k * H_ * W_ + plane + x] = rows[(i + x) * width_ + k];
        });
    });
  }

  // g, the gradient of q = update(before) -> the gradient of the energies there, added to `total`; that of the
  // compatibilities, added to compat_grad (null where not wanted) of each term, (K) or (K, K); and on to the gradient
  // of `before`, unless that is null. All are rows (N, width); `scratch` has room().
  void backward(const T* q, const T* before, T* g, T* total, T* scratch, double* const* compat_grad) {
    each_tile([&](int64_t begin, int64_t end, Work&) {
      gradient_rows(q + begin * width_, g + begin * width_, end - begin, width_);
      for (int64_t i = begin * width_; i < end * width_; ++i) total[i] += g[i];
    });
    if (!before) return;
    for (size_t t = 0; t < terms_.size(); ++t)
      if (compat_grad[t]) add_compat_grad(terms_[t], before, g, compat_grad[t]);
    for (Pairwise& p : terms_) {
      p.term->start(width_, true, threads_);
      each_tile([&](int64_t begin, int64_t end, Work&) {
        T* to = scratch + begin * width_;
        std::fill_n(to, (end - begin) * width_, T(0));
        compatible_rows(g + begin * width_, p.rows.data(), p.matrix, to, end - begin, K_);
        p.term->feed(begin, end, to);
      });
      p.term->finish(threads_);
    }
    each_tile([&](int64_t begin, int64_t end, Work& work) {
      const int64_t n = (end - begin) * width_;
      T* to = g + begin * width_;
      std::fill_n(to, n, T(0));
      work.q.resize(TILE * width_);
      for (size_t t = 0; t < terms_.size(); ++t) {
        terms_[t].term->messages(begin, end, work.q.data(), work.scratch[t]);
        for (int64_t i = 0; i < n; ++i) to[i] += work.q[i];
      }
    });
  }

 private:
  static constexpr int MAX_TERMS = 2;

  struct Pairwise {
    std::unique_ptr<Term<T>> term;
    std::vector<T> compat;  // as Message takes it
    std::vector<T> rows;    // padded to width_
    std::vector<T> halves;  // as Message takes them, of all pixels; empty for 0
    bool matrix;
  };

  struct Work {
    std::vector<T> q, messages[MAX_TERMS];
    std::array<T, TILE> halves[MAX_TERMS] = {};
    std::array<T, FEW * TILE> rows = {};
    Scratch<T> scratch[MAX_TERMS];
  };

  // Of a problem, from pixel `begin` on, where a tile begins.
  T* negative(int64_t problem, int64_t begin) const {
    return negative_.get() + problem * room() + begin * (K_ <= FEW ? K_ : width_);
  }

  // f(begin, end, work) for all tiles. Bands of the lattice are parts; `work` is one part's.
  template <typename F>
  void each_tile(const F& f) const {
    constexpr int64_t BAND = Lattice::BAND;
    parallel_for((N_ + BAND - 1) / BAND, 1, threads_, [&](int64_t first, int64_t last) {
      Work work;
      for (int64_t i = first * BAND; i < std::min(N_, last * BAND); i += TILE) f(i, std::min(N_, i + TILE), work);
    });
  }

  // f(first pixel, its place in a plane (H, W), how many) for the parts of the pixels [begin, end) that lie together in
  // a plane.
  template <typename F>
  void each_row(int64_t begin, int64_t end, const F& f) const {
    if (size_.w == W_) return f(begin, begin, end - begin);
    while (begin < end) {
      const int64_t x = begin % size_.w, n = std::min(end - begin, size_.w - x);
      f(begin, begin / size_.w * W_ + x, n);
      begin += n;
    }
  }

  // grad += sum over the pixels of g (K q)^T, or its diagonal.
  void add_compat_grad(Pairwise& p, const T* q, const T* g, double* grad) {
    const int64_t numbers = p.matrix ? K_ * K_ : K_;
    p.term->start(width_, false, threads_);
    each_tile([&](int64_t begin, int64_t end, Work&) { p.term->feed(begin, end, q + begin * width_); });
    p.term->finish(threads_);
    std::vector<double> of_band((N_ + Lattice::BAND - 1) / Lattice::BAND * numbers, 0.0);
    each_tile([&](int64_t begin, int64_t end, Work& work) {
      double* sum = of_band.data() + begin / Lattice::BAND * numbers;
      work.q.resize(TILE * width_);
      p.term->messages(begin, end, work.q.data(), work.scratch[0]);
      for (int64_t i = 0; i < end - begin; ++i) {
        const T *m = work.q.data() + i * width_, *own = g + (begin + i) * width_;
        for (int64_t l = 0; l < K_; ++l)
          for (int64_t k = p.matrix ? 0 : l; k <= (p.matrix ? K_ - 1 : l); ++k)
            sum[p.matrix ? l * K_ + k : l] += static_cast<double>(own[l]) * static_cast<double>(m[k]);
      }
    });
    for (size_t i = 0; i < of_band.size(); ++i) grad[i % numbers] += of_band[i];
  }

  int64_t K_, width_, N_, problems_ = 1;
  Size size_;
  int64_t H_, W_;
  int threads_;
  Memory<T> negative_;  // -U: few labels (problems, tiles, K, TILE), many (N, width_)
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
  int64_t G, K, H, W, iterations;
  Normalization normalization;
  Kernel kernel;

  Size size(int64_t b) const { return {sizes[2 * b], sizes[2 * b + 1]}; }
  int64_t planes() const { return K * H * W; }

  MeanField<T> field(int64_t b, int threads) const {
    const Size s = size(b);
    MeanField<T> field(K, s, H, W, threads);
    if (gaussian && K > 1) {
      if (kernel == LATTICE) {
        const Memory<float> features = features_of<float>(image, sigma, 2, s, H, W, threads);
        field.add(lattice_term<T>(features.get(), 2, s, normalization, K <= FEW, threads), gaussian, gaussian_matrix);
      } else {
        field.add(spatial_term<T>(sigma, kernel == FAST ? CUT : 0.0, s, normalization), gaussian, gaussian_matrix);
      }
    }
    if (bilateral && K > 1) {
      const T* rgb = image + b * 3 * H * W;
      if (kernel == EXACT) {
        field.add(exact_term<T>(features_of<T>(rgb, sigma + 2, 5, s, H, W, threads), 5, s, normalization, threads),
                  bilateral, bilateral_matrix);
      } else {
        const Memory<float> features = features_of<float>(rgb, sigma + 2, 5, s, H, W, threads);
        field.add(lattice_term<T>(features.get(), 5, s, normalization, K <= FEW, threads), bilateral, bilateral_matrix);
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
  if (!std::all_of(s.sizes, s.sizes + 2 * B, [&](int64_t n) { return n == s.H || n == s.W; }))
    std::fill_n(out, B * s.G * s.planes(), T(0));
  each_image(B, threads, s.sizes, [&](int64_t b, int own) {
    MeanField<T> field = s.field(b, own);
    for (int64_t g = 0, count; g < s.G; g += count) {
      const int64_t p = b * s.G + g;
      count = together(s.K, s.G - g);
      field.set_unary(s.unary + p * s.planes(), count);
      for (int64_t i = 0; i <= s.iterations; ++i) {
        const bool last = i == s.iterations;
        field.update(i == 0, last, last ? out + p * s.planes() : nullptr, nullptr);
      }
    }
  });
}

template <typename T>
void backward(const Shared<T>& s, const T* grad, T* out, double* gaussian_grad, double* bilateral_grad, int64_t B,
              int threads) {
  std::fill_n(out, B * s.G * s.planes(), T(0));
  const int64_t numbers = s.K * s.K;
  std::vector<double> compat_grad(B * 2 * numbers, 0.0);
  each_image(B, threads, s.sizes, [&](int64_t b, int own) {
    MeanField<T> field = s.field(b, own);
    const int64_t room = field.room();
    std::vector<double*> terms;
    if (s.gaussian) terms.push_back(gaussian_grad ? &compat_grad[2 * b * numbers] : nullptr);
    if (s.bilateral) terms.push_back(bilateral_grad ? &compat_grad[(2 * b + 1) * numbers] : nullptr);
    std::vector<Memory<T>> q;
    for (int64_t i = 0; i <= s.iterations; ++i) q.push_back(buffer<T>(room));
    std::vector<T> g(room), scratch(room);
    for (int64_t p = b * s.G; p < (b + 1) * s.G; ++p) {
      field.set_unary(s.unary + p * s.planes(), 1);
      for (int64_t i = 0; i <= s.iterations; ++i) field.update(i == 0, i == s.iterations, nullptr, q[i].get());
      std::vector<T> total(room, T(0));
      field.load(grad + p * s.planes(), g.data());
      for (int64_t i = s.iterations; i >= 0; --i)
        field.backward(q[i].get(), i > 0 ? q[i - 1].get() : nullptr, g.data(), total.data(), scratch.data(),
                       terms.data());
      field.store(total.data(), out + p * s.planes());
    }
  });
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < numbers; ++i) {
      if (gaussian_grad && (s.gaussian_matrix || i < s.K)) gaussian_grad[i] += compat_grad[2 * b * numbers + i];
      if (bilateral_grad && (s.bilateral_matrix || i < s.K))
        bilateral_grad[i] += compat_grad[(2 * b + 1) * numbers + i];
    }
}

template <typename T>
Shared<T> shared(const void* unary, const void* image, const int64_t* sizes, const void* gaussian,
                 const void* bilateral, bool gaussian_matrix, bool bilateral_matrix, const double* sigma, int64_t G,
                 int64_t K, int64_t H, int64_t W, int64_t iterations, int normalization, int kernel) {
  return {static_cast<const T*>(unary),
          static_cast<const T*>(image),
          sizes,
          static_cast<const T*>(gaussian),
          static_cast<const T*>(bilateral),
          gaussian_matrix,
          bilateral_matrix,
          sigma,
          G,
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
                        void* out, bool f64, int64_t B, int64_t G, int64_t K, int64_t H, int64_t W, int64_t iterations,
                        int normalization, int kernel, int threads) {
  if (f64) {
    forward(shared<double>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, G, K, H,
                           W, iterations, normalization, kernel),
            static_cast<double*>(out), B, threads);
  } else {
    forward(shared<float>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, G, K, H,
                          W, iterations, normalization, kernel),
            static_cast<float*>(out), B, threads);
  }
}

void crf_mean_field_bwd(const void* grad, const void* unary, const void* image, const int64_t* sizes,
                        const void* gaussian, const void* bilateral, bool gaussian_matrix, bool bilateral_matrix,
                        const double* sigma, void* out, double* gaussian_grad, double* bilateral_grad, bool f64,
                        int64_t B, int64_t G, int64_t K, int64_t H, int64_t W, int64_t iterations, int normalization,
                        int kernel, int threads) {
  if (f64) {
    backward(shared<double>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, G, K, H,
                            W, iterations, normalization, kernel),
             static_cast<const double*>(grad), static_cast<double*>(out), gaussian_grad, bilateral_grad, B, threads);
  } else {
    backward(shared<float>(unary, image, sizes, gaussian, bilateral, gaussian_matrix, bilateral_matrix, sigma, G, K, H,
                           W, iterations, normalization, kernel),
             static_cast<const float*>(grad), static_cast<float*>(out), gaussian_grad, bilateral_grad, B, threads);
  }
}

}  // namespace fastcam
