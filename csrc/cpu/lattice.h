// The permutohedral lattice (Adams, Baek and Davis 2010) of N points with d features: built once, filters any values.
//
// Values lie in rows of `width` numbers as row_width() gives it, one a point or vertex. Points come in bands of BAND.
// Each band splats on its own: a vertex belongs to the first band that meets it, later bands have copies of it, and a
// blur begins by adding the copies up and ends by handing the result out. So nobody races, and the bits of a result do
// not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/memory.h"

namespace fastcam {

class Lattice {
 public:
  static constexpr int64_t BAND = 16384;

  // features (d, N). `few`: made for rows of few numbers; offers splat, blur and slice alone, and blur needs a spare.
  // Throws std::invalid_argument for features that are not finite or too large, too many points or dimensions.
  Lattice(const float* features, int64_t d, int64_t N, bool few, int threads);

  int64_t points() const { return N_; }
  int64_t vertices() const { return M_; }

  // vertex (N, d + 1), weight (N, d + 1), neighbour (d + 1, M, 2) with M for none. Vertices count in the order in which
  // the points meet them.
  void copy_to(int32_t* vertex, float* weight, int32_t* neighbour) const;

  // x (V, N) -> out (V, N), double if f64. The adjoint if `reverse`.
  void filter(const void* x, void* out, bool f64, int64_t V, bool reverse, int threads) const;

  // How many rows the vertices' values z take.
  int64_t rows() const { return zero_ + 1 + blocks_; }
  // Adds rows x of the points [begin, end), all in one band, each times `scale` of its point (or 1, if that is null),
  // to z, which was all 0 to begin with.
  template <typename T>
  void splat(int64_t begin, int64_t end, const T* x, const T* scale, T* z, int64_t width) const;
  // After all points were splatted; returns which of z and `spare` holds the result. `spare`, wanted if `few`: rows()
  // more rows, the last of which is 0. Axes in reverse order: the adjoint.
  template <typename T>
  T* blur(T* z, T* spare, int64_t width, bool reverse, int threads) const;
  // Rows of the points [begin, end) from blurred z, each times `scale` of its point.
  template <typename T>
  void slice(const T* z, int64_t begin, int64_t end, const T* scale, T* out, int64_t width) const;

 private:
  // Rows of several numbers are blurred in place, chain by chain: their bytes are what counts. Of few numbers, a vertex
  // and its neighbours go to another array, so that no two threads write into one cache line.
  struct Axis {
    Memory<int32_t> near;         // few: (2, M), who comes after each vertex and who before; zero_ for nobody
    std::vector<int32_t> chains;  // vertices in steps along the axis, one chain after the other, zero_ around each
    std::vector<int64_t> blocks;  // places of some zero_ in `chains`, the first and the last among them
  };
  template <typename Word>
  void build(const std::vector<double>& low, const std::vector<int>& bits, int id_bits, const float* features,
             int threads);

  int64_t d_, N_, M_ = 0, blocks_ = 0;
  bool few_;
  int32_t zero_ = 0;             // the row that stands for absent neighbours, behind those of vertices and copies
  Memory<int32_t> vertex_;       // (N / GROUP, d + 1, GROUP): rows of the points' vertices
  Memory<float> weight_;         // the same
  std::vector<int32_t> owners_;  // vertices that have copies
  std::vector<int32_t> copies_;  // (owners + 1): where the rows of their copies begin
  std::vector<Axis> axes_;       // d + 1
};

}  // namespace fastcam
