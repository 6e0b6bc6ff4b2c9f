import math

import numpy as np
import pytest
import torch

from fastcam.metrics import regions as m


def random_maps(count=3, size=(9, 11), labels=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, labels, size, generator=g) for _ in range(count)]


HALVES = torch.tensor([[0, 0, 1, 1]] * 2)
QUARTERS = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
SHIFTED = torch.tensor([[0, 1, 1, 1]] * 2)
ONE = torch.zeros(2, 4, dtype=torch.int64)


def test_equal_partitions_have_the_best_of_every_score():
    (labels,) = random_maps(1)
    renamed = 7 - labels
    assert m.rand_index(labels, [renamed]) == pytest.approx(1)
    assert m.variation_of_information(labels, [renamed]) == pytest.approx(0)
    assert m.covering(labels, [renamed]) == pytest.approx(1)
    assert m.achievable_accuracy(labels, renamed) == 1
    assert m.undersegmentation_error(labels, renamed) == 0
    assert m.boundary_recall(labels, renamed, tolerance=0) == 1
    assert m.boundary_counts(labels, [renamed]).f == 1


def test_rand_index_equals_pair_counting():
    a, b, c = random_maps(3, (4, 5))
    x, y, z = (t.flatten() for t in (a, b, c))

    def share(p, q):
        pairs = [(i, j) for i in range(20) for j in range(i)]
        return np.mean([bool(p[i] == p[j]) == bool(q[i] == q[j]) for i, j in pairs])

    assert m.rand_index(a, [b, c]) == pytest.approx((share(x, y) + share(x, z)) / 2)


def test_scores_of_halves_and_a_shifted_border_by_hand():
    # 8 pixels; overlaps of SHIFTED (2, 6) with HALVES (4, 4): 2, 0 / 2, 4
    assert m.overlaps(SHIFTED, HALVES).tolist() == [[2, 0], [2, 4]]
    same = (4 * 3 / 2 + 4 * 3 / 2, 2 * 1 / 2 + 6 * 5 / 2, 2 * 1 / 2 * 2 + 4 * 3 / 2)  # truth, pred, both
    assert m.rand_index(SHIFTED, [HALVES]) == pytest.approx(1 - (same[0] + same[1] - 2 * same[2]) / 28)
    entropy = -(0.25 * math.log2(0.25) + 0.25 * math.log2(0.25) + 0.5 * math.log2(0.5))
    assert m.variation_of_information(SHIFTED, [HALVES]) == pytest.approx(
        2 * entropy - 1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)
    )
    assert m.covering(SHIFTED, [HALVES]) == pytest.approx((4 * (2 / 4) + 4 * (4 / 6)) / 8)
    assert m.achievable_accuracy(SHIFTED, HALVES) == 6 / 8
    assert m.undersegmentation_error(SHIFTED, HALVES) == pytest.approx((2 + 2) / 8)
    assert m.undersegmentation_error(QUARTERS, HALVES) == 0


def test_one_region_has_the_entropy_of_the_truth():
    assert m.variation_of_information(ONE, [HALVES]) == pytest.approx(1)
    assert m.variation_of_information(ONE, [QUARTERS, HALVES]) == pytest.approx(1.5)
    assert m.rand_index(ONE, [HALVES]) == pytest.approx(12 / 28)


def test_voi_agrees_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    a, b = random_maps(2, (30, 20), 6)
    split, merge = skimage.variation_of_information(b.numpy(), a.numpy())
    assert m.variation_of_information(a, [b]) == pytest.approx(split + merge)


def test_voi_is_a_metric():
    for seed in range(5):
        a, b, c = random_maps(3, seed=seed)
        ab, bc, ac = (m.variation_of_information(p, [q]) for p, q in ((a, b), (b, c), (a, c)))
        assert ac <= ab + bc + 1e-9
        assert m.variation_of_information(b, [a]) == pytest.approx(ab)
        assert m.rand_index(b, [a]) == pytest.approx(m.rand_index(a, [b]))


def test_compactness_of_squares_and_of_a_line():
    squares = torch.arange(4).view(2, 2).repeat_interleave(5, 0).repeat_interleave(5, 1)
    assert m.compactness(squares) == pytest.approx(math.pi / 4)
    assert m.compactness(torch.zeros(1, 9, dtype=torch.int64)) == pytest.approx(4 * math.pi * 9 / 20**2)


def test_boundaries_lie_left_of_and_above_a_border():
    expected = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]]).bool()
    assert torch.equal(m.boundaries(HALVES), expected)
    corner = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    assert m.boundaries(corner).int().tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert not m.boundaries(ONE).any()


def test_boundary_recall_within_a_tolerance():
    far = torch.zeros(4, 12, dtype=torch.int64)
    far[:, 6:] = 1
    near = torch.zeros(4, 12, dtype=torch.int64)
    near[:, 8:] = 1
    assert m.boundary_recall(near, far, tolerance=2) == 1
    assert m.boundary_recall(near, far, tolerance=1) == 0
    assert math.isnan(m.boundary_recall(near, torch.zeros_like(far)))


@pytest.mark.parametrize("seed", range(4))
def test_thinning_agrees_with_scikit_image(seed):
    morphology = pytest.importorskip("skimage.morphology")
    g = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 44, 50, generator=g), 5, 1)[0, 0]
    mask = smooth > smooth.median()
    np.testing.assert_array_equal(m.thin(mask).numpy(), morphology.thin(mask.numpy()))


@pytest.mark.parametrize("distance", [1.0, 2.3, 4.0])
def test_matching_is_as_large_as_possible(distance):
    sparse = pytest.importorskip("scipy.sparse")
    from scipy.sparse.csgraph import maximum_bipartite_matching

    g = torch.Generator().manual_seed(int(10 * distance))
    a, b = (torch.rand(25, 30, generator=g) < 0.15 for _ in range(2))
    matched_a, matched_b = m.match_boundaries(a, b, distance)
    assert not (matched_a & ~a).any()
    assert not (matched_b & ~b).any()
    near = torch.cdist(a.nonzero().double(), b.nonzero().double()) <= distance + 1e-9
    most = int((maximum_bipartite_matching(sparse.csr_matrix(near.numpy()), "column") >= 0).sum())
    assert int(matched_a.sum()) == int(matched_b.sum()) == most


def test_matching_finds_the_other_way_round():
    """Greedy takes the near pair and leaves one over; both can be matched."""
    a, b = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    a[0, [2, 4]] = True
    b[0, [1, 3]] = True
    a_, b_ = m.match_boundaries(a, b, 1.0)
    assert a_.sum() == b_.sum() == 2
    assert m.match_boundaries(a, torch.zeros_like(b), 2.0)[0].sum() == 0
    assert m.match_boundaries(torch.zeros_like(a), b, 2.0)[1].sum() == 0


def test_boundary_counts_of_two_annotators_by_hand():
    pred = torch.zeros(5, 40, dtype=torch.int64)
    pred[:, 10:], pred[:, 30:] = 1, 2  # lines at columns 9 and 29
    first, second = torch.zeros(5, 40, dtype=torch.bool), torch.zeros(5, 40, dtype=torch.bool)
    first[:, 9] = True
    second[:, 20] = True
    counts = m.boundary_counts(pred, [first, second])
    assert counts == (5, 10, 5, 10)
    assert counts.f == pytest.approx(0.5)
    assert m.boundary_counts(torch.zeros_like(pred), [first]).f == 0


def test_ods_takes_one_scale_and_ois_one_an_image():
    values = torch.tensor([[0.9, 0.5], [0.2, 0.8]])
    assert m.ods_ois(values) == pytest.approx((0.65, 0.85))
    assert m.ods_ois(values, lower=True) == pytest.approx((0.55, 0.35))
    counts = [[m.BoundaryCounts(8, 10, 8, 10), m.BoundaryCounts(2, 10, 2, 10)],
              [m.BoundaryCounts(1, 10, 1, 10), m.BoundaryCounts(6, 10, 6, 10)]]  # fmt: skip
    assert m.boundary_ods_ois(counts) == pytest.approx((0.45, 0.7))


def test_coverings_of_two_scales_by_hand():
    scales = [m.best_overlaps(p, [HALVES]) for p in (ONE, SHIFTED)]
    scores, best = m.covering_ods_ois([scales])
    assert scores == pytest.approx((m.covering(SHIFTED, [HALVES]),) * 2)
    assert best == pytest.approx((4 * max(4 / 8, 2 / 4) + 4 * (4 / 6)) / 8)


def test_bad_input_is_refused():
    for a, b in ((HALVES, HALVES[:1]), (HALVES.float(), HALVES), (HALVES[:0], HALVES[:0])):
        with pytest.raises(ValueError, match=r"^region metrics: expected two integer label maps"):
            m.overlaps(a, b)
    with pytest.raises(ValueError, match=r"^region metrics: expected at least one true partition"):
        m.rand_index(HALVES, [])


def test_annotators_of_photographs_agree_with_themselves(shared_data):
    folder = shared_data / "bsds500" / "groundtruth" / "test"
    if not folder.is_dir():
        pytest.skip("no BSDS500")
    with np.load(sorted(folder.glob("*.npz"))[0]) as stored:
        labels = torch.from_numpy(stored["segmentations"][0].astype(np.int64))
        drawn = np.unpackbits(stored["boundaries"][0], axis=-1)[..., : int(stored["width"])]
    counts = m.boundary_counts(labels, [torch.from_numpy(drawn).bool()])
    assert counts.f > 0.99  # the stored boundaries are thinned by another program
