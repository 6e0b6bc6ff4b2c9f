import pytest

from fastcam.data import COCO_CLASSES, VOC_CLASSES, load_class_list
from fastcam.errors import FastcamError


def test_built_in_lists_have_the_usual_order():
    assert len(VOC_CLASSES) == 20 and len(COCO_CLASSES) == 80
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert (COCO_CLASSES[0], COCO_CLASSES[15], COCO_CLASSES[62], COCO_CLASSES[79]) == (
        "person",
        "cat",
        "tv",
        "toothbrush",
    )


def test_coco_order_is_that_of_the_official_categories(shared_data):
    import json

    categories = json.loads((shared_data / "coco/categories.json").read_text())["categories"]
    names = {c["label80"]: c["name"] for c in categories if c["label80"]}
    assert tuple(names[label] for label in range(1, 81)) == COCO_CLASSES


def test_every_way_to_give_a_list(tmp_path):
    (tmp_path / "classes.txt").write_text("traffic light\n\n dog \n")
    assert load_class_list("voc") == VOC_CLASSES
    assert load_class_list("coco") == COCO_CLASSES
    assert load_class_list(" cat,dog ") == ("cat", "dog")
    assert load_class_list("cat,") == ("cat",)
    assert load_class_list(tmp_path / "classes.txt") == ("traffic light", "dog")
    assert load_class_list(["cat", "dog"]) == ("cat", "dog")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("vco", "'vco' is no readable text file"), (",", "names no class"), ("cat,dog,cat", "names cat more than once")],
)
def test_wrong_lists_are_one_line(spec, message):
    with pytest.raises(FastcamError, match=message) as raised:
        load_class_list(spec)
    assert "\n" not in str(raised.value)
