import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastcam.data import open_archive, open_list
from fastcam.errors import FastcamError


def jpeg(value, size=(6, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.fixture
def archive(tmp_path):
    def write(**arrays):
        path = tmp_path / "images.npz"
        base = {"label": np.array([2, 0, 0, 1]), "classes": np.array(["A/x", "A/y", "B/z"])}
        np.savez(path, **{**base, **arrays})
        return path

    return write


GREY = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)


class TestArchive:
    def test_of_grey_images(self, archive):
        dataset = open_archive(archive(images=GREY))
        assert len(dataset) == 4 and dataset.classes == ("A/x", "A/y", "B/z") and dataset.has_tags
        assert dataset.ids == ["B/z/00", "A/x/00", "A/x/01", "A/y/00"]
        assert dataset.tags.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]]
        item = dataset[1]
        assert item["id"] == "A/x/00" and item["tags"].tolist() == [1, 0, 0]
        assert item["image"].dtype == torch.uint8
        assert item["image"].tolist() == [GREY[1].tolist()] * 3

    def test_of_colour_images(self, archive):
        images = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 3), dtype=np.uint8)
        assert open_archive(archive(images=images))[2]["image"].permute(1, 2, 0).tolist() == images[2].tolist()

    def test_of_strokes_is_white_on_black(self, archive):
        ink = np.random.default_rng(0).integers(0, 2, (4, 5, 5), dtype=np.uint8)
        packed = np.packbits(ink.reshape(4, 25), axis=1)
        dataset = open_archive(archive(strokes=packed, drawer=np.array([7, 1, 2, 1])))
        assert dataset.ids[0] == "B/z/07"
        assert dataset[3]["image"].tolist() == [(255 * ink[3]).tolist()] * 3

    def test_of_files_end_to_end(self, archive):
        files = [jpeg(value) for value in (10, 60, 120, 250)]
        offset = np.cumsum([0, *map(len, files)])
        dataset = open_archive(archive(jpeg=np.concatenate(files), offset=offset, wnid=np.array(["n1", "n2", "n3"])))
        assert dataset.ids == ["n3/00", "n1/00", "n1/01", "n2/00"]
        assert [item["image"].shape for item in dataset] == [(3, 4, 6)] * 4
        assert [round(item["image"].float().mean().item()) for item in dataset] == [10, 60, 120, 250]

    def test_split_of_the_classes(self, archive):
        path = archive(images=GREY, split=np.array(["val", "train", "train"]))
        train = open_archive(path, "train")
        assert train.classes == ("A/y", "B/z") and train.ids == ["B/z/00", "A/y/00"]
        assert train.tags.tolist() == [[0, 1], [1, 0]] and train[0]["image"][0].tolist() == GREY[0].tolist()
        assert open_archive(path, "val").ids == ["A/x/00", "A/x/01"]
        assert len(open_archive(path, "train+val")) == 4
        with pytest.raises(FastcamError, match="has no split 'test', expected one of val, train"):
            open_archive(path, "test")

    def test_without_splits_groups_of_names_are_splits_and_train_is_all(self, archive):
        path = archive(images=GREY)
        assert open_archive(path, "B").classes == ("B/z",)
        assert len(open_archive(path, "train")) == len(open_archive(path, "A+B")) == 4

    def test_chosen_classes_in_their_order(self, archive):
        dataset = open_archive(archive(images=GREY), classes=["B/z", "A/x"])
        assert dataset.classes == ("B/z", "A/x") and dataset.tags.argmax(1).tolist() == [0, 1, 1]
        with pytest.raises(FastcamError, match="has no class 'A/z'"):
            open_archive(archive(images=GREY), classes=["A/z"])

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({}, "holds label, classes, expected label, classes"),
            ({"images": GREY[:3]}, "has label int64 .* for 3 images"),
            ({"images": GREY, "label": np.array([0, 1, 2, 3])}, "0 to 2"),
            ({"images": GREY, "label": np.zeros(4)}, "an integer of 0 to 2"),
            ({"images": GREY.astype(np.float32)}, "images float32 .* expected uint8"),
            ({"images": GREY, "drawer": np.array([1, 1, 1, 1])}, "two images with id 'A/x/01'"),
        ],
    )
    def test_bad_arrays_are_refused(self, arrays, message, archive):
        with pytest.raises(FastcamError, match=message):
            open_archive(archive(**arrays))

    def test_missing_and_damaged_files_are_refused(self, archive, tmp_path):
        with pytest.raises(FastcamError, match=r"archive .* does not exist"):
            open_archive(tmp_path / "none.npz")
        (tmp_path / "text.npz").write_text("text")
        with pytest.raises(FastcamError, match="does not read as"):
            open_archive(tmp_path / "text.npz")
        np.savez(tmp_path / "pickle.npz", label=np.array([{}]))
        with pytest.raises(FastcamError, match="does not read as"):
            open_archive(tmp_path / "pickle.npz")

    def test_damaged_image_is_named_when_it_is_read(self, archive):
        files = [jpeg(1), jpeg(2), jpeg(3)[:9], jpeg(4)]
        dataset = open_archive(archive(jpeg=np.concatenate(files), offset=np.cumsum([0, *map(len, files)])))
        with pytest.raises(FastcamError, match=r"images.npz, image 2: "):
            dataset[2]

    def test_real_characters_and_photographs(self, shared_data):
        folder = shared_data / "fewshot"
        characters = open_archive(folder / "omniglot_background_small1.npz", "Greek+Latin")
        assert len(characters.classes) == 50 and len(characters) == 1000
        image = characters[0]["image"]
        assert image.shape == (3, 105, 105) and 0 < (image == 255).float().mean() < 0.2
        assert {int(i.rsplit("/")[-1]) for i in characters.ids} == set(range(1, 21))
        counts = [len(open_archive(folder / "tiny_imagenet_fewshot.npz", s)) for s in ("train", "val", "test")]
        assert counts == [64 * 20, 16 * 20, 20 * 20]
        assert open_archive(folder / "tiny_imagenet_fewshot.npz", "test")[5]["image"].shape == (3, 64, 64)


class TestList:
    @pytest.fixture
    def images(self, tmp_path):
        for i, name in enumerate(("a.jpg", "b.png", "c.jpg", "d.jpg")):
            Image.new("L", (3, 2), 50 * i).save(tmp_path / name)
        return tmp_path

    def test_names_images_and_numbers_classes_as_they_appear(self, images):
        (images / "train.csv").write_text("filename,label\nc.jpg,n2\na,n1\nb.png,n2\n")
        dataset = open_list(images, images / "train.csv")
        assert dataset.ids == ["c", "a", "b"] and dataset.classes == ("n2", "n1")
        assert dataset.tags.argmax(1).tolist() == [0, 1, 0]
        assert [int(item["image"][0, 0, 0]) for item in dataset] == [100, 0, 50]
        assert open_list(images, images / "train.csv", ["n1"]).ids == ["a"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("filename,label\n", "has no images, expected a header"),
            ("a.jpg\nb.png\n", "has no images, expected a header"),
            ("f,l\na.jpg,x\na,y\n", "names 'a' more than once"),
            ("f,l\nz.jpg,x\n", "z.jpg of list .* does not exist"),
        ],
    )
    def test_bad_lists_are_refused(self, text, message, images):
        (images / "l.csv").write_text(text)
        with pytest.raises(FastcamError, match=message):
            open_list(images, images / "l.csv")

    def test_missing_list_and_unknown_class_are_refused(self, images):
        with pytest.raises(FastcamError, match="does not read as CSV"):
            open_list(images, images / "none.csv")
        (images / "l.csv").write_text("f,l\na.jpg,cat\n")
        with pytest.raises(FastcamError, match="no image of class 'cats'; nearest is 'cat'"):
            open_list(images, images / "l.csv", ["cats"])
