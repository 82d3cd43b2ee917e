"""The Mamba block under other discretisations, to see what Mamba's buys.

A state-space model is a differential equation, h'(t) = A h(t) + B u(t), of which a step of length delta is taken:

  mamba   A by zero-order hold, B by Euler: h = exp(delta A) h + delta B u    Mamba's code (arXiv:2312.00752)
  zoh     both by zero-order hold: h = exp(delta A) h + (exp(delta A) - 1) / A B u    its Eq. 4, diagonal A
  euler   both by Euler: h = (1 + delta A) h + delta B u; grows where delta |A| is above 2
  none    no equation: a plain gate g = sigmoid(what delta is made of), h = (1 - g) h + g B u, without A
          (its Theorem 1; equal to "zoh" with A = -1)

Source: the paper's equations. Only "mamba" has kernels of its own; the others run position by position in PyTorch.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers.s6 import S6, State, at_least_float32

Discretisation = Literal["mamba", "zoh", "euler", "none"]


def make_s6(discretisation: str, d_model: int, *sizes: Any, **options: Any) -> S6:
    """The Mamba block under a discretisation.

    Raises:
        ConfigError: There is no such discretisation.
    """
    if discretisation == "mamba":
        return S6(d_model, *sizes, **options)
    return DiscretisedS6(discretisation, d_model, *sizes, **options)


class DiscretisedS6(S6):
    """`S6` with another discretisation; parameters as there, but that "none" has no A.

    Args, beside those of `S6`:
        discretisation: "zoh", "euler", "none", or "mamba", which is `S6` in plain PyTorch.
    """

    def __init__(self, discretisation: str, d_model: int, *sizes: Any, **options: Any) -> None:
        if discretisation not in get_args(Discretisation):
            known = ", ".join(map(repr, get_args(Discretisation)))
            raise ConfigError(f"discretisation={discretisation!r}: takes {known}")
        super().__init__(d_model, *sizes, **options)
        self.discretisation = discretisation
        if discretisation == "none":
            del self.A_log
            self.register_parameter("A_log", None)
            self.no_decay = tuple(name for name in type(self).no_decay if name != "A_log")

    def mix(
        self,
        u: Float[Tensor, "b l d_inner"],
        z: Float[Tensor, "b l d_inner"] | None = None,
        state: State | None = None,
        *,
        reverse: bool = False,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> tuple[Float[Tensor, "b l d_inner"], State]:
        """As `SelectivePath.mix`."""
        u, conv = self.convolve(
            u, None if state is None else state.conv, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens
        )
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        decay, entering = self._discrete(F.linear(dt, self.dt_proj.weight), u, B)
        if mask is not None:
            decay = torch.where(mask[..., None, None], decay, 1)
            entering = torch.where(mask[..., None, None], entering, 0)
        if cu_seqlens is not None:
            decay = decay.masked_fill(_first_of_each(cu_seqlens, u.shape[1], reverse)[None, :, None, None], 0)
        start = self.init_state(len(u)).ssm if state is None else state.ssm
        h = recurrence(decay, entering, start, reverse)
        y = (h * C[:, :, None].to(h.dtype)).sum(-1) + self.D * u
        y = (y if z is None else y * F.silu(z)).to(u.dtype)
        y = y if mask is None else y.masked_fill(~mask[..., None], 0)
        return y, State(conv, self._last(h, start, cu_seqlens, reverse))

    def _discrete(
        self, dt: Float[Tensor, "b l d"], u: Float[Tensor, "b l d"], B: Float[Tensor, "b l n"]
    ) -> tuple[Float[Tensor, "b l d n"], Float[Tensor, "b l d n"]]:
        """What the state is multiplied by, and what enters it, at least in float32."""
        before = at_least_float32(dt) + self.dt_proj.bias
        driven = at_least_float32(u)[..., None] * B[:, :, None].to(before.dtype)
        if self.discretisation == "none":
            gate = torch.sigmoid(before)[..., None]
            return (1 - gate).expand_as(driven), gate * driven
        delta, A = F.softplus(before)[..., None], -at_least_float32(self.A_log).exp()
        if self.discretisation == "euler":
            return 1 + delta * A, delta * driven
        decay = torch.exp(delta * A)
        return decay, (torch.expm1(delta * A) / A if self.discretisation == "zoh" else delta) * driven

    def init_state(self, batch: int) -> State:
        """The state before the first position: an empty past."""
        weight = self.x_proj.weight
        wide = at_least_float32(self.D)
        return State(
            weight.new_zeros(batch, self.d_inner, self.d_conv), wide.new_zeros(batch, self.d_inner, self.d_state)
        )

    @staticmethod
    def _last(h: Tensor, start: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
        """The state after the last scanned position, of every packed sequence."""
        if cu_seqlens is None:
            return start if not h.shape[1] else h[:, 0 if reverse else -1]
        lasts = cu_seqlens[:-1] if reverse else cu_seqlens[1:] - 1
        empty = cu_seqlens.diff() == 0
        padded = torch.cat([h[0], start], 0)  # some row to look at where there is no position
        return padded[torch.where(empty, h.shape[1], lasts).long()]


def _first_of_each(cu_seqlens: Tensor, length: int, reverse: bool) -> Tensor:
    """True where a packed sequence begins, in the order of the scan."""
    borders = cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]
    first = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    # An empty sequence begins nowhere: a place behind all others stands for that.
    borders = torch.where(cu_seqlens.diff() == 0, length, borders).long()
    return first.index_fill(0, borders, True)[:length]


def recurrence(
    decay: Float[Tensor, "b l *d"],
    entering: Float[Tensor, "b l *d"],
    start: Float[Tensor, "b ..."],
    reverse: bool = False,
) -> Float[Tensor, "b l *d"]:
    """All states of `h_t = decay_t h_{t-1} + entering_t`, from the first position or, reversed, from the last.

    Its backward is the same recurrence the other way, so that nothing but the states is kept.
    """
    states: Tensor = _Recurrence.apply(decay, entering, start, reverse)  # pyright: ignore[reportAssignmentType]
    return states


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, entering: Tensor, start: Tensor, reverse: bool) -> Tensor:
        states, h = torch.empty_like(entering), start
        for t in _order(decay.shape[1], reverse):
            h = torch.addcmul(entering[:, t], decay[:, t], h)
            states[:, t] = h
        ctx.save_for_backward(decay, states, start)
        ctx.reverse = reverse
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        decay, states, start = ctx.saved_tensors
        order = _order(decay.shape[1], ctx.reverse)
        dentering, before = torch.empty_like(states), torch.empty_like(states)
        dh = torch.zeros_like(start)
        for place in reversed(range(len(order))):
            t = order[place]
            dh = dstates[:, t] + dh
            dentering[:, t] = dh
            before[:, t] = states[:, order[place - 1]] if place else start
            dh = decay[:, t] * dh
        return dentering * before, dentering, dh, None


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)
