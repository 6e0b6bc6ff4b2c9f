#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/math.h"
#include "multiversion.h"

#pragma GCC optimize("fp-contract=fast")

namespace fastcam {
namespace {

template <typename T, int BYTES>
struct Register {
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t size = BYTES / sizeof(T);
  static constexpr int count = 64 / BYTES;  // registers that make up a Vector<T>
};

// One register block: R rows times N registers.
template <int BYTES, int R, int N, typename T>
FASTCAM_INLINE void panel_block(const T* a, int64_t lda, const T* b, T* c, int64_t ldc, int64_t depth) {
  using V = typename Register<T, BYTES>::type;
  constexpr int64_t W = Register<T, BYTES>::size;
  V s[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j) s[i][j] = *reinterpret_cast<const V*>(c + i * ldc + j * W);
  for (int64_t d = 0; d < depth; ++d, a += lda, b += PANEL<T>) {
    V x[N];
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j) x[j] = *reinterpret_cast<const V*>(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < N; ++j) s[i][j] += a[i] * x[j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j) *reinterpret_cast<V*>(c + i * ldc + j * W) = s[i][j];
}

// Sums over n of R rows of a times N rows of b. Every sum is Vector<T>::size partial sums, added up by halves.
template <int BYTES, int R, int N, typename T>
FASTCAM_INLINE void rows_block(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t n) {
  using V = typename Register<T, BYTES>::type;
  constexpr int64_t W = Register<T, BYTES>::size, PARTS = Vector<T>::size;
  constexpr int P = Register<T, BYTES>::count;
  V s[R][N][P];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) s[i][j][p] = V{};
  int64_t m = 0;
  for (; m + PARTS <= n; m += PARTS) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      V x[N];
#pragma GCC unroll 3
      for (int j = 0; j < N; ++j) x[j] = *reinterpret_cast<const V*>(b + j * ldb + m + p * W);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const V y = *reinterpret_cast<const V*>(a + i * lda + m + p * W);
#pragma GCC unroll 3
        for (int j = 0; j < N; ++j) s[i][j][p] += y * x[j];
      }
    }
  }
  alignas(64) T parts[R][N][PARTS];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) *reinterpret_cast<V*>(parts[i][j] + p * W) = s[i][j][p];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < N; ++j) {
      T* sums = parts[i][j];
      for (int64_t l = 0; l < n - m; ++l) sums[l] += a[i * lda + m + l] * b[j * ldb + m + l];
      if constexpr (PARTS == 16) lanes<T, 8>(sums) += lanes<T, 8>(sums + 8);
      lanes<T, 4>(sums) += lanes<T, 4>(sums + 4);
      c[i * ldc + j] += (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
}

// At most R rows of a against a panel: the register blocks side by side.
template <int BYTES, int R, int N, typename T>
FASTCAM_INLINE void panel(const T* a, int64_t lda, const T* b, T* c, int64_t ldc, int64_t height, int64_t depth) {
  if constexpr (R > 1)
    if (height < R) return panel<BYTES, R - 1, N>(a, lda, b, c, ldc, height, depth);
  for (int64_t j = 0; j < PANEL<T>; j += N * Register<T, BYTES>::size)
    panel_block<BYTES, R, N>(a, lda, b + j, c + j, ldc, depth);
}

// At most R rows of a and N rows of b.
template <int BYTES, int R, int N, typename T>
FASTCAM_INLINE void rows(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t height,
                         int64_t width, int64_t n) {
  if constexpr (R > 1)
    if (height < R) return rows<BYTES, R - 1, N>(a, lda, b, ldb, c, ldc, height, width, n);
  if constexpr (N > 1)
    if (width < N) return rows<BYTES, R, N - 1>(a, lda, b, ldb, c, ldc, height, width, n);
  rows_block<BYTES, R, N>(a, lda, b, ldb, c, ldc, n);
}

template <int BYTES, int R, int N, typename T>
FASTCAM_INLINE void all_panels(const T* a, int64_t lda, const T* b, T* c, int64_t ldc, int64_t height, int64_t depth) {
  for (int64_t i = 0; i < height; i += R)
    panel<BYTES, R, N>(a + i, lda, b, c + i * ldc, ldc, std::min<int64_t>(R, height - i), depth);
}

// R rows of a stay in the first-level cache, CHUNK numbers of each, while all of b goes by.
template <int BYTES, int R, int N, typename T>
FASTCAM_INLINE void all_rows(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t height,
                             int64_t width, int64_t n) {
  constexpr int64_t CHUNK = 4096 / sizeof(T);
  for (int64_t m = 0; m < n; m += CHUNK)
    for (int64_t i = 0; i < height; i += R)
      for (int64_t j = 0; j < width; j += N)
        rows<BYTES, R, N>(a + i * lda + m, lda, b + j * ldb + m, ldb, c + i * ldc + j, ldc,
                          std::min<int64_t>(R, height - i), std::min<int64_t>(N, width - j), std::min(CHUNK, n - m));
}

template <typename T>
FASTCAM_INLINE void pack(const T* x, int64_t stride, int64_t rows, int64_t columns, T* to, T* squares) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t d = 0; d < rows; ++d, x += stride) {
    for (int64_t n = 0; n < columns; n += LINE) __builtin_prefetch(x + DEPTH * stride + n);  // of the next call
    for (int64_t n = 0; n < columns; n += PANEL<T>) {
      T* panel = to + n * rows + d * PANEL<T>;
      if (columns - n >= PANEL<T>) {
        for (int64_t i = 0; i < PANEL<T>; ++i) panel[i] = x[n + i];
      } else {
        for (int64_t i = 0; i < PANEL<T>; ++i) panel[i] = i < columns - n ? x[n + i] : T(0);
      }
      if (squares)
        for (int64_t i = 0; i < PANEL<T>; ++i) squares[n + i] += panel[i] * panel[i];
    }
  }
}

FASTCAM_MULTIVERSION void pack_f32(const float* x, int64_t stride, int64_t rows, int64_t columns, float* to,
                                   float* squares) {
  pack(x, stride, rows, columns, to, squares);
}
FASTCAM_MULTIVERSION void pack_f64(const double* x, int64_t stride, int64_t rows, int64_t columns, double* to,
                                   double* squares) {
  pack(x, stride, rows, columns, to, squares);
}

// Both products with blocks that fit the registers of one instruction set: 24 of 32 for AVX-512, 12 of 16 elsewhere.
#define FASTCAM_GEMM(T, NAME, TARGET, BYTES, PANEL_ROWS, ROWS, COLUMNS)                                             \
  TARGET void NAME##_panel(const T* a, int64_t lda, const T* b, T* c, int64_t ldc, int64_t height, int64_t depth) { \
    all_panels<BYTES, PANEL_ROWS, 3>(a, lda, b, c, ldc, height, depth);                                             \
  }                                                                                                                 \
  TARGET void NAME##_rows(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t height,      \
                          int64_t width, int64_t n) {                                                               \
    all_rows<BYTES, ROWS, COLUMNS>(a, lda, b, ldb, c, ldc, height, width, n);                                       \
  }
FASTCAM_GEMM(float, plain, , 16, 4, 3, 1)
FASTCAM_GEMM(double, plain, , 16, 4, 3, 1)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTCAM_SANITIZE)
#define FASTCAM_GEMM_CHOICE
FASTCAM_GEMM(float, avx2, __attribute__((target("arch=x86-64-v3"))), 32, 4, 3, 2)
FASTCAM_GEMM(double, avx2, __attribute__((target("arch=x86-64-v3"))), 32, 4, 3, 2)
FASTCAM_GEMM(float, avx512, __attribute__((target("arch=x86-64-v4"))), 64, 8, 8, 3)
FASTCAM_GEMM(double, avx512, __attribute__((target("arch=x86-64-v4"))), 64, 8, 8, 3)
const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
#endif

}  // namespace

#ifdef FASTCAM_GEMM_CHOICE
#define FASTCAM_GEMM_RUN(PRODUCT, ...)                  \
  if (level == 4) return avx512_##PRODUCT(__VA_ARGS__); \
  if (level == 3) return avx2_##PRODUCT(__VA_ARGS__);   \
  plain_##PRODUCT(__VA_ARGS__)
#else
#define FASTCAM_GEMM_RUN(PRODUCT, ...) plain_##PRODUCT(__VA_ARGS__)
#endif

void pack_tile(const float* x, int64_t stride, int64_t rows, int64_t columns, float* to, float* squares) {
  pack_f32(x, stride, rows, columns, to, squares);
}
void pack_tile(const double* x, int64_t stride, int64_t rows, int64_t columns, double* to, double* squares) {
  pack_f64(x, stride, rows, columns, to, squares);
}
void multiply_panel(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t height, int64_t depth) {
  FASTCAM_GEMM_RUN(panel, a, lda, b, c, ldc, height, depth);
}
void multiply_panel(const double* a, int64_t lda, const double* b, double* c, int64_t ldc, int64_t height,
                    int64_t depth) {
  FASTCAM_GEMM_RUN(panel, a, lda, b, c, ldc, height, depth);
}
void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                   int64_t columns, int64_t n) {
  FASTCAM_GEMM_RUN(rows, a, lda, b, ldb, c, ldc, rows, columns, n);
}
void multiply_rows(const double* a, int64_t lda, const double* b, int64_t ldb, double* c, int64_t ldc, int64_t rows,
                   int64_t columns, int64_t n) {
  FASTCAM_GEMM_RUN(rows, a, lda, b, ldb, c, ldc, rows, columns, n);
}

}  // namespace fastcam
