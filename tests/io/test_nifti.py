"""NIfTI files, and what is said where they or nibabel are missing."""

import sys

import numpy as np
import pytest

from fastcam.errors import FastcamError
from fastcam.io import read_nifti


def test_axes_and_spacing(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(array, np.diag([1.5, 1.25, 10.0, 1]))
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array, array.transpose(2, 1, 0))
    assert volume.spacing == (10.0, 1.25, 1.5)


def test_bad_files_are_named(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    (tmp_path / "broken.nii").write_bytes(b"nothing")
    with pytest.raises(FastcamError, match=r"volume .*broken.nii does not decode"):
        read_nifti(tmp_path / "broken.nii")
    with pytest.raises(FastcamError, match=r"volume .*none.nii does not exist"):
        read_nifti(tmp_path / "none.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(FastcamError, match=r"four.nii has shape \(2, 2, 2, 3\), expected three dimensions"):
        read_nifti(tmp_path / "four.nii")


def test_without_nibabel_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(FastcamError, match=r"a.nii.gz is a NIfTI file, which nibabel reads; install it with: pip") as e:
        read_nifti(tmp_path / "a.nii.gz")
    assert "\n" not in str(e.value)
