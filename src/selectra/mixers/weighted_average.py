"""MambaMixer's weighted averaging of the features of all earlier layers, in place of skip connections."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.mixers.sizes import require_sizes


class WeightedAverage(nn.Module):
    """The inputs of each layer's token and channel mixer as learned sums of everything before them.

    Behrouz, Santacatterina and Zabih 2024, "MambaMixer", arXiv:2403.19888, Sec. 3.2. For layers l = 1..L, with
    `y_token^(0) = y_channel^(0) = x`, all weights scalars, 2 L^2 + 3 L together:

        x_token^(l)   = sum_{i<l}  alpha_{l,i} y_token^(i) + sum_{i<l} beta_{l,i}  y_channel^(i)
        x_channel^(l) = sum_{i<=l} theta_{l,i} y_token^(i) + sum_{i<l} gamma_{l,i} y_channel^(i)

    The paper gives no initial values. The start is the identity of DenseFormer (arXiv:2402.02622): 1 on the newest
    term, 0 elsewhere. Newest is what was computed last: `y_channel^(l-1)` before a token mixer (beta), `y_token^(l)`
    before a channel mixer (theta). So the start is the plain chain `x -> token_1 -> channel_1 -> token_2 -> ...`, and
    skips of any length are learned as alpha, gamma and the older betas and thetas leave 0.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        require_sizes(depth=depth)
        layers = range(1, depth + 1)
        self.alpha = nn.ParameterList(torch.zeros(layer) for layer in layers)
        self.beta = nn.ParameterList(_newest(layer) for layer in layers)
        self.theta = nn.ParameterList(_newest(layer + 1) for layer in layers)
        self.gamma = nn.ParameterList(torch.zeros(layer) for layer in layers)

    def token_input(
        self, tokens: Sequence[Float[Tensor, "..."]], channels: Sequence[Float[Tensor, "..."]]
    ) -> Float[Tensor, "..."]:
        """Input of the next layer's token mixer.

        Args:
            tokens: `y_token^(0..l-1)`.
            channels: `y_channel^(0..l-1)`.
        """
        layer = len(tokens) - 1
        return _weigh(self.alpha[layer], tokens, self.beta[layer], channels)

    def channel_input(
        self, tokens: Sequence[Float[Tensor, "..."]], channels: Sequence[Float[Tensor, "..."]]
    ) -> Float[Tensor, "..."]:
        """Input of the same layer's channel mixer.

        Args:
            tokens: `y_token^(0..l)`.
            channels: `y_channel^(0..l-1)`.
        """
        layer = len(channels) - 1
        return _weigh(self.theta[layer], tokens, self.gamma[layer], channels)


def _newest(n_terms: int) -> Tensor:
    return torch.cat([torch.zeros(n_terms - 1), torch.ones(1)])


def _weigh(a: Tensor, first: Sequence[Tensor], b: Tensor, second: Sequence[Tensor]) -> Tensor:
    weights, terms = [*a.unbind(), *b.unbind()], [*first, *second]
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = torch.addcmul(total, weight, term)
    return total
