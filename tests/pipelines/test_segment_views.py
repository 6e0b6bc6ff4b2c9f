"""How the segment pass joins views and windows, and how it reads plain folders with masks and a void label."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny import TRAINER

from fastcam.data import FolderDataset, VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import read_label_png
from fastcam.pipelines._data import Data
from fastcam.pipelines.evaluate import evaluate
from fastcam.pipelines.segment import image_probabilities, segment, window_logits

OCR = {"name": "ocr", "backbone": "test_resnet", "coarse_channels": 8, "mid_channels": 8, "key_channels": 4, "lr": 0.05}


class Brightness(torch.nn.Module):
    """A segmenter whose logits are linear in the pixel."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([-1.0, 0.5, 2.0]), requires_grad=False)

    def logits(self, images):
        return images[:, :1] * self.factor[:, None, None]


def views(sizes=((6, 8), (12, 16))):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=g) for size in sizes]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("fuse", ["prob", "logits", "exp_logits"])
def test_views_are_joined_as_worked_by_hand(fuse, flip):
    network = Brightness()
    terms = []
    for view in views():
        logits = torch.nn.functional.interpolate(network.logits(view[None]), (6, 8), mode="bilinear")[0]
        mirrored = torch.nn.functional.interpolate(network.logits(view[None].flip(-1)), (6, 8), mode="bilinear")[0]
        both = [logits, mirrored.flip(-1)] if flip else [logits]
        if fuse == "prob":
            terms += [both_i.softmax(0) for both_i in both]
        elif fuse == "logits":
            terms += both
        else:
            terms.append(torch.stack(both).mean(0).exp())
    mean = torch.stack(terms).mean(0)
    expected = mean.softmax(0) if fuse == "logits" else mean / mean.sum(0)
    torch.testing.assert_close(image_probabilities(network, views(), (6, 8), flip, fuse), expected)


def test_exponentials_of_huge_logits_are_finite():
    p = image_probabilities(Brightness(), [1e4 * view for view in views()], (6, 8), True, "exp_logits")
    assert p.isfinite().all()
    torch.testing.assert_close(p.sum(0), torch.ones(6, 8))


@pytest.mark.parametrize("size", [(5, 5), (12, 17), (7, 31)])
def test_windows_cover_every_pixel_and_average_what_overlaps(size):
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(window_logits(Brightness(), images, 6), Brightness().logits(images))

    class Where(Brightness):
        def logits(self, images):
            assert max(images.shape[-2:]) <= 6
            return images[:, :1] - images[:, :1].mean((2, 3), keepdim=True)

    whole = images[:1].clone()
    whole[:] = torch.arange(size[1])
    out = window_logits(Where(), whole, 6)
    assert out.shape == (1, 1, *size)
    assert out.isfinite().all()
    if size == (12, 17):  # windows begin at columns 0, 4, 8, 11; column 4 is in the first two
        assert out[0, 0, 0, 4].item() == pytest.approx(((4 - 2.5) + (4 - 6.5)) / 2)


@pytest.fixture
def camvid(tmp_path):
    """Four frames in CamVid's layout: 0 is a class, 3 is void."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "camvid" / folder).mkdir(parents=True)
    for i in range(4):
        label = np.repeat(np.repeat(rng.integers(0, 4, (3, 4)), 16, 0), 16, 1).astype(np.uint8)
        Image.fromarray(np.stack([60 * label] * 3, -1)).save(tmp_path / "camvid" / "images" / f"f{i}.png")
        Image.fromarray(label).save(tmp_path / "camvid" / "labels" / f"f{i}.png")
    return tmp_path / "camvid"


def test_ocr_trains_predicts_and_is_scored_on_a_plain_folder_with_a_void_label(camvid, tmp_path):
    data = Data(images=str(camvid / "images"), masks=str(camvid / "labels"), classes=["road", "tree"], void=3)
    trainer = dataclasses.replace(TRAINER, epochs=1)
    weights = segment(data, tmp_path / "train", labels=camvid / "labels", method=OCR, trainer=trainer)
    written = segment(data, tmp_path / "masks", predict=weights, scales=(1.0, 0.5), fuse="logits", window=32)
    assert written.written == 4
    assert read_label_png(tmp_path / "masks" / "f0.png").max() <= 2
    scores = evaluate(data, tmp_path / "masks")
    counts = np.bincount(
        np.concatenate([np.array(Image.open(path)).ravel() for path in (camvid / "labels").iterdir()]), minlength=4
    )
    assert np.array(scores["confusion"]).sum(1).tolist() == counts[:3].tolist()


def test_folder_with_masks_turns_void_into_ignore(camvid):
    dataset = FolderDataset(camvid / "images", classes=("road", "tree"), masks=camvid / "labels", void=3)
    label = np.array(Image.open(camvid / "labels" / "f1.png"))
    assert np.array_equal(dataset[1]["mask"].numpy(), np.where(label == 3, 255, label))


def test_void_in_voc_layout_becomes_ignore(root):
    plain = VOCDataset(root, "val", classes=tuple((root / "classes.txt").read_text().split()))
    other = VOCDataset(root, "val", classes=plain.classes, void=2)
    mask = plain[0]["mask"].clone()
    mask[mask == 2] = 255
    assert torch.equal(other[0]["mask"].as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor))


def test_mistakes_are_named(camvid, tmp_path):
    images, labels = str(camvid / "images"), camvid / "labels"
    classes = ["road", "tree"]
    options = {"labels": labels, "method": OCR, "trainer": dataclasses.replace(TRAINER, epochs=1)}
    with pytest.raises(FastcamError, match=r"has value 3, expected 0 to 2 or 255; check data.classes, or name it as"):
        segment(Data(images=images, classes=classes), tmp_path / "a", **options)
    with pytest.raises(FastcamError, match=r"data.void is 256, expected 0 to 255"):
        segment(Data(images=images, classes=classes, void=256), tmp_path / "b", **options)
    with pytest.raises(FastcamError, match=r"there is no folder SegmentationClass; give data.masks or data.root"):
        evaluate(Data(images=images, classes=classes), labels)
    with pytest.raises(FastcamError, match=r"weights .* do not exist"):
        segment(Data(images=images), tmp_path / "c", predict=tmp_path / "none")
    with pytest.raises(FastcamError, match="window is -1, expected pixels, or 0 for whole images"):
        segment(Data(images=images), tmp_path / "c", predict=tmp_path / "none", window=-1)
