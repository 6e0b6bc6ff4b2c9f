#include "bindings.h"

#include <memory>

#include "cpu/lattice.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/region_graph.h"

namespace {

void bind_lattice(pybind11::module_& m) {
  using fastcam::Lattice;
  pybind11::class_<Lattice>(m, "Lattice")
      .def(pybind11::init([](uintptr_t features, int64_t d, int64_t N, int threads) {
             return std::make_unique<Lattice>(reinterpret_cast<const float*>(features), d, N, false, threads);
           }),
           pybind11::call_guard<pybind11::gil_scoped_release>())
      .def_property_readonly("vertices", &Lattice::vertices)
      .def("copy_to",
           [](const Lattice& lattice, uintptr_t vertex, uintptr_t weight, uintptr_t neighbour) {
             lattice.copy_to(reinterpret_cast<int32_t*>(vertex), reinterpret_cast<float*>(weight),
                             reinterpret_cast<int32_t*>(neighbour));
           })
      .def(
          "filter",
          [](const Lattice& lattice, uintptr_t x, uintptr_t out, bool f64, int64_t V, bool reverse, int threads) {
            lattice.filter(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out), f64, V, reverse, threads);
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
}

// Bytes that Python may hold; see cpu/memory.h.
struct Bytes {
  fastcam::Memory<char> memory;
  int64_t size;
};

void bind_memory(pybind11::module_& m) {
  pybind11::class_<Bytes>(m, "Memory", pybind11::buffer_protocol())
      .def(pybind11::init(
          [](int64_t size) { return std::make_unique<Bytes>(Bytes{fastcam::buffer<char>(size), size}); }))
      .def_buffer([](Bytes& bytes) {
        return pybind11::buffer_info(reinterpret_cast<unsigned char*>(bytes.memory.get()), bytes.size);
      })
      .attr("LARGE") = static_cast<int64_t>(fastcam::LARGE_PAGE);
}

void bind_region_graph(pybind11::module_& m) {
  using fastcam::RegionGraph;
  pybind11::class_<RegionGraph>(m, "RegionGraph")
      .def(pybind11::init([](uintptr_t labels, int64_t B, int64_t H, int64_t W, int threads) {
             return std::make_unique<RegionGraph>(reinterpret_cast<const int32_t*>(labels), B, H, W, threads);
           }),
           pybind11::call_guard<pybind11::gil_scoped_release>())
      .def_property_readonly("refused", &RegionGraph::refused)
      .def_property_readonly("edges", &RegionGraph::edges)
      .def_property_readonly("regions", &RegionGraph::regions)
      .def("copy_to", [](const RegionGraph& graph, uintptr_t edges, uintptr_t border, uintptr_t area,
                         uintptr_t perimeter, uintptr_t counts) {
        graph.copy_to(reinterpret_cast<int64_t*>(edges), reinterpret_cast<int64_t*>(border),
                      reinterpret_cast<int64_t*>(area), reinterpret_cast<int64_t*>(perimeter),
                      reinterpret_cast<int64_t*>(counts));
      });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace fastcam;
  m.doc() = "C++ implementations of fastcam's ops, on addresses; fastcam.native calls them.";
  bind(m, "attention_maps_fwd", attention_maps_fwd);
  bind(m, "attention_maps_bwd", attention_maps_bwd);
  bind(m, "cam_fuse_fwd", cam_fuse_fwd);
  bind(m, "cam_fuse_bwd", cam_fuse_bwd);
  bind(m, "cam_label_fwd", cam_label_fwd);
  bind(m, "cam_sweep_fwd", cam_sweep_fwd);
  bind(m, "correlation_propagate_fwd", correlation_propagate_fwd);
  bind(m, "correlation_propagate_bwd", correlation_propagate_bwd);
  bind(m, "crf_mean_field_fwd", crf_mean_field_fwd);
  bind(m, "crf_mean_field_bwd", crf_mean_field_bwd);
  bind(m, "feature_affinity_fwd", feature_affinity_fwd);
  bind(m, "feature_affinity_bwd", feature_affinity_bwd);
  bind_lattice(m);
  bind_memory(m);
  bind(m, "pairwise_max_fwd", pairwise_max_fwd);
  bind(m, "pairwise_max_bwd", pairwise_max_bwd);
  bind(m, "path_affinity_fwd", path_affinity_fwd);
  bind(m, "path_affinity_bwd", path_affinity_bwd);
  bind(m, "peak_find_fwd", peak_find_fwd);
  bind(m, "peak_find_list", peak_find_list);
  bind(m, "pixel_refine_fwd", pixel_refine_fwd);
  bind(m, "pixel_refine_bwd", pixel_refine_bwd);
  bind(m, "prototype_similarity_fwd", prototype_similarity_fwd);
  bind(m, "prototype_similarity_bwd", prototype_similarity_bwd);
  bind(m, "random_walk", random_walk);
  bind_region_graph(m);
  bind(m, "region_merge_fwd", region_merge_fwd);
  bind(m, "region_merge_describe", region_merge_describe);
  bind(m, "region_pool_fwd", region_pool_fwd);
  bind(m, "region_pool_bwd", region_pool_bwd);
  bind(m, "region_reduce_fwd", region_reduce_fwd);
  bind(m, "region_reduce_bwd", region_reduce_bwd);
  bind(m, "region_reduce_hist", region_reduce_hist);
  bind(m, "superpixel_slic_fwd", superpixel_slic_fwd);
  bind(m, "window_reduce_fwd", window_reduce_fwd);
  bind(m, "window_reduce_bwd", window_reduce_bwd);
}
