"""Training of image models at 224 px: ours against the same model over mamba_ssm's or VMamba's kernels."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import selectra.models  # noqa: F401
from selectra.bench.events import Stopwatch
from selectra.bench.modules import Subject, agree, backends, check, plain, seeded
from selectra.bench.peers import MAMBA_SSM, VMAMBA
from selectra.bench.vision_peers import CONV, COPIES, missing, with_theirs
from selectra.bench.vision_shares import shares
from selectra.bench.vision_steps import (
    Step,
    as_one_graph,
    compiled_blocks,
    images,
    peak_bytes,
    rows_named,
    times,
    training_of,
)
from selectra.errors import BackendError
from selectra.registry import models
from selectra.spec import Spec

SEED, SIZE, SMALL_SIZE, SMALL_BATCH = 0, 224, 48, 2


class Case(NamedTuple):
    """A model, what its small form for the check is built with, and how many images a step has."""

    model: str
    peer: str
    batch: int
    target: float
    """How many times as fast as the peer it shall be."""
    small: dict[str, Any]

    @property
    def name(self) -> str:
        """The model, with the images of a step where they are not those of its published training."""
        return self.model if self in CASES else f"{self.model}@{self.batch}"


STAGES: dict[str, Any] = {"dims": (16, 32), "depths": (1, 1)}
CASES = (
    Case("vim_tiny", MAMBA_SSM, 128, 2.0, {"depth": 2, "d_model": 32, "img_size": SMALL_SIZE}),
    Case("vmamba_tiny", MAMBA_SSM, 64, 2.0, STAGES),
    Case("vmamba_tiny_s1l8", VMAMBA, 128, 1.3, STAGES),
)
# A step of these takes the GPU longer than the host, which prepares a step of fewer images as slowly.
LARGE = tuple(case._replace(batch=256) for case in CASES)
SIDES = ("ours", "theirs")
# What a row's keys of times are; a step as one CUDA graph costs the host nothing, on both sides.
EAGER, COMPILED, EAGER_GRAPH, COMPILED_GRAPH = "eager", "compiled", "eager, one CUDA graph", "compiled, one CUDA graph"
WAYS = (EAGER, EAGER_GRAPH, COMPILED, COMPILED_GRAPH)


def measure(
    into: dict[str, Any], seconds: float, watch: Stopwatch, save: Callable[[], None], only: str | None = None
) -> None:
    """Check all cases, then time each eager, each with compiled blocks, both as one graph too; profile eager steps."""
    cases = rows_named(only, {case.name: case for case in (*CASES, *LARGE)}, CASES)
    absent = missing(*dict.fromkeys(case.peer for case in cases))
    if absent:
        raise BackendError(
            f"{' and '.join(absent)} not found; results/build_peers.py builds them, PYTHONPATH names where."
        )
    into["image size"], into["without"] = SIZE, missing(CONV, COPIES)
    into["gate"] = {case.name: gate(case, watch.device) for case in cases}
    rows: list[dict[str, Any]] = [
        {"model": case.model, "peer": case.peer, "batch": case.batch, "target": case.target} for case in cases
    ]
    into["rows"] = rows
    # Compiling takes minutes, and a profiler slows the host from then on.
    for way in (_eager, _compiled, _profiled):
        for row, case in zip(rows, cases, strict=True):
            way(row, case, seconds, watch)
            save()


def gate(case: Case, device: torch.device) -> dict[str, float]:
    """Errors of the small form in float32: ours against float64's reference, theirs against ours."""
    with seeded(SEED, device), torch.backends.cudnn.flags(allow_tf32=False):
        model = models.build(Spec(case.model, n_classes=10, **case.small), {}).to(device)  # pyright: ignore[reportAttributeAccessIssue]
        x = torch.randn(SMALL_BATCH, 3, SMALL_SIZE, SMALL_SIZE, device=device)
        ours = Subject(model, x, plain)
        found = {"ours": check(case.model, ours)}
        theirs = Subject(with_theirs(copy.deepcopy(model)), x, plain)
        return found | {"theirs": agree(f"{case.model} over {case.peer}", theirs, ours)}


def _sides(case: Case, device: torch.device) -> dict[str, nn.Module]:
    with seeded(SEED, device):
        ours: nn.Module = models.build(Spec(case.model), {}).to(device)  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    return {"ours": ours, "theirs": with_theirs(copy.deepcopy(ours))}


def _eager(row: dict[str, Any], case: Case, seconds: float, watch: Stopwatch) -> None:
    x, target = images(case.batch, SIZE, watch.device, SEED)
    sides = _sides(case, watch.device)
    steps = {side: training_of(model, x, target) for side, model in sides.items()}
    row["peak_bytes"] = {side: peak_bytes(step, watch.device) for side, step in steps.items()}
    row["backends"] = backends(Subject(sides["ours"], x[:1], plain))
    row[EAGER] = times(steps, seconds, watch)
    _as_graphs(row, EAGER_GRAPH, steps, seconds, watch)


def _compiled(row: dict[str, Any], case: Case, seconds: float, watch: Stopwatch) -> None:
    x, target = images(case.batch, SIZE, watch.device, SEED)
    torch.compiler.reset()
    sides = _sides(case, watch.device)
    for model in sides.values():
        compiled_blocks(model, model.blocks())  # pyright: ignore[reportCallIssue]
    steps = {side: training_of(model, x, target) for side, model in sides.items()}
    row[COMPILED] = times(steps, seconds, watch)
    _as_graphs(row, COMPILED_GRAPH, steps, seconds, watch)


def _as_graphs(row: dict[str, Any], way: str, steps: dict[str, Step], seconds: float, watch: Stopwatch) -> None:
    if watch.cuda:
        row[way] = times({side: as_one_graph(step, watch.device) for side, step in steps.items()}, seconds, watch)


def _profiled(row: dict[str, Any], case: Case, seconds: float, watch: Stopwatch) -> None:
    x, target = images(case.batch, SIZE, watch.device, SEED)
    sides = _sides(case, watch.device)
    row["shares_ms"] = {side: shares(training_of(model, x, target)) for side, model in sides.items()}
