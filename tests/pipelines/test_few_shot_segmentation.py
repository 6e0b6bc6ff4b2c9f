"""Training on episodes and the few-shot pass, on procedural images."""

import dataclasses
import json
import shutil

import pytest
import torch
from pipelines.tiny import CLASSES, TRAINER, files

from fastcam.data import write_procedural
from fastcam.data.few_shot import read_episodes, write_episodes
from fastcam.errors import FastcamError
from fastcam.io import read_label_png
from fastcam.metrics import episode_counts
from fastcam.pipelines import _few_shot_segmentation as segmentation
from fastcam.pipelines._data import Data, open_data
from fastcam.pipelines._few_shot_segmentation import enlarge, fit_square
from fastcam.pipelines.few_shot import few_shot, table
from fastcam.pipelines.train import train

METHOD = {
    "name": "dsmf_net", "backbone": "test_resnet", "channels": 8, "graph_nodes": 4, "scales": [1.0, 0.5],
    "protocol": "own", "base": ["elephant", "fox"], "novel": ["lion", "sheep"], "min_pixels": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Data:
    """24 images with masks, no tags."""
    folder = tmp_path_factory.mktemp("voc")
    write_procedural(folder, train=24, val=4, size=48)
    return Data(root=str(folder))


@pytest.fixture(scope="module")
def weights(pictures, tmp_path_factory):
    return train(pictures, METHOD, dataclasses.replace(TRAINER, epochs=1), tmp_path_factory.mktemp("train"))


def run(data, weights, out, **more):
    return few_shot(data, weights, out, **{"episodes": 6, "size": 40, "workers": 0, **more})


def test_training_sees_every_pair_of_an_image_and_a_base_class(pictures, weights):
    images = open_data(pictures, masks=True, need_tags=False)
    labels = [CLASSES.index(name) + 1 for name in METHOD["base"]]
    pairs = sum(int((images[i]["mask"] == k).sum()) >= 20 for i in range(len(images)) for k in labels)
    steps = (weights.parent / "metrics.csv").read_text().splitlines()[1:]
    assert len(steps) == pairs // TRAINER.batch_size


def test_scores_are_those_of_the_written_masks(pictures, weights, tmp_path):
    scores = run(pictures, weights, tmp_path, predictions=True)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    images = open_data(pictures, masks=True, need_tags=False)
    sums = {name: torch.zeros(2, 2) for name in METHOD["novel"]}
    for i, episode in enumerate(read_episodes(tmp_path / "list.json")):
        mask = images.by_id(episode.query)["mask"].as_subclass(torch.Tensor)
        target = (mask == CLASSES.index(episode.label) + 1).byte()
        target[mask == 255] = 255
        sums[episode.label] += episode_counts(read_label_png(tmp_path / f"{i:05d}.png"), target)
    iou = {name: float(s[1, 0] / s[1, 1]) for name, s in sums.items() if s.any()}
    assert {k: v for k, v in scores["iou"].items() if v is not None} == pytest.approx(iou)
    assert scores["mean_iou"] == pytest.approx(sum(iou.values()) / len(iou))
    total = sum(sums.values())
    assert scores["fb_iou"] == pytest.approx(float((total[:, 0] / total[:, 1]).mean()))
    low, high = scores["intervals"]["fb_iou"]
    assert low <= scores["fb_iou"] <= high
    text = table(scores)
    assert all(word in text for word in ("lion", "FB-IoU", "1 shots, 6 episodes, network"))


def test_a_stopped_run_goes_on_and_ends_in_the_same_scores(pictures, weights, tmp_path, monkeypatch):
    whole = run(pictures, weights, tmp_path / "whole")
    calls = []

    def stop(pred, target):
        calls.append(0)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return episode_counts(pred, target)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "episode_counts", stop)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, weights, tmp_path / "stopped")
    done = [name for name in files(tmp_path / "stopped") if name.endswith(".episode.json")]
    assert len(done) == 3
    assert "scores.json" not in files(tmp_path / "stopped")
    assert run(pictures, weights, tmp_path / "stopped") == whole
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_all_predictors_see_the_same_episodes_and_are_compared_pair_by_pair(pictures, weights, tmp_path):
    network = run(pictures, weights, tmp_path / "network", shots=2)
    for name in ("prototype", "prior"):
        other = run(pictures, weights, tmp_path / name, shots=2, predictor=name, against=tmp_path / "network")
        assert (tmp_path / name / "list.json").read_text() == (tmp_path / "network" / "list.json").read_text()
        difference, low, high = other["difference"]["mean_iou"]
        assert difference == pytest.approx(other["mean_iou"] - network["mean_iou"])
        assert low <= high
        assert "more than the other run" in table(other)
    with pytest.raises(FastcamError, match="is of another episode; give runs on one episode list"):
        run(pictures, weights, tmp_path / "one", against=tmp_path / "network")


def test_a_given_list_is_used_as_it_is(pictures, weights, tmp_path):
    run(pictures, weights, tmp_path / "first", seed=3)
    first = read_episodes(tmp_path / "first" / "list.json")
    write_episodes(tmp_path / "mine.json", first[:2])
    scores = run(pictures, weights, tmp_path / "second", episode_list=tmp_path / "mine.json")
    assert scores["episodes"] == 2
    assert read_episodes(tmp_path / "second" / "list.json") == first[:2]
    for i in range(2):
        a, b = ((tmp_path / part / f"{i:05d}.episode.json").read_text() for part in ("first", "second"))
        assert a == b


def test_bad_input_is_refused_in_one_line(pictures, weights, trained, tmp_path):
    with pytest.raises(FastcamError, match="are of a cam, expected a few-shot method"):
        run(pictures, trained, tmp_path / "a")
    with pytest.raises(FastcamError, match="ways is 5, but method dsmf_net segments one image for one class; use 1"):
        run(pictures, weights, tmp_path / "a", ways=5)
    with pytest.raises(FastcamError, match=r"class '(lion|sheep)' has \d+ images .* for 30 shots and a query"):
        run(pictures, weights, tmp_path / "a", shots=30)
    with pytest.raises(FastcamError, match="class 'dragon' is not a class of the data; known are fox"):
        run(pictures, weights, tmp_path / "a", classes=["dragon"])
    assert not (tmp_path / "a").exists()
    (tmp_path / "list.json").write_text('[["lion", "train_0000", "nowhere"]]')
    with pytest.raises(FastcamError, match=r"the episode list names image '.*', which the data lack"):
        run(pictures, weights, tmp_path / "b", episode_list=tmp_path / "list.json")
    with pytest.raises(FastcamError, match="the episode list asks for class 'lion', but tested are sheep"):
        run(pictures, weights, tmp_path / "c", episode_list=tmp_path / "list.json", classes=["sheep"])


def test_a_support_without_the_class_is_refused_by_name(pictures, weights, tmp_path):
    images = open_data(pictures, masks=True, need_tags=False)
    has = [bool((images[i]["mask"] == CLASSES.index("lion") + 1).any()) for i in range(len(images))]
    query, support = images.ids[has.index(True)], images.ids[has.index(False)]
    (tmp_path / "list.json").write_text(json.dumps([["lion", query, support]]))
    with pytest.raises(FastcamError, match=f"support image {support} of an episode of 'lion' has no pixel of it"):
        run(pictures, weights, tmp_path / "out", episode_list=tmp_path / "list.json")


def test_base_classes_with_too_few_images_and_wrong_names_are_refused_before_training(pictures, tmp_path):
    with pytest.raises(FastcamError, match=r"class '(fox|elephant)' has \d+ images"):
        train(pictures, {**METHOD, "shots": 24}, TRAINER, tmp_path)
    with pytest.raises(
        FastcamError, match="base class 'ground_track_field' of protocol isaid_5i_sdm is not a class of the data"
    ):
        train(pictures, {"name": "dsmf_net", "backbone": "test_resnet", "protocol": "isaid_5i_sdm"}, TRAINER, tmp_path)


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (40, 40)])
def test_images_are_filled_up_and_scores_cut_out_again(size):
    image = torch.full((3, *size), 128, dtype=torch.uint8)
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[:, size[1] // 2 :] = 1
    view, labels = fit_square(image, mask, 20, ((0.5,) * 3, (0.5,) * 3))
    assert view.shape == (3, 20, 20)
    h, w = (round(20 * side / max(size)) for side in size)
    assert (labels[:h, :w] != 255).all()
    assert (labels != 255).sum() == h * w
    assert not view[:, h:].any()
    assert not view[:, :, w:].any()
    scores = torch.stack([0.5 - (labels == 1).float(), (labels == 1).float() - 0.5])[None]
    found = enlarge(scores, size)
    assert found.shape == size
    assert (found == mask).float().mean() > 0.9


def test_the_data_of_the_training_is_needed(weights, pictures, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(pictures.root, root)
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(FastcamError, match=r"mask folder .* does not exist"):
        run(Data(root=str(root)), weights, tmp_path / "out")
