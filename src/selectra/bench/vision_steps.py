"""Inference and training steps of classifiers under bfloat16 autocast, their times and their peak memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.bench.events import Stopwatch, time_in_turn
from selectra.bench.timing import interleaved
from selectra.errors import BackendError, ConfigError
from selectra.spec import nearest

Step = Callable[[], object]
# Steps before one is recorded as a graph, as PyTorch's documentation asks for.
WARM = 3
# The host's time wavers from step to step.
LEAST_ROUNDS = 9


def images(batch: int, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (b, 3, size, size) and classes out of 1000."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator, device=device)
    return x, torch.randint(1000, (batch,), generator=generator, device=device)


def inference_of(model: nn.Module, x: Tensor) -> Step:
    """Scores without gradient."""

    def run() -> object:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
            return model(x)

    return run


def training_of(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """Forward, backward and AdamW, which runs as one kernel for all parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=x.is_cuda)

    def run() -> object:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return run


def as_one_graph(step: Step, device: torch.device) -> Step:
    """The step recorded once as a CUDA graph: the host launches it whole, and its own speed does not count.

    Raises:
        BackendError: The device is no GPU.
    """
    if device.type != "cuda":
        raise BackendError(f"a step on {device} cannot be recorded as a CUDA graph; measure on a GPU, device 'cuda'.")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # What kernels choose, compile or allocate at first is not for the graph.
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def compiled_blocks(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """Compile each block in place, blocks of one kind and shape together; what lies around them stays eager."""
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
    return model


def times(steps: Mapping[str, Step], seconds: float, watch: Stopwatch) -> dict[str, dict[str, Any]]:
    """Of every step: wall clock with the host's time in it, and the device's own time by events, in turn."""
    walls = interleaved(steps, seconds, watch.device, LEAST_ROUNDS)
    own = time_in_turn({name: _numbered(step) for name, step in steps.items()}, seconds, watch)
    return {
        name: {
            "wall_ms": {"median": 1e3 * walls[name].median, "fastest": 1e3 * walls[name].fastest},
            "rounds": walls[name].rounds,
            "device_ms": asdict(own[name]),
        }
        for name in steps
    }


def _numbered(step: Step) -> Callable[[int], object]:
    return lambda _: step()


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Bytes at the peak of a step beyond what lies there before: weights, images and optimizer; None on a CPU."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rows_named(only: str | None, rows: dict[str, Any], usual: Sequence[Any] | None = None) -> list[Any]:
    """Those of a part's rows that are asked for: one, or the usual ones, or all."""
    if only is None:
        return list(rows.values() if usual is None else usual)
    if only not in rows:
        raise ConfigError(f"there is no row '{only}'; there are {', '.join(rows)}.{nearest(only, rows)}")
    return [rows[only]]
