"""Where a GPU's time goes during a call: kernels by kind, what overlaps, and what the GPU waits for."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first kind whose pattern a kernel's name has; Selectra's own kernels have plain names.
KINDS = {
    "exchanges (NCCL)": r"nccl",
    "scan: effects of chunks": r"^scan_(states|adjoints?|chain\w*|effect\w*)\b",
    "scan: forward": r"^scan_(forward|short_forward)\b",
    "scan: backward": r"^scan_(backward|reduce|fold|short_backward|short_sum)\b",
    "convolution": r"^conv_",
    "norms": r"^(gated_)?norm_",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|splitK",
    "copies": r"memcpy|memset|copy_kernel|CatArray|direct_copy",
}
OTHER = "elementwise and the rest"
# Shorter gaps lie between any two kernels.
GAP = 20e-6


def shares(call: Callable[[], Any]) -> dict[str, Any]:
    """One call of `call`: milliseconds by kind of kernel, of the longest kernels, and without any.

    The call runs as it does without a profiler: Selectra takes other ways through PyTorch while one is at work.
    """
    enabled = torch._C._autograd._profiler_enabled  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._autograd._profiler_enabled = lambda: False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
    finally:
        torch._C._autograd._profiler_enabled = enabled  # pyright: ignore[reportAttributeAccessIssue]
    events = found.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    on_gpu = [e for e in events if e.device_type().name == "CUDA"]
    return summary([(e.name(), e.start_ns() / 1e9, e.duration_ns() / 1e9) for e in on_gpu])


def summary(events: list[tuple[str, float, float]]) -> dict[str, Any]:
    """Of names, starts and durations in seconds: all results in milliseconds."""
    if not events:
        return {"kernels": 0}
    kinds: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for name, _, duration in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)
        kinds.setdefault(kind, []).append(duration)
        names.setdefault(name[:90], []).append(duration)
    spans = sorted((start, start + duration) for _, start, duration in events)
    apart = [(s, e) for (name, s, d) in events for e in (s + d,) if not re.search("nccl", name)]
    busy, gaps = covered(spans)
    computing, _ = covered(sorted(apart))
    long = [gap for gap in gaps if gap > GAP]
    longest = sorted(names.items(), key=lambda pair: -sum(pair[1]))[:25]
    return {
        "kernels": len(events),
        "from the first to the last": 1e3 * (max(end for _, end in spans) - spans[0][0]),
        "busy": 1e3 * busy,
        "exchanges that hide behind nothing": 1e3 * (busy - computing),
        "idle": 1e3 * sum(gaps),
        "gaps of 20 us and more": {"number": len(long), "ms": 1e3 * sum(long)},
        "gaps of 1 ms and more": {"number": sum(g > 1e-3 for g in gaps), "ms": 1e3 * sum(g for g in gaps if g > 1e-3)},
        "by kind": {kind: {"number": len(t), "ms": 1e3 * sum(t)} for kind, t in sorted(kinds.items(), key=_total)},
        "longest": {name: {"number": len(t), "ms": 1e3 * sum(t)} for name, t in longest},
    }


def _total(pair: tuple[str, list[float]]) -> float:
    return -sum(pair[1])


def covered(spans: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """How long any of sorted spans lasts, and the gaps between them."""
    total, gaps, end = 0.0, [], None
    for start, stop in spans:
        if end is None or start > end:
            gaps += [] if end is None else [start - end]
            total += stop - start
            end = stop
        elif stop > end:
            total += stop - end
            end = stop
    return total, gaps
