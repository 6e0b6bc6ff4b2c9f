"""Data sets by their layout on disk, joint transforms, and the procedural data set of the demo."""

from fastcam.data.acdc import ACDC_CLASSES, Scan, read_acdc, write_acdc
from fastcam.data.class_episodes import ClassEpisodes, class_members, draw_episode, fixed_episodes
from fastcam.data.classes import COCO_CLASSES, VOC_CLASSES, load_class_list
from fastcam.data.folder import FolderDataset
from fastcam.data.groups import GroupSampler
from fastcam.data.labelled import LabelledDataset, open_archive, open_list
from fastcam.data.multi_crop import draw_crops, multi_crop_transform
from fastcam.data.procedural import PROCEDURAL_CLASSES, write_procedural
from fastcam.data.retrieval import (
    Label,
    Query,
    crop_box,
    label_queries,
    read_labels,
    read_landmarks,
    ukbench_labels,
)
from fastcam.data.tags import (
    load_tags,
    read_cls_labels,
    read_tag_csv,
    read_tag_records,
    tags_from_mask,
    tags_from_xml,
)
from fastcam.data.transforms import (
    RandAugment,
    center_transform,
    denormalize,
    eval_transform,
    multi_scale,
    segment_transform,
    train_transform,
    turn_transform,
    twin_transform,
    two_view_transform,
)
from fastcam.data.voc import VOCDataset

__all__ = [
    "ACDC_CLASSES",
    "COCO_CLASSES",
    "PROCEDURAL_CLASSES",
    "VOC_CLASSES",
    "ClassEpisodes",
    "FolderDataset",
    "GroupSampler",
    "Label",
    "LabelledDataset",
    "Query",
    "RandAugment",
    "Scan",
    "VOCDataset",
    "center_transform",
    "class_members",
    "crop_box",
    "denormalize",
    "draw_crops",
    "draw_episode",
    "eval_transform",
    "fixed_episodes",
    "label_queries",
    "load_class_list",
    "load_tags",
    "multi_crop_transform",
    "multi_scale",
    "open_archive",
    "open_list",
    "read_acdc",
    "read_cls_labels",
    "read_labels",
    "read_landmarks",
    "read_tag_csv",
    "read_tag_records",
    "segment_transform",
    "tags_from_mask",
    "tags_from_xml",
    "train_transform",
    "twin_transform",
    "turn_transform",
    "two_view_transform",
    "ukbench_labels",
    "write_acdc",
    "write_procedural",
]
