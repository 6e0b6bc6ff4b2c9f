"""One published system per file, created by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from pathlib import Path
from typing import Any

from torch import nn

from fastcam.errors import FastcamError

# name: (file, class). The files import timm through the backbones, so they are opened when they are asked for.
METHODS = {
    "amdim": ("fastcam.methods.amdim", "AMDIM"),
    "cam": ("fastcam.methods.cam", "CAM"),
    "cotraining": ("fastcam.methods.cotraining", "CoTraining"),
    "cti": ("fastcam.methods.cti", "CTI"),
    "cyclegan": ("fastcam.methods.cyclegan", "CycleGAN"),
    "deeplab": ("fastcam.methods.deeplab", "DeepLab"),
    "drs": ("fastcam.methods.drs", "DRS"),
    "drs_refine": ("fastcam.methods.drs_refine", "DRSRefine"),
    "dsmf_net": ("fastcam.methods.dsmf_net", "DSMFNet"),
    "group_wsss": ("fastcam.methods.group_wsss", "GroupWSSS"),
    "irn": ("fastcam.methods.irn", "IRN"),
    "mcof": ("fastcam.methods.mcof", "MCOF"),
    "mevt": ("fastcam.methods.mevt", "MEVT"),
    "ocr": ("fastcam.methods.ocr", "OCR"),
    "prm": ("fastcam.methods.prm", "PRM"),
    "psa": ("fastcam.methods.psa", "PSA"),
    "sba": ("fastcam.methods.sba", "SBA"),
    "sfc": ("fastcam.methods.sfc", "SFC"),
    "ssl_few_shot": ("fastcam.methods.ssl_few_shot", "SSLFewShot"),
}


def list_methods() -> list[str]:
    """The names that :func:`create_method` knows."""
    return sorted(METHODS)


def method_class(name: str) -> Any:
    """The class of a method, which says its `kind`.

    Raises:
        FastcamError: an unknown name.
    """
    if name not in METHODS:
        raise FastcamError(
            f"method '{name}': unknown{_nearest(name, list_methods())}; known: {', '.join(list_methods())}"
        )
    module, cls = METHODS[name]
    return getattr(importlib.import_module(module), cls)


def create_method(
    name: str, *, num_classes: int, backbone: str | None = None, weights: str | Path | None = None, **config: Any
) -> nn.Module:
    """A method by name, its configuration checked.

    Args:
        name: one of :func:`list_methods`.
        num_classes: number of foreground classes.
        backbone: timm name; ``None`` takes the paper's.
        weights: local file with the backbone's pre-trained weights. It belongs to the start of training, not to the
            configuration: a trained method holds the backbone's weights itself.
        config: fields of the method's ``Config``; what is not named keeps the paper's value.

    Raises:
        FastcamError: an unknown method or field (the message has the nearest known one), or a value the method refuses.

    Example:
        >>> create_method("sfc", num_classes=20).config.bank_draws
        4
    """
    cls = method_class(name)
    module = importlib.import_module(cls.__module__)
    known = [field.name for field in dataclasses.fields(module.Config)]
    if backbone is not None:
        config["backbone"] = backbone
    for key in config:
        if key not in known:
            raise FastcamError(
                f"method '{name}': unknown setting '{key}'{_nearest(key, known)}; known: {', '.join(known)}"
            )
    if num_classes < 1:
        raise FastcamError(f"method '{name}': num_classes is {num_classes}, expected at least 1")
    # YAML and safetensors metadata have lists where the dataclass has tuples.
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return cls(num_classes, module.Config(**fields), weights=weights)


def load_method(path: str | Path, **changes: Any) -> nn.Module:
    """Builds a trained method again from a file that :func:`fastcam.io.save_weights` wrote.

    Args:
        path: the file.
        changes: fields of the configuration that take another value than in the training, such as how networks vote.

    Raises:
        FastcamError: the file is missing, damaged or of something else, or as :func:`create_method`.
    """
    from fastcam.io import load_weights

    state, saved = load_weights(path)
    if "method" not in saved:
        raise FastcamError(f"weights '{path}': hold no method; expected a file that `fastcam train` wrote")
    config = {key: value for key, value in saved["config"].items() if key != "backbone"}
    config |= changes
    method: Any = create_method(saved["method"], num_classes=saved["num_classes"], backbone=saved["backbone"], **config)
    expected = {key: value.shape for key, value in method.export_state_dict().items()}
    wrong = sorted(
        key for key in expected.keys() | state.keys() if key not in state or expected.get(key) != state[key].shape
    )
    if wrong:
        raise FastcamError(
            f"weights '{path}': do not fit method '{saved['method']}' ({wrong[0]} and {len(wrong) - 1} more)"
        )
    method.load_state_dict(state, strict=False)
    return method.eval()


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""
