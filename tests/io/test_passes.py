import json

import pytest

from fastcam.errors import FastcamError
from fastcam.io import finished_ids, open_pass, read_pass

CONFIG = {"scales": (1.0, 0.5), "crf": {"srgb": 5, "sxy": 50}, "threshold": 0.3}


def test_same_configuration_opens_again_with_the_same_fingerprint(tmp_path):
    first = open_pass(tmp_path / "out", CONFIG)
    assert len(first) == 64
    (tmp_path / "out" / "a.png").touch()
    assert open_pass(tmp_path / "out", dict(reversed(CONFIG.items()))) == first
    assert read_pass(tmp_path / "out") == {"config": json.loads(json.dumps(CONFIG)), "fingerprint": first}


def test_changed_keys_are_named_with_old_and_new_value(tmp_path):
    open_pass(tmp_path, CONFIG)
    changed = {"scales": (1.0, 0.5), "crf": {"srgb": 13, "sxy": 50}, "threshold": 0.3, "tags": "xml"}
    with pytest.raises(FastcamError) as raised:
        open_pass(tmp_path, changed)
    message = str(raised.value)
    assert "crf.srgb: 5 -> 13" in message and "tags: unset -> xml" in message
    assert "threshold" not in message and "\n" not in message
    assert read_pass(tmp_path)["config"]["crf"]["srgb"] == 5


def test_output_of_unknown_origin_is_not_mixed_with(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(FastcamError, match=r"holds a\.png but no pass\.json"):
        open_pass(tmp_path, CONFIG)
    assert read_pass(tmp_path) is None


def test_logs_and_unfinished_files_do_not_count_as_output(tmp_path):
    (tmp_path / "log.txt").touch()
    (tmp_path / ".tmp-1.png").touch()
    assert open_pass(tmp_path, CONFIG)


def test_damaged_record_and_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "pass.json").write_text("{")
    with pytest.raises(FastcamError, match=r"pass\.json does not read"):
        open_pass(tmp_path, CONFIG)
    (tmp_path / "file").touch()
    with pytest.raises(FastcamError, match="is a file"):
        open_pass(tmp_path / "file", CONFIG)


def test_paths_are_plain_values_and_objects_are_not(tmp_path):
    assert open_pass(tmp_path / "a", {"images": tmp_path}) == open_pass(tmp_path / "b", {"images": str(tmp_path)})
    with pytest.raises(TypeError, match="open_pass: expected plain values"):
        open_pass(tmp_path / "c", {"images": object()})


def test_finished_ids_may_have_dots_and_slashes(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.v2.png", "sub/c.png", "d.npz", ".tmp-1.png"):
        (tmp_path / name).touch()
    assert finished_ids(tmp_path, ".png") == {"a", "b.v2", "sub/c"}
    assert finished_ids(tmp_path / "missing", ".png") == set()
