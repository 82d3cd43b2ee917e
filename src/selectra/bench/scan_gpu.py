"""`selectra bench scan` on a GPU: every shape against its floor and other packages' kernels, forward and backward."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from selectra.bench import gate
from selectra.bench.calls import Arguments, Ours, Prepared, chosen_backend, kept_bytes, public
from selectra.bench.events import Run, Spread, Stopwatch, host_microseconds, time_in_turn
from selectra.bench.floor import Machine, at_clock_of, backward_floor, forward_floor, input_bytes, measure_machine
from selectra.bench.peers import Prepare, mamba_ssm_scan, precision, versions, vmamba_scan
from selectra.bench.scan_table import summary, table
from selectra.bench.shapes import CASES, Case
from selectra.errors import ConfigError
from selectra.ops import selective_scan
from selectra.train.record import environment

SEED = 0
# Inputs are taken in turn from so many sets that together they outgrow the cache.
MOST_SETS = 6
# The portable backend runs thousands of small kernels: it is timed at small shapes alone.
PORTABLE_ELEMENTS = 1 << 22
HOST_CASE = Case("host", 1, 64, 16, dtype="bf16")
PRECISION_CASES = tuple(Case("precision", 2, 256, 1024, dtype=dtype) for dtype in ("bf16", "fp32"))

Save = Callable[[dict[str, Any]], None]
Peers = dict[str, Prepare]


def bench_scan_gpu(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Save,
    cases: tuple[Case, ...] = CASES,
    backend: str | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Check, then time forward and backward of our operator and of installed peers; returns the record.

    Args:
        seconds: Time for each measurement: a shape, forward or backward.
        save: Is given the record so far after every shape.
        backend: Ours to time; the one that a call gets without.

    Raises:
        BackendError: Results are wrong; nothing is timed then.
    """
    started = time.perf_counter()
    choose = chosen_backend if backend is None else lambda _: backend
    peers, absent = find_peers()
    gated = _checked(peers, cases, device, choose)
    _say(console, gated, absent)
    watch = watch or Stopwatch(device)
    machine = measure_machine(watch)
    record: dict[str, Any] = {
        "benchmark": "scan_gpu",
        "what": "one scan with softplus, step bias and skip, below autograd; the forward keeps what the backward needs",
        "environment": environment(),
        "device": str(device),
        "seeds": {"inputs": SEED, "gate and precision": gate.SEED},
        "seconds for each measurement": seconds,
        "machine": machine.facts(),
        "peers": versions(),
        "absent": absent,
        "gate": gated,
        "host_microseconds": host_times(device, watch, choose),
        "precision": precisions(peers, device, choose, PRECISION_CASES),
        "rows": [],
    }
    for case in cases:
        record["rows"].append(measure(case, peers, seconds, watch, machine, choose))
        record["summary"] = summary(record["rows"])
        record["seconds"] = time.perf_counter() - started
        save(record)
        console.print(table(record["rows"][-1:], header=len(record["rows"]) == 1), highlight=False, soft_wrap=True)
    console.print(record["summary"], highlight=False)
    return record


def _say(console: Console, gated: dict[str, float], absent: dict[str, str]) -> None:
    for name, reason in absent.items():
        console.print(f"{name} is absent: {reason}", soft_wrap=True, highlight=False)
    console.print(f"correct against float64 in {len(gated)} kinds of call", highlight=False)


def find_peers() -> tuple[dict[str, Prepare], dict[str, str]]:
    """Other packages' kernels: those that can be timed, and why the others cannot."""
    builders = {"mamba_ssm": mamba_ssm_scan(), "VMamba": vmamba_scan()}
    found = {name: prepare for name, prepare in builders.items() if prepare is not None}
    return found, {name: "not installed" for name in builders if name not in found}


def takers(peers: Peers, case: Case, device: torch.device) -> Peers:
    """The peers that take this kind of call."""
    one = case._replace(b=1, l=1).arguments(device)
    found = {}
    for name, prepare in peers.items():
        with contextlib.suppress(ConfigError):
            prepare(one)
            found[name] = prepare
    return found


def _checked(
    peers: Peers, cases: tuple[Case, ...], device: torch.device, choose: Callable[[Arguments], str]
) -> dict[str, float]:
    """Ours and the peers against the reference; our worst error in each kind of call."""
    gated = gate.check_ours(cases, device, choose)
    for case in {case.kind: case for case in cases}.values():
        for name, prepare in takers(peers, case, device).items():
            gate.check_peer(name, prepare, case, device)
    return gated


def measure(
    case: Case,
    peers: Peers,
    seconds: float,
    watch: Stopwatch,
    machine: Machine,
    choose: Callable[[Arguments], str],
) -> dict[str, Any]:
    """One row of the record."""
    arguments = case.arguments(watch.device, SEED)
    backend = choose(arguments)
    found = gate.check_at_size(case, arguments, backend)
    sets = [arguments, *_more_sets(case, arguments, watch)]
    prepared: dict[str, list[Prepared]] = {"ours": [Ours(each, backend) for each in sets]}
    for name, prepare in takers(peers, case, watch.device).items():
        prepared[name] = [prepare(each) for each in sets]
    if backend != "portable" and case.elements <= PORTABLE_ELEMENTS:
        prepared["portable"] = [Ours(each, "portable") for each in sets]
    bare = [Ours(each, backend, save=False) for each in sets]
    forward: dict[str, Run] = {name: _forward(each) for name, each in prepared.items()}
    times = {"fwd": time_in_turn({**forward, "ours_unsaved": _forward(bare)}, seconds, watch)}
    machine = at_clock_of(lambda: forward["ours"](0), machine, watch)
    times["bwd"] = time_in_turn({name: _backward(each, sets) for name, each in prepared.items()}, seconds, watch)
    own = prepared["ours"][0]
    kept = kept_bytes(own, arguments)
    memory = {name: _memory(each[0], arguments, watch) for name, each in prepared.items()}
    floors = {"fwd": forward_floor(case, machine), "bwd": backward_floor(case, machine, kept)}
    row = case.facts() | {"backend": backend, "extra": case.extra}
    row |= _times(times, prepared)
    row |= {f"floor_{way}_ms": floor.ms for way, floor in floors.items()}
    row |= {f"floor_{way}": {"bytes_ms": f.bytes_ms, "special_ms": f.special_ms} for way, f in floors.items()}
    row |= {f"share_{way}": row[f"floor_{way}_ms"] / row[f"ours_{way}_ms"] for way in ("fwd", "bwd")}
    row |= {"clock": machine.clock, "input sets": len(sets), "input_bytes": input_bytes(arguments)}
    return row | {"memory": memory, "errors at size": found}


def _times(times: dict[str, dict[str, Spread]], prepared: dict[str, list[Prepared]]) -> dict[str, Any]:
    """Medians of ours and of the peer, its ratio to ours, the other contenders' medians, and everybody's spread."""
    # The first that is installed: mamba_ssm, which takes every case.
    peer = next((name for name in prepared if name not in ("ours", "portable")), None)
    row: dict[str, Any] = {"peer": peer}
    others = [name for name in prepared if name not in ("ours", peer)]
    row["others"] = {name: {f"{way}_ms": found[name].median for way, found in times.items()} for name in others}
    for way, found in times.items():
        row[f"ours_{way}_ms"] = found["ours"].median
        row[f"peer_{way}_ms"] = None if peer is None else found[peer].median
        row[f"ratio_{way}"] = None if peer is None else found[peer].median / found["ours"].median
    row["ours_unsaved_fwd_ms"] = times["fwd"]["ours_unsaved"].median
    row["spread"] = {way: {name: vars(spread) for name, spread in found.items()} for way, found in times.items()}
    return row


def _more_sets(case: Case, arguments: Arguments, watch: Stopwatch) -> list[Arguments]:
    """As many further input sets as it takes to outgrow a GPU's cache twice."""
    if not watch.cuda:
        return []
    cache = torch.cuda.get_device_properties(watch.device).L2_cache_size
    count = min(MOST_SETS, math.ceil(2 * cache / input_bytes(arguments)))
    return [case.arguments(watch.device, SEED + 1 + i) for i in range(count - 1)]


def _forward(sets: Sequence[Prepared]) -> Run:
    return lambda i: sets[i % len(sets)].forward()


def _backward(sets: Sequence[Prepared], arguments: list[Arguments]) -> Run:
    ready = []
    for each, inputs in zip(sets, arguments, strict=True):
        ready.append((each, each.forward(), each.own(_ones(inputs))))

    def run(i: int) -> object:
        each, outputs, dy = ready[i % len(ready)]
        return each.backward(outputs, dy)

    return run


def _ones(arguments: Arguments) -> Tensor:
    u = arguments["u"]
    assert u is not None
    return torch.randn_like(u)


def _memory(prepared: Prepared, arguments: Arguments, watch: Stopwatch) -> dict[str, float]:
    """Bytes kept for the backward, over the inputs' bytes too, and the peak of a training step beyond the inputs."""
    kept = kept_bytes(prepared, arguments)
    found = {"kept_bytes": kept, "kept_over_inputs": kept / input_bytes(arguments)}
    if watch.cuda:
        dy = prepared.own(_ones(arguments))
        watch.synchronize()
        torch.cuda.reset_peak_memory_stats(watch.device)
        before = torch.cuda.memory_allocated(watch.device)
        prepared.backward(prepared.forward(), dy)
        watch.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated(watch.device) - before
    return found


def host_times(device: torch.device, watch: Stopwatch, choose: Callable[[Arguments], str]) -> dict[str, float]:
    """The host's microseconds for one call of a small shape."""
    arguments = HOST_CASE.arguments(device, SEED)
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in arguments.items()}
    backend = choose(arguments)
    own = Ours(arguments, backend)
    usual = backend == chosen_backend(arguments)
    with contextlib.nullcontext() if usual else selective_scan.using(backend):
        return {
            "forward without gradient": host_microseconds(lambda: selective_scan(**public(arguments)), watch),
            "forward with gradient": host_microseconds(lambda: selective_scan(**public(leaves)), watch),
            "lowest level": host_microseconds(own.forward, watch),
        }


def precisions(
    peers: Peers,
    device: torch.device,
    choose: Callable[[Arguments], str],
    cases: tuple[Case, ...],
) -> list[dict[str, Any]]:
    """Errors of y and of every gradient against float64, ours beside each peer's."""
    rows = []
    for case in cases:
        arguments = case.arguments(device, gate.SEED)
        dy = gate.cotangent(arguments)
        contenders = {"ours": lambda arguments: Ours(arguments, choose(arguments)), **takers(peers, case, device)}
        found = precision(contenders, arguments, dy, gate.reference(arguments, dy, "portable"))
        errors = {what: {name: e._asdict() for name, e in each.items()} for what, each in found.items()}
        rows.append(case.facts() | {"errors": errors})
    return rows
