"""Decoding steps as one CUDA graph: the host launches one thing for a token, not some thousand."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.errors import ConfigError
from selectra.language.model import LanguageModel
from selectra.language.stream import Stream, overwrite_


class GraphedStep:
    """`model.step_` of one token for every row, recorded once and replayed.

    Args:
        model: On a GPU, in evaluation mode.
        state: Every step reads and writes this one; it stays what it is while the graph is recorded.

    Raises:
        ConfigError: The model is not on a GPU.
    """

    def __init__(self, model: LanguageModel, state: Stream) -> None:
        device = model.embedding.weight.device
        if device.type != "cuda":
            raise ConfigError(f"the model is on {device}; a CUDA graph needs it on a GPU.")
        self.state = state
        self._tokens = torch.zeros(len(state.seen), 1, dtype=torch.int64, device=device)
        before = state.replaced({name: tensor.clone() for name, tensor in state.tensors().items()})
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries' memory is taken before anything is recorded.
            for _ in range(3):
                model.step_(self._tokens, state)
                overwrite_(state, before)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = model.step_(self._tokens, state)
        # Recording ran nothing, but what it was recorded on may have been written by the steps before.
        overwrite_(state, before)

    def __call__(self, tokens: Int[Tensor, "b 1"]) -> Float[Tensor, "b 1 vocab"]:
        """The logits after the next token; they are overwritten by the next call. The state must have room."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits
