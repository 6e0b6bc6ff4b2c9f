import os
import pickle

import numpy as np
import pytest
import torch

from fastcam.data import VOC_CLASSES, load_tags, read_cls_labels, read_tag_csv, tags_from_mask, tags_from_xml
from fastcam.errors import FastcamError

CLASSES = ("cat", "dog", "traffic light")


def csv_file(folder, text):
    (folder / "tags.csv").write_text(text)
    return folder / "tags.csv"


def test_mask_gives_its_classes_without_background_and_border():
    mask = torch.tensor([[0, 3, 255], [1, 1, 9]], dtype=torch.uint8)
    assert tags_from_mask(mask, 3).tolist() == [1, 0, 1]


class TestXml:
    def write(self, folder, *names):
        objects = "".join(
            f"<object><name>{name}</name><difficult>1</difficult><part><name>head</name></part></object>"
            for name in names
        )
        path = folder / "a.xml"
        path.write_text(f"<annotation><filename>a.jpg</filename>{objects}</annotation>")
        return path

    def test_all_objects_count_difficult_or_not_but_no_parts(self, tmp_path):
        assert tags_from_xml(self.write(tmp_path, "dog", "dog", "cat"), CLASSES).tolist() == [1, 1, 0]
        assert tags_from_xml(self.write(tmp_path), CLASSES).tolist() == [0, 0, 0]

    def test_classes_left_out_do_not_count_and_unknown_ones_are_refused(self, tmp_path):
        assert tags_from_xml(self.write(tmp_path, "dog", "sheep"), CLASSES, others=VOC_CLASSES).tolist() == [0, 1, 0]
        with pytest.raises(FastcamError, match=r"a\.xml has the tag 'dogg', which is no known class; nearest is 'dog'"):
            tags_from_xml(self.write(tmp_path, "dogg"), CLASSES, others=VOC_CLASSES)

    def test_missing_and_damaged(self, tmp_path):
        with pytest.raises(FastcamError, match="does not exist"):
            tags_from_xml(tmp_path / "a.xml", CLASSES)
        (tmp_path / "a.xml").write_text("<annotation><object>")
        with pytest.raises(FastcamError, match="does not read as XML"):
            tags_from_xml(tmp_path / "a.xml", CLASSES)


class TestCsv:
    def read(self, folder, text):
        return {image: row.tolist() for image, row in read_tag_csv(csv_file(folder, text), CLASSES).items()}

    def test_one_column_a_class_in_any_order_among_others(self, tmp_path):
        text = "id,split,dog,cat,sheep,traffic light\na,train,1,0,1,0\nb.jpg,val,0.0,1,1,1\n"
        assert self.read(tmp_path, text) == {"a": [0, 1, 0], "b": [1, 0, 1]}

    @pytest.mark.parametrize("header", ["", "image,tags\n", "File,Labels\n"])
    def test_a_column_of_tags_with_and_without_header(self, tmp_path, header):
        text = header + "sub/a.v2.jpg,cat dog\nb,\nc,traffic light\nd,dog; traffic light\n\ne,cat|dog\n"
        expected = {"sub/a.v2": [1, 1, 0], "b": [0, 0, 0], "c": [0, 0, 1], "d": [0, 1, 1], "e": [1, 1, 0]}
        assert self.read(tmp_path, text) == expected

    def test_the_column_of_tags_is_found_by_its_name(self, tmp_path):
        assert self.read(tmp_path, "file,class_index,class_name,split\na.jpg,0,dog,train\n") == {"a": [0, 1, 0]}

    def test_byte_order_mark_quotes_and_windows_lines(self, tmp_path):
        assert self.read(tmp_path, '\ufeffid,"cat","dog","traffic light"\r\n"a",1,0,0\r\n') == {"a": [1, 0, 0]}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("image,tags\na,cat dgo\n", "line 2 has the tag 'dgo', which is no known class; nearest is 'dog'"),
            ("a,cat\na.png,dog\n", "line 2 has image 'a' a second time"),
            ("id,cat,dogs,traffic light\na,1,0,0\n", "0 columns for class 'dog', expected one; nearest is 'dogs'"),
            ("id,cat,dog,traffic light\na,1,0,yes\n", "line 2 has the value 'yes', expected 0 or 1"),
            ("id,cat,dog,traffic light\na,1,0,-1\n", "expected 0 or 1"),
            ("id,cat,dog,traffic light\na,1,0\n", "line 2 has 3 columns, expected 4"),
            ("id,split,aeroplane\na,train,1\n", "has columns id, split, aeroplane, expected a column for every class"),
            ("a\n", "line 1 has 1 columns, expected 2"),
            ("\n\n", "is empty"),
        ],
    )
    def test_wrong_files_are_one_line_naming_the_place(self, tmp_path, text, message):
        with pytest.raises(FastcamError, match=message) as raised:
            self.read(tmp_path, text)
        assert "tags.csv" in str(raised.value) and "\n" not in str(raised.value)

    def test_missing_and_binary_files(self, tmp_path):
        with pytest.raises(FastcamError, match="does not exist"):
            read_tag_csv(tmp_path / "tags.csv", CLASSES)
        (tmp_path / "tags.csv").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(FastcamError, match="does not read as CSV"):
            read_tag_csv(tmp_path / "tags.csv", CLASSES)


class TestClsLabels:
    def test_text_and_integer_ids_and_some_of_the_voc_classes(self, tmp_path):
        labels = {name: np.eye(20, dtype=np.float32)[k] for k, name in enumerate(["2007_000032", "2007_000039"], 7)}
        for table in (labels, {int(name.replace("_", "")): row for name, row in labels.items()}):
            np.save(tmp_path / "cls_labels.npy", table)
            assert load_tags(tmp_path / "cls_labels.npy", list(labels), VOC_CLASSES).argmax(1).tolist() == [7, 8]
            some = load_tags(tmp_path / "cls_labels.npy", ["2007_000039", "2007_000032"], ("chair", "person", "cat"))
            assert some.tolist() == [[1, 0, 0], [0, 0, 1]]

    def test_malicious_file_is_refused_and_does_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        np.save(tmp_path / "cls_labels.npy", {"2007_000032": Evil()})
        with pytest.raises(FastcamError, match=r"cls_labels\.npy wants to run .*system when read"):
            read_cls_labels(tmp_path / "cls_labels.npy", VOC_CLASSES)
        assert not (tmp_path / "ran").exists()
        (tmp_path / "cls_labels.npy").write_bytes(pickle.dumps(Evil()))  # no .npy header at all
        with pytest.raises(FastcamError, match="does not read"):
            read_cls_labels(tmp_path / "cls_labels.npy", VOC_CLASSES)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"a": np.ones(5)}, r"has vectors \(5,\), expected one entry for each of 3 classes"),
            ({"a": np.ones(3), "b": np.ones(4)}, "no vectors of one length"),
            ({"a": np.array([0, 0.5, 1])}, "entries other than 0 and 1"),
            ({}, "expected a dictionary of vectors"),
        ],
    )
    def test_other_tables_are_refused(self, tmp_path, table, message):
        np.save(tmp_path / "a.npy", table)
        with pytest.raises(FastcamError, match=message):
            read_cls_labels(tmp_path / "a.npy", CLASSES)


def test_missing_entries_and_other_suffixes(tmp_path):
    path = csv_file(tmp_path, "a,cat\n")
    with pytest.raises(FastcamError, match="has no entry for image 'b'"):
        load_tags(path, ["a", "b"], CLASSES)
    with pytest.raises(FastcamError, match=r"suffix '\.txt', expected one of \.csv, \.json"):
        load_tags(tmp_path / "tags.txt", ["a"], CLASSES)
