"""Builds fastcam: Python packages by name, and the compiled modules by a generated ninja file.

``fastcam._C`` (C++) is always built. ``fastcam._C_cuda`` is built where nvcc is found. Neither needs torch. Settings,
from the environment:

- ``FASTCAM_CUDA``: ``auto`` (default: build if nvcc is found), ``0`` (never), ``1`` (fail without nvcc).
- ``FASTCAM_CUDA_ARCHS``: compute capabilities, default ``75;80;86;89;90``; the last one is embedded as PTX too, for
newer GPUs.
- ``FASTCAM_SANITIZE``: for example ``address,undefined``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LINKED = {"fastcam.kernels": "kernels", "fastcam.pipelines": "python/pipelines", "fastcam.bench": "python/bench"}


def nvcc() -> str | None:
    """The CUDA compiler to use, or ``None`` if the CUDA module is not to be built."""
    wanted = os.environ.get("FASTCAM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTCAM_CUDA: expected auto, 0 or 1, got '{wanted}'")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and found is None:
        raise SystemExit("FASTCAM_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return found if wanted != "0" else None


def module(name: str, *sources: str) -> Extension:
    """An extension of every file that the globs below csrc/ match."""
    return Extension(name, [str(p.relative_to(ROOT)) for g in sources for p in sorted((ROOT / "csrc").glob(g))])


class NinjaBuild(build_ext):
    """Compiles every extension with one generated ninja file in the build folder."""

    def build_extensions(self) -> None:
        """Write ``build.ninja`` and run it."""
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()} -I{ROOT / 'csrc'}"
        sanitize = os.environ.get("FASTCAM_SANITIZE", "")
        extra = f"-g -fsanitize={sanitize} -DFASTCAM_SANITIZE" if sanitize else ""
        archs = os.environ.get("FASTCAM_CUDA_ARCHS", "75;80;86;89;90").split(";")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"nvcc = {nvcc() or 'nvcc'}",
            # No contraction: the bits of a sum, and so every argmax, must not depend on the CPU. No errno: else square
            # roots are taken one by one.
            "cxxflags = -O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -pthread "
            f"{includes} {extra}",
            f"cudaflags = -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden {' '.join(targets)} {includes}",
            "rule cxx\n  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule cuda\n  command = $nvcc $cudaflags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx -shared -pthread {extra} $in -o $out",
            f"rule linkcuda\n  command = $nvcc -shared -cudart static {' '.join(targets)} $in -o $out",
        ]
        for ext in self.extensions:
            cuda = any(s.endswith(".cu") for s in ext.sources)
            objects = []
            for source in ext.sources:
                objects.append(str(build / ext.name / source) + ".o")
                lines.append(f"build {objects[-1]}: {'cuda' if source.endswith('.cu') else 'cxx'} {ROOT / source}")
            out = Path(self.get_ext_fullpath(ext.name)).resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {out}: {'linkcuda' if cuda else 'link'} {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([ninja(), "-C", str(build), *(["-v"] if self.verbose else [])], check=True)


def ninja() -> str:
    """The ninja program: that of the Python package, else the system's."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


extensions = [module("fastcam._C", "bindings_cpu.cpp", "cpu/*.cpp")]
if nvcc():
    extensions.append(module("fastcam._C_cuda", "bindings_cuda.cpp", "cuda/*.cu"))

setup(
    packages=[*find_namespace_packages(include=["fastcam", "fastcam.*"], exclude=[f"{p}*" for p in LINKED]), *LINKED],
    package_dir=LINKED,
    package_data={"fastcam": ["py.typed"], "fastcam.pipelines": ["configs/*.yaml"]},
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
