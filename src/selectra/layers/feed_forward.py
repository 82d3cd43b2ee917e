"""Feed-forward layers: what mixes channels between two mixers of positions."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """A gated perceptron, `down(silu(gate(x)) up(x))`, with the names of Hugging Face's Llama and Jamba.

    Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, Eq. 6.

    Args:
        d_model: Width.
        d_ff: Inner width.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Mix the channels of every position."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUMLP(nn.Module):
    """The Transformer's perceptron with GELU, `fc2(gelu(fc1(x)))`.

    Args:
        d_model: Width.
        d_ff: Inner width.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Mix the channels of every position."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
