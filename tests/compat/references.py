"""What the stand-ins must compute, written down by call as plain loops in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[..., Any]


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """mamba_ssm's scan on (b, d, l): y before the gate, y after it, the last state."""
    batch, d, length = u.shape

    def by_channel(x: Tensor) -> Tensor:
        """B or C for every channel and position, (b, d, n, l)."""
        if x.dim() == 2:
            return x[None, :, :, None].expand(batch, -1, -1, length)
        x = x[:, None] if x.dim() == 3 else x
        return torch.stack([x[:, channel // (d // x.shape[1])] for channel in range(d)], 1)

    B, C = by_channel(B), by_channel(C)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    state, ys = u.new_zeros(batch, d, A.shape[1]), []
    for t in range(length):
        step = dt[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        ys.append((state * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return y, y if z is None else y * F.silu(z), state


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    silu: bool = True,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """causal_conv1d's convolution on (b, d, l), position by position."""
    batch, d, length = x.shape
    k = weight.shape[1]
    past = x.new_zeros(batch, d, k - 1) if before is None else before
    rows = []
    for b in range(batch):
        ys = []
        for t in range(length):
            total = x.new_zeros(d) if bias is None else bias
            for j in range(k):
                at = t - k + 1 + j
                if seq_idx is not None and (seq_idx[b, t] < 0 or at < 0 or seq_idx[b, at] != seq_idx[b, t]):
                    continue
                total = total + weight[:, j] * (x[b, :, at] if at >= 0 else past[b, :, at])
            y = F.silu(total) if silu else total
            ys.append(torch.zeros_like(y) if seq_idx is not None and seq_idx[b, t] < 0 else y)
        rows.append(torch.stack(ys, -1))
    return torch.stack(rows)


def inner(
    xz: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    delta_proj: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    softplus: bool = True,
) -> Tensor:
    """What follows Mamba's input projection, without the output projection, (b, d, l)."""
    x, z = xz.chunk(2, 1)
    u = convolve(x, conv[:, 0], conv_bias)
    low = torch.einsum("rd,bdl->brl", x_proj, u)
    rank, n = delta_proj.shape[1], A.shape[1]
    delta = torch.einsum("dr,brl->bdl", delta_proj, low[:, :rank])
    if B is None:
        B = low[:, rank : rank + n]
        B = B if B_bias is None else B + B_bias[:, None]
    if C is None:
        C = low[:, -n:]
        C = C if C_bias is None else C + C_bias[:, None]
    return scan(u, delta, A, B, C, D, z, delta_bias, softplus)[1]


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None, idx: Tensor | None) -> Any:
    """Mamba-2's recurrence on (b, l, h, p): y and the last state."""
    batch, length, heads, p = x.shape
    each = heads // B.shape[2]
    state = x.new_zeros(batch, heads, p, B.shape[3]) if first is None else first
    ys = []
    for t in range(length):
        if idx is not None and t:
            state = state * (idx[:, t] == idx[:, t - 1])[:, None, None, None]
        b, c = (torch.stack([m[:, t, head // each] for head in range(heads)], 1) for m in (B, C))
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, :, None]
        ys.append((state * c[:, :, None]).sum(-1))
    return torch.stack(ys, 1), state


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Layer or root mean square normalisation of the last axis."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def assert_same(got: Call, want: Call, inputs: Mapping[str, Tensor | None], tolerance: float = 1e-10) -> None:
    """Outputs, and gradients of a fixed random loss with respect to every input, in float64."""
    found = [_run(call, inputs) for call in (got, want)]
    for (name, a), b in zip(found[0].items(), found[1].values(), strict=True):
        assert a.shape == b.shape, name
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6), name


def _run(call: Call, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([(y * random(*y.shape, seed=7 + i)).sum() for i, y in enumerate(outputs)]).sum()
    named = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}
