"""Mixers of the vision models with other packages' kernels in the place of ours, in those packages' layout.

The modules keep their weights: another class is put over each mixer, which computes the same in the order of the
official code (hustvl/Vim, MzeroMiko/VMamba): channels first, flips and copies into every route's order, mamba_ssm's or
VMamba's scan. Where causal_conv1d's and VMamba's copying kernels (`csm_triton`) are importable they are used.
"""

import importlib
import importlib.util
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.bench.peers import MAMBA_SSM, VMAMBA
from selectra.errors import BackendError
from selectra.mixers import CrossPaths, CrossScan2d, SelectivePath
from selectra.models.vim import Halved
from selectra.models.vmamba import UngatedCrossScan2d

CONV, COPIES = "causal_conv1d_cuda", "csm_triton"
# Both packages keep the states at every so many positions.
CHUNK = 2048

library = torch.library.Library("selectra_bench", "FRAGMENT")
_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor delta_bias"
library.define(f"scan(str kernels, {_SCAN}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"scan_backward(str kernels, {_SCAN}, Tensor dy, Tensor out, Tensor states) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define("conv(Tensor x, Tensor weight, Tensor bias) -> Tensor")
library.define("conv_backward(Tensor x, Tensor weight, Tensor bias, Tensor dy) -> (Tensor, Tensor, Tensor)")


def missing(*names: str) -> list[str]:
    """Those of these modules that are not importable."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def _scan(
    kernels: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """y before the gate, the states, and y; the first is empty where there is no gate."""
    module: Any = importlib.import_module(kernels)
    if kernels == MAMBA_SSM:
        out, states, *gated = module.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        return (out, states, gated[0]) if gated else (u.new_empty(0), states, out)
    assert kernels == VMAMBA
    # One row of channels in a block; y not widened to float32.
    out, states = module.fwd(u, delta, A, B, C, D, delta_bias, True, 1, False)
    return u.new_empty(0), states, out


def _scan_backward(
    kernels: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    dy: Tensor,
    out: Tensor,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias and z, which is empty without a gate."""
    module: Any = importlib.import_module(kernels)
    if kernels == MAMBA_SSM:
        kept = None if z is None else out
        grads = module.bwd(u, delta, A, B, C, D, z, delta_bias, dy, states, kept, None, True, False)
    else:
        grads = module.bwd(u, delta, A, B, C, D, delta_bias, dy, states, True, 1)
    du, ddelta, dA, dB, dC, dD, dbias = grads[:7]
    return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dbias, u.new_empty(0) if z is None else grads[7]


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    module: Any = importlib.import_module(CONV)
    if _fills(module):
        # No packed sequences, no states before or after.
        y = torch.empty_like(x)
        module.causal_conv1d_fwd(x, weight, bias, None, None, y, None, True)
        return y
    return module.causal_conv1d_fwd(x, weight, bias, *_no_states(module, 3), True)


def _conv_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    module: Any = importlib.import_module(CONV)
    if _fills(module):
        # Parameters' gradients are added up in float32, into zeros, as the package's own Python does.
        dx, dw, db = torch.empty_like(x), *(torch.zeros_like(p, dtype=torch.float32) for p in (weight, bias))
        module.causal_conv1d_bwd(x, weight, bias, dy, None, None, None, dx, dw, db, None, True)
        return dx, dw.to(weight.dtype), db.to(bias.dtype)
    states = _no_states(module, 3)
    # Whether the gradient of the initial states is wanted too; it comes last.
    flags = (False, True) if states else (True,)
    return tuple(module.causal_conv1d_bwd(x, weight, bias, dy, *states, None, *flags)[:3])


def _fills(module: Any) -> bool:
    """Whether it writes into tensors that it is given, as since version 1.5."""
    return "arg7" in (module.causal_conv1d_fwd.__doc__ or "")


def _no_states(module: Any, count: int) -> tuple[None, ...]:
    """What later versions are told of packed sequences and of states before and after."""
    return (None,) * count if "arg6" in (module.causal_conv1d_fwd.__doc__ or "") else ()


library.impl("scan", _scan, "CompositeExplicitAutograd")
library.impl("scan_backward", _scan_backward, "CompositeExplicitAutograd")
library.impl("conv", _conv, "CompositeExplicitAutograd")
library.impl("conv_backward", _conv_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra_bench::scan", lib=library)
def _scan_fake(kernels: str, u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    gated = rest[3] is not None
    states = A.new_empty(u.shape[0], u.shape[1], -(-u.shape[2] // CHUNK), 2 * A.shape[1])
    return u.new_empty(u.shape if gated else (0,)), states, u.new_empty(u.shape)


@torch.library.register_fake("selectra_bench::scan_backward", lib=library)
def _scan_backward_fake(kernels: str, *tensors: Any) -> tuple[Tensor, ...]:
    *arguments, _, _, _ = tensors
    u, delta, A, B, C, D, z, bias = arguments
    grads = (x.new_empty(x.shape) for x in (u, delta, A, B, C, D, bias))
    return (*grads, u.new_empty(0) if z is None else z.new_empty(z.shape))


@torch.library.register_fake("selectra_bench::conv", lib=library)
def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("selectra_bench::conv_backward", lib=library)
def _conv_backward_fake(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


class _Scan(torch.autograd.Function):
    """The same without PyTorch's dispatcher, as the packages' own functions."""

    @staticmethod
    def forward(ctx: Any, kernels: str, *tensors: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, states, y = _scan(kernels, *tensors)
        ctx.save_for_backward(*tensors, out, states)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, out, states = ctx.saved_tensors
        return None, *_in_order(_scan_backward(ctx.kernels, *(*tensors, _last_dense(dy), out, states)), tensors[6])  # pyright: ignore[reportCallIssue]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight, bias)
        return _conv(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _conv_backward(*(*ctx.saved_tensors, _last_dense(dy)))  # pyright: ignore[reportCallIssue]


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_order(grads: tuple[Tensor, ...], z: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the order of the arguments."""
    *first, dbias, dz = grads
    return (*first, None if z is None else dz, dbias)


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.kernels = inputs[0]
    ctx.save_for_backward(*inputs[1:], output[0], output[1])
    ctx.mark_non_differentiable(output[0], output[1])
    ctx.set_materialize_grads(False)


def _scan_autograd(ctx: Any, _out: Any, _states: Any, dy: Tensor) -> Any:
    *tensors, out, states = ctx.saved_tensors
    grads = torch.ops.selectra_bench.scan_backward(ctx.kernels, *tensors, dy.contiguous(), out, states)
    return None, *_in_order(tuple(grads), tensors[6])


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_autograd(ctx: Any, dy: Tensor) -> Any:
    return tuple(torch.ops.selectra_bench.conv_backward(*ctx.saved_tensors, dy.contiguous()))


torch.library.register_autograd("selectra_bench::scan", _scan_autograd, setup_context=_setup_scan, lib=library)
torch.library.register_autograd("selectra_bench::conv", _conv_autograd, setup_context=_setup_conv, lib=library)


def scan(
    kernels: str,
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b g n l"],
    C: Float[Tensor, "b g n l"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b d l"] | None,
    delta_bias: Float[Tensor, " d"],
) -> Float[Tensor, "b d l"]:
    """The other package's scan, with softplus.

    Args:
        kernels: The name of its compiled module.
    """
    if torch.compiler.is_compiling():
        # The compiler writes producers' results as they are asked for.
        dense = (None if x is None else x.contiguous() for x in (u, delta, A, B, C, D, z, delta_bias))
        return torch.ops.selectra_bench.scan(kernels, *dense)[2]
    return _Scan.apply(kernels, u, delta, A, B, C, D, z, delta_bias)  # pyright: ignore[reportReturnType]


def _short_conv(path: SelectivePath, x: Float[Tensor, "b d l"], by_package: bool) -> Float[Tensor, "b d l"]:
    """The causal convolution with SiLU, by causal_conv1d where that is there."""
    weight, bias = path.conv1d.weight, path.conv1d.bias
    assert bias is not None
    if not by_package:
        return F.silu(F.conv1d(x, weight, bias, padding=path.d_conv - 1, groups=path.d_inner)[..., : x.shape[2]])
    if torch.compiler.is_compiling():
        return torch.ops.selectra_bench.conv(x.contiguous(), weight[:, 0].contiguous(), bias)
    return _Conv.apply(x, weight[:, 0], bias)  # pyright: ignore[reportReturnType]


class TheirVim(Halved):
    """Vim's mixer over mamba_ssm's kernels: the backward direction on flipped copies."""

    # Of an instance `with_theirs` says it: looking for modules in a forward would be timed, and no compiler traces it.
    has_conv: bool

    def forward(self, x: Float[Tensor, "b l d_model"], **_: Any) -> Float[Tensor, "b l d_model"]:
        length = x.shape[1]
        flat = x.flatten(0, 1).t()
        xz = (self.in_proj.weight @ flat).unflatten(1, (-1, length)).transpose(0, 1)
        ahead = self._path(self.ahead, xz)
        back = self._path(self.back, xz.flip(2)).flip(2)
        return self.out_proj((ahead + back).transpose(1, 2)) / 2

    def _path(self, path: SelectivePath, xz: Float[Tensor, "b d2 l"]) -> Float[Tensor, "b d l"]:
        u, z = xz.chunk(2, dim=1)
        u, length = _short_conv(path, u, self.has_conv), u.shape[2]
        # The official code's own views and copies.
        projected = path.x_proj(u.transpose(1, 2).flatten(0, 1))
        dt, B, C = projected.split([path.dt_rank, path.d_state, path.d_state], dim=1)
        delta = (path.dt_proj.weight @ dt.t()).unflatten(1, (-1, length)).transpose(0, 1)
        B, C = (m.unflatten(0, (-1, length)).transpose(1, 2).unsqueeze(1).contiguous() for m in (B, C))
        return scan(MAMBA_SSM, u, delta, -path.A_log.exp(), B, C, path.D, z, path.dt_proj.bias)


class _TheirPaths(CrossPaths):
    """VMamba's copies, projections and scan in the order of its code, channels first."""

    kernels: ClassVar[str]
    # As above.
    has_copies: bool

    def mix(self, u: Float[Tensor, "b h w d_inner"]) -> Float[Tensor, "b h w d_inner"]:
        k, n, height, width = len(self.D), self.d_state, u.shape[1], u.shape[2]
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2).contiguous()))
        us = _routes(u, self.has_copies)
        projected = torch.einsum("bkdl,kcd->bkcl", us, self.x_proj)
        dt, B, C = projected.split([self.dt_rank, n, n], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj).to(us.dtype)
        B, C = B.to(us.dtype).contiguous(), C.to(us.dtype).contiguous()
        A = -self.A_log.flatten(0, 1).exp()
        y = scan(
            self.kernels,
            us.flatten(1, 2),
            delta.flatten(1, 2).contiguous(),
            A,
            B,
            C,
            self.D.flatten(),
            None,
            self.dt_bias.flatten(),
        )
        merged = _merged(y.unflatten(1, (k, -1)).unflatten(3, (height, width)), self.has_copies)
        return merged.unflatten(2, (height, width)).permute(0, 2, 3, 1)


def _routes(u: Float[Tensor, "b d h w"], by_package: bool) -> Float[Tensor, "b k d l"]:
    """Copies of u in the order of every route: by rows, by columns, and both backwards."""
    if by_package and not torch.compiler.is_compiling():
        return importlib.import_module(COPIES).cross_scan_fn(u)
    both = torch.stack([u.flatten(2), u.transpose(2, 3).flatten(2)], 1)
    return torch.cat([both, both.flip(3)], 1)


def _merged(ys: Float[Tensor, "b k d h w"], by_package: bool) -> Float[Tensor, "b d l"]:
    """The routes' outputs put back and added."""
    if by_package and not torch.compiler.is_compiling():
        return importlib.import_module(COPIES).cross_merge_fn(ys)
    height, width = ys.shape[3:]
    flat = ys.flatten(3)
    both = flat[:, :2] + flat[:, 2:].flip(3)
    return both[:, 0] + both[:, 1].unflatten(2, (width, height)).transpose(2, 3).flatten(2)


class TheirGated(_TheirPaths, CrossScan2d):
    """Vanilla VMamba's mixer over mamba_ssm's scan."""

    kernels = MAMBA_SSM


class TheirUngated(_TheirPaths, UngatedCrossScan2d):
    """The second version's mixer over VMamba's own scan."""

    kernels = VMAMBA


THEIRS: dict[type[nn.Module], type[nn.Module]] = {
    Halved: TheirVim,
    CrossScan2d: TheirGated,
    UngatedCrossScan2d: TheirUngated,
}


def with_theirs(model: nn.Module) -> nn.Module:
    """The same model, changed in place: its mixers run on the other packages' kernels from now on.

    Raises:
        BackendError: No mixer of the model has a counterpart.
    """
    mixers: list[Any] = [module for module in model.modules() if type(module) in THEIRS]
    if not mixers:
        raise BackendError(f"{type(model).__name__} has no mixer that other packages' kernels could run.")
    has_conv, has_copies = not missing(CONV), not missing(COPIES)
    for mixer in mixers:
        mixer.__class__ = THEIRS[type(mixer)]
        mixer.has_conv, mixer.has_copies = has_conv, has_copies
    return model
