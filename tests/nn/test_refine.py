import pytest
import torch
import torch.nn.functional as F

from fastcam import pixel_refine
from fastcam.nn import Refine, affinity_labels, confident_labels, two_threshold_labels


def test_masks_are_resized_with_corners_aligned_as_the_authors(golden):
    arrays = {k: torch.from_numpy(v) for k, v in golden("pamr_forward").items()}
    out = Refine("pamr", dilations=(1, 2, 4, 8, 12, 24), iterations=10)(arrays["mask"], arrays["image"])
    torch.testing.assert_close(out, arrays["out_it10_d6"], rtol=1e-4, atol=1e-5)


def test_masks_of_the_images_size_are_the_ops():
    masks, image = torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    assert torch.equal(Refine(iterations=2)(masks, image), pixel_refine(masks, image, iterations=2))


def test_two_threshold_labels_are_the_authors(golden):
    arrays = {k: torch.from_numpy(v) for k, v in golden("par_refine_label").items()}
    _, high, low = arrays["thresholds"].tolist()
    refine = Refine(dilations=arrays["par_dilations"].tolist(), iterations=int(arrays["par_num_iter"]))
    label = two_threshold_labels(
        refine, arrays["valid_cam"], arrays["image"], arrays["cls_label"], high=high, low=low, boxes=arrays["img_box"]
    )
    expected = arrays["refined_label"].long()
    assert label.unique().tolist() == expected.unique().tolist()
    assert (label != expected).float().mean() <= 1e-3  # ties of float32 sums may fall the other way


def test_images_of_a_batch_do_not_meet_and_absent_classes_get_no_pixel():
    g = torch.Generator().manual_seed(0)
    cams, image = torch.rand(2, 3, 16, 18, generator=g), torch.rand(2, 3, 16, 18, generator=g)
    present = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    label = two_threshold_labels(Refine(), cams, image, present, high=0.5, low=0.2)
    alone = [
        two_threshold_labels(Refine(), cams[i : i + 1], image[i : i + 1], present[i : i + 1], high=0.5, low=0.2)
        for i in range(2)
    ]
    assert torch.equal(label, torch.cat(alone))
    assert set(label[0].unique().tolist()) <= {0, 1, 3, 255}
    assert set(label[1].unique().tolist()) <= {0, 2, 255}
    nothing = two_threshold_labels(Refine(), cams, image, torch.zeros(2, 3))
    assert (nothing == 0).all()


def test_affinity_labels_are_the_authors(golden):
    arrays = golden("par_refine_label")
    pairs = affinity_labels(torch.from_numpy(arrays["aff_in"]), stride=1)
    assert pairs.tolist() == arrays["aff_mask"].tolist()


def test_affinity_labels_take_the_first_pixel_of_each_cell():
    label = torch.arange(7 * 9).reshape(1, 7, 9) // 2
    coarse = F.interpolate(label[:, None, :6, :8].float(), scale_factor=0.5, mode="nearest")[:, 0].long()
    pairs = affinity_labels(label, stride=2, ignore_self=False)
    assert torch.equal(pairs, affinity_labels(coarse, stride=1, ignore_self=False))


def test_confident_labels_ignore_what_no_class_or_several_claim():
    masks = torch.tensor([[0.9, 0.7, 0.1, 0.1], [0.05, 0.7, 1.0, 0.55], [0.15, 0.0, 0.0, 0.1]]).reshape(1, 3, 1, 4)
    # thresholds: 0.63 for the background, 0.6 for class 1, 0.2 for class 2, whose maximum is 0.15
    assert confident_labels(masks).flatten().tolist() == [0, 255, 1, 255]
    absent = confident_labels(masks, torch.tensor([[False, True]]))
    assert absent.flatten().tolist() == [0, 0, 255, 255]


def test_a_pixel_at_its_threshold_is_not_claimed():
    masks = torch.tensor([[0.0, 0.0], [0.5, 0.3]]).reshape(1, 2, 1, 2)
    assert confident_labels(masks, foreground=0.6).flatten().tolist() == [1, 255]


def test_shapes_that_do_not_fit_are_refused():
    x = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"two_threshold_labels: expected cams .* got .* and \(2, 4\)"):
        two_threshold_labels(Refine(), x, x, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"confident_labels: expected masks .* got \(2, 3, 4, 5\) and \(2, 3\)"):
        confident_labels(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"affinity_labels: expected label .* got \(2, 3, 4, 5\) and 16"):
        affinity_labels(x)
