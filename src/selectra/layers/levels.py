"""Four grids for a decoder, each of half the sides of the one before, from whatever a backbone gives.

Plain stacks have one resolution: their grids are brought to a quarter, half, once and twice its stride by transposed
convolutions and a maximum (Li et al. 2022, "Exploring Plain Vision Transformer Backbones", arXiv:2203.16527, Sec. 3, in
the form that BEiT's decoders have, arXiv:2106.08254). Pyramids of fewer stages get coarser grids by maxima.
"""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError

COUNT = 4


class FourLevels(nn.Module):
    """Grids of a backbone as four, channels first, finest first.

    Args:
        dims: Widths of the backbone's grids.
        strides: Pixels from one of their positions to the next, all alike or doubling.

    Attributes:
        dims: Widths of the four.
        strides: Their strides.
    """

    def __init__(self, dims: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.dims, self.strides = tuple(dims)[-COUNT:], tuple(strides)[-COUNT:]
        self.plain = len(set(strides)) == 1
        self.ways = nn.ModuleList()
        if self.plain:
            self._from_plain(tuple(dims), strides[0])
        elif any(b != 2 * a for a, b in pairwise(strides)):
            raise ConfigError(f"the backbone's strides are {tuple(strides)}; they must be all alike, or double.")
        self.missing = 0 if self.plain else COUNT - len(self.strides)
        self.dims += self.dims[-1:] * self.missing
        self.strides += tuple(self.strides[-1] * 2**i for i in range(1, self.missing + 1))

    def _from_plain(self, dims: tuple[int, ...], stride: int) -> None:
        if stride % COUNT:
            raise ConfigError(
                f"a plain backbone of stride {stride}: needs a multiple of {COUNT}, of which a quarter is the finest "
                "grid's; give the backbone a larger patch_size."
            )
        # Behind which quarter of the blocks each is taken; where there are fewer grids, some are taken twice.
        self.taken = [i * len(dims) // COUNT for i in range(COUNT)]
        self.dims = tuple(dims[i] for i in self.taken)
        self.strides = tuple(stride * 2**i // COUNT for i in range(COUNT))
        d, half = self.dims[0], self.dims[1]
        finest = [nn.ConvTranspose2d(d, d, 2, 2), nn.BatchNorm2d(d), nn.GELU(), nn.ConvTranspose2d(d, d, 2, 2)]
        ways = [nn.Sequential(*finest), nn.ConvTranspose2d(half, half, 2, 2), nn.Identity(), nn.MaxPool2d(2, 2)]
        self.ways.extend(ways)

    def forward(self, grids: Sequence[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        # From channels last to channels first; heights, widths and channels differ from grid to grid.
        first = [grid.permute(0, 3, 1, 2) for grid in grids]
        if self.plain:
            return [way(first[i]) for way, i in zip(self.ways, self.taken, strict=True)]
        first = first[-COUNT:]
        for _ in range(self.missing):
            first.append(F.max_pool2d(first[-1], 2, 2))
        return first
