"""The critic: a value for each token. A role of its own on the same base, or a head on the policy's trunk."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.model.heads import CRITIC, ScoreHead
from mlxft.model.logits import Split
from mlxft.model.logprobs import rows_hidden
from mlxft.model.lora import LEAVES
from mlxft.model.roles import Roles

ROLE = "value"


class Critic(nn.Module):
    """A scalar head, and the value role's own parameters.

    They stand here while the policy stands in the model's places: so the loop trains both, and one update of the
    parameters by name reaches them. To be read they are put into the role's layers, and the role into the model.

    Args:
        weights: full name -> value of the role's parameters; empty for a head on the policy's trunk.
    Attributes:
        offset: added to what the head gives, which has no bias: where rewards lie that are normalised.
    """

    offset = 0.0

    def __init__(self, weights: dict[str, mx.array], head: ScoreHead) -> None:
        super().__init__()
        self.head = head
        # Names with dots would be taken for paths when an update is built from names.
        self.role = {name.replace(".", "/"): value for name, value in weights.items()}

    def values(self, split: Split, roles: Roles, ids: mx.array, positions: mx.array) -> mx.array:
        """(N,) float32 at positions of (B, T) ids, by the value role."""
        weights = {name.replace("/", "."): value for name, value in tree_flatten(self.role)}
        role = roles[ROLE]
        for name, value in weights.items():
            path, _, leaf = name.rpartition(".")
            if path in role.layers and leaf in LEAVES:
                role.layers[path][leaf] = value
            else:
                role.whole[name] = value
        try:
            with roles.use(ROLE):
                return self.head(rows_hidden(split, ids, positions)) + self.offset
        finally:
            role.whole.clear()  # or what an update replaces would stay in memory


def add_critic(model: nn.Module, split: Split, roles: Roles, start: str | None, width: int) -> Critic:
    """Attach a critic to a model whose policy is active.

    Args:
        start: the role that it begins as, with that role's head if it has one; None: a head on the policy's trunk.
        width: of the hidden states.
    """
    head = ScoreHead.of(mx.zeros((1, width)))  # all values 0: the first advantages are the rewards
    weights: dict[str, mx.array] = {}
    if start is not None:
        role = roles.copy(start, ROLE)
        if role.head is not None:
            head, role.head = role.head, None
        # What stands outside the body (an output layer) gives no value; weight decay would eat it.
        inside = next(name for name, module in model.named_modules() if module is split.body) + "."
        role.layers = {path: layer for path, layer in role.layers.items() if path.startswith(inside)}
        role.whole = {name: value for name, value in role.whole.items() if name.startswith(inside)}
        weights = roles.weights(ROLE)
    critic = Critic(weights, head)
    setattr(model, CRITIC, critic)
    return critic


def is_critic(name: str) -> bool:
    """Whether a parameter of the model is the critic's."""
    return name.startswith(f"{CRITIC}.")


def of_policy(name: str) -> bool:
    """Whether it is not."""
    return not is_critic(name)


def explained_variance(values: Any, returns: Any) -> float:
    """1 - var(returns - values) / var(returns); 0 where the returns do not vary."""
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread > 0 else 0.0
