"""What is found out before a study's first training: sizes that meet the budget, and what models cost."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from rich.console import Console

from selectra.compare.match import meet
from selectra.compare.measure import build_model, measure
from selectra.compare.room import require_room
from selectra.compare.study import Study, Variant
from selectra.compare.turned import has_size
from selectra.compare.worker import load
from selectra.errors import ConfigError, DataError
from selectra.registry import models, tasks
from selectra.report.study_claims import brief
from selectra.spec import Run, Spec, nearest
from selectra.train.job import check, typed
from selectra.train.optim import all_warmup
from selectra.train.precision import Precision
from selectra.train.same_data import describe_data

LENGTH_BATCH = 8


class TimeUpError(RuntimeError):
    """The limit of time came while models were matched and measured; nothing of it is stored."""


def prepare(
    study: Study, device: torch.device, console: Console, until: float = inf, side_by_side: int = 1
) -> dict[str, Any]:  # fmt: skip
    """Match every model to the budget, and measure what it costs; prints parameters, FLOPs and time of each.

    All are matched before the first one is built, so that what cannot be met, or not be held, is refused at once.

    Args:
        until: Nothing is begun after this time of `time.monotonic`.
        side_by_side: Trainings that share the memory at a time, at the least.

    Raises:
        ConfigError: A model cannot be brought to the budget, or is too large for the memory here.
        TimeUpError: That time came; a model that is being measured is measured to the end.
    """
    found, count = [], len(study.bases) * len(study.variants)

    def in_time() -> None:
        if time.monotonic() >= until:
            raise TimeUpError(
                f"The limit of time came while models were matched and measured, after {len(found)} of {count}, before "
                "the first training; nothing is stored. Give it more time with --time-limit."
            )

    _say(f"Before the first training {count} models are {'matched and ' if study.budget else ''}measured.", console)
    for base in study.bases:
        if base.train.steps is not None and (warning := all_warmup(base.optim, base.train.steps)):
            _say(warning, console)
    read = _matched(study, device, in_time, side_by_side)
    summaries = {base.name: data.summary() if hasattr(data, "summary") else [] for base, data, _ in read}
    for line in (line for lines in summaries.values() for line in lines):
        _say(line, console)
    sized = [each for _, _, models_ in read for each in models_]
    if study.budget is not None:
        _say(f"Matched: {'; '.join(each.told for each in sized)}.", console)
    for base, data, models_ in read:
        _require_metric(study, base, data, models_[0].spec)
    for each in sized:
        in_time()
        found.append({"base": each.base, "variant": each.variant, **_measured(each, device)})
        _print_cost(found[-1], f"{len(found)} of {count}", console)
    described = {base.name: describe_data(data) for base, data, _ in read}
    curves = _curves(study, found, device, console, in_time)
    return {"models": found, "curves": curves, "data": _plain(described), "summaries": summaries}


def _matched(
    study: Study, device: torch.device, in_time: Callable[[], None], side_by_side: int
) -> "list[tuple[Run, Any, list[_Sized]]]":  # fmt: skip
    """Every base with its data and the models that will be trained on it, at their sizes; none is built."""
    if study.budget is not None and study.budget.quantity == "params":
        require_room("a model", study.budget.amount, device, side_by_side)
    found = []
    for base in study.bases:
        in_time()
        data = load(typed(base).data)
        facts = data.facts
        _require_judges(base, data, in_time)
        sized = []
        for variant in study.variants:
            in_time()
            sized.append(_sized(study, base, variant, facts, device, in_time))
            if sized[-1].by_gradient:
                require_room(f"'{variant.name}'", sized[-1].parameters, device, side_by_side)
        found.append((base, data, sized))
    return found


def seconds_by_steps(base: Run, found: Mapping[str, Any], workers: int) -> float | None:
    """What a training takes by the time of its steps alone; None on a GPU, where several are trained at once.

    Args:
        found: What `prepare` found out about the model on this base.
        workers: Processes side by side, each with its share of the cores.
    """
    cost, train = found["cost"], base.train
    if not found["by_gradient"] or cost["device"] != "cpu" or train.steps is None:
        return None
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    slower = max(1.0, cost["threads"] / threads)
    return train.steps * train.batch_size / cost["batch"] * cost["step_ms"] / 1e3 * slower


def _require_judges(base: Run, data: Any, in_time: Callable[[], None]) -> None:
    """Refuse data by which nothing could be chosen or decided, before anything is trained on it.

    Images by which models are judged are read once: a damaged one would end every training at its last step.

    Raises:
        DataError: The validation part or the test part is empty, or has a file that cannot be read; or it shows already
            that the training part has one.
    """
    for part, called, why in (("val", "validation", "chooses learning rates and weights by it"),
                              ("test", "test", "decides by it")):  # fmt: skip
        if not len(data.windows(part)):
            raise DataError(
                f"the {called} part of '{base.name}' is empty, and a comparison {why}; give it more data, or, where "
                f"the data has parts of its own, a {called} part."
            )
        if hasattr(data, "readable") and hasattr(data, "read"):
            for row in data.readable(part):
                in_time()
                data.read(int(row))
    # Of training images on disk this looks at what their headers show; those in memory every training reads at first.
    if not getattr(data, "in_memory", True):
        data.windows("train")


def _require_metric(study: Study, base: Run, data: Any, spec: Spec) -> None:
    """Refuse a metric that the task does not measure: it would be missed behind the first training.

    Raises:
        ConfigError: It is none of the task's.
    """
    model = models.build(spec, data.facts).eval()
    evaluator = tasks.build(typed(base).task, data.facts).for_data(data).evaluator()
    with torch.no_grad():
        evaluator.update(model, data.windows("val")[[0]].to(torch.device("cpu")))
    known = list(evaluator.compute())
    if study.metric not in known:
        raise ConfigError(
            f"the study '{study.name}' is decided by '{study.metric}', and the task '{base.task.name}' measures "
            f"{known}.{nearest(study.metric, known)}"
        )


@dataclass(frozen=True)
class _Sized:
    """A model at its size, not yet built."""

    base: str
    variant: str
    spec: Spec
    note: str
    facts: Mapping[str, Any]
    precision: Precision
    parameters: int
    by_gradient: bool

    @property
    def told(self) -> str:
        """In words."""
        return f"{self.base}, {self.variant}: {self.note}"


def _sized(
    study: Study, base: Run, variant: Variant, facts: dict[str, Any], device: torch.device, in_time: Callable[[], None]
) -> _Sized:  # fmt: skip
    run = typed(study.run(base, variant, 0))
    check(run)
    spec, note = run.model, ""
    if study.budget is not None:
        if has_size(spec, facts, study.budget.over):
            quantity, over = study.budget.quantity, study.budget.over
            amount, align = study.budget.amount, study.budget.align
            found = meet(spec, facts, quantity, amount, over=over, device=device, align=align, before_each=in_time)
            spec, note = found.spec, f"{found.turned.label} = {found.value} for {found.got:,.6g} {quantity}"
        else:
            note = f"has no {study.budget.over}, so it is as large as it is"
    model = build_model(spec, facts, "meta")
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    by_gradient = parameters > 0 and not hasattr(model, "solve")
    return _Sized(base.name, variant.name, spec, note, facts, run.train.precision, parameters, by_gradient)


def _measured(sized: _Sized, device: torch.device) -> dict[str, Any]:
    cost = measure(sized.spec, sized.facts, device=device, precision=sized.precision).to_json()
    return {"spec": sized.spec.to_json(), "by_gradient": sized.by_gradient, "matched": sized.note, "cost": cost,
            "facts": _plain(sized.facts)}  # fmt: skip


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts, default=str))


def _curves(
    study: Study, found: list[dict[str, Any]], device: torch.device, console: Console, in_time: Callable[[], None]
) -> list[dict[str, Any]]:  # fmt: skip
    """Time and memory of every variant, at the sizes of the first base, against the look-back."""
    rows, how = [], {"device": device, "precision": study.bases[0].train.precision}
    first = [each for each in found if each["base"] == study.bases[0].name] if study.lengths else []
    for number, each in enumerate(first, 1):
        _say(f"{number} of {len(first)}: {each['variant']} at the look-backs {study.lengths}", console)
        for length in study.lengths:
            in_time()
            facts = {**each["facts"], "seq_len": length}
            try:
                cost = measure(Spec.from_json(each["spec"]), facts, batch=LENGTH_BATCH, seconds=0.1, **how)
            except (ConfigError, torch.OutOfMemoryError) as error:
                rows.append({"variant": each["variant"], "length": length, "reason": str(error)})
                continue
            rows.append({"variant": each["variant"], "length": length, **cost.to_json()})
    return rows


def _print_cost(each: dict[str, Any], place: str, console: Console) -> None:
    cost, note = each["cost"], f" ({each['matched']})" if each["matched"] else ""
    step = f", a training step {brief(cost['step_ms'])} ms" if cost["step_ms"] else ""
    _say(
        f"{place}: {each['base']}, {each['variant']}{note}: {cost['parameters']:,} parameters, "
        f"{cost['flops'] / 1e6:.4g} MFLOPs a sample, a forward pass of {cost['batch']} {brief(cost['forward_ms'])} ms"
        f"{step}, {brief(cost['activations_mb'])} MiB of activations, {cost['throughput']:,.0f} samples a second",
        console,
    )  # fmt: skip


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
