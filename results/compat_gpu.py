"""Official models' training steps on a GPU: their own Python over mamba_ssm's kernels, against the same under compat.

    python results/build_peers.py --mamba-ssm mamba_ssm-2.3.2.post1.tar.gz --out peers
    python results/compat_gpu.py --vim Vim --timemachine TimeMachine --out results --build-into peers
    PYTHONPATH=peers python results/compat_gpu.py --vim Vim --timemachine TimeMachine --out results

Both sides run in one process, by turns, timed by CUDA events: the official model's source is imported twice, once
beside Vim's fork of mamba_ssm (with the compiled scan that the first command builds, and the fork's causal_conv1d,
which the second does), once beside selectra.compat's stand-ins. What the sources import from timm and transformers,
and what does no work in these models, is put there as empty names.
"""

import datetime
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils import cpp_extension

from selectra.compat.packages import MODULES
from selectra.compat.stand_in import StandIn

FLAGS = [
    "-O3",
    "--use_fast_math",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    *(f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")),
    *(f"-U__CUDA_NO_BFLOAT16{name}__" for name in ("_OPERATORS", "_CONVERSIONS", "2_OPERATORS", "2_CONVERSIONS")),
]
THEIRS, OURS = "mamba_ssm", "selectra.compat"
CONV = "causal_conv1d_cuda"
console = Console(width=140)


@dataclass(frozen=True)
class Job:
    """One model's training step."""

    name: str
    module: str
    """Where the official class is imported from."""
    build: Callable[[Any], nn.Module]
    """From that module."""
    batch: Callable[[], tuple[Tensor, Tensor]]
    """Input and target."""
    loss: Callable[[Tensor, Tensor], Tensor]
    bfloat16: bool = False
    """Whether the forward runs under autocast."""


def vim(size: int, images: int, bfloat16: bool) -> Job:
    """Vim-Ti with bidirectional mixers, middle class token and halved sums, as it was released."""
    options = {
        "img_size": size, "patch_size": 16, "embed_dim": 192, "depth": 24, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "final_pool_type": "mean", "if_abs_pos_embed": True, "if_rope": False,
        "if_rope_residual": False, "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True,
        "use_middle_cls_token": True, "drop_path_rate": 0.0,
    }  # fmt: skip

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(images, 3, size, size, device="cuda"), torch.randint(1000, (images,), device="cuda")

    name = f"Vim-Ti {size} px, {images} images, {'bf16 autocast' if bfloat16 else 'fp32'}"
    return Job(name, "models_mamba", lambda m: m.VisionMamba(**options), batch, nn.functional.cross_entropy, bfloat16)


def timemachine(name: str, series: int, windows: int, *, ch_ind: int, n1: int, n2: int) -> Job:
    """TimeMachine as its script for a data set has it, 96 hours in, 96 out, but without dropout."""
    config = SimpleNamespace(
        seq_len=96, pred_len=96, enc_in=series, dropout=0.0, revin=1, residual=1, ch_ind=ch_ind, n1=n1, n2=n2,
        d_state=256, dconv=2, e_fact=1,
    )  # fmt: skip

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(windows, 192, series, device="cuda").cumsum(1)
        return x[:, :96].contiguous(), x[:, 96:].contiguous()

    title = f"TimeMachine {name}, {series} series, {windows} windows, fp32"
    return Job(title, "models.TimeMachine", lambda m: m.Model(config), batch, nn.functional.mse_loss)


JOBS = (
    vim(224, 64, True),
    vim(224, 128, True),
    timemachine("traffic", 862, 16, ch_ind=0, n1=512, n2=16),
    timemachine("ETTh1", 7, 512, ch_ind=1, n1=512, n2=32),
    vim(224, 64, False),
)


def main(
    vim_folder: Annotated[Path, typer.Option("--vim", help="A checkout of hustvl/Vim.")],
    timemachine_folder: Annotated[Path, typer.Option("--timemachine", help="A checkout of Atik-Ahamed/TimeMachine.")],
    out: Annotated[Path, typer.Option(help="Folder for the record.")],
    seconds: Annotated[float, typer.Option(help="Seconds of timing for each side of each job.")] = 3.0,
    jobs: Annotated[str, typer.Option(help="Only jobs whose name holds this.")] = "",
    build_into: Annotated[Path | None, typer.Option(help="Only build the fork's causal_conv1d into a folder.")] = None,
) -> None:
    """Time both sides and write the record."""
    sys.path[:0] = [str(vim_folder / "vim"), str(timemachine_folder / "TimeMachine_supervised")]
    add_names()
    if build_into is not None:
        build_conv(vim_folder / "causal-conv1d" / "csrc", build_into)
        return
    if importlib.util.find_spec(CONV) is None:
        build_conv(vim_folder / "causal-conv1d" / "csrc")
    forks = [str(vim_folder / "mamba-1p1p1"), str(vim_folder / "causal-conv1d")]
    device = torch.cuda.get_device_name()
    record: dict[str, Any] = {
        "command": "python results/compat_gpu.py --vim Vim --timemachine TimeMachine --out results",
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "jobs": [],
    }
    name = re.sub(r"\W+", "_", device.lower())
    path = out / f"compat_gpu_{name}_{record['date']}.json"
    for job in JOBS:
        if jobs in job.name:
            record["jobs"].append(compare(job, forks, seconds))
            console.print_json(data=record["jobs"][-1])
            # After every job: what is measured stays measured.
            path.write_text(json.dumps(record, indent=1) + "\n")


def compare(job: Job, forks: list[str], seconds: float) -> dict[str, Any]:
    """Times of a training step on both sides, and how far their results are from each other."""
    torch.manual_seed(0)
    theirs = job.build(imported(job.module, lambda: sys.path.extend(forks), lambda: remove(forks))).cuda()
    finder = StandIn(MODULES)
    ours = job.build(imported(job.module, finder.enter, finder.leave)).cuda()
    assert type(theirs) is not type(ours)
    ours.load_state_dict(theirs.state_dict())
    x, target = job.batch()
    sides = {THEIRS: theirs, OURS: ours}
    result: dict[str, Any] = {"job": job.name}
    result["differences"] = differences(job, sides, x, target)
    steps = {}
    for name, model in sides.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        steps[name] = step_of(job, model, optimizer, x, target)
    times = timed(steps, seconds)
    result["milliseconds"] = times
    result["times_as_fast"] = times[THEIRS] / times[OURS]
    forwards = {name: forward_of(job, model, x) for name, model in sides.items()}
    result["forward_milliseconds"] = timed(forwards, seconds / 3)
    result["kernels_ms"] = {name: kernels(step) for name, step in steps.items()}
    return result


def imported(module: str, enter: Callable[[], None], leave: Callable[[], None]) -> Any:
    """A fresh import of an official module, and of everything of these packages that it brings."""
    forget()
    enter()
    found = __import__(module, fromlist=["_"])
    leave()
    forget()
    return found


def forget() -> None:
    """Drop official modules, so that the next import makes them anew; compiled ones stay."""
    tops = ("mamba_ssm", "causal_conv1d", "models_mamba", "rope", "models", "RevIN")
    for name in list(sys.modules):
        if name.partition(".")[0] in tops:
            del sys.modules[name]


def remove(paths: list[str]) -> None:
    """Off the path of imports."""
    sys.path[:] = [path for path in sys.path if path not in paths]


def forward_of(job: Job, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The forward without gradient."""

    def forward() -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=job.bfloat16):
            return model(x)

    return forward


def step_of(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor
) -> Callable[[], Tensor]:
    """A training step: forward, backward, optimizer."""

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=job.bfloat16):
            loss = job.loss(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def timed(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Milliseconds of a call, medians, by turns."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    while spent < 1000 * seconds * len(calls) or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
            spent += times[name][-1]
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def differences(job: Job, sides: dict[str, nn.Module], x: Tensor, target: Tensor) -> dict[str, Any]:
    """Relative differences of outputs and gradients: in float32, and under autocast each from theirs in float32."""
    exact = {name: results(job, model, x, target, False) for name, model in sides.items()}
    found: dict[str, Any] = {"float32": apart(exact[OURS], exact[THEIRS])}
    if job.bfloat16:
        for name, model in sides.items():
            found[f"{name}, bf16, from float32"] = apart(results(job, model, x, target, True), exact[THEIRS])
    return found


def results(job: Job, model: nn.Module, x: Tensor, target: Tensor, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """Output, and all gradients one after another."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
        y = model(x)
        loss = job.loss(y, target)
    loss.backward()
    grads = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    return y.detach().float(), torch.cat(grads)


def apart(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest difference over the largest entry, of the output and of all gradients."""
    pairs = zip(("output", "gradients"), got, want, strict=True)
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in pairs}


def kernels(step: Callable[[], Any], most: int = 8) -> dict[str, float]:
    """Milliseconds of GPU time of a step's longest kernels, and of all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.events() or ():
        times[event.name[:90]] = times.get(event.name[:90], 0.0) + event.device_time / 1000
    longest = dict(sorted(times.items(), key=lambda item: -item[1])[:most])
    return {"all": sum(times.values()), **longest}


def build_conv(source: Path, keep: Path | None = None) -> None:
    """The fork's causal_conv1d_cuda, what these models use of it: float32 weights, forward and backward along time.

    Args:
        source: Its csrc.
        keep: Where the module goes, if anywhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(source, Path(folder) / "csrc")
        kernels = []
        for name in ("fwd", "bwd"):
            text, instance = (root / f"causal_conv1d_{name}.cu").read_text(), r"(?m)^template void .*;$"
            # One file an instance, so that they compile at the same time.
            for number, found in enumerate(re.findall(instance, text)):
                if not re.search(r"at::Half|, at::BFloat16|channellast", found):
                    kernels.append(root / f"{name}_{number}.cu")
                    kernels[-1].write_text(re.sub(instance, "", text) + found + "\n")
        calls = root / "causal_conv1d.cpp"
        text = calls.read_text()
        for left_out in ("channellast_fwd", "channellast_bwd", "update"):
            call = rf"causal_conv1d_{left_out}_cuda<input_t, weight_t>\(params, stream\);"
            text = re.sub(call, 'TORCH_CHECK(false, "not in this build");', text)
        branch = r"(?s)if \({} == at::ScalarType::{}\).*?\}} else "
        for axis, dtype in (("ITYPE", "Half"), ("WTYPE", "Half"), ("WTYPE", "BFloat16")):
            text = re.sub(branch.format(axis, dtype), "", text, count=1)
        calls.write_text(text)
        sources = [str(path) for path in (calls, *kernels)]
        objects = Path(folder) / "build"
        objects.mkdir()
        module = cpp_extension.load(
            CONV, sources, ["-O1"], FLAGS, extra_include_paths=[str(root)], build_directory=str(objects)
        )
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy2(objects / f"{CONV}.so", keep)
    assert isinstance(module, types.ModuleType)
    sys.modules[CONV] = module


def add_names() -> None:
    """What the sources import from timm and transformers; it does no work in these models."""

    def nothing(*_: Any, **__: Any) -> Any:
        return {}

    names = ("TextStreamer", "GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput")
    add("transformers", {})
    add("transformers.generation", dict.fromkeys(names, object))
    add("transformers.utils", {"WEIGHTS_NAME": "", "CONFIG_NAME": ""})
    add("transformers.utils.hub", {"cached_file": nothing})

    def pair(x: Any) -> Any:
        return x if isinstance(x, tuple) else (x, x)

    def same(function: Any) -> Any:
        return function

    start = {"trunc_normal_": nn.init.trunc_normal_, "lecun_normal_": nn.init.xavier_normal_}
    add("timm", {})
    add("timm.models", {})
    add("timm.models.layers", {**start, "DropPath": nn.Dropout, "to_2tuple": pair})
    add("timm.models.registry", {"register_model": same})
    loaded = {"VisionTransformer": nn.Module, "_cfg": nothing, "_load_weights": nothing}
    add("timm.models.vision_transformer", loaded)


def add(name: str, names: dict[str, Any]) -> None:
    """A module with these names, in the place of one that may or may not be there."""
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(names)


if __name__ == "__main__":
    typer.run(main)
