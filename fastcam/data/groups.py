"""Groups of images that share classes."""

import torch
from torch import Tensor


class GroupSampler:
    """Draws partners for an image: images with the same tags, and where these are too few, with one common tag.

    Group-WSSS (X. Li et al., AAAI 2021). The common tag is drawn from the image's own. No image comes twice, and none
    is its own partner, as long as there are enough of them; then partners repeat, and an image without any forms a
    group with itself.

    Args:
        tags: `(N, C)`, of all images.
        size: images a group, the first included.

    Raises:
        ValueError: another shape, or a size below 1.

    Example:
        >>> sampler = GroupSampler(torch.tensor([[1, 0], [1, 0], [0, 1]]), size=2)
        >>> sampler(0, torch.Generator()), sampler(2, torch.Generator())
        ([0, 1], [2, 2])
    """

    def __init__(self, tags: Tensor, size: int) -> None:
        if tags.ndim != 2 or size < 1:
            raise ValueError(
                f"GroupSampler: expected tags (N, C) and size of 1 or more, got {tuple(tags.shape)}, {size}"
            )
        self.size = size
        self._tags = [tuple(row.nonzero().flatten().tolist()) for row in tags > 0]
        self._same: dict[tuple[int, ...], list[int]] = {}
        self._with: dict[int, list[int]] = {}
        for index, own in enumerate(self._tags):
            self._same.setdefault(own, []).append(index)
            for k in own:
                self._with.setdefault(k, []).append(index)

    def __call__(self, index: int, generator: torch.Generator) -> list[int]:
        """The group of an image: `size` indices, its own first.

        Cost: independent of the number of images.
        """
        own = self._tags[index]
        group = [index]
        self._draw(self._same[own], group, generator)
        if own:
            flag = own[int(torch.randint(len(own), (), generator=generator))]
            self._draw(self._with[flag], group, generator)
        partners = group[1:] or group
        return group + [partners[i % len(partners)] for i in range(self.size - len(group))]

    def _draw(self, pool: list[int], group: list[int], generator: torch.Generator) -> None:
        """Adds images of the pool to the group until it is full or the pool is empty."""
        if len(pool) > 8 * self.size:  # most draws are new ones
            while len(group) < self.size:
                drawn = pool[int(torch.randint(len(pool), (), generator=generator))]
                group += [drawn] if drawn not in group else []
        else:
            order = torch.randperm(len(pool), generator=generator).tolist()
            new = [pool[i] for i in order if pool[i] not in group]
            group += new[: self.size - len(group)]
