"""From pixels to grids, and learned positions at any size."""

import pytest
import torch
from torch import nn

from selectra.errors import ConfigError
from selectra.layers.image import (
    ConvNorm,
    Mlp,
    PaddedPatchEmbed,
    PatchEmbed,
    PatchMerging,
    insert_token,
    quarters,
    remove_tokens,
    resize_grid,
    resize_positions,
    start_linear,
)


@pytest.mark.parametrize(
    ("size", "patch", "stride"), [((16, 24), 8, 8), ((17, 30), 8, 4), ((9, 8), 8, 3), ((8, 8), 8, 8)]
)
def test_patches_are_rows_of_a_product(size, patch, stride):
    embed, x = PatchEmbed(2, 5, patch, stride), torch.randn(3, 2, *size)
    patches = x.unfold(2, patch, stride).unfold(3, patch, stride)  # b c h w patch patch
    assert tuple(patches.shape[2:4]) == embed.grid(size)
    assert embed.proj.bias is not None
    expected = torch.einsum("bchwij,dcij->bhwd", patches, embed.proj.weight) + embed.proj.bias
    assert torch.allclose(embed(x), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (17, 30), (3, 5), (1, 1)])
def test_padded_patches_see_every_pixel(size):
    embed, x = PaddedPatchEmbed(2, 5, 8, 4, bias=False), torch.randn(1, 2, *size)
    height, width = embed.grid(size)
    assert (height, width) == (-(-size[0] // 4), -(-size[1] // 4))
    padded = torch.zeros(1, 2, max(size[0], (height - 1) * 4 + 8), max(size[1], (width - 1) * 4 + 8))
    padded[:, :, : size[0], : size[1]] = x
    assert torch.equal(embed(x), PatchEmbed.forward(embed, padded)[:, :height, :width])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 6), (4, 7), (5, 7), (1, 1)])
def test_merging_joins_four_neighbours(height, width):
    merge, x = PatchMerging(3, 4), torch.randn(2, height, width, 3)
    y = merge(x)
    assert y.shape == (2, -(-height // 2), -(-width // 2), 4)
    padded = torch.zeros(2, height + height % 2, width + width % 2, 3)
    padded[:, :height, :width] = x
    i, j = y.shape[1] - 1, y.shape[2] - 1
    corner = [padded[:, 2 * i + a, 2 * j + b] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.allclose(y[:, i, j], merge.reduction(merge.norm(torch.cat(corner, -1))), atol=1e-6)


def test_a_convolution_between_grids_is_pytorchs():
    way, x = ConvNorm(3, 4, 3, 2, 1), torch.randn(2, 5, 7, 3)
    expected = way.norm(way.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.equal(way(x), expected) and way(x).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(("depth", "ends"), [(24, [5, 11, 17, 23]), (4, [0, 1, 2, 3]), (6, [1, 2, 4, 5]), (1, [0])])
def test_quarters_end_with_the_last_block(depth, ends):
    assert quarters(depth) == ends


def test_tokens_are_inserted_and_removed():
    x, token = torch.randn(2, 5, 3), torch.randn(1, 1, 3)
    for at in (0, 2, 5):
        y = insert_token(x, token, at)
        assert y.shape == (2, 6, 3) and torch.equal(y[:, at], token[:, 0].expand(2, -1))
        assert torch.equal(remove_tokens(y, [at]), x)
    assert torch.equal(remove_tokens(insert_token(insert_token(x, token, 0), token, 6), [0, 6]), x)
    assert torch.equal(remove_tokens(x, []), x)


def test_resizing_keeps_what_has_the_size_and_constants():
    grid = torch.randn(4, 6, 3)
    assert resize_grid(grid, (4, 6)) is grid
    for size in ((8, 12), (3, 3), (1, 9)):
        assert torch.allclose(resize_grid(torch.ones(4, 6, 2), size), torch.ones(*size, 2), atol=1e-5)
    assert resize_grid(grid.bfloat16(), (5, 5)).dtype == torch.bfloat16


def test_resized_positions_keep_those_of_extra_tokens():
    table = torch.randn(1, 12 + 2, 3)
    assert resize_positions(table, (3, 4), (3, 4), (0, 13), (0, 13)) is table
    y = resize_positions(table, (3, 4), (5, 6), (0, 13), (0, 31))
    assert y.shape == (1, 32, 3)
    assert torch.equal(y[:, [0, 31]], table[:, [0, 13]])
    assert torch.allclose(y[0, 1:31].view(5, 6, 3), resize_grid(table[0, 1:13].view(3, 4, 3), (5, 6)))


def test_linear_maps_start_small_but_for_those_left_out():
    first, kept, mlp = nn.Linear(64, 64), nn.Linear(64, 64), Mlp(64, 64)
    before = kept.weight.clone()
    start_linear(nn.Sequential(first, kept, mlp).modules(), [kept])
    assert torch.equal(kept.weight, before)
    assert 0.015 < first.weight.std() < 0.022 and (first.bias == 0).all() and (mlp.fc1.bias == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 8, 0), "patch_size=0"), ((3, 8, 4, 0), "stride=0"), ((0, 8, 4), "in_channels=0"), ((3, 0, 4), "d_model=0")],
)
def test_sizes_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PatchEmbed(*arguments)


def test_an_image_must_hold_a_patch():
    with pytest.raises(ConfigError, match="img_size=4 is smaller than patch_size=8"):
        PatchEmbed(3, 4, 8).grid(4)
    with pytest.raises(ConfigError, match="4 x 9 pixels; each side must be at least 8"):
        PatchEmbed(3, 4, 8)(torch.zeros(1, 3, 4, 9))
