"""Which implementation of an op runs, and why the others do not.

Every op lists its candidates best first, each with a predicate on one of its tensors that returns ``None`` or the
reason why not. The first that may run is taken. A backend asked for by name is never replaced by another: it runs, or
:class:`BackendError` says why not. Ask for one call (``backend="reference"``), for a block (:func:`use_backend`), or
for the process (``FASTCAM_BACKEND=reference`` or ``FASTCAM_BACKEND=cam_fuse=cpp,crf_mean_field=reference`` in the
environment, read at import).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec

from torch import Tensor

NAMES = ("triton", "cuda", "cpp", "reference")
Predicate = Callable[[Tensor], str | None]


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def _parse(text: str) -> dict[str, str]:
    """``"reference"`` or ``"cam_fuse=cpp,crf_mean_field=reference"`` -> choice per op, ``""`` standing for all ops."""
    choice = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, backend = part.rpartition("=")
        if backend not in NAMES:
            raise BackendError(f"FASTCAM_BACKEND: expected one of {', '.join(NAMES)}, got '{backend}' in '{text}'")
        choice[name] = backend
    return choice


_choice = _parse(os.environ.get("FASTCAM_BACKEND", ""))
_has_triton = find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_has_cpp = find_spec("fastcam._C") is not None
_has_cuda = find_spec("fastcam._C_cuda") is not None


@contextlib.contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Use ``backend`` for the named ops, or all ops, inside the block. It holds for the process, not for one thread."""
    global _choice
    if backend not in NAMES:
        raise BackendError(f"use_backend: expected one of {', '.join(NAMES)}, got '{backend}'")
    before = _choice
    _choice = {**before, **dict.fromkeys(ops, backend)} if ops else {"": backend}
    try:
        yield
    finally:
        _choice = before


def always(x: Tensor) -> str | None:
    """For the reference: runs wherever torch does."""
    return None


def needs_cpp(x: Tensor) -> str | None:
    """For ``cpp``: CPU tensors, and the compiled module."""
    if not _has_cpp:
        return "fastcam._C is not built (reinstall fastcam with a C++17 compiler)"
    return None if x.device.type == "cpu" else f"it runs on CPU tensors, got {x.device.type}"


def needs_cuda(x: Tensor) -> str | None:
    """For ``cuda``: CUDA tensors, and the module that nvcc compiled."""
    if not _has_cuda:
        return "fastcam._C_cuda is not built (reinstall fastcam where nvcc is found, or with FASTCAM_CUDA=1)"
    return None if x.device.type == "cuda" else f"it runs on CUDA tensors, got {x.device.type}"


def needs_gpu(x: Tensor) -> str | None:
    """For ``triton``: GPU tensors, or CPU tensors under ``TRITON_INTERPRET=1``."""
    if not _has_triton:
        return "triton is not installed"
    if x.device.type == "cuda" or _interpreted:
        return None
    return f"it runs on GPU tensors, got {x.device.type}"


def resolve(op: str, candidates: Mapping[str, Predicate], x: Tensor, backend: str | None = None) -> str:
    """The name of the backend that runs ``op`` on a tensor like ``x``.

    Raises:
        BackendError: the backend asked for does not exist for this op or cannot take ``x``.
    """
    asked = backend or _choice.get(op) or _choice.get("")
    if asked is None:
        return next(name for name, why_not in candidates.items() if why_not(x) is None)
    if asked not in candidates:
        raise BackendError(f"{op}: backend '{asked}' does not exist, expected one of {', '.join(candidates)}")
    reason = candidates[asked](x)
    if reason is not None:
        raise BackendError(f"{op}: backend '{asked}' cannot run: {reason}")
    return asked


def explain(op: str, candidates: Mapping[str, Predicate], x: Tensor) -> dict[str, str]:
    """Every candidate with ``"ok"`` or the reason why not, best first: what ``fastcam env`` prints."""
    return {name: why_not(x) or "ok" for name, why_not in candidates.items()}
