"""Patches of series end at the last value, lose none, and tell a gap from a value."""

import pytest
import torch

from selectra.errors import ConfigError
from selectra.layers.embed import PatchEmbedSeries


@pytest.mark.parametrize(
    ("seq_len", "patch_len", "stride", "n_patches"),
    [(96, 16, 8, 11), (97, 16, 8, 12), (16, 16, 8, 1), (5, 16, 8, 1), (17, 16, 16, 2), (1, 1, 1, 1), (10, 4, 3, 3)],
)
def test_every_value_is_in_a_patch(seq_len, patch_len, stride, n_patches):
    embed = PatchEmbedSeries(seq_len, 4, patch_len, stride)
    x = torch.randn(2, seq_len, 3, requires_grad=True)
    tokens = embed(x)
    assert tokens.shape == (2, 3, n_patches, 4) and embed.n_patches == n_patches
    (gradient,) = torch.autograd.grad(tokens.square().sum(), x)
    assert (gradient != 0).all()


def test_a_patch_holds_its_own_values_and_ends_at_the_last():
    embed, x = PatchEmbedSeries(11, 4, 4, 2), torch.randn(1, 11, 2, requires_grad=True)
    tokens = embed(x)
    for patch in range(embed.n_patches):
        (gradient,) = torch.autograd.grad(tokens[0, 1, patch].sum(), x, retain_graph=True)
        used = gradient[0].nonzero()
        end = 11 - 2 * (embed.n_patches - 1 - patch)
        assert set(used[:, 1].tolist()) == {1}
        assert used[:, 0].tolist() == list(range(max(0, end - 4), end))


def test_series_are_embedded_alike():
    embed, x = PatchEmbedSeries(10, 4, 4, 2), torch.randn(1, 10, 1)
    tokens = embed(x.expand(1, 10, 3))
    assert torch.equal(tokens[:, 0], tokens[:, 2])


def test_padding_before_the_window_is_a_gap():
    """A window that is a patch too short equals a longer one that begins with a gap."""
    short, long = PatchEmbedSeries(9, 4, 4, 2), PatchEmbedSeries(10, 4, 4, 2)
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 9, 3)
    longer = torch.cat([torch.zeros(2, 1, 3), x], 1)
    observed = torch.ones(longer.shape, dtype=torch.bool)
    assert not torch.allclose(long(longer, observed)[:, :, 0], short(x)[:, :, 0])
    observed[:, 0] = False
    assert torch.allclose(long(longer, observed), short(x), atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 5}, "stride=5 is longer than patch_len=4"),
    ],
)
def test_what_cannot_be_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        PatchEmbedSeries(**{"seq_len": 8, "d_model": 4, "patch_len": 4, "stride": 2, **wrong})
