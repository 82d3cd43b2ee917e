"""The cross-scan's arguments: checked, and brought to one form that every backend takes."""

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks
from selectra.ops.dispatch import Backend, Op
from selectra.ops.selective_scan import selective_scan
from selectra.ops.whole import require_whole

_NARROW_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
# Bits of a route, as in selective_scan/scan_call.cuh.
BACK, DOWN = 1, 2
ROUTES = {"right": 0, "left": BACK, "down": DOWN, "up": DOWN | BACK}


class CrossCall(NamedTuple):
    """One checked call. u and z are (b, h, w, 1 or k, d); parameters have the compute type."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    routes: Sequence[int]
    merge: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may need a gradient."""
        return self[:8]


def prepare(
    u: Float[Tensor, "b h w d"] | Float[Tensor, "b h w k d"],
    delta: Float[Tensor, "b h w k d"],
    A: Float[Tensor, "k d n"],
    B: Float[Tensor, "b h w k n"],
    C: Float[Tensor, "b h w k n"],
    D: Float[Tensor, "k d"] | None = None,
    z: Float[Tensor, "b h w d"] | Float[Tensor, "b h w k d"] | None = None,
    delta_bias: Float[Tensor, "k d"] | None = None,
    delta_softplus: bool = False,
    *,
    routes: Sequence[str] = ("right", "left", "down", "up"),
    merge: bool = True,
) -> CrossCall:
    """Run one selective scan along every route through a grid, and add what they give at each position.

    Route i visits the h w positions in its order, with its own step, parameters and projections: `y_i =
    selective_scan(u_i, delta_i, A_i, ...)` along that order. Nothing is moved for it: every tensor stays at its grid
    position. All of it is differentiable. Arithmetic and states are float32, or float64 when every tensor is float64.
    A sequence that is scanned both ways is a grid of one row with `routes=("right", "left")`.

    Source: VMamba (arXiv:2401.10166), SS2D; Vision Mamba (arXiv:2401.09417), Alg. 1.

    Args:
        u: Input, shared by all routes or one for each.
        delta: Step size before bias and softplus.
        A: Continuous-time decay, real and usually negative.
        B: Input projection.
        C: Output projection.
        D: Weight of the skip connection, of every route.
        z: Gate, before SiLU, shared by all routes or one for each.
        delta_bias: Added to `delta` before softplus.
        delta_softplus: Whether softplus is applied to `delta`.
        routes: "right" goes row by row, "down" column by column; "left" and "up" are these from the last position to
            the first. One may come several times.
        merge: Whether the routes' outputs are added.

    Returns:
        y (b, h, w, d) in u's type, or (b, h, w, k, d) without `merge`.

    Raises:
        ConfigError: An argument does not fit; the message says which, what it is and what is allowed.
        BackendError: The backend that was asked for refuses this call; the message is its reason. On a GPU also where
            A was infinite or not-a-number in an earlier call, whose results are not-a-number there.
    """
    require_whole("cross_scan")
    kinds = tuple(_kind(name) for name in routes)
    if not kinds:
        raise ConfigError(f"routes is empty; it names one or more of {', '.join(ROUTES)}.")
    if not _fits(u, delta, A, B, C, D, z, delta_bias, len(kinds)):
        _check(u, delta, A, B, C, D, z, delta_bias, len(kinds))
    dtype = checks.compute_dtype(u.dtype == torch.float64)
    return CrossCall(
        u.unsqueeze(3) if u.dim() == 4 else u,
        delta,
        A if A.dtype is dtype else A.to(dtype),
        B,
        C,
        D if D is None or D.dtype is dtype else D.to(dtype),
        z.unsqueeze(3) if z is not None and z.dim() == 4 else z,
        delta_bias if delta_bias is None or delta_bias.dtype is dtype else delta_bias.to(dtype),
        delta_softplus,
        kinds,
        merge,
    )


def _kind(name: str) -> int:
    if name in ROUTES:
        return ROUTES[name]
    near = difflib.get_close_matches(str(name), ROUTES, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"there is no route '{name}'; there are {', '.join(ROUTES)}.{hint}")


def _fits(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    k: int,
) -> bool:
    """Whether a call is plainly right; the checks in words take thrice as long, and say what is wrong."""
    of_delta, of_A, index = delta.shape, A.shape, u.get_device()
    if len(of_delta) != 5 or len(of_A) != 3:
        return False
    *positions, routes, d = of_delta
    n, shared = of_A[2], (*positions, d)
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    return (
        routes == k
        and of_A[:2] == (k, d)
        and n > 0
        and u.shape in (shared, of_delta)
        and (z is None or z.shape in (shared, of_delta))
        and B.shape == C.shape == (*positions, k, n)
        and (D is None or D.shape == (k, d))
        and (delta_bias is None or delta_bias.shape == (k, d))
        and all(x is None or (x.dtype in _NARROW_FLOATS and x.get_device() == index) for x in tensors)
        # Devices other than a GPU may share the number -1.
        and (index >= 0 or all(x is None or x.device == u.device for x in tensors))
    )


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    k: int,
) -> None:
    if u.dim() not in (4, 5):
        raise ConfigError(f"u has shape {tuple(u.shape)}; it must be (b, h, w, d), or (b, h, w, k, d) with k routes.")
    batch, height, width, d = (*u.shape[:3], u.shape[-1])
    if A.dim() != 3 or A.shape[:2] != (k, d) or A.shape[2] < 1:
        raise ConfigError(
            f"A has shape {tuple(A.shape)}; it must be (k, d, n) with k = {k} routes, d = {d} as in u and n at least 1."
        )
    n = A.shape[2]
    checks.require_fitting({"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias})
    of_routes = (batch, height, width, k)
    checks.require_shapes({"delta": delta}, (*of_routes, d), "(b, h, w, k, d)")
    for name, tensor in {"u": u, "z": z}.items():
        if tensor is not None and tensor.dim() == 4:
            checks.require_shape(name, tensor, (batch, height, width, d), "(b, h, w, d)")
        elif tensor is not None:
            checks.require_shape(name, tensor, (*of_routes, d), "(b, h, w, d), or (b, h, w, k, d)")
    checks.require_shapes({"B": B, "C": C}, (*of_routes, n), "(b, h, w, k, n)")
    checks.require_shapes({"D": D, "delta_bias": delta_bias}, (k, d), "(k, d)")


class CrossScan(Op[..., CrossCall, Tensor]):
    """The operator's type. A backend that `selective_scan` is asked for counts here too: it is the same recurrence."""

    def __init__(
        self, name: str, prepare: Callable[..., CrossCall], backends: Sequence[Backend[CrossCall, Tensor]]
    ) -> None:
        super().__init__(name, prepare, backends, returns=Tensor)

    def wish(self) -> str | None:
        """The backend that is asked for, here or of the scan."""
        return super().wish() or selective_scan.wish()

    if TYPE_CHECKING:

        def __call__(
            self,
            u: Tensor,
            delta: Tensor,
            A: Tensor,
            B: Tensor,
            C: Tensor,
            D: Tensor | None = ...,
            z: Tensor | None = ...,
            delta_bias: Tensor | None = ...,
            delta_softplus: bool = ...,
            *,
            routes: Sequence[str] = ...,
            merge: bool = ...,
        ) -> Tensor: ...
