import numpy as np
import pytest
from PIL import Image

from fastcam.data import FolderDataset
from fastcam.errors import FastcamError

CLASSES = ("cat", "dog")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.JPG", "a.v2.png", "sub/a.webp"):
        Image.fromarray(np.full((2, 3, 3), 90, np.uint8)).save(folder / name)
    (folder / "readme.txt").touch()
    (folder / ".hidden.jpg").touch()
    return folder


def test_images_of_all_folders_sorted_with_their_tags(images, tmp_path):
    (tmp_path / "tags.csv").write_text("image,tags\nsub/a.webp,dog\nb.JPG,cat dog\na.v2,\nelsewhere,cat\n")
    dataset = FolderDataset(images, tmp_path / "tags.csv", classes=CLASSES)
    assert dataset.ids == ["a.v2", "b", "sub/a"]
    assert dataset.tags.tolist() == [[0, 0], [1, 1], [0, 1]]
    assert [item["id"] for item in dataset] == dataset.ids
    assert dataset[0]["image"].shape == (3, 2, 3) and "mask" not in dataset[0]


def test_tags_are_optional(images):
    assert "tags" not in FolderDataset(images, classes=CLASSES)[0]


def test_photographs_stand_upright(images):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((2, 3, 3), 90, np.uint8)).save(images / "b.JPG", exif=exif)
    assert FolderDataset(images, classes=CLASSES)[1]["image"].shape == (3, 3, 2)


def test_real_aerial_folder(shared_data):
    root = shared_data / "aerial/ucmerced"
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    dataset = FolderDataset(root, root / "labels.csv", classes=classes)
    assert len(dataset) == 256 and dataset.tags.sum(0).tolist() == [16] * 16
    item = dataset[17]
    assert classes[int(item["tags"].argmax())] == item["id"].split("/")[0]


class TestBadInput:
    def refused(self, message, *args, **options):
        with pytest.raises(FastcamError, match=message) as raised:
            FolderDataset(*args, classes=CLASSES, **options)
        assert "\n" not in str(raised.value)

    def test_missing_and_empty_folder(self, tmp_path):
        self.refused("nowhere does not exist", tmp_path / "nowhere")
        self.refused("has no image", tmp_path)

    def test_two_files_of_one_id(self, images):
        Image.new("RGB", (2, 2)).save(images / "b.png")
        self.refused(r"has b\.JPG and b\.png for one id", images)

    def test_image_without_tags_and_unknown_tag(self, images, tmp_path):
        (tmp_path / "tags.csv").write_text("b,cat\n")
        self.refused(r"has no entry for image 'a\.v2'", images, tmp_path / "tags.csv")
        (tmp_path / "tags.csv").write_text("b,cta\n")
        self.refused("'cta', which is no known class; nearest is 'cat'", images, tmp_path / "tags.csv")

    def test_damaged_image_and_too_large_image(self, images):
        (images / "b.JPG").write_bytes(b"")
        with pytest.raises(FastcamError, match=r"b\.JPG does not decode"):
            FolderDataset(images, classes=CLASSES)[1]
        with pytest.raises(FastcamError, match="max_pixels=5"):
            FolderDataset(images, classes=CLASSES, max_pixels=5)[0]
