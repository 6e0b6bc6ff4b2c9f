"""Class names and lists of them."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from fastcam.errors import FastcamError

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 classes of PASCAL VOC in the usual order: class k has label k + 1."""

COCO_CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 thing classes of COCO by increasing category id: class k has label k + 1."""


def load_class_list(spec: str | os.PathLike[str] | Iterable[str]) -> tuple[str, ...]:
    """Class names from a setting.

    Args:
        spec: `"voc"`, `"coco"`, names with commas between (`"cat,dog"`; a single one as `"cat,"`), a text file with a
            name a line, or the names themselves.

    Returns:
        The names in order, without blanks around them.

    Raises:
        FastcamError: no such file, no name, or a name twice.

    Example:
        >>> load_class_list("cat, dog")
        ('cat', 'dog')
    """
    if spec == "voc":
        return VOC_CLASSES
    if spec == "coco":
        return COCO_CLASSES
    if isinstance(spec, str) and "," in spec:
        names: Iterable[str] = spec.split(",")
    elif isinstance(spec, str | os.PathLike):
        try:
            names = Path(spec).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FastcamError(
                f"class list {os.fspath(spec)!r} is no readable text file, expected a file with a name a line, "
                "names with commas between, voc or coco"
            ) from error
    else:
        names = spec
    classes = tuple(name.strip() for name in names if name.strip())
    if not classes:
        raise FastcamError(f"class list {spec!r} names no class")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise FastcamError(f"class list {spec!r} names {', '.join(twice)} more than once; remove one")
    return classes


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: `; nearest is 'cat'`, or nothing where no known name is
    near."""
    match = get_close_matches(name, list(known), n=1)
    return f"; nearest is {match[0]!r}" if match else ""
