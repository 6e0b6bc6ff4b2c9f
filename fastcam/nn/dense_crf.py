"""The dense CRF as a layer, and the parameter sets of published systems."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.ops.crf_mean_field import Compat, Sigma, crf_mean_field

# What published systems give their CRF: (sxy, compat), (sxy, srgb, compat); all run 10 steps.
CRF_PRESETS: dict[str, tuple[tuple[float, float], tuple[float, float, float]]] = {
    "psa": ((3, 3), (80, 13, 10)),  # also SEAM, 1-stage, AFA and ToCo: scores of CAMs or of a network
    "irn": ((3, 3), (50, 5, 10)),  # also AFA and ToCo: labels that are right with probability 0.7
    "deeplab": ((1, 3), (67, 3, 4)),  # deeplab-pytorch, DRS, CLIP-ES
    "afa": ((3, 3), (64, 5, 4)),  # segmentation at test time, as those below
    "toco": ((1, 1), (121, 5, 4)),
    "toco_cam": ((3, 3), (36, 3, 4)),  # CAMs to labels
    "mctformer": ((4, 3), (83, 5, 3)),
}


class DenseCRF(nn.Module):
    r"""Mean field of a fully connected CRF on the output of a network: logits in, marginals out.

    Energies are :math:`-\log \mathrm{softmax}(\text{logits})`; see :func:`fastcam.crf_mean_field` for the model and
    cost. For energies ``u`` pass ``-u``, for probabilities their logarithm: what is added to all labels of a pixel does
    not matter. Differentiable in the logits through all steps (CRF-RNN, Zheng et al., ICCV 2015).

    Args:
        iterations: steps.
        gaussian: ``(sxy, compat)`` or ``None``.
        bilateral: ``(sxy, srgb, compat)`` or ``None``.
        normalization: as in :func:`fastcam.crf_mean_field`, as ``kernel`` and ``backend``.
        kernel: ``"fast"``, ``"lattice"`` (pydensecrf's numbers) or ``"exact"``.
        clip: smallest probability that the energies are made of, or ``None``. Published systems have 1e-5; a label
            below it gets no gradient.
        learn_compat: the compatibilities are parameters instead of buffers. Each learns in the form given: a number, a
            vector or a matrix.
        backend: ``None`` to choose.

    Attributes:
        gaussian_compat: the compatibility of the Gaussian term, ``None`` without that term; ``bilateral_compat`` alike.

    Raises:
        ValueError: ``clip`` out of range. Other values are judged by :func:`fastcam.crf_mean_field` when called.

    Example:
        >>> crf = DenseCRF.preset("irn")
        >>> logits, image = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        >>> crf(logits, image)[0, :, 0, 0]
        tensor([0.5000, 0.5000])
    """

    gaussian_compat: Tensor
    bilateral_compat: Tensor

    def __init__(
        self,
        *,
        iterations: int = 10,
        gaussian: tuple[Sigma, Compat] | None = (3, 3),
        bilateral: tuple[Sigma, Sigma, Compat] | None = (80, 13, 10),
        normalization: Literal["symmetric", "before", "after", "none"] = "symmetric",
        kernel: Literal["fast", "lattice", "exact"] = "fast",
        clip: float | None = None,
        learn_compat: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"DenseCRF: expected clip in (0, 1) or None, got {clip}")
        self.iterations = iterations
        self.normalization = normalization
        self.kernel = kernel
        self.clip = clip
        self.backend = backend
        self.gaussian_sigma = gaussian and gaussian[:-1]
        self.bilateral_sigma = bilateral and bilateral[:-1]
        for name, term in (("gaussian_compat", gaussian), ("bilateral_compat", bilateral)):
            compat = None if term is None else torch.as_tensor(term[-1], dtype=torch.get_default_dtype()).clone()
            if learn_compat:
                self.register_parameter(name, None if compat is None else nn.Parameter(compat))
            else:
                self.register_buffer(name, compat)

    @classmethod
    def preset(cls, name: str, **options: Any) -> DenseCRF:
        """The CRF of a published system, by its name in ``CRF_PRESETS``, with its energies clipped at 1e-5.

        Args:
            name: ``"psa"``, ``"irn"``, ``"deeplab"``, ``"afa"``, ``"toco"``, ``"toco_cam"`` or ``"mctformer"``.
            options: arguments of :class:`DenseCRF` that differ.

        Raises:
            ValueError: an unknown name.
        """
        if name not in CRF_PRESETS:
            raise ValueError(f"DenseCRF: expected a preset of {', '.join(CRF_PRESETS)}, got {name!r}")
        gaussian, bilateral = CRF_PRESETS[name]
        return cls(**{"gaussian": gaussian, "bilateral": bilateral, "clip": 1e-5, **options})

    def forward(self, logits: Tensor, image: Tensor | None, valid: Tensor | None = None) -> Tensor:
        """Marginals of the labels.

        Args:
            logits: :math:`(B, K, H, W)`, floating. ``-inf`` rules a label out unless there is ``clip``.
            image: :math:`(B, 3, H, W)` in 0..255, before any normalisation, of the size of the logits; ``None`` without
                a bilateral term.
            valid: int64 :math:`(B, 2)`, true heights and widths of padded images.

        Returns:
            Q :math:`(B, K, H, W)` in the dtype of ``logits``.

        Raises:
            ValueError, TypeError: see :func:`fastcam.crf_mean_field`.
        """
        unary = -logits if self.clip is None else -F.log_softmax(logits, dim=1).clamp(min=math.log(self.clip))
        return crf_mean_field(
            unary,
            image,
            iterations=self.iterations,
            gaussian=self.gaussian_sigma and (*self.gaussian_sigma, self.gaussian_compat),
            bilateral=self.bilateral_sigma and (*self.bilateral_sigma, self.bilateral_compat),
            normalization=self.normalization,
            kernel=self.kernel,
            valid=valid,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What tells two CRFs apart, for ``repr``."""
        sigmas = f"gaussian_sigma={self.gaussian_sigma}, bilateral_sigma={self.bilateral_sigma}"
        return f"iterations={self.iterations}, {sigmas}, normalization={self.normalization}, kernel={self.kernel}"
