"""pseudo-label: inputs, outputs, engines that agree byte for byte, resuming after kills, and what it refuses."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines.tiny import CLASSES, files

from fastcam.data import write_procedural
from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, read_label_png, read_pass
from fastcam.pipelines import _engines, _report_catalogue, _shards
from fastcam.pipelines._data import Data
from fastcam.pipelines._shards import Work, finished_shards, read_catalogue
from fastcam.pipelines._sources import open_source
from fastcam.pipelines.evaluate import evaluate
from fastcam.pipelines.label import label
from fastcam.pipelines.labeler import Settings
from fastcam.pipelines.pseudo_label import pseudo_label
from fastcam.pipelines.refine import Crf
from fastcam.pipelines.report import report

pytest.importorskip("pyarrow")
RUN = {"scales": (1.0,), "threshold": 0.4, "crf": None, "device": "cpu", "shard_size": 5}
KILLS = int(os.environ.get("FASTCAM_KILLS", "4"))  # 200 for the full test


@pytest.fixture(scope="module")
def labels(root) -> Path:
    return root / "image_labels.csv"


@pytest.fixture(scope="module")
def run(root, weights, labels, tmp_path_factory) -> Path:
    """All outputs of the 16 images."""
    out = tmp_path_factory.mktemp("run")
    pseudo_label(root / "JPEGImages", weights, out, labels, outputs=("png", "webdataset", "coco"), cams=True, **RUN)
    return out


def rows_of(out: Path) -> list[dict]:
    return [row for rows in read_catalogue(out) for row in rows]


def content(out: Path) -> dict[str, object]:
    """All that must be the same whoever made it: files but times, rows but seconds."""
    plain = {
        name: (out / name).read_bytes() for name in files(out) if Path(name).suffix in (".png", ".npz", ".tar", ".csv")
    }
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(out)]
    counts = {k: {n: v[n] for n in ("images", "errors", "quality", "labels")} for k, v in finished_shards(out).items()}
    return {**plain, "rows": rows, "counts": counts}


class TestOutputs:
    def test_masks_of_all_images_and_nothing_half_done(self, run):
        ids = {f"train_{i:04d}" for i in range(12)} | {f"val_{i:04d}" for i in range(4)}
        shards = [f"{i:06d}" for i in range(4)]
        wanted = {f"{i}.png" for i in ids} | {f"cams/{i}.npz" for i in ids} | {"pass.json", "cams/pass.json"}
        wanted |= {f"{folder}/{s}{end}" for s in shards for folder, end in FILES_OF_A_SHARD}
        assert files(run) == wanted | {"times.json", "errors.csv", "coco.json"}
        assert not list(run.glob(".tmp*"))

    def test_catalogue_has_a_row_an_image(self, run):
        rows = rows_of(run)
        assert sorted(row["id"] for row in rows) == sorted(p.stem for p in run.glob("*.png"))
        for row in rows:
            mask = read_label_png(run / f"{row['id']}.png")
            assert dict(zip(row["labels"], row["pixels"], strict=True)) == {
                int(k): int((mask == k).sum()) for k in mask.unique()
            }
            assert row["error"] is None and 0 < row["quality"] <= 1 and Path(row["source"]).is_file()
        assert len({row["fingerprint"] for row in rows}) == 1

    def test_statistics_add_up(self, run):
        shards = finished_shards(run)
        rows = rows_of(run)
        assert [s["images"] for s in shards.values()] == [5, 5, 5, 1]
        pixels = sum(label["pixels"] for s in shards.values() for label in s["labels"].values())
        assert pixels == sum(row["width"] * row["height"] for row in rows) == 16 * 48 * 48
        assert all(sum(s["stages"].values()) > 0 for s in shards.values())

    def test_stored_cams_give_the_labels_again(self, run, tmp_path):
        label(run / "cams", tmp_path, threshold=0.4)
        assert read_pass(run / "cams")["config"]["classes"] == CLASSES
        for path in tmp_path.glob("*.png"):
            assert load_cams(run / "cams" / f"{path.stem}.npz").maps.shape[1:] == (12, 12)
            assert (read_label_png(path) == read_label_png(run / path.name)).float().mean() > 0.9  # stride 4

    def test_evaluate_reads_labels_and_cams(self, run, root, tmp_path):
        data = Data(root=str(root), split="val")
        assert 0 <= evaluate(data, run, tmp_path)["mean_iou"]["skip"] <= 1
        assert evaluate(data, run / "cams", tmp_path, threshold=0.4)["images"] == 4

    def test_tar_shards_hold_the_same(self, run):
        seen = set()
        for path in sorted(run.glob("shards/*.tar")):
            with tarfile.open(path) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}
            for name in [n for n in members if n.endswith(".png")]:
                key = name.removesuffix(".png")
                seen.add(key)
                assert members[name] == (run / name).read_bytes()
                assert members[f"{key}.cam.npz"] == (run / "cams" / f"{key}.npz").read_bytes()
                assert json.loads(members[f"{key}.json"])["id"] == key
        assert len(seen) == 16

    def test_webdataset_reads_the_tars(self, run):
        wds = pytest.importorskip("webdataset")
        samples = list(wds.WebDataset([str(p) for p in sorted(run.glob("shards/*.tar"))], shardshuffle=False))
        assert sorted(sample["__key__"] for sample in samples) == sorted(p.stem for p in run.glob("*.png"))
        assert all({"png", "json", "cam.npz"} <= sample.keys() for sample in samples)

    def test_pycocotools_reads_coco_json(self, run):
        coco = pytest.importorskip("pycocotools.coco").COCO(str(run / "coco.json"))
        names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
        assert names == {**dict(enumerate(CLASSES, 1)), 255: "ignored"}
        assert len(coco.getImgIds()) == 16
        for image in coco.loadImgs(coco.getImgIds()):
            mask = np.zeros((48, 48), np.uint8)
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
                mask[coco.annToMask(annotation) > 0] = annotation["category_id"]
            assert np.array_equal(mask, read_label_png(run / f"{image['image']}.png").numpy())


FILES_OF_A_SHARD = (("shards", ".json"), ("shards", ".tar"), ("catalogue", ".parquet"))


class TestInputs:
    def run(self, images, weights, out, labels=None, **more):
        result = pseudo_label(images, weights, out, labels, **{**RUN, **more})
        assert result.finished == result.shards
        return {row["id"]: row for row in rows_of(out)}

    def test_list_and_tables(self, root, weights, labels, run, tmp_path):
        with labels.open() as file:
            table = list(csv.DictReader(file))
        name = next(iter(table[0]))
        records = [
            {"image": f"JPEGImages/{row[name]}.jpg", "tags": [c for c in CLASSES if row.get(c) == "1"]} for row in table
        ]
        if not any(record["tags"] for record in records):  # the other layout: one column of tags
            records = [{"image": f"JPEGImages/{row[name]}.jpg", "tags": list(row.values())[1].split()} for row in table]
        assert any(record["tags"] for record in records)
        (root / "t.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        (root / "t.json").write_text(json.dumps(records))
        (root / "t.csv").write_text("image,tags\n" + "".join(f"{r['image']},{' '.join(r['tags'])}\n" for r in records))
        pa = pytest.importorskip("pyarrow.parquet")
        pa.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), root / "t.parquet")
        try:
            for suffix in ("jsonl", "json", "csv", "parquet"):
                made = self.run(root / f"t.{suffix}", weights, tmp_path / suffix)
                assert len(made) == 16
                for image_id in made:
                    png = (tmp_path / suffix / f"{image_id}.png").read_bytes()
                    assert png == (run / f"{Path(image_id).name}.png").read_bytes()
            (root / "t.txt").write_text("JPEGImages/val_0001.jpg\n./JPEGImages/val_0002.jpg\n")
            assert self.run(root / "t.txt", weights, tmp_path / "txt").keys() == {
                "JPEGImages/val_0001",
                "JPEGImages/val_0002",
            }
        finally:
            for path in root.glob("t.*"):
                path.unlink()

    def test_voc_layout(self, root, weights, labels, run, tmp_path):
        made = self.run(root, weights, tmp_path / "a", labels, split="val")
        assert made.keys() == {f"val_{i:04d}" for i in range(4)}
        for image_id, row in made.items():
            expected = next(r for r in rows_of(run) if r["id"] == image_id)
            assert row["classes"] == expected["classes"]
        assert self.run(root, weights, tmp_path / "b", Path("mask"), split="val").keys() == made.keys()
        with pytest.raises(FastcamError, match="has VOC's layout; give split"):
            self.run(root, weights, tmp_path / "c")

    def test_coco_layout(self, root, weights, tmp_path):
        annotations = {
            "images": [{"id": 7, "file_name": "val_0001.jpg"}, {"id": 9, "file_name": "val_0003.jpg"}],
            "annotations": [{"image_id": 9, "category_id": 18}, {"image_id": 9, "category_id": 2}],
            "categories": [{"id": 18, "name": CLASSES[2]}, {"id": 2, "name": CLASSES[0]}, {"id": 3, "name": "car"}],
        }
        (tmp_path / "instances.json").write_text(json.dumps(annotations))
        made = self.run(root / "JPEGImages", weights, tmp_path / "out", tmp_path / "instances.json")
        assert {k: row["classes"] for k, row in made.items()} == {
            "val_0001": [],
            "val_0003": [CLASSES[0], CLASSES[2]],
        }

    def test_tar_shards(self, root, weights, run, tmp_path):
        expected = {row["id"]: row for row in rows_of(run)}
        images = sorted((root / "JPEGImages").glob("*.jpg"))
        for number, part in enumerate((images[:10], images[10:])):
            with tarfile.open(tmp_path / f"part-{number}.tar", "w") as tar:
                for path in part:
                    about = tmp_path / "about.json"
                    about.write_text(json.dumps({"tags": expected[path.stem]["classes"]}))
                    tar.add(path, f"some/{path.name}")
                    tar.add(about, f"some/{path.stem}.json")
        made = self.run(tmp_path / "part-*.tar", weights, tmp_path / "out")
        assert finished_shards(tmp_path / "out").keys() == {"part-0", "part-1"}
        assert len(made) == 16
        for path in images:
            number = 0 if path in images[:10] else 1
            row = made[f"part-{number}/some/{path.stem}"]
            assert row["error"] is None and row["pixels"] == expected[path.stem]["pixels"]
        assert self.run(tmp_path, weights, tmp_path / "folder").keys() == made.keys()

    def test_class_numbers_and_strange_samples_of_tars(self, root, weights, tmp_path):
        image = (root / "JPEGImages/val_0000.jpg").read_bytes()
        members = {"a.jpg": image, "a.cls": b"2", "b.cls": b"1", "c.jpg": image, "c.cls": b"77", "d.jpg": image[:50],
                   "e.json": b"{", "e.jpg": image, "f.jpg": image, "../g.jpg": image}  # fmt: skip
        write_tar(tmp_path / "x.tar", members)
        made = self.run(tmp_path / "x.tar", weights, tmp_path / "out")
        assert made["x/a"]["classes"] == [CLASSES[2]] and made["x/f"]["error"] is None
        assert "sample x/b has no image" in made["x/b"]["error"]
        assert "class 77 of x/c is none of 0 to 5" in made["x/c"]["error"]
        assert "does not decode" in made["x/d"]["error"]
        assert "e.json does not read as JSON" in made["x/e"]["error"]
        assert "is no name of a file below a folder" in made["x/../g"]["error"]
        assert not list(tmp_path.glob("*.png")) and files(tmp_path / "out") >= {"x/a.png", "x/f.png"}

    @pytest.mark.parametrize("cut", [0, 512, 700, 3])
    def test_tar_that_breaks_off(self, root, weights, tmp_path, cut):
        image = (root / "JPEGImages/val_0000.jpg").read_bytes()
        write_tar(tmp_path / "x.tar", {f"{i}.jpg": image for i in range(4)})
        whole = (tmp_path / "x.tar").read_bytes()
        second = whole.index(b"2.jpg")
        (tmp_path / "x.tar").write_bytes(whole[: second + cut])
        made = self.run(tmp_path / "x.tar", weights, tmp_path / "out")
        assert made["x/0"]["error"] is None
        assert "copy it again" in made["x/(rest)"]["error"]

    def test_predicted_tags_without_labels(self, root, weights, tmp_path):
        made = self.run(root / "JPEGImages", weights, tmp_path, tag_threshold=0.0)
        assert all(row["classes"] == CLASSES for row in made.values())


def write_tar(path, members):
    import io

    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class TestDamage:
    def test_odd_names_and_damaged_files(self, root, weights, tmp_path):
        source = root / "JPEGImages/val_0000.jpg"
        folder = tmp_path / "images"
        names = [
            "a b.jpg",
            "-x.jpg",
            "ü.jpg",
            "line\nbreak.jpg",
            "a.b.c.jpg",
            "q'\"$(x).jpg",
            "x" * 240 + ".jpg",
            "100%.JPG",
        ]
        (folder / "deep/er").mkdir(parents=True)
        for name in [*names, "deep/er/a.jpg"]:
            shutil.copy(source, folder / name)
        shutil.copy(source, os.fsencode(folder) + b"/\xff\xfe.jpg")
        (folder / "broken.jpg").write_bytes(source.read_bytes()[:300])
        (folder / "empty.png").touch()
        outputs = ("png", "webdataset", "coco")
        result = pseudo_label(folder, weights, tmp_path / "out", outputs=outputs, **RUN)
        assert (result.images, result.errors) == (12, 2)
        with (tmp_path / "out/errors.csv").open(newline="") as file:
            errors = {row["id"]: row["error"] for row in csv.DictReader(file)}
        assert errors.keys() == {"broken", "empty"}
        assert "does not decode" in errors["broken"] and "has no bytes" in errors["empty"]
        masks = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")}
        assert len(masks) == 10 and {"line\nbreak.png", "a.b.c.png", "deep/er/a.png", "100%.png"} <= masks
        assert "\\xff\\xfe" in {row["id"] for row in rows_of(tmp_path / "out")}
        assert "2 without a label, see errors.csv" in str(result)

    def test_ids_that_cannot_be_files(self, root, weights, tmp_path):
        shutil.copy(root / "JPEGImages/val_0000.jpg", tmp_path / "a.jpg")
        records = [{"image": name} for name in ("a.jpg", "x/../../a.jpg", "y" * 300 + ".jpg")]
        (tmp_path / "list.json").write_text(json.dumps(records))
        result = pseudo_label(tmp_path / "list.json", weights, tmp_path / "out", **RUN)
        errors = [row["error"] for row in rows_of(tmp_path / "out")]
        assert result.errors == 2 and errors[0] is None
        assert "is no name of a file below a folder" in errors[1] and "longer than file names may be" in errors[2]

    def test_label_in_the_place_of_a_folder(self, root, weights, tmp_path):
        (tmp_path / "in/a.png").mkdir(parents=True)
        for name in ("a.jpg", "a.png/b.jpg"):
            shutil.copy(root / "JPEGImages/val_0000.jpg", tmp_path / "in" / name)
        result = pseudo_label(tmp_path / "in", weights, tmp_path / "out", **RUN)
        assert (result.images, result.errors) == (2, 1)
        assert "cannot be named" in next(filter(None, (row["error"] for row in rows_of(tmp_path / "out"))))

    def test_full_disk_stops_the_run_and_keeps_what_is_finished(self, root, weights, tmp_path, monkeypatch):
        original, calls = _shards._write_catalogue, []

        def full(path, rows):
            calls.append(path)
            if len(calls) == 3:
                raise OSError(28, "No space left on device", str(path))
            original(path, rows)

        monkeypatch.setattr(_shards, "_write_catalogue", full)
        with pytest.raises(FastcamError, match="could not be written: No space left on device"):
            pseudo_label(root / "JPEGImages", weights, tmp_path, **RUN)
        assert len(finished_shards(tmp_path)) == 2
        assert pseudo_label(root / "JPEGImages", weights, tmp_path, **RUN).made == 2


class TestResume:
    def test_finished_shards_do_no_work_again(self, root, weights, labels, run, monkeypatch):
        monkeypatch.setattr(_shards, "PseudoLabeler", None)  # would fail if a network were made
        before = {name: (run / name).stat().st_mtime_ns for name in files(run) if "/" in name or name.endswith("png")}
        result = pseudo_label(
            root / "JPEGImages", weights, run, labels, outputs=("png", "webdataset", "coco"), cams=True, **RUN
        )
        assert (result.made, result.finished, result.images) == (0, 4, 16)
        assert before == {name: (run / name).stat().st_mtime_ns for name in before}

    def test_a_shard_counts_only_with_its_statistics(self, root, weights, labels, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run/shards/000002.json").unlink()
        (tmp_path / "run/.tmp-000002").mkdir()
        (tmp_path / "run/.tmp-000002/half").touch()
        more = {"outputs": ("png", "webdataset", "coco"), "cams": True}
        assert pseudo_label(root / "JPEGImages", weights, tmp_path / "run", labels, **more, **RUN).made == 1
        assert content(tmp_path / "run") == content(run)
        assert not (tmp_path / "run/.tmp-000002").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"threshold": 0.3}, r"threshold: 0\.4 -> 0\.3"),
            ({"crf": Crf()}, r"\(crf: None -> set\)"),
            ({"shard_size": 4}, r"input\.shard_size: 5 -> 4"),
            ({"outputs": ("png",)}, "outputs"),
        ],
    )
    def test_other_settings_are_refused_by_name(self, root, weights, labels, run, change, message):
        given = {"outputs": ("png", "webdataset", "coco"), "cams": True, **RUN, **change}
        with pytest.raises(FastcamError, match=f"made with another configuration .*{message}"):
            pseudo_label(root / "JPEGImages", weights, run, labels, **given)

    def test_other_images_tags_weights_and_version_are_refused(
        self, root, weights, trained, labels, tmp_path, monkeypatch
    ):
        write_procedural(tmp_path / "voc", train=2, val=1, size=48)
        folder = tmp_path / "voc/JPEGImages"
        given = (folder, weights, tmp_path / "out", tmp_path / "voc/image_labels.csv")
        pseudo_label(*given, **RUN)
        with pytest.raises(FastcamError, match=r"weights: \w+ -> \w+"):
            pseudo_label(folder, trained / "weights.safetensors" if trained.is_dir() else trained, *given[2:], **RUN)
        with pytest.raises(FastcamError, match=r"input\.list: \w+ -> \w+, tags: given -> as far"):
            pseudo_label(*given[:3], **RUN)
        shutil.copy(next(folder.glob("*.jpg")), folder / "more.jpg")
        (tmp_path / "voc/image_labels.csv").write_text(
            (tmp_path / "voc/image_labels.csv").read_text() + more_tags(given[3])
        )
        with pytest.raises(FastcamError, match=r"input\.images: 3 -> 4"):
            pseudo_label(*given, **RUN)
        (folder / "more.jpg").unlink()
        monkeypatch.setattr("fastcam.pipelines.labeler.__version__", "9")
        with pytest.raises(FastcamError, match=r"version: .* -> 9"):
            pseudo_label(*given, **RUN)

    @pytest.mark.timeout(300 + 20 * KILLS)
    def test_random_kills_lose_and_double_nothing(self, root, weights, labels, tmp_path):
        """Each kill leaves finished shards untouched, and the end is that of a run without kills."""
        helper = Path(__file__).with_name("killed_run.py")
        command = [sys.executable, str(helper), str(root), str(weights), str(tmp_path), str(KILLS)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["kills"] == KILLS and told["inside"] > 0
        expected = content(tmp_path / "whole")
        for folder in sorted(tmp_path.glob("killed-*")):
            assert content(folder) == expected
            assert not list(folder.glob(".tmp-0*"))


def more_tags(path) -> str:
    last = Path(path).read_text().strip().splitlines()[-1]
    return "more" + last[last.index(",") :] + "\n"


OUTPUTS = {"outputs": ("png", "webdataset"), "cams": True, "crf": Crf(preset="psa", iterations=2)}


@pytest.fixture(scope="module")
def expected(root, weights, labels, tmp_path_factory):
    """What engine local makes."""
    out = tmp_path_factory.mktemp("local")
    pseudo_label(root / "JPEGImages", weights, out, labels, **{**RUN, **OUTPUTS})
    return content(out)


class TestEngines:
    def test_processes(self, root, weights, labels, expected, tmp_path):
        more = {**RUN, **OUTPUTS, "processes": 2}
        assert pseudo_label(root / "JPEGImages", weights, tmp_path, labels, **more).made == 4
        assert content(tmp_path) == expected

    @pytest.mark.parametrize(
        "names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]
    )
    def test_ranks_share_the_shards(self, root, weights, labels, expected, tmp_path, monkeypatch, names):
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        made = []
        for rank in (2, 0, 1):
            for name, value in zip(names, (rank, 3, 0), strict=True):
                monkeypatch.setenv(name, str(value))
            more = {**RUN, **OUTPUTS, "engine": "torchrun"}
            made.append(pseudo_label(root / "JPEGImages", weights, tmp_path, labels, **more).made)
        assert made == [1, 2, 1]
        assert content(tmp_path) == expected

    def test_torchrun_starts_it(self, root, weights, labels, expected, tmp_path):
        arguments = {"images": root / "JPEGImages", "weights": weights, "out": tmp_path, "labels": labels}
        script = tmp_path / "job.py"
        script.write_text(
            "import sys\nfrom fastcam.pipelines.cli import main\nsys.exit(main(['pseudo-label', *sys.argv[1:]]))\n"
        )
        argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        argv += ["--scales", "[1.0]", "--threshold", "0.4", "--device", "cpu", "--shard_size", "5", "--cams", "true"]
        argv += [
            "--outputs",
            "[png,webdataset]",
            "--crf.preset",
            "psa",
            "--crf.iterations",
            "2",
            "--engine",
            "torchrun",
        ]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, *argv], env=env, check=True, capture_output=True, timeout=300)
        script.unlink()
        assert content(tmp_path) == expected

    def test_ray(self, root, weights, labels, expected, tmp_path, monkeypatch):
        pytest.importorskip("ray", reason="needs ray[data]")
        monkeypatch.setenv("RAY_worker_niceness", "0")  # else actors starve beside other tests
        more = {**RUN, **OUTPUTS, "engine": "ray", "processes": 2}
        assert pseudo_label(root / "JPEGImages", weights, tmp_path, labels, **more).made == 4
        assert content(tmp_path) == expected

    def test_ranks_that_contradict_themselves(self, monkeypatch):
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(FastcamError, match="RANK is 3 and WORLD_SIZE is 3"):
            _engines.rank_and_world()
        monkeypatch.setenv("RANK", "x")
        with pytest.raises(FastcamError, match="expected whole numbers"):
            _engines.rank_and_world()

    def test_error_of_a_process_is_told(self, root, weights, tmp_path, monkeypatch):
        monkeypatch.setattr(_engines, "_state", {})
        source = open_source(root / "JPEGImages", None, None, CLASSES, 5)
        _engines._start(Work(source, tmp_path, weights, Settings()), "cpu", 1, multiprocessing.Value("i", 0))
        with pytest.raises(FastcamError, match="leaves the background to a rule"):
            _engines._one(0)

    @pytest.mark.parametrize(
        ("module", "given", "message"),
        [
            ("pyarrow.parquet", {}, r"the catalogue of pseudo-label needs pyarrow.*pip install 'fastcam\[scale\]'"),
            ("pycocotools.mask", {"outputs": ("coco",)}, r"rle needs pycocotools.*fastcam\[scale\]"),
            ("ray", {"engine": "ray"}, r"engine ray needs ray, which is not installed.*fastcam\[ray\]"),
        ],
    )
    def test_missing_library_is_one_line(self, root, weights, tmp_path, monkeypatch, module, given, message):
        monkeypatch.setitem(sys.modules, module, None)  # its import raises ModuleNotFoundError
        with pytest.raises(FastcamError, match=message):
            pseudo_label(root / "JPEGImages", weights, tmp_path, **{**RUN, **given})
        assert not list(tmp_path.glob("*.png"))


def test_settings_that_cannot_be(root, weights, tmp_path):
    for given, message in (
        ({"processes": 0}, "processes is 0"),
        ({"outputs": ()}, "expected at least one of each"),
        ({"shard_size": 0}, "shard_size is 0, expected at least 1"),
        ({"threshold": None, "high": 0.3}, "needs both"),
        ({"threshold": None}, "method cam leaves the background to a rule; give a threshold, a power, or high and low"),
        ({"images": tmp_path / "*.tar"}, "no file matches"),
        ({"images": tmp_path / "none"}, "does not exist"),
    ):
        arguments = {"images": root / "JPEGImages", **RUN, **given}
        with pytest.raises(FastcamError, match=message):
            pseudo_label(weights=weights, out=tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()


class TestReport:
    def test_catalogue_and_stored_cams_are_shown(self, run, monkeypatch):
        text = report(run, run.parent / "report.html", failures=3).read_text()
        worst = sorted(rows_of(run), key=lambda row: row["quality"])[:3]
        titles = re.findall(r"<h4>(\w+) · quality ([\d.]+)</h4>", text)
        assert [float(quality) for _, quality in titles] == [pytest.approx(row["quality"], abs=1e-3) for row in worst]
        assert text.count("label of ") >= 3 and "16 images in 4 shards" in text
        shards = finished_shards(run).values()
        pixels = sum(s["labels"].get("0", {"pixels": 0})["pixels"] for s in shards) / (16 * 48 * 48)
        assert f"{100 * pixels:.0f} % of the pixels" in text
        assert "From the stored CAMs of 16 images" in text

    def test_cams_in_tars_give_the_same_curve(self, run, root, weights, labels, tmp_path):
        more = {**RUN, "outputs": ("webdataset",), "cams": True}
        pseudo_label(root / "JPEGImages", weights, tmp_path / "run", labels, **more)
        curve = re.compile(r"share of foreground at every threshold: [^\"]+")
        texts = [report(folder, tmp_path / "report.html").read_text() for folder in (run, tmp_path / "run")]
        assert len({curve.search(text)[0] for text in texts}) == 1

    def test_errors_are_counted_by_reason(self, root, weights, tmp_path):
        for name in ("a.jpg", "b.jpg"):
            (tmp_path / name).write_bytes(b"\xff\xd8\xff not an image")
        shutil.copy(root / "JPEGImages/val_0000.jpg", tmp_path / "c.jpg")
        pseudo_label(tmp_path, weights, tmp_path / "out", **RUN)
        text = report(tmp_path / "out").read_text()
        assert "3 images in 1 shards, 2 without a label" in text
        assert re.search(r'<th scope="row">2</th><td>image does not decode', text)

    def test_shares_worked_by_hand(self):
        maps = torch.tensor([[[0.0, 0.5]], [[0.3, 0.1]]])
        camsets = [
            CamSet(torch.tensor([0, 1]), maps, None, (1, 2)),
            CamSet(torch.zeros(0).long(), maps[:0], None, (1, 2)),
        ]
        shares = dict(zip(_report_catalogue.THRESHOLDS, _report_catalogue.foreground_shares(camsets), strict=True))
        assert (shares[0.0], shares[0.3], shares[0.5]) == (0.5, 0.25, 0.0)
