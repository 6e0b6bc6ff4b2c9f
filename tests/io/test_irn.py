import os
import pickle

import numpy as np
import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import load_irn_npy, save_irn_npy
from fastcam.io._restricted_npy import load_object

CAMS = {
    "keys": torch.tensor([1, 3]),
    "cam": torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)),
    "high_res": np.random.default_rng(0).random((2, 12, 16), dtype=np.float32),
}


class Evil:
    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def save_pickle(path, obj, protocol=4):
    """A `.npy` file of dtype object whose pickle holds `obj` where numpy puts the array."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(obj, file, protocol=protocol)


def test_reads_the_dictionary_that_irn_writes(tmp_path):
    np.save(tmp_path / "a.npy", CAMS)  # as step/make_cam.py does: tensors for keys and cam, an array for high_res
    cams = load_irn_npy(tmp_path / "a.npy")
    assert torch.equal(cams["keys"], CAMS["keys"]) and torch.equal(cams["cam"], CAMS["cam"])
    assert torch.equal(cams["high_res"], torch.from_numpy(CAMS["high_res"]))


def test_writes_what_irn_reads(tmp_path):
    high_res = torch.from_numpy(CAMS["high_res"])
    save_irn_npy(tmp_path / "a.npy", CAMS["keys"], CAMS["cam"], high_res)
    theirs = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    assert isinstance(theirs["cam"], torch.Tensor) and isinstance(theirs["high_res"], np.ndarray)
    assert np.pad(theirs["keys"] + 1, (1, 0)).tolist() == [0, 2, 4]
    assert torch.equal(load_irn_npy(tmp_path / "a.npy")["high_res"], high_res)


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    maps = torch.zeros(100, 64, 64)
    save_irn_npy(tmp_path / "a.npy", torch.arange(1), maps[:1], maps[:1])
    assert (tmp_path / "a.npy").stat().st_size < 3 * 4 * 64 * 64


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1.5, -2.0], ">f4"),
        np.array([True, False]),
        np.array(["person", "cat"]),
        np.array([{"a": 1}, None], dtype=object),
        np.float32(0.5),
        np.zeros((0, 3)),
    ],
    ids=lambda value: f"{value.dtype}-{value.shape}",
)
def test_arrays_come_back_as_numpy_wrote_them(tmp_path, value, protocol):
    save_pickle(tmp_path / "a.npy", np.array({"x": value, 2007000032: [value]}, dtype=object), protocol)
    obj = load_object(tmp_path / "a.npy")
    assert list(obj) == ["x", 2007000032]
    for back in (obj["x"], obj[2007000032][0]):
        assert np.array_equal(back, value) and np.asarray(back).dtype.kind == value.dtype.kind


def test_tensors_of_any_strides_and_dtype_come_back(tmp_path):
    tensors = [torch.arange(6).view(2, 3).T, torch.ones(3, dtype=torch.float16)[1:], torch.zeros(0, 2)]
    save_pickle(tmp_path / "a.npy", np.array({"x": tensors}, dtype=object))
    for back, tensor in zip(load_object(tmp_path / "a.npy")["x"], tensors, strict=True):
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)


@pytest.mark.parametrize(
    "call", [os.system, eval, exec, getattr, __import__, np.load, torch.load, torch.hub.load, pickle.loads, type]
)
def test_malicious_pickles_are_refused_and_do_not_run(tmp_path, call):
    mark = tmp_path / "ran"
    save_pickle(tmp_path / "a.npy", Evil(call, f"__import__('os').system('touch {mark}')"))
    with pytest.raises(FastcamError, match=r"a\.npy wants to run .*; do not trust this file") as raised:
        load_irn_npy(tmp_path / "a.npy")
    assert "\n" not in str(raised.value) and not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_hidden_in_a_tensor_storage_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    inner = pickle.dumps(Evil(os.system, f"touch {mark}"))
    save_pickle(tmp_path / "a.npy", Evil(torch.storage._load_from_bytes, inner))
    with pytest.raises(FastcamError, match=r"a\.npy does not read"):
        load_irn_npy(tmp_path / "a.npy")
    assert not mark.exists()


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path):
    storage = torch.zeros(4)._typed_storage()
    for size, stride in [((100,), (1,)), ((4,), (1000,)), ((4,), (-1,))]:
        save_pickle(tmp_path / "a.npy", Evil(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {}))
        with pytest.raises(FastcamError, match=r"a\.npy does not read"):
            load_object(tmp_path / "a.npy")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_always_give_one_line(tmp_path):
    np.save(tmp_path / "a.npy", CAMS)
    good = (tmp_path / "a.npy").read_bytes()
    rng = np.random.default_rng(0)
    for length in (0, 5, 50, 140, len(good) // 2, len(good) - 1):
        (tmp_path / "b.npy").write_bytes(good[:length])
        with pytest.raises(FastcamError, match=r"b\.npy"):
            load_irn_npy(tmp_path / "b.npy")
    survived = 0
    for _ in range(200):
        data = bytearray(good)
        data[rng.integers(len(good))] = rng.integers(256)
        (tmp_path / "b.npy").write_bytes(data)
        try:
            load_irn_npy(tmp_path / "b.npy")
            survived += 1
        except FastcamError as error:
            assert "\n" not in str(error)
    assert survived > 0  # a changed map value is no damage that can be seen


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"a": 1}, r"holds a dictionary with \['a'\], expected IRN"),
        ([1, 2], "holds a list"),
        ({"keys": np.arange(2), "cam": np.zeros((3, 4, 4))}, "has shapes"),
        ({"keys": "cat", "cam": np.zeros((3, 4, 4))}, "a field that is no array"),
    ],
)
def test_other_dictionaries_are_refused(tmp_path, obj, message):
    holder = np.empty((), object)
    holder[()] = obj
    np.save(tmp_path / "a.npy", holder)
    with pytest.raises(FastcamError, match=message):
        load_irn_npy(tmp_path / "a.npy")


def test_plain_arrays_and_missing_files(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(FastcamError, match="not one dictionary"):
        load_irn_npy(tmp_path / "a.npy")
    with pytest.raises(FastcamError, match="does not exist"):
        load_irn_npy(tmp_path / "b.npy")


def test_shapes_that_do_not_fit_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="save_irn_npy: expected"):
        save_irn_npy(tmp_path / "a.npy", torch.arange(2), torch.zeros(1, 2, 2), torch.zeros(2, 4, 4))
