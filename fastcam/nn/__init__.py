"""Modules, losses and backbones that several methods share."""

from fastcam.nn.backbone import Backbone, create_backbone
from fastcam.nn.bank import ImageBank
from fastcam.nn.cam import FusedCams, background_channel, fuse_views, max_normalize
from fastcam.nn.correlation import pixel_correlation
from fastcam.nn.refine import Refine, affinity_labels, confident_labels, two_threshold_labels

__all__ = [
    "Backbone",
    "FusedCams",
    "ImageBank",
    "Refine",
    "affinity_labels",
    "background_channel",
    "confident_labels",
    "create_backbone",
    "fuse_views",
    "max_normalize",
    "pixel_correlation",
    "two_threshold_labels",
]
