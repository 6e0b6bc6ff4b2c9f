"""Dense CRF against pydensecrf (``pip install pydensecrf2``), on a photograph of scikit-image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import crf_mean_field
from fastcam.bench._harness import Case, CaseIterator
from fastcam.nn.unaries import unary_from_softmax
from fastcam.ops.crf_mean_field import FEW

SETTINGS = {  # name -> gaussian, bilateral
    "sxy 50 srgb 5": ((3, 3), (50, 5, 10)),
    "sxy 80 srgb 13": ((3, 3), (80, 13, 10)),
}
SPATIAL = "up to four labels the spatial term is an exact Gaussian, pydensecrf's a lattice: other numbers"
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


GPU_CASES = (  # B, H, W, K, steps, kernel; beyond four labels "fast" is "lattice"
    (32, 375, 500, 2, 10, "fast"),
    (1, 375, 500, 21, 10, "lattice"),
    (16, 375, 500, 21, 10, "lattice"),
    (32, 375, 500, 21, 10, "lattice"),
    (8, 480, 640, 81, 10, "lattice"),
    (1, 375, 500, 21, 1, "exact"),
)


def gpu_cases() -> CaseIterator:
    """The Triton backend on batches: all of it, and lattices, steps, and steps replayed as a CUDA graph apart."""
    for B, H, W, K, steps, kernel in GPU_CASES:
        one_unary, one_image = problem(H, W, K)
        shifts = range(0, 16 * B, 16)
        unary, image = (torch.cat([t.roll(s, -1) for s in shifts]).cuda() for t in (one_unary, one_image))
        for name, (gaussian, bilateral) in SETTINGS.items():
            options = {"gaussian": gaussian, "bilateral": bilateral, "kernel": kernel}

            def run(steps: int, backend: str, u: Tensor = unary, i: Tensor = image, o: dict = options) -> Tensor:
                return crf_mean_field(u, i, iterations=steps, backend=backend, **o)

            alone, replay = gpu_steps(unary, image, gaussian, bilateral, kernel, steps)
            yield Case(
                name=f"{B} of {W} x {H}, K {K}, {name}, kernel {kernel}, {steps} step{'s' if steps > 1 else ''}",
                runners={
                    "fastcam, lattice included": lambda r=run, s=steps: r(s, "triton"),
                    "fastcam, no steps": lambda r=run: r(0, "triton"),
                    "fastcam, steps alone": alone,
                    "fastcam, steps alone, CUDA graph": replay,
                    **({"reference, lattice included": lambda r=run, s=steps: r(s, "reference")} if B == 1 else {}),
                },
                expected=lambda r=run, s=steps: r(s, "reference"),
                moved=B * H * W * (4 * 2 * K + 3),
                operations=B * H * W * K * steps * 2 * (H * W if kernel == "exact" else 6 + 6 + 2 * 27),
                tolerance=1e-3,
                unchecked={"fastcam, no steps": "builds the lattice and takes one softmax: another result"},
            )


def gpu_steps(
    unary: Tensor, image: Tensor, gaussian: tuple, bilateral: tuple, kernel: str, steps: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Steps on lattices that are already built, launched one by one and as one CUDA graph."""
    from fastcam.kernels.crf_mean_field import MeanField

    compats = [torch.full((unary.shape[1],), -float(c), device=unary.device) for c in (gaussian[-1], bilateral[-1])]
    (sxy, _), (sxy_bilateral, srgb, _) = gaussian, bilateral
    sigmas = [float(sxy)] * 2, [float(sxy_bilateral)] * 2 + [float(srgb)] * 3
    field = MeanField(unary, image, None, compats[0], compats[1], sigmas[0], sigmas[1], "symmetric", kernel)
    field.result(steps)  # compiles the kernels, which cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = field.result(steps)

    def replay() -> Tensor:
        graph.replay()
        return out

    return lambda: field.result(steps), replay


def several_cases() -> CaseIterator:
    """Two problems on one image, as IRN's labels need them, and 16 images; ten steps, lattices included."""
    (gaussian, bilateral), name = SETTINGS["sxy 50 srgb 5"], "sxy 50 srgb 5"
    for K in (2, 4, 21):
        unary, image = problem(375, 500, K)
        two = torch.stack([unary, unary.roll(40, -1)], dim=1)  # (1, 2, K, H, W): they share the lattice
        many = torch.cat([unary.roll(s, -1) for s in range(0, 256, 16)])
        images = torch.cat([image.roll(s, -1) for s in range(0, 256, 16)])
        for title, u, i in (
            (f"two problems on 500 x 375, K {K}", two, image),
            (f"16 of 500 x 375, K {K}", many, images),
        ):
            options = {"iterations": 10, "gaussian": gaussian, "bilateral": bilateral}

            def peer(u: Tensor = u, i: Tensor = i, o: dict = options) -> Tensor:
                problems = u.reshape(-1, 1, *u.shape[-3:])
                own = i.expand(len(problems), -1, -1, -1)
                return torch.cat([pydensecrf(p, x[None], **o) for p, x in zip(problems, own, strict=True)]).view(
                    u.shape
                )

            yield Case(
                name=f"{title}, {name}, 10 steps, lattices included",
                runners={
                    "fastcam": lambda o=options, u=u, i=i: crf_mean_field(u, i, **o),
                    "pydensecrf": peer,
                },
                expected=peer,
                moved=4 * 2 * u.numel() + 3 * i[:, 0].numel(),
                operations=10 * u.numel() * 2 * (6 + 6 + 2 * 27),
                tolerance=1e-2,  # ten steps enlarge rounding where two labels are equally likely
                unchecked={"fastcam": SPATIAL} if K <= FEW else {},
            )


def cases(device: str) -> CaseIterator:
    """VOC, COCO and Cityscapes sizes, lattice included; ten steps, and none but the lattice (one step)."""
    if device == "cuda":
        yield from gpu_cases()
        return
    yield from several_cases()
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
                        **(
                            {
                                "fastcam, kernel lattice": lambda o=options, u=u, i=i: crf_mean_field(
                                    u, i, kernel="lattice", **o
                                )
                            }
                            if K <= FEW
                            else {}
                        ),
                        **rivals,
                    },
                    expected=rivals.get("pydensecrf"),
                    moved=4 * (2 * K * H * W) + 3 * H * W,
                    operations=steps * H * W * K * 2 * (6 + 6 + 2 * 27),
                    tolerance=1e-3,
                    unchecked={"fastcam": SPATIAL} if K <= FEW else {},
                )
