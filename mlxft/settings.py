"""What every section of a recipe is."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A section of a recipe: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, and pydantic would take true for 1.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {"on", "off"} <= set(get_args(kind)):
            return "on" if value else "off"
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"expected another value than {str(value).lower()} (YAML reads yes, no, on and off so)")
        return value
