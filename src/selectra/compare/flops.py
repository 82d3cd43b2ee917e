"""FLOPs of a forward pass, counted from the operators that run, whatever the device.

PyTorch's counter knows products and convolutions, and Selectra's operators tell it of theirs. It knows neither the
attention that a CPU runs, with which a Transformer would look cheaper there than on a GPU, nor Fourier transforms, with
which SiMBA and Hyena would everywhere.
"""

from collections.abc import Callable, Sequence
from math import log2, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = Sequence[int]
# Of n complex numbers 5 n log2(n), of real ones half of that: Frigo & Johnson 2005, section 3, the field's convention.
COMPLEX, REAL = 5.0, 2.5


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """As the counter's own formulas of a GPU's attention: all pairs, those that a causal mask leaves out too."""
    return sdpa_flop_count(query, key, value)


def _complex(x: Shape, dims: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _transform(COMPLEX, x, dims)


def _from_real(x: Shape, dims: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _transform(REAL, x, dims)


def _to_real(x: Shape, dims: Sequence[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    return _transform(REAL, out_shape, dims)


def _transform(each: float, shape: Shape, dims: Sequence[int]) -> int:
    length = prod(shape[dim] for dim in dims)
    return round(each * prod(shape) * log2(length)) if length else 0


aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._fft_c2c: _complex,
    aten._fft_r2c: _from_real,
    aten._fft_c2r: _to_real,
}


def count_flops(model: nn.Module, inputs: Tensor) -> int:
    """FLOPs of a forward pass, a multiplication with an addition as two.

    Sums, norms, activations and look-ups do not count. On a GPU recurrent layers run as one operator that is not
    known: count these on a CPU.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), counter:
        model(inputs)
    return counter.get_total_flops()
