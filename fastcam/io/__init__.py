"""Files in and out: labels, regions, saliency, CAMs, objects, IRN's files, weights, images, book-keeping of passes."""

from fastcam.io.atomic import atomic_write
from fastcam.io.cams import CamSet, encode_cams, load_cams, save_cams
from fastcam.io.images import IMAGE_SUFFIXES, MAX_PIXELS, image_size, read_image
from fastcam.io.instances import Instances, load_instances, save_instances
from fastcam.io.irn import load_irn_npy, save_irn_npy
from fastcam.io.labels import encode_label_png, read_label_png, voc_palette, write_label_png
from fastcam.io.nifti import Volume, read_nifti
from fastcam.io.passes import finished_ids, open_pass, read_pass
from fastcam.io.regions import load_tree, read_region_png, save_tree, write_region_png
from fastcam.io.saliency import find_saliency, read_saliency
from fastcam.io.weights import load_weights, save_weights

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "CamSet",
    "Instances",
    "Volume",
    "atomic_write",
    "encode_cams",
    "encode_label_png",
    "find_saliency",
    "finished_ids",
    "image_size",
    "load_cams",
    "load_instances",
    "load_irn_npy",
    "load_tree",
    "load_weights",
    "open_pass",
    "read_image",
    "read_label_png",
    "read_nifti",
    "read_pass",
    "read_region_png",
    "read_saliency",
    "save_cams",
    "save_instances",
    "save_irn_npy",
    "save_tree",
    "save_weights",
    "voc_palette",
    "write_label_png",
    "write_region_png",
]
