"""Small tables for the tests of data, forecaster and report."""

import numpy as np
import pandas as pd


def hourly(rows: int = 400, series: tuple[str, ...] = ("a (°C)", "b")) -> pd.DataFrame:
    """A wide table: daily waves with noise."""
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(rows) * 2 * np.pi / 24)
    columns = {name: (i + 1) * wave + 10 * i + rng.normal(0, 0.1, rows) for i, name in enumerate(series)}
    return pd.DataFrame({"time": pd.date_range("2020-01-01", periods=rows, freq="h"), **columns})


def long(wide: pd.DataFrame) -> pd.DataFrame:
    """The same as `unique_id, ds, y`."""
    return wide.melt("time", var_name="unique_id", value_name="y").rename(columns={"time": "ds"})
