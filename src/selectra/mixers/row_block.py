"""The block that SiMBA and Samba share: a Mamba along a grid's rows, then a mixer of channels.

Source: arXiv:2403.15360, Sec. 3.1; github.com/badripatro/simba and github.com/zhuqinfeng1999/Samba: `Block_mamba`.
"""

from jaxtyping import Float
from torch import Tensor, nn

from selectra.layers.drop import DropPath
from selectra.layers.image import Mlp
from selectra.layers.norm import LayerNorm
from selectra.mixers.s6 import S6


class RowBlock(nn.Module):
    """Mamba along the grid's rows, then a mixer of channels where it is given, each behind a norm and added.

    Args:
        d_model: Width.
        mamba: Mixes tokens, row by row.
        channel: Mixes channels: an MLP on the grid, or another mixer on the sequence of tokens; or none.
        drop_path: Rate at which either branch is left out in training.
        eps: Of the norm before the mixer of channels; the other has PyTorch's.
    """

    def __init__(
        self, d_model: int, mamba: S6, channel: nn.Module | None, drop_path: float = 0.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(d_model)
        self.norm2 = None if channel is None else LayerNorm(d_model, eps=eps)
        self.mamba, self.channel, self.drop_path = mamba, channel, DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        grid = x.shape[1:3]
        x = x + self.drop_path(self.mamba(self.norm1(x).flatten(1, 2)).unflatten(1, grid))
        if self.channel is None or self.norm2 is None:
            return x
        y = self.norm2(x)
        # MLPs stay on the grid; the others mix a sequence of tokens.
        y = self.channel(y) if isinstance(self.channel, Mlp) else self.channel(y.flatten(1, 2)).unflatten(1, grid)
        return x + self.drop_path(y)
