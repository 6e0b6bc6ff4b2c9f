"""Scores of rankings against numbers worked by hand and the formulas of two protocols."""

import random

import pytest
import torch

from fastcam.metrics import bootstrap_interval, ranking_average_precision, recall_at, ukbench_hits


def compute_ap(ranked, positives, junk):
    """Oxford5k's protocol as it is written down: the trapezoid of every step, junk passed over."""
    recall, precision, area, seen, hits = 0.0, 1.0, 0.0, 0, 0
    for image in ranked:
        if image in junk:
            continue
        seen += 1
        hits += image in positives
        new_recall, new_precision = hits / len(positives), hits / seen
        area += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision = new_recall, new_precision
    return area


def holidays_ap(ranked, positives):
    """The Holidays' protocol: sum over the positives of the mean of two precisions, ranks from 0."""
    ranks = [i for i, image in enumerate(ranked) if image in positives]
    terms = [((n / r if r else 1.0) + (n + 1) / (r + 1)) / 2 for n, r in enumerate(ranks)]
    return sum(terms) / len(positives)


class TestAveragePrecision:
    @pytest.mark.parametrize(
        ("ranked", "positives", "junk", "expected"),
        [
            ("ab", "ab", "", 1.0),
            ("abcd", "a", "", 1.0),
            ("xa", "a", "", 0.25),  # precisions 0 and 1/2
            ("axb", "ab", "", (1 + (1 / 2 + 2 / 3) / 2) / 2),
            ("xyab", "ab", "", ((0 + 1 / 3) / 2 + (1 / 3 + 2 / 4) / 2) / 2),
            ("ajxjb", "ab", "j", (1 + (1 / 2 + 2 / 3) / 2) / 2),
            ("ax", "ab", "", 0.5),  # b is never found
            ("xy", "a", "", 0.0),
            ("", "a", "", 0.0),
        ],
    )
    def test_by_hand(self, ranked, positives, junk, expected):
        assert ranking_average_precision(ranked, set(positives), set(junk)) == pytest.approx(expected, abs=1e-15)

    def test_equals_both_protocols_on_random_rankings(self):
        draw = random.Random(0)
        for _ in range(50):
            images = list(range(30))
            draw.shuffle(images)
            positives, junk = set(images[: draw.randint(1, 9)]), set(images[20 : 20 + draw.randint(0, 9)])
            draw.shuffle(images)
            ap = ranking_average_precision(images, positives, junk)
            assert ap == pytest.approx(compute_ap(images, positives, junk), abs=1e-12)
            kept = [image for image in images if image not in junk]
            assert ap == pytest.approx(holidays_ap(kept, positives), abs=1e-12)

    def test_junk_changes_nothing_wherever_it_stands(self):
        plain = ranking_average_precision("xaybz", {"a", "b"})
        for place in range(6):
            ranked = [*"xaybz"[:place], "j", *"xaybz"[place:]]
            assert ranking_average_precision(ranked, {"a", "b"}, {"j"}) == plain

    def test_one_wrong_image_less_in_front_is_better(self):
        assert ranking_average_precision("xab", {"a", "b"}) > ranking_average_precision("yxab", {"a", "b"})

    def test_image_that_is_junk_and_positive_is_junk(self):
        assert ranking_average_precision("xa", {"a", "x"}, {"x"}) == 1.0

    def test_refuses_nothing_to_find_and_images_twice(self):
        with pytest.raises(ValueError, match="expected at least one positive, got none"):
            ranking_average_precision("ab", set())
        with pytest.raises(ValueError, match="expected every image once, got 'a' twice"):
            ranking_average_precision("aba", {"b"})


class TestRecall:
    def test_counts_the_first_images_that_are_not_junk(self):
        assert [recall_at("jxya", {"a"}, k, {"j"}) for k in (1, 2, 3, 9)] == [0, 0, 1, 1]
        assert recall_at("ja", {"a"}, 1, {"j"}) == 1

    def test_refuses_k_of_0_and_nothing_to_find(self):
        with pytest.raises(ValueError, match="expected k >= 1 and a positive, got k = 0 and 1 positives"):
            recall_at("a", {"a"}, 0)
        with pytest.raises(ValueError, match="got k = 1 and 0 positives"):
            recall_at("a", {"a"}, 1, {"a"})


GROUPS = {name: name[0] for name in ("a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3")}


class TestUkbench:
    def test_by_hand(self):
        rankings = {
            "a0": ["a0", "a3", "b0", "a1", "a2"],
            "b1": ["b1", "b0", "b2", "b3"],
            "b0": ["a0", "a1", "a2", "a3"],
        }
        assert ukbench_hits(rankings, GROUPS) == {"a0": 3, "b1": 4, "b0": 0}

    def test_refuses_no_query_and_unknown_images(self):
        with pytest.raises(ValueError, match="expected at least one query"):
            ukbench_hits({}, GROUPS)
        with pytest.raises(ValueError, match="expected a group for every image, got none for 'c0'"):
            ukbench_hits({"a0": ["a0", "c0"]}, GROUPS)


class TestInterval:
    def test_of_many_values_is_that_of_the_normal_distribution(self):
        values = torch.randn(400, generator=torch.Generator().manual_seed(1))
        low, high = bootstrap_interval(values)
        half = 1.96 * float(values.std()) / 20
        assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
        assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)

    def test_groups_are_drawn_whole(self):
        """Ten equal values a group are worth one value: the interval is that of the groups' means."""
        means = torch.randn(12, generator=torch.Generator().manual_seed(2))
        groups = [i // 10 for i in range(120)]
        assert bootstrap_interval(means.repeat_interleave(10), groups) == pytest.approx(bootstrap_interval(means))

    def test_is_the_same_each_time_and_a_point_for_one_group(self):
        assert bootstrap_interval([0.0, 1.0, 1.0]) == bootstrap_interval([0.0, 1.0, 1.0])
        assert bootstrap_interval([0.5]) == (0.5, 0.5)
        assert bootstrap_interval([0.0, 1.0], ["a", "a"]) == (0.5, 0.5)

    @pytest.mark.parametrize(
        ("values", "more", "message"),
        [
            ([], {}, r"expected values \(n,\) and n groups, got \(0,\) and 0 groups"),
            ([1.0, 2.0], {"groups": ["a"]}, r"got \(2,\) and 1 groups"),
            ([float("nan")], {}, "got level 0.95, 10000 draws and 1 NaN"),
            ([1.0], {"level": 1.0}, r"expected finite values, level in \(0, 1\)"),
        ],
    )
    def test_refuses(self, values, more, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(values, **more)
