import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastcam.errors import FastcamError
from fastcam.io import image_size, read_image


def test_rgb_png_comes_back_exactly(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8 and image.flags.writeable and image.flags.c_contiguous
    assert np.array_equal(image, rgb)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257, 65535, 128 * 257]], np.uint16)).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}")[0].tolist() == [[v] * 3 for v in (0, 1, 255, 128)]


def test_transparent_pixels_are_laid_over_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_with_alpha_and_transparent_palette(tmp_path):
    Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0].tolist() == [[40] * 3, [255] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png")[0].tolist() == [[1, 2, 3], [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb_of_the_same_colour(tmp_path, mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (16, 16, 3) and image.min() >= 254


def test_exif_orientation_only_when_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_image(tmp_path / "a.png", orient=True)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]
    assert image_size(tmp_path / "a.png") == (2, 3) and image_size(tmp_path / "a.png", orient=True) == (3, 2)


def test_size_is_read_without_decoding(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(9000, 8000))
    assert image_size(tmp_path / "a.png", orient=True) == (8000, 9000)
    with pytest.raises(FastcamError, match="image does not decode"):
        image_size(b"no image")


def test_bytes_are_read_like_the_file(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert np.array_equal(read_image((tmp_path / "a.png").read_bytes()), rgb)


def test_formats_that_start_programs_are_not_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(FastcamError, match=r"a\.jpg does not decode: its content is none of JPEG"):
        read_image(tmp_path / "a.jpg")


def bomb(width, height):
    """A PNG of some bytes that claims to be huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])  # above our limit; above Pillow's own
def test_decompression_bomb_is_refused_before_decoding(tmp_path, side):
    (tmp_path / "a.png").write_bytes(bomb(side, side))
    with pytest.raises(FastcamError, match=r"a\.png.*pixels"):
        read_image(tmp_path / "a.png")


def test_max_pixels_is_a_setting(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=64).shape == (8, 8, 3)
    with pytest.raises(FastcamError, match="8 x 8 pixels, more than max_pixels=63"):
        read_image(tmp_path / "a.png", max_pixels=63)


def test_missing_file(tmp_path):
    with pytest.raises(FastcamError, match=r"nothing\.jpg does not exist"):
        read_image(tmp_path / "nothing.jpg")


def test_damaged_files_always_give_one_line(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    good = (tmp_path / "a.jpg").read_bytes()
    refused = 0
    for length in [0, 1, 3, 20, 200, len(good) // 2, len(good) - 2]:
        (tmp_path / "b.jpg").write_bytes(good[:length])
        with pytest.raises(FastcamError, match=r"b\.jpg does not decode") as raised:
            read_image(tmp_path / "b.jpg")
        assert "\n" not in str(raised.value)
    for _ in range(100):
        data = bytearray(good)
        for position in rng.integers(0, 600, 20):
            data[position] = rng.integers(256)
        (tmp_path / "b.jpg").write_bytes(data)
        try:
            assert read_image(tmp_path / "b.jpg").shape[2] == 3
        except FastcamError:
            refused += 1
    assert refused > 50
