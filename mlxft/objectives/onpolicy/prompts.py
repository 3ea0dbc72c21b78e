"""Prompts that completions are sampled for, and what a recipe for that may not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mlxft.config import Config, Settings
from mlxft.data.encode import chat_notes, encode_prompt, turn_end
from mlxft.data.formats import Example, Prompt, tools_of
from mlxft.data.sources import report_lines
from mlxft.data.splits import of_valid
from mlxft.errors import ConfigError, DataError, TrainingError
from mlxft.model.load import context_of, load_config
from mlxft.objectives.base import NoDropout
from mlxft.objectives.onpolicy.rolled import RolloutSettings
from mlxft.objectives.onpolicy.rollout import EncodedPrompt

NO_DROPOUT = NoDropout("the policy that samples and the one that is trained would differ")
MAX_KL = 4.0  # nats a token: of the text that is written, the reference would have drawn 2 % of the tokens


class Method(Settings):
    """What every on-policy method has among its settings."""

    kl_coef: float = Field(0.05, ge=0, description="What a nat of KL to the reference costs; 0: no reference is kept.")
    epochs: int = Field(1, ge=1, description="Passes over each rollout.")
    minibatches: int = Field(1, ge=1, description="Steps (optimiser updates) that a pass is cut into.")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="End the passes over a rollout after one in whose mean the policy is 1.5 times so far from the one "
        "that sampled it, in nats a token (approx_kl_k3); default: never.",
    )
    max_kl: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description=f"Stop the run when KL to the reference is above, in nats a token, mean over a rollout; auto: "
        f"{MAX_KL:g} where kl_coef is above 0, else never; null: never.",
    )

    @property
    def highest_kl(self) -> float | None:
        """`max_kl` as a number, if there is a bound."""
        if self.max_kl == "auto":
            return MAX_KL if self.kl_coef else None
        return self.max_kl

    @property
    def refers(self) -> bool:
        """Whether anything needs the reference's log-probabilities."""
        return self.kl_coef > 0 or self.highest_kl is not None


def check_recipe(config: Config, rollout: RolloutSettings, grouped: bool) -> list[str]:
    """What is worth a note.

    Raises:
        ConfigError: settings that have no meaning for completions of the model's own; all of them in one.
    """
    data, name = config.data, config.objective
    problems = []
    if data.format != "prompts":
        problems.append(f"data.format: {data.format} is not for objective {name}; it is prompts, rows with a prompt")
    if data.train_on is not None:
        problems.append("data.train_on: completions are trained whole; leave it out")
    if data.overflow not in ("error", "drop"):
        problems.append(f"data.overflow: {data.overflow} would make another prompt of one; choose error or drop")
    if config.batch.pack:
        problems.append(f"batch.pack: is not for objective {name}, whose completions are rows of their own")
    if config.batch.accumulate != 1:
        problems.append(
            f"batch.accumulate: {name}.minibatches says how many steps a rollout is cut into, and batch.tokens or rows "
            "how many completions are computed at once; leave accumulate out"
        )
    problems += NO_DROPOUT.problems(config)
    if grouped and rollout.samples < 2:
        problems.append(f"rollout.samples: {name} compares completions of one prompt; give at least 2")
    if data.max_length <= rollout.max_tokens:
        problems.append(
            f"data.max_length ({data.max_length}) is of prompt and completion together: raise it above "
            f"rollout.max_tokens ({rollout.max_tokens})"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    notes = [note] if (note := rollout.bias_note()) else []
    if not getattr(config, name).refers:
        notes.append(
            f"{name}.kl_coef is 0: no reference is asked, and kl is not reported ({name}.max_kl: a number asks)"
        )
    if config.run.steps is None and getattr(config, name).target_kl is not None:
        notes.append(
            f"run.epochs is counted in steps, as if {name}.target_kl ended no rollout early: those that it ends leave "
            "steps for more rollouts"
        )
    return notes


def check_kl(kl: float, name: str, most: float | None, validated: bool) -> None:
    """TrainingError where KL to the reference, in nats a token, is above the objective's `max_kl`.

    Args:
        validated: whether there are held-out prompts, by which the best weights are known.
    """
    kept = "Weights that a validation found best, and checkpoints, stay as they were"
    if not validated:
        kept = "Checkpoints (run.save_every) stay as they were; with data.valid the best weights would be kept as well"
    if most is not None and kl > most:
        raise TrainingError(
            f"the policy has run away from the reference: KL is {kl:.4g} nats a token, {name}.max_kl is {most:g}. "
            f"Raise {name}.kl_coef, lower optim.lr or {name}.epochs, or look for what the reward is cheated by in "
            f"samples.jsonl. {kept}"
        )


class _Room(NamedTuple):
    """Tokens that a prompt may have, what bounds them, and a way out, for messages."""

    tokens: int
    bound: str
    way: str


def encode_prompts(
    train: Sequence[Example], valid: Sequence[Example], config: Config, tokenizer: Any, notes: list[str]
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    """Prompts to train on, and held-out ones if there are any, as the model sees them.

    Args:
        notes: takes what was left out.
    Raises:
        ConfigError: completions are to end at EOS, and there is none; or they are longer than the model's context.
        DataError: prompts that can not be rendered or that leave no room for a whole completion, all of them in one;
            or none is left.
    """
    if config.data.template == "auto" and train:
        item = train[0].item
        assert isinstance(item, Prompt)
        asked = item.prompt if isinstance(item.prompt, list) else None
        notes += chat_notes(tokenizer, turn_end(tokenizer, asked, tools_of(item.row)))
    room = _room(config)
    found = _encode(train, config, tokenizer, room, notes)
    with of_valid():
        return found, _encode(valid, config, tokenizer, room, notes) if valid else []


def _encode(
    examples: Sequence[Example], config: Config, tokenizer: Any, room: _Room, notes: list[str]
) -> list[EncodedPrompt]:
    longest, why, way = room
    if config.section("rollout", RolloutSettings).stop_at_eos and not tokenizer.eos_token_ids:
        raise ConfigError(
            "rollout.stop_at_eos: the tokenizer has no EOS token, so no completion can end at one; set it to false: "
            "completions then end at a text of rollout.stop, or at rollout.max_tokens"
        )
    chat = config.data.template == "auto"
    found: list[EncodedPrompt] = []
    problems: list[str] = []
    dropped = 0
    for where, item in examples:
        assert isinstance(item, Prompt)
        try:
            tools = tools_of(item.row)
            ids = encode_prompt(item.prompt, tokenizer, tools=tools, chat=chat, where=where)
        except DataError as error:
            problems.append(str(error))
            continue
        if not ids:
            problems.append(f"{where}: the prompt has no token")
        elif len(ids) > longest and config.data.overflow == "drop":
            dropped += 1
        elif len(ids) > longest:
            problems.append(
                f"{where}: {len(ids)} tokens; {why} less rollout.max_tokens leaves {longest}. {way}, or set "
                "data.overflow: drop"
            )
        else:
            text = item.prompt if isinstance(item.prompt, str) else str(tokenizer.decode(ids))
            found.append(EncodedPrompt(np.array(ids, dtype=np.int32), text, item.row, where, item.prompt))
    if problems:
        raise DataError(report_lines(problems))
    if dropped:
        notes.append(f"{dropped:,} prompts leave no room for a completion within {why} and are left out")
    if not found:
        raise DataError(f"no prompt is left to sample from: {why} less rollout.max_tokens leaves {longest} tokens")
    return found


def _room(config: Config) -> _Room:
    most, answer = config.data.max_length, config.section("rollout", RolloutSettings).max_tokens
    context = context_of(load_config(config.model.path))
    if context is None or context >= most:
        return _Room(most - answer, f"data.max_length ({most})", "Raise the first")
    if context <= answer:
        raise ConfigError(f"rollout.max_tokens ({answer}) leaves no room for a prompt in the model's {context} tokens")
    return _Room(context - answer, f"the model's context ({context})", "Lower rollout.max_tokens")
