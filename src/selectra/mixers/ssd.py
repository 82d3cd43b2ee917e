"""The Mamba-2 block: heads with one decay each, scanned by state-space duality.

Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, Sec. 7. Parameters carry the names, shapes and initial
values of `mamba_ssm.Mamba2`, so its weights load as they are.

Departures: no part of the width that is not scanned (`d_ssm`), no skip by channel (`D_has_hdim`), no normalisation
before the gate: no released weights have them.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers.packing import sequence_of
from selectra.mixers.s6 import State, at_least_float32, require_input, zero_absent
from selectra.mixers.sizes import inner_width, require_sizes
from selectra.ops import causal_conv1d
from selectra.ops.gated_norm import gated_norm
from selectra.ops.ssd import ssd

NO_LIMIT = (0.0, math.inf)


class GatedNorm(nn.Module):
    """RMS norm, by groups of channels, of the scan's output and skip times SiLU of the gate.

    Args:
        d: Width.
        n_groups: Groups that are normalised each by itself.
        eps: Added to the mean of squares.
    """

    def __init__(self, d: int, n_groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(
        self,
        y: Float[Tensor, "*b d"],
        z: Float[Tensor, "*b d"],
        x: Float[Tensor, "*b d"] | None = None,
        D: Float[Tensor, " h"] | None = None,
    ) -> Float[Tensor, "*b d"]:
        """The normalised `(y + D x) silu(z)`, in the gate's type; computed in float32 at least."""
        return gated_norm(y, z, self.weight, x, D, n_groups=self.n_groups, eps=self.eps)


class SSD(nn.Module):
    """The whole Mamba-2 block, `(b, l, d_model) -> (b, l, d_model)`, causal along the length.

    Args:
        d_model: Width of the residual stream.
        d_state: State size.
        d_conv: Width of the short convolution.
        expand: Width between the projections over `d_model`.
        d_head: Channels of a head.
        n_groups: Groups of heads that share B and C.
        bias: Whether the projections have a bias.
        conv_bias: Whether the convolution has one.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        dt_init_floor: Initial steps below this are raised to it.
        dt_limit: Bounds of the step.
        eps: Of the norm.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    """Parameters of this module that weight decay leaves out, as mamba_ssm does; the optimizer reads it."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int | float = 2,
        d_head: int = 64,
        n_groups: int = 1,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        require_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, d_head=d_head, n_groups=n_groups)
        d_inner = inner_width(expand, d_model)
        if d_inner % d_head or d_inner // d_head % n_groups:
            raise ConfigError(
                f"d_head={d_head} must divide the inner width {d_inner}, and n_groups={n_groups} the number of heads"
            )
        self.d_model, self.d_state, self.d_conv, self.d_head, self.n_groups = d_model, d_state, d_conv, d_head, n_groups
        self.d_inner, self.n_heads, self.dt_limit = d_inner, d_inner // d_head, dt_limit
        channels = d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + channels + self.n_heads, bias=bias)
        # Only the container of the weights: the convolution itself runs channels last.
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(low + (high - low) * torch.rand(self.n_heads)).clamp(min=dt_init_floor)
        # The inverse of the softplus.
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedNorm(d_inner, n_groups, eps)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b l d_model"],
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_model"]:
        """Mix whole sequences. Absent positions (`mask` False) influence nothing and give 0."""
        return self._mixed(x, None, mask, cu_seqlens)[0]

    def init_state(self, batch: int) -> State:
        """The state before the first position: an empty past. Its `ssm` is (b, heads, d_head, n)."""
        weight, wide = self.in_proj.weight, at_least_float32(self.A_log)
        conv = weight.new_zeros(batch, self.conv1d.in_channels, self.d_conv)
        return State(conv, wide.new_zeros(batch, self.n_heads, self.d_head, self.d_state))

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: State, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], State]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        return self._mixed(x, state, mask, None)

    @torch.no_grad()
    def step_(self, x: Float[Tensor, "b l d_model"], state: State) -> Float[Tensor, "b l d_model"]:
        """Like `scan`, usually of one position, but overwrites the state's tensors; without gradient."""
        y, after = self.scan(x, state)
        for tensor, value in zip(state, after, strict=True):
            tensor.copy_(value)
        return y

    def _mixed(
        self, x: Tensor, state: State | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        require_input(x, self.d_model, mask, cu_seqlens)
        sizes = [self.d_inner, self.conv1d.in_channels, self.n_heads]
        z, xBC, dt = self.in_proj(zero_absent(x, mask)).split(sizes, -1)
        xBC, conv = causal_conv1d(
            xBC,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            "silu",
            initial_state=None if state is None else state.conv,
            return_final_state=True,
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
        bc = self.n_groups * self.d_state
        u, B, C = xBC.split([self.d_inner, bc, bc], -1)
        # A step of 0 passes the state on as it is.
        step = zero_absent(
            F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias)).clamp(*self.dt_limit), mask
        )
        y, ssm = ssd(
            u.unflatten(-1, (self.n_heads, self.d_head)),
            step,
            -at_least_float32(self.A_log).exp(),
            B.unflatten(-1, (self.n_groups, self.d_state)),
            C.unflatten(-1, (self.n_groups, self.d_state)),
            initial_state=None if state is None else state.ssm,
            sequence=None if cu_seqlens is None else sequence_of(cu_seqlens, x.shape[1]),
        )
        y = self.norm(y.flatten(-2), z, u, self.D)
        return zero_absent(self.out_proj(y), mask), State(conv, ssm)
