"""Class activation maps of classifiers: normalisation, background, and the fusion of several views of one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcam.ops.cam_fuse import Activation, Normalize, Reduce, cam_fuse
from fastcam.ops.cam_label import cam_label


class FusedCams(NamedTuple):
    """The maps of a batch of images at full size.

    ``maps`` ``(B, C, H, W)``: one map a class in [0, 1], 0 for absent classes. ``background`` ``(B, H, W)``, or
    ``None`` where the method leaves the background to a threshold; a pixel is background where ``background`` is at
    least the largest map.
    """

    maps: Tensor
    background: Tensor | None = None


def max_normalize(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Divides every map of ``(..., H, W)`` by its maximum plus ``eps``: a zero map stays zero."""
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + eps)


def background_channel(maps: Tensor) -> Tensor:
    """``1 - max_k``: the background ``(B, 1, H, W)`` of normalised maps ``(B, C, H, W)``."""
    return 1 - maps.amax(dim=1, keepdim=True)


def multi_scale_max(
    cams: Callable[[Tensor, Tensor | None], Tensor],
    views: Sequence[Tensor],
    size: tuple[int, int],
    tags: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    mirror: bool = False,
    normalize: Normalize | None = "max",
) -> Tensor:
    """Maps of several views of an image, each normalised by itself, the largest value kept at every pixel (DRS).

    A view never lowers a map, unlike in :class:`CamFusion`, which normalises once, behind the fusion.

    Args:
        cams: ``(images (B, 3, h, w), tags) -> (B, C, h', w')``, the maps of one view.
        views: the images at one scale each.
        size: ``(H, W)`` of the result; maps are resized with their corners aligned.
        tags: ``(B, C)``; absent classes give 0. ``None``: every class counts as present.
        keys: int64 ``(n,)``: only the maps of these classes are fused and returned. ``None``: all.
        mirror: take each view's mirror image too, normalised with it.
        normalize: as in :func:`fastcam.cam_fuse`.

    Returns:
        ``(B, C, H, W)``, or ``(B, n, H, W)``.
    """
    if not views:
        raise ValueError("multi_scale_max: expected at least one view, got none")
    fusion = CamFusion("irn", mirror=mirror, multiple=1, reduce="max", normalize=normalize, align_corners=True)
    return torch.stack([fusion(cams, [view], size, tags, keys).maps for view in views]).amax(dim=0)


@dataclass(frozen=True)
class FusionPolicy:
    """How a system makes one map a class from several views of an image.

    ``scales`` of the image, in the authors' order, resized by ``resize`` (``"bicubic"``: with antialiasing, as Pillow
    does, to rounded sizes; ``"bilinear"``: without, to sizes rounded down); ``mirror``: each with its mirror image.
    Maps are resized to multiples of ``multiple``, then cut; the other fields are arguments of :func:`fastcam.cam_fuse`.
    """

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    mirror: bool = True
    multiple: int = 1
    activation: Activation | None = "relu"
    reduce: Reduce = "sum"
    normalize: Normalize | None = "max"
    align_corners: bool = False
    eps: float = 1e-5


_ATTENTION = FusionPolicy((1.0,), activation=None, normalize="minmax", eps=1e-8)
_AFA = FusionPolicy((1.0, 0.5, 1.5), "bilinear", activation="resized_relu", reduce="pair_max", normalize="minmax")
POLICIES = {
    "irn": FusionPolicy(multiple=16),  # high_res; its maps at stride 4 take multiple=1
    "psa": FusionPolicy(),
    "seam": FusionPolicy((0.5, 1.0, 1.5, 2.0), activation="fused_relu", normalize="seam"),
    "mctformer": _ATTENTION,
    "mctformer+": replace(_ATTENTION, scales=(1.0, 0.75, 1.25)),
    "afa": _AFA,
    "toco": _AFA,
    "1-stage": FusionPolicy(activation=None, reduce="mean", normalize=None),
}


class CamFusion:
    """The fusion of a published system, by name.

    Args:
        policy: ``"irn"``, ``"psa"``, ``"seam"``, ``"mctformer"`` (V2), ``"mctformer+"``, ``"afa"``, ``"toco"``,
            ``"1-stage"``, or a :class:`FusionPolicy`.
        changes: fields of :class:`FusionPolicy` that differ.

    Example:
        >>> fusion = CamFusion("irn", scales=(1.0, 2.0), multiple=1)
        >>> views = fusion.views(torch.rand(1, 3, 4, 6))
        >>> [tuple(view.shape[2:]) for view in views]
        [(4, 6), (8, 12)]
        >>> fusion(lambda images, tags: images, views, (4, 6)).maps.shape
        torch.Size([1, 3, 4, 6])
    """

    def __init__(self, policy: str | FusionPolicy = "irn", **changes: Any) -> None:
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"CamFusion: expected one of {', '.join(POLICIES)}, got {policy!r}")
            policy = POLICIES[policy]
        unknown = sorted(set(changes) - {f.name for f in fields(FusionPolicy)})
        if unknown:
            raise ValueError(f"CamFusion: {unknown[0]!r} is no field of FusionPolicy")
        self.policy = replace(policy, **changes)

    def views(self, images: Tensor) -> list[Tensor]:
        """Images ``(B, 3, H, W)`` at every scale."""
        p = self.policy
        views = []
        for scale in p.scales:
            wanted = [n * scale for n in images.shape[2:]]
            if p.resize == "bicubic":
                size = [max(1, round(n)) for n in wanted]
                view = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            else:
                size = [max(1, int(n)) for n in wanted]
                view = F.interpolate(images, size, mode="bilinear", align_corners=False)
            views.append(images if scale == 1 else view)
        return views

    def fuse(self, maps: Sequence[Tensor], size: tuple[int, int], present: Tensor | None = None) -> Tensor:
        """Fused maps ``(B, C, H, W)`` of the maps ``(B, C, h, w)`` of views, each followed by its mirror image's."""
        return cam_fuse(maps, size, present=present, **self._arguments(maps, size))

    def label(
        self, maps: Sequence[Tensor], size: tuple[int, int], background: float | tuple[str, float],
        keys: Tensor | None = None, present: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Labels uint8 ``(B, H, W)`` of what :meth:`fuse` gives, without writing it: :func:`fastcam.cam_label`."""
        return cam_label(maps, size, background=background, keys=keys, present=present, **self._arguments(maps, size))

    def __call__(
        self,
        cams: Callable[[Tensor, Tensor | None], Tensor],
        views: Sequence[Tensor],
        size: tuple[int, int],
        tags: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> FusedCams:
        """Maps of every view and of its mirror image, fused.

        Args:
            cams: ``(images (B, 3, h, w), tags) -> (B, C, h', w')``, the maps of one view.
            views: the images at one scale each, ``(B, 3, h_s, w_s)``; :meth:`views` makes them.
            size: ``(H, W)`` of the result.
            tags: ``(B, C)``; absent classes give 0. ``None``: every class counts as present.
            keys: int64 ``(n,)``: only the maps of these classes are fused and returned. ``None``: all.

        Returns:
            ``FusedCams`` without background.
        """
        if not views:
            raise ValueError("CamFusion: expected at least one view, got none")
        maps: list[Tensor] = []
        twice = torch.cat([tags, tags]) if self.policy.mirror and tags is not None else tags
        for view in views:
            both = cams(torch.cat([view, view.flip(-1)]) if self.policy.mirror else view, twice)
            maps += (both if keys is None else both[:, keys]).chunk(2 if self.policy.mirror else 1)
        present = None if tags is None else tags > 0
        return FusedCams(self.fuse(maps, size, present if present is None or keys is None else present[:, keys]))

    def _arguments(self, maps: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Any]:
        p = self.policy
        return {
            "grid": tuple(-(-n // p.multiple) * p.multiple for n in size),
            "flips": [p.mirror and i % 2 == 1 for i in range(len(maps))],
            "activation": p.activation,
            "reduce": p.reduce,
            "normalize": p.normalize,
            "align_corners": p.align_corners,
            "eps": p.eps,
        }


class Cam(nn.Module):
    """CAM and Grad-CAM of any classifier, for all classes asked for at once, at several scales and mirrored.

    With ``classifier``: CAM (B. Zhou et al., CVPR 2016), the classifier's weights applied to every pixel of the
    layer's features. Without: Grad-CAM (R. R. Selvaraju et al., ICCV 2017), weights that are the spatial means of a
    logit's gradient. One forward pass a scale gives the maps of all classes; Grad-CAM adds one backward pass from the
    logits to the layer, vectorised over classes.

    The model is used as it is, so call ``model.eval()`` first. Where gradients are enabled the maps are differentiable;
    where not, nothing before the layer is recorded.

    Args:
        model: ``(B, 3, H, W) -> logits (B, C)``.
        layer: the module whose output ``(B, D, h, w)`` is weighed, or its name in ``model``.
        classifier: the linear layer or 1 x 1 convolution from the mean of these features to the logits, or its name.
            ``None``: Grad-CAM.
        fusion: how views are fused.
        reshape: makes ``(B, D, h, w)`` of the layer's output, where that has another form.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> Cam(model, "0", "3")(torch.rand(2, 3, 8, 8), keys=torch.tensor([1, 3])).shape
        torch.Size([2, 2, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        classifier: nn.Module | str | None = None,
        *,
        fusion: CamFusion | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.fusion = fusion or CamFusion("psa")
        self._layer = model.get_submodule(layer) if isinstance(layer, str) else layer
        self._classifier = model.get_submodule(classifier) if isinstance(classifier, str) else classifier
        self._reshape = reshape or (lambda features: features)
        if self._classifier is not None and not isinstance(getattr(self._classifier, "weight", None), Tensor):
            raise TypeError(f"Cam: expected a classifier with a weight, got {type(self._classifier).__name__}")

    def forward(
        self,
        images: Tensor,
        tags: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Fused maps of images.

        Args:
            images: ``(B, 3, H, W)``, normalised as the model expects.
            tags: ``(B, C)``; classes that an image does not have give 0 there.
            keys: int64 ``(n,)``, the classes to explain. ``None``: those that any image has, or without ``tags`` all.
            size: of the maps; ``None``: that of the images.

        Returns:
            ``(B, n, H, W)``, in the order of ``keys``.
        """
        if images.ndim != 4:
            raise ValueError(f"Cam: expected images (B, 3, H, W), got {tuple(images.shape)}")
        if keys is None and tags is not None:
            keys = (tags > 0).any(0).nonzero().flatten()
        if tags is not None:
            tags = tags[:, keys]
        size = size or (images.shape[2], images.shape[3])
        return self.fusion(lambda views, _: self.maps(views, keys), self.fusion.views(images), size, tags).maps

    def maps(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Maps ``(B, n, h, w)`` of one view as the formula gives them, before any activation."""
        if self._classifier is not None:
            output, _ = self._run(images, needs_gradient=False)
            features = self._form(output)
            weight = cast(Tensor, self._classifier.weight).flatten(1).to(features.dtype)
            if weight.shape[1] != features.shape[1]:
                raise ValueError(
                    f"Cam: expected a classifier of the layer's {features.shape[1]} features, got weight of "
                    f"{weight.shape[1]}"
                )
            return torch.einsum("bdhw,nd->bnhw", features, weight if keys is None else weight[keys])
        differentiable = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            output, logits = self._run(images if differentiable else images.clone(), needs_gradient=True)
            if logits.ndim != 2:
                raise ValueError(f"Cam: expected a model that gives logits (B, C), got {tuple(logits.shape)}")
            features = self._form(output)
            n = logits.shape[1] if keys is None else len(keys)
            if n == 0:
                return features.new_zeros(len(features), 0, *features.shape[2:])
            with torch.enable_grad():
                total = (logits if keys is None else logits[:, keys]).sum(0)  # a logit depends on its own image alone
            (gradient,) = torch.autograd.grad(
                total,
                output,
                torch.eye(n, dtype=logits.dtype, device=logits.device),
                is_grads_batched=True,
                create_graph=differentiable,
            )
            weight = self._form(gradient.flatten(0, 1)).mean((2, 3)).unflatten(0, (n, -1))
            maps = torch.einsum("bdhw,nbd->bnhw", features, weight)
            return maps if differentiable else maps.detach()

    def _form(self, output: Tensor) -> Tensor:
        features = self._reshape(output)
        if features.ndim != 4:
            raise ValueError(
                f"Cam: expected a layer that gives (B, D, h, w), got {tuple(features.shape)}; pass reshape to form it"
            )
        return features

    def _run(self, images: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
        """The layer's output and the logits, which are recorded from that output on where gradients are needed."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if needs_gradient and not output.requires_grad:
                torch.set_grad_enabled(True)
                output = output.detach().requires_grad_()
            seen.append(output)
            return output.clone()  # what follows may work in place

        handle = self._layer.register_forward_hook(hook)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # its end undoes what the hook sets
                logits = self.model(images)
        finally:
            handle.remove()
        if not seen:
            raise ValueError("Cam: the layer took no part in the model's forward pass")
        return seen[-1], logits
