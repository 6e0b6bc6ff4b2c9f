"""Several overlapping random crops of an image, whose places are known: views of self-supervised learning (MEVT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastcam.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform
from fastcam.errors import FastcamError

GLOBALS = 2
RATIO = (3 / 4, 4 / 3)
TRIES = 1000
SHARED, SHARED_GLOBALS = 0.01, 0.02  # parts of the image's area that two crops must have in common


Box = tuple[int, int, int, int]


def shared_area(a: Box, b: Box) -> int:
    """Area that two boxes (x1, y1, x2, y2) have in common."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def draw_crops(
    height: int,
    width: int,
    num_locals: int,
    *,
    global_scale: tuple[float, float] = (0.25, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.25),
) -> Tensor:
    """Random boxes of two global crops and of local ones, each of which overlaps every global crop drawn before it.

    The two global crops share more than 2 % of the image's area, a local and a global one more than 1 %. A box that
    does not is drawn again, as Leopart does. In images so elongated that crops are tiny, half of the smaller crop is
    enough.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        num_locals: L.
        global_scale: smallest and largest area of a global crop as a share of the image's; sides at 3/4 to 4/3.
        local_scale: of a local crop.

    Returns:
        int64 ``(2 + L, 4)``: x1, y1, x2, y2 in pixels, the global crops first.

    Raises:
        FastcamError: no such boxes in 1,000 tries, with scales that leave hardly any.
    """
    image = torch.empty(3, height, width, device="meta")  # only its size is read
    scales = [global_scale] * GLOBALS + [local_scale] * num_locals
    boxes: list[Box] = []

    def fits(box: Box, other: Box) -> bool:
        share = height * width * (SHARED_GLOBALS if len(boxes) < GLOBALS else SHARED)
        return shared_area(box, other) > min(share, shared_area(box, box) / 2, shared_area(other, other) / 2)

    for _ in range(TRIES):
        if len(boxes) == len(scales):
            return torch.tensor(boxes)
        place = v2.RandomResizedCrop(1, scale=scales[len(boxes)], ratio=RATIO).make_params([image])
        top, left = place["top"], place["left"]
        box = (left, top, left + place["width"], top + place["height"])
        if all(fits(box, other) for other in boxes[:GLOBALS]):
            boxes.append(box)
    raise FastcamError(
        f"no {len(scales)} overlapping crops of {global_scale} and {local_scale} of the area were found in an image of "
        f"{width} x {height} pixels; choose larger scales"
    )


def multi_crop_transform(
    crop_size: int,
    local_size: int,
    num_locals: int,
    *,
    global_scale: tuple[float, float] = (0.25, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.25),
    flip: bool = True,
    colors: Literal["leopart", "dino"] = "leopart",
    strength: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """Two global crops and L local ones of every image, with their boxes, each with colours changed by itself.

    Args:
        crop_size: S, side of the global crops.
        local_size: s, side of the local crops.
        num_locals: L.
        global_scale: as for :func:`draw_crops`.
        local_scale: as for :func:`draw_crops`.
        flip: mirror every other crop.
        colors: ``"leopart"``: jitter (0.8, 0.8, 0.8, 0.2) times ``strength``, grey for a fifth of the crops, blur for
            half. ``"dino"``: jitter (0.8, 0.8, 0.4, 0.2) times ``strength``; blur for all first global crops, a tenth
            of the second, half of the local ones; a fifth of the second global crops solarised.
        strength: of the jitter.
        mean: subtracted from the image in [0, 1].
        std: divides it then.

    Returns:
        A transform whose items have ``"globals"`` float32 ``(2, 3, S, S)``, ``"locals"`` float32 ``(L, 3, s, s)``,
        ``"boxes"`` float32 ``(2 + L, 4)`` (x1, y1, x2, y2 in the image's pixels, globals first), ``"flips"`` bool
        ``(2 + L,)``, and what else the item had but image, mask and maps.

    Raises:
        ValueError: sizes below 1 or a negative number of crops.
    """
    if min(crop_size, local_size) < 1 or num_locals < 0:
        raise ValueError(
            f"multi_crop_transform: expected sizes >= 1 and num_locals >= 0, got {crop_size}, {local_size} and "
            f"{num_locals}"
        )
    dino = colors == "dino"
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, (0.4 if dino else 0.8) * strength, 0.2 * strength)
    blurs = [1.0, 0.1] + [0.5] * num_locals if dino else [0.5] * (GLOBALS + num_locals)

    def augment(crop: int) -> v2.Compose:
        size = crop_size if crop < GLOBALS else local_size
        blur = v2.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))
        steps = [v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2), v2.RandomApply([blur], blurs[crop])]
        if dino and crop == 1:
            steps.append(v2.RandomSolarize(128, 0.2))
        to_float = v2.ToDtype(torch.float32, scale=True)
        return v2.Compose([*steps, to_float, v2.Normalize(list(mean), list(std))])

    augments = [augment(crop) for crop in range(GLOBALS + num_locals)]

    def transform(item: dict[str, Any]) -> dict[str, Any]:
        image = item["image"].as_subclass(Tensor)
        boxes = draw_crops(
            image.shape[1], image.shape[2], num_locals, global_scale=global_scale, local_scale=local_scale
        )
        flips = (torch.rand(len(boxes)) < 0.5) & flip
        crops = []
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            side = crop_size if i < GLOBALS else local_size
            crop = F.resized_crop(
                image, y1, x1, y2 - y1, x2 - x1, [side, side], v2.InterpolationMode.BICUBIC, antialias=True
            )
            crops.append(augments[i](crop.flip(-1) if flips[i] else crop))
        rest = {key: value for key, value in item.items() if key not in ("image", "mask", "maps", "valid")}
        locals_ = torch.stack(crops[GLOBALS:]) if num_locals else image.new_zeros(0, 3, local_size, local_size).float()
        views = {"globals": torch.stack(crops[:GLOBALS]), "locals": locals_}
        return {**rest, **views, "boxes": boxes.float(), "flips": flips}

    return transform
