import numpy as np
import pytest
import torch

from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, save_cams


def camset(n=2, background=False, size=(8, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(n, 2, 3, generator=generator)
    return CamSet(torch.arange(n) * 3, maps, torch.rand(2, 3, generator=generator) if background else None, size)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_round_trip_in_half_precision(tmp_path, n, background):
    cams = camset(n, background)
    save_cams(tmp_path / "a.npz", cams)
    back = load_cams(tmp_path / "a.npz")
    assert back.size == cams.size and torch.equal(back.keys, cams.keys) and back.maps.dtype == torch.float32
    assert torch.equal(back.maps, cams.maps.half().float())
    if background:
        assert torch.equal(back.background, cams.background.half().float())
    else:
        assert back.background is None


def test_file_needs_no_pickle_and_is_small(tmp_path):
    cams = CamSet(torch.tensor([4]), torch.zeros(1, 94, 125), None, (375, 500))
    save_cams(tmp_path / "a.npz", cams)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["maps"].dtype == np.float16 and arrays["keys"].tolist() == [4]
    assert (tmp_path / "a.npz").stat().st_size < 94 * 125 // 4


def test_scores_interpolate_between_pixel_centres():
    cams = CamSet(torch.tensor([0]), torch.tensor([[[0.0, 1.0]]]), None, (1, 4))
    # centres of 4 pixels lie at -0.25, 0.25, 0.75, 1.25 of the 2-pixel map
    assert cams.scores(0.5).tolist() == [[[0.5] * 4], [[0.0, 0.25, 0.75, 1.0]]]


def test_stored_background_is_resized_like_the_maps():
    cams = CamSet(torch.tensor([0]), torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0, 0.0]]), (1, 4))
    assert cams.scores().tolist() == [[[1.0, 0.75, 0.25, 0.0]], [[0.0, 0.25, 0.75, 1.0]]]
    assert cams.scores(0.5)[0].tolist() == [[0.5] * 4]


def test_power_background_is_one_minus_maximum_to_alpha():
    cams = CamSet(torch.tensor([1, 2]), torch.tensor([[[0.5, 0.0]], [[0.25, 0.0]]]), None, (1, 2))
    assert cams.scores(("power", 4))[0].tolist() == [[0.0625, 1.0]]
    assert CamSet(torch.tensor([], dtype=torch.int64), torch.zeros(0, 1, 1), None, (2, 2)).scores(
        ("power", 4)
    ).tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


def test_ties_go_to_the_background():
    cams = CamSet(torch.tensor([0, 1]), torch.full((2, 1, 1), 0.5), None, (1, 1))
    assert cams.scores(0.5).argmax(0).item() == 0
    assert cams.scores(0.4).argmax(0).item() == 1


def test_scores_without_any_background_are_refused():
    with pytest.raises(ValueError, match=r"CamSet\.scores: no background is stored"):
        camset().scores()
    with pytest.raises(ValueError, match=r"CamSet\.scores: expected background a number"):
        camset().scores("power")


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": torch.tensor([0])},
        {"keys": torch.tensor([3, 0])},
        {"keys": torch.tensor([1, 1])},
        {"keys": torch.tensor([-1, 1])},
        {"keys": torch.tensor([0.0, 1.0])},
        {"maps": torch.zeros(2, 2, 3, dtype=torch.int64)},
        {"background": torch.zeros(3, 2)},
        {"size": (0, 4)},
    ],
)
def test_fields_that_do_not_fit_are_refused(fields):
    good = {"keys": torch.tensor([0, 3]), "maps": torch.zeros(2, 2, 3), "background": None, "size": (4, 6)}
    with pytest.raises(ValueError, match="CamSet: expected"):
        CamSet(**good | fields)


def test_not_finite_maps_are_not_stored(tmp_path):
    with pytest.raises(ValueError, match=r"encode_cams: maps .* not finite"):
        save_cams(tmp_path / "a.npz", CamSet(torch.tensor([0]), torch.full((1, 2, 2), torch.nan), None, (2, 2)))
    assert not list(tmp_path.iterdir())


def test_missing_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FastcamError, match="does not exist; run make-cam"):
        load_cams(path)
    save_cams(path, camset())
    good = path.read_bytes()
    for data in (b"", good[: len(good) // 2], good[:60] + b"\xff" * 30 + good[90:]):
        path.write_bytes(data)
        with pytest.raises(FastcamError, match=r"a\.npz is damaged"):
            load_cams(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(FastcamError, match="not made by make-cam"):
        load_cams(path)
    np.savez(path, keys=np.array([{}], dtype=object), maps=np.zeros((1, 2, 2)), size=np.array([2, 2]))
    with pytest.raises(FastcamError, match="not made by make-cam"):
        load_cams(path)
