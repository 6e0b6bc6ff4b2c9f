from typing import ClassVar

import numpy as np
import pytest
import torch
from op_tester import OpTester, compile_for_gpus

from fastcam import cam_sweep
from fastcam.ops.cam_sweep import CANDIDATES, FWD


def by_loop(scores, target, thresholds, num_classes, keys=None, present=None, ignore_index=255):
    """One argmax and one confusion matrix a threshold, in numpy."""
    scores, target = scores.cpu().numpy(), target.cpu().numpy().astype(np.int64)
    if present is not None:
        scores = np.where(present.cpu().numpy()[:, :, None, None], scores, scores.dtype.type(-np.inf))
    numbers = np.arange(scores.shape[1]) if keys is None else keys.cpu().numpy()
    labels = np.concatenate([[0], numbers + 1])
    counts = target != ignore_index
    matrices = np.zeros((len(thresholds), num_classes + 1, num_classes + 1), np.int64)
    for matrix, t in zip(matrices, np.asarray(thresholds, np.float64).astype(scores.dtype), strict=True):
        plane = np.full_like(scores[:, :1], t) if scores.shape[1] else np.full((len(scores), 1, *scores.shape[2:]), t)
        pred = labels[np.concatenate([plane, scores], 1).argmax(1)]
        np.add.at(matrix, (target[counts], pred[counts]), 1)
    return matrices


class TestCamSweep(OpTester):
    op = staticmethod(cam_sweep)
    candidates = CANDIDATES
    has_backward = False
    # (B, n, size, thresholds, num_classes)
    cases: ClassVar = [
        (0, 3, (4, 5), [0.5], 3),
        (1, 1, (1, 1), [0.5], 1),
        (2, 3, (17, 9), [0.3, 0.1, 0.7], 5),
        (2, 20, (131, 70), [i / 100 for i in range(100)], 20),
    ]
    small: ClassVar = (2, 3, (5, 7), [0.3, 0.1, 0.7], 4)

    def inputs(self, case, dtype, device):
        B, n, size, thresholds, num_classes = case
        g = torch.Generator().manual_seed(0)
        scores = torch.rand(B, n, *size, generator=g, dtype=torch.float64).to(device, dtype)
        target = torch.randint(0, num_classes + 1, (B, *size), generator=g).to(device)
        target[torch.rand(B, *size, generator=g) < 0.1] = 255
        return (scores, target, thresholds), {"num_classes": num_classes}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("levels", [4, 1000])  # 4: many scores equal a threshold or each other
    def test_equals_one_argmax_a_threshold_bit_for_bit(self, device, backend, dtype, levels):
        g = torch.Generator().manual_seed(levels)
        scores = (torch.randint(0, levels + 1, (2, 3, 13, 11), generator=g) / levels).to(device, dtype)
        target = torch.randint(0, 7, (2, 13, 11), generator=g, dtype=torch.uint8).to(device)
        target[:, :2] = 255
        thresholds = [0.5, 0.0, 0.25, 0.75, 1.0, 0.3, 0.3, -1.0, 2.0, 1e-7, float("inf"), float("-inf")]
        keys = torch.tensor([0, 3, 5], device=device)
        present = torch.tensor([[True, False, True], [False, False, False]], device=device)
        for options in ({"keys": keys}, {"keys": keys, "present": present}):
            counts = cam_sweep(scores, target, thresholds, num_classes=6, **options, backend=backend)
            assert counts.dtype == torch.int64
            np.testing.assert_array_equal(counts.cpu().numpy(), by_loop(scores, target, thresholds, 6, **options))

    def test_thresholds_far_apart_or_equal_are_still_exact(self, device, backend):
        g = torch.Generator().manual_seed(0)
        scores = torch.randn(1, 2, 9, 9, generator=g).to(device)
        scores[0, 0, 0, :4] = torch.tensor([3e38, -3e38, 1e-40, 0.0])
        target = torch.randint(0, 3, (1, 9, 9), generator=g).to(device)
        for thresholds in ([-3e38, 0.0, 3e38], [0.5] * 5, [0.1, 0.1 + 1e-8, 0.1 + 1e-7], [-1e-40, 0.0, 1e-40]):
            counts = cam_sweep(scores, target, thresholds, num_classes=2, backend=backend).cpu().numpy()
            np.testing.assert_array_equal(counts, by_loop(scores, target, thresholds, 2))

    def test_counts_by_hand(self, device, backend):
        scores = torch.tensor([[[[0.2, 0.6, 0.6]], [[0.3, 0.6, 0.1]]]], device=device)
        target = torch.tensor([[[2, 1, 0]]], device=device)
        counts = cam_sweep(scores, target, torch.tensor([0.6, 0.25]), num_classes=2, backend=backend)
        # at 0.6 equal scores lose; at 0.25 pixel 0 is class 2, pixel 1 ties and is class 1, pixel 2 is class 1
        assert counts.tolist() == [[[1, 0, 0], [1, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 1, 0], [0, 0, 1]]]

    def test_nan_counts_as_infinity(self, device, backend):
        scores = torch.tensor([[[[torch.nan, torch.inf]], [[2.0, 0.0]]]], device=device)
        counts = cam_sweep(
            scores, torch.ones(1, 1, 2, device=device).long(), [0.5, 9.0], num_classes=2, backend=backend
        )
        assert counts[:, 1].tolist() == [[0, 2, 0]] * 2

    def test_nothing_to_count(self, device, backend):
        scores = torch.rand(1, 2, 3, 3, device=device)
        ignored = torch.full((1, 3, 3), 255, device=device)
        assert cam_sweep(scores, ignored, [0.1, 0.2], num_classes=2, backend=backend).sum().item() == 0
        zero = torch.zeros_like(ignored)
        assert cam_sweep(scores, zero, [], num_classes=2, backend=backend).shape == (0, 3, 3)
        none = cam_sweep(scores[:, :0], zero, [-1.0], num_classes=2, backend=backend)
        assert none[0, 0].tolist() == [9, 0, 0]

    def test_rows_sum_to_true_labels_and_other_ignore_index(self, device, backend):
        (scores, target, thresholds), options = self.inputs(self.small, torch.float32, device)
        target = target.masked_fill(target == 255, -1).to(torch.int8)
        counts = cam_sweep(scores, target, thresholds, **options, ignore_index=-1, backend=backend)
        expected = [int((target == label).sum()) for label in range(5)]
        assert counts.sum(2).tolist() == [expected] * 3

    def test_opcheck(self, device, backend):
        (scores, target, _), _ = self.inputs(self.small, torch.float32, device)
        thresholds, labels = torch.tensor([0.1, 0.4], device=device), torch.arange(1, 4, device=device)
        torch.library.opcheck(FWD, (scores, target, thresholds, labels, None, 4, 255, backend))

    def test_exceptions(self, device, backend):
        a, t = torch.ones(1, 2, 3, 4, device=device), torch.zeros(1, 3, 4, dtype=torch.int64, device=device)
        mask = torch.ones(1, 3, dtype=torch.bool, device=device)
        for match, error, options in (
            (r"expected scores \(B, n, H, W\), got \(2, 3, 4\)", ValueError, {"scores": a[0]}),
            (r"expected target \(B, H, W\) = \(1, 3, 4\), got \(3, 4\)", ValueError, {"target": t[0]}),
            (r"expected target of an integer dtype, got float32", TypeError, {"target": t.float()}),
            (r"num_classes of at least 1, got 0", ValueError, {"num_classes": 0}),
            (r"expected at most 1 classes, got 2", ValueError, {"num_classes": 1}),
            (r"expected present \(B, n\) = \(1, 2\), got \(1, 3\)", ValueError, {"present": mask}),
            (r"expected present of dtype bool, got int64", TypeError, {"present": mask[:, :2].long()}),
            (r"expected keys of dtype int64, got bool", TypeError, {"keys": mask[0, :2]}),
        ):
            arguments = {"scores": a, "target": t, "thresholds": [0.5], "num_classes": 2, **options}
            with pytest.raises(error, match="^cam_sweep: .*" + match):
                cam_sweep(**arguments, backend=backend)
        if backend != "triton":
            for label in (3, -1, 254):
                with pytest.raises(ValueError, match=f"^cam_sweep: expected target from 0 to 2, got {label}"):
                    cam_sweep(a, t.index_fill(1, t[0, 0, :1], label), [0.5], num_classes=2, backend=backend)


def test_triton_kernel_compiles_for_several_gpu_generations():
    kernels = pytest.importorskip("fastcam.kernels.cam_sweep")
    for target in ("*u8", "*i64"):
        pointers = {"scores_ptr": "*bf16", "target_ptr": target, "thresholds_ptr": "*bf16", "labels_ptr": "*i64"}
        sizes = dict.fromkeys(("n", "P", "num_classes", "T", "ignore_index", "steps"), "i32")
        signature = {**pointers, "present_ptr": "*u8", "counts_ptr": "*i64", **sizes}
        compile_for_gpus(kernels._cam_sweep_kernel, signature, {"BLOCK": kernels.BLOCK})
