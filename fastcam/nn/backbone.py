"""Classification networks as feature extractors: timm's layers, local weights, a chosen stride, frozen stages."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastcam.errors import FastcamError
from fastcam.nn.context import ContextDecoder
from fastcam.nn.networks import NETWORKS

PROBE = 64  # side of the image that measures strides; the last stage of a stride-32 network still has 2 x 2 pixels
STAGES = 4
OURS = "backbone.net."  # where a method of ours keeps its backbone
OURS_DECODER = "backbone.decoder."
DECODER = re.compile(r"(.+)\+(context|topdown)(\d+)")  # of the backbone's name
CLASSIFIER_PREFIXES = ("classifier.", "fc.", "head.", "pre_logits.")


class Backbone(nn.Module):
    """A timm network that returns the outputs of its last four stages, behind that of its stem where it is asked for.

    With a decoder, its outputs take the place of the four.

    Batch norm uses its running statistics, whatever mode the module is in; its weight and bias stay trainable except in
    frozen stages. CAM methods fine-tune on small batches of crops, where batch statistics would be noise. A network
    that starts from random weights has no statistics to keep: ``frozen_norm=False`` gives it ordinary batch norm.

    Args:
        net: timm network with ``forward_intermediates``.
        indices: which of its intermediates are the stages.
        head: the last output is the network's final feature map, after the 1 x 1 convolution that some networks
            (MobileNetV2, EfficientNet) have behind their last stage.
        normalize: mean and standard deviation of the RGB input the network was trained with.
        frozen_norm: whether batch norm keeps its running statistics.
        decoder: takes the list of the four stages' outputs and returns one of four, finest first.

    Attributes:
        channels: number of channels of each output.
        strides: stride of each output.
    """

    def __init__(
        self,
        net: Any,
        indices: list[int],
        head: bool,
        normalize: tuple[tuple[float, ...], ...],
        frozen_norm: bool = True,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.decoder = decoder
        self.indices = indices
        self.head = head
        self.normalize = normalize
        self.frozen_norm = frozen_norm
        self.eval()
        with torch.no_grad():
            outputs = self(torch.zeros(1, 3, PROBE, PROBE))
        self.channels = [x.shape[1] for x in outputs]
        self.strides = [_stride(x) for x in outputs]
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Outputs ``(B, channels[i], ~H / strides[i], ~W / strides[i])`` of images ``(B, 3, H, W)``."""
        stages = self.stages(images)
        return stages if self.decoder is None else [*stages[:-STAGES], *self.decoder(stages[-STAGES:])]

    def stages(self, images: Tensor) -> list[Tensor]:
        """The network's own stage outputs, in front of the decoder."""
        if not self.head:
            return self.net.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        last, stages = self.net.forward_intermediates(images, indices=self.indices)
        return [*stages[:-1], last]

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode of every layer but frozen batch norm, which keeps its running statistics."""
        super().train(mode)
        for module in self.modules():
            if self.frozen_norm and isinstance(module, _BatchNorm):
                module.eval()
        return self


def create_backbone(
    name: str,
    *,
    output_stride: int = 16,
    dilate: bool = True,
    weights: str | Path | None = None,
    frozen_stages: int = 0,
    frozen_norm: bool = True,
    head: bool = False,
    stem: bool = False,
    cut_stages: int = 0,
    drop_path: float = 0.0,
) -> Backbone:
    """A feature extractor from any timm network with at least four stages, or one of ``fastcam.nn.networks``. Nothing
    is downloaded.

    Where a layer would make the stride larger than ``output_stride`` its stride becomes 1, and the layers behind it are
    dilated to keep their field of view (DeepLab). SFC and IRN leave them undilated: ``dilate=False``.
    HRNet gives its four branches, from stride 4 to 32, and wants images whose sides are multiples of 32. PVTv2 keeps
    its stride of 32: its attention has strides of its own.

    Args:
        name: timm name, e.g. ``"resnet50"``, ``"mobilenetv2_100"``; or ``"squeezenet1_1"``, ``"resnet50_v2_c4"``.
            ``"pvt_v2_b2+context256"`` puts :class:`fastcam.nn.ContextDecoder` of width 256 on the four stages,
            ``"pvt_v2_b2+topdown256"`` one without attention to the coarsest stage; MEVT trains both parts, and its
            weights start both.
        output_stride: largest stride of the outputs: 8, 16 or 32.
        dilate: whether layers behind a removed stride are dilated.
        weights: local ``.safetensors`` or ``.pth`` state dict in timm's or torchvision's names, or weights of a trained
            method, whose backbone is taken; ``None`` for random weights. A decoder that the file does not hold starts
            from random weights.
        frozen_stages: parameters that the first ``frozen_stages`` stages depend on (the stem included) get no
            gradient.
        frozen_norm: batch norm keeps its running statistics. With random weights there are none to keep: use ``False``.
        head: end in the network's final feature map, e.g. MobileNetV2's 1280 channels, instead of its last stage.
        stem: begin with the output before the last four stages, where timm lists one: five outputs instead of four.
        cut_stages: the last stages of the network that are left out, with their weights: 1 ends a ResNet in layer3
            ("C4") and a VGG in front of its last pooling. Four outputs remain, those of the stages before.
        drop_path: largest rate of stochastic depth, for networks that have it.

    Raises:
        FastcamError: unknown network, fewer than four stages, a stride the network cannot be brought to, weights that
        do not fit.
    """
    import timm

    full_name, decoder = name, DECODER.fullmatch(name)
    name = decoder[1] if decoder else name
    if name not in NETWORKS and not timm.is_model(name):
        near = ", ".join(_nearest(name, [*NETWORKS, *timm.list_models()]))
        raise FastcamError(f"backbone '{name}': timm has no such network" + (f"; near it: {near}" if near else ""))
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    net: Any = (
        NETWORKS[name]() if name in NETWORKS else timm.create_model(name, pretrained=False, num_classes=0, **rate)
    )
    net.eval()
    if not hasattr(net, "forward_intermediates") or len(net.feature_info) < STAGES:
        raise FastcamError(
            f"backbone '{name}': expected a network with {STAGES} or more stages; choose a CNN such as 'resnet50'"
        )
    if not 0 <= frozen_stages <= STAGES:
        raise FastcamError(f"backbone '{name}': frozen_stages is {frozen_stages}, expected 0 to {STAGES}")
    full = set(net.state_dict())
    count = len(net.feature_info) - cut_stages
    if cut_stages < 0 or count < STAGES:
        most = len(net.feature_info) - STAGES
        raise FastcamError(f"backbone '{name}': cut_stages is {cut_stages}, expected 0 to {most}")
    before = min(count - STAGES, int(stem))
    indices = list(range(count - STAGES - before, count))
    if output_stride < 32 and any(key.endswith(".attn.sr") for key, _ in net.named_modules()):
        raise FastcamError(
            f"backbone '{name}': its attention has strides that change with the network's; use output_stride 32"
        )
    last, stages = _limit_stride(net, indices, output_stride, dilate)
    head = head and not cut_stages and last.shape[1] != stages[-1].shape[1]
    net.prune_intermediate_layers(indices, prune_norm=not head, prune_head=not head)
    if getattr(net, "incre_modules", None) is not None and not head:
        net.incre_modules = None  # HRNet's branches as they are; these widen them for its classifier
    on_top = None if decoder is None else _decoder(full_name, decoder, [x.shape[1] for x in stages], drop_path)
    if weights is not None:
        _load(net, name, Path(weights), unused=full - set(net.state_dict()))
        if on_top is not None:
            _load_decoder(on_top, full_name, Path(weights))
    try:
        normalize = (tuple(net.default_cfg["mean"]), tuple(net.default_cfg["std"]))
        backbone = Backbone(net, indices, head, normalize, frozen_norm, on_top)
    except RuntimeError:  # networks that join branches of several strides
        backbone = None
    if backbone is None or max(backbone.strides) > output_stride:
        raise FastcamError(
            f"backbone '{name}': cannot be brought to output stride {output_stride}; choose 32 or another network"
        )
    _freeze(backbone, frozen_stages + before if frozen_stages else 0)
    return backbone


def _stride(x: Tensor) -> int:
    """Stride of an output of the probe; without padding maps are a little smaller than the stride says."""
    return 2 ** round(math.log2(PROBE / x.shape[-1]))


def _nearest(name: str, names: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, names, n=3)


def _decoder(name: str, match: re.Match[str], channels: list[int], drop_path: float) -> ContextDecoder:
    """The decoder that a backbone's name asks for, on the last four stages."""
    try:
        return ContextDecoder(channels[-STAGES:], int(match[3]), cross=match[2] == "context", drop_path=drop_path)
    except ValueError as error:
        raise FastcamError(f"backbone '{name}': {error}") from None


def _load_decoder(decoder: ContextDecoder, name: str, path: Path) -> None:
    """The decoder of a trained method, where its weights hold one."""
    from fastcam.io import load_weights

    state = {k.removeprefix(OURS_DECODER): v for k, v in load_weights(path)[0].items() if k.startswith(OURS_DECODER)}
    expected = {k: v.shape for k, v in decoder.state_dict().items()}
    if state and expected != {k: v.shape for k, v in state.items()}:
        raise FastcamError(
            f"weights '{path}': hold another decoder than '{name}'; name the backbone they were trained with"
        )
    decoder.load_state_dict(state or decoder.state_dict())


def _limit_stride(net: Any, indices: list[int], output_stride: int, dilate: bool) -> tuple[Tensor, list[Tensor]]:
    """Takes the stride from layers that would pass ``output_stride`` and dilates those behind them.

    Returns the final and the stages' outputs of the network as it was.
    """

    def limit(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        stride_in, stride_out = _stride(args[0]), _stride(output)
        if stride_out > max(stride_in, output_stride):
            even = layer.kernel_size in (2, (2, 2))  # cannot be centred at stride 1
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                layer.padding = "same" if even else layer.padding
            else:
                layer.stride = 1
                layer.kernel_size = 1 if even else layer.kernel_size
        if dilate and stride_in > output_stride and isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1:
            rate = stride_in // output_stride
            layer.dilation = tuple(d * rate for d in layer.dilation)
            if not isinstance(layer.padding, str):
                layer.padding = tuple(p * rate for p in layer.padding)

    windows = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [m.register_forward_hook(limit) for m in net.modules() if isinstance(m, windows)]
    with torch.no_grad():  # a hook runs behind its layer, so that this pass still sees the network's own strides
        outputs = net.forward_intermediates(torch.zeros(1, 3, PROBE, PROBE), indices=indices)
    for hook in hooks:
        hook.remove()
    return outputs


def _freeze(backbone: Backbone, stages: int) -> None:
    if stages == 0:
        return
    parameters = list(backbone.parameters())
    with torch.enable_grad():
        output = backbone.stages(torch.zeros(1, 3, PROBE, PROBE))[stages - 1].sum()
    for p, g in zip(parameters, torch.autograd.grad(output, parameters, allow_unused=True), strict=True):
        if g is not None:
            p.requires_grad_(False)


def _load(net: nn.Module, name: str, path: Path, unused: set[str]) -> None:
    from fastcam.io import load_weights

    state, saved = load_weights(path)
    if "method" in saved:  # a trained method of ours: its backbone, without what DRS has put into it
        state = {
            k.removeprefix(OURS): v for k, v in state.items() if k.startswith(OURS) and not k.endswith(".controller")
        }
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    if "features.18.0.weight" in state:
        state = {_mobilenet_v2_key(k): v for k, v in state.items()}
    expected = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {
        k: v
        for k, v in state.items()
        if not k.endswith("num_batches_tracked")
        and (k in expected or (k not in unused and not k.startswith(CLASSIFIER_PREFIXES)))
    }
    _refuse(path, name, "lacks", expected.keys() - given.keys())
    _refuse(path, name, "has unexpected", given.keys() - expected.keys())
    _refuse(path, name, "has other shapes for", {k for k, shape in expected.items() if given[k].shape != shape})
    net.load_state_dict(given, strict=False)


def _refuse(path: Path, name: str, what: str, keys: set[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        raise FastcamError(
            f"weights '{path}': {what} {shown}; expected the tensors of '{name}' in timm's or torchvision's names"
        )


# torchvision counts MobileNetV2's blocks through: features.1 .. features.17; timm groups them into seven stages.
_MOBILENET_V2_BLOCKS = [f"blocks.{s}.{i}" for s, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for i in range(n)]
_MOBILENET_V2_FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
_MOBILENET_V2_BLOCK = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
_MOBILENET_V2_ENDS = {"0.0": "conv_stem", "0.1": "bn1", "18.0": "conv_head", "18.1": "bn2"}


def _mobilenet_v2_key(key: str) -> str:
    if m := re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)\.(\w+)", key):
        block, layer, tensor = int(m[1]), m[2], m[3]
        names = _MOBILENET_V2_FIRST if block == 1 else _MOBILENET_V2_BLOCK
        return f"{_MOBILENET_V2_BLOCKS[block - 1]}.{names.get(layer, layer)}.{tensor}"
    if m := re.fullmatch(r"features\.(\d+\.\d)\.(\w+)", key):
        return f"{_MOBILENET_V2_ENDS.get(m[1], m[1])}.{m[2]}"
    return key
