"""Both stages through the command line's functions on a small archive, and scores on fixed episodes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines.tiny import TRAINER

from fastcam.data import fixed_episodes
from fastcam.errors import FastcamError
from fastcam.methods import load_method
from fastcam.pipelines._data import Data, open_data
from fastcam.pipelines._few_shot_classification import embed_images, episode_accuracies, few_shot_accuracy
from fastcam.pipelines.few_shot import few_shot, table
from fastcam.pipelines.train import train

ENCODER = {"size": 32, "width": 2, "rkhs": 16, "depth": 1}
AMDIM = {"name": "amdim", **ENCODER, "warmup": 0}
EPISODES = {"name": "ssl_few_shot", **ENCODER, "way": 3, "queries": 2, "episodes": 4}
SMALL = dataclasses.replace(TRAINER, crop=32, flip=False)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """8 classes of noisy squares of one grey value, 6 images each: 5 to train on, 3 to test."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 6)
    images = (labels * 30 + 20)[:, None, None] + generator.integers(-9, 10, (48, 36, 36))
    path = tmp_path_factory.mktemp("archive") / "squares.npz"
    split = np.array(["train"] * 5 + ["test"] * 3)
    np.savez(path, images=images.astype(np.uint8), label=labels, classes=np.array(list("abcdefgh")), split=split)
    return Data(images=str(path))


@pytest.fixture(scope="module")
def stages(archive, tmp_path_factory):
    """Weights of the pre-training and of the episodes that start from it."""
    out = tmp_path_factory.mktemp("stages")
    first = train(archive, AMDIM, SMALL, out / "amdim")
    second = train(
        archive, {**EPISODES, "weights": str(first)}, dataclasses.replace(SMALL, batch_size=2), out / "episodes"
    )
    return first, second


def test_both_stages_train_one_after_the_other(stages):
    first, second = (load_method(path) for path in stages)
    assert (first.name, first.kind, second.name, second.kind) == (
        "amdim",
        "pretraining",
        "ssl_few_shot",
        "few-shot",
    )
    ours, theirs = (m.encoder.layers[0].weight for m in (first, second))
    assert not torch.equal(ours, theirs) and (ours - theirs).abs().max() < 1e-2  # it went on from there


def test_pass_writes_scores_and_the_list_of_episodes(archive, stages, tmp_path):
    test = dataclasses.replace(archive, split="test")
    numbers = {"shots": 1, "ways": 3, "queries": 4, "episodes": 20, "workers": 0}
    scores = few_shot(test, stages[1], tmp_path / "a", **numbers)
    assert scores == json.loads((tmp_path / "a" / "scores.json").read_text())
    network, dataset = load_method(stages[1]), open_data(test)
    expected = few_shot_accuracy(network, dataset, way=3, shot=1, queries=4, episodes=20)
    assert {key: scores[key] for key in expected} == expected
    text = table(scores)
    assert f"{100 * scores['accuracy']:5.1f} +- {100 * scores['interval']:.2f} %" in text
    assert "3 ways, 1 shots, 4 queries, 20 episodes" in text
    again = few_shot(test, stages[1], tmp_path / "a", **numbers)
    assert again == scores
    # the other stage on the same episodes, by their list
    other = few_shot(
        test, stages[0], tmp_path / "b", episode_list=tmp_path / "a" / "list.json", against=tmp_path / "a", workers=0
    )
    assert other["episodes"] == 20
    assert other["difference"] == pytest.approx(other["accuracy"] - scores["accuracy"])
    assert "above the other run on the same episodes" in table(other)


def test_pass_refuses_what_does_not_fit(archive, stages, tmp_path):
    test = dataclasses.replace(archive, split="test")
    with pytest.raises(FastcamError, match="episodes take 5 classes, but there are 3"):
        few_shot(test, stages[1], tmp_path / "a", queries=2)
    with pytest.raises(FastcamError, match="class f has 6 images, but an episode takes 16"):
        few_shot(test, stages[1], tmp_path / "a", ways=3)
    with pytest.raises(FastcamError, match="predictor and predictions are of methods that segment"):
        few_shot(test, stages[1], tmp_path / "a", ways=3, queries=2, predictor="prior")
    with pytest.raises(FastcamError, match="shots is 0"):
        few_shot(test, stages[1], tmp_path / "a", shots=0)
    assert not (tmp_path / "a").exists()
    few_shot(test, stages[1], tmp_path / "a", ways=3, queries=2, episodes=2)
    few_shot(test, stages[1], tmp_path / "b", ways=3, queries=2, episodes=2, seed=1)
    with pytest.raises(FastcamError, match="is of other episodes"):
        few_shot(test, stages[1], tmp_path / "b", ways=3, queries=2, episodes=2, seed=1, against=tmp_path / "a")


def test_training_refuses_too_few_images_and_classes(archive, tmp_path):
    with pytest.raises(FastcamError, match="class a has 6 images, but an episode takes 8"):
        train(archive, {**EPISODES, "queries": 7}, SMALL, tmp_path)
    with pytest.raises(FastcamError, match="episodes take 6 classes, but there are 5"):
        train(archive, {**EPISODES, "way": 6}, SMALL, tmp_path)
    with pytest.raises(FastcamError, match=r"ssl_few_shot: trainer.crop is 48, but the encoder sees 32"):
        train(archive, EPISODES, TRAINER, tmp_path)


def test_plain_folder_of_images_pre_trains_without_tags(data, tmp_path):
    folder = Data(images=f"{data.root}/JPEGImages")
    weights = train(folder, AMDIM, dataclasses.replace(SMALL, epochs=1), tmp_path)
    assert load_method(weights).features(torch.zeros(1, 3, 32, 32))[-1].shape == (1, 16, 1, 1)


def test_embeddings_are_the_method_s_image_by_image(archive, stages):
    network, dataset = load_method(stages[1]), open_data(dataclasses.replace(archive, split="test"))
    embeddings = embed_images(network, dataset, workers=0)
    item = network.test_transform()(dataset[7])
    with torch.no_grad():
        torch.testing.assert_close(embeddings[7], network.embed(item["image"][None])[0])


def test_accuracy_of_episodes_worked_by_hand():
    embeddings = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [4.0]])
    episodes = torch.tensor([[[0, 3], [1, 4], [2, 5]], [[3, 0], [1, 4], [2, 5]]])
    # prototypes 0 and 10: of 1, 11, 2 and 4 only 4 goes wrong; exchanged, only 4 goes right
    assert episode_accuracies(embeddings, episodes, 1).tolist() == [0.75, 0.25]
    # prototypes 0.5 and 10.5; then 5.5 twice, where the first counts
    assert episode_accuracies(embeddings, episodes, 2).tolist() == [0.5, 0.5]


def test_random_embeddings_are_right_by_chance():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(400, 8, generator=generator)
    members = list(torch.arange(400).split(20))
    accuracies = episode_accuracies(embeddings, fixed_episodes(members, 5, 16, 2000, seed=0), 1)
    assert abs(accuracies.mean().item() - 0.2) < 0.01


def test_list_of_images_with_classes_is_opened_by_the_split(data, tmp_path):
    names = sorted(path.name for path in Path(data.root, "JPEGImages").iterdir())[:3]
    (tmp_path / "train.csv").write_text(
        "filename,label\n" + "".join(f"{name},c{i % 2}\n" for i, name in enumerate(names))
    )
    listed = Data(images=f"{data.root}/JPEGImages", split=str(tmp_path / "train.csv"))
    dataset = open_data(listed)
    assert dataset.classes == ("c0", "c1") and dataset.tags.argmax(1).tolist() == [0, 1, 0]
    assert dataset.ids == [Path(name).stem for name in names]
    assert open_data(dataclasses.replace(listed, classes=["c1"])).ids == [Path(names[1]).stem]
    with pytest.raises(FastcamError, match=r"masks are needed, and .* has none; give data.root"):
        open_data(listed, masks=True)
