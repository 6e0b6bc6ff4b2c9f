"""Modules, losses and backbones that several methods share."""

from fastcam.nn.backbone import Backbone, create_backbone
from fastcam.nn.bank import ImageBank
from fastcam.nn.cam import Cam, CamFusion, FusedCams, FusionPolicy, background_channel, max_normalize
from fastcam.nn.correlation import pixel_correlation
from fastcam.nn.dense_crf import CRF_PRESETS, DenseCRF
from fastcam.nn.peaks import peak_backprop, peak_response_maps, peak_stimulation
from fastcam.nn.proposals import tree_proposals
from fastcam.nn.refine import Refine, affinity_labels, confident_labels, two_threshold_labels

__all__ = [
    "CRF_PRESETS",
    "Backbone",
    "Cam",
    "CamFusion",
    "DenseCRF",
    "FusedCams",
    "FusionPolicy",
    "ImageBank",
    "Refine",
    "affinity_labels",
    "background_channel",
    "confident_labels",
    "create_backbone",
    "max_normalize",
    "peak_backprop",
    "peak_response_maps",
    "peak_stimulation",
    "pixel_correlation",
    "tree_proposals",
    "two_threshold_labels",
]
