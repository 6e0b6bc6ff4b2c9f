import json

import pytest

from fastcam.data import Label, Query, crop_box, label_queries, read_labels, read_landmarks, ukbench_labels
from fastcam.errors import FastcamError

ENTRY = {"query": "oxc1_tower_7", "bbox": [10.2, 20, 110.6, 90], "good": ["a"], "ok": ["b"], "junk": ["c"]}


def write(path, table):
    path.write_text(json.dumps(table))
    return path


class TestLandmarks:
    def test_json_and_text_files_give_the_same_queries(self, tmp_path):
        files = {"query": "oxc1_tower_7 10.2 20 110.6 90", "good": "a\n", "ok": "b\n", "junk": "c\n"}
        (tmp_path / "gt").mkdir()
        for name, text in files.items():
            (tmp_path / "gt" / f"tower_1_{name}.txt").write_text(text)
        expected = Query("tower_1", "tower_7", (10.2, 20, 110.6, 90), frozenset("ab"), frozenset("c"), "tower")
        assert read_landmarks(tmp_path / "gt") == [expected]
        assert read_landmarks(write(tmp_path / "gt.json", {"tower_1": ENTRY})) == [expected]

    def test_boxes_may_be_read_as_sizes(self, tmp_path):
        (query,) = read_landmarks(write(tmp_path / "gt.json", {"tower_1": ENTRY}), boxes="size")
        assert query.box == pytest.approx((10.2, 20, 120.8, 110))

    def test_paris6k(self, shared_data):
        path = shared_data / "retrieval" / "paris6k_groundtruth.json"
        if not path.is_file():
            pytest.skip(f"{path} is absent")
        queries = read_landmarks(path)
        assert len(queries) == 55
        assert len({query.group for query in queries}) == 11
        assert all(query.positives and query.image in query.positives for query in queries)
        assert not any(query.positives & query.junk for query in queries)
        assert all(max(query.box) <= 1024 for query in queries)  # the longer side of every image
        as_sizes = read_landmarks(path, boxes="size")
        assert sum(query.box[2] > 1024 or query.box[3] > 1024 for query in as_sizes) == 16

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ([], "holds a list, expected an object of queries"),
            ({}, "has no query, expected files like defense_1_query.txt"),
            ({"q": {**ENTRY, "good": [], "ok": []}}, "query q: there is no good and no ok image"),
            ({"q": {**ENTRY, "bbox": [5, 5, 5, 9]}}, r"query q: box \[5, 5, 5, 9\] is empty; expected corners"),
            ({"q": {**ENTRY, "bbox": [5, 5, 9]}}, "query q: ValueError.*expected an image, a box of 4 numbers"),
            ({"q": {"query": "a"}}, "query q: KeyError"),
        ],
    )
    def test_refuses(self, table, message, tmp_path):
        with pytest.raises(FastcamError, match=message):
            read_landmarks(write(tmp_path / "gt.json", table))

    def test_refuses_missing_and_damaged_files(self, tmp_path):
        with pytest.raises(FastcamError, match="does not exist"):
            read_landmarks(tmp_path / "none.json")
        (tmp_path / "gt.json").write_text("{")
        with pytest.raises(FastcamError, match="does not read as JSON"):
            read_landmarks(tmp_path / "gt.json")
        (tmp_path / "a_1_query.txt").write_text("a 0 0 1 1")
        with pytest.raises(FastcamError, match=r"a_1_good\.txt does not exist; copy all files"):
            read_landmarks(tmp_path)


class TestCrop:
    @pytest.mark.parametrize(
        ("box", "expected"),
        [
            ((1.4, 2.6, 8.5, 9.9), (1, 3, 8, 10)),
            ((-5, -5, 500, 500), (0, 0, 30, 20)),
            ((3.2, 3.2, 3.3, 3.3), (3, 3, 4, 4)),
            ((90, 90, 120, 120), (29, 19, 30, 20)),
        ],
    )
    def test_is_rounded_inside_and_never_empty(self, box, expected):
        assert crop_box(box, (20, 30)) == expected


class TestLabels:
    def test_are_read_by_column(self, tmp_path):
        (tmp_path / "labels.csv").write_text("file,index,name,part\nsub/a.jpg,0,tree,train\nb.png,1,big house,test\n")
        labels = read_labels(tmp_path / "labels.csv", "name", "part")
        assert labels == {"sub/a": Label("tree", "train"), "b": Label("big house", "test")}
        assert read_labels(tmp_path / "labels.csv", "index")["b"] == Label("1", "")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no column 'label'; it has none"),
            ("file,labels\na,b\n", "has no column 'label'; it has file, labels"),
            ("file,label\n", "has no rows"),
            ("file,label\na.jpg,x\na.png,y\n", "line 3 has image 'a' a second time"),
            ("file,label\na.jpg,\n", "line 2 has no label for image 'a'"),
        ],
    )
    def test_refuses(self, text, message, tmp_path):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(FastcamError, match=message):
            read_labels(tmp_path / "labels.csv", "label")
        with pytest.raises(FastcamError, match="does not exist"):
            read_labels(tmp_path / "none.csv", "label")

    def test_ukbench_counts_in_fours(self):
        labels = ukbench_labels(["ukbench00003", "ukbench00004", "x/ukbench00007"])
        assert [label.label for label in labels.values()] == ["0", "1", "1"]
        with pytest.raises(FastcamError, match="image 'cup' has no number"):
            ukbench_labels(["cup"])

    def test_same_label_is_relevant_and_the_query_itself_is_junk(self):
        labels = {name: Label(label, "") for name, label in zip("abcd", "xxyz", strict=True)}
        queries = label_queries(labels, ["a", "c", "d"], ["a", "b", "c"])
        assert queries == [Query("a", "a", None, frozenset("b"), frozenset("a"), "x")]  # c and d have nothing to find
        with pytest.raises(FastcamError, match="image 'e' has no label"):
            label_queries(labels, ["e"], ["a"])
        with pytest.raises(FastcamError, match="no query shares its label"):
            label_queries(labels, ["d"], ["a"])
