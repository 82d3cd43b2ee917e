"""Where a training step's time goes: the GPU's time of scan, convolution, copies, products and the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CALLS = 3
SHARES = ("scan", "convolution", "copies", "products", "norms", "casts of weights", "optimizer", "rest")
# By the start or a part of a kernel's name; others are told by the operator that launched them.
KERNELS = {
    "scan_": "scan",
    "sum_routes": "scan",
    "selective_scan": "scan",
    "conv_": "convolution",
    "causal_conv1d": "convolution",
    "norm_": "norms",
    "triton_cross": "copies",
}
OPERATORS = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_"), "products"),
    **dict.fromkeys(("aten::cat", "aten::copy_", "aten::clone", "aten::flip"), "copies"),
    **dict.fromkeys(
        ("aten::cudnn_convolution", "aten::_conv_depthwise2d", "aten::convolution_backward", "aten::conv_depthwise3d"),
        "convolution",
    ),
    **dict.fromkeys(("aten::native_layer_norm", "aten::native_layer_norm_backward"), "norms"),
    "aten::_fused_adamw_": "optimizer",
}


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the GPU for each kind of work of one step, and their sum, "all"."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
    times: dict[str, float] = dict.fromkeys(SHARES, 0.0)
    everything = 0.0
    for event in found.events() or []:
        if event.device_type == DeviceType.CUDA:
            # Annotations lie on the GPU's track too; they hold kernels and are none.
            if not _is_annotation(event):
                everything += event.time_range.elapsed_us()
        elif event.kernels:
            for kernel in event.kernels:
                times[_kind(kernel.name, event)] += kernel.duration
    times["rest"] += everything - sum(times.values())
    return {kind: time / CALLS / 1e3 for kind, time in times.items()} | {"all": everything / CALLS / 1e3}


def _is_annotation(event: Any) -> bool:
    return getattr(event, "is_user_annotation", False)


def _kind(kernel: str, event: Any) -> str:
    for name, kind in KERNELS.items():
        if kernel.startswith(name) or (not name.endswith("_") and name in kernel):
            return kind
    kind = OPERATORS.get(event.name, "rest")
    return "casts of weights" if kind == "copies" and _inside(event, "aten::_to_copy") else kind


def _inside(event: Any, name: str) -> bool:
    while event is not None:
        if event.name == name:
            return True
        event = event.cpu_parent
    return False
