"""The command that measures regions on BSDS500, on one image of it."""

import json

import pytest

from fastcam.bench import _region_quality as quality


def test_merged_regions_beat_their_superpixels_and_kept_scores_are_not_made_again(
    shared_data, tmp_path, capsys, monkeypatch
):
    root = shared_data / "bsds500"
    if not root.is_dir():
        pytest.skip("no BSDS500")
    few = {"superpixels": quality.superpixels, "adaptive": quality.ours()}
    monkeypatch.setattr(quality, "METHODS", few)
    monkeypatch.setattr(quality, "LEVELS", (1.2, 0.9))
    arguments = [str(root), "--images", "1", "--keep", str(tmp_path)]
    quality.main(arguments)
    printed = capsys.readouterr().out
    (kept,) = tmp_path.glob("*.json")
    scores = json.loads(kept.read_text())
    assert [len(scores[name]) for name in few] == [1, 2]
    before, after = (quality.row([scores[name]]) for name in few)
    covering, rand, voi, boundary = 0, 3, 5, 7
    assert after[covering] > 2 * before[covering]
    assert after[rand] > before[rand]
    assert after[voi] < before[voi]
    assert after[boundary] > before[boundary]
    assert f"| adaptive | {scores['adaptive'][0]['regions']} to " in printed

    monkeypatch.setattr(quality, "METHODS", dict.fromkeys(few))
    quality.main(arguments)
    assert capsys.readouterr().out == printed


def test_row_by_hand():
    """Two images at two scales: ODS takes one scale for both, OIS the best of each, best that of every region."""

    def scale(rand, voi, best, boundary):
        return {"rand": rand, "voi": voi, "best": best, "area": [10, 30], "boundary": boundary, "regions": 2}

    images = [
        [scale(0.9, 1.0, [1.0, 0.5], [5, 10, 5, 10]), scale(0.5, 3.0, [0.0, 0.9], [0, 10, 0, 10])],
        [scale(0.6, 2.0, [0.2, 0.2], [0, 10, 0, 10]), scale(0.8, 1.5, [0.5, 0.5], [10, 10, 10, 10])],
    ]
    # Coverings of the first image 25 and 27 of 40 pixels, of the second 8 and 20.
    expected = [(27 + 20) / 80, (27 + 20) / 80, (10 + 27 + 20) / 80, 0.75, 0.85, 1.5, 1.25, 0.5, 0.75]
    assert quality.row(images) == pytest.approx(expected)
