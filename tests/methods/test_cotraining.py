"""Deep co-training against arrays of the authors' program, cases worked by hand, and what its formulas promise."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.cotraining import (
    CoTraining,
    diversity,
    draw_pair,
    entropy,
    fgsm,
    jsd,
    kl,
    mode,
    partition,
    ramp,
    unit,
    vat,
    vote,
)

C = 3
TINY = {"backbone": "unet", "width": 2}


def tiny(**config):
    torch.manual_seed(0)
    method = create_method("cotraining", num_classes=C, **{**TINY, **config})
    method.optimizers(120)
    return method


def batch(count=2, networks=2, size=16):
    """Grey images whose right half is bright with label 2; each network has other noise."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(count, networks, size, size, dtype=torch.int64)
    mask[..., size // 2 :] = 2

    def image(like):
        return (
            0.2 + 0.3 * like[:, :, None] + 0.1 * torch.rand(*like.shape[:2], 1, size, size, generator=generator)
        ).expand(-1, -1, 3, -1, -1)

    return {"image": image(mask), "mask": mask, "unlabelled": image(mask)[:, 0]}


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Small(nn.Module):
    """The network of the authors' step."""

    stride = 1

    def __init__(self, arrays=None, number=0, channels=1):
        super().__init__()
        self.a = nn.Conv2d(channels, 5, 3, padding=1)
        self.b = nn.Conv2d(5, 4, 1)
        if arrays is not None:
            self.load_state_dict(
                {key.removeprefix(f"net{number}."): x for key, x in arrays.items() if key.startswith(f"net{number}.")}
            )

    def forward(self, x):
        return self.b(F.leaky_relu(self.a(x), 0.1))


@pytest.mark.parametrize("count", [2, 3])
def test_divergence_and_its_gradient_are_the_authors(count, golden):
    arrays = tensors(golden("deep_cotraining_jsd"))
    logits = arrays[f"logits_s{count}"].requires_grad_()
    p = logits.softmax(2)
    torch.testing.assert_close(p, arrays[f"probs_s{count}"])
    torch.testing.assert_close(entropy(p, dim=2), arrays[f"entropy_map_s{count}"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jsd(p), arrays[f"jsd_map_s{count}"], rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(jsd(p).mean(), logits)
    torch.testing.assert_close(gradient, arrays[f"grad_logits_s{count}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tag", "kind", "classes"),
    [
        ("kl1", "kl", ()),
        ("kl2", "kl", ()),
        ("kl_big", "kl", ()),
        ("l2", "l2", ()),
        ("l1", "l1", ()),
        ("fg", "kl", (1, 2, 3)),
    ],
)
def test_virtual_adversarial_images_are_the_authors(tag, kind, classes, golden):
    arrays = tensors(golden("deep_cotraining_vat"))
    xi, eps, steps = arrays[f"cfg_{tag}"].tolist()

    def network(x):
        return F.conv2d(x, arrays["weight"], arrays["bias"], padding=1)

    changed = vat(
        network, arrays["img"], arrays[f"d0_{tag}"], eps=eps, xi=xi, steps=int(steps), kind=kind, classes=classes
    )
    torch.testing.assert_close(changed, arrays[f"adv_{tag}"], rtol=1e-4, atol=1e-5)


def test_a_step_has_the_authors_terms_and_gradients(golden):
    arrays = tensors(golden("deep_cotraining_step"))
    method = tiny(cot_begin=-2, cot_end=-1, adv_begin=-2, adv_end=-1)
    method.networks = nn.ModuleList([Small(arrays, number) for number in range(2)])
    given = {
        "image": torch.stack([arrays["img1"], arrays["img2"]], 1).expand(-1, -1, 3, -1, -1),
        "mask": torch.stack([arrays["gt1"], arrays["gt2"]], 1)[:, :, 0].long(),
        "unlabelled": arrays["unl"].expand(-1, 3, -1, -1),
    }
    for number in range(2):
        x, y = arrays[f"img{number + 1}"], arrays[f"gt{number + 1}"][:, 0].long()
        torch.testing.assert_close(
            method.adversarial(number, x, y), arrays[f"img{number + 1}_adv"], rtol=1e-4, atol=1e-6
        )
        found = method.adversarial(number, arrays["unl"], None)
        torch.testing.assert_close(found, arrays[f"unl_adv{number + 1}"], rtol=1e-4, atol=1e-6)
    scalars = method.training_step(given)
    for name, expected in (
        ("supervised", arrays["sup"].sum()),
        ("jsd", arrays["jsd"]),
        ("adversarial", arrays["adv"]),
        ("loss", arrays["total"]),
    ):
        torch.testing.assert_close(scalars[name].detach(), expected.reshape(()), rtol=1e-4, atol=1e-6)
    for prefix, value in (("gradadv", scalars["adversarial"]), ("grad", scalars["loss"])):
        method.zero_grad()
        value.backward(retain_graph=True)
        for number, network in enumerate(method.networks):
            for name, parameter in network.named_parameters():
                torch.testing.assert_close(parameter.grad, arrays[f"{prefix}{number}.{name}"], rtol=1e-4, atol=1e-6)


class TestDivergence:
    def test_by_hand(self):
        """Two pixels: (1, 0) against (0, 1) is ln 2; (1/2, 1/2) against (1, 0): H(3/4, 1/4) - ln 2 / 2."""
        p = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [1.0, 0.0]]]).mT[:, None, :, None]
        mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
        torch.testing.assert_close(jsd(p)[0, 0], torch.tensor([math.log(2), mixed]))

    def test_is_symmetric_bounded_zero_for_equals_and_half_the_divergences_from_the_mean(self):
        p = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64).softmax(2)
        value = jsd(p)
        torch.testing.assert_close(jsd(p[[2, 0, 1]]), value)
        torch.testing.assert_close(jsd(torch.cat([p, p])), value)
        assert (value > 0).all()
        assert (value <= math.log(3)).all()
        torch.testing.assert_close(jsd(p[:1].expand(3, -1, -1, -1, -1)), torch.zeros_like(value))
        torch.testing.assert_close(jsd(p[:1]), torch.zeros_like(value))
        m = p[:2].mean(0)
        halves = sum((q * (q.log() - m.log())).sum(1) for q in p[:2]) / 2
        torch.testing.assert_close(jsd(p[:2]), halves, rtol=1e-7, atol=1e-9)

    def test_disjoint_certain_members_reach_the_logarithm_of_their_number(self):
        p = torch.eye(3)[:, None, :, None, None]
        torch.testing.assert_close(jsd(p), torch.full((1, 1, 1), math.log(3)))

    def test_gradient_is_the_closed_form(self):
        logits = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(jsd(logits.softmax(2), 0.0).sum(), logits)
        p = logits.detach().softmax(2)
        r = p.log() - p.mean(0).log()
        torch.testing.assert_close(gradient, p * (r - (p * r).sum(2, keepdim=True)) / 2)
        torch.testing.assert_close(gradient.sum(2), torch.zeros(2, 1, 3, 3, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda x: jsd(x.softmax(2)), logits)

    def test_saturated_members_have_finite_values_and_gradients(self):
        logits = (torch.eye(4)[[0, 1]] * 2e4 - 1e4)[:, None, :, None, None].clone().requires_grad_()
        value = jsd(logits.softmax(2)).sum()
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(math.log(2))
        assert gradient.isfinite().all()


class TestResistance:
    def test_gradient_is_the_difference_of_the_probabilities_and_reaches_one_side(self):
        target = torch.randn(2, 4, 3, 5, dtype=torch.float64).softmax(1).requires_grad_()
        logits = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        value = kl(target, logits)
        value.backward()
        assert value > 0
        assert target.grad is None
        torch.testing.assert_close(logits.grad, (logits.softmax(1) - target).detach() / 30, rtol=1e-5, atol=1e-8)
        assert kl(logits.softmax(1), logits).item() == pytest.approx(0, abs=1e-12)

    def test_is_finite_where_both_are_certain(self):
        logits = torch.tensor([[1e4, -1e4]]).view(1, 2, 1, 1).requires_grad_()
        kl(logits.detach().flip(1).softmax(1), logits).backward()
        assert logits.grad.isfinite().all()

    def test_gradient_reaches_the_network_that_resists_alone(self):
        method = tiny(craft="train")
        given = batch()
        x, y = method._input(given["image"][:, 0]), given["mask"][:, 0]
        changed = method.adversarial(0, x, y)
        kl(method.network_logits(0, x).softmax(1), method.network_logits(1, changed)).backward()
        assert all(p.grad is None for p in method.networks[0].parameters())
        assert any(p.grad.abs().sum() > 0 for p in method.networks[1].parameters())

    def test_twins_resist_examples_against_themselves(self):
        method = tiny(cot_begin=-1, cot_end=0, adv_begin=-1, adv_end=0, fgsm_eps=0.1)
        twin = Small()
        method.networks = nn.ModuleList([twin, twin])
        scalars = method.training_step(batch())
        assert scalars["jsd"].item() == pytest.approx(0, abs=1e-6)
        assert scalars["adversarial"] > 1e-6
        assert scalars["diversity"].item() == pytest.approx(0, abs=1e-7)


class TestFGSM:
    def test_linear_network_by_hand(self):
        """Logits (0, w x): with label 0 the gradient has the sign of w, so the pixel goes there until 1."""
        x = torch.tensor([[0.5, 0.99, 0.0, 0.3]]).view(1, 1, 1, 4)
        w = torch.tensor([2.0, 1.0, -1.0, 0.0])

        def network(images):
            return torch.cat([torch.zeros_like(images), images * w], 1)

        changed = fgsm(network, x, torch.zeros(1, 1, 4, dtype=torch.int64), eps=0.1)
        torch.testing.assert_close(changed.flatten(), torch.tensor([0.6, 1.0, 0.0, 0.3]))
        scaled = fgsm(
            network, x, torch.zeros(1, 1, 4, dtype=torch.int64), eps=0.1, class_weights=torch.tensor([7.0, 1])
        )
        assert torch.equal(scaled, changed)

    def test_raises_a_convex_loss_by_at_least_its_first_order(self):
        torch.manual_seed(0)
        conv = nn.Conv2d(1, 4, 3, padding=1).double().float()
        x, y = 0.4 + 0.2 * torch.rand(2, 1, 6, 5), torch.randint(0, 4, (2, 6, 5))
        probe = x.clone().requires_grad_()
        before = F.cross_entropy(conv(probe), y)
        (gradient,) = torch.autograd.grad(before, probe)
        changed = fgsm(conv, x, y, eps=0.03)
        torch.testing.assert_close((changed - x).abs(), torch.full_like(x, 0.03))
        assert F.cross_entropy(conv(changed), y) >= before + 0.03 * gradient.abs().sum() - 1e-6

    def test_without_labels_the_decision_stands_for_them(self):
        torch.manual_seed(0)
        network, x = Small(), torch.rand(2, 1, 6, 5)
        assert torch.equal(fgsm(network, x), fgsm(network, x, network(x).argmax(1)))

    def test_unknown_pixels_everywhere_leave_the_image(self):
        x = torch.rand(1, 1, 4, 4)
        assert torch.equal(fgsm(Small(), x, torch.full((1, 4, 4), 255)), x)


class TestVAT:
    def test_has_the_asked_length_for_every_image_alone(self):
        torch.manual_seed(0)
        network = Small()
        x, noise = 0.3 + 0.4 * torch.rand(3, 1, 7, 6), torch.randn(3, 1, 7, 6)
        r = vat(network, x, noise, eps=0.2) - x
        torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((3,), 0.2))
        for i in range(3):
            alone = vat(network, x[i : i + 1], noise[i : i + 1], eps=0.2)
            torch.testing.assert_close(alone, (x + r)[i : i + 1], rtol=1e-4, atol=1e-5)

    def test_small_probe_gives_the_hessians_direction_and_the_authors_is_lost_in_rounding(self):
        torch.manual_seed(0)
        size = 48
        network, x, noise = Small(), 0.2 + 0.6 * torch.rand(1, 1, size, size), torch.randn(1, 1, size, size)

        def direction(xi, dtype=torch.float32):
            net = Small().to(dtype)
            net.load_state_dict(network.state_dict())
            images = x.to(dtype)
            p = net(images).softmax(1).detach()
            d = unit(noise.to(dtype)).requires_grad_()
            q = net(images + xi * d).softmax(1)
            (gradient,) = torch.autograd.grad((p * (p.log() - q.log())).sum(), d)
            return unit(gradient.double().flatten()[None])[0]

        exact = direction(1e-4, torch.float64)

        def found(xi):
            return (vat(network, x, noise, eps=1e-2, xi=xi) - x).double().flatten()

        for xi in (1e-2, 0.1, 1.0):
            assert F.cosine_similarity(found(xi), exact, dim=0) > 0.99
        assert F.cosine_similarity(found(1e-6), exact, dim=0) < 0.3

    def test_a_network_that_does_not_look_leaves_the_image(self):
        x = torch.rand(2, 1, 4, 4)
        assert torch.equal(vat(lambda images: 0 * images.repeat(1, 2, 1, 1), x, eps=1.0), x)


def test_making_examples_leaves_network_gradients_and_images_as_they_are():
    method = tiny()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    x = torch.rand(2, 1, 16, 16)
    copy = x.clone()
    for adversary in ("fgsm", "vat"):
        object.__setattr__(method.config, "adversary", adversary)
        changed = method.adversarial(0, x, None)
        assert not changed.requires_grad
        assert not torch.equal(changed, x)
    assert torch.equal(x, copy)
    assert not x.requires_grad
    assert method.training
    assert all(module.training for module in method.modules())
    assert all(p.grad is None for p in method.parameters())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_mode_puts_every_module_back():
    network = tiny().networks[0]
    network.last.eval()
    before = [module.training for module in network.modules()]
    with mode(network, "eval"):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before
    with mode(network, "train"):
        assert [module.training for module in network.modules()] == before


def test_vat_of_the_default_length_is_as_long_as_fgsm():
    method = tiny(adversary="vat")
    x = 0.3 + 0.4 * torch.rand(1, 1, 16, 16)
    torch.manual_seed(3)
    r = method.adversarial(0, x, None) - x
    assert r.norm().item() == pytest.approx(0.03 * 16, rel=1e-4)


def test_ramp():
    assert ramp(19, 20, 50, 0.05) == 0
    assert ramp(20, 20, 50, 0.05) == pytest.approx(0.05 * math.exp(-5))
    assert ramp(35, 20, 50, 2.0) == pytest.approx(2 * math.exp(-1.25))
    assert ramp(50, 20, 50, 0.05) == ramp(1000, 20, 50, 0.05) == 0.05
    values = [ramp(e / 10, 20, 50, 1.0) for e in range(600)]
    assert values == sorted(values)
    assert ramp(49.999, 20, 50, 1.0) == pytest.approx(1)
    assert ramp(3, 3, 3, 1.0) == 1


def test_partition():
    cases = [f"p{i}" for i in range(11)]
    same = partition(cases, 3, 1.0, seed=0)
    assert all(sorted(part) == sorted(cases) for part in same)
    apart = partition(cases, 3, 0.0, seed=0)
    assert [len(part) for part in apart] == [3, 3, 3]
    assert len({case for part in apart for case in part}) == 9
    half = partition(cases, 2, 0.5, seed=1)  # round(5.5) = 6 common, 5 // 2 for each
    assert [len(part) for part in half] == [8, 8]
    assert len(set(half[0]) & set(half[1])) == 6
    assert partition(cases, 2, 0.5, seed=1) == half != partition(cases, 2, 0.5, seed=2)
    assert partition(["a"], 1, 0.0, seed=0) == [["a"]]
    with pytest.raises(ValueError, match=r"^partition: 1 cases are too few for 2 networks with overlap 0\.0"):
        partition(["a"], 2, 0.0, seed=0)
    with pytest.raises(ValueError, match=r"^partition: expected networks >= 1"):
        partition(["a"], 0, 0.0, seed=0)


def test_labelled_subsets_keep_patients_together():
    ids = [f"patient{p:03d}_{phase}_{i:02d}" for p in range(5) for phase in ("ed", "es") for i in range(3)]
    method = tiny(overlap=0.2)
    first, second = method.labelled_subsets(ids, seed=0)
    patients = [{ids[i][:10] for i in part} for part in (first, second)]
    assert [len(part) for part in patients] == [3, 3]
    assert len(patients[0] & patients[1]) == 1
    assert all(len(part) == 18 for part in (first, second))
    assert [len(part) for part in tiny(overlap=0.0).labelled_subsets(["x", "y", "z"], seed=0)] == [1, 1]
    with pytest.raises(FastcamError, match=r"1 labelled cases are too few for 2 networks with overlap 0\.0; raise"):
        tiny(overlap=0.0).labelled_subsets(ids[:6], seed=0)


def test_votes():
    p = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.0, 0.55, 0.45]])[:, None, :, None, None]
    torch.testing.assert_close(vote(p).flatten(), torch.tensor([1.3, 1.25, 0.45]) / 3)
    torch.testing.assert_close(vote(p, "hard").flatten(), torch.tensor([1.0, 2.0, 0.0]) / 3)
    assert torch.equal(vote(p, 1), p[1])
    torch.testing.assert_close(vote(p[[2, 1, 0]]), vote(p))
    torch.testing.assert_close(vote(p[[2, 1, 0]], "hard"), vote(p, "hard"))
    assert vote(p[:2], "hard").argmax(1).item() == 0  # a tie
    assert vote(p[:1], "hard").argmax(1) == vote(p[:1]).argmax(1)
    torch.testing.assert_close(diversity(p[:2]), torch.tensor((0.25 + 0.25 + 0) / 3))


def test_pairs_are_drawn_evenly():
    torch.manual_seed(0)
    pairs = [draw_pair(3) for _ in range(600)]
    assert {pair: abs(pairs.count(pair) - 200) < 60 for pair in pairs} == {(0, 1): True, (0, 2): True, (1, 2): True}
    assert draw_pair(2) == (0, 1)
    assert draw_pair(1) == (0, 0)


def test_logits_are_the_logarithm_of_the_vote():
    given = batch()["unlabelled"]
    for kind in ("soft", "hard", 1):
        method = tiny(vote=kind).eval()
        with torch.no_grad():
            logits = method.logits(given)
            assert logits.isfinite().all()
            torch.testing.assert_close(logits.softmax(1), vote(method.probabilities(given), kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["enet", "unet", "test_resnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_takes_any_size(backbone, channels):
    method = tiny(backbone=backbone, channels=channels, width=8).eval()
    with torch.no_grad():
        assert method.logits(torch.rand(1, 3, 41, 55)).shape == (1, C + 1, 41, 55)


def test_without_its_terms_it_is_as_many_trainings_of_their_own():
    method = tiny(cot_max=0.0, adv_max=0.0)
    assert not method.learns_from_unlabelled
    assert tiny(cot_max=0.0).learns_from_unlabelled
    given = batch()
    del given["unlabelled"]
    alone = [tiny(cot_max=0.0, adv_max=0.0).networks[i] for i in range(2)]
    theirs = [torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4) for network in alone]
    ours = [optimizer for optimizer, _ in method.optimizers(10)]
    for _ in range(3):
        for optimizer in ours:
            optimizer.zero_grad()
        method.training_step(given)["loss"].backward()
        for optimizer in ours:
            optimizer.step()
        for s, (network, optimizer) in enumerate(zip(alone, theirs, strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(network(given["image"][:, s, :1]), given["mask"][:, s]).backward()
            optimizer.step()
    for s, network in enumerate(alone):
        for mine, other in zip(method.networks[s].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)  # Adam's first steps are near a sign


def test_factors_and_rates_follow_the_authors_epochs():
    method = tiny()
    optimizer, schedule = method.optimizers(240)[1]  # two steps an epoch
    seen = []
    for _ in range(240):
        seen.append((*method.factors(), optimizer.param_groups[0]["lr"]))
        method.step += 1
        optimizer.step()
        schedule.step()
    assert seen[0][:2] == (pytest.approx(0.5 * math.exp(-5)), 0)
    assert seen[39][1] == 0 < seen[40][1]
    assert seen[100][:2] == (0.5, 0.05) == seen[239][:2]
    assert [round(seen[i][2], 9) for i in (0, 59, 60, 119, 120, 180, 239)] == [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-6, 1e-6]


@pytest.mark.parametrize("config", [{}, {"adversary": "vat"}, {"networks": 3}, {"networks": 1}, {"craft": "train"}])
def test_ten_steps_of_falling_loss(config):
    method = tiny(cot_end=1, adv_begin=0, adv_end=1, lr=1e-2, lr_every=200, **config)
    pairs = method.optimizers(12)
    given = batch(4, method.config.networks)
    losses = []
    for _ in range(10):
        scalars = method.training_step(given)
        for optimizer, _ in pairs:
            optimizer.zero_grad()
        scalars["loss"].backward()
        for optimizer, schedule in pairs:
            optimizer.step()
            schedule.step()
        losses.append(scalars["supervised"].item())
        assert all(value.isfinite() for value in scalars.values())
    assert losses[-1] < 0.8 * losses[0]
    assert scalars["adversarial"] > 0
    assert (scalars["jsd"] > 1e-7) == (method.config.networks > 1)


def test_resistance_alone_leaves_agreement_out():
    method = tiny(cot_max=0.0, adv_begin=-1, adv_end=0)
    scalars = method.training_step(batch())
    assert scalars["jsd"] == 0
    assert scalars["diversity"] > 0
    torch.testing.assert_close(scalars["loss"], scalars["supervised"] + 0.05 * scalars["adversarial"])
    scalars["adversarial"].backward()
    assert all(any(p.grad.abs().sum() > 0 for p in network.parameters()) for network in method.networks)


def test_one_labelled_image_for_all_networks_and_masks_without_any_label():
    method = tiny(cot_begin=-1, cot_end=0, adv_begin=-1, adv_end=0)
    given = batch(1, size=32)
    shared = {"image": given["image"][:, 0], "mask": given["mask"][:, 0], "unlabelled": given["unlabelled"]}
    stacked = {**shared, "image": given["image"][:, [0, 0]], "mask": given["mask"][:, [0, 0]]}
    method.eval()  # the running statistics stay
    torch.testing.assert_close(method.training_step(shared)["loss"], method.training_step(stacked)["loss"])
    scalars = method.train().training_step({**given, "mask": torch.full_like(given["mask"], 255)})
    assert scalars["supervised"] == 0
    scalars["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_saved_weights_make_the_same_method_whose_vote_may_change(tmp_path):
    method = tiny(shrink=(0.5, 0.9)).eval()
    about = {"method": "cotraining", "num_classes": C, "classes": ["a", "b", "c"], "backbone": "unet"}
    config = {**vars(method.config)}
    save_weights(tmp_path / "w.safetensors", method.export_state_dict(), {**about, "config": config})
    again = load_method(tmp_path / "w.safetensors")
    images = batch()["unlabelled"]
    with torch.no_grad():
        assert torch.equal(again.logits(images), method.logits(images))
        second = load_method(tmp_path / "w.safetensors", vote=1)
        torch.testing.assert_close(second.logits(images).softmax(1), method.probabilities(images)[1])
    with pytest.raises(FastcamError, match="vote is 2, expected soft, hard, or the number of a network, 0 to 1"):
        load_method(tmp_path / "w.safetensors", vote=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"networks": 0}, "networks is 0, expected at least 1"),
        ({"channels": 2}, r"channels is 2, expected 1 \(grey\) or 3"),
        ({"width": 0}, "width is 0"),
        ({"overlap": 1.5}, "overlap is 1.5, expected 0 to 1"),
        ({"case": "("}, r"case '\(' is no regular expression"),
        ({"class_weights": (1.0,)}, "class_weights has 1 numbers, expected 4"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr_every": 0}, "lr_every is 0"),
        ({"cot_end": -1.0}, "cot_end is -1.0, expected cot_begin, 0.0, or more"),
        ({"adv_max": -1.0}, "adv_max is -1.0"),
        ({"fgsm_eps": math.nan}, "fgsm_eps is nan"),
        ({"adversary": "pgd"}, "adversary is 'pgd', expected fgsm or vat"),
        ({"vat_eps": -1.0}, "vat_eps is -1.0"),
        ({"vat_xi": 0.0}, "vat_xi is 0.0"),
        ({"vat_steps": 0}, "vat_steps is 0"),
        ({"vat_distance": "js"}, "vat_distance is 'js'"),
        ({"vat_classes": (4,)}, r"vat_classes is \(4,\), expected labels 0 to 3"),
        ({"craft": "no"}, "craft is 'no'"),
        ({"vote": "both"}, "vote is 'both'"),
        ({"shrink": (0.9, 0.5)}, r"shrink is \(0.9, 0.5\)"),
        ({"backbone": "resnet_99"}, "backbone 'resnet_99': timm has no such network"),
    ],
)
def test_bad_settings_are_refused_by_name(config, message):
    with pytest.raises(FastcamError, match=message):
        create_method("cotraining", num_classes=C, **config)


def test_weights_are_for_timm_networks(tmp_path):
    with pytest.raises(FastcamError, match="cotraining: enet takes no weights"):
        create_method("cotraining", num_classes=C, weights=tmp_path / "w.safetensors")


def test_defaults_are_the_published_run():
    config = create_method("cotraining", num_classes=C).config
    assert isinstance(create_method("cotraining", num_classes=C, **TINY), CoTraining)
    assert (config.cot_max, config.adv_max, config.fgsm_eps, config.lr, config.epochs) == (0.5, 0.05, 0.03, 1e-3, 120)
