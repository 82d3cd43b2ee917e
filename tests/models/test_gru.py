"""The GRU: what is its own."""

from typing import Any

import torch

from selectra.models.gru import GRU

SIZES: dict[str, Any] = {"seq_len": 10, "horizon": 4, "n_series": 3, "d_model": 8, "depth": 2}


def test_it_is_the_recurrence_written_out():
    model, x = GRU(**{**SIZES, "depth": 1}, window_norm="none").eval(), torch.randn(2, 10, 3)
    w_in, w, b_in, b = (getattr(model.gru, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = torch.zeros(2, 3, 8)
    for t in range(10):
        row = torch.stack([x[:, t], torch.zeros(2, 3)], -1)
        r_in, z_in, n_in = (row @ w_in.T + b_in).chunk(3, -1)
        r, z, n = (h @ w.T + b).chunk(3, -1)
        z = torch.sigmoid(z_in + z)
        h = (1 - z) * torch.tanh(n_in + torch.sigmoid(r_in + r) * n) + z * h
    assert torch.allclose(model(x), model.head(h), atol=1e-5)


def test_the_forecast_follows_the_order_of_the_series():
    model, x, order = GRU(**SIZES).eval(), torch.randn(2, 10, 3), torch.tensor([2, 0, 1])
    assert torch.allclose(model(x[..., order]), model(x)[..., order], atol=1e-6)


def test_a_gap_is_not_a_value():
    model, x = GRU(**SIZES, window_norm="none").eval(), torch.randn(1, 10, 3)
    x[0, 8, 1] = 0
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[0, 8, 1] = False
    assert not torch.allclose(model(x, observed=observed), model(x), atol=1e-5)


def test_the_number_of_parameters():
    first, second = 3 * (2 * 8 + 8 * 8 + 2 * 8), 3 * (8 * 8 + 8 * 8 + 2 * 8)
    assert sum(p.numel() for p in GRU(**SIZES).parameters()) == first + second + 8 * 4 + 4


def test_a_state_carried_past_the_window_is_another_forecast() -> None:
    """Why an update passes over the whole window: 5 rows that have left it are still in a carried state.

    By how much is for the weights to say: here the network has learned to remember.
    """
    model = GRU(seq_len=24, horizon=4, n_series=2, d_model=8, window_norm="none").eval()
    with torch.no_grad():
        for layer in range(2):
            # The gate that keeps the state, which a training may open as far.
            getattr(model.gru, f"bias_hh_l{layer}")[8:16] += 4
    rows = torch.randn(3, 29, 2)

    def from_state(x: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        given = torch.stack([x, torch.zeros_like(x)], -1).transpose(1, 2)
        _, after = model.gru(given.flatten(0, 1), state)
        return model.head(after[-1].unflatten(0, given.shape[:2])), after

    with torch.no_grad():
        fresh, (first, state) = model(rows[:, 5:]), from_state(rows[:, :24], None)
        carried, _ = from_state(rows[:, 24:], state)
        torch.testing.assert_close(first.flatten(), model(rows[:, :24]).flatten())
    assert (carried.flatten() - fresh.flatten()).abs().max() > 1e-3
