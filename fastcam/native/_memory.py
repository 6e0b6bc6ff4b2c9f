"""Memory for what the C++ backends return."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam import _C


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As :func:`torch.empty` on a CPU, from 2 MB on on memory that earlier results have given back.

    The system clears every page that it hands out, which takes as long as fusing CAMs into them.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _C.Memory.LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(_C.Memory(count * dtype.itemsize), dtype=dtype, count=count).view(tuple(shape))
