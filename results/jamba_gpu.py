"""One block of Jamba at published sizes on a GPU: `python results/jamba_gpu.py OUT.json`.

8 layers, 1 attention, 4 mixtures of 16 experts: 12.8 billion parameters in bfloat16, random weights made on the GPU.
Prefill in chunks and decoding (one CUDA graph a token, batch 1) at contexts from 4 K to 256 K tokens, and what memory
they take; beside it a dense Transformer of 8 attention layers with as many active parameters. `--tiny` tries everything
at a small size first and writes no record.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decode_gpu import CHUNK, facts, made_on_gpu, median_ms, prefill

import selectra.models  # noqa: F401
from selectra.language.graphed import GraphedStep
from selectra.layers.moe import MoE
from selectra.mixers.attention import KeyValue
from selectra.registry import models
from selectra.spec import Spec

CONTEXTS, ROOM, REPEATS = (4096, 32768, 143360, 262144), 128, 40
SIZES = {"vocab_size": 65536, "d_model": 4096, "n_heads": 32, "n_kv_heads": 8}
TINY = {"vocab_size": 1024, "d_model": 512, "n_heads": 4, "n_kv_heads": 1}
TINY_CONTEXTS = (256, 700)


def active_parameters(model: Any) -> int:
    """Those that a token goes through."""
    unused = 0
    for module in model.modules():
        if isinstance(module, MoE):
            share = 1 - module.top_k / module.n_experts
            unused += int(share * sum(p.numel() for p in module.experts.parameters()))
    return sum(p.numel() for p in model.parameters()) - unused


def build(name: str, **options: Any) -> Any:
    """A model with random weights; those that are made in float32 are brought to bfloat16."""
    with made_on_gpu():
        return models.build(Spec(name, **options)).to(torch.bfloat16).eval()


def rival_of(active: int, sizes: dict[str, int]) -> dict[str, int]:
    """A Transformer of 8 layers with as many parameters as are active."""
    d_model, depth = sizes["d_model"], 8
    attention = 2 * d_model * d_model * (1 + sizes["n_kv_heads"] / sizes["n_heads"])
    rest = active - 2 * sizes["vocab_size"] * d_model - depth * (attention + 2 * d_model)
    return {**sizes, "depth": depth, "d_ff": round(rest / (depth * 3 * d_model) / 64) * 64}


def measured(model: Any, contexts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Prefill, decoding and memory at each context."""
    token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    # Libraries and kernels take their memory now, and the chunk's products choose theirs.
    prefill(model, model.init_state(1, capacity=CHUNK), min(CHUNK, contexts[0]))
    GraphedStep(model, model.init_state(1, capacity=8))
    for context in contexts:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state = model.init_state(1, capacity=context + ROOM)
        caches = [layer for layer in state.layers if isinstance(layer, KeyValue)]
        attention = sum(tensor.nbytes for cache in caches for tensor in (cache.keys, cache.values))
        seconds = prefill(model, state, context)
        prefill_peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = GraphedStep(model, state)
        ms = median_ms(lambda step=step: step(token), REPEATS)
        yield {
            "context": context,
            "room": context + ROOM,
            "prefill_seconds": seconds,
            "ms_per_token": ms,
            "attention_bytes": attention,
            "other_state_bytes": state.n_bytes - attention,
            "prefill_peak_bytes": prefill_peak,
            "decode_peak_bytes": torch.cuda.max_memory_allocated() - before,
        }
        del step, state, caches


@torch.no_grad()
def main(out: Path | None, tiny: bool) -> None:
    """Measure, print and write after every row."""
    sizes, contexts = (TINY, TINY_CONTEXTS) if tiny else (SIZES, CONTEXTS)
    small = {"d_ff": 256} if tiny else {}
    found: dict[str, Any] = {**facts("jamba_gpu.py OUT.json"), "chunk": CHUNK, "models": {}}
    found["cache_bytes_per_token"] = 2 * 2 * sizes["d_model"] // sizes["n_heads"] * sizes["n_kv_heads"]

    def part(key: str, model: Any) -> int:
        active = active_parameters(model)
        found["models"][key] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "active_parameters": active,
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
            "rows": [],
        }
        for row in measured(model, contexts):
            found["models"][key]["rows"].append(row)
            print(key, row, flush=True)  # noqa: T201
            if out is not None:
                out.write_text(json.dumps(found, indent=2) + "\n")
        return active

    active = part("jamba", build("jamba_block", **sizes, **small))
    torch.cuda.empty_cache()
    rival = rival_of(active, sizes)
    found["rival"] = f"Transformer of 8 layers, d_ff {rival['d_ff']}"
    part("attention", build("gpt", **rival))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    main(None if arguments.tiny else arguments.out, arguments.tiny)
