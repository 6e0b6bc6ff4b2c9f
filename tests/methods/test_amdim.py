"""AMDIM: the contrast of places against the authors' arrays and a dense computation; the encoder; the recipe."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcam.data.transforms import IMAGENET_MEAN, twin_transform
from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import amdim, create_method, load_method
from fastcam.methods.amdim import (
    Encoder,
    EncoderConfig,
    Maps,
    ResidualUnit,
    RKHSHead,
    amdim_losses,
    classifier_loss,
    multilocation_nce,
)

TINY = {"size": 32, "width": 4, "rkhs": 40, "depth": 2, "warmup": 0}


def tiny(**config):
    torch.manual_seed(0)
    return create_method("amdim", num_classes=3, **{**TINY, **config})


def views(count=4):
    torch.manual_seed(1)
    images = torch.randn(count, 3, 32, 32)
    return {"image": images + 0.1 * torch.randn_like(images), "second": images + 0.1 * torch.randn_like(images)}


def dense_nce(source, target, clip):
    """The loss by its definition, all scores at once."""
    raw = torch.einsum("ir,jryx->ijyx", source, target).flatten(2) / source.shape[1] ** 0.5
    scores = clip * torch.tanh(raw / clip)
    total = 0
    for i in range(len(source)):
        others = torch.cat([scores[i, j] for j in range(len(target)) if j != i] or [scores.new_zeros(0)])
        for p in scores[i, i]:
            total = total - (p - torch.log(p.exp() + others.exp().sum()))
    return total / scores[:, 0].numel(), raw.square().mean()


class TestNCE:
    def test_is_the_authors(self, golden):
        arrays = {name: torch.from_numpy(array) for name, array in golden("ssl_few_shot_multi_nce").items()}
        maps = [Maps(*(arrays[f"r{s}_x{v}"].clone().requires_grad_() for s in (1, 5, 7))) for v in (1, 2)]
        places = (arrays["src_idx_r5_x1"], arrays["src_idx_r5_x2"])
        losses = amdim_losses(*maps, places)
        for ours, theirs in (("loss", "loss_inf"), ("loss_reg", "lgt_reg")):
            torch.testing.assert_close(losses[ours], arrays[theirs], rtol=1e-5, atol=1e-6)
        for name in ("loss_1t5", "loss_1t7", "loss_5t5"):
            torch.testing.assert_close(losses[name], arrays[name], rtol=1e-5, atol=1e-6)
        losses["loss"].backward()
        for v, of_view in enumerate(maps, 1):
            for s, x in zip((1, 5, 7), of_view, strict=True):
                torch.testing.assert_close(x.grad, arrays[f"grad.r{s}_x{v}"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("block", [1, 40, 10**6])
    @pytest.mark.parametrize("clip", [0.5, 20.0, 200.0])
    def test_and_its_gradient_are_those_of_all_scores_at_once(self, block, clip):
        torch.manual_seed(0)
        inputs = [torch.randn(5, 6).double() * 4, torch.randn(5, 6, 2, 3).double() * 4]
        ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        results = multilocation_nce(*ours, clip=clip, block=block), dense_nce(*theirs, clip)
        torch.testing.assert_close(*results)
        for loss, square in results:
            (1.5 * loss + 0.3 * square).backward()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad)

    def test_gradcheck(self):
        torch.manual_seed(0)
        inputs = [torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4, 1, 2).double().requires_grad_()]
        assert torch.autograd.gradcheck(lambda f, g: multilocation_nce(f, g, clip=2.0, block=7), inputs)

    def test_no_tensor_is_larger_than_a_block_or_the_features(self):
        largest = 0

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                result = function(*args, **(kwargs or {}))
                for x in result if isinstance(result, tuple | list) else [result]:
                    largest = max(largest, x.untyped_storage().size() // 4 if isinstance(x, torch.Tensor) else 0)
                return result

        images, channels, side = 60, 8, 7
        source = torch.randn(images, channels, requires_grad=True)
        target = torch.randn(images, channels, side, side, requires_grad=True)
        with Sizes():
            sum(multilocation_nce(source, target, block=4 * images * side**2)).backward()
        assert largest == target.numel()  # 23,520; a block has 11,760 and all scores would have 176,400
        assert source.grad.abs().sum() > 0

    def test_what_is_kept_for_the_gradient_is_the_features_and_a_few_numbers_a_row(self):
        kept = {}

        def keep(x):
            kept[x.data_ptr()] = x.numel()
            return x

        source, target = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4, 5, 5, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            multilocation_nce(source, target)
        assert sum(kept.values()) <= source.numel() + target.numel() + 30 * 26

    def test_equal_scores_give_the_logarithm_of_their_number(self):
        for count in (2, 3, 7):
            loss, square = multilocation_nce(torch.zeros(count, 4), torch.randn(count, 4, 3, 2))
            assert loss.item() == pytest.approx(math.log(1 + (count - 1) * 6), rel=1e-6)
            assert square == 0

    def test_lies_between_zero_and_its_bound(self):
        torch.manual_seed(0)
        source, target = 1000 * torch.randn(6, 8), 1000 * torch.randn(6, 8, 2, 2)
        loss, _ = multilocation_nce(source, target, clip=3.0)
        assert 0 <= loss <= math.log(1 + 5 * 4 * math.exp(6.0)) + 1e-4

    def test_vanishes_where_the_positives_dominate(self):
        source = 100 * torch.eye(4)
        loss, _ = multilocation_nce(source, source[:, :, None, None].expand(-1, -1, 2, 2))
        assert 0 <= loss < 1e-6

    def test_one_image_has_no_negatives_so_loss_zero_and_a_finite_gradient(self):
        source, target = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, 5, 5, requires_grad=True)
        loss, square = multilocation_nce(source, target)
        (loss + square).backward()
        assert loss == 0
        expected = 2 * torch.einsum("ir,iryx,isyx->is", source, target, target) / 100
        torch.testing.assert_close(source.grad, expected.detach())

    def test_order_of_images_and_of_places_makes_no_difference(self):
        torch.manual_seed(0)
        source, target = torch.randn(6, 4), torch.randn(6, 4, 5, 5)
        order, places = torch.randperm(6), torch.randperm(25)
        moved = target[order].flatten(2)[:, :, places].unflatten(2, (5, 5))
        for x, y in zip(multilocation_nce(source[order], moved), multilocation_nce(source, target), strict=True):
            torch.testing.assert_close(x, y)

    def test_other_places_of_the_same_image_are_no_negatives(self):
        torch.manual_seed(0)
        source, target = torch.randn(2, 4).double(), torch.randn(2, 4, 1, 2).double()
        scores = 20 * torch.tanh(torch.einsum("ir,jrl->ijl", source, target.flatten(2)) / 2 / 20)
        rows = [torch.log(1 + (scores[i, 1 - i].exp().sum() / scores[i, i].exp())) for i in (0, 1)]
        torch.testing.assert_close(multilocation_nce(source, target)[0], torch.stack(rows).mean())

    def test_sources_of_a_process_know_their_place_among_the_images_of_all(self):
        torch.manual_seed(0)
        source, target = torch.randn(6, 4), torch.randn(6, 4, 2, 2)
        parts = [multilocation_nce(source[i : i + 2], target, offset=i, block=20) for i in (0, 2, 4)]
        for whole, part in zip(multilocation_nce(source, target), zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.stack(part).mean(), whole)

    def test_is_float32_under_autocast(self):
        torch.manual_seed(0)
        source, target = torch.randn(4, 64), torch.randn(4, 64, 3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = multilocation_nce(source, target)
            rounded, _ = multilocation_nce(source.bfloat16(), target.bfloat16())
        assert torch.equal(loss, multilocation_nce(source, target)[0])
        assert rounded.dtype == torch.float32

    @pytest.mark.parametrize(
        ("source", "target", "options", "message"),
        [
            ((2, 3), (2, 3, 4), {}, r"expected source \(n, r\), target \(B, r, h, w\), got \(2, 3\), \(2, 3, 4\)"),
            ((2, 3), (2, 4, 1, 1), {}, "expected source"),
            ((0, 3), (0, 3, 1, 1), {}, "1 or more images"),
            ((2, 3), (2, 3, 0, 1), {}, "1 or more images"),
            ((2, 3), (3, 3, 1, 1), {"offset": 2}, "sources are 2 to 4, got 3 targets"),
            ((2, 3), (2, 3, 1, 1), {"clip": 0.0}, "clip above 0"),
        ],
    )
    def test_refuses(self, source, target, options, message):
        with pytest.raises(ValueError, match=f"multilocation_nce: .*{message}"):
            multilocation_nce(torch.zeros(source), torch.zeros(target), **options)

    def test_refuses_integers_and_mixed_dtypes(self):
        for dtypes in ((torch.int64, torch.int64), (torch.float32, torch.float64)):
            with pytest.raises(TypeError, match="multilocation_nce: expected floats of one dtype"):
                multilocation_nce(torch.zeros(2, 3, dtype=dtypes[0]), torch.zeros(2, 3, 1, 1, dtype=dtypes[1]))


class TestObjective:
    def maps(self, count=3):
        return Maps(torch.randn(count, 8, 1, 1), torch.randn(count, 8, 5, 5), torch.randn(count, 8, 7, 7))

    def test_exchanging_the_views_makes_no_difference(self):
        torch.manual_seed(0)
        first, second, places = self.maps(), self.maps(), torch.randint(25, (2, 3))
        ours = amdim_losses(first, second, (places[0], places[1]))
        theirs = amdim_losses(second, first, (places[1], places[0]))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])

    def test_places_matter_for_five_to_five_and_its_scores_alone(self):
        torch.manual_seed(0)
        first, second = self.maps(), self.maps()
        some, other = (amdim_losses(first, second, (p, p)) for p in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])))
        assert some["loss_1t5"] == other["loss_1t5"] and some["loss_1t7"] == other["loss_1t7"]
        assert some["loss_5t5"] != other["loss_5t5"]

    def test_penalty_is_half_of_the_weighted_mean_squares_of_the_raw_scores(self):
        first = Maps(torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 7, 7))
        second = Maps(torch.zeros(2, 4, 1, 1), torch.ones(2, 4, 5, 5), torch.zeros(2, 4, 7, 7))
        # one of six pairs has scores: 1 x 1 summed over 4 channels, divided by 2
        losses = amdim_losses(first, second, (torch.zeros(2).long(),) * 2, clip=0.1, penalty=0.3)
        assert losses["loss_reg"].item() == pytest.approx(0.5 * 0.3 * 4)

    def test_processes_share_their_negatives(self, tmp_path):
        torch.manual_seed(0)
        torch.save([self.maps(4), self.maps(4)], tmp_path / "maps.pt")
        torch.multiprocessing.start_processes(run_process, (str(tmp_path),), nprocs=2, start_method="fork")
        maps = [Maps(*(x.requires_grad_() for x in m)) for m in torch.load(tmp_path / "maps.pt", weights_only=False)]
        amdim_losses(*maps, (torch.arange(4), torch.arange(4)))["loss"].backward()
        for view, own in enumerate(maps):
            for s, x in enumerate(own):
                # every process averages over its own images; DDP then averages the processes
                parts = [torch.load(tmp_path / f"{rank}.pt")[view][s] for rank in (0, 1)]
                torch.testing.assert_close(torch.cat(parts) / 2, x.grad, rtol=1e-4, atol=1e-6)


def run_process(rank, folder):
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    own = slice(2 * rank, 2 * rank + 2)
    maps = [
        Maps(*(x[own].clone().requires_grad_() for x in m)) for m in torch.load(f"{folder}/maps.pt", weights_only=False)
    ]
    amdim_losses(*maps, (torch.arange(4)[own],) * 2)["loss"].backward()
    torch.save([[x.grad for x in m] for m in maps], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class TestEncoder:
    @pytest.mark.parametrize(
        ("size", "sides"),
        [
            (128, [64, 64, 62, 62, 30, 14, 7, 5, 3, 1, 1]),
            (64, [62, 62, 30, 14, 7, 5, 3, 1, 1]),
            (32, [30, 30, 30, 14, 7, 5, 3, 1, 1]),
        ],
    )
    def test_sides_of_all_layers_and_channels_of_the_maps(self, size, sides):
        encoder = Encoder(EncoderConfig(size, 4, 40, 2)).eval()
        x, found = torch.randn(2, 3, size, size), []
        maps = encoder(x)
        for layer in encoder.layers:
            x = layer(x)
            found.append(x.shape[-1])
        assert found == sides
        wide = 16 if size == 32 else 32
        assert [tuple(m.shape) for m in maps] == [(2, wide, 7, 7), (2, wide, 5, 5), (2, 40, 1, 1)]
        assert torch.equal(maps[2], x)

    def test_has_the_papers_number_of_parameters(self):
        with torch.device("meta"):
            method = create_method("amdim", num_classes=1)
        count = sum(p.numel() for p in method.encoder.parameters())
        heads = sum(p.numel() for p in [*method.head5.parameters(), *method.head7.parameters()])
        assert round(count / 1e6 + 0.10, 2) == 194.35  # theirs has 0.10 million that are never used
        assert round(heads / 1e6, 2) == 14.16

    @pytest.mark.parametrize("size", [31, 64])
    def test_refuses_images_of_another_size(self, size):
        with pytest.raises(ValueError, match=rf"amdim: expected images \(B, 3, 32, 32\), got \(1, 3, {size}, {size}\)"):
            tiny().features(torch.zeros(1, 3, size, size))

    @pytest.mark.parametrize(("channels", "out", "kernel", "stride"), [(3, 3, 1, 1), (3, 5, 4, 2), (4, 4, 3, 1)])
    def test_unit_starts_as_the_average_of_its_window_with_zeros_in_new_channels(self, channels, out, kernel, stride):
        x = torch.randn(2, channels, 8, 8)
        y = ResidualUnit(channels, out, kernel, stride)(x)
        assert torch.equal(y[:, :channels], x if kernel == 1 else F.avg_pool2d(x, kernel, stride))
        assert y[:, channels:].abs().sum() == 0

    def test_unit_is_the_residual_network_of_its_formula(self):
        torch.manual_seed(0)
        unit = ResidualUnit(3, 5, 2, 2)
        torch.nn.init.normal_(unit.conv2.weight)
        x = torch.randn(2, 3, 6, 6)
        inner = F.conv2d(F.relu(F.conv2d(x, unit.conv1.weight, stride=2)), unit.conv2.weight)
        expected = inner + F.pad(F.avg_pool2d(x, 2, 2), (0, 0, 0, 0, 0, 2))
        torch.testing.assert_close(unit(x), expected)

    def test_head_starts_nearly_as_a_normalised_copy(self):
        torch.manual_seed(0)
        head, x = RKHSHead(6, 8), 5 * torch.randn(64, 6, 3, 3)
        copy = F.batch_norm(x, None, None, training=True)
        assert (head(x)[:, :6] - copy).abs().max() < 0.2

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"size": 28}, "size is 28, expected 32, 64 or 128"),
            ({"rkhs": 15}, "rkhs 15, expected .* at least 16, the channels before it"),
            ({"depth": 0}, "depth 0"),
            ({"width": 0}, "width is 0"),
            ({"augment": "cut"}, "augment is 'cut', expected crop or shift"),
            ({"jitter": [0.4]}, "jitter has 1 numbers"),
            ({"clip": 0.0}, "clip is 0.0"),
            ({"depht": 2}, "unknown setting 'depht', did you mean 'depth'"),
        ],
    )
    def test_bad_configurations_are_refused_by_name(self, config, message):
        with pytest.raises(FastcamError, match=message):
            tiny(**config)


def steps(method, batch, count=10):
    ((optimizer, schedule),) = method.optimizers(total_steps=count)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = method.training_step(batch)["loss"]
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


class TestTraining:
    def test_loss_falls_over_ten_steps_and_reaches_every_parameter(self):
        method = tiny(lr=0.003)
        losses = steps(method, views())
        assert losses[-1] < 0.95 * losses[0]
        assert all(p.grad is not None for p in method.parameters())

    def test_rate_rises_over_the_warm_up_and_falls_at_the_drops(self):
        method = tiny(lr=1.0, warmup=4, drops=(0.5, 0.75))
        ((optimizer, schedule),) = method.optimizers(total_steps=20)
        rates = []
        for _ in range(20):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        expected = [0.25, 0.5, 0.75, *[1.0] * 7, *[0.2] * 5, *[0.04] * 5]
        assert rates == pytest.approx(expected)
        assert optimizer.defaults["betas"] == (0.8, 0.999)

    def test_one_image_a_step_is_refused(self):
        with pytest.raises(FastcamError, match=r"one image a step has no negatives .* raise trainer.batch_size"):
            tiny().training_step(views(1))

    def test_needs_a_second_view(self):
        with pytest.raises(ValueError, match=r"expected a second view batch\['second'\]"):
            tiny().training_step({"image": torch.zeros(2, 3, 32, 32)})

    def test_classifiers_look_on_without_touching_the_encoder(self):
        batch = {**views(), "tags": torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])}
        plain, watched = tiny(), tiny(online_classifiers=True)
        watched.load_state_dict(plain.state_dict(), strict=False)
        for method in (plain, watched):
            torch.manual_seed(3)
            method.training_step(batch)["loss"].backward()
        for p, q in zip(plain.parameters(), watched.parameters(), strict=False):
            assert torch.equal(p.grad, q.grad)
        assert watched.classifiers.linear.weight.grad.abs().sum() > 0
        assert not any(key.startswith("classifiers") for key in watched.export_state_dict())

    def test_classifiers_need_tags(self):
        with pytest.raises(FastcamError, match="online_classifiers need the images' tags"):
            tiny(online_classifiers=True).training_step(views())

    def test_classifier_loss_bounds_logits_and_leaves_unknown_labels_out(self):
        logits = torch.tensor([[30.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
        bounded = 10 * math.tanh(3)
        first, second = math.log(1 + math.exp(-bounded)), math.log(2)
        expected = (first + second) / 2 + 1e-3 * (900 + 1 + 4) / 6
        assert classifier_loss(logits, torch.tensor([0, 1, -1])).item() == pytest.approx(expected, rel=1e-5)
        assert classifier_loss(logits, torch.tensor([-1, -1, -1])).item() == pytest.approx(1e-3 * 905 / 6, rel=1e-5)

    def test_saved_and_loaded_gives_the_same_features(self, tmp_path):
        method = tiny(online_classifiers=True)
        steps(method, {**views(), "tags": torch.eye(4, 3)}, 2)
        config = {"method": "amdim", "num_classes": 3, "backbone": None, "config": vars(method.config)}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), config)
        images = views()["image"]
        again = load_method(tmp_path / "w.safetensors")
        for x, y in zip(method.eval().features(images), again.features(images), strict=True):
            assert torch.equal(x, y)


class TestViews:
    def item(self, size=40):
        from torchvision import tv_tensors

        torch.manual_seed(0)
        return {"image": tv_tensors.Image(torch.randint(256, (3, size, size), dtype=torch.uint8)), "id": "a"}

    def test_are_two_and_differ(self):
        made = tiny().train_transform(32, resize_long=None, flip=True, mean=(0, 0, 0), std=(1, 1, 1))(self.item())
        assert made["image"].shape == made["second"].shape == (3, 32, 32)
        assert made["image"].dtype == torch.float32 and not torch.equal(made["image"], made["second"])
        assert made["id"] == "a"

    def test_of_an_image_are_mirrored_alike(self):
        still = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": None, "grayscale": 0.0}
        transform = twin_transform(40, **still, mean=(0, 0, 0), std=(1, 1, 1))
        image = self.item()["image"].as_subclass(torch.Tensor) / 255
        seen = set()
        for seed in range(8):
            item = self.item()
            torch.manual_seed(seed)
            made = transform(item)
            assert torch.equal(made["image"], made["second"])
            seen.add(torch.allclose(made["image"], image))
            assert torch.allclose(made["image"], image) or torch.allclose(made["image"], image.flip(2))
        assert seen == {True, False}

    def test_move_by_a_few_pixels_and_mirror_the_border(self):
        transform = twin_transform(8, shift=2, jitter=None, grayscale=0.0, flip=False, mean=(0, 0, 0), std=(1, 1, 1))
        item = self.item(8)
        padded = F.pad(item["image"].as_subclass(torch.Tensor).float() / 255, (2, 2, 2, 2), mode="reflect")
        windows = [padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        for seed in range(6):
            torch.manual_seed(seed)
            moved = transform(item)["second"]
            assert any(torch.allclose(moved, window, atol=1e-6) for window in windows)

    def test_crop_of_another_size_than_the_encoders_is_refused(self):
        with pytest.raises(FastcamError, match=r"amdim: trainer.crop is 48, but the encoder sees 32 pixels"):
            tiny().train_transform(48, resize_long=None, flip=True, mean=IMAGENET_MEAN, std=(1, 1, 1))

    def test_embedded_images_are_the_centre_of_the_resized_one(self):
        from torchvision.transforms import v2

        image = self.item(60)["image"]
        made = tiny().test_transform()({"image": image})["image"]
        small = v2.functional.resize(image, 36, interpolation=v2.InterpolationMode.BICUBIC)[:, 2:34, 2:34]
        mean, std = (torch.tensor(values)[:, None, None] for values in amdim.IMAGENET)
        torch.testing.assert_close(made, (small.as_subclass(torch.Tensor) / 255 - mean) / std)
