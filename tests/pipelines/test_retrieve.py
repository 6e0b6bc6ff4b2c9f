"""The retrieve pass on tiny images: what it writes, resumes and refuses."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny import files

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method
from fastcam.nn import create_backbone
from fastcam.pipelines import retrieve as module
from fastcam.pipelines._data import Data
from fastcam.pipelines.cli import main
from fastcam.pipelines.retrieve import Truth, retrieve

BACKBONE = "resnet10t"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_weights(path, create_backbone(BACKBONE, output_stride=32).net.state_dict(), {})
    return path


@pytest.fixture(scope="module")
def method(weights):
    return {"backbone": BACKBONE, "weights": str(weights), "detectors": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three objects in four views each: a texture, shifted and a little noisy; image 4 k + i is view i of object k."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k in range(3):
        texture = rng.integers(0, 256, (80, 88, 3))
        for i in range(4):
            view = texture[i : i + 64, 2 * i : 2 * i + 72] + rng.integers(-4, 5, (64, 72, 3))
            Image.fromarray(view.clip(0, 255).astype(np.uint8)).save(root / f"view{4 * k + i:05d}.png")
    return root


@pytest.fixture(scope="module")
def found(folder, method, tmp_path_factory):
    out = tmp_path_factory.mktemp("found")
    return retrieve(Data(images=str(folder)), method, out, truth=Truth("ukbench"), dim=3, workers=0)


def read_rankings(out):
    with (out / "rankings.csv").open() as file:
        return list(csv.DictReader(file))


def vector_of(path, method, detectors):
    """What the method itself says of an image file."""
    network = create_method("sba", num_classes=1, **method)
    network.set_detectors(torch.tensor(detectors))
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in network.normalize)
    with torch.no_grad():
        return network.describe((pixels - mean) / std)[0]


class TestWritten:
    def test_files(self, found):
        names = {f"view{i:05d}.npy" for i in range(12)}
        assert {
            name.removeprefix("database/") for name in files(found.out) if name.startswith("database/view")
        } == names
        assert {"detectors.json", "descriptors.npz", "rankings.csv", "scores.json", "whitening.npz"} <= files(found.out)

    def test_vectors_are_the_methods_own(self, found, folder, method):
        detectors = json.loads((found.out / "detectors.json").read_text())["indices"]
        expected = vector_of(folder / "view00005.png", method, detectors)
        got = torch.from_numpy(np.load(found.out / "database" / "view00005.npy"))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

    def test_detectors_are_the_channels_of_largest_variance(self, found):
        record = json.loads((found.out / "detectors.json").read_text())
        sums = np.stack([np.load(found.out / "statistics" / "database" / f"view{i:05d}.npy") for i in range(12)])
        np.testing.assert_allclose(record["variances"], sums.var(axis=0), rtol=1e-9)
        assert record["indices"] == sorted(np.argsort(-sums.var(axis=0), kind="stable")[:4].tolist())

    def test_rankings_begin_with_the_query_and_follow_the_descriptors(self, found):
        rows = read_rankings(found.out)
        assert [row["image"] for row in rows if row["rank"] == "1"] == [
            row["query"] for row in rows if row["rank"] == "1"
        ]
        with np.load(found.out / "descriptors.npz") as arrays:
            ids, vectors = arrays["ids"].tolist(), arrays["vectors"]
        assert vectors.shape == (12, 3)
        distance = ((vectors[4] - vectors) ** 2).sum(axis=1)
        mine = [row for row in rows if row["query"] == "view00004"]
        assert [row["image"] for row in mine] == [ids[i] for i in np.argsort(distance, kind="stable")]
        np.testing.assert_allclose([float(row["distance"]) for row in mine], np.sort(distance), atol=2e-6, rtol=1e-5)

    def test_scores_are_those_of_the_rankings(self, found):
        scores = json.loads((found.out / "scores.json").read_text())
        assert scores == json.loads(json.dumps(found.scores))
        rows = read_rankings(found.out)
        hits = [
            sum(
                int(row["image"][4:]) // 4 == q // 4
                for row in rows
                if int(row["query"][4:]) == q and int(row["rank"]) < 5
            )
            for q in range(12)
        ]
        assert scores["ns"]["mean"] == pytest.approx(sum(hits) / 12)
        assert [row["hits"] for row in scores["by_query"].values()] == hits
        assert (scores["queries"], scores["groups"], scores["images"]) == (12, 3, 12)
        assert scores["map"]["interval"][0] <= scores["map"]["mean"] <= scores["map"]["interval"][1]
        assert "N-S" in str(found) and "mAP" in str(found)


class TestResume:
    def test_finished_vectors_are_not_made_again_when_only_what_follows_changes(
        self, found, folder, method, monkeypatch
    ):
        before = {path: path.stat().st_mtime_ns for path in (found.out / "database").glob("*.npy")}
        more = retrieve(Data(images=str(folder)), method, found.out, truth=Truth("ukbench"), expand=2, top=5, workers=0)
        assert before == {path: path.stat().st_mtime_ns for path in (found.out / "database").glob("*.npy")}
        assert not more.scores["whitened"] and more.scores["expand"] == 2
        assert len(read_rankings(found.out)) == 12 * 5

    def test_stopped_pass_goes_on_and_ends_in_the_same_vectors(self, found, folder, method, tmp_path, monkeypatch):
        calls = []
        original = module.multi_scale

        def stopped(*args, **kwargs):
            calls.append(1)
            if len(calls) == 17:  # behind the statistics of 12 images
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "multi_scale", stopped)
        run = {"data": Data(images=str(folder)), "method": method, "out": tmp_path, "workers": 0}
        with pytest.raises(KeyboardInterrupt):
            retrieve(**run)
        assert len(list((tmp_path / "database").glob("*.npy"))) == 4
        assert retrieve(**run).queries == 12
        assert len(calls) == 17 + 8
        for path in (tmp_path / "database").glob("*.npy"):
            assert np.array_equal(np.load(path), np.load(found.out / "database" / path.name))

    def test_other_settings_are_refused_in_the_same_folder(self, found, folder, method):
        with pytest.raises(FastcamError, match=r"was made with another configuration \(method\.detectors: 4 -> 5\)"):
            retrieve(Data(images=str(folder)), {**method, "detectors": 5}, found.out, workers=0)


class TestSets:
    def test_separate_queries(self, folder, method, tmp_path):
        (tmp_path / "asked").mkdir()
        Image.open(folder / "view00006.png").crop((3, 3, 70, 60)).save(tmp_path / "asked" / "part.png")
        out = retrieve(
            Data(images=str(folder)), method, tmp_path / "out", queries=Data(images=str(tmp_path / "asked")), top=3
        )
        rows = read_rankings(out.out)
        assert (out.queries, out.images, out.scores) == (1, 12, None)
        assert [row["query"] for row in rows] == ["part"] * 3
        assert not (out.out / "scores.json").exists()

    def test_splits_of_a_label_file(self, folder, method, tmp_path):
        lines = [f"view{i:05d}.png,{'abc'[i // 4]},{'test' if i % 4 == 3 else 'train'}" for i in range(12)]
        (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *lines]) + "\n")
        truth = Truth(str(tmp_path / "labels.csv"), split="split")
        out = retrieve(Data(images=str(folder)), method, tmp_path / "out", truth=truth)
        assert (out.queries, out.images, out.scores["ns"]) == (3, 9, None)
        assert {row["query"] for row in read_rankings(out.out)} == {"view00003", "view00007", "view00011"}
        statistics = files(tmp_path / "out" / "statistics" / "database")
        assert "view00003.npy" not in statistics and "view00002.npy" in statistics

    def test_landmarks_are_crops_and_keep_the_query_among_the_positives(self, folder, method, tmp_path):
        names = [f"view{i:05d}" for i in range(4)]
        entry = {
            "query": names[0],
            "bbox": [4.0, 2.0, 60.0, 70.0],
            "good": names[:2],
            "ok": [names[2]],
            "junk": [names[3]],
        }
        (tmp_path / "gt.json").write_text(json.dumps({"tower_1": entry}))
        (tmp_path / "images" / "sub").mkdir(parents=True)  # the release has a folder a landmark
        for path in folder.iterdir():
            (tmp_path / "images" / "sub" / path.name).symlink_to(path)
        out = retrieve(
            Data(images=str(tmp_path / "images")), method, tmp_path / "out", truth=Truth(str(tmp_path / "gt.json"))
        )
        detectors = json.loads((out.out / "detectors.json").read_text())["indices"]
        Image.open(folder / "view00000.png").crop((4, 2, 60, 64)).save(tmp_path / "crop.png")
        got = torch.from_numpy(np.load(out.out / "queries" / "tower_1.npy"))
        torch.testing.assert_close(got, vector_of(tmp_path / "crop.png", method, detectors), atol=1e-5, rtol=1e-4)
        assert list(out.scores["by_query"]) == ["tower_1"]
        first = read_rankings(out.out)[0]
        assert (first["query"], first["rank"]) == ("tower_1", "1")

    def test_whitening_and_detectors_of_another_run_or_set(self, found, folder, method, tmp_path):
        data = Data(images=str(folder))
        retrieve(data, method, tmp_path / "a", truth=Truth("ukbench"), dim=3, fit=data, detectors="fit", workers=0)
        same = retrieve(
            data,
            method,
            tmp_path / "b",
            truth=Truth("ukbench"),
            whitening=tmp_path / "a" / "whitening.npz",
            detectors=str(tmp_path / "a" / "detectors.json"),
            workers=0,
        )
        assert not (tmp_path / "b" / "statistics").exists()
        with np.load(tmp_path / "a" / "descriptors.npz") as a, np.load(tmp_path / "b" / "descriptors.npz") as b:
            np.testing.assert_allclose(a["vectors"], b["vectors"], atol=1e-6)
        assert same.scores["whitened"]
        with pytest.raises(FastcamError, match=r"whitening .* is for vectors of 2048 numbers, these have 512"):
            retrieve(
                data, {**method, "aggregation": "mean"}, tmp_path / "c", whitening=tmp_path / "a" / "whitening.npz"
            )

    def test_one_image_can_be_described_by_a_baseline_and_not_choose_detectors(self, folder, method, tmp_path):
        (tmp_path / "one").mkdir()
        Image.open(folder / "view00000.png").save(tmp_path / "one" / "a.png")
        data = Data(images=str(tmp_path / "one"))
        out = retrieve(data, {**method, "aggregation": "mean"}, tmp_path / "out")
        assert [(row["query"], row["image"]) for row in read_rankings(out.out)] == [("a", "a")]
        with pytest.raises(FastcamError, match="detectors need images to compare, got 1"):
            retrieve(data, method, tmp_path / "out2")

    def test_black_image_without_response_is_ranked(self, folder, method, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "create_method", silenced(create_method))
        out = retrieve(
            Data(images=str(folder)), {**method, "aggregation": "max"}, tmp_path / "out", truth=Truth("ukbench")
        )
        with np.load(out.out / "descriptors.npz") as arrays:
            assert not arrays["vectors"].any()
        assert out.queries == 12

    def test_damaged_images_stop_the_pass_or_are_left_out(self, folder, method, tmp_path):
        (tmp_path / "images").mkdir()
        for path in folder.iterdir():
            (tmp_path / "images" / path.name).symlink_to(path)
        (tmp_path / "images" / "view00012.png").write_bytes(b"no image")
        data = Data(images=str(tmp_path / "images"))
        with pytest.raises(FastcamError, match=r"view00012\.png does not decode"):
            retrieve(data, method, tmp_path / "a")
        out = retrieve(data, method, tmp_path / "b", skip_damaged=True, truth=Truth("ukbench"))
        assert (out.images, out.queries) == (12, 12)


def silenced(create):
    """Methods whose features are 0."""

    def made(name, **settings):
        network = create(name, **settings)
        network.features = lambda images: torch.zeros(len(images), 512, 2, 2)
        return network

    return made


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"dim": 12},
                "dim is 12, but 12 vectors of 2048 numbers give at most 11; give fewer, or more images in fit",
            ),
            ({"expand": 13}, "expand is 13, but only 12 images are searched"),
            ({"scales": ()}, "expected positive scales"),
            ({"scales": (0.0,)}, "expected positive scales"),
            ({"top": 0}, "top of at least 1"),
            ({"detectors": "fit"}, "detectors are to come from the images of fit, and there are none"),
            (
                {"detectors": "nowhere.json"},
                "detectors nowhere.json: FileNotFoundError.*a detectors.json of another run",
            ),
            ({"whitening": "none.npz"}, "whitening none.npz does not exist"),
            ({"whitening": "none.npz", "dim": 3}, "leave dim and fit out, or whitening"),
            ({"truth": Truth("none.csv")}, "label file none.csv does not exist"),
            ({"truth": Truth("none.json")}, "ground truth none.json does not exist"),
            ({"index": "Flat"}, "faiss"),
        ],
    )
    def test_settings(self, settings, message, found, folder, method, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "faiss", None)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FastcamError, match=message):
            retrieve(Data(images=str(folder)), method, found.out, workers=0, **settings)

    def test_methods(self, folder, method, weights, tmp_path):
        data = Data(images=str(folder))
        with pytest.raises(FastcamError, match=r"method\.weights is missing; nothing is trained here"):
            retrieve(data, {"backbone": BACKBONE}, tmp_path / "out")
        with pytest.raises(FastcamError, match="method cam is a cam, expected a retrieval method such as sba"):
            retrieve(data, {"name": "cam", "backbone": BACKBONE, "weights": str(weights)}, tmp_path / "out")

    def test_features_that_are_nan_name_the_image(self, folder, weights, method, tmp_path):
        state = create_backbone(BACKBONE, output_stride=32, weights=weights).net.state_dict()
        state = {
            key: value * float("nan") if key.endswith("layer4.0.conv1.weight") else value
            for key, value in state.items()
        }
        save_weights(tmp_path / "nan.safetensors", state, {})
        with pytest.raises(FastcamError, match="image view00000: its vector has NaN or infinity; check the weights"):
            retrieve(
                Data(images=str(folder)), {**method, "weights": str(tmp_path / "nan.safetensors")}, tmp_path / "out"
            )

    def test_no_images_and_one_name_twice(self, folder, method, tmp_path):
        (tmp_path / "images").mkdir()
        with pytest.raises(FastcamError, match="has no image"):
            retrieve(Data(images=str(tmp_path / "images")), method, tmp_path / "out")
        image = Image.open(folder / "view00000.png")
        for name in ("a.png", "a.bmp"):
            image.save(tmp_path / "images" / name)
        with pytest.raises(FastcamError, match="for one id; rename one"):
            retrieve(Data(images=str(tmp_path / "images")), method, tmp_path / "out")

    def test_landmarks_whose_names_are_not_unique_or_missing(self, folder, method, tmp_path):
        entry = {"query": "view00000", "bbox": [0, 0, 9, 9], "good": ["view00001"], "ok": [], "junk": []}
        (tmp_path / "gt.json").write_text(json.dumps({"a_1": {**entry, "query": "other"}}))
        truth = Truth(str(tmp_path / "gt.json"))
        with pytest.raises(FastcamError, match="the image other of query a_1 is not in the data"):
            retrieve(Data(images=str(folder)), method, tmp_path / "out", truth=truth)
        for sub in ("x", "y"):
            (tmp_path / "images" / sub).mkdir(parents=True)
            (tmp_path / "images" / sub / "view00000.png").symlink_to(folder / "view00000.png")
        with pytest.raises(FastcamError, match="have one name, by which"):
            retrieve(Data(images=str(tmp_path / "images")), method, tmp_path / "out", truth=truth)
        with pytest.raises(FastcamError, match="names its queries, parts of the database's images"):
            data = Data(images=str(folder))
            retrieve(data, method, tmp_path / "out", truth=truth, queries=Data(images=str(tmp_path / "images")))


def test_command_prints_the_scores(folder, weights, tmp_path, capsys):
    argv = [
        "--data.images",
        folder,
        "--method.backbone",
        BACKBONE,
        "--method.weights",
        weights,
        "--method.detectors",
        4,
    ]
    assert main([str(word) for word in ["retrieve", *argv, "--truth.file", "ukbench", "--out", tmp_path / "out"]]) == 0
    out = capsys.readouterr().out
    assert "12 rankings of 12 images" in out and "mAP" in out and "over 12 queries of 3 groups" in out
