"""Where a block's time goes: the GPU's time of each part of a norm + S6 block, from PyTorch's profiler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6

CALLS = 5
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_")
COPIES = ("aten::cat", "aten::copy_", "aten::clone")
# Kernels of this package by the start of their names.
OURS = {"scan_": "scan", "conv_": "conv", "norm_": "norm"}
PARTS = ("norm", "in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj", "copies", "elementwise and sums")


class BlockSize(NamedTuple):
    """A block and its input."""

    tag: str
    batch: int
    length: int
    d_model: int


def residual_block(d_model: int) -> PreNorm:
    """The block whose parts are timed."""
    return PreNorm(AddNorm(d_model), S6(d_model))


def joined(block: PreNorm) -> PreNorm:
    """The same block with PyTorch's own backward of the projections, which a module that has a hook gets."""
    assert isinstance(block.mixer, S6)
    for linear in (block.mixer.in_proj, block.mixer.x_proj):
        linear.register_forward_hook(_nothing)
    return block


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def forward_of(block: nn.Module, x: Tensor, residual: Tensor) -> Callable[[], object]:
    """A forward without gradient."""

    def run() -> object:
        with torch.no_grad():
            return block(x, residual)

    return run


def training_of(block: nn.Module, x: Tensor, residual: Tensor) -> Callable[[], object]:
    """A forward, and a backward for the inputs and all parameters."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    leaves = [x, residual, *block.parameters()]
    dy, dresidual = torch.randn_like(x), torch.randn_like(residual)

    def run() -> object:
        return torch.autograd.grad(block(x, residual), leaves, (dy, dresidual))

    return run


def parts(block: PreNorm, run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the GPU for each part of one call, and their sum, "all"."""
    assert isinstance(block.mixer, S6)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as found:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    events = list(found.events() or [])
    times: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    everything = 0.0
    for event in events:
        if event.device_type != DeviceType.CUDA:
            continue
        everything += event.time_range.elapsed_us()
        own = next((part for start, part in OURS.items() if event.name.startswith(start)), None)
        if own is not None:
            times[own] += event.time_range.elapsed_us()
    for event in events:
        if event.device_type == DeviceType.CPU and event.kernels:
            part = _part(event, block.mixer)
            if part is not None:
                times[part] += sum(kernel.duration for kernel in event.kernels)
    times["elementwise and sums"] = everything - sum(times.values())
    return {part: time / CALLS / 1e3 for part, time in times.items()} | {"all": everything / CALLS / 1e3}


def _part(event: Any, mixer: S6) -> str | None:
    """Which part PyTorch's operator belongs to; the products by their sizes."""
    if event.name in COPIES:
        return "copies"
    return product_part(event, mixer) if event.name in PRODUCTS else None


def product_part(event: Any, mixer: S6) -> str:
    """Which of the projections a product belongs to, by its sizes."""
    sizes = {size for shape in event.input_shapes for size in shape}
    if mixer.d_inner not in sizes:
        return "in_proj"
    if mixer.d_model in sizes:
        # The halves of in_proj's gradients have the sizes of out_proj.
        return "in_proj" if _inside(event, "_Halves") else "out_proj"
    return "dt_proj" if mixer.dt_rank in sizes else "x_proj"


def _inside(event: Any, name: str) -> bool:
    while event is not None:
        if name in event.name:
            return True
        event = event.cpu_parent
    return False
