"""Image files in: any mode that Pillow decodes becomes 8-bit RGB."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastcam.errors import FastcamError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
MAX_PIXELS = 2**26
"""Larger images are refused before they are decoded: a file of some kilobytes may unfold to gigabytes."""


def read_image(path: str | os.PathLike[str], *, orient: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file to RGB.

    Grey levels of 16 bit are scaled to 8; transparent pixels are laid over white; CMYK, palette and two-level images
    are converted by Pillow; of several frames the first is taken.

    Args:
        path: any format that Pillow reads.
        orient: turn the image as its EXIF orientation says. Off where a mask was drawn on the stored pixels.
        max_pixels: largest width x height that is decoded.

    Returns:
        uint8 `(H, W, 3)`, contiguous and writable.

    Raises:
        FastcamError: the file is missing, does not decode, or is larger than `max_pixels`.
    """
    path = Path(path)
    with warnings.catch_warnings():
        # Pillow's own limit only warns, and speaks of an attack where ours gives a size and a way out.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise FastcamError(
                        f"image {path} has {width} x {height} pixels, more than max_pixels={max_pixels}; "
                        "make it smaller or raise max_pixels"
                    )
                if orient:
                    ImageOps.exif_transpose(image, in_place=True)
                return np.array(_to_rgb(image))
        except FastcamError:
            raise
        except FileNotFoundError:
            raise FastcamError(f"image {path} does not exist") from None
        except Exception as error:  # damaged files make Pillow raise nearly anything: OSError, SyntaxError, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FastcamError(f"image {path} does not decode: {reason}; replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
            raise ValueError(f"integer levels {levels.min()} to {levels.max()}, expected 0 to 65535")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float pixels have no known range, expected 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
