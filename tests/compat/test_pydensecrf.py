"""The drop-in module against pydensecrf's arrays and, where it is installed, pydensecrf itself."""

import multiprocessing
from functools import partial

import numpy as np
import pytest
import torch

import fastcam.compat.pydensecrf.densecrf as dcrf
from fastcam.compat.pydensecrf import utils

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NORMALIZATIONS = {
    "none": dcrf.NO_NORMALIZATION,
    "before": dcrf.NORMALIZE_BEFORE,
    "after": dcrf.NORMALIZE_AFTER,
    "symmetric": dcrf.NORMALIZE_SYMMETRIC,
}
H, W, M = 16, 18, 3


@pytest.fixture
def arrays(golden):
    return golden("postprocess_densecrf_small")


@pytest.fixture
def peer():
    """pydensecrf's two modules."""
    module = pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2")
    return module, pytest.importorskip("pydensecrf.utils")


def crf_2d(arrays):
    crf = dcrf.DenseCRF2D(W, H, M)
    crf.setUnaryEnergy(arrays["unary"])
    return crf


def by_features(crf, steps):
    """What `inference` does where terms are no image's."""
    return dcrf.DenseCRF.inference(crf, steps)


def assert_both_ways_give(crf, steps, expected):
    for q in (crf.inference(steps), by_features(crf, steps)):
        assert q.dtype == np.float32
        np.testing.assert_allclose(np.array(q).reshape(M, H, W), expected, **CLOSE)


class TestGolden:
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_one_term(self, arrays, normalization, steps):
        gaussian, bilateral = crf_2d(arrays), crf_2d(arrays)
        gaussian.addPairwiseGaussian(sxy=3, compat=3, normalization=NORMALIZATIONS[normalization])
        bilateral.addPairwiseBilateral(
            sxy=8, srgb=13, rgbim=arrays["image"], compat=10, normalization=NORMALIZATIONS[normalization]
        )
        assert_both_ways_give(gaussian, steps, arrays[f"q_gauss_{normalization}_t{steps}"])
        assert_both_ways_give(bilateral, steps, arrays[f"q_bil_{normalization}_t{steps}"])

    @pytest.mark.parametrize("kernel", ["const", "diag", "full"])
    def test_kernels(self, arrays, kernel):
        crf, kind = crf_2d(arrays), getattr(dcrf, f"{kernel.upper()}_KERNEL")
        crf.addPairwiseGaussian((3, 3), 3, kind)
        crf.addPairwiseBilateral((8, 8), (13, 13, 13), arrays["image"], 10, kind, dcrf.NORMALIZE_SYMMETRIC)
        assert_both_ways_give(crf, 2, arrays[f"q_kernel_{kernel}"])

    @pytest.mark.parametrize("name", ["vector", "matrix", "potts", "potts_as_matrix"])
    def test_compatibilities(self, arrays, name):
        given = {"potts": 3, "potts_as_matrix": 3 * (1 - np.eye(M, dtype=np.float32))}
        crf = crf_2d(arrays)
        crf.addPairwiseGaussian(3, given[name] if name in given else arrays[f"compat_{name}"])
        assert_both_ways_give(crf, 2, arrays[f"q_compat_{name}"])

    def test_two_standard_deviations(self, arrays):
        crf = crf_2d(arrays)
        crf.addPairwiseGaussian((2, 5), 3)
        assert_both_ways_give(crf, 2, arrays["q_gauss_sx2_sy5"])

    def test_features_of_utils(self, arrays):
        features = utils.create_pairwise_bilateral((8, 8), (13, 13, 13), arrays["image"], chdim=2)
        np.testing.assert_allclose(features, arrays["features_utils_bilateral"], rtol=1e-6)
        for crf in (crf_2d(arrays), dcrf.DenseCRF(H * W, M)):
            crf.setUnaryEnergy(arrays["unary"])
            crf.addPairwiseEnergy(features, compat=10)
            np.testing.assert_allclose(crf.inference(2).reshape(M, H, W), arrays["q_utils_bilateral"], **CLOSE)

    def test_step_by_step_with_divergence(self, arrays):
        crf = crf_2d(arrays)
        crf.addPairwiseGaussian(3, 3)
        crf.addPairwiseBilateral(8, 13, arrays["image"], 10)
        Q, tmp1, tmp2 = crf.startInference()
        divergences = [crf.klDivergence(Q)]
        for _ in range(5):
            crf.stepInference(Q, tmp1, tmp2)
            divergences.append(crf.klDivergence(Q))
        np.testing.assert_allclose(divergences, arrays["kl_t0_to_t5"], rtol=1e-5)
        np.testing.assert_allclose(Q.reshape(M, H, W), arrays["q_step5"], **CLOSE)

    def test_a_step_filters_as_the_lattice_of_101_points_does(self, golden):
        lattice = golden("postprocess_permutohedral_rand3d")
        crf = dcrf.DenseCRF(101, 5)
        crf.setUnaryEnergy(np.zeros((5, 101)))
        crf.addPairwiseEnergy(lattice["features"], 0.25, normalization=dcrf.NO_NORMALIZATION)
        Q = lattice["values"].copy()
        crf.stepInference(Q, None, None)
        score = np.exp(0.25 * lattice["filtered"].astype(np.float64))
        np.testing.assert_allclose(Q, score / score.sum(0), **CLOSE)

    def test_energies(self, arrays):
        labels, softmax = arrays["labels"], arrays["softmax"]
        results = {
            "unary": utils.unary_from_softmax(softmax),
            "unary_clip": utils.unary_from_softmax(arrays["softmax_with_zero"]),
            "unary_scale06": utils.unary_from_softmax(arrays["softmax_with_zero"], scale=0.6),
            "unary_unnormalised_scores": utils.unary_from_softmax(0.3 * arrays["softmax_with_zero"]),
            "unary_from_labels_gt07_zero_not_unsure": utils.unary_from_labels(labels, 3, 0.7, zero_unsure=False),
            "unary_from_labels_gt05_zero_unsure": utils.unary_from_labels(labels, 2, 0.5),
        }
        for name, result in results.items():
            assert result.dtype == np.float32
            np.testing.assert_allclose(result, arrays[name], rtol=1e-6, err_msg=name)


class TestBesidePydensecrf:
    """The same random problem through both modules."""

    @pytest.mark.parametrize("normalization", NORMALIZATIONS.values())
    @pytest.mark.parametrize(
        ("d", "N", "labels"), [(1, 6, 2), (2, 101, 3), (3, 64, 1), (4, 33, 5), (5, 203, 21), (6, 50, 4)]
    )
    def test_any_features(self, peer, d, N, labels, normalization):
        rng = np.random.default_rng(d)
        unary = rng.standard_normal((labels, N)).astype(np.float32)
        matrix = rng.random((labels, labels)).astype(np.float32)
        for compat in (0.7, -rng.random(labels).astype(np.float32), matrix):
            features = (1.5 * rng.standard_normal((d, N))).astype(np.float32)
            crfs = []
            for module in (peer[0], dcrf):
                crf = module.DenseCRF(N, labels)
                crf.setUnaryEnergy(unary)
                crf.addPairwiseEnergy(features, compat, module.FULL_KERNEL, int(normalization))
                crf.addPairwiseEnergy(features[:1] / 2, 0.5, normalization=module.NORMALIZE_AFTER)
                crfs.append(crf)
            theirs, ours = (crf.inference(4) for crf in crfs)
            np.testing.assert_allclose(ours, np.array(theirs), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(crfs[1].klDivergence(ours), crfs[0].klDivergence(theirs), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(("w", "h", "labels"), [(1, 1, 2), (1, 9, 2), (13, 1, 3), (7, 11, 4), (30, 21, 21)])
    @pytest.mark.parametrize("normalization", NORMALIZATIONS.values())
    def test_images(self, peer, w, h, labels, normalization):
        rng = np.random.default_rng(w)
        p = rng.dirichlet(np.ones(labels), h * w).T.astype(np.float32, order="C")
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        options = {"normalization": int(normalization)}

        def solve(densecrf, tools):
            crf = densecrf.DenseCRF2D(w, h, labels)
            crf.setUnaryEnergy(tools.unary_from_softmax(p))
            crf.addPairwiseGaussian(sxy=(2, 3.5), compat=0.4, **options)
            crf.addPairwiseBilateral(sxy=9, srgb=(60, 70, 80), rgbim=image, compat=0.6, **options)
            return np.array(crf.inference(5))

        np.testing.assert_allclose(solve(dcrf, utils), solve(*peer), rtol=1e-3, atol=1e-5)

    def test_terms_of_unlike_normalization_and_two_of_a_kind(self, peer):
        rng = np.random.default_rng(0)
        unary = rng.standard_normal((3, 20)).astype(np.float32)

        def solve(densecrf):
            crf = densecrf.DenseCRF2D(5, 4, 3)
            crf.setUnaryEnergy(unary)
            crf.addPairwiseGaussian(1, 0.5, normalization=densecrf.NORMALIZE_BEFORE)
            crf.addPairwiseGaussian(4, 0.5, normalization=densecrf.NORMALIZE_AFTER)
            return np.array(crf.inference(3))

        np.testing.assert_allclose(solve(dcrf), solve(peer[0]), **CLOSE)

    def test_volumes(self, peer):
        volume = np.random.default_rng(0).random((4, 5, 6, 2)).astype(np.float32)
        unary = np.random.default_rng(1).standard_normal((3, 120)).astype(np.float32)

        def solve(densecrf, tools):
            crf = densecrf.DenseCRF(120, 3)
            crf.setUnaryEnergy(unary)
            crf.addPairwiseEnergy(tools.create_pairwise_gaussian((1, 2, 3), volume.shape[:3]), 2)
            crf.addPairwiseEnergy(tools.create_pairwise_bilateral((3, 3, 3), (0.2, 0.3), volume, chdim=3), 3)
            crf.addPairwiseEnergy(tools.create_pairwise_bilateral((3, 3, 3), 0.2, volume[..., 0]), 1)
            return np.array(crf.inference(3))

        np.testing.assert_allclose(solve(dcrf, utils), solve(*peer), rtol=1e-3, atol=1e-5)

    def test_features_and_energies_are_equal(self, peer):
        theirs = peer[1]
        image = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
        labels = np.random.default_rng(1).integers(0, 3, (5, 7))
        p = np.random.default_rng(2).random((3, 5, 7)).astype(np.float32)
        for name, args in (
            ("create_pairwise_gaussian", ((2, 3.3), (5, 7))),
            ("create_pairwise_bilateral", ((2, 3.3), (5, 6, 7.7), image, 0)),
            ("create_pairwise_bilateral", ((2, 3.3), (5, 6, 7.7), image.transpose(1, 0, 2), -2)),
            ("create_pairwise_bilateral", ((2, 3.3), (5,), image[0])),
            ("unary_from_labels", (labels, 3, 0.6, False)),
            ("unary_from_labels", (labels, 2, 0.6)),
            ("unary_from_softmax", (p, None, 0.01)),
            ("unary_from_softmax", (p, 0.9)),
            ("unary_from_softmax", (p, None, None)),
            ("unary_from_softmax", (1.4 * p,)),
        ):
            result, expected = getattr(utils, name)(*args), getattr(theirs, name)(*args)
            assert result.shape == expected.shape
            assert result.dtype == expected.dtype
            np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7, err_msg=f"{name} {args[0]}")

    def test_old_names(self, peer):
        with pytest.warns(DeprecationWarning, match="unary_from_labels"):
            ours = utils.compute_unary(np.array([[0, 1], [2, 1]]), 2)
        np.testing.assert_allclose(ours, peer[1].compute_unary(np.array([[0, 1], [2, 1]]), 2), rtol=1e-6)
        p = np.array([[0.1, 0.6], [0.9, 0.4]], np.float32)
        for gt_prob in (1, 0.8):
            with pytest.warns(DeprecationWarning, match="unary_from_softmax"):
                ours = utils.softmax_to_unary(p, gt_prob)
            np.testing.assert_allclose(ours, peer[1].softmax_to_unary(p, gt_prob), rtol=1e-6)

    def test_unary_objects(self, peer):
        rng = np.random.default_rng(0)
        L, f = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal((4, 7)).astype(np.float32)

        def solve(densecrf, kind):
            crf = densecrf.DenseCRF(7, 3)
            crf.setUnary(densecrf.LogisticUnary(L, f) if kind == "logistic" else densecrf.ConstUnary(L @ f))
            return np.array(crf.inference(0))

        for kind in ("logistic", "constant"):
            np.testing.assert_allclose(solve(dcrf, kind), solve(peer[0], kind), **CLOSE)
        crf = dcrf.DenseCRF(7, 3)
        crf.setUnaryEnergy(L, f)
        np.testing.assert_allclose(crf.inference(0), solve(peer[0], "logistic"), **CLOSE)


# What published systems write, with the modules they import as arguments.


def irn_crf_inference_label(densecrf, tools, img, labels, t=10, n_labels=21, gt_prob=0.7):
    h, w = img.shape[:2]
    d = densecrf.DenseCRF2D(w, h, n_labels)
    unary = tools.unary_from_labels(labels, n_labels, gt_prob=gt_prob, zero_unsure=False)
    d.setUnaryEnergy(unary)
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(np.copy(img)), compat=10)
    q = d.inference(t)
    return np.argmax(np.array(q).reshape((n_labels, h, w)), axis=0)


def seam_crf_inference(densecrf, tools, img, probs, t=10, scale_factor=1, labels=21):
    h, w = img.shape[:2]
    d = densecrf.DenseCRF2D(w, h, labels)
    unary = np.ascontiguousarray(tools.unary_from_softmax(probs))
    d.setUnaryEnergy(unary)
    d.addPairwiseGaussian(sxy=3 / scale_factor, compat=3)
    d.addPairwiseBilateral(sxy=80 / scale_factor, srgb=13, rgbim=np.copy(img), compat=10)
    return np.array(d.inference(t)).reshape((labels, h, w))


def clip_es_crf(densecrf, tools, image, probmap):
    C, h, w = probmap.shape
    U = np.ascontiguousarray(tools.unary_from_softmax(probmap))
    d = densecrf.DenseCRF2D(w, h, C)
    d.setUnaryEnergy(U)
    d.addPairwiseGaussian(sxy=1, compat=3)
    d.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(image), compat=4)
    return np.array(d.inference(10)).reshape((C, h, w))


def test_call_sites_of_published_systems_give_pydensecrfs_result(peer):
    image = pytest.importorskip("skimage.data", reason="needs scikit-image").coffee()[100:160, 150:233]
    rng = np.random.default_rng(0)
    grey = image.mean(2)
    p = np.stack([np.exp(-np.abs(grey - centre) / 40) for centre in (30, 110, 200)]) * rng.uniform(0.5, 1, (3, 60, 83))
    p = (p / p.sum(0)).astype(np.float32)
    labels = p.argmax(0)
    for call, given in (
        (partial(irn_crf_inference_label, n_labels=3), labels),
        (partial(seam_crf_inference, labels=3), p),
        (partial(seam_crf_inference, labels=3, scale_factor=2, t=1), p),
        (clip_es_crf, p),
    ):
        ours, theirs = call(dcrf, utils, image, given), call(*peer, image, given)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


class TestArraysPydensecrfRefuses:
    def test_strides_precision_and_protection_do_not_matter(self, arrays):
        def solve(unary, image, compat):
            crf = dcrf.DenseCRF2D(W, H, M)
            crf.setUnaryEnergy(unary)
            crf.addPairwiseBilateral(8, 13, image, compat)
            return crf.inference(2)

        unary, image, compat = arrays["unary"], arrays["image"], arrays["compat_matrix"]
        expected = solve(unary, image, compat)
        protected = [array.copy() for array in (unary, image, compat)]
        for array in protected:
            array.setflags(write=False)
        for given in (
            protected,
            [np.asfortranarray(array) for array in (unary, image, compat)],
            [np.repeat(array, 2, axis=-1)[..., ::2] for array in (unary, image, compat)],
            [torch.from_numpy(array) for array in (unary, image, compat)],
            [unary.astype(np.float64), image, compat.astype(np.float64)],
            [unary.tolist(), image, compat.tolist()],
        ):
            np.testing.assert_array_equal(solve(*given), expected)

    def test_arrays_are_copied(self, arrays):
        unary, image = arrays["unary"].copy(), arrays["image"].copy()
        features = utils.create_pairwise_gaussian((3, 3), (H, W))
        crf = dcrf.DenseCRF2D(W, H, M)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseBilateral(8, 13, image, 10)
        crf.addPairwiseEnergy(features, 3)
        unary[:], image[:], features[:] = 0, 0, 0
        same = crf_2d(arrays)
        same.addPairwiseBilateral(8, 13, arrays["image"], 10)
        same.addPairwiseEnergy(utils.create_pairwise_gaussian((3, 3), (H, W)), 3)
        np.testing.assert_array_equal(crf.inference(2), same.inference(2))

    def test_unsigned_labels_do_not_wrap(self):
        labels = np.array([0, 1, 2])
        np.testing.assert_array_equal(
            utils.unary_from_labels(labels.astype(np.uint8), 2, 0.7), utils.unary_from_labels(labels, 2, 0.7)
        )

    def test_infinite_energy_rules_a_label_out(self, arrays):
        unary = arrays["unary"].copy()
        unary[1, :9] = np.inf
        crf = dcrf.DenseCRF2D(W, H, M)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(3, 3)
        for q in (crf.inference(3), by_features(crf, 3)):
            assert (q[1, :9] == 0).all()
            np.testing.assert_allclose(q.sum(0), 1, rtol=1e-5)
            assert np.isfinite(crf.klDivergence(q))

    def test_one_label_and_one_pixel(self):
        crf = dcrf.DenseCRF2D(1, 1, 1)
        crf.setUnaryEnergy(np.zeros((1, 1)))
        crf.addPairwiseGaussian(3, 3)
        crf.addPairwiseBilateral(3, 3, np.zeros((1, 1, 3), np.uint8), 3)
        assert crf.inference(5) == 1

    def test_subclasses(self, arrays):
        class Mine(dcrf.DenseCRF2D):
            pass

        crf = Mine(W, H, M)
        crf.setUnaryEnergy(arrays["unary"])
        np.testing.assert_allclose(crf.inference(0).reshape(M, H, W), arrays["q_gauss_none_t0"], **CLOSE)

    def test_inference_in_a_forked_process(self, arrays):
        if "fork" not in multiprocessing.get_all_start_methods():
            pytest.skip("needs fork")
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            torch.rand(10**6).add(1)  # torch's own threads do not survive the fork
            with multiprocessing.get_context("fork").Pool(1) as pool:
                child = pool.apply_async(large_inference).get(timeout=60)
            np.testing.assert_array_equal(child, large_inference())
        finally:
            torch.set_num_threads(threads)


def large_inference():
    rng = np.random.default_rng(0)
    crf = dcrf.DenseCRF2D(320, 240, 2)
    crf.setUnaryEnergy(rng.standard_normal((2, 320 * 240)))
    crf.addPairwiseGaussian(3, 3)
    crf.addPairwiseBilateral(50, 5, rng.integers(0, 256, (240, 320, 3), dtype=np.uint8), 10)
    return crf.inference(1)[:, ::97]


def some_crf(w=4, h=3, labels=2):
    crf = dcrf.DenseCRF2D(w, h, labels)
    crf.setUnaryEnergy(np.zeros((labels, w * h)))
    return crf


IMAGE = np.zeros((3, 4, 3), np.uint8)
PLANE = np.zeros((1, 12), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dcrf.DenseCRF(0, 2), ValueError, "DenseCRF: expected nvar >= 1, got 0"),
        (lambda: dcrf.DenseCRF(4, 2.5), TypeError, "DenseCRF: expected nlabels an integer, got float"),
        (lambda: dcrf.DenseCRF2D(4, -1, 2), ValueError, "DenseCRF2D: expected h >= 1, got -1"),
        (lambda: some_crf().setUnaryEnergy(np.zeros((12, 2))), ValueError, r"setUnaryEnergy: expected u \(2, 12\)"),
        (lambda: some_crf().setUnaryEnergy(np.zeros((2, 3, 4))), ValueError, "expected u with 2 axes"),
        (lambda: some_crf().setUnaryEnergy(np.zeros((2, 12), complex)), TypeError, "u of real numbers"),
        (lambda: some_crf().setUnaryEnergy(None), TypeError, "u of real numbers, got object"),
        (lambda: some_crf().setUnaryEnergy(np.full((2, 12), np.nan)), ValueError, "u without NaN"),
        (lambda: some_crf().setUnaryEnergy(np.full((2, 12), np.inf)), ValueError, "a finite energy at every point"),
        (lambda: some_crf().setUnaryEnergy(np.full((2, 12), -np.inf)), ValueError, "u without NaN and -inf"),
        (lambda: some_crf().setUnaryEnergy(np.zeros((2, 5)), np.zeros((4, 12))), ValueError, r"f \(D, N\)"),
        (lambda: some_crf().setUnary(np.zeros((2, 12))), TypeError, "setUnary: expected u a Unary, got ndarray"),
        (lambda: some_crf().setUnary(dcrf.ConstUnary(np.zeros((3, 12)))), ValueError, r"expected u \(2, 12\)"),
        (lambda: dcrf.LogisticUnary(PLANE, PLANE), ValueError, r"expected L \(M, D\) and f \(D, N\)"),
        (lambda: dcrf.DenseCRF(4, 2).inference(1), ValueError, "no unary was set; call setUnaryEnergy"),
        (lambda: dcrf.DenseCRF2D(4, 3, 2).inference(1), ValueError, "no unary was set; call setUnaryEnergy"),
        (lambda: dcrf.DenseCRF(4, 2).startInference(), ValueError, "startInference: no unary was set"),
        (lambda: some_crf().inference(-1), ValueError, "inference: expected niter >= 0, got -1"),
        (lambda: some_crf().inference(1.5), TypeError, "inference: expected niter an integer"),
        (lambda: some_crf().stepInference(np.zeros((2, 12)), None, None), TypeError, "expected Q as startInference"),
        (lambda: some_crf().stepInference(PLANE, None, None), ValueError, r"stepInference: expected Q \(2, 12\)"),
        (lambda: some_crf().klDivergence(PLANE), ValueError, r"klDivergence: expected Q \(2, 12\)"),
        (lambda: some_crf().addPairwiseEnergy(PLANE[:, 1:], 3), ValueError, r"expected features \(1 to 15, 12\)"),
        (lambda: some_crf().addPairwiseEnergy(np.zeros((16, 12)), 3), ValueError, r"features \(1 to 15, 12\)"),
        (lambda: some_crf().addPairwiseEnergy(PLANE + np.nan, 3), ValueError, "finite features"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, np.zeros(3)), ValueError, r"compat a number, \(2,\) or \(2, 2\)"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, np.zeros((2, 2, 1))), ValueError, "got shape"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, np.nan), ValueError, "compat finite"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, 1e39), ValueError, "compat finite in float32"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, "3"), TypeError, "compat of real numbers"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, 3, 7), ValueError, "kernel one of CONST_KERNEL"),
        (lambda: some_crf().addPairwiseEnergy(PLANE, 3, 1, 4), ValueError, "normalization one of NO_NORMALIZATION"),
        (lambda: some_crf().addPairwiseGaussian(0, 3), ValueError, "addPairwiseGaussian: expected sxy a positive"),
        (lambda: some_crf().addPairwiseGaussian((3, 3, 3), 3), ValueError, "sxy a positive number or 2"),
        (lambda: some_crf().addPairwiseGaussian((3, -1), 3), ValueError, "sxy a positive number or 2"),
        (lambda: some_crf().addPairwiseGaussian(None, 3), TypeError, "sxy of real numbers, got object"),
        (lambda: some_crf().addPairwiseBilateral(3, 0, IMAGE, 3), ValueError, "srgb a positive number or 3"),
        (lambda: some_crf().addPairwiseBilateral(3, np.inf, IMAGE, 3), ValueError, "srgb a positive number or 3"),
        (lambda: some_crf().addPairwiseBilateral(3, 3, IMAGE.astype(float), 3), TypeError, "rgbim uint8, got float64"),
        (lambda: some_crf().addPairwiseBilateral(3, 3, IMAGE[:2], 3), ValueError, r"rgbim \(h, w, 3\) = \(3, 4, 3\)"),
        (lambda: some_crf().addPairwiseBilateral(3, 3, IMAGE[..., :1], 3), ValueError, "create_pairwise_bilateral"),
        (lambda: utils.unary_from_labels([0, 1], 1, 0.5), ValueError, "expected n_labels >= 2, got 1"),
        (lambda: utils.unary_from_labels([0, 1], 2, 1), ValueError, r"gt_prob in \(0, 1\), got 1"),
        (lambda: utils.unary_from_labels([0, 255], 2, 0.5), ValueError, r"labels in \[0, 2\], got 0 to 255"),
        (lambda: utils.unary_from_labels([-1, 1], 2, 0.5, False), ValueError, r"labels in \[0, 1\], got -1 to 1"),
        (lambda: utils.unary_from_labels([0.0, 1.0], 2, 0.5), TypeError, "labels of integers, got float64"),
        (lambda: utils.unary_from_softmax([[np.nan], [1]]), ValueError, "sm without NaN"),
        (lambda: utils.unary_from_softmax([[-0.1], [1]], clip=None), ValueError, "sm without NaN and of at least 0"),
        (lambda: utils.unary_from_softmax(PLANE, scale=0), ValueError, r"scale in \(0, 1\], got 0"),
        (lambda: utils.unary_from_softmax(PLANE, clip=2), ValueError, r"clip in \(0, 1\), got 2"),
        (lambda: utils.unary_from_softmax(0.5), ValueError, r"sm \(M, \.\.\.\)"),
        (lambda: utils.create_pairwise_gaussian((3,), (4, 5)), ValueError, "sdims a positive number or 2"),
        (lambda: utils.create_pairwise_gaussian((3, 0), (4, 5)), ValueError, "sdims a positive number or 2"),
        (lambda: utils.create_pairwise_bilateral((3, 3), (5,), IMAGE, 2), ValueError, "schan a positive number or 3"),
        (lambda: utils.create_pairwise_bilateral((3, 3), 5, IMAGE, 3), ValueError, "chdim an axis of img"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("way", ["inference", "stepInference"])
def test_what_float32_cannot_hold_is_refused(way):
    overflow = some_crf()
    overflow.addPairwiseGaussian(3, [3e38, -3e38], normalization=dcrf.NO_NORMALIZATION)
    tiny = some_crf()
    tiny.addPairwiseGaussian(1e-30, 3)
    for crf, message in ((overflow, "overflow"), (tiny, "about a million")):
        with pytest.raises(ValueError, match=message):
            crf.inference(2) if way == "inference" else by_features(crf, 2)
