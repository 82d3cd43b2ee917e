"""Decoding on a GPU beside the time that reading the weights takes: `python results/decode_gpu.py OUT.json`.

A Mamba of 1.4 billion parameters with random weights in bfloat16, batch 1, one CUDA graph a token; its memory at
contexts from 1 K to 256 K tokens; a Transformer of the same size with the same step; and `transformers`' Mamba where
it is installed. Medians of CUDA events. `--tiny` tries everything at a small size first and writes no record.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import selectra.models  # noqa: F401
from selectra.language.graphed import GraphedStep
from selectra.ops import add_norm
from selectra.registry import models
from selectra.spec import Spec

CHUNK, ROOM = 4096, 256
VOCAB = 50280
# Name, contexts: a Transformer of the size of the Mamba has 24 layers of width 2048.
FULL = (("mamba_lm_1b4", (1024, 4096, 16384, 65536, 262144)), ("gpt_1b3", (1024, 4096, 16384, 65536)))
TINY = (("mamba_lm_130m", (128, 300)), ("gpt_125m", (128,)))
THEIRS = {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": VOCAB}


def median_ms(call: Callable[[], object], repeats: int = 50) -> float:
    """Of one call, by CUDA events."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bandwidth(n_bytes: int = 2**31) -> float:
    """Bytes a second read and written by a copy."""
    source, target = (torch.empty(n_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * n_bytes / (median_ms(lambda: target.copy_(source), 20) / 1e3)


@contextmanager
def made_on_gpu() -> Iterator[None]:
    """Weights are drawn in bfloat16 on the GPU, never elsewhere."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(previous)


def build(name: str, **options: Any) -> Any:
    """A model with random weights."""
    with made_on_gpu():
        return models.build(Spec(name, **options), {"vocab_size": VOCAB}).to(torch.bfloat16).eval()


def facts(script: str) -> dict[str, Any]:
    """What a record says of its making."""
    return {
        "command": f"python results/{script}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seed": 0,
    }


def prefill(model: Any, state: Any, context: int, chunk: int = CHUNK) -> float:
    """Read random tokens in chunks; seconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for start in range(0, context, chunk):
        n = min(chunk, context - start)
        model.step_(torch.randint(1000, (1, n), device="cuda"), state, n_logits=1)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def decoding(model: Any, contexts: tuple[int, ...]) -> Iterator[dict[str, float]]:
    """Time of a token and memory of the state behind contexts of different lengths."""
    token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    # Libraries and kernels take their memory now.
    prefill(model, model.init_state(1, capacity=256), 256)
    GraphedStep(model, model.init_state(1, capacity=8))
    for context in contexts:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state = model.init_state(1, capacity=context + ROOM)
        seconds = prefill(model, state, context)
        prefill_peak = torch.cuda.max_memory_allocated() - before
        step = GraphedStep(model, state)
        torch.cuda.reset_peak_memory_stats()
        yield {
            "context": context,
            "ms_per_token": median_ms(lambda step=step: step(token)),
            "state_bytes": state.n_bytes,
            "prefill_seconds": seconds,
            "prefill_peak_bytes": prefill_peak,
            "allocated_bytes": torch.cuda.max_memory_allocated() - before,
        }
        del step, state


def other_ways(model: Any) -> dict[str, float]:
    """The same step without its kernel, and without a graph."""
    state, token = model.init_state(1), torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    ways = {"without a graph": median_ms(lambda: model.step_(token, state), 20)}
    # A backend that is asked for leaves every operator to itself.
    with add_norm.using("cuda"):
        step = GraphedStep(model, state)
        ways["operator by operator, in a graph"] = median_ms(lambda: step(token))
        ways["operator by operator, without a graph"] = median_ms(lambda: model.step_(token, state), 10)
    return ways


def theirs(options: dict[str, int]) -> dict[str, Any]:
    """`transformers`' Mamba of the same size, its own step with its cache; no graph."""
    try:
        package: Any = importlib.import_module("transformers")
    except ImportError as error:
        return {"not run": str(error)}
    with made_on_gpu():
        model = package.MambaForCausalLM(package.MambaConfig(**options)).to(torch.bfloat16).eval()
    prompt = torch.randint(1000, (1, 16), device="cuda")
    times = [
        median_ms(lambda n=n: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False), 3)
        for n in (4, 20)
    ]
    return {"version": package.__version__, "ways": {"generate": (times[1] - times[0]) / 16}}


@torch.no_grad()
def main(out: Path | None, tiny: bool) -> None:
    """Measure, print and write after every part."""
    bandwidth = copy_bandwidth(2**27 if tiny else 2**31)
    found: dict[str, Any] = {**facts("decode_gpu.py OUT.json"), "copy_bytes_per_second": bandwidth, "models": {}}

    def write(what: object) -> None:
        print(what, flush=True)  # noqa: T201
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n")

    for name, contexts in TINY if tiny else FULL:
        model = build(name)
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        floor = n_bytes / bandwidth * 1e3
        part = found["models"][name] = {"weight_bytes": n_bytes, "floor_ms": floor, "rows": []}
        for row in decoding(model, contexts):
            part["rows"].append(row | {"over_floor": row["ms_per_token"] / floor})
            write((name, part["rows"][-1]))
        if name.startswith("mamba"):
            found["ways"] = other_ways(model)
            write(found["ways"])
        del model
        torch.cuda.empty_cache()
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1024}
    found["transformers"] = theirs(small if tiny else THEIRS)
    write(found["transformers"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    main(None if arguments.tiny else arguments.out, arguments.tiny)
