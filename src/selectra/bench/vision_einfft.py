"""EinFFT's complex products: one batched product against einsums, as in the official code, and against a loop."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.bench.events import Run, Stopwatch, time_in_turn
from selectra.bench.modules import seeded
from selectra.bench.peers import error_of
from selectra.bench.vision_steps import rows_named
from selectra.errors import BackendError
from selectra.mixers import EinFFT
from selectra.ops.spectral import complex_block_product, from_spectrum, to_spectrum

SEED, BATCH, CPU_BATCH = 0, 64, 4
# Tokens and channels of SiMBA-S's stages at 224 px.
SIZES = ((3136, 64), (784, 128), (196, 320), (49, 448))
AT_MOST = 1e-4

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def einsums(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Four real einsums over all blocks, and their sums, as badripatro/simba has it."""
    (a, b), (real, imaginary) = x.unbind(-1), weight

    def product(part: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("...kd,kde->...ke", part, matrix)

    return torch.stack(
        [product(a, real) - product(b, imaginary) + bias[0], product(a, imaginary) + product(b, real) + bias[1]], -1
    )


def loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Block by block, four real products each."""
    blocks = []
    for i in range(weight.shape[1]):
        (a, b), (real, imaginary) = x[..., i, :, :].unbind(-1), weight[:, i]
        parts = (a @ real - b @ imaginary + bias[0, i], a @ imaginary + b @ real + bias[1, i])
        blocks.append(torch.stack(parts, -1))
    return torch.stack(blocks, -3)


PRODUCTS: dict[str, Product] = {"one product": complex_block_product, "einsums": einsums, "loop": loop}


def mixed(mixer: EinFFT, x: Tensor, product: Product) -> Tensor:
    """What the mixer computes, by another form of its products."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = torch.view_as_real(to_spectrum(wide.unflatten(2, (mixer.n_blocks, -1))))
    parts = F.relu(product(parts, mixer.complex_weight_1, mixer.complex_bias_1))
    parts = product(parts, mixer.complex_weight_2, mixer.complex_bias_2).to(wide.dtype)
    spectrum = torch.view_as_complex(F.softshrink(parts, mixer.threshold))
    return from_spectrum(spectrum).flatten(2).to(x.dtype)


def measure(
    into: dict[str, Any], seconds: float, watch: Stopwatch, save: Callable[[], None], only: str | None = None
) -> None:
    """Check all forms against the mixer in float64, then time them at every stage of SiMBA-S."""
    into["gate"] = gate(watch.device)
    batch = BATCH if watch.cuda else CPU_BATCH
    into["batch"], into["rows"] = batch, []
    for tokens, channels in rows_named(only, {str(tokens): (tokens, channels) for tokens, channels in SIZES}):
        with seeded(SEED, watch.device):
            mixer = EinFFT(channels).to(watch.device)
            x = torch.randn(batch, tokens, channels, device=watch.device).requires_grad_()
        # On a CPU low precision is no gain.
        for autocast in (False, True) if watch.cuda else (False,):
            row: dict[str, Any] = {
                "tokens": tokens,
                "channels": channels,
                "dtype": "bf16 autocast" if autocast else "fp32",
            }
            for kind in ("forward", "training"):
                runs = {name: _run(mixer, x, product, kind, autocast) for name, product in PRODUCTS.items()}
                row[kind] = {name: asdict(spread) for name, spread in time_in_turn(runs, seconds, watch).items()}
            into["rows"].append(row)
        save()


def gate(device: torch.device) -> dict[str, float]:
    """The largest error of each form in float32, over the output's and the input's gradient's largest entry.

    Raises:
        BackendError: A form computes something else.
    """
    with seeded(SEED, device):
        mixer = EinFFT(24).to(device)
        # Weights at which the soft threshold lets something through.
        for weight in mixer.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        x = torch.randn(2, 35, 24, device=device)
    exact = EinFFT(24).double()
    exact.load_state_dict(mixer.double().cpu().state_dict())
    truth = _results(exact, x.double().cpu())
    mixer = mixer.float().to(device)
    found = {}
    for name, product in PRODUCTS.items():
        got = _results(lambda x, product=product: mixed(mixer, x, product), x)
        found[name] = max(error_of(a, b).largest for a, b in zip(got, truth, strict=True))
        if not found[name] <= AT_MOST:
            raise BackendError(f"EinFFT by '{name}' is wrong, nothing is timed: off by {found[name]:.1e}.")
    return found


def _results(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y))[0]


def _run(mixer: EinFFT, x: Tensor, product: Product, kind: str, autocast: bool) -> Run:
    leaves = [x, *mixer.parameters()]

    def run(_: int) -> object:
        with (
            torch.set_grad_enabled(kind == "training"),
            torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
        ):
            y = mixed(mixer, x, product)
        return torch.autograd.grad(y, leaves, torch.ones_like(y)) if kind == "training" else y

    return run
