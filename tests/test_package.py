"""What a user's ``pip install`` and ``import`` must give."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastcam

ROOT = Path(__file__).resolve().parents[1]
MODULES = "fastcam, fastcam._C, fastcam.bench._harness, fastcam.ops.cam_fuse, fastcam.kernels, fastcam.pipelines.cli"


def python(code: str, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, cwd="/", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_light_and_silent():
    code = (
        "import sys, fastcam; from fastcam import prototype_similarity, cam_fuse, crf_mean_field; import torch;"
        "heavy = {'triton', 'timm', 'torchvision', 'lightning', 'PIL', 'scipy', 'matplotlib', 'fastcam._C_cuda'};"
        "heavy &= set(sys.modules);"
        "assert not torch.cuda.is_initialized(); print(sorted(heavy))"
    )
    torch_alone = "import sys, torch; print(sorted({'triton', 'scipy', 'matplotlib', 'PIL'} & set(sys.modules)))"
    assert python(code) == python(torch_alone)


def test_every_public_name_exists_and_unknown_ones_are_refused():
    for name in fastcam.__all__:
        assert getattr(fastcam, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'cam_fusion'"):
        _ = fastcam.cam_fusion


def test_sdist_builds_a_wheel_that_imports_outside_the_checkout(tmp_path):
    pytest.importorskip("setuptools")
    clone = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        source, target = ROOT / name, clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.exists():
            shutil.copy2(source, target, follow_symlinks=False)
    env = {**os.environ, "FASTCAM_CUDA": "0"}
    subprocess.run(
        [sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"],
        cwd=clone, env=env, check=True, capture_output=True,
    )  # fmt: skip
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(sdist)], env=env, check=True, capture_output=True)
    where = python(f"import {MODULES}; print(fastcam.__file__)", PYTHONPATH=str(tmp_path / "site"))
    assert where.startswith(str(tmp_path / "site"))
    assert not list((tmp_path / "site").glob("kernels*")), "a top-level package 'kernels' would hide another project's"
    assert list((tmp_path / "site" / "fastcam" / "pipelines" / "configs").glob("*.yaml"))
