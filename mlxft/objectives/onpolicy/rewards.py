"""What completions are worth: a reward model, functions and rules, weighted and added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlxft.data.encode import Ids
from mlxft.model.logits import Split
from mlxft.model.roles import Roles
from mlxft.objectives.onpolicy.settings import RewardSettings

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """A completion that is to be scored.

    Attributes:
        prompt_ids, reply_ids: (P,) and (R,) int32, as sampled: with the EOS that ended it, without padding.
        prompt, completion: their texts, without special tokens.
        row: the fields of the row of data.
        finished: whether EOS or a stop text ended it.
        where: the row's place, for messages.
    """

    prompt_ids: Ids
    reply_ids: Ids
    prompt: str
    completion: str
    row: dict[str, Any]
    finished: bool
    where: str


class Scores(NamedTuple):
    """Rewards of n completions.

    Attributes:
        total: (n,) float32, what is trained by.
        components: name -> (n,) float32, each source's own value: before normalising, weights, penalty and clipping.
    """

    total: Values
    components: dict[str, Values]


class Rewards:
    """The rewards of a recipe.

    Raises:
        ConfigError: no source is given, or a function can not be loaded.
    """

    role: str | None  # of the reward model, if it is one on the policy's base

    def __init__(self, settings: RewardSettings, tokenizer: Any) -> None:
        self.role = None
        raise AssertionError("to come")

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Whether (where, fields) of each row have what the rules read. DataError: all that lack it."""
        raise AssertionError("to come")

    def prepare(self, roles: Roles, split: Split, fingerprint: str | None, base: str | None = None) -> None:
        """Load the reward model, if there is one; see `rewards.adapter`.

        Args:
            roles: of the policy's model, to which the role "reward" comes where it is of the same base.
            fingerprint: of the policy's base.
            base: its name (model.path): a reward model of another base with the same shapes is told by it.
        """
        raise AssertionError("to come")

    def score(self, items: Sequence[Item], *, tokens: int) -> Scores:
        """Rewards of completions, in their order; the reward model reads batches of at most `tokens` tokens."""
        raise AssertionError("to come")
