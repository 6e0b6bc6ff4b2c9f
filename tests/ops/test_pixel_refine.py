import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_tester import OpTester, compile_for_gpus

from fastcam import pixel_refine
from fastcam.ops.pixel_refine import BWD, CANDIDATES, FWD


class TestPixelRefine(OpTester):
    op = staticmethod(pixel_refine)
    candidates = CANDIDATES
    # (B, C, K, H, W, mode, dilations, iterations); dilations beyond the image, widths that are no multiple of a vector
    cases = (
        (0, 2, 3, 4, 5, "par", (1, 2), 2),
        (2, 0, 3, 4, 5, "par", (1, 2), 2),
        (1, 1, 3, 1, 1, "pamr", (1, 2, 4, 8, 12, 24), 10),
        (1, 5, 3, 3, 6, "par", (1, 2, 4, 8, 12, 24), 10),
        (2, 2, 1, 9, 11, "pamr", (3,), 0),
        (2, 3, 3, 19, 40, "par", (1, 2, 4), 3),
        (1, 9, 2, 33, 70, "pamr", (1, 2, 4, 8, 12, 24), 4),
    )
    small = (2, 2, 3, 4, 5, "par", (1, 2), 2)

    def inputs(self, case, dtype, device):
        B, C, K, H, W, mode, dilations, iterations = case
        g = torch.Generator().manual_seed(0)
        masks = torch.rand(B, C, H, W, generator=g, dtype=torch.float64)
        image = torch.rand(B, K, H, W, generator=g, dtype=torch.float64)
        options = {"mode": mode, "dilations": dilations, "iterations": iterations}
        return (masks.to(device, dtype),), {"image": image.to(device, dtype), **options}

    def pamr_arrays(self, golden, device):
        arrays = {k: torch.from_numpy(v).to(device) for k, v in golden("pamr_forward").items()}
        mask = arrays["mask"].requires_grad_()
        return arrays, mask, F.interpolate(mask, (32, 40), mode="bilinear", align_corners=True)

    @pytest.mark.parametrize(
        ("name", "dilations", "iterations"),
        [("it1_d1", [1], 1), ("it1_d1_2_4", [1, 2, 4], 1), ("it10_d6", [1, 2, 4, 8, 12, 24], 10)],
    )
    def test_pamr_equals_the_authors_arrays(self, device, backend, golden, name, dilations, iterations):
        if iterations > 1 and os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("takes the interpreter minutes")
        arrays, mask, resized = self.pamr_arrays(golden, device)
        options = {"mode": "pamr", "dilations": dilations, "iterations": iterations, "backend": backend}
        out = pixel_refine(resized, arrays["image"], **options)
        torch.testing.assert_close(out, arrays[f"out_{name}"], rtol=1e-4, atol=1e-5)
        if name != "it1_d1":
            out.backward(arrays[f"cotangent_{name}"])
            torch.testing.assert_close(mask.grad, arrays[f"grad_mask_{name}"], rtol=1e-4, atol=1e-5)

    def test_one_colour_averages_all_neighbours_alike_as_the_authors(self, device, backend, golden):
        arrays, *_ = self.pamr_arrays(golden, device)
        image = torch.full((1, 3, 8, 9), 0.3, device=device)
        out = pixel_refine(arrays["flat_mask"], image, mode="pamr", dilations=[1, 2], iterations=2, backend=backend)
        torch.testing.assert_close(out, arrays["flat_image_out"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mode", ["par", "pamr"])
    def test_equals_the_formula_at_every_pixel(self, device, backend, mode):
        dilations, H, W = (1, 3), 6, 7
        rng = np.random.default_rng(0)
        image, mask = rng.random((2, H, W)), rng.random((H, W))
        expected = np.zeros((H, W))
        offsets = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
        far = np.array([np.hypot(*o) for o in offsets])
        near = np.exp(-((far / (far.std(ddof=1) + 1e-8) / 0.3) ** 2))
        for y in range(H):
            for x in range(W):
                at = [(min(max(y + dy, 0), H - 1), min(max(x + dx, 0), W - 1)) for dy, dx in offsets]
                colours, centre = np.array([image[:, i, j] for i, j in at]), image[:, y, x]
                if mode == "pamr":
                    std = np.concatenate([colours, [centre] * len(dilations)]).std(0, ddof=1)
                    weights = np.exp((-np.abs(colours - centre) / (1e-8 + 0.1 * std)).mean(1))
                else:
                    std = colours.std(0, ddof=1)
                    weights = np.exp((-((np.abs(colours - centre) / (std + 1e-8) / 0.3) ** 2)).mean(1))
                weights = weights / weights.sum() + (0.01 * near / near.sum() if mode == "par" else 0)
                expected[y, x] = sum(w * mask[i, j] for w, (i, j) in zip(weights, at, strict=True))
        out = pixel_refine(
            torch.from_numpy(mask)[None, None].to(device, torch.float32),
            torch.from_numpy(image)[None].to(device, torch.float32),
            mode=mode, dilations=dilations, iterations=1, backend=backend,
        )  # fmt: skip
        np.testing.assert_allclose(out[0, 0].cpu().numpy(), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("mode", "factor"), [("pamr", 1.0), ("par", 1.01)])
    def test_constant_mask_is_multiplied_by_the_sum_of_the_weights(self, device, backend, mode, factor):
        _, kwargs = self.inputs((1, 1, 3, 6, 7, mode, (1, 2), 3), torch.float32, device)
        out = pixel_refine(torch.ones(1, 1, 6, 7, device=device), **kwargs, backend=backend)
        torch.testing.assert_close(out, torch.full_like(out, factor**3))

    @pytest.mark.parametrize("mode", ["par", "pamr"])
    def test_scale_and_order_of_the_colours_do_not_matter(self, device, backend, mode):
        (masks,), kwargs = self.inputs((1, 2, 3, 6, 7, mode, (1, 2), 2), torch.float32, device)
        out = pixel_refine(masks, **kwargs, backend=backend)
        kwargs["image"] = 255 * kwargs["image"].flip(1)
        torch.testing.assert_close(pixel_refine(masks, **kwargs, backend=backend), out, rtol=1e-5, atol=1e-5)

    def test_strided_image(self, device, backend):
        (masks,), kwargs = self.inputs(self.small, torch.float32, device)
        out = pixel_refine(masks, **kwargs, backend=backend)
        kwargs["image"] = kwargs["image"].to(memory_format=torch.channels_last)
        torch.testing.assert_close(pixel_refine(masks, **kwargs, backend=backend), out)

    def test_nan_in_the_image_spreads_to_its_neighbours_only(self, device, backend):
        (masks,), kwargs = self.inputs((1, 1, 3, 1, 7, "par", (1,), 1), torch.float32, device)
        kwargs["image"][0, 0, 0, 2] = torch.nan
        out = pixel_refine(masks, **kwargs, backend=backend)
        assert out.isnan().flatten().tolist() == [False, True, True, True, False, False, False]

    def test_opcheck(self, device, backend):
        (masks,), kwargs = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (masks, kwargs["image"], "par", [1, 2], 2, backend))
        torch.library.opcheck(BWD, (masks, kwargs["image"], "par", [1, 2], 2, backend))

    def test_exceptions(self, device, backend):
        m, image = torch.ones(1, 2, 4, 4, device=device), torch.ones(1, 3, 4, 4, device=device)
        with pytest.raises(ValueError, match=r"expected masks \(B, C, H, W\) and image .* got .* and \(1, 3, 4, 3\)"):
            pixel_refine(m, image[..., :3])
        with pytest.raises(ValueError, match=r"with K, H, W >= 1, got .* and \(1, 0, 4, 4\)"):
            pixel_refine(m, image[:, :0])
        with pytest.raises(ValueError, match="expected mode 'par' or 'pamr', got 'crf'"):
            pixel_refine(m, image, mode="crf")
        for dilations in ([], [1, 0]):
            with pytest.raises(ValueError, match="expected at least one dilation, each >= 1, got"):
                pixel_refine(m, image, dilations=dilations)
        with pytest.raises(ValueError, match="expected iterations >= 0, got -1"):
            pixel_refine(m, image, iterations=-1)
        with pytest.raises(TypeError, match="expected one dtype, got masks float32, image float16"):
            pixel_refine(m, image.half())


@pytest.mark.parametrize(("dtype", "mode", "C"), [("fp32", "par", 21), ("bf16", "pamr", 1)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, mode, C):
    kernels = pytest.importorskip("fastcam.kernels.pixel_refine")
    size = kernels.blocks(48, C)
    shared = {"weight_ptr": "*fp32", "offsets_ptr": "*i32", **dict.fromkeys(("H", "W", "P"), "i32")}
    compile_for_gpus(
        kernels._pixel_refine_weights_kernel,
        {"image_ptr": f"*{dtype}", "position_ptr": "*fp32", "K": "i32", **shared},
        {"PAMR": mode == "pamr", **size["weights"]},
    )
    average = {"now_ptr": "*fp32", "next_ptr": "*fp32", "C": "i32", **shared}
    compile_for_gpus(kernels._pixel_refine_average_kernel, average, size["average"])
    spread = {"grad_ptr": "*fp32", "padded_ptr": "*fp32", "C": "i32", "reach": "i32", **shared}
    compile_for_gpus(kernels._pixel_refine_spread_kernel, spread, size["average"])
