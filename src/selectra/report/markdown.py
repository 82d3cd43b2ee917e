"""Words and tables that the pages of a comparison share."""

from collections.abc import Iterable, Sequence
from typing import Any

NAMES = {
    "tsm2": "TSM2", "timemachine": "TimeMachine", "simba_series": "SiMBA", "s_mamba": "S-Mamba", "patchtst": "PatchTST",
    "itransformer": "iTransformer", "tsmixer": "TSMixer", "dlinear": "DLinear", "nlinear": "NLinear",
    "rlinear": "RLinear", "gru": "GRU", "linear": "linear (closed form)", "naive": "naive",
    "seasonal_naive": "seasonal naive",
}  # fmt: skip
DATA = {"etth1": "ETTh1", "etth2": "ETTh2", "ettm1": "ETTm1", "ettm2": "ETTm2", "exchange": "Exchange",
        "weather": "Weather"}  # fmt: skip
Row = dict[str, Any]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def error(value: float | None) -> str:
    """An error of standardised values, as tables print them."""
    return "-" if value is None else f"{value:.3f}"
