"""The selective scan's arguments: checked, and brought to one form that every backend takes."""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, overload

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks
from selectra.ops.dispatch import Op

P = ParamSpec("P")

# Beyond it softplus(x) is x in float64 too: log(1 + exp(-40)) is below its rounding. PyTorch's own choice is 20.
SOFTPLUS_THRESHOLD = 40.0
_NARROW_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
_OUT_TYPES = _NARROW_FLOATS | {None}


class ScanCall(NamedTuple):
    """One checked call. B and C are (b, l, g, n); parameters and states have the compute type."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    reverse: bool
    out_dtype: torch.dtype
    return_final_state: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may need a gradient."""
        return self[:9]


def prepare(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l n"] | Float[Tensor, "b l g n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Float[Tensor, "b d n"] | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    mask: Bool[Tensor, "b l"] | None = None,
    cu_seqlens: Int32[Tensor, " n_seqs_plus_1"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> ScanCall:
    """Run the selective state-space recurrence along the length.

    `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`, `y_t = C_t . h_t + D u_t`, with `delta = softplus(delta +
    delta_bias)` when `delta_softplus`, and `y * silu(z)` when `z` is given. All of it is differentiable, the initial
    and the final state too. Arithmetic and states are float32, or float64 when every tensor is float64.

    Source: Mamba (arXiv:2312.00752), Eq. 2a-2b with Alg. 2; A by zero-order hold, B by Euler, as in the official code.

    Args:
        u: Input.
        delta: Step size before bias and softplus; dimensionless, positive after them.
        A: Continuous-time decay, real and usually negative.
        B: Input projection; with groups, channel i belongs to group i // (d / g). May be constant in time by stride.
        C: Output projection, as B.
        D: Weight of the skip connection.
        z: Gate, before SiLU.
        delta_bias: Added to `delta` before softplus.
        delta_softplus: Whether softplus is applied to `delta`.
        initial_state: State before the first position, (b, d, n), or (n_seqs, d, n) with `cu_seqlens`.
        return_final_state: Also return the state after the last position (after position 0 when `reverse`).
        reverse: Run from the last position to the first; equals flip, scan, flip.
        mask: True = present. At an absent position the state is passed on unchanged, y is exactly 0 and no input
            gets a gradient, whatever stands there.
        cu_seqlens: Borders of sequences packed along the length, from 0 to l; needs b = 1, excludes `mask`.
        out_dtype: Type of y; `None` means u's.

    Returns:
        y (b, l, d), or the pair of y and the final state, (b, d, n) or (n_seqs, d, n), when `return_final_state`.

    Raises:
        ConfigError: An argument does not fit; the message says which, what it is and what is allowed.
        BackendError: The backend that was asked for refuses this call; the message is its reason. On a GPU also where
            A was infinite or not-a-number in an earlier call, whose results are not-a-number there.
    """
    if not _fits(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens, out_dtype):
        _check(u, delta, A, B, C, D, z, delta_bias, out_dtype)
        n_states = checks.count_states(u, mask, cu_seqlens)
        checks.require_fitting({"u": u, "initial_state": initial_state})
        letters = "(b, d, n)" if cu_seqlens is None else "(n_seqs, d, n)"
        checks.require_shapes({"initial_state": initial_state}, (n_states, *A.shape), letters)
    u_dtype = u.dtype
    dtype = checks.compute_dtype(u_dtype == torch.float64)
    return ScanCall(
        u,
        delta,
        A if A.dtype is dtype else A.to(dtype),
        B.unsqueeze(2) if B.dim() == 3 else B,
        C.unsqueeze(2) if C.dim() == 3 else C,
        D if D is None or D.dtype is dtype else D.to(dtype),
        z,
        delta_bias if delta_bias is None or delta_bias.dtype is dtype else delta_bias.to(dtype),
        initial_state if initial_state is None or initial_state.dtype is dtype else initial_state.to(dtype),
        mask,
        cu_seqlens,
        delta_softplus,
        reverse,
        u_dtype if out_dtype is None else out_dtype,
        return_final_state,
    )


def _fits(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> bool:
    """Whether a call is plainly right; the checks in words take ten times as long, and say what is wrong."""
    shape, index = u.shape, u.get_device()
    of_A, of_B = A.shape, B.shape
    if len(shape) != 3 or len(of_A) != 2 or mask is not None or cu_seqlens is not None or out_dtype not in _OUT_TYPES:
        return False
    (batch, length, d), n = shape, of_A[1]
    groups = of_B[2] if len(of_B) == 4 else 1
    # Written out, and the number of the device instead of the device: half of the time.
    return (
        groups > 0
        and d % groups == 0
        and of_A[0] == d
        and n > 0
        and of_B == C.shape
        and of_B in ((batch, length, n), (batch, length, groups, n))
        and delta.shape == shape
        and u.dtype in _NARROW_FLOATS
        and delta.dtype in _NARROW_FLOATS
        and A.dtype in _NARROW_FLOATS
        and B.dtype in _NARROW_FLOATS
        and C.dtype in _NARROW_FLOATS
        and index == delta.get_device() == A.get_device() == B.get_device() == C.get_device()
        and (D is None or _is_alike(D, (d,), index))
        and (z is None or _is_alike(z, shape, index))
        and (delta_bias is None or _is_alike(delta_bias, (d,), index))
        and (initial_state is None or _is_alike(initial_state, (batch, d, n), index))
        # Devices other than a GPU may share the number -1.
        and (
            index >= 0
            or len({x.device for x in (u, delta, A, B, C, D, z, delta_bias, initial_state) if x is not None}) == 1
        )
    )


def _is_alike(x: Tensor, shape: tuple[int, ...], index: int) -> bool:
    return x.shape == shape and x.dtype in _NARROW_FLOATS and x.get_device() == index


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    if u.dim() != 3:
        raise ConfigError(f"u has shape {tuple(u.shape)}; it must be (b, l, d), channels last.")
    batch, length, d = u.shape
    if A.dim() != 2 or A.shape[0] != d or A.shape[1] < 1:
        raise ConfigError(f"A has shape {tuple(A.shape)}; it must be (d, n) with d = {d} as in u and n at least 1.")
    checks.require_fitting({"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias})
    checks.require_shapes({"delta": delta, "z": z}, (batch, length, d), "(b, l, d)")
    checks.require_shapes({"D": D, "delta_bias": delta_bias}, (d,), "(d,)")
    _check_projection("B", B, u, A)
    _check_projection("C", C, u, A)
    if (B.dim() == 4) != (C.dim() == 4) or (B.dim() == 4 and B.shape[2] != C.shape[2]):
        raise ConfigError(f"B has shape {tuple(B.shape)} and C {tuple(C.shape)}; both need the same groups.")
    if out_dtype is not None and out_dtype not in checks.FLOATS:
        raise ConfigError(f"out_dtype is {out_dtype}; allowed are float32, float64, bfloat16 and float16.")


def _check_projection(name: str, tensor: Tensor, u: Tensor, A: Tensor) -> None:
    batch, length, d = u.shape
    n = A.shape[1]
    if tensor.dim() == 3:
        checks.require_shape(name, tensor, (batch, length, n), "(b, l, n)")
        return
    if tensor.dim() != 4:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; it must be (b, l, n) or (b, l, g, n).")
    groups = tensor.shape[2]
    if groups < 1 or d % groups:
        raise ConfigError(f"{name} has {groups} groups; they must divide d = {d}.")
    checks.require_shape(name, tensor, (batch, length, groups, n), "(b, l, g, n)")


class SelectiveScan(Op[P, ScanCall, Any]):
    """The operator's type: as `prepare`, with the result that `return_final_state` asks for."""

    if TYPE_CHECKING:

        @overload
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
            initial_state: Tensor | None = ...,
            return_final_state: Literal[False] = ...,
            reverse: bool = ...,
            mask: Tensor | None = ...,
            cu_seqlens: Tensor | None = ...,
            out_dtype: torch.dtype | None = ...,
        ) -> Tensor: ...

        @overload
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
            initial_state: Tensor | None = ...,
            return_final_state: Literal[True],
            reverse: bool = ...,
            mask: Tensor | None = ...,
            cu_seqlens: Tensor | None = ...,
            out_dtype: torch.dtype | None = ...,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
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
            initial_state: Tensor | None = ...,
            return_final_state: bool,
            reverse: bool = ...,
            mask: Tensor | None = ...,
            cu_seqlens: Tensor | None = ...,
            out_dtype: torch.dtype | None = ...,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
