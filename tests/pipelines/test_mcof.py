"""The loop of MCOF on tiny images."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny import CLASSES, TRAINER, files

from fastcam.errors import FastcamError
from fastcam.io import read_label_png
from fastcam.pipelines import mcof as mcof_module
from fastcam.pipelines._data import open_data
from fastcam.pipelines.evaluate import evaluate
from fastcam.pipelines.mcof import (
    Mining,
    Regions,
    image_saliency,
    make_regions,
    mcof,
    read_regions,
    refined_label,
    write_regions,
)
from fastcam.pipelines.refine import Crf

METHOD = {"backbone": "resnet10t", "bins": 2, "hidden": 16, "lr": 0.01}
PIXELNET = {"backbone": "resnet10t", "head_channels": 8, "low_level_channels": 0, "rates": [2], "lr": 0.01}
MINING = Mining(regions=12, first_single_class=False)
CRF = Crf(preset="psa", iterations=2)
SHORT = dataclasses.replace(TRAINER, epochs=1)


def run(data, cams, out, iterations, **more):
    settings = {"method": METHOD, "pixelnet": PIXELNET, "mining": MINING, "crf": CRF}
    return mcof(data, cams, out, iterations=iterations, trainer=SHORT, pixel_trainer=SHORT, **{**settings, **more})


@pytest.fixture(scope="module")
def mined(data, cams, tmp_path_factory):
    """One iteration."""
    out = tmp_path_factory.mktemp("mcof")
    return out, run(data, cams, out, 1)


def test_every_step_leaves_labels_that_can_be_scored_and_the_tags_hold(data, root, mined):
    out, weights = mined
    assert weights == out / "iteration_1" / "pixelnet" / "weights.safetensors"
    assert weights.is_file()
    tags = open_data(data).tags
    for step in ("seeds", "mined", "refined", "masks"):
        folder = out / "iteration_1" / step
        assert {f"train_{i:04d}.png" for i in range(12)} <= files(folder)
        for i in range(12):
            present = set(read_label_png(folder / f"train_{i:04d}.png").unique().tolist()) - {0, 255}
            assert present <= {int(k) + 1 for k in tags[i].nonzero()}, (step, i)
        assert evaluate(data, folder, out=out / "scores" / step)["classes"][1:] == CLASSES


def test_seeds_and_what_is_mined_have_one_label_a_region(mined):
    out, _ = mined
    for step in ("seeds", "mined"):
        regions = read_regions(out / "superpixels" / "train_0003.png")
        labels = read_label_png(out / "iteration_1" / step / "train_0003.png")
        assert all(len(labels[regions == r].unique()) == 1 for r in range(int(regions.max()) + 1))


def test_finished_steps_are_skipped_and_one_more_iteration_begins_where_the_last_ended(data, cams, mined, monkeypatch):
    out, _ = mined
    before = {name: (out / name).stat().st_mtime_ns for name in files(out / "iteration_1") if (out / name).exists()}
    calls = []
    original = mcof_module._train_regions

    def counted(*args):
        calls.append(args[5])
        return original(*args)

    monkeypatch.setattr(mcof_module, "_train_regions", counted)
    weights = run(data, cams, out, 2)
    assert weights == out / "iteration_2" / "pixelnet" / "weights.safetensors"
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    second = files(out / "iteration_2" / "seeds")
    assert {f"train_{i:04d}.png" for i in range(12)} <= second
    labels = read_label_png(out / "iteration_2" / "seeds" / "train_0003.png")
    mask = read_label_png(out / "iteration_1" / "masks" / "train_0003.png")
    assert (labels[labels != 255] == mask[labels != 255]).float().mean() >= 0.8


def test_stopped_in_the_middle_it_ends_in_the_same_labels(data, cams, mined, tmp_path, monkeypatch):
    original = mcof_module.train_segmenter

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mcof_module, "train_segmenter", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, cams, tmp_path, 1)
    monkeypatch.setattr(mcof_module, "train_segmenter", original)
    run(data, cams, tmp_path, 1)
    for step in ("refined", "masks"):
        for i in range(12):
            name = f"iteration_1/{step}/train_{i:04d}.png"
            assert torch.equal(read_label_png(tmp_path / name), read_label_png(mined[0] / name))


def test_other_settings_are_refused(data, cams, mined):
    out, _ = mined
    with pytest.raises(FastcamError, match="another configuration"):
        run(data, cams, out, 1, mining=dataclasses.replace(MINING, regions=20))
    with pytest.raises(FastcamError, match="iterations is 0, expected at least 1"):
        run(data, cams, out, 0)
    with pytest.raises(FastcamError, match=r"mining.low is 0.9, expected at most high"):
        run(data, cams, out, 1, mining=Mining(low=0.9))
    with pytest.raises(FastcamError, match="expected mcof; leave the name out"):
        run(data, cams, out.parent / "other", 1, method={"name": "cam", "backbone": "resnet10t"})


def test_first_network_may_see_images_of_one_class_only(data, cams, tmp_path):
    run(data, cams, tmp_path, 1, mining=dataclasses.replace(MINING, first_single_class=True))
    ids = (tmp_path / "iteration_1" / "single_class.txt").read_text().split()
    counts = dict(zip(open_data(data).ids, open_data(data).tags.sum(1).tolist(), strict=True))
    assert ids == [i for i, n in counts.items() if n == 1]


def test_regions_survive_the_file_and_the_transform(data, root, mined, tmp_path):
    numbers = torch.arange(48 * 48).view(48, 48)
    write_regions(tmp_path / "a.png", numbers)
    assert torch.equal(read_regions(tmp_path / "a.png"), numbers)
    with pytest.raises(FastcamError, match=r"regions .*b.png do not load"):
        read_regions(tmp_path / "b.png")
    out, _ = mined
    images = open_data(data)

    def pad(item):
        from fastcam.data import train_transform

        return train_transform(64, resize_long=(48, 48), flip=False)(item)

    item = Regions(images, out / "superpixels", out / "iteration_1" / "seeds", pad)[3]
    inside = item["regions"] >= 0
    assert int(inside.sum()) == 48 * 48
    regions = read_regions(out / "superpixels" / "train_0003.png")
    assert torch.equal(item["regions"][inside], regions.flatten())
    labels = read_label_png(out / "iteration_1" / "seeds" / "train_0003.png")
    assert torch.equal(item["mask"][inside], labels.flatten().long())
    assert (item["mask"][~inside] == 255).all()


@pytest.mark.parametrize("kind", ["merge", "slic"])
def test_regions_are_counted_from_0_and_about_as_many_as_asked_for(kind):
    y, x = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    image = torch.stack([5 * x, 6 * y, 2 * x + 3 * y]).to(torch.uint8)
    regions = make_regions(image, Mining(regions=20, kind=kind))
    assert regions.unique().tolist() == list(range(int(regions.max()) + 1))
    assert 10 <= int(regions.max()) + 1 <= 25
    assert torch.equal(regions, make_regions(image, Mining(regions=20, kind=kind)))
    flat = make_regions(torch.zeros(3, 10, 10, dtype=torch.uint8), Mining(regions=1, kind=kind))
    assert flat.max() == 0


class TestRefinedLabel:
    @pytest.fixture
    def scene(self):
        """A red square on green, half of it mined."""
        image = torch.zeros(3, 24, 24, dtype=torch.uint8)
        image[1] = 160
        image[:, 6:18, 6:18] = torch.tensor([220, 20, 20], dtype=torch.uint8)[:, None, None]
        mined = torch.zeros(24, 24, dtype=torch.int64)
        mined[6:18, 6:12] = 3
        saliency = torch.full((24, 24), 0.2)
        saliency[5:19, 5:19] = 0.6
        return image, mined, saliency

    def test_saliency_and_colour_complete_an_object_in_an_image_of_one_class(self, scene):
        image, mined, saliency = scene
        made = refined_label(image, mined, torch.ones(24, 24), torch.tensor([0.0, 0, 1]), saliency, MINING, CRF)
        assert (made[7:17, 7:17] == 3).all()
        assert (made[:4] == 0).all()

    def test_an_image_of_two_classes_leaves_saliency_out_and_ignores_what_is_not_sure(self, scene):
        image, mined, saliency = scene
        sure = torch.ones(24, 24)
        sure[:, 18:] = 0.4
        tags = torch.tensor([1.0, 0, 1])
        made = refined_label(image, mined, sure, tags, saliency, MINING, CRF)
        assert torch.equal(made, refined_label(image, mined, sure, tags, None, MINING, CRF))
        assert (made[:, 18:] == 255).all()

    def test_without_mined_pixels_saliency_decides_alone_and_without_tags_nothing_is_there(self, scene):
        image, mined, saliency = scene
        nothing = torch.zeros_like(mined)
        made = refined_label(image, nothing, torch.ones(24, 24), torch.tensor([0.0, 1, 0]), saliency, MINING, CRF)
        assert (made[8:16, 8:16] == 2).all()
        assert refined_label(image, nothing, torch.ones(24, 24), torch.zeros(3), saliency, MINING, CRF).max() == 0

    def test_where_nearly_all_was_mined_saliency_is_left_out(self, scene):
        image, _, saliency = scene
        made = refined_label(
            image, torch.ones(24, 24).long(), torch.ones(24, 24), torch.tensor([1.0, 0]), saliency, MINING, CRF
        )
        assert (made == 1).all()


def test_saliency_comes_from_the_folder_where_there_is_one(tmp_path):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, 2:6, 2:6] = 255
    regions = (image[0] > 0).long()
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "a.png")
    torch.testing.assert_close(image_saliency(tmp_path, "a", image, regions), torch.full((8, 8), 0.2))
    assert torch.equal(image_saliency(tmp_path, "b", image, regions), regions.float())
    assert torch.equal(image_saliency(None, "a", image, regions), regions.float())
    with pytest.raises(FastcamError, match="is 8 x 8 pixels, but its image is 5 x 5"):
        image_saliency(tmp_path, "a", image[:, :5, :5], regions[:5, :5])
