"""Runs every op test on each backend that this process can run, and fills uninitialised memory with NaN."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"device", "backend"} <= set(metafunc.fixturenames) or metafunc.cls is None:
        return
    names = metafunc.cls.candidates
    if INTERPRETED:
        runs = [("cpu", "triton")] if "triton" in names else []
    else:
        runs = [("cpu", name) for name in ("reference", "cpp") if name in names]
        if torch.cuda.is_available():
            runs += [("cuda", name) for name in ("reference", "triton", "cuda") if name in names]
    metafunc.parametrize(
        "device, backend",
        [
            pytest.param(
                *run,
                id="-".join(run),
                marks=[pytest.mark.gpu] * (run[0] == "cuda") + [pytest.mark.interpret] * INTERPRETED,
            )
            for run in runs
        ],
    )


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """``torch.empty`` gives NaN (or the largest integer), so that a result that was not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
