"""`selectra generate`: continue prompts with a model from a folder, the text shown as it comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from selectra.errors import DataError
from selectra.language.checkpoint import CONFIG, end_tokens, from_pretrained
from selectra.language.generate import generate, require_possible
from selectra.language.graphed import require_gpu
from selectra.language.model import LanguageModel
from selectra.language.sampling import Sampling
from selectra.language.tokens import Tokenizer, Writer, find_tokenizer
from selectra.official import read_device


@dataclass(frozen=True)
class GenerateJob:
    """What is to be generated."""

    folder: Path
    """Of the model."""
    prompts: tuple[str, ...]
    """Texts to continue."""
    file: Path | None = None
    """Further ones, one a line."""
    tokenizer: str | None = None
    """A tokenizer.json, "bytes", or None for the folder's own."""
    max_new_tokens: int = 200
    """For each prompt."""
    draws: Mapping[str, Any] = field(default_factory=dict)
    """How tokens are drawn: the fields of `Sampling`."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""
    seed: int = 0
    """Of the draws."""
    device: str = "cpu"
    """Where the model runs."""
    dtype: str | None = None
    """The model's type, if not its own."""
    graphed: bool = False
    """Whether a step is recorded as one CUDA graph."""


def generate_command(job: GenerateJob, console: Console) -> list[str]:
    """Generate, show, and return the answers.

    A single answer is written as it comes; of several, each one when it is finished.

    Raises:
        DataError: Files, tokens or prompts do not fit.
        ConfigError: An option does not, or the state of so many tokens does not fit into the memory.
    """
    sampling, prompts = Sampling(**job.draws), read_prompts(job.prompts, job.file)
    tokenizer = find_tokenizer(job.tokenizer or job.folder)
    model = from_pretrained(job.folder, device=read_device(job.device), dtype=job.dtype)
    _require_fitting(tokenizer, model)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    require_possible(model, ids, job.max_new_tokens)
    if job.graphed:
        require_gpu(model)
    writers = [Writer(tokenizer, job.stops) for _ in ids]
    alone = len(ids) == 1
    if alone:
        _show(console, prompts[0])
    generator = torch.Generator(model.embedding.weight.device).manual_seed(job.seed)
    ends = end_tokens(job.folder)

    def on_token(row: int, token: int) -> bool:
        if token in ends:
            return True
        news = writers[row].add(token)
        if alone:
            _show(console, news)
        return writers[row].ended

    generate(
        model, ids, max_new_tokens=job.max_new_tokens, sampling=sampling, stop_tokens=ends, generator=generator,
        on_token=on_token, graphed=job.graphed,
    )  # fmt: skip
    rest = [writer.end() for writer in writers]
    if alone:
        _show(console, rest[0] + "\n")
    else:
        for number, (prompt, writer) in enumerate(zip(prompts, writers, strict=True)):
            console.print(f"[bold]{number + 1}[/bold] {escape(prompt + writer.text)}", highlight=False, soft_wrap=True)
    return [writer.text for writer in writers]


def _require_fitting(tokenizer: Tokenizer, model: LanguageModel) -> None:
    """A model's vocabulary may be padded, but not smaller than the tokenizer's."""
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.vocab_size}: "
            "they are of different models; name the right one with --tokenizer."
        )


def _show(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def read_prompts(prompts: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts of the command line and of a file's lines.

    Raises:
        DataError: There are none, or there is no such file.
    """
    lines: list[str] = []
    if file is not None:
        if not file.is_file():
            raise DataError(f"there is no file '{file}'.")
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    found = (*prompts, *lines)
    if not found:
        raise DataError(f"there is no prompt; write one behind the model's folder, which holds {CONFIG}.")
    return found
