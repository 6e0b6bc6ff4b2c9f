"""DSMF-Net against arrays of PFENet's and GloRe's own programs, numbers worked by hand, and what must not change."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torchvision import tv_tensors

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.dsmf_net import (
    EpisodeTransform,
    GloReUnit,
    PyramidHead,
    between,
    cosine_map,
    cosine_max_prior,
    masked_average_pool,
    minmax_map,
    pyramid_sizes,
    support_weights,
)

TINY = {"backbone": "test_resnet", "channels": 16, "graph_nodes": 4, "protocol": "own", "base": ["a"], "novel": ["b"]}
STILL = {"feature_dropout": 0.0, "head_dropout": 0.0}


def tiny(**config):
    torch.manual_seed(0)
    return create_method("dsmf_net", num_classes=2, **{**TINY, **config})


def trained(**config):
    """A network whose graph units do something."""
    method = tiny(**config)
    for unit in method.graph or []:
        torch.nn.init.normal_(unit.blocker.weight)
    return method.eval()


def batch(count=4, shots=1, size=64, seed=1):
    """Dark images in which the class is a bright block, somewhere else in every image."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(count, shots + 1, size, size, dtype=torch.int64)
    for one in mask.flatten(0, 1):
        y, x = torch.randint(size // 2, (2,), generator=generator).tolist()
        one[y : y + size // 2, x : x + size // 2] = 1
    noise = 0.2 * torch.randn(count, shots + 1, 3, size, size, generator=generator)
    image = 2.0 * mask[:, :, None] - 1 + noise
    return {"image": image[:, 0], "mask": mask[:, 0], "support": image[:, 1:], "support_mask": mask[:, 1:]}


def episode(count=2, shots=1, size=64, seed=1):
    data = batch(count, shots, size, seed)
    return data["image"], data["support"], data["support_mask"]


def test_masked_average_pool_equals_pfenets_value_and_gradient(golden):
    a = {k: torch.from_numpy(v) for k, v in golden("dsmf_net_weighted_gap_soft").items()}
    features = a["feat"].requires_grad_()
    pooled = masked_average_pool(features, a["mask"])
    torch.testing.assert_close(pooled, a["proto"], rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(pooled, features, a["cotangent"])
    torch.testing.assert_close(grad, a["grad_feat"], rtol=1e-4, atol=1e-5)


def test_prior_equals_pfenets(golden):
    a = {k: torch.from_numpy(v) for k, v in golden("dsmf_net_prior").items()}
    mask = support_weights(a["mask"][:, 0], (5, 5))
    prior = cosine_max_prior(a["query_feat_4"], a["supp_feat_4"], mask)
    torch.testing.assert_close(prior, a["prior"], rtol=1e-4, atol=1e-5)


def test_graph_unit_equals_glores_values_and_gradients(golden):
    a = {k: torch.from_numpy(v) for k, v in golden("dsmf_net_glore_norm0").items()}
    unit = GloReUnit(12, 5, normalize=False)
    unit.load_state_dict({k.removeprefix("param."): v for k, v in a.items() if k.startswith("param.")})
    x = a["x"].requires_grad_()
    torch.testing.assert_close(unit.train()(x.detach()), a["y_train"], rtol=1e-4, atol=1e-5)
    unit.load_state_dict({k.removeprefix("param."): v for k, v in a.items() if k.startswith("param.")})
    y = unit.eval()(x)
    torch.testing.assert_close(y, a["y_eval"], rtol=1e-5, atol=1e-4)
    y.backward(a["cotangent"])
    torch.testing.assert_close(x.grad, a["grad_x_eval"], rtol=1e-4, atol=1e-3)
    for name, p in unit.named_parameters():
        torch.testing.assert_close(p.grad, a[f"grad.{name}"], rtol=1e-4, atol=1e-3)


def test_masked_average_pool_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    n = 4
    torch.testing.assert_close(masked_average_pool(x, torch.ones(1, 1, 2, 2)), x.mean((2, 3), True) * n / (n + 5e-4))
    assert masked_average_pool(x, torch.zeros(1, 1, 2, 2)).item() == 0
    one = torch.zeros(1, 1, 2, 2)
    one[..., 1, 1] = 1
    assert masked_average_pool(x, one).item() == pytest.approx(6 / 1.0005)
    assert masked_average_pool(x, 0.25 * one).item() == pytest.approx(1.5 / 0.2505)
    torch.testing.assert_close(masked_average_pool(3 * x, one), 3 * masked_average_pool(x, one))


def test_cosine_map_by_hand_and_blind_to_scale():
    x = torch.tensor([[[[3.0, 0.0, -1.0, 0.0]], [[4.0, 2.0, 0.0, 0.0]]]])
    g = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert cosine_map(x, g).flatten().tolist() == pytest.approx([0.6, 0.0, -1.0, 0.0], abs=1e-6)
    torch.testing.assert_close(cosine_map(5 * x, 0.1 * g), cosine_map(x, g), rtol=1e-5, atol=1e-6)


def test_cosine_of_a_zero_feature_has_no_gradient():
    x = torch.zeros(1, 2, 1, 2)
    x[0, :, 0, 1] = torch.tensor([1.0, 1.0])
    g = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(cosine_map(x, g).sum(), x)
    assert grad[..., 0].tolist() == [[[0.0], [0.0]]]
    s = 2**-0.5  # of (1, 1) / |(1, 1)| with (1, 0): d/dx = (y^2, -x y) / |.|^3
    assert grad[0, :, 0, 1].tolist() == pytest.approx([s / 2, -s / 2], abs=1e-5)
    empty = cosine_map(x, torch.zeros_like(g))
    assert not empty.any()
    assert not torch.autograd.grad(empty.sum(), x)[0].any()


def test_cosine_and_minmax_gradients_agree_with_finite_differences():
    g = torch.Generator().manual_seed(0)
    x, p = (torch.randn(2, 3, *size, generator=g, dtype=torch.float64).requires_grad_() for size in ((2, 3), (1, 1)))
    assert torch.autograd.gradcheck(lambda x, p: minmax_map(cosine_map(x, p)), (x, p))


def test_minmax_by_hand_and_constant_map_is_zero():
    values = torch.tensor([[[[1.0, 3.0, 2.0]], [[7.0, 7.0, 7.0]]]])
    mapped = minmax_map(values)
    assert mapped[0, 0, 0].tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-6)
    assert mapped[0, 1, 0].tolist() == [0.0, 0.0, 0.0]


def test_prior_lies_between_0_and_1_and_is_blind_to_scale_order_and_zeros():
    g = torch.Generator().manual_seed(0)
    q, s = torch.rand(2, 6, 3, 4, generator=g), torch.rand(2, 6, 4, 4, generator=g)
    mask = (torch.rand(2, 1, 4, 4, generator=g) > 0.5).float()
    prior = cosine_max_prior(q, s, mask)
    assert prior.amin((1, 2, 3)).tolist() == [0.0, 0.0]
    assert prior.amax((1, 2, 3)).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    torch.testing.assert_close(cosine_max_prior(4 * q, 0.5 * s, mask), prior, rtol=1e-4, atol=1e-5)
    order = torch.randperm(16, generator=g)
    moved = [t.flatten(2)[:, :, order].view(t.shape) for t in (s, mask)]
    torch.testing.assert_close(cosine_max_prior(q, *moved), prior)
    every = torch.ones_like(mask)  # with features that are not negative, places of zeros change nothing
    torch.testing.assert_close(cosine_max_prior(q, s * mask, every), prior)
    assert not cosine_max_prior(q, s, torch.zeros_like(mask)).any()


def test_untrained_graph_unit_gives_back_its_input():
    unit = GloReUnit(6, 3)
    x = torch.randn(2, 6, 4, 5)
    for mode in (True, False):
        assert torch.equal(unit.train(mode)(x), x)


def test_graph_nodes_do_not_grow_with_the_image_and_places_may_be_permuted():
    torch.manual_seed(0)
    unit = GloReUnit(6, 3).eval()
    torch.nn.init.normal_(unit.blocker.weight)
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(unit.nodes(torch.cat([x, x], 3))[0], unit.nodes(x)[0])
    order = torch.randperm(20)
    moved = x.flatten(2)[:, :, order].view(x.shape)
    torch.testing.assert_close(unit(moved), unit(x).flatten(2)[:, :, order].view(x.shape), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unit(x), x)


def test_pyramid_and_the_sizes_between_its_levels():
    sizes = pyramid_sizes((32, 32), (1.0, 0.5, 0.25, 0.125))
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert between(sizes) == [(24, 24), (12, 12), (6, 6)]
    assert pyramid_sizes((5, 3), (1.0, 0.1)) == [(5, 3), (1, 1)]


def test_pyramid_of_one_level_is_the_published_chain_of_convolutions():
    torch.manual_seed(0)
    head = PyramidHead(4, 2, (1.0,), merge=False, aux_hidden=True, dropout=0.0)
    x, p, maps = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 1, 1), torch.rand(2, 2, 5, 6)
    logits, (inner,) = head(x, p, maps)

    def block(z, *layers):
        for layer in layers:
            z = F.relu(F.conv2d(z, layer.weight, padding=layer.kernel_size[0] // 2))
        return z

    z = block(torch.cat([x, p.expand(2, 4, 5, 6), maps], 1), head.init_merge[0][0])
    z = z + block(z, head.beta_conv[0][0], head.beta_conv[0][2])
    torch.testing.assert_close(inner, head.inner_cls[0](z))
    z = block(z, head.res1[0])
    z = z + block(z, head.res2[0], head.res2[2])
    torch.testing.assert_close(logits, head.cls(z))


def test_levels_pass_on_to_the_coarser_ones_alone():
    torch.manual_seed(0)
    head = PyramidHead(4, 1, (1.0, 0.5, 0.25), merge=True, aux_hidden=False, dropout=0.0)
    x = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 1, 1), torch.rand(1, 1, 8, 8)
    before = head(*x)[1]
    with torch.no_grad():
        head.merges[1][0].weight.mul_(2)  # of the coarser of the two merged levels
    after = head(*x)[1]
    assert [one.shape[2:] for one in before] == [(6, 6), (3, 3)]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    with torch.no_grad():
        head.merges[0][0].weight.mul_(2)
    assert not torch.allclose(head(*x)[1][1], after[1])


@pytest.mark.parametrize(("config", "millions"), [({}, 10.0), ({"aux_hidden": False}, 8.3)])
def test_number_of_weights_is_that_of_the_specified_layers(config, millions):
    method = create_method("dsmf_net", num_classes=15, **config)
    learned = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert learned / 1e6 == pytest.approx(millions, abs=0.06)
    assert (method.backbone.channels, method.backbone.strides) == ([256, 512, 1024, 2048], [4, 8, 8, 8])


def test_last_support_stage_sees_marked_places_alone():
    method = tiny()
    images, masks = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64)
    masks[0] = 1
    plain, marked = method.backbone(images), method.support_stages(images, masks)
    for stage in range(3):
        assert torch.equal(marked[stage], plain[stage])
    torch.testing.assert_close(marked[3][0], plain[3][0])  # a full mask changes nothing
    assert not marked[3][1].any()
    masks[1, :32] = 1
    by_hand = method.backbone.net.layer4(plain[2] * support_weights(masks, plain[2].shape[2:]))
    by_hand = by_hand * support_weights(masks, by_hand.shape[2:])
    torch.testing.assert_close(method.support_stages(images, masks)[3], by_hand)


@pytest.mark.parametrize(("final", "channels"), [(True, 1280), (False, 320)])
def test_last_stage_of_mobilenet_ends_behind_its_final_convolution_or_before(final, channels):
    method = tiny(backbone="mobilenetv2_100", final_features=final).eval()
    last = method.support_stages(torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32))[3]
    assert last.shape == (1, channels, 4, 4)
    assert bool((last >= 0).all()) == final


def test_no_gradient_reaches_the_backbone_and_every_other_weight_has_one():
    method = tiny(**STILL)
    for unit in method.graph:  # at zero, as it begins, it holds back what lies before it
        torch.nn.init.ones_(unit.blocker.weight)
    method.training_step(batch(2))["loss"].backward()
    for name, p in method.named_parameters():
        if name.startswith("backbone."):
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    for name in ("reduce.0.0.weight", "graph.2.conv_state.weight", "down_supp.0.weight", "head.merges.2.0.weight"):
        assert method.get_parameter(name).grad.abs().sum() > 0, name


def test_training_leaves_the_backbone_as_it_was():
    method = tiny().train()
    assert not any(m.training for m in method.backbone.modules())
    before = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    ((optimizer, _),) = method.optimizers(2)
    method.training_step(batch(2))["loss"].backward()
    optimizer.step()
    for name, value in method.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_same_support_five_times_is_one_shot_and_order_does_not_matter():
    method = trained()
    query, support, masks = episode(2)
    with torch.no_grad():
        one = method.predict(query, support, masks)
        five = method.predict(query, support.repeat(1, 5, 1, 1, 1), masks.repeat(1, 5, 1, 1))
        torch.testing.assert_close(five, one, rtol=1e-4, atol=1e-5)
        query, support, masks = episode(2, shots=3)
        order = [2, 0, 1]
        a = method.predict(query, support, masks)
        torch.testing.assert_close(method.predict(query, support[:, order], masks[:, order]), a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["predict", "prototype_scores", "prior_scores"])
def test_images_of_a_batch_do_not_see_each_other(name):
    method = trained()
    inputs = episode(3, shots=2)
    with torch.no_grad():
        together = getattr(method, name)(*inputs)
        alone = [getattr(method, name)(*(x[i : i + 1] for x in inputs)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_unknown_pixels_of_a_support_are_not_the_class():
    method = trained()
    query, support, masks = episode(1)
    unknown = masks.masked_fill(masks == 0, 255)
    with torch.no_grad():
        assert torch.equal(method.predict(query, support, unknown), method.predict(query, support, masks))


@pytest.mark.parametrize("name", ["predict", "prototype_scores", "prior_scores"])
def test_an_empty_support_mask_gives_finite_scores(name):
    query, support, masks = episode(1)
    with torch.no_grad():
        assert getattr(trained(), name)(query, support, torch.zeros_like(masks)).isfinite().all()


@pytest.mark.parametrize("size", [(64, 64), (65, 65), (33, 70)])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"maps": "convolution"},
        {"maps": "none", "merge": False},
        {"stages": (2, 3, 4)},
        {"prior": False},
    ],
)
def test_logits_have_the_size_of_the_query(config, size):
    method = tiny(**config).eval()
    with torch.no_grad():
        scores = method.predict(torch.randn(2, 3, *size), torch.randn(2, 1, 3, 48, 64), torch.ones(2, 1, 48, 64))
    assert scores.shape == (2, 2, *size)
    assert scores.dtype == torch.float32


def test_baselines_find_a_bright_block():
    """Colours are features enough: even an untrained trunk tells them apart."""
    method = tiny().eval()
    query, support, masks = episode(4)
    target = batch(4)["mask"]
    for name in ("prototype_scores", "prior_scores"):
        found = getattr(method, name)(query, support, masks).argmax(1)
        both, either = ((found & target) > 0).sum(), ((found | target) > 0).sum()
        assert both / either > 0.5, name


def test_loss_is_the_cross_entropy_of_all_logits():
    method, data = tiny(aux_weight=0.5, **STILL).eval(), batch(2)
    data["mask"][:, :10] = 255
    scalars = method.training_step(data)
    logits, inner = method(data["image"], data["support"], data["support_mask"])
    main, *aux = [
        F.cross_entropy(F.interpolate(s, (64, 64), mode="bilinear", align_corners=True), data["mask"], ignore_index=255)
        for s in (logits, *inner)
    ]
    assert len(aux) == 3
    torch.testing.assert_close(scalars["loss"], main + 0.5 * sum(aux) / 3)
    torch.testing.assert_close(scalars["main_loss"], main.detach())


def test_without_intermediate_losses_their_heads_learn_nothing():
    method = tiny(aux_weight=0.0)
    method.training_step(batch(2))["loss"].backward()
    assert not any(p.grad.any() for p in method.head.inner_cls.parameters())
    assert method.head.cls[-1].weight.grad.any()


def test_a_batch_without_any_label_gives_zero_loss():
    data = batch(2)
    scalars = tiny().training_step({**data, "mask": torch.full_like(data["mask"], 255)})
    scalars["loss"].backward()
    assert scalars["loss"] == 0


@pytest.mark.parametrize("config", [{}, {"maps": "none", "merge": False}])
def test_loss_falls_over_ten_steps(config):
    method, data = tiny(lr=0.1, **STILL, **config), batch()
    ((optimizer, scheduler),) = method.optimizers(10)
    losses = []
    for _ in range(10):
        loss = method.training_step(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.93 * losses[0]


def test_learning_rate_is_poly():
    ((optimizer, scheduler),) = tiny(lr=0.01).optimizers(4)
    rates = []
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * (1 - i / 4) ** 0.9 for i in (1, 2, 3, 4)])


def test_logits_are_float32_and_finite_under_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = tiny().eval().predict(*episode(1))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_saved_weights_load_into_the_same_network(tmp_path):
    method = trained(stages=[2, 3])
    record = {"method": "dsmf_net", "num_classes": 2, "classes": ["a", "b"], "backbone": TINY["backbone"]}
    path = tmp_path / "w.safetensors"
    save_weights(path, method.export_state_dict(), {**record, "config": dataclasses.asdict(method.config)})
    loaded = load_method(path)
    with torch.no_grad():
        assert (loaded.kind, loaded.learns_from_masks) == ("few-shot", True)
        assert loaded.config == method.config
        assert torch.equal(loaded.predict(*episode(1)), method.predict(*episode(1)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"maps": "graphs"}, "maps is 'graphs', expected graph, convolution or none"),
        ({"maps": "none", "prior": False}, "the network needs a map"),
        ({"stages": [0, 1]}, r"stages are \(0, 1\), expected some of 1, 2, 3 and 4"),
        ({"scales": [0.5, 1.0]}, "expected falling numbers"),
        ({"scales": [1.0]}, "merge joins neighbouring scales, got a single one"),
        ({"protocol": "isaid"}, "protocol is 'isaid', expected isaid_5i_sdm, isaid_5i_dmnet"),
        ({"novel_images": "kept"}, "novel_images is 'kept', expected background or removed"),
        ({"shots": 0}, "expected at least 1"),
    ],
)
def test_bad_settings_are_refused_by_name(config, message):
    with pytest.raises(FastcamError, match=f"dsmf_net: .*{message}|dsmf_net: {message}"):
        tiny(**config)


def test_bad_shapes_are_refused():
    method = tiny()
    query, support, masks = episode(1)
    with pytest.raises(ValueError, match=r"dsmf_net: expected query .* got \(1, 3, 64, 64\), \(1, 3, 64, 64\)"):
        method.predict(query, support[:, 0], masks)
    with pytest.raises(ValueError, match="at least one support image, got K = 0"):
        method.predict(query, support[:, :0], masks[:, :0])


class Pictures:
    """Four images of two classes; the last one shows both."""

    classes = ("a", "b")
    ids = ("p", "q", "r", "s")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        mask = torch.zeros(40, 60, dtype=torch.uint8)
        mask[5:25, 5 : 15 + 5 * index] = 1
        if index == 3:
            mask[30:, 40:] = 2
        image = tv_tensors.Image(torch.full((3, 40, 60), 40 * index, dtype=torch.uint8))
        return {"image": image, "mask": tv_tensors.Mask(mask), "id": self.ids[index]}


def test_training_episodes_are_of_base_classes_and_the_query_is_no_support():
    episodes = tiny(shots=2).training_episodes(Pictures(), 32)
    assert len(episodes) == 4
    torch.manual_seed(0)
    for index in range(4):
        item = episodes[index]
        shapes = [tuple(item[k].shape) for k in ("image", "mask", "support", "support_mask")]
        assert shapes == [(3, 32, 32), (32, 32), (2, 3, 32, 32), (2, 32, 32)]
        assert item["label"] == 0
        assert set(item["mask"].unique().tolist()) <= {0, 1, 255}
        # Grey values name the images; blur, size and mirror image do not change them.
        known = item["support_mask"] != 255
        grey = [float(s[0][k].median()) for s, k in zip(item["support"], known, strict=True)]
        own = float(item["image"][0][item["mask"] != 255].median())
        assert len({round(value, 2) for value in [*grey, own]}) == 3


def test_images_with_novel_classes_are_removed_where_the_protocol_says_so():
    episodes = tiny(novel_images="removed").training_episodes(Pictures(), 32)
    assert episodes.members == {0: [0, 1, 2]}
    assert tiny(min_pixels=400).training_episodes(Pictures(), 32).members == {0: [2, 3]}
    with pytest.raises(FastcamError, match="class 'a' has 1 images with enough of its pixels, expected at least 2"):
        tiny(min_pixels=450).training_episodes(Pictures(), 32)


def test_the_same_seed_draws_the_same_episode():
    episodes = tiny().training_episodes(Pictures(), 32)
    torch.manual_seed(3)
    first = episodes[1]
    torch.manual_seed(3)
    second = episodes[1]
    assert all(torch.equal(first[name], second[name]) for name in ("image", "mask", "support", "support_mask"))


def test_crops_keep_the_object():
    torch.manual_seed(0)
    transform = EpisodeTransform(40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[:6, :6] = 1  # in a corner, which a free crop of a larger image would often lose
    item = {"image": tv_tensors.Image(torch.zeros(3, 60, 60, dtype=torch.uint8)), "mask": tv_tensors.Mask(mask)}
    kept = [int((transform(item)["mask"] == 1).sum()) for _ in range(30)]
    assert min(kept) > 0
    assert sum(kept) / len(kept) > 0.8 * 36 * (40 / 60) ** 2
