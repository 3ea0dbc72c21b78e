"""How large an on-policy objective's rollouts and batches can get, and what its roles take: for a plan of memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxft.config import Config
from mlxft.data.batching import plan_epoch
from mlxft.errors import ModelError
from mlxft.model.adapters import read_adapter_config
from mlxft.model.batch_sample import ROWS
from mlxft.model.load import skeleton
from mlxft.model.phases import Residents, Rolling
from mlxft.model.plan import Outline, Shape, ShapeSplit
from mlxft.model.random import aside
from mlxft.objectives.base import MakesStep, heaviest
from mlxft.objectives.onpolicy.base import OnPolicy
from mlxft.objectives.onpolicy.reward_model import find_reward_run, same_base
from mlxft.objectives.onpolicy.rollout import EncodedPrompt
from mlxft.objectives.onpolicy.settings import RewardsSettings

OUTLINE = Outline(reads="logprobs")


def shapes(objective: OnPolicy[Any]) -> list[Shape]:
    """Micro-batches of a step at their largest: of the longest prompts, and of the shortest, which are more of them;
    each completion as long as it may be."""
    return [shape for step in _steps(objective) for shape, _ in step]


def largest(objective: OnPolicy[Any]) -> list[MakesStep]:
    """Steps over made-up completions that may take most; where a step has several micro-batches, two stand for all."""
    cut = [(shape, asked) for step in _steps(objective) for shape, asked in step]
    times = 2 if parted(objective) else 1
    chosen = heaviest([shape for shape, _ in cut])
    return [partial(objective.rehearsed, [cut[i][1]] * times) for i in chosen]


def parted(objective: OnPolicy[Any]) -> bool:
    """Whether a step is made of several micro-batches, so that the gradient of the first waits for the others'."""
    return any(len(step) > 1 for step in _steps(objective))


def rolling(objective: OnPolicy[Any]) -> Rolling:
    """A rollout at its largest, held-out prompts included."""
    r = objective.rollouts
    most = r.rows or ROWS
    prompts = min(r.prompts, len(objective.prompts))
    rows = min(most, max(prompts * r.samples, len(objective.valid)))
    group = max(min(prompts, max(1, most // r.samples)), min(len(objective.valid), most))
    longest = max(len(p.ids) for p in (*objective.prompts, *objective.valid))
    scored = shapes(objective)
    if objective.valid:
        scored += [shape for shape, _ in _cut(objective, objective.valid, range(len(objective.valid)))]
    if objective.config.section("rewards", RewardsSettings).adapter is not None:
        scored += _rewarded(objective)
    filtered = r.top_p < 1 or r.min_p > 0 or r.top_k > 0
    return Rolling(rows, group, longest, r.max_tokens, filtered, scored)


def _inside(model: nn.Module) -> int:
    """Bytes of what is trained in the body: an output layer gives no value, so a critic has none."""
    body = ShapeSplit(model).body
    prefix = next(name for name, module in model.named_modules() if module is body) + "."
    return sum(v.nbytes for name, v in tree_flatten(model.trainable_parameters()) if name.startswith(prefix))


def rollout_steps(objective: OnPolicy[Any]) -> int:
    """Steps that a whole rollout is used for."""
    return int(objective.settings.epochs * min(objective.settings.minibatches, _count(objective)))


def critic(config: Config) -> str | None:
    """Which kind of critic the recipe's method has; None: it has none."""
    found: str | None = getattr(getattr(config, config.objective, None), "critic", None)
    return found


def residents(config: Config, model: nn.Module) -> Residents:
    """What the roles beside the policy take.

    Args:
        model: with what is trained, and no critic yet.
    """
    policy = sum(v.nbytes for _, v in tree_flatten(model.trainable_parameters()))
    whole = config.tune.method == "full"
    # A fresh adapter's reference is the bare base.
    refers = getattr(config, config.objective).refers
    reference = policy if refers and (whole or config.model.adapter is not None) else 0
    reward, role, notes = _reward(config)
    separate = critic(config) == "separate"
    trained = (reward if role else _inside(model)) if separate else 0
    copies = ["the reference"] * bool(reference) + ["the critic"] * (separate and not role)
    if whole and copies:
        what = "are whole copies" if len(copies) > 1 else "is a whole copy"
        notes.append(f"tune.method: full: {' and '.join(copies)} {what} of what is trained")
    return Residents(reference, reward, trained, tuple(notes))


def _count(objective: OnPolicy[Any]) -> int:
    """Completions of a rollout."""
    return min(objective.rollouts.prompts, len(objective.prompts)) * objective.rollouts.samples


def _longest(prompts: Sequence[EncodedPrompt], samples: int, count: int, shortest: bool = False) -> list[int]:
    """The prompts of `count` completions."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=not shortest)
    return [i for i in order for _ in range(samples)][:count]


def _steps(objective: OnPolicy[Any]) -> list[list[tuple[Shape, list[int]]]]:
    """Of each kind of step the micro-batches, with the prompts of their completions."""
    r = objective.rollouts
    whole = _count(objective)
    count = -(-whole // min(objective.settings.minibatches, whole))
    asked = [_longest(objective.prompts, r.samples, count, shortest) for shortest in (False, True)]
    return [_cut(objective, objective.prompts, chosen) for chosen in asked]


def _cut(
    objective: OnPolicy[Any], prompts: Sequence[EncodedPrompt], asked: Sequence[int]
) -> list[tuple[Shape, list[int]]]:
    """Micro-batches of completions of these prompts, each as long as may be."""
    answer = objective.rollouts.max_tokens
    lengths = np.array([len(prompts[i].ids) for i in asked], dtype=np.int64) + answer
    batches = objective.cut(range(len(lengths)), lengths)
    return [
        (Shape(len(rows), int(lengths[rows].max()), len(rows) * answer), [asked[i] for i in rows]) for rows in batches
    ]


def _rewarded(objective: OnPolicy[Any]) -> list[Shape]:
    """What a reward model reads in one go: it has a budget of tokens even where steps have one of rows."""
    r = objective.rollouts
    asked = _longest(objective.prompts, r.samples, _count(objective))
    lengths = np.array([len(objective.prompts[i].ids) for i in asked], dtype=np.int64) + r.max_tokens
    slots = plan_epoch(lengths, tokens=objective.config.batch.budget, seed=None)
    return [Shape(len(slot.rows), slot.width, len(slot.rows)) for slot in slots]


@aside()
def _reward(config: Config) -> tuple[int, bool, list[str]]:
    """Bytes of the reward model, whether it is a role on the policy's base, and what is to be said of it."""
    settings = config.section("rewards", RewardsSettings)
    if settings.adapter is None:
        return 0, False, []
    folder = find_reward_run(settings.adapter, settings.normalize).folder
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not (folder / "adapter_config.json").is_file():
        return stored, False, ["the reward model is a whole model of its own"]
    m = config.model
    try:
        policy = skeleton(m.path, dtype=m.dtype, quantize=m.quantize, group_size=m.group_size).fingerprint
        if same_base(folder, policy, m.path):
            return stored, True, []
        base = read_adapter_config(folder).get("mlxft", {}).get("base", {})
        options = {k: base[k] for k in ("dtype", "quantize", "group_size") if base.get(k) is not None}
        own = skeleton(base.get("model", ""), **options).model
    except ModelError as error:
        return stored, False, [f"the reward model's base is not counted: {error}"]
    weights = sum(v.nbytes for _, v in tree_flatten(own.parameters()))
    return stored + weights, False, [f"the reward model has a base of its own ({base['model']})"]
