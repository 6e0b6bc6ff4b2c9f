"""CAM files of IRN (Ahn, Cho, Kwak, CVPR 2019) and the many systems that copy its `make_cam` step."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io._restricted_npy import load_object
from fastcam.io.atomic import atomic_write


def load_irn_npy(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the `.npy` dictionary of one image without executing its pickle.

    Returns:
        `"keys"` int64 `(n,)`, present classes from 0; and, as far as the file has them, `"cam"` float32 `(n, h, w)` at
        a quarter of the size and `"high_res"` float32 `(n, H, W)`.

    Raises:
        FastcamError: the file is missing, damaged, refused by the restricted reader, or has other fields or shapes.
    """
    path = Path(path)
    obj = load_object(path)
    if not isinstance(obj, dict) or "keys" not in obj or not ("cam" in obj or "high_res" in obj):
        raise FastcamError(f"{path} holds {_fields(obj)}, expected IRN's dictionary with keys, cam, high_res")
    try:
        cams = {"keys": torch.as_tensor(obj["keys"]).to(torch.int64)}
        cams |= {name: torch.as_tensor(obj[name]).to(torch.float32) for name in ("cam", "high_res") if name in obj}
    except (TypeError, ValueError, RuntimeError) as error:
        raise FastcamError(
            f"{path} has a field that is no array ({error}), expected IRN's keys, cam, high_res"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in cams.items()}
    if any(
        len(shape) != (1 if name == "keys" else 3) or shape[0] != shapes["keys"][0] for name, shape in shapes.items()
    ):
        raise FastcamError(f"{path} has shapes {shapes}, expected keys (n,), cam (n, h, w), high_res (n, H, W)")
    return cams


def save_irn_npy(path: str | os.PathLike[str], keys: Tensor, cam: Tensor, high_res: Tensor) -> None:
    """Writes the dictionary that IRN's later steps read, atomically.

    `keys` and `cam` are stored as tensors and `high_res` as an array: IRN's own steps call `cams.cuda()` on the one
    and numpy on the other.

    Args:
        path: the file to write.
        keys: int64 `(n,)`, present classes from 0.
        cam: float `(n, ceil(H / 4), ceil(W / 4))`, stored as float32.
        high_res: float `(n, H, W)`, stored as float32.

    Raises:
        ValueError: shapes that do not fit together.
        FastcamError: the file could not be written.
    """
    if keys.ndim != 1 or cam.ndim != 3 or high_res.ndim != 3 or not len(keys) == len(cam) == len(high_res):
        shapes = tuple(keys.shape), tuple(cam.shape), tuple(high_res.shape)
        raise ValueError(f"save_irn_npy: expected keys (n,), cam (n, h, w), high_res (n, H, W), got {shapes}")
    fields = {
        "keys": keys.detach().to("cpu", torch.int64, copy=True),  # a copy: a view would pickle its whole storage
        "cam": cam.detach().to("cpu", torch.float32, copy=True),
        "high_res": high_res.detach().to("cpu", torch.float32).numpy(),
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(fields, dtype=object), allow_pickle=True)


def _fields(obj: object) -> str:
    return f"a dictionary with {list(obj)[:5]}" if isinstance(obj, dict) else f"a {type(obj).__name__}"
