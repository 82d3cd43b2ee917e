"""One position through whole Mamba blocks in one call: norm, projections, convolution, recurrence and gate.

What it is bound by is the reading of the weights, once; the torch calls that it replaces take far longer than that.
Tensors go to the kernel as addresses, and what a block's weights are is looked at anew only when they have changed.
"""

import struct
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
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
_call_words = struct.Struct("=20q")
_sizes = struct.Struct("=5qd")
_absent = (0, 0, 0)
_half = torch.bfloat16
_address, _type = Tensor.data_ptr, attrgetter("dtype")


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
        key: Theirs, from `key_of`.
        eps: The norm's.
    """

    def __init__(self, weights: BlockWeights, key: list[object], eps: float) -> None:
        self.key, self.eps = key, eps
        d_inner, states = weights.A_log.shape
        rank, width, d_model = weights.dt_weight.shape[1], weights.conv_weight.shape[2], weights.in_weight.shape[1]
        self._x_dtype = weights.in_weight.dtype
        self._dtype = torch.float64 if self._x_dtype == torch.float64 else torch.float32
        self._x_shape, self._state_shapes = (1, d_model), ((d_inner, width), (d_inner, states))
        self._fitting: tuple[object, ...] | None = None
        self.input = (d_model, self._x_dtype)
        self._usable = _native.available and width <= LARGEST_WIDTH and all(self._fits(w) for w in weights)
        if self._usable:
            words = [word for weight in weights for word in _words(weight)]
            sizes = _sizes.pack(d_model, d_inner, states, width, rank, eps)
            self.words = sizes + struct.pack(f"={len(words)}q", *words)
            self._library = library()

    def _fits(self, weight: Tensor | None) -> bool:
        return weight is None or (
            type(weight) in PLAIN
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and is_readable(weight.dtype, self._dtype)
        )

    def call(self, words: bytes) -> None:
        """Run the kernel."""
        self._library.call_packed("step", self._dtype, words)

    def takes(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the kernel takes this input."""
        if not (self._usable and x.is_contiguous() and x.dtype is self._x_dtype and x.dim() == 3):
            return False
        if x.shape[1:] != self._x_shape or refusal(_native) is not None:
            return False
        return residual is None or (
            residual.shape == x.shape and residual.is_contiguous() and is_readable(residual.dtype, self._dtype)
        )

    def takes_state(self, batch: int, conv: Tensor, ssm: Tensor) -> bool:
        """Whether the kernel takes this state."""
        if not (self._usable and conv.is_contiguous() and ssm.is_contiguous() and conv.is_cpu and ssm.is_cpu):
            return False
        call = (batch, conv.shape, ssm.shape, conv.dtype, ssm.dtype)
        if call != self._fitting:
            # Looked at once, since the calls that follow are alike.
            if (conv.shape, ssm.shape) != tuple((batch, *shape) for shape in self._state_shapes):
                return False
            if ssm.dtype != self._dtype or not is_readable(conv.dtype, self._dtype):
                return False
            self._fitting = call
        # Memory that a graph of gradients may still need has a version, which an inference tensor lacks.
        return not (conv.is_inference() or ssm.is_inference())


def run(
    plans: Sequence[StepPlan],
    states: Sequence[tuple[Tensor, Tensor]],
    x: Float[Tensor, "b 1 m"],
    residual: Float[Tensor, "b 1 m"] | None = None,
    stream: Float[Tensor, "b 1 m"] | None = None,
) -> Float[Tensor, "b 1 m"]:
    """What blocks in a row make of x; `stream`, which all but a single block need, and the states are written."""
    y = torch.empty_like(x)
    source, before, to, after = _words(x), _words(residual), _words(y), _words(stream)
    words, following, batch = [], len(plans), x.shape[0]
    for plan, (conv, ssm) in zip(plans, states, strict=True):
        following -= 1
        words.append(_call_words.pack(batch, following, *source, *before, *after, *to, *_words(conv), *_words(ssm)))
        words.append(plan.words)
        # A block reads all of its input before it writes.
        source, before = to, after
    plans[0].call(b"".join(words))
    # As PyTorch's own writes do: a gradient that needs what stood there before is refused.
    torch.autograd.graph.increment_version(list(chain.from_iterable(states)))
    return y


def key_of(weights: BlockWeights) -> list[object]:
    """What changes when a weight is another one, lies elsewhere or has another type.

    Which weights are absent shows in it too: between any two that may be, there is one that may not.
    """
    present = [weight for weight in weights if weight is not None]
    return [*map(_address, present), *map(_type, present)]


def _words(tensor: Tensor | None) -> tuple[int, int, int]:
    if tensor is None:
        return _absent
    return tensor.data_ptr(), tensor.stride(0), HALVED if tensor.dtype is _half else WHOLE
