"""The code of docs/howto/own_job.md does what the page says."""

import re
import shutil
import types
from pathlib import Path

import pytest
from pipelines.tiny import CLASSES

from fastcam.io import read_label_png

PAGE = Path(__file__).parents[2] / "docs/howto/own_job.md"


@pytest.fixture
def job(root, weights, tmp_path, monkeypatch) -> dict:
    """The names that the page's first block makes, in a folder with the files it names; `saved` is what it saved."""
    saved: list[dict] = []
    images = sorted((root / "JPEGImages").glob("*.jpg"))
    names = {"endless_rows": lambda: ({"image": str(path)} for path in images[:3]), "save": saved.append}
    monkeypatch.chdir(tmp_path)
    shutil.copy(weights, "weights.safetensors")
    for name, path in zip(("a.jpg", "b.jpg"), images, strict=False):
        shutil.copy(path, name)
    exec(block("endless_rows"), names)
    return {**names, "saved": saved, "images": images}


def block(word: str) -> str:
    """The page's block of Python with this word."""
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in text]
    return found


def test_plain_calls(job):
    assert [row["error"] for row in job["rows"]] == [None, None]
    assert job["rows"][0]["classes"] == ["sheep"]
    assert len(job["saved"]) == 3 and all(read_label_png(row["mask"]).shape == (48, 48) for row in job["saved"])


def test_data_loader(job):
    job["dataset_of_rows"] = [{"image": path.read_bytes(), "name": path.stem} for path in job["images"]]
    job["saved"].clear()
    exec(block("DataLoader").replace("256", "5").replace("num_workers=4", "num_workers=2"), job)
    assert [row["name"] for row in job["saved"]] == [path.stem for path in job["images"]]
    assert all(row["error"] is None and row["cam"] for row in job["saved"])


class Frame:
    """As much of a Spark data frame as the page uses: batches through Arrow, and back by the schema."""

    def __init__(self, table, batch) -> None:
        self.table, self.batch, self.write = table, batch, self

    def mapInPandas(self, function, schema):
        import pyarrow as pa

        kinds = {"binary": pa.binary(), "string": pa.string(), "int": pa.int32(), "long": pa.int64()}
        kinds |= {"double": pa.float64(), **{f"array<{k}>": pa.list_(v) for k, v in kinds.items()}}
        wanted = pa.schema([(name, kinds[kind]) for name, kind in (field.split() for field in schema.split(", "))])
        made = list(function(batch.to_pydict() for batch in self.table.to_batches(self.batch)))
        assert all(set(frame) == set(wanted.names) for frame in made)  # else Spark refuses them
        return Frame(pa.concat_tables(pa.table(frame, wanted) for frame in made), self.batch)

    def drop(self, name):
        return Frame(self.table.drop_columns([name]), self.batch)

    def parquet(self, path) -> None:
        import pyarrow.parquet

        pyarrow.parquet.write_table(self.table, path)


def spark_frame(images, folder):
    """`spark` with the table images.parquet of three images: with tags, without, and damaged."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = [images[0].read_bytes(), images[1].read_bytes(), b"no image"]
    schema = pa.schema([("image", pa.binary()), ("tags", pa.list_(pa.string()))])
    table = pa.table({"image": content, "tags": [[CLASSES[0], CLASSES[2]], None, []]}, schema)
    parquet.write_table(table, folder / "images.parquet")
    return table


def check_labels(rows) -> None:
    """Of `spark_frame`'s three images."""
    assert [row["error"] is None for row in rows] == [True, True, False]
    assert list(rows[0]["classes"]) == [CLASSES[0], CLASSES[2]] and rows[2]["mask"] is None
    for row in rows[:2]:
        mask = read_label_png(bytes(row["mask"]))
        assert list(row["labels"]) == mask.unique().tolist() and sum(row["pixels"]) == mask.numel()


def test_spark_with_a_stand_in(job, tmp_path):
    job["pandas"] = types.SimpleNamespace(DataFrame=dict)  # both have columns by name
    table = spark_frame(job["images"], tmp_path)
    job["spark"] = type("Spark", (), {"read": type("Read", (), {"parquet": lambda path: Frame(table, 2)})})
    exec(block("mapInPandas").replace("import pandas\n", ""), job)
    import pyarrow.parquet

    check_labels(pyarrow.parquet.read_table("labels").to_pylist())


def test_spark(job, tmp_path):
    pytest.importorskip("pandas")
    SparkSession = pytest.importorskip("pyspark.sql", reason="needs pyspark and Java").SparkSession
    spark_frame(job["images"], tmp_path)
    job["spark"] = SparkSession.builder.master("local[1]").config("spark.ui.enabled", False).getOrCreate()
    try:
        exec(block("mapInPandas"), job)
        rows = [row.asDict() for row in job["spark"].read.parquet("labels").collect()]
        check_labels(sorted(rows, key=lambda row: (row["error"] is not None, row["tags"] is None)))
    finally:
        job["spark"].stop()
