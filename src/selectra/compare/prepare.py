"""What is found out before a study's first training: sizes that meet the budget, and what models cost."""

import json
import os
import time
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch
from rich.console import Console

from selectra.compare.match import has_size, meet
from selectra.compare.measure import build_model, measure
from selectra.compare.study import Study, Variant
from selectra.compare.worker import load
from selectra.errors import ConfigError, DataError
from selectra.registry import models, tasks
from selectra.spec import Run, Spec, nearest
from selectra.train.job import check, typed
from selectra.train.same_data import describe_data

LENGTH_BATCH = 8


class TimeUpError(RuntimeError):
    """The limit of time came while models were matched and measured; nothing of it is stored."""


def prepare(study: Study, device: torch.device, console: Console, until: float = inf) -> dict[str, Any]:
    """Match every model to the budget, and measure what it costs; prints parameters, FLOPs and time of each.

    Args:
        until: Nothing is begun after this time of `time.monotonic`.

    Raises:
        TimeUpError: That time came; a model that is being measured is measured to the end.
    """
    found, count = [], len(study.bases) * len(study.variants)
    described, summaries = dict[str, Any](), dict[str, list[str]]()

    def in_time() -> None:
        if time.monotonic() >= until:
            raise TimeUpError(
                f"The limit of time came while models were matched and measured, after {len(found)} of {count}, before "
                "the first training; nothing is stored. Give it more time with --time-limit."
            )

    _say(f"Before the first training {count} models are {'matched and ' if study.budget else ''}measured.", console)
    for base in study.bases:
        in_time()
        data = load(typed(base).data)
        facts = data.facts
        _require_judges(base, data, in_time)
        summaries[base.name] = data.summary() if hasattr(data, "summary") else []
        for line in summaries[base.name]:
            _say(line, console)
        described[base.name] = describe_data(data)
        for variant in study.variants:
            in_time()
            each = _prepared(study, base, variant, facts, device, in_time)
            if variant is study.variants[0]:
                _require_metric(study, base, data, Spec.from_json(each["spec"]))
            found.append({"base": base.name, "variant": variant.name, **each})
            _print_cost(found[-1], f"{len(found)} of {count}", console)
    curves = _curves(study, found, device, console, in_time)
    return {"models": found, "curves": curves, "data": _plain(described), "summaries": summaries}


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
        DataError: The validation part or the test part is empty, or has a file that cannot be read.
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


def _prepared(
    study: Study, base: Run, variant: Variant, facts: dict[str, Any], device: torch.device, in_time: Callable[[], None]
) -> dict[str, Any]:  # fmt: skip
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
    model = build_model(spec, facts)
    learns = any(each.requires_grad for each in model.parameters()) and not hasattr(model, "solve")
    in_time()
    cost = measure(spec, facts, device=device, precision=run.train.precision).to_json()
    return {"spec": spec.to_json(), "by_gradient": learns, "matched": note, "cost": cost, "facts": _plain(facts)}


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
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
    step = f", a training step {cost['step_ms']:.3g} ms" if cost["step_ms"] else ""
    _say(
        f"{place}: {each['base']}, {each['variant']}{note}: {cost['parameters']:,} parameters, "
        f"{cost['flops'] / 1e6:.4g} MFLOPs a sample, a forward pass of {cost['batch']} {cost['forward_ms']:.3g} ms"
        f"{step}, {cost['activations_mb']:.3g} MiB of activations, {cost['throughput']:,.0f} samples a second",
        console,
    )  # fmt: skip


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
