"""A recipe of `mlxft label`: its options in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mlxft.config import Settings
from mlxft.errors import ConfigError
from mlxft.explain import explain
from mlxft.recipe import read_yaml


class Label(Settings):
    """Each setting is the option of its name; what stands there and is not given has the option's default."""

    prompts: str | None = Field(None, min_length=1, description="Rows with a prompt; those with answers are judged.")
    out: Path | None = Field(None, description="Judgements, a line each; gone on with if it exists.")
    model: str | None = Field(None, min_length=1, description="What answers.")
    adapter: str | None = Field(None, min_length=1, description="Adapter folder or run to put on the model.")
    against: str | None = Field(None, min_length=1, description="Another model: one answer from each.")
    n: int | None = Field(None, ge=2, le=9, description="Answers a prompt.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer.")
    temperature: float | None = Field(None, ge=0, description="Of sampling.")
    seed: int | None = Field(None, ge=0, description="Of the answers and their order.")


def read_label_recipe(path: Path) -> dict[str, Any]:
    """The settings that a recipe gives, by name.

    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: can not read the recipe: {getattr(e, 'strerror', None) or e}") from e
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    if {"objective", "data", "tune"} & raw.keys():
        raise ConfigError(f"{path}: is a recipe of mlxft train; configs/label.yaml shows one of mlxft label")
    try:
        found = Label.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(e, Label))) from e
    return found.model_dump(exclude_none=True)
