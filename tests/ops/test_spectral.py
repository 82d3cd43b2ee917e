"""Block products against einsum."""

import torch

from selectra.ops.spectral import block_product, complex_block_product


def test_block_products():
    x, weight, bias = torch.randn(2, 3, 4, 5), torch.randn(4, 5, 6), torch.randn(4, 6)
    expected = torch.einsum("abkd,kde->abke", x, weight)
    assert torch.allclose(block_product(x, weight), expected, atol=1e-5)
    assert torch.allclose(block_product(x, weight, bias), expected + bias, atol=1e-5)
    z, weight, bias = torch.randn(3, 4, 5, dtype=torch.complex64), torch.randn(2, 4, 5, 6), torch.randn(2, 4, 6)
    got = torch.view_as_complex(complex_block_product(torch.view_as_real(z), weight, bias))
    expected = torch.einsum("akd,kde->ake", z, torch.complex(*weight)) + torch.complex(*bias)
    assert torch.allclose(got, expected, atol=1e-5)
