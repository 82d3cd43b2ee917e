"""The cross-scan: every backend of the CPU against a plain loop over positions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError, ConfigError
from selectra.ops import cross_scan, selective_scan
from selectra.ops.cross_scan.call import ROUTES
from tests.ops import cases
from tests.ops.cross import ALL, drawn, order, results, slow

BACKENDS = ("cpu", "portable", "reference")
# Grid, routes, channels, states.
CASES = [
    ((2, 3, 5), ALL, 6, 3, {"gate": "shared"}),
    ((1, 4, 2), ("right", "left"), 5, 16, {"shared": False, "gate": "own"}),
    ((2, 1, 7), ("right", "left"), 3, 1, {"gate": "shared"}),
    ((1, 6, 1), ALL, 2, 3, {"shared": False}),
    ((1, 3, 4), ("up",), 4, 1, {"plain": True}),
    ((2, 2, 3), ("down", "right", "down"), 3, 16, {}),
]


def available(backend: str) -> None:
    reason = cross_scan.explain(**small())[backend]
    if reason != "ok":
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_a_loop_over_positions(case: Any, merge: bool, backend: str) -> None:
    available(backend)
    shape, routes, d, n, more = case
    tensors = drawn(shape, len(routes), d, n, **more)
    want = results(slow, tensors, torch.float64, routes=routes, merge=merge)
    with cross_scan.using(backend):
        got = results(cross_scan, tensors, torch.float64, routes=routes, merge=merge)
    assert got["y"].shape == ((*shape, d) if merge else (*shape, len(routes), d))
    cases.assert_close(got, want, cases.FLOAT64, backend)


def test_without_softplus() -> None:
    tensors = drawn((1, 3, 2), 4, 3, 2, plain=True)
    tensors["delta"] = tensors["delta"].abs()
    want = results(slow, tensors, torch.float64, delta_softplus=False)
    cases.assert_close(results(cross_scan, tensors, torch.float64, delta_softplus=False), want, 1e-12, "no softplus")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype, backend: str) -> None:
    available(backend)
    tensors = drawn((2, 3, 5), 4, 8, 4, dtype=dtype, gate="shared")
    want = results(slow, tensors, torch.float64)
    with cross_scan.using(backend):
        got = results(cross_scan, tensors, dtype)
    cases.assert_close(got, want, 1e-5 if dtype == torch.float32 else 2e-2, backend)


def test_the_sum_of_the_routes_is_rounded_once() -> None:
    tensors: dict[str, Any] = {
        name: t.bfloat16() for name, t in drawn((1, 8, 8), 4, 8, 1, dtype=torch.bfloat16).items()
    }
    wide: dict[str, Any] = {name: t.float() for name, t in tensors.items()}
    got, want = (cross_scan(**arguments, delta_softplus=True) for arguments in (tensors, wide))
    assert torch.equal(got, want.bfloat16())


def strided(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers behind other strides: channels first, parts of wider tensors, a crop of a larger grid."""
    first = {"u": tensors["u"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}
    parts = {name: torch.cat([tensors[name]] * 2, -1)[..., : tensors[name].shape[-1]] for name in ("delta", "B")}
    crop = {"C": torch.cat([tensors["C"]] * 2, 2)[:, :, : tensors["C"].shape[2]]}
    routes_first = {"A": tensors["A"].transpose(0, 1).contiguous().transpose(0, 1)}
    return tensors | first | parts | crop | routes_first


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    available(backend)
    tensors = drawn((2, 3, 4), 4, 5, 3, gate="shared")
    want = results(slow, tensors, torch.float64)
    with cross_scan.using(backend):
        got = results(cross_scan, strided(tensors), torch.float64)
    cases.assert_close(got, want, cases.FLOAT64, backend)


def test_a_pair_is_a_grid_of_one_row() -> None:
    tensors = drawn((2, 1, 9), 2, 4, 3, gate="shared")
    line = {name: t.squeeze(1) if t.shape[:3] == (2, 1, 9) else t for name, t in tensors.items()}
    ys = [
        selective_scan(
            line["u"], line["delta"][:, :, i], line["A"][i], line["B"][:, :, i], line["C"][:, :, i], line["D"][i],
            line["z"], line["delta_bias"][i], True, reverse=bool(i),
        )
        for i in range(2)
    ]  # fmt: skip
    got = cross_scan(**tensors, delta_softplus=True, routes=("right", "left"))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(got.squeeze(1), ys[0] + ys[1])


def test_routes_visit_every_position_once() -> None:
    # With A = 0 and all else 1 the state counts the positions.
    ones = torch.ones(1, 2, 3, 4, 1, dtype=torch.float64)
    y = cross_scan(ones[:, :, :, 0], ones, torch.zeros(4, 1, 1, dtype=torch.float64), ones, ones, merge=False)
    for i, route in enumerate(ROUTES):
        seen = [int(y[0, r, c, i, 0]) for r, c in order(route, 2, 3)]
        assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(shape: tuple[int, int, int], backend: str) -> None:
    available(backend)
    tensors = drawn(shape, 4, 3, 2, gate="shared")
    with cross_scan.using(backend):
        got = results(cross_scan, tensors, torch.float64)
    assert got["y"].shape == (*shape, 3) and not any(value.any() for value in got.values())


def small() -> dict[str, Any]:
    return {name: t.float() for name, t in drawn((1, 2, 3), 4, 6, 2, gate="shared").items()}


BAD = [
    ({"routes": ("right", "lft")}, "there is no route 'lft'; there are right, left, down, up. Did you mean 'left'"),
    ({"routes": ()}, "routes is empty; it names one or more of right"),
    ({"routes": ("right", "left")}, r"A has shape \(4, 6, 2\); it must be \(k, d, n\) with k = 2 routes"),
    ({"u": torch.zeros(6, 6)}, r"u has shape \(6, 6\); it must be \(b, h, w, d\), or"),
    ({"u": torch.zeros(1, 2, 3, 2, 6)}, r"u has shape \(1, 2, 3, 2, 6\); it must be \(b, h, w, d\), or"),
    ({"delta": torch.zeros(1, 2, 3, 6)}, r"delta has shape \(1, 2, 3, 6\); it must be \(b, h, w, k, d\)"),
    ({"B": torch.zeros(1, 2, 3, 4, 3)}, r"B has shape \(1, 2, 3, 4, 3\); it must be \(b, h, w, k, n\)"),
    ({"z": torch.zeros(1, 2, 4, 6)}, r"z has shape \(1, 2, 4, 6\); it must be \(b, h, w, d\)"),
    ({"D": torch.zeros(24)}, r"D has shape \(24,\); it must be \(k, d\)"),
    ({"C": torch.zeros(1, 2, 3, 4, 2, dtype=torch.float64)}, "C is torch.float64 in a call that mixes"),
    ({"z": torch.zeros(1, 2, 3, 6, device="meta")}, "z is on meta, the first argument on cpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cross_scan(**small() | change)


def test_a_backend_that_is_asked_for_runs_or_refuses() -> None:
    a = small()
    assert cross_scan.explain(**a)["cuda"] == "tensors are on cpu, it needs cuda"
    with cross_scan.using("cuda"), pytest.raises(BackendError, match="cross_scan: backend 'cuda' was asked for"):
        cross_scan(**a)
    # The scan's own wish counts, since it is the same recurrence; one for this operator comes first.
    with selective_scan.using("portable"):
        assert cross_scan.backend_for(**a) == "portable"
        with cross_scan.using("reference"):
            assert cross_scan.backend_for(**a) == "reference"
    available("cpu")
    assert cross_scan.backend_for(**a) == "cpu"


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    available(backend)
    tensors = {name: t.float() for name, t in drawn((1, 2, 3), 4, 6, 2, gate="shared").items()}

    def step(**arguments: Any) -> Tensor:
        return cross_scan(**arguments)

    torch._dynamo.reset()
    with cross_scan.using(backend):
        want = results(step, tensors, torch.float32)
        got = results(torch.compile(step, fullgraph=True, backend="aot_eager"), tensors, torch.float32)
    cases.assert_close(got, {name: t.double() for name, t in want.items()}, 1e-6, backend)
