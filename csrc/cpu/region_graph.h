// The regions of label maps, and which of them touch along how many pixel sides.
#pragma once

#include <cstdint>
#include <vector>

namespace fastcam {

class RegionGraph {
 public:
  // labels (B, H, W), none negative.
  RegionGraph(const int32_t* labels, int64_t B, int64_t H, int64_t W, int threads);
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
  };
  static void build(const int32_t* labels, int64_t H, int64_t W, int threads, Image& image);

  std::vector<Image> images_;
};

}  // namespace fastcam
