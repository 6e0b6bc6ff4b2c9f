"""Label maps as palette PNG: one byte a pixel, 0 background, class k + 1, 255 ignored."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io.atomic import atomic_write


def voc_palette() -> np.ndarray:
    """The colours of PASCAL VOC: bits 0, 3, 6 of a label become the highest bits of red, bits 1, 4, 7 of green, bits
    2, 5 of blue.

    Returns:
        uint8 `(256, 3)`; label 255 is the cream of VOC's object borders.
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), np.int64)
    for bit in range(8):
        palette[:, bit % 3] |= (labels >> bit & 1) << 7 - bit // 3
    return palette.astype(np.uint8)


def encode_label_png(label: Tensor | np.ndarray) -> bytes:
    """A label map as the bytes of a palette PNG with VOC's colours.

    Args:
        label: any integer dtype with values 0 to 255 `(H, W)`, on any device.

    Raises:
        ValueError: another shape or dtype, or values outside 0 to 255.
    """
    array = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
    if array.ndim != 2 or array.dtype.kind not in "ui":
        raise ValueError(f"encode_label_png: expected integers (H, W), got {array.dtype} {array.shape}")
    if array.size == 0 or array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"encode_label_png: expected at least one pixel and values 0 to 255, got {array.shape}, {_range(array)}"
        )
    image = Image.fromarray(array.astype(np.uint8)).convert("P")
    image.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def write_label_png(path: str | os.PathLike[str], label: Tensor | np.ndarray) -> None:
    """Writes a label map as `encode_label_png` gives it, atomically.

    Raises:
        ValueError: as `encode_label_png`.
        FastcamError: the file could not be written.
    """
    encoded = encode_label_png(label)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def read_label_png(source: str | os.PathLike[str] | bytes) -> Tensor:
    """Reads the label indices of a palette or greyscale PNG; the palette's colours do not matter.

    Args:
        source: a file as `write_label_png` or VOC's tools write it, or its bytes.

    Returns:
        uint8 `(H, W)`.

    Raises:
        FastcamError: the file is missing, does not decode, or stores colours instead of label indices.
    """
    path = "of bytes" if isinstance(source, bytes) else Path(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else path, formats=("PNG",)) as image:
            mode, array = image.mode, np.array(image)
    except FileNotFoundError:
        raise FastcamError(f"mask {path} does not exist") from None
    except Exception as error:  # as in read_image: damaged files raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastcamError(f"mask {path} does not decode: {reason}; replace or remove it") from error
    if mode not in ("P", "L", "1"):
        raise FastcamError(
            f"mask {path} stores {mode} colours, expected a palette or 8-bit greyscale PNG of label indices; convert it"
        )
    return torch.from_numpy(array.astype(np.uint8))


def _range(array: np.ndarray) -> str:
    return f"{array.min()} to {array.max()}" if array.size else "no values"
