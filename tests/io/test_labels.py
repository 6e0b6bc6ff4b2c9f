import numpy as np
import pytest
import torch
from PIL import Image

from fastcam.errors import FastcamError
from fastcam.io import read_label_png, voc_palette, write_label_png


def test_palette_has_the_published_colours_of_voc():
    palette = voc_palette()
    assert palette[[0, 1, 2, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0],  # background
        [128, 0, 0],  # aeroplane
        [0, 128, 0],  # bicycle
        [64, 0, 0],  # cat
        [192, 128, 128],  # person
        [0, 64, 128],  # tvmonitor
        [224, 224, 192],  # border
    ]


def test_palette_equals_the_one_in_real_voc_masks(shared_data):
    path = next((shared_data / "voc/VOCdevkit/VOC2012/SegmentationClass").glob("*.png"))
    with Image.open(path) as image:
        palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.array_equal(voc_palette()[: len(palette)], palette)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_all_256_labels_survive(tmp_path, dtype):
    label = torch.arange(256, dtype=dtype).view(8, 32)
    write_label_png(tmp_path / "a.png", label)
    back = read_label_png(tmp_path / "a.png")
    assert back.dtype == torch.uint8 and torch.equal(back, label.to(torch.uint8))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and np.array_equal(np.array(image), label.numpy())


def test_numpy_and_strided_labels_are_written(tmp_path):
    label = np.arange(12, dtype=np.uint8).reshape(3, 4).T
    write_label_png(tmp_path / "a.png", label)
    assert np.array_equal(read_label_png(tmp_path / "a.png").numpy(), label)


def test_greyscale_png_is_read_as_indices(tmp_path):
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "a.png")
    assert read_label_png(tmp_path / "a.png").tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_masks_of_colours_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(FastcamError, match=rf"a\.png stores {mode} colours, expected a palette"):
        read_label_png(tmp_path / "a.png")


def test_missing_and_damaged_masks(tmp_path):
    with pytest.raises(FastcamError, match="does not exist"):
        read_label_png(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(FastcamError, match="does not decode"):
        read_label_png(tmp_path / "a.png")


@pytest.mark.parametrize(
    "label",
    [torch.zeros(4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((2, 2), 256), torch.full((2, 2), -1)],
)
def test_labels_that_do_not_fit_a_byte_map_are_refused(tmp_path, label):
    with pytest.raises(ValueError, match="encode_label_png: expected"):
        write_label_png(tmp_path / "a.png", label)
    assert not list(tmp_path.iterdir())
