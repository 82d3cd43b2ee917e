"""Continue prompts of unequal lengths, all rows at once, with a carried state."""

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from selectra.errors import ConfigError, DataError
from selectra.language.graphed import GraphedStep
from selectra.language.model import LanguageModel, require_in_vocabulary
from selectra.language.sampling import GREEDY, Sampling
from selectra.language.stream import Stream

# A row's new token; True ends the row.
OnToken = Callable[[int, int], bool | None]
PREFILL = 2048


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    on_token: OnToken | None = None,
    chunk: int = PREFILL,
    graphed: bool = False,
) -> list[list[int]]:
    """The tokens that follow each prompt.

    Args:
        model: In evaluation mode.
        prompts: Token ids; of any lengths, none empty.
        max_new_tokens: At most so many for each prompt.
        sampling: How a token is drawn.
        stop_tokens: A row ends with any of these.
        generator: Of the draws, on the model's device.
        on_token: Told every new token with its row, as it comes; a row ends when it says True.
        chunk: Prompts are read in pieces of so many positions.
        graphed: On a GPU: record a step as one CUDA graph once the prompts are read, and replay it for every token.

    Returns:
        The new tokens of every prompt, the one that ended it among them.

    Raises:
        DataError: An empty prompt, a token id that is not in the vocabulary, or logits that are no numbers.
        ConfigError: Prompt and answer together need more memory than there is, or are longer than the model takes; or
            a graph is asked for and the model is not on a GPU.
    """
    require_possible(model, prompts, max_new_tokens, chunk)
    tokens, mask = padded(prompts, model.embedding.weight.device)
    capacity = tokens.shape[1] + max_new_tokens
    state = model.init_state(len(prompts), capacity)
    logits = read_prompts(model, tokens, mask, state, chunk)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    # A single token comes with the prompts' logits: nothing is recorded for it.
    replayed = GraphedStep(model, state) if graphed and max_new_tokens > 1 else None
    for n in range(max_new_tokens):
        if logits.is_cpu or n == 0:
            # On a GPU the host would have to wait in every step.
            _require_numbers(logits[:, -1])
        drawn = sampling.draw(logits[:, -1], generator)
        for row, token in enumerate(drawn.tolist()):
            if row in open_rows:
                answers[row].append(token)
                ended = on_token is not None and bool(on_token(row, token))
                if ended or token in stop_tokens:
                    open_rows.discard(row)
        if not open_rows or n == max_new_tokens - 1:
            break
        tokens = drawn[:, None]
        logits = model.step_(tokens, state, n_logits=1) if replayed is None else replayed(tokens)
    return answers


def require_possible(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int = PREFILL
) -> None:
    """Raise unless there is room for these prompts and their answers, before anything is computed or shown.

    Raises:
        DataError, ConfigError: As those of `generate`.
    """
    _require_prompts(model, prompts, max_new_tokens, chunk)
    require_memory(model, len(prompts), max(map(len, prompts)) + max_new_tokens)


def read_prompts(
    model: LanguageModel,
    tokens: Int[Tensor, "b l"],
    mask: Bool[Tensor, "b l"] | None,
    state: Stream,
    chunk: int = PREFILL,
) -> Tensor:
    """Write prompts into a state, piece by piece; the logits of the last position.

    Args:
        model: The model.
        tokens: The prompts, padded on the left.
        mask: True where a token is present; None where all are.
        state: Is overwritten.
        chunk: Length of a piece.
    """
    logits = tokens
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        present = None if mask is None or bool(mask[:, part].all()) else mask[:, part]
        logits = model.step_(tokens[:, part], state, mask=present, n_logits=1)
    return logits


def padded(
    prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"] | None]:
    """Prompts as one batch, padded on the left, and the mask of what is present, None where all is."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, dtype=torch.int64, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(longest, device=device) >= (longest - lengths)[:, None]
    return tokens, None if all(len(prompt) == longest for prompt in prompts) else mask


def state_bytes(model: LanguageModel, batch: int, capacity: int) -> int:
    """Memory of a state, in bytes, without making it."""
    empty, one = (model.init_state(1, n).n_bytes for n in (0, 1))
    return batch * (empty + capacity * (one - empty))


def require_memory(model: LanguageModel, batch: int, capacity: int) -> None:
    """Raise unless a state of `capacity` positions fits into the memory that is free now.

    Raises:
        ConfigError: It does not.
    """
    limit = getattr(model, "seq_len", None)
    if limit is not None and capacity > limit:
        raise ConfigError(
            f"prompt and answer have {capacity} tokens; this model takes at most {limit}. Shorten one of them."
        )
    room = memory_of(model.embedding.weight.device)
    needed = state_bytes(model, batch, capacity)
    if room is not None and needed > room:
        raise ConfigError(
            f"the state of {batch} rows of {capacity} tokens, prompt and answer, needs {needed / 2**30:.2f} GiB; "
            f"there are {room / 2**30:.2f} GiB. Take fewer rows at once, or shorter ones."
        )


def memory_of(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or that a machine has; where it can be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sysconf: Any = getattr(os, "sysconf", None)
    if device.type != "cpu" or sysconf is None or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")


def _require_numbers(logits: Tensor) -> None:
    """Raise where nothing can be drawn; else the likeliest token would be the first that is no number."""
    broken = ~logits.amax(-1).isfinite()
    if bool(broken.any()):
        raise DataError(
            f"the model's logits are not finite after prompt {int(broken.nonzero()[0]) + 1} of {len(logits)}: its "
            "weights are broken, of a training that diverged maybe, or too large for their type; float16 overflows "
            "where bfloat16 and float32 do not (--dtype)."
        )


def _require_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int) -> None:
    if max_new_tokens < 1 or chunk < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} and chunk={chunk}: need at least 1 each")
    if not prompts:
        raise DataError("there is no prompt.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number + 1} of {len(prompts)} is empty; it needs at least one token.")
        require_in_vocabulary(min(prompt), max(prompt), model.vocab_size)
