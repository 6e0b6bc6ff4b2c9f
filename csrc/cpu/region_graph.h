// The regions of label maps, and which of them touch along how many pixel sides.
#pragma once

#include <cstdint>
#include <vector>

namespace fastcam {

class RegionGraph {
 public:
  static constexpr int32_t MOST = (1 << 24) - 1;  // largest label; tables have a row for every label up to the largest

  // labels (B, H, W), from 0 to MOST.
  RegionGraph(const int32_t* labels, int64_t B, int64_t H, int64_t W, int threads);
  int32_t refused() const;  // a label out of range, for which the graph is not built; 0 if there is none
  int64_t edges() const;    // of all images
  int64_t regions() const;  // of all images
  // edges (E, 2) with i < j in ascending order, borders (E), areas (S), perimeters (S), image behind image; numbers of
  // edges and regions of each image (B, 2).
  void copy_to(int64_t* edges, int64_t* border, int64_t* area, int64_t* perimeter, int64_t* counts) const;

 private:
  struct Edge {
    uint64_t key;  // i in the upper half, j in the lower
    int64_t border;
  };
  struct Image {
    std::vector<Edge> edges;
    std::vector<int64_t> area, perimeter;
    int32_t refused = 0;
  };
  static void build(const int32_t* labels, int64_t H, int64_t W, int threads, Image& image);

  std::vector<Image> images_;
};

}  // namespace fastcam
