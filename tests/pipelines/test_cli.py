import dataclasses
import importlib
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pipelines.tiny import METHOD, TRAINER, files

import fastcam
from fastcam.io import load_weights, save_weights
from fastcam.methods import create_method
from fastcam.pipelines import _fit
from fastcam.pipelines import make_cam as make_cam_module
from fastcam.pipelines._data import Data
from fastcam.pipelines._settings import TrainerConfig
from fastcam.pipelines.cli import COMMANDS, CONFIGS, main

PASSES = [name for name in COMMANDS if name != "bench"]


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--help"])
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def error_of(capsys, *argv: object) -> str:
    """The message of a command that fails as it should: status 2, one line on standard error, no output."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fastcam: error: ")
    return err.removeprefix("fastcam: error: ").rstrip("\n")


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, timeout=120)


class TestHelp:
    def test_names_every_command(self, capsys):
        text = help_of(capsys)
        assert all(re.search(rf"^    {name}\b", text, re.MULTILINE) for name in COMMANDS)

    @pytest.mark.parametrize("command", PASSES)
    def test_of_a_command_describes_every_argument(self, command, capsys):
        module = COMMANDS[command][0]
        function = getattr(importlib.import_module(f"fastcam.pipelines.{module}"), module)
        text = " ".join(help_of(capsys, command).split())
        for name in inspect.signature(function).parameters:
            described = re.search(rf"--{name}(?:\.\w+)? \S+ (\w+)|--{name}\.\w+", text)
            assert described, f"{command} --{name} has no help"
        assert function.__doc__.strip().split("\n")[0].split()[-1].rstrip(".:") in text

    def test_of_settings_is_their_docstring(self, capsys):
        text = " ".join(help_of(capsys, "train").split())
        assert "--trainer.resize_long [ITEM,...] smallest and largest length that the longer side" in text
        assert "--data.tags TAGS image-level labels: mask" in text

    def test_imports_neither_torch_nor_training_libraries(self):
        code = (
            "import sys\nfrom fastcam.pipelines.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'lightning', 'timm', 'numpy', 'jsonargparse'} & sys.modules.keys()))"
        )
        done = python("-c", code)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr

    def test_of_bench_is_its_own(self, capsys):
        assert "usage: python -m fastcam.bench" in help_of(capsys, "bench")

    def test_module_is_the_command(self):
        done = python("-m", "fastcam.pipelines", "--version")
        assert (done.returncode, done.stdout) == (0, f"fastcam {fastcam.__version__}\n")


KINDS = {  # of the method whose name a shipped configuration begins with; the others give CAMs
    "amdim": "pretraining",
    "cotraining": "segmenter",
    "cyclegan": "segmenter",
    "deeplab": "segmenter",
    "dsmf": "few-shot",
    "irn": "refiner",
    "mcof": "regions",
    "mevt": "pretraining",
    "ocr": "segmenter",
    "psa": "refiner",
    "sba": "retrieval",
    "ssl": "few-shot",
}


def kind_of(config: str) -> str:
    return KINDS.get(config.split("_")[0], "cam")


class TestSettings:
    @pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    def test_shipped_configuration_is_known_by_name_and_has_only_known_keys(self, config, capsys):
        """It gets as far as the missing data set, past all checks of its own keys."""
        commands = {"segmenter": ["segment", "--labels", "none"], "refiner": ["refine", "--cams", "none"]}
        commands |= {"regions": ["mcof", "--cams", "none"], "retrieval": ["retrieve"]}
        command = commands.get(kind_of(config), ["train"])
        message = error_of(capsys, *command, "--config", config, "--out", "out")
        assert message.startswith("expected either data.root" if len(command) == 1 else "input folder none does not")

    @pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    def test_method_of_a_shipped_configuration_can_be_built(self, config):
        recipe = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
        name = recipe.get("how", config.split("_")[0])
        method = create_method(num_classes=6, **{"name": name, **recipe["method"]})
        assert method.kind == kind_of(config)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["trian"], "there is no command 'trian'; did you mean train?"),
            ([], "the following arguments are required: COMMAND; see fastcam --help"),
            (["train", "--trainer.epoch", "3"], "train has no argument 'trainer.epoch'; did you mean"),
            (["make-cam", "--data.rot", "x"], "make-cam has no argument 'data.rot'; did you mean 'data.root'?"),
            (["label", "--cams", "a"], "the following arguments are required: out; see fastcam label --help"),
            (["train", "--trainer.epochs", "x"], "argument trainer.epochs is 'x', expected a whole number"),
            (["make-cam", "--scales", "1,2"], "argument scales is '1,2', expected a list such as [1.0,0.5]"),
            (["train", "--config", "sfc_vok"], "config sfc_vok is neither a file nor the name of a shipped"),
        ],
    )  # fmt: skip
    def test_mistake_on_the_command_line_is_one_line_with_the_nearest_name(self, argv, message, capsys):
        assert error_of(capsys, *argv).startswith(message)

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ({"trainer": {"epocs": 3}}, "train has no argument 'trainer.epocs'; did you mean 'trainer.epochs'?"),
            ({"trianer": {"epochs": 3}}, "train has no argument 'trianer.epochs'; did you mean 'trainer.epochs'?"),
            ({"data": {"rooot": "x"}}, "train has no argument 'data.rooot'; did you mean 'data.root'?"),
        ],
    )
    def test_wrong_key_in_a_file_names_the_nearest(self, recipe, message, capsys, tmp_path):
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        argv = ["train", "--config", tmp_path / "recipe.yaml", "--method.name", "cam", "--out", tmp_path / "out"]
        assert error_of(capsys, *argv) == message

    def test_wrong_key_of_a_method_names_the_nearest(self, capsys, root, tmp_path):
        argv = ["--method.name", "sfc", "--method.bank_drawz", "3"]
        message = error_of(capsys, "train", "--data.root", root, *argv, "--out", tmp_path / "out")
        assert "'bank_drawz'" in message
        assert "'bank_draws'" in message

    def test_file_fills_the_arguments_and_what_follows_overrides_it(self, tmp_path, monkeypatch):
        given = {}

        def record(data: Data, method: dict[str, object], trainer: TrainerConfig, out: Path) -> None:
            given.update(data=data, method=method, trainer=trainer, out=out)

        monkeypatch.setattr("fastcam.pipelines.train.train", record)
        recipe = {"data": {"root": "a"}, "method": {"name": "cam", "lr": 0.5}, "trainer": {"epochs": 3, "crop": 64}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        argv = ["--config", str(tmp_path / "recipe.yaml"), "--trainer.epochs", "5", "--method.lr", "0.1", "--out", "o"]
        assert main(["train", *argv]) == 0
        assert given == {
            "data": Data(root="a"),
            "method": {"name": "cam", "lr": 0.1},
            "trainer": TrainerConfig(epochs=5, crop=64),
            "out": Path("o"),
        }


class TestEndings:
    def test_interrupt_is_130_without_traceback(self, capsys, monkeypatch):
        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr("fastcam.pipelines.env.env", interrupt)
        assert main(["env"]) == 130
        assert capsys.readouterr().err == "fastcam: error: interrupted; run the same command again to continue\n"

    def test_interrupt_of_a_training_keeps_its_checkpoint_and_later_interrupts(
        self, capsys, root, tmp_path, monkeypatch
    ):
        original = _fit.StepModule.training_step

        def training_step(self, batch, batch_idx):
            if self.step == 4:
                raise KeyboardInterrupt
            return original(self, batch, batch_idx)

        monkeypatch.setattr(_fit.StepModule, "training_step", training_step)
        settings = {**dataclasses.asdict(TRAINER), "resize_long": [40, 56]}
        (tmp_path / "recipe.yaml").write_text(json.dumps({"method": METHOD, "trainer": settings}))
        argv = ["--config", tmp_path / "recipe.yaml", "--data.root", root, "--out", tmp_path / "out"]
        assert main(["train", *map(str, argv)]) == 130
        assert capsys.readouterr().err == "fastcam: error: interrupted; run the same command again to continue\n"
        assert torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["step"] == 3
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_library_that_is_missing_says_how_to_install_it(self, capsys, monkeypatch):
        def missing():
            raise ModuleNotFoundError("No module named 'timm'", name="timm")

        monkeypatch.setattr("fastcam.pipelines.env.env", missing)
        assert error_of(capsys, "env") == "timm is not installed; install it with: pip install 'fastcam[train]'"

    def test_fault_of_our_own_keeps_its_traceback(self, monkeypatch):
        def fault():
            raise ZeroDivisionError

        monkeypatch.setattr("fastcam.pipelines.env.env", fault)
        with pytest.raises(ZeroDivisionError):
            main(["env"])

    def test_env_lists_versions_and_why_backends_cannot_run(self, capsys):
        assert main(["env"]) == 0
        out = capsys.readouterr().out
        assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
        assert re.search(r"^  prototype_similarity\n(?:    .*\n)*?    reference +ok$", out, re.MULTILINE)


@pytest.fixture
def broken(root, tmp_path):
    """A data set of two images to break, as arguments."""
    folder = tmp_path / "broken"
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / sub).mkdir(parents=True)
    for i in range(2):
        for sub, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
            name = f"train_000{i}{suffix}"
            (folder / sub / name).write_bytes((root / sub / name).read_bytes())
    (folder / "classes.txt").write_bytes((root / "classes.txt").read_bytes())
    (folder / "ImageSets/Segmentation/train.txt").write_text("train_0000\ntrain_0001\n")
    return folder


class TestBadInput:
    """Each of the issue's list: one line that names the thing, status 2, nothing left behind."""

    def make_cam(self, capsys, folder, weights, out, *more) -> str:
        message = error_of(capsys, "make-cam", "--data.root", folder, "--weights", weights, "--out", out, *more)
        assert not [
            name for name in files(out) if not name.endswith(".npz") and name not in ("pass.json", "times.json")
        ]
        return message

    def train(self, capsys, folder, out, workers=0, **more) -> str:
        settings = dataclasses.replace(TRAINER, batch_size=2, workers=workers)
        settings = {**dataclasses.asdict(settings), "resize_long": [40, 56]}
        recipe = {"data": {"root": str(folder), **more}, "method": METHOD, "trainer": settings}
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        message = error_of(capsys, "train", "--config", path, "--out", out)
        assert not out.exists()
        return message

    def test_missing_image(self, capsys, broken, weights, tmp_path):
        (broken / "JPEGImages/train_0001.jpg").unlink()
        message = self.make_cam(capsys, broken, weights, tmp_path / "out")
        assert message.startswith(f"image {broken}/JPEGImages/train_0001.jpg does not exist")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_image_that_does_not_decode_stops_training(self, workers, capsys, broken, tmp_path):
        (broken / "JPEGImages/train_0000.jpg").write_bytes(b"\xff\xd8\xff not an image")
        message = self.train(capsys, broken, tmp_path / "out", workers)
        assert "train_0000.jpg" in message
        assert "does not decode" in message

    def test_image_that_does_not_decode_keeps_what_is_finished(self, capsys, broken, weights, tmp_path):
        (broken / "JPEGImages/train_0001.jpg").write_bytes(b"\xff\xd8\xff not an image")
        message = self.make_cam(capsys, broken, weights, tmp_path / "out", "--workers", "0")
        assert "train_0001.jpg" in message
        assert files(tmp_path / "out") == {"train_0000.npz", "pass.json", "times.json"}

    def test_mask_of_another_size(self, capsys, broken, tmp_path):
        path = broken / "SegmentationClass/train_0000.png"
        Image.open(path).crop((0, 0, 30, 48)).save(path)
        message = self.train(capsys, broken, tmp_path / "out")
        assert message.startswith(f"mask {path} is 30 x 48 pixels, but its image is 48 x 48")

    def test_tag_that_is_no_class(self, capsys, broken, tmp_path):
        (broken / "tags.csv").write_text("image,tags\ntrain_0000,fox unicorn\ntrain_0001,fox\n")
        assert "'unicorn'" in self.train(capsys, broken, tmp_path / "out", tags="tags.csv")

    def test_empty_folder(self, capsys, weights, tmp_path):
        (tmp_path / "empty").mkdir()
        argv = ["pseudo-label", "--images", tmp_path / "empty", "--weights", weights, "--threshold", "0.3"]
        assert error_of(capsys, *argv, "--out", tmp_path / "out").startswith(
            f"image folder {tmp_path}/empty has no image"
        )
        assert not (tmp_path / "out").exists()

    def test_empty_list(self, capsys, broken, tmp_path):
        (broken / "ImageSets/Segmentation/train.txt").write_text("")
        assert "names no image" in self.train(capsys, broken, tmp_path / "out")

    def test_missing_weights(self, capsys, broken, tmp_path):
        message = self.make_cam(capsys, broken, tmp_path / "none.safetensors", tmp_path / "out")
        assert message.startswith(f"weights {tmp_path}/none.safetensors do not exist")

    def test_damaged_weights(self, capsys, broken, weights, tmp_path):
        damaged = tmp_path / "weights.safetensors"
        damaged.write_bytes(weights.read_bytes()[:5000])
        assert str(damaged) in self.make_cam(capsys, broken, damaged, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_weights_of_another_network(self, capsys, broken, weights, tmp_path):
        state, about = load_weights(weights)
        about["backbone"] = about["config"]["backbone"] = "resnet14t"
        save_weights(tmp_path / "weights.safetensors", state, about)
        message = self.make_cam(capsys, broken, tmp_path / "weights.safetensors", tmp_path / "out")
        assert str(tmp_path / "weights.safetensors") in message
        assert not (tmp_path / "out").exists()

    def test_backbone_weights_of_another_network(self, capsys, broken, weights, tmp_path):
        argv = ["--method.name", "cam", "--method.backbone", "mobilenetv2_035", "--method.weights", weights]
        message = error_of(capsys, "train", "--data.root", broken, *argv, "--out", tmp_path / "out")
        assert "expected the tensors of 'mobilenetv2_035'" in message
        assert str(weights) in message
        assert not (tmp_path / "out").exists()

    def test_full_disk_in_a_pass(self, capsys, broken, weights, tmp_path, limit_file_size):
        with limit_file_size(1500):  # enough for pass.json, not for CAMs of full size
            message = self.make_cam(capsys, broken, weights, tmp_path / "out", "--stride", "1")
        assert re.fullmatch(r".*/out/train_000\d\.npz could not be written: .*; free space or choose .*", message)
        assert not (tmp_path / "out").exists()

    def test_full_disk_in_training(self, capsys, broken, tmp_path, limit_file_size):
        with limit_file_size(100_000):
            message = self.train(capsys, broken, tmp_path / "out")
        assert re.fullmatch(r".*/out/last\.ckpt could not be written: .*; free space or choose .*", message)

    def test_output_of_another_configuration(self, capsys, broken, weights, tmp_path):
        argv = ["make-cam", "--data.root", broken, "--weights", weights, "--out", tmp_path / "out"]
        assert main([str(word) for word in argv]) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path}/out: 2 of 2 images written in ")
        assert "another configuration (stride: 4 -> 2)" in error_of(capsys, *argv, "--stride", "2")


@pytest.fixture
def limit_file_size():
    """A disk on which no file can grow beyond some bytes."""
    from contextlib import contextmanager

    @contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def test_whole_chain_on_the_command_line(capsys, root, tmp_path, monkeypatch):
    """Tags to scored masks, each pass finding the classes in the folder before it."""
    settings = {**dataclasses.asdict(dataclasses.replace(TRAINER, epochs=1)), "resize_long": [40, 56]}
    (tmp_path / "train.yaml").write_text(json.dumps({"method": METHOD, "trainer": settings}))
    deeplab = {"name": "deeplab", "backbone": "resnet10t", "head_channels": 16, "rates": [1, 2]}
    (tmp_path / "segment.yaml").write_text(json.dumps({"method": deeplab, "trainer": settings}))
    data, val = ["--data.root", root], ["--data.root", root, "--data.split", "val"]
    out = {name: tmp_path / name for name in ("train", "cam", "refine", "label", "segment", "masks")}
    network, segmenter = out["train"] / "weights.safetensors", out["segment"] / "weights.safetensors"
    recipes = {name: ["--config", tmp_path / f"{name}.yaml"] for name in ("train", "segment")}
    crf = ["--background", "0.3", "--crf.iterations", "2"]
    chain = [
        ["train", *recipes["train"], *data, "--out", out["train"]],
        ["make-cam", *data, "--weights", network, "--scales", "[1.0,0.5]", "--out", out["cam"]],
        ["refine", *data, "--cams", out["cam"], *crf, "--out", out["refine"]],
        ["label", "--cams", out["refine"], "--out", out["label"]],
        ["segment", *recipes["segment"], *data, "--labels", out["label"], "--out", out["segment"]],
        ["segment", *val, "--predict", segmenter, "--out", out["masks"]],
        ["evaluate", *val, "--predictions", out["masks"]],
    ]
    for argv in chain:
        assert main([str(word) for word in argv]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == str(network)
    assert "over 4 images" in printed
    scores = json.loads((tmp_path / "masks" / "scores.json").read_text())
    assert scores["classes"] == ["background", "fox", "lion", "sheep", "goat", "elephant", "mouse"]
    monkeypatch.setattr(make_cam_module, "image_cams", None)  # nothing is computed a second time
    for argv in chain[:-1]:
        assert main([str(word) for word in argv]) == 0
    assert capsys.readouterr().out.count("written (") == 4
