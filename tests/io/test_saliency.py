"""Saliency maps in."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastcam.errors import FastcamError
from fastcam.io import find_saliency, read_saliency


def test_grey_levels_become_shares(tmp_path):
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "a.png")
    torch.testing.assert_close(read_saliency(tmp_path / "a.png"), torch.tensor([[0.0, 0.2, 1.0]]))


def test_deep_two_level_and_colour_images(tmp_path):
    Image.fromarray(np.array([[0, 13107, 65535]], np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(read_saliency(tmp_path / "deep.png"), torch.tensor([[0.0, 0.2, 1.0]]))
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "two.png")
    assert read_saliency(tmp_path / "two.png").tolist() == [[0, 1]]
    Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)).save(tmp_path / "colour.png")
    assert read_saliency(tmp_path / "colour.png").tolist() == [[0, 1]]


def test_file_is_found_by_id_and_a_missing_or_damaged_one_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "sub" / "a.b.jpg")
    assert find_saliency(tmp_path, "sub/a.b") == tmp_path / "sub" / "a.b.jpg"
    with pytest.raises(FastcamError, match=r"saliency map .*/c\.png does not exist; make one for every image"):
        find_saliency(tmp_path, "c")
    with pytest.raises(FastcamError, match=r"saliency map .*/c\.png does not exist"):
        read_saliency(tmp_path / "c.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(FastcamError, match=r"saliency map .*/c\.png does not decode"):
        read_saliency(tmp_path / "c.png")
