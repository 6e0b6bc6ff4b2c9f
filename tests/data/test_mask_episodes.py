"""Classes and episodes of few-shot segmentation."""

import numpy as np
import pytest
import torch

from fastcam.data import VOC_CLASSES
from fastcam.data.few_shot import (
    PROTOCOLS,
    Episode,
    draw_episodes,
    episode_mask,
    members,
    read_episodes,
    split_classes,
    write_episodes,
)
from fastcam.errors import FastcamError

IDS = {"cat": ["a", "b", "c", "d"], "cow": ["c", "d", "e"]}
FOLDED = [name for name, protocol in PROTOCOLS.items() if protocol.folds]


@pytest.mark.parametrize("name", FOLDED)
def test_folds_are_disjoint_and_train_on_the_other_ones(name):
    folds = PROTOCOLS[name].folds
    classes = [c for fold in folds for c in fold]
    assert len(set(classes)) == len(classes) == (20 if name == "pascal_5i" else 15)
    for number, fold in enumerate(folds):
        split = split_classes(name, number, classes)
        assert split.novel == fold
        assert set(split.base) == set(classes) - set(fold)


def test_pascal_folds_are_those_of_the_published_lists(shared_data):
    lists = np.load(shared_data / "lists" / "pascal5i.npz")
    for fold, names in enumerate(PROTOCOLS["pascal_5i"].folds):
        for part in ("trn", "val"):
            labels = set(lists[f"{part}_fold{fold}_class"].tolist())
            assert {VOC_CLASSES[label - 1] for label in labels} == set(names)


def test_both_dlrsd_variants_have_airplanes_in_their_first_fold_and_drop_two_of_17():
    both = [{c for fold in PROTOCOLS[name].folds for c in fold} for name in ("dlrsd_pcfnet", "dlrsd_sccnet")]
    assert both[0] - both[1] == {"trees", "water"}
    assert both[1] - both[0] == {"field", "sea"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "pascal"}, "protocol 'pascal' is unknown; known are isaid_5i_sdm"),
        ({"protocol": "pascal_5i", "fold": 4}, "fold is 4, expected 0 to 3"),
        ({"base": ["cat"]}, "there are no novel classes"),
        ({"base": ["cat"], "novel": ["cov"]}, "novel class 'cov' .* is not a class of the data; nearest is 'cow'"),
        ({"base": ["cat", "cow"], "novel": ["cow"]}, "class 'cow' is base and novel"),
    ],
)
def test_bad_splits_are_refused(arguments, message):
    with pytest.raises(FastcamError, match=message):
        split_classes(**{"protocol": "own", "fold": 0, "classes": VOC_CLASSES, **arguments})


def test_novel_classes_given_by_name_leave_the_base_of_a_protocol():
    split = split_classes("pascal_5i", 0, VOC_CLASSES, novel=["cat"])
    assert split.novel == ("cat",)
    assert "cat" not in split.base


def test_members_have_enough_pixels_and_no_forbidden_class():
    areas = torch.tensor([[5, 0], [9, 1], [0, 4], [3, 0]])
    assert members(areas, [0, 1]) == {0: [0, 1, 3], 1: [1, 2]}
    assert members(areas, [0], least=5) == {0: [0, 1]}
    assert members(areas, [0], least=0, without=[1]) == {0: [0, 3]}


def test_mask_of_an_episode_keeps_the_unknown():
    assert episode_mask(torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8), 2).tolist() == [[0, 0, 1, 255]]


def test_episodes_depend_on_the_seed_and_use_every_query_before_any_again():
    episodes = draw_episodes(IDS, 1, 14, seed=0)
    assert episodes == draw_episodes(IDS, 1, 14, seed=0)
    assert episodes != draw_episodes(IDS, 1, 14, seed=1)
    pairs = sorted((label, image) for label, own in IDS.items() for image in own)
    for part in (episodes[:7], episodes[7:]):
        assert sorted((e.label, e.query) for e in part) == pairs


def test_supports_show_the_class_differ_from_the_query_and_grow_with_the_shots():
    one, two = (draw_episodes(IDS, shots, 20, seed=5) for shots in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a.label, a.query, a.supports) == (b.label, b.query, b.supports[:1])
        assert set(b.supports) <= set(IDS[b.label]) - {b.query}
        assert len(set(b.supports)) == 2


def test_a_class_with_too_few_images_is_refused_by_name():
    with pytest.raises(FastcamError, match=r"class .cow. has 3 images .* expected at least 4 for 3 shots and a query"):
        draw_episodes(IDS, 3, 1, seed=0)
    with pytest.raises(FastcamError, match="shots is 0"):
        draw_episodes(IDS, 0, 1, seed=0)
    with pytest.raises(FastcamError, match="episodes is 0"):
        draw_episodes(IDS, 1, 0, seed=0)


def test_written_episodes_are_read_again(tmp_path):
    episodes = draw_episodes(IDS, 2, 9, seed=0)
    write_episodes(tmp_path / "list.json", episodes)
    assert read_episodes(tmp_path / "list.json") == episodes
    assert isinstance(episodes[0], Episode)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "holds no episodes"),
        ("[]", "holds no episodes"),
        ("3", "holds no episodes"),
        ('[["cat", "a"]]', "holds no episodes"),
        ('[["cat", "a", 3]]', "holds no episodes"),
        ('[["cat", "a", "b"], ["cat", "a", "b", "c"]]', "different numbers of supports"),
        ('[["cat", "a", "b"], ["cat", "a", "a"]]', "episode 1 has an image twice"),
    ],
)
def test_damaged_lists_are_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "list.json").write_text(text)
    with pytest.raises(FastcamError, match=f"episode list .*{message}"):
        read_episodes(tmp_path / "list.json")
