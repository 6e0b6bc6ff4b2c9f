"""PseudoLabeler: what a row becomes, that rows do not disturb each other, and that any file may come."""

import dataclasses
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny import CLASSES

from fastcam.data import VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import encode_label_png, load_cams, read_label_png
from fastcam.pipelines import labeler as labeler_module
from fastcam.pipelines._data import load_trained
from fastcam.pipelines.label import Rule, label_image
from fastcam.pipelines.labeler import PseudoLabeler, Settings, expected_iou, reduced
from fastcam.pipelines.make_cam import image_cams
from fastcam.pipelines.refine import Crf

SETTINGS = Settings(scales=(1.0, 0.5), rule=Rule(threshold=0.4), crf=Crf(preset="psa", iterations=2), cams=True)
MUTATIONS = int(os.environ.get("FASTCAM_MUTATIONS", "60"))  # 1000 for the full corpus


@pytest.fixture(scope="module")
def labeler(weights) -> PseudoLabeler:
    return PseudoLabeler(weights, SETTINGS, device="cpu")


@pytest.fixture(scope="module")
def rows(root) -> list[dict]:
    dataset = VOCDataset(root, "train", classes=CLASSES, tags="image_labels.csv", masks=None)
    return [
        {"image": str(path), "tags": tags.numpy(), "number": i}
        for i, (path, tags) in enumerate(zip(dataset.files, dataset.tags, strict=True))
    ]


def encoded(pixels, kind="png", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestRows:
    def test_the_mask_is_that_of_the_single_steps(self, labeler, rows):
        out = labeler(rows[:3])
        for row, made in zip(rows, out, strict=False):
            image = torch.from_numpy(np.array(Image.open(row["image"]))).permute(2, 0, 1)
            views = labeler._views(image)
            cams = image_cams(labeler.method, views, (48, 48), torch.from_numpy(row["tags"]), 1, 0.5)
            expected = label_image(cams, "a", SETTINGS.rule, SETTINGS.crf, image)
            assert (read_label_png(made["mask"]) == expected).float().mean() > 0.99  # batches round differently
            stored = load_cams(made["cam"])
            assert stored.maps.shape[1:] == (12, 12) and stored.size == (48, 48)
            torch.testing.assert_close(stored.maps, reduced(cams, 4).maps, rtol=1e-2, atol=1e-3)  # float16

    def test_fields_tell_what_the_mask_holds(self, labeler, rows):
        for row in labeler(rows):
            label = read_label_png(row["mask"])
            counts = dict(zip(row["labels"], row["pixels"], strict=True))
            assert counts == {int(k): int((label == k).sum()) for k in label.unique()}
            assert row["classes"] == [CLASSES[k] for k in np.flatnonzero(row["tags"])]
            assert (row["height"], row["width"]) == tuple(label.shape)
            assert 0 < row["quality"] <= 1 and row["seconds"] > 0 and row["error"] is None
            assert row["fingerprint"] == labeler.fingerprint and row["number"] == rows[row["number"]]["number"]

    def test_columns_in_columns_out(self, labeler, rows):
        columns = {"image": [r["image"] for r in rows[:2]], "tags": np.stack([r["tags"] for r in rows[:2]])}
        out = labeler(columns)
        assert out["mask"] == [row["mask"] for row in labeler(rows[:2])]
        assert {"image", "tags", "mask", "cam", "quality", "error", "fingerprint"} <= out.keys()
        assert out["tags"] == columns["tags"].tolist()
        empty = labeler({"image": [], "tags": []})
        assert empty.keys() == out.keys() and empty["mask"] == []

    def test_bytes_names_and_vectors_are_the_same_image(self, labeler, rows):
        names = [CLASSES[k] for k in np.flatnonzero(rows[0]["tags"])]
        content = Path(rows[0]["image"]).read_bytes()
        made = [
            labeler([{"image": i, "tags": t}])[0] for i in (rows[0]["image"], content) for t in (names, rows[0]["tags"])
        ]
        assert len({row["mask"] for row in made}) == 1

    def test_order_and_bytes_do_not_depend_on_threads(self, weights, rows):
        mixed = [*rows, *({"image": encoded(noise(20 + i % 3, 31)), "number": 100 + i} for i in range(9))]
        random.Random(0).shuffle(mixed)
        several = PseudoLabeler(weights, SETTINGS, device="cpu", workers=5)
        single = PseudoLabeler(weights, SETTINGS, device="cpu", workers=1)
        one, other = several(mixed), single(mixed)
        assert [row["number"] for row in one] == [row["number"] for row in mixed]
        assert [(row["mask"], row["cam"], row["quality"]) for row in one] == [
            (row["mask"], row["cam"], row["quality"]) for row in other
        ]

    def test_images_of_one_size_go_through_the_network_together(self, weights, rows, monkeypatch):
        sizes = []
        original = labeler_module.batch_cams

        def watched(method, views, size, *rest):
            sizes.append((len(views[0]), tuple(size)))
            return original(method, views, size, *rest)

        monkeypatch.setattr(labeler_module, "batch_cams", watched)
        small = {"image": encoded(noise(24, 24))}
        four = Settings(scales=(1.0,), rule=Rule(threshold=0.4), crf=None, batch_pixels=4 * 48 * 48)
        PseudoLabeler(weights, four, device="cpu")([rows[0], small, *rows[1:6], small])
        assert sizes == [(4, (48, 48)), (2, (48, 48)), (2, (24, 24))]

    def test_without_tags_the_classifier_chooses(self, labeler, monkeypatch):
        def tag_logits(images):
            return torch.tensor([[5.0, -5.0, -5.0, 5.0, -5.0, -5.0]]).expand(len(images), 6)

        monkeypatch.setattr(labeler.method, "tag_logits", tag_logits, raising=False)
        image = encoded(noise(24, 24))
        found, given, none = labeler(
            [{"image": image}, {"image": image, "tags": [CLASSES[1]]}, {"image": image, "tags": []}]
        )
        assert found["classes"] == [CLASSES[0], CLASSES[3]]
        assert given["classes"] == [CLASSES[1]]
        assert none["classes"] == [] and none["labels"] == [0] and none["quality"] == 1

    def test_fingerprint_names_weights_settings_and_version(self, weights, trained, monkeypatch):
        def of(path, settings):
            return labeler_module.fingerprint(settings.record(path))

        first = of(weights, SETTINGS)
        assert first == of(weights, SETTINGS)
        others = [of(trained, SETTINGS), of(weights, Settings())]
        monkeypatch.setattr(labeler_module, "__version__", "9")
        assert len({first, *others, of(weights, SETTINGS)}) == 4

    def test_sixteen_bit_gives_nearly_the_same_masks(self, labeler, weights, rows):
        half = PseudoLabeler(weights, dataclasses.replace(SETTINGS, precision="bfloat16"), device="cpu")
        assert half.fingerprint != labeler.fingerprint
        for row, other in zip(labeler(rows[:4]), half(rows[:4]), strict=True):
            assert other["error"] is None
            assert (read_label_png(row["mask"]) == read_label_png(other["mask"])).float().mean() > 0.9
            assert load_cams(row["cam"]).maps.sub(load_cams(other["cam"]).maps).abs().mean() < 0.02

    def test_norms_are_folded(self, labeler, trained):
        assert not [m for m in labeler.method.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert [m for m in load_trained(trained, "cam")[0].modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def test_coco_rle_is_the_mask(self, weights, rows):
        coco = pytest.importorskip("pycocotools.mask")
        settings = Settings(scales=(1.0,), rule=Rule(high=0.9, low=0.1), crf=None, rle=True)
        (row,) = PseudoLabeler(weights, settings, device="cpu")(rows[:1])
        label, rebuilt = read_label_png(row["mask"]).numpy(), np.zeros((48, 48), np.uint8)
        for record in json.loads(row["rle"]):
            run = coco.decode(record["segmentation"])
            rebuilt[run > 0] = record["category_id"]
            assert record["area"] == run.sum()
        assert np.array_equal(rebuilt, label) and 255 in label


class TestQuality:
    def test_worked_by_hand(self):
        scores = torch.tensor([[0.9, 0.6, 0.2, 0.1], [0.1, 0.4, 0.8, 0.9]])[:, None]
        label = torch.tensor([[0, 0, 3, 3]], dtype=torch.uint8)
        background, three = 1.5 / (2 + 0.3), 1.7 / (2 + 0.5)
        assert expected_iou(label, scores, torch.tensor([2])) == pytest.approx((background + three) / 2, abs=1e-6)

    def test_sure_is_one_unsure_is_less_missing_is_lower(self):
        label = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
        sure = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])[:, None]
        even = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])[:, None]
        key = torch.tensor([0])
        assert expected_iou(label, sure, key) == 1
        assert expected_iou(torch.zeros_like(label), even, key) < expected_iou(label, even, key) < 1

    def test_ignored_pixels_do_not_count(self):
        label = torch.tensor([[0, 255, 1]], dtype=torch.uint8)
        scores = torch.tensor([[1.0, 0.5, 0], [0, 0.5, 1]])[:, None]
        assert expected_iou(label, scores, torch.tensor([0])) == 1
        assert expected_iou(torch.full_like(label, 255), scores, torch.tensor([0])) == 0


def png_header(width, height) -> bytes:
    """A PNG of some bytes that claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestSafety:
    GOOD = noise(24, 32)

    def label(self, labeler, image, **row):
        """The row of an image between two good ones, which must not suffer."""
        good = {"image": encoded(self.GOOD), "tags": [CLASSES[0]]}
        before, row, after = labeler([good, {"image": image, "tags": [CLASSES[0]], **row}, good])
        for neighbour in (before, after):
            assert neighbour["error"] is None and neighbour["mask"] == before["mask"]
        if row["error"] is not None:
            assert row["mask"] is None and row["quality"] is None and row["cam"] is None
            assert "\n" not in row["error"]
        return row

    def test_an_encapsulated_program_is_not_started(self, labeler):
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
        assert "its content is none of JPEG" in self.label(labeler, eps)["error"]

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (b"", "image has no bytes"),
            (b"\xff\xd8\xff not an image", "does not decode"),
            (b"<html>404 not found</html>", "its content is none of JPEG, PNG"),
            (png_header(10_000, 10_000), "has 10000 x 10000 pixels, more than max_pixels"),
            (png_header(60_000, 60_000), "exceeds limit"),
            (png_header(0, 5), "does not decode"),
            (None, "image is a NoneType, expected a path or bytes"),
            (3, "image is a int, expected a path or bytes"),
            ("/nowhere/a.jpg", "cannot be read: No such file"),
            ("a\0b.jpg", "cannot be read: "),
            (Path("/dev/zero"), "is no regular file"),
        ],
        ids=str,
    )
    def test_what_is_no_image(self, labeler, image, message):
        assert message in self.label(labeler, image)["error"]

    def test_pipe_is_not_waited_for(self, labeler, tmp_path):
        os.mkfifo(tmp_path / "a.jpg")
        assert "is no regular file" in self.label(labeler, tmp_path / "a.jpg")["error"]

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
    @pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
    def test_truncated(self, labeler, kind, share):
        whole = encoded(noise(60, 60), kind)
        assert "does not decode" in self.label(labeler, whole[: int(share * len(whole))])["error"]

    def test_suffix_that_lies(self, labeler, tmp_path):
        (tmp_path / "a.jpg").write_bytes(encoded(self.GOOD, "png"))
        right = self.label(labeler, encoded(self.GOOD))
        assert self.label(labeler, tmp_path / "a.jpg")["mask"] == right["mask"]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
    def test_other_modes(self, labeler, mode):
        grey = np.linspace(0, 255, 24 * 32).reshape(24, 32)
        image = Image.fromarray((257 * grey).astype(np.uint16) if mode == "I;16" else grey.astype(np.uint8))
        image = (
            image
            if mode in ("I;16", "L")
            else image.convert("RGB").convert(mode)
            if mode != "LA"
            else image.convert(mode)
        )
        buffer = io.BytesIO()
        image.save(buffer, "tiff" if mode in ("CMYK", "YCbCr") else "png")
        row = self.label(labeler, buffer.getvalue())
        assert row["error"] is None and (row["height"], row["width"]) == (24, 32)

    def test_exif_rotation(self, labeler, weights):
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = encoded(self.GOOD, "png", exif=exif)
        row = self.label(labeler, turned)
        assert (row["height"], row["width"]) == (32, 24)
        assert row["mask"] == self.label(labeler, encoded(np.rot90(self.GOOD, -1).copy()))["mask"]
        stored = PseudoLabeler(weights, Settings(scales=(1.0,), rule=Rule(threshold=0.4), orient=False), device="cpu")
        assert stored([{"image": turned}])[0]["height"] == 24

    def test_max_pixels(self, weights):
        small = Settings(scales=(1.0,), rule=Rule(threshold=0.4), crf=None, max_pixels=700)
        large, good = PseudoLabeler(weights, small, device="cpu")(
            [{"image": encoded(noise(24, 32))}, {"image": encoded(noise(20, 32))}]
        )
        assert "has 32 x 24 pixels, more than max_pixels=700" in large["error"] and good["error"] is None

    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
    def test_tiny_and_thin(self, labeler, size):
        row = self.label(labeler, encoded(noise(*size)))
        assert row["error"] is None and (row["height"], row["width"]) == size

    @pytest.mark.parametrize(
        ("tags", "message"),
        [
            (["unicorn"], "tag 'unicorn' is no known class"),
            (["foxx"], "nearest is 'fox'"),
            ([1, 0], "expected names of classes or a 0/1 vector of length 6"),
            ([2, 0, 0, 0, 0, 0], "expected names of classes or a 0/1 vector"),
            ("fox", "expected a list of names"),
            (7, "expected a list of names"),
        ],
    )
    def test_tags_that_are_none(self, labeler, tags, message):
        assert message in self.label(labeler, encoded(self.GOOD), tags=tags)["error"]

    def test_error_of_the_network_hits_one_image(self, labeler, monkeypatch):
        original = type(labeler.method).logits

        def fussy(self, images):
            if bool((images[..., 0, 0] > 2).all(1).any()):
                raise RuntimeError("out of memory\nand more")
            return original(self, images)

        monkeypatch.setattr(type(labeler.method), "logits", fussy)
        white = self.GOOD.copy()
        white[:3, :3] = 255
        assert self.label(labeler, encoded(white))["error"] == "RuntimeError: out of memory and more"

    def test_maps_that_are_not_finite(self, labeler, monkeypatch):
        original = labeler_module.batch_cams

        def broken(*args):
            made = original(*args)
            if len(made) > 1:
                made[1] = dataclasses.replace(made[1], maps=made[1].maps * torch.nan)
            return made

        monkeypatch.setattr(labeler_module, "batch_cams", broken)
        assert "finite" in self.label(labeler, encoded(self.GOOD))["error"]

    def test_row_that_comes_with_an_error_is_passed_on(self, labeler):
        assert self.label(labeler, None, error="lost on the way")["error"] == "lost on the way"

    def test_mutated_files(self, labeler):
        """Bytes flipped, cut out, put in and cut off: each file is labelled or has its reason."""
        made = labeler([{"image": image, "tags": [CLASSES[0]]} for image in mutations(MUTATIONS)])
        failed = [row for row in made if row["error"] is not None]
        assert len(made) == MUTATIONS and MUTATIONS // 4 < len(failed) < MUTATIONS
        assert all((row["mask"] is None) == (row["error"] is not None) for row in made)
        assert all(len(row["error"].strip()) > 10 and "\n" not in row["error"] for row in failed)
        good = {"image": encoded(self.GOOD), "tags": [CLASSES[0]]}
        assert labeler([good])[0]["error"] is None

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"scales": ()}, "scales are .* expected positive numbers"),
            ({"scales": (1.0, 0)}, "scales are"),
            ({"precision": "float8"}, "precision is 'float8', expected float32 or bfloat16"),
            ({"rule": Rule()}, "method cam leaves the background to a rule"),
            ({"stride": 0}, "stride is 0, expected at least 1"),
            ({"rule": Rule(high=0.3)}, "needs both"),
            ({"crf": Crf(sxy=-1)}, r"crf\.sxy is -1"),
        ],
    )
    def test_settings_that_cannot_be(self, weights, settings, message):
        with pytest.raises(FastcamError, match=message):
            PseudoLabeler(weights, Settings(**settings), device="cpu")


def mutations(count):
    """Damaged image files of many kinds, always the same ones."""
    draw = random.Random(0)
    pixels = noise(30, 40)
    seeds = [encoded(pixels, kind) for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm")]
    seeds.append(encoded(pixels, "jpeg", progressive=True))
    seeds.append(encoded(pixels[..., 0].astype(np.uint16) * 257))
    seeds.append(encode_label_png(pixels[..., 0]))
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(draw.choice((1, 1, 3, 20))):
            at = draw.randrange(min(len(data), draw.choice((40, 200, len(data)))) or 1)
            how = draw.randrange(5)
            if how == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                data[at] = draw.choice((0, 255, 127))
            elif how == 2:
                del data[at : at + draw.randrange(1, 50)]
            elif how == 3:
                data[at:at] = draw.randbytes(draw.randrange(1, 50))
            else:
                del data[max(1, at) :]
            if not data:
                break
        yield bytes(data)
