"""EinFFT: what its parts are; tests/test_official.py holds it to the official outputs."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from selectra.errors import ConfigError
from selectra.mixers import EinFFT


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize("n_blocks", [1, 2, 4])
def test_any_length_and_number_of_blocks(length, n_blocks):
    """Against products of complex numbers, and by numerical gradients."""
    mixer, x = EinFFT(8, n_blocks, threshold=0.0).double(), torch.randn(2, length, 8, dtype=torch.float64)
    w1, b1, w2, b2 = (
        torch.complex(*p)
        for p in (mixer.complex_weight_1, mixer.complex_bias_1, mixer.complex_weight_2, mixer.complex_bias_2)
    )
    s = torch.fft.fftn(x.view(2, length, n_blocks, -1), dim=(1, 2), norm="ortho")
    s = torch.einsum("blkd,kde->blke", s, w1) + b1
    s = torch.complex(s.real.relu(), s.imag.relu())
    s = torch.einsum("blkd,kde->blke", s, w2) + b2
    expected = torch.fft.ifftn(s, dim=(1, 2), norm="ortho").real.reshape(2, length, 8)
    assert torch.allclose(mixer(x), expected, atol=1e-12)
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_()
    assert gradcheck(mixer, (x.requires_grad_(),))


@pytest.mark.parametrize(
    ("d_model", "expected"), [(64, 4_352), (128, 16_896), (320, 103_680), (448, 202_496), (512, 264_192)]
)
def test_the_number_of_parameters(d_model, expected):
    """C^2 + 4 C, as the official class has."""
    with torch.device("meta"):
        assert sum(p.numel() for p in EinFFT(d_model).parameters()) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_their_type(dtype):
    mixer, x = EinFFT(8), torch.randn(2, 5, 8)
    low = mixer(x.to(dtype))
    assert low.dtype == dtype and torch.allclose(low.float(), mixer(x), atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 6}, "d_model=6 must be a multiple of n_blocks=4"),
        ({"d_model": 8, "threshold": -1.0}, "threshold=-1.0"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EinFFT(**arguments)
    with pytest.raises(ConfigError, match=r"\(1, 5, 6\).*d_model = 8"):
        EinFFT(8)(torch.randn(1, 5, 6))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing_to_do(shape):
    x = torch.randn(shape, requires_grad=True)
    y = EinFFT(8)(x)
    assert y.shape == shape
    y.sum().backward()


GROWS = """
import torch
from selectra.mixers import EinFFT
torch.set_num_threads(1)
mixer = EinFFT(64)
for _ in range(10):
    x = torch.randn(1, 64, 3136).transpose(1, 2).requires_grad_()
    y = mixer(x)
    torch.autograd.grad(y, [x, *mixer.parameters()], torch.randn(1, 64, 3136).transpose(1, 2))
    others = [torch.randn(i % 997 + 1) for i in range(300)]
"""


def test_no_memory_but_its_own_is_written():
    """Transforms over two dimensions at once of such layouts end the process, some allocations later."""
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
