"""The cross-scan as a plain loop over positions, and calls to hold the operator to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALL = ("right", "left", "down", "up")
ACTIVATIONS = ("u", "delta", "B", "C", "z")


def order(route: str, height: int, width: int) -> list[tuple[int, int]]:
    """The positions in the order in which a route visits them."""
    rows = [(r, c) for r in range(height) for c in range(width)]
    columns = [(r, c) for c in range(width) for r in range(height)]
    return {"right": rows, "left": rows[::-1], "down": columns, "up": columns[::-1]}[route]


def slow(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    routes: Sequence[str] = ALL,
    merge: bool = True,
) -> Tensor:
    """As `cross_scan`."""
    batch, height, width, _, d = delta.shape
    u = u if u.dim() == 5 else u.unsqueeze(3).expand_as(delta)
    z = z if z is None or z.dim() == 5 else z.unsqueeze(3).expand_as(delta)
    of_routes = []
    for i, route in enumerate(routes):
        state, ys = torch.zeros(batch, d, A.shape[2], dtype=u.dtype), {}
        for r, c in order(route, height, width):
            at = (slice(None), r, c, i)
            dt = delta[at] if delta_bias is None else delta[at] + delta_bias[i]
            dt = F.softplus(dt, threshold=40) if delta_softplus else dt
            state = torch.exp(dt[..., None] * A[i]) * state + (dt * u[at])[..., None] * B[at].unsqueeze(1)
            y = (state * C[at].unsqueeze(1)).sum(-1)
            y = y if D is None else y + D[i] * u[at]
            ys[r, c] = y if z is None else y * F.silu(z[at])
        of_routes.append(torch.stack([torch.stack([ys[r, c] for c in range(width)], 1) for r in range(height)], 1))
    return sum(of_routes[1:], of_routes[0]) if merge else torch.stack(of_routes, 3)


def drawn(
    shape: tuple[int, int, int],
    k: int,
    d: int,
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    shared: bool = True,
    gate: str | None = None,
    plain: bool = False,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Tensors of a call in float64, of numbers that `dtype` holds.

    Args:
        shape: Batch, height, width.
        shared: Whether all routes read one u.
        gate: "shared", "own" or None.
        plain: Without skip and bias.
        seed: Of the numbers; by default the sizes make one.
    """
    generator = torch.Generator().manual_seed(sum(shape) + 7 * d + n if seed is None else seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    tensors = {"u": normal(*shape, d) if shared else normal(*shape, k, d), "delta": normal(*shape, k, d)}
    tensors |= {"A": -normal(k, d, n).exp(), "B": normal(*shape, k, n), "C": normal(*shape, k, n)}
    if gate is not None:
        tensors["z"] = normal(*shape, d) if gate == "shared" else normal(*shape, k, d)
    if not plain:
        tensors |= {"D": normal(k, d), "delta_bias": normal(k, d)}
    return {name: t.to(dtype if name in ACTIVATIONS else torch.float32).double() for name, t in tensors.items()}


def results(
    op: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu", **flags: Any
) -> dict[str, Tensor]:
    """The output and every gradient; activations in `dtype`, the layout in memory as it is."""
    leaves = {}
    for name, tensor in tensors.items():
        to = dtype if name in ACTIVATIONS or dtype == torch.float64 else torch.float32
        leaf = torch.empty_strided(tensor.size(), tensor.stride(), dtype=to, device=device)
        leaves[name] = leaf.copy_(tensor).requires_grad_()
    y = op(**leaves, **{"delta_softplus": True} | flags)
    generator = torch.Generator().manual_seed(5)
    # Numbers of few digits, which all types hold.
    dy = (torch.randint(-4, 5, y.shape, generator=generator) / 4).to(device, y.dtype)
    # Without positions some are not used.
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    found = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    assert all(found[name].dtype == leaf.dtype for name, leaf in leaves.items()) and y.dtype == leaves["u"].dtype
    return {name: value.cpu() for name, value in found.items()}
