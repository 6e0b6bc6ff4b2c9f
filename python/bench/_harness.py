"""Measures the cases that ``fastcam/bench/<op>.py`` declares.

One run interleaves all runners of a case round by round, so that a machine whose speed drifts slows them alike; medians
and quartiles are reported, and ratios are medians of the ratios of each round. A runner is timed only after its result
agreed with ``expected``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

FASTCAM = "fastcam"  # runners whose name begins so are ours


@dataclass
class Case:
    """One problem and everything that solves it."""

    name: str
    runners: dict[str, Callable[[], Any]]  # ours begin with "fastcam", the first of ours is compared with every rival
    expected: Callable[[], Any] | None  # result that all but `unchecked` must give
    moved: float = 0.0  # least bytes: each input read once, each output written once
    operations: float = 0.0  # least floating-point operations
    tolerance: float = 1e-4  # largest absolute difference to `expected`
    flips: float = 0.0  # for labels, which rounding may decide: share of values that may differ by more than that
    unchecked: dict[str, str] = field(default_factory=dict)  # runner -> why its result is another one


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run, print, and write JSON if asked."""
    ops = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(prog="python -m fastcam.bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which ops, of: {', '.join(ops)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of every case, at least 1 (default: 7)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.ops) - set(ops))
    if unknown:
        parser.error(f"no bench for {', '.join(unknown)}; there are {', '.join(ops)}")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads: expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.device)
    print(", ".join(f"{k}: {v}" for k, v in machine.items()))
    report: dict[str, Any] = {
        "machine": machine,
        "command": " ".join(["python -m fastcam.bench", *(argv or sys.argv[1:])]),
    }
    report["cases"] = []
    for op in args.ops or ops:
        for case in import_module(f"fastcam.bench.{op}").cases(args.device):
            if args.only in case.name:
                report["cases"].append({"op": op, **measure(case, args.device, args.rounds, machine)})
                print(show(report["cases"][-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(case: Case, device: str, rounds: int, machine: dict[str, Any]) -> dict[str, Any]:
    """Check every runner, then time all of them interleaved."""
    notes = dict(case.unchecked)
    runners = {}
    expected = case.expected() if case.expected else None
    for name, run in case.runners.items():
        result = run()
        if name not in notes and expected is not None:
            error = largest_difference(result, expected)
            allowed = case.flips > 0 and ((result - expected).abs() > case.tolerance).double().mean() <= case.flips
            if not error <= case.tolerance and not allowed:
                notes[name] = f"not timed: differs by {error:.2g}, allowed {case.tolerance:.2g}"
                continue
        runners[name] = run
    times: dict[str, list[float]] = {name: [] for name in runners}
    repeats = {name: max(1, int(0.05 / max(once(run, 1, device), 1e-7))) for name, run in runners.items()}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, run in runners.items():
            times[name].append(once(run, repeats[name], device))
    gc.enable()
    floor = max(case.moved / machine["copy GB/s"], case.operations / machine["GEMM GFLOP/s"]) / 1e9
    ours = next((name for name in runners if name.startswith(FASTCAM)), None)
    rows = {}
    for name, seconds in times.items():
        low, median, high = quartiles(seconds)
        rows[name] = {
            "median ms": median * 1e3,
            "quartiles ms": [low * 1e3, high * 1e3],
            "allocated MB": allocated(runners[name], device),
        }
        if ours and name != ours:
            rows[name]["times ours"] = statistics.median(a / b for a, b in zip(seconds, times[ours], strict=True))
    return {"case": case.name, "floor ms": floor * 1e3, "runners": rows, "notes": notes}


def once(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one call, the mean of ``repeats``."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, median, high


def largest_difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two tensors or sequences of tensors; infinite where shapes differ or a value is
    NaN."""
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape:
            return float("inf")
        difference = (a.double() - b.double()).abs()
        return float("inf") if difference.isnan().any() else float(difference.max()) if a.numel() else 0.0
    return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))


def allocated(run: Callable[[], Any], device: str) -> float:
    """Most megabytes that torch's allocator held at a time during one call, the result included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 1e6


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Hides what native code writes to standard error: some builds of torch's profiler announce every start and stop
    there."""
    before = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(null)
        os.close(before)


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, versions, and the two ceilings as measured now: bandwidth of a large copy, rate of a large float32
    product."""
    source = torch.rand(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    a = torch.randn(4096 if device == "cuda" else 2048, 4096 if device == "cuda" else 2048, device=device)
    copy, product = (
        statistics.median(once(run, 3, device) for _ in range(5))
        for run in (lambda: target.copy_(source), lambda: torch.mm(a, a))
    )
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastcam": metadata.version("fastcam"),
        "commit": commit or "unknown",
        "copy GB/s": round(2 * source.nbytes / copy / 1e9, 1),
        "GEMM GFLOP/s": round(2 * a.shape[0] ** 3 / product / 1e9, 1),
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(result: dict[str, Any]) -> str:
    """A case as lines of text."""
    lines = [f"\n{result['op']}: {result['case']}   (floor {result['floor ms']:.3f} ms)"]
    for name, row in result["runners"].items():
        low, high = row["quartiles ms"]
        line = f"  {name:44s} {row['median ms']:10.3f} ms  [{low:.3f}, {high:.3f}]  {row['allocated MB']:8.1f} MB"
        lines.append(line + (f"  {row['times ours']:8.2f} x ours" if "times ours" in row else ""))
    lines += [f"  note: {name}: {note}" for name, note in result["notes"].items()]
    return "\n".join(lines)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` set up as its manual says for fixed shapes."""
    return torch.compile(function, dynamic=False)


CaseIterator = Iterator[Case]
