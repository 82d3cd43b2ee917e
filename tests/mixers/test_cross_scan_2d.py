"""VMamba's mixer of a grid."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers import CrossPaths, CrossScan2d, cross_scan_2d


def written_out(m: CrossPaths, u: Tensor) -> Tensor:
    """The official code's order of things: four copies of the map, scanned one by one, added."""
    _, h, w, d = u.shape
    u = F.silu(m.conv2d(u.permute(0, 3, 1, 2)))
    rows, columns = u.flatten(2), u.transpose(2, 3).flatten(2)
    total = torch.zeros_like(u)
    for k, x in enumerate([rows, columns, rows.flip(2), columns.flip(2)]):
        dt, B, C = (m.x_proj[k] @ x).split([m.dt_rank, m.d_state, m.d_state], dim=1)
        delta = F.softplus(m.dt_proj[k] @ dt + m.dt_bias[k][:, None])
        A, state, ys = -m.A_log[k].exp(), torch.zeros(len(u), d, m.d_state, dtype=u.dtype), []
        for t in range(h * w):
            step = delta[:, :, t, None]
            state = (step * A).exp() * state + step * B[:, None, :, t] * x[:, :, t, None]
            ys.append((state * C[:, None, :, t]).sum(2) + m.D[k] * x[:, :, t])
        y = torch.stack(ys, 2)
        y = y.flip(2) if k > 1 else y
        total = total + (y.unflatten(2, (h, w)) if k % 2 == 0 else y.unflatten(2, (w, h)).transpose(2, 3))
    return total.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("h", "w"), [(3, 4), (5, 2), (1, 6), (4, 1), (1, 1)])
@pytest.mark.parametrize("d_state", [1, 3])
def test_four_scans_written_out(h, w, d_state):
    m, x = CrossScan2d(6, d_state, expand=1.5).double(), torch.randn(2, h, w, 6).double().requires_grad_()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    u, z = m.in_proj(x).chunk(2, -1)
    expected = m.out_proj(m.out_norm(written_out(m, u)) * F.silu(z))
    assert torch.allclose(m(x), expected, rtol=1e-9, atol=1e-12)
    weight, wanted = torch.randn_like(expected), [x, *m.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), wanted) for y in (m(x), expected)]
    for got, want in zip(*gradients, strict=True):
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


def test_steps_start_as_mambas():
    m = CrossScan2d(64)
    steps = F.softplus(m.dt_bias)
    assert steps.min() >= 0.001 - 1e-6 and steps.max() <= 0.1 + 1e-6
    assert m.dt_proj.abs().max() <= m.dt_rank**-0.5
    assert torch.equal(m.A_log[2, 5], torch.arange(1.0, 17).log())


@pytest.mark.skipif("SELECTRA_CHECK_SHAPES" in os.environ, reason="the hook speaks first")
def test_a_grid_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match=r"x has shape \(2, 3, 4\)"):
        CrossScan2d(6)(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match=r"x has shape \(2, 3, 4, 5\)"):
        CrossScan2d(6)(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ConfigError, match=r"dt_rank='aut'.*Did you mean 'auto'"):
        CrossScan2d(6, dt_rank="aut")  # pyright: ignore[reportArgumentType]


def test_sizes_that_cannot_be_are_named():
    with pytest.raises(ConfigError, match="d_conv=4: needs an odd number"):
        CrossScan2d(6, d_conv=4)


@pytest.mark.parametrize("batch", [2, 17])
def test_products_in_pieces(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where rows are many: the same values and gradients."""
    torch.manual_seed(0)
    mixer = CrossScan2d(12, d_state=3, dt_rank=2).double()
    x = torch.randn(batch, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    found = []
    for pieces in (1, batch if batch >= cross_scan_2d.ENOUGH_PIECES else batch * 5):
        monkeypatch.setattr(cross_scan_2d, "_pieces", lambda u, pieces=pieces: pieces)
        y = mixer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *mixer.parameters()))))
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
