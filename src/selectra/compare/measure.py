"""What a model costs: parameters, FLOPs, activation memory, and measured times of a forward pass and a training step.

FLOPs are counted by `torch.utils.flop_counter`, with the formulas that our operators register beside it (a scan is 9
for each step, channel and state, the field's rule); it counts products and scans, not element-wise work. Times are
medians of calls after a warm-up, on a GPU by its own clock, each call begun before the last one ends. Activation
memory is what a forward pass keeps for its backward, each storage once and weights left out, which is the same on every
device.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from selectra import models as _models
from selectra.compare.energy import Counter
from selectra.compare.flops import count_flops
from selectra.compare.room import require_room
from selectra.compare.sampling import sample
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.precision import Precision, autocast

__all__ = ["Cost", "_models", "build_model", "count_parameters", "flops_unbuilt", "inputs_for", "measure"]

BATCH = 32
# Seconds of calls behind each median, at the least; a GPU makes many in less.
TIMED, TIMED_GPU = 0.3, 0.1
NO_COUNTER = Counter("energy is not asked for", None)
SEED = 0
MIB = 2**20
# What a model raises that looks into its tensors, or has some that are no parameters, where tensors have no values.
NEEDS_VALUES = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException, AssertionError,
    NotImplementedError,
)  # fmt: skip
# The shape of one input, beside the batch, from what the data says.
SHAPES: dict[str, Callable[[Mapping[str, Any]], tuple[int, ...]]] = {
    "series": lambda facts: (facts["seq_len"], facts["n_series"]),
    "language": lambda facts: (facts["seq_len"],),
    "video": lambda facts: (facts.get("in_channels", 3), facts["n_frames"], *_sides(facts["img_size"])),
    **dict.fromkeys(
        ("image", "segmentation", "detection"),
        lambda facts: (facts.get("in_channels", 3), *_sides(facts["img_size"])),
    ),
}
# What the facts must say.
NEEDED = {
    "series": ("seq_len", "n_series"), "language": ("vocab_size", "seq_len"), "video": ("img_size", "n_frames"),
    **dict.fromkeys(("image", "segmentation", "detection"), ("img_size",)),
}  # fmt: skip


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class Cost:
    """What a model costs on a device.

    `flops` is that of a forward pass of one sample; times are in milliseconds and of a whole batch, each a median with
    its interquartile range; memory is in MiB.
    """

    parameters: int
    flops: int
    activations_mb: float
    forward_ms: float
    forward_iqr_ms: float
    step_ms: float
    step_iqr_ms: float
    batch: int
    device: str
    threads: int
    dtype: str = "float32"
    tf32: bool = False
    compiled: bool = False
    layout: str = "images NCHW, all else channels last"

    @property
    def throughput(self) -> float:
        """Samples in a second, forward."""
        return 1e3 * self.batch / self.forward_ms

    def to_json(self) -> dict[str, Any]:
        """As a dictionary, the throughput with it."""
        return {**asdict(self), "throughput": self.throughput}


class OneObjectEach(nn.Module):
    """A detector as a function of one tensor; in training it gives the sum of its losses.

    Args:
        detector: Takes a list of images; every image shows one object, which covers a quarter of it.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        """What was found on every image; in training the losses' sum."""
        if not self.training:
            return self.detector(list(x))
        height, width = x.shape[-2:]
        box = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]], device=x.device)
        mask = torch.zeros(1, height, width, dtype=torch.uint8, device=x.device)
        mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
        target = {"boxes": box, "labels": torch.zeros(1, dtype=torch.long, device=x.device), "masks": mask}
        losses = self.detector(list(x), [target] * len(x))
        return torch.stack(list(losses.values())).sum()


def build_model(spec: Spec, facts: Mapping[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """A freshly seeded model of one tensor; on the device "meta" nothing is allocated."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(SEED)
        model = models.build(spec, dict(facts))
    return OneObjectEach(model) if models.entry(spec.name).kind == "detection" else model


def inputs_for(spec: Spec, facts: Mapping[str, Any], batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Random inputs of the model's kind.

    Raises:
        ConfigError: Inputs of this kind are not known here.
    """
    kind = models.entry(spec.name).kind
    if kind not in SHAPES:
        raise ConfigError(f"'{spec.name}' is for {kind}; what can be measured are models for {', '.join(SHAPES)}.")
    missing = [name for name in NEEDED[kind] if name not in facts]
    if missing:
        raise ConfigError(f"to measure '{spec.name}', the facts must say {', '.join(missing)}.")
    generator = torch.Generator().manual_seed(SEED)
    if kind == "language":
        return torch.randint(facts["vocab_size"], (batch, *SHAPES[kind](facts)), generator=generator).to(device)
    return torch.randn(batch, *SHAPES[kind](facts), generator=generator).to(device)


def count_parameters(spec: Spec, facts: Mapping[str, Any]) -> int:
    """Parameters that are trained, without building them."""
    return sum(each.numel() for each in build_model(spec, facts, "meta").parameters() if each.requires_grad)


def flops_unbuilt(spec: Spec, facts: Mapping[str, Any]) -> int:
    """FLOPs of a forward pass of one sample on a CPU; nothing is allocated or calculated where the model allows that.

    Raises:
        ConfigError: It has to be built, as what it does depends on what it finds, and the memory here is too small.
    """
    inputs = inputs_for(spec, facts, 1)
    model = build_model(spec, facts, "meta").eval()
    try:
        with FakeTensorMode():
            # Of shape and type alone, on a CPU as far as operators see, so that these choose a real pass's kernels.
            model._apply(lambda each: torch.empty(each.shape, dtype=each.dtype, device="cpu"))
            return count_flops(model, torch.empty(inputs.shape, dtype=inputs.dtype))
    except NEEDS_VALUES:
        require_room(spec.name, count_parameters(spec, facts), torch.device("cpu"))
        return count_flops(build_model(spec, facts).eval(), inputs)


def kept_for_backward(model: nn.Module, inputs: Tensor) -> float:
    """MiB that a forward pass keeps for its backward; weights and inputs are left out."""
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), inputs)}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # What is kept must live until the end: a freed address would be counted once for two.
        output = model(inputs)
    del output
    return sum(found.values()) / MIB


def _kept(model: nn.Module, inputs: Tensor, device: torch.device, precision: Precision) -> float:
    with autocast(device, precision):
        return kept_for_backward(model, inputs)


def _timed(call: Callable[[], Any], device: torch.device, seconds: float) -> tuple[float, float]:
    """Milliseconds: the median of calls, and the width of their middle half, 0 where a slow one was made but once."""
    found = sample(call, device, seconds, NO_COUNTER)
    return found.ms, found.upper - found.lower


def measure(
    spec: Spec, facts: Mapping[str, Any], *, device: torch.device | str = "cpu", batch: int = BATCH,
    seconds: float | None = None, precision: Precision = "float32",
) -> Cost:  # fmt: skip
    """Everything that a model costs on a device.

    Args:
        facts: What the data says, such as seq_len, horizon and n_series, or n_classes and img_size.
        seconds: Time behind each median, at the least; by default 0.3 on a CPU and 0.1 on a GPU.
        precision: What products are rounded to in the timed passes.
    """
    device = torch.device(device)
    seconds = seconds or (TIMED_GPU if device.type == "cuda" else TIMED)
    model, inputs = build_model(spec, facts).to(device), inputs_for(spec, facts, batch, device)
    learns = any(each.requires_grad for each in model.parameters())
    model.eval()
    # The same on every device: a GPU runs recurrent layers as one operator, of which no counter knows.
    flops = count_flops(model, inputs[:1]) if device.type == "cpu" else flops_unbuilt(spec, facts)

    def forward() -> None:
        with torch.no_grad(), autocast(device, precision):
            model(inputs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(device, precision):
            found = model(inputs)
            # In training some have an auxiliary head beside the other.
            loss = torch.stack([each.square().mean() for each in (found if isinstance(found, tuple) else (found,))])
        loss.sum().backward()

    forward_ms, forward_iqr = _timed(forward, device, seconds)
    model.train()
    step_ms, step_iqr = _timed(step, device, seconds) if learns else (0.0, 0.0)
    return Cost(
        parameters=sum(each.numel() for each in model.parameters() if each.requires_grad),
        flops=flops,
        activations_mb=_kept(model, inputs, device, precision) if learns else 0.0,
        forward_ms=forward_ms,
        forward_iqr_ms=forward_iqr,
        step_ms=step_ms,
        step_iqr_ms=step_iqr,
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=precision,
        tf32=device.type == "cuda" and bool(torch.backends.cuda.matmul.allow_tf32),
    )
