"""Commands shown in README.md and docs/ are commands there are: options, arguments, recipes and settings."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml
from architectures import names

import mlxft
from mlxft.cli import COMMANDS, cli
from mlxft.config import Config, all_keys, load_config, objective_sections, objectives

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
    recipe = context.params.get("recipe")
    if command.name in ("train", "check") and recipe is not None and "=" not in str(recipe):
        load_config(recipe, list(context.params["overrides"]))


@pytest.mark.parametrize("line", shown(mentions))
def test_options_mentioned_are_there(line: str) -> None:
    command, arguments = parse(line)
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    assert {a.split("=")[0] for a in arguments if a.startswith("-")} <= known


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which makes what the site has and no file does."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Titles as GitHub and mkdocs make links of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", page.read_text("utf-8"))
    places = [((page.parent / link if link else page), anchor) for link, anchor in links]
    assert [str(place) for place, _ in places if not place.exists()] == []
    assert [f"{place.name}#{at}" for place, at in places if at and at not in anchors(place)] == []


def test_the_site_has_every_page_once(hooks: ModuleType) -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def pages(nav: object) -> Iterator[str]:
        for below in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
            yield from [below] if isinstance(below, str) else pages(below)

    found = sorted(pages(site["nav"]))
    assert found == sorted([*hooks.ELSEWHERE.values(), *(p.name for p in (ROOT / "docs").glob("*.md"))])
    assert all((ROOT / source).is_file() for source in hooks.ELSEWHERE)


def test_what_is_generated_is_whole(hooks: ModuleType) -> None:
    """Every command, setting, recipe and name of the API is on its page."""
    text = {name: "\n".join(make()) for name, make in hooks.GENERATED.items()}
    assert all(f"\n## mlxft {name}\n" in text["commands"] for name in [*COMMANDS, "runs rm"])
    keys = [key for key in all_keys(Config) if not key.startswith("versions")]
    for objective in objectives():
        keys += [f"{s}.{key}" for s, kind in objective_sections(objective).items() for key in all_keys(kind)]
    assert len(keys) > 120
    assert [key for key in keys if f"| `{key}` |" not in text["settings"]] == []
    assert re.findall(r"^## (.*)$", text["recipes"], re.MULTILINE)[0] == "continued-pretraining.yaml"
    assert set(re.findall(r"^::: mlxft\.(\w+)$", text["api"], re.MULTILINE)) == {*mlxft.__all__} - {
        "__version__",
        "errors",
    }
    assert "::: mlxft.errors.ConfigError" in text["errors"]
    marked = [name for page in PAGES for name in re.findall(r"<!-- generated: (\w+) -->", page.read_text("utf-8"))]
    assert sorted(marked) == sorted(text)


def test_links_lead_to_the_same_on_the_site(hooks: ModuleType) -> None:
    assert hooks.place_of("README.md", "docs/hub.md") == "hub.md"
    assert hooks.place_of("docs/methods.md", "../benchmarks/README.md") == "benchmarks.md"
    assert hooks.place_of("docs/recipes.md", "../configs/sft-lora.yaml") == "recipes.md#sft-lorayaml"
    assert hooks.place_of("benchmarks/README.md", "../docs/architectures.md") == "architectures.md"


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
