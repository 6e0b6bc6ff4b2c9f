"""ENet and U-Net: sizes by the paper's table, and how they join what lies apart."""

import pytest
import torch

from fastcam.nn import ENet, UNet
from fastcam.nn.enet import Bottleneck


def test_enet_has_the_sizes_of_the_table():
    network, seen = ENet(1, 4).eval(), {}
    for name in ("first_norm", "down1", "down2", "up4", "up5"):

        def keep(module, given, out, name=name):
            seen[name] = tuple((out[0] if isinstance(out, tuple) else out).shape)

        getattr(network, name).register_forward_hook(keep)
    with torch.no_grad():
        assert network(torch.rand(2, 1, 64, 32)).shape == (2, 4, 64, 32)
    assert seen == {
        "first_norm": (2, 13, 32, 16),
        "down1": (2, 64, 16, 8),
        "down2": (2, 128, 8, 4),
        "up4": (2, 64, 16, 8),
        "up5": (2, 14, 32, 16),
    }
    assert [len(stage) for stage in (network.stage1, network.stage2, network.stage4, network.stage5)] == [4, 16, 2, 1]


def test_enet_bottlenecks_have_the_weights_of_the_table():
    def count(*args, **kwargs):
        return sum(p.numel() for p in Bottleneck(*args, **kwargs).parameters())

    def norm(channels, prelu=True):
        return channels * (3 if prelu else 2)

    assert count(64, 64) == 64 * 16 + norm(16) + (9 * 16 * 16 + 16) + norm(16) + 16 * 64 + norm(64)
    assert count(14, 64, "down") == 4 * 14 * 16 + norm(16) + (9 * 16 * 16 + 16) + norm(16) + 16 * 64 + norm(64)
    asymmetric = 5 * 32 * 32 + (5 * 32 * 32 + 32)
    assert count(128, 128, "asymmetric", 5) == 128 * 32 + norm(32) + asymmetric + norm(32) + 32 * 128 + norm(128)
    up = 128 * 16 + norm(16, False) + (9 * 16 * 16 + 16) + norm(16, False) + 16 * 64 + norm(64, False)
    assert count(128, 64, "up", prelu=False) == up + 128 * 64 + 2 * 64
    assert all(norm.eps == 1e-3 for norm in ENet(1, 4).modules() if isinstance(norm, torch.nn.BatchNorm2d))


def test_what_was_pooled_returns_to_its_place():
    """With bodies that add nothing, down then up leaves each maximum where it was and 0 elsewhere."""
    down, up = Bottleneck(4, 8, "down").eval(), Bottleneck(8, 4, "up", prelu=False).eval()
    for block in (down, up):
        torch.nn.init.zeros_(block.body[-3].weight)
    conv, norm = up.short
    conv.weight.data = torch.eye(8)[:4, :, None, None].clone()
    norm.eps = 0.0
    x = torch.rand(1, 4, 6, 10)
    with torch.no_grad():
        small, places = down(x)
        assert small.shape == (1, 8, 3, 5)
        assert small[:, 4:].abs().sum() == 0  # padded channels
        back, none = up(small, places)
    assert none is None
    expected = torch.where(x == small[:, :4].repeat_interleave(2, 2).repeat_interleave(2, 3), x, 0)
    torch.testing.assert_close(back, expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_unet_joins_every_level_and_keeps_the_size(depth):
    network = UNet(3, 5, width=4, depth=depth).eval()
    assert network.stride == 2**depth
    assert len(network.up) == depth
    x = torch.rand(1, 3, 3 * 2**depth, 2**depth, requires_grad=True)
    out = network(x)
    assert out.shape == (1, 5, 3 * 2**depth, 2**depth)
    widths = [block[0].in_channels for block in network.up]
    assert widths == [2 * 4 * 2**level for level in reversed(range(depth))]
    out.sum().backward()
    assert x.grad.abs().sum() > 0
