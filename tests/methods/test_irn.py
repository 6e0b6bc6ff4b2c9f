"""IRN against dense matrices over the authors' paths, loops pixel by pixel, and fields worked by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.irn import cluster_centroids, detect, refine_centroids, split_by_instance

TINY = {
    "backbone": "test_resnet",
    "edge_channels": 8,
    "displacement_channels": (8, 8, 16, 16, 16),
    "train_radius": 4,
    "pad": 16,
    "steps": 16,
}


def tiny(**config):
    torch.manual_seed(0)
    return create_method("irn", num_classes=3, **{**TINY, **config})


def batch(count=2, size=48):
    """Images with a dark left half of label 0 and a bright right half of label 2."""
    mask = torch.zeros(count, size, size, dtype=torch.int64)
    mask[:, :, size // 2 :] = 2
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"image": mask[:, None] - 1.0 + 0.1 * noise, "mask": mask}


def pointing_to(height: int, width: int, centres: list[tuple[float, float]], edge: int) -> torch.Tensor:
    """Displacements of the columns left of ``edge`` to the first centre, of the others to the second."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    to = [torch.stack([cy - y, cx - x]) for cy, cx in centres]
    return torch.where(x < edge, to[0], to[1])


def centroids_by_loops(field: np.ndarray, steps: int) -> np.ndarray:
    """Specification b.7, one pixel and one step after the other."""
    _, height, width = field.shape
    out = np.zeros((2, height, width), np.int64)
    for row in range(height):
        for column in range(width):
            y, x = np.float32(row), np.float32(column)
            for _ in range(steps):
                y0, x0, y1, x1 = math.floor(y), math.floor(x), math.ceil(y), math.ceil(x)
                wy, wx = y - y0, x - x0
                move = (
                    field[:, y0, x0] * (1 - wy) * (1 - wx)
                    + field[:, y0, x1] * (1 - wy) * wx
                    + field[:, y1, x0] * wy * (1 - wx)
                    + field[:, y1, x1] * wy * wx
                )
                y, x = np.clip(y + move[0], 0, height - 1), np.clip(x + move[1], 0, width - 1)
            out[:, row, column] = np.rint(y), np.rint(x)
    return out


class TestInstances:
    def test_without_displacement_every_pixel_stays_and_all_are_one_object(self):
        field = torch.zeros(2, 4, 5)
        centroids = refine_centroids(field)
        y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
        assert torch.equal(centroids, torch.stack([y, x]))
        assert cluster_centroids(centroids, field).unique().tolist() == [0]

    def test_field_that_points_to_two_centres_makes_two_objects(self):
        field = pointing_to(9, 20, [(4, 4), (4, 15)], edge=10)
        centroids = refine_centroids(field)
        assert centroids[:, :, :10].flatten(1).unique(dim=1).tolist() == [[4], [4]]
        assert centroids[:, :, 10:].flatten(1).unique(dim=1).tolist() == [[4], [15]]
        objects = cluster_centroids(centroids, field)
        assert objects[:, :10].unique().tolist() == [0]
        assert objects[:, 10:].unique().tolist() == [1]

    def test_positions_are_those_of_a_loop_over_pixels(self):
        torch.manual_seed(3)
        field = 1.5 * torch.randn(2, 6, 7)
        np.testing.assert_array_equal(refine_centroids(field, 12).numpy(), centroids_by_loops(field.numpy(), 12))

    def test_halves_go_to_the_even_pixel(self):
        field = torch.zeros(2, 1, 6)
        field[1, 0, 2], field[1, 0, 3] = 0.5, 0.5
        assert refine_centroids(field, 1)[1, 0].tolist() == [0, 1, 2, 4, 4, 5]

    def test_nothing_leaves_the_map(self):
        field = torch.stack([torch.full((3, 4), -9.0), torch.full((3, 4), 9.0)])
        centroids = refine_centroids(field)
        assert centroids[0].unique().tolist() == [0]
        assert centroids[1].unique().tolist() == [3]
        assert cluster_centroids(centroids, field).unique().tolist() == [0]  # large displacements: one object

    def test_one_pixel(self):
        field = torch.ones(2, 1, 1)
        assert refine_centroids(field).tolist() == [[[0]], [[0]]]

    def test_maps_are_cut_class_by_class_and_empty_ones_left_out(self):
        maps = torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 3.0, 4.0]]])
        split, classes = split_by_instance(maps, torch.tensor([[0, 0, 1]]))
        assert split.tolist() == [[[1, 2, 0]], [[0, 3, 0]], [[0, 0, 4]]]
        assert classes.tolist() == [0, 1, 1]

    def test_detections_by_hand(self):
        winner = torch.tensor([[1, 1, 0, 2], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 2]])
        scores = torch.zeros(2, 4, 4)
        scores[0, 0, 1], scores[0, 3, 0], scores[1, 0, 3], scores[1, 3, 3] = 0.5, 0.8, 0.9, 0.7
        masks, channels, values = detect(scores, winner, min_area=0.1)  # at least 1.6 of 16 pixels
        found = sorted(zip(channels.tolist(), values.tolist(), masks.flatten(1).sum(1).tolist(), strict=True))
        expected = [(0, 0.5, 2), (0, 0.8, 3), (1, 0.0, 1), (1, 0.0, 1)]
        assert found == [(k, pytest.approx(v), n) for k, v, n in expected]
        assert torch.equal(masks.any(0), winner > 0)
        assert not (masks.sum(0) > 1).any()

    def test_background_everywhere_gives_no_detection(self):
        masks, channels, values = detect(torch.rand(2, 3, 4), torch.zeros(3, 4, dtype=torch.int64))
        assert (tuple(masks.shape), len(channels), len(values)) == ((0, 3, 4), 0, 0)

    def test_two_objects_of_one_class_are_told_apart(self, monkeypatch):
        method = tiny(steps=64).eval()
        boundary = torch.zeros(1, 9, 20)
        boundary[:, :, 10] = 1
        field = pointing_to(9, 20, [(4, 4), (4, 15)], edge=10)
        monkeypatch.setattr(method, "relations", lambda images: (boundary, field[None]))
        maps = torch.zeros(2, 9, 20)
        maps[1] = 1
        masks, classes, scores = method.instances(torch.zeros(3, 36, 80), maps)
        assert classes.tolist() == [1, 1]
        assert scores.min() > 0.9
        first = masks[0] if masks[0, 0, 0] else masks[1]
        assert first[:, :36].all()
        assert not first[:, 46:].any()

    def test_no_class_or_zero_maps_give_no_objects(self):
        method = tiny().eval()
        for maps in (torch.zeros(0, 8, 8), torch.zeros(2, 8, 8)):
            masks, classes, scores = method.instances(torch.zeros(3, 30, 32), maps)
            assert (tuple(masks.shape), len(classes), len(scores)) == ((0, 30, 32), 0, 0)


class TestWalk:
    def test_equals_the_dense_matrix_over_the_authors_paths(self, golden):
        arrays = golden("irn_path_index")
        torch.manual_seed(0)
        height, width, steps, beta = 6, 7, 16, 10
        maps, boundary = torch.rand(1, 2, height, width), 0.4 * torch.rand(1, height, width)
        matrix = np.eye(height * width)
        e = boundary[0].double().numpy()
        for group in range(int(arrays["r5_n_groups"])):
            for path in arrays[f"r5_paths_g{group}"]:
                for y in range(height):
                    for x in range(width):
                        ends = [(y + dy, x + dx) for dy, dx in path]
                        if all(0 <= i < height and 0 <= j < width for i, j in ends):
                            i, j = y * width + x, ends[0][0] * width + ends[0][1]
                            matrix[i, j] = matrix[j, i] = (1 - max(e[end] for end in ends)) ** beta
        matrix /= matrix.sum(axis=0, keepdims=True)
        start = (maps * (1 - boundary[:, None]))[0].flatten(1).double().numpy()
        expected = start @ np.linalg.matrix_power(matrix, steps)
        walked = tiny(steps=steps).walk(maps, boundary)
        np.testing.assert_allclose(walked[0].flatten(1).numpy(), expected, atol=2e-4)

    def test_nothing_crosses_a_boundary(self):
        boundary = torch.zeros(1, 8, 12)
        boundary[:, :, 6] = 1
        maps = torch.zeros(1, 1, 8, 12)
        maps[..., :6] = 1
        walked = tiny(steps=256).walk(maps, boundary)
        torch.testing.assert_close(walked[..., :6], torch.ones(1, 1, 8, 6), rtol=0, atol=2e-4)
        assert walked[..., 6:].abs().max() < 2e-4


class TestRefine:
    def test_scores_have_the_size_of_the_image_and_a_largest_of_one(self):
        method = tiny().eval()
        images = torch.randn(2, 3, 33, 46)
        with torch.no_grad():
            constant = method.refine(images, torch.rand(2, 2, 9, 12), 0.25)
            own = method.refine(images, torch.rand(2, 3, 5, 6), None)
        assert constant.shape == own.shape == (2, 3, 33, 46)
        assert constant[:, 0].unique().tolist() == [0.25]
        for scores in (constant[:, 1:], own):
            torch.testing.assert_close(scores.amax(dim=(1, 2, 3)), torch.ones(2))

    def test_map_of_zeros_stays_zero(self):
        method = tiny().eval()
        with torch.no_grad():
            scores = method.refine(torch.randn(1, 3, 32, 32), torch.zeros(1, 2, 8, 8), 0.25)
        assert not scores[:, 1:].any()


class TestNetwork:
    @pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv2_035", "test_convnext"])
    @pytest.mark.parametrize("size", [(33, 47), (1, 1)])
    def test_relations_come_at_a_quarter_of_the_size(self, backbone, size):
        method = tiny(backbone=backbone).eval()
        with torch.no_grad():
            boundary, displacement = method.relations(torch.randn(2, 3, *size))
        h, w = -(-size[0] // 4), -(-size[1] // 4)
        assert boundary.shape == (2, h, w)
        assert displacement.shape == (2, 2, h, w)
        assert 0 <= boundary.min() <= boundary.max() <= 1

    def test_boundary_of_the_mirror_image_is_the_mirrored_boundary(self):
        method = tiny(pad=64).eval()
        image = torch.randn(1, 3, 40, 48)
        with torch.no_grad():
            boundary, mirrored = method.relations(image)[0], method.relations(image.flip(-1))[0]
        torch.testing.assert_close(mirrored.flip(-1), boundary)

    @pytest.mark.parametrize(("size", "padded"), [((40, 30), (64, 64)), ((70, 30), (80, 64))])
    def test_image_is_padded_below_and_to_the_right_and_never_cropped(self, size, padded, monkeypatch):
        method, seen = tiny(pad=64).eval(), []
        backbone = method.backbone.forward
        monkeypatch.setattr(method.backbone, "forward", lambda images: seen.append(images) or backbone(images))
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            method.relations(image)
        assert seen[0].shape[-2:] == padded
        assert torch.equal(seen[0][..., : size[0], : size[1]], torch.cat([image, image.flip(-1)]))
        assert not seen[0][..., size[0] :, :].any()
        assert not seen[0][..., size[1] :].any()

    def test_stem_is_pooled_as_in_a_resnet(self):
        method = tiny(backbone="resnet10t").eval()
        image = torch.randn(1, 3, 64, 64)
        net = method.backbone.net
        with torch.no_grad():
            expected = net.maxpool(net.act1(net.bn1(net.conv1(image))))
            torch.testing.assert_close(method._stages(image)[0], expected)

    def test_boundary_head_is_the_sum_of_its_levels(self):
        """Of the authors' description: 1 x 1 convolution, group norm, upsampling, ReLU; then one 1 x 1 over all."""
        method = tiny(edge_channels=32).eval()
        with torch.no_grad():
            stages = method._stages(torch.randn(1, 3, 64, 96))
            logits = method.boundary.last.bias.view(1, 1, 1)
            for i, (stage, (conv, norm)) in enumerate(zip(stages, method.boundary.levels, strict=True)):
                level = F.group_norm(F.conv2d(stage, conv.weight), 4, norm.weight, norm.bias)
                factor = stages[0].shape[-1] // level.shape[-1]
                if factor > 1:
                    level = F.interpolate(level, scale_factor=factor, mode="bilinear", align_corners=False)
                weight = method.boundary.last.weight[:, 32 * i : 32 * i + 32]
                logits = logits + F.conv2d(F.relu(level), weight)[:, 0]
            torch.testing.assert_close(method.boundary(stages), logits, rtol=1e-4, atol=1e-5)

    def test_groups_are_the_authors(self):
        method = tiny(edge_channels=32, displacement_channels=(64, 128, 256, 256, 256))
        assert [level[1].num_groups for level in method.boundary.levels] == [4] * 5
        assert [level[1].num_groups for level in method.displacement.levels] == [8, 16, 16, 16, 16]
        assert method.displacement.coarse[0].in_channels == 768
        assert method.displacement.last[0][0].in_channels == 448

    def test_mean_displacement_over_the_images_is_subtracted_but_not_in_training(self):
        method = tiny()
        images = [torch.randn(1, 3, 32, 48), torch.randn(1, 3, 40, 32)]
        method.calibrate(images)
        assert method.training
        method.eval()
        with torch.no_grad():
            means = torch.stack([method.relations(image)[1].mean(dim=(0, 2, 3)) for image in images])
            torch.testing.assert_close(means.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
            stages = method._stages(images[0])
            raw = method.train().displacement(stages)
            shifted = method.eval().displacement(stages)
        assert method.displacement.mean.abs().max() > 1e-4
        torch.testing.assert_close(raw - shifted, method.displacement.mean.view(1, 2, 1, 1).expand_as(raw))


class TestTraining:
    def test_loss_falls_over_ten_steps(self):
        method, data = tiny(lr=0.05), batch()
        (optimizer, scheduler), *others = method.optimizers(10)
        assert not others
        losses = []
        for _ in range(10):
            loss = method.training_step(data)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0]

    def test_backbone_never_learns(self):
        method = tiny()
        method.training_step(batch())["loss"].backward()
        assert all(p.grad is None for p in method.backbone.parameters())
        (optimizer, _), *_ = method.optimizers(1)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.parameters() if p.requires_grad}
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 1.0])

    def test_batch_without_labels_gives_zero_loss_and_gradient(self):
        method, data = tiny(), batch()
        data["mask"].fill_(255)
        scalars = method.training_step(data)
        scalars["loss"].backward()
        assert scalars["loss"] == 0
        assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)

    def test_bfloat16_autocast_gives_nearly_the_same_loss(self):
        method, data = tiny(), batch()
        with torch.autocast("cpu", torch.bfloat16):
            half = method.training_step(data)["loss"]
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, method.training_step(data)["loss"], rtol=0.05, atol=0)

    def test_weights_restore_boundaries_displacements_and_their_mean(self, tmp_path):
        method = tiny()
        method.calibrate([torch.randn(1, 3, 32, 32)])
        method.eval()
        record = {"method": "irn", "num_classes": 3, "classes": ["a", "b", "c"], "backbone": TINY["backbone"]}
        config = dataclasses.asdict(method.config)
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), {**record, "config": config})
        loaded = load_method(tmp_path / "w.safetensors")
        image = torch.randn(1, 3, 40, 40)
        with torch.no_grad():
            for ours, theirs in zip(method.relations(image), loaded.relations(image), strict=True):
                assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"displacement_channels": (8, 8)}, "irn: displacement_channels has 2 numbers, expected 5"),
            ({"radius": 1}, "irn: radius is 1, expected at least 2"),
            ({"steps": 0}, "irn: steps is 0, expected at least 1"),
            ({"edge_chanels": 8}, "unknown setting 'edge_chanels', did you mean 'edge_channels'"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused(self, config, message):
        with pytest.raises(FastcamError, match=message):
            tiny(**config)
