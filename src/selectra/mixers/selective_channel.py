"""MambaMixer's selective channel mixer: a two-directional selective scan over channels instead of over positions."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.mixers.s6 import SelectivePath, require_input, zero_absent
from selectra.mixers.sizes import mixer_sizes
from selectra.ops.whole import require_whole


class SelectiveChannel(nn.Module):
    """Mix across channels (variates), which stand where a token mixer has positions; each is a vector of `d_model`.

    Behrouz, Santacatterina and Zabih 2024, "MambaMixer", arXiv:2403.19888, Sec. 3.2: each direction has its own
    input projection, convolution, selection, A and D; one gate, computed from the unflipped input, serves both:
    `y = SSM(x_ahead) * gate + flip(SSM(x_back)) * gate`. The scan reads channels in their given order, so the result
    depends on it.

    Departures: B, C and the step are selected from the convolution's output, as in Mamba's code, not from the input;
    an output projection brings the sum back to `d_model`, as in the Mamba block.

    Args:
        d_model: Width of each channel's vector.
        d_state: State size.
        d_conv: Width of the short convolutions.
        expand: Width between the projections over `d_model`.
        dt_rank: Rank of the step's projection; "auto" is `ceil(d_model / 16)`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        d_inner, rank = mixer_sizes(d_model, d_state, d_conv, expand, dt_rank)
        self.d_model = d_model
        # One product for the inputs of both directions and the gate: [ahead, back, gate].
        self.in_proj = nn.Linear(d_model, 3 * d_inner, bias=False)
        self.ahead = SelectivePath(d_inner, d_state, d_conv, rank)
        self.back = SelectivePath(d_inner, d_state, d_conv, rank)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "b s d_model"], *, mask: Bool[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s d_model"]:
        """Mix across `s`. Absent channels (`mask` False) influence nothing and give 0."""
        require_whole("SelectiveChannel")
        require_input(x, self.d_model, mask)
        u_ahead, u_back, z = self.in_proj(zero_absent(x, mask)).chunk(3, dim=-1)
        ahead = self.ahead.mix_whole(u_ahead, z, mask=mask)
        return self.out_proj(ahead + self.back.mix_whole(u_back, z, reverse=True, mask=mask))
