"""Group-WSSS: messages, update, dropout, loss, kept maps and labels."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import load_weights, save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods import group_wsss as gw

pytest.importorskip("timm")

GOLDEN = {"rtol": 1e-4, "atol": 1e-5}
TINY = {"backbone": "resnet10t", "output_stride": 16, "head_channels": 16}


def make(**config):
    torch.manual_seed(0)
    return create_method("group_wsss", num_classes=5, **{**TINY, **config})


def graph(channels=4, **config):
    torch.manual_seed(0)
    made = gw.GroupGraph(channels, gw.Config(**config))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def a_batch(images, size=64):
    torch.manual_seed(0)
    tags = torch.eye(5)[torch.arange(images) % 5]
    return {"image": torch.randn(images, 3, size, size), "tags": tags, "id": [f"i{i}" for i in range(images)]}


class TestGolden:
    def test_co_attention_and_gate(self, golden):
        z = {k: torch.from_numpy(v) for k, v in golden("group_wsss_coattention").items()}
        names = ("exemplar", "query", "proj_a_w", "proj_a_b", "proj_b_w", "proj_b_b", "gate_w")
        p = {name: z[name].requires_grad_() for name in names}
        a = F.conv2d(p["exemplar"], p["proj_a_w"], p["proj_a_b"]).flatten(2)
        b = F.conv2d(p["query"], p["proj_b_w"], p["proj_b_b"]).flatten(2)
        message = gw.co_attention(a, b, p["query"].flatten(2))
        out = gw.gate(message, p["gate_w"].flatten()).view_as(z["out"])
        out.backward(z["grad_out"])
        torch.testing.assert_close(out, z["out"], **GOLDEN)
        for name in names:
            torch.testing.assert_close(p[name].grad, z[f"grad_{name}"], **GOLDEN)

    def test_gru(self, golden):
        z = {k: torch.from_numpy(v) for k, v in golden("group_wsss_convgru_k3").items()}
        gru = gw.ConvGRU(5, kernel=3)
        gru.load_state_dict(
            {f"{n}.{part}": z[f"{n}_{part[0]}"] for n in ("reset", "update", "out") for part in ("weight", "bias")}
        )
        x, state = z["input"].requires_grad_(), z["state"].requires_grad_()
        out = gru(x, state)
        out.backward(z["grad_out"])
        torch.testing.assert_close(out, z["out"], **GOLDEN)
        torch.testing.assert_close(x.grad, z["grad_input"], **GOLDEN)
        torch.testing.assert_close(state.grad, z["grad_state"], **GOLDEN)


class TestCoAttention:
    def test_formula(self):
        torch.manual_seed(0)
        a, b, query = torch.randn(2, 3, 7), torch.randn(2, 3, 5), torch.randn(2, 4, 5)
        weight = torch.softmax(a.transpose(1, 2) @ b, dim=2)
        torch.testing.assert_close(gw.co_attention(a, b, query), query @ weight.transpose(1, 2))
        torch.testing.assert_close(gw.co_attention(a, b, query[:, :2]), query[:, :2] @ weight.transpose(1, 2))

    def test_constant_state_is_the_message_of_every_pixel(self):
        query = torch.tensor([1.0, -2.0]).view(1, 2, 1).expand(1, 2, 6)
        message = gw.co_attention(torch.randn(1, 2, 4), torch.randn(1, 2, 6), query)
        torch.testing.assert_close(message, query[..., :4])

    def test_without_projections_the_message_is_the_mean_and_the_gate_a_half(self):
        query = torch.randn(1, 3, 6)
        message = gw.co_attention(torch.zeros(1, 2, 4), torch.zeros(1, 2, 6), query)
        torch.testing.assert_close(message, query.mean(2, keepdim=True).expand(1, 3, 4))
        torch.testing.assert_close(gw.gate(message, torch.zeros(3)), message / 2)

    def test_order_of_pixels(self):
        torch.manual_seed(0)
        a, b, query = torch.randn(1, 2, 6), torch.randn(1, 2, 6), torch.randn(1, 3, 6)
        order, message = torch.randperm(6), gw.co_attention(a, b, query)
        torch.testing.assert_close(gw.co_attention(a, b[..., order], query[..., order]), message)
        torch.testing.assert_close(gw.co_attention(a[..., order], b, query), message[..., order])

    def test_message_lies_between_the_states(self):
        query = torch.randn(1, 3, 9)
        message = gw.co_attention(10 * torch.randn(1, 2, 5), torch.randn(1, 2, 9), query)
        assert (message <= query.amax(2, keepdim=True) + 1e-6).all()
        assert (message >= query.amin(2, keepdim=True) - 1e-6).all()


class TestGRU:
    @pytest.mark.parametrize(("bias", "old"), [(-100.0, True), (100.0, False)])
    def test_update_gate_chooses_between_state_and_candidate(self, bias, old):
        torch.manual_seed(0)
        gru, x, state = gw.ConvGRU(2), torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
        with torch.no_grad():
            gru.update.weight.zero_()
            gru.update.bias.fill_(bias)
            reset = torch.sigmoid(gru.reset(torch.cat([x, state], 1)))
            candidate = torch.tanh(gru.out(torch.cat([x, state * reset], 1)))
            torch.testing.assert_close(gru(x, state), state if old else candidate)

    def test_state_stays_in_the_unit_range(self):
        gru = gw.ConvGRU(3)
        assert gru(100 * torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) * 2 - 1).abs().max() <= 1


class TestGraphDropout:
    def test_by_hand(self):
        x = torch.tensor([[[[1.0, 4.0, 3.0, 2.0]]]])
        assert gw.graph_dropout(x, torch.tensor([0.5])).tolist() == [[[[1.0, 2.0, 1.5, 2.0]]]]
        scaled = gw.graph_dropout(x, torch.tensor([0.1]))
        torch.testing.assert_close(scaled, x * (1 + torch.sigmoid(x)) / 2)

    def test_mean_over_channels_decides_for_all_of_them(self):
        x = torch.tensor([[[[3.0, 0.0]], [[-1.0, 0.0]]]])
        assert gw.graph_dropout(x, torch.tensor([0.9])).tolist() == [[[[1.5, 0.0]], [[-0.5, 0.0]]]]

    def test_negative_everywhere_is_left_alone_and_threshold_zero_halves_all(self):
        x = torch.rand(2, 3, 4, 4) + 0.1
        assert torch.equal(gw.graph_dropout(-x, torch.tensor([0.5, 0.5])), -x)
        assert torch.equal(gw.graph_dropout(x, torch.tensor([0.5, 0.5]), threshold=0.0), x / 2)

    def test_gradient(self):
        torch.manual_seed(0)
        x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        for draw in (0.1, 0.9):
            chance = torch.tensor([draw], dtype=torch.float64)
            assert torch.autograd.gradcheck(lambda x, chance=chance: gw.graph_dropout(x, chance), (x,))


class TestGraph:
    @pytest.mark.parametrize("config", [{}, {"aggregate": "mean", "group_size": 4}])
    def test_groups_of_a_batch_do_not_see_each_other(self, config):
        made = graph(**config)
        K = made.config.group_size
        nodes, draws = torch.randn(3, K, 4, 5, 6), torch.rand(3, 3, K)
        together = made(nodes, draws)
        assert together.shape == nodes.shape
        for g in range(3):
            alone = made(nodes[g : g + 1], draws[:, g : g + 1])
            torch.testing.assert_close(together[g : g + 1], alone)

    def test_one_round_by_hand(self):
        made, nodes = graph(rounds=1), torch.randn(1, 3, 4, 3, 3)
        a, b = (
            torch.stack([project(node).flatten(2) for node in nodes.unbind(1)])
            for project in (made.project_a, made.project_b)
        )
        flat = nodes.flatten(3).transpose(0, 1)
        for i, (j, k) in enumerate([(1, 2), (0, 2), (0, 1)]):
            sent = [gw.gate(gw.co_attention(a[i], b[s], flat[s]), made.gate).view(1, 4, 3, 3) for s in (j, k)]
            expected = made.gru(made.fuse(torch.cat(sent, 1)), nodes[:, i])
            torch.testing.assert_close(made(nodes)[:, i], expected)

    def test_mean_does_not_depend_on_the_order_of_the_others_and_takes_any_number(self):
        made, nodes = graph(aggregate="mean", group_size=4), torch.randn(2, 4, 4, 3, 3)
        order = torch.tensor([0, 3, 1, 2])
        torch.testing.assert_close(made(nodes[:, order]), made(nodes)[:, order])
        assert made(nodes[:, :2]).shape == (2, 2, 4, 3, 3)

    def test_swapped_others_with_swapped_weights_leave_the_first_alone(self):
        made, nodes = graph(rounds=1), torch.randn(1, 3, 4, 3, 3)
        first = made(nodes)[:, 0]
        with torch.no_grad():
            made.fuse.weight.copy_(made.fuse.weight.roll(4, dims=1))
        torch.testing.assert_close(made(nodes[:, [0, 2, 1]])[:, 0], first)

    def test_group_of_one_stays_as_it_is(self):
        nodes = torch.randn(2, 1, 4, 3, 3)
        assert torch.equal(graph(group_size=1)(nodes, torch.rand(3, 2, 1)), nodes)

    def test_gradient_reaches_every_parameter(self):
        made = graph()
        made(torch.randn(2, 3, 4, 3, 3), torch.rand(3, 2, 3)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in made.parameters())


class TestTraining:
    @pytest.mark.parametrize("config", [{}, {"aggregate": "mean", "group_size": 4}])
    def test_loss_falls_over_ten_steps(self, config):
        method = make(lr=0.05, head_layers=0, accumulate=False, **config)
        batch = a_batch(method.group_size)
        ((optimizer, schedule),) = method.optimizers(total_steps=10)
        losses = []
        for _ in range(10):
            loss = method.training_step(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]

    def test_equal_logits_weigh_the_loss_by_seven_tenths(self):
        logits, tags = torch.randn(6, 4), torch.eye(6, 4)
        expected = 0.7 * F.multilabel_soft_margin_loss(logits, tags)
        torch.testing.assert_close(gw.group_loss(logits, logits, tags), expected)

    def test_rates_are_the_authors(self):
        ((optimizer, schedule),) = make().optimizers(total_steps=15)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.001, 0.002, 0.01, 0.02])
        rates = []
        for _ in range(15):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 5 + [1e-5] * 5)

    @pytest.mark.parametrize("tags", [0.0, 1.0])
    def test_no_tag_and_every_tag_train(self, tags):
        method, batch = make(), a_batch(3)
        method.optimizers(1)
        loss = method.training_step({**batch, "tags": torch.full((3, 5), tags)})["loss"]
        loss.backward()
        assert loss.isfinite()

    def test_one_class_and_groups_of_one_train(self):
        batch = a_batch(2)
        method = create_method("group_wsss", num_classes=1, group_size=1, **TINY)
        assert method.training_step({**batch, "tags": torch.ones(2, 1)})["loss"].isfinite()

    def test_broken_group_is_refused(self):
        with pytest.raises(ValueError, match=r"group_wsss\.training_step: expected a multiple of 3 images, got 4"):
            make().training_step(a_batch(4))

    def test_bad_values_are_refused_by_name(self):
        for config, message in (
            ({"aggregate": "sum"}, "group_wsss: aggregate is 'sum', expected one of concat, mean"),
            ({"group_size": 0}, "group_wsss: group_size is 0, expected at least 1"),
            ({"rounds": 0}, "group_wsss: rounds is 0, expected at least 1"),
            ({"attention_channels": 0}, "group_wsss: attention_channels is 0"),
            ({"dropout_rate": 1.5}, r"group_wsss: dropout_rate is 1\.5, expected a number from 0 to 1"),
        ):
            with pytest.raises(FastcamError, match=message):
                make(**config)


class TestKeptMaps:
    def test_quantized_map_by_hand(self):
        maps = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 0.0, 0.0]]])
        assert gw.quantized_attention(maps).tolist() == [[[0, 128, 255]], [[0, 0, 0]]]

    def test_maximum_is_kept_of_what_is_believed(self):
        old, new = torch.tensor([[10, 200]], dtype=torch.uint8), torch.tensor([[20, 100]], dtype=torch.uint8)
        assert gw.accumulate(old, new, 0.5).tolist() == [[20, 200]]
        assert gw.accumulate(old, new, 0.05).tolist() == [[10, 200]]
        assert gw.accumulate(old, new, 0.05, last=True).tolist() == [[10, 200]]
        assert gw.accumulate(None, new, 0.05) is None
        assert gw.accumulate(None, new, 0.05, last=True).tolist() == [[20, 100]]
        assert gw.accumulate(None, new, 0.5).tolist() == [[20, 100]]

    def test_training_keeps_tagged_maps_from_its_share_on_and_checkpoints_them(self):
        method, batch = make(accumulate_from=0.5, accumulate_last=0.5), a_batch(3)
        method.optimizers(total_steps=2)
        method.training_step(batch)
        assert not list(method.kept_maps())
        method.training_step(batch)
        kept = {name: (keys, maps) for name, keys, maps in method.kept_maps()}
        assert list(kept) == ["i0", "i1", "i2"]
        assert [keys.tolist() for keys, _ in kept.values()] == [[0], [1], [2]]
        assert kept["i0"][1].shape == (1, 4, 4)
        again = make()
        again.load_state_dict(method.state_dict())
        assert torch.equal(next(again.kept_maps())[2], kept["i0"][1])
        assert again.step == 2
        assert not any("extra" in k for k in method.export_state_dict())


class TestProxyLabel:
    def test_case_by_hand(self):
        maps = torch.tensor([[0.0, 1.0, 0.5, 1.0, 0.85, 0.2, 0.5], [1.0, 0.0, 0.4, 0.95, 0.0, 0.0, 0.5]])[:, None]
        saliency = torch.tensor([[1.0, 0.5, 1.0, 1.0, 0.14, 0.3, 0.05]])
        # class 2; class 1; the larger; two above 0.9; background beaten by nothing but class 1 certain; salient but
        # background; background
        assert gw.proxy_label(maps, saliency).tolist() == [[2, 1, 1, 255, 255, 255, 0]]

    def test_background_counts_among_the_conflicts(self):
        maps = torch.tensor([[[0.0, 1.0, 1.0]]])
        assert gw.proxy_label(maps, torch.tensor([[0.0, 0.09, 0.5]])).tolist() == [[0, 255, 1]]

    @pytest.mark.parametrize("maps", [torch.zeros(0, 4, 4), torch.full((1, 4, 4), 0.7)])
    def test_image_without_foreground_is_ignored(self, maps):
        assert gw.proxy_label(maps, torch.zeros(4, 4)).unique().tolist() == [255]

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"proxy_label: expected maps \(n, H, W\) and saliency \(H, W\), got"):
            gw.proxy_label(torch.zeros(1, 2, 2), torch.zeros(2, 3))


class TestInference:
    @pytest.mark.parametrize("config", [{}, {"aggregate": "mean", "group_size": 4}, {"group_size": 1}])
    def test_maps_are_the_mean_of_first_and_last_states(self, config):
        method, batch = make(**config).eval(), a_batch(2)
        with torch.no_grad():
            first = method.states(torch.cat([batch["image"], batch["image"].flip(-1)])).unflatten(0, (2, 2))
            nodes = torch.stack([first[0], first[1], first[1]] if not config else [*first], dim=1)
            if not config:  # three nodes: the image, its mirror image, and the image again
                nodes[:, 2] = first[0]
            last = first[0] if config.get("group_size") == 1 else method.graph(nodes)[:, 0]
            torch.testing.assert_close(method.cams(batch["image"]), F.relu((first[0] + last) / 2))

    def test_fused_maps_are_mirrored_with_the_image_masked_and_in_unit_range(self):
        method, batch = make().eval(), a_batch(1)
        tags = torch.tensor([[1.0, 0, 1, 0, 0]])
        with torch.no_grad():
            views = [batch["image"], F.interpolate(batch["image"], (48, 48))]
            maps = method.fused_cams(views, (40, 40), tags).maps
            mirrored = method.fused_cams([view.flip(-1) for view in views], (40, 40), tags).maps
            keys = method.fused_cams(views, (40, 40), tags, torch.tensor([0, 2])).maps
        torch.testing.assert_close(mirrored.flip(-1), maps, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(keys, maps[:, [0, 2]])
        assert maps[:, [1, 3, 4]].count_nonzero() == 0
        assert 0 <= maps.min() <= maps.max() <= 1

    def test_weights_restore_the_maps(self, tmp_path):
        method, batch = make().eval(), a_batch(2)
        config = dataclasses.asdict(method.config)
        saved = {"method": "group_wsss", "num_classes": 5, "backbone": "resnet10t", "config": config}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        assert load_weights(tmp_path / "w.safetensors")[1]["config"]["aggregate"] == "concat"
        with torch.no_grad():
            again = load_method(tmp_path / "w.safetensors").cams(batch["image"])
            assert torch.equal(again, method.cams(batch["image"]))

    def test_no_view_is_refused(self):
        with pytest.raises(ValueError, match=r"group_wsss\.fused_cams: expected at least one view"):
            make().fused_cams([], (8, 8))
