"""Argument checks that ops share. They look at shapes, dtypes and devices only: reading values would synchronise a
GPU."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_same(op: str, **tensors: Tensor) -> None:
    """All tensors share one floating dtype and one device.

    Raises:
        TypeError: a dtype that is not float32, float16, bfloat16 or float64, or two different ones.
        ValueError: two different devices.
    """
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{op}: expected {name} of dtype float32, float16, bfloat16 or float64, got {_name(x.dtype)}"
            )
    if len({x.dtype for x in tensors.values()}) > 1:
        raise TypeError(
            f"{op}: expected one dtype, got {', '.join(f'{n} {_name(x.dtype)}' for n, x in tensors.items())}"
        )
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError(
            f"{op}: expected one device, got {', '.join(f'{n} on {x.device}' for n, x in tensors.items())}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_labels(op: str, **tensors: Tensor) -> None:
    """All tensors are of an integer dtype.

    Raises:
        TypeError: another dtype.
    """
    for name, x in tensors.items():
        if x.dtype not in INTEGERS:
            raise TypeError(f"{op}: expected {name} of an integer dtype, got {_name(x.dtype)}")
