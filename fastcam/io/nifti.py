"""Volumes of medical images from NIfTI files, by nibabel (the extra `medical`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcam.errors import FastcamError


@dataclass(frozen=True)
class Volume:
    """Slices one after the other.

    Attributes:
        array: `(slices, H, W)`, of the file's dtype.
        spacing: millimetres between slices, rows and columns.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]


def read_nifti(path: str | os.PathLike[str]) -> Volume:
    """Reads a three-dimensional `.nii` or `.nii.gz` file.

    NIfTI counts x, y, z; its x become columns, its y rows and its z slices. Nothing is turned or mirrored.

    Raises:
        FastcamError: nibabel is not installed, the file is missing or damaged, or not three-dimensional.
    """
    try:
        import nibabel
    except ImportError:
        raise FastcamError(
            f"{path} is a NIfTI file, which nibabel reads; install it with: pip install 'fastcam[medical]'"
        ) from None
    if not Path(path).is_file():
        raise FastcamError(f"volume {path} does not exist")
    try:
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
        zooms = tuple(float(size) for size in image.header.get_zooms())
    except Exception as error:  # nibabel, zlib and the system each have exceptions of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastcamError(f"volume {path} does not decode: {reason}; replace or remove it") from error
    if array.ndim != 3:
        raise FastcamError(f"volume {path} has shape {array.shape}, expected three dimensions; split it")
    return Volume(np.ascontiguousarray(array.transpose(2, 1, 0)), (zooms[2], zooms[1], zooms[0]))
