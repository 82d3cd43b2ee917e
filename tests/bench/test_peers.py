"""Other packages' kernels: their layouts and orders of arguments, with stand-ins where no GPU is; attention."""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.bench import peers
from selectra.bench.calls import results
from selectra.bench.gate import reference
from selectra.bench.shapes import Case
from selectra.errors import BackendError, ConfigError
from selectra.ops import selective_scan

GATED = Case("", 2, 6, 7, 3, groups=2, dtype="fp32")
PLAIN = GATED._replace(gate=False)
DEVICE = torch.device("cpu")


class StandIn(ModuleType):
    """The signatures and layouts of the compiled modules, over our reference."""

    def __init__(self, name: str, takes_gate: bool) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self._gate = takes_gate

    def fwd(self, *arguments: Any) -> list[Tensor]:
        inputs, rest = self._read(arguments)
        assert rest in ([True], [True, 1, False])
        for name, x in inputs.items():
            assert x is None or x.is_contiguous(), name
        u, A = inputs["u"], inputs["A"]
        states = torch.empty(u.shape[0], u.shape[1], -(-u.shape[2] // 2048), 2 * A.shape[1])
        y = self._scan(inputs | {"z": None})
        return [y, states] if inputs["z"] is None else [y, states, self._scan(inputs)]

    def bwd(self, *arguments: Any) -> list[Tensor | None]:
        inputs, rest = self._read(arguments)
        u, A = inputs["u"], inputs["A"]
        dy, states = rest[:2]
        assert dy.shape == u.shape
        assert states.shape[-1] == 2 * A.shape[1]
        if self._gate:
            out, dz, softplus, again = rest[2:]
            assert (out is None) == (inputs["z"] is None)
            assert (dz, softplus, again) == (None, True, False)
        else:
            assert rest[2:] == [True, 1]
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
        grads = dict(
            zip(leaves, torch.autograd.grad(self._scan(inputs | leaves), list(leaves.values()), dy), strict=True)
        )
        return [grads.get(name) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")]

    def _read(self, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], list[Any]]:
        names = ["u", "delta", "A", "B", "C", "D", *(["z"] if self._gate else []), "delta_bias"]
        return {"z": None} | dict(zip(names, arguments, strict=False)), list(arguments[len(names) :])

    def _scan(self, inputs: dict[str, Any]) -> Tensor:
        last = {name: inputs[name].transpose(1, 2) for name in ("u", "delta", "z") if inputs[name] is not None}
        last |= {name: inputs[name].permute(0, 3, 1, 2) for name in "BC"}
        with selective_scan.using("reference"):
            return selective_scan(**(inputs | last), delta_softplus=True).transpose(1, 2).contiguous()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, takes_gate in ((peers.MAMBA_SSM, True), (peers.VMAMBA, False)):
        monkeypatch.setitem(sys.modules, name, StandIn(name, takes_gate))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("make", "case"), [("mamba_ssm", GATED), ("mamba_ssm", PLAIN), ("vmamba", PLAIN)])
@pytest.mark.parametrize("form", ["grouped", "ungrouped", "bare"])
def test_a_peer_gets_and_gives_our_arguments(make: str, case: Case, form: str) -> None:
    arguments = case.arguments(DEVICE)
    if form == "ungrouped":
        arguments |= {name: x[:, :, 0] for name in "BC" if (x := arguments[name]) is not None}
    if form == "bare":
        arguments |= {"D": None, "delta_bias": None}
    dy = torch.randn(case.b, case.l, case.d)
    prepare = {"mamba_ssm": peers.mamba_ssm_scan, "vmamba": peers.vmamba_scan}[make]()
    assert prepare is not None
    truth = reference(arguments, dy)
    assert results(prepare(arguments), dy).keys() == truth.keys()
    found = peers.precision({make: prepare}, arguments, dy, truth)
    assert all(error[make].largest < 1e-5 for error in found.values()), found


@pytest.mark.usefixtures("stand_ins")
def test_a_gate_is_refused_where_there_is_none() -> None:
    prepare = peers.vmamba_scan()
    assert prepare is not None
    with pytest.raises(ConfigError, match="no gate"):
        prepare(GATED.arguments(DEVICE))


def test_what_is_not_installed_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert peers.mamba_ssm_scan() is None
    assert peers.vmamba_scan() is None
    assert peers.versions() == {}


def test_a_module_that_cannot_be_loaded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{peers.MAMBA_SSM}.py").write_text("raise ImportError('undefined symbol')")
    (tmp_path / f"{peers.MAMBA_SSM}.json").write_text(json.dumps({"version": "2.3"}))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=r"undefined symbol.*build_peers"):
        peers.mamba_ssm_scan()
    assert peers.versions()["mamba_ssm"] == {"version": "2.3"}


@pytest.mark.parametrize("causal", [True, False])
def test_attention_agrees_with_float64(causal: bool) -> None:
    found = peers.check_sdpa("flash", torch.float32, DEVICE, causal)
    assert set(found) == {"y", "dq", "dk", "dv"}
    assert all(error.largest < 1e-5 for error in found.values()), found


def test_attention_runs_backward_again() -> None:
    attention = peers.sdpa(1, 5, 128, torch.float32, DEVICE)
    y = attention.forward()
    dy = attention.own(torch.randn(1, 5, 128))
    first, again = attention.backward(y, dy), attention.backward(y, dy)
    assert all(torch.equal(a, b) and a.shape == y.shape for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("width", "kernel", "error", "message"),
    [
        (100, "flash", ConfigError, "64 divides"),
        (64, "flesh", ConfigError, "flash, cudnn"),
        (64, "cudnn", BackendError, "cannot run its cudnn"),
    ],
)
def test_attention_that_cannot_be_had(width: int, kernel: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        peers.sdpa(1, 5, width, torch.float32, DEVICE, kernel=kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("length", [71, 2049])
@pytest.mark.parametrize(
    ("name", "gate"), [("mamba_ssm_scan", True), ("mamba_ssm_scan", False), ("vmamba_scan", False)]
)
def test_built_peers_compute_the_same_operation(name: str, gate: bool, length: int, dtype: str) -> None:
    prepare = getattr(peers, name)()
    if prepare is None:
        pytest.skip(f"{name} finds nothing; results/build_peers.py builds it")
    case = Case("", 2, 16, length, 16, groups=1 if gate else 2, dtype=dtype, gate=gate)
    arguments = case.arguments(torch.device("cuda"))
    dy = torch.randn_like(arguments["u"])  # pyright: ignore[reportArgumentType]
    cpu = {name: None if x is None else x.cpu() for name, x in arguments.items()}
    found = peers.precision({name: prepare}, arguments, dy, reference(cpu, dy.cpu()))
    most = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}[dtype]
    assert all(error[name].largest < most for error in found.values()), found
