"""The CRF as a layer: against pydensecrf's arrays, the function behind it, and numerical gradients."""

import numpy as np
import pytest
import torch

from fastcam import crf_mean_field
from fastcam.nn import CRF_PRESETS, DenseCRF
from fastcam.nn.unaries import unary_from_softmax

SMALL = {"gaussian": (1.5, 2), "bilateral": (4, 60, 3), "iterations": 2}


@pytest.fixture
def problem():
    """Logits ``(2, 3, 4, 5)`` and images."""
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 3, 4, 5, generator=g), torch.randint(0, 256, (2, 3, 4, 5), generator=g, dtype=torch.uint8)


def test_equals_pydensecrf(golden):
    arrays = golden("postprocess_densecrf_small")
    crf = DenseCRF(gaussian=(3, 3), bilateral=(8, 13, 10), iterations=2, kernel="lattice", clip=1e-5)
    image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None]
    q = crf(torch.from_numpy(arrays["softmax"]).log()[None], image)
    np.testing.assert_allclose(q[0], arrays["q_kernel_const"], rtol=1e-4, atol=1e-5)


def test_logits_energies_and_log_probabilities_are_the_same(problem):
    logits, image = problem
    expected = crf_mean_field(-logits, image, **SMALL)
    crf = DenseCRF(**SMALL)
    torch.testing.assert_close(crf(logits, image), expected)
    torch.testing.assert_close(crf(torch.log_softmax(logits, 1), image), expected)
    torch.testing.assert_close(crf(logits + torch.randn(2, 1, 4, 5), image), expected)


def test_clip_is_that_of_published_unaries(problem):
    logits, image = problem
    expected = crf_mean_field(unary_from_softmax(torch.softmax(logits, 1), clip=0.1), image, **SMALL)
    torch.testing.assert_close(DenseCRF(**SMALL, clip=0.1)(logits, image), expected)


@pytest.mark.parametrize("name", CRF_PRESETS)
def test_presets_are_their_systems_parameters(problem, name):
    logits, image = problem
    gaussian, bilateral = {  # sxy, compat; sxy, srgb, compat: specifications and code of the systems
        "psa": ((3, 3), (80, 13, 10)),
        "irn": ((3, 3), (50, 5, 10)),
        "deeplab": ((1, 3), (67, 3, 4)),
        "afa": ((3, 3), (64, 5, 4)),
        "toco": ((1, 1), (121, 5, 4)),
        "toco_cam": ((3, 3), (36, 3, 4)),
        "mctformer": ((4, 3), (83, 5, 3)),
    }[name]
    unary = unary_from_softmax(torch.softmax(logits, 1))
    expected = crf_mean_field(unary, image, iterations=10, gaussian=gaussian, bilateral=bilateral)
    torch.testing.assert_close(DenseCRF.preset(name)(logits, image), expected)


def test_presets_take_options(problem):
    logits, image = problem
    torch.testing.assert_close(DenseCRF.preset("irn", iterations=0)(logits, image), torch.softmax(logits, 1))
    with pytest.raises(ValueError, match=r"DenseCRF: expected a preset of psa, irn, .*, got 'voc'"):
        DenseCRF.preset("voc")


@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradient_of_the_logits(problem, clip):
    logits, image = problem
    crf = DenseCRF(**SMALL, clip=clip)
    assert torch.autograd.gradcheck(lambda x: crf(x, image), logits.double().requires_grad_())


def test_terms_may_be_absent(problem):
    logits, _ = problem
    torch.testing.assert_close(DenseCRF(gaussian=None, bilateral=None)(logits, None), torch.softmax(logits, 1))
    only = DenseCRF(bilateral=None, iterations=1)
    assert only.bilateral_compat is None
    torch.testing.assert_close(only(logits, None), crf_mean_field(-logits, None, iterations=1, bilateral=None))


def test_padded_images_equal_images_alone(problem):
    logits, image = problem
    crf = DenseCRF(**SMALL)
    q = crf(logits, image, torch.tensor([[4, 5], [3, 2]]))
    torch.testing.assert_close(q[1:, :, :3, :2], crf(logits[1:, :, :3, :2], image[1:, :, :3, :2]))
    assert (q[1, :, 3:] == 0).all()


def test_compatibilities_are_parameters_only_if_they_learn(problem):
    logits, image = problem
    costs = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    fixed = DenseCRF(gaussian=(1.5, costs), bilateral=(4, 60, 3), iterations=2)
    learns = DenseCRF(gaussian=(1.5, costs), bilateral=(4, 60, 3), iterations=2, learn_compat=True)
    assert list(fixed.parameters()) == []
    assert {name: p.shape for name, p in learns.named_parameters()} == {
        "gaussian_compat": (3, 3),
        "bilateral_compat": (),
    }
    with torch.no_grad():
        torch.testing.assert_close(learns(logits, image), fixed(logits, image))
        learns.gaussian_compat += 1
    assert (costs.diagonal() == 0).all()  # the module has a copy
    fixed.load_state_dict(learns.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fixed(logits, image), learns(logits, image))


def test_gradient_of_learned_compatibilities(problem):
    logits, image = problem
    costs = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    crf = DenseCRF(gaussian=(1.5, costs), bilateral=(4, 60, 3), iterations=2, learn_compat=True).double()

    def result(gaussian_compat, bilateral_compat):
        values = {"gaussian_compat": gaussian_compat, "bilateral_compat": bilateral_compat}
        return torch.func.functional_call(crf, values, (logits.double(), image))

    start = [crf.gaussian_compat.detach().clone(), crf.bilateral_compat.detach().clone()]
    assert torch.autograd.gradcheck(result, [t.requires_grad_() for t in start])
    loss = crf(logits.double(), image)[:, 1].sum()
    loss.backward()
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter -= 0.1 * parameter.grad
    assert crf(logits.double(), image)[:, 1].sum() < loss


def test_repr_tells_two_crfs_apart():
    assert "iterations=10, gaussian_sigma=(3,), bilateral_sigma=(50, 5)" in repr(DenseCRF.preset("irn"))


@pytest.mark.parametrize("clip", [0, 1, -0.1])
def test_clip_out_of_range_is_refused(clip):
    with pytest.raises(ValueError, match=r"DenseCRF: expected clip in \(0, 1\) or None"):
        DenseCRF(clip=clip)
