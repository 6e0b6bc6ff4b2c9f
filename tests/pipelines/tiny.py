"""What the tests of pipelines share besides fixtures."""

from pathlib import Path

from fastcam.data import PROCEDURAL_CLASSES
from fastcam.pipelines._settings import TrainerConfig

CLASSES = list(PROCEDURAL_CLASSES)
METHOD = {"name": "cam", "backbone": "resnet10t", "lr": 0.01}
TRAINER = TrainerConfig(
    epochs=2, batch_size=4, crop=48, resize_long=(40, 56), workers=0, log_every=1, accelerator="cpu"
)


def files(folder: Path) -> set[str]:
    """Names of all files below a folder, hidden ones included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
