"""Arrays of .npz files against numpy's own reader."""

import concurrent.futures
import io

import numpy as np
import pytest

from fastcam.io._npz import read_npz

ARRAYS = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "number": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.uint8),
    "big_endian": np.arange(3, dtype=">f8"),
    "text": np.array(["a", "bc"]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_reads(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    arrays = read_npz(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as expected:
        assert arrays.keys() == set(expected.files)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], strict=True)
            assert array.flags.writeable


def test_objects_are_refused():
    file = io.BytesIO()
    np.savez(file, x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"x\.npy holds objects, not numbers"):
        read_npz(file)


def test_threads_that_read_at_once_all_get_the_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", **ARRAYS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda _: float(read_npz(tmp_path / "x.npz")["plain"].sum()), range(400)))
    assert sums == [15.0] * 400
