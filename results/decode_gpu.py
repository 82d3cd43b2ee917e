"""Decoding on a GPU beside the time that reading the weights takes: `python results/decode_gpu.py OUT.json`.

A Mamba of 1.3 billion parameters with random weights in bfloat16, batch 1, one CUDA graph a token; its memory at
contexts from 1 K to 256 K tokens; a Transformer of the same size with the same step; and `transformers`' Mamba where
it is installed. Medians of CUDA events.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch

import selectra.models  # noqa: F401
from selectra.language.graphed import GraphedStep
from selectra.registry import models
from selectra.spec import Spec

CONTEXTS = (1024, 4096, 16384, 65536, 262144)


def median_ms(call: Any, repeats: int = 50) -> float:
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


def build(name: str, **options: Any) -> Any:
    """A model with random weights, made in bfloat16 on the GPU."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return models.build(Spec(name, **options)).to(torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(previous)


def decoding(model: Any, contexts: tuple[int, ...]) -> list[dict[str, float]]:
    """Time of a token and memory of the state behind contexts of different lengths."""
    rows = []
    for context in contexts:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state = model.init_state(1, capacity=context + 256)
        for start in range(0, context, 4096):
            n = min(4096, context - start)
            model.step_(torch.randint(1000, (1, n), device="cuda"), state, n_logits=1)
        prefill_peak = torch.cuda.max_memory_allocated() - before
        step = GraphedStep(model, state)
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        rows.append(
            {
                "context": context,
                "ms_per_token": median_ms(lambda step=step, token=token: step(token)),
                "state_bytes": state.n_bytes,
                "prefill_peak_bytes": prefill_peak,
                "allocated_bytes": torch.cuda.memory_allocated() - before,
            }
        )
        del step, state
    return rows


def theirs() -> dict[str, Any]:
    """`transformers`' Mamba of the same size, its own step with its cache; no graph."""
    try:
        package: Any = importlib.import_module("transformers")
    except ImportError as error:
        return {"not run": str(error)}
    config = package.MambaConfig(hidden_size=2048, num_hidden_layers=48, vocab_size=50280)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = package.MambaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)
    prompt = torch.randint(1000, (1, 16), device="cuda")
    times = [
        median_ms(lambda n=n: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False), 3)
        for n in (16, 48)
    ]
    return {"version": package.__version__, "ms_per_token": (times[1] - times[0]) / 32}


@torch.no_grad()
def main(out: Path) -> None:
    """Measure, print and write."""
    bandwidth = copy_bandwidth()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "models": {},
    }
    # A Transformer with the size of the Mamba: 24 layers of width 2048.
    for name, contexts in (("mamba_lm_1b4", CONTEXTS), ("gpt_1b3", CONTEXTS[:3])):
        model = build(name, **({"vocab_size": 50280} if name == "gpt_1b3" else {}))
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        floor = n_bytes / bandwidth * 1e3
        rows = decoding(model, contexts)
        for row in rows:
            row["over_floor"] = row["ms_per_token"] / floor
            print(name, row, flush=True)  # noqa: T201
        found["models"][name] = {"weight_bytes": n_bytes, "floor_ms": floor, "rows": rows}
        out.write_text(json.dumps(found, indent=2) + "\n")
        del model
        torch.cuda.empty_cache()
    found["transformers"] = theirs()
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(found["transformers"])  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
