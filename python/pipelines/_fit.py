"""Training as a list of steps: Lightning runs them on the machine, and one integer says how far it got.

Step s sees batch s of `Batches`, which depends on the seed and s alone, and draws from a random state that depends on
nothing else either. So a run that is killed and started again ends in the same bits as one that is not.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import logging
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from fastcam.data import GroupSampler
from fastcam.errors import FastcamError
from fastcam.io import atomic_write, open_pass, save_weights
from fastcam.pipelines._parallel import add_time, withdraw
from fastcam.pipelines._settings import WEIGHTS, TrainerConfig

CHECKPOINT, METRICS = "last.ckpt", "metrics.csv"
_INIT, _ORDER, _ITEM, _STEP, _GROUP = range(5)  # what a random state is for; no two may draw the same numbers


def _seed_all(seed: int) -> None:
    """:func:`torch.manual_seed`, which formats a traceback for every kind of device not in use: 1.3 ms an image."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Batches(Sampler[list[tuple[int, int]]]):
    """The batches of all epochs as lists of (pass, index), from a step on, for one of several processes.

    Every pass is a new permutation; the images left over at its end sit it out. An epoch is a pass, unless
    `steps_per_epoch` counts otherwise. With groups, only the first of every `groups.size` images of a batch comes from
    the permutation, and brings its partners in the place of the others.

    Args:
        images: number of images.
        batch_size: images a step, over all processes; a multiple of `world`.
        epochs: number of epochs.
        seed: of the order.
        start: first step.
        rank: the process that asks.
        world: number of processes.
        groups: partners of an image; `batch_size / world` is a multiple of its size.
        steps_per_epoch: what epochs count, or `None` for passes.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        groups: GroupSampler | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world
        self.groups = groups
        self.per_pass = images // batch_size
        self.per_epoch = steps_per_epoch or self.per_pass
        self.total = self.per_epoch * epochs

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.start, self.total):
            turn, batch = divmod(step, self.per_pass)
            if not order or batch == 0:
                generator = torch.Generator().manual_seed(_mix(self.seed, _ORDER, turn))
                order = torch.randperm(self.images, generator=generator).tolist()
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.groups is not None:
                generator = torch.Generator().manual_seed(_mix(self.seed, _GROUP, turn, batch))
                firsts = chosen[:: self.groups.size]
                chosen = [index for first in firsts for index in self.groups(first, generator)]
            share = self.batch_size // self.world
            yield [(turn, index) for index in chosen[self.rank * share : (self.rank + 1) * share]]


class Seeded(Dataset[Any]):
    """Items by (pass, index) whose random draws depend on the seed and these two alone.

    The pass comes with every index, so that worker processes may run ahead into the next one.

    Args:
        dataset: items by index; its transforms draw from torch's global generator, which is put back afterwards.
        seed: of the training.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(self.seed, _ITEM, *key))
            return self.dataset[key[1]]


@contextlib.contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Makes the random initial weights of a network that is built inside a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_mix(seed, _INIT))
        yield


class StepModule(LightningModule):
    """A method under Lightning, which steps a single optimiser; several are stepped here.

    They all step after the backward pass of one loss, or, where the method has `training_phases`, one after the other,
    each on a loss that is computed when those before it have stepped (adversarial networks).

    Args:
        method: the network with its recipe.
        config: the settings.
        total: number of training steps.
    """

    def __init__(self, method: Any, config: TrainerConfig, total: int) -> None:
        super().__init__()
        self.method = method.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast
        self.settings = config
        self.total = total
        self.step = 0
        self.pairs = method.optimizers(total)
        self.phased = hasattr(method, "training_phases")
        self.automatic_optimization = len(self.pairs) == 1 and not self.phased
        self.first_bad: Tensor
        self.scalars: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self.register_buffer("first_bad", torch.tensor(total), persistent=False)

    @property
    def grad_clip(self) -> float | None:
        """Largest norm of the gradient, from the method's recipe."""
        return getattr(self.method.config, "grad_clip", None)

    def configure_optimizers(self) -> Any:
        """All optimisers, with schedulers that step once a training step."""
        optimizers = [optimizer for optimizer, _ in self.pairs]
        return optimizers, [{"scheduler": s, "interval": "step"} for _, s in self.pairs if s is not None]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes all that a step draws a function of seed, step and process."""
        _seed_all(_mix(self.settings.seed, _STEP, self.step, self.trainer.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The method's step. Remembers the first step whose loss is not finite, without waiting for the device."""
        batch = tree_map(_channels_last, batch)
        scalars = self._step_in_turn(batch) if self.phased else self.method.training_step(batch)
        loss = scalars["loss"]
        self.scalars = {name: value.detach() for name, value in scalars.items()}
        self.rates = {f"lr{i or ''}": opt.param_groups[0]["lr"] for i, (opt, _) in enumerate(self.pairs)}
        self.first_bad.masked_fill_(~loss.detach().isfinite() & (self.first_bad == self.total), self.step)
        if not self.automatic_optimization:
            if not self.phased:
                self._step(loss, self._optimizers())
            schedulers: Any = self.lr_schedulers() or []
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()
        return loss

    def _optimizers(self) -> list[Any]:
        optimizers: Any = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _step(self, loss: Tensor, optimizers: list[Any]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            if self.grad_clip is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.grad_clip, gradient_clip_algorithm="norm")
            optimizer.step()

    def _step_in_turn(self, batch: Any) -> dict[str, Tensor]:
        optimizers = self._optimizers()
        scalars: dict[str, Tensor] = {"loss": self.first_bad.new_zeros((), dtype=torch.float32)}
        for index, part in self.method.training_phases(batch):
            self._step(part["loss"], [optimizers[index]])
            total = scalars["loss"] + part["loss"].detach()
            scalars |= {**part, "loss": total}
        return scalars

    def checkpoint(self) -> dict[str, Any]:
        """All that the next step depends on."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.pairs],
            "schedulers": [scheduler and scheduler.state_dict() for _, scheduler in self.pairs],
            "scaler": scaler and scaler.state_dict(),
        }

    def restore(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Continues where `checkpoint` was taken. Comes before `trainer.fit`, which moves everything to the device."""
        self.step = checkpoint["step"]
        self.method.load_state_dict(checkpoint["method"])
        for (optimizer, scheduler), state, schedule in zip(
            self.pairs, checkpoint["optimizers"], checkpoint["schedulers"], strict=True
        ):
            optimizer.load_state_dict(state)
            if scheduler is not None:
                scheduler.load_state_dict(schedule)
        if checkpoint["scaler"] is not None:
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
            scaler.load_state_dict(checkpoint["scaler"])


class Journal(Callback):
    """Progress bar, `metrics.csv`, TensorBoard, checkpoints, and the end of a run whose loss is not finite.

    Args:
        module: what is trained.
        out: folder of the run.
        per_epoch: steps an epoch.
    """

    def __init__(self, module: StepModule, out: Path, per_epoch: int) -> None:
        self.module = module
        self.out = out
        self.per_epoch = per_epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar at the first step of this process and cuts lines that a killed run wrote beyond it."""
        module = self.module
        self.saved, self.saved_at = module.step, time.perf_counter()
        if trainer.is_global_zero:
            bar = {"desc": module.method.name, "unit": "step", "initial": module.step, "total": module.total}
            self.bar = tqdm(**bar, disable=None)
            self.rows = [row for row in _read_rows(self.out / METRICS) if int(row["step"]) <= module.step]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Counts the step; writes what is due."""
        module = self.module
        module.step += 1
        config, step = module.settings, module.step
        save_due = step % self.per_epoch == 0 or (config.checkpoint_every > 0 and step % config.checkpoint_every == 0)
        log_due = step % config.log_every == 0 or step == module.total
        if save_due or log_due:
            if trainer.world_size > 1:  # all processes must stop at the same step
                torch.distributed.all_reduce(module.first_bad, op=torch.distributed.ReduceOp.MIN)
            bad = int(module.first_bad)
            if bad < module.total:
                raise FastcamError(
                    f"the loss of step {bad + 1} is not finite; lower the learning rate or use precision 32 "
                    f"(last.ckpt holds step {self.saved})"
                )
        if not trainer.is_global_zero:
            return
        self.bar.update()
        if log_due:
            self._log(trainer)
        if save_due:
            self._save()

    def _log(self, trainer: Trainer) -> None:
        module = self.module
        scalars = {name: float(value) for name, value in module.scalars.items()}
        epoch = round(module.step / self.per_epoch, 4)
        self.bar.set_postfix(epoch=f"{epoch:.1f}", loss=f"{scalars['loss']:.4g}")
        for logger in trainer.loggers:
            logger.log_metrics({**scalars, **module.rates}, step=module.step)
        self.rows.append({"step": module.step, "epoch": epoch, **scalars, **module.rates})
        with atomic_write(self.out / METRICS) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def _save(self) -> None:
        module = self.module
        data = io.BytesIO()  # torch.save to a file hides why the system refuses to write
        torch.save(module.checkpoint(), data)
        with atomic_write(self.out / CHECKPOINT) as temporary:
            temporary.write_bytes(data.getbuffer())
        now = time.perf_counter()
        add_time(self.out, module.step - self.saved, now - self.saved_at)
        self.saved, self.saved_at = module.step, now

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the bar, also after an error."""
        if hasattr(self, "bar"):
            self.bar.close()


def fit(
    method: Any,
    dataset: Dataset[Any],
    classes: tuple[str, ...],
    config: TrainerConfig,
    out: Path,
    record: Mapping[str, Any],
    finish: Callable[[Any], None] | None = None,
    groups: GroupSampler | None = None,
) -> Path:
    """Trains a method, or continues to, and writes its weights.

    Args:
        method: from `fastcam.methods.create_method`, untrained.
        dataset: items by index, with a random training transform.
        classes: names of the foreground classes, stored with the weights.
        config: the settings.
        out: folder of the run.
        record: all that the weights depend on, for `fastcam.io.open_pass`.
        finish: called with the trained method before its weights are written, in one process.
        groups: partners of an image, for methods that learn from groups of images.

    Returns:
        The weights' path.

    Raises:
        FastcamError: too few images for a batch, a loss that is not finite, a checkpoint that does not load, an image
            that does not.
    """
    images = len(dataset)  # type: ignore[arg-type]
    if images < config.batch_size:
        raise FastcamError(
            f"trainer.batch_size is {config.batch_size}, but there are {images} images; choose at most {images}"
        )
    if config.epochs < 1 or config.batch_size < 1:
        raise FastcamError(f"trainer.epochs is {config.epochs} and batch_size {config.batch_size}, expected at least 1")
    if config.batch_size % config.devices:
        raise FastcamError(
            f"trainer.batch_size is {config.batch_size}, expected a multiple of trainer.devices, {config.devices}"
        )
    if groups is not None and config.batch_size // config.devices % groups.size:
        raise FastcamError(
            f"trainer.batch_size is {config.batch_size}, expected a multiple of {groups.size} images a group for each "
            f"of {config.devices} devices"
        )
    if config.steps_per_epoch is not None and config.steps_per_epoch < 1:
        raise FastcamError(f"trainer.steps_per_epoch is {config.steps_per_epoch}, expected at least 1, or null")
    batches = Batches(
        images, config.batch_size, config.epochs, config.seed, groups=groups, steps_per_epoch=config.steps_per_epoch
    )
    module = StepModule(method, config, batches.total)
    if not module.automatic_optimization and config.precision == "16-mixed":
        raise FastcamError(
            f"trainer.precision 16-mixed scales one loss, but {method.name} has several optimisers; use bf16-mixed"
        )
    if module.phased and config.devices > 1:
        raise FastcamError(
            f"trainer.devices is {config.devices}, but {method.name} steps its optimisers in turn, which DDP cannot "
            "do; use 1"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers, log intervals and modules in eval mode
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        trainer = _trainer(module, config, Journal(module, out, batches.per_epoch), out)
        open_pass(out, record)
        if (out / CHECKPOINT).is_file():
            module.restore(_load_checkpoint(out / CHECKPOINT), trainer)
        if module.step < module.total:
            module.train_dataloader = lambda: _loader(dataset, module, trainer, groups)  # type: ignore[method-assign]
            _run(trainer, module, out)
    if trainer.is_global_zero:
        if finish is not None:
            finish(method)
        config_of = dataclasses.asdict(method.config)
        record = {"method": method.name, "num_classes": len(classes), "classes": list(classes)}
        record |= {"backbone": config_of.get("backbone"), "config": config_of}
        save_weights(out / WEIGHTS, method.export_state_dict(), record)
    return out / WEIGHTS


def _trainer(module: StepModule, config: TrainerConfig, journal: Journal, out: Path) -> Trainer:
    # DDP must look for parameters without a gradient: systems detach stages that they do not freeze.
    many = config.strategy == "auto" and config.devices > 1
    try:
        return Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp_find_unused_parameters_true" if many else config.strategy,
            precision=config.precision,
            max_epochs=1,  # Lightning's epoch is the whole training
            gradient_clip_val=module.grad_clip if module.automatic_optimization else None,
            callbacks=[journal],
            logger=TensorBoardLogger(out, name=None, version="tensorboard"),
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise FastcamError(
            f"trainer.accelerator, devices, strategy or precision do not fit this machine: {reason}"
        ) from None


def _loader(
    dataset: Dataset[Any], module: StepModule, trainer: Trainer, groups: GroupSampler | None
) -> DataLoader[Any]:
    config, rank, world = module.settings, trainer.global_rank, trainer.world_size
    images = len(dataset)  # type: ignore[arg-type]
    settings = images, config.batch_size, config.epochs, config.seed
    return DataLoader(
        Seeded(dataset, config.seed),
        batch_sampler=Batches(*settings, module.step, rank, world, groups, config.steps_per_epoch),
        num_workers=config.workers,
        pin_memory=module.device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws from the random state of the steps
    )


def _run(trainer: Trainer, module: StepModule, out: Path) -> None:
    """`trainer.fit` with our exceptions, taking everything back that came before the first checkpoint if it fails."""
    try:
        trainer.fit(module)
        if module.step < module.total:
            raise KeyboardInterrupt
    except BaseException as error:
        if trainer.is_global_zero and not (out / CHECKPOINT).is_file():
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
            (out / METRICS).unlink(missing_ok=True)
            withdraw(out)
        if isinstance(error, SystemExit):  # Lightning's answer to Ctrl-C, which it ignores from then on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        if isinstance(error, FastcamError):  # from a worker process it comes wrapped in a traceback; ours are one line
            line = str(error).strip().splitlines()[-1]
            raise FastcamError(line.removeprefix("fastcam.errors.FastcamError: ")) from None
        raise


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch readers each have exceptions of their own
        reason = str(error).split("\n", 1)[0]
        raise FastcamError(f"checkpoint {path} does not load: {reason}; remove it to train from the start") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def _mix(*numbers: int) -> int:
    """One seed from several small numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return mixed
