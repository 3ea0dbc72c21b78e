"""The recipes of configs/ as they are installed: list them, and write one with the files that it names."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

from mlxft.errors import ConfigError, nearest
from mlxft.files import check_file, text_writer, write_result

_PACKAGE = Path(__file__).parents[1]
# What recipes name by its place in a clone.
_FILES = re.compile(r"mlxft/(demo/[\w-]+\.jsonl)|(configs/[\w-]+\.py)")


def recipe_names() -> dict[str, str]:
    """Return the name of each recipe, and the first sentence of its comment."""
    found = {}
    for path in sorted((_PACKAGE / "configs").glob("*.yaml")):
        comment = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
        text = " ".join(line.removeprefix("#").strip(" ") for line in comment)
        found[path.stem] = re.split(r"\. |: +mlxft ", text)[0].rstrip(".")
    return found


def copy_recipe(name: str, out: Path | None = None, overwrite: bool = False) -> list[Path]:
    """Write a recipe, and beside it the rows and the Python file that it names.

    Args:
        out: file to write (default: NAME.yaml in the working folder).
    Returns:
        The files that were written, the recipe first.
    Raises:
        ConfigError: there is no such recipe, or a file exists and is another one.
    """
    known = recipe_names()
    name = Path(name).name.removesuffix(".yaml")
    if name not in known:
        raise ConfigError(f"{name}: no such recipe{nearest(name, known)}; mlxft recipes lists them")
    out = Path(f"{name}.yaml") if out is None else out
    text = (_PACKAGE / "configs" / f"{name}.yaml").read_text("utf-8")
    text = re.sub(r"configs/([\w-]+\.yaml)", lambda at: str(out) if at[1] == f"{name}.yaml" else at[1], text)
    wanted = {out: _FILES.sub(lambda found: str(out.parent / os.path.basename(found[0])), text)}
    for named in _FILES.finditer(text):
        beside = out.parent / os.path.basename(named[0])
        wanted[beside] = (_PACKAGE / (named[1] or named[2])).read_text("utf-8")
    new = {path: text for path, text in wanted.items() if not _holds(path, text)}
    for path in new:
        check_file(path, overwrite, "FILE")
    for path, text in new.items():
        write_result(path, text_writer(text))
    return list(wanted)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text("utf-8") == text
    except (OSError, ValueError):
        return False
