"""The Mamba-2 block against a loop over positions written from the paper, and against Mamba's scan."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers import SSD
from selectra.ops import selective_scan
from selectra.ops.ssd import ssd


def by_position(mixer: SSD, x: Tensor) -> Tensor:
    """Sec. 7.1, position by position, head by head."""
    batch, length, _ = x.shape
    z, xBC, dt = mixer.in_proj(x).split([mixer.d_inner, mixer.conv1d.in_channels, mixer.n_heads], -1)
    padded = F.pad(xBC.transpose(1, 2), (mixer.d_conv - 1, 0))
    xBC = F.silu(F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=padded.shape[1])).transpose(1, 2)
    bc = mixer.n_groups * mixer.d_state
    u, B, C = xBC.split([mixer.d_inner, bc, bc], -1)
    u = u.reshape(batch, length, mixer.n_heads, mixer.d_head)
    each = mixer.n_heads // mixer.n_groups
    B, C = (t.reshape(batch, length, mixer.n_groups, -1).repeat_interleave(each, 2) for t in (B, C))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*mixer.dt_limit)
    h = x.new_zeros(batch, mixer.n_heads, mixer.d_head, mixer.d_state)
    rows = []
    for t in range(length):
        decay = torch.exp(-dt[:, t] * mixer.A_log.exp())
        h = h * decay[..., None, None] + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        rows.append((h * C[:, t, :, None]).sum(-1) + mixer.D[:, None] * u[:, t])
    y = torch.stack(rows, 1).flatten(2) * F.silu(z)
    y = y.unflatten(-1, (mixer.n_groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
    return mixer.out_proj(y.flatten(-2) * mixer.norm.weight)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({"d_model": 8, "d_state": 5, "d_head": 4}, 70),
        ({"d_model": 12, "d_state": 3, "d_head": 3, "n_groups": 4, "d_conv": 2, "bias": True}, 129),
        ({"d_model": 5, "d_state": 1, "d_head": 1, "expand": 3, "conv_bias": False, "dt_limit": (0.02, 0.05)}, 1),
    ],
)
def test_values_and_gradients_are_those_of_a_loop(sizes, length):
    mixer = SSD(**sizes).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, length, sizes["d_model"], dtype=torch.float64, requires_grad=True)
    inputs = [x, *mixer.parameters()]
    y, wanted = mixer(x), by_position(mixer, x)
    weights = torch.randn_like(y)
    assert torch.allclose(y, wanted, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad((y * weights).sum(), inputs)
    expected = torch.autograd.grad((wanted * weights).sum(), inputs)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() <= 1e-9 * max(1.0, float(want.abs().max()))


def test_with_one_decay_a_head_it_is_mambas_recurrence():
    """Duality: the same as the selective scan with A equal over channels and states of a head."""
    heads, p, n, length = 3, 2, 4, 100
    x = torch.randn(2, length, heads, p, dtype=torch.float64)
    dt = torch.rand(2, length, heads, dtype=torch.float64)
    A = -torch.rand(heads, dtype=torch.float64)
    B, C = (torch.randn(2, length, 1, n, dtype=torch.float64) for _ in range(2))
    y, state = ssd(x, dt, A, B, C)
    delta = dt.repeat_interleave(p, 2)
    wide = A.repeat_interleave(p)[:, None].expand(-1, n)
    wanted, last = selective_scan(x.flatten(2), delta, wide, B[:, :, 0], C[:, :, 0], return_final_state=True)
    assert torch.allclose(y.flatten(2), wanted, rtol=1e-11, atol=1e-11)
    assert torch.allclose(state.flatten(1, 2), last, rtol=1e-11, atol=1e-11)


def test_what_stands_at_absent_positions_has_no_effect():
    mixer = SSD(8, 4, d_head=4).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([0, 5])[:, None]
    poisoned = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    y = mixer(poisoned, mask=mask)
    assert y.isfinite().all() and (y[~mask] == 0).all()
    y.sum().backward()
    assert poisoned.grad is not None and (poisoned.grad[~mask] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    assert torch.allclose(y[1, 5:], mixer(x[1:, 5:])[0])


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="d_head=5 must divide the inner width 16"):
        SSD(8, d_head=5)
    for expand in (float("nan"), float("inf"), 0, -1.0):
        with pytest.raises(ConfigError, match=f"expand={expand}: needs a finite number above 0"):
            SSD(8, d_head=4, expand=expand)
    with pytest.raises(ConfigError, match="n_groups=3"):
        SSD(8, d_head=4, n_groups=3)
