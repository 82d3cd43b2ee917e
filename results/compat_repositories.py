"""Official repositories under selectra.compat on a CPU: build, forward, backward, 20 training steps, stored outputs.

    python results/compat_repositories.py --folders REPOSITORIES --golden GOLDEN --out results

REPOSITORIES holds checkouts by the names in `TRIALS` below. Each model is built and run in a process of its own by
`python -m selectra.compat run`; nothing of a repository's source is changed. What a repository needs besides is
installed by hand, and stands in its row.
"""

import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import selectra.compat

STEPS = 20
# Of what a float32 run may differ where a fixture names no tolerance of its own.
TOLERANCE = 1e-5
WATCHED = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")
console = Console(width=140)

Outputs = Callable[[nn.Module, list[Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Trial:
    """One official class at a small size."""

    repository: str
    """Folder of the checkout."""
    cls: str
    """The class, as the record names it."""
    build: Callable[[Path, dict[str, Any]], nn.Module]
    """From the checkout and the constructor's configuration."""
    config: dict[str, Any]
    batch: Callable[[], tuple[list[Tensor], Tensor]]
    """Inputs and target."""
    loss: Callable[[Tensor, Tensor], Tensor]
    needed: tuple[str, ...] = ()
    """Packages or settings of the repository's own, besides torch."""
    golden: str = ""
    """Fixtures' names begin so."""
    outputs: Outputs | None = None
    """The outputs that fixtures hold, by name; the model's own under the primary name otherwise."""


def at(folder: Path, path: str, module: str) -> Any:
    """Import a module with a folder of the checkout on the path, as the repository's scripts have it."""
    sys.path.insert(0, str(folder / path))
    return importlib.import_module(module)


def by_file(folder: Path, path: str) -> Any:
    """Import one file."""
    spec = importlib.util.spec_from_file_location("official", folder / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["official"] = module
    spec.loader.exec_module(module)
    return module


def images(*shape: int, classes: int) -> Callable[[], tuple[list[Tensor], Tensor]]:
    """Random images and classes."""
    return lambda: ([torch.randn(*shape)], torch.randint(classes, (shape[0],)))


def series(horizon: int, count: int = 7, stamps: bool = False) -> Callable[[], tuple[list[Tensor], Tensor]]:
    """Noisy waves, 96 steps in."""

    def make() -> tuple[list[Tensor], Tensor]:
        t = torch.arange(96 + horizon)[None, :, None] + 24 * torch.rand(4, 1, count)
        x = torch.sin(t * 2 * torch.pi / 24) + 0.1 * torch.randn(4, 96 + horizon, count)
        past = [x[:, :96]]
        return [*past, torch.randn(4, 96, 4)] if stamps else past, x[:, 96:]

    return make


def vim_outputs(model: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Vim's features and logits."""
    features = model.forward_features(inputs[0])
    return {"features": features, "logits": model.head(features)}


def forecaster(name: str) -> Callable[[Path, dict[str, Any]], nn.Module]:
    """A forecaster that takes (x, marks, decoder input, decoder marks)."""

    def build(folder: Path, config: dict[str, Any]) -> nn.Module:
        inner = at(folder, ".", name).Model(SimpleNamespace(**config))

        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, marks: Tensor) -> Tensor:
                found = self.inner(x, marks, None, None)
                return found[0] if isinstance(found, tuple) else found

        return Whole()

    return build


def vmamba(cls: str) -> Callable[[Path, dict[str, Any]], nn.Module]:
    """A class of VMamba; its cross-scan enters the CUDA device of a CPU tensor, which this makes nothing of."""

    def build(folder: Path, config: dict[str, Any]) -> nn.Module:
        if not torch.cuda.is_available():
            torch.cuda.device = lambda _: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
        return getattr(at(folder, "classification/models", "vmamba"), cls)(**config)

    return build


def stages(model: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """A backbone's maps."""
    return {f"stage{i}": y for i, y in enumerate(model(*inputs))}


TIMM = "timm 1.0.31"
VMAMBA_NEEDS = (TIMM, "fvcore, iopath, yacs, portalocker", "on a CPU: torch.cuda.device of a CPU tensor made a no-op")
VIM = {
    "img_size": 32, "patch_size": 8, "stride": 8, "depth": 4, "embed_dim": 48, "num_classes": 5, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "final_pool_type": "mean", "bimamba_type": "v2",
    "if_cls_token": True, "if_divide_out": True, "use_middle_cls_token": True,
}  # fmt: skip
VMAMBA = {
    "depths": [1, 2], "dims": [24, 48], "num_classes": 5, "forward_type": "v05_noz", "norm_layer": "ln2d",
    "ssm_d_state": 1, "downsample_version": "v3", "patchembed_version": "v2",
}  # fmt: skip
VIDEO = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_classes": 5}
TIMEMACHINE = {
    "seq_len": 96, "pred_len": 96, "enc_in": 7, "dropout": 0.1, "revin": 1, "residual": 1, "ch_ind": 0, "n1": 48,
    "n2": 24, "d_state": 16, "dconv": 2, "e_fact": 1,
}  # fmt: skip
S_MAMBA = {
    "seq_len": 96, "pred_len": 24, "output_attention": False, "use_norm": True, "d_model": 32, "embed": "timeF",
    "freq": "h", "dropout": 0.1, "class_strategy": "projection", "d_state": 8, "d_ff": 32, "e_layers": 2,
    "activation": "gelu", "factor": 1, "n_heads": 2,
}  # fmt: skip
TSLIB = {
    "task_name": "long_term_forecast", "pred_len": 24, "d_model": 16, "expand": 2, "d_ff": 16, "d_conv": 4,
    "enc_in": 7, "c_out": 7, "embed": "timeF", "freq": "h", "dropout": 0.1,
}  # fmt: skip
VISION = {
    "dim": 16, "in_dim": 16, "depths": [1, 1, 2, 2], "window_size": [8, 8, 4, 4], "mlp_ratio": 4,
    "num_heads": [2, 2, 4, 4], "drop_path_rate": 0.0, "num_classes": 5, "resolution": 64,
}  # fmt: skip
RESTORE = {"img_size": 16, "embed_dim": 60, "depths": (1, 1), "d_state": 8, "upscale": 2}
SEGMENT = {"in_chans": 1, "out_chans": 2, "depths": [1, 1, 1, 1], "hidden_size": 96}

TRIALS = (
    Trial("Vim", "VisionMamba", lambda f, c: at(f, "vim", "models_mamba").VisionMamba(**c), VIM,
          images(4, 3, 32, 32, classes=5), F.cross_entropy, (TIMM,), "vim_v2", vim_outputs),
    Trial("VMamba", "VSSM", vmamba("VSSM"), VMAMBA, images(4, 3, 32, 32, classes=5), F.cross_entropy, VMAMBA_NEEDS,
          "vmamba_v"),
    Trial("VMamba", "Backbone_VSSM", vmamba("Backbone_VSSM"), {**VMAMBA, "out_indices": [0, 1]},
          lambda: ([torch.randn(2, 3, 32, 32)], torch.zeros(())), lambda y, _: y[-1].square().mean(), VMAMBA_NEEDS,
          "vmamba_backbone", stages),
    Trial("VideoMamba", "VisionMamba (image)",
          lambda f, c: by_file(f, "videomamba/image_sm/models/videomamba.py").VisionMamba(**c), VIDEO,
          images(4, 3, 32, 32, classes=5), F.cross_entropy, (TIMM,), "videomamba_image"),
    Trial("VideoMamba", "VisionMamba (video)",
          lambda f, c: by_file(f, "videomamba/video_sm/models/videomamba.py").VisionMamba(**c),
          {**VIDEO, "num_frames": 3}, images(4, 3, 3, 32, 32, classes=5), F.cross_entropy, (TIMM,),
          "videomamba_video"),
    Trial("TimeMachine", "Model",
          lambda f, c: at(f, "TimeMachine_supervised", "models.TimeMachine").Model(SimpleNamespace(**c)), TIMEMACHINE,
          series(96), F.mse_loss, (), "timemachine"),
    Trial("S-D-Mamba", "S_Mamba.Model", forecaster("model.S_Mamba"), S_MAMBA, series(24, stamps=True), F.mse_loss,
          ("reformer_pytorch 1.4.4 and what it imports, for a layer that S_Mamba does not use",)),
    Trial("Time-Series-Library", "Mamba.Model", forecaster("models.Mamba"), TSLIB, series(24, stamps=True), F.mse_loss),
    Trial("MambaVision", "MambaVision",
          lambda f, c: at(f, ".", "mambavision.models.mamba_vision").MambaVision(**c), VISION,
          images(4, 3, 64, 64, classes=5), F.cross_entropy, (TIMM,)),
    Trial("MambaIR", "MambaIR",
          lambda f, c: at(f, ".", "basicsr.archs.mambair_arch").MambaIR(upsampler="pixelshuffledirect", **c), RESTORE,
          lambda: ([torch.rand(1, 3, 16, 16)], torch.rand(1, 3, 32, 32)), F.l1_loss,
          (TIMM, "opencv-python-headless, lmdb, addict, as its package imports them")),
    Trial("SegMamba", "SegMamba", lambda f, c: at(f, ".", "model_segmamba.segmamba").SegMamba(**c), SEGMENT,
          lambda: ([torch.randn(1, 1, 32, 32, 32)], torch.randint(2, (1, 32, 32, 32))), F.cross_entropy),
)  # fmt: skip


def main(
    folders: Annotated[Path, typer.Option(help="Folder of the checkouts.")],
    golden: Annotated[Path | None, typer.Option(help="Folder of the stored outputs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the record.")] = None,
    only: Annotated[int | None, typer.Option(help="Run one trial in this process, and print its result.")] = None,
    commits: Annotated[Path | None, typer.Option(help="JSON of each checkout's commit, where it has no .git.")] = None,
) -> None:
    """Run all trials, each in its own process, and write the record."""
    if only is not None:
        sys.stdout.write("\n" + json.dumps(run(TRIALS[only], folders, golden)) + "\n")
        return
    known = json.loads(commits.read_text()) if commits else {}
    rows = []
    for number, trial in enumerate(TRIALS):
        row = {"repository": trial.repository, "class": trial.cls, "commit": known.get(trial.repository)}
        row |= {"needed": list(trial.needed), **apart(number, folders, golden)}
        rows.append(row)
        console.print_json(data=row)
    hardware = f"{torch.get_num_threads()} thread of {cpu_name()}"
    record = {
        "command": "python results/compat_repositories.py --folders REPOSITORIES --golden GOLDEN --out results",
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "einops", "numpy")},
        "steps": STEPS,
        "rows": rows,
    }
    if out is not None:
        name = re.sub(r"\W+", "_", cpu_name().lower()).strip("_")
        (out / f"compat_cpu_{name}_{record['date']}.json").write_text(json.dumps(record, indent=1) + "\n")


def apart(number: int, folders: Path, golden: Path | None) -> dict[str, Any]:
    """One trial in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "selectra.compat",
        "run",
        __file__,
        "--folders",
        str(folders),
        "--only",
        f"{number}",
    ]
    command += ["--golden", str(golden)] if golden else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(trial: Trial, folders: Path, golden: Path | None) -> dict[str, Any]:
    """Build, train, compare."""
    warnings.simplefilter("ignore")
    selectra.compat.install()
    folder = (folders / trial.repository).resolve()
    torch.manual_seed(0)
    start = time.perf_counter()
    model = trial.build(folder, trial.config)
    imported = sorted(name for name in sys.modules if name.startswith(WATCHED))
    found: dict[str, Any] = {"stand_ins_imported": imported, "build_seconds": time.perf_counter() - start}
    inputs, target = trial.batch()
    losses, times = train(trial, model, inputs, target)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    found |= {
        "forward": bool(torch.isfinite(torch.tensor(losses)).all()),
        "backward": bool(grads) and all(bool(g.isfinite().all()) for g in grads),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "step_seconds": sorted(times)[len(times) // 2],
    }
    if golden is not None and trial.golden:
        names = sorted(path.stem for path in golden.glob(f"{trial.golden}*.json"))
        found["golden"] = {name: against(trial, folder, golden / name) for name in names}
    return found


def train(trial: Trial, model: nn.Module, inputs: list[Tensor], target: Tensor) -> tuple[list[float], list[float]]:
    """Losses before every step and after the last, and seconds of each step, on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, times = [], []
    model.train()
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = trial.loss(model(*inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    with torch.no_grad():
        losses.append(trial.loss(model(*inputs), target).item())
    return losses, times


def against(trial: Trial, folder: Path, fixture: Path) -> dict[str, Any]:
    """Largest differences from a stored run of the official code, relative to each tensor's largest entry.

    Returns:
        The worst of outputs and of gradients, and whether each lies within the fixture's tolerance.
    """
    facts = json.loads(fixture.with_suffix(".json").read_text())
    stored = load_file(fixture.with_suffix(".safetensors"))
    model = trial.build(folder, facts["config"]).eval()
    state = {key.removeprefix("state."): value for key, value in stored.items() if key.startswith("state.")}
    model.load_state_dict(state)
    inputs = [stored[f"in.{name}"].clone().requires_grad_() for name in facts["inputs"]]
    outputs = trial.outputs(model, inputs) if trial.outputs else {facts["primary"][0]: model(*inputs)}
    limits = facts["tolerance"]["per_tensor_relative_to_max"]
    errors = {f"out.{name}": relative(y, stored[f"out.{name}"]) for name, y in outputs.items()}
    weights = {name.removeprefix("lossw.") for name in stored if name.startswith("lossw.")}
    if weights <= set(outputs):
        sum((outputs[name] * stored[f"lossw.{name}"]).sum() for name in weights).backward()  # pyright: ignore[reportAttributeAccessIssue]
        named = dict(model.named_parameters())
        named |= {f"in.{name}": x for name, x in zip(facts["inputs"], inputs, strict=True)}
        for key in stored:
            name = key.removeprefix("grad.")
            if name != key and name in named:
                grad = named[name].grad
                assert grad is not None, f"{name} has no gradient"
                errors[key] = relative(grad, stored[key])
    return {
        "output_error": max(e for name, e in errors.items() if name.startswith("out.")),
        "gradient_error": max((e for name, e in errors.items() if name.startswith("grad.")), default=None),
        "tensors": len(errors),
        "within_tolerance": all(e <= limits.get(name, TOLERANCE) for name, e in errors.items()),
    }


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((got.detach() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def cpu_name() -> str:
    """The processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
