"""Backbones against timm and torchvision, and what stays frozen."""

import re

import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method
from fastcam.nn import create_backbone

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(("name", "output_stride"), [("mobilenetv2_035", 8), ("mobilenetv2_035", 16), ("resnet18", 16)])
def test_outputs_equal_those_of_timms_dilated_network(name, output_stride):
    torch.manual_seed(0)
    ours = create_backbone(name, output_stride=output_stride)
    theirs = timm.create_model(name, features_only=True, output_stride=output_stride, out_indices=(1, 2, 3, 4)).eval()
    reference = timm.create_model(name, num_classes=0, output_stride=output_stride).eval()
    reference.load_state_dict(ours.net.state_dict(), strict=False)
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = reference.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        for x, y in zip(ours(images), expected, strict=True):
            torch.testing.assert_close(x, y)
    assert ours.channels == theirs.feature_info.channels()
    assert ours.strides == [min(s, output_stride) for s in (4, 8, 16, 32)]


def test_undilated_network_differs_from_the_plain_one_in_strides_only():
    plain, dense = create_backbone("resnet18", output_stride=32), create_backbone("resnet18", dilate=False)
    dense.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for x, y in zip(plain(images)[:3], dense(images)[:3], strict=True):
            torch.testing.assert_close(x, y)
    convs = [m for m in dense.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.dilation == (1, 1) for m in convs)
    assert dense.strides == [4, 8, 16, 16]


@pytest.mark.parametrize("name", ["vgg11", "convnext_atto", "mobilenetv3_small_050"])
def test_networks_without_an_output_stride_of_their_own_reach_stride_16(name):
    backbone = create_backbone(name, output_stride=16)
    with torch.no_grad():
        outputs = backbone(torch.zeros(1, 3, 96, 64))
    assert [tuple(x.shape[2:]) for x in outputs] == [(24, 16), (12, 8), (6, 4), (6, 4)]
    assert [x.shape[1] for x in outputs] == backbone.channels


def test_head_ends_in_the_final_feature_map():
    assert create_backbone("mobilenetv2_035").channels[-1] == 112
    assert create_backbone("mobilenetv2_035", head=True).channels[-1] == 1280
    assert create_backbone("resnet18", head=True).channels[-1] == 512


def test_stem_comes_before_the_four_stages_where_the_network_has_one():
    plain, more = create_backbone("mobilenetv2_035"), create_backbone("mobilenetv2_035", stem=True)
    more.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stem, *stages = more(images)
        for x, y in zip(stages, plain(images), strict=True):
            torch.testing.assert_close(x, y)
    assert stem.shape[2:] == (32, 32)
    assert (more.strides, more.channels[1:]) == ([2, 4, 8, 16, 16], plain.channels)
    assert create_backbone("convnext_atto", stem=True).strides == [4, 8, 16, 16]


def test_stem_does_not_count_as_a_frozen_stage():
    frozen = [
        {
            name
            for name, p in create_backbone("resnet18", frozen_stages=n, stem=stem).named_parameters()
            if p.requires_grad
        }
        for n in (0, 1)
        for stem in (False, True)
    ]
    assert frozen[0] == frozen[1]
    assert frozen[2] == frozen[3] != frozen[0]


def test_frozen_stages_get_no_gradient_and_later_ones_do():
    backbone = create_backbone("resnet18", frozen_stages=2).train()
    backbone(torch.randn(1, 3, 32, 32))[-1].sum().backward()
    with_gradient = {name.split(".")[1] for name, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient == {"layer3", "layer4"}


def test_batch_norm_statistics_survive_training_and_its_affine_learns():
    backbone = create_backbone("mobilenetv2_035", frozen_stages=1)
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone.eval()
    backbone.train()
    backbone(torch.randn(4, 3, 64, 64) * 5)[-1].sum().backward()
    after = backbone.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms[-1].weight.grad is not None
    assert not norms[0].weight.requires_grad


def test_torchvision_mobilenet_file_gives_torchvisions_features(shared_data):
    torchvision = pytest.importorskip("torchvision")
    from safetensors.torch import load_file

    path = shared_data / "weights" / "mobilenet_v2_imagenet1k.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    reference = torchvision.models.mobilenet_v2().eval()
    state = {k: v.float() for k, v in load_file(path).items()}
    reference.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = create_backbone("mobilenetv2_100", output_stride=32, weights=path, head=True)(images)[-1]
        torch.testing.assert_close(reference.classifier(features.mean(dim=(2, 3))), reference(images))
        # As the weights' description has it: stride 1 in features.14, dilation 2 in 15 to 17.
        reference.features[14].conv[1][0].stride = (1, 1)
        for i in (15, 16, 17):
            conv = reference.features[i].conv[1][0]
            conv.dilation = conv.padding = (2, 2)
        features = create_backbone("mobilenetv2_100", output_stride=16, weights=path, head=True)(images)[-1]
        torch.testing.assert_close(features, reference.features(images))


def test_torchvision_resnet_state_loads_with_its_classifier_ignored(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.resnet18().eval()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    backbone = create_backbone("resnet18", output_stride=32, weights=tmp_path / "resnet18.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reference.fc(backbone(images)[-1].mean(dim=(2, 3))), reference(images))


def test_a_trained_method_lends_its_backbone(tmp_path):
    method = create_method("cam", num_classes=2, backbone="resnet10t")
    saved = {"method": "cam", "num_classes": 2, "backbone": "resnet10t", "config": {}}
    save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
    backbone = create_backbone("resnet10t", weights=tmp_path / "w.safetensors")
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, method.backbone.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer4.1.bn2.weight"), "lacks layer4.1.bn2.weight;"),
        (lambda s: s.update(extra=torch.zeros(1)), "has unexpected extra;"),
        (lambda s: s.update(conv1=s.pop("conv1.weight")), "lacks conv1.weight;"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "has other shapes for conv1.weight;"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(tmp_path, change, message):
    state = timm.create_model("resnet18").state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(FastcamError, match=re.escape(message)):
        create_backbone("resnet18", weights=tmp_path / "w.pth")


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(FastcamError, match=r"timm has no such network; near it: .*resnet50"):
        create_backbone("resnet_50")
    with pytest.raises(FastcamError, match=r"absent\.pth do not exist"):
        create_backbone("resnet18", weights=tmp_path / "absent.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(FastcamError, match="do not read as safetensors"):
        create_backbone("resnet18", weights=tmp_path / "broken.safetensors")
    with pytest.raises(FastcamError, match="frozen_stages is 5, expected 0 to 4"):
        create_backbone("resnet18", frozen_stages=5)
    with pytest.raises(FastcamError, match="cannot be brought to output stride 16"):
        create_backbone("hrnet_w18_small", output_stride=16)


def test_hrnet_gives_its_four_branches_from_weights_of_the_whole_classifier(tmp_path):
    from safetensors.torch import save_file

    whole = timm.create_model("hrnet_w18_small", pretrained=False)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    backbone = create_backbone("hrnet_w18_small", output_stride=32, weights=tmp_path / "w.safetensors").eval()
    assert backbone.channels == [16, 32, 64, 128]
    assert backbone.strides == [4, 8, 16, 32]
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x1 = whole.eval().act2(whole.bn2(whole.conv2(whole.act1(whole.bn1(whole.conv1(x))))))
        torch.testing.assert_close(backbone(x), whole.stages(x1))
