"""How completions are sampled: the section `rollout`."""

from __future__ import annotations

from pydantic import Field, field_validator

from mlxft.config import Settings
from mlxft.objectives.onpolicy.settings import RewardsSettings


class RolloutSettings(Settings):
    """The section `rollout`: how completions are sampled."""

    prompts: int = Field(32, ge=1, le=10**6, description="Rows of prompts a rollout.")
    samples: int = Field(1, ge=1, le=10**4, description="Completions sampled of each prompt.")
    max_tokens: int = Field(64, ge=1, le=10**6, description="Longest completion in tokens.")
    temperature: float = Field(1.0, description="Sampling temperature, above 0; log-probabilities are taken at it too.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens of this much mass; 1: from all."
    )
    top_k: int = Field(0, ge=0, description="Sample from so many of the likeliest tokens; 0: from all.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Leave out tokens less likely than this share of the likeliest.")
    stop: list[str] = Field(
        default_factory=list, description="Texts that end a completion, beside EOS; in its thoughts they do not count."
    )
    stop_at_eos: bool = Field(True, description="End a completion at EOS; false: sample on to max_tokens.")
    rows: int | None = Field(None, ge=1, description="Completions decoded at once; default: the sampler's choice.")

    @field_validator("temperature")
    @classmethod
    def _samples(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(
                f"must be above 0, seen {value:g}: at 0 the likeliest token is always taken, and on-policy training "
                "needs sampling to see which of several completions is better; 1.0 is usual"
            )
        return value

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("has an empty text, which would end every completion at once; leave it out")
        return value

    def bias_note(self) -> str | None:
        """What to warn of where tokens are left out in sampling; None where none are."""
        on = [f"rollout.{name}" for name in ("top_p", "top_k", "min_p") if getattr(self, name) != _OFF[name]]
        if not on:
            return None
        return (
            f"{', '.join(on)}: completions are sampled from part of the vocabulary, and log-probabilities are of all "
            "of it: ratios and KL are biased; leave it out unless sampling needs it"
        )


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


def sections(own: dict[str, type[Settings]]) -> dict[str, type[Settings]]:
    """The sections of an on-policy objective's recipe."""
    return {**own, "rollout": RolloutSettings, "rewards": RewardsSettings}
