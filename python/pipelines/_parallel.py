"""Threads that read and write around one that computes, and the frame of all passes over images."""

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from fastcam.errors import FastcamError
from fastcam.io import atomic_write, finished_ids

T = TypeVar("T")
R = TypeVar("R")


class PassResult(NamedTuple):
    """What a pass over images did.

    Attributes:
        out: its output folder.
        images: images whose output now stands there.
        written: those of them that this call wrote; the rest were there before.
        seconds: wall-clock time of this call.
    """

    out: Path
    images: int
    written: int
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.written / self.seconds:.1f} images/s" if self.written else ""
        skipped = f" ({self.images - self.written} were finished before)" if self.written < self.images else ""
        return f"{self.out}: {self.written} of {self.images} images written{skipped} in {self.seconds:.1f} s{rate}"


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map(function, items)` with calls running ahead in threads; results come in order.

    Items are drawn in the calling thread, so calls of this function nest: reading ahead, computing in one thread,
    writing behind. Decoding, resizing, compression and the native ops release Python's lock, which is what makes
    threads enough.

    Args:
        function: called once an item; an exception of it is raised here, in order.
        items: any iterable; at most `2 * workers` of its items are under way at once, so memory stays flat.
        workers: threads; 0 computes in the calling thread.
    """
    if workers <= 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def run_pass(
    name: str, out: Path, suffix: str, ids: list[str], work: Callable[[Iterable[str]], Iterator[Any]]
) -> PassResult:
    """Runs a pass over the images that have no file `<id><suffix>` below `out` yet, with a progress bar.

    The time and the number of images are added up over all calls in `times.json` of the folder.

    Args:
        name: shown beside the bar.
        out: output folder, opened with `fastcam.io.open_pass`.
        suffix: of the files that `work` writes.
        ids: all images of the pass.
        work: takes the ids still to do and yields once for each file written.

    Raises:
        FastcamError: there are no images.
    """
    if not ids:
        raise FastcamError(f"{name}: there are no images to work on; check the data set's folder and list")
    done = finished_ids(out, suffix)
    todo = [image_id for image_id in ids if image_id not in done]
    start, written = time.perf_counter(), 0
    bar = {"desc": name, "unit": "image", "initial": len(ids) - len(todo), "total": len(ids), "disable": None}
    try:
        for _ in tqdm(work(todo), **bar):
            written += 1
    except BaseException:
        if not finished_ids(out, suffix):
            withdraw(out)
        raise
    finally:
        if written:
            add_time(out, written, time.perf_counter() - start)
    return PassResult(out, len(ids), written, time.perf_counter() - start)


def withdraw(out: Path) -> None:
    """Takes back the opening of a pass that came to nothing, so that the folder is free for another configuration."""
    (out / "pass.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it was there before, with something else in it
        out.rmdir()


def add_time(out: Path, count: int, seconds: float) -> None:
    """Adds to the `{"count", "seconds"}` of `times.json`, which the report shows."""
    path = out / "times.json"
    before = json.loads(path.read_text()) if path.is_file() else {"count": 0, "seconds": 0.0}
    with atomic_write(path) as temporary:
        total = {"count": before["count"] + count, "seconds": round(before["seconds"] + seconds, 3)}
        temporary.write_text(json.dumps(total) + "\n")
