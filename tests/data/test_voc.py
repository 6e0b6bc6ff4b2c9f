import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from fastcam.data import VOC_CLASSES, VOCDataset, train_transform
from fastcam.errors import FastcamError
from fastcam.io import write_label_png

ANIMALS = ("cat", "cow", "dog", "horse", "sheep", "person")


@pytest.fixture
def root(tmp_path):
    """Two images: `a` with a cat (8) and a person (15), `b` with a dog (12)."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"):
        (tmp_path / folder).mkdir(parents=True)
    masks = {"a": [[0, 8, 255], [15, 8, 0]], "b": [[12, 12, 12], [0, 0, 255]]}
    names = {"a": ("cat", "person"), "b": ("dog",)}
    for name, mask in masks.items():
        Image.fromarray(np.full((2, 3, 3), 90, np.uint8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        write_label_png(tmp_path / f"SegmentationClass/{name}.png", torch.tensor(mask))
        objects = "".join(f"<object><name>{tag}</name></object>" for tag in names[name])
        (tmp_path / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (tmp_path / "tags.csv").write_text("a,cat person\nb,dog\n")
    return tmp_path


def test_item_has_the_promised_fields(root):
    item = VOCDataset(root, "train")[0]
    assert isinstance(item["image"], tv_tensors.Image) and isinstance(item["mask"], tv_tensors.Mask)
    assert item["image"].dtype == item["mask"].dtype == torch.uint8
    assert item["image"].shape == (3, 2, 3) and item["id"] == "a"
    assert item["mask"].tolist() == [[0, 8, 255], [15, 8, 0]]
    assert [VOC_CLASSES[k] for k in item["tags"].nonzero().flatten()] == ["cat", "person"]


@pytest.mark.parametrize("tags", ["mask", "xml", "tags.csv", "cls_labels.npy"])
def test_four_sources_of_tags_agree(root, tags):
    labels = {
        name: np.isin(range(20), present).astype(np.float32) for name, present in {"a": (7, 14), "b": (11,)}.items()
    }
    np.save(root / "cls_labels.npy", labels)
    dataset = VOCDataset(root, "train", tags=tags)
    assert dataset.tags.nonzero().tolist() == [[0, 7], [0, 14], [1, 11]]
    assert torch.equal(torch.stack([item["tags"] for item in dataset]), dataset.tags)


def test_subset_of_classes_ignores_the_pixels_and_tags_of_others(root):
    for tags in ("mask", "xml"):
        dataset = VOCDataset(root, "train", classes=("dog", "cat"), tags=tags)
        assert dataset.tags.tolist() == [[0, 1], [1, 0]]
        assert dataset[0]["mask"].tolist() == [[0, 2, 255], [255, 2, 0]]


def test_a_class_file_in_root_gives_the_labels_their_meaning(root):
    (root / "classes.txt").write_text("\n".join(f"kind{k}" for k in range(1, 16)))
    dataset = VOCDataset(root, "train", classes=("kind12", "kind8"))
    assert dataset[0]["mask"].tolist() == [[0, 2, 255], [255, 2, 0]]
    with pytest.raises(FastcamError, match=r"class 'kind88' is not in .*classes\.txt; nearest is 'kind8'"):
        VOCDataset(root, "train", classes=("kind88",))


def test_without_masks_the_image_alone_is_read(root):
    (root / "SegmentationClass" / "a.png").unlink()
    item = VOCDataset(root, "train", tags="tags.csv", masks=None)[0]
    assert "mask" not in item and item["tags"].sum() == 2


def test_without_tags_items_have_none_and_no_tag_file_is_read(root):
    (root / "tags.csv").unlink()
    dataset = VOCDataset(root, "train", tags=None, masks=None)
    assert not dataset.has_tags and dataset.tags is None
    assert set(dataset[0]) == {"image", "id"}


def test_list_by_path_with_further_columns(root):
    (root / "list.txt").write_text("/JPEGImages/b.jpg /SegmentationClassAug/b.png\n\na 1\n")
    assert VOCDataset(root, root / "list.txt").ids == ["b", "a"]


def test_stored_pixels_stay_where_the_mask_is_whatever_exif_says(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((2, 3, 3), 90, np.uint8)).save(root / "JPEGImages/a.jpg", exif=exif)
    assert VOCDataset(root, "train")[0]["image"].shape == (3, 2, 3)


def test_dataset_travels_to_workers(root):
    assert torch.equal(
        pickle.loads(pickle.dumps(VOCDataset(root, "train")))[1]["tags"], VOCDataset(root, "train")[1]["tags"]
    )


class TestBadInput:
    def refused(self, message, *args, index=None, **options):
        with pytest.raises(FastcamError, match=message) as raised:
            dataset = VOCDataset(*args, **options)
            if index is not None:
                dataset[index]
        assert "\n" not in str(raised.value)

    def test_missing_folders_and_lists(self, root):
        self.refused("JPEGImages does not exist; root must be", root / "nowhere", "train")
        self.refused(r"split 'trian' is neither .* has train", root, "trian")
        self.refused(r"mask folder .*SegmentationClassAug does not exist", root, "train", masks="SegmentationClassAug")

    def test_missing_files_are_found_at_once(self, root):
        (root / "SegmentationClass/b.png").unlink()
        self.refused(r"mask .*b\.png does not exist \(1 of 2", root, "train")
        (root / "JPEGImages/b.jpg").unlink()
        self.refused(r"image .*b\.jpg does not exist \(1 of 2", root, "train")

    def test_empty_and_double_lists(self, root):
        (root / "ImageSets/Segmentation/train.txt").write_text("\n")
        self.refused("names no image", root, "train")
        (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\na\n")
        self.refused("names image 'a' twice", root, "train")

    def test_mask_of_another_size(self, root):
        write_label_png(root / "SegmentationClass/a.png", torch.zeros(3, 3, dtype=torch.uint8))
        self.refused(r"a\.png is 3 x 3 pixels, but its image is 3 x 2", root, "train", index=0)

    def test_label_outside_the_class_range(self, root):
        write_label_png(root / "SegmentationClass/a.png", torch.full((2, 3), 21))
        self.refused(r"a\.png has label 21, expected 0 to 20 or 255", root, "train", index=0)
        self.refused(r"has label 21, expected 0 to 20", root, "train", classes=("cat",), index=0)

    def test_mask_of_colours(self, root):
        Image.new("RGB", (3, 2)).save(root / "SegmentationClass/a.png")
        self.refused("stores RGB colours", root, "train", index=0)

    def test_image_that_does_not_decode(self, root):
        (root / "JPEGImages/a.jpg").write_bytes(b"no image")
        self.refused(r"a\.jpg does not decode", root, "train", index=0)

    def test_image_that_is_too_large(self, root):
        self.refused("more than max_pixels=5", root, "train", max_pixels=5, index=0)

    def test_tags_from_masks_without_masks(self, root):
        self.refused("tags='mask' needs masks", root, "train", masks=None)


class TestRealVoc:
    def test_counts_of_the_data_sets_description(self, shared_data):
        root = shared_data / "voc/VOCdevkit/VOC2012"
        train = VOCDataset(root, "train", classes=ANIMALS, tags="image_labels.csv")
        val = VOCDataset(root, "val", classes=ANIMALS, tags="image_labels.csv")
        assert (len(train), len(val)) == (437, 225)
        assert train.tags.sum(0).tolist() == [131, 62, 121, 68, 63, 79]
        assert val.tags.sum(0).tolist() == [58, 39, 72, 39, 21, 47]

    def test_tags_of_the_list_equal_those_of_the_masks(self, shared_data):
        root = shared_data / "voc/VOCdevkit/VOC2012"
        from_mask = VOCDataset(root, "val")
        assert torch.equal(from_mask.tags, VOCDataset(root, "val", tags="image_labels.csv").tags)

    def test_images_without_masks_train(self, shared_data):
        root = shared_data / "voc/VOCdevkit/VOC2012"
        dataset = VOCDataset(
            root,
            "train_aug_images",
            tags="image_labels.csv",
            masks=None,
            transform=train_transform(64, resize_long=(64, 96)),
        )
        batch = torch.utils.data.default_collate([dataset[i] for i in (0, 100, 246)])
        assert batch["image"].shape == (3, 3, 64, 64) and batch["valid"].shape == (3, 64, 64)
        assert batch["tags"].sum(1).min() >= 1
