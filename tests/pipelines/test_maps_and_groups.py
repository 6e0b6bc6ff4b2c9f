"""Training on maps and on groups of images, and labels by saliency maps."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.test_train import Killed, assert_same_weights, kill_in_step
from pipelines.tiny import CLASSES, METHOD, TRAINER, files

from fastcam.data import GroupSampler, VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, load_weights, read_label_png, read_pass, save_cams
from fastcam.methods import drs, group_wsss
from fastcam.pipelines._data import open_data, training_transform
from fastcam.pipelines._fit import Batches
from fastcam.pipelines.evaluate import evaluate
from fastcam.pipelines.label import Saliency, label
from fastcam.pipelines.make_cam import make_cam
from fastcam.pipelines.train import Mapped, train

REFINE = {"name": "drs_refine", "backbone": "resnet10t", "output_stride": 16, "head_layers": 0}
GROUP = {"name": "group_wsss", "backbone": "resnet10t", "output_stride": 16, "head_layers": 0, "group_size": 2}
WHOLE = dataclasses.replace(TRAINER, square=True, flip=False, resize_long=(48, 48))


class TestMaps:
    def test_second_stage_learns_from_cams_and_makes_cams(self, data, cams, tmp_path):
        config = dataclasses.replace(TRAINER, epochs=1, square=True, color_jitter=(0.3, 0.3, 0.3, 0.1))
        weights = train(data, REFINE, config, tmp_path / "train", cams=cams)
        assert load_weights(weights)[1]["method"] == "drs_refine"
        make_cam(data, weights, tmp_path / "cams", scales=(1.0,))
        assert 0 <= evaluate(data, tmp_path / "cams")["mean_iou"]["skip"] <= 1
        with pytest.raises(FastcamError, match="another configuration"):
            train(data, REFINE, dataclasses.replace(config, square=False), tmp_path / "train", cams=cams)

    def test_items_have_the_maps_of_their_image_at_its_classes(self, data, cams):
        images = open_data(data)
        flipped = dataclasses.replace(TRAINER, crop=48, resize_long=(48, 48), flip=False)
        items = Mapped(images, cams, training_transform(flipped, ((0, 0, 0), (1, 1, 1))))
        item, stored = items[3], load_cams(cams / f"{images.ids[3]}.npz")
        assert item["maps"].shape == (len(CLASSES), 48, 48)
        torch.testing.assert_close(item["maps"][stored.keys], stored.scores(0.0)[1:])
        absent = [k for k in range(len(CLASSES)) if k not in stored.keys.tolist()]
        assert item["maps"][absent].count_nonzero() == 0

    def test_image_without_classes_gives_zero_maps(self, data, cams, tmp_path):
        images = open_data(data)
        save_cams(
            tmp_path / f"{images.ids[0]}.npz", CamSet(torch.zeros(0).long(), torch.zeros(0, 12, 12), None, (48, 48))
        )
        item = Mapped(images, tmp_path, training_transform(TRAINER, ((0, 0, 0), (1, 1, 1))))[0]
        assert item["maps"].shape == (len(CLASSES), 48, 48)
        assert item["maps"].count_nonzero() == 0

    def test_methods_that_do_not_fit_the_input_are_refused(self, data, cams, tmp_path):
        with pytest.raises(FastcamError, match="method cam learns from tags alone; leave cams out"):
            train(data, METHOD, TRAINER, tmp_path, cams=cams)
        with pytest.raises(FastcamError, match="method drs_refine learns from maps; give cams"):
            train(data, REFINE, TRAINER, tmp_path)

    def test_missing_cams_and_cams_of_another_size_are_named(self, data, cams, tmp_path):
        (tmp_path / "none").mkdir()
        with pytest.raises(FastcamError, match=r"none has no CAMs for 12 of 12 images, e\.g\. train_0000; finish"):
            train(data, REFINE, TRAINER, tmp_path / "out", cams=tmp_path / "none")
        images = open_data(data)
        save_cams(tmp_path / "train_0000.npz", CamSet(torch.tensor([1]), torch.zeros(1, 3, 3), None, (40, 48)))
        with pytest.raises(
            FastcamError, match="CAMs of train_0000 are of an image of 48 x 40 pixels, but it is 48 x 48"
        ):
            Mapped(images, tmp_path, lambda item: item)[0]


class TestGroups:
    def test_batches_hold_groups_and_processes_share_them_whole(self):
        sampler = GroupSampler(torch.eye(3).repeat(8, 1), 3)
        whole = list(Batches(24, 12, 2, seed=0, groups=sampler))
        assert len(whole) == 4
        assert list(Batches(24, 12, 2, seed=0, start=3, groups=sampler)) == whole[3:]
        shares = [list(Batches(24, 12, 2, seed=0, rank=rank, world=2, groups=sampler)) for rank in range(2)]
        for batch, first, second in zip(whole, *shares, strict=True):
            assert first + second == batch
            assert len(first) == 6
            for i in range(0, 12, 3):
                assert len({index % 3 for _, index in batch[i : i + 3]}) == 1  # one class a group
                assert len({index for _, index in batch[i : i + 3]}) == 3

    def test_training_keeps_a_map_of_every_tag_of_every_image(self, root, data, tmp_path):
        method = {**GROUP, "accumulate_from": 0.0, "accumulate_last": 0.0}
        weights = train(data, method, WHOLE, tmp_path)
        assert not any("extra_state" in name for name in load_weights(weights)[0])
        assert read_pass(tmp_path / "attention")["config"]["classes"] == CLASSES
        for item in VOCDataset(root, "train", classes=CLASSES, tags="image_labels.csv", masks=None):
            kept = load_cams(tmp_path / "attention" / f"{item['id']}.npz")
            assert kept.keys.tolist() == item["tags"].nonzero().flatten().tolist()
            assert kept.size == (48, 48)
            assert kept.maps.max() <= 1
        assert evaluate(data, tmp_path / "attention")["images"] == 12

    def test_killed_and_run_again_ends_in_the_same_bits_and_maps(self, data, tmp_path, monkeypatch):
        method, config = {**GROUP, "accumulate_from": 0.0}, dataclasses.replace(WHOLE, checkpoint_every=2)
        whole = train(data, method, config, tmp_path / "whole")
        with monkeypatch.context() as patch:
            kill_in_step(patch, 5)
            with pytest.raises(Killed):
                train(data, method, config, tmp_path / "killed")
        assert_same_weights(whole, train(data, method, config, tmp_path / "killed"))
        for name in files(whole.parent / "attention"):
            if name.endswith(".npz"):
                first, second = (load_cams(tmp_path / run / "attention" / name) for run in ("whole", "killed"))
                assert torch.equal(first.maps, second.maps)

    def test_image_that_never_came_by_gets_a_map_at_the_end(self, data, tmp_path):
        config = dataclasses.replace(WHOLE, epochs=1, batch_size=2, crop=48)
        train(data, {**GROUP, "accumulate_from": 1.0}, config, tmp_path)
        assert len([name for name in files(tmp_path / "attention") if name.endswith(".npz")]) == 12

    def test_crops_and_broken_groups_are_refused(self, data, tmp_path):
        with pytest.raises(FastcamError, match="method group_wsss keeps the maps of training images"):
            train(data, GROUP, TRAINER, tmp_path)
        with pytest.raises(FastcamError, match=r"trainer\.batch_size is 3, expected a multiple of 2 images a group"):
            train(data, GROUP, dataclasses.replace(WHOLE, batch_size=3), tmp_path)
        assert not files(tmp_path)


class TestSaliency:
    @pytest.fixture
    def saliency(self, cams, tmp_path):
        generator = np.random.default_rng(0)
        (tmp_path / "saliency").mkdir()
        for path in cams.glob("*.npz"):
            plane = generator.integers(0, 256, (48, 48), dtype=np.uint8)
            Image.fromarray(plane).save(tmp_path / "saliency" / f"{path.stem}.png")
        return tmp_path / "saliency"

    @pytest.mark.parametrize(("rule", "function"), [("drs", drs.pseudo_label), ("group_wsss", group_wsss.proxy_label)])
    def test_labels_are_the_rules(self, rule, function, cams, saliency, tmp_path):
        label(cams, tmp_path / "labels", saliency=Saliency(saliency, rule))
        camset = load_cams(cams / "train_0003.npz")
        plane = torch.from_numpy(np.array(Image.open(saliency / "train_0003.png"))) / 255
        expected = function(camset.scores(0.0)[1:], plane)
        written = read_label_png(tmp_path / "labels" / "train_0003.png")
        for i in range(len(camset.keys) + 1):
            value = 0 if i == 0 else int(camset.keys[i - 1]) + 1
            assert torch.equal(written == value, expected == i)
        assert torch.equal(written == 255, expected == 255)

    def test_second_rule_missing_map_and_other_size_are_refused(self, cams, saliency, tmp_path):
        with pytest.raises(FastcamError, match="saliency excludes threshold, power, high and low, min_score and crf"):
            label(cams, tmp_path / "a", threshold=0.3, saliency=Saliency(saliency))
        (saliency / "train_0000.png").unlink()
        with pytest.raises(FastcamError, match=r"saliency map .*train_0000\.png does not exist"):
            label(cams, tmp_path / "b", saliency=Saliency(saliency))
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(saliency / "train_0000.png")
        with pytest.raises(FastcamError, match=r"train_0000\.png is 48 x 40 pixels, but its image is 48 x 48"):
            label(cams, tmp_path / "b", saliency=Saliency(saliency))
