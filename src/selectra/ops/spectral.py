"""Spectra along positions and blocks, and block-diagonal linear maps of them: what EinFFT is made of."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from selectra.ops.whole import require_whole


def to_spectrum(x: Float[Tensor, "b l k d"]) -> Complex[Tensor, "b l k d"]:
    """Fourier transform over positions and blocks, orthonormal.

    One dimension after the other: a transform over two dimensions of a tensor that is not contiguous, in the backward
    too, writes over other memory on a CPU (PyTorch 2.14.1 with oneMKL 2024.2, from a few hundred positions on).
    """
    require_whole("EinFFT")
    return torch.fft.fft(torch.fft.fft(x, dim=1, norm="ortho"), dim=2, norm="ortho")


def from_spectrum(x: Complex[Tensor, "b l k d"]) -> Float[Tensor, "b l k d"]:
    """The real part of what `to_spectrum` transforms to x, in the same way."""
    return torch.fft.ifft(torch.fft.ifft(x, dim=1, norm="ortho"), dim=2, norm="ortho").real


def block_product(
    x: Float[Tensor, "*batch k d"], weight: Float[Tensor, "k d e"], bias: Float[Tensor, "k e"] | None = None
) -> Float[Tensor, "*batch k e"]:
    """`x[..., i, :] @ weight[i] + bias[i]` for each of k blocks, as one batched product.

    Args:
        x: Rows, each cut into k blocks.
        weight: A matrix for each block.
        bias: Added to each block.
    """
    rows = x.flatten(0, -3).transpose(0, 1)  # k rows d
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return y.transpose(0, 1).unflatten(0, x.shape[:-2])


def complex_block_product(
    x: Float[Tensor, "*batch k d 2"], weight: Float[Tensor, "2 k d e"], bias: Float[Tensor, "2 k e"]
) -> Float[Tensor, "*batch k e 2"]:
    """The same with complex numbers, as one real batched product of twice the width.

    Real, because what surrounds it (ReLU, softshrink) acts on both parts alone, and because real products run in the
    matrix units and under autocast, where complex ones do not.

    Args:
        x: Real and imaginary part last, as `torch.view_as_real` gives them.
        weight: Real and imaginary part first, as EinFFT stores them.
        bias: Likewise.
    """
    real, imaginary = weight
    # (re, im) times this gives the products' parts: (re, im) @ [[real, imaginary], [-imaginary, real]].
    parts = torch.stack([torch.stack([real, imaginary], -1), torch.stack([-imaginary, real], -1)], 2)  # k d 2 e 2
    y = block_product(x.flatten(-2), parts.flatten(3).flatten(1, 2), bias.permute(1, 2, 0).flatten(1))
    return y.unflatten(-1, (-1, 2))
