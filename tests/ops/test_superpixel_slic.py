from typing import ClassVar

import numpy as np
import pytest
import torch
from op_tester import OpTester

from fastcam import superpixel_slic
from fastcam._lab import rgb_to_lab
from fastcam.ops.superpixel_slic import CANDIDATES, FWD


def pieces(labels):
    """Number of 4-connected pieces and of labels, by scikit-image."""
    from skimage.measure import label

    return label(labels.numpy(), connectivity=1, background=-1).max(), len(labels.unique())


def photo(H, W, seed=0):
    """Something with edges, shades and noise, uint8 ``(1, 3, H, W)``."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic", align_corners=False)
    blocks = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 3, generator=g), (H, W))
    return (255 * (0.5 * smooth + 0.5 * blocks) + 8 * torch.randn(1, 3, H, W, generator=g)).clamp(0, 255).byte()


class TestSuperpixelSlic(OpTester):
    op = staticmethod(superpixel_slic)
    candidates = CANDIDATES
    has_backward = False
    cases: ClassVar = [(0, 5, 4, 3), (1, 1, 1, 1), (1, 1, 23, 4), (2, 37, 50, 9), (1, 90, 121, 300), (3, 64, 48, 12)]
    small: ClassVar = (2, 24, 31, 8)

    def inputs(self, case, dtype, device):
        B, H, W, n = case
        images = torch.cat([photo(H, W, seed) for seed in range(B)]) if B else torch.zeros(0, 3, H, W)
        return (images.to(device, dtype), n), {}

    def test_every_backend_gives_the_same_labels_bit_for_bit(self, device, backend):
        g = torch.Generator().manual_seed(1)
        for H, W, n, m in (
            (1, 1, 9, 10.0),
            (50, 1, 7, 3.0),
            (61, 83, 40, 10.0),
            (40, 40, 2000, 1e-3),
            (30, 99, 5, 1e6),
        ):
            for image in (photo(H, W), torch.randint(0, 256, (1, 3, H, W), generator=g, dtype=torch.uint8)):
                for connect in (True, False):
                    options = {"compactness": m, "enforce_connectivity": connect, "iterations": 4}
                    expected = superpixel_slic(image, n, **options, backend="reference")
                    actual = superpixel_slic(image.to(device), n, **options, backend=backend)
                    assert torch.equal(actual.cpu(), expected), (H, W, n, m, connect)

    def test_with_contours_every_backend_gives_the_same_labels_bit_for_bit(self, device, backend):
        g = torch.Generator().manual_seed(3)
        for H, W, n, weight in (
            (1, 1, 3, 50.0),
            (40, 1, 6, 9.0),
            (61, 83, 40, 50.0),
            (30, 99, 5, 1e6),
            (33, 40, 300, 0.4),
        ):
            image, contour = photo(H, W), torch.rand(1, H, W, generator=g) ** 3
            options = {"contour_weight": weight, "enforce_connectivity": False, "iterations": 4}
            expected = superpixel_slic(image, n, **options, contour=contour, backend="reference")
            actual = superpixel_slic(image.to(device), n, **options, contour=contour.to(device), backend=backend)
            assert torch.equal(actual.cpu(), expected), (H, W, n, weight)

    def test_line_between_equal_colours_is_not_crossed(self, device, backend):
        """A diagonal contour on a grey image: without it superpixels are squares."""
        y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
        below = 2 * x > 3 * y + 10
        contour = (below != (2 * x > 3 * (y + 1) + 10)) | (below != (2 * (x + 1) > 3 * y + 10))
        image = torch.full((1, 3, 64, 96), 120, dtype=torch.uint8)
        spill = {}
        for name, given in (("with", contour[None].float()), ("without", None)):
            given = None if given is None else given.to(device)
            labels = superpixel_slic(image.to(device), 24, contour=given, backend=backend)[0].cpu()
            assert pieces(labels)[0] == len(labels.unique())
            sides = [labels[side].bincount(minlength=99) for side in (below & ~contour, ~below)]
            spill[name] = int(torch.minimum(*sides).sum())
        assert spill["without"] > 300
        assert spill["with"] < 0.05 * spill["without"]

    def test_contour_of_zeros_or_of_no_weight_changes_nothing(self, device, backend):
        image = photo(50, 60).to(device)
        expected = superpixel_slic(image, 20, backend=backend)
        ones = torch.ones(1, 50, 60, device=device)
        assert torch.equal(superpixel_slic(image, 20, contour=0 * ones, backend=backend), expected)
        assert torch.equal(superpixel_slic(image, 20, contour=ones, contour_weight=0, backend=backend), expected)

    def test_batch_of_contours_equals_single_ones(self, device, backend):
        image = torch.cat([photo(40, 50, seed) for seed in range(3)]).to(device)
        contour = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(5)).to(device)
        together = superpixel_slic(image, 15, contour=contour, backend=backend)
        for b in range(3):
            alone = superpixel_slic(image[b : b + 1], 15, contour=contour[b : b + 1], backend=backend)
            assert torch.equal(alone[0], together[b])

    def test_superpixels_are_connected_and_numbered_in_scan_order(self, device, backend):
        for n in (1, 6, 50, 400):
            labels = superpixel_slic(photo(70, 90).to(device), n, backend=backend)[0].cpu()
            assert labels.dtype == torch.int32
            found, names = pieces(labels)
            assert found == names == labels.max() + 1
            first = [int((labels.flatten() == s).nonzero()[0]) for s in range(names)]
            assert first == sorted(first)
            assert n < 50 or 0.7 * n <= names <= 1.3 * n

    def test_edges_of_flat_areas_are_kept(self, device, backend):
        """No superpixel crosses a step edge wherever it lies, whatever the grid."""
        image = torch.zeros(1, 3, 60, 80, dtype=torch.uint8)
        image[0, 0, :, 33:] = 200
        image[0, 1, 41:] = 255
        labels = superpixel_slic(image.to(device), 30, backend=backend)[0].cpu()
        area = 2 * (torch.arange(60)[:, None] >= 41) + (torch.arange(80) >= 33)
        for s in labels.unique():
            assert len(area[labels == s].unique()) == 1

    def test_constant_image_gives_the_grid(self, device, backend):
        image = torch.full((1, 3, 40, 60), 77, dtype=torch.uint8)
        labels = superpixel_slic(image.to(device), 6, backend=backend)[0].cpu()
        sizes = labels.flatten().bincount()
        assert len(sizes) == 6
        assert sizes.max() <= 1.4 * sizes.min()  # pixels between two centres go to the earlier one

    def test_two_colours_by_hand(self, device, backend):
        image = torch.zeros(1, 3, 1, 6, dtype=torch.uint8, device=device)
        image[..., 2:] = 255  # the grid's cells are 3 wide, the edge is at 2
        assert superpixel_slic(image, 2, compactness=1, backend=backend).tolist() == [[[0, 0, 1, 1, 1, 1]]]

    def test_small_piece_joins_the_neighbour_of_its_colour(self, device, backend):
        """A dot of a near colour inside one area, on its border to another."""
        image = torch.zeros(1, 3, 8, 16, dtype=torch.uint8, device=device)
        image[..., 8:] = 250
        image[0, :, 3, 8] = (
            20  # dark dot in the light area: a piece of one pixel unless it hangs together with the dark
        )
        image[0, :, 6, 12] = 5  # dark, alone in the light area
        labels = superpixel_slic(image, 2, backend=backend)[0]
        assert labels[3, 8] == labels[0, 0]
        assert labels[6, 12] == labels[0, 15]

    def test_more_segments_than_pixels_and_one_segment(self, device, backend):
        image = photo(5, 7).to(device)
        assert superpixel_slic(image, 65535, iterations=0, backend=backend).unique().numel() <= 35
        assert superpixel_slic(image, 1, backend=backend).unique().tolist() == [0]

    def test_floats_are_rounded_and_clipped(self, device, backend):
        image = photo(20, 30).to(device)
        odd = image.float() + 0.3
        odd[0, 0, 0, 0], image[0, 0, 0, 0] = 1e9, 255
        assert torch.equal(superpixel_slic(odd, 9, backend=backend), superpixel_slic(image, 9, backend=backend))

    def test_opcheck(self, device, backend):
        (image, n), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (image, None, n, 10.0, 50.0, 3, True, backend))
        torch.library.opcheck(FWD, (image, image[:, 0] / 255, n, 10.0, 50.0, 3, True, backend))

    def test_exceptions(self, device, backend):
        image = torch.zeros(1, 3, 4, 5, device=device)
        bad = image.clone()
        bad[0, 1, 2, 3] = torch.nan
        for match, error, arguments in (
            (r"expected image \(B, 3, H, W\), got \(3, 4, 5\)", ValueError, {"image": image[0]}),
            (r"expected image \(B, 3, H, W\), got \(1, 2, 4, 5\)", ValueError, {"image": image[:, :2]}),
            (r"expected image uint8 or floating, got int64", TypeError, {"image": image.long()}),
            (r"expected an image without NaN", ValueError, {"image": bad}),
            (r"n_segments from 1 to 65535, got 0", ValueError, {"n_segments": 0}),
            (r"n_segments from 1 to 65535, got 65536", ValueError, {"n_segments": 65536}),
            (r"expected a positive compactness, got -1", ValueError, {"compactness": -1}),
            (r"expected a positive compactness, got nan", ValueError, {"compactness": float("nan")}),
            (r"expected iterations >= 0, got -1", ValueError, {"iterations": -1}),
            (r"contour \(1, 4, 5\) for the image, got \(1, 5, 4\)", ValueError, {"contour": image[:, 0].mT}),
            (r"a floating contour, got int64", TypeError, {"contour": image[:, 0].long()}),
            (r"expected a contour without NaN", ValueError, {"contour": bad[:, 1]}),
            (r"contour_weight >= 0, got -2", ValueError, {"contour_weight": -2}),
        ):
            with pytest.raises(error, match="^superpixel_slic: .*" + match):
                superpixel_slic(**{"image": image, "n_segments": 4, **arguments}, backend=backend)


def test_lab_is_that_of_scikit_image_to_its_half_units():
    color = pytest.importorskip("skimage.color")
    g = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (1, 3, 100, 100), generator=g, dtype=torch.uint8)
    rgb[0, :, 0, :50] = torch.arange(50, dtype=torch.uint8)  # dark greys
    ours = rgb_to_lab(rgb)[0].permute(1, 2, 0).numpy() - np.array([0, 256, 256])
    theirs = 2 * color.rgb2lab(rgb[0].permute(1, 2, 0).numpy())
    assert np.abs(ours - theirs).max() < 1.5  # rounding to halves, and 13 bits of linear light
    assert np.abs(ours - theirs).mean() < 0.3


def test_superpixels_of_photographs_hold_their_objects(shared_data):
    """Better than scikit-image's SLIC at the same number asked for: boundary recall, under-segmentation error."""
    segmentation = pytest.importorskip("skimage.segmentation")
    from PIL import Image

    from fastcam.metrics.regions import boundary_recall, undersegmentation_error

    folder = shared_data / "bsds500"
    if not folder.is_dir():
        pytest.skip("no BSDS500")
    ours, theirs = [], []
    for path in sorted((folder / "images" / "test").glob("*.jpg"))[:3]:
        image = np.asarray(Image.open(path).convert("RGB"))
        truth = np.load(folder / "groundtruth" / "test" / f"{path.stem}.npz")["segmentations"][0].astype(np.int64)
        truth = torch.from_numpy(truth)
        labels = superpixel_slic(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], 300)[0]
        rival = torch.from_numpy(segmentation.slic(image, 300, compactness=10, max_num_iter=10, start_label=0))
        for scores, one in ((ours, labels), (theirs, rival)):
            scores.append((boundary_recall(one, truth), -undersegmentation_error(one, truth)))
    assert (np.mean(ours, 0) > np.mean(theirs, 0)).all()
