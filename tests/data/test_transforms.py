import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from fastcam.data import (
    RandAugment,
    denormalize,
    eval_transform,
    multi_scale,
    segment_transform,
    train_transform,
    turn_transform,
    two_view_transform,
)
from fastcam.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomShrink


def item(height=40, width=60):
    """The image's red channel repeats the mask, so that both must stay aligned."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[height // 4 : height // 2, width // 5 : width // 2] = 200
    image = torch.stack([mask, torch.full_like(mask, 77), torch.full_like(mask, 11)])
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask), "tags": torch.ones(2), "id": "a"}


TRANSFORMS = {
    "train": train_transform(48, resize_long=(30, 90), color_jitter=None),
    "segment": segment_transform(48, scale=(0.5, 2.0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
class TestTrainTransforms:
    def test_fields_and_dtypes(self, name):
        out = TRANSFORMS[name](item())
        assert type(out["image"]) is torch.Tensor and type(out["mask"]) is torch.Tensor
        assert (out["image"].shape, out["image"].dtype) == ((3, 48, 48), torch.float32)
        assert (out["mask"].shape, out["mask"].dtype) == ((48, 48), torch.int64)
        assert (out["valid"].shape, out["valid"].dtype) == ((48, 48), torch.bool)
        assert out["tags"].tolist() == [1, 1] and out["id"] == "a"

    def test_padding_is_mean_colour_ignored_and_not_valid(self, name):
        sizes = set()
        for seed in range(30):
            torch.manual_seed(seed)
            out = TRANSFORMS[name](item())
            padded = ~out["valid"]
            assert (out["image"][:, padded] == 0).all() and (out["mask"][padded] == 255).all()
            assert (out["mask"][out["valid"]] != 255).all() and (out["image"][1][out["valid"]] != 0).all()
            rows, cols = out["valid"].any(1).sum().item(), out["valid"].any(0).sum().item()
            assert out["valid"].sum().item() == rows * cols > 0
            sizes.add((rows, cols))
        assert len(sizes) > 5 and any(48 in size for size in sizes)

    def test_image_and_mask_stay_aligned(self, name):
        for seed in range(20):
            torch.manual_seed(seed)
            out = TRANSFORMS[name](item())
            red = denormalize(out["image"])[0]
            disagree = ((red > 100) != (out["mask"] == 200)) & out["valid"]
            # bicubic and nearest may differ on the outline of the box, nowhere else
            assert disagree.sum() <= 0.6 * 2 * 4 * 48

    def test_same_seed_same_result_and_the_input_is_left_alone(self, name):
        before, source = item(), item()
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(TRANSFORMS[name](source))
        assert torch.equal(results[0]["image"], results[1]["image"])
        assert not torch.equal(results[0]["image"], results[2]["image"])
        assert source.keys() == before.keys() and torch.equal(source["image"], before["image"])

    def test_no_randomness_but_torchs(self, name):
        results = []
        for seed in (1, 2):
            np.random.seed(seed)
            torch.manual_seed(0)
            results.append(TRANSFORMS[name](item())["image"])
        assert torch.equal(*results)


def test_resize_long_reaches_both_ends_of_its_range():
    transform, longest = train_transform(200, resize_long=(30, 33)), set()
    for seed in range(40):
        torch.manual_seed(seed)
        longest.add(int(transform(item())["valid"].any(0).sum()))
    assert longest == {30, 31, 32, 33}


def test_square_gives_both_sides_one_length_and_maps_follow_the_image():
    source = item(40, 60)
    source["maps"] = tv_tensors.Mask(torch.arange(60.0).expand(2, 40, 60))
    out = train_transform(32, resize_long=(30, 30), square=True, flip=False, color_jitter=(0.4, 0.4, 0.4, 0.1))(source)
    rows, columns = out["valid"].any(1), out["valid"].any(0)
    assert (int(rows.sum()), int(columns.sum())) == (30, 30)
    assert out["maps"].dtype == torch.float32
    assert out["maps"][0][rows][:, columns][0].tolist() == list(range(0, 60, 2))
    assert out["maps"][:, ~out["valid"]].count_nonzero() == 0


def test_images_without_mask_and_without_any_augmentation():
    source = item(48, 48)
    del source["mask"]
    out = train_transform(48, resize_long=None, flip=False)(source)
    assert "mask" not in out and out["valid"].all()
    assert torch.equal(denormalize(out["image"]), source["image"].as_subclass(torch.Tensor))


def test_flip_mirrors_half_of_the_time():
    transform, source = train_transform(60, resize_long=None), item(60, 60)
    flipped = 0
    for seed in range(200):
        torch.manual_seed(seed)
        mask = transform(source)["mask"].to(torch.uint8)
        assert torch.equal(mask, source["mask"]) or torch.equal(mask, source["mask"].flip(-1))
        flipped += not torch.equal(mask, source["mask"])
    assert 70 < flipped < 130


def test_color_jitter_changes_colours_only():
    torch.manual_seed(0)
    out = train_transform(48, resize_long=None, flip=False, color_jitter=(0.4, 0.4, 0.4, 0.1))(item(48, 48))
    assert not torch.equal(denormalize(out["image"]), item(48, 48)["image"].as_subclass(torch.Tensor))
    assert torch.equal(out["mask"].to(torch.uint8), item(48, 48)["mask"])


def test_eval_transform_normalises_as_the_formula_says():
    out = eval_transform()(item())
    expected = (item()["image"].numpy() / 255 - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(
        IMAGENET_STD, (3, 1, 1)
    )
    np.testing.assert_allclose(out["image"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert out["mask"].dtype == torch.int64 and out["mask"].shape == (40, 60)


class TestMultiScale:
    def test_views_are_pillows_bicubic_resize(self):
        array = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
        views = multi_scale(torch.from_numpy(array).permute(2, 0, 1), (1.0, 0.5, 1.5, 2.0))
        assert [tuple(view.shape) for view in views] == [(3, 37, 51), (3, 18, 26), (3, 56, 76), (3, 74, 102)]
        for view in views:
            resized = np.array(Image.fromarray(array).resize(view.shape[:0:-1], Image.Resampling.BICUBIC))
            assert np.array_equal(denormalize(view).permute(1, 2, 0).numpy(), resized)

    def test_tiny_image_keeps_a_pixel(self):
        assert multi_scale(torch.zeros(3, 1, 1, dtype=torch.uint8), (0.1,))[0].shape == (3, 1, 1)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="multi_scale: expected image uint8"):
            multi_scale(torch.zeros(3, 4, 4))
        with pytest.raises(ValueError, match="multi_scale: expected positive scales"):
            multi_scale(torch.zeros(3, 4, 4, dtype=torch.uint8), (1.0, 0.0))


def test_bad_settings_name_the_transform():
    for make in (
        lambda: train_transform(0),
        lambda: train_transform(8, resize_long=(5, 4)),
        lambda: segment_transform(8, scale=(0, 1)),
    ):
        with pytest.raises(ValueError, match=r"Random\w+: expected"):
            make()


class TestTwoViews:
    def test_two_crops_of_one_size_and_the_rest_untouched(self):
        torch.manual_seed(0)
        out = two_view_transform(32)(item())
        for name in ("image", "strong"):
            assert type(out[name]) is torch.Tensor
            assert (out[name].shape, out[name].dtype) == ((3, 32, 32), torch.float32)
        assert (out["mask"].shape, out["mask"].dtype) == ((32, 32), torch.int64)
        assert out["tags"].tolist() == [1, 1] and out["id"] == "a"
        assert not torch.equal(out["image"], out["strong"])

    def test_first_view_keeps_its_colours_and_its_mask(self):
        for seed in range(10):
            torch.manual_seed(seed)
            out = two_view_transform(48)(item())
            image = denormalize(out["image"]).int()
            assert ((image[1] - 77).abs() <= 1).all() and ((image[2] - 11).abs() <= 1).all()
            assert ((image[0] > 100) != (out["mask"] == 200)).float().mean() < 0.15

    def test_same_seed_same_views(self):
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(two_view_transform(32)(item())["strong"])
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])

    def test_bad_scale_is_refused(self):
        with pytest.raises(
            ValueError, match=r"two_view_transform: expected 0 < smallest <= largest scale, got \(0, 1\)"
        ):
            two_view_transform(32, scale=(0, 1))


class TestRandAugment:
    def test_every_operation_keeps_shape_and_dtype_and_most_change_the_image(self):
        torch.manual_seed(0)
        image = tv_tensors.Image(torch.randint(20, 220, (3, 20, 30), dtype=torch.uint8))
        augment, changed = RandAugment(), 0
        for index in range(15):
            for sign in (-1.0, 1.0):
                out = augment.transform(image, {"chosen": [(index, 0.9, sign)]})
                assert (out.shape, out.dtype) == (image.shape, torch.uint8)
                changed += not torch.equal(out, image)
        assert changed >= 28

    def test_severity_by_hand(self):
        image = tv_tensors.Image(torch.full((3, 4, 4), 100, dtype=torch.uint8))
        one = lambda index, level, sign=1.0: RandAugment().transform(image, {"chosen": [(index, level, sign)]})  # noqa: E731
        assert one(2, 0.9).unique().tolist() == [155]  # inverted
        assert one(4, 0.5).unique().tolist() == [64]  # two bits
        assert one(5, 1.0).unique().tolist() == [155]  # inverted from 0 on
        assert one(6, 0.5).unique().tolist() == [155]  # 55 more where it is dark
        assert one(9, 0.5).unique().tolist() == [145]  # 1.45 times as bright
        assert one(13, 1.0)[:, 0, 0].tolist() == [124, 116, 104]  # moved 45 % to the right: the mean colour

    def test_half_of_the_operations_are_used(self):
        torch.manual_seed(0)
        image = tv_tensors.Image(torch.zeros(3, 4, 4, dtype=torch.uint8))
        drawn = [RandAugment(ops=2).make_params([image])["chosen"] for _ in range(400)]
        assert 0.45 < sum(len(chosen) for chosen in drawn) / 800 < 0.55
        assert {index for chosen in drawn for index, _, _ in chosen} == set(range(15))
        levels = torch.tensor([level for chosen in drawn for _, level, _ in chosen])
        assert 0.88 < levels.mean() < 0.92 and 0.03 < levels.std() < 0.06

    def test_bad_magnitude_is_refused(self):
        with pytest.raises(ValueError, match=r"RandAugment: expected ops >= 0 and magnitude in 0\.\.10, got 2 and 11"):
            RandAugment(magnitude=11)


class TestTurnTransform:
    def test_gives_whole_squares_whose_mask_follows_the_image(self):
        turn = turn_transform(50, shrink=(0.5, 0.9), mean=(0, 0, 0), std=(1, 1, 1))
        for seed in range(20):
            torch.manual_seed(seed)
            out = turn(item())
            assert (out["image"].shape, out["image"].dtype) == ((3, 50, 50), torch.float32)
            assert (out["mask"].shape, out["mask"].dtype) == ((50, 50), torch.int64)
            assert set(out["mask"].unique().tolist()) <= {0, 200}
            agree = ((out["image"][0] > 100 / 255) == (out["mask"] > 0)).float().mean()
            assert agree > 0.95  # bilinear against nearest at the border of the mask
            assert out["image"].min() >= 0 and out["image"].max() <= 1

    def test_a_square_image_without_turns_is_mirrored_at_most(self):
        whole = item(32, 32)
        turn = turn_transform(32, degrees=0.0, shrink=(1.0, 1.0), mean=(0, 0, 0), std=(1, 1, 1))
        kinds = set()
        for seed in range(30):
            torch.manual_seed(seed)
            out = turn(whole)["mask"]
            mask = whole["mask"].as_subclass(torch.Tensor).long()
            flips = [axes for axes in ((), (0,), (1,), (0, 1)) if torch.equal(out, mask.flip(axes))]
            assert len(flips) == 1
            kinds.add(flips[0])
        assert len(kinds) == 4
        fixed = turn_transform(32, degrees=0.0, shrink=(1.0, 1.0), flip=False)
        assert all(torch.equal(fixed(whole)["mask"], mask) for _ in range(5))

    def test_window_has_the_drawn_share_of_both_sides(self):
        for seed in range(10):
            torch.manual_seed(seed)
            out = RandomShrink(0.5, 0.75)(item(40, 60))
            height, width = out["image"].shape[-2:]
            assert 20 <= height <= 30 and 30 <= width <= 45
            assert abs(height / 40 - width / 60) < 0.03
            assert out["mask"].shape == (height, width)

    def test_bad_shares_are_refused(self):
        with pytest.raises(ValueError, match=r"RandomShrink: expected 0 < low <= high <= 1, got 0.9, 1.1"):
            RandomShrink(0.9, 1.1)
