"""Fixtures that several test folders share."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

_TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Name -> arrays of `tests/golden/<name>.npz`, computed by the authors' own programs."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(_TESTS / "golden" / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, masks and weights: the folder `FASTCAM_DATA`, else `shared/data` beside the checkout, else skip."""
    root = Path(os.environ.get("FASTCAM_DATA") or _TESTS.parents[1] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no shared data at {root}; set FASTCAM_DATA")
    return root
