import os
import pickle

import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import load_weights, save_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3).T, "a.bias": torch.ones(3, dtype=torch.float16)}


def assert_same(back, state):
    assert back.keys() == state.keys()
    assert all(back[name].dtype == state[name].dtype and torch.equal(back[name], state[name]) for name in state)


def test_round_trip_with_configuration(tmp_path):
    config = {"method": "sfc", "num_classes": 20, "config": {"scales": [1.0, 0.5]}}
    save_weights(tmp_path / "w.safetensors", STATE | {"tied": STATE["a.bias"]}, config)
    state, back = load_weights(tmp_path / "w.safetensors")
    assert back == config
    assert_same(state, STATE | {"tied": STATE["a.bias"]})


def test_loaded_tensors_outlive_a_change_of_the_file(tmp_path):
    save_weights(tmp_path / "w.safetensors", STATE, {})
    state, _ = load_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(bytes((tmp_path / "w.safetensors").stat().st_size))
    assert_same(state, STATE)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_torch_files_are_read_with_and_without_a_wrapper(tmp_path, wrap):
    torch.save({wrap: STATE, "epoch": 3} if wrap else STATE, tmp_path / "w.pth")
    state, config = load_weights(tmp_path / "w.pth")
    assert_same(state, STATE)
    assert config == {}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_torch_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for save in (torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))):
        save({"a": Evil()}, tmp_path / "w.pth")
        with pytest.raises(FastcamError, match=r"w\.pth cannot be read safely") as raised:
            load_weights(tmp_path / "w.pth")
        assert "\n" not in str(raised.value) and not (tmp_path / "ran").exists()


def test_missing_damaged_and_empty_files(tmp_path):
    with pytest.raises(FastcamError, match="do not exist"):
        load_weights(tmp_path / "w.safetensors")
    save_weights(tmp_path / "w.safetensors", STATE, {})
    data = (tmp_path / "w.safetensors").read_bytes()
    for part in (b"", data[:20], data[:-1]):
        (tmp_path / "w.safetensors").write_bytes(part)
        with pytest.raises(FastcamError, match="do not read as safetensors"):
            load_weights(tmp_path / "w.safetensors")
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(FastcamError, match="hold no state dict"):
        load_weights(tmp_path / "w.pth")


def test_reads_real_weights(shared_data):
    state, config = load_weights(shared_data / "weights" / "mobilenet_v2_imagenet1k.safetensors")
    assert state["features.0.0.weight"].shape == (32, 3, 3, 3) and config == {}
