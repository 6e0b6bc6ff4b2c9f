"""The levels below a GPU: Triton kernels in their interpreter, and CUDA sources through nvcc."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


KERNELS = [
    p.stem for p in sorted((ROOT / "kernels").glob("[a-z]*.py")) if (ROOT / f"tests/ops/test_{p.stem}.py").exists()
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is the interpreter's own process")
@pytest.mark.parametrize("op", KERNELS)
def test_triton_kernels_pass_the_tests_of_their_op_in_the_interpreter(op):
    pytest.importorskip("triton")
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / "ops").glob(f"test_{op}*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpret", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert passed, run.stdout[-2000:]
    assert int(passed[1]) > 0


@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_cuda_source_compiles_for_several_gpu_generations(source, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found")
    for capability in (75, 80, 90):
        out = tmp_path / f"{capability}.cubin"
        flags = ["-std=c++17", "-Werror", "all-warnings", "-cubin", f"-arch=sm_{capability}", "-I", "csrc"]
        subprocess.run([nvcc, *flags, f"csrc/cuda/{source}", "-o", str(out)], check=True, cwd=ROOT)
        assert out.stat().st_size > 0


def test_every_op_has_all_its_parts():
    for path in sorted((ROOT / "fastcam" / "ops").glob("[a-z]*.py")):
        for part in ("fastcam/reference/{}.py", "tests/ops/test_{}.py", "python/bench/{}.py", "docs/ops/{}.md"):
            assert (ROOT / part.format(path.stem)).exists(), f"op {path.stem} lacks {part.format(path.stem)}"
