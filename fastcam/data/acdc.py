"""ACDC: magnetic resonance images of hearts as slices in VOC's layout, split by patients.

O. Bernard et al., "Deep Learning Techniques for Automatic MRI Cardiac Multi-structures Segmentation and Diagnosis: Is
the Problem Solved?", IEEE TMI 2018. Every patient has two volumes, at the end of diastole and of systole.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastcam.errors import FastcamError
from fastcam.io import atomic_write, write_label_png
from fastcam.io.nifti import read_nifti

ACDC_CLASSES = ("rv", "myocardium", "lv")
VOLUMES = "volumes.csv"  # which slices make up a volume, for `fastcam.metrics.VolumeScores`
PHASES = ("ed", "es")


@dataclass(frozen=True)
class Scan:
    """One volume of one patient.

    Attributes:
        patient: such as `patient001`.
        phase: `"ed"` or `"es"`.
        image: uint8 `(slices, H, W)`.
        label: uint8 `(slices, H, W)`: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle.
        spacing: millimetres between slices, rows and columns, or `None` where nothing is known of it.
    """

    patient: str
    phase: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float] | None


def read_acdc(root: str | os.PathLike[str]) -> Iterator[Scan]:
    """The volumes of a folder, patient by patient.

    Args:
        root: holds `patientNNN.npz` (arrays `ed_image`, `ed_label`, `es_image`, `es_label`), or the challenge's own
            folders `patientNNN/` with `Info.cfg` and NIfTI files, whose grey values are stretched over 0 to 255.

    Raises:
        FastcamError: no patient is there, or files are missing, damaged or do not fit together.
    """
    folder = Path(root)
    archives = sorted(folder.glob("patient*.npz"))
    patients = [path for path in sorted(folder.glob("patient*")) if path.is_dir()]
    if not archives and not patients:
        raise FastcamError(f"folder {folder} holds neither patient*.npz nor folders patient*; give ACDC's folder")
    for scan in _read_archives(archives) if archives else _read_folders(patients):
        if scan.image.ndim != 3 or scan.image.shape != scan.label.shape or scan.image.size == 0:
            came = f"image {scan.image.shape} and label {scan.label.shape}"
            raise FastcamError(f"{scan.patient} {scan.phase} in {folder}: {came}, expected the same three dimensions")
        if scan.label.max() > len(ACDC_CLASSES):
            raise FastcamError(f"{scan.patient} {scan.phase} in {folder}: label {scan.label.max()}, expected 0 to 3")
        yield scan


def _read_archives(paths: Sequence[Path]) -> Iterator[Scan]:
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                parts = [(phase, arrays[f"{phase}_image"], arrays[f"{phase}_label"]) for phase in PHASES]
        except Exception as error:  # zip, zlib and numpy each have exceptions of their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FastcamError(f"{path} does not load as a patient of ACDC: {reason}") from error
        for phase, image, label in parts:
            yield Scan(path.stem, phase, image, label, None)


def _read_folders(folders: Sequence[Path]) -> Iterator[Scan]:
    for folder in folders:
        try:
            info = (folder / "Info.cfg").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise FastcamError(f"{folder / 'Info.cfg'} does not read; expected lines such as ED: 1") from None
        for phase in PHASES:
            frame = re.search(rf"^{phase.upper()}:\s*(\d+)", info, re.MULTILINE)
            if frame is None:
                raise FastcamError(f"{folder / 'Info.cfg'} has no line {phase.upper()}: with the number of a frame")
            stem = f"{folder.name}_frame{int(frame[1]):02d}"
            image, label = (read_nifti(_compressed(folder / f"{stem}{end}.nii")) for end in ("", "_gt"))
            grey = image.array.astype(np.float64)
            low, high = grey.min(), grey.max()
            grey = (grey - low) * (255 / (high - low) if high > low else 0.0)
            labels = np.clip(label.array, 0, 255).astype(np.uint8)
            yield Scan(folder.name, phase, grey.round().astype(np.uint8), labels, image.spacing)


def _compressed(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def write_acdc(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labelled: Sequence[float] = (0.1, 0.25),
    held_out: float = 0.2,
    seed: int = 0,
    crop: int = 0,
    size: int = 0,
) -> None:
    """Writes every slice as a grey image and a mask in VOC's layout, and lists of slices by patients.

    Lists: `test`, the held-out patients; `train`, the others; and for a share of 0.1 `labelled_10` and `unlabelled_10`,
    into which `train` falls. Patients with labels at a small share have them at a larger one too. `volumes.csv` says
    which slices make up which volume, in order, and how far apart pixels are, in millimetres where that is known.

    Args:
        source: as `read_acdc` takes it.
        out: the root of the data set.
        labelled: shares of the training patients that have labels; each gives at least one patient.
        held_out: share of all patients that is held out.
        seed: of the draw of patients.
        crop: side of the square that is cut from the middle of a slice, black beyond it; 0 for whole slices.
        size: side that a slice is brought to then, images bilinear, masks nearest; 0 for none.

    Raises:
        FastcamError: as `read_acdc`; or shares, crop or size that leave no patient or pixel to a list.
    """
    if not 0 < held_out < 1 or not all(0 < share < 1 for share in labelled) or min(crop, size) < 0:
        came = f"labelled {list(labelled)}, held_out {held_out}, crop {crop}, size {size}"
        raise FastcamError(f"acdc: {came}; expected shares between 0 and 1, and sides of 0 or more")
    root, rows = Path(out), []
    slices: dict[str, list[str]] = {}
    for scan in read_acdc(source):
        spacing = scan.spacing or (1.0, 1.0, 1.0)
        for number, (image, label) in enumerate(zip(scan.image, scan.label, strict=True)):
            name = f"{scan.patient}_{scan.phase}_{number:02d}"
            grey, mask = (Image.fromarray(_middle(plane, crop)) for plane in (image, label))
            before = grey.size
            if size:
                grey = grey.resize((size, size), Image.Resampling.BILINEAR)
                mask = mask.resize((size, size), Image.Resampling.NEAREST)
            with atomic_write(root / "JPEGImages" / f"{name}.png") as temporary:
                grey.save(temporary)
            write_label_png(root / "SegmentationClass" / f"{name}.png", np.array(mask))
            apart = [spacing[0], spacing[1] * before[1] / grey.height, spacing[2] * before[0] / grey.width]
            rows.append([name, f"{scan.patient}_{scan.phase}", number, *(round(step, 4) for step in apart)])
            slices.setdefault(scan.patient, []).append(name)
    for name, patients in _split(sorted(slices), labelled, held_out, seed).items():
        if not patients:
            raise FastcamError(f"acdc: {len(slices)} patients leave none to list {name}; choose other shares")
        _write_lines(root / "ImageSets" / "Segmentation" / f"{name}.txt", [i for p in patients for i in slices[p]])
    _write_lines(root / "classes.txt", ACDC_CLASSES)
    with atomic_write(root / VOLUMES) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "volume", "slice", "spacing_z", "spacing_y", "spacing_x"])
        writer.writerows(rows)


def _split(patients: list[str], labelled: Sequence[float], held_out: float, seed: int) -> dict[str, list[str]]:
    """List -> patients, sorted."""
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    tested = max(1, round(held_out * len(order)))
    train = order[tested:]
    lists = {"test": order[:tested], "train": train}
    for share in labelled:
        known = max(1, round(share * len(train)))
        lists |= {f"labelled_{share:.0%}"[:-1]: train[:known], f"unlabelled_{share:.0%}"[:-1]: train[known:]}
    return {name: sorted(members) for name, members in lists.items()}


def _middle(plane: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of `(H, W)`, black beyond its border; the plane itself for a side of 0."""
    if side == 0:
        return plane
    square = np.zeros((side, side), plane.dtype)
    here, there = zip(*(_window(length, side) for length in plane.shape), strict=True)
    square[there] = plane[here]
    return square


def _window(length: int, side: int) -> tuple[slice, slice]:
    """What of an axis is copied, and where to."""
    start, copied = (length - side) // 2, min(length, side)
    return slice(max(start, 0), max(start, 0) + copied), slice(max(-start, 0), max(-start, 0) + copied)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
