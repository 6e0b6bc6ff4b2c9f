"""Draws docs/images/cam.png and prints the figures of docs/nn/cam.md.

python docs/nn/cam.py mobilenet_v2_imagenet1k.safetensors [picture.png]

The weights are torchvision's MobileNetV2 as safetensors. The library grad-cam is compared with where it is installed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastcam.nn import Cam, CamFusion

PHOTOGRAPHS = {"chelsea": 281, "coffee": 967}  # ImageNet: tabby, espresso
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def load(name: str) -> tuple[np.ndarray, Tensor]:
    """A photograph of scikit-image, 224 x 224, and the network's input."""
    photograph = np.asarray(Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((224, 224)))
    x = (torch.from_numpy(photograph / 255).float() - MEAN) / STD
    return photograph, x.permute(2, 0, 1)[None]


def milliseconds(run: Callable[[], object], rounds: int = 7) -> float:
    """Median."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def overlay(photograph: np.ndarray, heat: Tensor) -> np.ndarray:
    """The photograph in grey under a map in [0, 1], black to red to yellow."""
    h = heat.numpy()[..., None]
    colour = np.clip(np.concatenate([2 * h, 2 * h - 1, 0 * h], -1), 0, 1) * 255
    return (0.5 * photograph.mean(-1, keepdims=True) + 0.5 * colour).astype(np.uint8)


def main(weights: Path, picture: Path) -> None:
    """Maps of every photograph, their times and their agreement with grad-cam."""
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict({k: v.float() for k, v in load_file(weights).items()}, strict=False)
    model.eval()
    once = CamFusion("psa", scales=(1.0,), mirror=False, eps=1e-7)  # as grad-cam
    makers = {
        "CAM": Cam(model, "features.18", "classifier.1", fusion=once),
        "Grad-CAM": Cam(model, "features.18", fusion=once),
        "CAM, 4 scales mirrored": Cam(model, "features.18", "classifier.1"),
    }
    rows = []
    for name, key in PHOTOGRAPHS.items():
        photograph, x = load(name)
        with torch.no_grad():
            maps = {label: cam(x, keys=torch.tensor([key]))[0, 0] for label, cam in makers.items()}
            top = model(x)[0].topk(5).indices.tolist()
        print(
            f"{name}: class {key} is number {top.index(key) + 1 if key in top else 'beyond 5'} of the network's guesses"
        )
        rows.append(np.concatenate([photograph, *(overlay(photograph, m) for m in maps.values())], 1))
    Image.fromarray(np.concatenate(rows)).save(picture)

    _, x = load("chelsea")
    for n in (1, 20):
        keys = torch.arange(n) * 40 + 1
        with torch.no_grad():
            for label, cam in makers.items():
                print(f"{n} classes, fastcam {label}: {milliseconds(lambda c=cam, k=keys: c(x, keys=k)):.1f} ms")
        compare(model, x, keys, makers["Grad-CAM"])


def compare(model: torch.nn.Module, x: Tensor, keys: Tensor, ours: Cam) -> None:
    """Time and agreement of grad-cam, which takes one class a call."""
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        print(f"grad-cam cannot be imported: {error}")
        return
    library = GradCAM(model=model, target_layers=[model.features[18]])

    def run() -> np.ndarray:
        return np.stack([library(input_tensor=x, targets=[ClassifierOutputTarget(int(k))])[0] for k in keys])

    with torch.no_grad():
        maps = ours(x, keys=keys)[0]
    theirs = torch.from_numpy(run())
    theirs = theirs / (theirs.amax((1, 2), keepdim=True) + 1e-7)
    difference = (theirs - maps).abs().amax((1, 2))
    print(
        f"{len(keys)} classes, grad-cam: {milliseconds(run):.1f} ms; largest difference {float(difference.max()):.1e}"
    )


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else root / "images" / "cam.png")
