"""EinFFT: SiMBA's channel mixer, a two-layer network on the spectrum, block by block."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers.s6 import at_least_float32
from selectra.mixers.sizes import require_sizes
from selectra.ops.spectral import complex_block_product, from_spectrum, to_spectrum


class EinFFT(nn.Module):
    """Mix channels within blocks, at every frequency along positions and blocks; later positions are seen too.

    Patro and Agneeswaran 2024, "SiMBA", arXiv:2403.15360; badripatro/simba, `classification/simba.py`, which gives the
    parameters' names, shapes and start: channels are cut into blocks; a Fourier transform runs over positions and over
    blocks; each block passes two complex linear maps, a ReLU on both parts between them and a soft threshold after; of
    the transform back the real part is kept.

    Departures: transforms run in float32 (float64 for float64 inputs) whatever the input is, and the result has the
    input's type; the official one is always float32.

    Args:
        d_model: Channels; a multiple of `n_blocks`.
        n_blocks: Blocks; 4 in the paper's code.
        threshold: What the soft threshold takes from each part's magnitude.
    """

    def __init__(self, d_model: int, n_blocks: int = 4, threshold: float = 0.01) -> None:
        super().__init__()
        require_sizes(d_model=d_model, n_blocks=n_blocks)
        if d_model % n_blocks:
            raise ConfigError(f"d_model={d_model} must be a multiple of n_blocks={n_blocks}")
        if threshold < 0:
            raise ConfigError(f"threshold={threshold}: needs at least 0")
        self.d_model, self.n_blocks, self.threshold = d_model, n_blocks, threshold
        width = d_model // n_blocks
        self.complex_weight_1 = nn.Parameter(0.02 * torch.randn(2, n_blocks, width, width))
        self.complex_weight_2 = nn.Parameter(0.02 * torch.randn(2, n_blocks, width, width))
        self.complex_bias_1 = nn.Parameter(0.02 * torch.randn(2, n_blocks, width))
        self.complex_bias_2 = nn.Parameter(0.02 * torch.randn(2, n_blocks, width))

    def forward(self, x: Float[Tensor, "b l d_model"]) -> Float[Tensor, "b l d_model"]:
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ConfigError(
                f"x has shape {tuple(x.shape)}; it must be (b, l, d_model) with d_model = {self.d_model}."
            )
        if x.numel() == 0:
            # Transforms refuse a length of zero.
            return x
        wide = at_least_float32(x)
        parts = torch.view_as_real(to_spectrum(wide.unflatten(2, (self.n_blocks, -1))))  # b l blocks width 2
        # A model's weights may be of half precision as a whole.
        weights = (self.complex_weight_1, self.complex_bias_1, self.complex_weight_2, self.complex_bias_2)
        first, first_bias, second, second_bias = map(at_least_float32, weights)
        parts = F.relu(complex_block_product(parts, first, first_bias))
        parts = complex_block_product(parts, second, second_bias)
        # Under autocast the products are low in precision, and no complex numbers are.
        spectrum = torch.view_as_complex(F.softshrink(parts.to(wide.dtype), self.threshold))
        return from_spectrum(spectrum).flatten(2).to(x.dtype)
