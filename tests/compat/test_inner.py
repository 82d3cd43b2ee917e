"""What follows Mamba's input projection, by its names: values and gradients against loops."""

# pyright: reportMissingImports=false

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from tests.compat import references
from tests.compat.references import assert_same, random

pytestmark = pytest.mark.usefixtures("installed")
B_, D_, L_, N_, R_, E_ = 2, 4, 6, 3, 2, 5
IN = ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight")


def inner_inputs(length: int = L_, **changed: Any) -> dict[str, Any]:
    """Random arguments in float64."""
    return {
        "xz": random(B_, 2 * D_, length, seed=1),
        "conv1d_weight": random(D_, 1, 3, seed=2),
        "conv1d_bias": random(D_, seed=3),
        "x_proj_weight": random(R_ + 2 * N_, D_, seed=4),
        "delta_proj_weight": random(D_, R_, seed=5),
        "A": -random(D_, N_, seed=6).abs(),
        "D": random(D_, seed=7),
        "delta_bias": random(D_, seed=8),
        **changed,
    }


def projected() -> dict[str, Any]:
    """An output projection."""
    return {"out_proj_weight": random(E_, D_, seed=9), "out_proj_bias": random(E_, seed=10)}


def loop(**given: Any) -> Tensor:
    """Without the output projection, (b, d, l)."""
    first = [given.pop(name) for name in IN]
    names = {"B_proj_bias": "B_bias", "C_proj_bias": "C_bias", "delta_softplus": "softplus"}
    return references.inner(*first, **{names.get(name, name): x for name, x in given.items()})


def loop_projected(out_proj_weight: Tensor, out_proj_bias: Tensor | None = None, **given: Any) -> Tensor:
    y = torch.einsum("ed,bdl->ble", out_proj_weight, loop(**given))
    return y if out_proj_bias is None else y + out_proj_bias


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"D": None, "delta_bias": None, "conv1d_bias": None},
        {"B_proj_bias": random(N_, seed=11), "C_proj_bias": random(N_, seed=12)},
        {"B": random(D_, N_, seed=13)},
        {"B": random(B_, 2, N_, L_, seed=13), "C": random(B_, N_, L_, seed=14)},
    ],
)
def test_inner_functions_by_call(changed: dict[str, Any]) -> None:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_fn_no_out_proj, mamba_inner_ref

    inputs = inner_inputs(**changed)
    assert_same(mamba_inner_fn_no_out_proj, loop, inputs)
    for function in (mamba_inner_fn, mamba_inner_ref):
        assert_same(function, loop_projected, {**inputs, **projected()})


@pytest.mark.parametrize("softplus", [True, False])
def test_sequences_of_one_position(softplus: bool) -> None:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj

    inputs = inner_inputs(length=1)
    ours = lambda **given: mamba_inner_fn_no_out_proj(**given, delta_softplus=softplus)  # noqa: E731
    assert_same(ours, lambda **given: loop(**given, delta_softplus=softplus), inputs)


def test_sequences_of_one_position_with_groups_and_nothing_else() -> None:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj

    changed = {"D": None, "delta_bias": None, "B": random(B_, 2, N_, 1, seed=13)}
    assert_same(mamba_inner_fn_no_out_proj, loop, inner_inputs(length=1, **changed))


def test_both_directions() -> None:
    from mamba_ssm.ops import selective_scan_interface as interface

    inputs = {**inner_inputs(), **projected(), "A_b": -random(D_, N_, seed=15).abs()}

    def both(A: Tensor, A_b: Tensor, **given: Any) -> Tensor:
        weights = {name: given.pop(name) for name in ("out_proj_weight", "out_proj_bias")}
        x, z = given["xz"].chunk(2, 1)
        # The selection is made forward; only the scan runs backward.
        u = references.convolve(x, given["conv1d_weight"][:, 0], given["conv1d_bias"])
        low = torch.einsum("rd,bdl->brl", given["x_proj_weight"], u)
        delta = torch.einsum("dr,brl->bdl", given["delta_proj_weight"], low[:, :R_])
        B, C = low[:, R_ : R_ + N_], low[:, -N_:]
        rest = (given["D"], given["delta_bias"])
        ahead = references.scan(u, delta, A, B, C, rest[0], z, rest[1], True)[1]
        u, delta, B, C, z = (t.flip(-1) for t in (u, delta, B, C, z))
        back = references.scan(u, delta, A_b, B, C, rest[0], z, rest[1], True)[1].flip(-1)
        return torch.einsum("ed,bdl->ble", weights["out_proj_weight"], ahead + back) + weights["out_proj_bias"]

    for function in (interface.bimamba_inner_fn, interface.bimamba_inner_ref):
        assert_same(function, both, inputs)


def test_norms_of_the_selection() -> None:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    names = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")
    inputs = {**inner_inputs(D=None), **projected()}
    inputs |= {name: random(size, seed=20 + size) for name, size in zip(names, (N_, N_, D_), strict=True)}

    def normed(**given: Any) -> Tensor:
        weights = [given.pop(name) for name in names]
        first = [given.pop(name) for name in IN]
        xz, conv, conv_bias, x_proj, delta_proj = first
        x, z = xz.chunk(2, 1)
        u = references.convolve(x, conv[:, 0], conv_bias)
        low = torch.einsum("rd,bdl->blr", x_proj, u)
        delta = torch.einsum("dr,blr->bld", delta_proj, low[..., :R_])
        parts = (low[..., R_ : R_ + N_], low[..., -N_:], delta)
        B, C, delta = (
            references.norm(t, weight, None, 1e-5, True).transpose(1, 2)
            for t, weight in zip(parts, weights, strict=True)
        )
        y = references.scan(u, delta, given["A"], B, C, None, z, given["delta_bias"], True)[1]
        return torch.einsum("ed,bdl->ble", given["out_proj_weight"], y) + given["out_proj_bias"]

    assert_same(lambda **given: mamba_inner_fn(**given, b_c_dt_rms_eps=1e-5), normed, inputs)


def test_complex_decay_is_refused_in_words() -> None:
    from mamba_ssm.ops import selective_scan_interface as interface

    inputs = inner_inputs(A=torch.ones(D_, N_, dtype=torch.complex128))
    with pytest.raises(ConfigError, match="A is torch"):
        interface.mamba_inner_fn_no_out_proj(**inputs)
    with pytest.raises(ConfigError, match="A_b is torch"):
        interface.bimamba_inner_fn(**inner_inputs(), **projected(), A_b=inputs["A"])
