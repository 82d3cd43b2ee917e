"""The user's kind of data frame and types of columns, and how a result gets them back."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import narwhals as nw
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
        unit: The unit of polars' and arrow's stamps; "date" for dates.
    """

    backend: str = "pandas"
    ids: str | None = None
    zone: str | None = None
    unit: str | None = None

    def restored(self, frame: pd.DataFrame) -> Any:
        """A forecast in the user's types and kind of frame."""
        if self.ids is not None:
            frame["unique_id"] = frame["unique_id"].astype("int64").astype(self.ids)
        stamps = [name for name in STAMPS if name in frame.columns]
        if self.zone is not None:
            for name in stamps:
                frame[name] = frame[name].dt.tz_localize("UTC").dt.tz_convert(self.zone)
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


def read_frame(data: object, what: str = "df") -> tuple[pd.DataFrame, Style]:
    """A user's frame as pandas with text for names, and its style.

    Raises:
        DataError: It is no data frame, or has no rows.
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
    return frame, Style(backend, str(ids) if whole else None, None if zone is None else str(zone), unit)
