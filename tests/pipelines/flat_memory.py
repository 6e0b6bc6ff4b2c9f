"""Labels many small drawn images and watches the memory: `flat_memory.py OUT [IMAGES]` (50,000 by default).

Prints the resident memory after every tenth of the images, and fails where the last tenth needs over 5 % more than the
second one. The images lie in tar shards of 500, some of them damaged.
"""

import io
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastcam.io import save_weights
from fastcam.methods import create_method
from fastcam.pipelines import pseudo_label as command
from fastcam.pipelines._shards import finished_shards

SHARD = 500


def draw_shard(path: Path, number: int) -> None:
    """A tar shard of images of three sizes; every 50th is cut off."""
    draw = np.random.default_rng(number)
    with tarfile.open(path, "w") as tar:
        for i in range(SHARD):
            buffer = io.BytesIO()
            height, width = ((24, 32), (32, 24), (28, 28))[i % 3]
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "jpeg")
            content = buffer.getvalue()[: 200 if i % 50 == 7 else None]
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def resident() -> float:
    """Resident memory of this process in MB."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def main(out: Path, images: int = 50_000) -> None:
    torch.manual_seed(0)
    shards = out / "shards"
    shards.mkdir(parents=True)
    for number in range(-(-images // SHARD)):
        draw_shard(shards / f"{number:05d}.tar", number)
    method = create_method("cam", num_classes=6, backbone="test_resnet")
    about = {"method": "cam", "num_classes": 6, "classes": list("abcdef"), "backbone": "test_resnet"}
    save_weights(out / "weights.safetensors", method.state_dict(), {**about, "config": {"backbone": "test_resnet"}})
    marks: list[float] = []
    original = command._Progress.shard

    def watched(self: object, statistics: dict) -> None:
        original(self, statistics)  # type: ignore[arg-type]
        marks.append(resident())

    command._Progress.shard = watched  # type: ignore[method-assign]
    start = time.perf_counter()
    run = {"scales": (1.0,), "threshold": 0.4, "crf": None, "device": "cpu", "outputs": ("webdataset",), "cams": True}
    result = command.pseudo_label(shards, out / "weights.safetensors", out / "run", **run)
    tenths = [marks[round((i + 1) * len(marks) / 10) - 1] for i in range(10)]
    print(result, f"{result.images / (time.perf_counter() - start):.0f} images/s", sep="\n")
    print("resident MB after every tenth:", " ".join(f"{mark:.0f}" for mark in tenths))
    assert result.errors == sum(s["images"] for s in finished_shards(out / "run").values()) // 50
    assert tenths[-1] <= 1.05 * tenths[1], "memory grows"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:3]))
