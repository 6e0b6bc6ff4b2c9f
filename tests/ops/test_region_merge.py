import itertools
import math

import pytest
import torch

from fastcam import backends, region_graph, region_merge, superpixel_slic
from fastcam.ops.region_merge import CANDIDATES, FWD, WEIGHTS
from fastcam.reference.region_merge import (
    Contact,
    Regions,
    border_weight,
    content_border_similarity,
    content_similarity,
    mean_color_similarity,
)


def example(B=1, H=48, W=60, n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, 3, 4, 5, generator=g)
    image = torch.nn.functional.interpolate(coarse, (H, W)) * 200 + 25 * torch.rand(B, 3, H, W, generator=g)
    return superpixel_slic(image, n), image


def same_partition(a, b):
    """Equal up to renaming: as many pairs of labels as labels."""
    pairs = torch.stack([a.flatten(), b.flatten()]).unique(dim=1).shape[1]
    return pairs == len(a.unique()) == len(b.unique())


class TestRegionMerge:
    candidates = CANDIDATES

    def run_stored(self, stored, device, backend, stop=0.9):
        parts = [torch.from_numpy(stored[k]).to(device) for k in ("edges", "border", "area", "perimeter", "lab_sums")]
        hist = torch.from_numpy(stored["hist_counts"]).double().flatten(1).to(device)
        sizes = torch.tensor([[len(parts[0]), len(parts[2])]], device=device)
        merges, numbers, counts = FWD(
            *parts, hist, sizes, 3, "content_border", "adaptive", 2.0, stop, 1.05, 0.01, 0.9, backend
        )
        return merges[: int(counts)].cpu(), numbers[: int(counts)].cpu()

    def test_agrees_with_stored_merges(self, device, backend, golden):
        stored = golden("region_growing_merge")
        merges, numbers = self.run_stored(stored, device, backend)
        expected = torch.from_numpy(stored["merges"])
        assert torch.equal(merges, expected[:, :3].long())
        torch.testing.assert_close(numbers, expected[:, 3:], rtol=1e-4, atol=1e-5)

    def test_cuts_agree_with_stored_partitions(self, device, backend, golden):
        from fastcam.ops.region_merge import MergeTree

        stored = golden("region_growing_merge")
        merges, numbers = self.run_stored(stored, device, backend)
        labels = torch.from_numpy(stored["labels"])
        tree = MergeTree(labels, merges[:, 1:], numbers[:, 0], numbers[:, 1], merges[:, 0], 105, 0.9)
        for level, count, parents in zip(stored["levels"], stored["n_regions"], stored["parents"], strict=True):
            region = tree.region_of(float(level))
            assert region.max() + 1 == count
            assert same_partition(region, torch.from_numpy(parents))
            assert torch.equal(tree.cut(float(level)), region[labels.long()])

    def test_similarities_agree_with_stored_ones(self, device, backend, golden):
        stored = golden("region_growing_merge")
        regions = Regions(
            *(torch.from_numpy(stored[k]).double() for k in ("area", "perimeter", "lab_sums")),
            torch.from_numpy(stored["hist_counts"]).double().flatten(1),
        )
        i, j = torch.from_numpy(stored["edges"]).T
        content = content_similarity(regions.of(i), regions.of(j))
        torch.testing.assert_close(content, torch.from_numpy(stored["edge_content"]), rtol=1e-4, atol=1e-5)
        contact = Contact(torch.from_numpy(stored["border"]).double(), content)
        score = content_border_similarity(regions.of(i), regions.of(j), contact)
        torch.testing.assert_close(score, torch.from_numpy(stored["edge_score_initial"]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("criterion", ["adaptive", "best_first"])
    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_backends_merge_alike(self, device, backend, weight, criterion):
        labels, image = example(B=2)
        options = {"weight": weight, "criterion": criterion, "stop": 0.2, "texture": weight == "content"}
        expected = region_merge(labels, image, **options, backend="reference")
        trees = region_merge(labels.to(device), image.to(device), **options, backend=backend)
        for a, b in zip(trees, expected, strict=True):
            assert torch.equal(a.merges.cpu(), b.merges)
            torch.testing.assert_close(a.values.cpu(), b.values)
            assert torch.equal(a.rounds.cpu(), b.rounds)

    def test_batch_equals_single_images(self, device, backend):
        labels, image = (t.to(device) for t in example(B=3))
        trees = region_merge(labels, image, backend=backend)
        for b, tree in enumerate(trees):
            alone = region_merge(labels[b : b + 1], image[b : b + 1], backend=backend)[0]
            assert torch.equal(tree.merges, alone.merges)
            assert torch.equal(tree.cut(1.2), alone.cut(1.2))

    @pytest.mark.parametrize("criterion", ["adaptive", "best_first"])
    def test_chain_worked_by_hand(self, device, backend, criterion):
        """Similarities 1.80, 1.70, 1.75 along A-B-C-D, then with 1.85 in the middle, from the specification."""
        labels = torch.arange(4).repeat_interleave(4).view(1, 1, 16).to(device)
        image = torch.zeros(1, 3, 1, 16, device=device)

        def table(first, second, third):
            values = {(0, 1): first, (1, 2): second, (2, 3): third, (0, 2): 0.5, (1, 3): 0.4}

            def weight(a, b, contact):
                # The regions' areas tell a merge: then every remaining pair is unlike.
                names = [(round(float(x)), round(float(y))) for x, y in zip(a.area, b.area, strict=True)]
                start = all(n == (4, 4) for n in names)
                return torch.tensor([list(values.values())[k] if start else 0.1 for k in range(len(names))]).double()

            return weight

        if backend != "reference":
            with pytest.raises(backends.BackendError, match=r"^region_merge: backend 'cpp' does not exist"):
                region_merge(labels, image, weight=table(1.8, 1.7, 1.75), backend=backend)
            return
        one = region_merge(labels, image, weight=table(1.8, 1.7, 1.75), criterion=criterion, start=1.6, stop=0.3)[0]
        two = region_merge(labels, image, weight=table(1.8, 1.85, 1.75), criterion=criterion, start=1.6, stop=0.3)[0]
        if criterion == "adaptive":
            assert one.merges.tolist() == [[0, 1], [2, 3]]
            assert one.values.tolist() == pytest.approx([1.8, 1.75], abs=1e-6)
            assert one.rounds.tolist() == [0, 0]
            assert two.merges.tolist() == [[1, 2]]  # 0.9 times 1.75 and 1.80 are below 1.6 or blocked
        else:
            assert one.merges.tolist() == [[0, 1]]
            assert two.merges.tolist() == [[1, 2]]

    def test_best_first_takes_pairs_of_a_chain_in_descending_order(self, device, backend):
        grey = torch.tensor([0, 10, 60, 62, 200, 255.0])  # steps 10, 50, 2, 138, 55
        image = grey.repeat_interleave(3).expand(1, 3, 4, 18).to(device)
        labels = torch.arange(6).repeat_interleave(3).expand(1, 4, 18).to(device)
        tree = region_merge(labels, image, weight="mean_color", criterion="best_first", stop=0, backend=backend)[0]
        assert tree.merges[:2].tolist() == [[2, 3], [0, 1]]
        assert len(tree.merges) == 5
        assert tree.cut(count=3)[0, ::3].tolist() == [0, 0, 1, 1, 2, 2]

    def test_two_areas_are_found_exactly(self, device, backend):
        image = torch.zeros(1, 3, 30, 40)
        image[:, 0, :, :22], image[:, 1, :, 22:], image[:, 2, :, 22:] = (
            250,
            200,
            250,
        )  # red, and a blue unlike in L, a, b
        labels = torch.arange(12).view(3, 4).repeat_interleave(10, 0).repeat_interleave(10, 1)
        labels = torch.where((torch.arange(40) >= 22) & (labels % 4 == 2), labels + 10, labels)[None]
        for stop in (0.2, 0.5, 0.95):
            cut = region_merge(labels.to(device), image.to(device), stop=stop, backend=backend)[0].cut()
            assert same_partition(cut.cpu(), (torch.arange(40) >= 22).long().expand(30, 40))

    def test_constant_image_becomes_one_region(self, device, backend):
        labels, image = example()
        tree = region_merge(labels.to(device), torch.full_like(image, 99).to(device), backend=backend)[0]
        assert tree.cut().unique().tolist() == [0]
        assert float(tree.values.max()) <= 2

    def test_levels_and_counts_are_nested_and_regions_stay_connected(self, device, backend):
        from fastcam.reference.superpixel_slic import pieces

        labels, image = example(n=80)
        tree = region_merge(labels.to(device), image.to(device), stop=0, backend=backend)[0]
        cuts = [tree.cut(level).cpu() for level in (2.0, 1.6, 1.3, 1.0, 0.7, 0.4)]
        cuts += [tree.cut(count=n).cpu() for n in range(int(cuts[-1].max()), tree.regions - len(tree.merges) - 1, -1)]
        assert same_partition(cuts[0], labels[0])
        for fine, coarse in itertools.pairwise(cuts):
            assert len(torch.stack([fine.flatten(), coarse.flatten()]).unique(dim=1).T) == len(fine.unique())
            assert len(pieces(coarse).unique()) == len(coarse.unique()) == coarse.max() + 1
        for count in (tree.regions, 17, tree.regions - len(tree.merges)):
            assert len(tree.cut(count=count).unique()) == count

    def test_number_of_superpixels_does_not_matter_to_the_partition(self, device, backend):
        labels, image = example()
        S = int(labels.max()) + 1
        shuffled = torch.randperm(S, generator=torch.Generator().manual_seed(9))[labels.long()]
        first = region_merge(labels.to(device), image.to(device), backend=backend)[0].cut(1.1)
        second = region_merge(shuffled.to(device), image.to(device), backend=backend)[0].cut(1.1)
        assert same_partition(first.cpu(), second.cpu())

    def test_function_by_name_and_as_callable_agree(self, device, backend):
        labels, image = (t.to(device) for t in example())
        named = region_merge(labels, image, weight="mean_color", stop=0.4, backend=backend)[0]
        called = region_merge(labels, image, weight=lambda a, b, _: mean_color_similarity(a, b), stop=0.4)[0]
        assert torch.equal(named.merges, called.merges)

    def test_given_graphs_are_used(self, device, backend):
        labels, image = (t.to(device) for t in example())
        graphs = region_graph(labels, backend=backend)
        tree = region_merge(labels, image, graphs=graphs, backend=backend)[0]
        assert torch.equal(tree.merges, region_merge(labels, image, backend=backend)[0].merges)
        none = [g._replace(edges=g.edges[:0], border=g.border[:0]) for g in graphs]
        assert len(region_merge(labels, image, graphs=none, backend=backend)[0].merges) == 0

    def test_gaps_single_regions_and_empty_batches(self, device, backend):
        image = torch.zeros(1, 3, 1, 3, device=device)
        gaps = region_merge(torch.tensor([[[7, 7, 2]]], device=device), image, backend=backend)[0]
        assert gaps.regions == 2
        assert gaps.cut().tolist() == [[0, 0, 0]]
        assert gaps.cut(count=2).tolist() == [[1, 1, 0]]
        one = region_merge(torch.zeros(1, 1, 3, dtype=torch.int32, device=device), image, backend=backend)[0]
        assert one.cut().tolist() == [[0, 0, 0]]
        assert len(one.merges) == 0
        assert region_merge(gaps.labels.new_zeros(0, 1, 3), image[:0], backend=backend) == []

    def test_exceptions(self, device, backend):
        labels, image = torch.zeros(1, 2, 3, dtype=torch.int64, device=device), torch.zeros(1, 3, 2, 3, device=device)
        nan = image.clone()
        nan[0, 0, 0, 0] = torch.nan
        for match, error, arguments in (
            (r"expected labels \(B, H, W\) and image \(B, 3, H, W\)", ValueError, {"labels": labels[0]}),
            (r"and \(1, 2, 2, 3\)", ValueError, {"image": image[:, :2]}),
            (r"labels of an integer dtype, got float32", TypeError, {"labels": labels.float()}),
            (r"image uint8 or floating, got int32", TypeError, {"image": image.int()}),
            (r"image without NaN", ValueError, {"image": nan}),
            (r"weight in .* or a function, got 'colour'", ValueError, {"weight": "colour"}),
            (r"criterion in .*, got 'worst'", ValueError, {"criterion": "worst"}),
            (r"stop >= 0 and start > 0, got -1", ValueError, {"stop": -1}),
            (r"factor > 1", ValueError, {"factor": 1.0}),
            (r"expected 1 graphs, one an image, got 0", ValueError, {"graphs": []}),
        ):
            with pytest.raises(error, match=r"^region_merge: .*" + match):
                region_merge(**{"labels": labels, "image": image, **arguments}, backend=backend)
        tree = region_merge(labels, image, backend=backend)[0]
        with pytest.raises(ValueError, match=r"^MergeTree: merging stopped at 0\.9, got level 0\.5"):
            tree.cut(0.5)
        with pytest.raises(ValueError, match=r"^MergeTree: expected a count from 1 to 1, got 2"):
            tree.cut(count=2)
        with pytest.raises(ValueError, match=r"^MergeTree: expected a level or a count"):
            tree.cut(1.0, count=1)


def test_border_weight_by_hand():
    b, p, q = torch.tensor([[10.0, 60.0, 60.0], [30.0, 30.0, 40.0]], dtype=torch.float64).T
    assert border_weight(b, p, q).tolist() == pytest.approx([math.sqrt(2 * 10 / 60), 1.0])


def test_callable_that_returns_nonsense_is_refused():
    labels, image = example()
    for bad in (lambda a, b, c: a.area[:1], lambda a, b, c: a.area * torch.nan):
        with pytest.raises(ValueError, match=r"^region_merge: expected weight to return"):
            region_merge(labels, image, weight=bad)
