"""What on-policy objectives share: prompts, rollouts with the current weights, rewards, micro-batches, validation.

`steps` is a generator that the loop pulls: it samples and scores a rollout, and then yields its minibatches, each a
step, for some epochs. What frozen models say of a completion is computed when it is sampled, and is in its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from pydantic import Field, field_validator

from mlxft.config import Config, DataSettings, Settings
from mlxft.data.chat import decode_completion, opening_after, until_stop
from mlxft.data.dataset import (
    Encoded,
    EncodedCompletion,
    Ids,
    chat_notes,
    data_fingerprint,
    encode_prompt,
    load_splits,
    of_valid,
    plan_epoch,
    turn_end,
)
from mlxft.data.formats import Example, Prompt, tools_of
from mlxft.data.sources import report_lines
from mlxft.distributed import Portion, assign, current
from mlxft.errors import ConfigError, DataError, TrainingError
from mlxft.model.cpu import as_trained
from mlxft.model.frozen import FrozenModel, FrozenModels, FrozenSource, is_bare
from mlxft.model.layers import probing
from mlxft.model.load import context_of, read_model_config, trusting
from mlxft.model.logits import Draw, ahead, rows_logprobs, rows_logprobs_entropy
from mlxft.model.memory import (
    Beside,
    Outline,
    Residents,
    Rolling,
    Shape,
    ShapeSplit,
    sampling_bytes,
    scoring_bytes,
)
from mlxft.model.prefix import Completions
from mlxft.model.sampling import ROWS_AT_ONCE, Sampling, never_drawn, sample_batch
from mlxft.objectives.base import (
    MakesStep,
    MicroBatch,
    NoDropout,
    Objective,
    Step,
    Summary,
    Terms,
    heaviest,
    real_mask,
    whole_row_problems,
)
from mlxft.objectives.episodes import LIMITS, EncodedPrompt, EnvironmentSettings, Episode, Episodes
from mlxft.objectives.functional import equal_groups, wins
from mlxft.objectives.pairs import stack
from mlxft.objectives.rewards import Rewards, RewardsSettings, Scores, ToScore, find_reward_run
from mlxft.text import VALUE, Event, counted

# --- settings ---------------------------------------------------------------------------------------------------------


class RolloutSettings(Settings):
    """The section `rollout`: how completions are sampled."""

    prompts: int = Field(32, ge=1, le=10**6, description="Prompts per rollout.")
    samples: int = Field(1, ge=1, le=10**4, description="Completions per prompt.")
    max_tokens: int = Field(
        64, ge=1, le=10**6, description="Longest completion in tokens; with an environment, longest turn."
    )
    temperature: float = Field(1.0, description="Sampling temperature, above 0, also of log-probabilities.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens up to this probability mass; 1: from all."
    )
    top_k: int = Field(0, ge=0, description="Sample from this many of the likeliest tokens; 0: from all.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Leave out tokens below this share of the likeliest token's probability."
    )
    stop: list[str] = Field(
        default_factory=list, description="Texts that end a completion, besides EOS; inside thoughts they do not."
    )
    stop_at_eos: bool = Field(True, description="End a completion at EOS; false: sample up to max_tokens.")
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
        """Return a warning where sampling leaves tokens out, else None."""
        on = [f"rollout.{name}" for name in ("top_p", "top_k", "min_p") if getattr(self, name) != _OFF[name]]
        if not on:
            return None
        return (
            f"{', '.join(on)}: completions are sampled from part of the vocabulary while log-probabilities are over "
            "all of it, so ratios and KL are biased; leave it out unless sampling needs it"
        )


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


def sections(own: dict[str, type[Settings]]) -> dict[str, type[Settings]]:
    """Return the sections of an on-policy objective's recipe."""
    return {**own, "rollout": RolloutSettings, "rewards": RewardsSettings, "environment": EnvironmentSettings}


_NO_DROPOUT = NoDropout("the policy that samples and the one that is trained would differ")
MAX_KL = 4.0  # nats a token: the reference would sample 2 % of the tokens that the policy writes


class PassSettings(Settings):
    """Settings of every objective that trains on rollouts."""

    epochs: int = Field(1, ge=1, description="Passes over each rollout.")
    minibatches: int = Field(
        1, ge=1, description="Minibatches per pass over a rollout; batch.accumulate of them make a step."
    )


class OnPolicySettings(PassSettings):
    """Settings of every on-policy method with rewards."""

    kl_coef: float = Field(0.05, ge=0, description="Cost of a nat of KL to the reference; 0: no reference is kept.")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="End the passes over a rollout once the policy's mean KL to the one that sampled it is above 1.5 "
        "times this, in nats a token (approx_kl_k3); default: never.",
    )
    max_kl: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="Stop the run when the mean KL to the reference over a rollout is above this, in nats a token; "
        f"auto: {MAX_KL:g} where kl_coef is above 0, else never; null: never.",
    )

    @property
    def highest_kl(self) -> float | None:
        """Return `max_kl` as a number, None where there is no bound."""
        if self.max_kl == "auto":
            return MAX_KL if self.kl_coef else None
        return self.max_kl

    @property
    def refers(self) -> bool:
        """Return whether anything needs the reference's log-probabilities."""
        return self.kl_coef > 0 or self.highest_kl is not None


def check_on_policy_recipe(config: Config, rollout: RolloutSettings, name: str, grouped: bool) -> list[str]:
    """Check an on-policy recipe, and return notes.

    Raises:
        ConfigError: settings have no meaning for completions that are sampled; all of them in one.
    """
    data = config.data
    problems = whole_row_problems(config, ("prompts",), _NO_DROPOUT)
    if grouped and rollout.samples < 2:
        problems.append(f"rollout.samples: {name} compares completions of one prompt; give at least 2")
    if data.max_length <= rollout.max_tokens:
        problems.append(
            f"data.max_length ({data.max_length}) bounds prompt and completion together: raise it above "
            f"rollout.max_tokens ({rollout.max_tokens})"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    notes = [note] if (note := rollout.bias_note()) else []
    if not getattr(config, name).refers:
        notes.append(
            f"{name}.kl_coef is 0: no reference is kept, and kl is not reported (unless {name}.max_kl is a number)"
        )
    if config.run.steps is None and getattr(config, name).target_kl is not None:
        notes.append(
            f"run.epochs is converted to steps as if {name}.target_kl ended no rollout early; steps that it saves go "
            "to further rollouts"
        )
    return notes


def check_kl(kl: float, name: str, most: float | None, validated: bool) -> None:
    """Raise TrainingError where KL to the reference, in nats a token, is above the objective's `max_kl`.

    Args:
        validated: whether there are held-out prompts, so that the best weights are kept.
    """
    kept = "The best weights by validation, and checkpoints, are unchanged"
    if not validated:
        kept = "Checkpoints (run.save_every) are unchanged; with data.valid the best weights would be kept as well"
    if most is not None and kl > most:
        raise TrainingError(
            f"the policy has moved too far from the reference: KL is {kl:.4g} nats a token, {name}.max_kl is {most:g}. "
            f"Raise {name}.kl_coef, lower optim.lr or {name}.epochs, or look in samples.jsonl for how completions "
            f"exploit the reward. {kept}"
        )


# --- prompts ----------------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """Tokens that a prompt may have, what bounds them, and the way out, for messages."""

    tokens: int
    bound: str
    way: str


def encode_prompts(
    train: Sequence[Example],
    valid: Sequence[Example],
    config: Config,
    tokenizer: Any,
    notes: list[str],
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    """Return the prompts to train on, and held-out ones, as the model sees them.

    Args:
        notes: a note on what was left out is appended.
        tools: those of an environment, beside the rows' own.
    Raises:
        ConfigError: completions are to end at EOS and there is none; or they are longer than the model's context.
        DataError: prompts cannot be rendered or leave no room for a whole completion, all of them in one; or none is
            left.
    """
    if config.data.template == "auto" and train:
        item = train[0].item
        assert isinstance(item, Prompt)
        asked = item.prompt if isinstance(item.prompt, list) else None
        notes += chat_notes(tokenizer, turn_end(tokenizer, asked, tools_of(item.row)))
    room = room_for_prompts(config, tokenizer)
    found = _encode(train, config, tokenizer, room, notes, tools)
    with of_valid():
        return found, _encode(valid, config, tokenizer, room, notes, tools) if valid else []


def _encode(
    examples: Sequence[Example],
    config: Config,
    tokenizer: Any,
    room: Room,
    notes: list[str],
    more: Sequence[dict[str, Any]],
) -> list[EncodedPrompt]:
    longest, why, way = room
    chat = config.data.template == "auto"
    found: list[EncodedPrompt] = []
    problems: list[str] = []
    dropped = 0
    for where, item in examples:
        assert isinstance(item, Prompt)
        try:
            tools = [*(tools_of(item.row) or ()), *more] or None
            ids = encode_prompt(item.prompt, tokenizer, tools=tools, chat=chat, where=where)
        except DataError as error:
            problems.append(str(error))
            continue
        if not ids:
            problems.append(f"{where}: the prompt has no tokens")
        elif len(ids) > longest and config.data.overflow == "drop":
            dropped += 1
        elif len(ids) > longest:
            problems.append(
                f"{where}: {len(ids)} tokens; {why} minus rollout.max_tokens leaves {longest}. {way}, or set "
                "data.overflow: drop"
            )
        else:
            text = item.prompt if isinstance(item.prompt, str) else str(tokenizer.decode(ids))
            found.append(EncodedPrompt(np.array(ids, dtype=np.int32), text, item.row, where, item.prompt))
    if problems:
        raise DataError(report_lines(problems))
    if dropped:
        notes.append(counted(dropped, f"prompts leave no room for a completion within {why} and are left out"))
    if not found:
        raise DataError(f"no prompt is left to sample from: {why} minus rollout.max_tokens leaves {longest} tokens")
    return found


def room_for_prompts(config: Config, tokenizer: Any) -> Room:
    """Return the room that completions leave to prompts.

    Raises:
        ConfigError: completions are to end at EOS and there is none; or they are longer than the model's context.
    """
    if config.section("rollout", RolloutSettings).stop_at_eos and not tokenizer.eos_token_ids:
        raise ConfigError(
            "rollout.stop_at_eos: the tokenizer has no EOS token, so no completion can end at one; set it to false: "
            "completions then end at a text of rollout.stop, or at rollout.max_tokens"
        )
    most, completion = config.data.max_length, config.section("rollout", RolloutSettings).max_tokens
    context = context_of(read_model_config(config.model.path))
    if context is None or context >= most:
        return Room(most - completion, f"data.max_length ({most})", "Raise the first")
    if context <= completion:
        raise ConfigError(
            f"rollout.max_tokens ({completion}) leaves no room for a prompt in the model's {context} tokens"
        )
    return Room(context - completion, f"the model's context ({context})", "Lower rollout.max_tokens")


# --- rollout ----------------------------------------------------------------------------------------------------------
# Completions of prompts with numbers for each of their tokens, and how they are cut into steps.

_Floats = npt.NDArray[np.float32]


_EACH = ("prompts", "replies", "finished", "own", "begins", "turn_rewards", "episodes")  # lists of a Rollout
Piece = tuple[list[int], int]  # completions that are computed at once, and the rank that does


@dataclass
class Rollout:
    """B completions.

    Attributes:
        number: of the rollout, from 0.
        prompts: index of each completion's prompt; completions of one prompt are neighbours.
        replies: ids of each, (R,) int32, as sampled: with the EOS that ended it. Of an episode, observations included.
        finished: whether EOS or a stop text ended it, or the environment an episode.
        scores: (B,) rewards.
        tokens: name -> numbers for each completion's tokens: old_logprobs, ref_logprobs, values, advantages, returns.
        own: of episodes, (R,) bool, which of the ids the policy wrote: a completion's tokens are these alone.
        begins: of episodes, the tokens of each prompt that stand before the ids.
        turn_rewards: of episodes, for each completion's tokens the environment's reward: a turn's at its last token.
        episodes: the episodes while they are fresh; a checkpoint does not have them.
        counts, seconds: the completions that each rank has sampled, in this order, and the time it took; while fresh.
    """

    number: int
    prompts: list[int]
    replies: list[Ids]
    finished: list[bool]
    scores: _Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    tokens: dict[str, list[_Floats]] = field(default_factory=dict)
    own: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    turn_rewards: list[_Floats] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.replies)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Return (B,) the number of tokens of each completion."""
        return np.array([int(own.sum()) for own in self.own] or [*map(len, self.replies)], dtype=np.int64)

    def lengths(self, prompts: Sequence[EncodedPrompt]) -> npt.NDArray[np.int64]:
        """Return (B,) the number of ids of prompt and completion together."""
        begins = self.begins or [len(prompts[i].ids) for i in self.prompts]
        return np.array([begin + len(reply) for begin, reply in zip(begins, self.replies)], dtype=np.int64)

    def stacked(self, rows: Sequence[int], prompts: Sequence[EncodedPrompt]) -> Completions:
        """Return some completions after their prompts as rows of a batch."""
        begins: Sequence[int | None] = self.begins or [None] * len(self)
        found = [EncodedCompletion(prompts[self.prompts[i]].ids[: begins[i]], self.replies[i]) for i in rows]
        return stack(found, own=[self.own[i] for i in rows] if self.own else None)

    @property
    def rewards(self) -> mx.array:
        """Return (B, T) float32: the environment's reward of each turn, and what else is in the score at the end."""
        found = pad(self.turn_rewards or [np.zeros(size, np.float32) for size in self.sizes], int(self.sizes.max()))
        found[np.arange(len(self)), self.sizes - 1] += self.scores - found.sum(axis=1)
        return mx.array(found)

    def put(self, to: slice, more: Rollout, of: slice) -> None:
        """Put completions of another rollout, not scored yet, in the places of some of this one's."""
        for name in _EACH:
            getattr(self, name)[to] = getattr(more, name)[of]

    def sampled_by(self, rank: int) -> Rollout:
        """Return the completions, not scored yet, that a rank has sampled."""
        start = sum(self.counts[:rank])
        return replace(self, **{name: getattr(self, name)[start : start + self.counts[rank]] for name in _EACH})

    @classmethod
    def gathered(cls, mine: Rollout, seconds: float, prompts: Sequence[EncodedPrompt]) -> Rollout:
        """Return the completions that all ranks have sampled, not scored yet, in the order of the ranks."""
        ranks = current()
        if ranks.size == 1:
            return mine
        arrays = {name: np.array(value) for name, value in mine.arrays().items()} if len(mine) else {}
        parts = ranks.gather_arrays({**arrays, "seconds": np.array([seconds])})
        others = ranks.gather([episode.to_json() for episode in mine.episodes])
        found = cls(mine.number, [], [], [], seconds=[float(part.pop("seconds")[0]) for part in parts])
        for rank, (part, episodes) in enumerate(zip(parts, others)):
            one = (
                cls.of({name: mx.array(value) for name, value in part.items()})
                if part
                else cls(mine.number, [], [], [])
            )
            own = rank == ranks.rank
            one.episodes = mine.episodes if own else [Episode.of(e, prompts[i]) for i, e in zip(one.prompts, episodes)]
            found.counts.append(len(one))
            for name in _EACH:
                getattr(found, name).extend(getattr(one, name))
        return found

    def grid(self, name: str) -> mx.array:
        """Return the tokens' numbers as (B, T) float32, padded on the right with 0."""
        return mx.array(pad(self.tokens[name], int(self.sizes.max())))

    @property
    def mask(self) -> mx.array:
        """Return (B, T), 1 where a completion has a token."""
        return mx.array((np.arange(self.sizes.max()) < self.sizes[:, None]).astype(np.float32))

    def set_grid(self, name: str, values: mx.array) -> None:
        """Set the tokens' numbers from (B, T)."""
        rows = np.array(values.astype(mx.float32))
        self.tokens[name] = [row[:size].copy() for row, size in zip(rows, self.sizes)]

    def flat(self, name: str, rows: Sequence[int]) -> mx.array:
        """Return (N,) float32, the numbers of some completions' tokens."""
        return mx.array(np.concatenate([self.tokens[name][i] for i in rows]).astype(np.float32))

    def arrays(self) -> dict[str, mx.array]:
        """Return all of it, for a checkpoint."""
        found: dict[str, Any] = {
            "number": np.array([self.number], np.int32),
            "prompts": np.array(self.prompts, np.int32),
            "sizes": np.array([*map(len, self.replies)], np.int32),
            "replies": np.concatenate(self.replies).astype(np.int32),
            "finished": np.array(self.finished, np.int32),
            "scores": self.scores,
        }
        found |= {f"tokens.{name}": np.concatenate(values) for name, values in self.tokens.items()}
        if self.own:
            found |= {"own": np.concatenate(self.own).astype(np.int32), "begins": np.array(self.begins, np.int32)}
            found["turn_rewards"] = np.concatenate(self.turn_rewards)
        return {name: mx.array(value) for name, value in found.items()}

    @classmethod
    def of(cls, arrays: dict[str, mx.array]) -> Rollout:
        """Return the rollout whose `arrays` these are."""
        held = {name: np.array(value) for name, value in arrays.items()}
        ends = np.cumsum(held["sizes"])[:-1]
        found = cls(
            number=int(held["number"][0]),
            prompts=[int(i) for i in held["prompts"]],
            replies=list(np.split(held["replies"], ends)),
            finished=[bool(x) for x in held["finished"]],
            scores=held["scores"],
            own=list(np.split(held["own"].astype(bool), ends)) if "own" in held else [],
            begins=[int(i) for i in held.get("begins", ())],
        )
        each = np.cumsum(found.sizes)[:-1]
        found.tokens = {n[7:]: list(np.split(v, each)) for n, v in held.items() if n.startswith("tokens.")}
        found.turn_rewards = list(np.split(held["turn_rewards"], each)) if found.own else []
        return found


def pad(rows: Sequence[npt.NDArray[Any]], width: int) -> npt.NDArray[Any]:
    """Stack rows of unequal length, padded on the right with 0."""
    out = np.zeros((len(rows), width), dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def minibatches(count: int, parts: int, *, seed: int, rollout: int, epoch: int) -> list[list[int]]:
    """Shuffle a rollout's completions and cut them into up to `parts` parts of like size."""
    order = np.random.default_rng([seed, 2, rollout, epoch]).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, min(parts, count))]


def micro_batches(
    rows: Sequence[int], lengths: npt.NDArray[np.int64], *, tokens: int | None, most: int | None, together: int = 1
) -> list[list[int]]:
    """Cut completions into micro-batches of a token budget, or of `most` rows, by length; neighbours stay together."""
    units = [list(rows[i : i + together]) for i in range(0, len(rows), together)]
    tokens, most = (None if n is None else max(1, n // together) for n in (tokens, most))
    slots = plan_epoch(np.array([lengths[unit].max() for unit in units]), tokens=tokens, rows=most, seed=None)
    return [[i for unit in slot.rows for i in units[unit]] for slot in slots]


# --- sampling ---------------------------------------------------------------------------------------------------------
# What a rollout is made of, and dynamic sampling (DAPO, Yu et al. 2025, section 3.2), which samples more of it.


class Drawn(NamedTuple):
    """A sampled rollout with its scores.

    Attributes:
        tokens, seconds: tokens that were sampled for it, and the time taken.
        event: numbers to report.
    """

    rollout: Rollout
    scores: Scores
    tokens: int
    seconds: float
    event: dict[str, float]

    def plus(self, more: Drawn) -> Drawn:
        """Add the tokens and seconds of another one."""
        return self._replace(tokens=self.tokens + more.tokens, seconds=self.seconds + more.seconds)


def resample(objective: OnPolicy[Any], first: Drawn, most: int) -> Drawn:
    """Replace groups of equal scores, as far as `most` further rounds of sampling find groups whose scores differ.

    Each round samples as many other prompts as there are groups of equal scores, and the groups whose scores differ
    take their places: the rollout keeps its size. The prompts follow from seed and rollout alone, so that a resumed run
    takes the same. A rollout takes each prompt at most once.

    Args:
        first: completions of the rollout's own prompts; it is changed.
    Returns:
        The rollout, with all that was sampled counted, and in its event: resampled, the groups replaced;
        groups_sampled; and reward_sampled, the mean reward of all of them, free of selection.
    """
    size, number = objective.rollouts.samples, first.rollout.number
    asked = set(first.rollout.prompts)
    order = np.random.default_rng([objective.config.run.seed, 5, number]).permutation(len(objective.prompts))
    left = [int(i) for i in order if int(i) not in asked]
    replaced, every = 0, [first.scores.total.copy()]
    drawn = first
    for round_ in range(most):
        equal = np.flatnonzero(equal_groups(first.scores.total, size))
        chosen, left = left[: len(equal)], left[len(equal) :]
        if not chosen:
            break
        more = objective.sampled(chosen, number, objective.seed_of(number, round_ + 1))
        good = np.flatnonzero(~equal_groups(more.scores.total, size))
        for to, of in zip(equal, good):
            _put(first, more, slice(to * size, (to + 1) * size), slice(of * size, (of + 1) * size))
        replaced += len(good)
        every.append(more.scores.total)
        drawn = drawn.plus(more)
    event = {
        "resampled": replaced,
        "groups_sampled": sum(map(len, every)) // size,
        "reward_sampled": float(np.concatenate(every).mean()),
    }
    return drawn._replace(event={**drawn.event, **event})


def _put(drawn: Drawn, more: Drawn, to: slice, of: slice) -> None:
    """Put completions of one rollout in the places of another's, with their scores."""
    drawn.rollout.put(to, more.rollout, of)
    drawn.scores.total[to] = more.scores.total[of]
    for name, values in drawn.scores.components.items():
        values[to] = more.scores.components[name][of]


def episode_numbers(rollout: Rollout) -> dict[str, float]:
    """Return what is reported of episodes, a mean or share of them each; {} where there are none."""
    episodes = rollout.episodes
    if not episodes:
        return {}
    found = {name: [e.ended == name for e in episodes] for name in LIMITS}
    numbers: dict[str, Any] = {
        "turns": [e.turns for e in episodes],
        "tool_errors": [e.errors for e in episodes],
        "unparsed_calls": [e.unparsed for e in episodes],
        **{f"limit_{name}": values for name, values in found.items()},
    }
    return {name: float(np.mean(values)) for name, values in numbers.items()}


def episode_warning(rollout: Rollout) -> str | None:
    """Return a warning where no episode can have gone as it should; None where one has, or there are none."""
    episodes = rollout.episodes
    if episodes and all(e.errors == e.turns for e in episodes):
        return f"every step of the environment raised an error, the first episode's last: {episodes[0].failure}"
    if episodes and not any(rollout.finished):
        return "no episode was ended by the environment: see limit_turns, limit_tokens, limit_seconds"
    return None


# --- validation -------------------------------------------------------------------------------------------------------

SAMPLES_SHOWN = 4  # completions that are shown
CUT_OFF = "every completion was cut off: raise rollout.max_tokens, or set rollout.stop"


class HeldOut:
    """Completions of held-out prompts by policy and reference, always with the same random numbers."""

    def __init__(self, objective: OnPolicy[Any]) -> None:
        self._objective = objective
        self._before: Scores | None = None  # the reference's

    def measure(self) -> dict[str, Any]:
        """Return reward, KL, win rate against the reference, and some completions with their scores.

        KL where the objective reads the reference, the win rate where there is one.
        """
        o = self._objective
        every = list(range(len(o.valid)))
        seed = o.seed_of(0, valid=True)
        rollout = o.sample(o.valid, every, 1, 0, seed)
        scores = o.score(rollout, o.valid)
        entropy = o.record_logprobs(rollout, o.valid, o.pieces(every, rollout.lengths(o.valid)))
        reward, kl = float(scores.total.mean()), o.kl_of(rollout)
        return {
            # What is optimised, lower is better: it decides which weights are kept.
            "loss": (cost := o.settings.kl_coef * kl.get("kl", 0.0)) - reward,
            VALUE: reward - cost,
            "reward": reward,
            **{f"reward/{name}": float(values.mean()) for name, values in scores.components.items()},
            **kl,
            "entropy": entropy,
            "response_tokens": float(rollout.sizes.mean()),
            "eos_share": float(np.mean(rollout.finished)),
            **episode_numbers(rollout),
            **(self._against(scores, seed) if o.reference is not None else {}),
            "samples": [
                {
                    "prompt": o.valid[i].text,
                    "answer": o.text(rollout.replies[i], o.opening(o.valid[i])),
                    "score": float(scores.total[i]),
                    **({"messages": rollout.episodes[i].messages} if rollout.episodes else {}),
                }
                for i in every[:SAMPLES_SHOWN]
            ],
        }

    def _against(self, scores: Scores, seed: int) -> dict[str, float]:
        """Compare the scores with those of the reference's completions."""
        o = self._objective
        assert o.reference is not None
        if self._before is None:
            with o.reference.reading():
                self._before = o.score(o.sample(o.valid, list(range(len(o.valid))), 1, 0, seed), o.valid)
        now, before = scores.total, self._before.total
        won = wins(mx.array(now - before), mx.array(np.abs(now) + np.abs(before)))
        return {
            "win_rate": float(won.mean()),
            "reference_reward": float(before.mean()),
            "reference_reward_std": float(before.std()),
        }


# --- on-policy --------------------------------------------------------------------------------------------------------

_P = TypeVar("_P", bound=PassSettings)
_M = TypeVar("_M", bound=OnPolicySettings)
FAR = "approx_kl_k3"  # metric of policy_loss: KL to the policy that sampled by k3, never below 0; approx_kl is k1
_IDLE = 8  # consecutive rollouts with nothing to train on before a run is stopped, at least


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """B completions after their prompts, and numbers for each of their N tokens.

    Attributes:
        ids: (B, T) right-padded; last: (B,) the last real token of each row.
        positions, labels: (N,) flat index that predicts a token, and the token.
        old_logprobs, ref_logprobs, advantages, values, returns: (N,) float32; None where the loss does not read it.
        ref_hidden: (N, D) hidden states of the reference at the positions, for the exact KL.
        owners: (N,) the completion of a token, for losses of whole completions; advantages are then (B,).
    """

    ids: mx.array
    last: mx.array
    positions: mx.array
    labels: mx.array
    old_logprobs: mx.array
    advantages: mx.array | None = None
    ref_logprobs: mx.array | None = None
    values: mx.array | None = None
    returns: mx.array | None = None
    owners: mx.array | None = None
    ref_hidden: mx.array | None = None


class RolloutObjective(Objective, Generic[_P]):
    """An objective over completions that the policy samples, rollout by rollout.

    A subclass gives `roll`, `make`, `per` and the loss.

    Args:
        section: the method's settings.
        notes: of what was checked before.
        data: which rows are read, where that is not what the recipe says.
        reads: columns of the rows that are read besides those of the format; None: all.
    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """

    least_steps = 100
    # Nothing is compiled: micro-batches of completions rarely have the same shape.
    first_whole = 0  # the first rollout that trains everything
    together = 1  # completions that stay in one micro-batch: the two of a pair
    reads: tuple[str, ...] = ()  # numbers of each token that `make` needs

    @classmethod
    def formats(cls, config: Config) -> Sequence[str]:
        return ("prompts",)

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        section: type[_P],
        notes: list[str],
        *,
        data: DataSettings | None = None,
        reads: Collection[str] | None = (),
    ) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.section(self.section(), section)
        self.rollouts = config.section("rollout", RolloutSettings)
        if (wanted := config.batch.accumulate) > self.settings.minibatches:
            raise ConfigError(
                f"batch.accumulate: {wanted} minibatches of a rollout would make a step, and "
                f"{self.section()}.minibatches is {self.settings.minibatches}: raise that, or leave it out (the "
                "micro-batches of a minibatch are summed in any case)"
            )
        train, valid, said = load_splits(data or config.data, config.run.seed, tokenizer=tokenizer, reads=reads)
        self.notes = [*notes, *said]
        self._data = data_fingerprint(train, valid)
        self.prompts, self.valid = self.encode(train, valid)
        s = self.rollouts
        filters = s.top_p, s.top_k, s.min_p
        self.sampling = Sampling(s.max_tokens, s.temperature, *filters, tuple(s.stop), s.stop_at_eos, True)
        self.how = Draw(s.temperature, never_drawn(tokenizer, self.sampling))
        self._number, self._step = 0, 0  # the rollout and its next step
        self._rollout: Rollout | None = None
        self._model: nn.Module | None = None

    def encode(
        self, train: Sequence[Example], valid: Sequence[Example]
    ) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
        """Return the prompts to train on, and held-out ones; notes on them are added."""
        return encode_prompts(train, valid, self.config, self.tokenizer, self.notes)

    def prepare(self, model: nn.Module, base: str = "") -> None:
        self._model = model
        self.models = FrozenModels(model, base, self.config.model.path)
        self.roles, self.split = self.models.roles, self.models.split
        self.open_frozen()
        layers = [layer for role in self.roles.names for layer in self.roles[role].layers.values()]
        self.notes += _NO_DROPOUT.take_out(model, *layers)

    def open_frozen(self) -> None:
        """Open the frozen models."""

    def longest(self, prompt: EncodedPrompt) -> tuple[int, int]:
        """Return the most ids after a prompt, and how many of them the policy can write."""
        return self.rollouts.max_tokens, self.rollouts.max_tokens

    def recorded(self) -> tuple[str, ...]:
        """Return the names of the numbers of each token that `make` needs."""
        return self.reads

    # Data

    @property
    def _per_pass(self) -> int:
        """Return the rollouts of one pass over the prompts."""
        return -(-len(self.prompts) // self.rollouts.prompts)

    def _chosen(self, number: int) -> list[int]:
        """Return the prompts of a rollout."""
        epoch, at = divmod(number, self._per_pass)
        order = np.random.default_rng([self.config.run.seed, 1, epoch]).permutation(len(self.prompts))
        return order[at * self.rollouts.prompts : (at + 1) * self.rollouts.prompts].tolist()

    def seed_of(self, number: int, round_: int = 0, valid: bool = False) -> int:
        """Return the seed of a rollout's sampling, or of a later round of it."""
        return int(np.random.default_rng([self.config.run.seed, 3 + valid, number, round_]).integers(1 << 32))

    def micro_batches(self, rows: Sequence[int], lengths: Any) -> list[list[int]]:
        """Return the completions of each micro-batch."""
        most = self.config.batch.rows
        tokens = None if most else self.config.batch.budget
        return micro_batches(rows, lengths, tokens=tokens, most=most, together=self.together)

    def pieces(self, rows: Sequence[int], lengths: Any) -> list[Piece]:
        """Return the completions of each micro-batch, cut for the ranks."""
        return self.shared(self.micro_batches(rows, lengths), lengths)

    def shared(self, batches: Sequence[list[int]], lengths: Any) -> list[Piece]:
        """Cut the micro-batches of a step for the ranks."""
        ranks, size = current(), self.together
        if self.config.tune.router_aux is not None:  # what is balanced together stays together
            return list(zip(batches, assign([len(rows) * int(max(lengths[rows])) for rows in batches], ranks.weights)))
        units = [[rows[i : i + size] for i in range(0, len(rows), size)] for rows in batches]
        shared = ranks.share(units, [int(max(lengths[rows])) for rows in batches])
        return [(list(chain(*piece)), rank) for piece, rank in shared]

    def _steps(self, rollout: Rollout, lengths: Any) -> list[list[list[int]]]:
        """Return the micro-batches of each step; none where nothing of the rollout is trained on."""
        found: list[list[list[int]]] = []
        kept, accumulate, size = self.kept(rollout), self.config.batch.accumulate, self.together
        for epoch in range(self.settings.epochs if kept else 0):
            drawn = {"seed": self.config.run.seed, "rollout": rollout.number, "epoch": epoch}
            parts = minibatches(len(kept) // size, self.settings.minibatches, **drawn)
            cut = [self.micro_batches([i for u in part for i in kept[u * size :][:size]], lengths) for part in parts]
            found += [list(chain(*cut[i : i + accumulate])) for i in range(0, len(cut), accumulate)]
        return found

    def kept(self, rollout: Rollout) -> list[int]:
        """Return the completions that are trained on, now that they are scored."""
        return list(range(len(rollout)))

    def why_idle(self, rollouts: int) -> str:
        """Return the error text for that many rollouts without a completion to train on."""
        return f"nothing of {rollouts} rollouts is trained on"

    def _per_epoch(self, rollout: Rollout) -> int:
        units = len(self.kept(rollout)) // self.together
        return -(-min(self.settings.minibatches, units) // self.config.batch.accumulate)

    # Rollouts

    def sample(
        self, prompts: Sequence[EncodedPrompt], chosen: list[int], samples: int, number: int, seed: int
    ) -> Rollout:
        """Sample completions of some prompts with the active role; each rank samples some, and all get all of them."""
        part = current().portion(len(chosen))
        began = time.perf_counter()
        mine = Rollout(number, [], [], [])
        if part.stop > part.start:
            mine = self.sample_part(prompts, chosen, samples, number, seed, part)
        return Rollout.gathered(mine, time.perf_counter() - began, prompts)

    def sample_part(
        self,
        prompts: Sequence[EncodedPrompt],
        chosen: list[int],
        samples: int,
        number: int,
        seed: int,
        part: Portion,
    ) -> Rollout:
        """Sample completions of this rank's part of the chosen prompts: the same as if it sampled all of them."""
        assert self._model is not None
        chosen = chosen[part.here]
        asked = [prompts[i].ids.tolist() for i in chosen]
        how: dict[str, Any] = {"samples": samples, "seed": seed, "rows": self.rollouts.rows, "part": part}
        found = sample_batch(self._model, self.tokenizer, asked, self.sampling, **how)
        completions = [completion for of_one in found for completion in of_one]
        return Rollout(
            number,
            [i for i in chosen for _ in range(samples)],
            [np.array(completion.ids, dtype=np.int32) for completion in completions],
            [completion.finish != "length" for completion in completions],
        )

    def opening(self, prompt: EncodedPrompt) -> str:
        """Return the mark that opens a thought at the end of a prompt, or ''."""
        return opening_after(self.tokenizer, prompt.ids.tolist())

    def text(self, reply: Any, opening: str = "") -> str:
        """Return a completion's text as rewards read it: without the stop text that ended it."""
        text = decode_completion(self.tokenizer, reply.tolist())
        return until_stop(text, self.sampling.stop, opening, self.sampling.stop_in_answer)

    def roll(self, model: nn.Module) -> tuple[Rollout, Event | None]:
        """Make the next rollout, ready to be trained on, and its event, if any, with `sampling_s` and `scoring_s`."""
        raise AssertionError(f"{type(self).__name__} makes no rollouts")

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        """Return the micro-batches that train on some completions."""
        raise AssertionError(f"{type(self).__name__} makes no micro-batches")

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        """Return the denominators of a step that trains on these completions."""
        raise AssertionError(f"{type(self).__name__} has no denominators")

    # The contract

    def steps(self, model: nn.Module) -> Iterator[Step]:
        idle, owed = 0, False  # owed: an epoch ended without a step of its own; the next step ends it
        while True:
            event, spent = None, 0.0
            if self._rollout is None:
                self._rollout, event = self.roll(model)
                spent = event["sampling_s"] + event["scoring_s"] if event else 0.0
            rollout = self._rollout
            lengths = rollout.lengths(self.prompts)
            steps = self._steps(rollout, lengths)
            last_of_epoch = (rollout.number + 1) % self._per_pass == 0
            idle = 0 if steps else idle + 1
            if not steps:
                self._number, self._rollout, owed = self._number + 1, None, owed or last_of_epoch
                yield Step([], {}, event=event, before_s=spent)  # only to report it
            if idle >= max(_IDLE, 2 * self._per_pass):
                raise TrainingError(self.why_idle(idle))
            while self._rollout is rollout:
                at = self._step
                if at % self._per_epoch(rollout) == 0 and self.too_far() and at:
                    self._number, self._step, self._rollout = self._number + 1, 0, None
                    owed = owed or last_of_epoch
                    break
                pieces = self.shared(steps[at], lengths)
                micro_batches = [replace(m, rank=rank) for rows, rank in pieces for m in self.make(rollout, rows)]
                per = self.per(rollout, [i for rows in steps[at] for i in rows])
                final = at + 1 == len(steps)
                self._step = at + 1
                if final:
                    self._number, self._step, self._rollout = self._number + 1, 0, None
                ends = owed or (final and last_of_epoch)
                yield Step(micro_batches, per, ends, event, spent, self.after_step)
                event, spent, owed = None, 0.0, False

    def too_far(self) -> bool:
        """Return whether the passes over this rollout end with the one before."""
        return False

    def after_step(self, sums: Terms, per: dict[str, float]) -> None:
        """Take note of a step's sums, which are not evaluated yet."""

    def rehearsed(self, chosen: Sequence[Sequence[int]]) -> Step:
        """Return a step over made-up completions of full length.

        Args:
            chosen: for each micro-batch the prompts of its completions.
        """
        micro_batches: list[MicroBatch] = []
        per: dict[str, float] = {}
        for prompts in chosen:
            longest = [self.longest(self.prompts[i]) for i in prompts]
            replies = [np.zeros(n, np.int32) for n, _ in longest]
            rollout = Rollout(max(self._number, self.first_whole), [*prompts], replies, [])
            rollout.own = [np.arange(n) < trained for n, trained in longest]
            rollout.tokens = {
                name: [np.zeros(trained, np.float32) for _, trained in longest] for name in self.recorded()
            }
            micro_batches += self.make(rollout, range(len(prompts)))
            for name, count in self.per(rollout, range(len(prompts))).items():
                per[name] = per.get(name, 0.0) + count
        return Step(micro_batches, per)

    def real_tokens(self, data: RolloutBatch) -> list[mx.array]:
        return [real_mask(data.ids, data.last + 1)]

    def held(self) -> list[mx.array]:
        return self.models.arrays()

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Return an upper bound: `target_kl` may end the passes over a rollout early."""
        full, rest = divmod(len(self.prompts), self.rollouts.prompts)
        sizes = [self.rollouts.prompts * self.per_prompt] * full + [rest * self.per_prompt] * bool(rest)
        steps = (-(-min(self.settings.minibatches, size) // self.config.batch.accumulate) for size in sizes)
        return self.settings.epochs * sum(steps)

    def state_dict(self) -> dict[str, Any]:
        return {"rollout": self._number, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number, self._step = state["rollout"], state["step"]

    def arrays(self) -> dict[str, mx.array]:
        return self._rollout.arrays() if self._rollout is not None else {}

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        self._rollout = Rollout.of(arrays) if arrays else None

    def fingerprint(self) -> str:
        return self._data

    def summary(self) -> Summary:
        counts: dict[str, int | float] = {
            "prompts": len(self.prompts),
            "prompt tokens": sum(len(p.ids) for p in self.prompts),
            "rollouts a pass": self._per_pass,
            "completions a rollout": min(self.rollouts.prompts, len(self.prompts)) * self.rollouts.samples,
        }
        if self.valid:
            counts["held-out prompts"] = len(self.valid)
        first = self.prompts[0]
        asked = first.asked if isinstance(first.asked, list) else None
        chat = self.config.data.template == "auto"
        ends = turn_end(self.tokenizer, asked, tools_of(first.row)) if chat else ()
        return Summary(counts, self.notes, bool(self.valid), ends=frozenset(ends))

    def previews(self, n: int) -> list[Encoded]:
        """Return the first prompts; nothing of them is trained."""
        return [Encoded(p.ids, np.zeros(len(p.ids), dtype=bool), p.where) for p in self.prompts[:n]]

    # Memory: the largest steps, of the longest prompts and of the shortest, which fit in larger numbers

    @classmethod
    def outline(cls, config: Config) -> Outline:
        return Outline(reads="logprobs")

    def beside(self, model: nn.Module) -> Beside:
        rolling = self._rolling()
        phases = sampling_bytes(model, rolling), scoring_bytes(model, rolling.scored)
        return Beside(self.residents(self.config, model), *phases, self._several())

    def shapes(self) -> list[Shape]:
        return [shape for step in self._largest_steps() for shape, _ in step]

    def largest(self, model: nn.Module) -> list[MakesStep]:
        """Return steps over made-up completions; where a step has several micro-batches, two stand for all."""
        cut = [(shape, asked) for step in self._largest_steps() for shape, asked in step]
        times = 2 if self._several() else 1
        chosen = heaviest([shape for shape, _ in cut])
        return [partial(self.rehearsed, [cut[i][1]] * times) for i in chosen]

    def steps_per_rollout(self) -> int:
        minibatches = min(self.settings.minibatches, self._units)
        return int(self.settings.epochs * -(-minibatches // self.config.batch.accumulate))

    @property
    def _count(self) -> int:
        """Return the completions of a rollout."""
        return min(self.rollouts.prompts, len(self.prompts)) * self.rollouts.samples

    @property
    def per_prompt(self) -> int:
        """Return how many units of `together` completions are trained of a prompt, at most."""
        return self.rollouts.samples // self.together

    @property
    def _units(self) -> int:
        """Return the units of a rollout."""
        return min(self.rollouts.prompts, len(self.prompts)) * self.per_prompt

    def _several(self) -> bool:
        """Return whether a step has several micro-batches, so that a gradient is held while others are computed."""
        return self.config.batch.accumulate > 1 or any(len(step) > 1 for step in self._largest_steps())

    def _rolling(self) -> Rolling:
        """Return the largest rollout, held-out prompts included."""
        r = self.rollouts
        most = r.rows or ROWS_AT_ONCE
        prompts = min(r.prompts, len(self.prompts))
        rows = min(most, max(prompts * r.samples, len(self.valid)))
        group = max(min(prompts, max(1, most // r.samples)), min(len(self.valid), most))
        longest = max(len(p.ids) for p in (*self.prompts, *self.valid))
        whole = max(len(p.ids) + self.longest(p)[0] for p in (*self.prompts, *self.valid))
        filtered = r.top_p < 1 or r.min_p > 0 or r.top_k > 0
        return Rolling(rows, group, longest, whole - longest, filtered, self.scored())

    def scored(self) -> list[Shape]:
        """Return the shapes of the batches that are read without a gradient."""
        found = self.shapes()
        if self.valid:
            found += [shape for shape, _ in self._cut(self.valid, range(len(self.valid)))]
        return found

    def _largest_steps(self) -> list[list[tuple[Shape, list[int]]]]:
        """Return the micro-batches of each kind of minibatch, with the prompts of their completions."""
        count = -(-self._units // min(self.settings.minibatches, self._units)) * self.together
        each = self.per_prompt * self.together
        asked = [_longest(self.prompts, each, count, shortest) for shortest in (False, True)]
        return [self._cut(self.prompts, chosen) for chosen in asked]

    def _cut(self, prompts: Sequence[EncodedPrompt], asked: Sequence[int]) -> list[tuple[Shape, list[int]]]:
        """Return micro-batches of full-length completions of these prompts."""
        lengths = self._longest_rows(prompts, asked)
        trained = [self.longest(prompts[i])[1] for i in asked]
        batches = self.micro_batches(range(len(lengths)), lengths)
        return [
            (Shape(len(rows), int(lengths[rows].max()), sum(trained[i] for i in rows)), [asked[i] for i in rows])
            for rows in batches
        ]

    def _longest_rows(self, prompts: Sequence[EncodedPrompt], asked: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the ids of prompts with completions of full length."""
        return np.array([len(prompts[i].ids) + self.longest(prompts[i])[0] for i in asked], dtype=np.int64)


class OnPolicy(RolloutObjective[_M], Generic[_M]):
    """An objective over the policy's completions and their rewards. A subclass gives advantages and the loss."""

    valued = True
    grouped = False  # whether completions are compared with others of their prompt
    needs_reference = False  # whether the loss reads ref_logprobs
    reads: tuple[str, ...] = ("old_logprobs", "advantages")

    def __init__(self, config: Config, tokenizer: Any, section: type[_M]) -> None:
        notes = check_on_policy_recipe(config, config.section("rollout", RolloutSettings), self.section(), self.grouped)
        rewards, meets = config.section("rewards", RewardsSettings), config.section("environment", EnvironmentSettings)
        self.rewards = Rewards(rewards, tokenizer, needed=meets.path is None)
        data, reads, chat = config.data, self.rewards.columns, config.data.template == "auto"
        self.episodes = Episodes(meets, tokenizer, chat, rewards.given) if meets.path is not None else None
        if self.episodes is not None:
            named = {name: self.episodes.rows(name, getattr(data, name)) for name in ("train", "valid")}
            data, reads = data.model_copy(update=named), None
        super().__init__(config, tokenizer, section, notes, data=data, reads=reads)
        if self.episodes is not None:
            self.episodes.check(self.prompts[0])
        # Of prompt and completion together.
        self.most = room_for_prompts(config, tokenizer).tokens + self.rollouts.max_tokens
        self.rewards.check_rows([(p.where, p.row) for p in (*self.prompts, *self.valid)])
        self.kl_coef: float = self.settings.kl_coef
        # KL to the policy that sampled, over this pass: sum and weight, and those of steps that are not read yet.
        self._apart = [0.0, 0.0]
        self._unread: list[tuple[mx.array, float]] = []
        self._held_out = HeldOut(self)
        self.reference: FrozenModel | None = None

    def encode(
        self, train: Sequence[Example], valid: Sequence[Example]
    ) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
        tools = self.episodes.tools if self.episodes is not None else ()
        return encode_prompts(train, valid, self.config, self.tokenizer, self.notes, tools)

    def longest(self, prompt: EncodedPrompt) -> tuple[int, int]:
        if self.episodes is None:
            return super().longest(prompt)
        s = self.episodes.settings
        whole = min(self.most - len(prompt.ids), self.most if s.tokens is None else s.tokens)
        return whole, min(whole, s.turns * self.rollouts.max_tokens)

    def open_frozen(self) -> None:
        """Open the reference, where anything reads it, and the reward model."""
        if self.settings.refers or is_bare(self.config):  # the bare base is there at no cost
            self.reference = self.models.start("reference", self.config)
        with trusting(self.config.model.trust_remote_code):
            self.rewards.prepare(self.models)
        replaced = sorted(self.roles["policy"].whole) if self.config.model.adapter is not None else []
        if self.rewards.role is not None and replaced:
            seen = f"rewards.adapter: it is for the base, in which model.adapter replaces {replaced[0]}"
            raise ConfigError(f"{seen}; fuse model.adapter and train from the fused folder")

    # Rollouts

    def sample_part(
        self,
        prompts: Sequence[EncodedPrompt],
        chosen: list[int],
        samples: int,
        number: int,
        seed: int,
        part: Portion,
    ) -> Rollout:
        if self.episodes is None:
            return super().sample_part(prompts, chosen, samples, number, seed, part)
        assert self._model is not None
        each = [i for i in chosen[part.here] for _ in range(samples)]
        whole = Portion(*(samples * n for n in part))
        how: dict[str, Any] = {"most": self.most, "seed": seed, "rows": self.rollouts.rows, "part": whole}
        played = self.episodes.play(self._model, [prompts[i] for i in each], self.sampling, **how)
        return Rollout(
            number,
            each,
            [np.array(episode.ids, dtype=np.int32) for episode in played],
            [episode.ended == "end" for episode in played],
            own=[np.array(episode.own, dtype=bool) for episode in played],
            begins=[episode.begin for episode in played],
            turn_rewards=[episode.turn_rewards for episode in played],
            episodes=played,
        )

    def score(self, rollout: Rollout, prompts: Sequence[EncodedPrompt]) -> Scores:
        """Return the rewards of the completions; each rank scores those that it has sampled."""
        ranks = current()
        if ranks.size == 1:
            return self.score_part(rollout, prompts)
        mine = rollout.sampled_by(ranks.rank)
        scores = self.score_part(mine, prompts) if len(mine) else Scores(np.zeros(0, np.float32), {})
        parts = ranks.gather_arrays({"": scores.total, **scores.components})
        names = [name for part in parts for name in part if name]
        found = {name: np.concatenate([part[name] for part in parts if name in part]) for name in dict.fromkeys(names)}
        return Scores(np.concatenate([part[""] for part in parts]), found)

    def score_part(self, rollout: Rollout, prompts: Sequence[EncodedPrompt]) -> Scores:
        """Return the rewards of the completions: of episodes those of their last turns, and their environments'."""
        if self.episodes is not None:
            return self.episodes.score(rollout.episodes, self.rewards, tokens=self.config.batch.budget)
        items = []
        for i, reply, finished in zip(rollout.prompts, rollout.replies, rollout.finished):
            p, opening = prompts[i], self.opening(prompts[i])
            text = self.text(reply, opening)
            items.append(ToScore(p.ids, reply, p.text, text, p.row, finished, p.where, p.asked, opening))
        return self.rewards.score(items, tokens=self.config.batch.budget)

    def record_logprobs(self, rollout: Rollout, prompts: Sequence[EncodedPrompt], micro: Sequence[Piece]) -> float:
        """Record log-probabilities by the policy, and by the reference if it is read; return the mean entropy.

        Args:
            micro: the completions of each batch: those of the first steps, so that their ratio is 1 to the last bit.
        """
        assert self._model is not None
        with probing(self._model):
            self.record(rollout, prompts, micro, self.read_policy)
            if self.settings.refers:
                assert self.reference is not None
                with self.reference.reading():
                    self.record(rollout, prompts, micro, lambda a: {"ref_logprobs": self.logprobs(a, grad=False)})
        entropy = rollout.tokens.pop("entropy")
        return float(np.concatenate(entropy).mean(dtype=np.float64))

    def read_policy(self, a: Completions) -> dict[str, mx.array]:
        """Return (N,) by the current policy for each token: entropy, old_logprobs, and what else a subclass records."""
        logprobs, entropy = rows_logprobs_entropy(self.split, a.ids, a.positions, a.labels, draw=self.how)
        return {"old_logprobs": logprobs, "entropy": entropy}

    def record(
        self,
        rollout: Rollout,
        prompts: Sequence[EncodedPrompt],
        micro: Sequence[Piece],
        read: Callable[[Completions], dict[str, mx.array]],
    ) -> None:
        """Record what `read` returns for each batch of completions: name -> (N,) for their tokens.

        Each rank reads the batches that are its own, and all get the numbers of all of them.
        """
        ranks = current()
        batches = ((rows, rollout.stacked(rows, prompts)) for rows, rank in micro if rank == ranks.rank)
        order, parts = list[int](), dict[str, list[_Floats]]()
        for rows, found in ahead(batches, lambda stacked: as_trained(lambda: read(stacked))):
            order += rows
            for name, values in found.items():
                parts.setdefault(name, []).append(np.array(values))
        mine = {name: np.concatenate(values) for name, values in parts.items()}
        for theirs in ranks.gather_arrays({"rows": np.array(order, np.int64), **mine}):
            every = theirs.pop("rows").tolist()
            ends = np.cumsum(rollout.sizes[every])[:-1]
            for name, numbers in theirs.items():
                kept = rollout.tokens.setdefault(name, [np.zeros(0, np.float32)] * len(rollout))
                for i, part in zip(every, np.split(numbers, ends)):
                    kept[i] = part

    def set_advantages(self, rollout: Rollout, micro: Sequence[Piece]) -> dict[str, float]:
        """Set what the loss reads of each token (`advantages`), from scores and log-probabilities.

        Returns:
            Numbers to report.
        """
        raise AssertionError(f"{type(self).__name__} has no advantages")

    def draw(self, number: int) -> Drawn:
        """Return the completions of a rollout, with their scores."""
        return self.sampled(self._chosen(number), number, self.seed_of(number))

    def sampled(self, chosen: list[int], number: int, seed: int) -> Drawn:
        """Sample and score completions of training prompts."""
        began = time.perf_counter()
        rollout = self.sample(self.prompts, chosen, self.rollouts.samples, number, seed)
        seconds = time.perf_counter() - began
        scores = self.score(rollout, self.prompts)
        each = {f"sampling_s/rank{rank}": taken for rank, taken in enumerate(rollout.seconds)}
        return Drawn(rollout, scores, int(rollout.sizes.sum()), seconds, {**episode_numbers(rollout), **each})

    def roll(self, model: nn.Module) -> tuple[Rollout, dict[str, Any]]:
        """Make the next rollout, ready to be trained on, and its event."""
        number = self._number
        mx.eval(model.trainable_parameters())  # the rest of the last step does not count as sampling
        began = time.perf_counter()
        drawn = self.draw(number)
        rollout, scores = drawn.rollout, drawn.scores
        rollout.scores = scores.total
        lengths = rollout.lengths(self.prompts)
        steps = self._steps(rollout, lengths)[: self._per_epoch(rollout)]
        first = [piece for step in steps for piece in self.shared(step, lengths)]
        if rest := sorted({*range(len(rollout))}.difference(*(rows for rows, _ in first))):
            first += self.pieces(rest, lengths)
        entropy = self.record_logprobs(rollout, self.prompts, first)
        kl = self.kl_of(rollout)
        event: dict[str, Any] = {
            "event": "rollout",
            "rollout": number,
            "reward": float(scores.total.mean()),
            "reward_std": float(scores.total.std()),
            **{f"reward/{name}": float(values.mean()) for name, values in scores.components.items()},
            **kl,
            "kl_coef": self.kl_coef,
            "entropy": entropy,
            "response_tokens": float(rollout.sizes.mean()),
            "eos_share": float(np.mean(rollout.finished)),
            **drawn.event,
            **self.set_advantages(rollout, first),
            "sampling_tokens_per_s": drawn.tokens / max(drawn.seconds, 1e-9),
            "sampling_s": drawn.seconds,
            "scoring_s": time.perf_counter() - began - drawn.seconds,
        }
        if warning := episode_warning(rollout):
            event["warning"] = warning
        elif not any(rollout.finished) and self.rollouts.stop_at_eos:
            event["warning"] = CUT_OFF
        if kl:
            a_token = kl["kl"] / float(rollout.sizes.mean())
            check_kl(a_token, self.section(), self.settings.highest_kl, bool(self.valid))
            self.after_rollout(kl["kl"], len(rollout))
        return rollout, event

    def recorded(self) -> tuple[str, ...]:
        return (*self.reads, "ref_logprobs") if self.needs_reference else self.reads

    def after_rollout(self, kl: float, count: int) -> None:
        """Adapt settings after a rollout of `count` completions with this `kl`."""

    @staticmethod
    def kls(rollout: Rollout) -> npt.NDArray[np.float64]:
        """Return (B,) log policy - log reference of each completion, in nats."""
        apart = zip(rollout.tokens["old_logprobs"], rollout.tokens["ref_logprobs"])
        return np.array([(old.astype(np.float64) - ref).sum() for old, ref in apart])

    def kl_of(self, rollout: Rollout) -> dict[str, float]:
        """Return `kl`, nats summed over a completion, mean over completions; {} without a reference."""
        return {"kl": float(self.kls(rollout).mean())} if self.settings.refers else {}

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        """Return the micro-batches that train on some completions."""
        stacked = rollout.stacked(rows, self.prompts)
        names = [n for n in rollout.tokens if n != "ref_logprobs" or self.needs_reference]
        data = RolloutBatch(
            ids=stacked.ids,
            last=stacked.last,
            positions=stacked.positions,
            labels=stacked.labels,
            **{name: rollout.flat(name, rows) for name in names},
        )
        tokens = int(rollout.lengths(self.prompts)[list(rows)].sum())
        where = tuple(dict.fromkeys(self.prompts[rollout.prompts[i]].where for i in rows))
        return [MicroBatch(data, tokens, int(rollout.sizes[list(rows)].sum()), where)]

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        return {"policy": float(rollout.sizes[list(rows)].sum())}

    def logprobs(self, a: Completions | RolloutBatch, grad: bool = True) -> mx.array:
        """Return (N,) log-probabilities of a batch's tokens by the active role."""
        return rows_logprobs(self.split, a.ids, a.positions, a.labels, grad=grad, draw=self.how)

    def too_far(self) -> bool:
        """Return whether the policy moved too far from the one that sampled, on average over the ended pass."""
        total, weight = self._read_apart()
        self._apart = [0.0, 0.0]
        most = self.settings.target_kl
        return most is not None and weight > 0 and total / weight > 1.5 * most

    def _read_apart(self) -> list[float]:
        """Return sum and weight of KL to the policy that sampled, over the pass so far."""
        for total, weight in self._unread:
            self._apart = [self._apart[0] + float(total), self._apart[1] + weight]
        self._unread.clear()
        return self._apart

    def after_step(self, sums: Terms, per: dict[str, float]) -> None:
        if self.settings.target_kl is not None and FAR in sums.metrics:
            self._unread.append((sums.metrics[FAR], next(iter(per.values()))))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"apart": self._read_apart(), "kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._apart, self.kl_coef = state.get("apart", [0.0, 0.0]), state["kl_coef"]

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        return self._held_out.measure() if self.valid else {}

    @classmethod
    def separate_critic(cls, config: Config) -> bool:
        """Return whether a critic with parameters of its own is trained."""
        return False

    @classmethod
    def frozen(cls, config: Config) -> list[FrozenSource]:
        found = [FrozenSource("reference")] if getattr(config, cls.section()).refers else []
        settings = config.section("rewards", RewardsSettings)
        if settings.adapter is not None:
            found.append(FrozenSource("reward", find_reward_run(settings.adapter, settings.normalize).folder))
        return found

    @classmethod
    def residents(cls, config: Config, model: nn.Module) -> Residents:
        frozen = super().residents(config, model)
        notes, critic, whole = [*frozen.notes], 0, ["the reference"] * bool(frozen.frozen.get("reference"))
        if cls.separate_critic(config):
            # It starts from the reward model where that is a role on the same base, else from the policy.
            role = "reward" in frozen.frozen and "reward" not in frozen.apart
            critic = frozen.frozen["reward"] if role else _inside(model)
            whole += ["the critic"] * (not role)
        if config.tune.method == "full" and whole:
            what = "are whole copies" if len(whole) > 1 else "is a whole copy"
            notes.append(f"tune.method: full: {' and '.join(whole)} {what} of what is trained")
        return frozen._replace(critic=critic, notes=tuple(notes))

    def scored(self) -> list[Shape]:
        found = super().scored()
        if self.config.section("rewards", RewardsSettings).adapter is not None:
            # A reward model reads by a budget of tokens even where steps have one of rows.
            r = self.rollouts
            asked = _longest(self.prompts, r.samples, self._count)
            lengths = self._longest_rows(self.prompts, asked)
            slots = plan_epoch(lengths, tokens=self.config.batch.budget, seed=None)
            found += [Shape(len(slot.rows), slot.width, len(slot.rows)) for slot in slots]
        return found


def _inside(model: nn.Module) -> int:
    """Return the bytes of what is trained in the body; a critic needs no output layer."""
    body = ShapeSplit(model).body
    prefix = next(name for name, module in model.named_modules() if module is body) + "."
    return sum(v.nbytes for name, v in tree_flatten(model.trainable_parameters()) if name.startswith(prefix))


def _longest(prompts: Sequence[EncodedPrompt], samples: int, count: int, shortest: bool = False) -> list[int]:
    """Return the longest, or shortest, prompts of `count` completions."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=not shortest)
    return [i for i in order for _ in range(samples)][:count]
