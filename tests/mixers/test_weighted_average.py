"""MambaMixer's weighted averages: the paper's sums, its count of weights, and a start that is a plain chain."""

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.mixers import WeightedAverage


def run(average: WeightedAverage, depth: int, x: Tensor, token, channel) -> Tensor:
    tokens, channels = [x], [x]
    for layer in range(1, depth + 1):
        tokens.append(token(layer, average.token_input(tokens, channels)))
        channels.append(channel(layer, average.channel_input(tokens, channels)))
    return channels[-1]


def token(layer: int, x: Tensor) -> Tensor:
    return torch.tanh(x + layer)


def channel(layer: int, x: Tensor) -> Tensor:
    return torch.sin(layer * x)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_the_number_of_weights_is_the_paper_s(depth):
    average = WeightedAverage(depth)
    assert sum(p.numel() for p in average.parameters()) == 2 * depth**2 + 3 * depth
    for layer in range(1, depth + 1):
        lengths = [len(weights[layer - 1]) for weights in (average.alpha, average.beta, average.theta, average.gamma)]
        assert lengths == [layer, layer, layer + 1, layer]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_start_is_a_plain_chain(depth):
    x = torch.randn(3, 4)
    chain = x
    for layer in range(1, depth + 1):
        chain = channel(layer, token(layer, chain))
    assert torch.equal(run(WeightedAverage(depth), depth, x, token, channel), chain)


def test_the_sums_are_the_paper_s():
    depth, x = 3, torch.randn(3, 4, dtype=torch.float64)
    average = WeightedAverage(depth).double()
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tokens, channels = [x], [x]
    for i in range(depth):
        layer = i + 1
        alpha, beta, theta, gamma = average.alpha[i], average.beta[i], average.theta[i], average.gamma[i]
        x_token = torch.zeros_like(x)
        for j in range(layer):
            x_token = x_token + alpha[j] * tokens[j] + beta[j] * channels[j]
        tokens.append(token(layer, x_token))
        x_channel = theta[layer] * tokens[layer]
        for j in range(layer):
            x_channel = x_channel + theta[j] * tokens[j] + gamma[j] * channels[j]
        channels.append(channel(layer, x_channel))
    assert torch.allclose(run(average, depth, x, token, channel), channels[-1], rtol=0, atol=1e-12)


def test_every_weight_learns_from_the_start():
    depth = 3
    average = WeightedAverage(depth)
    run(average, depth, torch.randn(3, 4), token, channel).sum().backward()
    for parameter in average.parameters():
        assert parameter.grad is not None and (parameter.grad != 0).all()


def test_no_layers_is_refused():
    with pytest.raises(ConfigError, match="depth=0"):
        WeightedAverage(0)
