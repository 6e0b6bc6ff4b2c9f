// Matrix products on tiles that stay in the caches: what pools, similarities and correlations of features are made of.
//
// Their sums are the only place where a multiplication and an addition are contracted: the rate doubles, and every CPU
// that has the instruction gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "parallel.h"
#include "vector.h"

namespace fastcam {

constexpr int64_t MAX_HEIGHT = 8;  // rows of the largest register block
template <typename T>
constexpr int64_t PANEL = 3 * Vector<T>::size;  // its columns
template <typename T>
constexpr int64_t TILE = 4 * PANEL<T>;  // columns that a task works on: its rows are read in pieces of 768 bytes
constexpr int64_t DEPTH = 64;           // rows of b that stay in the first-level cache with what they are multiplied by

// c[i, n] += sum_d a[d, i] b[d, n] for i < height <= MAX_HEIGHT and n < PANEL; rows of a, b and c are lda, PANEL and
// ldc apart.
void multiply_panel(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t height, int64_t depth);
void multiply_panel(const double* a, int64_t lda, const double* b, double* c, int64_t ldc, int64_t height,
                    int64_t depth);

// c[i, j] += sum_n a[i, n] b[j, n] for all i < rows and j < columns.
void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                   int64_t columns, int64_t n);
void multiply_rows(const double* a, int64_t lda, const double* b, int64_t ldb, double* c, int64_t ldc, int64_t rows,
                   int64_t columns, int64_t n);

// `columns` <= TILE columns of x (rows, columns), its rows `stride` apart -> panels (TILE / PANEL, rows, PANEL), zeros
// where the columns end. Adds their squares to squares[n], unless that is null.
void pack_tile(const float* x, int64_t stride, int64_t rows, int64_t columns, float* to, float* squares = nullptr);
void pack_tile(const double* x, int64_t stride, int64_t rows, int64_t columns, double* to, double* squares = nullptr);

constexpr int64_t SMALL = 1 << 14;  // numbers that one thread has gone through before another one has woken up

// Rows of the blocks that n rows are cut into: as few blocks as possible, all of one height.
inline int64_t block_height(int64_t n) {
  const int64_t blocks = std::max<int64_t>(1, (n + MAX_HEIGHT - 1) / MAX_HEIGHT);
  return std::max<int64_t>(1, (n + blocks - 1) / blocks);
}

template <typename T>
int64_t panels(int64_t columns) {
  return (columns + PANEL<T> - 1) / PANEL<T>;
}

// Memory that is written before it is read, and begins with a cache line.
struct Release {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], Release> uninitialized(int64_t n) {
  return std::unique_ptr<T[], Release>(static_cast<T*>(::operator new[](n * sizeof(T), std::align_val_t(64))));
}

// c (PANEL, PANEL) += a^T b for two panels (depth, PANEL).
template <typename T>
void multiply_panels(const T* a, const T* b, T* c, int64_t depth) {
  for (int64_t d = 0; d < depth; d += DEPTH)
    multiply_panel(a + d * PANEL<T>, PANEL<T>, b + d * PANEL<T>, c, PANEL<T>, PANEL<T>, std::min(DEPTH, depth - d));
}

// The left factor of products with panels: a(i, d) for i < rows and d < depth, in blocks of equal height.
template <typename T>
struct Blocks {
  int64_t rows, depth, height;
  std::unique_ptr<T[], Release> data;  // (ceil(rows / height), depth, height)

  template <typename Element>
  Blocks(int64_t rows, int64_t depth, int threads, Element a)
      : rows(rows), depth(depth), height(block_height(rows)), data(uninitialized<T>(padded() * depth)) {
    parallel_for(padded() / height, 1, rows * depth < SMALL ? 1 : threads, [&](int64_t i, int64_t) {
      T* to = data.get() + i * height * depth;
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t j = 0; j < height; ++j) *to++ = i * height + j < rows ? a(i * height + j, d) : T(0);
    });
  }

  // Rows of c that the products write.
  int64_t padded() const { return (rows + height - 1) / height * height; }

  // c (padded(), PANEL), its rows ldc apart, += columns [first, first + count) of this times b (count, PANEL).
  void multiply(int64_t first, int64_t count, const T* b, T* c, int64_t ldc) const {
    for (int64_t i = 0; i < rows; i += height)
      multiply_panel(data.get() + (i / height * depth + first) * height, height, b, c + i * ldc, ldc, height, count);
  }

  // c (min(height, rows - i), columns), its rows ldc apart, = rows i and on of this, i a multiple of height, times the
  // panels b (ceil(columns / PANEL), depth, PANEL).
  void multiply_row(int64_t i, const T* b, T* c, int64_t ldc, int64_t columns) const {
    const T* a = data.get() + i * depth;
    const int64_t used = std::min(height, rows - i);
    T edge[MAX_HEIGHT * PANEL<T>];
    for (int64_t n = 0; n < columns; n += PANEL<T>, b += depth * PANEL<T>) {
      const int64_t width = std::min(PANEL<T>, columns - n);
      const bool whole = width == PANEL<T>;
      for (int64_t j = 0; j < used; ++j) std::fill_n(whole ? c + j * ldc + n : edge + j * PANEL<T>, PANEL<T>, T(0));
      multiply_panel(a, height, b, whole ? c + n : edge, whole ? ldc : PANEL<T>, used, depth);
      for (int64_t j = 0; !whole && j < used; ++j) std::copy_n(edge + j * PANEL<T>, width, c + j * ldc + n);
    }
  }

  // c (padded(), TILE) = this times `columns` <= TILE columns of x, read once; squares[n] = their sums of squares
  // unless null. `packed` holds DEPTH * TILE numbers.
  void multiply_tile(const T* x, int64_t stride, int64_t columns, T* packed, T* c, T* squares) const {
    std::fill(c, c + padded() * TILE<T>, T(0));
    if (squares) std::fill(squares, squares + TILE<T>, T(0));
    for (int64_t d = 0; d < depth; d += DEPTH) {
      const int64_t count = std::min(DEPTH, depth - d);
      pack_tile(x + d * stride, stride, count, columns, packed, squares);
      for (int64_t n = 0; n < columns; n += PANEL<T>) multiply(d, count, packed + n * count, c + n, TILE<T>);
    }
  }
};

}  // namespace fastcam
