"""What README.md shows is true: its recipe, its example rows and its settings are those of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import Config, all_keys, read_yaml
from mlxft.data.formats import FORMATS
from mlxft.objectives.sft import FORMATS as SFT_FORMATS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
FORMAT_ROWS = re.findall(r"^\| `([\w-]+)` \| `(\{.*\})` \|$", README, re.MULTILINE)


def test_the_recipe_shown_is_the_one_that_runs() -> None:
    block = README.split("runs as it is:\n\n", 1)[1].split("\n\nWhat it does not say", 1)[0]
    assert read_yaml(block, "README.md") == yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))


def test_every_trainable_format_has_an_example() -> None:
    assert [name for name, _ in FORMAT_ROWS] == list(SFT_FORMATS)


@pytest.mark.parametrize(("name", "row"), FORMAT_ROWS, ids=[name for name, _ in FORMAT_ROWS])
def test_example_row_is_in_its_format(name: str, row: str) -> None:
    read: Any = FORMATS[name].read(yaml.safe_load(row))
    assert read


def test_every_setting_named_exists() -> None:
    sections = "|".join(name for name in Config.model_fields if name not in ("objective", "versions"))
    named = set(re.findall(rf"(?<![\w/.-])(?:{sections})\.(?!gguf|yaml)[a-z_]+\b(?!\.?[/(\w])", README))
    assert len(named) > 30
    keys = set(all_keys(Config))
    wrong = named - keys - {"run.dir", "run.metrics", "run.stpes", "tune.rnak"}  # an object's, and the wrong ones shown
    assert not wrong, f"README names settings that do not exist: {sorted(wrong)}"


def test_every_recipe_is_listed() -> None:
    listed = re.findall(r"^\| `([\w-]+\.yaml)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in (ROOT / "configs").glob("*.yaml"))
