"""What completions are worth: a reward model, functions and rules, weighted and added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxft.data.encode import Ids
from mlxft.data.formats import Message
from mlxft.data.sources import report_lines
from mlxft.data.thoughts import answer_of
from mlxft.errors import ConfigError, DataError
from mlxft.model.logits import Split
from mlxft.model.roles import Roles
from mlxft.objectives.onpolicy.functions import MISSING_EOS, MODEL, ScoredFunction, load_functions
from mlxft.objectives.onpolicy.reward_model import RewardModel, find_reward_run
from mlxft.objectives.onpolicy.rules import ScoredRule
from mlxft.objectives.onpolicy.settings import ExactMatch, Number, RewardsSettings

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """A completion that is to be scored.

    Attributes:
        prompt_ids, reply_ids: (P,) and (R,) int32, as sampled: with the EOS that ended it, without padding.
        prompt, completion: their texts, without special tokens but for those that mark thoughts.
        row: the fields of the row of data.
        finished: whether EOS or a stop text ended it.
        where: the row's place, for messages.
        asked: the text or the messages that the prompt was rendered from; None: the text `prompt`.
        opening: the mark by which the prompt has opened a thought, or "".
    """

    prompt_ids: Ids
    reply_ids: Ids
    prompt: str
    completion: str
    row: dict[str, Any]
    finished: bool
    where: str
    asked: str | list[Message] | None = None
    opening: str = ""

    @property
    def answer(self) -> str:
        """The completion without its thoughts."""
        return answer_of(self.completion, self.opening)


class Scores(NamedTuple):
    """Rewards of n completions.

    Attributes:
        total: (n,) float32, what is trained by.
        components: name -> (n,) float32, each source's own value: before normalising, weights and clipping; and what
            the missing-EOS penalty adds.
    """

    total: Values
    components: dict[str, Values]


class Rewards:
    """The rewards of a recipe.

    Args:
        tokenizer: the policy's.
    Attributes:
        role: the role of the reward model, if it is one on the policy's base: the critic may start from it.
    Raises:
        ConfigError: no source is given, or one can not be used. The reward run itself is loaded by `prepare`.
    """

    def __init__(self, settings: RewardsSettings, tokenizer: Any) -> None:
        if not settings.given:
            raise ConfigError("rewards: give adapter, function or rules")
        self.role: str | None = None
        self._settings = settings
        self._tokenizer = tokenizer
        self._run = None if settings.adapter is None else find_reward_run(settings.adapter, settings.normalize)
        self._model: RewardModel | None = None
        self._rules = [ScoredRule(i, rule, settings.thoughts) for i, rule in enumerate(settings.rules)]
        self._sources: list[ScoredFunction | ScoredRule] = [*load_functions(settings.function), *self._rules]

    @property
    def names(self) -> list[str]:
        """Names of the components, in the order of `Scores.components`."""
        model = [] if self._run is None else [MODEL]
        penalty = [] if self._settings.missing_eos_penalty is None else [MISSING_EOS]
        return [*model, *(source.name for source in self._sources), *penalty]

    @property
    def columns(self) -> set[str] | None:
        """The rows' columns that rules compare with; None where a function is given, which may read every one."""
        if any(isinstance(source, ScoredFunction) for source in self._sources):
            return None
        return {rule.rule.field for rule in self._rules if isinstance(rule.rule, ExactMatch | Number)}

    @property
    def slope(self) -> float:
        """What a unit of the reward model's score adds to a reward."""
        s = self._settings
        std = self._run.std if s.normalize and self._run is not None else None
        return s.adapter_weight / (std or 1.0)

    @property
    def offset(self) -> float:
        """What a score of 0 of the reward model adds to a reward."""
        mean = self._run.mean if self._settings.normalize and self._run is not None else None
        return -self.slope * (mean or 0.0)

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Whether rows, each with where it stands, have what the rules read.

        Raises:
            DataError: some do not; all of them in one.
        """
        found = [(where, rule.problem(row)) for where, row in rows for rule in self._rules]
        if lines := [f"{where}: {problem}" for where, problem in found if problem]:
            raise DataError(report_lines(lines))

    def prepare(self, roles: Roles, split: Split, fingerprint: str | None, base: str | None = None) -> None:
        """Load the reward model, if there is one: as the role "reward" where it is of the policy's base.

        Args:
            roles: of the policy's model.
            split: of that model.
            fingerprint: of the policy's base. Other bases are loaded beside it.
            base: its name (model.path). A fine-tune has the fingerprint of what it came from: where the names lead to
                different places, the reward run is loaded on its own base.
        Raises:
            ModelError: it can not be loaded.
        """
        if self._run is not None:
            self._model = RewardModel(self._run, self._tokenizer, roles, split, fingerprint, base)
            self.role = self._model.role

    def held(self) -> list[mx.array]:
        """Arrays of the reward model, if there is one."""
        return [] if self._model is None else self._model.held()

    def score(self, items: Sequence[Item], *, tokens: int) -> Scores:
        """Rewards of completions, in their order.

        Components, the reward model's normalised if asked for, are weighted and added up; then the missing-EOS penalty
        is taken off, and then the total is clipped.

        Args:
            tokens: most tokens of a batch that the reward model reads, padding included.
        Raises:
            DataError, RewardError: a source gives no number for a completion.
        """
        s = self._settings
        components: dict[str, Values] = {}
        total = np.zeros(len(items))
        if self._run is not None:
            assert self._model is not None, "prepare first"
            values = np.array(self._model.score(items, tokens))
            components[MODEL] = values.astype(np.float32)
            if s.normalize:
                assert self._run.mean is not None
                assert self._run.std is not None
                values = (values - self._run.mean) / self._run.std
            total += s.adapter_weight * values
        for source in self._sources:
            values = np.array(source.score(items) if items else [])
            components[source.name] = values.astype(np.float32)
            total += source.weight * values
        if s.missing_eos_penalty is not None:
            values = -s.missing_eos_penalty * np.array([not item.finished for item in items], dtype=np.float64)
            components[MISSING_EOS] = values.astype(np.float32)
            total += values
        if s.clip is not None:
            total = np.clip(total, -s.clip, s.clip)
        return Scores(total.astype(np.float32), components)
