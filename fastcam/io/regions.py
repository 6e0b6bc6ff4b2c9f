"""Regions on disk: label maps as 16-bit PNG, and trees of merges."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io._npz import read_npz
from fastcam.io.atomic import atomic_write
from fastcam.ops.region_merge import MergeTree


def write_region_png(path: str | os.PathLike[str], labels: Tensor) -> None:
    """Writes a map of regions as a grey PNG of 16 bits, atomically.

    Args:
        path: the file.
        labels: integers `(H, W)` from 0 to 65535.

    Raises:
        ValueError: another shape, a floating dtype, or values outside that range.
        FastcamError: the file could not be written.
    """
    if labels.ndim != 2 or labels.numel() == 0 or labels.is_floating_point():
        raise ValueError(f"write_region_png: expected integers (H, W), got {labels.dtype} {tuple(labels.shape)}")
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high > 65535:
        raise ValueError(f"write_region_png: expected regions from 0 to 65535, got {low} to {high}")
    buffer = io.BytesIO()
    Image.fromarray(labels.cpu().numpy().astype(np.uint16)).save(buffer, format="PNG")
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_region_png(path: str | os.PathLike[str]) -> Tensor:
    """Reads what `write_region_png` wrote, or any grey PNG of 8 or 16 bits: int32 `(H, W)`.

    Raises:
        FastcamError: the file is missing, does not decode, or stores colours.
    """
    try:
        with Image.open(Path(path), formats=("PNG",)) as image:
            mode, array = image.mode, np.array(image)
    except FileNotFoundError:
        raise FastcamError(f"regions {path} do not exist") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastcamError(f"regions {path} do not decode: {reason}; make them again") from error
    if mode != "L" and not mode.startswith("I"):
        raise FastcamError(f"regions {path} store {mode} colours, expected a grey PNG of 8 or 16 bits; convert it")
    return torch.from_numpy(array.astype(np.int32))


def save_tree(path: str | os.PathLike[str], tree: MergeTree) -> None:
    """Writes a tree of merges as a compressed `.npz`, atomically; `load_tree` gives it back bit for bit.

    Raises:
        FastcamError: the file could not be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        labels=tree.labels.cpu().numpy().astype(np.int32),
        merges=tree.merges.cpu().numpy().astype(np.int32),
        values=tree.values.cpu().numpy(),
        thresholds=tree.thresholds.cpu().numpy(),
        rounds=tree.rounds.cpu().numpy().astype(np.int32),
        regions=np.int64(tree.regions),
        stop=np.float64(tree.stop),
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_tree(path: str | os.PathLike[str]) -> MergeTree:
    """Reads what `save_tree` wrote, without executing anything from it; labels are int32, on the CPU.

    Raises:
        FastcamError: the file is missing, damaged, or holds no tree.
    """
    try:
        stored = {name: torch.from_numpy(array) for name, array in read_npz(Path(path)).items()}
        labels, merges, values = stored["labels"], stored["merges"].long(), stored["values"].double()
        thresholds, rounds = stored["thresholds"].double(), stored["rounds"].long()
        S, M = int(labels.max()) + 1, len(merges)
        regions = int(stored["regions"])
        shapes = {values.shape, thresholds.shape, rounds.shape}
        fits = labels.ndim == 2 and int(labels.min()) >= 0 and merges.shape == (M, 2) and shapes == {(M,)}
        if not fits or not M < regions <= S or not bool((merges.sort(1).values == merges).all()):
            raise ValueError("its arrays do not fit together")
        if M and not 0 <= int(merges.min()) <= int(merges.max()) < S:
            raise ValueError("it merges regions that it has not")
        return MergeTree(labels, merges, values, thresholds, rounds, regions, float(stored["stop"]))
    except FileNotFoundError:
        raise FastcamError(f"tree {path} does not exist; run regions first") from None
    except Exception as error:  # zip, zlib and npy readers each have exceptions of their own for damaged bytes
        raise FastcamError(
            f"tree {path} is damaged or not made by regions ({error!r}); remove it and run the pass again"
        ) from error
