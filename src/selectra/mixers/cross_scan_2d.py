"""VMamba's mixer of a grid: selective scans along four routes, each with its own selection, added."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.norm import LayerNorm
from selectra.mixers.s6 import at_least_float32, start_step
from selectra.mixers.sizes import mixer_sizes, require_sizes
from selectra.ops import cross_scan

ROUTES = ("right", "down", "left", "up")
MANY_ROWS, ENOUGH_PIECES = 16384, 16


class CrossPaths(nn.Module):
    """Depthwise convolution, selection of step, B and C for each route, and the scans: what lies between projections.

    Liu et al. 2024, "VMamba", arXiv:2401.10166, SS2D. Routes go by rows, by columns, and both backwards, in the order
    of the official code; nothing is moved for them.

    Args:
        d_inner: Width.
        d_state: State size per channel and route.
        d_conv: Side of the depthwise convolution; odd.
        dt_rank: Rank of the steps' projections.
        conv_bias: Whether the convolution has a bias.
        routes: Of "right", "down", "left" and "up", by default all; fewer show what the others are worth.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        d_conv: int = 3,
        dt_rank: int = 1,
        *,
        conv_bias: bool = True,
        routes: tuple[str, ...] = ROUTES,
    ) -> None:
        super().__init__()
        require_sizes(d_inner=d_inner, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank)
        if d_conv % 2 == 0:
            raise ConfigError(f"d_conv={d_conv}: needs an odd number, so that the grid keeps its size")
        if not routes or len(set(routes)) < len(routes) or not set(routes) <= set(ROUTES):
            raise ConfigError(f"routes={routes}: takes one or more of {', '.join(ROUTES)}, each once")
        self.d_inner, self.d_state, self.dt_rank, self.routes = d_inner, d_state, dt_rank, routes
        k = len(routes)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, bias=conv_bias)
        self.x_proj = nn.Parameter(torch.empty(k, dt_rank + 2 * d_state, d_inner))
        nn.init.uniform_(self.x_proj, -(d_inner**-0.5), d_inner**-0.5)
        self.dt_proj = nn.Parameter(torch.empty(k, d_inner, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(k, d_inner))
        start_step(self.dt_proj, self.dt_bias)
        # A = -(1, 2, ..., N) in every channel of every route, the real part of S4D-Lin.
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(k, d_inner, 1))
        self.D = nn.Parameter(torch.ones(k, d_inner))

    def mix(self, u: Float[Tensor, "b h w d_inner"]) -> Float[Tensor, "b h w d_inner"]:
        """Convolve and scan."""
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        delta, B, C = self.select(u)
        A = -at_least_float32(self.A_log).exp()
        return cross_scan(u, delta, A, B, C, self.D, None, self.dt_bias, True, routes=self.routes)

    def select(
        self, u: Float[Tensor, "b h w d_inner"]
    ) -> tuple[Float[Tensor, "b h w k d_inner"], Float[Tensor, "b h w k n"], Float[Tensor, "b h w k n"]]:
        """Step before bias and softplus, B and C of every route; they depend on their own position alone."""
        k, n = len(self.routes), self.d_state
        dt, B, C = F.linear(u, self.x_proj.flatten(0, 1)).unflatten(3, (k, -1)).split([self.dt_rank, n, n], dim=4)
        # One product a route; its rows lie together, and the scan reads them there.
        rows, weight = dt.flatten(0, 2).transpose(0, 1), self.dt_proj.transpose(1, 2)
        pieces = _pieces(u)
        if pieces > 1:
            rows = rows.reshape(k * pieces, -1, self.dt_rank)
            weight = weight.unsqueeze(1).expand(-1, pieces, -1, -1).flatten(0, 1)
        steps = torch.bmm(rows, weight).view(k, -1, self.d_inner)
        return steps.transpose(0, 1).unflatten(0, u.shape[:3]), B, C


class CrossScan2d(CrossPaths):
    """The whole gated mixer, `(b, h, w, d_model) -> (b, h, w, d_model)`: vanilla VMamba's SS2D.

    Args, beside those of `CrossPaths`:
        d_model: Width of the residual stream.
        expand: Width between the projections over `d_model`.
        dt_rank: Rank of the steps' projections; "auto" is `ceil(d_model / 16)`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        conv_bias: bool = True,
        routes: tuple[str, ...] = ROUTES,
    ) -> None:
        d_inner, rank = mixer_sizes(d_model, d_state, d_conv, expand, dt_rank)
        super().__init__(d_inner, d_state, d_conv, rank, conv_bias=conv_bias, routes=routes)
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.out_norm = LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b h w d_model"]) -> Float[Tensor, "b h w d_model"]:
        require_grid(x, self.d_model)
        u, z = self.in_proj(x).chunk(2, dim=3)
        # The gate follows the norm, so it cannot go into the scan.
        return self.out_proj(self.out_norm(self.mix(u)) * F.silu(z))


def _pieces(u: Tensor) -> int:
    """In how many equal pieces the rows of a product with a weight of few rows and columns are taken.

    The weight's gradient sums over all rows. cuBLAS gives it a handful of blocks, each of which goes through all of
    them: 13 ms for 131,072 on an H100. In pieces it has blocks for all multiprocessors.
    """
    batch, height, width, _ = u.shape
    if not u.is_cuda or batch * height * width < MANY_ROWS:
        return 1
    return batch if batch >= ENOUGH_PIECES else batch * height


def require_grid(x: Tensor, d_model: int) -> None:
    """Raise unless x is (b, h, w, d_model)."""
    if x.dim() != 4 or x.shape[3] != d_model:
        raise ConfigError(f"x has shape {tuple(x.shape)}; it must be (b, h, w, d_model) with d_model = {d_model}.")
