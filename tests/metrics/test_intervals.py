import math

import pytest
import torch

from fastcam.metrics import mean_interval


def test_by_hand():
    # deviations -2, -1, 3: the population's variance is 14 / 3
    mean, half = mean_interval([1.0, 2.0, 6.0])
    assert mean == pytest.approx(3.0)
    assert half == pytest.approx(1.96 * math.sqrt(14 / 3) / math.sqrt(3))


def test_one_value_and_equal_values_have_no_interval():
    assert mean_interval([0.3]) == (0.3, 0.0)
    assert mean_interval(torch.full((50,), 0.5)) == (0.5, 0.0)


def test_holds_the_true_mean_95_times_of_100():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        mean, half = mean_interval(torch.rand(200, generator=generator))
        hits += abs(mean - 0.5) <= half
    assert 930 <= hits <= 970


@pytest.mark.parametrize("values", [[], [[0.5]], [0.1, math.nan]])
def test_nothing_other_shapes_and_nan_are_refused(values):
    with pytest.raises(ValueError, match="mean_interval: expected 1 or more finite values"):
        mean_interval(torch.tensor(values))
