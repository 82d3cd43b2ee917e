"""`selectra tokenize`. Heavy imports happen inside, so that help comes at once."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def tokenize(
    files: Annotated[list[Path], typer.Argument(help="Text, JSONL and parquet files, .gz or not.", metavar="FILE...")],
    out: Annotated[Path, typer.Option(help="The folder of shards.")],
    tokenizer: Annotated[str, typer.Option(help='A tokenizer.json, "bytes" or "characters".')] = "bytes",
    column: Annotated[str, typer.Option(help="Of JSONL and parquet files: where the text is.")] = "text",
    end: Annotated[
        str | None, typer.Option(help='A text of one token behind every document, such as "<|endoftext|>".')
    ] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a shard, about.")] = 2**26,
) -> None:
    """Make tokens of texts once, in files that `data=text_shards data.path=FOLDER` trains on."""
    from selectra.data.shards import write_shards  # noqa: PLC0415

    found = write_shards(files, out, tokenizer=tokenizer, column=column, end=end, shard_tokens=shard_tokens)
    tokens, documents = (sum(shard[what] for shard in found["shards"]) for what in ("tokens", "documents"))
    n_shards, vocab_size = len(found["shards"]), found["vocab_size"]
    Console().print(
        f"{documents:,} documents, {tokens:,} tokens of {vocab_size:,} in {n_shards} shards in {out}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
