"""Reads `.npy` files that hold a pickled dictionary, without executing a pickle.

A pickle is a program: it may import any function and call it. Here the few names that arrays and tensors are pickled
under lead to the stand-ins of this file, which build plain data only, and every other name is refused before anything
is called.
"""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcam.errors import FastcamError


def load_object(path: str | os.PathLike[str]) -> Any:
    """Reads the single object of a file written by `numpy.save(path, obj)`.

    Args:
        path: a `.npy` file of dtype object and shape `()`.

    Returns:
        The object, made of dictionaries, lists, tuples, numbers, strings, `numpy.ndarray` and `torch.Tensor`.

    Raises:
        FastcamError: the file is missing, damaged, not of this kind, or names anything but arrays and tensors
            (possibly an attack).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if not dtype.hasobject or shape != ():
                raise ValueError(f"it holds {dtype} {shape}, not one dictionary")
            array = _Unpickler(file, encoding="latin1").load()  # latin1: how Python 2 wrote the bytes of arrays
            (obj,) = _plain(array).ravel()
            return _plain(obj)
    except FileNotFoundError:
        raise FastcamError(f"{path} does not exist") from None
    except _Refused as refusal:
        raise FastcamError(
            f"{path} wants to run {refusal} when read, expected arrays and numbers only; do not trust this file"
        ) from None
    except Exception as error:  # damaged bytes can make the unpickler raise nearly anything
        raise FastcamError(
            f"{path} does not read as a .npy dictionary ({error!r}); check where it comes from"
        ) from error


class _Refused(Exception):
    pass


class _Dtype:
    """Stands for a pickled `numpy.dtype` of plain numbers or text."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO":
            raise ValueError(f"dtype {code!r} is not plain")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.dtype.kind == "U":  # the state gives the bytes of an element, which the code already says
            return
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a pickled `numpy.ndarray`."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.dtype == object:
            self.array = np.empty(len(data), object)
            self.array[:] = data
        else:
            self.array = np.frombuffer(_bytes(data), dtype.dtype).copy()
        self.array = self.array.reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    return np.frombuffer(_bytes(data), dtype.dtype)[0].item()


def _bytes(data: bytes | str = b"", _: str = "latin1") -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=storage.dtype)
    return tensor.set_(storage._untyped_storage, offset, size, stride).clone()


class _NdArray:
    """Stands for the class `numpy.ndarray`, which array pickles name but need not call."""


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NdArray,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _plain(obj: Any) -> Any:
    """Replaces the stand-ins inside dictionaries, lists and tuples by what they stand for."""
    if isinstance(obj, _Array):
        return obj.array
    if isinstance(obj, dict):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return type(obj)(_plain(value) for value in obj)
    return obj
