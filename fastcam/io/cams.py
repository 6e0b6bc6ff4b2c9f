"""The maps of one image on disk: present classes only, half precision, deflated."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io._npz import read_npz
from fastcam.io.atomic import atomic_write


@dataclass(frozen=True, eq=False)
class CamSet:
    """Activation maps of the classes present in one image.

    Attributes:
        keys: int64 `(n,)`, the present classes, counted from 0, increasing.
        maps: float `(n, h, w)` in [0, 1], at any resolution.
        background: float `(h, w)` where the maps come with a background of their own (SFC, the CRF's marginals), else
            `None`.
        size: `(H, W)` of the image.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """

    keys: Tensor
    maps: Tensor
    background: Tensor | None
    size: tuple[int, int]

    def __post_init__(self) -> None:
        keys, maps, background = self.keys, self.maps, self.background
        if (
            keys.ndim != 1
            or keys.dtype != torch.int64
            or maps.ndim != 3
            or not maps.is_floating_point()
            or len(keys) != len(maps)
        ):
            raise ValueError(
                "CamSet: expected keys int64 (n,) and maps float (n, h, w), got "
                f"{keys.dtype} {tuple(keys.shape)} and {maps.dtype} {tuple(maps.shape)}"
            )
        if bool((keys.diff() <= 0).any()) or bool((keys < 0).any()):
            raise ValueError(f"CamSet: expected keys from 0 on, increasing, got {keys.tolist()}")
        if background is not None and (background.shape != maps.shape[1:] or background.dtype != maps.dtype):
            raise ValueError(
                f"CamSet: expected background {maps.dtype} {tuple(maps.shape[1:])} like the maps, "
                f"got {background.dtype} {tuple(background.shape)}"
            )
        if min(*maps.shape[1:], *self.size) < 1:
            raise ValueError(f"CamSet: expected at least one pixel, got maps {tuple(maps.shape)} and size {self.size}")

    def scores(self, background: float | tuple[str, float] | None = None) -> Tensor:
        """The maps at the size of the image behind a plane for the background.

        Maps are resized bilinearly (`align_corners=False`). Of equal scores the first wins in `argmax`, so ties go to
        the background.

        Args:
            background: a constant; `("power", alpha)` for `(1 - max_k map_k)^alpha` (PSA, with the maximum over the
                resized maps); `None` for the stored background.

        Returns:
            Scores `(n + 1, H, W)` in the dtype of the maps. Channel 0 is label 0, channel i is label
            `keys[i - 1] + 1`.

        Raises:
            ValueError: `background` is `None` but none is stored, or it is not one of the above.
        """
        maps = _resize(self.maps, self.size)
        if background is None:
            if self.background is None:
                raise ValueError("CamSet.scores: no background is stored; give a number or ('power', alpha)")
            plane = _resize(self.background[None], self.size)
        elif isinstance(background, int | float):
            plane = maps.new_full((1, *self.size), background)
        elif isinstance(background, tuple) and len(background) == 2 and background[0] == "power":
            plane = (1 - (maps.amax(0, keepdim=True) if len(maps) else maps.new_zeros(1, *self.size))) ** background[1]
        else:
            raise ValueError(
                f"CamSet.scores: expected background a number, ('power', alpha) or None, got {background!r}"
            )
        return torch.cat([plane, maps])


def encode_cams(camset: CamSet) -> bytes:
    """A `CamSet` as the bytes of a compressed `.npz`; equal sets give equal bytes.

    Maps are rounded to float16: a relative error of at most 2^-11.

    Raises:
        ValueError: the maps hold NaN, infinity or values beyond float16.
    """
    arrays = {
        "keys": camset.keys.detach().cpu().numpy(),
        "maps": camset.maps.detach().half().cpu().numpy(),
        "size": np.asarray(camset.size, np.int64),
    }
    if camset.background is not None:
        arrays["background"] = camset.background.detach().half().cpu().numpy()
    for name in ("maps", "background"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise ValueError(f"encode_cams: {name} is not finite in float16, expected values in [0, 1]")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def save_cams(path: str | os.PathLike[str], camset: CamSet) -> None:
    """Writes a `CamSet` as `encode_cams` gives it, atomically.

    Raises:
        ValueError: as `encode_cams`.
        FastcamError: the file could not be written.
    """
    encoded = encode_cams(camset)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def load_cams(source: str | os.PathLike[str] | bytes) -> CamSet:
    """Reads what `save_cams` wrote, or the bytes of `encode_cams`, without executing anything from them.

    Returns:
        The `CamSet` on the CPU; maps and background are float32.

    Raises:
        FastcamError: the file is missing, damaged, or not such a file.
    """
    path = "of bytes" if isinstance(source, bytes) else Path(source)
    try:
        arrays = read_npz(io.BytesIO(source) if isinstance(source, bytes) else path)
        background = arrays.get("background")
        return CamSet(
            keys=torch.from_numpy(arrays["keys"]),
            maps=torch.from_numpy(arrays["maps"].astype(np.float32)),
            background=None if background is None else torch.from_numpy(background.astype(np.float32)),
            size=(int(arrays["size"][0]), int(arrays["size"][1])),
        )
    except FileNotFoundError:
        raise FastcamError(f"CAM file {path} does not exist; run make-cam first") from None
    except Exception as error:  # zip, zlib and npy readers each have exceptions of their own for damaged bytes
        raise FastcamError(
            f"CAM file {path} is damaged or not made by make-cam ({error!r}); remove it and run the pass again"
        ) from error


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[1:] == size:
        return maps
    if len(maps) == 0:  # interpolate refuses empty batches
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
