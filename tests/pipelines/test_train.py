import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipelines.tiny import CLASSES, METHOD, TRAINER, files
from torch import nn

from fastcam.errors import FastcamError
from fastcam.io import load_weights
from fastcam.pipelines import _fit
from fastcam.pipelines import train as train_module
from fastcam.pipelines._fit import Batches, fit
from fastcam.pipelines.train import train

SFC = {
    "name": "sfc",
    "backbone": "resnet10t",
    "lr": 0.01,
    "side_channels": [4, 4, 4, 4],
    "correlation_channels": 8,
    "bank_draws": 2,
}
CTI = {
    "name": "cti",
    "backbone": "deit_tiny_patch16_224",
    "image_size": 48,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "infusion_block": 0,
    "cam_blocks": 2,
    "memory_size": 1,
}
MEVT = {
    "name": "mevt",
    "backbone": "test_convnext+context16",
    "view_clusters": 4,
    "region_clusters": 4,
    "prototypes": 4,
    "head_hidden": 8,
    "bottleneck": 4,
    "num_locals": 1,
    "local_size": 32,
    "warmup_epochs": 0,
    "epochs": 2,
}


def joined(lists):
    return [item for part in lists for item in part]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_in_step(monkeypatch, step: int) -> None:
    original = _fit.StepModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == step:
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(_fit.StepModule, "training_step", training_step)


def assert_same_weights(a: Path, b: Path) -> None:
    (first, about_first), (second, about_second) = load_weights(a), load_weights(b)
    assert about_first == about_second
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("method", [METHOD, SFC, CTI, MEVT], ids=["cam", "sfc", "cti", "mevt"])
def test_killed_in_mid_epoch_and_run_again_ends_in_the_same_bits(method, data, tmp_path, monkeypatch):
    config = dataclasses.replace(TRAINER, checkpoint_every=2)  # 3 steps an epoch: step 4 is the middle of the second
    whole = train(data, method, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_in_step(patch, 5)
        with pytest.raises(Killed):
            train(data, method, config, tmp_path / "killed")
    killed = tmp_path / "killed"
    assert torch.load(killed / "last.ckpt", weights_only=True)["step"] == 4
    assert not (killed / "weights.safetensors").exists()
    assert_same_weights(whole, train(data, method, config, killed))
    assert rows(whole.parent) == rows(killed)
    assert [row["step"] for row in rows(killed)] == ["1", "2", "3", "4", "5", "6"]


def test_number_of_workers_makes_no_difference(data, tmp_path):
    here = train(data, METHOD, TRAINER, tmp_path / "here")
    workers = train(data, METHOD, dataclasses.replace(TRAINER, workers=2), tmp_path / "workers")
    assert_same_weights(here, workers)


def test_another_seed_trains_another_network(data, trained, tmp_path):
    other = train(data, METHOD, dataclasses.replace(TRAINER, epochs=1, seed=1), tmp_path)
    key = "classifier.weight"
    assert not torch.equal(load_weights(other)[0][key], load_weights(trained)[0][key])


def test_rest_of_the_batches_after_a_step_is_the_end_of_all_batches():
    everything = list(Batches(10, 3, 4, seed=7))
    assert len(everything) == 12
    for start in (0, 1, 3, 7, 12):
        assert list(Batches(10, 3, 4, seed=7, start=start)) == everything[start:]
    for epoch in range(4):  # every epoch: other order, no image twice
        keys = joined(everything[3 * epoch : 3 * epoch + 3])
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 9
    assert [key[1] for key in joined(everything[:3])] != [key[1] for key in joined(everything[3:6])]


def test_epochs_of_a_given_number_of_steps_go_through_whole_passes():
    steps = list(Batches(10, 3, 2, seed=7, steps_per_epoch=4))
    assert steps == list(Batches(10, 3, 4, seed=7))[:8]
    assert list(Batches(10, 3, 2, seed=7, start=5, steps_per_epoch=4)) == steps[5:]


def test_resumed_training_reads_only_the_images_that_are_left(tmp_path, monkeypatch):
    read = []

    class Counting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    config = dataclasses.replace(TRAINER, epochs=2, batch_size=2, checkpoint_every=1)
    with monkeypatch.context() as patch:
        kill_in_step(patch, 1)
        with pytest.raises(Killed):
            fit(TwoOptimisers(), Counting(ONES), ("x",), config, tmp_path, {})
    read.clear()
    fit(TwoOptimisers(), Counting(ONES), ("x",), config, tmp_path, {})
    assert read == [index for _, index in joined(Batches(4, 2, 2, config.seed, start=1))]


def test_processes_share_every_batch_without_overlap():
    whole = list(Batches(9, 4, 2, seed=0))
    shares = [list(Batches(9, 4, 2, seed=0, rank=rank, world=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(joined(parts)) == sorted(batch)
        assert [len(part) for part in parts] == [2, 2]


def test_finished_training_is_left_alone(data, trained, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was built again")

    monkeypatch.setattr(train_module, "create_method", refuse)
    before = {name: (trained.parent / name).stat().st_mtime_ns for name in files(trained.parent)}
    assert train(data, METHOD, dataclasses.replace(TRAINER, epochs=1), trained.parent) == trained
    assert before == {name: (trained.parent / name).stat().st_mtime_ns for name in files(trained.parent)}


def test_folder_of_other_settings_is_refused(data, trained):
    with pytest.raises(FastcamError, match=r"another configuration \(method.lr: 0.01 -> 0.02\)"):
        train(data, {**METHOD, "lr": 0.02}, dataclasses.replace(TRAINER, epochs=1), trained.parent)


def test_what_does_not_change_the_weights_may_change(data, trained):
    config = dataclasses.replace(TRAINER, epochs=1, workers=3, devices=2, log_every=7, checkpoint_every=1)
    assert train(data, METHOD, config, trained.parent) == trained


def test_leaves_weights_checkpoint_metrics_and_tensorboard(trained):
    state, about = load_weights(trained)
    assert about["method"] == "cam"
    assert about["classes"] == CLASSES
    assert about["backbone"] == "resnet10t"
    assert state["classifier.weight"].shape[0] == len(CLASSES)
    left = files(trained.parent)
    assert {"weights.safetensors", "last.ckpt", "metrics.csv", "pass.json", "times.json"} <= left
    assert any(name.startswith("tensorboard/events.out") for name in left)
    row = rows(trained.parent)[0]
    assert float(row["loss"]) > 0
    assert float(row["lr"]) == 0.01


def test_infinite_loss_stops_with_its_step(data, tmp_path):
    with pytest.raises(FastcamError, match=r"the loss of step [2-6] is not finite; lower the learning rate"):
        train(data, {**METHOD, "lr": 1e30}, TRAINER, tmp_path / "out")
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_bfloat16_trains(data, tmp_path):
    path = train(data, METHOD, dataclasses.replace(TRAINER, epochs=1, precision="bf16-mixed"), tmp_path)
    assert all(value.isfinite().all() for value in load_weights(path)[0].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 13}, "trainer.batch_size is 13, but there are 12 images"),
        ({"epochs": 0}, "trainer.epochs is 0"),
        ({"steps_per_epoch": 0}, "trainer.steps_per_epoch is 0, expected at least 1, or null"),
        ({"devices": 3}, "batch_size is 4, expected a multiple of trainer.devices, 3"),
        ({"strategy": "dpp"}, "trainer.accelerator, devices, strategy or precision do not fit this machine"),
    ],
)
def test_setting_that_cannot_work_is_refused_before_anything_is_written(change, message, data, tmp_path):
    with pytest.raises(FastcamError, match=message):
        train(data, METHOD, dataclasses.replace(TRAINER, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_is_named(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_in_step(patch, 4)
        with pytest.raises(Killed):
            train(data, METHOD, TRAINER, tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(
        FastcamError, match=r"checkpoint .*last.ckpt does not load: .*remove it to train from the start"
    ):
        train(data, METHOD, TRAINER, tmp_path)


@dataclasses.dataclass(frozen=True)
class TwoConfig:
    grad_clip: float | None = None


class TwoOptimisers(nn.Module):
    """Two numbers, each with an optimiser of its own; the loss is a * x + 10 * b * x."""

    name = "two"
    kind = "cam"

    def __init__(self, config: TwoConfig = TwoConfig()) -> None:
        super().__init__()
        self.config = config
        self.a = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(1.0))

    def optimizers(self, total_steps):
        half = torch.optim.SGD([self.b], lr=0.01)
        decay = torch.optim.lr_scheduler.LambdaLR(half, lambda step: 0.5**step)
        return [(torch.optim.SGD([self.a], lr=0.1), None), (half, decay)]

    def training_step(self, batch):
        x = batch["x"].mean()
        return {"loss": self.a * x + 10 * self.b * x}

    def export_state_dict(self):
        return self.state_dict()


ONES = [{"x": torch.ones(())} for _ in range(4)]


def test_several_optimisers_all_step_with_their_schedulers(tmp_path):
    method = TwoOptimisers()
    fit(method, ONES, ("x",), dataclasses.replace(TRAINER, epochs=1, batch_size=2), tmp_path, {})
    assert method.a.item() == pytest.approx(1 - 2 * 0.1)
    assert method.b.item() == pytest.approx(1 - 0.01 * 10 - 0.005 * 10)


def test_several_optimisers_resume_exactly(tmp_path, monkeypatch):
    config = dataclasses.replace(TRAINER, epochs=3, batch_size=2, checkpoint_every=1)
    whole = fit(TwoOptimisers(), ONES, ("x",), config, tmp_path / "whole", {})
    with monkeypatch.context() as patch:
        kill_in_step(patch, 3)
        with pytest.raises(Killed):
            fit(TwoOptimisers(), ONES, ("x",), config, tmp_path / "killed", {})
    assert_same_weights(whole, fit(TwoOptimisers(), ONES, ("x",), config, tmp_path / "killed", {}))


class InTurn(TwoOptimisers):
    """The gradient of b is 10 a of the step before it: a has stepped already."""

    def training_phases(self, batch):
        x = batch["x"].mean()
        yield 0, {"loss": (self.a + self.b) * x}  # the gradient of b must not reach its optimiser
        yield 1, {"loss": 10 * self.a.detach() * self.b * x, "seen": self.a.detach().clone()}


def test_optimisers_in_turn_see_the_steps_before_theirs(tmp_path):
    method = InTurn()
    fit(method, ONES, ("x",), dataclasses.replace(TRAINER, epochs=1, batch_size=2, log_every=1), tmp_path, {})
    assert method.a.item() == pytest.approx(1 - 2 * 0.1)
    assert method.b.item() == pytest.approx(1 - 0.01 * 9 - 0.005 * 8)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["loss"]) == pytest.approx(2 + 10 * 0.9)
    assert float(second["seen"]) == pytest.approx(0.8)


def test_optimisers_in_turn_are_refused_on_two_devices(tmp_path):
    config = dataclasses.replace(TRAINER, batch_size=2, devices=2)
    with pytest.raises(FastcamError, match="two steps its optimisers in turn, which DDP cannot do; use 1"):
        fit(InTurn(), ONES, ("x",), config, tmp_path, {})


def test_gradient_is_clipped_at_the_norm_of_the_method(tmp_path):
    method = TwoOptimisers(TwoConfig(grad_clip=0.5))
    fit(method, ONES, ("x",), dataclasses.replace(TRAINER, epochs=1, batch_size=4), tmp_path, {})
    assert method.a.item() == pytest.approx(1 - 0.1 * 0.5, rel=1e-4)
    assert method.b.item() == pytest.approx(1 - 0.01 * 0.5, rel=1e-4)


def test_float16_with_several_optimisers_is_refused(tmp_path):
    config = dataclasses.replace(TRAINER, batch_size=2, precision="16-mixed")
    with pytest.raises(FastcamError, match="two has several optimisers; use bf16-mixed"):
        fit(TwoOptimisers(), ONES, ("x",), config, tmp_path, {})


def test_two_processes_train_what_one_does(root, data, trained, tmp_path):
    """Mean gradients of half batches are the gradient of the batch: batch norm is frozen, items are the same."""
    settings = {**dataclasses.asdict(TRAINER), "epochs": 1, "devices": 2, "resize_long": list(TRAINER.resize_long)}
    recipe = {"data": {"root": str(root), "tags": data.tags}, "method": METHOD, "trainer": settings}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "fastcam.pipelines", "train", "--config", str(tmp_path / "recipe.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "two" / "weights.safetensors")]
    one, two = load_weights(trained)[0], load_weights(tmp_path / "two" / "weights.safetensors")[0]
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
