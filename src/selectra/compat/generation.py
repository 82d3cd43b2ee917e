"""`mamba_ssm.utils.generation`: the cache, and text generation one token at a time."""

import logging
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.errors import ConfigError

logger = logging.getLogger("selectra")
GenerateDecoderOnlyOutput = namedtuple("GenerateDecoderOnlyOutput", ["sequences", "scores"])
_said: set[str] = set()


@dataclass
class InferenceParams:
    """What has been seen: how many positions, and every layer's states under its index."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start again with these sizes."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def sample(
    logits: Float[Tensor, "b v"], top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> Int[Tensor, " b"]:
    """A token for each row: the best one for `top_k=1`, else drawn from those that the bounds leave.

    Args:
        logits: Unnormalised.
        top_k: How many of the best are left; 0 for all.
        top_p: The best whose probabilities sum up to this are left; 0 for all.
        min_p: Without `top_k`: tokens below this share of the best one's probability go.
        temperature: Divides the logits.

    Raises:
        ConfigError: `top_p` above 1.
    """
    if top_k == 1:
        return logits.argmax(-1)
    if top_p > 1:
        raise ConfigError(f"top_p={top_p}: takes at most 1")
    logits, tokens = logits.sort(-1, descending=True)
    if top_k > 0:
        logits, tokens = logits[:, :top_k], tokens[:, :top_k]
    elif min_p > 0:
        share = logits.softmax(-1)
        logits = logits.masked_fill(share < min_p * share[:, :1], -torch.inf)
    logits = logits / temperature
    if 0 < top_p < 1:
        # A token stays while those before it sum up to less than the bound.
        share = logits.softmax(-1)
        logits = logits.masked_fill(share.cumsum(-1) - share >= top_p, -torch.inf)
    drawn = torch.multinomial(logits.softmax(-1), 1)
    return tokens.gather(-1, drawn).squeeze(-1)


def _penalised(logits: Tensor, so_far: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that have been, made smaller."""
    score = logits.gather(1, so_far)
    return logits.scatter(1, so_far, torch.where(score < 0, score * penalty, score / penalty))


@torch.inference_mode()
def decode(
    input_ids: Int[Tensor, "b l"],
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerateDecoderOnlyOutput:
    """Continue sequences of one length until `max_length`, or until all end.

    `cg` and `enable_timing` change nothing here but a line in the log. Other arguments as in `sample`; tokens of
    `teacher_outputs` are taken instead of drawn ones where it has them.
    """
    if cg and "cg" not in _said:
        _said.add("cg")
        logger.warning("selectra.compat generates without CUDA graphs: cg=True changes nothing.")
    batch = input_ids.shape[0]
    cache = InferenceParams(max_length, batch)
    sequences, newest, scores = input_ids, input_ids, []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while not _done(newest, cache, max_length, eos_token_id):
        logits = model(newest, inference_params=cache, num_last_tokens=1).logits[:, -1, :vocab_size]
        cache.seqlen_offset += newest.shape[1]
        if output_scores:
            scores.append(logits.clone())
        if repetition_penalty != 1.0:
            logits = _penalised(logits, sequences, repetition_penalty)
        if teacher_outputs is not None and teacher_outputs.shape[1] > cache.seqlen_offset:
            newest = teacher_outputs[:, cache.seqlen_offset, None]
        else:
            newest = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        sequences = torch.cat([sequences, newest], 1)
        if streamer is not None:
            streamer.put(newest.cpu())
    if streamer is not None:
        streamer.end()
    return GenerateDecoderOnlyOutput(sequences, tuple(scores))


def _done(newest: Tensor, cache: InferenceParams, max_length: int, eos_token_id: int | None) -> bool:
    if cache.seqlen_offset == 0:
        return False
    ended = eos_token_id is not None and bool((newest == eos_token_id).all())
    return ended or cache.seqlen_offset >= max_length - 1


class GenerationMixin:
    """`generate` for a model whose forward takes a cache."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Every layer's empty states; the model says how."""
        raise NotImplementedError(f"{type(self).__name__} must say how its layers' empty states are made, to generate.")

    def generate(
        self,
        input_ids: Int[Tensor, "b l"],
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `decode`; the sequences alone, or with the scores where `return_dict_in_generate`."""
        drawn = (top_k, top_p, min_p, temperature)
        found = decode(input_ids, self, max_length, *drawn, output_scores=output_scores, **kwargs)
        if not output_scores:
            found = found._replace(scores=None)
        return found if return_dict_in_generate else found.sequences
