"""A recipe of `mlxft label`: its options in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from mlxft.config import Settings
from mlxft.recipe import read_settings


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
    return read_settings(path, Label, "configs/label.yaml shows one of mlxft label").model_dump(exclude_none=True)
