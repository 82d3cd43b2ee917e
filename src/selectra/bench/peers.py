"""Other people's kernels at the level of their C++ calls, beside ours in one process: mamba_ssm, VMamba, attention.

What their callers pay besides the kernels (transposes, autograd, Python) is left out, and every contender has its
inputs in the layout that it wants. `results/build_peers.py` builds the two scans; an installed mamba_ssm serves too.
"""

import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectra.bench.calls import Arguments, Prepared, results
from selectra.errors import BackendError, ConfigError

Prepare = Callable[[Arguments], Prepared]

MAMBA_SSM, VMAMBA = "selective_scan_cuda", "selective_scan_cuda_oflex"
HEAD_SIZE = 64
ATTENTION_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# In the order in which both packages return gradients.
_PARAMETERS = ("A", "D", "delta_bias")
_GRADIENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")


def mamba_ssm_scan() -> Prepare | None:
    """mamba_ssm's CUDA kernels, or None where they are not installed.

    Raises:
        BackendError: They are there and cannot be loaded.
    """
    kernels = _module(MAMBA_SSM)
    return None if kernels is None else lambda arguments: MambaSSM(kernels, arguments)


def vmamba_scan() -> Prepare | None:
    """VMamba's CUDA kernels, or None where they are not installed. They take no gate.

    Raises:
        BackendError: They are there and cannot be loaded.
    """
    kernels = _module(VMAMBA)
    return None if kernels is None else lambda arguments: VMamba(kernels, arguments)


def versions() -> dict[str, dict[str, str]]:
    """Of each peer that is installed: version, and for one built from source also checksum, compiler and changes."""
    found: dict[str, dict[str, str]] = {}
    for name, package in ((MAMBA_SSM, "mamba_ssm"), (VMAMBA, "VMamba"), ("causal_conv1d_cuda", "causal_conv1d")):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        facts = Path(spec.origin).with_name(f"{name}.json")
        if facts.is_file():
            found[package] = json.loads(facts.read_text())
        else:
            try:
                found[package] = {"version": importlib.metadata.version(package)}
            except importlib.metadata.PackageNotFoundError:
                found[package] = {"version": "unknown"}
    return found


def _module(name: str) -> ModuleType | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"{name} is installed and cannot be loaded ({error}); build it anew for PyTorch {torch.__version__} with "
            "results/build_peers.py, or take it off the path."
        ) from error


class _ChannelsFirst:
    """The inputs of one call as both packages want them: (b, d, l), (b, g, n, l), float32 parameters."""

    def __init__(self, kernels: ModuleType, arguments: Arguments) -> None:
        self._kernels = kernels
        self._own = {name: None if x is None else _own(name, x.detach()) for name, x in arguments.items()}
        self._grouped = arguments["B"] is not None and arguments["B"].dim() == 4
        self._taken = tuple(self._own[name] for name in ("u", "delta", "A", "B", "C", "D"))

    def own(self, dy: Float[Tensor, "b l d"]) -> Float[Tensor, "b d l"]:
        """A gradient of y in the packages' layout."""
        return rearrange(dy, "b l d -> b d l").contiguous()

    def gradients(self, grads: list[Tensor | None]) -> dict[str, Tensor]:
        """By name, channels last again."""
        found: dict[str, Tensor] = {}
        for name, grad in zip(_GRADIENTS, grads, strict=False):
            if grad is None or self._own.get(name) is None:
                continue
            if name in ("B", "C"):
                found[name] = rearrange(grad, "b g n l -> b l g n" if self._grouped else "b 1 n l -> b l n")
            else:
                found[name] = grad if name in _PARAMETERS else rearrange(grad, "b d l -> b l d")
        return found


class MambaSSM(_ChannelsFirst):
    """mamba_ssm's `selective_scan_cuda.fwd` and `.bwd`, called as its autograd function calls them."""

    def forward(self) -> list[Tensor]:
        """y before the gate, the states at every 2048th position, and the gated y: always ready for a backward."""
        return self._kernels.fwd(*self._taken, self._own["z"], self._own["delta_bias"], True)

    def backward(self, outputs: list[Tensor], dy: Float[Tensor, "b d l"]) -> list[Tensor | None]:
        """Gradients in the package's order."""
        out, states = outputs[:2]
        z = self._own["z"]
        # No place for dz that the caller brings, and no gated y once more: as in training.
        return self._kernels.bwd(
            *self._taken, z, self._own["delta_bias"], dy, states, None if z is None else out, None, True, False
        )

    def y(self, outputs: list[Tensor]) -> Float[Tensor, "b l d"]:
        """Channels last."""
        return rearrange(outputs[0] if self._own["z"] is None else outputs[2], "b d l -> b l d")


class VMamba(_ChannelsFirst):
    """VMamba's `selective_scan_cuda_oflex.fwd` and `.bwd`, with outputs in the inputs' type.

    Raises:
        ConfigError: The call has a gate.
    """

    def __init__(self, kernels: ModuleType, arguments: Arguments) -> None:
        if arguments.get("z") is not None:
            raise ConfigError("VMamba's kernels take no gate z; compare them on a case without one.")
        super().__init__(kernels, arguments)

    def forward(self) -> list[Tensor]:
        """y and the states at every 2048th position."""
        # One row of channels in a block, which is all that the package still has; y not widened to float32.
        return self._kernels.fwd(*self._taken, self._own["delta_bias"], True, 1, False)

    def backward(self, outputs: list[Tensor], dy: Float[Tensor, "b d l"]) -> list[Tensor | None]:
        """Gradients in the package's order."""
        return self._kernels.bwd(*self._taken, self._own["delta_bias"], dy, outputs[1], True, 1)

    def y(self, outputs: list[Tensor]) -> Float[Tensor, "b l d"]:
        """Channels last."""
        return rearrange(outputs[0], "b d l -> b l d")


def _own(name: str, x: Tensor) -> Tensor:
    """One input in the packages' layout, contiguous as they ask for."""
    if name in ("B", "C"):
        return rearrange(x, "b l g n -> b g n l" if x.dim() == 4 else "b l n -> b 1 n l").contiguous()
    return x.float().contiguous() if name in _PARAMETERS else rearrange(x, "b l d -> b d l").contiguous()


class Error(NamedTuple):
    """How far a tensor is from the truth."""

    largest: float
    """Largest difference over the largest entry."""
    rms: float
    """Root of the mean squared difference over that of the truth: 16-bit results of one accuracy differ less in it."""


def precision(
    contenders: Mapping[str, Prepare],
    arguments: Arguments,
    dy: Float[Tensor, "b l d"],
    truth: Mapping[str, Tensor],
) -> dict[str, dict[str, Error]]:
    """Errors of y and of every gradient, each contender's beside the others', on the same inputs.

    Args:
        arguments: Inputs, already rounded to the type of the measurement.
        truth: y, du, ddelta, ... in float64, from the same rounded inputs.

    Returns:
        For "y", "du", ... the error of each contender.
    """
    found: dict[str, dict[str, Error]] = {name: {} for name in truth}
    for contender, prepare in contenders.items():
        got = results(prepare(arguments), dy)
        for name, want in truth.items():
            found[name][contender] = error_of(got[name], want)
    return found


def error_of(got: Tensor, want: Tensor) -> Error:
    """The error of one tensor, computed in float64 where the truth lies."""
    want = want.double()
    difference = got.to(want.device).double() - want
    largest = difference.abs().max() / want.abs().max().clamp_min(1e-30)
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)
    return Error(largest.item(), rms.item())


class Attention:
    """PyTorch's attention of one layer: q, k and v (b, heads, l, 64), views of (b, l, heads, 64) as a layer has them.

    Between projections only, as the scans are timed: a layer of width d against two scans of inner width 2 d, which
    have about as many parameters around them.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, kernel: SDPBackend) -> None:
        self.qkv, self._causal, self._kernel = (q, k, v), causal, kernel

    def forward(self) -> Float[Tensor, "b heads l 64"]:
        """The output, with what the backward needs behind it."""
        with sdpa_kernel(self._kernel):
            return F.scaled_dot_product_attention(*self.qkv, is_causal=self._causal)

    def backward(self, outputs: Tensor, dy: Float[Tensor, "b heads l 64"]) -> tuple[Tensor, ...]:
        """Gradients of q, k and v; may be called again with the same outputs."""
        return torch.autograd.grad(outputs, self.qkv, dy, retain_graph=True)

    def own(self, dy: Float[Tensor, "b l d"]) -> Float[Tensor, "b heads l 64"]:
        """A gradient of the layer's output as a view by heads."""
        return rearrange(dy, "b l (heads c) -> b heads l c", c=HEAD_SIZE)


def sdpa(
    batch: int,
    length: int,
    d_model: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    causal: bool = True,
    kernel: str = "flash",
    seed: int = 0,
) -> Attention:
    """An attention layer's kernel on random inputs, heads of 64.

    Args:
        causal: Each position sees those before it, as a scan does.
        kernel: "flash", FlashAttention as PyTorch brings it, or "cudnn".

    Raises:
        ConfigError: The width is no multiple of 64, or the kernel has no such name.
        BackendError: PyTorch cannot run that kernel on these inputs.
    """
    if d_model % HEAD_SIZE:
        raise ConfigError(f"attention with heads of {HEAD_SIZE} needs a width that {HEAD_SIZE} divides, got {d_model}.")
    if kernel not in ATTENTION_KERNELS:
        raise ConfigError(f"there is no attention kernel '{kernel}'; there are {', '.join(ATTENTION_KERNELS)}.")
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, length, d_model // HEAD_SIZE, HEAD_SIZE)

    def random() -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        return x.transpose(1, 2).requires_grad_()

    attention = Attention(random(), random(), random(), causal, ATTENTION_KERNELS[kernel])
    try:
        attention.forward()
    except RuntimeError as error:
        raise BackendError(f"PyTorch cannot run its {kernel} attention on {device} in {dtype}: {error}") from error
    return attention


def check_sdpa(kernel: str, dtype: torch.dtype, device: torch.device, causal: bool = True) -> dict[str, Error]:
    """Errors of attention's output and gradients against float64, on a small odd length."""
    attention = sdpa(2, 71, 2 * HEAD_SIZE, dtype, device, causal=causal, kernel=kernel)
    y = attention.forward()
    dy = torch.randn(y.shape, generator=torch.Generator(device).manual_seed(1), dtype=dtype, device=device)
    got: tuple[Any, ...] = (y, *attention.backward(y, dy))
    q, k, v = (x.detach().double().requires_grad_() for x in attention.qkv)
    exact = Attention(q, k, v, causal, SDPBackend.MATH)
    want = exact.forward()
    truth = (want, *exact.backward(want, dy.double()))
    return {name: error_of(a, b) for name, a, b in zip(("y", "dq", "dk", "dv"), got, truth, strict=True)}
