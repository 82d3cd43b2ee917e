"""The Mamba block: a gated mixer along the length whose recurrence selects what to keep.

Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752. Parameters carry
the names, shapes and initial values of `mamba_ssm.Mamba`, so its weights load as they are.

Glossary: D d_model, ED d_inner, N d_state (Sec. 3); `u h y z` are the scan's input, state, output and gate.
Departures: none known.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.norm import AddNorm
from selectra.mixers.inner import Weights, mixed_at_once
from selectra.mixers.projections import is_plain, linear_halves, parameter
from selectra.mixers.sizes import mixer_sizes, require_sizes
from selectra.mixers.streaming import quick_step
from selectra.ops import causal_conv1d, checks, selective_scan


class State(NamedTuple):
    """What a mixer remembers of the past: everything that later outputs can depend on."""

    conv: Float[Tensor, "b d_inner d_conv"]
    """The last inputs of the short convolution, oldest first, zeros before the sequence's start."""
    ssm: Float[Tensor, "b d_inner n"]
    """The recurrence's state, float32 whatever the activations are (float64 for a float64 model)."""


class SelectivePath(nn.Module):
    """Short convolution, selection of step, B and C from its output, and the scan: what lies between the projections.

    A block of its own because two-directional mixers run two of these between shared projections.

    Args:
        d_inner: Width.
        d_state: State size per channel.
        d_conv: Width of the short convolution.
        dt_rank: Rank of the step's projection.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        dt_init: How the step's projection starts.
        dt_scale: Scale of that start.
        dt_init_floor: Initial steps below this are raised to it.
        conv_bias: Whether the convolution has a bias.
    """

    no_decay: tuple[str, ...] = ("A_log", "D", "dt_proj.bias")
    """Parameters of this module that weight decay leaves out, as mamba_ssm does; the optimizer reads it."""

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int = 1,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        require_sizes(d_inner=d_inner, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank)
        if not 0 < dt_min <= dt_max < math.inf:
            raise ConfigError(f"dt_min={dt_min} and dt_max={dt_max}: needs 0 < dt_min <= dt_max")
        self.d_inner, self.d_state, self.d_conv, self.dt_rank = d_inner, d_state, d_conv, dt_rank
        # Only the container of the weights: the convolution itself runs channels last.
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        self._start = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        start_step(self.dt_proj.weight, self.dt_proj.bias, *self._start)
        # A = -(1, 2, ..., N) in every channel, the real part of S4D-Lin.
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights as the constructor does; any rows of them, where a process holds a part."""
        self.conv1d.reset_parameters()
        self.x_proj.reset_parameters()
        start_step(self.dt_proj.weight, self.dt_proj.bias, *self._start)
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32).log())
        self.D.fill_(1)

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
        """Mix along the length.

        Args:
            u: The projected input.
            z: The gate, applied as `y * silu(z)`.
            state: Where to continue from; without one the past is empty.
            reverse: Scan from the last position to the first; nothing is flipped.
            mask: True where a position is present.
            cu_seqlens: Borders of packed sequences.

        Returns:
            The output, and the state after the last scanned position.
        """
        u, conv = self.convolve(
            u, None if state is None else state.conv, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens
        )
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            u,
            F.linear(dt, self.dt_proj.weight),
            -at_least_float32(self.A_log).exp(),
            B,
            C,
            self.D,
            z,
            # Added inside the scan, before the softplus, in the state's precision.
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            reverse=reverse,
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
        return y, State(conv, ssm)

    def mix_whole(
        self,
        u: Float[Tensor, "b l d_inner"],
        z: Float[Tensor, "b l d_inner"] | None = None,
        *,
        reverse: bool = False,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_inner"]:
        """`mix` from an empty past, without the state that follows, in one node of autograd where that can be."""
        own = type(self).mix is SelectivePath.mix and type(self).convolve is SelectivePath.convolve
        if own and is_plain(self.x_proj) and self.x_proj.bias is None and is_plain(self.dt_proj):
            y = mixed_at_once(u, z, self.weights(), reverse=reverse, mask=mask, cu_seqlens=cu_seqlens)
            if y is not None:
                return y
        return self.mix(u, z, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens)[0]

    def weights(self) -> Weights:
        """All parameters, for a node of autograd."""
        conv, x_proj, dt_proj = (self._modules[name] for name in ("conv1d", "x_proj", "dt_proj"))
        return Weights(
            parameter(conv, "weight"),
            parameter(conv, "bias"),
            parameter(x_proj, "weight"),
            parameter(dt_proj, "weight"),
            parameter(dt_proj, "bias"),
            parameter(self, "A_log"),
            parameter(self, "D"),
        )

    def convolve(
        self,
        u: Float[Tensor, "b l d_inner"],
        state: Float[Tensor, "states d_inner d_conv"] | None = None,
        *,
        reverse: bool = False,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> tuple[Float[Tensor, "b l d_inner"], Float[Tensor, "states d_inner d_conv"]]:
        """The short convolution with SiLU, and its last inputs."""
        return causal_conv1d(
            u,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            "silu",
            initial_state=state,
            return_final_state=True,
            reverse=reverse,
            mask=mask,
            cu_seqlens=cu_seqlens,
        )

    def init_state(self, batch: int) -> State:
        """The state before the first position: an empty past."""
        weight, wide = self.x_proj.weight, at_least_float32(self.A_log)
        return State(weight.new_zeros(batch, self.d_inner, self.d_conv), wide.new_zeros(batch, *self.A_log.shape))


class S6(SelectivePath):
    """The whole Mamba block, `(b, l, d_model) -> (b, l, d_model)`, causal along the length.

    Args, beside those of `SelectivePath`:
        d_model: Width of the residual stream.
        expand: Width between the projections over `d_model`.
        dt_rank: Rank of the step's projection; "auto" is `ceil(d_model / 16)`.
        bias: Whether the input and output projections have a bias.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        d_inner, rank = mixer_sizes(d_model, d_state, d_conv, expand, dt_rank)
        super().__init__(
            d_inner,
            d_state,
            d_conv,
            rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
        )
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def reset_parameters(self) -> None:
        """Draw all weights as the constructor does; any rows of them, where a process holds a part."""
        super().reset_parameters()
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b l d_model"],
        *,
        reverse: bool = False,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_model"]:
        """Mix whole sequences. Absent positions (`mask` False) influence nothing and give 0."""
        u, z = self._halves(x, mask, cu_seqlens)
        return self._projected(self.mix_whole(u, z, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens), mask)

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: State, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], State]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        u, z = self._halves(x, mask)
        y, after = self.mix(u, z, state, mask=mask)
        return self._projected(y, mask), after

    def step_(self, x: Float[Tensor, "b l d_model"], state: State) -> Float[Tensor, "b l d_model"]:
        """Like `scan`, usually of one position, but overwrites the state's tensors; without gradient."""
        found = quick_step(self, x, state) if type(self) is S6 else None
        return self._scan_into(x, state) if found is None else found[0]

    def step_behind_(
        self,
        norm: AddNorm,
        x: Float[Tensor, "b l d_model"],
        residual: Float[Tensor, "b l d_model"] | None,
        state: State,
    ) -> tuple[Float[Tensor, "b l d_model"], Float[Tensor, "b l d_model"]]:
        """`norm(x, residual)` and `step_` of what it gives, in one call where that can be; also gives the stream."""
        found = quick_step(self, x, state, norm, residual) if type(self) is S6 and type(norm) is AddNorm else None
        if found is not None:
            return found
        with torch.no_grad():
            x, stream = norm(x, residual)
        return self.step_(x, state), stream

    @torch.no_grad()
    def _scan_into(self, x: Tensor, state: State) -> Tensor:
        y, after = self.scan(x, state)
        for tensor, value in zip(state, after, strict=True):
            tensor.copy_(value)
        return y

    def _halves(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The path's input and the gate."""
        require_input(x, self.d_model, mask, cu_seqlens)
        return linear_halves(self.in_proj, zero_absent(x, mask))

    def _projected(self, y: Tensor, mask: Tensor | None) -> Tensor:
        y = self.out_proj(y)
        return y if self.out_proj.bias is None else zero_absent(y, mask)


def require_input(x: Tensor, d_model: int, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> None:
    """Raise unless `x` is (b, l, d_model) and the mask or the borders fit it, in the operators' words."""
    if x.dim() != 3 or x.shape[2] != d_model:
        raise ConfigError(f"x has shape {tuple(x.shape)}; it must be (b, l, d_model) with d_model = {d_model}.")
    checks.count_states(x, mask, cu_seqlens)


def zero_absent(x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None) -> Float[Tensor, "b l d"]:
    """Zeros where `mask` is False. Not a product: NaN may stand there, also on its way into a weight's gradient."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that: what decays are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def start_step(
    weight: Float[Tensor, "*k d r"],
    bias: Float[Tensor, "*k d"],
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
) -> None:
    """Start with steps spread evenly in logarithm over [dt_min, dt_max], whatever the input (Sec. 3.6)."""
    std = weight.shape[-1] ** -0.5 * dt_scale
    if dt_init == "random":
        nn.init.uniform_(weight, -std, std)
    elif dt_init == "constant":
        nn.init.constant_(weight, std)
    else:
        raise ConfigError(f"dt_init={dt_init!r}: takes 'random' or 'constant'")
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(low + (high - low) * torch.rand(bias.shape)).clamp(min=dt_init_floor)
    # The inverse of the softplus that the scan applies.
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
