"""What the README says is there, is there."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from selectra import cli
from selectra.registry import models, recipes
from selectra.runs import find_run
from selectra.train.job import typed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Lines of code alone: fenced or indented, a line that goes on in the next one together with it.
LINE = re.compile(r"^ *(selectra (?:[^\\\n]|\\\n)*)$", re.M)


def commands() -> list[Any]:
    """Every command that a page shows, in words, without a mark of what was left out."""
    found = []
    for page in PAGES:
        for text in LINE.findall(page.read_text()):
            words = shlex.split(text.replace("\\\n", " "), comments=True)
            found.append(pytest.param([word for word in words if word != "..."], id=f"{page.name}: {' '.join(words)}"))
    return found


def test_the_two_commands_stand_as_promised() -> None:
    assert "python3 -m venv .venv && . .venv/bin/activate && pip install . && selectra forecast" in README
    assert "pip install -e '.[all,dev]' && pytest -n auto" in README


@pytest.mark.parametrize("words", commands())
def test_commands_exist_with_their_options(words: list[str]) -> None:
    command: Any = typer.main.get_command(cli.app)
    rest = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("words", [each for each in commands() if each.values[0][1] in ("train", "show")])
def test_recipes_models_and_changes_are_there(words: list[str]) -> None:
    """A name and settings of a training are looked up and checked as the command does it, before data is read."""
    name, *changes = itertools.takewhile(lambda word: not word.startswith("--"), words[2:])
    run = typed(find_run(name, changes))
    assert run.to_json()


def test_the_five_files_are_short() -> None:
    _, _, section = README.partition("## Read these five files")
    files = re.findall(r"\]\((src/[^)]+)\)", section.partition("##")[0])
    assert len(files) == 5
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) < 900


def test_links_and_pictures_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_names_in_the_table_are_registered() -> None:
    import selectra.models
    import selectra.recipes  # noqa: F401

    assert "| planned |" not in README
    rows = [line for line in README.splitlines() if line.startswith("|") and line.endswith("| works |")]
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row)}
    assert named == set(models.families())
    assert "tsm2_weather" in recipes.names()
