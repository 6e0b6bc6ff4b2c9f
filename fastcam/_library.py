"""The one place that registers ops with torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

LIBRARY = torch.library.Library("fastcam", "DEF")
# Where the launchers of a backend live.
PACKAGES = {"reference": "reference", "triton": "kernels", "cpp": "native", "cuda": "native"}


def op(schema: str, *, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register one direction of an op as ``torch.ops.fastcam.<name>`` and return it.

    Args:
        schema: ``"<stem>_fwd(Tensor x, ..., str backend) -> Tensor"`` (or ``_bwd``); the last argument names the
            backend. The work is done by the function ``<stem>_fwd`` of ``fastcam/<package of the backend>/<stem>.py``,
            called with all arguments but that one.
        fake: the same signature on fake tensors: gives the outputs' shapes and dtypes.
    """
    name = schema.partition("(")[0]
    stem = name.rpartition("_")[0]

    modules: dict[str, ModuleType] = {}

    def run(*args: Any) -> Any:
        backend = args[-1]
        if backend not in modules:
            modules[backend] = import_module(f"fastcam.{PACKAGES[backend]}.{stem}")
        return getattr(modules[backend], name)(*args[:-1])

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcam::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastcam, name).default
