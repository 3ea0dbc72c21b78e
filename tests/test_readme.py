"""What README.md and the pages of docs/ show is true: recipes, example rows, settings, errors, names of other tools."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import Config, all_keys, objective_sections, objectives, read_yaml
from mlxft.data.formats import FORMATS
from mlxft.objectives.sft import SFT_FORMATS as SFT_FORMATS

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FORMAT_ROWS = re.findall(r"^\| `([\w-]+)` \| `(\{.*\})` \|$", PAGES["data.md"], re.MULTILINE)
CODE = r"`([^`]+)`"


def test_readme_is_short_and_begins_with_what_works() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 170
    first = re.findall(r"^    (git|make)\b(.*?)(?: {2,}#.*)?$", PAGES["README.md"], re.MULTILINE)[:3]
    assert first == [("git", " clone <this repository> && cd mlxft"), ("make", " demo"), ("make", " test")]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", "".join(PAGES.values())))
    assert {"demo", "rlhf", "docs"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "quickstart.md"])
def test_the_recipe_shown_is_the_one_that_runs(page: str) -> None:
    shown = re.search(r"runs as it is:\n\n((?:    .*\n)+)", PAGES[page])
    assert shown is not None
    assert read_yaml(shown[1], page) == yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))


def test_every_format_has_an_example() -> None:
    assert [name for name, _ in FORMAT_ROWS][: len(SFT_FORMATS)] == list(SFT_FORMATS)
    assert {name for name, _ in FORMAT_ROWS} == set(FORMATS)


@pytest.mark.parametrize(("name", "row"), FORMAT_ROWS, ids=[name for name, _ in FORMAT_ROWS])
def test_example_row_is_in_its_format(name: str, row: str) -> None:
    read: Any = FORMATS[name].read(yaml.safe_load(row))
    assert read


def test_every_setting_named_exists() -> None:
    keys = set(all_keys(Config))
    for objective in objectives():
        keys |= {f"{s}.{key}" for s, kind in objective_sections(objective).items() for key in all_keys(kind)}
    sections = "|".join({key.partition(".")[0] for key in keys} - {"objective", "versions"})
    shown_wrong = {"run.dir", "run.metrics", "run.stpes", "tune.rnak"}  # an object's, and mistakes shown
    found: set[str] = set()
    for page, text in PAGES.items():
        named = set(
            re.findall(rf"(?<![\w/.-])(?:{sections})\.(?!gguf|yaml|py|jsonl|md|html)[a-z_]+\b(?!\.?[/(\w])", text)
        )
        assert named <= keys | shown_wrong, page
        found |= named
    assert len(found) > 80


def test_every_recipe_is_listed() -> None:
    listed = re.findall(r"^\| `([\w-]+\.yaml)` \|", PAGES["recipes.md"], re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in (ROOT / "configs").glob("*.yaml"))


def test_every_error_quoted_is_one() -> None:
    source = "".join(path.read_text("utf-8") for path in sorted((ROOT / "mlxft").rglob("*.py")))
    quoted = re.findall(r"^### `(.+)`$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 20
    assert [text for text in quoted if text not in source] == []


def test_settings_of_mlx_lm_are_named_as_they_are() -> None:
    """The column of mlx_lm.lora, which is installed; a cell names a setting first and may explain it then."""
    from mlx_lm.lora import CONFIG_DEFAULTS

    about = re.search(r"mlx-lm (\d\S+\d)", PAGES["migrating.md"])
    assert about is not None
    if about[1] != version("mlx-lm"):
        pytest.skip(f"the page is of mlx-lm {about[1]}")
    rows = [line.strip("|").split("|") for line in PAGES["migrating.md"].splitlines() if line.startswith("| `")]
    named = {
        name.partition(".")[0]
        for row in rows
        for name in re.findall(rf"^ {CODE}(?:, {CODE})?", row[1])
        for name in name
    }
    assert len(named) > 15
    assert named - {""} <= {*CONFIG_DEFAULTS, "steps_per_eval", "warmup"}  # warmup: in lr_schedule


def test_python_shown_can_be_read() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", "".join(PAGES.values()), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        compile(block, "a page", "exec")
