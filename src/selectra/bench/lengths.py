"""`selectra bench lengths`: time against length, one attention layer's kernel against two scans, at equal parameters.

An attention layer of width d with its MLP has about 12 d^2 parameters, two Mamba blocks of inner width 2 d the same:
so one causal attention over heads of 64 stands against two scans of width 2 d. What is around them is not timed.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console

from selectra.bench import gate
from selectra.bench.calls import Arguments, Ours, Prepared, chosen_backend
from selectra.bench.events import Run, Stopwatch, time_in_turn
from selectra.bench.length_table import findings, length_table
from selectra.bench.peers import HEAD_SIZE, Prepare, check_sdpa, mamba_ssm_scan, sdpa, versions
from selectra.bench.shapes import DTYPES, Case
from selectra.errors import BackendError
from selectra.train.record import environment

SEED = 0
KERNELS = {"attention": "flash", "attention, cuDNN": "cudnn"}
# Beyond this length the scans share one set of inputs, which no cache holds anyway.
TWO_SETS = 16_385


class Study(NamedTuple):
    """What is measured: width, batch and lengths."""

    d_model: int = 1024
    batch: int = 8
    lengths: tuple[int, ...] = (
        512, 513, 1000, 1001, 1023, 1024, 1025, 1500, 2047, 2048, 2049, 2500, 3000, 3001, 3500, 3501, 4095, 4096, 4097,
        6000, 6001, 8191, 8192, 8193, 12000, 16384, 16385, 65536,
    )  # fmt: skip
    longest_peer: int = 16_385
    """Attention and other packages are timed up to here."""
    dtype: str = "bf16"

    def case(self, length: int) -> Case:
        """One of the two scans."""
        return Case(f"L{length}", self.batch, 2 * self.d_model, length, dtype=self.dtype)


def bench_lengths(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    study: Study | None = None,
    backend: str | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Check, then time forward and training step at every length; returns the record.

    Raises:
        BackendError: Results are wrong; nothing is timed then.
    """
    study, started = study or Study(), time.perf_counter()
    choose = chosen_backend if backend is None else lambda _: backend
    mamba_ssm = mamba_ssm_scan()
    _gate(study, device, choose, mamba_ssm)
    kernels, absent = _attention_kernels(study, device)
    watch = watch or Stopwatch(device)
    record: dict[str, Any] = {
        "benchmark": "lengths",
        "what": "one causal attention of width d against two scans of width 2 d; below autograd where they can be",
        "environment": environment(),
        "device": str(device),
        "seeds": {"inputs": SEED},
        "seconds for each measurement": seconds,
        "study": study._asdict(),
        "peers": versions(),
        "absent": absent | ({} if mamba_ssm else {"mamba_ssm": "not installed"}),
        "rows": [],
    }
    for length in study.lengths:
        short = length <= study.longest_peer
        scans = {"ours": _ours(choose)} | ({"mamba_ssm": mamba_ssm} if mamba_ssm and short else {})
        record["rows"].append(_measure(study, length, scans, kernels if short else {}, seconds, watch))
        record["seconds"] = time.perf_counter() - started
        save(record)
        text = length_table({**record, "rows": record["rows"][-1:]})
        console.print(text if length == study.lengths[0] else text.splitlines()[-1], highlight=False, soft_wrap=True)
    record["findings"] = findings(record)
    save(record)
    for line in record["findings"]["words"]:
        console.print(line, highlight=False, soft_wrap=True)
    return record


def _ours(choose: Callable[[Arguments], str]) -> Prepare:
    return lambda arguments: Ours(arguments, choose(arguments))


def _gate(study: Study, device: torch.device, choose: Callable[[Arguments], str], mamba_ssm: Prepare | None) -> None:
    case = study.case(study.lengths[0])
    gate.check_ours((case,), device, choose)
    # The longest too, where a tensor has more bytes than 32 bits can count.
    for each in (case, study.case(max(study.lengths))):
        arguments = each.arguments(device, SEED)
        gate.check_at_size(each, arguments, choose(arguments))
    if mamba_ssm is not None:
        gate.check_peer("mamba_ssm", mamba_ssm, case, device)


def _attention_kernels(study: Study, device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """The kernels of attention that this device has and that are right, and why not the others."""
    found, absent = {}, {}
    for name, kernel in KERNELS.items():
        try:
            errors = check_sdpa(kernel, DTYPES[study.dtype], device)
        except (BackendError, RuntimeError) as error:
            absent[name] = str(error).splitlines()[0]
            continue
        worst = gate.worse(*(error.largest for error in errors.values()))
        if not worst <= gate.PEERS_AT_MOST[study.dtype]:
            raise BackendError(f"{name} is off by {worst:.1e} of its maximum; the comparison would be void.")
        found[name] = kernel
    return found, absent


def _measure(
    study: Study,
    length: int,
    scans: dict[str, Prepare],
    kernels: dict[str, str],
    seconds: float,
    watch: Stopwatch,
) -> dict[str, Any]:
    case = study.case(length)
    sets = [case.arguments(watch.device, SEED + i) for i in range(2 if length <= TWO_SETS else 1)]
    runs: dict[str, dict[str, Run]] = {"fwd": {}, "train": {}}
    for name, prepare in scans.items():
        pair = [prepare(each) for each in sets]
        forward, training = _steps(pair if len(pair) == 2 else 2 * pair, sets[0])
        runs["fwd"][name], runs["train"][name] = forward, training
    for name, kernel in kernels.items():
        dtype = DTYPES[study.dtype]
        layer = sdpa(study.batch, length, study.d_model, dtype, watch.device, kernel=kernel, seed=SEED)
        dy = torch.randn(study.batch, length, study.d_model, dtype=dtype, device=watch.device)
        dy = dy.unflatten(2, (-1, HEAD_SIZE)).transpose(1, 2)
        runs["fwd"][name], runs["train"][name] = _layer_steps(layer, dy)
    row: dict[str, Any] = {"B": study.batch, "d_model": study.d_model, "L": length, "fwd_ms": {}, "train_ms": {}}
    row["spread"] = {}
    for way, found in runs.items():
        times = time_in_turn(found, seconds, watch)
        row[f"{way}_ms"] = {name: spread.median for name, spread in times.items()}
        row["spread"][way] = {name: vars(spread) for name, spread in times.items()}
    return row


def _steps(pair: list[Prepared], arguments: Arguments) -> tuple[Run, Run]:
    """Both scans' forward; forward and backward of both, as two blocks one after the other would."""
    u = arguments["u"]
    assert u is not None
    dy = torch.randn_like(u)
    own = [each.own(dy) for each in pair]

    def forward(_: int) -> object:
        return [each.forward() for each in pair]

    def training(_: int) -> object:
        outputs = [each.forward() for each in pair]
        return [
            each.backward(out, grad) for each, out, grad in zip(reversed(pair), reversed(outputs), own, strict=True)
        ]

    return forward, training


def _layer_steps(layer: Any, dy: torch.Tensor) -> tuple[Run, Run]:
    def forward(_: int) -> object:
        return layer.forward()

    def training(_: int) -> object:
        return layer.backward(layer.forward(), dy)

    return forward, training
