"""Random calls of the operators, every flag of the signature drawn by a seed, and how results are compared."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT32_OUTPUT, FLOAT32_GRADIENT = 1e-6, 1e-5
FLOAT64 = 1e-12


@dataclass
class Case:
    """Arguments of one call in float64, and the flags that made them."""

    tensors: dict[str, Tensor]
    flags: dict[str, Any] = field(default_factory=dict)
    integers: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh leaves in `dtype`, laid out in memory as they were drawn; constant in time once, not repeated."""
        found = {}
        for name, tensor in self.tensors.items():
            once = tensor[:, :1] if is_constant_in_time(tensor) else tensor
            leaf = torch.empty_strided(once.size(), once.stride(), dtype=dtype)
            found[name] = leaf.copy_(once).requires_grad_()
        return found

    def arguments(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The call's arguments from its leaves."""
        return {
            name: leaf.expand_as(self.tensors[name]) if is_constant_in_time(self.tensors[name]) else leaf
            for name, leaf in leaves.items()
        }


def is_constant_in_time(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dim() > 2 and tensor.stride(1) == 0


def run(
    op: Callable[..., Any], case: Case, dtype: torch.dtype, loss_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of every input under a fixed random loss, its weights rounded to `loss_dtype`."""
    leaves = case.leaves(dtype)
    y, state = op(**case.arguments(leaves), **case.integers, **case.flags, return_final_state=True)
    generator = torch.Generator().manual_seed(1)

    def weights(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(loss_dtype or dtype).to(dtype)

    loss = sum((out * weights(out.shape)).sum() for out in (y, state))
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    outputs = {"y": y.detach(), "final_state": state.detach()}
    return outputs, dict(zip(leaves, grads, strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Each tensor within `tolerance` of the truth, relative to the truth's maximum."""
    for name, truth in want.items():
        value = got[name]
        assert value.shape == truth.shape, f"{what}: {name} has shape {tuple(value.shape)}, not {tuple(truth.shape)}"
        assert torch.isfinite(value).all(), f"{what}: {name} is not finite everywhere"
        if truth.numel():
            scale = truth.abs().max().item()
            if name == "delta_bias":
                # Its gradient is the sum of delta's and may cancel to nothing: one addend is its smallest scale.
                scale = max(scale, want["delta"].abs().max().item() if want["delta"].numel() else 0.0)
            scale = scale or 1.0
            error = (value.double() - truth).abs().max().item() / scale
            assert error <= tolerance, f"{what}: {name} is off by {error:.2e} of its maximum, allowed {tolerance:.0e}"


class _Draw:
    """Random tensors and choices of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values behind other strides."""
        kind = self.rng.choice(["contiguous", "contiguous", "length last", "slice", "padded"])
        if kind == "length last":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "slice":
            return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
        if kind == "padded":
            return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
        return tensor

    def integers(self, layout: str, batch: int, length: int) -> tuple[dict[str, Tensor], int]:
        """A mask or borders, and the number of states."""
        if layout == "packed":
            inner = [self.rng.randint(0, length) for _ in range(self.rng.choice([0, 1, 3, 6]))]
            borders = sorted([0, length, *inner])
            return {"cu_seqlens": torch.tensor(borders, dtype=torch.int32)}, len(borders) - 1
        if layout == "mask":
            share = self.rng.choice([0.0, 0.3, 0.8, 1.0])
            return {"mask": torch.rand(batch, length, generator=self.generator) < share}, batch
        return {}, batch


def scan_case(seed: int) -> Case:
    """A call of `selective_scan`: odd sizes, groups, strides, masks over NaN, packed and empty sequences."""
    draw = _Draw(seed)
    layout = draw.rng.choice(["mask", "packed", "plain", "plain"])
    batch = 1 if layout == "packed" else draw.rng.choice([1, 1, 2, 3])
    length = draw.rng.choice([0, 1, 2, 3, 7, 17, 31, 32, 33, 64, 65, 100, 131])
    groups = draw.rng.choice([1, 1, 2, 3])
    d = groups * draw.rng.choice([1, 2, 3, 5, 8, 11, 16, 17, 24])
    n = draw.rng.choice([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 64])
    softplus = draw.chance(0.6)
    integers, n_states = draw.integers(layout, batch, length)

    projection = (n,) if groups == 1 and draw.chance(0.5) else (groups, n)
    delta = draw.normal(batch, length, d) * draw.rng.choice([0.5, 1.0, 4.0])
    tensors = {
        "u": draw.laid_out(draw.normal(batch, length, d)),
        # Without softplus the step must be positive by itself.
        "delta": draw.laid_out(delta if softplus else delta.abs() * 0.3),
        # Decays from nearly constant to nearly instant.
        "A": -torch.exp(draw.normal(d, n) * 1.5),
    }
    for name in ("B", "C"):
        if draw.chance(0.15):
            tensors[name] = draw.normal(batch, 1, *projection).expand(batch, length, *projection)
        else:
            tensors[name] = draw.laid_out(draw.normal(batch, length, *projection))
    optional = {
        "D": draw.normal(d),
        "z": draw.laid_out(draw.normal(batch, length, d) * 2),
        "delta_bias": draw.normal(d) if softplus else draw.normal(d).abs() * 0.1,
        "initial_state": draw.normal(n_states, d, n),
    }
    tensors |= {name: tensor for name, tensor in optional.items() if draw.chance(0.5)}
    case = Case(tensors, {"delta_softplus": softplus, "reverse": draw.chance(0.4)}, integers)
    if layout == "mask":
        _poison(case, ("u", "delta", "B", "C", "z"))
    return case


def _poison(case: Case, names: tuple[str, ...]) -> None:
    """NaN beneath the mask, in every tensor that has its own memory for each position."""
    absent = ~case.integers["mask"]
    for name in names:
        tensor = case.tensors.get(name)
        if tensor is not None and tensor.shape[1] > 1 and tensor.stride(1) != 0:
            poisoned = tensor.clone(memory_format=torch.preserve_format)
            poisoned[absent] = math.nan
            case.tensors[name] = poisoned


def conv_case(seed: int) -> Case:
    """A call of `causal_conv1d`."""
    draw = _Draw(seed)
    layout = draw.rng.choice(["mask", "packed", "plain", "plain"])
    batch = 1 if layout == "packed" else draw.rng.choice([1, 2, 3])
    length = draw.rng.choice([0, 1, 2, 3, 4, 7, 33, 64, 100])
    d, k = draw.rng.choice([1, 2, 3, 8, 15, 16, 17, 40]), draw.rng.choice([1, 2, 3, 4, 4, 5, 7])
    integers, n_states = draw.integers(layout, batch, length)
    tensors = {"x": draw.laid_out(draw.normal(batch, length, d)), "weight": draw.normal(d, k)}
    optional = {"bias": draw.normal(d), "initial_state": draw.normal(n_states, d, k)}
    tensors |= {name: tensor for name, tensor in optional.items() if draw.chance(0.5)}
    flags = {"activation": draw.rng.choice([None, "silu"]), "reverse": draw.chance(0.4)}
    case = Case(tensors, flags, integers)
    if layout == "mask":
        _poison(case, ("x",))
    return case
