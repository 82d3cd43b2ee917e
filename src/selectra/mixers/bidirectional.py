"""A selective mixer that looks both ways along the length."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn

from selectra.mixers.s6 import SelectivePath, at_least_float32, require_input, zero_absent
from selectra.mixers.sizes import mixer_sizes
from selectra.ops import cross_scan


class Bidirectional(nn.Module):
    """Two selective paths, first to last and last to first, between shared projections; their outputs are summed.

    Input projection, gate and output projection are common; convolution, selection, A and D belong to each direction:
    the mixer of Vision Mamba's encoder (Zhu et al. 2024, arXiv:2401.09417, Alg. 1). Nothing is flipped: the second
    path scans in reverse, so the gate at a position meets both directions' outputs at that position.

    Args:
        d_model: Width of the residual stream.
        d_state: State size per channel.
        d_conv: Width of the short convolutions.
        expand: Width between the projections over `d_model`.
        dt_rank: Rank of the step's projection; "auto" is `ceil(d_model / 16)`.
        conv_bias: Whether the short convolutions have a bias.
        bias: Whether the input and output projections have one.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        d_inner, rank = mixer_sizes(d_model, d_state, d_conv, expand, dt_rank)
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.ahead = SelectivePath(d_inner, d_state, d_conv, rank, conv_bias=conv_bias)
        self.back = SelectivePath(d_inner, d_state, d_conv, rank, conv_bias=conv_bias)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b l d_model"],
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_model"]:
        """Mix whole sequences. Absent positions (`mask` False) influence nothing and give 0."""
        require_input(x, self.d_model, mask, cu_seqlens)
        u, z = self.in_proj(zero_absent(x, mask)).chunk(2, dim=-1)
        if x.is_cuda and mask is None and cu_seqlens is None:
            return self.out_proj(self._mix_at_once(u, z))
        ahead, _ = self.ahead.mix(u, z, mask=mask, cu_seqlens=cu_seqlens)
        back, _ = self.back.mix(u, z, reverse=True, mask=mask, cu_seqlens=cu_seqlens)
        y = self.out_proj(ahead + back)
        return y if self.out_proj.bias is None else zero_absent(y, mask)

    def _mix_at_once(self, u: Float[Tensor, "b l d"], z: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Both paths in one launch of the scan, added: on a GPU two small ones would leave it half empty."""
        paths = (self.ahead, self.back)
        u = torch.stack([path.convolve(u, reverse=path is self.back)[0] for path in paths])
        x_weight, dt_weight, A_log, D, bias = (
            torch.stack(own)
            for own in zip(
                *((p.x_proj.weight, p.dt_proj.weight, p.A_log, p.D, p.dt_proj.bias) for p in paths), strict=True
            )
        )
        rank, n = self.ahead.dt_rank, self.ahead.d_state
        rows = u.flatten(1, 2)
        dt, B, C = torch.bmm(rows, x_weight.transpose(1, 2)).split([rank, n, n], dim=-1)
        delta = torch.bmm(dt, dt_weight.transpose(1, 2))
        # A line is a grid of one row: (2, b l, ...) as (b, 1, l, 2, ...).
        over = (x.unflatten(1, (u.shape[1], 1, u.shape[2])).movedim(0, 3) for x in (rows, delta, B, C))
        u, delta, B, C = over
        A = -at_least_float32(A_log).exp()
        y = cross_scan(u, delta, A, B, C, D, z.unsqueeze(1), bias, True, routes=("right", "left"))
        return y.squeeze(1)
