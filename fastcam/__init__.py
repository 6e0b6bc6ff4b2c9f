"""Fast kernels and whole pipelines for weakly supervised segmentation.

``import fastcam`` is light: torch and numpy only; Triton, CUDA and the training libraries are imported by what uses
them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {  # public name -> module that defines it
    "attention_maps": "fastcam.ops.attention_maps",
    "cam_fuse": "fastcam.ops.cam_fuse",
    "cam_label": "fastcam.ops.cam_label",
    "cam_sweep": "fastcam.ops.cam_sweep",
    "correlation_propagate": "fastcam.ops.correlation_propagate",
    "pairwise_max": "fastcam.ops.pairwise_max",
    "prototype_similarity": "fastcam.ops.prototype_similarity",
    "region_pool": "fastcam.ops.region_pool",
    "crf_mean_field": "fastcam.ops.crf_mean_field",
    "Lattice": "fastcam.ops.crf_mean_field",
    "feature_affinity": "fastcam.ops.feature_affinity",
    "path_affinity": "fastcam.ops.path_affinity",
    "peak_find": "fastcam.ops.peak_find",
    "pixel_refine": "fastcam.ops.pixel_refine",
    "random_walk": "fastcam.ops.random_walk",
    "region_graph": "fastcam.ops.region_graph",
    "region_merge": "fastcam.ops.region_merge",
    "region_reduce": "fastcam.ops.region_reduce",
    "superpixel_slic": "fastcam.ops.superpixel_slic",
    "window_reduce": "fastcam.ops.window_reduce",
    "use_backend": "fastcam.backends",
    "BackendError": "fastcam.backends",
    "create_method": "fastcam.methods",
    "list_methods": "fastcam.methods",
    "load_method": "fastcam.methods",
    "FastcamError": "fastcam.errors",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastcam' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
