"""Convolution, selection and scan of a mixer as one node of autograd.

On a GPU the host needs some ten microseconds for every operation and as much again for every node of autograd; a small
model's step is these times added up. One node for all that lies between a mixer's projections saves most of them, and
the products' gradients meet where they are instead of in new tensors.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from selectra.ops import causal_conv1d, checks, selective_scan
from selectra.ops.causal_conv1d.call import ConvCall
from selectra.ops.causal_conv1d.registration import KERNELS as CONVOLUTIONS
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.registration import KERNELS as SCANS
from selectra.ops.transforms import is_batched, needs_operators, tell


class Weights(NamedTuple):
    """The parameters of a path, as mamba_ssm shapes them."""

    conv: Float[Tensor, "d 1 k"]
    conv_bias: Float[Tensor, " d"] | None
    x_proj: Float[Tensor, "r_2n d"]
    dt_proj: Float[Tensor, "d r"]
    dt_bias: Float[Tensor, " d"] | None
    A_log: Float[Tensor, "d n"]
    D: Float[Tensor, " d"] | None


class _Way(NamedTuple):
    """What is no tensor."""

    convolution: str
    scan: str
    """Names of backends."""
    reverse: bool


def mixed_at_once(
    u: Float[Tensor, "b l d"],
    z: Float[Tensor, "b l d"] | None,
    weights: Weights,
    *,
    reverse: bool = False,
    mask: Bool[Tensor, "b l"] | None = None,
    cu_seqlens: Int32[Tensor, " borders"] | None = None,
) -> Float[Tensor, "b l d"] | None:
    """`selective_scan` of what is selected from the convolution of u, gated by z.

    None where the operations have to be called one by one: where a compiler, a transform, a wrapper of an operator or
    another kind of tensor must see them, where shapes, types or devices do not fit (the operators say so in words), or
    where a backend was asked for that is written in PyTorch.
    """
    tensors = (u, z, *weights, mask, cu_seqlens)
    if causal_conv1d.wrapped or selective_scan.wrapped or not _fit(u, z, weights):
        return None
    if mask is not None or cu_seqlens is not None:
        checks.count_states(u, mask, cu_seqlens)
    product = torch.get_autocast_dtype(u.device.type) if torch.is_autocast_enabled(u.device.type) else None
    alike = u.dtype == (product or weights.x_proj.dtype) == (product or weights.dt_proj.dtype)
    if not alike or (z is not None and z.dtype != u.dtype) or u.numel() == 0 or needs_operators(tensors):
        return None
    # Backends look at the device, the types, and the numbers of taps and of states.
    filters, decay = weights.conv.flatten(1), weights.A_log
    convolution = causal_conv1d.choose(ConvCall(u, filters, None, None, None, None, True, False, False)).name
    like = ScanCall(u, u, decay, u, u, None, None, None, None, None, None, True, False, u.dtype, False)
    scan = selective_scan.choose(like).name
    if not (convolution in CONVOLUTIONS and CONVOLUTIONS[convolution].direct and scan in SCANS and SCANS[scan].direct):
        return None
    way = _Way(convolution, scan, reverse)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:9]):
        return _apply(way, mask, cu_seqlens, u, z, *weights)
    return _forward(way, mask, cu_seqlens, u, z, weights, False)[0]


def _fit(u: Tensor, z: Tensor | None, w: Weights) -> bool:
    """Whether shapes, devices and types are those of a path: kernels on pointers come next."""
    if u.dim() != 3 or w.conv.dim() != 3 or w.dt_proj.dim() != 2 or w.A_log.dim() != 2:
        return False
    d, (rank, n), wide = u.shape[2], (w.dt_proj.shape[1], w.A_log.shape[1]), u.dtype is torch.float64
    return (
        w.conv.shape[:2] == (d, 1)
        and w.x_proj.shape == (rank + 2 * n, d)
        and w.dt_proj.shape[0] == w.A_log.shape[0] == d
        and all(x is None or x.shape == (d,) for x in (w.conv_bias, w.dt_bias, w.D))
        and (z is None or (z.shape == u.shape and z.device == u.device))
        and all(
            x is None or (x.device == u.device and x.is_floating_point() and (x.dtype is torch.float64) == wide)
            for x in w
        )
    )


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type; a call that changes nothing takes microseconds too."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _wide(tensor: Tensor | None) -> Any:
    """A parameter in the type that is computed in."""
    return tensor if tensor is None or tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _convolution(
    u: Tensor, weights: Weights, mask: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> ConvCall:
    filters, bias = _wide(weights.conv)[:, 0], _wide(weights.conv_bias)
    return ConvCall(u, filters, bias, None, mask, cu_seqlens, True, reverse, False)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    projected: Float[Tensor, "rows r_2n"],
    z: Tensor | None,
    w: Weights,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> ScanCall:
    """The scan's call; `projected` holds the step's low rank, B and C."""
    rank, n = w.dt_proj.shape[1], A.shape[1]
    B, C = (projected.narrow(1, rank + place, n).view(*u.shape[:2], 1, n) for place in (0, n))
    D, bias = _wide(w.D), _wide(w.dt_bias)
    return ScanCall(u, delta, A, B, C, D, z, bias, None, mask, cu_seqlens, True, reverse, u.dtype, False)


def _forward(
    way: _Way, mask: Tensor | None, cu_seqlens: Tensor | None, x: Tensor, z: Tensor | None, w: Weights, save: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """y, and what the backward needs."""
    (batch, length, d), rank = x.shape, w.dt_proj.shape[1]
    tell({"causal_conv1d": way.convolution, "selective_scan": way.scan})
    u, _ = CONVOLUTIONS[way.convolution].forward(_convolution(x, w, mask, cu_seqlens, way.reverse))
    # Rounded as autocast does it; its products take what has its type as it is.
    x_proj, dt_proj = _in(w.x_proj, x.dtype), _in(w.dt_proj, x.dtype)
    projected = torch.mm(u.reshape(-1, d), x_proj.t())
    delta = torch.mm(projected.narrow(1, 0, rank), dt_proj.t()).view(batch, length, d)
    A = _wide(w.A_log).exp().neg_()
    call = _scan(u, delta, A, projected, z, w, mask, cu_seqlens, way.reverse)
    y, _, checkpoints = SCANS[way.scan].forward(call, save)
    return y, (u, projected, delta, A, checkpoints, x_proj, dt_proj)


def _plain_products(x: Tensor) -> Any:
    """Where products round nothing more than their types do."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, way: _Way, mask: Tensor | None, cu_seqlens: Tensor | None, x: Tensor, z: Tensor | None, *weights: Any
    ) -> Tensor:
        y, kept = _forward(way, mask, cu_seqlens, x, z, Weights._make(weights), True)
        ctx.save_for_backward(mask, cu_seqlens, x, z, *weights, *kept)
        ctx.way = way
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mask, cu_seqlens, x, z, *saved = ctx.saved_tensors
        w, kept = Weights._make(saved[:7]), saved[7:]
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or is_batched(dy) or needs_operators((dy, x)):
            grads = _differentiable_gradients(ctx.way, mask, cu_seqlens, (x, z, *w), wanted, dy)
        else:
            with _plain_products(x):
                grads = _gradients(ctx.way, mask, cu_seqlens, x, z, w, kept, wanted, dy)
        return (None, None, None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)))


_apply: Any = super(torch.autograd.Function, _Inner).apply  # pyright: ignore[reportAttributeAccessIssue]


def _gradients(
    way: _Way,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    w: Weights,
    kept: list[Any],
    wanted: tuple[bool, ...],
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, z and the weights."""
    tell({"selective_scan_backward": way.scan, "causal_conv1d_backward": way.convolution})
    u, projected, delta, A, checkpoints, x_proj, dt_proj = kept
    d, rank = x.shape[2], w.dt_proj.shape[1]
    call = _scan(u, delta, A, projected, z, w, mask, cu_seqlens, way.reverse)
    dfinal = None
    if not SCANS[way.scan].final_may_lack:
        n_states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dfinal = A.new_zeros((n_states, *A.shape))
    du, ddelta, dA, dB, dC, dD, dz, dbias, _ = SCANS[way.scan].backward(call, dy, dfinal, checkpoints)
    assert du is not None and ddelta is not None and dB is not None and dC is not None and dA is not None
    du, ddelta = du.reshape(-1, d), ddelta.reshape(-1, d)
    dprojected = torch.cat([torch.mm(ddelta, dt_proj), dB.reshape(du.shape[0], -1), dC.reshape(du.shape[0], -1)], 1)
    ddt_proj = _weight_gradient(ddelta, projected.narrow(1, 0, rank), w.dt_proj) if wanted[5] else None
    dx_proj = _weight_gradient(dprojected, u.reshape(-1, d), w.x_proj) if wanted[4] else None
    # The scan made this gradient for this function alone.
    du = du.addmm_(dprojected, x_proj).view(x.shape)
    conv = _convolution(x, w, mask, cu_seqlens, way.reverse)
    dx, dconv, dconv_bias, _ = CONVOLUTIONS[way.convolution].backward(conv, du, None)
    assert dconv is not None
    # A is -exp(A_log): its own derivative.
    found = (dx, dz, dconv.unsqueeze(1), dconv_bias, dx_proj, ddt_proj, dbias, dA.mul_(A), dD)
    pairs = zip(found, (x, z, *w), strict=True)
    return tuple(None if grad is None or of is None else _in(grad, of.dtype) for grad, of in pairs)


def _weight_gradient(grad: Float[Tensor, "rows e"], x: Float[Tensor, "rows d"], weight: Tensor) -> Tensor:
    """grad' x in the weight's type."""
    if grad.is_cuda and grad.dtype != weight.dtype == torch.float32:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return torch.mm(grad.t(), x)


def _differentiable_gradients(
    way: _Way,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """As `_gradients`, by operations that autograd and transforms see."""
    x, z, *weights = tensors
    assert x is not None
    create = torch.is_grad_enabled()
    with torch.enable_grad(), _plain_products(x):
        # Other tensors with the same history: those of the node itself are its inputs.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in (x, z, *weights)]
        first, gate, *own = views
        assert first is not None
        y = mixed_one_by_one(first, gate, Weights._make(own), way.reverse, mask, cu_seqlens)
        leaves = [view for view, want in zip(views, wanted, strict=True) if want and view is not None]
        grads = iter(torch.autograd.grad([y], leaves, [dy], create_graph=create, allow_unused=True))
    return tuple(next(grads) if want else None for want in wanted)


def mixed_one_by_one(
    x: Float[Tensor, "b l d"],
    z: Float[Tensor, "b l d"] | None,
    w: Weights,
    reverse: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "b l d"]:
    """The same by the operators, each with its own gradient."""
    rank, n = w.dt_proj.shape[1], w.A_log.shape[1]
    u: Any = causal_conv1d(x, w.conv[:, 0], w.conv_bias, "silu", reverse=reverse, mask=mask, cu_seqlens=cu_seqlens)
    dt, B, C = torch.nn.functional.linear(u, w.x_proj.to(u.dtype)).split([rank, n, n], -1)
    delta = torch.nn.functional.linear(dt, w.dt_proj.to(u.dtype))
    A = -_wide(w.A_log).exp()
    flags: dict[str, Any] = {"reverse": reverse, "mask": mask, "cu_seqlens": cu_seqlens}
    y: Any = selective_scan(u, delta, A, B, C, w.D, z, w.dt_bias, True, **flags)
    return y
