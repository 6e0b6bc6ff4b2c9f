"""Segment proposals from the merge tree."""

import torch

from fastcam.nn import tree_proposals


def test_things_of_one_colour_are_among_the_proposals_which_come_largest_first():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[1] = 120
    image[:, 5:20, 10:25] = torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None]
    image[:, 22:35, 35:55] = torch.tensor([30, 30, 200], dtype=torch.uint8)[:, None, None]
    proposals = tree_proposals(image, superpixels=60)
    areas = proposals.flatten(1).sum(1)
    assert (areas[:-1] >= areas[1:]).all()
    for top, left, bottom, right in ((5, 10, 20, 25), (22, 35, 35, 55)):
        thing = torch.zeros(40, 60, dtype=torch.bool)
        thing[top:bottom, left:right] = True
        both = (proposals & thing).flatten(1).sum(1)
        assert (both / (proposals | thing).flatten(1).sum(1)).max() > 0.9


def test_every_proposal_is_nested_in_or_apart_from_every_other():
    image = torch.randint(0, 256, (3, 24, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flat = tree_proposals(image, superpixels=30, area=(0.0, 1.1)).flatten(1).float()
    both, size = flat @ flat.T, flat.sum(1)
    assert ((both == 0) | (both == torch.minimum(size[:, None], size))).all()
    assert size[0] == 24 * 32
    assert len(tree_proposals(image, superpixels=30, count=5)) == 5


def test_one_colour_has_no_proposal_but_the_whole_which_is_too_large():
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    assert len(tree_proposals(image, superpixels=1)) == 0
    assert tree_proposals(image, superpixels=1, area=(0.0, 2.0)).all()
