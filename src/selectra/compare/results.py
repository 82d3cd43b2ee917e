"""From a study's file to the records that the report reads: every cell, and what follows from them."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from selectra.compare.cells import Cell, differences
from selectra.compare.conduct import PREPARED, STUDY, prepared_models
from selectra.compare.stats import CONFIDENCE, ERROR_RATE, contrast, grain, judged, over_bases, spread
from selectra.compare.store import Store
from selectra.compare.study import FEWEST_SEEDS, Study
from selectra.errors import DataError
from selectra.spec import Run, Spec
from selectra.train.checkpoint import replacing

WHAT, FORMAT = "selectra study", 1
Row = dict[str, Any]
# What of every cell's record is kept; software and hardware are told once.
KEPT = (
    "base", "variant", "seed", "trial", "settings", "val", "test", "score", "pruned", "history", "best_step", "steps",
    "seconds", "parameters", "test_windows", "device", "packed", "backends", "data_order", "environment", "reason",
    "command", "differs", "key", "last", "held_out", "losses",
)  # fmt: skip


def results(store: Store) -> Row:
    """Everything about a study, in JSON's types.

    Raises:
        DataError: The file holds no study, or its cells were not made alike.
    """
    definition = store.recall(STUDY)
    if definition is None:
        raise DataError(f"'{store.path}' holds no study; `selectra compare` makes one.")
    study, known = Study.model_validate(definition), prepared_models(store)
    cells, environments = _cells(store, study)
    scored = [cell for cell in cells if "test" in cell]
    require_alike(scored, str(store.path))
    rows = [_row(study, known, base.name, variant.name, cells)
            for base in study.bases for variant in study.variants]  # fmt: skip
    lengths = [row for row in store.recall(PREPARED)["curves"] if "reason" not in row]
    return concluded({
        "what": WHAT, "format": FORMAT, "name": study.name, "question": study.question, "study": definition,
        "subject": None, "subject_title": study.subject_title or study.subject,
        "metric": study.metric, "higher_is_better": study.higher_is_better, "seeds": study.seeds,
        "error_rate": ERROR_RATE, "confidence": CONFIDENCE, "counts": store.counts(),
        "kinds": {each.name: each.kind for each in study.variants},
        # A file of before they were kept has none.
        "summaries": store.recall(PREPARED).get("summaries", {}),
        "rows": rows, "overall": [], "by_base": [], "costs": [], "curves": {"rows": lengths},
        "environments": environments, "cells": [cell for cell in cells if "trial" not in cell],
        "trials": [cell for cell in cells if "trial" in cell],
    })  # fmt: skip


def concluded(record: Row) -> Row:
    """A study's record with all that follows from its rows and curves: comparisons, costs, crossings, the verdict."""
    study, rows, curves = Study.model_validate(record["study"]), record["rows"], record["curves"]["rows"]
    subject = _subject(study, rows)
    overall, by_base = _contrasts(study, rows, subject)
    content = {
        **record, "subject": subject, "overall": overall, "by_base": by_base, "costs": _costs(study, rows, subject),
        "curves": {"rows": curves, "crossings": _crossings(study, curves, subject)},
    }  # fmt: skip
    return {**content, "verdict": verdict(content)}


def write_results(path: Path, out: Path) -> None:
    """Write the records of a study's file as JSON."""
    store = Store(path)
    try:
        content = results(store)
    finally:
        store.close()
    with replacing(out) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cells(store: Store, study: Study) -> tuple[list[Row], list[Row]]:
    """Every finished or failed cell, and the different environments that they ran in, which they name by number."""
    cells, environments = [], []
    for cell, state, record in store.cells():
        if state not in ("done", "failed") or record is None:
            continue
        where = {name: record[name] for name in ("versions", "hardware", "commit") if name in record}
        if where not in environments:
            environments.append(where)
        row = {
            **cell.label, **record, "environment": environments.index(where), "key": cell.key,
            # A folder for each: of two trainings in one the second is refused.
            "command": f"{command_of(cell.run)} --out runs/{cell.key}", "differs": differs(study, cell),
        }  # fmt: skip
        cells.append({name: row[name] for name in KEPT if name in row})
    return cells, environments


def require_alike(scored: Iterable[Row], where: str) -> None:
    """Refuse cells that saw the data in different orders, or whose operators ran on different backends.

    Raises:
        DataError: Two cells that are compared were not made alike.
    """
    orders: dict[Any, Row] = {}
    backends: dict[str, Row] = {}
    for cell in scored:
        if "data_order" in cell:
            first = orders.setdefault((cell["base"], cell["seed"]), cell)
            if first["data_order"] != cell["data_order"]:
                raise DataError(
                    f"'{where}': {first['variant']} and {cell['variant']} saw {cell['base']} with seed {cell['seed']} "
                    "in different orders, so they cannot be compared; do the study again in a new file."
                )
        for name, backend in cell.get("backends", {}).items():
            first = backends.setdefault(name, cell)
            if first["backends"][name] != backend:
                raise DataError(
                    f"'{where}': {name} ran on '{first['backends'][name]}' in one cell and on '{backend}' in another, "
                    "so times and results are no comparison; do the study again in a new file on one sort of machine."
                )


def _row(study: Study, known: Any, base: str, variant: str, cells: Sequence[Row]) -> Row:
    """A variant on a base: the mean over seeds, and what is missing."""
    about = known[base, variant]
    mine = [cell for cell in cells if (cell["base"], cell["variant"]) == (base, variant) and "trial" not in cell]
    done = {cell["seed"]: cell["test"][study.metric] for cell in mine if "test" in cell}
    vals = [cell["val"][study.metric] for cell in mine if "val" in cell and study.metric in cell["val"]]
    wanted = range(study.seeds if about["by_gradient"] else 1)
    reasons = sorted({cell["reason"] for cell in mine if "reason" in cell})
    trials = [cell for cell in cells if (cell["base"], cell["variant"]) == (base, variant) and "trial" in cell]
    if trials and all("reason" in cell for cell in trials):
        reasons.append(f"every trial failed: {trials[0]['reason']}")
    chosen = next((cell["differs"] for cell in mine if "differs" in cell), {})
    return {
        "base": base, "variant": variant, "kind": study.variant(variant).kind, "spec": about["spec"],
        "matched": about["matched"], "cost": about["cost"], "sure": not about["by_gradient"],
        "values": {str(seed): value for seed, value in sorted(done.items())},
        "mean": fmean(done.values()) if done else None, "spread": spread(list(done.values())),
        "interval": _interval(list(done.values())), "val": fmean(vals) if vals else None,
        "seconds": fmean(cell["seconds"] for cell in mine if "test" in cell) if done else None,
        "missing": [seed for seed in wanted if seed not in done], "reasons": reasons, "differs": chosen,
        "test_windows": next((cell["test_windows"] for cell in mine if "test_windows" in cell), None),
        "trials": len(trials), "pruned": sum(bool(cell.get("pruned")) for cell in trials),
    }  # fmt: skip


def _interval(values: Sequence[float]) -> list[float] | None:
    """The interval of a mean over seeds by Student's t; None for fewer than three values, or where they are equal."""
    if len(values) < FEWEST_SEEDS or max(values) == min(values):
        return None
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, fmean(values), stats.sem(values))
    return [float(low), float(high)]


def _subject(study: Study, rows: Sequence[Row]) -> str | None:
    """Of the variants that the subject may be, the one best on validation over all bases; None where none is whole."""
    scores = {}
    for variant in study.variants:
        mine = [row for row in rows if row["variant"] == variant.name]
        if study.is_subject(variant) and not any(row["missing"] or row["val"] is None for row in mine):
            # Logarithms: a base of large errors weighs no more than one of small ones.
            vals = [row["val"] for row in mine]
            scores[variant.name] = fmean(np.log(vals).tolist()) if min(vals) > 0 else fmean(vals)
    if not scores:
        return None
    best = max if study.higher_is_better else min
    return best(scores, key=lambda name: scores[name])


def _values(study: Study, row: Row) -> list[float]:
    """The metric for every seed; what no seed changes stands for all."""
    values = list(row["values"].values())
    return values * study.seeds if row["sure"] else values


def _contrasts(study: Study, rows: Sequence[Row], subject: str | None) -> tuple[list[Row], list[Row]]:
    """The subject against every rival: over all bases (means over bases, seed by seed), and on each."""
    if subject is None:
        return [], []
    of = {(row["base"], row["variant"]): row for row in rows}
    rivals = study.rivals(subject)
    overall, by_base = [], []
    for rival in rivals:
        pairs = [(of[base.name, subject], of[base.name, rival]) for base in study.bases]
        if not any(row["missing"] for pair in pairs for row in pair):
            ours, theirs = ([_values(study, row) for row in side] for side in zip(*pairs, strict=True))
            means = [[over_bases(seed) for seed in zip(*side, strict=True)] for side in (ours, theirs)]
            steps = grain([row for pair in pairs for row in pair], study.higher_is_better)
            overall.append(_against(rival, means[0], means[1], steps))
    for base in study.bases:
        for rival in rivals:
            ours, theirs = of[base.name, subject], of[base.name, rival]
            if not ours["missing"] and not theirs["missing"]:
                steps = grain((ours, theirs), study.higher_is_better)
                found = _against(rival, _values(study, ours), _values(study, theirs), steps)
                by_base.append({"base": base.name, **found})
    return judged(overall, study.higher_is_better), judged(by_base, study.higher_is_better)


def _against(rival: str, ours: Sequence[float], theirs: Sequence[float], steps: float) -> Row:
    found = contrast(ours, theirs, grain=steps)
    return {**found, "rival": rival, "rival_mean": found["rival"]}


TIMES = ("forward_ms", "step_ms")


def _costs(study: Study, rows: Sequence[Row], subject: str | None) -> list[Row]:
    """What the subject costs beside each rival, on each base; times differ where their middle halves do not meet.

    A time that was measured once, its spread unknown, is compared with none.
    """
    of, found = {(row["base"], row["variant"]): row["cost"] for row in rows}, []
    for base in study.bases:
        for rival in study.rivals(subject) if subject is not None else ():
            ours, theirs = of[base.name, subject or ""], of[base.name, rival]
            for quantity in ("parameters", "forward_ms", "step_ms", "activations_mb"):
                own, other = ours[quantity], theirs[quantity]
                spreads = [each[f"{quantity[:-3]}_iqr_ms"] for each in (ours, theirs)] if quantity in TIMES else []
                level = abs(own - other) <= max(0.5 * sum(spreads), 0.02 * max(own, other))
                # What is solved has no step and keeps nothing.
                if own > 0 and other > 0 and all(spreads):
                    outcome = "level" if level else "better" if own < other else "worse"
                    found.append({"base": base.name, "rival": rival, "quantity": quantity, "ours": own, "theirs": other,
                                  "outcome": outcome})  # fmt: skip
    return found


def verdict(content: Row) -> Row:
    """The answer in one sentence, and who is beaten, who wins and who is level over all bases."""
    names = {outcome: [each["rival"] for each in content["overall"] if each["outcome"] == outcome]
             for outcome in ("better", "worse", "level")}  # fmt: skip
    title, subject, seeds = content["subject_title"], content["subject"], content["seeds"]
    missing = [f"{row['variant']} on {row['base']}" for row in content["rows"] if row["missing"]]
    if subject is None or not content["overall"]:
        return {"text": f"No verdict yet: {len(missing)} of {len(content['rows'])} results are missing.", **names,
                "missing": missing}  # fmt: skip
    who = title if subject == title else f"{title} ({subject}, the best of its kind on validation)"
    parts = []
    if names["worse"]:
        parts.append(f"loses to {_list(content, names['worse'])}")
    if names["better"]:
        parts.append(f"beats {_list(content, names['better'])}")
    if names["level"]:
        parts.append(f"shows no difference that {seeds} seeds can show from {_list(content, names['level'])}")
    answer = "Yes" if not names["worse"] and not names["level"] else "No" if names["worse"] else "Not shown"
    text = f"{answer}: on {_bases(content)}, {who} {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}."
    if missing:
        text += f" Not in this: {', '.join(missing)}."
    return {"text": text, **names, "missing": missing, "answer": answer}


def _bases(content: Row) -> str:
    names = list(dict.fromkeys(row["base"] for row in content["rows"]))
    return names[0] if len(names) == 1 else f"{len(names)} data sets together"


def _list(content: Row, rivals: Sequence[str]) -> str:
    signs = {each["rival"]: f"{each['difference']:+.1f} %" if each["unit"] == "%" else f"{each['difference']:+.4f}"
             for each in content["overall"]}  # fmt: skip
    shown = [f"{rival} ({content['metric']} {signs[rival]})" for rival in rivals]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if shown[1:] else shown[0]


def _crossings(study: Study, rows: Sequence[Row], subject: str | None) -> list[Row]:
    """Where along the length the subject becomes cheaper than each rival, in time and memory."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["variant"]].append(row)
    crossings = []
    for quantity in ("forward_ms", "step_ms", "activations_mb"):
        for rival in study.rivals(subject) if subject is not None else ():
            if subject in found and rival in found:
                length = crossover(found[subject], found[rival], quantity)
                crossings.append({"rival": rival, "quantity": quantity, "length": length})
    return crossings


def crossover(ours: Sequence[Row], theirs: Sequence[Row], quantity: str) -> float | None:
    """The length from which on `ours` costs less, to the end of what was measured; None where it never does.

    Between measured lengths both are straight in logarithms. At the first length that was measured: that length.
    """
    rival = {row["length"]: row[quantity] for row in theirs}
    points = sorted((row["length"], row[quantity], rival[row["length"]]) for row in ours if row["length"] in rival)
    points = [(np.log(length), np.log(own) - np.log(other)) for length, own, other in points if own > 0 and other > 0]
    if not points or points[-1][1] >= 0:
        return None
    before = max((index for index, (_, gap) in enumerate(points) if gap >= 0), default=None)
    if before is None:
        # As it was given: a logarithm and back is a little more.
        return float(round(np.exp(points[0][0])))
    (x0, y0), (x1, y1) = points[before], points[before + 1]
    return float(np.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))


def differs(study: Study, cell: Cell) -> dict[str, Any]:
    """What a cell's run has that its base has not, outside model and seed, by dotted name."""
    found = differences(study.base(cell.label["base"]), cell.run)
    return {name: now for name, (_, now) in found.items() if name != "train.seed"}


def command_of(run: Run) -> str:
    """A command that trains the same again, outside the study; `selectra eval` then tests it."""
    words = [f"data={run.data.name}", *_words("data", run.data), f"task={run.task.name}", *_words("task", run.task)]
    words += _words("model", run.model)
    # What `selectra train MODEL data=... task=...` takes where no word says otherwise.
    usual = Run(model=run.model, data=run.data, task=run.task)
    for name in ("optim", "train", "parallel"):
        section, bare = getattr(run, name), getattr(usual, name)
        for field in type(section).model_fields:
            value = getattr(section, field)
            # Of steps and epochs, to give the one takes the other away.
            if value != getattr(bare, field) and not (value is None and field in ("steps", "epochs")):
                words.append(f"{name}.{field}={_text(value)}")
    return shlex.join(["selectra", "train", run.model.name, *words])


def _words(prefix: str, spec: Spec) -> list[str]:
    found = []
    for name, value in spec.pairs:
        if isinstance(value, Spec):
            found += [f"{prefix}.{name}={value.name}", *_words(f"{prefix}.{name}", value)]
        else:
            found.append(f"{prefix}.{name}={_text(value)}")
    return found


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        # A comma at the end: of a single value it could not be told that it stands in a tuple.
        return ",".join(map(_text, value)) + ("," if len(value) == 1 else "")
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
