"""Objects on disk, against pycocotools where it is installed and runs worked by hand."""

import json

import numpy as np
import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import Instances, load_instances, save_instances
from fastcam.io.instances import decode_rle, encode_rle


def some(count: int = 3, height: int = 5, width: int = 7) -> Instances:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(count, height, width, generator=generator) > 0.5
    return Instances(masks, torch.arange(count), torch.linspace(0, 1, count))


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[0, 1], [1, 1]], [1, 3]),
        ([[1, 0], [1, 0]], [0, 2, 2]),
        ([[0, 0, 0]], [3]),
        ([[1]], [0, 1]),
        ([[0, 1, 0], [0, 0, 1]], [2, 1, 2, 1]),
    ],
)
def test_runs_by_hand_go_down_the_columns_and_begin_with_zeros(mask, counts):
    assert encode_rle(np.array(mask)) == counts
    np.testing.assert_array_equal(decode_rle(counts, np.shape(mask)), np.array(mask, bool))


def test_runs_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    for mask in some(6).masks.numpy():
        ours = coco.frPyObjects({"size": list(mask.shape), "counts": encode_rle(mask)}, *mask.shape)
        assert ours == coco.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.parametrize("count", [0, 3])
def test_what_is_written_is_read_again(count, tmp_path):
    instances = some(count)
    save_instances(tmp_path / "sub" / "a.json", "sub/a", instances)
    again = load_instances(tmp_path / "sub" / "a.json")
    assert torch.equal(again.masks, instances.masks)
    assert torch.equal(again.classes, instances.classes)
    torch.testing.assert_close(again.scores, instances.scores, rtol=0, atol=1e-6)
    assert (again.classes.dtype, again.scores.dtype) == (torch.int64, torch.float32)


def test_category_is_the_label(tmp_path):
    save_instances(tmp_path / "a.json", "a", some(2))
    records = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert [record["category_id"] for record in records] == [1, 2]
    assert [record["image_id"] for record in records] == ["a", "a"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"size": [2, 2]}', '{"size": [2, 2], "annotations": [{"segmentation": {"counts": [1, 2]}}]}'],
)
def test_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(FastcamError, match=r"a\.json are damaged or not in COCO's form"):
        load_instances(path)


def test_missing_file_says_which_pass_makes_it(tmp_path):
    with pytest.raises(FastcamError, match="do not exist; write them first"):
        load_instances(tmp_path / "a.json")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Instances: expected masks bool"):
        Instances(torch.zeros(2, 3, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), torch.zeros(2))
