"""Modules, losses and backbones that several methods share."""

from fastcam.nn.backbone import Backbone, create_backbone
from fastcam.nn.bank import ImageBank
from fastcam.nn.cam import Cam, CamFusion, FusedCams, FusionPolicy, background_channel, max_normalize
from fastcam.nn.correlation import pixel_correlation

__all__ = [
    "Backbone",
    "Cam",
    "CamFusion",
    "FusedCams",
    "FusionPolicy",
    "ImageBank",
    "background_channel",
    "create_backbone",
    "max_normalize",
    "pixel_correlation",
]
