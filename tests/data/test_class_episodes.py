import pytest
import torch

from fastcam.data import ClassEpisodes, class_members, draw_episode, fixed_episodes
from fastcam.data.class_episodes import read_class_episodes, write_class_episodes
from fastcam.errors import FastcamError


class Labelled:
    """`counts[k]` images of class k, whose pixels are their number."""

    def __init__(self, *counts):
        labels = [k for k, count in enumerate(counts) for _ in range(count)]
        self.classes = tuple("abcdefgh"[: len(counts)])
        self.ids = [f"{self.classes[k]}{i}" for i, k in enumerate(labels)]
        self.tags = torch.eye(len(counts))[labels]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2), float(index))}


def test_members_are_the_images_of_classes_that_have_some():
    assert [own.tolist() for own in class_members(Labelled(2, 0, 3), 2)] == [[0, 1], [2, 3, 4]]
    assert [own.tolist() for own in class_members(Labelled(2, 1, 3), 2, ["c", "a"])] == [
        [2 + i for i in (1, 2, 3)],
        [0, 1],
    ]


def test_members_of_odd_data_are_refused():
    images = Labelled(2, 3)
    with pytest.raises(FastcamError, match=r"class a has 2 images, but an episode takes 3 \(shot \+ queries\)"):
        class_members(images, 3)
    with pytest.raises(FastcamError, match="class 'z' is not a class of the data"):
        class_members(images, 1, ["z"])
    images.tags[3] = 1
    with pytest.raises(FastcamError, match="image 'b3' has 2 tags, but episodes need images of one class"):
        class_members(images, 1)
    images.tags[3] = 0
    with pytest.raises(FastcamError, match="image 'b3' has 0 tags"):
        class_members(images, 1)
    images.tags = None
    with pytest.raises(FastcamError, match=r"these have no tags; give data.tags"):
        class_members(images, 1)


def test_episode_has_distinct_classes_and_images_one_class_a_column():
    images = Labelled(6, 7, 8, 9)
    labels = images.tags.argmax(1)
    for seed in range(20):
        drawn = draw_episode(class_members(images, 5), 3, 5, torch.Generator().manual_seed(seed))
        assert drawn.shape == (5, 3)
        assert len(drawn.unique()) == 15
        of_column = labels[drawn]
        assert (of_column == of_column[0]).all() and len(of_column[0].unique()) == 3


def test_episode_draws_classes_first_and_then_a_permutation_each():
    members = class_members(Labelled(3, 4, 5), 2)
    drawn = draw_episode(members, 2, 2, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randperm(3, generator=generator)[:2].tolist()
    columns = [members[k][torch.randperm(len(members[k]), generator=generator)[:2]] for k in (first, second)]
    assert torch.equal(drawn, torch.stack(columns, 1))


def test_episodes_choose_all_classes_and_images_alike():
    members = class_members(Labelled(4, 4, 4), 2)
    drawn = fixed_episodes(members, 2, 2, 3000, seed=0)
    counts = drawn.flatten().bincount(minlength=12)  # 1,000 each, standard deviation 26
    assert ((counts - 1000).abs() < 110).all()


def test_fixed_episodes_depend_on_the_seed_alone_and_short_lists_begin_long_ones():
    members = class_members(Labelled(4, 4, 4), 3)
    torch.manual_seed(1)
    some = fixed_episodes(members, 2, 3, 4, seed=5)
    torch.manual_seed(2)
    assert torch.equal(fixed_episodes(members, 2, 3, 9, seed=5)[:4], some)
    assert not torch.equal(fixed_episodes(members, 2, 3, 4, seed=6), some)


def test_more_ways_than_classes_and_no_episodes_are_refused():
    images = Labelled(2, 2)
    with pytest.raises(FastcamError, match="episodes take 3 classes, but there are 2; lower way"):
        draw_episode(class_members(images, 2), 3, 2)
    with pytest.raises(FastcamError, match="episodes take 3 classes, but there are 2; lower way"):
        ClassEpisodes(images, way=3, images_per_class=2, episodes=1, transform=dict)
    with pytest.raises(FastcamError, match="episodes is 0"):
        fixed_episodes(class_members(images, 2), 2, 2, 0, seed=0)


def test_items_are_stacked_images_in_the_order_of_the_rows():
    images = Labelled(3, 3, 3)
    episodes = ClassEpisodes(images, way=2, images_per_class=3, episodes=7, transform=dict)
    assert len(episodes) == 7
    torch.manual_seed(4)
    item = episodes[0]
    torch.manual_seed(4)
    drawn = draw_episode(class_members(images, 3), 2, 3)
    assert item["image"].shape == (6, 1, 2, 2)
    assert item["image"][:, 0, 0, 0].tolist() == drawn.flatten().tolist()


def test_list_is_read_as_it_was_written(tmp_path):
    images = Labelled(4, 4, 4)
    drawn = fixed_episodes(class_members(images, 3), 2, 3, 5, seed=0)
    write_class_episodes(tmp_path / "list.json", drawn, 1, images.ids)
    again, shot = read_class_episodes(tmp_path / "list.json", images.ids)
    assert torch.equal(again, drawn) and shot == 1
    turned = images.ids[::-1]  # ids count, not numbers
    again, _ = read_class_episodes(tmp_path / "list.json", turned)
    assert torch.equal(again, len(turned) - 1 - drawn)
    with pytest.raises(FastcamError, match=r"names image '\w+', which the data lack"):
        read_class_episodes(tmp_path / "list.json", images.ids[:3])


@pytest.mark.parametrize("text", ["", "[]", '{"shot": 1}', '{"shot": 2, "ids": ["a"], "episodes": [[[0], [0]]]}'])
def test_damaged_lists_are_refused(text, tmp_path):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(FastcamError, match="holds no episodes of one size"):
        read_class_episodes(tmp_path / "list.json", ["a"])
    with pytest.raises(FastcamError, match="does not exist"):
        read_class_episodes(tmp_path / "none.json", ["a"])
