"""Memory of on-policy training by phase: completions are sampled, then scored, then trained on, one after the other.

What a phase needs alone is free in the next, so the peak is the largest phase's, not their sum. Sampling and scoring
have no gradient; both are traced as training is, from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxft.errors import ModelError
from mlxft.model.kv import PREFILL, takes_rows
from mlxft.model.logits import chunk_size
from mlxft.model.logprobs import rows_logprobs_entropy
from mlxft.model.plan import TRACED_CHUNKS, Job, Plan, Shape, ShapeSplit
from mlxft.model.random import probing
from mlxft.model.trace import Graph, trace

_STEP = 256  # positions by which mlx-lm's caches grow
# (B, V) float32 arrays that drawing a token takes beside the logits: divided by the temperature, their mass, its padded
# copy, and what the step ahead has begun with; the filters hold them sorted and with their places too.
_DRAWN, _FILTERED = 4, 6


class Rolling(NamedTuple):
    """A rollout at its largest.

    Attributes:
        rows: completions decoded at once.
        group: prompts whose caches stand beside theirs.
        prompt, answer: longest prompt and completion, in tokens.
        filtered: whether top_p, top_k or min_p leave tokens out.
        scored: batches whose log-probabilities are read, and those that a reward model reads.
    """

    rows: int
    group: int
    prompt: int
    answer: int
    filtered: bool
    scored: Sequence[Shape]


class Residents(NamedTuple):
    """Bytes of the roles that stand in memory beside the policy, in every phase.

    Attributes:
        reference, reward: frozen.
        critic: of its own parameters; trained too, so that each has a gradient and the optimiser's state.
        notes: what is worth saying of them.
    """

    reference: int = 0
    reward: int = 0
    critic: int = 0
    notes: tuple[str, ...] = ()

    def with_training(self, job: Job) -> int:
        """All of them, with the critic's share of the optimiser's state, its gradient, and the sum of earlier ones."""
        own = job.gradients
        more = self.critic * (job.optimizer + job.sums) // own if own else 0
        return self.reference + self.reward + 2 * self.critic + more


@dataclass(frozen=True)
class PhasedPlan(Plan):
    """A plan of which the training step is one phase.

    Attributes:
        roles: name -> bytes, see `Residents`.
        sampling: caches, logits and what a part of the prompts takes on its way through the model.
        scoring: of the largest batch, forward only.
    """

    roles: Mapping[str, int] = field(default_factory=dict)
    sampling: int = 0
    scoring: int = 0

    @property
    def held(self) -> int:
        """What stands in memory all the time."""
        return self.weights + self.adapters + sum(self.roles.values()) + self.optimizer

    def phases(self, ahead: bool = True) -> dict[str, int]:
        """Peak of each phase, in the order they come."""
        step = self.gradients + self.activations + self.logits + self.batch + (self.ahead if ahead else 0)
        return {
            "sampling": self.held + self.sampling,
            "scoring": self.held + self.scoring,
            "training": self.held + step,
        }

    @property
    def total(self) -> int:
        return max(self.phases().values())

    @property
    def needed(self) -> int:
        return max(self.phases(ahead=False).values())


def with_phases(step: Plan, residents: Residents, sampling: int, scoring: int, sums: int) -> PhasedPlan:
    """The plan of a training step as that of training with rollouts.

    Args:
        step: of the policy's largest micro-batch, as if it were alone in its step.
        sampling, scoring: of these phases, beside what stands in memory all the time.
        sums: of the policy's gradients, where a step has several micro-batches; else 0.
    """
    own, critic = step.gradients, residents.critic
    before = sums + (critic * sums // own if own else 0)
    # The critic's batch comes after the policy's, whose gradient waits for it, and has no logits.
    first = replace(step, gradients=before + own)
    second = replace(step, gradients=max(before, own) + critic, logits=0)
    both = max(first, second, key=lambda part: part.needed) if critic else first
    state = critic * step.optimizer // own if own else 0
    roles = {"reference": residents.reference, "reward": residents.reward, "critic": critic}
    given = asdict(both) | {"optimizer": step.optimizer + state}
    return PhasedPlan(**given, roles=roles, sampling=sampling, scoring=scoring)


def sampling_bytes(model: nn.Module, rolling: Rolling) -> int:
    """Peak of sampling, beside the weights.

    Raises:
        ModelError: the architecture's memory can not be predicted.
    """
    _check_caches(model)
    with probing(model):
        rows, group = (rolling.rows, rolling.group) if takes_rows(model) else (1, 1)
        room = _rounded(rolling.prompt)
        before = min(rolling.prompt - 1, max(3, PREFILL // group))
        first = _cached(model, group, before, rolling.prompt - 1 - before, room)
        prefill = first.peak() if before else 0
        last = _cached(model, rows, 1, rolling.prompt + rolling.answer - 1, _rounded(rolling.prompt + rolling.answer))
        drawn = 4 * rows * _vocabulary(model) * (_FILTERED if rolling.filtered else _DRAWN)
        return max(prefill, _held_by(model, group, room) + last.peak() + drawn)


def scoring_bytes(model: nn.Module, shapes: Sequence[Shape]) -> int:
    """Peak of scoring the largest of these batches, beside the weights.

    Raises:
        ModelError: the architecture's memory can not be predicted.
    """
    largest = {max(shapes, key=lambda s: s.rows * s.width), max(shapes, key=lambda s: s.rows * s.width * s.width)}
    with probing(model):
        return max(_scored(model, shape) for shape in largest)


def _scored(model: nn.Module, shape: Shape) -> int:
    split = ShapeSplit(model)
    most = TRACED_CHUNKS * chunk_size(split.vocabulary) if split.separable else shape.trained
    n = max(1, min(shape.trained, most))
    ids, places = mx.zeros((shape.rows, shape.width), dtype=mx.int32), mx.zeros((n,), dtype=mx.int32)

    def read(ids: mx.array, positions: mx.array, labels: mx.array) -> list[mx.array]:
        return list(rows_logprobs_entropy(split, ids, positions, labels))

    graph, _ = trace(model, read, [ids, places, places])
    # Hidden states at positions beyond the traced chunks.
    more = (shape.trained - n) * split._width * split._dtype.size if split.separable else 0
    return graph.peak() + max(0, more)


def _check_caches(model: nn.Module) -> None:
    """Refuse what keeps more than keys and values while it samples.

    Raises:
        ModelError: so it is.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    kinds = {type(c) for c in make_prompt_cache(model)}
    if other := sorted(k.__name__ for k in kinds if not issubclass(k, (KVCache, RotatingKVCache))):
        name = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"what sampling takes is predicted for transformers only, and {name} keeps another state "
            f"({', '.join(other)}); mlxft check --time says what it takes"
        )


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


def _caches(model: nn.Module) -> list[Any]:
    """A model's caches after a token, never evaluated."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    return list(caches)


def _sizes(model: nn.Module, rows: int, room: int) -> list[mx.array]:
    """Keys and values of each layer for `room` positions, or as many as a sliding window has."""
    found = []
    for cache in _caches(model):
        size = min(room, getattr(cache, "max_size", room))
        for part in (cache.keys, cache.values):
            found.append(mx.zeros((rows, part.shape[1], size, part.shape[-1]), part.dtype))
    return found


def _held_by(model: nn.Module, rows: int, room: int) -> int:
    return sum(part.nbytes for part in _sizes(model, rows, room))


def _vocabulary(model: nn.Module) -> int:
    return int(model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])


def _cached(model: nn.Module, rows: int, columns: int, offset: int, room: int) -> Graph:
    """The graph of `columns` further tokens of each row behind `offset` of them; what it makes includes the caches."""
    from mlx_lm.models.cache import make_prompt_cache

    def step(ids: mx.array, *held: mx.array) -> list[mx.array]:
        caches = make_prompt_cache(model)
        for cache, keys, values in zip(caches, held[::2], held[1::2]):
            cache.keys, cache.values, cache.offset = keys, values, offset
            if hasattr(cache, "_idx"):
                cache._idx = min(offset, keys.shape[2])
        logits = model(ids, cache=caches)
        kept = [part for cache in caches for part in (cache.keys, cache.values)]
        return [*kept, logits[:, -1]] if columns == 1 else kept

    ids = mx.zeros((rows, max(1, columns)), dtype=mx.int32)
    return trace(model, step, [ids, *_sizes(model, rows, room)])[0]
