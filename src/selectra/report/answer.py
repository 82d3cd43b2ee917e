"""`docs/answer.md`: is Mamba useful? Every claim with the record that it rests on; nothing is computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selectra.report.forecasting import grid
from selectra.report.read import whole

Row = dict[str, Any]
TITLE = "Should I use Mamba?"
HEADINGS = {"wins": "Where Mamba wins", "loses": "Where Mamba loses", "level": "Where no difference is shown"}
MODES = {"forward": "forward pass", "step": "training step", "decode": "generated token"}
PICTURE = (
    "![Every comparison with its interval](answer.png)\n\n"
    "*Every comparison, in per cent of the rival's score, with its 95 % interval. Grey is not told from chance after "
    "correction for several rivals.*"
)
QUANTITIES = {"unit_us": "time", "unit_mj": "energy", "memory_mb": "memory"}


def page(content: Row, records: str) -> str:
    """The whole page.

    Args:
        content: What `compare.answer.collect` found.
        records: The folder of records as the page's links see it.
    """
    parts = [
        f"# {TITLE}",
        f"**{content['verdict']}**",
        "This page is made by `selectra report results --out docs/answer.md` from the records beside each claim, and "
        "from nothing else. For your own data ask `selectra compare forecasting my.csv` or `selectra compare vision "
        "folder/`, and open the page that it writes.",
    ]
    if content["table"]:
        parts.insert(2, table(content))
    if content["points"]:
        parts.append(PICTURE)
    for outcome, heading in HEADINGS.items():
        mine = [claim for claim in content["claims"] if claim["outcome"] == outcome]
        parts += [
            f"## {heading}",
            _bullets(f"{each['text']} {links(each, records)}" for each in mine) or "Nowhere yet.",
        ]
    parts += ["## The speed question", *_speed(content, records)]
    parts += ["## What its parts are worth", *_parts(content, records)]
    if content["unfinished"]:
        parts += ["## What is not finished yet", _bullets(_unfinished(each, records) for each in content["unfinished"])]
    parts += ["## What has no record yet",
              _bullets(f"{each['question']}: no record yet; made by `{each['command']}`" for each in content["missing"])
              or "Nothing."]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def table(content: Row) -> str:
    """Every Mamba model of every comparison in a line: whom it beats, is level with, loses to."""
    rows = [[each["what"], each["mamba"], *(", ".join(each[key]) or "-" for key in ("wins", "level", "loses"))]
            for each in content["table"]]  # fmt: skip
    text = grid(["data", "Mamba as", "better than", "not told apart from", "worse than"], rows)
    # Words, not numbers.
    return text.replace("---:", "---")


def links(each: Row, records: str) -> str:
    """The records behind a claim."""
    return "(" + ", ".join(f"[record]({records}/{name})" for name in each["records"]) + ")"


def _speed(content: Row, records: str) -> list[str]:
    parts = []
    for question in dict.fromkeys(each["question"] for each in content["speed"]):
        mine = [each for each in content["speed"] if each["question"] == question]
        first = mine[0]
        parts.append(f"### {question}")
        parts.append(f"{first['params'] / 1e6:g} M parameters each, {first['device']} {links(first, records)}. From "
                     f"where on {first['subject']} costs less ({first['axis']}):")  # fmt: skip
        rivals = list(dict.fromkeys(each["rival"] for each in mine))
        rows = []
        for mode, called in MODES.items():
            for quantity, what in QUANTITIES.items():
                cells = {each["rival"]: _where(each) for each in mine
                         if (each["mode"], each["quantity"]) == (mode, quantity)}  # fmt: skip
                if cells:
                    rows.append([f"{called}, {what}", *(cells.get(rival, "-") for rival in rivals)])
        parts.append(grid(["", *(f"than {rival}" for rival in rivals)], rows))
    if content["kernels"]:
        parts.append("### Kernels alone, one attention layer against two scans of equal parameters")
        parts.append(_bullets(f"{each['text']} {links(each, records)}" for each in content["kernels"]))
    return parts or ["No record yet."]


def _where(each: Row) -> str:
    if each["point"] is None:
        return f"never (to {each['most']:,})"
    return "everywhere measured" if each["point"] <= each["least"] else f"{each['point']:,.0f}"


def _parts(content: Row, records: str) -> list[str]:
    parts = []
    for each in content["parts"]:
        parts.append(f"### {each['question']}")
        parts.append(f"**{each['text']}** {each['trainings']} scored trainings {links(each, records)}")
        rows = [[row["base"], row["variant"], "-" if row["mean"] is None else f"{row['mean']:.4f}",
                 "-" if row["spread"] is None else f"{row['spread']:.4f}", str(row["seeds"]), f"{row['parameters']:,}"]
                for row in each["rows"]]  # fmt: skip
        parts.append(grid(["data", "variant", each["metric"], "± seeds", "seeds", "parameters"], rows))
    return parts or ["No record yet."]


def _unfinished(each: Row, records: str) -> str:
    failed = f", {each['failed']} failed" if each["failed"] else ""
    command = f"`{each['command']}`" if each["command"] else "the command that began it"
    return (f"{each['question']}: {each['trainings']} trainings{failed} {links(each, records)}; gone on with by "
            f"{command} with the same store")  # fmt: skip


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def write_answer(content: Row, out: Path, records: str) -> None:
    """Write the page, whole or not at all."""
    with whole(out) as partial:
        partial.write_text(page(content, records), encoding="utf-8")
