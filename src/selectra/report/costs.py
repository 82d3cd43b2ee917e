"""The report of cost curves as one page, as Markdown, as CSV and as one picture, from their record alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selectra.errors import DataError
from selectra.report.cost_plots import figure, pictures
from selectra.report.forecasting import grid
from selectra.report.read import refuse_other, whole

Row = dict[str, Any]
WHAT, FORMAT = "selectra costs", 1
MODES = {"forward": "forward pass", "step": "training step", "decode": "generated token"}
QUANTITIES = {"unit_us": "time", "unit_mj": "energy", "memory_mb": "memory"}
COLUMNS = (
    "kind", "model", "mode", "point", "batch", "parameters", "ms", "lower", "upper", "calls", "host_ms", "unit_us",
    "unit_mj", "watts", "memory_mb", "reason",
)  # fmt: skip


def read_costs(path: Path) -> Row:
    """A record of cost curves.

    Raises:
        DataError: The file is absent, damaged, of something else, or of another version.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a record of costs: {error}.") from error
    if not isinstance(content, dict) or content.get("what") != WHAT:
        raise DataError(f"'{path}' holds no cost curves; `selectra compare costs` makes them.")
    if content.get("format") != FORMAT:
        raise DataError(
            f"'{path}' has version {content.get('format')} of the records' format, and this is {FORMAT}; "
            "measure anew with this Selectra."
        )
    return content


def refuse_others(stem: Path) -> None:
    """Refuse to write the table over a file that is none of ours.

    Raises:
        DataError: STEM.csv is there and no report.
    """
    refuse_other(stem.with_name(f"{stem.name}.csv"), ",".join(COLUMNS[:4]))


def write_reports(content: Row, stem: Path) -> list[Path]:
    """Write STEM.html, STEM.md, STEM.csv and STEM.png, each whole or not at all; their paths.

    Raises:
        DataError: STEM.csv is there and no report.
    """
    refuse_others(stem)
    picture = io.BytesIO()
    figure(content).savefig(picture, format="png", dpi=120)
    texts = {
        ".html": page(content).encode(), ".md": markdown(content).encode(), ".csv": table(content).encode(),
        ".png": picture.getvalue(),
    }  # fmt: skip
    found = []
    for suffix, data in texts.items():
        path = stem.with_name(stem.name + suffix)
        with whole(path) as partial:
            partial.write_bytes(data)
        found.append(path)
    return found


def rivals_of(kind: Row) -> list[str]:
    """What Mamba is set against."""
    return [name for name in names_of(kind) if name not in kind["subjects"]]


def names_of(kind: Row) -> list[str]:
    """Models that were measured."""
    return list(dict.fromkeys(row["model"] for row in kind["rows"]))


def said(kind: Row, crossing: Row, *, short: bool = False) -> str:
    """Where one model becomes cheaper than another."""
    points = [row["point"] for row in kind["rows"] if row["mode"] == crossing["mode"] and "reason" not in row
              and row["model"] == crossing["rival"]]  # fmt: skip
    rival, point = crossing["rival"], crossing["point"]
    if point is None:
        return f"never below {rival}, up to {max(points):,}"
    if point <= min(points):
        return f"below {rival} from the smallest, {min(points):,}, on"
    return f"below {rival} from {point:,.0f} on" if short else f"below {rival} from about {point:,.0f} on"


def crossing_lines(kind: Row) -> list[str]:
    """One line for each subject, mode and quantity."""
    lines = []
    for subject in kind["subjects"]:
        for mode, called in MODES.items():
            for quantity, what in QUANTITIES.items():
                mine = [each for each in kind["crossings"] if (each["subject"], each["mode"], each["quantity"])
                        == (subject, mode, quantity)]  # fmt: skip
                if mine:
                    found = "; ".join(said(kind, each) for each in mine)
                    lines.append(f"{subject}, {called}, {what}: {found} ({kind['axis']})")
    return lines


def verdict(content: Row) -> str:
    """The first subject of each kind against its first rival, by time."""
    parts = []
    for kind in content["kinds"].values():
        if not rivals_of(kind) or not kind["crossings"]:
            continue
        subject, rival = kind["subjects"][0], rivals_of(kind)[0]
        mine = {each["mode"]: each for each in kind["crossings"]
                if (each["subject"], each["rival"], each["quantity"]) == (subject, rival, "unit_us")}  # fmt: skip
        found = "; ".join(f"{MODES[mode]} {_where(kind, each)}" for mode, each in mine.items())
        ever = any(each["point"] is not None for each in mine.values())
        parts.append(f"{kind['question']}: {'where' if ever else 'nowhere'} is {subject} faster than {rival}: {found}.")
    return " ".join(parts) or "Nothing is measured yet."


def _where(kind: Row, crossing: Row) -> str:
    text = said(kind, crossing)
    return text.removeprefix(f"below {crossing['rival']} ").replace(f"never below {crossing['rival']}", "never")


def missing(kind: Row) -> list[str]:
    """What could not be measured, and why."""
    return [f"{row['model']}, {MODES[row['mode']]} at {row['point']:,}: {row['reason']}"
            for row in kind["rows"] if "reason" in row]  # fmt: skip


def rows_of(kind: Row) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of everything."""
    head = ["model", "what", kind["axis"], "batch", "ms", "quartiles", "calls", "host, ms",
            f"us a {kind['unit']}", f"mJ a {kind['unit']}", "W", "MiB", "parameters"]  # fmt: skip
    return head, [
        [row["model"], MODES[row["mode"]], f"{row['point']:,}", str(row["batch"]), _brief(row["ms"]),
         f"{_brief(row['lower'])} to {_brief(row['upper'])}", str(row["calls"]), _brief(row["host_ms"]),
         _brief(row["unit_us"]), _brief(row["unit_mj"]), _brief(row["watts"]), _brief(row["memory_mb"]),
         f"{row['parameters']:,}"]
        for row in kind["rows"] if "reason" not in row
    ]  # fmt: skip


def _brief(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def how(content: Row, kind: Row) -> str:
    """Sizes, precision and device in one line."""
    return (
        f"{kind['params'] / 1e6:g} M parameters within 2 % (the most even width), products in {kind['precision']}, "
        f"{content['device']}"
    )


def reading(content: Row) -> list[str]:
    """What the numbers mean, and what they rest on."""
    settings, hardware = content["settings"], content["environment"]["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in content["environment"]["versions"].items() if version)
    idle = "" if content["idle_watts"] is None else f" Idle, the device takes {content['idle_watts']:.0f} W."
    return [
        "A time is the median of the times between the ends of two calls in a row, after a warm-up, with the device "
        f"never idle between them on a GPU; quartiles stand beside it. {settings['seconds for each median']:g} s of "
        "calls at the least lie behind each.",
        "Where the host's time for beginning a call is as long as the call, the host is what limits it.",
        f"Energy: {content['energy']}. It is mean power times mean time, idle power included.{idle}",
        "Memory is the most that a GPU took, weights, gradients and optimizer included; on a CPU what a forward pass "
        "keeps for its backward; for generated tokens the state of all rows.",
        f"TF32 {'on' if settings['tf32'] else 'off'}; {settings['forward and training step']}; not compiled; "
        f"generated tokens: {settings['generated tokens']}; optimizer: {settings['optimizer']}; "
        f"{settings['threads']} threads; layout: {settings['layout']}; seed {settings['seed']}.",
        "Where costs cross is read off straight lines between measured points, in logarithms; a cost counts as lower "
        "from a point on only if it stays so to the end.",
        f"{content['device']}; {hardware['processor']}, {hardware['system']}; {versions}; {content['date']}.",
        f"Made by: {content['command']}",
    ]


def page(content: Row) -> str:
    """The page as HTML: it needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("selectra", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    kinds = []
    for name, kind in content["kinds"].items():
        head, rows = rows_of(kind)
        shown = [(title, Markup(svg)) for title, svg in pictures(name, kind)]
        kinds.append({"question": kind["question"], "how": how(content, kind), "pictures": shown,
                      "crossings": crossing_lines(kind), "missing": missing(kind), "head": head, "rows": rows,
                      "sizes": sizes(kind)})  # fmt: skip
    return environment.get_template("costs.html.jinja").render(
        verdict=verdict(content), where=f"{content['device']}, {content['date']}", kinds=kinds, reading=reading(content)
    )


def sizes(kind: Row) -> list[str]:
    """What each model is."""
    return [f"{each['name']} (at {each['point']:,}): {each['parameters']:,} parameters, {json.dumps(each['spec'])}"
            for each in kind["models"]]  # fmt: skip


def markdown(content: Row) -> str:
    """The same without pictures."""
    parts = ["# What does Mamba cost beside models of the same size?", f"**{verdict(content)}**"]
    for kind in content["kinds"].values():
        head, rows = rows_of(kind)
        parts += [f"## {kind['question']}", how(content, kind) + ".", _bullets(crossing_lines(kind)), grid(head, rows)]
        parts += [_bullets(missing(kind))] if missing(kind) else []
    return "\n\n".join([*parts, "## How it was measured", _bullets(reading(content))]) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(content: Row) -> str:
    """Every row as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for name, kind in content["kinds"].items():
        writer.writerows({"kind": name, **row} for row in kind["rows"])
    return buffer.getvalue()
