"""Parts of adversarial networks against the authors' generator, numbers worked by hand and what norms do not see."""

import pytest
import torch
from torch import nn

from fastcam.nn.gan import (
    ReplayPool,
    ResidualBlock,
    ResnetGenerator,
    frozen,
    lsgan_discriminator_loss,
    lsgan_generator_loss,
    patch_discriminator,
    pixel_discriminator,
    strided_discriminator,
)


@pytest.mark.parametrize(("case", "channels", "out"), [("seg", 3, 4), ("img", 4, 3)])
def test_generator_gives_the_authors_values_and_gradients(case, channels, out, golden):
    arrays = {name: torch.from_numpy(array) for name, array in golden("cyclegan_semi_generator").items()}
    generator = ResnetGenerator(channels, out, width=4, blocks=2, dropout=0.0)
    own = list(generator.parameters())
    theirs = [array for name, array in arrays.items() if name.startswith(f"{case}.p.")]  # both in order of the layers
    assert [p.shape for p in own] == [p.shape for p in theirs]
    with torch.no_grad():
        for parameter, value in zip(own, theirs, strict=True):
            parameter.copy_(value)
    x = arrays[f"{case}.x"].requires_grad_()
    y = generator(x) if case == "seg" else generator(x).tanh()
    torch.testing.assert_close(y, arrays[f"{case}.out"], rtol=1e-4, atol=1e-5)
    y.backward(arrays[f"{case}.cotangent"])
    torch.testing.assert_close(x.grad, arrays[f"{case}.grad_x"], rtol=1e-4, atol=1e-5)


def test_generator_for_21_labels_has_the_published_size():
    assert sum(p.numel() for p in ResnetGenerator(3, 21).parameters()) == pytest.approx(11.43e6, rel=1e-3)


@pytest.mark.parametrize("size", [(16, 20), (18, 21), (8, 8), (1, 1), (5, 40)])
def test_output_has_the_size_of_the_input(size):
    x = torch.randn(2, 3, *size)
    assert ResnetGenerator(3, 5, width=4, blocks=1)(x).shape == (2, 5, *size)


def test_other_sizes_are_filled_up_with_their_last_row_and_column():
    generator = ResnetGenerator(3, 5, width=4, blocks=1, dropout=0.0)
    x = torch.randn(1, 3, 14, 17)
    full = nn.functional.pad(x, (0, 3, 0, 2), mode="replicate")
    torch.testing.assert_close(generator(x), generator(full)[..., :14, :17], rtol=0, atol=0)


def test_weights_are_drawn_with_the_authors_deviation_and_biases_are_zero():
    torch.manual_seed(0)
    for layer in ResnetGenerator(3, 5, width=32, blocks=1).modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not layer.bias.any()


def test_biases_before_a_norm_have_no_effect():
    generator = ResnetGenerator(3, 5, width=4, blocks=1, dropout=0.0)
    generator(torch.randn(2, 3, 16, 16)).square().sum().backward()
    convolutions = [m for m in generator.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in convolutions[:-1]:
        assert layer.bias.grad.abs().max() < 1e-3 * layer.weight.grad.abs().max()
    assert convolutions[-1].bias.grad.abs().min() > 0


def test_constant_image_has_finite_gradients():
    x = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    y = ResnetGenerator(3, 5, width=4, blocks=1, dropout=0.0)(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    block, x = ResidualBlock(4, dropout=0.5), torch.randn(1, 4, 8, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_pixel_discriminator_moves_with_its_pixels():
    torch.manual_seed(0)
    network, x = pixel_discriminator(3, 8), torch.randn(2, 3, 6, 5)
    order = torch.randperm(30)
    moved = x.flatten(2)[..., order].view_as(x)
    expected = network(x).flatten(2)[..., order].view(2, 1, 6, 5)
    torch.testing.assert_close(network(moved), expected, rtol=1e-4, atol=1e-6)


def test_pixel_discriminator_does_not_see_constants_before_its_norm():
    torch.manual_seed(0)
    network, x = pixel_discriminator(3, 8), torch.randn(2, 3, 6, 5)
    before = network(x)
    network[2].bias.data += torch.randn(16)
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "size"),
    [(pixel_discriminator, (64, 96)), (patch_discriminator, (6, 10)), (strided_discriminator, (2, 3))],
)
def test_discriminators_score_every_place(build, size):
    assert build(3, 4)(torch.randn(2, 3, 64, 96)).shape == (2, 1, *size)


def test_patch_discriminator_sees_70_pixels():
    torch.manual_seed(0)
    convolutions = nn.Sequential(*(m for m in patch_discriminator(1, 2) if isinstance(m, nn.Conv2d)))  # norms see all
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    convolutions(x)[0, 0, 7, 7].backward()
    rows = x.grad[0, 0].any(dim=1).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_least_squares_losses_by_hand():
    ones, halves = torch.ones(2, 1, 3, 3), torch.full((2, 1, 3, 3), 0.5)
    assert lsgan_generator_loss(ones) == 0
    assert lsgan_generator_loss(halves) == 0.25
    assert lsgan_discriminator_loss(halves, halves) == 0.25
    assert lsgan_discriminator_loss(ones, 0 * ones) == 0
    scores = torch.tensor([0.5, 3.0], requires_grad=True)
    lsgan_generator_loss(scores).backward()
    assert scores.grad.tolist() == [-0.5, 2.0]  # 2 (D - 1) / 2


def test_frozen_network_passes_gradients_through_but_takes_none():
    network, x = nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1, requires_grad=True)
    network.bias.requires_grad_(False)
    with frozen(network):
        y = network(x)
    y.backward()
    assert x.grad.item() == network.weight.item()
    assert network.weight.grad is None
    assert network.weight.requires_grad
    assert not network.bias.requires_grad


def entries(count):
    return [torch.full((2, 1), float(i), requires_grad=True) for i in range(count)]


def test_pool_returns_what_came_until_it_is_full_and_then_half_of_the_time_an_earlier_one():
    torch.manual_seed(0)
    pool, batches = ReplayPool(50), entries(2050)
    out = [pool(batch) for batch in batches]
    values = [int(batch[0]) for batch in out]
    assert not any(batch.requires_grad for batch in out)
    assert values[:50] == list(range(50))
    assert len(pool.entries) == 50
    earlier = sum(value != i for i, value in enumerate(values))
    assert earlier / 2000 == pytest.approx(0.5, abs=0.04)
    kept = [int(batch[0]) for batch in pool.entries]
    assert sorted(kept + values[50:]) == list(range(2050))  # every batch is shown again once at most, or still kept


def test_pool_of_no_entries_returns_what_came():
    pool = ReplayPool(0)
    assert [int(pool(batch)[0]) for batch in entries(5)] == list(range(5))


def test_restored_pool_continues_as_the_saved_one(tmp_path):
    torch.manual_seed(0)
    pool, batches = ReplayPool(3), entries(40)
    for batch in batches[:20]:
        pool(batch)
    torch.save(pool.state_dict(), tmp_path / "pool.ckpt")
    other = ReplayPool(3)
    other.load_state_dict(torch.load(tmp_path / "pool.ckpt", weights_only=True))
    rest = []
    for each in (pool, other):
        torch.manual_seed(1)
        rest.append([int(each(batch)[0]) for batch in batches[20:]])
    assert rest[0] == rest[1]
    assert rest[0] != list(range(20, 40))


def test_pool_keeps_its_entries_when_the_batch_changes_afterwards():
    pool, batch = ReplayPool(1), torch.zeros(1)
    pool(batch)
    batch += 1
    assert pool.entries[0].item() == 0
