"""Label PNGs, COCO's JSON, CAM stores and IRN's files, and back."""

import json

import numpy as np
import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, load_irn_npy, read_label_png, save_cams, save_irn_npy, write_label_png
from fastcam.io.coco import CocoImage, label_rle, read_coco, rle_label, write_coco
from fastcam.io.convert import cams_to_irn, cams_to_label, irn_to_cams, label_to_cams
from fastcam.pipelines.cli import main
from fastcam.pipelines.convert import convert

CLASSES = ["cat", "dog", "cow"]
SIZES = [(1, 1), (7, 5), (12, 16), (33, 1)]


def labels(ignored=True) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)
    values = np.array([0, 1, 2, 3, 255] if ignored else [0, 1, 2, 3], np.uint8)
    made = {f"a/{i}": torch.from_numpy(draw.choice(values, size)) for i, size in enumerate(SIZES)}
    return {**made, "none": torch.zeros(4, 6, dtype=torch.uint8), "all.of.it": torch.full((4, 6), 2, dtype=torch.uint8)}


@pytest.fixture
def folder(tmp_path):
    for name, label in labels().items():
        write_label_png(tmp_path / "png" / f"{name}.png", label)
    return tmp_path / "png"


def same(folder, expected) -> bool:
    found = {p.relative_to(folder).with_name(p.name[:-4]).as_posix(): read_label_png(p) for p in folder.rglob("*.png")}
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


class TestRoundTrips:
    def test_png_coco_png(self, folder, tmp_path):
        pytest.importorskip("pycocotools.mask")
        convert(folder, "coco", tmp_path / "a.json", classes="cat,dog,cow")
        convert(tmp_path / "a.json", "png", tmp_path / "back", classes="cat,dog,cow")
        assert same(tmp_path / "back", labels())
        convert(tmp_path / "a.json", "png", tmp_path / "again")
        assert same(tmp_path / "again", labels())

    def test_png_cams_png(self, folder, tmp_path):
        convert(folder, "cams", tmp_path / "cams")
        convert(tmp_path / "cams", "png", tmp_path / "back")
        assert same(tmp_path / "back", labels())

    def test_coco_cams_coco(self, folder, tmp_path):
        pytest.importorskip("pycocotools.mask")
        convert(folder, "coco", tmp_path / "a.json", classes="cat,dog,cow")
        convert(tmp_path / "a.json", "cams", tmp_path / "cams")
        convert(tmp_path / "cams", "coco", tmp_path / "b.json", classes="cat,dog,cow")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    def test_labels_through_irn_and_its_pickle(self, tmp_path):
        whole = labels(ignored=False)
        for name, label in whole.items():
            write_label_png(tmp_path / "png" / f"{name}.png", label)
        convert(tmp_path / "png", "irn", tmp_path / "irn")
        plain = np.load(tmp_path / "irn/a/2.npy", allow_pickle=True).item()  # as IRN itself reads it
        assert plain["high_res"].shape[1:] == SIZES[2] and plain["cam"].shape[1:] == (3, 4)
        convert(tmp_path / "irn", "png", tmp_path / "back", maps="high_res", threshold=0.5)
        assert same(tmp_path / "back", whole)

    @pytest.mark.parametrize(("shape", "maps"), [((3, 5), "cam"), ((11, 18), "high_res")])
    def test_cams_irn_cams_is_exact(self, tmp_path, shape, maps):
        camset = CamSet(torch.tensor([1, 4]), torch.rand(2, *shape).half().float(), None, (11, 18))
        save_cams(tmp_path / "cams/x.npz", camset)
        convert(tmp_path / "cams", "irn", tmp_path / "irn")
        convert(tmp_path / "irn", "cams", tmp_path / "back", maps=maps)
        assert (tmp_path / "back/x.npz").read_bytes() == (tmp_path / "cams/x.npz").read_bytes()

    def test_irn_to_cams_rounds_to_float16_only(self, tmp_path):
        cam, high = torch.rand(2, 3, 3), torch.rand(2, 9, 10)
        save_irn_npy(tmp_path / "irn/x.npy", torch.tensor([5, 2]), cam, high)
        convert(tmp_path / "irn", "cams", tmp_path / "cams")
        made = load_cams(tmp_path / "cams/x.npz")
        assert made.keys.tolist() == [2, 5] and made.size == (9, 10)
        torch.testing.assert_close(made.maps, cam.flip(0), rtol=2**-11, atol=1e-7)

    def test_image_without_classes(self, tmp_path):
        camset = CamSet(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, 3), None, (8, 12))
        fields = cams_to_irn(camset)
        save_irn_npy(tmp_path / "a.npy", **fields)
        back = irn_to_cams(load_irn_npy(tmp_path / "a.npy"))
        assert back.keys.tolist() == [] and back.size == (8, 12)
        assert cams_to_label(back, 0.5).tolist() == [[0] * 12] * 8


class TestCoco:
    def test_foreign_file_with_polygons_plain_runs_and_overlap(self, tmp_path):
        pytest.importorskip("pycocotools.mask")
        square = [0, 0, 4, 0, 4, 4, 0, 4]
        content = {
            "categories": [{"id": 90, "name": "cow"}, {"id": 18, "name": "dog"}, {"id": 2, "name": "bus"}],
            "images": [{"id": 5, "file_name": "sub/x.jpg", "height": 4, "width": 6}],
            "annotations": [
                {"image_id": 5, "category_id": 18, "segmentation": {"size": [4, 6], "counts": [0, 4, 20]}},
                {"image_id": 5, "category_id": 90, "segmentation": [square]},
                {"image_id": 5, "category_id": 2, "segmentation": {"size": [4, 6], "counts": [23, 1]}},
            ],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        ((name, label),) = read_coco(tmp_path / "a.json", CLASSES)
        assert name == "sub/x"
        assert label.tolist() == [[2, 3, 3, 3, 0, 0]] * 3 + [[2, 3, 3, 3, 0, 255]]
        ((_, by_id),) = read_coco(tmp_path / "a.json")  # bus 1, dog 2, cow 3
        assert by_id.unique().tolist() == [0, 1, 2, 3]

    def test_area_and_box(self):
        pytest.importorskip("pycocotools.mask")
        label = torch.tensor([[0, 7, 7], [0, 7, 0]], dtype=torch.uint8)
        (record,) = label_rle(label)
        assert (record["category_id"], record["area"], record["bbox"]) == (7, 3, [1, 0, 2, 2])
        assert torch.equal(rle_label([record], (2, 3)), label)

    def test_file_that_is_no_coco_file(self, tmp_path):
        (tmp_path / "a.json").write_text("[1]")
        with pytest.raises(FastcamError, match=r"COCO file .*a\.json does not read"):
            list(read_coco(tmp_path / "a.json"))
        with pytest.raises(FastcamError, match="does not exist"):
            list(read_coco(tmp_path / "b.json"))

    def test_masks_of_another_size_or_too_many_categories(self, tmp_path):
        pytest.importorskip("pycocotools.mask")
        record = {"category_id": 1, "segmentation": {"size": [4, 6], "counts": [23, 1]}}
        write_coco(
            tmp_path / "a.json", [CocoImage("a", "a.jpg", (4, 6), label_rle(np.ones((3, 3), np.uint8)))], CLASSES
        )
        with pytest.raises(FastcamError, match="a mask is 3 x 3, its image 6 x 4 pixels"):
            list(read_coco(tmp_path / "a.json"))
        with pytest.raises(FastcamError, match="category 256 is no label"):
            rle_label([{**record, "category_id": 256}], (4, 6))


class TestRefusals:
    def test_irn_holds_neither_backgrounds_nor_ignored_pixels(self, folder, tmp_path):
        with pytest.raises(FastcamError, match="ignored pixels, which IRN's files cannot hold"):
            convert(folder, "irn", tmp_path / "irn")

    def test_other_strides_are_not_irn(self):
        with pytest.raises(FastcamError, match="the maps are 2 x 2, and IRN's files hold 3 x 3 or 9 x 9"):
            cams_to_irn(CamSet(torch.tensor([0]), torch.rand(1, 2, 2), None, (9, 9)))

    def test_maps_without_a_background_need_a_threshold(self):
        with pytest.raises(FastcamError, match="give a threshold"):
            cams_to_label(CamSet(torch.tensor([0]), torch.rand(1, 2, 2), None, (9, 9)))

    def test_one_hot_maps_have_no_class_255(self):
        assert label_to_cams(torch.tensor([[255, 0, 254]], dtype=torch.uint8)).keys.tolist() == [253]

    def test_fields_that_are_missing(self):
        with pytest.raises(FastcamError, match="has no field high_res"):
            irn_to_cams({"keys": torch.tensor([0]), "cam": torch.rand(1, 2, 2)})

    def test_command_says_what_is_wrong_in_one_line(self, tmp_path, capsys):
        assert main(["convert", "--source", str(tmp_path / "x"), "--to", "png", "--out", str(tmp_path / "o")]) == 2
        assert "is neither a folder nor a .json file" in capsys.readouterr().err
        (tmp_path / "x").mkdir()
        assert main(["convert", "--source", str(tmp_path / "x"), "--to", "png", "--out", str(tmp_path / "o")]) == 2
        assert "holds no .png, .npz or .npy file" in capsys.readouterr().err
