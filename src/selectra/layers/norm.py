"""Norms of the residual stream."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.ops import add_norm


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, over the last dimension by `add_norm`'s kernels on a GPU, over several as one.

    PyTorch's own kernels give each row a block of threads, which is slow for many short rows, as images have them;
    compiled programs fuse theirs with what stands around them, and keep it. Types are PyTorch's, under autocast too.

    Over several dimensions PyTorch is given rows of one: on a GPU its backward counts the columns of more than 65,536
    rows by the last dimension alone, writes beside its memory and fails (pytorch/pytorch#193016).
    """

    def forward(self, input: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normalised rows."""
        if len(self.normalized_shape) > 1:
            return self._as_rows(input)
        if not (input.is_cuda and self._is_for_kernels(input)):
            return super().forward(input)
        wide = input.float() if torch.is_autocast_enabled("cuda") else input
        return add_norm(wide, None, self.weight, self.bias, self.eps, kind="layer", residual_dtype=wide.dtype)[0]

    def _as_rows(self, x: Tensor) -> Tensor:
        """The norm over several dimensions; one of another shape is for PyTorch to refuse."""
        n = len(self.normalized_shape)
        if x.shape[-n:] != self.normalized_shape:
            return super().forward(x)
        rows = x.flatten(-n)
        # Rounded weights beside a float32 input are refused on a CPU.
        weight, bias = (
            None if p is None else p.flatten().to(torch.promote_types(p.dtype, x.dtype))
            for p in (self.weight, self.bias)
        )
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, self.eps).view(x.shape)

    def _is_for_kernels(self, x: Tensor) -> bool:
        """Whether a plain call, and at most a plain backward pass, is asked for, of what kernels take."""
        return (
            self.bias is not None
            and x.shape[-1:] == self.weight.shape
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not torch.compiler.is_compiling()
            # A recorded program cannot hold a function of Python.
            and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
            and _functorch.maybe_current_level() is None
            and forward_ad._current_level < 0
        )


class AddNorm(nn.Module):
    """Add to the residual stream and normalise the sum.

    Args:
        d_model: Width of the stream.
        eps: Added to the mean of squares.
        kind: "rms", which has a scale, or "layer", which has a bias too.
        residual_in_fp32: Whether the stream is float32 whatever the type of what is added; float64 stays float64.
    """

    def __init__(
        self, d_model: int, eps: float = 1e-5, kind: Literal["rms", "layer"] = "rms", residual_in_fp32: bool = True
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ConfigError(f"d_model={d_model}: needs at least 1")
        if kind not in ("rms", "layer"):
            raise ConfigError(f"kind={kind!r}: takes 'rms' or 'layer'")
        self.eps, self.residual_in_fp32 = eps, residual_in_fp32
        self.kind: Literal["rms", "layer"] = kind
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if kind == "layer" else None

    def reset_parameters(self) -> None:
        """The start: no change of scale, and no shift."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Float[Tensor, "... d_model"], residual: Float[Tensor, "... d_model"] | None = None
    ) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, "... d_model"]]:
        """The normalised sum in the type of x, and the sum; without `residual` the stream starts with x."""
        dtype = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else None
        return add_norm(x, residual, self.weight, self.bias, self.eps, kind=self.kind, residual_dtype=dtype)


class SharedBatch:
    """Whether other processes have shares of each batch too, and batch norms see all of it (`train.batch_norms`)."""

    now = False


def alone(x: Tensor) -> bool:
    """Whether a tensor's one row is the whole batch, which a batch norm finds no deviation in."""
    return len(x) == 1 and not SharedBatch.now


class BatchNorm2d(nn.BatchNorm1d):
    """Each (row, feature) normalised over the batch, with its own gain and bias: TSMixer's 2D norm, for `(..., l, d)`.

    As Keras has it, from which TSMixer's numbers come: eps 1e-3 and a share of 0.01 of each batch in the running
    statistics. A batch of one, which has no deviation, is normalised by these in training too.

    Args:
        rows: l.
        features: d.
    """

    def __init__(self, rows: int, features: int) -> None:
        super().__init__(rows * features, eps=1e-3, momentum=0.01)

    def forward(self, input: Float[Tensor, "*batch l d"]) -> Float[Tensor, "*batch l d"]:
        flat = input.flatten(-2).flatten(0, -2)
        if self.training and alone(flat):
            y = F.batch_norm(flat, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            y = super().forward(flat)
        return y.view_as(input)


class PreNorm(nn.Module):
    """A mixer behind the residual stream's norm, with the names and the order of `mamba_ssm`'s Block.

    Each block adds what the block before gave, so that sum and norm are one step; whoever stacks blocks ends with one
    more `AddNorm`:

        residual = None
        for block in blocks:
            x, residual = block(x, residual)
        x, _ = norm_f(x, residual)

    Args:
        norm: Adds to the stream and normalises.
        mixer: What mixes.
    """

    def __init__(self, norm: AddNorm, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(
        self, x: Float[Tensor, "b l d_model"], residual: Float[Tensor, "b l d_model"] | None = None, **options: Any
    ) -> tuple[Float[Tensor, "b l d_model"], Float[Tensor, "b l d_model"]]:
        """What the mixer makes of the normalised sum, not yet added, and the sum; `options` go to the mixer."""
        x, stream = self.norm(x, residual)
        return self.mixer(x, **options), stream

    def step_(
        self, x: Float[Tensor, "b l d_model"], residual: Float[Tensor, "b l d_model"] | None, state: Any
    ) -> tuple[Float[Tensor, "b l d_model"], Float[Tensor, "b l d_model"]]:
        """As `forward`, usually of one position, on from the mixer's `state`, which is written; without gradient."""
        joined = getattr(self.mixer, "step_behind_", None)
        if joined is not None:
            return joined(self.norm, x, residual, state)
        with torch.no_grad():
            x, stream = self.norm(x, residual)
        return self.mixer.step_(x, state), stream  # pyright: ignore[reportCallIssue]


def run_blocks(
    blocks: Iterable[nn.Module],
    drops: Iterable[nn.Module],
    x: Float[Tensor, "b l d"],
    after: Collection[int],
    through: Callable[..., Any] | None = None,
) -> list[tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]]:
    """`PreNorm` blocks one behind the other.

    Args:
        blocks: The blocks.
        drops: What each block's output goes through before it is added: `DropPath`.
        x: What the stream starts with.
        after: Numbers of the blocks behind which to look; those behind the last of them are not run.
        through: Calls a block, the first of its arguments, with the others; by default nothing is done about it.

    Returns:
        For each of these, in rising order, what is to be added and the stream; an `AddNorm` takes both.
    """
    residual, seen = None, []
    for number, (block, drop) in enumerate(zip(blocks, drops, strict=True)):
        x, residual = block(x, residual) if through is None else through(block, x, residual)
        x = drop(x)
        if number in after:
            seen.append((x, residual))
        if len(seen) == len(after):
            break
    return seen
