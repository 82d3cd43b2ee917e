"""The public forecasting sets: where each is published, what is in it, and how the papers read it.

Checksums are of the unpacked content. Those of ETT, Weather, Exchange, ILI and M4's hourly and weekly part were
computed from copies of the published files; those of ECL, Traffic and Solar are the ones that several independent
public projects print, those of M4's other parts the ones that one project prints beside hourly and weekly ones equal to
ours. Addresses are the ones in wide public use; none of them is asked before `selectra data get`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from selectra.errors import DataError

ETT_PAGE = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
TSL_PAGE = "https://huggingface.co/datasets/thuml/Time-Series-Library/resolve/main/"
LSTNET_PAGE = "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master/"
M4_PAGE = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset/"
LONG_HORIZONS = (96, 192, 336, 720)


@dataclass(frozen=True)
class PublicFile:
    """One published file.

    Args:
        name: What it is called on disk, unpacked.
        url: Where it is published; what ends in ".gz" is kept as it is.
        sha256: Of the unpacked content.
        size: Bytes of the unpacked content; None where not known.
    """

    name: str
    url: str
    sha256: str
    size: int | None = None

    @property
    def saved_name(self) -> str:
        """What a download is called."""
        return self.name + ".gz" if self.url.endswith(".gz") else self.name


@dataclass(frozen=True)
class PublicSet:
    """A data set in one or more files.

    Args:
        name: What a user writes; case does not matter.
        title: What it is, in a few words.
        files: Its files, in the order in which rows follow.
        rows: Rows of the regular axis; of the longest series where they differ in length.
        n_series: Number of series.
        freq: pandas' alias of the distance of rows.
        split: "ett", "ratio" or "last".
        lookback: Rows that the papers let a model see at least.
        horizons: Rows that the papers forecast.
        stamps: "order" where the file's own stamps are damaged, absent or made up.
        start: First stamp where the file has none.
        layout: "wide" with a header and dates; "bare", numbers alone; "m4", a series a row.
        licence: As its publisher states it.
        citation: The paper to name.
    """

    name: str
    title: str
    files: tuple[PublicFile, ...]
    rows: int
    n_series: int
    freq: str
    licence: str
    citation: str
    split: Literal["ett", "ratio", "last"] = "ratio"
    lookback: int = 96
    horizons: tuple[int, ...] = LONG_HORIZONS
    stamps: Literal["check", "order"] = "check"
    start: str = ""
    layout: Literal["wide", "bare", "m4"] = "wide"


def _ett(name: str, sha256: str, size: int) -> PublicSet:
    quarter = "m" in name
    return PublicSet(
        name,
        f"temperature and load of transformer {name[-1]}, " + ("every 15 minutes" if quarter else "hourly"),
        (PublicFile(f"{name}.csv", f"{ETT_PAGE}{name}.csv", sha256, size),),
        rows=69_680 if quarter else 17_420,
        n_series=7,
        freq="15min" if quarter else "h",
        split="ett",
        licence="CC BY-ND 4.0",
        citation="Zhou et al. 2021, arXiv:2012.07436",
    )


def _m4(name: str, n_series: int, rows: int, freq: str, horizon: int, *files: tuple[str, int | None]) -> PublicSet:
    parts = zip(("Train", "Test"), files, strict=True)
    called = [(f"{name}-{part.lower()}.csv", part, *file) for part, file in parts]
    return PublicSet(
        f"M4_{name}",
        f"M4 competition, {name.lower()}",
        tuple(PublicFile(file, f"{M4_PAGE}{part}/{file}", sha256, size) for file, part, sha256, size in called),
        rows=rows,
        n_series=n_series,
        freq=freq,
        split="last",
        lookback=2 * horizon,
        horizons=(horizon,),
        stamps="order",
        start="2000-01-03",
        layout="m4",
        licence="not stated; the organisers' public release",
        citation="Makridakis, Spiliotis and Assimakopoulos 2020, Int. J. Forecasting 36(1)",
    )


_SETS = (
    _ett("ETTh1", "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066", 2_589_657),
    _ett("ETTh2", "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b", 2_417_960),
    _ett("ETTm1", "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e", 10_360_719),
    _ett("ETTm2", "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd", 9_677_236),
    PublicSet(
        "Weather",
        "weather of Jena, 2020, every 10 minutes",
        (
            PublicFile(
                "weather.csv",
                f"{TSL_PAGE}weather/weather.csv",
                "34ee981d07313e51da2a50bb600072c8ae4a69cb4b0651f4cb93a069d7a2ba63",
                7_235_425,
            ),
        ),
        rows=52_696,
        n_series=21,
        freq="10min",
        # One stamp is there twice and ten are not; the papers count rows.
        stamps="order",
        licence="not stated; Max Planck Institute for Biogeochemistry, Jena",
        citation="Wu et al. 2021, arXiv:2106.13008",
    ),
    PublicSet(
        "Exchange",
        "exchange rates of eight countries, daily",
        (
            PublicFile(
                "exchange_rate.csv",
                f"{TSL_PAGE}exchange_rate/exchange_rate.csv",
                "48b4d9d3d508f5104162e85b9a6042e3557fde11aa9f2944eba8c0d0efc89842",
                637_800,
            ),
        ),
        rows=7_588,
        n_series=8,
        freq="D",
        licence="not stated",
        citation="Lai et al. 2018, arXiv:1703.07015",
    ),
    PublicSet(
        "ILI",
        "influenza-like illness in the United States, weekly",
        (
            PublicFile(
                "national_illness.csv",
                f"{TSL_PAGE}illness/national_illness.csv",
                "93601f64d2566dc796ca4305adad8b8560c2db1a1ff04543c3bd813a7263570a",
                67_620,
            ),
        ),
        rows=966,
        n_series=7,
        freq="W-TUE",
        lookback=36,
        horizons=(24, 36, 48, 60),
        licence="not stated; CDC FluView, United States government",
        citation="Wu et al. 2021, arXiv:2106.13008",
    ),
    PublicSet(
        "ECL",
        "electricity consumption of 321 clients, hourly",
        (
            PublicFile(
                "electricity.csv",
                f"{TSL_PAGE}electricity/electricity.csv",
                "7e45845d54c5219bad0ae6bc1b5316cf8ff9cead5d33fa998a5a51c2e4a497ad",
                95_581_762,
            ),
        ),
        rows=26_304,
        n_series=321,
        freq="h",
        licence="not stated; from UCI ElectricityLoadDiagrams20112014",
        citation="Lai et al. 2018, arXiv:1703.07015",
    ),
    PublicSet(
        "Traffic",
        "occupancy of San Francisco's roads, 862 sensors, hourly",
        (
            PublicFile(
                "traffic.csv",
                f"{TSL_PAGE}traffic/traffic.csv",
                "cb06463d56fa17d87f47027cd9389ceae82a69eddee51cdb61480e120dab0b16",
                136_478_119,
            ),
        ),
        rows=17_544,
        n_series=862,
        freq="h",
        licence="not stated; California Department of Transportation",
        citation="Lai et al. 2018, arXiv:1703.07015",
    ),
    PublicSet(
        "Solar",
        "solar power of 137 plants in Alabama, 2006, every 10 minutes",
        (
            PublicFile(
                "solar_AL.txt",
                f"{LSTNET_PAGE}solar-energy/solar_AL.txt.gz",
                "230327ef72d2abb387939d4a35d6fd34f1066071bc7c40ce7ecf5531a0122ac2",
                180_018_000,
            ),
        ),
        rows=52_560,
        n_series=137,
        freq="10min",
        stamps="order",
        start="2006-01-01",
        layout="bare",
        licence="not stated; National Renewable Energy Laboratory",
        citation="Lai et al. 2018, arXiv:1703.07015",
    ),
    _m4(
        "Hourly", 414, 1008, "h", 48,
        ("ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f", 2_347_115),
        ("71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42", 132_820),
    ),
    _m4(
        "Daily", 4_227, 9_933, "D", 14,
        ("78e94591c60c06309f1e544fd7b2ccba28f3616b01913dd336a1d1d98483a1ec", None),
        ("633b0815626ae266d36872c4d53e95eb93ee8d43e79587fceec519eba3e6b05e", None),
    ),
    _m4(
        "Weekly", 359, 2_610, "W-MON", 13,
        ("d478d3f6ed673e6ed3c2cb0fbed5425f72eedd51318ebebeb0b5ecfcefc37714", 4_015_067),
        ("3b2bc4be8e636e802260dcd843ca3c5da40536a1fbe1ecb3229a97dae4f44688", 44_247),
    ),
    _m4(
        "Monthly", 48_000, 2_812, "MS", 18,
        ("63aaa56198b4a22279a2fec541f56921f3bed6d8e0f84e550206df9276f2e9b9", None),
        ("5e3538bf23b4a09f4078180c3e2b34859f0382e1c4f22564affc1797e8f3f48f", None),
    ),
    _m4(
        "Quarterly", 24_000, 874, "QS-JAN", 8,
        ("4450678cd493aa965c14bde984a5b62a66d8c3b2f7af1e53779bc91ff008ccdc", None),
        ("bf1cab3b969a744c220cdc148e3829803eaa5da2754270fc4f376e775cd7d0ae", None),
    ),
    _m4(
        "Yearly", 23_000, 841, "YS-JAN", 6,
        ("6aa668d4f04654c0bf5f07b266a51c556f0df2faf4709f852653755396a249e4", None),
        ("6dc2dd45b3af320389e2d3735cb4b3cdf320b63cbcda15d1a17193ab99702306", None),
    ),
)  # fmt: skip
PUBLIC: dict[str, PublicSet] = {each.name.lower(): each for each in _SETS}
ALIASES = {"electricity": "ecl", "exchange_rate": "exchange", "national_illness": "ili", "solar_al": "solar"}


def find_public(name: str) -> PublicSet | None:
    """The set of this name, in any case and with "-" for "_"; None where there is none."""
    key = name.lower().replace("-", "_")
    return PUBLIC.get(ALIASES.get(key, key))


def public_set(name: str) -> PublicSet:
    """The set of this name.

    Raises:
        DataError: There is none; the message holds the nearest name.
    """
    found = find_public(name)
    if found is not None:
        return found
    close = difflib.get_close_matches(name.lower(), [*PUBLIC, *ALIASES], n=1)
    hint = f"did you mean {public_set(close[0]).name!r}? " if close else ""
    raise DataError(
        f"there is no public set {name!r}; {hint}There are: {', '.join(each.name for each in PUBLIC.values())}"
    )
