"""Kills pseudo-label at random moments, again and again. `killed_run.py VOC WEIGHTS OUT KILLS`.

This process imports everything once and forks, so that a run starts in no time and most kills hit work. Makes
`OUT/whole` without a kill, and `OUT/killed-<n>`, each killed until it is finished. Fails where a finished shard was
written again. The last line of its output is JSON: `kills`, and how many of them hit a run that was not finished.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastcam.pipelines.pseudo_label import pseudo_label


def start(root: Path, weights: Path, out: Path) -> int:
    """Runs in a fork; its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run = {"scales": (1.0,), "threshold": 0.4, "crf": None, "device": "cpu", "shard_size": 2, "workers": 2}
    outputs = ("png", "webdataset", "coco")
    pseudo_label(root / "JPEGImages", weights, out, root / "image_labels.csv", outputs=outputs, cams=True, **run)
    os._exit(0)


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files of all shards that count, and of their images' masks."""
    marks = {}
    for path in (out / "shards").glob("*.json") if (out / "shards").is_dir() else ():
        if path.name[0] != ".":
            for file in (path, path.with_suffix(".tar"), out / "catalogue" / f"{path.stem}.parquet"):
                marks[file.name] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return marks


def main(root: Path, weights: Path, out: Path, wanted: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    begin = time.perf_counter()
    assert os.waitpid(start(root, weights, out / "whole"), 0)[1] == 0
    whole = time.perf_counter() - begin
    kills = inside = number = 0
    while kills < wanted:
        number += 1
        folder, status = out / f"killed-{number:03d}", -1
        while status != 0:
            before = finished(folder)
            pid = start(root, weights, folder)
            if kills < wanted:
                time.sleep(draw.uniform(0, whole))
                os.kill(pid, signal.SIGKILL)
                kills += 1
            status = os.waitpid(pid, 0)[1]
            inside += os.WIFSIGNALED(status)
            after = finished(folder)
            assert all(after[name] == mark for name, mark in before.items()), "a finished shard was written again"
    print(json.dumps({"kills": kills, "inside": inside, "runs": number}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
