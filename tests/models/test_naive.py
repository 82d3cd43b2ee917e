"""Naive forecasts by hand-made windows, and what missing values do to them."""

import pytest
import torch

from selectra.errors import ConfigError
from selectra.models.naive import Naive, SeasonalNaive


def test_naive_repeats_the_last_observed_value() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[..., None]
    observed = torch.tensor([[True, True, False], [False, False, False]])[..., None]
    model = Naive(horizon=2)
    assert model(x)[..., 0].tolist() == [[3, 3], [6, 6]]
    assert model(x, observed=observed)[..., 0].tolist() == [[2, 2], [0, 0]]


def test_seasonal_naive_repeats_the_last_season() -> None:
    x = torch.arange(7.0)[None, :, None]
    assert SeasonalNaive(seq_len=7, horizon=5, season=3)(x)[0, :, 0].tolist() == [4, 5, 6, 4, 5]


def test_seasonal_naive_falls_back_by_phase_then_to_the_last_value() -> None:
    x = torch.arange(7.0)[None, :, None]
    observed = torch.tensor([True, True, True, True, False, True, False])[None, :, None]
    # Phases of the forecast are those of rows 4, 5, 6; row 1 stands for 4 and row 3 for 6.
    assert SeasonalNaive(seq_len=7, horizon=3, season=3)(x, observed=observed)[0, :, 0].tolist() == [1, 5, 3]
    observed[0, 1] = False
    assert SeasonalNaive(seq_len=7, horizon=3, season=3)(x, observed=observed)[0, :, 0].tolist() == [5, 5, 3]
    assert SeasonalNaive(seq_len=7, horizon=1, season=3)(x, observed=torch.zeros_like(observed)).item() == 0


@pytest.mark.parametrize("season", [1, 2, 5, 6, 13])
def test_seasonal_naive_is_a_shift(season: int) -> None:
    series = torch.randn(40)
    forecast = SeasonalNaive(seq_len=13, horizon=4, season=season)(series[None, :13, None])[0, :, 0]
    expected = [series[13 - season + step % season] for step in range(4)]
    assert forecast.tolist() == [float(value) for value in expected]


@pytest.mark.parametrize("model", [Naive(horizon=3), SeasonalNaive(seq_len=8, horizon=3, season=4)])
def test_what_is_masked_has_no_influence(model: torch.nn.Module) -> None:
    x, observed = torch.randn(2, 8, 3), torch.rand(2, 8, 3) > 0.4
    clean, poisoned = x.masked_fill(~observed, 0.0), x.masked_fill(~observed, float("nan"))
    assert torch.equal(model(clean, observed=observed), model(poisoned, observed=observed))


def test_a_season_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="season between 1 and the look-back of 96 rows, got 144"):
        SeasonalNaive(seq_len=96, horizon=3, season=144)
