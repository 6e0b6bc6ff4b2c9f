"""The same labels and maps in other forms: label maps, one-hot maps, IRN's dictionaries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io.cams import CamSet

IGNORE = 255


def label_to_cams(label: Tensor) -> CamSet:
    """A label map as maps of 0 and 1 at full size, with a background; all are 0 where a pixel is ignored.

    Args:
        label: uint8 `(H, W)`: 0 background, class k + 1, 255 ignored.
    """
    values = label.unique().long()
    values = values[(values > 0) & (values < IGNORE)]
    maps = (label == values[:, None, None]).float()
    return CamSet(values - 1, maps, (label == 0).float(), (label.shape[0], label.shape[1]))


def cams_to_label(cams: CamSet, threshold: float | None = None) -> Tensor:
    """The label map in which every pixel has its best score; 255 where all are 0. Undoes `label_to_cams`.

    Args:
        cams: the maps.
        threshold: constant score of the background; `None` for the maps' own.

    Returns:
        uint8 `(H, W)`.

    Raises:
        FastcamError: neither a threshold nor a background.
    """
    if threshold is None and cams.background is None:
        raise FastcamError("the maps have no background of their own; give a threshold")
    best, winner = cams.scores(threshold).max(0)
    labels = torch.cat([cams.keys.new_zeros(1), cams.keys + 1])[winner]
    return labels.masked_fill(best == 0, IGNORE).to(torch.uint8)


def cams_to_irn(cams: CamSet) -> dict[str, Tensor]:
    """The fields of IRN's dictionary: `cam` at stride 4 and `high_res` at full size, one resized from the other.

    Whichever the maps are is kept exactly: `irn_to_cams` gives the `CamSet` back.

    Raises:
        FastcamError: the maps are of another size, or the set has a background or ignored pixels, for which IRN's
            files have no place.
    """
    height, width = cams.size
    small = (-(-height // 4), -(-width // 4))
    if tuple(cams.maps.shape[1:]) not in (small, cams.size):
        came = f"{cams.maps.shape[2]} x {cams.maps.shape[1]}"
        expected = f"{small[1]} x {small[0]} or {width} x {height}"
        raise FastcamError(f"the maps are {came}, and IRN's files hold {expected}; make them with stride 4 or 1")
    if cams.background is not None:
        hard = bool((cams.maps * (1 - cams.maps) == 0).all())
        if not hard or bool((cams.background != 1 - cams.maps.sum(0)).any()):
            raise FastcamError(
                "the maps have a background of their own or ignored pixels, which IRN's files cannot hold"
            )
    sizes = {"cam": small, "high_res": (height, width)}
    return {"keys": cams.keys, **{name: _resized(cams.maps.float(), size) for name, size in sizes.items()}}


def irn_to_cams(fields: dict[str, Tensor], maps: str = "cam") -> CamSet:
    """A `CamSet` of the fields that `load_irn_npy` gives.

    Args:
        fields: `keys`, `high_res` and, for `maps="cam"`, `cam`.
        maps: which of the two becomes the maps.

    Raises:
        FastcamError: the field is missing, or `high_res` is, without which the size of the image is unknown.
    """
    for name in (maps, "high_res"):
        if name not in fields:
            raise FastcamError(f"the file has no field {name}, only {', '.join(fields)}; make it with IRN's make_cam")
    height, width = fields["high_res"].shape[1:]
    order = fields["keys"].argsort()
    return CamSet(fields["keys"][order], fields[maps][order], None, (height, width))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[1:]) == size:
        return maps
    if len(maps) == 0:  # interpolate refuses empty batches
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
