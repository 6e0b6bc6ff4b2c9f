"""CycleGAN-semi: the authors' training iteration, the flow of gradients, the baseline within it, exact resuming."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import load_weights, save_weights
from fastcam.methods import create_method, cyclegan, load_method
from fastcam.metrics import iou

C = 3
TINY = {"width": 4, "blocks": 1, "discriminator_width": 4}
ALONE = dict.fromkeys(cyclegan.FACTORS, 0.0)  # the baseline


def tiny(num_classes=C, **config):
    torch.manual_seed(0)
    return create_method("cyclegan", num_classes=num_classes, **{**TINY, **config})


def batch(count=4, size=16, labels=C + 1):
    """Images that are as bright as their labels, and as many others of the same kind."""
    g = torch.Generator().manual_seed(1)
    masks = torch.randint(0, labels, (2 * count, 4, 4), generator=g)
    masks = masks.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    noise = 0.2 * torch.rand(2 * count, 3, size, size, generator=g)
    images = (1.6 * masks[:, None] / C - 0.9 + noise).clamp(-1, 1)
    return {"image": images[:count], "mask": masks[:count], "unlabelled": images[count:]}


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def step(method, data, steps=1):
    """Training steps as the trainer makes them; the losses of the last one."""
    pairs = method.optimizers(100)
    for _ in range(steps):
        last = []
        for index, scalars in method.training_phases(data):
            optimizer, _ = pairs[index]
            optimizer.zero_grad()
            scalars["loss"].backward()
            optimizer.step()
            last.append({name: value.item() for name, value in scalars.items()})
    return last


class TestStepOfTheAuthors:
    """Golden arrays of one iteration with stand-in generators."""

    @pytest.fixture
    def arrays(self, golden):
        return {name: torch.from_numpy(array) for name, array in golden("cyclegan_semi_step_paper").items()}

    @pytest.fixture
    def method(self, arrays):
        method = tiny(label_input="argmax_index")

        def stand_in(name, into, out):
            layers = nn.Sequential(nn.Conv2d(into, 6, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(6, out, 3, padding=1))
            state = {f"{i}.{p}": arrays[f"{name}.{c}.{p}"] for i, c in ((0, "a"), (2, "b")) for p in ("weight", "bias")}
            layers.load_state_dict(state)
            return layers

        method.image_to_label = stand_in("Gsi", 3, 4)
        method.label_to_image = nn.Sequential(*stand_in("Gis", 4, 3), nn.Tanh())
        for network, name in ((method.image_discriminator, "Di"), (method.label_discriminator, "Ds")):
            prefix = f"{name}.dis_model."
            network.load_state_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
        return method

    @pytest.fixture
    def data(self, arrays):
        return {"image": arrays["l_img"], "mask": arrays["l_gt"][:, 0], "unlabelled": arrays["u_img"]}

    def test_losses_and_gradients_of_both_phases(self, arrays, method, data):
        phases = method.training_phases(data)
        index, scalars = next(phases)
        names = {"lab_loss_CE": "label", "lab_loss_MSE": "pair", "img_gen_loss": "adversarial_image"}
        names |= {"gt_gen_loss": "adversarial_label", "img_cycle_loss": "cycle_image", "gt_cycle_loss": "cycle_label"}
        assert index == 0
        for theirs, ours in names.items():
            torch.testing.assert_close(scalars[f"loss_{ours}"], arrays[f"loss.{theirs}"], rtol=1e-4, atol=1e-6)
        scalars["loss"].backward()
        for name, network in (("Gsi", method.image_to_label), ("Gis", method.label_to_image)):
            expected = {
                k.replace("a.", "0.").replace("b.", "2."): v for k, v in self.under(arrays, f"grad_gen.{name}.")
            }
            torch.testing.assert_close(grads(network), expected, rtol=1e-4, atol=1e-6)
        for network in (method.image_discriminator, method.label_discriminator):
            assert not grads(network)
        generators = [*method.image_to_label.parameters(), *method.label_to_image.parameters()]
        for parameter in generators:
            parameter.grad = None
        index, scalars = next(phases)
        assert index == 1
        torch.testing.assert_close(scalars["loss_image_discriminator"], arrays["loss.img_dis_loss"])
        torch.testing.assert_close(scalars["loss_label_discriminator"], arrays["loss.gt_dis_loss"])
        scalars["loss"].backward()
        for name, network in (("Di", method.image_discriminator), ("Ds", method.label_discriminator)):
            expected = dict(self.under(arrays, f"grad_dis.{name}.dis_model."))
            torch.testing.assert_close(grads(network), expected, rtol=1e-4, atol=1e-6)
        assert all(parameter.grad is None for parameter in generators)
        assert next(phases, None) is None

    @staticmethod
    def under(arrays, prefix):
        return [(name.removeprefix(prefix), value) for name, value in arrays.items() if name.startswith(prefix)]


class TestFormulas:
    def test_discriminator_input_by_hand(self):
        p = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]).T[None, :, None]  # one row of two pixels
        assert cyclegan.discriminator_input(p, "softmax") is p
        assert cyclegan.discriminator_input(p, "argmax_index").tolist() == [[[[1, 0]]]]
        assert cyclegan.discriminator_input(p, "argmax_onehot").tolist() == [[[[0, 1]], [[1, 0]], [[0, 0]]]]

    def test_one_hot_turns_back_into_its_labels_and_makes_void_background(self):
        mask = torch.tensor([[[0, 2, 255], [1, 3, 3]]])
        assert cyclegan.one_hot(mask, 4).argmax(1).tolist() == [[[0, 2, 0], [1, 3, 3]]]
        assert (cyclegan.one_hot(mask, 4).sum(1) == 1).all()

    def test_pair_and_cycle_losses_by_hand(self):
        fake, image = torch.zeros(1, 3, 1, 2), torch.tensor([0.5, -1.0]).expand(1, 3, 1, 2)
        known = torch.tensor([[[True, False]]])
        assert cyclegan.pair_loss(fake, image) == (0.25 + 1) / 2
        assert cyclegan.pair_loss(fake, image, "l1") == 0.75
        assert cyclegan.pair_loss(fake, image, "mse", known) == 0.25
        assert cyclegan.pair_loss(fake, image, "mse", known & ~known) == 0
        assert cyclegan.image_cycle_loss(fake, image) == 0.75

    def test_learning_rate_of_the_papers_400_epochs(self):
        factors = {e: cyclegan.learning_rate_factor(e, 400) for e in (0, 100, 250, 399, 400)}
        assert factors == pytest.approx({0: 1, 100: 1, 250: 0.5, 399: 1 / 300, 400: 0})

    def test_official_scores_by_hand(self):
        confusion = torch.tensor([[5, 3, 1], [2, 4, 1], [0, 1, 6]])  # rows true
        assert cyclegan.official_iou(confusion, "voc").tolist() == pytest.approx([4 / (4 + 1 + 1), 6 / (6 + 1 + 1)])
        assert cyclegan.official_iou(confusion, "cityscapes").tolist() == pytest.approx([5 / 10, 4 / 9])
        torch.testing.assert_close(cyclegan.official_iou(confusion, "acdc"), iou(confusion))
        with pytest.raises(ValueError, match="official_iou: expected dataset voc, cityscapes or acdc, got 'coco'"):
            cyclegan.official_iou(confusion, "coco")

    def test_official_scores_are_never_below_the_usual_ones(self):
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            confusion = torch.randint(1, 50, (5, 5), generator=g)
            assert (cyclegan.official_iou(confusion, "voc") >= iou(confusion)[1:]).all()
            assert (cyclegan.official_iou(confusion, "cityscapes") >= iou(confusion)[:-1]).all()


class TestGradients:
    @pytest.mark.parametrize(
        ("term", "to_label", "to_image"),
        [
            ("pair", False, True),
            ("adversarial_image", False, True),
            ("adversarial_label", True, False),
            ("cycle_image", True, True),
            ("cycle_label", True, True),
        ],
    )
    def test_every_term_reaches_the_generators_it_is_made_by(self, term, to_label, to_image):
        method = tiny(**{**ALONE, term: 1.0})
        _, scalars = next(method.training_phases(batch()))
        scalars[f"loss_{term}"].backward()
        assert bool(grads(method.image_to_label)) == to_label
        assert bool(grads(method.label_to_image)) == to_image
        assert set(scalars) == {"loss", "loss_label", f"loss_{term}"}

    @pytest.mark.parametrize("how", cyclegan.LABEL_INPUTS)
    def test_only_probabilities_carry_the_label_discriminators_opinion(self, how):
        method = tiny(label_input=how)
        _, scalars = next(method.training_phases(batch()))
        term = scalars["loss_adversarial_label"]
        assert term.requires_grad == (how == "softmax")
        if how == "softmax":
            term.backward()
            assert method.image_to_label.layers[-1].weight.grad.abs().max() > 0

    def test_pair_loss_alone_leaves_the_segmentation_network_to_the_baseline(self):
        """All that is not its own cross-entropy: no term may change its step."""
        methods = [tiny(**{**ALONE, **factors}, dropout=0.0) for factors in ({}, {"pair": 1.0})]
        before = [p.clone() for p in methods[0].image_to_label.parameters()]
        for method in methods:
            step(method, batch(), steps=3)
        first, second = (list(method.image_to_label.parameters()) for method in methods)
        for old, a, b in zip(before, first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert not torch.equal(old, a)


class TestBaseline:
    def test_is_adam_on_the_cross_entropy_of_labelled_images(self):
        method, data = tiny(**ALONE, dropout=0.0, betas=(0.9, 0.999)), batch()
        assert not method.learns_from_unlabelled
        plain = cyclegan.ResnetGenerator(3, C + 1, width=4, blocks=1, dropout=0.0)
        plain.load_state_dict(method.image_to_label.state_dict())
        optimizer = torch.optim.Adam(plain.parameters(), lr=2e-4)
        del data["unlabelled"]
        step(method, data, steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(plain(data["image"]), data["mask"]).backward()
            optimizer.step()
        torch.testing.assert_close(list(method.image_to_label.parameters()), list(plain.parameters()))

    def test_leaves_the_other_networks_alone(self):
        method = tiny(**ALONE)
        others = method.label_to_image, method.image_discriminator, method.label_discriminator
        before = [p.clone() for network in others for p in network.parameters()]
        step(method, batch())
        after = [p for network in others for p in network.parameters()]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def test_missing_unlabelled_images_are_named(self):
        data = batch()
        del data["unlabelled"]
        with pytest.raises(FastcamError, match="cyclegan: a batch has no unlabelled images; give some, or set all"):
            next(tiny().training_phases(data))


@pytest.mark.parametrize("discriminator", ["pixel", "patch", "strided"])
def test_losses_fall_over_ten_steps_on_four_images(discriminator):
    method, data = tiny(discriminator=discriminator, lr=0.005, dropout=0.0), batch(size=32)
    first = step(method, data)
    last = step(method, data, steps=10)
    for name in ("loss", "loss_label", "loss_pair", "loss_cycle_image"):
        assert last[0][name] < 0.9 * first[0][name], name
    assert last[1]["loss_image_discriminator"] < first[1]["loss_image_discriminator"]


@pytest.mark.parametrize("label_input", cyclegan.LABEL_INPUTS)
def test_one_image_and_one_class_can_be_trained(label_input):
    method = tiny(num_classes=1, label_input=label_input)
    last = step(method, batch(count=1, labels=2), steps=2)
    assert all(torch.tensor(list(scalars.values())).isfinite().all() for scalars in last)


def test_numbers_of_labelled_and_unlabelled_images_may_differ():
    data = batch()
    data["unlabelled"] = data["unlabelled"][:1]
    assert len(step(tiny(), data)) == 2


class Knows(nn.Module):
    """Gives one answer for every so many images."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.asked = []

    def forward(self, x):
        self.asked.append(x)
        return self.answer.repeat(len(x) // len(self.answer), 1, 1, 1)


def test_perfect_generators_have_no_cycle_loss():
    method, data = tiny(), batch()
    labels = cyclegan.one_hot(data["mask"], C + 1)
    method.image_to_label, method.label_to_image = Knows(1e4 * labels), Knows(data["image"])
    _, scalars = next(method.training_phases({**data, "unlabelled": data["image"]}))
    assert scalars["loss_cycle_label"] == 0
    assert scalars["loss_cycle_image"] == 0
    assert torch.equal(method.label_to_image.asked[0], labels.repeat(2, 1, 1, 1))  # true ones, and what was predicted


@pytest.mark.parametrize("as_background", [True, False])
def test_void_counts_as_background_or_not_at_all(as_background):
    method, data = tiny(void_is_background=as_background, dropout=0.0), batch()
    void = torch.zeros_like(data["mask"], dtype=torch.bool)
    void[:, :8] = True
    _, scalars = next(method.training_phases({**data, "mask": data["mask"].masked_fill(void, 255)}))
    filled = data["mask"].masked_fill(void, 0)
    losses = F.cross_entropy(method.logits(data["image"]), filled, reduction="none")
    difference = (method.images(cyclegan.one_hot(filled, C + 1)) - data["image"]).square().mean(1)
    counts = torch.ones_like(void) if as_background else ~void
    torch.testing.assert_close(scalars["loss_label"], losses[counts].mean())
    torch.testing.assert_close(scalars["loss_pair"], difference[counts].mean())


def test_masks_without_any_label_give_a_finite_step():
    data = batch()
    data["mask"].fill_(255)
    first, second = step(tiny(void_is_background=False), data)
    assert first["loss_label"] == first["loss_pair"] == first["loss_cycle_label"] == 0
    assert torch.tensor([*first.values(), *second.values()]).isfinite().all()


def test_logits_have_the_size_of_the_image_and_stay_float32_under_autocast():
    method = tiny().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = method.logits(torch.randn(2, 3, 33, 46))
    assert logits.shape == (2, C + 1, 33, 46)
    assert logits.dtype == torch.float32


def test_images_are_segmented_at_the_size_of_the_training():
    method = tiny(inference_size=16).eval()
    x = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        small = method.image_to_label(F.interpolate(x, (16, 16), mode="bilinear", antialias=True))
        expected = F.interpolate(small, (40, 24), mode="bilinear")
        torch.testing.assert_close(method.logits(x), expected)
        square = torch.randn(1, 3, 16, 16)
        torch.testing.assert_close(method.logits(square), method.image_to_label(square))


def test_images_of_labels_lie_in_the_range_of_normalised_images():
    method = tiny().eval()
    with torch.no_grad():
        image = method.images(cyclegan.one_hot(batch()["mask"], C + 1))
    assert image.shape == (4, 3, 16, 16)
    assert image.abs().max() < 1
    assert [(white - mean) / std for white, mean, std in zip((1, 1, 1), *method.normalize, strict=True)] == [1, 1, 1]


def test_optimisers_hold_all_parameters_once_and_follow_the_papers_schedule():
    method = tiny()
    pairs = method.optimizers(400)
    held = [id(p) for optimizer, _ in pairs for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in method.parameters())
    for optimizer, schedule in pairs:
        assert optimizer.defaults["betas"] == (0.5, 0.999)
        rates = []
        for _ in range(400):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert [rates[e] for e in (0, 100, 250, 399)] == pytest.approx([2e-4, 2e-4, 1e-4, 2e-4 / 300])


def test_saved_generators_load_into_the_same_network(tmp_path):
    method = tiny().eval()
    step(method, batch())
    record = {"method": "cyclegan", "num_classes": C, "backbone": None, "config": dataclasses.asdict(method.config)}
    save_weights(tmp_path / "w.safetensors", method.export_state_dict(), record)
    loaded = load_method(tmp_path / "w.safetensors")
    assert loaded.config == method.config
    with torch.no_grad():
        for name, x in (("logits", batch()["image"]), ("images", cyclegan.one_hot(batch()["mask"], C + 1))):
            assert torch.equal(getattr(loaded, name)(x), getattr(method, name)(x))
    assert not [name for name in load_weights(tmp_path / "w.safetensors")[0] if "discriminator" in name]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_training_resumes_with_its_pools_to_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    from fastcam.pipelines import _fit
    from fastcam.pipelines._settings import TrainerConfig

    data = batch(count=8)
    items = [{name: value[i] for name, value in data.items()} for i in range(8)]
    trainer = TrainerConfig(epochs=4, batch_size=2, workers=0, log_every=1, checkpoint_every=1, accelerator="cpu")

    def train(out):
        return _fit.fit(tiny(pool_size=2, lr=0.01), items, ("a", "b", "c"), trainer, out, {})

    def entries(out):
        state = torch.load(out / "last.ckpt", weights_only=True)["method"]
        return {pool: state[f"{pool}_pool._extra_state"]["entries"] for pool in ("image", "label")}

    whole = load_weights(train(tmp_path / "whole"))[0]
    original = _fit.StepModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == 9:
            raise Killed
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(_fit.StepModule, "training_step", training_step)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    assert entries(tmp_path / "killed")
    resumed = load_weights(train(tmp_path / "killed"))[0]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for pool, kept in entries(tmp_path / "whole").items():
        assert len(kept) == 2
        assert all(torch.equal(a, b) for a, b in zip(kept, entries(tmp_path / "killed")[pool], strict=True)), pool


def test_segment_pass_trains_it_on_unlabelled_images_too_and_predicts_with_it(tmp_path):
    pytest.importorskip("lightning")
    from fastcam.data import write_procedural
    from fastcam.io import read_label_png
    from fastcam.pipelines._data import Data
    from fastcam.pipelines._settings import TrainerConfig
    from fastcam.pipelines.segment import segment

    root, out = tmp_path / "voc", tmp_path / "net"
    write_procedural(root, train=4, val=2, size=32)
    data, others = (Data(root=str(root), split=split, tags="image_labels.csv") for split in ("train", "val"))
    method = {"name": "cyclegan", **TINY}
    size = {"crop": 32, "resize_long": (32, 32), "square": True, "flip": False}
    trainer = TrainerConfig(epochs=2, batch_size=2, workers=0, accelerator="cpu", **size)
    labels = root / "SegmentationClass"
    weights = segment(data, out, labels=labels, unlabelled=others, method=method, trainer=trainer)
    segment(others, tmp_path / "masks", predict=weights, device="cpu", workers=0)
    masks = [read_label_png(path) for path in sorted((tmp_path / "masks").glob("*.png"))]
    assert [mask.shape for mask in masks] == [(32, 32)] * 2
    with pytest.raises(FastcamError, match="method cyclegan does not learn from unlabelled images; leave them out"):
        segment(data, tmp_path / "b", labels=labels, unlabelled=others, method={**method, **ALONE}, trainer=trainer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"discriminator": "patches"}, "cyclegan: discriminator is 'patches', expected pixel, patch, strided"),
        ({"label_input": "argmax"}, "cyclegan: label_input is 'argmax', expected softmax, argmax_onehot, argmax_index"),
        ({"pair_loss": "l2"}, "cyclegan: pair_loss is 'l2', expected mse, l1"),
        ({"width": 0}, "cyclegan: width is 0, expected at least 1"),
        ({"blocks": -1}, "cyclegan: blocks is -1, expected at least 0"),
        ({"pool_size": -1}, "cyclegan: pool_size is -1, expected at least 0"),
        ({"inference_size": 0}, "cyclegan: inference_size is 0, expected at least 1, or null"),
        ({"cycle_label": -0.1}, "cyclegan: cycle_label is -0.1, expected at least 0"),
        ({"pair": float("nan")}, "cyclegan: pair is nan, expected at least 0"),
        ({"dropout": 1.0}, "cyclegan: dropout is 1.0, expected at least 0 and below 1"),
        ({"constant": 1.0}, "cyclegan: constant is 1.0, expected at least 0 and below 1"),
        ({"weights": "w.safetensors"}, "cyclegan: has no backbone to load w.safetensors into; leave weights out"),
        ({"backbone": "resnet50"}, "method 'cyclegan': unknown setting 'backbone'; known: width"),
        ({"cycle_lable": 1.0}, "unknown setting 'cycle_lable', did you mean 'cycle_label'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(FastcamError, match=message):
        tiny(**config)
