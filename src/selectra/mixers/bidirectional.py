"""A selective mixer that looks both ways along the length."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.mixers.both_ways import Projections, mixed_both_ways
from selectra.mixers.projections import is_plain, parameter
from selectra.mixers.s6 import SelectivePath, at_least_float32, require_input, zero_absent
from selectra.mixers.sizes import mixer_sizes
from selectra.ops import cross_scan, whole


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

    mean: ClassVar[bool] = False
    """Whether both directions' mean is projected instead of their sum."""

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
        # On a GPU two small launches would leave it half empty; elsewhere putting both side by side is lost time.
        at_once = x.is_cuda and mask is None and cu_seqlens is None and self._is_plain()
        if at_once and (y := self._in_one_node(x)) is not None:
            return y
        u, z = self.in_proj(zero_absent(x, mask)).chunk(2, dim=-1)
        if at_once:
            return self.out_proj(self._joined(self._mix_at_once(u, z)))
        ahead = self.ahead.mix_whole(u, z, mask=mask, cu_seqlens=cu_seqlens)
        back = self.back.mix_whole(u, z, reverse=True, mask=mask, cu_seqlens=cu_seqlens)
        y = self.out_proj(self._joined(ahead + back))
        return y if self.out_proj.bias is None else zero_absent(y, mask)

    def _joined(self, total: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Of the sum of both directions what is projected."""
        return total / 2 if self.mean else total

    def _in_one_node(self, x: Float[Tensor, "b l d_model"]) -> Float[Tensor, "b l d_model"] | None:
        """All of it in one node of autograd, or None where that cannot be."""
        into, out, ahead, back = self._parts("in_proj", "out_proj", "ahead", "back")
        if not (is_plain(into) and is_plain(out) and type(ahead) is type(back) is SelectivePath):
            return None
        if parameter(into, "bias") is not None or parameter(out, "bias") is not None:
            return None
        projections = Projections(parameter(into, "weight"), parameter(out, "weight"))
        return mixed_both_ways(x, projections, ahead.weights(), back.weights(), self.mean)

    def _parts(self, *names: str) -> list[Any]:
        """Submodules, without a module's own search for a name."""
        return [self._modules[name] for name in names]

    def _is_plain(self) -> bool:
        """Whether the paths' projections are their weights alone: no adapter, no hook, which would not be called.

        Nor may the length be split, which `cross_scan` refuses.
        """
        if whole.splits:
            return False
        for path in self._parts("ahead", "back"):
            x_proj, dt_proj = path._modules["x_proj"], path._modules["dt_proj"]
            # A bias of the selection is for `mix`, which calls the map itself.
            if not (is_plain(x_proj) and parameter(x_proj, "bias") is None and is_plain(dt_proj)):
                return False
        return True

    def _mix_at_once(self, u: Float[Tensor, "b l d"], z: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Both paths in one launch of the scan, added."""
        paths = (self.ahead, self.back)
        # By position: both may be one module.
        u = torch.stack([path.convolve(u, reverse=back)[0] for path, back in zip(paths, (False, True), strict=True)], 2)
        A_log, D, bias = (
            torch.stack(own) for own in zip(*((p.A_log, p.D, p.dt_proj.bias) for p in paths), strict=True)
        )
        A = -at_least_float32(A_log).exp()
        # A line is a grid of one row.
        u, z, *selection = (x.unsqueeze(1) for x in (u, z, *self._select(u)))
        delta, B, C = selection
        return cross_scan(u, delta, A, B, C, D, z, bias, True, routes=("right", "left")).squeeze(1)

    def _select(self, u: Float[Tensor, "b l 2 d"]) -> Iterator[Tensor]:
        """Step (b, l, 2, d), B and C (b, l, 2, n) of both paths."""
        paths, rank, n = (self.ahead, self.back), self.ahead.dt_rank, self.ahead.d_state
        x_weights, dt_weights = ([p.x_proj.weight for p in paths], [p.dt_proj.weight for p in paths])
        if torch.is_grad_enabled():
            # Half of the weight is zeros; but the weights' gradients are plain products then, which are faster than
            # batched ones: a training step of Vim-t's mixer takes 1.5 instead of 2.0 ms on an H100.
            parts = zip(*(weight.split([rank, n, n]) for weight in x_weights), strict=True)
            weight = torch.cat([torch.block_diag(*part) for part in parts])
            dt, B, C = F.linear(u.flatten(2), weight).split([2 * rank, 2 * n, 2 * n], dim=-1)
            delta = F.linear(dt, torch.block_diag(*dt_weights))
            return (x.unflatten(2, (2, -1)) for x in (delta, B, C))
        rows = u.flatten(0, 1).transpose(0, 1)
        dt, B, C = torch.bmm(rows, torch.stack(x_weights).transpose(1, 2)).split([rank, n, n], dim=-1)
        delta = torch.bmm(dt, torch.stack(dt_weights).transpose(1, 2))
        return (x.transpose(0, 1).unflatten(0, u.shape[:2]) for x in (delta, B, C))
