"""Looking at which backends run changes nothing of what is computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import selectra.models  # noqa: F401
from selectra.data.images import Images
from selectra.mixers import S6, inner
from selectra.registry import models
from selectra.spec import Run, Spec, Train
from selectra.tasks import Classification
from selectra.train.loop import fit
from selectra.train.record import BackendWatch

NAMES = ("vim_smoke", "simba_smoke", "rsmamba_smoke", "videomamba_smoke", "vmamba_smoke", "vim2_smoke")


def gradients(name: str, watch: Any) -> list[Tensor]:
    """Of one loss in bfloat16."""
    torch.manual_seed(0)
    model: Any = models.build(Spec(name), {"n_classes": 4, "in_channels": 3, "img_size": (32, 32)})
    with watch, torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(3, 3, 32, 32)), torch.arange(3))
        loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


class Other(TorchDispatchMode):
    """Any other mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_with_and_without(name: str) -> None:
    watch = BackendWatch()
    with torch.autograd.set_multithreading_enabled(False):
        plain, watched = gradients(name, torch.autograd.set_grad_enabled(True)), gradients(name, watch)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    scans = {"selective_scan", "cross_scan"} & set(watch.noted)
    assert scans and {f"{scan}_backward" for scan in scans} <= set(watch.noted)


def test_a_node_tells_what_it_runs_and_leaves_calls_to_other_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[int] = []
    forward = inner._forward
    monkeypatch.setattr(inner, "_forward", lambda *args: (nodes.append(1), forward(*args))[1])
    mixer, x = S6(8), torch.randn(2, 5, 8)
    with BackendWatch() as watch:
        mixer(x).sum().backward()
    names = {"causal_conv1d", "selective_scan", "causal_conv1d_backward", "selective_scan_backward"}
    assert watch.noted == dict.fromkeys(names, "cpu") and len(nodes) == 1
    with BackendWatch() as watch, Other():
        mixer(x).sum().backward()
    # The operators are called one by one, and seen by both.
    assert watch.noted == dict.fromkeys(names, "cpu") and len(nodes) == 1


@pytest.mark.compile
def test_what_is_compiled_stays_so() -> None:
    """Otherwise the first step of `train.compile` runs uncompiled, and a training that goes on rounds otherwise."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    mixer, x = torch.compile(S6(8), backend=backend), torch.randn(2, 5, 8)
    with BackendWatch() as watch:
        mixer(x).sum().backward()
    assert graphs
    names = {"causal_conv1d", "selective_scan", "causal_conv1d_backward", "selective_scan_backward"}
    assert watch.noted == dict.fromkeys(names, "cpu")


def test_a_resumed_training_in_bfloat16_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Whose first step is watched, wherever it begins."""
    name, data = "vim_smoke", Images("shapes", val=0.1)
    train = Train(steps=6, batch_size=8, eval_every=3, save_every=3, precision="bfloat16", device="cpu")
    run = Run(model=Spec(name), data=Spec("images"), task=Spec("classification"), train=train, name=name)

    def trained(out: Path, most: int = 1000) -> None:
        torch.manual_seed(0)
        model: Any = models.build(Spec(name), data.facts)
        calls: list[int] = []

        def interrupt(*_: Any) -> None:
            calls.append(1)
            if model.training and len(calls) > most:
                raise RuntimeError("the power is gone")

        model.register_forward_pre_hook(interrupt)
        task = Classification().for_data(data)
        fit(model, task, data.windows("train"), data.windows("val"), run, out, progress=False)

    trained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power is gone"):
        trained(tmp_path / "other", 4)
    trained(tmp_path / "other")
    whole, other = (
        [json.loads(line) for line in (tmp_path / each / "record.jsonl").read_text().splitlines()]
        for each in ("whole", "other")
    )
    assert [line["event"] for line in other].count("resumed") == 1
    # Every digit of them is written.
    norms = [[line["norm"] for line in lines if line["event"] == "step"] for lines in (whole, other)]
    assert len(norms[0]) == 6 and norms[0] == norms[1]
