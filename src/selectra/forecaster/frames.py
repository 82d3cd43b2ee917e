"""The user's kind of data frame and types of columns, and how a result gets them back."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import narwhals as nw
import numpy as np
import pandas as pd

from selectra.data.table import to_pandas
from selectra.errors import ConfigError, DataError

STAMPS = ("ds", "cutoff")


@dataclass(frozen=True)
class Style:
    """What the user's frame is, in words that JSON holds.

    Args:
        backend: The library, such as "pandas" or "polars".
        ids: The type of `unique_id` where it is a whole number, which tables hold as text.
        zone: The zone of the stamps, which tables hold in UTC.
        local: Whether tables hold them in the zone's own time instead: where all are midnights there, as those of days
            and months are, which last 23 or 25 hours twice a year.
        unit: The unit of polars' and arrow's stamps; "date" for dates.
    """

    backend: str = "pandas"
    ids: str | None = None
    zone: str | None = None
    local: bool = False
    unit: str | None = None

    def restored(self, frame: pd.DataFrame) -> Any:
        """A forecast in the user's types and kind of frame."""
        if self.ids is not None:
            frame["unique_id"] = frame["unique_id"].astype("int64").astype(self.ids)
        stamps = [name for name in STAMPS if name in frame.columns]
        if self.zone is not None:
            for name in stamps:
                frame[name] = _in_zone(frame[name], self.zone, self.local)
        if self.backend == "pandas":
            return frame
        try:
            native = nw.from_arrow(nw.from_native(frame).to_arrow(), backend=self.backend)
        except (ImportError, ModuleNotFoundError) as error:
            raise ConfigError(f"the frame came from {self.backend}, which is not installed here: {error}") from error
        if self.unit is not None:
            wanted = nw.Date() if self.unit == "date" else nw.Datetime(self.unit, self.zone)
            native = native.with_columns(nw.col(*stamps).cast(wanted))
        return native.to_native()


def _in_zone(stamps: pd.Series, zone: str, local: bool) -> pd.Series:
    """A table's stamps in the user's zone."""
    if not local:
        return stamps.dt.tz_localize("UTC").dt.tz_convert(zone)
    # Clocks go on at midnight in some zones; where they go back, the first of both midnights begins the day.
    return stamps.dt.tz_localize(zone, ambiguous=np.ones(len(stamps), dtype=bool), nonexistent="shift_forward")


def read_frame(data: object, what: str = "df", like: Style | None = None) -> tuple[pd.DataFrame, Style]:
    """A user's frame as pandas with text for names, and its style.

    Args:
        like: The style of an earlier frame, whose stamps these go on with.

    Raises:
        DataError: It is no data frame, has no rows, or only one of both has stamps with a zone.
    """
    try:
        frame = to_pandas(data)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    frame.columns = [str(name) for name in frame.columns]
    dtypes = dict(zip(frame.columns, frame.dtypes, strict=True))
    ids, time = dtypes.get("unique_id"), dtypes.get("ds", dtypes.get("date", dtypes.get("time")))
    zone = getattr(time, "tz", None)
    if zone is None:
        zone = next((tz for each in dtypes.values() if (tz := getattr(each, "tz", None)) is not None), None)
    if like is not None and (zone is None) != (like.zone is None):
        seen, here = (like.zone, "none") if zone is None else ("none", zone)
        raise DataError(
            f"{what}: stamps have the zone {here}, and those of fit {seen}; give both the same with "
            "Series.dt.tz_localize or tz_convert."
        )
    local = zone is not None and (_are_days(frame, str(zone)) if like is None else like.local)
    if local:
        at = str(zone) if like is None else str(like.zone)
        for name in _zoned(frame):
            frame[name] = frame[name].dt.tz_convert(at).dt.tz_localize(None)
    whole = ids is not None and pd.api.types.is_integer_dtype(ids)
    backend, unit = "pandas", None
    if not isinstance(data, pd.DataFrame):
        native = nw.from_native(data, eager_only=True)
        backend = native.implementation.value
        for dtype in native.schema.values():
            if isinstance(dtype, nw.Datetime):
                unit = dtype.time_unit
            elif isinstance(dtype, nw.Date):
                unit = "date"
    return frame, Style(backend, str(ids) if whole else None, None if zone is None else str(zone), local, unit)


def _zoned(frame: pd.DataFrame) -> list[str]:
    """Columns of stamps with a zone."""
    return [name for name in frame.columns if isinstance(frame[name].dtype, pd.DatetimeTZDtype)]


def _are_days(frame: pd.DataFrame, zone: str) -> bool:
    """Whether all stamps are the beginnings of days."""
    stamps = [frame[name].dropna().dt.tz_convert(zone) for name in _zoned(frame)]
    return bool(stamps) and all(len(each) > 0 and (each == each.dt.normalize()).all() for each in stamps)
