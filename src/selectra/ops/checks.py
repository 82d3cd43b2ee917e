"""Checks on operator arguments: each message names the argument, what was got and what is allowed."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from selectra.errors import BackendError, ConfigError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise unless `tensor` has exactly `shape`, which `meaning` spells in axis letters."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; it must be {meaning} = {shape}.")


def require_shapes(named: dict[str, Tensor | None], shape: tuple[int, ...], meaning: str) -> None:
    """`require_shape` for every tensor that is there."""
    for name, tensor in named.items():
        if tensor is not None:
            require_shape(name, tensor, shape, meaning)


def require_fitting(named: dict[str, Tensor | None]) -> None:
    """Raise unless all tensors are real floating point, on the first one's device, and float64 all or none."""
    first = next(tensor for tensor in named.values() if tensor is not None)
    for name, tensor in named.items():
        if tensor is not None:
            _require_device(name, tensor, first.device)
            _require_float(name, tensor, first.dtype == torch.float64)


def _require_float(name: str, tensor: Tensor, double: bool) -> None:
    if tensor.is_complex():
        raise ConfigError(f"{name} is {tensor.dtype}; complex values are not supported, pass a real tensor.")
    if tensor.dtype not in FLOATS:
        raise ConfigError(f"{name} is {tensor.dtype}; allowed are float32, float64, bfloat16 and float16.")
    if double != (tensor.dtype == torch.float64):
        raise ConfigError(
            f"{name} is {tensor.dtype} in a call that mixes float64 with other types; "
            "pass every tensor in float64, or none."
        )


def _require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device}, the first argument on {device}; move them to one device.")


def require_cpu(op: str, backend: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise before a kernel on data pointers meets a tensor that is not in the processor's memory."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            raise BackendError(
                f"{op}: backend '{backend}' is written into this program and a tensor is on {tensor.device}, "
                "it needs cpu; move the tensors and the module to the cpu, or compile or export on this device."
            )


def count_states(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """How many states a call on x (b, l, d) has, one a batch element or packed sequence; mask and borders checked."""
    batch, length = x.shape[:2]
    if mask is not None:
        _require_device("mask", mask, x.device)
        _require_mask(mask, batch, length)
    if cu_seqlens is None:
        return batch
    _require_device("cu_seqlens", cu_seqlens, x.device)
    _require_packed(cu_seqlens, batch, mask)
    return cu_seqlens.shape[0] - 1


def _require_mask(mask: Tensor, batch: int, length: int) -> None:
    """Raise unless `mask` is bool (b, l)."""
    if mask.dtype != torch.bool:
        raise ConfigError(f"mask is {mask.dtype}; it must be bool, True where the position is present.")
    require_shape("mask", mask, (batch, length), "(b, l)")


def _require_packed(cu_seqlens: Tensor, batch: int, mask: Tensor | None) -> None:
    """Raise unless `cu_seqlens` is int32 (n_seqs + 1,) in a call with b = 1 and no mask."""
    if mask is not None:
        raise ConfigError("mask and cu_seqlens were both given; packed sequences have no padding, pass one of them.")
    if cu_seqlens.dtype != torch.int32:
        raise ConfigError(f"cu_seqlens is {cu_seqlens.dtype}; it must be int32.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ConfigError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (n_seqs + 1,).")
    if batch != 1:
        raise ConfigError(f"cu_seqlens was given with b = {batch}; packed sequences need b = 1.")


def sequence_borders(cu_seqlens: Tensor, length: int) -> list[int]:
    """The borders of packed sequences as Python integers, checked: 0 first, never falling, `length` last."""
    borders: list[int] = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != length:
        raise ConfigError(
            f"cu_seqlens runs from {borders[0]} to {borders[-1]}; it must run from 0 to the length {length}."
        )
    for index, (start, end) in enumerate(pairwise(borders)):
        if end < start:
            raise ConfigError(f"cu_seqlens falls from {start} to {end} at index {index + 1}; it must never fall.")
    return borders


def compute_dtype(double: bool) -> torch.dtype:
    """The type of states and of all arithmetic."""
    return torch.float64 if double else torch.float32
