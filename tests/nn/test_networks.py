"""Networks of our own against torchvision's and timm's, and backbones that end before their last stages."""

import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.nn import create_backbone
from fastcam.nn.networks import ResNet50V2C4

timm = pytest.importorskip("timm")
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_squeezenet_is_torchvisions(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.squeezenet1_1().eval()
    torch.save(reference.state_dict(), tmp_path / "squeezenet.pth")
    backbone = create_backbone("squeezenet1_1", output_stride=32, weights=tmp_path / "squeezenet.pth", head=True)
    assert (backbone.channels, backbone.strides) == ([64, 128, 256, 512], [2, 4, 8, 16])
    with torch.no_grad():
        torch.testing.assert_close(backbone(IMAGES)[-1], reference.features(IMAGES))


def test_stages_of_the_pre_activation_network_are_timms():
    """Same residual stages; what timm lacks are the norms at the two ends."""
    torch.manual_seed(0)
    ours, theirs = ResNet50V2C4().eval(), timm.create_model("resnetv2_50", num_classes=0).eval()
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    names = {"bn": "norm", "downsample.weight": "downsample.conv.weight"}
    for layer, stage in zip((ours.layer1, ours.layer2, ours.layer3), theirs.stages, strict=False):
        for block, other in zip(layer, stage.blocks, strict=True):
            state = block.state_dict()
            for old, new in names.items():
                state = {key.replace(old, new): value for key, value in state.items()}
            other.load_state_dict(state)
    with torch.no_grad():
        x = ours.maxpool(ours.relu(ours.bn1(ours.conv1(ours.bn0(IMAGES)))))
        last, (_, one, two, _) = ours.forward_intermediates(IMAGES, [0, 1, 2, 3])
        for stage, expected in zip(theirs.stages, (one, two), strict=False):
            x = stage(x)
            torch.testing.assert_close(x, expected)
        torch.testing.assert_close(torch.relu(ours.bn_c4(theirs.stages[2](x))), last)


@pytest.mark.parametrize(("name", "output_stride"), [("squeezenet1_1", 16), ("resnet50_v2_c4", 8)])
def test_own_networks_reach_a_stride(name, output_stride):
    assert create_backbone(name, output_stride=output_stride).strides[-1] == output_stride


@pytest.mark.parametrize("name", ["squeezenet1_1_imagenet1k", "resnet50_v2_c4_imagenet1k"])
def test_given_weights_fit(name, shared_data):
    path = shared_data / "weights" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    backbone = create_backbone(name.removesuffix("_imagenet1k"), output_stride=32, weights=path, head=True)
    with torch.no_grad():
        last = backbone(IMAGES)[-1]
    assert last.isfinite().all() and last.min() == 0


class TestCutStages:
    def test_outputs_are_the_earlier_stages_of_the_whole_network(self):
        whole, cut = create_backbone("resnet18", output_stride=32), create_backbone("resnet18", cut_stages=1)
        cut.load_state_dict(whole.state_dict(), strict=False)
        assert (cut.channels, cut.strides) == ([64, 64, 128, 256], [2, 4, 8, 16])
        with torch.no_grad():
            for x, y in zip(cut(IMAGES)[1:], whole(IMAGES)[:3], strict=True):
                torch.testing.assert_close(x, y)
        assert not any("layer4" in key for key in cut.state_dict())

    def test_weights_may_lack_what_is_left_out_and_nothing_else(self, tmp_path):
        state = create_backbone("resnet18").net.state_dict()
        short = {key: value for key, value in state.items() if not key.startswith("layer4")}
        save_weights(tmp_path / "c4.safetensors", short, {})
        create_backbone("resnet18", cut_stages=1, weights=tmp_path / "c4.safetensors")
        save_weights(tmp_path / "all.safetensors", state, {})
        create_backbone("resnet18", cut_stages=1, weights=tmp_path / "all.safetensors")
        with pytest.raises(FastcamError, match=r"lacks layer4"):
            create_backbone("resnet18", weights=tmp_path / "c4.safetensors")

    def test_vgg_ends_in_front_of_its_last_pooling(self):
        cut = create_backbone("vgg11", cut_stages=1)
        assert (cut.channels, cut.strides) == ([128, 256, 512, 512], [2, 4, 8, 16])
        assert not isinstance(cut.net.features[-1], torch.nn.MaxPool2d)

    @pytest.mark.parametrize("cut", [-1, 2])
    def test_too_many_are_refused(self, cut):
        with pytest.raises(FastcamError, match=f"cut_stages is {cut}, expected 0 to 1"):
            create_backbone("resnet18", cut_stages=cut)
