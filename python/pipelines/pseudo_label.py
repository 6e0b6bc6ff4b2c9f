"""make-cam, refine and label in one go, on anyone's images: a folder on a laptop or millions of them on a cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from fastcam.errors import FastcamError, optional_module
from fastcam.io import load_weights, open_pass
from fastcam.pipelines._engines import Engine, rank_and_world, run_local, run_rank, run_ray
from fastcam.pipelines._parallel import withdraw
from fastcam.pipelines._shards import Work, finished_shards, summarize
from fastcam.pipelines._sources import open_source
from fastcam.pipelines.label import Rule
from fastcam.pipelines.labeler import MAX_PIXELS, Precision, Settings, fingerprint
from fastcam.pipelines.make_cam import SCALES
from fastcam.pipelines.refine import Crf


class LabelResult(NamedTuple):
    """What a call of `pseudo_label` did.

    Attributes:
        out: its output folder.
        shards: all shards of the run; `finished` of them count now, `made` of them by this call.
        finished: see there.
        made: see there.
        images: images of the finished shards.
        errors: those of them without a label; `errors.csv` says why, once all shards are finished.
        written: images of the shards that this call made.
        seconds: wall-clock time of this call.
    """

    out: Path
    shards: int
    finished: int
    made: int
    images: int
    errors: int
    written: int
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.written / self.seconds:.1f} images/s" if self.written else ""
        text = f"{self.out}: {self.images} images in {self.finished} of {self.shards} shards"
        text += f", {self.made} of them now, in {self.seconds:.1f} s{rate}"
        if self.errors:
            where = "errors.csv" if self.finished == self.shards else "the catalogue"
            text += f"; {self.errors} without a label, see {where}"
        return text


def pseudo_label(
    images: Path,
    weights: Path,
    out: Path,
    labels: Path | None = None,
    split: str | None = None,
    scales: tuple[float, ...] = SCALES,
    threshold: float | None = None,
    power: float | None = None,
    high: float | None = None,
    low: float | None = None,
    min_score: float | None = None,
    crf: Crf | None = Crf(),  # noqa: B008 (frozen)
    tag_threshold: float = 0.5,
    outputs: tuple[Literal["png", "webdataset", "coco"], ...] = ("png",),
    cams: bool = False,
    stride: int = 4,
    engine: Engine = "local",
    processes: int = 1,
    shard_size: int = 256,
    batch_pixels: int = 2**20,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    device: str = "auto",
    workers: int = 2,
) -> LabelResult:
    """Labels every image of a folder, a list, a table, VOC's or COCO's layout or tar shards.

    Can be stopped at any time: work is cut into shards, one counts when its file in shards/ exists, and the same
    command goes on with the others. A damaged image fails alone: errors.csv says why. catalogue/ holds a row an image
    (Parquet), with a quality score.

    One rule decides: a threshold, a power, high and low together, or none of them for methods whose CAMs have a
    background of their own (SFC).

    Args:
        images: folder of images; folder in VOC's layout; list or table of paths (.txt, .csv, .json, .jsonl, .parquet);
            tar shards: one, a folder of them, or a pattern such as 'shards/*.tar'.
        weights: weights.safetensors of a finished train pass.
        out: output folder.
        labels: tags of every image (.csv, .json, .jsonl, .parquet, .npy), COCO's annotations, or mask or xml of VOC's
            layout; without them the classifier chooses the classes.
        split: a list of VOC's layout, such as train.
        scales: factors of the image's size.
        threshold: constant score of the background.
        power: score of the background is (1 - largest CAM)^power.
        high: with low: foreground is what beats this constant.
        low: background is what does not even beat this constant; pixels between the two become 255.
        min_score: pixels whose best score is lower become 255.
        crf: the CRF; null leaves the CAMs as they are.
        tag_threshold: smallest probability of a class, without labels.
        outputs: any of png (a palette PNG an image: 0 background, class k + 1, 255 ignored), webdataset (a tar a
            shard), coco (coco.json, at the end).
        cams: keep the CAMs of the present classes, float16, in cams/ or in the tars.
        stride: pixels between two stored values of a map.
        engine: local, processes on this machine; torchrun, one process a rank, also under SLURM; ray, actors on one
            machine or a cluster.
        processes: of engine local, each with a GPU where there are some; actors of engine ray.
        shard_size: images in a shard, where the input is not cut into shards already; what a kill costs at most.
        batch_pixels: pixels that go through the network together, of images of one size; more for GPUs.
        max_pixels: larger images are refused.
        precision: of the network; bfloat16 is several times as fast where the processor has instructions for it, and
            moves labels near the threshold.
        device: auto, cpu or cuda.
        workers: threads of each process that read, and as many that refine and write.
    """
    rule = Rule(threshold, power, high, low, min_score)
    start = time.perf_counter()
    if processes < 1 or not outputs:
        raise FastcamError(f"processes is {processes} and outputs {list(outputs)}, expected at least one of each")
    optional_module("pyarrow.parquet", "the catalogue of pseudo-label", "scale")
    classes = load_weights(weights)[1].get("classes", [])
    source = open_source(images, labels, split, classes, shard_size)
    rle = "coco" in outputs
    settings = Settings(
        scales, rule, crf, tag_threshold, cams, stride, rle, source.orient, max_pixels, batch_pixels, precision
    )
    record = settings.record(weights)
    tagged = "given" if labels is not None else "as far as the input has them"
    work = Work(source, out, weights, settings, tuple(outputs), workers)
    about = {"outputs": sorted(outputs), "tags": tagged, "input": source.record(), "classes": classes}
    open_pass(out, {"pass": "pseudo-label", **record, **about})
    if cams and "png" in outputs:
        open_pass(out / "cams", {"pass": "make-cam", "pseudo-label": fingerprint(record), "classes": classes})
    names = source.shards
    before = finished_shards(out)
    todo = [index for index, name in enumerate(names) if name not in before]
    made = []
    try:
        with _Progress(work, before, engine) as progress:
            for statistics in _run(engine, work, todo, processes, device, progress.image):
                made.append(statistics)
                progress.shard(statistics)
    except BaseException:
        if engine != "torchrun" and all(path.name == "pass.json" for path in out.rglob("*") if path.is_file()):
            for folder in (out / "cams", out):  # nothing was made: they are free for other settings
                withdraw(folder)
        raise
    after = {name: shard for name, shard in finished_shards(out).items() if name in set(names)}
    if len(after) == len(names):
        summarize(work, list(classes))
    return LabelResult(
        out,
        len(names),
        len(after),
        len(made),
        sum(shard["images"] for shard in after.values()),
        sum(shard["errors"] for shard in after.values()),
        sum(shard["images"] for shard in made),
        time.perf_counter() - start,
    )


def _run(engine: Engine, work: Work, todo: list[int], processes: int, device: str, tick: Any) -> Any:
    if not todo:
        return iter(())
    if engine == "torchrun":
        return run_rank(work, todo, device, tick)
    if engine == "ray":
        return run_ray(work, todo, processes, device)
    return run_local(work, todo, min(processes, len(todo)), device, tick)


class _Progress:
    """A bar: images, images a second, time left, and the share of each stage in the work of all threads."""

    def __init__(self, work: Work, before: dict[str, dict[str, Any]], engine: Engine) -> None:
        rank, world, _ = rank_and_world() if engine == "torchrun" else (0, 1, 0)
        self.shards, self.done = len(work.source.shards), len(before)
        self.known = work.source.count is not None
        self.stages: dict[str, float] = {}
        self.ticked = 0
        done = sum(shard["images"] for shard in before.values())
        self.images = done
        name = "pseudo-label" if world == 1 else f"pseudo-label, rank {rank} of {world}"
        self.bar = tqdm(desc=name, unit="image", initial=done, total=work.source.count, disable=None)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def image(self) -> None:
        """An image of this process is done."""
        self.ticked += 1
        self.bar.update()

    def shard(self, statistics: dict[str, Any]) -> None:
        """A shard is done, here or in another process."""
        self.done += 1
        self.images += statistics["images"]
        self.bar.update(statistics["images"] - self.ticked)
        self.ticked = 0
        if not self.known:  # tars are counted when they are read: the rest as large as those so far
            self.bar.total = round(self.images / self.done * self.shards)
        for stage, seconds in statistics["stages"].items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        total = sum(self.stages.values()) or 1.0
        shares = ", ".join(f"{stage} {100 * seconds / total:.0f} %" for stage, seconds in self.stages.items())
        self.bar.set_postfix_str(f"shard {self.done}/{self.shards}: {shares}")
