"""`mamba_ssm.modules.block` and `.mlp`, and the residual block of 2024 that stood in `.mamba_simple`."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.compat.norms import RMSNorm, layer_norm_fn
from selectra.compat.pickled import completed


class Block(nn.Module):
    """Add, normalise, mix; then, where there is a perceptron, once more with that.

    Args:
        dim: Width.
        mixer_cls: Makes the mixer from the width.
        mlp_cls: Makes the perceptron; `nn.Identity` for none.
        norm_cls: Makes a norm.
        fused_add_norm: Whether the norm's result keeps the input's type and the residual its own.
        residual_in_fp32: Whether the residual is float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.layer_idx: int | None = None
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickled block; that of 2024 knew no perceptron."""
        super().__setstate__(completed(state, mlp=None, layer_idx=None))

    def forward(
        self,
        hidden_states: Float[Tensor, "b l d"],
        residual: Float[Tensor, "b l d"] | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The mixer's (or perceptron's) output and the residual, not yet added."""
        x, residual = add_norm(hidden_states, residual, self.norm, self.fused_add_norm, self.residual_in_fp32)
        x = self.mixer(x, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            x, residual = add_norm(x, residual, self.norm2, self.fused_add_norm, self.residual_in_fp32)
            x = self.mlp(x)
        return x, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # pyright: ignore[reportCallIssue]


class Block2024(Block):
    """The block without a perceptron, as it stood in `mamba_ssm.modules.mamba_simple`; arguments as `Block`'s."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def add_norm(x: Tensor, residual: Tensor | None, norm: Any, fused: bool, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum, as the field's blocks make them: fused, or one after the other."""
    if fused:
        rms = isinstance(norm, RMSNorm)
        flags: dict[str, Any] = {"prenorm": True, "residual_in_fp32": in_fp32, "is_rms_norm": rms}
        return layer_norm_fn(x, norm.weight, norm.bias, residual, eps=norm.eps, **flags)
    residual = x if residual is None else x + residual
    y = norm(residual.to(norm.weight.dtype))
    return y, residual.to(torch.float32) if in_fp32 else residual


class GatedMLP(nn.Module):
    """fc2(a activation(b)), where fc1 gives a and b.

    Args:
        in_features: Width of the input.
        hidden_features: Width inside; 8/3 of the input's by default, rounded up.
        out_features: Width of the output; the input's by default.
        activation: Of the gate.
        bias: Whether the maps have one.
        multiple_of: What the inner width is rounded up to a multiple of.
        device: Where the parameters lie.
        dtype: Their type.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        out = in_features if out_features is None else out_features
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """Every position by itself."""
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * self.activation(gate))
