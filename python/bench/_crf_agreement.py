"""How near ``crf_mean_field`` and pydensecrf are to each other, and each to the exact sums, on real photographs.

``python -m fastcam.bench._crf_agreement DATA`` reads ``DATA/voc`` (VOC 2012's layout in ``VOCdevkit/VOC2012``, images
of full size in ``full_resolution``) and ``DATA/weights/deeplabv3_mobilenet_v2_voc21.safetensors``, a network that gives
the unaries. Labels of an image: all 21, or background and those in its mask. Needs ``pip install pydensecrf2``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcam.compat.pydensecrf.densecrf as compat_densecrf
from fastcam import crf_mean_field
from fastcam.data import VOCDataset
from fastcam.io import load_weights
from fastcam.nn import CRF_PRESETS
from fastcam.nn.unaries import unary_from_softmax

STEPS = (1, 10)
PRESETS = ("psa", "irn", "deeplab")
WEIGHTS = "weights/deeplabv3_mobilenet_v2_voc21.safetensors"
STRIDES = {2: 2, 4: 2}  # of the network's inverted residuals, by their number
DILATIONS = dict.fromkeys(range(8, 15), 2) | dict.fromkeys(range(15, 18), 4)

Problem = tuple[Tensor, Tensor]  # unary (1, K, H, W), image uint8 (1, 3, H, W)
Solver = Callable[[Problem, str, int], Tensor]  # (problem, preset, steps) -> Q (1, K, H, W)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, compare until done or interrupted, print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m fastcam.bench._crf_agreement", description=__doc__)
    parser.add_argument("data", type=Path, help="folder that holds voc/ and weights/")
    parser.add_argument("--images", type=int, default=60, help="photographs of 320 pixels (default: 60)")
    parser.add_argument("--full", type=int, default=13, help="photographs of full size (default: 13, all there are)")
    parser.add_argument("--small", type=int, default=20, help="photographs for the exact sums (default: 20)")
    parser.add_argument("--side", type=int, default=96, help="their longer side (default: 96)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    voc = args.data / "voc"
    photographs = VOCDataset(voc / "VOCdevkit/VOC2012", "val")
    full = VOCDataset(voc / "full_resolution", voc / "full_resolution/ids.txt")
    network, _ = load_weights(args.data / WEIGHTS)
    network = {name: tensor.float() for name, tensor in network.items()}
    agreements: list[dict[str, Any]] = []
    distances: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):  # what is there so far is shown
        for name, data, count in (("320", photographs, args.images), ("full", full, args.full)):
            for item in spread(data, count):
                agreements += [{"size": name, **row} for row in agreement(item, network)]
        for item in spread(photographs, args.small):
            distances += distance(item, network, args.side)
    report: dict[str, Any] = {
        "command": f"python -m fastcam.bench._crf_agreement DATA --images {args.images} --full {args.full} "
        f"--small {args.small} --side {args.side}",
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in ("torch", "numpy", "fastcam", "pydensecrf2")},
        },
        "agreement": agreements,
        "distance": distances,
    }
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(show_agreement(agreements))
    print(show_distance(distances))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def spread(data: VOCDataset, count: int) -> Iterator[dict[str, Any]]:
    """``count`` items, or all there are, evenly spread over the list."""
    count = min(count, len(data))
    return (data[i * len(data) // count] for i in range(count))


def agreement(item: dict[str, Any], network: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Share of pixels that get pydensecrf's label, for all settings."""
    rows = []
    image = torch.as_tensor(item["image"])[None]
    for labels, unary in unaries(deeplab(network, image), item["tags"]):
        for preset in PRESETS:
            for steps in STEPS:
                theirs = pydensecrf((unary, image), preset, steps)
                for name, solver in OURS.items():
                    q = solver((unary, image), preset, steps)
                    row = {"image": item["id"], "labels": labels, "preset": preset, "steps": steps, "solver": name}
                    rows.append({**row, **compare(q, theirs)})
    return rows


def distance(item: dict[str, Any], network: dict[str, Tensor], side: int) -> list[dict[str, Any]]:
    """How far every solver is from the exact sums in float64 on a reduced image, for all settings."""
    rows = []
    image = torch.as_tensor(item["image"])[None]
    size = [max(1, round(n * side / max(image.shape[2:]))) for n in image.shape[2:]]
    small = F.interpolate(image.float(), size, mode="bilinear", antialias=True).round().byte()
    logits = F.interpolate(deeplab(network, image), size, mode="bilinear", antialias=True)
    for labels, unary in unaries(logits, item["tags"]):
        for preset in PRESETS:
            for steps in STEPS:
                truth = ours("exact")((unary.double(), small), preset, steps)
                for name, solver in AGAINST_EXACT.items():
                    q = solver((unary, small), preset, steps)
                    row = {"image": item["id"], "labels": labels, "preset": preset, "steps": steps, "solver": name}
                    rows.append({**row, **compare(q, truth)})
    return rows


def unaries(logits: Tensor, tags: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Energies of all labels, and of background and the image's classes."""
    present = torch.cat([torch.ones(1, dtype=torch.bool), torch.as_tensor(tags) > 0])
    for name, kept in (("all", logits), ("present", logits[:, present])):
        yield name, unary_from_softmax(torch.softmax(kept, dim=1))


def compare(q: Tensor, other: Tensor) -> dict[str, float]:
    """Share of equal labels in %, mean and largest difference of marginals."""
    difference = (q.double() - other.double()).abs()
    same = (q.argmax(1) == other.argmax(1)).double().mean()
    return {"same": 100 * same.item(), "mean": difference.mean().item(), "max": difference.max().item()}


def ours(kernel: Any) -> Solver:
    """``crf_mean_field`` with one of its kernels."""

    def solve(problem: Problem, preset: str, steps: int) -> Tensor:
        gaussian, bilateral = CRF_PRESETS[preset]
        return crf_mean_field(*problem, iterations=steps, gaussian=gaussian, bilateral=bilateral, kernel=kernel)

    return solve


def pydensecrf(problem: Problem, preset: str, steps: int) -> Tensor:
    """The library itself."""
    from pydensecrf import densecrf

    return drop_in(densecrf, problem, preset, steps)


def drop_in(densecrf: ModuleType, problem: Problem, preset: str, steps: int) -> Tensor:
    """What pydensecrf's users write, with the module they import."""
    unary, image = problem
    _, K, H, W = unary.shape
    (gaussian_sxy, gaussian_compat), (sxy, srgb, compat) = CRF_PRESETS[preset]
    crf = densecrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(unary[0].reshape(K, -1).numpy()))
    crf.addPairwiseGaussian(sxy=gaussian_sxy, compat=gaussian_compat)
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=pixels, compat=compat)
    return torch.from_numpy(np.array(crf.inference(steps))).reshape(1, K, H, W)


OURS: dict[str, Solver] = {
    "fast": ours("fast"),
    "lattice": ours("lattice"),
    "compat": lambda *given: drop_in(compat_densecrf, *given),
}
AGAINST_EXACT = {"fast": OURS["fast"], "lattice": OURS["lattice"], "pydensecrf": pydensecrf}


@torch.no_grad()
def deeplab(network: dict[str, Tensor], image: Tensor) -> Tensor:
    """DeepLabv3 on MobileNetV2: uint8 ``(1, 3, H, W)`` -> logits ``(1, 21, H, W)``."""

    def conv(name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        weight, bias = network[f"{name}.weight"], network[f"{name}.bias"]
        padding = dilation * (weight.shape[2] // 2)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1] // weight.shape[1])

    size = [round(n * 513 / max(image.shape[2:])) for n in image.shape[2:]]
    x = F.interpolate(image.float(), size, mode="bilinear", antialias=True)
    x = F.pad(x, (0, 513 - size[1], 0, 513 - size[0]), value=127.5) / 127.5 - 1
    x = F.relu6(conv("backbone.0.0", x, stride=2))
    for k in range(1, 18):
        layers = [0, 2, 4] if f"backbone.{k}.conv.4.weight" in network else [None, 0, 2]
        y = x if layers[0] is None else F.relu6(conv(f"backbone.{k}.conv.{layers[0]}", x))
        y = F.relu6(conv(f"backbone.{k}.conv.{layers[1]}", y, STRIDES.get(k, 1), DILATIONS.get(k, 1)))
        y = conv(f"backbone.{k}.conv.{layers[2]}", y)
        x = x + y if x.shape == y.shape else y
    pooled = F.relu(conv("image_pooling", x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
    x = F.relu(conv("concat_projection", torch.cat([pooled, F.relu(conv("aspp0", x))], dim=1)))
    logits = F.interpolate(conv("logits", x), (513, 513), mode="bilinear", align_corners=True)
    return F.interpolate(logits[..., : size[0], : size[1]], image.shape[2:], mode="bilinear")


def groups(rows: list[dict[str, Any]], *names: str) -> dict[tuple, list[dict[str, Any]]]:
    """Rows by their values under ``names``, in the order in which these first come."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def show_agreement(rows: list[dict[str, Any]]) -> str:
    """Table of the agreement with pydensecrf."""
    lines = [
        "\n| size | images | labels | preset | steps | " + " | ".join(f"{name} mean (worst)" for name in OURS) + " |"
    ]
    lines.append("|---|---|---|---|---|" + "---|" * len(OURS))
    for (size, labels, preset, steps), part in groups(rows, "size", "labels", "preset", "steps").items():
        by_solver = groups(part, "solver")
        cells = [f"{fmean(s):.3f} ({min(s):.2f})" for s in ([r["same"] for r in p] for p in by_solver.values())]
        count = len(part) // len(OURS)
        lines.append(f"| {size} | {count} | {labels} | {preset} | {steps} | " + " | ".join(cells) + " |")
    for (solver,), part in groups(rows, "solver").items():
        lines.append(f"{solver}, over all: {fmean(row['same'] for row in part):.3f}")
    lines.append("cells: labels that are pydensecrf's, % (worst image)")
    return "\n".join(lines)


def show_distance(rows: list[dict[str, Any]]) -> str:
    """Table of the distances to the exact sums."""
    lines = ["", "| labels | preset | steps | " + " | ".join(AGAINST_EXACT) + " | fast is no further on |"]
    lines.append("|---|---|---|" + "---|" * (len(AGAINST_EXACT) + 1))
    for (labels, preset, steps), part in groups(rows, "labels", "preset", "steps").items():
        by_solver = groups(part, "solver")
        cells = [distance_cell(own) for own in by_solver.values()]
        pairs = zip(by_solver["fast",], by_solver["pydensecrf",], strict=True)
        nearer = sum(own["mean"] <= theirs["mean"] for own, theirs in pairs)
        cells.append(f"{nearer} of {len(by_solver['fast',])}")
        lines.append(f"| {labels} | {preset} | {steps} | " + " | ".join(cells) + " |")
    for (steps, solver), part in groups(rows, "steps", "solver").items():
        lines.append(f"{solver}, steps {steps}, over all: {distance_cell(part)}")
    lines.append(
        "cells: mean |dQ| in 1e-3 / largest |dQ| of the median image / labels that are the same, % (worst image)"
    )
    return "\n".join(lines)


def distance_cell(rows: list[dict[str, Any]]) -> str:
    """Mean and largest difference, agreement."""
    same = [row["same"] for row in rows]
    mean = 1e3 * fmean(row["mean"] for row in rows)
    return f"{mean:.3f} / {median(row['max'] for row in rows):.3f} / {fmean(same):.3f} ({min(same):.2f})"


if __name__ == "__main__":
    main()
