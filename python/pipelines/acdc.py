"""The acdc command: heart scans of ACDC as slices in VOC's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastcam.data.acdc import write_acdc
from fastcam.io import open_pass


def acdc(
    source: Path,
    out: Path,
    labelled: tuple[float, ...] = (0.1, 0.25),
    held_out: float = 0.2,
    seed: int = 0,
    crop: int = 0,
    size: int = 0,
) -> Path:
    """Writes the slices of ACDC's patients as images and masks in VOC's layout, with lists by patients.

    The lists are test, train, and for a share of 0.1 labelled_10 and unlabelled_10. volumes.csv is for
    evaluate --volumes.

    Args:
        source: folder of patientNNN.npz, or of the challenge's folders with NIfTI files (needs fastcam[medical]).
        out: root of the data set, for data.root.
        labelled: shares of the training patients that have labels, each at least one patient.
        held_out: share of all patients that is held out in test.
        seed: of the draw of patients.
        crop: side of the square that is cut from the middle of a slice; 0 for whole slices.
        size: side that a slice is brought to then; 0 for none.

    Returns:
        out.
    """
    shares: dict[str, Any] = {"labelled": list(labelled), "held_out": held_out, "seed": seed}
    shares |= {"crop": crop, "size": size}
    open_pass(out, {"pass": "acdc", "source": source, **shares})
    write_acdc(source, out, **shares)
    return out
