"""What the README says is there, is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from selectra import cli
from selectra.registry import models, recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("selectra ")
]


def test_the_two_commands_stand_as_promised() -> None:
    assert "python3 -m venv .venv && . .venv/bin/activate && pip install . && selectra forecast" in README
    assert "pip install -e '.[all,dev]' && pytest -n auto" in README


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_exist_with_their_options(words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    command = group.commands[words[1]]  # pyright: ignore[reportAttributeAccessIssue]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


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

    rows = [line for line in README.splitlines() if line.startswith("|") and line.endswith("| works |")]
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row)}
    assert named == set(models.families())
    assert "tsm2_weather" in recipes.names()
