"""`selectra data list|get|check`: what public sets there are, which are here, and bringing the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from selectra.data.download import Limits
from selectra.data.public import FOLDER_VARIABLE, Copies, folders, get, look, read_public
from selectra.data.shard_index import index_of, shard_urls, write_index
from selectra.data.sources import PUBLIC, PublicFile, PublicSet, public_set
from selectra.data.splits import SPLITS
from selectra.errors import ConfigError, DataError


def data_command(action: str, names: Sequence[str], to: Path | None, console: Console) -> None:
    """Do what is asked; the first set that cannot be had ends it, with what was done before in place.

    Raises:
        ConfigError: A combination that has no effect.
        DataError: An unknown name, or a set or shard that is missing, damaged or cannot be loaded.
    """
    if action == "shards":
        _index(names, to, console)
        return
    if to is not None and action != "get":
        raise ConfigError(f"--to says where `selectra data get` puts files; `selectra data {action}` writes none.")
    sets = list(dict.fromkeys(public_set(name).name.lower() for name in names))
    if action == "get":
        if not sets:
            raise ConfigError(f"name at least one set to get; there are: {', '.join(s.name for s in PUBLIC.values())}.")
        for name in sets:
            _get(PUBLIC[name], to, console)
    elif action == "check":
        _check([PUBLIC[name] for name in sets or PUBLIC], bool(sets), console)
    else:
        _list([PUBLIC[name] for name in sets or PUBLIC], console)
        for name in sets:
            _describe(PUBLIC[name], console)


def _index(shards: Sequence[str], to: Path | None, console: Console) -> None:
    if to is None or not shards:
        raise ConfigError("`selectra data shards SHARDS --to FILE.json` takes shards, as data.path does, and a file.")
    index = index_of(shard_urls(shards), " ".join(shards), Limits(total=60.0))
    write_index(index, to)
    classes = "no classes" if index.classes is None else f"{len(index.classes)} classes"
    console.print(
        f"{len(index.shards):,} shards, {index.counts.sum():,} samples, {classes}: {escape(str(to))}", highlight=False
    )


def _list(sets: Sequence[PublicSet], console: Console) -> None:
    table = Table(title="public sets", title_justify="left")
    for column in ("name", "what it is", "rows", "series", "MB", "here"):
        right = column in ("rows", "series", "MB")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "what it is")
    for source in sets:
        here = "yes" if all(_is_there(file) for file in source.files) else "no"
        shape = (f"{source.rows:,}", f"{source.n_series:,}", _megabytes(source.files), here)
        table.add_row(source.name, source.title, *shape)
    console.print(table)
    places = " and ".join(str(place) for place in folders()) or "no folder"
    console.print(
        f"Looked for in {escape(places)}; contents are verified by `check` and whenever a set is read. "
        "Name sets to see where they come from.",
        highlight=False,
        soft_wrap=True,
    )


def _describe(source: PublicSet, console: Console) -> None:
    """Everything that is known of one set."""
    facts = {
        "split": f"{source.split}: {SPLITS[source.split]}",
        "look-back": str(source.lookback),
        "horizons": ", ".join(map(str, source.horizons)),
        "licence": source.licence,
        "cite": source.citation,
    }
    facts |= {file.name: f"{file.url}, sha256 {file.sha256}" for file in source.files}
    console.print(f"[bold]{source.name}[/]: {source.title}; {source.rows:,} rows of {source.n_series:,} series")
    for name, value in facts.items():
        console.print(f"  {name}: {value}", highlight=False, soft_wrap=True)


def _is_there(file: PublicFile) -> bool:
    names = (file.name, f"{file.name}.gz")
    return any(
        path.is_file() for place in folders() for name in names for path in (place / name, *place.glob(f"*/{name}"))
    )


def _megabytes(files: Sequence[PublicFile]) -> str:
    sizes = [file.size for file in files if file.size is not None]
    return f"{sum(sizes) / 1e6:.1f}" if len(sizes) == len(files) else "-"


def _get(source: PublicSet, to: Path | None, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task(source.name, total=None)

    def show(there: int, whole: int | None) -> None:
        # Only once something comes: most sets are there already.
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=there, total=whole)

    try:
        found = get(source, to, progress=show)
    finally:
        if bar.live.is_started:
            bar.stop()
    for path, loaded in found:
        done = "loaded and checked" if loaded else "already here, checked"
        console.print(f"{source.name}: {done}: {escape(str(path))}", highlight=False, soft_wrap=True)
    if to is not None:
        console.print(f"Found from now on with {FOLDER_VARIABLE}={escape(str(to))}", highlight=False, soft_wrap=True)
    console.print(f"Licence: {source.licence}. Cite: {source.citation}.", highlight=False, soft_wrap=True)


def _check(sets: Sequence[PublicSet], named: bool, console: Console) -> None:
    """Verify every copy and read what is whole; a damaged copy, or a missing one that was named, is an error."""
    problems: list[str] = []
    for source in sets:
        copies = [look(file) for file in source.files]
        if all(copy.right is not None for copy in copies):
            problems += _read(source, console)
        elif any(copy.wrong for copy in copies):
            problems += _damaged(source, copies)
        else:
            console.print(f"{source.name}: not here", highlight=False)
            problems += [f"{source.name} is not here; get it with: selectra data get {source.name}"] if named else []
    if problems:
        raise DataError(" ".join(problem.rstrip(".") + "." for problem in problems))


def _read(source: PublicSet, console: Console) -> list[str]:
    try:
        table = read_public(source)
    except DataError as error:
        return [str(error)]
    missing = 1.0 - table.observed.mean()
    line = f"{table.rows:,} rows of {len(table.names):,} series, every {table.freq}, {missing:.2%} missing"
    console.print(f"{source.name}: whole; {line}", highlight=False, soft_wrap=True)
    return []


def _damaged(source: PublicSet, copies: Sequence[Copies]) -> list[str]:
    advice = f"remove it and get it again with: selectra data get {source.name}"
    return [f"{source.name}: {str(path)!r}: {problem}; {advice}" for copy in copies for path, problem in copy.wrong]
