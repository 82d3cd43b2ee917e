"""The report of a study as one page, as Markdown and as CSV, from its records; nothing is computed anew."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selectra.errors import DataError
from selectra.report.forecasting import grid
from selectra.report.read import refuse_other, whole
from selectra.report.study_claims import (
    COSTS,
    bases_of,
    brief,
    chance,
    claims,
    comparisons,
    cost_place,
    interval,
    resolution,
    signed,
)
from selectra.report.study_plots import pictures

Row = dict[str, Any]
WHAT, FORMAT = "selectra study", 1
# How its records begin as a file.
BEGINS = f'{{\n "what": "{WHAT}"'
NEEDED = (
    "name", "question", "study", "subject", "subject_title", "metric", "higher_is_better", "seeds", "error_rate",
    "counts", "kinds", "rows", "overall", "by_base", "costs", "curves", "environments", "cells", "trials", "verdict",
)  # fmt: skip
CURVES = ("forward_ms", "step_ms", "activations_mb")
COLUMNS = (
    "part", "base", "variant", "seed", "trial", "metric", "test", "val", "pruned", "best_step", "steps", "seconds",
    "parameters", "device", "settings", "key", "command", "reason",
)  # fmt: skip


def read_study(path: Path) -> Row:
    """The exported records of a study.

    Raises:
        DataError: The file is absent, damaged, of something else, or of another version.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a study's records: {error}.") from error
    if not isinstance(content, dict) or content.get("what") != WHAT:
        raise DataError(f"'{path}' holds no study; `selectra compare` makes one.")
    if content.get("format") != FORMAT:
        raise DataError(
            f"'{path}' has version {content.get('format')} of the records' format, and this is {FORMAT}; "
            "export it again from its store with this Selectra."
        )
    if absent := [name for name in NEEDED if name not in content]:
        raise DataError(f"'{path}' is damaged: it has no {', '.join(absent)}; export it again from its store with "
                        "`selectra report`.")  # fmt: skip
    return content


def refuse_others(stem: Path, question: str) -> None:
    """Refuse to write a study's reports over files that are none, such as the table that the study is about.

    Raises:
        DataError: STEM.md or STEM.csv is there and no study's.
    """
    for suffix, begins in ((".md", f"# {question}\n"), (".csv", ",".join(COLUMNS[:4]))):
        refuse_other(stem.with_name(stem.name + suffix), begins)


def write_reports(content: Row, stem: Path) -> list[Path]:
    """Write STEM.html, STEM.md and STEM.csv, each whole or not at all; their paths.

    Raises:
        DataError: One of the last two is there and no report.
    """
    refuse_others(stem, content["question"])
    texts = {".html": page(content), ".md": markdown(content), ".csv": table(content)}
    found = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
        found.append(path)
    return found


def number(value: float | None, digits: int = 4) -> str:
    """A figure with fixed digits; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def summary(content: Row, base: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of a base, best first."""
    rows = [row for row in content["rows"] if row["base"] == base]
    rows.sort(key=lambda row: (row["mean"] is None, -(row["mean"] or 0) if content["higher_is_better"]
                               else row["mean"] or 0))  # fmt: skip
    head = ["model", "kind", content["metric"], "± seeds", "95 % of the mean", "parameters", "FLOPs a sample",
            "forward, ms", "step, ms", "activations, MiB", "samples a second", "training, s"]  # fmt: skip
    return head, [_summary_row(content, row) for row in rows]


def _placed(content: Row, base: str) -> tuple[str, list[str], list[list[str]], list[str]]:
    """The table of a base, with a name for every row that claims can lead to."""
    head, rows = summary(content, base)
    return base, head, rows, [cost_place(content, base, row[0]) for row in rows]


def _summary_row(content: Row, row: Row) -> list[str]:
    cost, found = row["cost"], interval(content, row)
    return [
        row["variant"], row["kind"] or "-", number(row["mean"]), "no chance" if row["sure"] else number(row["spread"]),
        "-" if found is None else f"{found[0]:.4f} to {found[1]:.4f}", f"{cost['parameters']:,}",
        f"{cost['flops']:,}", _wavering(cost["forward_ms"], cost["forward_iqr_ms"]),
        _wavering(cost["step_ms"], cost["step_iqr_ms"]) if cost["step_ms"] else "-",
        brief(cost["activations_mb"]), f"{cost['throughput']:,.0f}", number(row["seconds"], 1),
    ]  # fmt: skip


def _wavering(ms: float, iqr: float) -> str:
    """A time with its spread, where there is one."""
    return f"{brief(ms)} ± {iqr:.2g}" if iqr else f"{brief(ms)}, once"


def contrast_rows(content: Row) -> tuple[list[str], list[list[str]]]:
    """Every comparison that was made, with what it rests on."""
    head = ["where", "against", "difference", "95 % interval", "seeds won", "p", "p corrected", "could have shown",
            "outcome"]  # fmt: skip
    rows = []
    for row in comparisons(content):
        wins = row["pairs"] - row["wins"] if content["higher_is_better"] else row["wins"]
        rows.append([row.get("base", "all data"), row["rival"], signed(row, "difference"),
                     f"{signed(row, 'low')} to {signed(row, 'high')}", f"{wins} of {row['pairs']}",
                     chance(row["p"]), chance(row["p_adjusted"]), resolution(row), row["outcome"]])  # fmt: skip
    return head, rows


def crossings(content: Row) -> list[str]:
    """From which length on the subject is the cheaper one."""
    rows, lengths = content["curves"]["crossings"], [row["length"] for row in content["curves"]["rows"]]
    found = []
    for row in rows:
        what = COSTS[row["quantity"]][0]
        if row["length"] is None:
            found.append(f"{what}: never below that of {row['rival']}, up to a look-back of {max(lengths)}")
        elif row["length"] <= min(lengths):
            found.append(f"{what}: below that of {row['rival']} from the shortest look-back, {min(lengths)}, on")
        else:
            found.append(f"{what}: below that of {row['rival']} from a look-back of about {row['length']:.0f} on")
    return found


def fairness(content: Row) -> list[str]:
    """What was alike, what was not and why."""
    study, base = content["study"], content["study"]["bases"][0]
    train, tuning = base["train"], study["tuning"]
    length = f"{train['steps']} steps" if train["steps"] else f"{train['epochs']:g} passes over the data"
    lines = [
        f"Every model is trained for {length} of {train['batch_size']} samples, with seeds 0 to {study['seeds'] - 1}; "
        "the same seed gives every model the same order of the data, which is checked by a digest in every record.",
        f"{_kept(content)}; the test part is read once for each training, after it. What no seed changes is run once "
        "and stands for every seed.",
    ]
    if tuning:
        fixed = [f"{name} among {', '.join(map(str, values))}" for name, values in tuning["values"].items()]
        how = ", ".join(fixed + [f"{name} from {low:g} to {high:g}" for name, (low, high) in tuning["ranges"].items()])
        count = tuning["trials"] or len(next(iter(tuning["values"].values())))
        pruned = sum(row["pruned"] for row in content["rows"])
        lines.append(
            f"Every model that learns by gradient has {count} trials: {how}; judged on the validation part with a seed "
            f"that is not scored; {pruned} trials were pruned, by the same rule for all."
        )
    if study["budget"]:
        lines.append(f"Models are brought to {study['budget']['amount']:g} {study['budget']['quantity']} within 2 %: "
                     + "; ".join(f"{row['variant']} on {row['base']}: {row['matched']}" for row in content["rows"]
                                 if row["matched"]) + ".")  # fmt: skip
    else:
        lines.append(
            "Models keep the sizes that the study gives them, which differ: parameters and costs stand in the tables."
        )
    sort = [name for name, kind in content["kinds"].items() if kind == study["subject"]]
    if content["subject"] in sort and sort[1:]:
        lines.append(
            f"{content['subject']}, the best on validation of {', '.join(sort)}, stands for {content['subject_title']} "
            "in every comparison; the others of its sort have their rows in the tables and are nobody's rivals."
        )
    lines += [f"Differs beside the model: {name}, since {reason}." for name, reason in study["declared"].items()]
    return lines


def _kept(content: Row) -> str:
    """Which weights of a training are tested."""
    scored = [cell for cell in content["cells"] if "test" in cell and cell.get("packed", 1) > 1]
    if scored and all(cell["best_step"] == cell["steps"] for cell in scored):
        return "The weights that a training ends with are kept"
    return "The weights that are best on the validation part are kept"


def reading(content: Row) -> list[str]:
    """How the numbers are to be read."""
    rate = f"{100 * content['error_rate']:g} %"
    return [
        "A difference is that of logarithms, seed by seed, shown in per cent; of several data sets each weighs alike.",
        "It counts as real where a paired t-test, corrected by Holm's method for all comparisons of its group (over "
        f"all data; on single data sets), gives p below {content['error_rate']:g}, and the paired interval "
        f"leaves out zero: in at most {rate} of studies any difference of a group is called real that is none.",
        "Intervals (95 %) are Student's below eight pairs, of which a bootstrap would say little more than their "
        'range, and a paired bootstrap\'s (BCa) from eight on. "Could have shown" is the smallest difference that so '
        "many seeds of this spread can tell from chance, alone. The interval of the mean of a share ends at 0 and 1.",
        f"Chance is that between seeds, on one test part ({_tested(content) or 'not read yet'}). Whether other data of "
        "the kind would say the same is not tested; the fewer examples, the less does it say. Where all seeds differ "
        "by the same, a score that counts examples is judged as if it were uncertain by one of them.",
        "FLOPs are counted (products, and scans at 9 for each step, channel and state); times are medians of "
        "calls after a warm-up, with the interquartile range where there are several: "
        f"{'; '.join(_settings(content))}.",
    ]


def _tested(content: Row) -> str:
    """How many examples of each base decide; empty where nothing is tested yet."""
    sizes = {cell["base"]: cell["test_windows"] for cell in content["cells"] if "test_windows" in cell}
    called = {"forecasting": "windows, which overlap,"}.get(content["study"]["bases"][0]["task"]["name"], "examples")
    return "; ".join(f"{size:,} {called} of {base}" for base, size in sizes.items())


def _settings(content: Row) -> list[str]:
    """How costs were measured, as their records say: once where all are alike, else with the data's name."""
    found: dict[str, list[str]] = {}
    for row in content["rows"]:
        cost = row["cost"]
        words = (
            f"{cost['dtype']}, {'with' if cost['tf32'] else 'without'} TF32, "
            f"{'compiled' if cost['compiled'] else 'eager'}, batches of {cost['batch']}"
            # Records of before the layout was kept do not know it.
            + (f", layout: {cost['layout']}" if "layout" in cost else ", layout not recorded")
            + f", on {cost['device']}"
        )
        found.setdefault(words, []).append(row["base"])
    alike = len(found) == 1
    return [words if alike else f"{words} ({', '.join(dict.fromkeys(bases))})" for words, bases in found.items()]


def data_lines(content: Row) -> list[str]:
    """What the data were found to be, such as rows, gaps and images; nothing where the records do not say it."""
    return [f"{base}: {'; '.join(' '.join(line.split()) for line in lines)}"
            for base, lines in content.get("summaries", {}).items() if lines]  # fmt: skip


def missing(content: Row) -> list[str]:
    """Results that are not there, with the reason."""
    return [
        f"{row['variant']} on {row['base']}: {len(row['missing'])} of {len(row['missing']) + len(row['values'])} "
        f"trainings, {'; '.join(row['reasons']) or 'not run yet'}"
        for row in content["rows"] if row["missing"]
    ]  # fmt: skip


def cell_rows(content: Row) -> list[Row]:
    """Every scored training, numbered as claims name them."""
    metric = content["metric"]
    return [
        {
            "number": number, "key": cell["key"],
            "base": cell["base"], "variant": cell["variant"], "seed": cell["seed"],
            "test": cell["test"][metric], "val": cell["val"].get(metric),
            "others": ", ".join(f"{name} {value:.4f}" for name, value in cell["test"].items() if name != metric),
            "steps": f"{cell['best_step']} of {cell['steps']}", "seconds": cell["seconds"],
            "differs": ", ".join(f"{name}={_brief(value)}" for name, value in cell["differs"].items())
            or "the model alone",
            "backends": ", ".join(f"{name}: {value}" for name, value in cell["backends"].items()) or "-",
            "command": cell["command"], "where": cell["environment"] + 1, "device": cell["device"],
        }
        for number, cell in enumerate((cell for cell in content["cells"] if "test" in cell), 1)
    ]  # fmt: skip


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def environments(content: Row) -> list[str]:
    """Hardware and versions, numbered as the table of trainings names them."""
    found = []
    for each in content["environments"]:
        hardware, versions = each["hardware"], each["versions"]
        gpus = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ""
        shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        commit = f", commit {each['commit'][:12]}" if each.get("commit") else ""
        found.append(f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads{gpus}, "
                     f"{hardware['system']}; {shown}{commit}")  # fmt: skip
    return found


def page(content: Row) -> str:
    """The page as HTML: it needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("selectra", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    shown = pictures(content)
    return environment.get_template("study.html.jinja").render(
        content=content,
        title=content["subject_title"],
        sections={name: claims(content, name) if content["subject"] else [] for name in ("better", "worse", "level")},
        summaries=[_placed(content, base) for base in bases_of(content)],
        contrasts=contrast_rows(content),
        crossings=crossings(content),
        tested=_tested(content), fairness=fairness(content), reading=reading(content), missing=missing(content),
        data=data_lines(content),
        cells=cell_rows(content), environments=environments(content),
        # Made by matplotlib, with every name escaped.
        pictures={section: [(title, Markup(svg)) for where, title, svg in shown if where == section]
                  for section in ("differences", "trainings", "costs", "curves")},
        seconds=sum(cell.get("seconds", 0.0) for cell in [*content["cells"], *content["trials"]]),
    )  # fmt: skip


def markdown(content: Row) -> str:
    """The same without pictures, for a repository or a terminal."""
    title = content["subject_title"]
    parts = [f"# {content['question']}", f"**{content['verdict']['text']}**"]
    for name, heading in (("better", f"Where {title} wins"), ("worse", f"Where {title} loses"),
                          ("level", "Not told apart")):  # fmt: skip
        found = claims(content, name) if content["subject"] else []
        parts += [f"## {heading}", _bullets([each.in_words() for each in found]) or "Nowhere."]
    for base in bases_of(content):
        parts += [f"## {base}", grid(*summary(content, base))]
    if content["overall"]:
        parts += ["## Every comparison", grid(*contrast_rows(content))]
    if content["curves"]["rows"]:
        parts += ["## Costs against the look-back", grid(*_curve_table(content)), _bullets(crossings(content))]
    if missing(content):
        parts += ["## Missing", _bullets(missing(content))]
    head = ["number", "data", "model", "seed", content["metric"], "validation", "seconds", "differs from the base in",
            "key of its record"]  # fmt: skip
    rows = [[str(c["number"]), c["base"], c["variant"], str(c["seed"]), number(c["test"]), number(c["val"]),
             number(c["seconds"], 1), c["differs"], c["key"]] for c in cell_rows(content)]  # fmt: skip
    parts += ["## Every training", grid(head, rows)]
    if data_lines(content):
        parts += ["## The data", _bullets(data_lines(content))]
    parts += ["## What was alike", _bullets(fairness(content))]
    commands = "\n".join(cell["command"] for cell in cell_rows(content))
    parts += ["## How to read this", _bullets(reading(content)), "## Hardware and versions",
              _bullets(environments(content)), "## Commands",
              "Given where the comparison was made; `selectra eval runs/KEY` then gives the score on the test part.",
              f"```sh\n{commands}\n```"]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _curve_table(content: Row) -> tuple[list[str], list[list[str]]]:
    rows = content["curves"]["rows"]
    lengths = sorted({row["length"] for row in rows})
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of = {row["length"]: row for row in rows if row["variant"] == variant}
        found.append([variant, *(" / ".join(brief(of[n][name]) for name in CURVES)
                                 if n in of else "-" for n in lengths)])  # fmt: skip
    return ["forward ms / step ms / MiB", *map(str, lengths)], found


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(content: Row) -> str:
    """Every training and every trial as CSV."""
    buffer = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    metric = content["metric"]
    for part in ("cells", "trials"):
        for cell in content[part]:
            settings = json.dumps(cell.get("differs", {}))
            writer.writerow({**cell, "part": part, "metric": metric, "test": cell.get("test", {}).get(metric),
                             "val": cell.get("val", {}).get(metric), "settings": settings})  # fmt: skip
    return buffer.getvalue()
