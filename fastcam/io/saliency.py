"""Saliency maps as grey images: how much each pixel stands out, of whatever class."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcam.errors import FastcamError

SALIENCY_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def read_saliency(path: str | os.PathLike[str]) -> Tensor:
    """Reads a saliency map as saliency networks write it.

    Args:
        path: grey image; of colours the brightness counts, and two-level images are 0 and 1.

    Returns:
        float32 `(H, W)` in [0, 1].

    Raises:
        FastcamError: the file is missing or does not decode.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            deep = image.mode == "I" or image.mode.startswith("I;16")
            levels = np.array(image if deep else image.convert("L"), np.float32)
    except FileNotFoundError:
        raise FastcamError(f"saliency map {path} does not exist; make one for every image") from None
    except Exception as error:  # as in read_image: damaged files raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastcamError(f"saliency map {path} does not decode: {reason}; replace or remove it") from error
    return torch.from_numpy(levels / (65535 if deep else 255)).clamp(0, 1)


def find_saliency(folder: str | os.PathLike[str], image_id: str) -> Path:
    """The file of an image's saliency map: its id and one of the usual suffixes.

    Raises:
        FastcamError: there is none.
    """
    base = Path(folder, image_id)
    for suffix in SALIENCY_SUFFIXES:
        if (path := base.with_name(base.name + suffix)).is_file():
            return path
    raise FastcamError(f"saliency map {base}{SALIENCY_SUFFIXES[0]} does not exist; make one for every image")
