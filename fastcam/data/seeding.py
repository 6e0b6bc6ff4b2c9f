"""Randomness that depends on the item and on nothing else."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Seeded(Dataset[Any]):
    """A data set whose item `i` draws the same random numbers whenever `(seed, epoch, i)` is the same.

    The number of workers, the order of access and the place where a training run was killed then make no difference.
    Only torch's global generator is set, and it is put back afterwards.

    Args:
        dataset: any map-style data set; its transforms draw from torch's global generator.
        seed: of the whole run.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # Shared memory: persistent workers hold a copy of this object, and must see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; call it before an iterator is made."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        words = np.random.SeedSequence([self.seed, int(self._epoch), index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(words[0]))
            return self.dataset[index]
