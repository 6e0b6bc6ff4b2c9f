// The permutohedral lattice (Adams, Baek and Davis 2010) of N points with d features: built once, filters any values.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fastcam {

// Memory for n numbers, not initialised.
template <typename T>
std::unique_ptr<T[]> buffer(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

class Lattice {
 public:
  // features (d, N). Throws std::invalid_argument for features that are not finite or too large, too many points or
  // dimensions.
  Lattice(const float* features, int64_t d, int64_t N, int threads);

  int64_t points() const { return N_; }
  int64_t vertices() const { return M_; }

  // vertex (N, d + 1), weight (N, d + 1), neighbour (d + 1, M, 2) with M for none.
  void copy_to(int32_t* vertex, float* weight, int32_t* neighbour) const;

  // x (V, N) -> out (V, N), double if f64. The adjoint if `reverse`.
  void filter(const void* x, void* out, bool f64, int64_t V, bool reverse, int threads) const;

  // The three steps on rows of `width` numbers, one row a point or vertex; width as row_width() gives it.
  // Weights of the (point, vertex) pairs in order of vertices, each times `scale` of its point if that is not null.
  template <typename T>
  std::unique_ptr<T[]> splat_weights(const T* scale) const;
  // x (N, width) -> z, room for M + 1 rows, of which the last becomes 0.
  template <typename T>
  void splat(const T* x, const T* weights, T* z, int64_t width, int threads) const;
  // Returns the one of z and other, M + 1 rows each, that holds the result.
  template <typename T>
  const T* blur(T* z, T* other, int64_t width, bool reverse, int threads) const;
  // z -> rows of the points [begin, end), from out on. On the caller's thread.
  template <typename T>
  void slice(const T* z, T* out, int64_t begin, int64_t end, int64_t width) const;

 private:
  template <typename Key>
  void number_vertices(const std::vector<int64_t>& low, const std::vector<int>& bits, const float* features,
                       int threads);

  int64_t d_, N_, M_ = 0;
  std::unique_ptr<int32_t[]> vertex_;  // (N, d + 1)
  std::unique_ptr<float[]> weight_;    // (N, d + 1)
  std::vector<int32_t> neighbour_;     // (d + 1, M, 2)
  std::vector<int32_t> first_;         // (M + 1), where the pairs of each vertex begin
  std::unique_ptr<int32_t[]> point_;   // (N (d + 1)), points of the pairs, in order of vertices
};

}  // namespace fastcam
