"""A rollout: completions of prompts with what is known of each of their tokens, and how it is cut into steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxft.data.batching import plan_epoch
from mlxft.data.encode import Ids
from mlxft.data.formats import Message

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's ids (P,) int32 as the model sees them, its text, the row it comes from, and its place.

    `asked` is the text or the messages that were rendered.
    """

    ids: Ids
    text: str
    row: dict[str, Any]
    where: str
    asked: str | list[Message]


@dataclass
class Rollout:
    """B completions.

    Attributes:
        number: of the rollout, from 0.
        prompts: index of each completion's prompt; those of one prompt stand together.
        replies: ids of each, (R,) int32, as sampled: with the EOS that ended it.
        finished: whether EOS or a stop text ended it.
        scores: (B,) rewards.
        tokens: name -> one number a token of each completion: old_logprobs, ref_logprobs, values, advantages, returns.
    """

    number: int
    prompts: list[int]
    replies: list[Ids]
    finished: list[bool]
    scores: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    tokens: dict[str, list[Floats]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.replies)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(B,) tokens of each completion."""
        return np.array([len(reply) for reply in self.replies], dtype=np.int64)

    def grid(self, name: str) -> mx.array:
        """Numbers of tokens as (B, T) float32, padded on the right with 0."""
        return mx.array(pad(self.tokens[name], int(self.sizes.max())))

    @property
    def mask(self) -> mx.array:
        """(B, T), 1 where a completion has a token."""
        return mx.array((np.arange(self.sizes.max()) < self.sizes[:, None]).astype(np.float32))

    def set_grid(self, name: str, values: mx.array) -> None:
        """Keep (B, T) numbers of tokens."""
        rows = np.array(values.astype(mx.float32))
        self.tokens[name] = [row[:size].copy() for row, size in zip(rows, self.sizes)]

    def flat(self, name: str, rows: Sequence[int]) -> mx.array:
        """(N,) float32 numbers of the tokens of some completions."""
        return mx.array(np.concatenate([self.tokens[name][i] for i in rows]).astype(np.float32))

    def arrays(self) -> dict[str, mx.array]:
        """All of it, for a checkpoint."""
        sizes = self.sizes.astype(np.int32)
        found: dict[str, Any] = {
            "number": np.array([self.number], np.int32),
            "prompts": np.array(self.prompts, np.int32),
            "sizes": sizes,
            "replies": np.concatenate(self.replies).astype(np.int32),
            "finished": np.array(self.finished, np.int32),
            "scores": self.scores,
        }
        found |= {f"tokens.{name}": np.concatenate(values) for name, values in self.tokens.items()}
        return {name: mx.array(value) for name, value in found.items()}

    @classmethod
    def of(cls, arrays: dict[str, mx.array]) -> Rollout:
        """What `arrays` gave."""
        held = {name: np.array(value) for name, value in arrays.items()}
        ends = np.cumsum(held["sizes"])[:-1]
        return cls(
            number=int(held["number"][0]),
            prompts=[int(i) for i in held["prompts"]],
            replies=list(np.split(held["replies"], ends)),
            finished=[bool(x) for x in held["finished"]],
            scores=held["scores"],
            tokens={n[7:]: list(np.split(v, ends)) for n, v in held.items() if n.startswith("tokens.")},
        )


def pad(rows: Sequence[npt.NDArray[Any]], width: int) -> npt.NDArray[Any]:
    """Rows of unequal length as one array, padded on the right with 0."""
    out = np.zeros((len(rows), width), dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def minibatches(count: int, parts: int, *, seed: int, rollout: int, epoch: int) -> list[list[int]]:
    """Completions of a rollout, shuffled and cut into `parts` of like size; fewer where there are fewer completions."""
    order = np.random.default_rng([seed, 2, rollout, epoch]).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, min(parts, count))]


def micro_batches(
    rows: Sequence[int], lengths: npt.NDArray[np.int64], *, tokens: int | None, most: int | None
) -> list[list[int]]:
    """Some completions in batches of a token budget, or of `most` rows, those of like length together."""
    slots = plan_epoch(lengths[list(rows)], tokens=tokens, rows=most, seed=None)
    return [[rows[i] for i in slot.rows] for slot in slots]
