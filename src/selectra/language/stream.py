"""The state of a language model: one object for all of its layers, whatever they remember.

A `Stream` is a tree of tensors, one row a sequence. `fork` picks and repeats rows, `save_stream` and `load_stream` keep
it in a file; `torch.utils._pytree` goes through it, and its tensors are ordinary ones that gradients flow through.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import DataError

if TYPE_CHECKING:
    from selectra.language.model import LanguageModel


class Stream(NamedTuple):
    """What a model remembers of the past."""

    seen: Int[Tensor, " b"]
    """How many tokens each row has had."""
    layers: tuple[Any, ...]
    """The state of every mixer, in the model's order: NamedTuples of tensors whose first axis is the row."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name, such as "3.keys": the number of the layer and what it is there."""
        named = {"seen": self.seen}
        for i, layer in enumerate(self.layers):
            named.update({f"{i}.{name}": tensor for name, tensor in layer._asdict().items()})
        return named

    def replaced(self, tensors: dict[str, Tensor]) -> "Stream":
        """The same tree with other tensors, named as by `tensors`."""
        layers = [
            type(layer)(*(tensors[f"{i}.{name}"] for name in layer._fields)) for i, layer in enumerate(self.layers)
        ]
        return Stream(tensors["seen"], tuple(layers))

    @property
    def n_bytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def fork(stream: Stream, rows: Int[Tensor, " n"]) -> Stream:
    """A new stream of the given rows, in their order; a row may be taken several times and goes its own way."""
    return stream.replaced({name: tensor.index_select(0, rows) for name, tensor in stream.tensors().items()})


def overwrite_(stream: Stream, after: Stream) -> None:
    """Copy one stream's content into another's tensors, without gradient.

    Raises:
        DataError: It needs more room than there is.
    """
    new = after.tensors()
    for name, tensor in stream.tensors().items():
        if new[name].shape != tensor.shape:
            raise DataError(
                f"the state has room for {tensor.shape[1]} positions and {new[name].shape[1]} are needed; "
                "make it with init_state(batch, capacity=...) for prompt and answer together."
            )
        tensor.detach().copy_(new[name])


def merge(parts: list[tuple[Tensor, Stream]], like: Stream) -> Stream:
    """Streams of some rows each, put together: `parts` are row numbers and their stream."""
    merged = {}
    for name, tensor in like.tensors().items():
        pieces = [stream.tensors()[name] for _, stream in parts]
        room = max((piece.shape[1] for piece in pieces), default=0) if tensor.dim() > 1 else 0
        # Only memories of all positions differ: in how many slots they have.
        pieces = [
            F.pad(piece, (0, 0) * (piece.dim() - 2) + (0, room - piece.shape[1])) if piece.dim() > 1 else piece
            for piece in pieces
        ]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        merged[name] = torch.cat(pieces).index_select(0, order)
    return like.replaced(merged)


def save_stream(stream: Stream, path: str | Path) -> None:
    """Keep a stream in a `.safetensors` file."""
    save_file({name: tensor.detach().contiguous() for name, tensor in stream.tensors().items()}, path)


def load_stream(model: "LanguageModel", path: str | Path) -> Stream:
    """A stream of this model from a file, on the model's device.

    Raises:
        DataError: The file is not there, is damaged, or is of another model.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no file '{path}'.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise DataError(f"'{path}' cannot be read as a stream: {str(error).partition(chr(10))[0]}") from error
    batch = len(found["seen"]) if "seen" in found and found["seen"].dim() == 1 else 0
    like = model.init_state(batch)
    expected = like.tensors()
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[:4]
        raise DataError(f"'{path}' is no stream of this model: {', '.join(odd)} differ. Is it of another model?")
    for name, tensor in found.items():
        own = expected[name]
        # A memory of all positions may have any number of slots.
        free = 1 if own.dim() > 1 and own.shape[1] == 0 else None
        shapes = [tuple(size for axis, size in enumerate(each.shape) if axis != free) for each in (tensor, own)]
        if tensor.dim() != own.dim() or shapes[0] != shapes[1]:
            raise DataError(
                f"'{path}' is no stream of this model: '{name}' has the shape {tuple(tensor.shape)} "
                f"where the model has {tuple(own.shape)}."
            )
    return like.replaced({name: t.to(expected[name].device, expected[name].dtype) for name, t in found.items()})
