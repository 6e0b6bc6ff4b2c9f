"""Pictures of the report: label maps and CAMs laid over their image, as data URIs."""

from __future__ import annotations

import base64
import colorsys
import io

import numpy as np
from PIL import Image
from torch import Tensor

from fastcam.io import CamSet

IGNORE = 255
LONGEST = 256  # pixels of the longer side in the file; shown at 170, so sharp on dense screens
# Ten colours apart in hue and lightness; further classes walk around the hues by the golden ratio.
_COLOURS = (
    (255, 107, 53), (56, 132, 255), (46, 184, 92), (214, 64, 159), (250, 190, 40),
    (128, 90, 230), (20, 184, 190), (222, 60, 70), (150, 196, 40), (160, 110, 74),
)  # fmt: skip
_HEAT = ((0, 0, 4), (60, 9, 101), (135, 33, 107), (203, 65, 73), (246, 126, 23), (252, 200, 60), (252, 255, 164))

Array = np.ndarray


def class_colour(k: int) -> tuple[int, int, int]:
    """Colour of foreground class `k`."""
    if k < len(_COLOURS):
        return _COLOURS[k]
    red, green, blue = colorsys.hls_to_rgb(0.618034 * k % 1, 0.45 + 0.15 * (k % 3 - 1), 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def photo(image: Tensor) -> str:
    """The image, uint8 `(3, H, W)`."""
    return _encode(image.permute(1, 2, 0).numpy())


def label_overlay(image: Tensor, label: Tensor) -> str:
    """Labels `(H, W)` over their image; 255 is striped, the background a little darker than it is."""
    rgb = image.permute(1, 2, 0).numpy().astype(np.float32)
    labels = label.numpy().astype(np.int64)
    colours = np.array([(0, 0, 0), *(class_colour(k) for k in range(255))], np.float32)
    out = 0.4 * rgb + 0.6 * colours[np.where(labels == IGNORE, 0, labels)]
    out[labels == 0] = 0.8 * rgb[labels == 0]
    y, x = np.indices(labels.shape)
    stripes = np.where((x + y) // 3 % 2, 235.0, 150.0)[..., None]
    ignored = labels == IGNORE
    out[ignored] = (0.35 * rgb + 0.65 * stripes)[ignored]
    out[_outline(labels)] = 255
    return _encode(out)


def heat_overlay(image: Tensor, heat: Tensor) -> str:
    """A map `(H, W)` in [0, 1] as heat over the grey image."""
    grey = image.permute(1, 2, 0).numpy().astype(np.float32).mean(2, keepdims=True)
    levels = np.linspace(0, 1, len(_HEAT))
    value = heat.float().numpy().clip(0, 1)
    colour = np.stack([np.interp(value, levels, channel) for channel in zip(*_HEAT, strict=True)], axis=2)
    return _encode(0.3 * grey + 0.7 * colour)


def heat_gradient() -> str:
    """The heat's colours from 0 to 1 as CSS."""
    return f"linear-gradient(90deg,{','.join(f'rgb{colour}' for colour in _HEAT)})".replace(" ", "")


def full_size(cams: CamSet) -> Tensor:
    """The maps alone at the image's size, `(n, H, W)`."""
    return cams.scores(0.0)[1:]


def _outline(label: Array) -> Array:
    """The foreground's inner edge, one pixel wide."""
    edge = np.zeros(label.shape, bool)
    edge[:-1] |= label[:-1] != label[1:]
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    return edge & (label != IGNORE)


def _encode(rgb: Array) -> str:
    picture = Image.fromarray(rgb.round().clip(0, 255).astype(np.uint8))
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
