"""MEVT's formulas against the programs they come from, numbers worked by hand, and the properties of its parts."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcam.data import draw_crops, multi_crop_transform
from fastcam.data.multi_crop import shared_area
from fastcam.errors import FastcamError
from fastcam.io import load_weights, save_weights
from fastcam.methods import create_method, load_method, mevt
from fastcam.nn import ContextDecoder, create_backbone
from fastcam.nn.optim import cosine_schedule

pytest.importorskip("timm")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY = {
    "backbone": "test_convnext+context16",  # a quick encoder of four stages; PVTv2 has tests of its own
    "drop_path": 0.0,
    "view_clusters": 8,
    "region_clusters": 8,
    "prototypes": 6,
    "head_hidden": 16,
    "bottleneck": 8,
    "num_locals": 2,
    "local_size": 32,
    "dense_grid": 3,
    "warmup_epochs": 0,
    "freeze_last_epochs": 0,
    "lr": 2e-3,
    "epochs": 10,
}


def create(**changes):
    torch.manual_seed(0)
    return create_method("mevt", num_classes=3, **{**TINY, **changes})


def make_batch(images=4, crops=2, seed=0):
    torch.manual_seed(seed)
    transform = multi_crop_transform(64, 32, crops)
    items = [transform({"image": torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)}) for _ in range(images)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture
def arrays(golden):
    def load(name):
        return {k: torch.from_numpy(np.asarray(v)) for k, v in golden(name).items()}

    return load


def fit(method, batch, steps):
    ((optimizer, scheduler),) = method.optimizers(steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        scalars = method.training_step(batch)
        scalars["loss"].backward()
        optimizer.step()
        scheduler.step()
        losses.append(scalars["loss"].item())
    return losses


class TestGolden:
    def test_dino_loss_its_gradient_and_centre(self, arrays):
        a = arrays("mevt_dino_loss")
        student = a["student"].unflatten(0, (int(a["ncrops"]), -1)).requires_grad_()
        temperature = float(a["teacher_temp_schedule"][int(a["epoch"])])
        centre = a["center_before"][0]
        teacher = mevt.teacher_probabilities(a["teacher"], centre, temperature).unflatten(0, (2, -1))
        loss = mevt.view_loss(student, teacher, float(a["student_temp"]))
        loss.backward()
        torch.testing.assert_close(loss, a["loss"], **CLOSE)
        torch.testing.assert_close(student.grad.flatten(0, 1), a["grad_student"], **CLOSE)
        after = mevt.updated_centre(centre, a["teacher"], float(a["center_momentum"]))
        torch.testing.assert_close(after, a["center_after"][0], **CLOSE)

    def test_esvit_loss_its_gradients_and_centres(self, arrays):
        a = arrays("mevt_esvit_ddino_loss")
        images, n_global, n_local, views = (int(a[k]) for k in ("B", "N_global", "N_local", "ncrops"))
        temperature = float(a["teacher_temp_schedule"][int(a["epoch"])])
        leaves = {k: a[k].clone().requires_grad_() for k in ("s_cls", "s_region", "s_fea")}
        sizes = [images * n_global] * 2 + [images * n_local] * (views - 2)
        regions, tokens = (
            [x.unflatten(0, (images, -1)) for x in leaves[k].split(sizes)] for k in ("s_region", "s_fea")
        )
        t_view = mevt.teacher_probabilities(a["t_cls"], a["center_before"][0], temperature).unflatten(0, (2, images))
        t_region = mevt.teacher_probabilities(a["t_region"], a["center_grid_before"][0], temperature)
        t_region, t_tokens = (x.unflatten(0, (2, images, n_global)) for x in (t_region, a["t_fea"]))
        view = mevt.view_loss(leaves["s_cls"].unflatten(0, (views, images)), t_view)
        loss = 0.5 * view + 0.5 * mevt.region_loss(regions, tokens, t_region, t_tokens)
        loss.backward()
        torch.testing.assert_close(loss, a["loss"], **CLOSE)
        torch.testing.assert_close(leaves["s_cls"].grad, a["grad_s_cls"], **CLOSE)
        torch.testing.assert_close(leaves["s_region"].grad, a["grad_s_region"], **CLOSE)
        assert leaves["s_fea"].grad is None and not a["grad_s_fea"].any()
        for name, logits in (("center", "t_cls"), ("center_grid", "t_region")):
            after = mevt.updated_centre(a[f"{name}_before"][0], a[logits], 0.9)
            torch.testing.assert_close(after, a[f"{name}_after"][0], **CLOSE)

    def test_sinkhorn(self, arrays):
        a = arrays("mevt_sinkhorn")
        assigned = mevt.sinkhorn(a["scores"], float(a["epsilon"]), int(a["n_iters"]))
        torch.testing.assert_close(assigned, a["assignments"], **CLOSE)

    def test_roi_align_and_its_gradient(self, arrays):
        a = arrays("mevt_roi_align")
        x, side = a["x"].requires_grad_(), a["x"].shape[-1]
        boxes = torch.cat([a["boxes0"], a["boxes1"]])
        no = torch.zeros(3, dtype=torch.bool)
        y = mevt.aligned(x[torch.tensor([0, 0, 1])], boxes, no, side, int(a["output_size"]))
        torch.testing.assert_close(y, a["y"], **CLOSE)
        y.backward(a["cotangent"])
        torch.testing.assert_close(x.grad, a["grad_x"], **CLOSE)

    @pytest.mark.parametrize(("args", "expected"), [("args", "schedule"), ("args2", "schedule2")])
    def test_cosine_schedule(self, arrays, args, expected):
        a = arrays("mevt_cosine_scheduler")
        base, final, epochs, per_epoch, warmup, start = a[args].tolist()
        total = int(epochs * per_epoch)
        ours = [
            cosine_schedule(i, total, base, final, warmup=int(warmup * per_epoch), start=start) for i in range(total)
        ]
        np.testing.assert_allclose(ours, a[expected].numpy(), rtol=1e-9, atol=1e-12)


class TestFormulas:
    def test_view_loss_is_least_at_the_teachers_own_distribution(self):
        torch.manual_seed(0)
        logits = torch.randn(2, 3, 5)
        teacher = (logits / 0.1).softmax(-1)
        one = teacher[:1].expand(2, -1, -1)  # both views have one teacher
        entropy = -(teacher[0] * teacher[0].log()).sum(-1).mean()
        same = logits[:1].expand(2, -1, -1)
        torch.testing.assert_close(mevt.view_loss(same, one), entropy, **CLOSE)
        assert mevt.view_loss(logits, one) > entropy

    def test_centre_of_a_constant_output(self):
        centre, output = torch.zeros(3), torch.tensor([1.0, -2, 3])
        for _ in range(5):
            centre = mevt.updated_centre(centre, output.expand(2, 4, 3), 0.9)
        torch.testing.assert_close(centre, output * (1 - 0.9**5))

    def test_region_match_of_the_same_view_is_the_identity_and_follows_a_permutation(self):
        torch.manual_seed(0)
        tokens = torch.randn(2, 6, 9)
        assert torch.equal(mevt.region_match(tokens, tokens), torch.arange(6).expand(2, -1))
        order = torch.randperm(6)
        assert torch.equal(order[mevt.region_match(tokens, tokens[:, order])], torch.arange(6).expand(2, -1))

    def test_region_pair_loss_reads_the_matching_row(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 3, 5), torch.randn(2, 4, 5).softmax(-1)
        match = torch.tensor([[3, 0, 1], [2, 2, 0]])
        rows = torch.stack([teacher[b][match[b]] for b in range(2)])
        expected = -(rows * (student / 0.1).log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(mevt.region_pair_loss(student, teacher, match), expected, **CLOSE)

    def test_sinkhorn_properties(self):
        torch.manual_seed(0)
        scores = torch.rand(24, 4)
        assigned = mevt.sinkhorn(scores)
        torch.testing.assert_close(assigned.sum(1), torch.ones(24))
        torch.testing.assert_close(mevt.sinkhorn(scores + 7), assigned, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mevt.sinkhorn(scores, iterations=200).sum(0), torch.full((4,), 6.0), **CLOSE)
        torch.testing.assert_close(mevt.sinkhorn(torch.ones(5, 4)), torch.full((5, 4), 0.25))
        torch.testing.assert_close(mevt.sinkhorn(scores, iterations=0), (scores / 0.05).softmax(1))
        assert mevt.sinkhorn(1e4 * scores).isfinite().all()

    def test_sinkhorn_couples_the_batch_and_the_view_loss_does_not(self):
        torch.manual_seed(0)
        scores = torch.randn(8, 4)
        halves = torch.cat([mevt.sinkhorn(scores[:4]), mevt.sinkhorn(scores[4:])])
        assert not torch.allclose(mevt.sinkhorn(scores), halves, atol=1e-2)
        student, teacher = torch.randn(3, 8, 5), torch.randn(2, 8, 5).softmax(-1)
        parts = [mevt.view_loss(student[:, i : i + 4], teacher[:, i : i + 4]) for i in (0, 4)]
        torch.testing.assert_close(mevt.view_loss(student, teacher), torch.stack(parts).mean(), **CLOSE)

    def test_overlap_boxes_worked_by_hand(self):
        a, b = torch.tensor([[0.0, 0, 100, 50]]), torch.tensor([[50.0, 10, 150, 60]])
        torch.testing.assert_close(mevt.overlap_boxes(a, b, 200), torch.tensor([[100.0, 40, 200, 200]]))
        torch.testing.assert_close(mevt.overlap_boxes(b, a, 100), torch.tensor([[0.0, 0, 50, 80]]))
        flips = torch.tensor([True])
        torch.testing.assert_close(
            mevt.mirror_boxes(torch.tensor([[0.0, 0, 50, 80]]), flips, 100)[0, :1] + 0, torch.tensor([50.0])
        )

    def test_crops_of_a_ramp_agree_about_where_they_are(self):
        torch.manual_seed(0)
        height, width, side = 90, 120, 64
        image = torch.stack(torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij"))
        for _ in range(20):
            boxes = draw_crops(height, width, 0)
            flips = torch.rand(2) < 0.5
            crops = [image[None, :, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes.tolist()]
            maps = [F.interpolate(crop, (side, side), mode="bilinear", antialias=True) for crop in crops]
            maps = [x.flip(3) if flip else x for x, flip in zip(maps, flips, strict=True)]
            grids = [
                mevt.aligned(
                    maps[i], mevt.overlap_boxes(boxes[i : i + 1], boxes[1 - i : 2 - i], side), flips[i : i + 1], side, 7
                )
                for i in range(2)
            ]
            shared_w = min(boxes[:, 2]) - max(boxes[:, 0])
            shared_h = min(boxes[:, 3]) - max(boxes[:, 1])
            cell = max(float(shared_w), float(shared_h)) / 7
            assert float((grids[0] - grids[1]).abs().max()) < max(cell / 2, 2.0)

    def test_identical_crops_align_and_agree_best(self):
        torch.manual_seed(0)
        scores, box, no = (
            torch.randn(2, 6, 8, 8),
            torch.tensor([[3.0, 4, 50, 60]] * 2),
            torch.zeros(2, dtype=torch.bool),
        )
        here = mevt.overlap_boxes(box, box, 64)
        torch.testing.assert_close(here, torch.tensor([[0.0, 0, 64, 64]] * 2))
        a = mevt.aligned(scores, here, no, 64, 7)
        target = (a / 0.1).softmax(1)
        least = mevt.dense_loss(a, target)
        assert all(mevt.dense_loss(a + 0.1 * torch.randn_like(a), target) > least for _ in range(5))

    def test_cell_centres_worked_by_hand(self):
        boxes, flips = torch.tensor([[10.0, 20, 50, 40]] * 2), torch.tensor([False, True])
        centres, diagonal = mevt.cell_centres(boxes, flips, (1, 2))
        assert centres.tolist() == [[[20, 30], [40, 30]], [[40, 30], [20, 30]]]
        torch.testing.assert_close(diagonal, torch.full((2,), math.hypot(20, 20)))

    def test_pixpro_pairs_the_same_place(self):
        box, no = torch.tensor([[0.0, 0, 40, 40]]), torch.zeros(1, dtype=torch.bool)
        cells = mevt.cell_centres(box, no, (2, 2))
        x = torch.eye(4)[None]  # four cells, orthogonal features
        torch.testing.assert_close(mevt.pixpro_loss(x, x, cells, cells, 0.7), torch.tensor(-2.0), **CLOSE)
        far = mevt.cell_centres(box + 1000, no, (2, 2))
        assert mevt.pixpro_loss(x, x, cells, far, 0.7) == 0
        # within 1.1 diagonals lie all four cells; only one of each four has the same feature
        torch.testing.assert_close(mevt.pixpro_loss(x, x, cells, cells, 1.1), torch.tensor(-0.5), **CLOSE)

    def test_densecl_worked_by_hand(self):
        query, queue = torch.eye(2)[None], torch.tensor([[1.0, 0]])
        match = torch.tensor([[0, 1]])
        first = -math.log(math.exp(5) / (math.exp(5) + math.exp(5)))
        second = -math.log(math.exp(5) / (math.exp(5) + 1))
        loss = mevt.densecl_loss(query, query, match, queue, 0.2)
        torch.testing.assert_close(loss, torch.tensor((first + second) / 2), **CLOSE)

    def test_masked_loss_counts_masked_tokens_alone(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5).softmax(-1)
        masks = torch.tensor([[True, False, True], [False, False, False]])
        each = mevt.soft_cross_entropy(student, teacher, 0.1)
        torch.testing.assert_close(mevt.masked_loss(student, teacher, masks), (each[0, 0] + each[0, 2]) / 4)
        assert mevt.masked_loss(student, teacher, torch.zeros_like(masks)) == 0

    def test_block_masks_have_the_ratio_or_nothing(self):
        torch.manual_seed(0)
        masks = mevt.block_masks(200, (7, 7), 0.3, 0.5)
        counts = masks.sum((1, 2))
        assert set(counts.tolist()) == {0, 15}
        assert 60 < int((counts > 0).sum()) < 140
        assert not mevt.block_masks(3, (1, 1), 0.3, 1.0).any()

    def test_teacher_update_and_gradient_clipping(self):
        torch.manual_seed(0)
        teacher, student = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
        student.weight.data += 1
        student.running_mean += 5
        before = copy.deepcopy(teacher)
        mevt.update_teacher(teacher, student, 1.0)
        assert torch.equal(teacher.weight, before.weight) and torch.equal(teacher.running_mean, student.running_mean)
        mevt.update_teacher(teacher, student, 0.0)
        assert torch.equal(teacher.weight, student.weight)
        student.weight.grad, student.bias.grad = torch.tensor([3.0, 4, 0]), torch.tensor([0.1, 0, 0])
        mevt.clip_each(list(student.parameters()), 1.0)
        torch.testing.assert_close(student.weight.grad, torch.tensor([0.6, 0.8, 0]), **CLOSE)
        torch.testing.assert_close(student.bias.grad, torch.tensor([0.1, 0, 0]))

    def test_entropy_of_one_cluster_and_of_all(self):
        assert mevt.cluster_entropy(torch.tensor([[1.0, 0], [1, 0]])) == 0
        torch.testing.assert_close(mevt.cluster_entropy(torch.eye(4)), torch.tensor(1.0))

    def test_schedule_ends(self):
        values = [cosine_schedule(i, 50, 1.0, 0.1, warmup=10) for i in range(50)]
        assert values[0] == 0 and values[9] == values[10] == 1.0
        assert 0.1 < values[-1] < 0.11
        assert cosine_schedule(99, 50, 1.0, 0.1) == pytest.approx(0.1)


class TestCrops:
    def test_every_pair_with_a_global_crop_overlaps(self):
        torch.manual_seed(0)
        for height, width in ((60, 80), (33, 100), (7, 5), (1, 1), (3, 500)):
            for _ in range(10):
                boxes = draw_crops(height, width, 4)
                assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
                lists = boxes.tolist()
                pairs = [(i, g) for i in range(6) for g in range(2) if g < i]
                assert all(shared_area(lists[i], lists[g]) > 0 for i, g in pairs)
                if height > 30 and width <= 80:
                    shares = [shared_area(lists[i], lists[g]) / (height * width) for i, g in pairs]
                    assert min(shares) > 0.01 and shares[0] > 0.02

    def test_views_of_an_item(self):
        torch.manual_seed(0)
        item = {"image": torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), "id": "a", "mask": torch.zeros(40, 50)}
        views = multi_crop_transform(48, 24, 3, colors="dino")(item)
        assert views.keys() == {"id", "globals", "locals", "boxes", "flips"}
        assert views["globals"].shape == (2, 3, 48, 48) and views["locals"].shape == (3, 3, 24, 24)
        assert views["boxes"].shape == (5, 4) and views["flips"].dtype == torch.bool
        none = multi_crop_transform(48, 24, 0, flip=False)(item)
        assert none["locals"].shape == (0, 3, 24, 24) and not none["flips"].any()

    def test_refusals(self):
        with pytest.raises(ValueError, match="multi_crop_transform: expected sizes >= 1"):
            multi_crop_transform(0, 8, 2)
        with pytest.raises(FastcamError, match=r"no 2 overlapping crops .* 900 x 900 pixels; choose larger"):
            draw_crops(900, 900, 0, global_scale=(1e-6, 1e-6))


class TestNetwork:
    @pytest.mark.parametrize("size", [(72, 64), (33, 47)])
    def test_pvt_pyramid_has_sides_rounded_up(self, size):
        torch.manual_seed(0)
        backbone = create_backbone("pvt_v2_b0+context64", output_stride=32).eval()
        assert backbone.channels == [64] * 4 and backbone.strides == [4, 8, 16, 32]
        sides = [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert [tuple(y.shape[2:]) for y in backbone.stages(x)] == sides
            assert [tuple(y.shape[1:]) for y in backbone(x)] == [(64, *side) for side in sides]

    def test_full_size_has_the_published_number_of_parameters(self):
        with torch.device("meta"):
            decoder = ContextDecoder([64, 128, 320, 512], 256)
        assert 3.3e6 < sum(p.numel() for p in decoder.parameters()) < 3.7e6

    def test_attention_to_one_context_token_adds_one_vector_everywhere(self):
        torch.manual_seed(0)
        decoder = ContextDecoder([8, 8], 16, heads=2)
        x, context = torch.randn(2, 9, 16), torch.randn(2, 1, 16)
        added = decoder.blocks[0].attn(x, context)
        torch.testing.assert_close(added, added[:, :1].expand_as(added))

    def test_topdown_has_no_attention_but_in_the_coarsest_stage(self):
        decoder = ContextDecoder([8, 8, 8], 16, cross=False)
        assert {name.split(".")[1] for name, _ in decoder.named_parameters() if ".attn." in name} == {"2"}

    def test_head_gives_cosines_of_any_length(self):
        torch.manual_seed(0)
        head = mevt.DINOHead(12, 5, 16, 8)
        x = torch.randn(7, 8)
        assert head.cosines(x).abs().max() <= 1 + 1e-6
        torch.testing.assert_close(head.cosines(3 * x), head.cosines(x))

    def test_teacher_has_no_gradient_and_stays_in_eval_mode(self, batch):
        method = create(drop_path=0.5)
        method.train()
        assert not method.backbone.training and method.student_backbone.training
        method.training_step(batch)["loss"].backward()
        trained = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
        assert trained == {"student_backbone", "student_heads"}

    def test_teacher_follows_behind_the_step(self, batch):
        method = create(teacher_momentum=0.0)
        before = copy.deepcopy(method.backbone.state_dict())
        ((optimizer, _),) = method.optimizers(10)
        method.training_step(batch)["loss"].backward()
        assert all(torch.equal(value, before[key]) for key, value in method.backbone.state_dict().items())
        optimizer.step()
        student = method.student_backbone.state_dict()
        assert all(torch.equal(value, student[key]) for key, value in method.backbone.state_dict().items())
        assert not torch.equal(method.backbone.decoder.norm.weight, before["decoder.norm.weight"])


class TestTraining:
    def test_ten_steps_of_falling_loss(self, batch):
        method = create(teacher_momentum=1.0)  # a teacher that moves moves the loss too
        losses = fit(method, batch, 10)
        assert losses[-1] < losses[0] - 0.1
        assert all(math.isfinite(loss) for loss in losses)

    @pytest.mark.parametrize(
        "changes",
        [
            {"dense": "pixpro"},
            {"dense": "densecl", "queue": 6},
            {"dense_target": "centred"},
            {"dense_level": "E4"},
            {"backbone": "test_convnext"},
            {"backbone": "test_convnext+topdown16"},
            {"view_clusters": 0},
            {"region_clusters": 0},
            {"dense_weight": 0.0},
        ],
        ids=str,
    )
    def test_every_switch_trains(self, batch, changes):
        losses = fit(create(**changes), batch, 2)
        assert all(math.isfinite(loss) for loss in losses)

    def test_terms_that_are_off_have_no_part(self, batch):
        scalars = create(view_clusters=0, dense_weight=0.0).training_step(batch)
        assert scalars.keys() == {"loss", "loss_region", "entropy"}
        scalars = create().training_step(batch)
        assert scalars.keys() == {"loss", "loss_view", "loss_region", "loss_dense", "entropy"}
        assert "mask_token" not in create().state_dict()

    def test_dense_term_waits_for_its_epoch(self, batch):
        method = create(dense_epoch=1, epochs=2)
        ((optimizer, _),) = method.optimizers(4)
        terms = []
        for _ in range(4):
            scalars = method.training_step(batch)
            scalars["loss"].backward()
            optimizer.step()
            terms.append(scalars["loss_dense"].item())
        assert terms[:2] == [0, 0] and min(terms[2:]) > 0

    def test_clusters_are_frozen_in_the_first_epoch(self, batch):
        method = create(freeze_last_epochs=1, epochs=2)
        ((optimizer, _),) = method.optimizers(2)
        before = method.student_heads.view.last.weight.clone()
        for frozen in (True, False):
            method.training_step(batch)["loss"].backward()
            optimizer.step()
            assert torch.equal(method.student_heads.view.last.weight, before) == frozen

    def test_weight_decay_grows_and_spares_vectors(self, batch):
        method = create(weight_decay=(0.1, 0.3))
        ((optimizer, _),) = method.optimizers(10)
        fit_groups = [g["weight_decay"] for g in optimizer.param_groups]
        assert fit_groups[1] == 0
        assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
        seen = []
        for _ in range(3):
            method.training_step(batch)["loss"].backward()
            optimizer.step()
            seen.append(optimizer.param_groups[0]["weight_decay"])
        assert seen[0] == pytest.approx(0.1) and seen[0] < seen[1] < seen[2]

    def test_masked_tokens_train_their_token(self):
        torch.manual_seed(0)
        small = make_batch(images=2, crops=0)
        method = create(backbone="pvt_v2_b0", mask_weight=1.0, mask_chance=1.0, num_locals=0, dense_weight=0.0)
        scalars = method.training_step(small)
        scalars["loss"].backward()
        assert scalars["loss_mask"] > 0 and method.mask_token.grad.abs().sum() > 0
        empty = create(backbone="pvt_v2_b0", mask_weight=1.0, mask_chance=0.0, num_locals=0, dense_weight=0.0)
        assert empty.training_step(small)["loss_mask"] == 0

    def test_one_image_and_no_local_crops(self):
        method = create(num_locals=0)
        scalars = method.training_step(make_batch(images=1, crops=0))
        assert scalars["loss"].isfinite()

    def test_bfloat16_autocast(self, batch):
        method = create()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scalars = method.training_step(batch)
        assert scalars["loss"].dtype == torch.float32
        torch.testing.assert_close(scalars["loss"], create().training_step(batch)["loss"], rtol=0.1, atol=0.1)

    def test_a_batch_of_other_items_is_refused(self):
        with pytest.raises(ValueError, match=r"batch has no 'boxes'; see MEVT\.train_transform"):
            create().training_step({"globals": torch.zeros(1), "locals": torch.zeros(1), "flips": torch.zeros(1)})


class TestWeights:
    def save(self, method, path):
        record = {"method": "mevt", "num_classes": 3, "classes": list("abc"), "backbone": method.config.backbone}
        config = {k: v for k, v in TINY.items() if k != "backbone"}
        save_weights(path, method.export_state_dict(), {**record, "config": config})

    def test_loaded_weights_give_the_same_pyramid(self, batch, tmp_path):
        method = create()
        fit(method, batch, 2)
        self.save(method, tmp_path / "w.safetensors")
        assert all(k.startswith("backbone.") for k in load_weights(tmp_path / "w.safetensors")[0])
        loaded = load_method(tmp_path / "w.safetensors")
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for ours, theirs in zip(loaded.features(x), method.features(x), strict=True):
                assert torch.equal(ours, theirs)

    def test_a_state_of_training_goes_on_in_the_same_bits(self, batch):
        whole, half = create(), create()
        expected = fit(whole, batch, 4)
        ((optimizer, scheduler),) = half.optimizers(4)
        for _ in range(2):
            optimizer.zero_grad()
            half.training_step(batch)["loss"].backward()
            optimizer.step()
            scheduler.step()
        again = create(lr=2e-3)
        ((optimizer2, scheduler2),) = again.optimizers(4)
        again.load_state_dict(half.state_dict())
        optimizer2.load_state_dict(optimizer.state_dict())
        scheduler2.load_state_dict(scheduler.state_dict())
        losses = []
        for _ in range(2):
            optimizer2.zero_grad()
            scalars = again.training_step(batch)
            scalars["loss"].backward()
            optimizer2.step()
            scheduler2.step()
            losses.append(scalars["loss"].item())
        assert losses == expected[2:]
        for key, value in again.state_dict().items():
            assert torch.equal(value, whole.state_dict()[key]), key

    def test_a_segmenter_starts_from_encoder_and_decoder(self, tmp_path):
        method = create()
        self.save(method, tmp_path / "w.safetensors")
        settings = {"num_classes": 3, "output_stride": 32, "rates": (1,), "head_channels": 8, "low_level_channels": 4}
        both = create_method(
            "deeplab", backbone="test_convnext+context16", weights=tmp_path / "w.safetensors", **settings
        )
        for key, value in method.backbone.state_dict().items():
            assert torch.equal(both.backbone.state_dict()[key], value), key
        encoder = create_method("deeplab", backbone="test_convnext", weights=tmp_path / "w.safetensors", **settings)
        assert torch.equal(next(encoder.backbone.net.parameters()), next(method.backbone.net.parameters()))
        with torch.no_grad():
            assert both.eval().logits(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 64, 64)

    def test_another_decoder_is_refused(self, tmp_path):
        self.save(create(), tmp_path / "w.safetensors")
        with pytest.raises(FastcamError, match=r"hold another decoder than 'test_convnext\+context32'"):
            create_backbone("test_convnext+context32", output_stride=32, weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": "leopart"}, "dense is 'leopart', expected one of assign, pixpro, densecl"),
        ({"dense_level": "E3"}, "dense_level is 'E3'"),
        ({"colors": "grey"}, "colors is 'grey'"),
        ({"global_scale": (0.5, 0.2)}, "global_scale is"),
        ({"local_scale": (0.5,)}, "local_scale is"),
        ({"teacher_temp": (0.04, 0.0)}, "teacher_temp is"),
        ({"student_temp": 0.0}, "student_temp is 0.0, expected a positive number"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5, expected 0 to 1"),
        ({"num_locals": -1}, "num_locals is -1, expected 0 or more"),
        ({"view_clusters": 0, "region_clusters": 0, "dense_weight": 0.0}, "there is nothing to learn"),
        ({"mask_weight": 1.0, "region_clusters": 0}, "mask_weight needs the region head"),
        ({"mask_weight": 1.0}, "has no patch embedding to mask"),
        ({"backbone": "test_convnext+context12"}, "expected a width that is a multiple of 8 heads, got 12"),
        ({"temperature": 1.0}, "unknown setting 'temperature'"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(FastcamError, match=message):
        create(**changes)


def test_pvt_keeps_its_stride():
    with pytest.raises(FastcamError, match="use output_stride 32"):
        create_backbone("pvt_v2_b0", output_stride=16)
