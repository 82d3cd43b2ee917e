"""Decoding steps as one CUDA graph: the host launches one thing for a token, not some thousand."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.errors import ConfigError
from selectra.language.model import LanguageModel
from selectra.language.stream import Stream


def require_gpu(model: LanguageModel) -> None:
    """Raise unless the model is where graphs can be recorded.

    Raises:
        ConfigError: It is not.
    """
    device = model.embedding.weight.device
    if device.type != "cuda":
        raise ConfigError(f"the model is on {device}; a CUDA graph needs it on a GPU.")


class GraphedStep:
    """`model.step_` of one token for every row, recorded once and replayed.

    Args:
        model: On a GPU, in evaluation mode.
        state: Every step reads and writes this one; it stays what it is while the graph is recorded.

    Raises:
        ConfigError: The model is not on a GPU.
    """

    def __init__(self, model: LanguageModel, state: Stream) -> None:
        require_gpu(model)
        device = model.embedding.weight.device
        self.state = state
        self._tokens = torch.zeros(len(state.seen), 1, dtype=torch.int64, device=device)
        before = _Before(state)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries' memory is taken before anything is recorded.
            for _ in range(3):
                model.step_(self._tokens, state)
                before.restore()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = model.step_(self._tokens, state)
        # Recording ran nothing, but what it was recorded on may have been written by the steps before.
        before.restore()

    def __call__(self, tokens: Int[Tensor, "b 1"]) -> Float[Tensor, "b 1 vocab"]:
        """The logits after the next token; they are overwritten by the next call. The state must have room."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


class _Before:
    """What a step of one token overwrites: no copy of what grows with the context."""

    def __init__(self, state: Stream) -> None:
        rows = torch.arange(len(state.seen), device=state.seen.device)
        self._whole, self._slots = [(state.seen, state.seen.clone())], []
        for layer in state.layers:
            by_slot = getattr(layer, "by_slot", ())
            for name, tensor in layer._asdict().items():
                if name in by_slot:
                    place = (rows, layer.n.clone())
                    self._slots.append((tensor, place, tensor[place]))
                else:
                    self._whole.append((tensor, tensor.clone()))

    def restore(self) -> None:
        """Put it back."""
        for tensor, content in self._whole:
            tensor.copy_(content)
        for tensor, place, content in self._slots:
            tensor[place] = content
