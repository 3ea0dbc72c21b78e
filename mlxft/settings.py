"""What every section of a recipe is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A section of a recipe: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _takes(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would take true for 1; in YAML 1.1, which other programs write, on and off are true and false.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {"on", "off"} <= set(get_args(kind)):
            return "on" if value else "off"
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"expected another value than {str(value).lower()}")
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, int) and abs(part) >= 2**63:
                raise ValueError(f"a number of {len(str(part))} digits; expected one below 2^63")
            if isinstance(part, str | Path) and "\0" in str(part):
                raise ValueError(f"holds the character NUL; seen {part!r:.60}")
        return value
