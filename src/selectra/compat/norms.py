"""`mamba_ssm.ops.triton.layer_norm` and `.layernorm`: addition to the residual and normalisation.

Arithmetic is float32 (float64 for float64). The result has x's type; the residual its own type, or float32 where
`residual_in_fp32` asks for that and there is none yet.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.compat.pickled import completed
from selectra.errors import ConfigError
from selectra.ops import add_norm

# float64 goes with itself alone, and is rare here.
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Normalise dropout(x rowscale) + dropout(x1) + residual.

    Args:
        x: Input, (..., d).
        weight: Scale.
        bias: Shift.
        residual: Added before the normalisation.
        x1: A second input beside x.
        weight1: Scale of a second result.
        bias1: Its shift.
        eps: Added to the variance, or to the mean square.
        dropout_p: Probability with which an entry of x, or of x1, is dropped.
        rowscale: A factor for each position.
        prenorm: Also return the sum.
        residual_in_fp32: Whether the sum is float32 where there is no residual.
        is_rms_norm: Divide by the root of the mean square, without a mean.
        return_dropout_mask: Also return what was kept of x and of x1; None where nothing was dropped.

    Returns:
        y; then the second result, the sum and the masks, where asked for.

    Raises:
        ConfigError: `rowscale` together with `x1`.
    """
    if x1 is not None and rowscale is not None:
        raise ConfigError("rowscale goes with one input; x1 was given too.")
    stream = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    whole = (x1, rowscale, weight1) == (None, None, None) and not (dropout_p or return_dropout_mask)
    if whole and x.dtype in _NARROW and all(t is None or t.dtype in _NARROW for t in (weight, bias, residual)):
        kind: Literal["rms", "layer"] = "rms" if is_rms_norm else "layer"
        y, total = add_norm(x, residual, weight, bias, eps, kind=kind, residual_dtype=stream)
        return (y, total) if prenorm else y
    # What is added is rounded once.
    wide = x.dtype if x1 is None and rowscale is None else torch.promote_types(x.dtype, torch.float32)
    total, mask = _dropped(x.to(wide) if rowscale is None else x.to(wide) * rowscale[..., None], dropout_p)
    mask1 = None
    if x1 is not None:
        x1, mask1 = _dropped(x1.to(wide), dropout_p)
        total = total + x1
    if residual is not None:
        total = total + residual
    total = total.to(stream)
    found = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        found.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        found.append(total)
    if return_dropout_mask:
        return (*found, mask, mask1)
    return found[0] if len(found) == 1 else tuple(found)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with `is_rms_norm`."""
    scales = (weight, bias, residual, x1, weight1, bias1)
    flags = (eps, dropout_p, rowscale, prenorm, residual_in_fp32, True, return_dropout_mask)
    return layer_norm_fn(x, *scales, *flags)


def layer_norm_fn_2024(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """`layer_norm_fn` as it was in `mamba_ssm.ops.triton.layernorm`, with that order of arguments."""
    flags: dict[str, Any] = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    return layer_norm_fn(x, weight, bias, residual, eps=eps, **flags)


def rms_norm_fn_2024(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`rms_norm_fn` as it was in `mamba_ssm.ops.triton.layernorm`, with that order of arguments."""
    return rms_norm_fn(x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear map of the normalised sum, and the sum where `prenorm` asks for it."""
    flags: dict[str, Any] = {"prenorm": True, "residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    y, total = layer_norm_fn(x, norm_weight, norm_bias, residual, eps=eps, **flags)
    y = F.linear(y, linear_weight, linear_bias)
    return (y, total) if prenorm else y


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """`layer_norm_fn`, the sum in x's type, or in float32 with `upcast`."""
    return _reference(x, weight, bias, residual, eps, prenorm, upcast, False)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """`rms_norm_fn`, the sum in x's type, or in float32 with `upcast`."""
    return _reference(x, weight, bias, residual, eps, prenorm, upcast, True)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    upcast: bool,
    rms: bool,
) -> Any:
    taken = x.float() if upcast else x
    residual = None if residual is None else residual.to(taken.dtype)
    y, total = layer_norm_fn(taken, weight, bias, residual, eps=eps, prenorm=True, is_rms_norm=rms)
    return (y.to(x.dtype), total) if prenorm else y.to(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation with its own scale, as in `mamba_ssm.ops.triton.layer_norm`.

    Args:
        hidden_size: Width.
        eps: Added to the mean square.
        dropout_p: Probability with which an entry of the input is dropped in training.
        device: Where the scale lies.
        dtype: Its type.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickled norm; earlier ones knew no dropout."""
        super().__setstate__(completed(state, drop=None))

    def reset_parameters(self) -> None:
        """Scale 1."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """As `rms_norm_fn`."""
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        flags: dict[str, Any] = {"dropout_p": dropout, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, None, residual, eps=self.eps, **flags)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if p == 0.0:
        return x, None
    kept = torch.rand(x.shape, device=x.device) > p
    return x.masked_fill(~kept, 0) / (1 - p), kept


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if not rms:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = F.rms_norm(x, weight.shape, weight, eps)
    return y if bias is None else y + bias
