"""What the page of a study says under "wins", "loses" and "level", each claim with the records that it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
# What a cost is called, how more of it is said, and its unit.
COSTS = {
    "parameters": ("parameters", "{} parameters", ""),
    "forward_ms": ("time of a forward pass", "{} time for a forward pass", " ms"),
    "step_ms": ("time of a training step", "{} time for a training step", " ms"),
    "activations_mb": ("memory kept for the backward", "{} memory kept for the backward", " MiB"),
}


@dataclass(frozen=True)
class Claim:
    """A sentence, and where to look it up.

    Args:
        trainings: Of each model that it is about, the numbers and keys of its trainings.
        costs: Of each model whose cost it is about, the place of its row in the table of `base`.
    """

    text: str
    trainings: tuple[tuple[str, tuple[tuple[int, str], ...]], ...] = ()
    costs: tuple[tuple[str, str], ...] = ()
    base: str = ""

    def in_words(self) -> str:
        """For a page without links."""
        if self.costs:
            return f"{self.text} (the table of {self.base}: {', '.join(name for name, _ in self.costs)})"
        shown = (f"{name} {', '.join(str(number) for number, _ in found)}" for name, found in self.trainings)
        return f"{self.text} (trainings: {'; '.join(shown)})"


def trainings(content: Row, variant: str, base: str | None) -> tuple[tuple[int, str], ...]:
    """Numbers, as in the table of every training, and keys of a model's scored trainings on one base or on all."""
    scored = [cell for cell in content["cells"] if "test" in cell]
    return tuple((number, cell["key"]) for number, cell in enumerate(scored, 1)
                 if cell["variant"] == variant and base in (None, cell["base"]))  # fmt: skip


def interval(content: Row, row: Row) -> tuple[float, float] | None:
    """The interval of a model's mean over seeds; that of a share ends at 0 and 1, which Student's does not know."""
    if row["interval"] is None:
        return None
    low, high = row["interval"]
    values = [value for each in content["rows"] for value in each["values"].values()]
    share = content["higher_is_better"] and 0 <= min(values) <= max(values) <= 1
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def cost_place(content: Row, base: str, variant: str) -> str:
    """The name, in the page, of the row that tells what a model costs on a base."""
    names = list(dict.fromkeys(row["variant"] for row in content["rows"]))
    return f"cost-{bases_of(content).index(base)}-{names.index(variant)}"


def claims(content: Row, outcome: str) -> list[Claim]:
    """What is said under "wins", "loses" or "level": results over all data, on each, and costs."""
    subject, metric = content["subject"], content["metric"]
    words = {"better": "better than", "worse": "worse than", "level": "not told apart from"}[outcome]
    found = []
    for row in comparisons(content):
        if row["outcome"] == outcome:
            where = f"on {row['base']}" if "base" in row else "over all data"
            wins = row["pairs"] - row["wins"] if content["higher_is_better"] else row["wins"]
            text = (
                f"{subject} is {words} {row['rival']} {where}: {metric} {row['mean']:.4f} against "
                f"{row['rival_mean']:.4f}, {signed(row, 'difference')} (95 % interval {signed(row, 'low')} to "
                f"{signed(row, 'high')}; better with {wins} of {row['pairs']} seeds; "
                f"p {chance(row['p_adjusted'])} after correction)"
                + (_undecided(row, content["error_rate"]) if outcome == "level" else "")
            )
            found.append(Claim(text, tuple((name, trainings(content, name, row.get("base")))
                                           for name in (subject, row["rival"]))))  # fmt: skip
    return found + ([] if outcome == "level" else cost_claims(content, outcome))


def _undecided(row: Row, error_rate: float) -> str:
    """What the seeds could have shown, and why a difference is none although its own interval leaves zero out."""
    found = f"; these seeds could have shown {resolution(row)}"
    if row["p"] < error_rate and not row["low"] <= 0 <= row["high"]:
        found += f" alone: the interval, which leaves zero out, and its p {chance(row['p'])} are not corrected"
    return found


def comparisons(content: Row) -> list[Row]:
    """Over all data, where there are several, and on each."""
    return [*(content["overall"] if len(bases_of(content)) > 1 else ()), *content["by_base"]]


def resolution(row: Row) -> str:
    return f"{row['resolution']:.2f} %" if row["unit"] == "%" else f"{row['resolution']:.4f}"


def cost_claims(content: Row, outcome: str) -> list[Claim]:
    """Where the subject costs less, or more."""
    found = []
    for quantity, (_, words, unit) in COSTS.items():
        rows = [row for row in content["costs"] if row["quantity"] == quantity and row["outcome"] == outcome]
        less = "more" if outcome == "worse" else "fewer" if quantity == "parameters" else "less"
        for base in dict.fromkeys(row["base"] for row in rows):
            mine = [row for row in rows if row["base"] == base]
            rivals = ", ".join(f"{row['rival']} ({brief(row['theirs'])}{unit})" for row in mine)
            own = f"{brief(mine[0]['ours'])}{unit}"
            text = f"{content['subject']} needs {words.format(less)} on {base}, {own}, than {rivals}"
            names = (content["subject"], *(row["rival"] for row in mine))
            found.append(Claim(text, costs=tuple((name, cost_place(content, base, name)) for name in names), base=base))
    return found


def brief(value: float) -> str:
    """Three digits that count, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bases_of(content: Row) -> list[str]:
    return list(dict.fromkeys(row["base"] for row in content["rows"]))


def signed(row: Row, name: str) -> str:
    """A difference with its sign and unit."""
    return f"{row[name]:+.2f} %" if row["unit"] == "%" else f"{row[name]:+.4f}"


def chance(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
