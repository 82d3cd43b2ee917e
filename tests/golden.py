"""Stored outputs and gradients of official implementations, and how ours are held to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from selectra.official import Official, from_official

# Of a module and its inputs.
Also = Callable[[Official, list[Tensor]], dict[str, Tensor]]
PRECISIONS = [torch.float32, torch.float64]


class Golden(NamedTuple):
    """One stored instance, and how its tensors are compared in one precision."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: torch.dtype

    @classmethod
    def read(cls, folder: Path, name: str, dtype: torch.dtype) -> "Golden":
        about = json.loads((folder / f"{name}.json").read_text())
        return cls(about, load_file(folder / f"{name}.safetensors"), dtype)

    def module(self) -> Official:
        state = {
            k.removeprefix("state."): _cast(v, self.dtype) for k, v in self.tensors.items() if k.startswith("state.")
        }
        return from_official(self.about["source"], self.about["config"], state)

    def inputs(self) -> list[Tensor]:
        return [_cast(self.tensors[f"in.{name}"], self.dtype) for name in self.about["inputs"]]

    def check(self, kind: str, name: str, got: Tensor | None, slack: float = 1) -> None:
        assert got is not None and got.dtype == self.dtype
        if self.dtype == torch.float64:
            expected, tolerance = self.tensors[f"{kind}64.{name}"], 1e-9
        else:
            expected = self.tensors[f"{kind}.{name}"]
            tolerance = self.about["tolerance"]["per_tensor_relative_to_max"][f"{kind}.{name}"]
        assert got.shape == expected.shape
        error = (got.detach().cpu() - expected).abs().max() / expected.abs().max()
        assert error <= slack * tolerance, f"{kind}.{name}: {error:.1e}"

    def check_all(self, also: Also | None = None, device: str = "cpu", slack: float = 1) -> None:
        """Outputs and every stored gradient.

        Args:
            also: Gives further outputs, of which the stored loss has a part too.
            device: Where to compute.
            slack: Times the tolerance.
        """
        module = self.module().to(device)
        inputs = [x.to(device).requires_grad_(x.is_floating_point()) for x in self.inputs()]
        outputs = module(*inputs)
        assert isinstance(outputs, tuple) and len(outputs) == len(self.about["primary"])
        loss = torch.zeros((), dtype=self.dtype, device=device)
        named = dict(zip(self.about["primary"], outputs, strict=True))
        named |= also(module, inputs) if also is not None else {}
        assert {f"lossw.{name}" for name in named} == {key for key in self.tensors if key.startswith("lossw.")}
        for name, output in named.items():
            self.check("out", name, output, slack)
            loss = loss + (output * self.tensors[f"lossw.{name}"].to(device, self.dtype)).sum()
        loss.backward()
        parameters = dict(module.model.named_parameters())
        gradients = {f"in.{name}": x.grad for name, x in zip(self.about["inputs"], inputs, strict=True)}
        for name in self.about["grads"]:
            if name not in gradients:
                official = self.tensors[f"grad.{name}"]
                ((ours, reshaped),) = module.rename({name: official}).items()
                grad = parameters[ours].grad
                assert grad is not None and grad.shape == reshaped.shape
                gradients[name] = grad.reshape(official.shape)
            self.check("grad", name, gradients[name], slack)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in the precision; counts and orders as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
