"""Images a second from files to label files: ``PseudoLabeler`` against the loop that people write today.

``python -m fastcam.bench._pseudo_label IMAGES`` labels photographs of a folder with one plain CAM classifier: by IRN's
``make_cam`` and ``cam_to_ir_label`` written plainly, with all classes fused, files between the two and pydensecrf for
the two CRFs, and the network as PyTorch gives it; and by ``PseudoLabeler`` with the same weights, scales, rule and CRF.
Both take turns on parts of the images. Needs ``pip install pydensecrf2``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastcam.data import multi_scale
from fastcam.io import IMAGE_SUFFIXES, read_label_png, save_weights
from fastcam.methods import create_method
from fastcam.pipelines._data import load_trained
from fastcam.pipelines.label import Rule
from fastcam.pipelines.labeler import STAGES, Precision, PseudoLabeler, Settings
from fastcam.pipelines.make_cam import SCALES
from fastcam.pipelines.refine import Crf

HIGH, LOW = 0.30, 0.05  # IRN's two thresholds
Times = dict[str, float]


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print the tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m fastcam.bench._pseudo_label", description=__doc__)
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--count", type=int, default=12, help="how many of them, evenly spread (default: 12)")
    parser.add_argument("--part", type=int, default=4, help="images of one turn (default: 4)")
    parser.add_argument("--backbone", default="resnet50", help="timm's name, random weights (default: resnet50)")
    parser.add_argument("--weights", type=Path, help="of a trained method cam, instead of a backbone")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="default: 1 0.5 1.5 2")
    parser.add_argument("--tags", type=int, default=2, help="classes an image (default: 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--workers", type=int, default=2, help="threads of PseudoLabeler's stages (default: 2)")
    parser.add_argument("--device", default="cpu", help="of the network (default: cpu)")
    parser.add_argument("--batch_pixels", type=int, default=2**20, help="of PseudoLabeler (default: 2**20)")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="of PseudoLabeler")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    count = min(args.count, len(found))
    files = [found[i * len(found) // count] for i in range(count)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(files, args, Path(folder))
    print(show(report))
    print(sizing(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(files: list[Path], args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Both ways in turn over parts of the images; the first part is labelled once before, unmeasured."""
    crf = Crf("irn")
    rule, scales = Rule(high=HIGH, low=LOW), tuple(args.scales)
    settings = Settings(scales, rule, crf, cams=True, batch_pixels=args.batch_pixels, precision=args.precision)
    weights = args.weights
    if weights is None:
        weights = out / "weights.safetensors"
        method = create_method("cam", num_classes=20, backbone=args.backbone)
        about = {"method": "cam", "num_classes": 20, "backbone": args.backbone, "config": {"backbone": args.backbone}}
        save_weights(weights, method.state_dict(), {**about, "classes": [f"class {k}" for k in range(20)]})
    labeler = PseudoLabeler(weights, settings, device=args.device, workers=args.workers)
    network, names = load_trained(weights, "cam")
    network.to(args.device)
    backbone = network.config.backbone
    draw = torch.Generator().manual_seed(0)
    tags = {path: torch.randperm(len(names), generator=draw)[: args.tags].sort().values for path in files}
    parts = [files[i : i + args.part] for i in range(0, len(files), args.part)]
    plain: Times = defaultdict(float)
    ours: Times = defaultdict(float)
    ratios: list[float] = []
    agreement: list[float] = []
    sizes: dict[str, int] = defaultdict(int)
    for number, part in enumerate([parts[0], *parts]):
        start = time.perf_counter()
        stages = today(network, part, tags, scales, out)
        middle = time.perf_counter()
        before = dict(labeler.seconds)
        rows = labeler([{"image": str(p), "tags": [names[k] for k in tags[p]], "id": p.stem} for p in part])
        for row in rows:
            (out / f"{row['id']}.ours.png").write_bytes(row["mask"])
            (out / f"{row['id']}.ours.npz").write_bytes(row["cam"])
        end = time.perf_counter()
        if number == 0:
            continue
        for name, seconds in {**stages, "all": middle - start}.items():
            plain[name] += seconds
        for name in STAGES:
            ours[name] += labeler.seconds[name] - before[name]
        ours["all"] += end - middle
        ratios.append((middle - start) / (end - middle))
        for row in rows:
            theirs = read_label_png(out / f"{row['id']}.png")
            agreement.append(float((theirs == read_label_png(row["mask"])).double().mean()))
            sizes["png"] += len(row["mask"])
            sizes["cam"] += len(row["cam"])
            sizes["pixels"] += row["width"] * row["height"]
    return {
        "what": f"{backbone}, {args.tags} of {len(names)} classes an image, scales {list(args.scales)} and mirrored, "
        f"{args.device}, {args.threads} threads, {args.workers} workers, {args.precision}, torch {torch.__version__}",
        "images": len(files),
        "today": dict(plain),
        "PseudoLabeler": dict(ours),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "same labels": statistics.fmean(agreement),
        "bytes an image": {name: value / len(files) for name, value in sizes.items()},
    }


@torch.inference_mode()
def today(method: Any, files: list[Path], tags: dict[Path, Tensor], scales: tuple[float, ...], out: Path) -> Times:
    """IRN's ``make_cam`` over all images, then its ``cam_to_ir_label``, in one process as its code runs on one device.

    Seconds by stage: read and scale, network, fuse, files between, CRF, encode.
    """
    times: Times = defaultdict(float)
    device = next(method.parameters()).device

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times[stage] += time.perf_counter() - start

    for path in files:
        with timed("read and scale"):
            image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
            views = multi_scale(image, scales, mean=method.normalize[0], std=method.normalize[1])
        with timed("network"):
            maps = []
            for view in views:
                both = method.cams(torch.stack([view, view.flip(-1)]).to(device))
                maps.append((both[0] + both[1].flip(-1)).cpu())
        with timed("fuse"):
            height, width = image.shape[1:]
            padded = [-(-n // 16) * 16 for n in (height, width)]
            small = [-(-n // 4) for n in (height, width)]
            cam = torch.stack([F.interpolate(m[None], small, mode="bilinear")[0] for m in maps]).sum(0)
            high = torch.stack([F.interpolate(m[None], padded, mode="bilinear")[0] for m in maps]).sum(0)
            high = high[:, :height, :width]
            cam, high = (m[tags[path]] / (m[tags[path]].amax((1, 2), keepdim=True) + 1e-5) for m in (cam, high))
        with timed("files between"):
            fields = {"keys": tags[path], "cam": cam, "high_res": high.numpy()}
            np.save(out / f"{path.stem}.npy", np.array(fields, dtype=object), allow_pickle=True)
    for path in files:
        with timed("files between"):
            fields = np.load(out / f"{path.stem}.npy", allow_pickle=True).item()  # written above
        with timed("read and scale"):
            pixels = np.array(Image.open(path).convert("RGB"))
        with timed("CRF"):
            keys = np.pad(fields["keys"].numpy() + 1, (1, 0))
            found = []
            for threshold in (HIGH, LOW):
                scores = np.pad(fields["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
                found.append(keys[crf_of_labels(pixels, scores.argmax(0), len(keys))])
            label = found[0].copy()
            label[found[0] == 0] = 255
            label[(found[0] == 0) & (found[1] == 0)] = 0
        with timed("encode"):
            Image.fromarray(label.astype(np.uint8)).save(out / f"{path.stem}.png")
    return dict(times)


def crf_of_labels(image: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """IRN's ``crf_inference_label`` with pydensecrf: labels ``(H, W)`` after ten steps."""
    from pydensecrf import densecrf, utils

    height, width = labels.shape
    crf = densecrf.DenseCRF2D(width, height, count)
    crf.setUnaryEnergy(utils.unary_from_labels(labels, count, gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(image), compat=10)
    return np.array(crf.inference(10)).argmax(0).reshape(height, width)


def show(report: dict[str, Any]) -> str:
    """Rates and stage shares as lines of text."""
    lines = [report["what"]]
    for name in ("today", "PseudoLabeler"):
        times = dict(report[name])
        whole = times.pop("all")
        work = sum(times.values())
        shares = ", ".join(f"{stage} {100 * seconds / work:.1f} %" for stage, seconds in times.items())
        lines.append(f"{name:14s} {report['images'] / whole:7.2f} images/s   {shares}")
    ours = report["PseudoLabeler"]
    behind = (ours["label"] + ours["encode"]) / ours["network"]
    lines.append(f"times today's: {report['ratio']:.2f} (median of {len(report['ratios'])} turns)")
    lines.append(f"CRF, labels and encoding, of the network's time: {100 * behind:.1f} %")
    lines.append(f"pixels with the same label: {100 * report['same labels']:.2f} %")
    return "\n".join(lines)


def sizing(report: dict[str, Any]) -> str:
    """Hours and gigabytes for many images, computed from the rate and the sizes of this run."""
    rate = report["images"] / report["PseudoLabeler"]["all"]
    size = report["bytes an image"]
    lines = [
        f"\ncomputed from {rate:.2f} images/s of {size['pixels'] / 1e3:.0f} k pixels a machine like this one:",
        "| images | machines | hours | masks, GB | CAMs, GB |",
        "|---|---|---|---|---|",
    ]
    for images in (10_000, 1_000_000, 10_000_000):
        for machines in (1, 16, 256):
            hours = images / rate / machines / 3600
            masks, cams = images * size["png"] / 1e9, images * size["cam"] / 1e9
            lines.append(f"| {images:,} | {machines} | {hours:,.1f} | {masks:,.1f} | {cams:,.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
