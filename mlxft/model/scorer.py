"""Scores of answers by a model with a scalar head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxft.data.batching import Slot, plan_epoch
from mlxft.data.encode import Reply, encode_reply
from mlxft.model.heads import read_scores
from mlxft.model.logits import Split
from mlxft.model.logprobs import ahead

TOKENS = 4096  # of a batch, padding included


@dataclass
class Scorer:
    """A reward model, ready to score.

    Attributes:
        chat: whether texts become a user and an assistant turn when there is a chat template.
        mean, std: of the scores on the run's validation rows; None where it had none.
    """

    split: Split
    tokenizer: Any
    chat: bool
    mean: float | None
    std: float | None

    def encode(self, prompt: Any, reply: Any, where: str, tools: Any = None) -> Reply:
        """An answer as it is scored: the very tokens that training reads."""
        return encode_reply(prompt, reply, self.tokenizer, where, tools, self.chat)

    def scores(
        self, answers: Sequence[Reply], tokens: int = TOKENS, on_done: Callable[[int], None] | None = None
    ) -> list[float]:
        """The score of each answer; those of like length share a batch of `tokens`.

        Args:
            on_done: told after each batch how many answers it had.
        """
        if not answers:
            return []
        lengths = np.array([len(a.prompt) + len(a.reply) for a in answers], dtype=np.int64)
        found = np.zeros(len(answers))

        def read(slot: Slot) -> mx.array:
            # Padded on the right, where causal attention never sees it.
            ids = np.zeros((len(slot.rows), slot.width), dtype=np.int32)
            for b, i in enumerate(slot.rows):
                ids[b, : lengths[i]] = np.concatenate(answers[i])
            last = mx.array((lengths[list(slot.rows)] - 1).astype(np.int32))
            return read_scores(self.split, mx.array(ids), last)

        slots = plan_epoch(lengths, tokens=tokens, seed=None)
        for rows, values in ahead(((list(slot.rows), slot) for slot in slots), read):
            found[rows] = np.array(values)
            if on_done is not None:
                on_done(len(rows))
        return [float(value) for value in found]
