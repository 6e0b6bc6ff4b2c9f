"""Who runs which shard: processes of this machine, ranks of a job, or Ray's actors. They share nothing but files."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

import torch

from fastcam.errors import FastcamError, optional_module
from fastcam.pipelines._shards import Work, run_shard
from fastcam.pipelines.labeler import PseudoLabeler

Engine = Literal["local", "torchrun", "ray"]
Tick = Callable[[], object]


def rank_and_world() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine: torchrun's, else SLURM's, else `(0, 1, 0)`.

    Raises:
        FastcamError: they contradict each other.
    """
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if names[0] in os.environ and names[1] in os.environ:
            try:
                rank, world, local = (int(os.environ.get(name, "0")) for name in names)
            except ValueError:
                shown = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
                raise FastcamError(f"the environment has {shown}, expected whole numbers") from None
            if not 0 <= rank < world:
                raise FastcamError(f"{names[0]} is {rank} and {names[1]} is {world}, expected a rank below the number")
            return rank, world, local
    return 0, 1, 0


def own_device(device: str, place: int) -> str:
    """The GPU of a process among those of its machine, for device auto or cuda."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
    return device


def run_local(work: Work, todo: list[int], processes: int, device: str, tick: Tick) -> Iterator[dict[str, Any]]:
    """Shards in this process, or in several of this machine, each with a share of the threads and of the GPUs."""
    if processes == 1:
        labeler = work.labeler(own_device(device, 0))
        for index in todo:
            yield run_shard(work, labeler, index, tick)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(processes, context, _start, (work, device, threads, counter))
    try:
        for future in as_completed([pool.submit(_one, index) for index in todo]):
            yield future.result()
    except BrokenProcessPool:
        raise FastcamError(
            "a process of this run died, perhaps for lack of memory; run the command again, with fewer processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_state: dict[str, Any] = {}  # of a process that run_local started


def _start(work: Work, device: str, threads: int, counter: Any) -> None:
    torch.set_num_threads(threads)
    with counter.get_lock():
        place, counter.value = counter.value, counter.value + 1
    try:
        _state.update(work=work, labeler=work.labeler(own_device(device, place)))
    except FastcamError as error:  # an exception here would only tell that a process died
        _state["error"] = error


def _one(index: int) -> dict[str, Any]:
    if "error" in _state:
        raise _state["error"]
    return run_shard(_state["work"], _state["labeler"], index)


def run_rank(work: Work, todo: list[int], device: str, tick: Tick) -> Iterator[dict[str, Any]]:
    """The shards of this rank: every world-th one. Ranks do not talk to each other, so none waits for a slow one."""
    rank, world, local = rank_and_world()
    own = [index for index in todo if index % world == rank]
    if own:
        labeler = work.labeler(own_device(device, local))
        for index in own:
            yield run_shard(work, labeler, index, tick)


def run_ray(work: Work, todo: list[int], processes: int, device: str) -> Iterator[dict[str, Any]]:
    """Shards as the items of a Ray Data set, labelled by actors; in a cluster that RAY_ADDRESS names, else here."""
    ray = optional_module("ray", "engine ray", "ray")
    optional_module("ray.data", "engine ray", "ray")
    started = not ray.is_initialized()
    if started and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level="warning")
    elif started:
        ray.init(
            num_cpus=processes + 1,  # Ray Data has tasks of its own beside the actors
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _node_ip_address="127.0.0.1",
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # pseudo-label shows its own
    try:
        gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        shards = ray.data.from_items([{"shard": index} for index in todo], override_num_blocks=len(todo))
        done = shards.map_batches(
            ShardActor,
            fn_constructor_args=(work, device),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=processes),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
        )
        for row in done.iter_rows():
            yield json.loads(row["statistics"])
    finally:
        if started:
            ray.shutdown()


class ShardActor:
    """What a Ray actor holds: a labeler. A batch is numbers of shards in, their statistics out."""

    def __init__(self, work: Work, device: str) -> None:
        self.work = work
        self.labeler: PseudoLabeler = work.labeler(device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Runs the shards of a batch."""
        return {"statistics": [json.dumps(run_shard(self.work, self.labeler, int(i))) for i in batch["shard"]]}
