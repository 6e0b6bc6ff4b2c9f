"""The image bank of SFC: one stored image a class, mixed into later batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageBank(nn.Module):
    """Keeps the last image of every class and draws classes uniformly, so that rare ones are seen more often.

    SFC, section "image bank re-sampling". The authors' code starts with all-zero slots and draws them too: untagged
    black images, trained as negatives. Here only filled slots are drawn unless ``draw_empty``.

    The slots take part in checkpoints, for exact resuming, through the module's extra state. They are no buffers:
    distributed training would overwrite every process's bank with that of the first. All chance comes from torch's
    global CPU generator.

    Args:
        num_classes: number of slots.
        draws: images appended to a batch.
        draw_empty: draw unfilled slots too, as the authors' code does.
    """

    def __init__(self, num_classes: int, draws: int, draw_empty: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.draws = draws
        self.draw_empty = draw_empty
        self.slots: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def forward(self, images: Tensor, valid: Tensor, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores a batch and appends ``draws`` stored images to it.

        Args:
            images: ``(B, 3, H, W)``.
            valid: bool ``(B, H, W)``.
            tags: ``(B, C)``.

        Returns:
            The same with ``B + draws`` images; an image that belongs to several classes fills several slots.
        """
        tagged = (tags > 0).cpu()
        last = {k: i for i in torch.randperm(len(images)).tolist() for k in tagged[i].nonzero().flatten().tolist()}
        stored = {i: (images[i].clone(), valid[i].clone(), tags[i].clone()) for i in set(last.values())}
        self.slots |= {k: stored[i] for k, i in last.items()}
        drawable = list(range(self.num_classes)) if self.draw_empty else sorted(self.slots)
        if not drawable or self.draws == 0:
            return images, valid, tags
        empty = (torch.zeros_like(images[0]), torch.zeros_like(valid[0]), torch.zeros_like(tags[0]))
        drawn = [self.slots.get(drawable[i], empty) for i in torch.randint(len(drawable), (self.draws,)).tolist()]
        extra = [
            torch.stack([x.to(like) for x in column])
            for column, like in zip(zip(*drawn, strict=True), empty, strict=True)
        ]
        return torch.cat([images, extra[0]]), torch.cat([valid, extra[1]]), torch.cat([tags, extra[2]])

    def get_extra_state(self) -> dict[str, Tensor]:
        """The filled slots as plain tensors."""
        if not self.slots:
            return {"classes": torch.zeros(0, dtype=torch.int64)}
        images, valid, tags = (torch.stack(column).cpu() for column in zip(*self.slots.values(), strict=True))
        return {"classes": torch.tensor(list(self.slots)), "images": images, "valid": valid, "tags": tags}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Fills the slots again."""
        classes = state["classes"].tolist()
        self.slots = {k: (state["images"][i], state["valid"][i], state["tags"][i]) for i, k in enumerate(classes)}
