"""Commands shown in README.md and docs/ are commands there are: options, arguments, recipes and settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from architectures import names

from mlxft.cli import cli
from mlxft.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRONG = ("tune.rnak",)  # in commands that show an error


def blocks(page: Path) -> Iterator[str]:
    """Whole commands: lines of indented or fenced blocks."""
    text, fenced = re.sub(r"\\\n\s*", " ", page.read_text("utf-8")), False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        found = re.match(r"\s*(?:\$ )?(mlxft [a-z][a-z-]*( .*)?)$", line)
        if found and (fenced or line.startswith("    ")) and "..." not in line and not any(w in line for w in WRONG):
            yield found[1]


def mentions(page: Path) -> list[str]:
    """Commands within sentences and tables, of which a part may be left out."""
    return re.findall(r"`(mlxft [a-z-]+ [^`]+)`", page.read_text("utf-8"))


def shown(find: object) -> list[object]:
    assert callable(find)
    return [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in find(page)]


def parse(line: str) -> tuple[click.Command, list[str]]:
    """The command, and its arguments without comments and what follows a pipe."""
    for end in ("|", ">", "&&", ";"):
        line = line.split(f" {end} ")[0]
    _, name, *arguments = shlex.split(line, comments=True)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"no such command: {line}"
    if isinstance(command, click.Group) and arguments and arguments[0] in command.commands:
        return command.commands[arguments[0]], arguments[1:]
    return command, arguments


def test_there_are_commands() -> None:
    assert len(shown(blocks)) > 40
    assert {page.name for page in PAGES} >= {"README.md", "hub.md", "mlx-lm.md", "peft.md", "transfer.md"}


@pytest.mark.parametrize("line", shown(blocks))
def test_command_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, arguments = parse(line)
    try:
        context = command.make_context(command.name, list(arguments))
    except click.exceptions.Exit:  # --help
        return
    if command.name in ("train", "check") and context.params["recipe"] is not None:
        load_config(context.params["recipe"], list(context.params["overrides"]))


@pytest.mark.parametrize("line", shown(mentions))
def test_options_mentioned_are_there(line: str) -> None:
    command, arguments = parse(line)
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    assert {a.split("=")[0] for a in arguments if a.startswith("-")} <= known


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_recipes_named_are_there(page: Path) -> None:
    named = set(re.findall(r"\bconfigs/([\w-]+\.(?:yaml|py))", page.read_text("utf-8")))
    assert named <= {p.name for p in (ROOT / "configs").iterdir()}


def test_architectures_are_those_of_mlx_lm() -> None:
    """The table is of the mlx-lm that is installed, names all it has, and counts what it says."""
    page = (ROOT / "docs/architectures.md").read_text("utf-8")
    about = re.search(r"^# Architectures of mlx-lm (\S+)\n\n(\d+) of (\d+) ", page)
    assert about is not None
    if about[1] != version("mlx-lm"):
        pytest.skip(f"the page is of mlx-lm {about[1]}")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"][2:]
    assert [row[0] for row in rows] == names()
    whole = [row for row in rows if row[1:5] == ["yes"] * 4]
    assert (int(about[2]), int(about[3])) == (len(whole), len(rows))
    assert all(row[5] for row in rows if row not in whole), "a reason for each that is not"
    assert len(whole) >= 115
