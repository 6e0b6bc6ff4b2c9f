"""Image files in: any mode that Pillow decodes becomes 8-bit RGB."""

import functools
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastcam.errors import FastcamError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
"""What is decoded, whatever a file's suffix says. Pillow reads more; its EPS reader starts another program."""
MAX_PIXELS = 2**26
"""Larger images are refused before they are decoded: a file of some kilobytes may unfold to gigabytes."""


ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height


def read_image(
    source: str | os.PathLike[str] | bytes, *, orient: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes an image file to RGB.

    Grey levels of 16 bit are scaled to 8; transparent pixels are laid over white; CMYK, palette and two-level images
    are converted by Pillow; of several frames the first is taken.

    Args:
        source: a file of one of `FORMATS`, or its bytes.
        orient: turn the image as its EXIF orientation says. Off where a mask was drawn on the stored pixels.
        max_pixels: largest width x height that is decoded.

    Returns:
        uint8 `(H, W, 3)`, contiguous and writable.

    Raises:
        FastcamError: the file is missing, does not decode, or is larger than `max_pixels`.
    """
    with _opened(source) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise FastcamError(
                f"{_named(source)} has {width} x {height} pixels, more than max_pixels={max_pixels}; "
                "make it smaller or raise max_pixels"
            )
        if orient:
            ImageOps.exif_transpose(image, in_place=True)
        return np.array(_to_rgb(image))


def image_size(source: str | os.PathLike[str] | bytes, *, orient: bool = False) -> tuple[int, int]:
    """Height and width that `read_image` will give, from the file's header alone.

    Only a PNG whose EXIF data come behind its pixels may come out turned otherwise.

    Raises:
        FastcamError: the file is missing or has no readable header.
    """
    with _opened(source) as image:
        width, height = image.size
        # Pillow decodes a whole PNG to find EXIF data behind the pixels, where hardly any has them.
        known = orient and (image.format != "PNG" or "exif" in image.info)
        turned = known and image.getexif().get(ORIENTATION) in TURNED
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """The file, open; whatever goes wrong inside becomes one FastcamError."""
    with warnings.catch_warnings():
        # Pillow's own limit only warns, and speaks of an attack where ours gives a size and a way out.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
            with Image.open(file, formats=_formats()) as image:
                yield image
        except FastcamError:
            raise
        except FileNotFoundError:
            raise FastcamError(f"{_named(source)} does not exist") from None
        except Exception as error:  # damaged files make Pillow raise nearly anything: OSError, SyntaxError, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = f"its content is none of {', '.join(FORMATS)}"
            raise FastcamError(f"{_named(source)} does not decode: {reason}; replace or remove it") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _named(source: str | os.PathLike[str] | bytes) -> str:
    return "image" if isinstance(source, bytes) else f"image {os.fspath(source)}"


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
