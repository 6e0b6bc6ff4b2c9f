"""Modules, losses and backbones that several methods share."""

from fastcam.nn.backbone import Backbone, create_backbone
from fastcam.nn.bank import ImageBank
from fastcam.nn.cam import Cam, CamFusion, FusedCams, FusionPolicy, background_channel, max_normalize, multi_scale_max
from fastcam.nn.context import ContextDecoder
from fastcam.nn.correlation import pixel_correlation
from fastcam.nn.dense_crf import CRF_PRESETS, DenseCRF
from fastcam.nn.enet import ENet
from fastcam.nn.fold import fold_batch_norms
from fastcam.nn.gan import ReplayPool, ResnetGenerator, lsgan_discriminator_loss, lsgan_generator_loss
from fastcam.nn.losses import LossConfig, locally_adaptive_loss, ohem_cross_entropy, power_mean
from fastcam.nn.peaks import peak_backprop, peak_response_maps, peak_stimulation
from fastcam.nn.proposals import tree_proposals
from fastcam.nn.refine import Refine, affinity_labels, confident_labels, two_threshold_labels
from fastcam.nn.suppress import SuppressedReLU, suppress, suppress_activations
from fastcam.nn.trunk import create_trunk, score_head
from fastcam.nn.unet import UNet

__all__ = [
    "CRF_PRESETS",
    "Backbone",
    "Cam",
    "CamFusion",
    "ContextDecoder",
    "DenseCRF",
    "ENet",
    "FusedCams",
    "FusionPolicy",
    "ImageBank",
    "LossConfig",
    "Refine",
    "ReplayPool",
    "ResnetGenerator",
    "SuppressedReLU",
    "UNet",
    "affinity_labels",
    "background_channel",
    "confident_labels",
    "create_backbone",
    "create_trunk",
    "fold_batch_norms",
    "locally_adaptive_loss",
    "lsgan_discriminator_loss",
    "lsgan_generator_loss",
    "max_normalize",
    "multi_scale_max",
    "ohem_cross_entropy",
    "peak_backprop",
    "peak_response_maps",
    "peak_stimulation",
    "pixel_correlation",
    "power_mean",
    "score_head",
    "suppress",
    "suppress_activations",
    "tree_proposals",
    "two_threshold_labels",
]
