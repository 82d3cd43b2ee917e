"""A two-directional mixer, projections and all, as one node of autograd on a GPU.

As `inner.py` for one direction. Both directions' tensors lie as two planes of one, so that they go through batched
products and one launch of the scan; weights are rounded for the products together; gradients that meet are written
where they meet.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from selectra.mixers.inner import Weights, _in, _plain_products, _weight_gradient, mixed_one_by_one
from selectra.ops import causal_conv1d, cross_scan, whole
from selectra.ops.autocast import AUTOCAST_KEYS
from selectra.ops.causal_conv1d import cuda as conv
from selectra.ops.causal_conv1d.call import ConvCall
from selectra.ops.causal_conv1d.cuda import TYPES
from selectra.ops.cross_scan import line
from selectra.ops.cross_scan.call import ROUTES, CrossCall
from selectra.ops.cross_scan.line import Line
from selectra.ops.transforms import is_batched, needs_operators, tell

_copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
# Numbers of two bytes in 16.
ROW = 8
WAYS = (ROUTES["right"], ROUTES["left"])
# Of the inputs: x, both projections, and the weights of each path.
N_WEIGHTS = len(Weights._fields)
N_INPUTS = 3 + 2 * N_WEIGHTS


class Projections(NamedTuple):
    """What stands before and behind both paths, without biases."""

    into: Float[Tensor, "2d d_model"]
    out: Float[Tensor, "d_model d"]


def mixed_both_ways(
    x: Float[Tensor, "*batch l d_model"], projections: Projections, ahead: Weights, back: Weights, mean: bool
) -> Float[Tensor, "*batch l d_model"] | None:
    """The sum, or mean, of both paths between the projections.

    None where the operations have to be called one by one: where a compiler, a transform, a wrapper of an operator or
    another kind of tensor must see them, where another backend than `cuda` takes them, or where shapes, types or
    devices do not fit (the operators say so in words).
    """
    tensors = (x, *projections, *ahead, *back)
    if needs_operators(tensors) or causal_conv1d.wrapped or cross_scan.wrapped or whole.splits:
        return None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not _fit(x, dtype, projections, ahead, back) or not _on_kernels(x, ahead):
        return None
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _apply(mean, dtype, *tensors)
    return _forward(mean, dtype, x, projections, (ahead, back), False)[0]


def _fit(x: Tensor, dtype: torch.dtype, projections: Projections, ahead: Weights, back: Weights) -> bool:
    """Whether shapes, devices and types are those of a mixer: kernels on pointers come next."""
    into, out = projections
    if x.dim() != 3 or x.numel() == 0 or ahead.A_log.dim() != 2 or ahead.dt_proj.dim() != 2:
        return False
    (d, n), rank, width, index = ahead.A_log.shape, ahead.dt_proj.shape[1], x.shape[2], x.get_device()
    of_path = ((d, 1, ahead.conv.shape[-1]), (d,), (rank + 2 * n, d), (d, rank), (d,), (d, n), (d,))
    shapes = ((2 * d, width), (width, d), *of_path, *of_path)
    weights = (into, out, *ahead, *back)
    for tensor, shape in zip(weights, shapes, strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.get_device() != index or tensor.dtype not in TYPES):
            return False
    if (ahead.conv_bias is None) != (back.conv_bias is None):
        return False
    if ahead.D is None or back.D is None or ahead.dt_bias is None or back.dt_bias is None:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return dtype in TYPES and x.dtype in TYPES
    # Without autocast products take what they are given.
    products = (into, out, ahead.x_proj, back.x_proj, ahead.dt_proj, back.dt_proj)
    return dtype in TYPES and all(weight.dtype is dtype for weight in products)


def _on_kernels(x: Tensor, weights: Weights) -> bool:
    """Whether the operators choose their CUDA kernels, by the device, the types, and the numbers of taps and states."""
    filters = ConvCall(x, weights.conv[:, 0], None, None, None, None, True, False, False)
    if causal_conv1d.choose(filters).name != "cuda":
        return False
    A = weights.A_log.unsqueeze(0)
    return cross_scan.choose(CrossCall(x, x, A, x, x, None, None, None, True, WAYS, True)).name == "cuda"


class _Cast(NamedTuple):
    """The weights as kernels and products take them, those of both paths in one tensor each."""

    into: Float[Tensor, "2d d_model"]
    out: Float[Tensor, "d_model d"]
    x_proj: Float[Tensor, "2 r_2n d"]
    dt_proj: Float[Tensor, "2 d r"]
    A: Float[Tensor, "2 d n"]
    D: Float[Tensor, "2 d"]
    dt_bias: Float[Tensor, "2 d"]


N_CAST = len(_Cast._fields)


def _cast(dtype: torch.dtype, projections: Projections, ahead: Weights, back: Weights) -> _Cast:
    """One call for all that products take and one for what the scan takes: a call each would be most of the time."""
    (into, out), (d, rank), n = projections, ahead.dt_proj.shape, ahead.A_log.shape[1]
    of_x, of_dt, of_A = 2 * (rank + 2 * n) * d, 2 * d * rank, 2 * d * n
    pairs = [(ahead.x_proj, back.x_proj), (ahead.dt_proj, back.dt_proj)]
    rounded = into.dtype is not dtype or out.dtype is not dtype
    flat = into.new_empty(of_x + of_dt + (into.numel() + out.numel() if rounded else 0), dtype=dtype)
    x_proj = flat.as_strided((2, rank + 2 * n, d), (of_x // 2, d, 1), 0)
    dt_proj = flat.as_strided((2, d, rank), (of_dt // 2, rank, 1), of_x)
    to = [*x_proj.unbind(), *dt_proj.unbind()]
    of = [w for pair in pairs for w in pair]
    if rounded:
        of += [into, out]
        into = flat.as_strided(into.shape, (into.shape[1], 1), of_x + of_dt)
        out = flat.as_strided(out.shape, (out.shape[1], 1), of_x + of_dt + into.numel())
        to += [into, out]
    _copy_all(to, of)
    wide = ahead.A_log.new_empty(of_A + 4 * d, dtype=torch.float32)
    A = wide.as_strided((2, d, n), (d * n, n, 1), 0)
    D, bias = (wide.as_strided((2, d), (d, 1), start) for start in (of_A, of_A + 2 * d))
    own = [ahead.A_log, back.A_log, ahead.D, back.D, ahead.dt_bias, back.dt_bias]
    _copy_all([*A.unbind(), *D.unbind(), *bias.unbind()], own)
    A.exp_().neg_()
    return _Cast(into, out, x_proj, dt_proj, A, D, bias)


class _Kept(NamedTuple):
    """What the backward needs besides the inputs."""

    x: Float[Tensor, "b l d_model"]
    """In the products' type."""
    xz: Float[Tensor, "b l 2d"]
    u: Float[Tensor, "2 b l d"]
    projected: Float[Tensor, "2 rows r_2n"]
    delta: Float[Tensor, "2 b l d"]
    checkpoints: Tensor | None
    y: Float[Tensor, "b l d"]
    """What the output projection takes."""


def _forward(
    mean: bool,
    dtype: torch.dtype,
    x: Tensor,
    projections: Projections,
    paths: tuple[Weights, Weights],
    save: bool,
) -> tuple[Tensor, _Kept, _Cast]:
    """The output, and what the backward needs."""
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
        return _mixed(mean, dtype, x, projections, paths, save)


def _mixed(
    mean: bool, dtype: torch.dtype, x: Tensor, projections: Projections, paths: tuple[Weights, Weights], save: bool
) -> tuple[Tensor, _Kept, _Cast]:
    tell(dict.fromkeys(("causal_conv1d", "cross_scan"), "cuda"))
    w = _cast(dtype, projections, *paths)
    (batch, length, _), d, rank = x.shape, w.A.shape[1], w.dt_proj.shape[2]
    # Plans rely on how its product lies.
    x = _in(x, dtype).contiguous()
    xz = F.linear(x, w.into)
    halves = xz.split(d, 2)
    u = xz.new_empty((2, batch, length, d))
    for plane, path, reverse in zip(u.unbind(), paths, (False, True), strict=True):
        conv.forward(*_convolution(halves[0], path, reverse), out=plane)
    projected = _rows(xz, w)
    torch.bmm(u.view(2, -1, d), w.x_proj.transpose(1, 2), out=projected)
    delta = torch.bmm(projected.narrow(2, 0, rank), w.dt_proj.transpose(1, 2)).view(u.shape)
    ys, checkpoints = line.forward(_line(w, u, delta, projected, halves[1]), save)
    ahead, back = ys.unbind()
    y = torch.lerp(ahead, back, 0.5) if mean else ahead + back
    # No view, which nobody could write to: the result of a node of autograd.
    return F.linear(y, w.out), _Kept(x, xz, u, projected, delta, checkpoints, y), w


def _rows(like: Float[Tensor, "b l d"], w: _Cast) -> Float[Tensor, "2 rows r_2n"]:
    """Room for what is selected, each row on 16 bytes, which products with it are fastest on."""
    (_, width, _), rows = w.x_proj.shape, like.shape[0] * like.shape[1]
    return like.new_empty((2, rows, -(-width // ROW) * ROW)).narrow(2, 0, width)


def _line(w: _Cast, u: Tensor, delta: Tensor, projected: Tensor, z: Tensor) -> Line:
    return Line(u, delta, projected, w.A, w.D, z, w.dt_bias, WAYS)


def _convolution(x: Tensor, path: Weights, reverse: bool) -> tuple[Any, ...]:
    """Arguments of the kernels."""
    filters, bias = path.conv.squeeze(1), path.conv_bias
    if filters.dtype is not torch.float32:
        filters, bias = filters.float(), None if bias is None else bias.float()
    return (x, filters, bias, None, None, None, True, reverse)


class _BothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: bool, dtype: torch.dtype, x: Tensor, *weights: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, kept, cast = _forward(mean, dtype, x, *_paths(weights), True)
        ctx.save_for_backward(x, *weights, *kept, *cast)
        ctx.flags = (mean, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        mean, dtype = ctx.flags
        inputs, wanted = saved[:N_INPUTS], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or is_batched(dy) or needs_operators((dy, inputs[0])):
            grads = _differentiable_gradients(mean, dtype, inputs, wanted, dy)
        else:
            kept, cast = saved[N_INPUTS:-N_CAST], saved[-N_CAST:]
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
                grads = _gradients(mean, inputs, _Kept._make(kept), _Cast._make(cast), wanted, dy)
        return (None, None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)))


_apply: Any = super(torch.autograd.Function, _BothWays).apply  # pyright: ignore[reportAttributeAccessIssue]


def _paths(weights: Sequence[Any]) -> tuple[Projections, tuple[Weights, Weights]]:
    """The node's inputs behind x, by their names."""
    into, out, *own = weights
    return Projections(into, out), (Weights._make(own[:N_WEIGHTS]), Weights._make(own[N_WEIGHTS:]))


def _gradients(
    mean: bool, inputs: Sequence[Any], kept: _Kept, w: _Cast, wanted: Sequence[bool], dout: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x and the weights, in the order of the node's inputs."""
    tell(dict.fromkeys(("cross_scan_backward", "causal_conv1d_backward"), "cuda"))
    x, (into, out), paths = inputs[0], *_paths(inputs[1:])
    (batch, length, width), (_, d, _) = x.shape, w.A.shape
    dout = _in(dout, kept.y.dtype).reshape(-1, width)
    dout_proj = _weight_gradient(dout, kept.y.view(-1, d), out) if wanted[2] else None
    # With beta 0 what stands in the new tensor does not count.
    dy = torch.empty_like(kept.y)
    dy.view(-1, d).addmm_(dout, w.out, beta=0, alpha=0.5 if mean else 1)
    u, z = kept.xz.split(d, 2)
    # Each direction's of u and z, which are added into both halves of one tensor.
    parts = dy.new_empty((2, 2, batch, length, d))
    du_of, dz_of = parts.unbind(1)
    assert kept.checkpoints is not None
    scanned = line.backward(_line(w, kept.u, kept.delta, kept.projected, z), dy, kept.checkpoints, dz_of)
    dx_proj, ddt_proj = _selection_gradients(scanned, kept, w, paths, wanted)
    dA, dD, dbias = _scan_parameters(scanned.parameters, w.A)
    own: list[Tensor | None] = []
    for i, (path, du) in enumerate(zip(paths, scanned.u.unbind(), strict=True)):
        _, dconv, dconv_bias, _ = conv.backward(du, None, *_convolution(u, path, i == 1), out=du_of[i])
        own += [dconv.unsqueeze(1), dconv_bias, dx_proj[i], ddt_proj[i], dbias[i], dA[i], dD[i]]
    dxz = torch.empty_like(kept.xz)
    torch.add(*parts.unbind(), out=dxz.view(batch, length, 2, d).permute(2, 0, 1, 3))
    dxz = dxz.view(-1, 2 * d)
    dx = torch.mm(dxz, w.into).view(x.shape) if wanted[0] else None
    dinto = _weight_gradient(dxz, kept.x.reshape(-1, width), into) if wanted[1] else None
    found = (dx, dinto, dout_proj, *own)
    return tuple(
        None if grad is None or of is None else _in(grad, of.dtype) for grad, of in zip(found, inputs, strict=True)
    )


def _selection_gradients(
    scanned: line.Gradients, kept: _Kept, w: _Cast, paths: tuple[Weights, Weights], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of both paths' x_proj and dt_proj; that of u is added to `scanned.u`."""
    (_, rows, _), (_, d, n), rank = kept.projected.shape, w.A.shape, w.dt_proj.shape[2]
    ddelta, du = scanned.delta.view(2, rows, d), scanned.u.view(2, rows, d)
    dprojected = _rows(kept.xz, w)
    torch.bmm(ddelta, w.dt_proj, out=dprojected.narrow(2, 0, rank))
    dprojected.narrow(2, rank, 2 * n).view(2, rows, 2, n).copy_(scanned.BC.permute(2, 1, 0, 3))
    first, second = 3 + Weights._fields.index("x_proj"), 3 + Weights._fields.index("dt_proj")
    u, dt = kept.u.view(2, rows, d), kept.projected.narrow(2, 0, rank)

    # Batched, a product that sums over so many rows would have a handful of blocks: cuBLAS cuts the rows of plain ones.
    def of_weights(grads: Tensor, xs: Tensor, place: int, own: tuple[Tensor, ...]) -> list[Tensor | None]:
        both = zip(grads.unbind(), xs.unbind(), own, (wanted[place], wanted[place + N_WEIGHTS]), strict=True)
        return [_weight_gradient(grad, x, weight) if want else None for grad, x, weight, want in both]

    dx_proj = of_weights(dprojected, u, first, tuple(path.x_proj for path in paths))
    ddt_proj = of_weights(ddelta, dt, second, tuple(path.dt_proj for path in paths))
    du.baddbmm_(dprojected, w.x_proj)
    return dx_proj, ddt_proj


def _scan_parameters(grads: Tensor, A: Float[Tensor, "2 d n"]) -> tuple[tuple[Tensor, ...], ...]:
    """The gradients of both paths' A_log, D and bias."""
    (_, d, n), start = A.shape, A.numel()
    # A is -exp(A_log): its own derivative.
    dA = grads.as_strided(A.shape, (d * n, n, 1), 0).mul_(A)
    dD, dbias = (grads.as_strided((2, d), (d, 1), place) for place in (start, start + 2 * d))
    return dA.unbind(), dD.unbind(), dbias.unbind()


def _differentiable_gradients(
    mean: bool, dtype: torch.dtype, inputs: Sequence[Any], wanted: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """As `_gradients`, by operations that autograd and transforms see."""
    create = torch.is_grad_enabled()
    with torch.enable_grad(), _plain_products(inputs[0]):
        # Other tensors with the same history: those of the node itself are its inputs.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        first, projections, paths = views[0], *_paths(views[1:])
        assert first is not None
        y = mixed_one_by_one_both_ways(first.to(dtype), projections, *paths, mean)
        leaves = [view for view, want in zip(views, wanted, strict=True) if want and view is not None]
        grads = iter(torch.autograd.grad([y], leaves, [dy], create_graph=create, allow_unused=True))
    return tuple(next(grads) if want else None for want in wanted)


def mixed_one_by_one_both_ways(
    x: Float[Tensor, "b l d_model"], projections: Projections, ahead: Weights, back: Weights, mean: bool
) -> Float[Tensor, "b l d_model"]:
    """The same by the operators, each with its own gradient; products in x's type."""
    u, z = F.linear(x, projections.into.to(x.dtype)).chunk(2, dim=-1)
    y = mixed_one_by_one(u, z, ahead) + mixed_one_by_one(u, z, back, reverse=True)
    return F.linear(y / 2 if mean else y, projections.out.to(x.dtype))
