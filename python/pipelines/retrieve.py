"""The retrieve pass: images to descriptors, whitening, rankings and, with ground truth, scores."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcam.data import Query, crop_box, label_queries, multi_scale, read_labels, read_landmarks, ukbench_labels
from fastcam.data.retrieval import GROUP_OF
from fastcam.errors import FastcamError
from fastcam.io import atomic_write, finished_ids, open_pass
from fastcam.methods import create_method
from fastcam.methods.sba import (
    Whitening,
    expand_query,
    faiss_index,
    fit_whitening,
    rank,
    rank_faiss,
    select_detectors,
)
from fastcam.metrics import bootstrap_interval, ranking_average_precision, recall_at, ukbench_hits
from fastcam.pipelines._data import Data, Images, file_fingerprint, open_data
from fastcam.pipelines._parallel import ordered_map, run_pass
from fastcam.pipelines.make_cam import pick_device

RECALLS = (1, 5, 10)
NO_DATA = Data()
CHUNK = 256  # queries whose whole rankings are held at a time
UKBENCH = "ukbench"


@dataclass(frozen=True)
class Truth:
    """What is relevant to what, for scores.

    Args:
        file: a .csv of labels (images of one label are relevant to each other, a query's own image does not count); or
            the ground truth of Oxford5k or Paris6k, the folder of its .txt files or a .json; or ukbench, whose images
            are numbered in groups of four.
        label: column of the label in the .csv.
        split: column of the split in the .csv, where only some images are searched.
        database: its value for the images that are searched.
        queries: its value for the images that are looked for.
        boxes: what the four numbers of a landmark query are, its corners or its corner and size (CroW, PWA).
    """

    file: str | None = None
    label: str = "label"
    split: str | None = None
    database: str = "train"
    queries: str = "test"
    boxes: Literal["corners", "size"] = "corners"


class Retrieval(NamedTuple):
    """What was found.

    Attributes:
        out: the output folder.
        images: images that were searched.
        queries: number of rankings.
        scores: what scores.json holds; `None` without ground truth.
    """

    out: Path
    images: int
    queries: int
    scores: dict[str, Any] | None

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.queries} rankings of {self.images} images"]
        if self.scores is None:
            return lines[0]
        scores = self.scores
        for name, entry in {"mAP": scores["map"], **scores["recall"], "N-S": scores["ns"]}.items():
            if entry is not None:
                low, high = entry["interval"]
                lines.append(f"{name:<10} {entry['mean']:.4f}   95 % of draws {low:.4f} to {high:.4f}")
        return "\n".join([*lines, f"over {scores['queries']} queries of {scores['groups']} groups"])


class _Search(NamedTuple):
    """Who is asked, and who may answer.

    Attributes:
        database: ids of the images that are searched.
        queries: with what is relevant to them, where that is known.
        labels: image -> label, for truth by labels.
    """

    database: list[str]
    queries: list[Query]
    labels: dict[str, str] | None


def retrieve(
    data: Data,
    method: dict[str, Any],
    out: Path,
    queries: Data = NO_DATA,
    truth: Truth = Truth(),
    fit: Data = NO_DATA,
    detectors: str = "database",
    scales: tuple[float, ...] = (1.0,),
    dim: int = 0,
    whitening: Path | None = None,
    expand: int = 0,
    top: int = 100,
    index: str | None = None,
    skip_damaged: bool = False,
    device: str = "auto",
    workers: int = 2,
) -> Retrieval:
    """Describes images by one vector each (SBA), ranks them for every query, and scores the rankings.

    Writes detectors.json (the chosen channels), descriptors.npz (ids and vectors of the database), rankings.csv, with
    ground truth scores.json, with dim whitening.npz. Vectors of single images stand in database/, queries/ and fit/ as
    .npy files, and are not made again when only what comes behind them changes.

    Args:
        data: the images that are searched.
        method: backbone (a timm name), weights (local file for it), and any field of the method's configuration, as in
            --method.backbone resnet50 --method.detectors 16.
        out: output folder.
        queries: images that are looked for; by default those that truth names, without truth all of data.
        truth: what is relevant to what.
        fit: images that the whitening is learned on, best not those of data; by default those of data.
        detectors: images whose channels are compared, database or fit; or a detectors.json of another run.
        scales: factors of the image's size whose vectors are summed; 1 alone is the paper's.
        dim: numbers in a whitened descriptor, 4096 in the authors' program; 0 leaves descriptors as they are.
        whitening: a whitening.npz of another run, instead of fit and dim.
        expand: images that are added to a query, which is then asked again; 10 in the authors' program, 0 for none.
        top: images of a ranking that are written; truth is scored on whole rankings.
        index: by default the search is exact; or an index of faiss, such as HNSW32 or IVF1024,PQ64, for large sets.
        skip_damaged: leave out images that do not decode (Paris6k has 20) instead of stopping there.
        device: auto, cpu or cuda.
        workers: threads that read images and write vectors.

    Raises:
        FastcamError: bad images, settings, weights or ground truth; vectors that are NaN; more dimensions than images.
    """
    if not scales or min(scales) <= 0 or top < 1 or expand < 0 or dim < 0:
        raise FastcamError(
            f"scales are {scales}, top {top}, expand {expand}, dim {dim}, expected positive scales, top of at least 1 "
            "and no negative numbers"
        )
    if whitening is not None and (dim or _given(fit)):
        raise FastcamError("whitening comes with its own dim and images; leave dim and fit out, or whitening")
    dataset = open_data(data, need_tags=False)
    network, record = _network(method, scales)
    asked = open_data(queries, need_tags=False) if _given(queries) else dataset
    fitted = open_data(fit, need_tags=False) if _given(fit) else None
    search = _plan(dataset, asked, truth)
    network.to(pick_device(device), memory_format=torch.channels_last)
    passes = _Passes(network, tuple(scales), workers, skip_damaged)
    if network.config.aggregation == "pwa":
        record["detectors"] = _detectors(out, detectors, dataset, search.database, fitted, record, passes)
        network.set_detectors(torch.tensor(record["detectors"]))
    record = {"pass": "describe", **record}
    ids, vectors, asking, vectors_asking = _describe(out, record, dataset, asked, search, passes)
    space = None
    if whitening is not None:
        space = _load_whitening(whitening, vectors.shape[1])
    elif dim:
        others = None if fitted is None else passes.run(out / "fit", record, fitted, fitted.ids, network.describe)[1]
        space = _fit(vectors if others is None else others, dim)
        _save(out / "whitening.npz", **{name: value.numpy() for name, value in vars(space).items()})
    if space is not None:
        vectors, vectors_asking = space.transform(vectors), space.transform(vectors_asking)
    _save(out / "descriptors.npz", ids=np.array(ids), vectors=vectors.numpy())
    known = truth.file is not None
    rows = _rankings(vectors_asking, vectors, len(ids) if known else max(top, expand), expand, index)
    score = _Scores(search.labels) if known else None
    with atomic_write(out / "rankings.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["query", "rank", "image", "distance"])
        for query, (distances, order) in zip(asking, rows, strict=True):
            ranked = [ids[i] for i in order if i >= 0]
            pairs = enumerate(zip(ranked[:top], distances, strict=False), 1)
            table.writerows([query.id, place, image, f"{distance:.6g}"] for place, (image, distance) in pairs)
            if score is not None:
                score.update(query, ranked)
    scores = None
    if score is not None:
        about = {"data": asdict(data), "truth": asdict(truth), "record": record, "images": len(ids)}
        about |= {"dim": vectors.shape[1], "whitened": space is not None, "expand": expand, "index": index}
        scores = {**about, **score.compute()}
        with atomic_write(out / "scores.json") as temporary:
            temporary.write_text(json.dumps(scores, indent=2) + "\n")
    return Retrieval(out, len(ids), len(asking), scores)


def _describe(
    out: Path, record: dict[str, Any], dataset: Images, asked: Images, search: _Search, passes: _Passes
) -> tuple[list[str], Tensor, list[Query], Tensor]:
    """Ids and vectors of the database, queries and their vectors; images that are skipped are missing."""
    function, queries = passes.network.describe, search.queries
    if asked is dataset and not any(query.box for query in queries):  # queries are images of the same data
        union = list(dict.fromkeys([*search.database, *(query.image for query in queries)]))
        found, vectors = passes.run(out / "database", record, dataset, union, function)
        row = {image: i for i, image in enumerate(found)}
        ids = [image for image in search.database if image in row]
        asking = [query for query in queries if query.image in row]
        return ids, vectors[[row[i] for i in ids]], asking, vectors[[row[query.image] for query in asking]]
    ids, vectors = passes.run(out / "database", record, dataset, search.database, function)
    parts = {query.id: query for query in queries}
    boxes = json.dumps([[query.id, query.image, query.box] for query in queries])
    digest = {"queries": hashlib.sha256(boxes.encode()).hexdigest()[:16]}
    names, vectors_asking = passes.run(out / "queries", {**record, **digest}, asked, list(parts), function, parts)
    return ids, vectors, [parts[name] for name in names], vectors_asking


class _Passes:
    """What turns images into one vector each.

    Args:
        network: the method, on its device.
        scales: of its views.
        workers: threads.
        skip: whether images that do not decode are left out.
    """

    def __init__(self, network: Any, scales: tuple[float, ...], workers: int, skip: bool) -> None:
        self.network = network
        self.scales = scales
        self.workers = workers
        self.skip = skip

    def run(
        self,
        out: Path,
        record: dict[str, Any],
        dataset: Images,
        ids: Sequence[str],
        function: Callable[[list[Tensor]], Tensor],
        crops: dict[str, Query] | None = None,
    ) -> tuple[list[str], Tensor]:
        """Vectors of images, those that are finished from their files.

        Args:
            out: folder of one .npy an image.
            record: what the vectors depend on.
            dataset: where images are read.
            ids: of the images, or of the queries in `crops`.
            function: views `(1, 3, h_s, w_s)` to `(1, P)`.
            crops: queries by id, where parts of images are described.

        Returns:
            The ids that have a vector, in the order of `ids`, and the vectors `(n, P)`.
        """
        open_pass(out, record)
        device = next(self.network.parameters()).device
        mean, std = self.network.normalize

        def read(name: str) -> tuple[str, list[Tensor]] | None:
            query = crops[name] if crops else None
            try:
                image = dataset.by_id(query.image if query else name)["image"].as_subclass(Tensor)
            except FastcamError:
                if self.skip:
                    return None
                raise
            if query and query.box:
                left, top, right, bottom = crop_box(query.box, (image.shape[1], image.shape[2]))
                image = image[:, top:bottom, left:right]
            return name, multi_scale(image, self.scales, mean=mean, std=std)

        @torch.inference_mode()
        def compute(job: tuple[str, list[Tensor]]) -> tuple[str, Tensor]:
            name, views = job
            vector = function([view[None].to(device) for view in views])[0].cpu()
            if not bool(vector.isfinite().all()):
                raise FastcamError(f"image {name}: its vector has NaN or infinity; check the weights")
            return name, vector

        def write(done: tuple[str, Tensor]) -> None:
            with atomic_write(out / f"{done[0]}.npy") as temporary:
                np.save(temporary, done[1].numpy())

        def work(todo: Iterable[str]) -> Iterator[None]:
            jobs = (job for job in ordered_map(read, todo, self.workers) if job is not None)
            return ordered_map(write, map(compute, jobs), self.workers)

        run_pass(out.name, out, ".npy", list(ids), work)
        done = finished_ids(out, ".npy")
        kept = [name for name in ids if name in done]
        if not kept:
            raise FastcamError(f"{out}: none of {len(ids)} images decodes; check the data set's folder")
        return kept, torch.stack([_load_vector(out / f"{name}.npy") for name in kept])


def _given(data: Data) -> bool:
    return data.root is not None or data.images is not None


def _network(method: dict[str, Any], scales: Sequence[float]) -> tuple[Any, dict[str, Any]]:
    """The method, and what vectors depend on so far."""
    settings = {"name": "sba", **method}
    weights = settings.get("weights")
    if weights is None:
        raise FastcamError("method.weights is missing; nothing is trained here, so give weights of the backbone")
    network: Any = create_method(num_classes=1, **settings)
    if network.kind != "retrieval":
        raise FastcamError(f"method {network.name} is a {network.kind}, expected a retrieval method such as sba")
    record = {"method": {**settings, "weights": file_fingerprint(Path(weights))}, "scales": list(scales)}
    return network, record


def _plan(dataset: Images, asked: Images, truth: Truth) -> _Search:
    """Who is asked, who may answer, and what is relevant.

    Raises:
        FastcamError: ground truth that does not load or does not fit the images.
    """
    if truth.file is None:
        plain = [Query(image, image, None, frozenset(), frozenset(), image) for image in asked.ids]
        return _Search(dataset.ids, plain, None)
    path = Path(truth.file)
    if path.is_dir() or path.suffix == ".json":
        if asked is not dataset:
            raise FastcamError(
                f"ground truth {path} names its queries, parts of the database's images; leave queries out"
            )
        return _Search(dataset.ids, _landmark_queries(dataset.ids, read_landmarks(path, truth.boxes), path), None)
    if truth.file == UKBENCH:
        labels = ukbench_labels({*dataset.ids, *asked.ids})
    else:
        labels = read_labels(path, truth.label, truth.split)
    database, looked_for = dataset.ids, asked.ids
    if truth.split:
        database = [image for image in database if image not in labels or labels[image].split == truth.database]
        looked_for = [image for image in looked_for if image not in labels or labels[image].split == truth.queries]
        for name, value, found in (("database", truth.database, database), ("queries", truth.queries, looked_for)):
            if not found:
                raise FastcamError(
                    f"label file {path} has no image with '{value}' under {truth.split}; set truth.{name}"
                )
    names = {image: label.label for image, label in labels.items()}
    return _Search(database, label_queries(labels, looked_for, database), names)


def _landmark_queries(ids: Sequence[str], queries: list[Query], path: Path) -> list[Query]:
    """Queries with the ids of the data set, whose images may stand in sub-folders."""
    full: dict[str, str] = {}
    for image in ids:
        name = image.rpartition("/")[2]
        if full.setdefault(name, image) != image:
            raise FastcamError(f"images {full[name]} and {image} have one name, by which {path} knows them; rename one")

    def named(images: Iterable[str]) -> frozenset[str]:
        return frozenset(full.get(image, image) for image in images)

    for query in queries:
        if query.image not in full:
            raise FastcamError(f"ground truth {path}: the image {query.image} of query {query.id} is not in the data")
    return [
        query._replace(image=full[query.image], positives=named(query.positives), junk=named(query.junk))
        for query in queries
    ]


def _detectors(
    out: Path,
    source: str,
    dataset: Images,
    database: list[str],
    fitted: Images | None,
    record: dict[str, Any],
    passes: _Passes,
) -> list[int]:
    """The channels that become masks, and `detectors.json`."""
    if source not in ("database", "fit"):
        try:
            return [int(i) for i in json.loads(Path(source).read_text())["indices"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FastcamError(
                f"detectors {source}: {error!r}; expected database, fit or a detectors.json of another run"
            ) from None
    if source == "fit" and fitted is None:
        raise FastcamError(
            "detectors are to come from the images of fit, and there are none; give fit, or use database"
        )
    images, ids = (dataset, database) if source == "database" or fitted is None else (fitted, fitted.ids)
    if len(ids) < 2:
        raise FastcamError(f"detectors need images to compare, got {len(ids)}; give more, or a detectors.json")
    kept, statistics = passes.run(
        out / "statistics" / source, {"pass": "statistics", **record}, images, ids, passes.network.statistics
    )
    if len(kept) < 2:
        raise FastcamError(f"detectors need images to compare, and {len(kept)} of {len(ids)} decodes; give more")
    indices, variances = select_detectors(statistics, passes.network.config.detectors)
    with atomic_write(out / "detectors.json") as temporary:
        temporary.write_text(json.dumps({"indices": indices.tolist(), "variances": variances.tolist()}) + "\n")
    return indices.tolist()


def _fit(vectors: Tensor, dim: int) -> Whitening:
    if dim > min(len(vectors) - 1, vectors.shape[1]):
        raise FastcamError(
            f"dim is {dim}, but {len(vectors)} vectors of {vectors.shape[1]} numbers give at most "
            f"{min(len(vectors) - 1, vectors.shape[1])}; give fewer, or more images in fit"
        )
    try:
        return fit_whitening(vectors, dim)
    except ValueError as error:
        raise FastcamError(f"whitening: {error}; set dim") from None


def _load_whitening(path: Path, width: int) -> Whitening:
    try:
        with np.load(path) as arrays:
            space = Whitening(*(torch.from_numpy(arrays[name]) for name in ("mean", "components", "eigenvalues")))
    except FileNotFoundError:
        raise FastcamError(f"whitening {path} does not exist; give the whitening.npz of another run") from None
    except Exception as error:  # damaged zip files raise nearly anything
        raise FastcamError(
            f"whitening {path} does not load: {error!r}; give the whitening.npz of another run"
        ) from None
    if len(space.mean) != width:
        raise FastcamError(
            f"whitening {path} is for vectors of {len(space.mean)} numbers, these have {width}; "
            "use the settings it was learned with"
        )
    return space


def _load_vector(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError) as error:
        raise FastcamError(f"vector {path} does not load: {error}; remove it and run the command again") from None


def _save(path: Path, **arrays: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def _rankings(
    queries: Tensor, database: Tensor, k: int, expand: int, index: str | None
) -> Iterator[tuple[list[float], list[int]]]:
    """Distances and indices for each query, with expanded queries where that is asked for."""
    if expand > len(database):
        raise FastcamError(f"expand is {expand}, but only {len(database)} images are searched; give fewer")
    engine = None if index is None else faiss_index(database, index)

    def search(asking: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return rank(asking, database, k) if engine is None else rank_faiss(asking, engine, k)

    for asking in queries.split(CHUNK):
        if expand:
            asking = expand_query(asking, database, search(asking, expand)[1], expand)
        distances, order = search(asking, k)
        yield from zip(distances.tolist(), order.tolist(), strict=True)


class _Scores:
    """mAP, recall@k and, where all groups have four images, N-S, gathered query by query.

    Args:
        labels: image -> label, for truth by labels.
    """

    def __init__(self, labels: dict[str, str] | None) -> None:
        self.labels = labels
        self.by_query: dict[str, dict[str, Any]] = {}

    def update(self, query: Query, ranked: list[str]) -> None:
        """Adds a whole ranking."""
        row: dict[str, Any] = {"group": query.group}
        row["ap"] = ranking_average_precision(ranked, query.positives, query.junk)
        row |= {f"recall@{k}": recall_at(ranked, query.positives, k, query.junk) for k in RECALLS}
        if self.labels is not None and len(query.positives) == GROUP_OF - 1 and query.image in ranked:
            row["hits"] = ukbench_hits({query.id: ranked}, self.labels)[query.id]
        self.by_query[query.id] = row

    def compute(self) -> dict[str, Any]:
        """Means with intervals, and the numbers of every query."""
        rows = list(self.by_query.values())
        groups = [row["group"] for row in rows]

        def mean(name: str) -> dict[str, Any] | None:
            if any(name not in row for row in rows):
                return None
            values = [float(row[name]) for row in rows]
            return {"mean": sum(values) / len(values), "interval": bootstrap_interval(values, groups)}

        return {
            "queries": len(rows),
            "groups": len(set(groups)),
            "map": mean("ap"),
            "recall": {f"recall@{k}": mean(f"recall@{k}") for k in RECALLS},
            "ns": mean("hits"),
            "by_query": self.by_query,
        }
