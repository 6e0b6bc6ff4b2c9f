"""ACDC's slices: lists by patients, geometry, and the challenge's own files."""

import csv
import itertools

import numpy as np
import pytest
from PIL import Image

from fastcam.data import ACDC_CLASSES, VOCDataset, read_acdc, write_acdc
from fastcam.errors import FastcamError


def write_patients(folder, count, shape=(2, 20, 14)):
    """Volumes of constant slices: patient 10 p + slice, or 100 more at the end of systole."""
    folder.mkdir()
    for patient in range(count):
        arrays = {}
        for number, phase in enumerate(("ed", "es")):
            levels = 100 * number + 10 * patient + np.arange(shape[0])
            arrays[f"{phase}_image"] = np.broadcast_to(levels[:, None, None], shape).astype(np.uint8)
            label = np.zeros(shape, np.uint8)
            label[:, 8:12, 5:9] = 1 + patient % 3
            arrays[f"{phase}_label"] = label
        np.savez(folder / f"patient{patient + 1:03d}.npz", **arrays)
    return folder


@pytest.fixture
def source(tmp_path):
    return write_patients(tmp_path / "source", 10)


def lists(root):
    return {path.stem: path.read_text().split() for path in (root / "ImageSets" / "Segmentation").iterdir()}


def test_lists_keep_patients_apart(source, tmp_path):
    write_acdc(source, tmp_path / "a", seed=3)
    found = lists(tmp_path / "a")
    assert set(found) == {"train", "test", "labelled_10", "unlabelled_10", "labelled_25", "unlabelled_25"}
    patients = {name: {image_id.split("_")[0] for image_id in ids} for name, ids in found.items()}
    assert {name: len(members) for name, members in patients.items()} == {
        "test": 2, "train": 8, "labelled_10": 1, "unlabelled_10": 7, "labelled_25": 2, "unlabelled_25": 6
    }  # fmt: skip
    assert len(patients["test"] | patients["train"]) == 10
    for share in ("10", "25"):
        assert patients[f"labelled_{share}"] | patients[f"unlabelled_{share}"] == patients["train"]
        assert not patients[f"labelled_{share}"] & patients[f"unlabelled_{share}"]
    assert patients["labelled_10"] < patients["labelled_25"]
    assert all(len(ids) == 4 * len(patients[name]) for name, ids in found.items())
    write_acdc(source, tmp_path / "b", seed=3)
    assert lists(tmp_path / "b") == found
    drawn = set()
    for seed in range(4):
        write_acdc(source, tmp_path / f"s{seed}", seed=seed)
        drawn.add(tuple(lists(tmp_path / f"s{seed}")["test"]))
    assert len(drawn) > 1


def test_slices_are_items_of_the_voc_layout(source, tmp_path):
    write_acdc(source, tmp_path / "out")
    dataset = VOCDataset(tmp_path / "out", "train", classes=ACDC_CLASSES)
    item = dataset[dataset.ids.index("patient004_es_01")] if "patient004_es_01" in dataset.ids else dataset[3]
    patient, phase, number = item["id"].split("_")
    index = int(patient[-3:]) - 1
    assert item["image"].shape == (3, 20, 14)
    assert item["image"].unique().tolist() == [100 * (phase == "es") + 10 * index + int(number)]
    assert item["mask"].unique().tolist() == [0, 1 + index % 3]
    assert item["tags"].tolist() == [float(k == index % 3) for k in range(3)]


def test_middle_is_cut_with_black_around_and_brought_to_a_size(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    image = np.arange(6 * 9, dtype=np.uint8).reshape(1, 6, 9) + 1
    for patient in range(3):
        arrays = {f"{phase}_{kind}": image % 4 if kind == "label" else image
                  for phase, kind in itertools.product(("ed", "es"), ("image", "label"))}  # fmt: skip
        np.savez(folder / f"patient{patient:03d}.npz", **arrays)
    write_acdc(folder, tmp_path / "crop", crop=8, labelled=[0.5])
    grey = np.array(Image.open(tmp_path / "crop" / "JPEGImages" / "patient000_ed_00.png"))
    expected = np.zeros((8, 8), np.uint8)
    expected[1:7] = image[0, :, 0:8]
    assert np.array_equal(grey, expected)
    write_acdc(folder, tmp_path / "size", crop=4, size=8, labelled=[0.5])
    mask = np.array(Image.open(tmp_path / "size" / "SegmentationClass" / "patient000_ed_00.png"))
    assert np.array_equal(mask, np.kron(image[0, 1:5, 2:6] % 4, np.ones((2, 2), np.uint8)))
    with (tmp_path / "size" / "volumes.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row == {"image": "patient000_ed_00", "volume": "patient000_ed", "slice": "0",
                   "spacing_z": "1.0", "spacing_y": "0.5", "spacing_x": "0.5"}  # fmt: skip


def test_challenge_folders_with_nifti_files(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for patient in range(1, 4):
        folder = tmp_path / "acdc" / f"patient{patient:03d}"
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\n")
        for frame in (1, 12):
            grey = np.zeros((5, 4, 2), np.int16)  # x, y, z
            grey[3, 1, 1] = 1000 + frame
            label = (grey > 0).astype(np.uint8) * 2
            for end, array in (("", grey), ("_gt", label)):
                image = nibabel.Nifti1Image(array, np.diag([1.5, 1.25, 10, 1]))
                nibabel.save(image, folder / f"patient{patient:03d}_frame{frame:02d}{end}.nii.gz")
    scans = list(read_acdc(tmp_path / "acdc"))
    assert [(scan.patient, scan.phase) for scan in scans[:3]] == [
        ("patient001", "ed"), ("patient001", "es"), ("patient002", "ed")
    ]  # fmt: skip
    assert scans[0].image.shape == (2, 4, 5)
    assert scans[0].image[1, 1, 3] == 255
    assert scans[0].image.sum() == 255
    assert scans[0].label[1, 1, 3] == 2
    assert scans[0].spacing == (10.0, 1.25, 1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labelled": (1.0,)}, r"expected shares between 0 and 1"),
        ({"held_out": 0.0}, r"expected shares between 0 and 1"),
        ({"crop": -1}, r"sides of 0 or more"),
        ({"labelled": (0.99,)}, r"10 patients leave none to list unlabelled_99; choose other shares"),
        ({"held_out": 0.99}, r"10 patients leave none to list train; choose other shares"),
    ],
)
def test_shares_that_leave_nothing_are_refused(settings, message, source, tmp_path):
    with pytest.raises(FastcamError, match=message):
        write_acdc(source, tmp_path / "out", **settings)


def test_what_is_no_acdc_is_named(tmp_path):
    with pytest.raises(FastcamError, match=r"holds neither patient\*.npz nor folders patient\*; give ACDC's folder"):
        next(read_acdc(tmp_path))
    (tmp_path / "patient001").mkdir()
    with pytest.raises(FastcamError, match=r"Info.cfg does not read; expected lines such as ED: 1"):
        next(read_acdc(tmp_path))
    (tmp_path / "patient001" / "Info.cfg").write_text("ED: 1\n")
    with pytest.raises(FastcamError, match=r"patient001_frame01.nii"):
        next(read_acdc(tmp_path))
    (tmp_path / "patient001.npz").write_bytes(b"no archive")
    with pytest.raises(FastcamError, match=r"patient001.npz does not load as a patient of ACDC"):
        next(read_acdc(tmp_path))
    image = np.zeros((1, 2, 2), np.uint8)
    np.savez(tmp_path / "patient001.npz", ed_image=image, ed_label=image + 4, es_image=image, es_label=image)
    with pytest.raises(FastcamError, match=r"patient001 ed in .*: label 4, expected 0 to 3"):
        next(read_acdc(tmp_path))
    np.savez(tmp_path / "patient001.npz", ed_image=image, ed_label=image[0], es_image=image, es_label=image)
    with pytest.raises(FastcamError, match=r"expected the same three dimensions"):
        next(read_acdc(tmp_path))


def test_real_patients(shared_data, tmp_path):
    scans = list(read_acdc(shared_data / "medical" / "acdc"))
    assert len(scans) == 20
    assert sum(len(scan.image) for scan in scans) == 198
    assert sum(bool((plane == 1).any()) for scan in scans for plane in scan.label) == 158  # right ventricles
