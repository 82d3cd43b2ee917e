"""Cost curves: time, memory and energy of models of equal size against length or resolution.

Forward passes, training steps (forward, backward and AdamW) and generated tokens; each row is kept at once, so that a
stopped measurement goes on where it was.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.compare.curve_kinds import KINDS, Curves
from selectra.compare.energy import Counter, counter_of
from selectra.compare.match import match_even
from selectra.compare.measure import build_model, kept_for_backward
from selectra.compare.results import crossover
from selectra.compare.room import require_room
from selectra.compare.sampling import idle_watts, sample
from selectra.errors import ConfigError
from selectra.language.graphed import GraphedStep
from selectra.language.stream import fork
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.precision import autocast
from selectra.train.record import BackendWatch, environment

WHAT, FORMAT = "selectra costs", 1
MODES = ("forward", "step", "decode")
SECONDS, IDLE_SECONDS = 0.3, 1.0
# Tokens that are generated in a row before the state is taken back to its position, and room for as many and a warm-up.
TOKENS_IN_ROW, ROOM = 16, 24
DECODED_ROWS = 16
# A model that takes longer for a call is not measured at further points.
TOO_SLOW_MS = 1.5e3
SEED = 0
Row = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What is measured.

    Args:
        kinds: Of `KINDS`.
        models: Names; empty takes all of each kind.
        params: Parameters of every model; None is each kind's own.
        points: Lengths or resolutions; empty takes each kind's own.
        seconds: Time behind each median, at the least.
        until: Moment of `time.monotonic` after which nothing is begun.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    models: tuple[str, ...] = ()
    params: float | None = None
    points: tuple[int, ...] = ()
    seconds: float = SECONDS
    until: float = inf


class Work(NamedTuple):
    """Something to be done over and over, and how many tokens, images or windows it is."""

    call: Callable[[], object]
    units: int
    batch: int
    memory_mb: float | None = None


def new_record(wish: Wish, device: torch.device, counter: Counter) -> Row:
    """A record without rows."""
    kinds = {name: _kind_facts(KINDS[name], wish, device) for name in wish.kinds}
    return {
        "what": WHAT, "format": FORMAT, "environment": environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "settings": {
            "seconds for each median": wish.seconds, "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
            "tf32 in cuDNN": bool(torch.backends.cudnn.allow_tf32),
            "compiled": False, "layout": "channels last inside, images NCHW in",
            "forward and training step": "eager, one call begun before the last one ends",
            "generated tokens": "CUDA graph" if device.type == "cuda" else "eager",
            "optimizer": "AdamW, fused" if device.type == "cuda" else "AdamW",
            "threads": torch.get_num_threads(), "seed": SEED,
        },
        "energy": counter.source, "idle_watts": idle_watts(device, counter, IDLE_SECONDS), "kinds": kinds,
    }  # fmt: skip


def _kind_facts(curves: Curves, wish: Wish, device: torch.device) -> Row:
    return {
        "question": curves.question, "axis": curves.axis, "unit": curves.unit, "precision": curves.precision_on(device),
        "params": wish.params or curves.params_on(device), "subjects": list(curves.subjects), "models": [], "rows": [],
        "crossings": [],
    }  # fmt: skip


def measure_curves(
    wish: Wish, device: torch.device, save: Callable[[Row], None], say: Callable[[str], None], before: Row | None = None
) -> Row:
    """Measure what is not in the record yet.

    Args:
        save: Called with the record after every row.
        say: Called with a line for every row.
        before: The record that is gone on with.

    Raises:
        ConfigError: A name is unknown, or the record is of something else.
    """
    _check(wish)
    counter = counter_of(device)
    fresh = new_record(wish, device, counter)
    record = fresh if before is None else _gone_on_with(before, fresh)
    if before is None and counter.read is None:
        say(counter.source)
    for name in wish.kinds:
        for row in _rows(KINDS[name], record["kinds"][name], wish, device, counter):
            record["kinds"][name]["crossings"] = crossings(record["kinds"][name])
            save(record)
            say(f"{name}: {said(row, KINDS[name].unit)}")
    save(record)
    return record


def _check(wish: Wish) -> None:
    unknown = [name for name in wish.kinds if name not in KINDS]
    if unknown:
        raise ConfigError(f"there are no cost curves for '{unknown[0]}'; there are {', '.join(KINDS)}.")
    known = [name for kind in wish.kinds for name in KINDS[kind].models]
    for name in wish.models:
        if name not in known:
            raise ConfigError(f"there is no cost curve of '{name}'; there are {', '.join(known)}.")


def _gone_on_with(before: Row, fresh: Row) -> Row:
    """The earlier record, if it was made here and in the same way."""
    for name in ("format", "device", "settings"):
        if before.get(name) != fresh[name]:
            raise ConfigError(f"the record has {name} {before.get(name)!r}, and here it is {fresh[name]!r}; "
                              "name another file with --store.")  # fmt: skip
    for name, kind in fresh["kinds"].items():
        old = before["kinds"].setdefault(name, kind)
        if (old["params"], old["precision"]) != (kind["params"], kind["precision"]):
            raise ConfigError(f"the record's {name} models have {old['params']:,.0f} parameters, and now "
                              f"{kind['params']:,.0f} are asked for; name another file with --store.")  # fmt: skip
    return before


def said(row: Row, unit: str) -> str:
    """A row as a line."""
    where = f"{row['model']}, {row['mode']} at {row['point']}"
    if "reason" in row:
        return f"{where}: {row['reason']}"
    energy = "" if row["unit_mj"] is None else f", {row['unit_mj']:.4g} mJ"
    return f"{where}: {row['ms']:.3f} ms, {row['unit_us']:.4g} us{energy} a {unit}"


def _rows(curves: Curves, kind: Row, wish: Wish, device: torch.device, counter: Counter) -> Iterator[Row]:
    """Measure and add the rows of a kind; all models at one point before the next point."""
    done = {(row["model"], row["mode"], row["point"]) for row in kind["rows"]}
    bench = _Bench(curves, kind, device)
    for mode, point, name in _places(curves, wish, device):
        if (name, mode, point) in done or time.monotonic() >= wish.until:
            continue
        row: Row = {"model": name, "mode": mode, "point": point}
        longest = max((each.get("ms", 0.0) for each in kind["rows"] if (each["model"], each["mode"]) == (name, mode)),
                      default=0.0)  # fmt: skip
        if longest > TOO_SLOW_MS:
            kind["rows"].append(row | {"reason": f"left out: a call took {longest / 1e3:.1f} s at another point"})
            yield kind["rows"][-1]
            continue
        try:
            row |= bench.measure(name, mode, point, wish, counter)
        except (ConfigError, RuntimeError) as error:
            # A kernel that refuses a shape is a finding; PyTorch tells it by RuntimeError alone.
            row["reason"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else _first_line(error)
            bench.forget()
        kind["rows"].append(row)
        yield row


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _places(curves: Curves, wish: Wish, device: torch.device) -> Iterator[tuple[str, int, str]]:
    """Model by model, so that each is built once."""
    chosen = [name for name in curves.models if not wish.models or name in wish.models]
    points = wish.points or curves.points_on(device)
    decoded = (wish.points or curves.decoded_on(device)) if curves.decoded[0] else ()
    for name in chosen:
        for point in points:
            yield "forward", point, name
            yield "step", point, name
        for point in decoded:
            yield "decode", point, name


@dataclass
class _Bench:
    """Builds models, each once while it serves."""

    curves: Curves
    kind: Row
    device: torch.device
    sizes: dict[tuple[str, int], Spec] = field(default_factory=dict)
    built: tuple[Any, nn.Module] | None = None

    def measure(self, name: str, mode: str, point: int, wish: Wish, counter: Counter) -> Row:
        """One row."""
        spec = self.sized(name, point, wish)
        facts = self.curves.facts(point + ROOM if mode == "decode" else point)
        dtype = getattr(torch, self.curves.precision_on(self.device)) if mode == "decode" else torch.float32
        model = self.model(spec, facts, dtype)
        # Gradients of an earlier step are none of this work's memory.
        model.zero_grad(set_to_none=True)
        torch.manual_seed(SEED)
        work = WORKS[mode](self, model, point)
        watch = BackendWatch()
        with watch:
            work.call()
        found = sample(work.call, self.device, wish.seconds, counter)
        memory = found.peak_mb if work.memory_mb is None else work.memory_mb
        joules = None if found.joules is None else 1e3 * found.joules / work.units
        return {
            "batch": work.batch, "units": work.units, **found.to_json(), "unit_us": 1e3 * found.ms / work.units,
            "unit_mj": joules, "memory_mb": memory, "backends": watch.found(),
            "parameters": sum(each.numel() for each in model.parameters()),
        }  # fmt: skip

    def sized(self, name: str, point: int, wish: Wish) -> Spec:
        """The model at the parameters of all; noted in the record."""
        at = self.curves.matched_at or point
        if (name, at) not in self.sizes:
            wanted = wish.params or self.curves.params_on(self.device)
            require_room(f"'{name}'", wanted, self.device)
            spec, got = match_even(self.curves.models[name], self.curves.facts(at), wanted)
            self.sizes[name, at] = spec
            self.kind["models"].append({"name": name, "point": at, "spec": json.loads(json.dumps(spec.to_json())),
                                        "parameters": got})  # fmt: skip
        return self.sizes[name, at]

    def model(self, spec: Spec, facts: Row, dtype: torch.dtype) -> nn.Module:
        """On the device; the last one again where nothing that it is made of has changed."""
        key = (spec, {name: item.value for name, item in models.resolve(spec, facts).items()}, dtype)
        if self.built is None or self.built[0] != key:
            self.forget()
            self.built = (key, build_model(spec, facts, self.device).to(self.device, dtype))
        return self.built[1]

    def forget(self) -> None:
        """Give memory back."""
        self.built = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def inputs(self, batch: int, point: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Random inputs, and a loss of the outputs with random targets."""
        facts = self.curves.facts(point)
        if self.curves.kind == "language":
            tokens = torch.randint(facts["vocab_size"], (2, batch, point), device=self.device)
            return tokens[0], lambda y: F.cross_entropy(y.flatten(0, 1).float(), tokens[1].flatten())
        if self.curves.kind == "image":
            labels = torch.randint(facts["n_classes"], (batch,), device=self.device)
            images = torch.randn(batch, facts["in_channels"], point, point, device=self.device)
            return images, lambda y: F.cross_entropy(y.float(), labels)
        target = torch.randn(batch, facts["horizon"], facts["n_series"], device=self.device)
        windows = torch.randn(batch, point, facts["n_series"], device=self.device)
        return windows, lambda y: F.mse_loss(y.float(), target)

    def units(self, batch: int, point: int) -> int:
        """Tokens, images or windows of a batch."""
        return batch * point if self.curves.kind == "language" else batch

    def forward_work(self, model: nn.Module, point: int) -> Work:
        """A forward pass."""
        batch = self.curves.batch_on(self.device, point)
        x, _ = self.inputs(batch, point)
        model.eval()

        @torch.no_grad()
        def call() -> None:
            with autocast(self.device, self.curves.precision_on(self.device)):
                model(x)

        return Work(call, self.units(batch, point), batch)

    def step_work(self, model: nn.Module, point: int) -> Work:
        """A training step."""
        batch = self.curves.batch_on(self.device, point)
        x, loss_of = self.inputs(batch, point)
        model.train()
        on_gpu = self.device.type == "cuda"
        # Weights stay as they are, whatever random targets ask for.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=on_gpu)

        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast(self.device, self.curves.precision_on(self.device)):
                loss = loss_of(model(x))
            loss.backward()
            optimizer.step()

        kept = None if on_gpu else kept_for_backward(model, x)
        return Work(call, self.units(batch, point), batch, kept)

    def decode_work(self, model: Any, point: int) -> Work:
        """Some tokens for each row, one after the other, behind `point` earlier ones."""
        model.eval()
        state = model.init_state(1, point + ROOM)
        past = torch.randint(model.vocab_size, (1, point), device=self.device)
        model.step_(past, state, n_logits=1)
        state = fork(state, torch.zeros(DECODED_ROWS, dtype=torch.long, device=self.device))
        tokens = past[:, :1].expand(DECODED_ROWS, 1).contiguous()
        step = GraphedStep(model, state) if self.device.type == "cuda" else lambda each: model.step_(each, state)
        places = [(each, each.clone()) for each in state.tensors().values() if not each.is_floating_point()]

        @torch.no_grad()
        def call() -> None:
            for _ in range(TOKENS_IN_ROW):
                step(tokens)
            for place, start in places:
                place.copy_(start)

        return Work(call, TOKENS_IN_ROW * DECODED_ROWS, DECODED_ROWS, state.n_bytes / 2**20)


WORKS: dict[str, Callable[[_Bench, nn.Module, int], Work]] = {
    "forward": _Bench.forward_work, "step": _Bench.step_work, "decode": _Bench.decode_work,
}  # fmt: skip


def crossings(kind: Row) -> list[Row]:
    """From which point on each Mamba costs less than each other model, by quantity; see `results.crossover`."""
    rows = [row for row in kind["rows"] if "reason" not in row]
    names = list(dict.fromkeys(row["model"] for row in rows))
    found = []
    for mode in MODES:
        for quantity in ("unit_us", "unit_mj", "memory_mb"):
            for subject in (name for name in names if name in kind["subjects"]):
                for rival in (name for name in names if name not in kind["subjects"]):
                    pair = [_curve(rows, name, mode, quantity) for name in (subject, rival)]
                    if all(pair):
                        found.append({"mode": mode, "quantity": quantity, "subject": subject, "rival": rival,
                                      "point": crossover(pair[0], pair[1], "value")})  # fmt: skip
    return found


def _curve(rows: Sequence[Row], model: str, mode: str, quantity: str) -> list[Row]:
    return [{"length": row["point"], "value": row[quantity]} for row in rows
            if row["model"] == model and row["mode"] == mode and row[quantity] is not None]  # fmt: skip
