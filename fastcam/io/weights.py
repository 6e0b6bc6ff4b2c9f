"""Weights of networks: safetensors that carry their configuration; foreign `.pth` files without running their
pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io.atomic import atomic_write


def save_weights(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes a state dict as safetensors, with `config` as JSON in its metadata (field `fastcam`), atomically.

    Args:
        path: the file to write.
        state_dict: tensors of any device and strides; tied ones are stored twice.
        config: what it takes to build the network again; plain values only.

    Raises:
        TypeError: `config` holds something JSON cannot.
        FastcamError: the file could not be written.
    """
    from safetensors.torch import save

    # safetensors wants contiguous tensors that share no memory
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    data = save(tensors, metadata={"fastcam": json.dumps(dict(config))})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a `.safetensors` file, or a `.pth`, `.pt`, `.ckpt` or `.bin` file of torch with `weights_only=True`.

    Of a torch file that holds more than tensors, the entry `state_dict` or `model` is taken.

    Returns:
        The state dict on the CPU, and the configuration that `save_weights` stored (empty for foreign files).

    Raises:
        FastcamError: the file is missing, damaged, would need to run code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FastcamError(f"weights {path} do not exist")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        obj = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch readers each have exceptions of their own
        reason = str(error).split("\n", 1)[0]
        raise FastcamError(
            f"weights {path} cannot be read safely: {reason}; save the plain state_dict, best as safetensors"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(obj, dict) and isinstance(obj.get(name), dict):
            obj = obj[name]
    if not isinstance(obj, dict) or not obj or not all(isinstance(value, Tensor) for value in obj.values()):
        raise FastcamError(f"weights {path} hold no state dict, expected tensors by name; save model.state_dict()")
    return dict(obj), {}


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # safetensors maps the file: clones stay valid when it is overwritten
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, json.loads(metadata.get("fastcam", "{}"))
    except Exception as error:  # SafetensorError, or JSON's, of a damaged file
        raise FastcamError(
            f"weights {path} do not read as safetensors: {error}; copy or download them again"
        ) from error
