"""A data set that draws itself: six animals in VOC layout, for demos and tests without a download.

It is made to show what weak supervision is about. The animals come in pairs that share coat and body (fox and lion,
sheep and goat, elephant and mouse); only a head that is much smaller than the animal tells them apart. One of each
pair is frequent and the other rare, so a classifier learns the shared body for the frequent one: the bias that SFC
calibrates (Zhao et al., AAAI 2024).
"""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fastcam.io import atomic_write, write_label_png

Array = np.ndarray
Colour = tuple[float, float, float] | Array

PROCEDURAL_CLASSES: tuple[str, ...] = ("fox", "lion", "sheep", "goat", "elephant", "mouse")
_FREQUENCY = np.array([0.31, 0.10, 0.24, 0.08, 0.19, 0.08])
_NUMBER_OF_CLASSES = np.array([0.5, 0.37, 0.13])  # images with 1, 2, 3 classes
_SECOND_ANIMAL = 0.2  # chance of another animal of the first class
_LEAST_VISIBLE = 0.5  # of the body and of the head of every animal

_ORANGE, _CREAM, _GREY = (222, 132, 52), (240, 232, 214), (142, 146, 158)
_BLACK, _WHITE, _PINK, _BROWN = (38, 32, 34), (250, 248, 242), (238, 158, 160), (104, 58, 26)


def write_procedural(
    root: str | os.PathLike[str], *, train: int = 240, val: int = 80, seed: int = 0, size: int = 128
) -> None:
    """Writes the data set in VOC layout: images, palette masks with a thin 255 border, lists, `image_labels.csv`,
    `classes.txt`.

    Every image has 1 to 3 classes, drawn from long-tailed frequencies; the first six images of a split begin with one
    class each, so that none is missing. Image `i` of a split depends on `seed`, `i` and `size` only.

    Cost: about 20 ms an image of 128 pixels.

    Args:
        root: the folder to fill; it becomes the `root` of `VOCDataset`.
        train: number of images in the list `train`.
        val: number of images in the list `val`.
        seed: another seed draws other images.
        size: side of the square images, at least 32.

    Raises:
        ValueError: `size` below 32 or a negative number of images.
        FastcamError: a file could not be written.
    """
    if size < 32 or min(train, val) < 0:
        raise ValueError(f"write_procedural: expected size >= 32 and train, val >= 0, got {size}, {train}, {val}")
    root = Path(root)
    rows = []
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        names = [f"{split}_{index:04d}" for index in range(count)]
        for index, name in enumerate(names):
            image, mask = _draw(np.random.default_rng([seed, number, index]), size, index)
            with atomic_write(root / "JPEGImages" / f"{name}.jpg") as temporary:
                Image.fromarray(image).save(temporary, quality=92)
            write_label_png(root / "SegmentationClass" / f"{name}.png", mask)
            present = [int(k + 1 in mask) for k in range(len(PROCEDURAL_CLASSES))]
            rows.append([name, split, size, size, *present])
        _write_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    _write_lines(root / "classes.txt", PROCEDURAL_CLASSES)
    with (
        atomic_write(root / "image_labels.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "split", "width_original", "height_original", *PROCEDURAL_CLASSES])
        writer.writerows(rows)


def _write_lines(path: Path, lines: list[str] | tuple[str, ...]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _draw(rng: np.random.Generator, size: int, index: int) -> tuple[Array, Array]:
    """One image: uint8 `(size, size, 3)` and its labels `(size, size)`."""
    canvas = _scenery(rng, size)
    herd = _place(rng, size, _choose_classes(rng, index))
    owner = np.full((size, size), -1)
    for number, animal in enumerate(herd):
        animal.draw()
        plane = canvas[animal.window]
        plane *= 1 - 0.4 * animal.shadow[..., None]
        plane += animal.alpha[..., None] * (animal.rgb - plane)
        owner[animal.window][animal.alpha > 0.5] = number
    canvas += rng.normal(0, 3, canvas.shape)
    labels = np.array([0, *(animal.k + 1 for animal in herd)], np.uint8)[owner + 1]
    labels[_borders(owner)] = 255
    return canvas.round().clip(0, 255).astype(np.uint8), labels


def _choose_classes(rng: np.random.Generator, index: int) -> list[int]:
    count = 1 + rng.choice(len(_NUMBER_OF_CLASSES), p=_NUMBER_OF_CLASSES)
    classes = [int(k) for k in rng.choice(len(_FREQUENCY), count, replace=False, p=_FREQUENCY)]
    if index < len(PROCEDURAL_CLASSES):
        classes = [index, *(k for k in classes[1:] if k != index)]
    return classes + classes[:1] * int(rng.random() < _SECOND_ANIMAL)


def _place(rng: np.random.Generator, size: int, classes: list[int]) -> list["_Animal"]:
    """Finds places, from far to near, where no animal hides too much of another's body or head."""
    for _ in range(50):
        herd = sorted((_Animal(rng, k, size) for k in classes), key=lambda animal: animal.foot)
        owner = np.full((size, size), -1)
        for number, animal in enumerate(herd):
            owner[animal.window][animal.body | animal.head] = number
        if all(
            (owner[animal.window] == number)[part].mean() >= _LEAST_VISIBLE
            for number, animal in enumerate(herd)
            for part in (animal.body, animal.head)
        ):
            break
    return herd


def _borders(owner: Array) -> Array:
    """Pixels that touch a pixel of another owner."""
    border = np.zeros(owner.shape, bool)
    for edge, here, there in (
        (owner[1:] != owner[:-1], border[1:], border[:-1]),
        (owner[:, 1:] != owner[:, :-1], border[:, 1:], border[:, :-1]),
    ):
        here |= edge
        there |= edge
    return border


def _noise(rng: np.random.Generator, size: int, rows: int, cols: int) -> Array:
    """Smooth noise in about [-1, 1], float32 `(size, size)`, with `rows x cols` random knots."""
    knots = rng.uniform(-1, 1, (max(2, rows), max(2, cols))).astype(np.float32)
    return np.asarray(Image.fromarray(knots).resize((size, size), Image.Resampling.BICUBIC))


def _mix(a: Colour, b: Colour, t: Array) -> Array:
    """From colour `a` where t = 0 to `b` where t = 1, `(H, W, 3)`."""
    t = np.clip(t, 0, 1)[..., None]
    return np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t


def _scenery(rng: np.random.Generator, size: int) -> Array:
    """Sky, distant hills and textured ground in one of four moods, float32 `(size, size, 3)`."""
    sky, hills, near, far = (
        ((120, 182, 232), (104, 138, 122), (84, 142, 58), (142, 182, 92)),  # meadow
        ((250, 206, 150), (182, 122, 98), (206, 168, 104), (228, 200, 140)),  # desert
        ((186, 204, 222), (132, 148, 172), (196, 208, 222), (226, 232, 240)),  # snow
        ((94, 84, 138), (62, 58, 98), (70, 92, 74), (110, 112, 88)),  # dusk
    )[rng.integers(4)]
    y = np.linspace(0, 1, size, dtype=np.float32)[:, None].repeat(size, 1)
    horizon = rng.uniform(0.25, 0.45)
    canvas = _mix(sky, np.asarray(sky) * 0.6 + 100, y / horizon)
    clouds = _noise(rng, size, 8, 4) + 0.5 * _noise(rng, size, 16, 8)
    canvas = _mix_arrays(canvas, _WHITE, 0.45 * np.clip(clouds, 0, 1))
    ridge = horizon - 0.1 - 0.07 * _noise(rng, size, 2, 6)[:1] - 0.02 * _noise(rng, size, 2, 20)[:1]
    canvas = _mix_arrays(canvas, np.asarray(hills) + 14 * _noise(rng, size, 24, 24)[..., None], (y - ridge) * size)
    ground = _mix(far, near, (y - horizon) / (1 - horizon))
    blades = _noise(rng, size, size // 4, size // 2) + 0.7 * _noise(rng, size, 6, 6)
    ripples = np.sin(40 * y**1.5 + 2.5 * _noise(rng, size, 5, 4))
    ground *= 1 + (0.12 * blades + 0.04 * ripples)[..., None]
    canvas = _mix_arrays(canvas, ground, (y - horizon) * size)
    flowers = (rng.random((size, size)) < 0.004) & (y > horizon + 0.03)
    canvas[flowers] = rng.choice(np.array([_WHITE, (246, 212, 84), (226, 120, 150)]), flowers.sum())
    return canvas


def _mix_arrays(a: Array, b: Colour, t: Array) -> Array:
    return a + np.clip(t, 0, 1)[..., None] * (np.asarray(b, np.float32) - a)


class _Animal:
    """An animal painted on a transparent plane of its own, which covers a window of the image.

    Its body lies around (0, 0) of a frame (u, v) that looks to the right, v down, feet at v = 0.85, one unit being
    `unit` pixels. Parts are given by signed distances in that frame, negative inside, from which smooth edges follow.
    """

    def __init__(self, rng: np.random.Generator, k: int, size: int) -> None:
        self.k, self.size, self.rng = k, size, rng
        self.foot = rng.uniform(0.55, 0.97) * size
        self.unit = size * (0.13 + 0.4 * (self.foot / size - 0.55)) * rng.uniform(0.9, 1.2)
        centre = rng.uniform(min(1.1 * self.unit, 0.45 * size), max(size - 1.1 * self.unit, 0.55 * size))
        angle, facing = rng.uniform(-0.12, 0.12), float(rng.choice([-1, 1]))
        reach = 1.6 * self.unit
        self.window = (
            slice(max(0, int(self.foot - 1.4 * reach)), min(size, int(self.foot + 0.4 * reach) + 1)),
            slice(max(0, int(centre - reach)), min(size, int(centre + reach) + 1)),
        )
        y, x = np.mgrid[self.window].astype(np.float32)
        x, y = (x - centre) / self.unit * facing, (y - self.foot) / self.unit + 0.85
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        self.u, self.v = x * cos - y * sin, x * sin + y * cos
        self.body, self.head = self.ellipse(0, 0, 0.74, 0.43) < 0, self.ellipse(0.8, -0.4, 0.35, 0.35) < 0
        self.shadow = np.exp(-((x / 0.8) ** 2) - ((y - 0.86) / 0.14) ** 2)
        self.light = 1.1 - 0.3 * np.clip(self.v + 0.1, -0.6, 0.7) + rng.normal(0, 0.04)

    def draw(self) -> None:
        """Fills `rgb` `(h, w, 3)` and `alpha` `(h, w)` of the window."""
        self.rgb = np.zeros((*self.u.shape, 3), np.float32)
        self.alpha = np.zeros(self.u.shape, np.float32)
        _ANIMALS[self.k](self)

    def paint(self, distance: Array, colour: Colour, shade: bool = True) -> None:
        """Lays a part over what is there, a little darker along its edge."""
        depth = -distance * self.unit  # in pixels
        rgb = np.asarray(colour, np.float32) * np.ones((1, 1, 3), np.float32)
        if shade:
            rgb = rgb * (self.light * (0.72 + 0.28 * np.clip(depth / 2, 0, 1)))[..., None]
        cover = np.clip(0.5 + depth, 0, 1)
        self.rgb += cover[..., None] * (rgb - self.rgb)
        np.maximum(self.alpha, cover, out=self.alpha)

    def ellipse(self, u: float, v: float, a: float, b: float) -> Array:
        return (np.hypot((self.u - u) / a, (self.v - v) / b) - 1) * min(a, b)

    def limb(self, *points: tuple[float, float], width: float, end: float | None = None) -> Array:
        """A bent line of some width, which may change towards its end."""
        widths = np.linspace(width, width if end is None else end, len(points))
        pieces = []
        for (u0, v0), (u1, v1), w in zip(points, points[1:], widths, strict=False):
            du, dv = u1 - u0, v1 - v0
            t = np.clip(((self.u - u0) * du + (self.v - v0) * dv) / (du * du + dv * dv), 0, 1)
            pieces.append(np.hypot(self.u - u0 - t * du, self.v - v0 - t * dv) - w)
        return np.minimum.reduce(pieces)

    def polygon(self, *points: tuple[float, float]) -> Array:
        """A convex polygon with its corners clockwise on the screen."""
        sides = []
        for (u0, v0), (u1, v1) in zip(points, points[1:] + points[:1], strict=True):
            du, dv = u1 - u0, v1 - v0
            sides.append(((self.u - u0) * dv - (self.v - v0) * du) / np.hypot(du, dv))
        return np.maximum.reduce(sides)

    def around(self, u: float, v: float) -> Array:
        """Angle about a point."""
        return np.arctan2(self.v - v, self.u - u)

    def noise(self, rows: int, cols: int) -> Array:
        """As `_noise`, in the window."""
        return _noise(self.rng, self.size, rows, cols)[self.window]

    def eye(self, u: float, v: float) -> None:
        self.paint(self.ellipse(u, v, 0.045, 0.05), _BLACK, shade=False)


def _fur(animal: _Animal, dark: float = 0.16) -> Array:
    """The coat that fox and lion share."""
    hair = animal.noise(animal.size // 2, animal.size // 6)
    spots = np.sin(9 * animal.u + 2) * np.sin(11 * animal.v)
    return np.asarray(_ORANGE) * (1 + dark * hair + 0.05 * spots)[..., None]


def _wool(animal: _Animal) -> Array:
    """The coat that sheep and goat share."""
    curls = np.sin(17 * animal.u + 3 * np.sin(7 * animal.v)) * np.sin(17 * animal.v + 3 * np.sin(6 * animal.u))
    return np.asarray(_CREAM) * (0.92 + 0.1 * curls)[..., None]


def _skin(animal: _Animal) -> Array:
    """The coat that elephant and mouse share."""
    folds = np.abs(np.sin(8 * animal.v + 4 * animal.u + 1.5 * animal.noise(6, 6)))
    return np.asarray(_GREY) * (0.8 + 0.25 * np.clip(3 * folds, 0, 1))[..., None]


def _trunk_and_legs(animal: _Animal, coat: Array, feet: Colour, width: float, fluffy: float = 0.0) -> None:
    """The body that the animals of a pair share."""
    for u, shift in ((-0.42, -0.1), (0.38, 0.1), (-0.52, 0.03), (0.5, -0.02)):
        animal.paint(animal.limb((u, 0.2), (u + shift, 0.85 - width), width=width), np.asarray(coat) * 0.9)
        animal.paint(animal.limb((u + shift, 0.66), (u + shift, 0.85 - width), width=width * 1.02), feet)
    bumps = fluffy * np.abs(np.sin(6 * animal.around(0, 0)))
    animal.paint(animal.ellipse(0, 0, 0.74, 0.43) - bumps, coat)


def _fox(animal: _Animal) -> None:
    coat = _fur(animal)
    animal.paint(animal.limb((-0.6, 0.0), (-0.95, -0.2), (-1.15, -0.55), width=0.13, end=0.2), coat)
    animal.paint(animal.ellipse(-1.16, -0.62, 0.11, 0.15), _WHITE)
    _trunk_and_legs(animal, coat, _BLACK, 0.085)
    animal.paint(animal.polygon((0.56, -0.52), (0.6, -0.98), (0.8, -0.6)), _BLACK)
    animal.paint(animal.polygon((0.82, -0.58), (0.98, -0.96), (1.04, -0.5)), _BLACK)
    animal.paint(animal.ellipse(0.8, -0.42, 0.3, 0.26), coat)
    animal.paint(animal.polygon((0.72, -0.36), (1.28, -0.28), (0.8, -0.14)), _WHITE)
    animal.paint(animal.ellipse(1.26, -0.29, 0.06, 0.055), _BLACK, shade=False)
    animal.eye(0.86, -0.48)


def _lion(animal: _Animal) -> None:
    coat = _fur(animal)
    animal.paint(animal.limb((-0.65, -0.1), (-1.0, 0.0), (-1.12, 0.35), width=0.045), coat)
    animal.paint(animal.ellipse(-1.13, 0.4, 0.1, 0.14), _BROWN)
    _trunk_and_legs(animal, coat, coat, 0.1)
    angle = animal.around(0.74, -0.36)
    strands = 0.75 + 0.45 * np.abs(np.sin(9 * angle))
    animal.paint(
        animal.ellipse(0.74, -0.36, 0.46, 0.48) + 0.05 * np.sin(18 * angle), np.asarray(_BROWN) * strands[..., None]
    )
    animal.paint(animal.ellipse(0.84, -0.34, 0.24, 0.25), (240, 190, 116))
    animal.paint(animal.ellipse(0.98, -0.24, 0.13, 0.1), _WHITE)
    animal.paint(animal.ellipse(1.04, -0.29, 0.06, 0.045), _BLACK, shade=False)
    animal.eye(0.86, -0.42)


def _sheep(animal: _Animal) -> None:
    coat = _wool(animal)
    _trunk_and_legs(animal, coat, _BLACK, 0.075, fluffy=0.07)
    animal.paint(animal.limb((0.72, -0.42), (0.5, -0.3), width=0.07), _BLACK)
    animal.paint(animal.ellipse(0.84, -0.3, 0.22, 0.29), _BLACK)
    animal.paint(animal.ellipse(0.76, -0.56, 0.2, 0.13) - 0.03 * np.abs(np.sin(5 * animal.around(0.76, -0.56))), coat)
    animal.paint(animal.ellipse(0.92, -0.36, 0.06, 0.06), _WHITE, shade=False)
    animal.paint(animal.ellipse(0.935, -0.36, 0.03, 0.035), _BLACK, shade=False)


def _goat(animal: _Animal) -> None:
    coat = _wool(animal)
    _trunk_and_legs(animal, coat, (120, 104, 92), 0.075, fluffy=0.07)
    for shift in (0.0, 0.14):
        rings = 0.8 + 0.3 * np.sin(40 * animal.v + 20 * animal.u)
        horn = animal.limb((0.7 + shift, -0.6), (0.62 + shift, -0.9), (0.36 + shift, -1.06), width=0.075, end=0.04)
        animal.paint(horn, np.asarray((120, 92, 62)) * rings[..., None])
    animal.paint(animal.limb((0.96, -0.2), (0.94, 0.12), width=0.07, end=0.02), _WHITE)
    stripes = np.where(np.abs(animal.v + 0.42) < 0.07, 0.35, 1.0)
    animal.paint(animal.limb((0.72, -0.5), (1.0, -0.24), width=0.19), np.asarray((196, 168, 140)) * stripes[..., None])
    animal.eye(0.84, -0.5)


def _elephant(animal: _Animal) -> None:
    coat = _skin(animal)
    animal.paint(animal.limb((-0.7, -0.1), (-0.84, 0.25), width=0.035), coat)
    _trunk_and_legs(animal, coat, np.asarray(coat) * 0.8, 0.13)
    animal.paint(animal.limb((1.0, -0.3), (1.16, 0.1), (1.1, 0.45), (1.26, 0.58), width=0.14, end=0.07), coat)
    animal.paint(animal.limb((0.98, -0.08), (1.16, 0.14), (1.36, 0.1), width=0.045, end=0.03), _WHITE)
    animal.paint(animal.ellipse(0.84, -0.36, 0.32, 0.32), coat)
    animal.paint(animal.ellipse(0.62, -0.34, 0.27, 0.38), np.asarray(coat) * 0.85)
    animal.paint(animal.ellipse(0.62, -0.32, 0.18, 0.28), (196, 142, 150))
    animal.eye(0.98, -0.44)


def _mouse(animal: _Animal) -> None:
    coat = _skin(animal)
    animal.paint(animal.limb((-0.6, 0.2), (-0.95, 0.35), (-1.15, 0.05), (-1.4, -0.1), width=0.055, end=0.03), _PINK)
    _trunk_and_legs(animal, coat, _PINK, 0.07)
    for u, v, a in ((0.56, -0.68, 0.25), (0.94, -0.72, 0.23)):
        animal.paint(animal.ellipse(u, v, a, a), coat)
        animal.paint(animal.ellipse(u, v + 0.02, a * 0.68, a * 0.68), _PINK)
    animal.paint(animal.ellipse(0.78, -0.36, 0.3, 0.26), coat)
    animal.paint(animal.polygon((0.84, -0.56), (1.26, -0.24), (0.8, -0.12)), coat)
    animal.paint(animal.ellipse(1.24, -0.25, 0.07, 0.065), (222, 84, 104), shade=False)
    animal.eye(0.92, -0.42)


_ANIMALS: tuple[Callable[[_Animal], None], ...] = (_fox, _lion, _sheep, _goat, _elephant, _mouse)
