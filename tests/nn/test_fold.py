"""Folded batch norms: the same function with fewer modules, and no change where it would not be the same."""

import copy

import pytest
import torch
from torch import nn

from fastcam.methods import create_method
from fastcam.nn import fold_batch_norms


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and weights of norms that are not those of a fresh network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.3, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def on(images):
    return lambda network: network(images)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_values_of_torch_own_folding(bias, groups, affine):
    conv, norm = nn.Conv2d(3, 6, 3, bias=bias, groups=groups, padding=1), nn.BatchNorm2d(6, affine=affine)
    network = shaken(nn.Sequential(conv, norm))
    images = torch.randn(2, 3, 9, 7)
    folded = fold_batch_norms(network, on(images))
    expected = nn.utils.fusion.fuse_conv_bn_eval(conv, norm) if affine else network
    assert norms(folded) == 0 and norms(network) == 1
    with torch.no_grad():
        torch.testing.assert_close(folded(images), expected(images))
        torch.testing.assert_close(folded(images), network(images))


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv2_035", "test_efficientnet", "resnet10t"])
def test_backbones_give_the_same_maps(backbone):
    method = shaken(create_method("cam", num_classes=3, backbone=backbone))
    example = torch.randn(1, 3, 64, 64)
    folded = fold_batch_norms(method, lambda network: network.cams(example))
    assert norms(method) > 0 and norms(folded) == 0
    images = torch.randn(2, 3, 80, 48)
    with torch.no_grad():
        torch.testing.assert_close(folded.cams(images), method.cams(images), rtol=1e-3, atol=1e-4)


class Odd(nn.Module):
    """A convolution whose output two take, or whose norm takes something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "taken twice":
            return self.norm(y) + y
        if self.how == "called twice":
            return self.norm(self.conv(self.norm(y)) + y)
        return self.norm(y + x)


@pytest.mark.parametrize("how", ["taken twice", "called twice", "sum"])
def test_what_cannot_be_folded_stays(how):
    network = shaken(Odd(how))
    before = copy.deepcopy(network.state_dict())
    assert fold_batch_norms(network, on(torch.randn(1, 3, 8, 8))) is network
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_nothing_to_fold():
    for network in (
        nn.Conv2d(3, 3, 1),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ):
        assert fold_batch_norms(network.eval(), on(torch.randn(2, 3, 4, 4))) is network


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="fold_batch_norms: the network is in training mode"):
        fold_batch_norms(nn.BatchNorm2d(3), on(torch.randn(2, 3, 4, 4)))
