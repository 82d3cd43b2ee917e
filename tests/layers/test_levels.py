"""Four grids from whatever a backbone gives."""

import pytest
import torch

from selectra.errors import ConfigError
from selectra.layers.levels import FourLevels


def test_a_plain_stack_becomes_a_pyramid():
    levels = FourLevels((6, 6, 6, 6), (16, 16, 16, 16)).eval()
    assert levels.strides == (4, 8, 16, 32) and levels.dims == (6, 6, 6, 6)
    grids = [torch.randn(2, 4, 6, 6) for _ in range(4)]
    found = levels(grids)
    assert [tuple(each.shape) for each in found] == [(2, 6, 16, 24), (2, 6, 8, 12), (2, 6, 4, 6), (2, 6, 2, 3)]
    # The third is the third quarter's own grid, the fourth is made of the last.
    assert torch.equal(found[2], grids[2].permute(0, 3, 1, 2))
    assert found[3][0, 0, 0, 0] == grids[3][0, :2, :2, 0].max()


def test_fewer_grids_of_a_plain_stack_are_taken_twice():
    levels = FourLevels((6, 6), (8, 8))
    assert levels.taken == [0, 0, 1, 1] and levels.strides == (2, 4, 8, 16)


def test_short_pyramids_get_coarser_grids_and_long_ones_lose_the_finest():
    levels = FourLevels((4, 8, 12), (4, 8, 16))
    assert levels.strides == (4, 8, 16, 32) and levels.dims == (4, 8, 12, 12)
    found = levels([torch.randn(1, 8 // 2**i, 16 // 2**i, d) for i, d in enumerate((4, 8, 12))])
    assert found[3].shape == (1, 12, 1, 2) and found[3][0, 0, 0, 0] == found[2][0, 0, :, :2].max()
    assert FourLevels((2, 4, 8, 12, 16), (2, 4, 8, 16, 32)).strides == (4, 8, 16, 32)


def test_strides_that_fit_no_decoder_are_refused():
    with pytest.raises(ConfigError, match=r"strides are \(4, 8, 32\)"):
        FourLevels((4, 8, 12), (4, 8, 32))
    with pytest.raises(ConfigError, match=r"plain backbone of stride 2.*larger patch_size"):
        FourLevels((4, 4, 4, 4), (2, 2, 2, 2))
