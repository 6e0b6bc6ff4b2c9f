"""Arrays of `.npz` files, read by several threads at once.

numpy has Python's own parser read the header of an array, and in some versions of CPython 3.11 and 3.12 two threads
that parse at the same time fail with a SystemError (CPython issue 106905): here one header is read at a time.
"""

from __future__ import annotations

import os
import threading
import zipfile
from typing import IO

import numpy as np

_HEADER = threading.Lock()


def read_npz(source: str | os.PathLike[str] | IO[bytes]) -> dict[str, np.ndarray]:
    """All arrays of a file that `numpy.savez` wrote, by name. Nothing in it is executed.

    Raises:
        ValueError: an array of objects, or damaged bytes, for which zip, zlib and numpy have other exceptions too.
        OSError: the file does not open.
    """
    with zipfile.ZipFile(source) as archive:
        return {name.removesuffix(".npy"): _read_array(archive, name) for name in archive.namelist()}


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _HEADER:
            shape, fortran_order, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds objects, not numbers")
        return np.ndarray(shape, dtype, bytearray(file.read()), order="F" if fortran_order else "C")
