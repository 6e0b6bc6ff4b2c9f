"""Joint transforms of items: image, mask and the mask of valid pixels change together.

All randomness comes from torch's global generator, so that whoever seeds it (the train pass does) repeats a transform
exactly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Item = dict[str, Any]
Transform = Callable[[Item], Item]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORE_INDEX = 255


class RandomResizeLong(v2.Transform):
    """Resizes so that the longer side becomes a random integer in `[low, high]`: image bicubic, mask nearest.

    With `square` the shorter side gets that length too, whatever the image's shape.
    """

    def __init__(self, low: int, high: int, square: bool = False) -> None:
        super().__init__()
        if not 1 <= low <= high:
            raise ValueError(f"RandomResizeLong: expected 1 <= low <= high, got {low}, {high}")
        self.low, self.high, self.square = low, high, square

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the new size."""
        height, width = v2.query_size(flat_inputs)
        long = int(torch.randint(self.low, self.high + 1, ()))
        if self.square:
            return {"size": (long, long)}
        return {"size": _scaled(height, width, long / max(height, width))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes an image or a mask."""
        return F.resize(inpt, params["size"], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


class RandomScale(v2.Transform):
    """Resizes both sides by one random factor, uniform in `[low, high]`: image bicubic, mask nearest."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not 0 < low <= high:
            raise ValueError(f"RandomScale: expected 0 < low <= high, got {low}, {high}")
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the new size."""
        height, width = v2.query_size(flat_inputs)
        return {"size": _scaled(height, width, self.low + (self.high - self.low) * float(torch.rand(())))}

    transform = RandomResizeLong.transform


class RandomCrop:
    """Cuts a random `size x size` window; a smaller image is laid at a random place of it.

    Adds `"valid"`, bool `(size, size)`: where the crop shows the image. Around it the image is 0 (the mean colour, if
    it is normalised), the mask 255 and the maps of classes, where there are some, 0.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"RandomCrop: expected size >= 1, got {size}")
        self.size = size

    def __call__(self, item: Item) -> Item:
        """Crops `image`, `mask`, `maps` and the new `valid` at one place."""
        height, width = item["image"].shape[-2:]
        rows, cols = self._place(height), self._place(width)
        item = dict(item)
        valid = torch.ones(height, width, dtype=torch.bool)
        for name, plane, fill in (
            ("image", item["image"], 0),
            ("mask", item.get("mask"), IGNORE_INDEX),
            ("maps", item.get("maps"), 0),
            ("valid", valid, False),
        ):
            if plane is not None:
                window = plane.as_subclass(Tensor).new_full((*plane.shape[:-2], self.size, self.size), fill)
                window[..., rows[0], cols[0]] = plane[..., rows[1], cols[1]].as_subclass(Tensor)
                item[name] = tv_tensors.wrap(window, like=plane) if isinstance(plane, tv_tensors.TVTensor) else window
        return item

    def _place(self, length: int) -> tuple[slice, slice]:
        """Where along one axis in the window, and what of the image, is copied."""
        copied = min(length, self.size)
        start = int(torch.randint(abs(length - self.size) + 1, ()))
        if length > self.size:
            return slice(0, copied), slice(start, start + copied)
        return slice(start, start + copied), slice(0, copied)


def train_transform(
    crop_size: int,
    *,
    resize_long: tuple[int, int] | None = (320, 640),
    square: bool = False,
    flip: bool = True,
    color_jitter: tuple[float, float, float, float] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """The training transform of CAM networks (IRN, SEAM, SFC): resize the longer side, mirror, normalise, crop with
    zero padding.

    Args:
        crop_size: S.
        resize_long: range of the longer side; `None` keeps the image's size.
        square: give both sides that length (DRS, Group-WSSS).
        flip: mirror every other image.
        color_jitter: brightness, contrast, saturation and hue as for `torchvision.transforms.v2.ColorJitter`.
        mean: subtracted from the image in [0, 1].
        std: divides it then.

    Returns:
        A transform whose items have `"image"` float32 `(3, S, S)`, `"valid"` bool `(S, S)` and, where there was one,
        `"mask"` int64 `(S, S)`; `"maps"`, a `tv_tensors.Mask` of floats `(K, H, W)`, becomes float `(K, S, S)`; the
        rest passes through.
    """
    resize = [] if resize_long is None else [RandomResizeLong(*resize_long, square)]
    return v2.Compose(
        [*resize, *_augment(flip, color_jitter), _normalize(mean, std), RandomCrop(crop_size), _to_tensors]
    )


class RandAugment(v2.Transform):
    """RandAugment (E. D. Cubuk et al., 2020) on uint8 images as DeiT trains with it: timm's ``rand-m9-mstd0.5-inc1``.

    Draws ``ops`` of 15 operations, each used half of the time, at a severity around ``magnitude`` of 10; all grow with
    it. What geometry leaves empty gets the mean colour of ImageNet. Shears are about the centre, not the corner.

    Args:
        ops: operations drawn for an image.
        magnitude: mean of the severity, 0 to 10.
        std: its standard deviation.
    """

    def __init__(self, ops: int = 2, magnitude: float = 9.0, std: float = 0.5) -> None:
        super().__init__()
        if ops < 0 or not 0 <= magnitude <= 10:
            raise ValueError(f"RandAugment: expected ops >= 0 and magnitude in 0..10, got {ops} and {magnitude}")
        self.ops, self.magnitude, self.std = ops, magnitude, std

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws operations, their severities in 0..1 and directions."""
        chosen = []
        for _ in range(self.ops):
            index, used, severity, sign = torch.randint(15, ()), torch.rand(()), torch.randn(()), torch.rand(())
            level = min(max((self.magnitude + self.std * float(severity)) / 10, 0.0), 1.0)
            if used < 0.5:
                chosen.append((int(index), level, 1.0 if sign < 0.5 else -1.0))
        return {"chosen": chosen}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Augments an image."""
        for index, level, sign in params["chosen"]:
            inpt = self._apply(inpt, index, level, sign)
        return inpt

    def _apply(self, x: Any, index: int, level: float, sign: float) -> Any:
        angle = sign * math.degrees(math.atan(0.3 * level))
        shift = sign * 0.45 * level
        enhance = max(0.1, 1 + sign * 0.9 * level)

        def move(turn: float = 0.0, right: float = 0.0, down: float = 0.0, shear: tuple[float, float] = (0, 0)) -> Any:
            at = [round(right * x.shape[-1]), round(down * x.shape[-2])]
            fill = [255 * value for value in IMAGENET_MEAN]
            return F.affine(x, turn, at, 1.0, list(shear), v2.InterpolationMode.BILINEAR, fill)

        def add() -> Any:
            brighter = (x.to(torch.int16) + min(128, int(110 * level))).clamp(max=255).to(torch.uint8)
            return tv_tensors.wrap(torch.where(x < 128, brighter, x), like=x)

        operations: tuple[Callable[[], Any], ...] = (
            lambda: F.autocontrast(x),
            lambda: F.equalize(x),
            lambda: F.invert(x),
            lambda: move(turn=sign * 30 * level),
            lambda: F.posterize(x, 4 - int(4 * level)),
            lambda: F.solarize(x, 256 - int(256 * level)),
            add,
            lambda: F.adjust_saturation(x, enhance),
            lambda: F.adjust_contrast(x, enhance),
            lambda: F.adjust_brightness(x, enhance),
            lambda: F.adjust_sharpness(x, enhance),
            lambda: move(shear=(angle, 0)),
            lambda: move(shear=(0, angle)),
            lambda: move(right=shift),
            lambda: move(down=shift),
        )
        return operations[index]()


def two_view_transform(
    crop_size: int,
    *,
    scale: tuple[float, float] = (0.3, 1.2),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """Two independent random crops of every image, resized to a square; the second is augmented strongly (CTI).

    Args:
        crop_size: S.
        scale: smallest and largest area of a crop as a share of the image's; its sides have a ratio of 3/4 to 4/3.
        flip: mirror every other view.
        mean: subtracted from the image in [0, 1].
        std: divides it then.

    Returns:
        A transform whose items have `"image"` and `"strong"` float32 `(3, S, S)`, and where there was one `"mask"`
        int64 `(S, S)`, cropped as `"image"`.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"two_view_transform: expected 0 < smallest <= largest scale, got {scale}")
    crop = v2.RandomResizedCrop(crop_size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC)
    weak = v2.Compose([crop, *_augment(flip, None), _normalize(mean, std), _to_tensors])
    strong = v2.Compose([crop, *_augment(flip, None), RandAugment(), _normalize(mean, std), _to_tensors])

    def transform(item: Item) -> Item:
        return {**weak(item), "strong": strong({"image": item["image"]})["image"]}

    return transform


def twin_transform(
    size: int,
    *,
    scale: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (0.7, 1.4),
    shift: int | None = None,
    jitter: Sequence[float] | None = (0.4, 0.4, 0.4, 0.1),
    grayscale: float = 0.25,
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """Two views of every image that are mirrored alike, and cropped and coloured each on its own (AMDIM).

    Args:
        size: S.
        scale: smallest and largest area of a crop as a share of the image's.
        ratio: smallest and largest ratio of its sides.
        shift: move the image by at most so many pixels instead, four times out of five; what is missing at the border
            is mirrored. The image is brought to S x S pixels first.
        jitter: brightness, contrast, saturation and hue, four times out of five; `None` for none.
        grayscale: share of views without colour.
        flip: mirror every other image.
        mean: subtracted from the image in [0, 1].
        std: divides it then.

    Returns:
        A transform whose items have `"image"` and `"second"` float32 `(3, S, S)`.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    if shift is None:
        place: list[Transform] = [v2.RandomResizedCrop(size, scale, ratio, interpolation=bicubic)]
    else:
        moved = v2.RandomApply([v2.RandomCrop(size, padding=shift, padding_mode="reflect")], p=0.8)
        place = [v2.Resize((size, size), interpolation=bicubic), moved]
    color = [] if jitter is None else [v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8)]
    view = v2.Compose([*place, *color, v2.RandomGrayscale(grayscale), _normalize(mean, std), _to_tensors])
    mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)

    def transform(item: Item) -> Item:
        item = mirror(item)
        return {**view(item), "second": view({"image": item["image"]})["image"]}

    return transform


def center_transform(
    size: int,
    *,
    resize: int,
    flip: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """The transform of images that are classified: shorter side to `resize` (bicubic), the central square, normalised.

    Args:
        size: S, at most `resize`.
        resize: new length of the shorter side.
        flip: mirror every other image.
        mean: subtracted from the image in [0, 1].
        std: divides it then.

    Returns:
        A transform whose items have `"image"` float32 `(3, S, S)`.
    """
    if not 1 <= size <= resize:
        raise ValueError(f"center_transform: expected 1 <= size <= resize, got {size}, {resize}")
    shape = [v2.Resize(resize, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    return v2.Compose([*shape, *_augment(flip, None), _normalize(mean, std), _to_tensors])


class RandomShrink(v2.Transform):
    """Cuts a window at a random place whose sides are a random share of the image's, uniform in `[low, high]`."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not 0 < low <= high <= 1:
            raise ValueError(f"RandomShrink: expected 0 < low <= high <= 1, got {low}, {high}")
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws size and place."""
        whole = v2.query_size(flat_inputs)
        height, width = _scaled(whole[0], whole[1], self.low + (self.high - self.low) * float(torch.rand(())))
        top, left = (int(torch.randint(gap + 1, ())) for gap in (whole[0] - height, whole[1] - width))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crops an image or a mask."""
        return F.crop(inpt, **params)


def turn_transform(
    size: int,
    *,
    degrees: float = 45.0,
    shrink: tuple[float, float] = (0.85, 0.95),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """Whole images turned, mirrored and brought to a square: the training transform of deep co-training.

    Half of the images are turned by up to `degrees`, bilinear, around their centre; the corners that this leaves empty
    are black and background. From one in five a window is cut. The mask follows by nearest neighbour.

    Args:
        size: S.
        degrees: largest angle.
        shrink: smallest and largest side of the window, as a share of the image's.
        flip: mirror half of the images from left to right, and half of them upside down.
        mean: as for `train_transform`.
        std: as for `train_transform`.

    Returns:
        A transform whose items have `"image"` float32 `(3, S, S)` and, where there was one, `"mask"` int64 `(S, S)`.
    """
    mirror = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flip else []
    turn = v2.RandomApply([v2.RandomRotation(degrees, v2.InterpolationMode.BILINEAR)], p=0.5)
    window = v2.RandomApply([RandomShrink(*shrink)], p=0.2)
    return v2.Compose(
        [*mirror, turn, window, v2.Resize((size, size), antialias=True), _normalize(mean, std), _to_tensors]
    )


def segment_transform(
    crop_size: int,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    color_jitter: tuple[float, float, float, float] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """The training transform of segmentation networks (DeepLab): random scale, mirror, normalise, crop.

    Args:
        crop_size: S.
        scale: range of the factor.
        flip: mirror every other image.
        color_jitter: as for `train_transform`.
        mean: as for `train_transform`.
        std: as for `train_transform`.

    Returns:
        A transform with the results of `train_transform`.
    """
    return v2.Compose(
        [RandomScale(*scale), *_augment(flip, color_jitter), _normalize(mean, std), RandomCrop(crop_size), _to_tensors]
    )


def eval_transform(*, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Transform:
    """Normalises, without any randomness or change of size.

    Returns:
        A transform whose items have `"image"` float32 `(3, H, W)` and, where there was one, `"mask"` int64 `(H, W)`.
    """
    return v2.Compose([_normalize(mean, std), _to_tensors])


def multi_scale(
    image: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5, 2.0),
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> list[Tensor]:
    """The views of an image from which multi-scale CAMs are made: Pillow's bicubic resize, then normalisation.

    Args:
        image: uint8 `(3, H, W)`.
        scales: factors; 1 leaves the image as it is. Sides are rounded (halves to even) and at least 1.
        mean: subtracted from the image in [0, 1].
        std: divides it then.

    Returns:
        float32 `(3, h_s, w_s)`, one a scale.

    Raises:
        ValueError: another shape or dtype, or a scale that is not positive.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"multi_scale: expected image uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    if min(scales, default=1) <= 0:
        raise ValueError(f"multi_scale: expected positive scales, got {tuple(scales)}")
    array = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    views = []
    for scale in scales:
        height, width = _scaled(array.shape[0], array.shape[1], scale)
        resized = array if scale == 1 else np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
        view = torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        views.append(F.normalize(F.to_dtype(view, torch.float32, scale=True), list(mean), list(std)))
    return views


def denormalize(image: Tensor, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Undoes the normalisation.

    Args:
        image: float `(..., 3, H, W)`.
        mean: as it was subtracted.
        std: as it divided.

    Returns:
        uint8 of the same shape, rounded and clipped.
    """
    scale, shift = (
        torch.as_tensor(values, dtype=image.dtype, device=image.device).view(3, 1, 1) for values in (std, mean)
    )
    return ((image * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


def _augment(flip: bool, color_jitter: tuple[float, float, float, float] | None) -> list[Transform]:
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    return mirror if color_jitter is None else [*mirror, v2.ColorJitter(*color_jitter)]


def _normalize(mean: Sequence[float], std: Sequence[float]) -> Transform:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([to_float, v2.Normalize(list(mean), list(std))])


def _to_tensors(item: Item) -> Item:
    """Plain tensors, labels as int64: what losses take and what collates without surprise."""
    item = dict(item)
    item["image"] = item["image"].as_subclass(Tensor)
    if "mask" in item:
        item["mask"] = item["mask"].as_subclass(Tensor).long()
    if "maps" in item:
        item["maps"] = item["maps"].as_subclass(Tensor)
    return item


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, round(height * scale)), max(1, round(width * scale))
