"""`mamba_ssm.ops.triton.layernorm_gated`: normalisation by groups of channels with a gate before or after it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) silu(z), or norm(x silu(z)), in float32, returned in x's type.

    Args:
        x: Input, (..., d).
        weight: Scale.
        bias: Shift.
        z: Gate, if any.
        eps: Added to the variance, or to the mean square.
        group_size: Channels that are normalised together; all of them by default.
        norm_before_gate: Which of the two forms.
        is_rms_norm: Divide by the root of the mean square, without a mean.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = F.rms_norm(y, y.shape[-1:], None, eps) if is_rms_norm else F.layer_norm(y, y.shape[-1:], None, None, eps)
    y = y.flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with `is_rms_norm`."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(nn.Module):
    """Layer normalisation with a gate.

    Args:
        hidden_size: Width.
        eps: Added to the variance.
        group_size: Channels that are normalised together; all of them by default.
        norm_before_gate: norm(x) silu(z), else norm(x silu(z)).
        device: Where the parameters lie.
        dtype: Their type.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """As `layernorm_fn`."""
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class RMSNorm(nn.Module):
    """Root mean square normalisation with a gate; arguments as `LayerNorm`'s."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """As `rmsnorm_fn`."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
