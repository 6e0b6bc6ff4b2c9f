"""What this machine offers: versions, devices, backends."""

from __future__ import annotations

import importlib
import pkgutil
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastcam
from fastcam import backends, ops

LIBRARIES = (
    "numpy",
    "triton",
    "torchvision",
    "timm",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "safetensors",
    "pillow",
)


def env() -> str:
    """Shows versions, devices, and for every op which backends run on them and why the others do not.

    Put its output into bug reports.
    """
    lines = [
        f"fastcam       {fastcam.__version__}",
        f"python        {platform.python_version()} on {platform.platform()}",
        f"torch         {torch.__version__}",
        *(f"{name:<13} {_version(name)}" for name in LIBRARIES),
        f"cpu           {platform.machine()}, {torch.get_num_threads()} threads",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = f"{found.total_memory / 2**30:.0f} GiB"
            lines.append(f"cuda:{index}        {found.name}, {memory}, compute capability {found.major}.{found.minor}")
        devices.append(torch.device("cuda"))
    else:
        lines.append(f"cuda          none{'' if torch.version.cuda else ' (this torch is built without CUDA)'}")
    for device in devices:
        lines += ["", f"backends on {device}, best first"]
        for name in sorted(module.name for module in pkgutil.iter_modules(ops.__path__)):
            candidates = getattr(importlib.import_module(f"fastcam.ops.{name}"), "CANDIDATES", None)
            if candidates:
                states = backends.explain(name, candidates, torch.empty(0, device=device))
                lines.append(f"  {name}")
                lines += [f"    {backend:<10} {state}" for backend, state in states.items()]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
