"""Steps of an objective, taken one by one as the loop takes them; and the roles of a model: their bytes and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxft.model.adapters import LoRASpec, adapter_config
from mlxft.model.heads import HEAD_FILE, adapter_metadata, head_arrays, head_metadata
from mlxft.model.roles import Roles
from mlxft.objectives.base import MicroBatch, Step
from mlxft.objectives.functional import LossSum


def first_step(objective: Any, model: Any) -> Step:
    """The next step that has anything to train."""
    return next(step for step in objective.steps(model) if step.micro_batches)


def first_batch(objective: Any, model: Any) -> MicroBatch:
    return first_step(objective, model).micro_batches[0]


def sums_of(objective: Any, model: Any, step: Step, only: int | None = None) -> LossSum:
    """The sums of a step's micro-batches, or of one of them; `weight` is the first term's denominator."""
    batches = step.micro_batches if only is None else [step.micro_batches[only]]
    terms = objective.loss(model, batches[0].data)
    for batch in batches[1:]:
        terms = terms.plus(objective.loss(model, batch.data))
    values = list(terms.losses.values())
    return LossSum(sum(values[1:], values[0]), mx.array(float(next(iter(step.per.values())))), terms.metrics)


def role_bytes(roles: Roles, name: str) -> int:
    """The bytes of a role's own arrays, its head's among them."""
    head = roles[name].head
    return sum(v.nbytes for v in roles.weights(name).values()) + (0 if head is None else head.weight.nbytes)


def save_role(roles: Roles, name: str, folder: Path, about: dict[str, Any]) -> None:
    """Write a role as an adapter folder, with its head."""
    role, weights = roles[name], roles.weights(name)
    # A bare base with a head is an adapter without layers.
    spec = LoRASpec((), 1, 1.0) if role.spec is None and not weights else role.spec
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(spec, roles.model, about)), "utf-8")
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights, adapter_metadata(role.head))
    if role.head is not None:
        metadata = head_metadata(about["base"]["fingerprint"], {})
        mx.save_safetensors(str(folder / HEAD_FILE), head_arrays(role.head), metadata)
