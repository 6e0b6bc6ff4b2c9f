"""A tiny data set and what the first passes make of it, shared by all tests of pipelines."""

import dataclasses
from pathlib import Path

import pytest
import torch
from pipelines.tiny import METHOD, TRAINER

from fastcam.data import write_procedural
from fastcam.io import load_weights, save_weights
from fastcam.pipelines._data import Data
from fastcam.pipelines.make_cam import make_cam
from fastcam.pipelines.train import train


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Small networks gain nothing from threads, and sums depend on their number: before every other fixture."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def root(tmp_path_factory) -> Path:
    """12 training and 4 validation images of 48 x 48 pixels in VOC layout."""
    folder = tmp_path_factory.mktemp("voc")
    write_procedural(folder, train=12, val=4, size=48)
    return folder


@pytest.fixture(scope="package")
def data(root) -> Data:
    return Data(root=str(root), tags="image_labels.csv")


@pytest.fixture(scope="package")
def trained(data, tmp_path_factory) -> Path:
    """The weights of a plain CAM network after one epoch, in the folder of its training."""
    out = tmp_path_factory.mktemp("train")
    return train(data, METHOD, dataclasses.replace(TRAINER, epochs=1), out)


@pytest.fixture(scope="package")
def weights(trained, tmp_path_factory) -> Path:
    """The same with a positive classifier, so that every map shows something."""
    state, about = load_weights(trained)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(path, {**state, "classifier.weight": state["classifier.weight"].abs()}, about)
    return path


@pytest.fixture(scope="package")
def cams(data, weights, tmp_path_factory) -> Path:
    """CAMs of the training images."""
    out = tmp_path_factory.mktemp("cams")
    make_cam(data, weights, out, scales=(1.0, 0.5))
    return out
