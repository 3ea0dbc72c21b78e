"""What mkdocs generates: pages from outside docs/, the commands, the settings, and the recipes.

A page holds `<!-- generated: NAME -->` where the text of GENERATED[NAME] goes. Commands and settings come from the code
itself, in this process, so they cannot differ from it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Pages of the site that stand elsewhere, since GitHub looks for them there.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in what is generated, and lead links to where their pages are on the site."""
    source = {to: at for at, to in ELSEWHERE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = re.sub(r"<!-- generated: (\w+) -->", lambda found: "\n".join(GENERATED[found[1]]()), markdown)
    return re.sub(r"\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)", lambda m: f"]({place_of(source, m[1])}{m[2] or ''})", markdown)


def place_of(source: str, link: str) -> str:
    """Return where a link of a file of the repository leads on the site; as it is where the site has no such page."""
    path = (ROOT / source).parent.joinpath(link).resolve()
    target = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else link
    if path.parent.name == "configs" or target == "configs":
        return "recipes.md" + (f"#{slug(path.name)}" if path.suffix else "")
    return ELSEWHERE.get(target, target.removeprefix("docs/"))


def slug(title: str) -> str:
    """Return the anchor of a title, as GitHub and mkdocs make it from one without spaces."""
    return re.sub(r"[^\w-]", "", title.lower())


# --- what is generated ------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Yield the help of all commands."""
    import click

    from mlxft.cli import cli

    def shown(command: click.Command, name: str) -> Iterator[str]:
        context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
        yield from (f"## {name}", "", "```text", command.get_help(context), "```", "")
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                assert found is not None
                yield from shown(found, f"{name} {below}")

    yield from shown(cli, "mlxft")


def settings() -> Iterator[str]:
    """Yield a table of each section of a recipe."""
    from mlxft.config import Config, Settings, objective_sections, objectives

    own: dict[tuple[str, type[Settings]], list[str]] = {}
    for objective in objectives():
        for section, kind in objective_sections(objective).items():
            own.setdefault((section, kind), []).append(objective)
    shared = [(n, f.annotation) for n, f in Config.model_fields.items() if n not in ("objective", "versions")]
    yield from table("objective", "The way to train.", {"objective": Config.model_fields["objective"]})
    for section, kind in shared:
        yield from table(section, (kind.__doc__ or "").splitlines()[0], kind.model_fields, f"{section}.")
    for (section, kind), users in own.items():
        about = f"For objective {', '.join(f'`{u}`' for u in users)}."
        yield from table(section, about, kind.model_fields, f"{section}.")


def table(title: str, about: str, fields: Any, prefix: str = "") -> Iterator[str]:
    yield from (f"## {title}", "", about, "", "| setting | value | default | |", "| --- | --- | --- | --- |")
    for name, field in fields.items():
        default = "needed" if field.is_required() else written(field.get_default(call_default_factory=True))
        bounds = [f"{sign} {getattr(m, at):g}" for m in field.metadata for at, sign in BOUNDS.items() if hasattr(m, at)]
        cells = (f"`{prefix}{field.alias or name}`", value_of(field.annotation, bounds), default, field.description)
        yield f"| {' | '.join(escaped(str(cell)) for cell in cells)} |"
    yield ""


BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def escaped(cell: str) -> str:
    """Return a cell whose signs mean themselves."""
    return re.sub(r"([|\[\]])", r"\\\1", cell)


def written(value: Any) -> str:
    """Return a default as YAML would have it."""
    import json

    if value is None or value in ([], {}):
        return "none"
    return f"`{value if isinstance(value, str | Path) else json.dumps(value, default=lambda v: v.model_dump())}`"


def value_of(kind: Any, bounds: list[str]) -> str:
    """Return what a setting takes, in words."""
    from pydantic import BaseModel

    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) in (list, dict, tuple):
        return {list: "list", dict: "mapping", tuple: "list"}[get_origin(kind)]
    if isinstance(kind, type):
        word = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}.get(kind)
        word = word or ("mapping" if issubclass(kind, BaseModel) else kind.__name__)
        return " ".join([word, ", ".join(bounds)]).strip()
    parts = [value_of(part, bounds) for part in get_args(kind) if part is not type(None)]
    return " or ".join(dict.fromkeys(parts))


def recipes() -> Iterator[str]:
    """Yield all recipes as they stand in configs/."""
    for path in sorted((ROOT / "configs").iterdir()):
        if path.suffix in (".yaml", ".py"):
            kind = {".yaml": "yaml", ".py": "python"}[path.suffix]
            yield from (f"## {path.name}", "", f"```{kind}", path.read_text("utf-8").rstrip(), "```", "")


def api() -> Iterator[str]:
    """Yield what mkdocstrings documents: every name of `mlxft.__all__`."""
    import mlxft

    for name in mlxft.__all__:
        if name not in ("__version__", "errors"):  # the page has the errors in a section of their own
            yield from (f"::: mlxft.{name}", "")


def errors() -> Iterator[str]:
    """Yield what mlxft raises."""
    from mlxft import errors

    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, errors.MlxftError):
            yield from (f"::: mlxft.errors.{name}", "    options:", "      heading_level: 3", "")


GENERATED = {"api": api, "errors": errors, "commands": commands, "settings": settings, "recipes": recipes}
