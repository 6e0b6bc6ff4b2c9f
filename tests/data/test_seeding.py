import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastcam.data import Seeded


class Noise(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(3)


def draw(dataset, workers=0, indices=None):
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, sampler=indices)
    return torch.cat(list(loader))


def test_every_item_has_numbers_of_its_own():
    assert len(draw(Seeded(Noise(), 0)).unique()) == 18


def test_numbers_depend_on_seed_epoch_and_index_only():
    dataset = Seeded(Noise(), 7)
    first = draw(dataset)
    torch.manual_seed(123)
    assert torch.equal(draw(dataset), first)
    assert torch.equal(draw(dataset, indices=[4, 1, 0]), first[[4, 1, 0]])
    assert not torch.equal(draw(Seeded(Noise(), 8)), first)
    dataset.set_epoch(1)
    second = draw(dataset)
    assert not torch.isin(second, first).any()
    dataset.set_epoch(0)
    assert torch.equal(draw(dataset), first)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_no_difference_even_persistent_ones(workers):
    dataset, serial = Seeded(Noise(), 0), Seeded(Noise(), 0)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        serial.set_epoch(epoch)
        assert torch.equal(torch.cat(list(loader)), draw(serial))


def test_the_global_generator_is_left_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    Seeded(Noise(), 0)[3]
    assert torch.equal(torch.rand(4), expected)
