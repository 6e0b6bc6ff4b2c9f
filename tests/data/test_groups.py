"""Groups of images that share classes."""

import pytest
import torch

from fastcam.data import GroupSampler


def draws(sampler, index, times=50):
    generator = torch.Generator().manual_seed(0)
    return [sampler(index, generator) for _ in range(times)]


def test_partners_have_the_same_tags_where_there_are_enough():
    tags = torch.eye(3).repeat(100, 1)
    for group in draws(GroupSampler(tags, 4), 7):
        assert group[0] == 7
        assert len(set(group)) == 4
        assert all(torch.equal(tags[i], tags[7]) for i in group)


def test_every_image_of_the_same_tags_is_drawn():
    sampler = GroupSampler(torch.ones(60, 1), 3)
    assert {i for group in draws(sampler, 0, 400) for i in group} == set(range(60))


def test_others_share_one_tag_of_the_first():
    tags = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    groups = draws(GroupSampler(tags, 2), 0)
    assert {tuple(group) for group in groups} == {(0, 1), (0, 2), (0, 3)}


def test_same_tags_come_before_shared_ones():
    tags = torch.tensor([[1, 1], [1, 1], [1, 0]])
    assert all(set(group[:2]) == {0, 1} for group in draws(GroupSampler(tags, 3), 0))


def test_too_few_partners_repeat_and_none_is_the_image_itself():
    tags = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]])
    sampler = GroupSampler(tags, 4)
    assert draws(sampler, 0, 1) == [[0, 1, 1, 1]]
    assert draws(sampler, 2, 1) == [[2, 2, 2, 2]]
    assert draws(sampler, 3, 1) == [[3, 4, 4, 4]]


def test_group_depends_on_the_generator_alone():
    sampler = GroupSampler((torch.rand(500, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float(), 3)
    assert draws(sampler, 5) == draws(sampler, 5)


def test_group_of_one_is_the_image():
    assert draws(GroupSampler(torch.ones(3, 1), 1), 2, 1) == [[2]]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"GroupSampler: expected tags \(N, C\) and size of 1 or more, got \(3,\), 2"):
        GroupSampler(torch.ones(3), 2)
    with pytest.raises(ValueError, match="GroupSampler: expected tags"):
        GroupSampler(torch.ones(3, 1), 0)
