"""`mamba_ssm.modules.mamba2.Mamba2` and `mamba2_simple.Mamba2Simple`: names, parameters and initial values.

Departures: one process only (no tensor parallelism), and no caches of packed sequences.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.compat.conv import causal_conv1d_update
from selectra.compat.gated_norms import RMSNorm as GatedRMSNorm
from selectra.compat.layout import at_least_float32, swapped
from selectra.compat.ssd import NO_LIMIT, mamba_split_conv1d_scan_combined
from selectra.compat.state_update import selective_state_update
from selectra.errors import ConfigError


class Mamba2(nn.Module):
    """A Mamba-2 block, (b, l, d_model) -> (b, l, d_model).

    Args:
        d_model: Width of the residual stream.
        d_state: State size.
        d_conv: Width of the short convolution.
        conv_init: Bound of the convolution's uniform start, if not PyTorch's.
        expand: Width between the projections over `d_model`.
        headdim: Channels of a head.
        d_ssm: Channels that are scanned; the rest is a gated perceptron. All by default.
        ngroups: Groups of heads that share B and C.
        A_init_range: From where A starts uniformly.
        D_has_hdim: Whether the skip has a number for each channel, not each head.
        rmsnorm: Whether a gated normalisation stands before the output projection.
        norm_before_gate: Its form.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        dt_init_floor: Initial steps below this are raised to it.
        dt_limit: Bounds of the step.
        bias: Whether the projections have a bias.
        conv_bias: Whether the convolution has one.
        chunk_size: Changes nothing here.
        use_mem_eff_path: Changes nothing here.
        layer_idx: The layer's place in a cache.
        process_group: None; several processes are not covered.
        sequence_parallel: Changes nothing here.
        device: Where the parameters lie.
        dtype: Their type; D stays float32.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise ConfigError("selectra.compat's Mamba2 runs in one process; process_group must be None.")
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.conv_init, self.ngroups, self.D_has_hdim, self.rmsnorm = conv_init, ngroups, D_has_hdim, rmsnorm
        self.norm_before_gate, self.dt_limit, self.activation = norm_before_gate, tuple(dt_limit), "silu"
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.process_group, self.sequence_parallel = process_group, sequence_parallel
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim:
            raise ConfigError(f"headdim={headdim} must divide the scanned width {self.d_ssm}.")
        self.nheads = self.d_ssm // headdim
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        width = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, **at)
        channels = self.d_ssm + 2 * ngroups * d_state
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **at)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.act = nn.SiLU()
        dt = torch.exp(torch.rand(self.nheads, **at) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        dt = dt.clamp(min=dt_init_floor)
        self.dt_bias = _undecayed(dt + torch.log(-torch.expm1(-dt)))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = _undecayed(A.log().to(dtype or torch.float32))
        self.D = _undecayed(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            size = self.d_ssm // ngroups
            self.norm = GatedRMSNorm(self.d_ssm, 1e-5, size, norm_before_gate=norm_before_gate, **at)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **at)

    def forward(
        self,
        u: Float[Tensor, "b l d_model"],
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Mix whole sequences, or, with a cache that holds earlier positions, the next one.

        Args:
            u: Input; (b l, d_model) where `seqlen` is given.
            seqlen: l.
            seq_idx: Which packed sequence a position belongs to.
            cu_seqlens: Only with a cache in mamba_ssm; refused there.
            inference_params: A cache.

        Raises:
            ConfigError: Packed sequences together with a cache.
        """
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            y = self._mixed(x, seq_idx)
        elif cu_seqlens is not None:
            raise ConfigError("selectra.compat's Mamba2 has no cache for packed sequences (cu_seqlens).")
        else:
            y = self._cached(x, seq_idx, inference_params)
        return y if seqlen is None else y.flatten(0, 1)

    def _mixed(self, u: Tensor, seq_idx: Tensor | None, zxbcdt: Tensor | None = None, **also: Any) -> Any:
        D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
        return mamba_split_conv1d_scan_combined(
            self.in_proj(u) if zxbcdt is None else zxbcdt,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(at_least_float32(self.A_log)),
            D,
            self.chunk_size,
            seq_idx=seq_idx,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
            dt_limit=self.dt_limit,  # pyright: ignore[reportArgumentType]
            **also,
        )

    def _cached(self, u: Tensor, seq_idx: Tensor | None, inference_params: Any) -> Tensor:
        conv_state, ssm_state = self._get_states_from_cache(inference_params, u.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(u, conv_state, ssm_state)[0]
        zxbcdt = self.in_proj(u)
        y, state = self._mixed(u, seq_idx, zxbcdt, return_final_states=True)
        xBC = swapped(self._split(zxbcdt)[3])
        with torch.no_grad():
            conv_state.copy_(F.pad(xBC, (self.d_conv - xBC.shape[-1], 0)))
            ssm_state.copy_(state)
        return y

    def _split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """The gated perceptron's two halves, the gate, what is convolved, the step."""
        convolved = self.d_ssm + 2 * self.ngroups * self.d_state
        d_mlp = self.d_inner - self.d_ssm
        return zxbcdt.split([d_mlp, d_mlp, self.d_ssm, convolved, self.nheads], -1)

    def step(
        self, hidden_states: Float[Tensor, "b 1 d_model"], conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next position; overwrites both states.

        Raises:
            ConfigError: There is more than one position.
        """
        if hidden_states.shape[1] != 1:
            raise ConfigError(f"Mamba2.step takes one position at a time, got {hidden_states.shape[1]}.")
        z0, x0, z, xBC, dt = self._split(self.in_proj(hidden_states[:, 0]))
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        bc = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, bc, bc], -1)
        heads = (self.nheads, self.headdim)
        A = -torch.exp(at_least_float32(self.A_log))

        def of_heads(t: Tensor) -> Tensor:
            return t.unsqueeze(-1).expand(*t.shape, self.headdim)

        dt = at_least_float32(dt)
        limited = self.dt_limit != NO_LIMIT
        if limited:
            dt = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(*self.dt_limit)
        y = selective_state_update(
            ssm_state,
            x.unflatten(-1, heads),
            of_heads(dt),
            A[:, None, None].expand(*heads, self.d_state),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            self.D.unflatten(0, heads) if self.D_has_hdim else of_heads(self.D),
            None if self.rmsnorm else z.unflatten(-1, heads),
            None if limited else of_heads(self.dt_bias),
            dt_softplus=not limited,
        ).flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_inner > self.d_ssm:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Empty states (b, channels, d_conv) and (b, heads, headdim, d_state); `max_seqlen` changes nothing."""
        conv, ssm = self.conv1d.weight, self.in_proj.weight
        conv_state = conv.new_zeros(batch_size, self.d_conv, conv.shape[0], dtype=dtype or conv.dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return swapped(conv_state), ssm.new_zeros(shape, dtype=dtype or ssm.dtype)

    def _get_states_from_cache(self, inference_params: Any, batch_size: int, initialize_states: bool = False) -> Any:
        if self.layer_idx is None:
            raise ConfigError("a cache needs layers with a layer_idx; pass one to Mamba2.")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]


class Mamba2Simple(Mamba2):
    """The short form of the block, with other defaults and, where asked for, learned initial states.

    Args:
        learnable_init_states: Whether the scan starts from learned states.
        activation: "silu" or "swish" (the same).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.activation, self.learnable_init_states = activation, learnable_init_states
        if learnable_init_states:
            self.init_states = _undecayed(torch.zeros(self.nheads, headdim, d_state, device=device, dtype=dtype))

    def forward(self, u: Float[Tensor, "b l d_model"], seq_idx: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Mix whole sequences; `seq_idx` says which packed sequence a position belongs to."""
        states = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        return self._mixed(u, seq_idx, initial_states=states)


def _undecayed(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    setattr(parameter, "_no_weight_decay", True)  # noqa: B010 # an attribute that optimizers' set-ups look for
    return parameter
