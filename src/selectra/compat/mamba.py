"""`mamba_ssm.Mamba` with the extra arguments of its forks: Vim's, VideoMamba's and SegMamba's.

Parameters have their names, shapes, order and initial values, so that weights, optimizer states and seeds carry over.
Inside, everything is channels last and nothing is flipped: the second direction scans in reverse.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.compat.inner import convolved, scanned, select
from selectra.compat.layout import at_least_float32
from selectra.compat.pickled import completed
from selectra.compat.state_update import selective_state_update
from selectra.errors import ConfigError
from selectra.mixers.inner import Weights, mixed_at_once
from selectra.mixers.projections import linear_halves
from selectra.ops import causal_conv1d

TYPES = ("none", "v1", "v2", "v3")
# What the parameters of a further direction are called: after Vim's backward one, SegMamba's over slices.
BACKWARD, SLICES = "_b", "_s"


class Mamba(nn.Module):
    """A Mamba block, (b, l, d_model) -> (b, l, d_model).

    Args:
        d_model: Width of the residual stream.
        d_state: State size per channel.
        d_conv: Width of the short convolution.
        expand: Width between the projections over `d_model`.
        dt_rank: Rank of the step's projection; "auto" is `ceil(d_model / 16)`.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        dt_init: "random" or "constant".
        dt_scale: Scale of that start.
        dt_init_floor: Initial steps below this are raised to it.
        conv_bias: Whether the convolution has a bias.
        bias: Whether the projections have one.
        use_fast_path: As in the forks, without it, and with a cache, there is one direction only.
        layer_idx: The layer's place in a cache.
        device: Where the parameters lie.
        dtype: Their type; A_log and D stay float32.
        bimamba_type: "none"; "v1" (Vim: one selection scanned both ways), "v2" (Vim: each direction its own convolution
            and selection), "v3" (SegMamba: as v2, and a third path over interleaved slices).
        if_divide_out: Vim: halve the sum of v2's directions.
        init_layer_scale: Vim: initial value of a learned scale of the output, if any.
        nslices: SegMamba: slices of v3's third path.
        bimamba: VideoMamba: True means "v2".
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: Any = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        nslices: int = 5,
        bimamba: bool | None = None,
    ) -> None:
        super().__init__()
        kind = "v2" if bimamba else bimamba_type or "none"
        if kind not in TYPES:
            raise ConfigError(f"bimamba_type={bimamba_type!r}: takes {', '.join(TYPES)}")
        if dt_init not in ("random", "constant"):
            raise ConfigError(f"dt_init={dt_init!r}: takes 'random' or 'constant'")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_divide_out, self.nslices = kind, if_divide_out, nslices
        self.init_layer_scale = init_layer_scale
        self.activation, self.act = "silu", nn.SiLU()
        self._at: dict[str, Any] = {"device": device, "dtype": dtype}
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **self._at)
        self._add_path("", conv_bias)
        self._start_step(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self._add_decay("")
        self._add_skip("")
        if kind == "v1":
            self._add_decay(BACKWARD)
        for suffix in {"v2": (BACKWARD,), "v3": (BACKWARD, SLICES)}.get(kind, ()):
            self._add_decay(suffix)
            self._add_path(suffix, conv_bias)
            self._add_skip(suffix)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **self._at)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickled block of mamba_ssm or of a fork, which keeps its own arguments alone."""
        kind = "v2" if state.get("bimamba") else state.get("bimamba_type") or "none"
        own = completed(state, if_divide_out=False, init_layer_scale=None, nslices=5)
        super().__setstate__(own | {"bimamba_type": kind})

    def _add_path(self, suffix: str, conv_bias: bool) -> None:
        inner, k = self.d_inner, self.d_conv
        conv = nn.Conv1d(inner, inner, k, groups=inner, padding=k - 1, bias=conv_bias, **self._at)
        self.add_module(f"conv1d{suffix}", conv)
        width = self.dt_rank + 2 * self.d_state
        self.add_module(f"x_proj{suffix}", nn.Linear(inner, width, bias=False, **self._at))
        self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, inner, bias=True, **self._at))

    @torch.no_grad()
    def _start_step(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float) -> None:
        """Steps spread evenly in logarithm; of the first direction alone, as in the forks."""
        std = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, std)
        else:
            nn.init.uniform_(self.dt_proj.weight, -std, std)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(self.d_inner, **self._at) * (high - low) + low).clamp(min=dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        setattr(self.dt_proj.bias, "_no_reinit", True)  # noqa: B010 # an attribute that initialisers look for

    def _add_decay(self, suffix: str) -> None:
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self._at["device"])
        self._add_undecayed("A_log" if not suffix else f"A{suffix}_log", states.log().repeat(self.d_inner, 1))

    def _add_skip(self, suffix: str) -> None:
        self._add_undecayed(f"D{suffix}", torch.ones(self.d_inner, device=self._at["device"]))

    def _add_undecayed(self, name: str, value: Tensor) -> None:
        parameter = nn.Parameter(value)
        setattr(parameter, "_no_weight_decay", True)  # noqa: B010 # an attribute that optimizers' set-ups look for
        self.register_parameter(name, parameter)

    def forward(
        self, hidden_states: Float[Tensor, "b l d_model"], inference_params: Any = None, T: int = 1
    ) -> Float[Tensor, "b l d_model"]:
        """Mix whole sequences, or, with a cache that holds earlier positions, the next one.

        Args:
            hidden_states: Input.
            inference_params: A cache, as `mamba_ssm.utils.generation.InferenceParams`.
            T: Taken and not used, as in VideoMamba.
        """
        if inference_params is not None:
            out = self._cached(hidden_states, inference_params)
        else:
            x, z = linear_halves(self.in_proj, hidden_states)
            out = self.out_proj(self._directions(x, z) if self.use_fast_path else self._mixed(x, z, ""))
        return out if self.init_layer_scale is None else out * self.gamma

    def _directions(self, x: Float[Tensor, "b l d"], z: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        if self.bimamba_type == "v1":
            chosen = self._selected(convolved(x, self.conv1d.weight, self.conv1d.bias), "")
            ahead = scanned(chosen, self._decay(""), self.D, z, self.dt_proj.bias)
            return ahead + scanned(chosen, self._decay(BACKWARD), self.D, z, self.dt_proj.bias, reverse=True)
        y = self._mixed(x, z, "")
        if self.bimamba_type == "none":
            return y
        y = y + self._mixed(x, z, BACKWARD, reverse=True)
        if self.bimamba_type == "v3":
            return y + self._over_slices(x, z)
        return y / 2 if self.if_divide_out else y

    def _mixed(self, x: Tensor, z: Tensor, suffix: str, *, reverse: bool = False) -> Float[Tensor, "b l d"]:
        """One direction with its own convolution and selection."""
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        D, x_proj = getattr(self, f"D{suffix}"), getattr(self, f"x_proj{suffix}").weight
        if x.shape[1] > 1:
            own = Weights(conv.weight, conv.bias, x_proj, dt_proj.weight, dt_proj.bias, self._decay_log(suffix), D)
            y = mixed_at_once(x, z, own, reverse=reverse)
            if y is not None:
                return y
        chosen = self._selected(convolved(x, conv.weight, conv.bias, reverse=reverse), suffix)
        return scanned(chosen, self._decay(suffix), D, z, dt_proj.bias, reverse=reverse)

    def _selected(self, u: Tensor, suffix: str) -> Any:
        x_proj, dt_proj = getattr(self, f"x_proj{suffix}"), getattr(self, f"dt_proj{suffix}")
        return select(u, x_proj.weight, dt_proj.weight, self.d_state)

    def _decay(self, suffix: str) -> Float[Tensor, "d n"]:
        return -torch.exp(at_least_float32(self._decay_log(suffix)))

    def _decay_log(self, suffix: str) -> Tensor:
        return getattr(self, f"A{suffix}_log" if suffix else "A_log")

    def _over_slices(self, x: Tensor, z: Tensor) -> Float[Tensor, "b l d"]:
        """SegMamba's third path: position j of every slice, then position j + 1 of every slice."""
        length = x.shape[1]
        if length % self.nslices:
            raise ConfigError(f"nslices={self.nslices} must divide the length {length}.")

        def woven(t: Tensor, rows: int) -> Tensor:
            return t.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)

        y = self._mixed(woven(x, self.nslices), woven(z, self.nslices), SLICES)
        return woven(y, length // self.nslices)

    def _cached(self, hidden_states: Tensor, inference_params: Any) -> Tensor:
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        u, last = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, "silu", return_final_state=True)
        chosen = self._selected(u, "")
        y, state = scanned(chosen, self._decay(""), self.D, z, self.dt_proj.bias, return_final_state=True)
        with torch.no_grad():
            conv_state.copy_(last)
            ssm_state.copy_(state)
        return self.out_proj(y)

    def step(
        self, hidden_states: Float[Tensor, "b 1 d_model"], conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next position; overwrites both states.

        Raises:
            ConfigError: There is more than one position.
        """
        if hidden_states.shape[1] != 1:
            raise ConfigError(f"Mamba.step takes one position at a time, got {hidden_states.shape[1]}.")
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        before = conv_state.to(at_least_float32(x).dtype, copy=True)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        u, last = causal_conv1d(x, weight, bias, "silu", initial_state=before, return_final_state=True)
        with torch.no_grad():
            conv_state.copy_(last)
        chosen = self._selected(u, "")
        y = selective_state_update(
            ssm_state,
            u[:, 0],
            chosen.delta[:, 0],
            self._decay(""),
            chosen.B[:, 0, 0],
            chosen.C[:, 0, 0],
            self.D,
            z[:, 0],
            self.dt_proj.bias,
            dt_softplus=True,
        )
        return F.linear(y, self.out_proj.weight, self.out_proj.bias).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Empty states (b, d_inner, d_conv) and (b, d_inner, d_state); `max_seqlen` changes nothing."""
        weight, step = self.conv1d.weight, self.dt_proj.weight
        conv = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        return conv, step.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or step.dtype)

    def _get_states_from_cache(self, inference_params: Any, batch_size: int, initialize_states: bool = False) -> Any:
        if self.layer_idx is None:
            raise ConfigError("a cache needs layers with a layer_idx; pass one to Mamba.")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]
