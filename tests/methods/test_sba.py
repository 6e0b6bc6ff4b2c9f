"""SBA: the formulas by hand and by loops, the invariants of masks, whitening and search, and the method."""

import math
import sys

import numpy as np
import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.sba import (
    aggregate_masks,
    aggregate_pwa,
    channel_statistics,
    expand_query,
    faiss_index,
    fit_whitening,
    pool_baseline,
    rank,
    rank_faiss,
    select_detectors,
    soft_proposals,
    unit,
)
from fastcam.metrics import ranking_average_precision

ALL = torch.arange


def draw(*shape, seed=0, dtype=torch.float32):
    """Features after a ReLU: about half of them 0."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).relu()


def vectors(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestMasks:
    def test_worked_example(self):
        plane = torch.tensor([[[[3.0, 4.0]]]])
        torch.testing.assert_close(
            soft_proposals(plane, ALL(1)).flatten(), torch.tensor([0.7746, 0.8944]), atol=5e-5, rtol=0
        )
        features = torch.tensor([[[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 1.0]]]])
        psi = aggregate_pwa(features, torch.tensor([0]), normalize=False)[0]
        torch.testing.assert_close(psi[1:], torch.tensor([0.6, 0.8]).sqrt())

    @pytest.mark.parametrize(("alpha", "beta"), [(2, 2), (1, 1), (1, 3), (3, 0.5), (0.7, 2)])
    def test_powers_of_a_mask_sum_to_1(self, alpha, beta):
        w = soft_proposals(draw(2, 3, 5, 7, dtype=torch.float64), ALL(3), alpha, beta)
        torch.testing.assert_close(w.pow(alpha * beta).sum(dim=(2, 3)), torch.ones(2, 3, dtype=torch.float64))

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
    def test_scale_of_a_channel_does_not_matter(self, scale):
        x = draw(1, 4, 6, 5)
        torch.testing.assert_close(soft_proposals(x * scale, ALL(4)), soft_proposals(x, ALL(4)))

    def test_scale_of_all_features_scales_the_vector_only(self):
        x = draw(1, 4, 6, 5)
        scaled = aggregate_pwa(5 * x, ALL(2), normalize=False)
        torch.testing.assert_close(scaled, 5 * aggregate_pwa(x, ALL(2), normalize=False))
        torch.testing.assert_close(aggregate_pwa(5 * x, ALL(2)), aggregate_pwa(x, ALL(2)))

    def test_zero_channel_gives_zero_not_nan(self):
        x = draw(2, 3, 4, 4)
        x[:, 1] = 0
        assert (soft_proposals(x, ALL(3))[:, 1] == 0).all()
        blocks = aggregate_pwa(x, ALL(3)).view(2, 3, 3)
        assert blocks.isfinite().all() and (blocks[:, 1] == 0).all()
        assert (aggregate_pwa(torch.zeros(1, 3, 4, 4), ALL(3)) == 0).all()

    def test_constant_channel_pools_like_a_sum(self):
        x = draw(1, 3, 4, 5)
        x[:, 0] = 7.0
        w = soft_proposals(x, torch.tensor([0]), 2, 3)
        torch.testing.assert_close(w, torch.full_like(w, 20 ** (-1 / 6)))
        torch.testing.assert_close(aggregate_masks(x, w), w[0, 0, 0, 0] * x.sum(dim=(2, 3)))

    def test_single_active_position_gives_its_features(self):
        x = draw(1, 4, 5, 5)
        x[:, 2] = 0
        x[:, 2, 3, 1] = 0.3
        torch.testing.assert_close(aggregate_pwa(x, torch.tensor([2]), normalize=False), x[:, :, 3, 1])

    def test_alpha_and_beta_of_1_average_and_a_large_beta_sums(self):
        x = draw(1, 3, 4, 4, dtype=torch.float64)
        w = soft_proposals(x, ALL(3), 1, 1)
        torch.testing.assert_close(w.sum(dim=(2, 3)), torch.ones(1, 3, dtype=torch.float64))
        support = (x > 0).double()
        torch.testing.assert_close(soft_proposals(x, ALL(3), 2, 1e9), support)

    def test_any_order_of_the_positions_gives_the_same_vector(self):
        x = draw(1, 6, 4, 5)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
        shuffled = x.flatten(2)[:, :, order].view(1, 6, 5, 4)
        torch.testing.assert_close(aggregate_pwa(shuffled, ALL(3)), aggregate_pwa(x, ALL(3)))
        torch.testing.assert_close(aggregate_pwa(x.flip(3), ALL(3)), aggregate_pwa(x, ALL(3)))

    def test_equals_a_double_loop(self):
        x, chosen = draw(2, 5, 3, 4, dtype=torch.float64), [1, 4]
        for b in range(2):
            blocks = []
            for n in chosen:
                norm = math.sqrt(sum(float(v) ** 2 for v in x[b, n].flatten()))
                block = torch.zeros(5, dtype=torch.float64)
                for i in range(3):
                    for j in range(4):
                        block += math.sqrt(float(x[b, n, i, j]) / norm) * x[b, :, i, j]
                blocks.append(block)
            expected = torch.cat(blocks)
            torch.testing.assert_close(aggregate_pwa(x, torch.tensor(chosen))[b], expected / expected.norm())

    def test_maps_padded_with_0_to_one_size_give_the_same_vectors(self):
        small, large = draw(1, 4, 3, 5), draw(1, 4, 6, 4, seed=1)
        batch = torch.zeros(2, 4, 6, 5)
        batch[:1, :, :3], batch[1:, :, :, :4] = small, large
        together = aggregate_pwa(batch, ALL(4))
        torch.testing.assert_close(together, torch.cat([aggregate_pwa(x, ALL(4)) for x in (small, large)]))

    def test_order_of_the_detectors_orders_blocks_and_keeps_distances(self):
        x, order = draw(3, 5, 4, 4), torch.tensor([4, 0, 2])
        a, b = aggregate_pwa(x, order.sort().values), aggregate_pwa(x, order)
        torch.testing.assert_close(b.view(3, 3, 5), a.view(3, 3, 5)[:, [2, 0, 1]])
        torch.testing.assert_close(torch.cdist(a, a), torch.cdist(b, b), atol=1e-5, rtol=0)

    def test_mask_of_ones_is_sum_pooling(self):
        x = draw(2, 3, 4, 4)
        torch.testing.assert_close(aggregate_masks(x, torch.ones(2, 1, 4, 4)), x.sum(dim=(2, 3)))

    def test_half_precision_sums_in_float32(self):
        x = draw(1, 8, 64, 64) * 400
        half = x.half().clamp(max=500)
        expected = aggregate_pwa(half.double(), ALL(8), normalize=False)
        got = aggregate_pwa(half, ALL(8), normalize=False)
        assert got.dtype == torch.float32 and float(got.max()) > 65504  # float16 ends there
        assert float(((got - expected) / expected).abs().max()) < 1e-2

    def test_gradients(self):
        x = (draw(1, 3, 2, 3, dtype=torch.float64) + 0.1).requires_grad_()
        w = torch.rand(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(aggregate_masks, (x, w))
        assert torch.autograd.gradcheck(lambda x: soft_proposals(x, ALL(2)), (x,))
        grad = torch.rand(1, 6, dtype=torch.float64)
        (got,) = torch.autograd.grad(aggregate_masks(x, w), x, grad)
        torch.testing.assert_close(got, torch.einsum("bnhw,bnc->bchw", w, grad.view(1, 2, 3)))

    def test_eps_keeps_gradients_finite_where_features_are_0(self):
        x = draw(1, 2, 3, 3)
        x[:, 1] = 0
        x.requires_grad_()
        soft_proposals(x, ALL(2), eps=1e-6).sum().backward()
        assert x.grad.isfinite().all()

    def test_refuses_negative_features_unless_told_to_clamp(self):
        x = torch.tensor([[[[1.0, -1.0]]]])
        with pytest.raises(ValueError, match="soft_proposals: expected features of 0 or more"):
            soft_proposals(x, ALL(1))
        assert soft_proposals(x, ALL(1), clamp=True).flatten().tolist() == [1, 0]

    @pytest.mark.parametrize(("alpha", "beta", "eps"), [(0, 2, 0), (2, -1, 0), (2, 2, -1), (math.nan, 2, 0)])
    def test_refuses_exponents(self, alpha, beta, eps):
        with pytest.raises(ValueError, match="alpha and beta > 0 and eps >= 0"):
            soft_proposals(torch.ones(1, 1, 2, 2), ALL(1), alpha, beta, eps)

    def test_nan_stays_in_its_image(self):
        x = draw(2, 3, 4, 4)
        x[0, 1, 2, 2] = math.nan
        out = aggregate_pwa(x, ALL(3))
        assert out[0].isnan().any() and out[1].isfinite().all()

    def test_no_position_gives_zero(self):
        assert (aggregate_pwa(torch.zeros(1, 3, 0, 4), ALL(2)) == 0).all()


class TestBaselines:
    def test_by_hand(self):
        x = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
        assert pool_baseline(x, "mean").tolist() == [[2, 0]]
        assert pool_baseline(x, "max").tolist() == [[3, 0]]
        torch.testing.assert_close(pool_baseline(x, "gem", 3.0), torch.tensor([[14.0 ** (1 / 3), 0.0]]))
        with pytest.raises(ValueError, match="expected 'mean', 'max' or 'gem', got 'sum'"):
            pool_baseline(x, "sum")


class TestDetectors:
    def test_are_the_channels_of_largest_variance_in_increasing_order(self):
        table = np.random.default_rng(0).normal(size=(9, 12)) * np.arange(12)[::-1]
        indices, variances = select_detectors(torch.from_numpy(table), 4)
        np.testing.assert_allclose(variances, table.var(axis=0))
        assert indices.tolist() == sorted(np.argsort(-table.var(axis=0))[:4].tolist())
        shuffled = select_detectors(torch.from_numpy(table[::-1].copy()), 4)[0]
        assert shuffled.tolist() == indices.tolist()

    def test_all_channels_and_one(self):
        table = torch.tensor([[0.0, 5.0, 1.0], [0.0, 9.0, 2.0]])
        assert select_detectors(table, 3)[0].tolist() == [0, 1, 2]
        assert select_detectors(table, 1)[0].tolist() == [1]
        assert select_detectors(table, 2)[0].tolist() == [1, 2]  # the constant channel comes last

    def test_equal_variances_go_to_the_first_channel(self):
        table = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 3.0, 0.0, 3.0]])
        assert select_detectors(table, 3)[0].tolist() == [0, 1, 3]

    def test_statistics_are_sums_or_means_in_float64(self):
        x = torch.full((1, 2, 300, 300), 0.1)
        torch.testing.assert_close(channel_statistics(x), x.double().sum(dim=(2, 3)), rtol=1e-15, atol=0)
        torch.testing.assert_close(channel_statistics(x, "mean"), x.double().mean(dim=(2, 3)), rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match="pooling 'sum' or 'mean'"):
            channel_statistics(x, "max")

    @pytest.mark.parametrize(
        ("table", "n", "message"),
        [
            (torch.ones(1, 4), 2, "of two or more images"),
            (torch.ones(0, 4), 2, "of two or more images"),
            (torch.ones(3, 4), 5, "1 <= n <= C"),
            (torch.ones(3, 4), 0, "1 <= n <= C"),
            (torch.full((3, 4), math.nan), 2, "expected finite statistics"),
        ],
    )
    def test_refuses(self, table, n, message):
        with pytest.raises(ValueError, match=message):
            select_detectors(table, n)


class TestWhitening:
    @pytest.mark.parametrize(("n", "width", "dim"), [(40, 8, 8), (40, 8, 3), (12, 30, 11), (12, 30, 5)])
    def test_fitted_vectors_become_white(self, n, width, dim):
        x = vectors(n, width) @ torch.diag(torch.linspace(0.1, 3, width, dtype=torch.float64))
        z = fit_whitening(x, dim).transform(x, normalize=False)
        torch.testing.assert_close(z.mean(dim=0), torch.zeros(dim, dtype=torch.float64), atol=1e-10, rtol=0)
        torch.testing.assert_close(z.T.cov(), torch.eye(dim, dtype=torch.float64), atol=1e-9, rtol=0)

    @pytest.mark.parametrize(("n", "width"), [(40, 8), (12, 30)])
    def test_agrees_with_a_singular_value_decomposition_up_to_signs(self, n, width):
        x = vectors(n, width)
        space = fit_whitening(x, 6)
        centred = unit(x) - unit(x).mean(dim=0)
        _, values, rows = np.linalg.svd(centred.numpy(), full_matrices=False)
        np.testing.assert_allclose(space.eigenvalues, values[:6] ** 2 / (n - 1))
        np.testing.assert_allclose(np.abs((space.components.numpy() * rows[:6]).sum(axis=1)), np.ones(6))

    def test_results_have_length_1_and_do_not_depend_on_the_input_length(self):
        x = vectors(20, 6)
        space = fit_whitening(x, 4)
        z = space.transform(7 * x)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(20, dtype=torch.float64))
        torch.testing.assert_close(z, space.transform(x))

    def test_distances_outlive_a_rotation_of_the_input_and_the_signs(self):
        x = vectors(25, 6)
        turn = torch.linalg.qr(vectors(6, 6, seed=1)).Q
        a, b = fit_whitening(x, 4).transform(x), fit_whitening(x @ turn, 4).transform(x @ turn)
        torch.testing.assert_close(torch.cdist(a, a), torch.cdist(b, b), atol=1e-9, rtol=0)

    def test_columns_may_be_multiplied_in_blocks(self, monkeypatch):
        x = vectors(9, 40)
        whole = fit_whitening(x, 5).transform(x)
        monkeypatch.setattr(sys.modules["fastcam.methods.sba"], "BLOCK", 7)
        torch.testing.assert_close(fit_whitening(x, 5).transform(x).abs(), whole.abs())

    def test_zero_vector_has_an_image(self):
        x = vectors(20, 6)
        assert fit_whitening(x, 4).transform(torch.zeros(1, 6)).isfinite().all()

    @pytest.mark.parametrize(
        ("x", "dim", "message"),
        [
            (torch.rand(5, 9), 5, "1 <= dim <= min"),
            (torch.rand(1, 9), 1, "1 <= dim <= min"),
            (torch.rand(9, 3), 4, "1 <= dim <= min"),
            (torch.rand(5, 9), 0, "1 <= dim <= min"),
            (torch.rand(2, 9).repeat(4, 1), 3, "expected dim of at most 1, the rank of the vectors, got 3"),
            (torch.ones(6, 9), 1, "at most 0"),
            (torch.full((6, 9), math.nan), 1, "expected finite vectors"),
        ],
    )
    def test_refuses(self, x, dim, message):
        with pytest.raises(ValueError, match=message):
            fit_whitening(x, dim)

    def test_refuses_vectors_of_another_width(self):
        with pytest.raises(ValueError, match=r"expected vectors \(n, 6\), got \(2, 5\)"):
            fit_whitening(vectors(20, 6), 4).transform(torch.rand(2, 5))


class TestSearch:
    def test_order_is_that_of_distances_and_of_dot_products(self, monkeypatch):
        database, queries = unit(vectors(50, 7)), unit(vectors(6, 7, seed=1))
        module = sys.modules["fastcam.methods.sba"]
        monkeypatch.setattr(module, "BLOCK", 16)
        monkeypatch.setattr(module, "ROWS", 4)
        distances, order = rank(queries, database, 12)
        expected = np.sum((queries.numpy()[:, None] - database.numpy()[None]) ** 2, axis=2)
        np.testing.assert_array_equal(order, np.argsort(expected, axis=1)[:, :12])
        np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :12], atol=1e-12)
        np.testing.assert_array_equal(
            rank(queries, database)[1], (queries @ database.T).numpy().argsort(axis=1)[:, ::-1]
        )

    def test_query_that_is_in_the_database_comes_first(self):
        database = unit(vectors(30, 7).float())
        distances, order = rank(database, database, 3)
        assert order[:, 0].tolist() == list(range(30))
        assert float(distances[:, 0].max()) < 1e-6

    def test_equal_distances_come_in_the_order_of_the_database(self, monkeypatch):
        monkeypatch.setattr(sys.modules["fastcam.methods.sba"], "BLOCK", 3)
        assert rank(torch.ones(1, 2), torch.ones(8, 2))[1].tolist() == [list(range(8))]

    def test_zero_descriptor_is_at_distance_1_from_all(self):
        distances, _ = rank(torch.zeros(1, 3), unit(torch.rand(4, 3)))
        torch.testing.assert_close(distances, torch.ones(1, 4))

    def test_expansion(self):
        database, queries = unit(vectors(20, 5)), unit(vectors(3, 5, seed=1))
        before = database.clone()
        order = rank(queries, database)[1]
        assert expand_query(queries, database, order, 0) is queries
        for k in (1, 10, 20):
            got = expand_query(queries, database, order, k)
            expected = queries + torch.stack([database[row[:k]].sum(dim=0) for row in order])
            torch.testing.assert_close(got, expected / expected.norm(dim=1, keepdim=True))
        assert torch.equal(database, before)
        mean = unit(database.sum(dim=0))
        assert ((expand_query(queries, database, order, 20) @ mean) > (queries @ mean)).all()
        missing = torch.full((3, 2), -1)
        torch.testing.assert_close(expand_query(queries, database, missing, 2), queries)
        with pytest.raises(ValueError, match="expected k from 0 to the 20 neighbours, got 21"):
            expand_query(queries, database, order, 21)

    @pytest.mark.parametrize(
        ("queries", "database", "k", "message"),
        [
            (torch.ones(1, 3), torch.ones(0, 3), None, "of at least one vector"),
            (torch.ones(1, 3), torch.ones(2, 4), None, r"got \(1, 3\) and \(2, 4\)"),
            (torch.ones(1, 3), torch.ones(2, 3), 0, "expected k >= 1, got 0"),
            (torch.full((1, 3), math.nan), torch.ones(2, 3), 1, "expected finite vectors"),
        ],
    )
    def test_refuses(self, queries, database, k, message):
        with pytest.raises(ValueError, match=f"rank: .*{message}"):
            rank(queries, database, k)

    def test_faiss_finds_what_the_exact_search_finds(self):
        pytest.importorskip("faiss")
        database, queries = unit(vectors(300, 16).float()), unit(vectors(9, 16, seed=1).float())
        expected = rank(queries, database, 5)
        for kind in ("Flat", "HNSW32"):
            distances, order = rank_faiss(queries, faiss_index(database, kind), 5)
            assert (order == expected[1]).float().mean() > 0.9, kind
            torch.testing.assert_close(distances[:, 0], expected[0][:, 0], atol=1e-5, rtol=0)
        with pytest.raises(FastcamError, match="faiss refuses it"):
            faiss_index(database, "Nonsense")

    def test_faiss_that_is_missing_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(FastcamError, match=r"needs faiss, which is not installed; .*fastcam\[retrieval\]"):
            faiss_index(torch.ones(2, 3))

    def test_faiss_calls_and_what_becomes_of_missing_neighbours(self, monkeypatch):
        class Index:
            ntotal = 3

            def train(self, x):
                self.trained = x.shape

            def add(self, x):
                assert x.dtype == np.float32 and self.trained == x.shape

            def search(self, x, k):
                return np.full((len(x), k), 0.5, np.float32), np.array([[2, 0, -1]] * len(x))

        class Faiss:
            METRIC_L2 = 1

            @staticmethod
            def index_factory(width, kind, metric):
                assert (width, kind, metric) == (4, "HNSW32", 1)
                return Index()

        monkeypatch.setitem(sys.modules, "faiss", Faiss)
        distances, order = rank_faiss(torch.ones(2, 4), faiss_index(torch.ones(3, 4), "HNSW32"), 9)
        assert order.tolist() == [[2, 0, -1]] * 2
        assert distances.tolist() == [[0.5, 0.5, math.inf]] * 2


def toy(seed):
    """Features of 8 objects in 4 images each: an object fires its own channels in one place, clutter fires the others.

    16 channels say what the object is, two a object; 16 others fire all over the image, each image differently.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i in range(32):
        x = torch.rand(32, 10, 10, generator=generator) * 0.2
        clutter = 16 + torch.randperm(16, generator=generator)[:4]
        x[clutter] += torch.rand(4, 10, 10, generator=generator)
        row, column = torch.randint(7, (2,), generator=generator).tolist()
        thing = i // 4
        x[[2 * thing, 2 * thing + 1], row : row + 3, column : column + 3] += 6
        images.append(x)
    return torch.stack(images)


def mean_ap(database):
    order = rank(database, database)[1].tolist()
    groups = [{i for i in range(32) if i // 4 == q // 4} - {q} for q in range(32)]
    return sum(ranking_average_precision(order[q], groups[q], {q}) for q in range(32)) / 32


class TestToySet:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_parts_beat_sums_with_the_same_whitening_and_sums_beat_chance(self, seed):
        x, others = toy(seed), toy(seed + 100)
        indices = select_detectors(channel_statistics(x), 24)[0]

        def whitened(describe):
            return fit_whitening(describe(others), 12).transform(describe(x))

        parts = mean_ap(whitened(lambda x: aggregate_pwa(x, indices)))
        sums = mean_ap(whitened(lambda x: unit(channel_statistics(x).float())))
        chance = mean_ap(unit(torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))))
        assert parts > sums > chance


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return create_method("sba", num_classes=1, backbone="resnet10t", detectors=5)


class TestMethod:
    def test_describes_once_detectors_are_chosen(self, method):
        images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        fresh = create_method("sba", num_classes=1, backbone="resnet10t", detectors=5)
        with pytest.raises(FastcamError, match="no detectors are chosen"):
            fresh.describe(images)
        with torch.no_grad():
            method.set_detectors(select_detectors(method.statistics(images), 5)[0])
            found = method.describe(images)
            one = torch.cat([method.describe(image[None]) for image in images])
        assert found.shape == (3, method.width) == (3, 5 * 512)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4)
        assert not any(p.requires_grad for p in method.parameters())

    def test_scales_are_summed_before_the_length_becomes_1(self, method):
        views = [torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (64, 96)]
        method.set_detectors(torch.arange(5))
        with torch.no_grad():
            parts = [aggregate_pwa(method.features(view), torch.arange(5), normalize=False) for view in views]
            torch.testing.assert_close(method.describe(views), unit(parts[0] + parts[1]))
            expected = sum(channel_statistics(method.features(view)) for view in views)
            torch.testing.assert_close(method.statistics(views), expected)

    @pytest.mark.parametrize("kind", ["mean", "max", "gem"])
    def test_baselines_need_no_detectors(self, kind):
        method = create_method("sba", num_classes=1, backbone="resnet10t", aggregation=kind)
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(method.describe(images), unit(pool_baseline(method.features(images), kind)))

    def test_cut_stages_end_the_network_earlier(self):
        method = create_method("sba", num_classes=1, backbone="resnet10t", cut_stages=1, detectors=2)
        assert (method.backbone.channels[-1], method.width) == (256, 512)

    def test_saved_method_describes_the_same(self, method, tmp_path):
        method.set_detectors(torch.tensor([1, 4, 8, 9, 30]))
        about = {"method": "sba", "num_classes": 1, "classes": ["none"], "backbone": "resnet10t"}
        config = {"backbone": "resnet10t", "detectors": 5}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), {**about, "config": config})
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(load_method(tmp_path / "w.safetensors").describe(images), method.describe(images))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"aggregation": "sum"}, "aggregation is 'sum', expected pwa, mean, max or gem"),
            ({"statistic": "max"}, "statistic is 'max', expected sum or mean"),
            ({"detectors": 0}, "detectors is 0, expected at least 1"),
            ({"detectors": 513}, "detectors is 513, but resnet10t has 512 channels"),
            ({"alpha": 0.0}, "alpha is 0.0, expected a number above 0"),
            ({"beta": math.nan}, "beta is nan, expected a number above 0"),
            ({"power": -1.0}, "power is -1.0, expected a number above 0"),
            ({"cut_stages": 2}, "cut_stages is 2, expected 0 to 1"),
            ({"detector": 3}, "unknown setting 'detector', did you mean 'detectors'"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(FastcamError, match=message):
            create_method("sba", num_classes=1, **{"backbone": "resnet10t", **settings})

    @pytest.mark.parametrize(
        "indices", [[0, 1, 2], [0, 1, 2, 3, 512], [4, 3, 2, 1, 0], [0, 0, 1, 2, 3], [-1, 0, 1, 2, 3]]
    )
    def test_refuses_detectors_of_another_configuration(self, method, indices):
        with pytest.raises(FastcamError, match="expected 5 increasing channels from 0 to 511"):
            method.set_detectors(torch.tensor(indices))
