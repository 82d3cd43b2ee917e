"""TimeMachine: four Mambas at two scales, Ahamed and Cheng 2024, arXiv:2403.09898.

Each series' window is mapped to n1 numbers and those to n2; at each of the two scales a pair of Mambas reads them. What
the four say is brought back to one scale and mapped to the horizon.

Source: github.com/Atik-Ahamed/TimeMachine, 5bf17a7: `models/TimeMachine.py`, `scripts/TimeMachine/*.sh`.
Glossary: L seq_len, T horizon, M n_series, n1 and n2 the scales; `mamba1 mamba2` the inner pair at n2, `mamba3 mamba4`
the outer pair at n1; ch_ind channel_independent.

What the pairs read, as the code has it: with channel mixing all four scan across the series, one way, in the data's
order. With channel independence `mamba2` and `mamba3` see one token, so nothing recurs in them, and `mamba1` and
`mamba4` scan along the n numbers, which are no longer an order in time.

Departures: missing values take no part in the statistics and are then filled with the last observed value.
"""

from typing import Any, Literal

from jaxtyping import Bool, Float, Int32
from torch import Tensor, cat, nn
from torch.nn import functional as F

from selectra.layers.covariates import refuse_covariates
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers import S6
from selectra.mixers.projections import is_plain
from selectra.mixers.s6 import at_least_float32
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, reads
from selectra.ops import selective_scan
from selectra.registry import models

HORIZONS = (96, 192, 336, 720)
MIXED: dict[str, Any] = {"channel_independent": False}

# From the official scripts, in the order of HORIZONS: (n1, n2), dropout, and what else differs.
PUBLISHED: dict[str, tuple[list[tuple[int, int]], list[float], dict[str, Any]]] = {
    "etth1": ([(512, 32), (512, 64), (512, 128), (128, 16)], [0.7] * 4, {}),
    "etth2": ([(128, 32), (256, 32), (512, 64), (256, 128)], [0.7] * 4, {}),
    "ettm1": ([(256, 64), (512, 32), (128, 16), (512, 128)], [0.6] * 4, {}),
    "ettm2": ([(256, 32), (128, 64), (256, 128), (256, 128)], [0.6] * 4, {}),
    "weather": ([(128, 16), (512, 128), (128, 64), (512, 256)], [0.1, 0.5, 0.0, 0.0], {}),
    "electricity": ([(512, 128), (512, 256), (512, 256), (512, 8)], [0.0, 0.0, 0.4, 0.0], MIXED),
    "traffic": (
        [(512, 16), (512, 256), (512, 256), (512, 128)],
        [0.3, 0.1, 0.1, 0.1],
        MIXED | {"window_norm": "instance"},
    ),
}
SIZES: dict[str, dict[str, Any]] = {
    f"{data}_{horizon}": {"n1": n1, "n2": n2, "dropout": dropout, **others}
    for data, (scales, dropouts, others) in PUBLISHED.items()
    for horizon, (n1, n2), dropout in zip(HORIZONS, scales, dropouts, strict=True)
}


class Lone(S6):
    """A Mamba that reads one token, or one channel: what channel independence makes of TimeMachine's four.

    The same function, with fewer numbers. One token from the empty state is taken without a scan. Where there is one
    channel, step, B and C are all multiples of it, so that nothing of the size of a state is made but the states.
    """

    def mix_whole(
        self,
        u: Float[Tensor, "b l d_inner"],
        z: Float[Tensor, "b l d_inner"] | None = None,
        *,
        reverse: bool = False,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_inner"]:
        """As `S6.mix_whole`."""
        simple = mask is None and cu_seqlens is None and is_plain(self.x_proj) and is_plain(self.dt_proj)
        if not simple or (u.shape[1] != 1 and u.shape[2] != 1):
            return super().mix_whole(u, z, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens)
        u, _ = self.convolve(u, reverse=reverse)
        A = -at_least_float32(self.A_log).exp()
        read = one_token if u.shape[1] == 1 else one_channel
        y = read(u, self.x_proj.weight, self.dt_proj.weight, A, self.dt_proj.bias, reverse) + self.D * u
        return y if z is None else y * F.silu(z)


def one_token(
    u: Float[Tensor, "b 1 d"],
    x_proj: Float[Tensor, "r_2n d"],
    dt_proj: Float[Tensor, "d r"],
    A: Float[Tensor, "d n"],
    bias: Float[Tensor, " d"],
    reverse: bool,
) -> Float[Tensor, "b 1 d"]:
    """Selection and scan (without D and z) of one position from the empty state, on which A has nothing to act."""
    dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)
    # A's gradient is 0, as the scan's is, and not absent.
    return F.softplus(F.linear(dt, dt_proj) + bias) * u * (B * C).sum(-1, keepdim=True) + 0.0 * A.sum()


def one_channel(
    u: Float[Tensor, "b l 1"],
    x_proj: Float[Tensor, "r_2n 1"],
    dt_proj: Float[Tensor, "1 r"],
    A: Float[Tensor, "1 n"],
    bias: Float[Tensor, " 1"],
    reverse: bool,
) -> Float[Tensor, "b l 1"]:
    """Selection and scan (without D and z) of one channel.

    With B = u b and C = u c the states' drive is delta u^2 b: each state runs as a channel of one state driven by
    u^2, and the output is u times their sum weighted by b c.
    """
    n = A.shape[1]
    step, b, c = x_proj[:, 0].split([dt_proj.shape[1], n, n])
    delta, one = u * (dt_proj @ step), u.new_ones(1, 1, 1).expand(*u.shape[:2], 1)
    states = selective_scan(
        u.square().expand(-1, -1, n), delta.expand(-1, -1, n), A.T, one, one, delta_bias=bias.expand(n),
        delta_softplus=True, reverse=reverse,
    )  # fmt: skip
    return u * (states @ (b * c)[:, None])


@models.register(
    "timemachine",
    kind="series",
    source="arXiv:2403.09898",
    takes=("observed",),
    smoke={"n1": 12, "n2": 6, "d_state": 4, **MIXED},
    base={},
    **SIZES,
)
class TimeMachine(nn.Module):
    """Pairs of Mambas at two scales; the published sizes are named after data set and horizon, at a look-back of 96.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        n1: Width of the outer scale.
        n2: Width of the inner scale.
        d_state: State size per channel of the Mambas.
        d_conv: Width of their short convolutions.
        expand: Their inner width over their input's.
        channel_independent: Read each series alone; otherwise scan across the series.
        residual: Add each scale's input to what its Mambas say.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate at the entrance of each scale.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        n1: int = 256,
        n2: int = 128,
        d_state: int = 256,
        d_conv: int = 2,
        expand: int | float = 1,
        channel_independent: bool = True,
        residual: bool = True,
        window_norm: WindowNorm = "revin",
        dropout: float = 0.05,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        require_sizes(seq_len=seq_len, n_series=n_series, n1=n1, n2=n2)
        require_rate(dropout=dropout)
        self.channel_independent, self.residual = channel_independent, residual
        # The official code writes instance normalisation out, and stops the gradient at the mean alone.
        self.revin = RevIN(n_series, window_norm, scale_gradient=window_norm == "instance")
        self.lin1, self.lin2, self.lin3 = nn.Linear(seq_len, n1), nn.Linear(n1, n2), nn.Linear(n2, n1)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        mamba = Lone if channel_independent else S6
        self.mamba1 = mamba(1 if channel_independent else n2, **mixer)
        self.mamba2, self.mamba3 = mamba(n2, **mixer), mamba(n1, **mixer)
        self.mamba4 = mamba(1 if channel_independent else n1, **mixer)
        self.lin4 = ForecastHead(2 * n1, horizon, quantiles)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b horizon s *q"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        x, statistics = self.revin(x, observed)
        x = carry_forward(x, observed).transpose(1, 2)
        y = self.mix(x.reshape(-1, 1, x.shape[2]) if self.channel_independent else x)
        return self.revin.inverse(self.lin4(y.reshape(*x.shape[:2], -1)), statistics)

    def mix(self, x: Float[Tensor, "b s l"]) -> Float[Tensor, "b s n"]:
        """Both scales, side by side; series read alone stand in the batch, with s = 1."""
        outer = self.lin1(x)
        x = self.dropout1(outer)
        from_outer = self._turned(self.mamba4, x) + self.mamba3(x)
        inner = self.lin2(x)
        x = self.dropout2(inner)
        along, across = self._turned(self.mamba1, x), self.mamba2(x)
        x = self.lin3(along + inner + across if self.residual else along + across)
        return cat([x + outer if self.residual else x, from_outer], dim=2)

    def _turned(self, mamba: S6, x: Float[Tensor, "b s n"]) -> Float[Tensor, "b s n"]:
        """A series read alone is scanned along its numbers."""
        return mamba(x.transpose(1, 2)).transpose(1, 2) if self.channel_independent else mamba(x)


@reads("Atik-Ahamed/TimeMachine:Model")
def read_timemachine(
    *,
    seq_len: int = 96,
    pred_len: int = 96,
    enc_in: int = 7,
    n1: int = 256,
    n2: int = 128,
    dropout: float = 0.05,
    revin: Literal[0, 1] = 1,
    ch_ind: Literal[0, 1] = 1,
    residual: Literal[0, 1] = 1,
    d_state: int = 256,
    dconv: int = 2,
    e_fact: int | float = 1,
) -> Official:
    """The official model; defaults are those of its `run_longExp.py`."""
    model = TimeMachine(
        seq_len=seq_len,
        horizon=pred_len,
        n_series=enc_in,
        n1=n1,
        n2=n2,
        d_state=d_state,
        d_conv=dconv,
        expand=e_fact,
        channel_independent=ch_ind == 1,
        residual=residual == 1,
        window_norm="revin" if revin == 1 else "instance",
        dropout=dropout,
    )
    return Official(model, _rename)


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("revin_layer.affine_", "revin."): value for key, value in state.items()}
