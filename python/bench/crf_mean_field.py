"""Dense CRF against pydensecrf (``pip install pydensecrf2``), on a photograph of scikit-image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import crf_mean_field
from fastcam.bench._harness import Case, CaseIterator
from fastcam.ops.unaries import unary_from_softmax

SETTINGS = {  # name -> gaussian, bilateral
    "sxy 50 srgb 5": ((3, 3), (50, 5, 10)),
    "sxy 80 srgb 13": ((3, 3), (80, 13, 10)),
}
SIZES = ((375, 500, 2), (375, 500, 4), (375, 500, 21), (480, 640, 81), (1024, 2048, 2))


def pydensecrf(unary: Tensor, image: Tensor, iterations: int, gaussian: tuple, bilateral: tuple) -> Tensor:
    """The library that people use, as its manual says. One image, one thread."""
    from pydensecrf.densecrf import DenseCRF2D

    _, K, H, W = unary.shape
    crf = DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(unary[0].reshape(K, -1).numpy()))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixels, compat=bilateral[2])
    return torch.from_numpy(np.array(crf.inference(iterations))).reshape(1, K, H, W)


def problem(H: int, W: int, K: int) -> tuple[Tensor, Tensor]:
    """A photograph, and energies of smooth scores that follow its colours: ``(1, K, H, W)``, ``(1, 3, H, W)`` uint8."""
    from skimage.data import coffee

    photograph = torch.from_numpy(coffee()).permute(2, 0, 1)[None].float()
    image = F.interpolate(photograph, (H, W), mode="bilinear", align_corners=False).round().byte()
    g = torch.Generator().manual_seed(0)
    colours = 255 * torch.rand(K, 3, 1, 1, generator=g)
    coarse = F.interpolate(image.float(), (H // 16, W // 16), mode="area")
    scores = -(coarse - colours).square().mean(1)[None] / 2000 + torch.randn(1, K, H // 16, W // 16, generator=g)
    p = F.interpolate(scores, (H, W), mode="bilinear", align_corners=False).softmax(1)
    return unary_from_softmax(p), image


def cases(device: str) -> CaseIterator:
    """VOC, COCO and Cityscapes sizes, lattice included; ten steps, and none but the lattice (one step)."""
    for H, W, K in SIZES:
        unary, image = problem(H, W, K)
        for name, (gaussian, bilateral) in SETTINGS.items():
            for steps in (10, 1):
                options = {"iterations": steps, "gaussian": gaussian, "bilateral": bilateral}
                u, i = unary.to(device), image.to(device)
                rivals = {}
                if device == "cpu":
                    rivals["pydensecrf"] = lambda o=options, u=unary, i=image: pydensecrf(u, i, **o)
                yield Case(
                    name=f"{W} x {H}, K {K}, {name}, {steps} step{'s' if steps > 1 else ''}, lattice included",
                    runners={
                        "fastcam": lambda o=options, u=u, i=i: crf_mean_field(u, i, **o),
                        "fastcam, kernel lattice": lambda o=options, u=u, i=i: crf_mean_field(
                            u, i, kernel="lattice", **o
                        ),
                        **rivals,
                    },
                    expected=rivals.get("pydensecrf"),
                    moved=4 * (2 * K * H * W) + 3 * H * W,
                    operations=steps * H * W * K * 2 * (6 + 6 + 2 * 27),
                    tolerance=1e-3,
                    unchecked={"fastcam": "spatial term an exact Gaussian, pydensecrf's a lattice: other numbers"},
                )
