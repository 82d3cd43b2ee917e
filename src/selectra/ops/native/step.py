"""One position through a whole Mamba block in one call: norm, projections, convolution, recurrence and gate.

What it is bound by is the reading of the weights, once; the torch calls that it replaces take far longer than that.
Tensors go to the kernel as addresses, and what a block's weights are is looked at anew only when they have changed.
"""

import struct
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.ops import native
from selectra.ops.native.library import HALVED, WHOLE, is_readable, library, refusal

LARGEST_WIDTH = 64
"""Of the convolution, as `step.h` has room for it."""
PLAIN = (nn.Parameter, Tensor)
_native = native.status()
# The words of `StepCall`: those of one call, and those of the weights.
_call_words = struct.Struct("=19q")
_sizes = struct.Struct("=5qd")
_absent = (0, 0, 0)


class BlockWeights(NamedTuple):
    """A block's parameters, as `mamba_ssm` names and shapes them; the norm stands before it."""

    norm_weight: Float[Tensor, " m"] | None
    in_weight: Float[Tensor, "two_d m"]
    in_bias: Float[Tensor, " two_d"] | None
    conv_weight: Float[Tensor, "d 1 k"]
    conv_bias: Float[Tensor, " d"] | None
    x_weight: Float[Tensor, "r_plus_two_n d"]
    dt_weight: Float[Tensor, "d r"]
    dt_bias: Float[Tensor, " d"] | None
    A_log: Float[Tensor, "d n"]
    D: Float[Tensor, " d"] | None
    out_weight: Float[Tensor, "m d"]
    out_bias: Float[Tensor, " m"] | None


class StepPlan:
    """A block's weights, laid out for the kernel.

    Args:
        weights: The parameters.
        eps: The norm's.
    """

    def __init__(self, weights: BlockWeights, eps: float) -> None:
        self.key, self.eps = key_of(weights), eps
        d_inner, states = weights.A_log.shape
        rank, width, d_model = weights.dt_weight.shape[1], weights.conv_weight.shape[2], weights.in_weight.shape[1]
        self._x_dtype = weights.in_weight.dtype
        self._dtype = torch.float64 if self._x_dtype == torch.float64 else torch.float32
        self._shapes = ((1, d_model), (d_inner, width), (d_inner, states))
        self._fitting: tuple[object, ...] | None = None
        self._usable = _native.available and width <= LARGEST_WIDTH and all(self._fits(w) for w in weights)
        if self._usable:
            words = [word for weight in weights for word in _words(weight)]
            sizes = _sizes.pack(d_model, d_inner, states, width, rank, eps)
            self._weights = sizes + struct.pack(f"={len(words)}q", *words)
            self._library = library()

    def _fits(self, weight: Tensor | None) -> bool:
        return weight is None or (
            type(weight) in PLAIN
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and is_readable(weight.dtype, self._dtype)
        )

    def takes(self, x: Tensor, residual: Tensor | None, conv: Tensor, ssm: Tensor) -> bool:
        """Whether the kernel takes this call."""
        if not (self._usable and x.is_contiguous() and conv.is_contiguous() and ssm.is_contiguous()):
            return False
        call = (x.shape, conv.shape, ssm.shape, x.dtype, conv.dtype, ssm.dtype)
        if call != self._fitting:
            # Looked at once, since the calls that follow are alike.
            batch = x.shape[0]
            if call[:3] != tuple((batch, *shape) for shape in self._shapes) or refusal(_native) is not None:
                return False
            if x.dtype != self._x_dtype or ssm.dtype != self._dtype or not is_readable(conv.dtype, self._dtype):
                return False
            self._fitting = call
        if residual is not None and not (
            residual.shape == x.shape and residual.is_contiguous() and is_readable(residual.dtype, self._dtype)
        ):
            return False
        # Memory that a graph of gradients may still need has a version, which an inference tensor lacks.
        return conv.is_cpu and ssm.is_cpu and not (conv.is_inference() or ssm.is_inference())

    def run(
        self, x: Tensor, residual: Tensor | None, stream: Tensor | None, conv: Tensor, ssm: Tensor
    ) -> Float[Tensor, "b 1 m"]:
        """What the block makes of x; `stream`, `conv` and `ssm` are written."""
        y = torch.empty_like(x)
        words = _call_words.pack(
            x.shape[0], *_words(x), *_words(residual), *_words(stream), *_words(y), *_words(conv), *_words(ssm)
        )
        self._library.call_packed("step", self._dtype, words + self._weights)
        # As PyTorch's own writes do: a gradient that needs what stood there before is refused.
        torch.autograd.graph.increment_version((conv, ssm))
        return y


def key_of(weights: BlockWeights) -> list[object]:
    """What changes when a weight is another one, lies elsewhere or has another type."""
    key: list[object] = [None if w is None else w.data_ptr() for w in weights]
    key += [None if w is None else w.dtype for w in weights]
    return key


def _words(tensor: Tensor | None) -> tuple[int, int, int]:
    if tensor is None:
        return _absent
    return tensor.data_ptr(), tensor.stride(0), HALVED if tensor.dtype is torch.bfloat16 else WHOLE
