"""The regions pass, and refine by regions."""

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny import CLASSES, files

from fastcam.data import VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import (
    load_cams,
    load_tree,
    read_label_png,
    read_pass,
    read_region_png,
    write_label_png,
)
from fastcam.methods.region_growing import Config, grow_regions, region_scores, vote_labels
from fastcam.metrics.regions import boundaries
from fastcam.pipelines import refine as refine_module
from fastcam.pipelines import regions as regions_module
from fastcam.pipelines._data import Data
from fastcam.pipelines.cli import main
from fastcam.pipelines.refine import Regions, refine
from fastcam.pipelines.regions import LINE, draw_boundaries, regions

GROWING = Config(superpixels=30)
IDS = [f"train_{i:04d}" for i in range(12)]
STAGES = ("level_1.2", "level_0.9", "count_5")


def image_of(root, index):
    return VOCDataset(root, "train", classes=CLASSES)[index]["image"].as_subclass(torch.Tensor)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("regions")
    regions(data, out, levels=(1.2, 0.9), counts=(5,), growing=GROWING)
    return out


class TestRegions:
    def test_leaves_trees_label_maps_and_drawings(self, folder):
        expected = {f"{kind}/{stage}/{i}.png" for kind in ("labels", "boundaries") for stage in STAGES for i in IDS}
        assert files(folder) == expected | {f"{i}.npz" for i in IDS} | {"pass.json", "times.json"}

    def test_label_maps_are_the_cuts_of_the_tree_of_the_system(self, folder, root):
        tree = grow_regions(image_of(root, 3)[None], GROWING)[0]
        for stage, cut in (("level_1.2", tree.cut(1.2)), ("level_0.9", tree.cut(0.9)), ("count_5", tree.cut(count=5))):
            stored = read_region_png(folder / "labels" / stage / "train_0003.png")
            assert torch.equal(stored.long(), cut)
        assert torch.equal(load_tree(folder / "train_0003.npz").merges, tree.merges)

    def test_drawing_is_the_image_but_for_its_boundaries(self, folder, root):
        image = image_of(root, 3)
        drawn = torch.from_numpy(np.array(Image.open(folder / "boundaries" / "count_5" / "train_0003.png")))
        line = boundaries(read_region_png(folder / "labels" / "count_5" / "train_0003.png"))
        assert line.any() and not line.all()
        assert torch.equal(drawn.permute(2, 0, 1)[:, ~line], image[:, ~line])
        assert drawn[line].unique(dim=0).tolist() == [list(LINE)]

    def test_boundaries_by_hand(self):
        drawn = draw_boundaries(
            torch.zeros(3, 2, 3, dtype=torch.uint8), torch.tensor([[0, 0, 1], [0, 0, 1]]), (9, 8, 7)
        )
        assert drawn.tolist() == [[[0, v, 0], [0, v, 0]] for v in (9, 8, 7)]

    def test_trees_are_cut_again_without_growing(self, folder, data, tmp_path, monkeypatch):
        monkeypatch.setattr(regions_module, "grow_regions", None)
        result = regions(data, tmp_path, levels=(), counts=(3,), trees=folder, draw=False)
        assert (result.images, result.written) == (12, 12)
        assert not (tmp_path / "boundaries").exists()
        tree = load_tree(folder / "train_0007.npz")
        stored = read_region_png(tmp_path / "labels" / "count_3" / "train_0007.png")
        assert torch.equal(stored.long(), tree.cut(count=3))

    def test_finished_images_are_skipped_and_missing_ones_made_again(self, data, folder, monkeypatch):
        before = (folder / "train_0002.npz").read_bytes()
        (folder / "train_0002.npz").unlink()
        result = regions(data, folder, levels=(1.2, 0.9), counts=(5,), growing=GROWING)
        assert (result.images, result.written) == (12, 1)
        assert (folder / "train_0002.npz").read_bytes() == before

    def test_other_settings_are_refused_with_the_change(self, folder, data):
        with pytest.raises(FastcamError, match=r"another configuration \(growing.superpixels: 30 -> 31\)"):
            regions(data, folder, levels=(1.2, 0.9), counts=(5,), growing=Config(superpixels=31))

    def test_killed_in_the_middle_it_goes_on(self, data, tmp_path, monkeypatch):
        calls = []

        def dies(images, config):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return grow_regions(images, config)

        monkeypatch.setattr(regions_module, "grow_regions", dies)
        with pytest.raises(KeyboardInterrupt):
            regions(data, tmp_path, growing=GROWING, workers=0)
        assert len(list(tmp_path.glob("*.npz"))) == 3
        monkeypatch.undo()
        assert regions(data, tmp_path, growing=GROWING).written == 9

    def test_count_beyond_what_an_image_has_gives_its_superpixels(self, tmp_path):
        Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "flat.png")
        regions(Data(images=str(tmp_path)), tmp_path / "out", levels=(), counts=(1, 100_000))
        tree = load_tree(tmp_path / "out" / "flat.npz")
        largest = read_region_png(tmp_path / "out" / "labels" / "count_100000" / "flat.png")
        assert torch.equal(largest, tree.labels)
        assert read_region_png(tmp_path / "out" / "labels" / "count_1" / "flat.png").unique().tolist() == [0]

    def test_command_works_on_a_plain_folder(self, tmp_path, root, capsys):
        (tmp_path / "images" / "sub").mkdir(parents=True)
        Image.fromarray(image_of(root, 0).permute(1, 2, 0).numpy()).save(tmp_path / "images" / "sub" / "a.png")
        argv = ["regions", "--data.images", tmp_path / "images", "--out", tmp_path / "out", "--growing.superpixels", 20]
        assert main([str(word) for word in argv]) == 0
        assert "1 of 1 images written" in capsys.readouterr().out
        assert (tmp_path / "out" / "labels" / "level_0.9" / "sub" / "a.png").is_file()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"levels": ()}, "levels and counts are empty"),
            ({"growing": Config(stop=1.0)}, r"levels are \[1.3, 1.1, 0.9\], but merging stops at 1.0"),
            ({"counts": (0,)}, r"counts are \[0\]"),
            ({"growing": Config(superpixels=0)}, "growing.superpixels is 0"),
            ({"trees": "none"}, "input folder none does not exist; run regions first"),
            ({"trees": "none", "growing": GROWING}, "growing is for trees that are yet to grow"),
        ],
    )
    def test_bad_settings_are_refused_before_anything_is_written(self, settings, message, data, tmp_path):
        from pathlib import Path

        settings = {key: Path(value) if key == "trees" else value for key, value in settings.items()}
        with pytest.raises(FastcamError, match=message):
            regions(data, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()

    def test_level_below_the_end_of_given_trees_is_refused(self, data, tmp_path):
        regions(data, tmp_path / "a", growing=Config(superpixels=30, stop=0.9))
        with pytest.raises(FastcamError, match=r"levels are \[0.5\], but merging stops at 0.9"):
            regions(data, tmp_path / "b", levels=(0.5,), trees=tmp_path / "a")


class TestRefine:
    regions = Regions(levels=(1.3, 1.0), growing=GROWING)

    def test_cams_are_averaged_over_regions_with_their_background(self, data, cams, root, tmp_path):
        refine(data, cams, tmp_path, how="regions", background=0.3, regions=self.regions)
        camset = load_cams(cams / "train_0006.npz")
        tree = grow_regions(image_of(root, 6)[None], GROWING)[0]
        expected = region_scores(camset.scores(0.3), [tree.cut(1.3), tree.cut(1.0)])
        stored = load_cams(tmp_path / "train_0006.npz")
        torch.testing.assert_close(stored.maps, expected[1:], rtol=1e-3, atol=1e-3)  # stored as float16
        torch.testing.assert_close(stored.background, expected[0], rtol=1e-3, atol=1e-3)
        assert read_pass(tmp_path)["config"]["regions"]["levels"] == [1.3, 1.0]
        assert read_pass(tmp_path)["config"]["classes"] == CLASSES

    def test_label_maps_of_a_network_are_voted_on(self, data, root, tmp_path):
        g = torch.Generator().manual_seed(0)
        labels = {i: torch.randint(0, 4, (48, 48), generator=g) for i in IDS}
        for i, label in labels.items():
            write_label_png(tmp_path / "in" / f"{i}.png", label)
        result = refine(data, tmp_path / "in", tmp_path / "out", how="regions", regions=self.regions)
        assert result.written == 12
        tree = grow_regions(image_of(root, 4)[None], GROWING)[0]
        expected = vote_labels(labels["train_0004"], [tree.cut(1.3), tree.cut(1.0)])
        assert torch.equal(read_label_png(tmp_path / "out" / "train_0004.png"), expected)
        assert refine(data, tmp_path / "in", tmp_path / "out", how="regions", regions=self.regions).written == 0

    def test_what_is_for_labels_or_for_cams_alone_is_refused_with_the_other(self, data, cams, tmp_path):
        with pytest.raises(FastcamError, match=r"regions\.margin is for label PNGs"):
            refine(data, cams, tmp_path / "out", how="regions", background=0.3, regions=Regions(margin=0.1))
        write_label_png(tmp_path / "in" / "train_0000.png", torch.zeros(48, 48, dtype=torch.uint8))
        with pytest.raises(FastcamError, match="background and power are for CAMs"):
            refine(data, tmp_path / "in", tmp_path / "out", how="regions", power=4)
        assert not (tmp_path / "out").exists()

    def test_cams_without_background_need_one(self, data, cams, tmp_path):
        with pytest.raises(FastcamError, match="have no background of their own"):
            refine(data, cams, tmp_path / "out", how="regions", regions=self.regions)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (Regions(margin=2), "regions.margin is 2, expected a share from 0 to 1"),
            (Regions(levels=()), "levels and counts are empty"),
            (Regions(growing=Config(factor=0.5)), "growing.factor is 0.5"),
        ],
    )
    def test_value_out_of_range_is_named(self, bad, message, data, cams, tmp_path, monkeypatch):
        monkeypatch.setattr(refine_module, "open_pass", None)
        with pytest.raises(FastcamError, match=message):
            refine(data, cams, tmp_path, how="regions", background=0.3, regions=bad)
