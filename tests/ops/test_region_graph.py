from collections import Counter

import pytest
import torch

from fastcam import backends, region_graph
from fastcam.ops.region_graph import CANDIDATES, FWD


def by_loop(labels):
    """Borders and perimeters of one label map by looking at every pixel side."""
    H, W = labels.shape
    border, perimeter, area = Counter(), Counter(), Counter()
    rows = labels.tolist()
    for y in range(H):
        for x in range(W):
            here = rows[y][x]
            area[here] += 1
            for v, u in ((y, x + 1), (y + 1, x), (y, x - 1), (y - 1, x)):
                if not (0 <= v < H and 0 <= u < W):
                    perimeter[here] += 1
                elif rows[v][u] != here:
                    perimeter[here] += 1
                    if (v, u) > (y, x):
                        border[min(here, rows[v][u]), max(here, rows[v][u])] += 1
    return border, perimeter, area


class TestRegionGraph:
    candidates = CANDIDATES

    def test_equals_a_loop_over_pixel_sides(self, device, backend):
        g = torch.Generator().manual_seed(0)
        for H, W, S in ((1, 1, 1), (1, 9, 4), (7, 1, 3), (13, 17, 5), (40, 31, 900), (200, 9, 3)):
            labels = torch.randint(0, S, (2, H, W), generator=g)
            for one, graph in zip(labels, region_graph(labels.to(device), backend=backend), strict=True):
                border, perimeter, area = by_loop(one)
                edges = [tuple(e) for e in graph.edges.tolist()]
                assert edges == sorted(border)
                assert graph.border.tolist() == [border[e] for e in edges]
                n = int(one.max()) + 1
                assert graph.perimeter.tolist() == [perimeter[s] for s in range(n)]
                assert graph.area.tolist() == [area[s] for s in range(n)]

    def test_agrees_with_stored_graph(self, device, backend, golden):
        stored = golden("region_growing_merge")
        graph = region_graph(torch.from_numpy(stored["labels"])[None].to(device), backend=backend)[0]
        for part, name in zip(graph, ("edges", "border", "area", "perimeter"), strict=True):
            assert part.dtype == torch.int64
            assert torch.equal(part.cpu(), torch.from_numpy(stored[name]))

    def test_borders_and_frame_add_up_to_the_perimeter(self, device, backend):
        labels = torch.randint(0, 6, (1, 30, 20), generator=torch.Generator().manual_seed(3)).to(device)
        graph = region_graph(labels, backend=backend)[0]
        inner = torch.zeros_like(graph.perimeter).index_add_(0, graph.edges.T.flatten(), graph.border.repeat(2))
        assert int((graph.perimeter - inner).sum()) == 2 * (30 + 20)
        assert int(graph.area.sum()) == 600

    def test_every_integer_dtype_and_any_strides(self, device, backend):
        labels = torch.randint(0, 9, (2, 12, 10), generator=torch.Generator().manual_seed(4)).to(device)
        expected = region_graph(labels, backend=backend)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            strided = labels.to(dtype).mT.contiguous().mT
            for a, b in zip(region_graph(strided, backend=backend), expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_gaps_have_no_area(self, device, backend):
        graph = region_graph(torch.tensor([[[0, 5, 5]]], device=device), backend=backend)[0]
        assert graph.area.tolist() == [1, 0, 0, 0, 0, 2]
        assert graph.perimeter.tolist() == [4, 0, 0, 0, 0, 6]
        assert graph.edges.tolist() == [[0, 5]]

    def test_empty_batch_and_empty_image(self, device, backend):
        assert region_graph(torch.zeros(0, 3, 3, dtype=torch.int64, device=device), backend=backend) == []
        graph = region_graph(torch.zeros(1, 0, 3, dtype=torch.int64, device=device), backend=backend)[0]
        assert [tuple(part.shape) for part in graph] == [(0, 2), (0,), (0,), (0,)]

    def test_same_for_every_number_of_threads(self, device, backend):
        if backend != "cpp":
            pytest.skip("threads are the C++ backend's")
        labels = torch.randint(0, 50, (1, 400, 30), generator=torch.Generator().manual_seed(5))
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(region_graph(labels, backend=backend)[0])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))

    def test_opcheck(self, device, backend):
        labels = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(6)).to(device)
        torch.library.opcheck(FWD, (labels, backend), test_utils=("test_schema", "test_faketensor"))

    def test_exceptions(self, device, backend):
        labels = torch.zeros(1, 2, 3, dtype=torch.int64, device=device)
        for match, error, bad in (
            (r"expected labels \(B, H, W\), got \(2, 3\)", ValueError, labels[0]),
            (r"expected labels of an integer dtype, got float32", TypeError, labels.float()),
            (r"expected labels from 0 to 16777215, got -1", ValueError, labels - 1),
            (r"expected labels from 0 to 16777215, got 16777216", ValueError, labels + 2**24),
        ):
            with pytest.raises(error, match=r"^region_graph: " + match):
                region_graph(bad, backend=backend)
        with pytest.raises(backends.BackendError, match=r"^region_graph: backend 'triton' does not exist"):
            region_graph(labels, backend="triton")
