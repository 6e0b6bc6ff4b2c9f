import math

import numpy as np
import pytest
import torch

from fastcam.io import CamSet
from fastcam.metrics import ConfusionMatrix, cam_threshold_sweep, fp_fn, iou, mean_iou, tag_average_precision


def confusion_of(pred, target, num_labels, **options):
    confusion = ConfusionMatrix(num_labels, **options)
    confusion.update(torch.tensor(pred), torch.tensor(target))
    return confusion.compute()


class TestConfusionMatrix:
    def test_counts_by_hand(self):
        counts = confusion_of([[0, 1, 1], [2, 2, 0]], [[0, 1, 2], [2, 255, 0]], 3)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [[2, 0, 0], [0, 1, 0], [0, 1, 1]]

    def test_any_shapes_add_up(self):
        generator = torch.Generator().manual_seed(0)
        pairs = [torch.randint(0, 5, (2, *shape), generator=generator) for shape in [(7,), (3, 4, 5), (0, 4), (1, 9)]]
        confusion, expected = ConfusionMatrix(5), np.zeros((5, 5), int)
        for pred, target in pairs:
            confusion.update(pred, target.to(torch.uint8))
            np.add.at(expected, (target.numpy().ravel(), pred.numpy().ravel()), 1)
        assert np.array_equal(confusion.compute().numpy(), expected)

    def test_counts_pass_32_bits(self):
        confusion = ConfusionMatrix(2)
        confusion.confusion += 2**40
        confusion.update(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
        assert confusion.compute()[0, 0].item() == 2**40 + 3

    def test_predicted_ignore_three_ways(self):
        pred, target = [0, 255, 255, 255], [0, 0, 1, 255]
        with pytest.raises(ValueError, match="expected pred from 0 to 1, got 255; choose predicted_ignore"):
            confusion_of(pred, target, 2)
        assert confusion_of(pred, target, 2, predicted_ignore="background").tolist() == [[2, 0], [1, 0]]
        assert confusion_of(pred, target, 2, predicted_ignore="skip").tolist() == [[1, 0], [0, 0]]

    @pytest.mark.parametrize(("pred", "target"), [([2], [0]), ([-1], [0]), ([0], [2]), ([0], [-1])])
    def test_labels_outside_the_range_are_refused(self, pred, target):
        with pytest.raises(ValueError, match=r"ConfusionMatrix: expected (pred|target) from 0 to 1"):
            confusion_of(pred, target, 2)

    def test_float_and_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match="one shape and integer dtypes"):
            confusion_of([0.0], [0], 2)
        with pytest.raises(ValueError, match="one shape and integer dtypes"):
            confusion_of([0, 0], [0], 2)

    def test_reset_and_sum_over_processes(self):
        confusion = ConfusionMatrix(2)
        confusion.update(torch.tensor([1]), torch.tensor([1]))
        assert confusion._reductions["confusion"](torch.stack([confusion.confusion] * 3)).tolist() == [[0, 0], [0, 3]]
        confusion.reset()
        assert confusion.confusion.sum().item() == 0


class TestIou:
    # Label 2 is absent and never predicted; label 3 is absent but predicted once.
    CONFUSION = torch.tensor([[6, 1, 0, 1], [2, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    PRESENT = (6 / 10, 4 / 7)

    def test_three_rules_for_absent_labels_by_hand(self):
        skip, zero, gt_only = (iou(self.CONFUSION, rule).tolist() for rule in ("skip", "zero", "gt_only"))
        for values in (skip, zero, gt_only):
            assert values[:2] == pytest.approx(self.PRESENT)
        assert math.isnan(skip[2]) and skip[3] == 0
        assert zero[2:] == [0, 0]
        assert math.isnan(gt_only[2]) and math.isnan(gt_only[3])

    def test_means_differ_by_rule(self):
        total = sum(self.PRESENT)
        assert mean_iou(self.CONFUSION) == pytest.approx(total / 3)
        assert mean_iou(self.CONFUSION, "zero") == pytest.approx(total / 4)
        assert mean_iou(self.CONFUSION, "gt_only") == pytest.approx(total / 2)

    def test_nothing_counted(self):
        empty = torch.zeros(3, 3, dtype=torch.int64)
        assert math.isnan(mean_iou(empty)) and mean_iou(empty, "zero") == 0

    def test_unknown_rule(self):
        with pytest.raises(ValueError, match="iou: expected absent skip, zero or gt_only"):
            iou(self.CONFUSION, "ignore")

    def test_fp_fn_and_iou_share_the_union(self):
        fp, fn = fp_fn(self.CONFUSION)
        # IRN: 1 - T / union and 1 - P / union
        assert fp[:2].tolist() == pytest.approx([1 - 8 / 10, 1 - 6 / 7])
        assert fn[:2].tolist() == pytest.approx([1 - 8 / 10, 1 - 5 / 7])
        assert (fp + fn + iou(self.CONFUSION))[[0, 1, 3]].tolist() == pytest.approx([1, 1, 1])


def sweep_by_loop(camset, target, thresholds, num_classes):
    labels = torch.cat([torch.zeros(1, dtype=torch.int64), camset.keys + 1])
    matrices = []
    for threshold in thresholds:
        confusion = ConfusionMatrix(num_classes + 1)
        confusion.update(labels[camset.scores(float(threshold)).argmax(0)], target)
        matrices.append(confusion.compute().clone())
    return torch.stack(matrices)


class TestThresholdSweep:
    @pytest.mark.parametrize("keys", [[], [2], [0, 4], [0, 1, 2, 3, 4]])
    @pytest.mark.parametrize("levels", [4, 1000])  # 4: many scores equal a threshold or each other
    def test_equals_one_argmax_a_threshold(self, keys, levels):
        generator = torch.Generator().manual_seed(levels)
        maps = torch.randint(0, levels + 1, (len(keys), 13, 11), generator=generator) / levels
        camset = CamSet(torch.tensor(keys, dtype=torch.int64), maps, None, (13, 11))
        target = torch.randint(0, 6, (13, 11), generator=generator)
        target[target.bool() & (torch.rand(13, 11, generator=generator) < 0.1)] = 255
        thresholds = [0.5, 0.0, 0.25, 0.75, 1.0, 0.3, 0.3, -1.0, 2.0]
        counts = cam_threshold_sweep(camset, target, thresholds, 5)
        assert counts.dtype == torch.int64 and torch.equal(counts, sweep_by_loop(camset, target, thresholds, 5))

    def test_resized_and_half_maps(self):
        camset = CamSet(torch.tensor([1, 3]), torch.rand(2, 5, 4).half(), torch.rand(5, 4).half(), (17, 13))
        target = torch.randint(0, 5, (17, 13), dtype=torch.uint8)
        thresholds = torch.linspace(0, 1, 41)
        counts = cam_threshold_sweep(camset, target, thresholds, 4)
        assert torch.equal(counts, sweep_by_loop(camset, target, thresholds.half(), 4))

    def test_nothing_to_count(self):
        camset = CamSet(torch.tensor([0]), torch.rand(1, 2, 2), None, (2, 2))
        assert cam_threshold_sweep(camset, torch.full((2, 2), 255), [0.1, 0.2], 1).sum().item() == 0
        assert cam_threshold_sweep(camset, torch.zeros(2, 2, dtype=torch.int64), [], 1).shape == (0, 2, 2)

    def test_bad_arguments_name_the_op(self):
        camset = CamSet(torch.tensor([3]), torch.rand(1, 2, 2), None, (2, 2))
        for target, num_classes in [
            (torch.zeros(3, 2, dtype=torch.int64), 4),
            (torch.zeros(2, 2), 4),
            (torch.full((2, 2), 5), 4),
            (torch.zeros(2, 2, dtype=torch.int64), 3),
        ]:
            with pytest.raises(ValueError, match=r"cam_(threshold_)?sweep: expected"):
                cam_threshold_sweep(camset, target, [0.5], num_classes)


def test_tag_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.3, 0.5], [0.6, 0.4, 0.5]])
    tags = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    precision = tag_average_precision(scores, tags)
    assert precision[:2].tolist() == pytest.approx([(1 / 1 + 2 / 3) / 2, 1 / 4])
    assert math.isnan(precision[2])
