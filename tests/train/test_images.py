"""What images add to the loop: running means, half precision, depth, where NaN begins."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.data.images import Images
from selectra.errors import ConfigError
from selectra.layers.drop import DropPath
from selectra.models import Vim, ViM2, VMamba
from selectra.spec import Optim, Run, Spec, Train
from selectra.tasks import Classification
from selectra.train.depth import depths, freeze, training_mode
from selectra.train.loop import Fitted, fit
from selectra.train.optim import make_optimizer
from selectra.train.parallel import recomputed
from selectra.train.stop import DivergedError, StoppedError
from tests.train import tiny_images


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(d, d, 3, padding=1), nn.BatchNorm2d(d), DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.conv(x)).relu())


class Small(nn.Module):
    """Batch norms and dropped paths, so that statistics and draws matter."""

    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.layers = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def make_run(optim: dict[str, Any] | None = None, **train: Any) -> Run:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 48, "eval_every": 3, "device": "cpu", **train}
    spec = Spec("small")
    given = Optim(**{"lr": 3e-3, "warmup_steps": 2, **(optim or {})})
    return Run(model=spec, data=spec, task=spec, optim=given, train=Train(**settings), name="small")


IMAGES = Images("shapes", val=0.2, crop=3, flip=0.5, erase=0.3, mixup=0.2, cutmix=1.0)


def train(
    out: Path | None, model: nn.Module | None = None, optim: dict[str, Any] | None = None, **settings: Any
) -> tuple[nn.Module, Fitted]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Small() if model is None else model
    task = Classification(label_smoothing=0.1).for_data(IMAGES)
    parts = IMAGES.windows("train"), IMAGES.windows("val")
    return model, fit(model, task, *parts, make_run(optim, **settings), out, progress=False)


def same(one: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in one.state_dict().items())


def steps_of(out: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [[line["loss"], line["norm"], line["lr"]] for line in lines if line["event"] == "step"]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean": {"ema": 0.9, "channels_last": True},
    "bfloat16": {"precision": "bfloat16", "ema": 0.9},
    "float16": {"precision": "float16", "ema": 0.9, "recompute": True},
    "layers": {"optim": {"layer_decay": 0.5}, "freeze": 1, "ema": 0.9},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop", [2, 7])
def test_stopped_and_resumed_is_the_uninterrupted_training(name, stop, tmp_path, monkeypatch):
    settings = SETTINGS[name]

    def start() -> nn.Module:
        torch.manual_seed(0)
        model = Small()
        freeze(model, settings.get("freeze", 0))
        return model

    whole, _ = train(tmp_path / "whole", start(), **settings)
    calls, forward = iter(range(1, 1000)), Small.forward

    def counted(self: Small, x: Tensor) -> Tensor:
        if next(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Small, "forward", counted)
        with pytest.raises(StoppedError):
            train(tmp_path / "parts", start(), **settings)
    torch.rand(5)
    parts, _ = train(tmp_path / "parts", start(), **settings)
    assert same(parts, whole)
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")


def test_the_mean_is_kept_and_is_its_formula(tmp_path, monkeypatch):
    seen: list[dict[str, Tensor]] = []
    from selectra.train.state import State

    advance = State.advance

    def noted(self: State, batches: int) -> None:
        advance(self, batches)
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(State, "advance", noted)
    model, fitted = train(tmp_path, ema=0.6, eval_every=8)
    assert fitted.best_step == 8
    mean = seen[0]
    for n, new in enumerate(seen[1:], start=1):
        decay = min(0.6, (1 + n) / (10 + n))
        mean = {k: decay * mean[k] + (1 - decay) * v if v.is_floating_point() else v for k, v in new.items()}
    for name, value in model.state_dict().items():
        assert torch.allclose(value, mean[name], atol=1e-6), name
    assert not same(model, train(tmp_path / "without", eval_every=8)[0])


def test_recomputation_changes_nothing(tmp_path):
    one, _ = train(tmp_path / "one")
    other, _ = train(tmp_path / "other", recompute=True)
    assert same(one, other) and steps_of(tmp_path / "one") == steps_of(tmp_path / "other")
    assert not any("forward" in vars(block) for block in other.layers)  # pyright: ignore[reportGeneralTypeIssues]


def test_recomputation_stores_less():
    kept = {}
    for wanted in (False, True):
        sizes: list[int] = []
        model = VMamba(n_classes=2, dims=(8,), depths=(3,), d_state=2, patch_size=2)
        with (
            recomputed(model, wanted),
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t),
        ):
            model(torch.randn(2, 3, 16, 16))
        kept[wanted] = sum(sizes)
    assert kept[True] < kept[False] / 3
    with (
        pytest.raises(ConfigError, match=r"Linear does not say what its blocks are"),
        recomputed(nn.Linear(1, 1), True),
    ):
        pass


def _seeded() -> Small:
    """Without dropped paths, which are drawn otherwise in another precision."""
    torch.manual_seed(0)
    model = Small()
    for layer in model.layers:
        layer.drop.rate = 0.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def test_half_precision_is_used_and_stays_near(tmp_path):
    train(tmp_path / "full", _seeded())
    for precision in ("bfloat16", "float16"):
        train(tmp_path / precision, _seeded(), precision=precision)
        full, half = steps_of(tmp_path / "full"), steps_of(tmp_path / precision)
        assert full != half
        # Later steps go their own ways.
        assert half[0][0] == pytest.approx(full[0][0], rel=0.02)


def test_a_gradient_that_overflows_is_left_out_and_scaled_down(tmp_path, monkeypatch):
    """The first scale is so large that the first steps overflow in float16."""
    from selectra.train import state

    monkeypatch.setattr(state, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0**40))
    train(tmp_path, precision="float16", steps=40, batch_size=16)
    norms = [norm for _, norm, _ in steps_of(tmp_path)]
    assert norms[0] is None and norms[-1] is not None


def test_depth_of_every_parameter():
    model = Vim(n_classes=2, d_model=8, depth=3, d_state=2, patch_size=8, img_size=16)
    by_name, n = depths(model)
    assert n == 3
    assert {by_name[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert by_name["layers.1.mixer.out_proj.weight"] == 2
    assert {by_name[name] for name in ("norm_f.weight", "head.weight")} == {4}
    pyramid = ViM2(n_classes=2, dims=(8, 16), depths=(1, 1), channel_dims=(16, 16), channel_group=8, d_state=2)
    by_name, n = depths(pyramid)
    assert n == 2 and by_name["layers.0.downsample.reduction.weight"] == 1 and by_name["norm.weight"] == 3
    with pytest.raises(ConfigError, match=r"Linear has no stages or layers"):
        depths(nn.Linear(2, 2))


def test_layer_decay_lowers_rates_towards_the_image():
    model = Small()
    optimizer = make_optimizer(model, Optim(lr=1.0, weight_decay=0.1, layer_decay=0.5))
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert found["head.weight"] == (1.0, 0.1) and found["head.bias"] == (1.0, 0.0)
    assert found["layers.1.conv.weight"] == (0.5, 0.1) and found["layers.1.norm.weight"] == (0.5, 0.0)
    assert found["layers.0.conv.weight"] == (0.25, 0.1) and found["patch_embed.weight"] == (0.125, 0.1)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert len(make_optimizer(model, Optim()).param_groups) == 2


@pytest.mark.parametrize(
    ("count", "still"),
    [(1, {"patch_embed", "layers.0"}), (2, {"patch_embed", "layers"}), ("all", {"patch_embed", "layers"})],
)
def test_what_is_frozen_stays_and_the_rest_moves(count, still, tmp_path):
    torch.manual_seed(0)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, count)
    train(None, model)
    for name, value in model.state_dict().items():
        if name.startswith(tuple(still)):
            assert torch.equal(value, before[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(value, before[name]), name


def test_frozen_modules_stay_in_evaluation_mode():
    model = Small()
    freeze(model, 1)
    training_mode(model)
    assert not model.layers[0].norm.training and not model.layers[0].drop.training  # pyright: ignore[reportAttributeAccessIssue]
    assert model.layers[1].norm.training and model.training  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"train.freeze is 3, and Small has 2"):
        freeze(Small(), 3)
    with pytest.raises(ConfigError, match=r"leaves Linear nothing to train"):
        freeze(nn.Linear(1, 1), "all")


class Faulty(Small):
    """Divides by zero in a layer, or only in its gradient."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "weight":
            self.layers[1].conv.weight.data[0] = float("inf")  # pyright: ignore
        x = self.layers[0](self.patch_embed(x))
        # The root's gradient at 0 is infinite, and 0 times that is NaN.
        x = x + (0 * x.detach().relu() * 0 + 0 * x).abs().sqrt() * 0 if self.where == "gradient" else x
        return self.head(self.layers[1](x).mean((2, 3)))


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.detach().amax() - 1).log()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weight", r"Before this step 'layers.1.conv.weight' is not finite already"),
        ("output", r"The first that is not finite is the output of 'layers.0.norm' \(Log\); its inputs are finite"),
        ("gradient", r"The first that is not finite is the gradient of the output of 'layers.0"),
    ],
)
def test_the_first_place_that_is_not_finite_is_named(where, message):
    model = Faulty(where)
    if where == "output":
        model.layers[0].norm = Log()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DivergedError, match=message):
        train(None, model)


def test_a_batch_that_is_not_finite_is_named(monkeypatch):
    windows: Any = IMAGES.windows("train")
    original = type(windows).make

    def broken(self, *args):
        batch = original(self, *args)
        batch.x[0, 0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(type(windows), "make", broken)
    with pytest.raises(DivergedError, match=r"Of the step's batch 0, 'x' is not finite"):
        train(None)


def test_views_change_from_pass_to_pass_and_not_with_the_epoch_they_resume_in():
    windows = IMAGES.windows("train")
    assert hasattr(windows, "at_pass")
    one = windows[[0, 1]].to("cpu").x
    windows.at_pass(1, 0)
    assert not torch.equal(windows[[0, 1]].to("cpu").x, one)
    windows.at_pass(0, 0)
    assert torch.equal(windows[[0, 1]].to("cpu").x, one)


def compare_compiled(out: Path, within: float, **settings: Any) -> None:
    """The same losses and means, and weights under the model's own names."""
    from safetensors.torch import load_file

    for name, compiled in (("plain", False), ("compiled", True)):
        torch._dynamo.reset()
        tiny_images.train(out / name, compile=compiled, steps=6, **settings)
    plain, compiled = (load_file(out / name / "model.safetensors") for name in ("plain", "compiled"))
    assert steps_of(out / "compiled") == [pytest.approx(row, rel=within) for row in steps_of(out / "plain")]
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(value, compiled[name], atol=within) for name, value in plain.items())


@pytest.mark.compile
def test_a_compiled_training_is_the_plain_one(tmp_path, monkeypatch):
    """As traced, forward and backward; without the minute that generating code for a CPU takes."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="aot_eager"))
    compare_compiled(tmp_path, 1e-5)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_training_on_a_gpu_is_the_plain_one(tmp_path):
    compare_compiled(tmp_path, 1e-3, device="cuda")


@pytest.mark.compile
def test_train_compile_calls_the_compiled_model_and_measures_the_plain_one(tmp_path, monkeypatch):
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend=backend))
    train(tmp_path / "compiled", compile=True)
    assert graphs
    torch._dynamo.reset()
    train(tmp_path / "plain")
    assert steps_of(tmp_path / "compiled") == [pytest.approx(row, rel=1e-5) for row in steps_of(tmp_path / "plain")]
    graphs.clear()
    train(tmp_path / "again")
    assert not graphs
