"""CTI against the authors' arrays, numbers worked by hand, and the properties of its formulas."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import load_weights, save_weights
from fastcam.methods import create_method, cti, load_method
from fastcam.nn.cam import FusedCams

pytest.importorskip("timm")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY = {  # the sizes of the golden arrays
    "backbone": "deit_tiny_patch16_224",
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 8,
    "num_heads": 2,
    "drop_path": 0.0,
}


def create(num_classes=3, **changes):
    return create_method("cti", num_classes=num_classes, **{**TINY, **changes})


@pytest.fixture
def arrays(golden):
    def load(name):
        return {k: torch.from_numpy(np.asarray(v)) for k, v in golden(name).items()}

    return load


@pytest.fixture
def official(arrays):
    """The method with the authors' parameters, and their arrays."""
    forward = arrays("cti_forward")
    method = create()
    given = {k.removeprefix("param."): v for k, v in forward.items() if k.startswith("param.")}
    own = method.backbone.state_dict()
    assert given.keys() - own.keys() == {"pos_embed", "norm.weight", "norm.bias"}  # which nothing reads
    method.backbone.load_state_dict({k: given[k] for k in own})
    return method, forward


@pytest.fixture
def method():
    torch.manual_seed(0)
    return create(depth=4, infusion_block=1, cam_blocks=2, memory_size=2)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    return {"image": torch.randn(4, 3, 16, 16), "strong": torch.randn(4, 3, 16, 16), "tags": tags}


def remember(memory, stored, counts):
    """Puts stored tokens, oldest first, into the rings of a memory."""
    for k, n in enumerate(counts.tolist()):
        kept = stored[k, :n][-memory.size :]
        memory.tokens[k, : len(kept)] = kept
        memory.count[k] = len(kept)


class TestGolden:
    def test_forward_of_a_clean_pass(self, official):
        method, a = official
        out = method.backbone(a["img"], since=(0, 2, 4))
        expected = {
            "out.cls": out.class_logits,
            "out.pcls": out.patch_logits,
            "out.cams": out.cams,
            "out.mtatt": out.class_maps(2),
            "out.mtatt_as": out.class_maps(4),
            "out.fcams": out.cams * out.class_maps(2),
            "out.fcams_as": out.cams * out.class_maps(4),
            "out.attn": out.affinity(4),
            "out.rcams": cti.refine_cams(out.affinity(4), out.cams * out.class_maps(2)),
            "noswap.attn": out.affinity(0),
            "noswap.rcams": cti.refine_cams(out.affinity(0), out.cams * out.class_maps(2)),
            "noswap.mtatt": out.class_maps(2),
        }
        for name, value in expected.items():
            torch.testing.assert_close(value, a[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(out.tokens, a["out.ctk"][3], **CLOSE)
        torch.testing.assert_close(out.attention[0], a["out.Sattn"].sum(0)[:, :, 4:], **CLOSE)
        positive = method.backbone(a["img_pos"])
        torch.testing.assert_close(positive.tokens, a["out_pos.ctk_at_swap"], **CLOSE)
        torch.testing.assert_close(positive.cams, a["out_pos.cams"], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("which", "source"), [("intra", "out_pos.ctk_at_swap"), ("cross", "swap_cross_tokens")])
    def test_forward_of_an_infused_pass(self, official, which, source):
        method, a = official
        out = method.backbone(a["img"], a[source], since=(2, 4))
        maps = out.cams * out.class_maps(2)
        expected = {
            "cls": out.class_logits,
            "pcls": out.patch_logits,
            "cams": out.cams,
            "fcams": maps,
            "fcams_as": out.cams * out.class_maps(4),
            "mtatt_as": out.class_maps(4),
            "rcams": cti.refine_cams(out.affinity(4), maps),
        }
        for name, value in expected.items():
            torch.testing.assert_close(value, a[f"{which}.{name}"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.class_logits, a[f"{which}.ctk_last"][:, 1:].mean(2), **CLOSE)

    def test_normalisation_and_its_gradient(self, arrays):
        a = arrays("cti_maxnorm")
        x = a["x"].requires_grad_()
        y = cti.minmax_normalize(x)
        torch.testing.assert_close(y, a["y"], **CLOSE)
        (y * a["cotangent"]).sum().backward()
        torch.testing.assert_close(x.grad, a["grad_x"], **CLOSE)

    def test_training_step_with_all_gradients_and_the_memory(self, official, arrays):
        method, _ = official
        a = arrays("cti_trainstep_voc")
        remember(method.memory, a["memory_before"], a["mem_counts"])
        out = method.training_step({"image": a["img"], "strong": a["img_pos"], "tags": a["label"]})
        for name in ("loss_cls", "loss_bg", "loss_intra", "loss_cross"):
            torch.testing.assert_close(out[name].double(), a[name].double(), **CLOSE)
        torch.testing.assert_close(out["loss"], a["total_logged_as_loss_cls"], **CLOSE)
        out["loss"].backward()
        for name, p in method.backbone.named_parameters():
            torch.testing.assert_close(p.grad, a[f"grad.{name}"], **CLOSE)
        assert method.memory.count.clamp(max=30).tolist() == a["mem_counts_after"].tolist()
        expected = torch.stack([m[:n].mean(0) for m, n in zip(a["memory_after"], a["mem_counts_after"], strict=True)])
        torch.testing.assert_close(method.memory.mean(), expected, **CLOSE)

    def test_refined_foreground_and_background_of_the_loss(self, official, arrays):
        method, _ = official
        a = arrays("cti_trainstep_voc")
        weak = method.backbone(a["img"], since=(2, 4))
        maps = (weak.cams * weak.class_maps(2)).double()
        foreground = (maps[:, 1:] * a["label"][:, :, None, None]).amax(1, keepdim=True)
        pair = cti.minmax_normalize(cti.refine_cams(weak.affinity(4).double(), torch.cat([foreground, maps[:, :1]], 1)))
        full = F.interpolate(pair, (16, 16), mode="bilinear", align_corners=False)
        torch.testing.assert_close(full[:, :1], a["rcams_fg"], **CLOSE)
        torch.testing.assert_close(full[:, 1:], a["rcams_bg"], **CLOSE)


class TestNormalisation:
    def test_by_hand(self):
        # u = 0, 1, 3, 0: (u - 0 - eps) / (3 + eps)
        y = cti.minmax_normalize(torch.tensor([[[-1.0, 1.0], [3.0, 0.0]]]), eps=0.5)
        torch.testing.assert_close(y, torch.tensor([[[0, 0.5 / 3.5], [2.5 / 3.5, 0]]]))

    def test_range_scale_and_maps_without_contrast(self):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 5, 4)
        y = cti.minmax_normalize(x)
        assert (y >= 0).all() and (y < 1).all()
        torch.testing.assert_close(cti.minmax_normalize(7 * x), y, rtol=0, atol=1e-4)
        for flat in (torch.full((1, 3, 3), 2.0), -torch.rand(1, 3, 3), torch.zeros(1, 3, 3)):
            flat.requires_grad_()
            out = cti.minmax_normalize(flat)
            assert out.count_nonzero() == 0
            out.sum().backward()
            assert flat.grad.count_nonzero() == 0
        spike = torch.zeros(1, 3, 3)
        spike[0, 1, 2] = 4
        assert cti.minmax_normalize(spike).nonzero().tolist() == [[0, 1, 2]]
        assert cti.minmax_normalize(spike).max().item() == pytest.approx(1, abs=1e-5)

    def test_nan_stays_visible(self):
        assert cti.minmax_normalize(torch.tensor([[[torch.nan, 1.0]]])).isnan().any()


class TestInfusion:
    def test_by_hand(self):
        tokens = torch.tensor([[[2.0], [4.0], [6.0]]])
        assert cti.infuse(tokens, torch.zeros(1, 3, 1)).flatten().tolist() == [1, 2, 3]
        assert cti.infuse(tokens, torch.full((1, 2, 1), 8.0)).flatten().tolist() == [2, 6, 7]

    def test_own_tokens_change_nothing(self, method, batch):
        with torch.no_grad():
            clean = method.backbone(batch["image"], since=(2,))
            again = method.backbone(batch["image"], clean.tokens, since=(2,))
        torch.testing.assert_close(again.cams, clean.cams)
        torch.testing.assert_close(again.attention[2], clean.attention[2])

    def test_cross_sources_by_hand_and_without_gradient(self):
        tokens = torch.tensor([[[1.0], [2.0]]], requires_grad=True)
        memory = torch.tensor([[5.0], [6.0]], requires_grad=True)
        sources = cti.cross_sources(tokens, memory, torch.tensor([[0.0, 1.0]]))
        assert sources.flatten().tolist() == [1, 6]
        assert not sources.requires_grad


class TestMemory:
    def test_newest_tokens_are_kept_normalised_in_order(self):
        memory = cti.ClassTokenMemory(2, 3, 4)
        torch.manual_seed(0)
        seen = [torch.randn(2, 2, 4) for _ in range(4)]
        for tokens in seen:
            memory.append(tokens, torch.tensor([[1.0, 0], [1, 0]]))
        assert memory.count.tolist() == [8, 0]
        newest = torch.cat([t[:, 0] for t in seen])[-3:]
        expected = F.layer_norm(newest, (4,))
        stored = memory.tokens[0][torch.tensor([(5 + i) % 3 for i in range(3)])]
        torch.testing.assert_close(stored, expected)
        torch.testing.assert_close(memory.mean()[0], expected.mean(0))
        assert memory.mean()[1].count_nonzero() == 0
        assert not memory.full()

    def test_a_batch_larger_than_the_memory_leaves_its_last_tokens(self):
        memory, tokens = cti.ClassTokenMemory(1, 2, 4), torch.randn(5, 1, 4)
        memory.append(tokens, torch.ones(5, 1))
        torch.testing.assert_close(memory.mean()[0], F.layer_norm(tokens[3:, 0], (4,)).mean(0))
        assert memory.full()

    def test_no_tags_store_nothing(self):
        memory = cti.ClassTokenMemory(2, 3, 4)
        memory.append(torch.randn(3, 2, 4), torch.zeros(3, 2))
        assert memory.count.tolist() == [0, 0]
        assert memory.tokens.count_nonzero() == 0


class TestBackgroundLoss:
    def test_complements_have_no_loss_and_equal_maps_have_it(self):
        affinity = torch.eye(4)[None]
        ones = torch.ones(1, 2, 2, 2)
        left = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        tags = torch.ones(1, 1)
        opposite = cti.background_loss(torch.stack([1 - left, left])[None], ones, affinity, tags)
        assert opposite.item() == pytest.approx(0, abs=1e-4)
        equal = cti.background_loss(torch.stack([left, left])[None], ones, affinity, tags)
        assert equal.item() == pytest.approx(1, abs=1e-4)

    def test_absent_classes_do_not_count(self):
        torch.manual_seed(0)
        cams, maps, affinity = torch.rand(2, 4, 3, 3), torch.rand(2, 4, 3, 3), torch.rand(2, 9, 9)
        background = cti.minmax_normalize(cti.refine_cams(affinity, cams[:, :1] * maps[:, :1]))
        loss = cti.background_loss(cams, maps, affinity, torch.zeros(2, 3))
        torch.testing.assert_close(loss, (1 - background).abs().mean())

    def test_detached_foreground_gets_gradient_through_attention_alone(self):
        torch.manual_seed(0)
        cams, maps = torch.rand(1, 3, 3, 3, requires_grad=True), torch.rand(1, 3, 3, 3, requires_grad=True)
        affinity, tags = torch.rand(1, 9, 9), torch.ones(1, 2)
        cti.background_loss(cams, maps, affinity, tags, detach_foreground=True).backward()
        assert cams.grad[:, 1:].count_nonzero() == 0
        assert cams.grad[:, 0].count_nonzero() > 0
        assert maps.grad[:, 1:].count_nonzero() > 0

    def test_refined_maps_are_linear_and_identity_keeps_them(self):
        torch.manual_seed(0)
        x, affinity = torch.rand(2, 3, 2, 4), torch.rand(2, 8, 8)
        torch.testing.assert_close(cti.refine_cams(torch.eye(8).expand(2, 8, 8), x), x)
        torch.testing.assert_close(cti.refine_cams(affinity, 3 * x), 3 * cti.refine_cams(affinity, x))
        assert cti.refine_cams(affinity, x)[1, 2, 0, 3].item() == pytest.approx(
            (affinity[1, 3] * x[1, 2].flatten()).sum().item()
        )


class TestNetwork:
    def test_attention_rows_sum_to_at_most_the_number_of_blocks(self, method, batch):
        with torch.no_grad():
            out = method.backbone(batch["image"], since=(0, 2))
        for first, blocks in ((0, 4), (2, 2)):
            assert (out.attention[first] >= 0).all()
            assert (out.attention[first].sum(2) <= blocks + 1e-5).all()

    def test_tokens_before_the_first_block_are_shared_by_the_batch(self, method):
        assert method.backbone.class_tokens().shape == (1, 4, 16)

    def test_background_gets_no_gradient_from_the_tags(self, method, batch):
        out = method.backbone(batch["image"])
        logits = out.class_logits + out.patch_logits
        F.multilabel_soft_margin_loss(logits, batch["tags"]).backward()
        assert method.backbone.head.weight.grad[0].count_nonzero() == 0
        assert method.backbone.bg_token.grad.count_nonzero() > 0  # through attention

    def test_swapped_classes_swap_their_maps(self, method, batch):
        def rows(x, swap):  # of a tensor whose first dimension runs over background and classes
            return x.unflatten(0, (4, -1))[swap].flatten(0, 1)

        swap, net = [0, 2, 1, 3], method.backbone
        with torch.no_grad():
            before = method.cams(batch["image"], batch["tags"])
            for p in (net.tokenizer[2].weight, net.tokenizer[2].bias, net.head.weight, net.head.bias):
                p.copy_(rows(p, swap))
            net.pos_embed_cls.copy_(net.pos_embed_cls[:, swap])
            after = method.cams(batch["image"], batch["tags"][:, [1, 0, 2]])
        torch.testing.assert_close(after, before[:, [1, 0, 2]], **CLOSE)

    @pytest.mark.parametrize(("size", "grid"), [((16, 16), (4, 4)), ((16, 24), (4, 6)), ((23, 31), (5, 7))])
    def test_any_resolution(self, method, size, grid):
        with torch.no_grad():
            assert method.eval().cams(torch.randn(1, 3, *size)).shape == (1, 3, *grid)

    def test_image_smaller_than_a_patch_is_refused(self, method):
        with pytest.raises(ValueError, match=r"cti: expected images .* at least 4 x 4 pixels, got \(1, 3, 3, 8\)"):
            method.cams(torch.randn(1, 3, 3, 8))


class TestTraining:
    def test_loss_falls_over_ten_steps(self, batch):
        torch.manual_seed(0)
        method = create(depth=4, infusion_block=1, cam_blocks=2, memory_size=2, lr=0.01, warmup_epochs=0)
        ((optimizer, schedule),) = method.optimizers(total_steps=600)
        losses = []
        for _ in range(10):
            out = method.training_step(batch)
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            schedule.step()
            losses.append(out["loss"].item())
        assert np.isfinite(losses).all()
        assert losses[-1] < 0.8 * losses[0]

    def test_step_is_the_sum_of_its_parts_and_reaches_all_parameters(self, method, batch):
        out = method.training_step(batch)
        assert list(out) == ["loss", "loss_cls", "loss_bg", "loss_intra", "loss_cross"]
        assert all(value > 0 for value in out.values())
        assert out["loss"].item() == pytest.approx(sum(v.item() for k, v in out.items() if k != "loss"))
        out["loss"].backward()
        assert [name for name, p in method.named_parameters() if p.grad is None] == []

    def test_cross_loss_waits_for_every_class(self, batch):
        method = create(depth=4, infusion_block=1, cam_blocks=2, memory_size=3)
        losses = [method.training_step(batch)["loss_cross"].item() for _ in range(2)]
        assert losses[0] == 0  # two of each class in a batch
        assert losses[1] > 0

    def test_losses_on_maps_begin_with_their_epoch(self, batch):
        method = create(depth=4, infusion_block=1, cam_blocks=2, memory_size=1, start_epoch=2, epochs=6)
        method.optimizers(total_steps=9)
        active = [method.training_step(batch)["loss_bg"].item() > 0 for _ in range(4)]
        assert active == [False, False, False, True]

    @pytest.mark.parametrize("tags", [torch.zeros(1, 3), torch.ones(1, 3)])
    def test_no_class_and_every_class_in_a_batch_of_one_train(self, method, batch, tags):
        one = {"image": batch["image"][:1], "strong": batch["strong"][:1], "tags": tags}
        for _ in range(2):
            out = method.training_step(one)
            out["loss"].backward()
        assert out["loss"].isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)

    def test_a_single_class_trains(self, batch):
        method = create(num_classes=1, depth=4, infusion_block=1, cam_blocks=2, memory_size=2)
        out = method.training_step({**batch, "tags": torch.ones(4, 1)})
        out["loss"].backward()
        assert all(value.isfinite() for value in out.values())

    def test_half_precision_autocast_gives_nearly_the_same_loss(self, batch):
        losses = []
        for enabled in (False, True):
            torch.manual_seed(0)
            method = create(depth=4, infusion_block=1, cam_blocks=2, memory_size=2)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(method.training_step(batch)["loss"])
            losses[-1].backward()
        assert losses[1].dtype == torch.float32
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)

    def test_missing_second_view_is_refused(self, method, batch):
        with pytest.raises(ValueError, match=r"cti\.training_step: expected a second view batch\['strong'\]"):
            method.training_step({"image": batch["image"], "tags": batch["tags"]})

    def test_schedule_rises_then_falls_once_an_epoch(self):
        config = cti.Config()
        assert cti.learning_rate(0, config) == 1e-6
        assert cti.learning_rate(4, config) == pytest.approx(1e-6 + 4 * (6.25e-5 - 1e-6) / 5)
        # The cosine's clock runs from epoch 0.
        assert cti.learning_rate(5, config) == pytest.approx(1e-5 + 0.5 * 5.25e-5 * (1 + math.cos(math.pi * 5 / 60)))
        assert cti.learning_rate(60, config) == pytest.approx(1e-5)
        method = create(epochs=3, warmup_epochs=1, lr=1e-3)
        ((optimizer, schedule),) = method.optimizers(total_steps=6)
        rates = []
        for _ in range(6):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[::2] == pytest.approx([cti.learning_rate(e, method.config) for e in range(3)])
        assert rates[1::2] == rates[::2]

    def test_biases_norms_and_the_shared_token_are_not_decayed(self, method):
        ((optimizer, _),) = method.optimizers(total_steps=6)
        names = {id(p): name for name, p in method.named_parameters()}
        free = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
        assert optimizer.param_groups[1]["weight_decay"] == 0
        assert "backbone.cls_token" in free
        assert all(name.endswith(("cls_token", "bias")) or ".norm" in name for name in free)
        assert not free & {f"backbone.{x}" for x in ("bg_token", "pos_embed_cls", "pos_embed_pat", "head.weight")}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(method.parameters()))


class TestInference:
    @pytest.mark.parametrize("maps", ["cam", "fused", "refined"])
    def test_maps_are_masked_and_in_unit_range(self, maps):
        torch.manual_seed(0)
        method = create(depth=4, infusion_block=1, cam_blocks=2, maps=maps).eval()
        tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        images = torch.randn(2, 3, 16, 24)
        with torch.no_grad():
            fused = method.fused_cams([images], (16, 24), tags)
            only = method.fused_cams([images], (16, 24), tags, torch.tensor([2]))
            single = method.cams(images, tags)
        assert isinstance(fused, FusedCams)
        assert fused.background is None
        assert fused.maps.shape == (2, 3, 16, 24)
        assert single.shape == (2, 3, 4, 6)
        for out in (fused.maps, single):
            assert out[tags == 0].count_nonzero() == 0
            assert out.min() >= 0
        assert fused.maps.max() < 1
        torch.testing.assert_close(only.maps, fused.maps[:, [2]])

    def test_one_view_is_the_authors_formula(self, method, batch):
        image, tags = batch["image"][:1], batch["tags"][:1]
        method.eval()
        with torch.no_grad():
            total = torch.zeros(1, 3, 16, 16)
            for mirrored in (False, True):
                out = method.backbone(image.flip(-1) if mirrored else image, since=(0,))
                refined = cti.refine_cams(out.affinity(0), out.cams * out.class_maps(0))[:, 1:]
                full = F.interpolate(refined, (16, 16), mode="bilinear", align_corners=False)
                total += (full.flip(-1) if mirrored else full) * tags[:, :, None, None]
            fused = method.fused_cams([image], (16, 16), tags)
        torch.testing.assert_close(fused.maps, cti.minmax_normalize(total), rtol=1e-4, atol=1e-4)

    def test_mirrored_image_gives_mirrored_maps(self, method, batch):
        method.eval()
        with torch.no_grad():
            maps = method.fused_cams([batch["image"]], (16, 16)).maps
            mirrored = method.fused_cams([batch["image"].flip(-1)], (16, 16)).maps
        torch.testing.assert_close(mirrored.flip(-1), maps, **CLOSE)

    def test_tag_logits_are_the_mean_of_both_heads(self, method, batch):
        with torch.no_grad():
            out = method.backbone(batch["image"])
            logits = method.tag_logits(batch["image"])
        torch.testing.assert_close(logits, (out.class_logits + out.patch_logits) / 2)


class TestWeights:
    def test_image_classifier_starts_tokens_and_positions(self, tmp_path):
        import timm

        torch.manual_seed(3)
        sizes = {"patch_size": 4, "embed_dim": 16, "depth": 8, "num_heads": 2}
        deit = timm.create_model("deit_tiny_patch16_224", img_size=24, num_classes=7, **sizes)
        state = deit.state_dict()
        save_weights(tmp_path / "deit.safetensors", state, {})
        same = create(image_size=24, weights=tmp_path / "deit.safetensors").backbone
        assert torch.equal(same.cls_token, state["cls_token"])
        assert torch.equal(same.pos_embed_cls, state["pos_embed"][:, :1].expand(1, 4, 16))
        assert torch.equal(same.pos_embed_pat, state["pos_embed"][:, 1:])
        assert torch.equal(same.blocks[5].attn.qkv.weight, state["blocks.5.attn.qkv.weight"])
        assert same.bg_token.count_nonzero() == 0
        other = create(weights=tmp_path / "deit.safetensors").backbone  # a grid of 4 x 4 from one of 6 x 6
        square = state["pos_embed"][:, 1:].mT.unflatten(2, (6, 6))
        resized = F.interpolate(square, (4, 4), mode="bicubic", align_corners=False)
        torch.testing.assert_close(other.pos_embed_pat, resized.flatten(2).mT)

    def test_saved_method_restores_its_maps_and_leaves_the_memory_out(self, method, batch, tmp_path):
        method.training_step(batch)
        method.eval()
        config = dict(method.config.__dict__)
        saved = {"method": "cti", "num_classes": 3, "backbone": config["backbone"], "config": config}
        path = tmp_path / "w.safetensors"
        save_weights(path, method.export_state_dict(), saved)
        assert all(key.startswith("backbone.") for key in load_weights(path)[0])
        again = load_method(path)
        assert again.config == method.config
        changes = {k: config[k] for k in ("depth", "infusion_block", "cam_blocks")}
        started = create(**changes, weights=path).eval()
        with torch.no_grad():
            expected = method.cams(batch["image"])
            assert torch.equal(again.cams(batch["image"]), expected)
            assert torch.equal(started.cams(batch["image"]), expected)

    def test_checkpoint_holds_memory_and_step(self, method, batch, tmp_path):
        method.training_step(batch)
        torch.save(method.state_dict(), tmp_path / "last.ckpt")
        expected = method.training_step(batch)["loss"]
        again = create(depth=4, infusion_block=1, cam_blocks=2, memory_size=2)
        again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True))
        assert again.step == 1
        assert torch.equal(again.training_step(batch)["loss"], expected)

    def test_weights_of_another_network_are_refused(self, tmp_path):
        save_weights(tmp_path / "other.safetensors", {"pos_embed": torch.zeros(1, 17, 8)}, {})
        with pytest.raises(FastcamError, match=r"are missing, not expected or of another shape; give those of"):
            create(weights=tmp_path / "other.safetensors")
        deep = create().backbone.state_dict()
        save_weights(tmp_path / "deep.safetensors", deep, {})
        with pytest.raises(FastcamError, match=r"deep.safetensors': blocks\.4\.attn\.proj\.bias and 47 more"):
            create(depth=4, infusion_block=1, cam_blocks=2, weights=tmp_path / "deep.safetensors")


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"maps": "refine"}, "maps is 'refine', expected one of cam, fused, refined"),
            ({"infusion_block": 7}, "infusion_block is 7, expected 0 to 6"),
            ({"cam_blocks": 9}, "cam_blocks is 9, expected 1 to 8"),
            ({"memory_size": 0}, "memory_size is 0 and epochs 60, expected at least 1"),
            ({"crop_scale": (0.3,)}, "crop_scale has 1 numbers, expected 2"),
            ({"backbone": "deit_tiny_patch16_22"}, "timm has no such network; near it: "),
            ({"backbone": "resnet10t"}, "backbone 'resnet10t': "),
            ({"backbone": "deit_tiny_distilled_patch16_224"}, "expected a plain vision transformer"),
            ({"backbone": "vit_base_patch16_clip_224"}, "expected a plain vision transformer"),
            ({"num_heads": 3}, "cannot be built: "),
        ],
    )
    def test_values_are_refused_by_name(self, changes, message):
        with pytest.raises(FastcamError, match=message):
            create(**changes)
