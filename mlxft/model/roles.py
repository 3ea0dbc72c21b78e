"""Policy, reference, reward model and critic as roles over one base.

Each role is an adapter, and a scalar head if it has one. A role owns the low-rank layers around the base's; the base's
own layers, packed or not, are shared by all roles. Switching puts other layers into the model's places: no array is
copied or computed, and a compiled function with `model.state` among its inputs sees the arrays that are there now.
Where a role has no adapter, the base's own layer is in place: the bare base is exact to the last bit, and a role costs
its own arrays only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.errors import ModelError
from mlxft.model.adapters import (
    LoRASpec,
    attached_spec,
    count_all,
    load_trained,
    low_rank_layers,
    read_adapter,
    spec_of,
)
from mlxft.model.heads import HEAD_FILE, ScoreHead, attach_head, head_of, load_head, trained_without_head
from mlxft.model.layers import LEAVES, SAVED, LowRank
from mlxft.model.logits import Split


@dataclass
class Role:
    """What one role puts into the model: layers by path, its own values of parameters, a head."""

    spec: LoRASpec | None
    layers: dict[str, LowRank] = field(default_factory=dict)
    whole: dict[str, mx.array] = field(default_factory=dict)
    head: ScoreHead | None = None


class Roles:
    """The roles of a model.

    A compiled function must have `model.state` among its inputs, and is traced again where a role's shapes differ.
    Python values keep what they were when it was traced, a role's dropout included.

    Args:
        model: a base, or one with an adapter.
        adopt: name of the role that takes what is trainable in `model` now: its adapter, parameters trained whole, its
            head. It stays active. Without it, the model must be bare.
    """

    def __init__(self, model: nn.Module, adopt: str | None = None) -> None:
        self.model = model
        self.active: str | None = None
        self._roles: dict[str, Role] = {}
        self._places: dict[str, tuple[Any, Any]] = {}  # path -> what holds the layer, and under which key
        self._base: dict[str, nn.Module] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}  # parameter -> module and leaf
        self._own: dict[str, mx.array] = {}  # its value in the base
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, LowRank)}
        assert adopt is not None or not (adapted or head_of(model)), "the model is not bare: name the role it has"
        if adopt is None:
            model.freeze()
            return
        leaves = {f"{name}.{leaf}" for name in adapted for leaf in LEAVES}
        for path, layer in adapted.items():
            self._note_layer(path, layer.base)
        whole = {n: v for n, v in trained_without_head(model).items() if n not in leaves}
        self._note_parameters(whole)
        self._roles[adopt] = Role(attached_spec(adapted), adapted, whole, head_of(model))
        self.active = adopt

    @property
    def names(self) -> list[str]:
        """The roles, in the order in which they were added."""
        return list(self._roles)

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def arrays(self) -> list[mx.array]:
        """Return all arrays of the roles, and the base's own where roles replace them."""
        found = list(self._own.values())
        for role in self._roles.values():
            layers = [layer.parameters() for layer in role.layers.values()]
            held = [layers, role.whole, {} if role.head is None else role.head.parameters()]
            found += [value for _, value in tree_flatten(held)]
        return found

    def _note_layer(self, path: str, base: nn.Module) -> None:
        holder: Any = self.model
        *above, key = path.split(".")
        for part in above:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        self._places[path] = (holder, int(key) if isinstance(holder, list) else key)
        self._base[path] = base

    def _note_parameters(self, names: Iterable[str]) -> None:
        modules = dict(self.model.named_modules())
        for name in names:
            if name not in self._owners:
                owner, _, leaf = name.rpartition(".")
                count_all(modules[owner], leaf)
                self._owners[name] = modules[owner], leaf
                self._own[name] = modules[owner][leaf]

    def use(self, name: str | None) -> ExitStack:
        """Make a role active; None: the bare base. As a context manager, restore the active role after the block."""
        back = ExitStack()
        back.callback(self.use, self.active)
        if self.active != name:
            self._leave()
            self._enter(self._roles[name] if name is not None else Role(None))
            self.active = name
        return back

    def _leave(self) -> None:
        if self.active is None:
            return
        role = self._roles[self.active]
        for name in role.whole:  # training has replaced them
            owner, leaf = self._owners[name]
            role.whole[name] = owner[leaf]
        role.head = head_of(self.model)

    def _enter(self, role: Role) -> None:
        training = self.model.training
        for path, (holder, key) in self._places.items():
            layer = role.layers[path] if path in role.layers else self._base[path]
            if layer.training != training:
                layer.train(training)
            # Not by the module's own setter: the key exists, and keeps its place in the order of parameters.
            (list if isinstance(holder, list) else dict).__setitem__(holder, key, layer)
        for name, (owner, leaf) in self._owners.items():
            owner[leaf] = role.whole.get(name, self._own[name])
            (owner.unfreeze if name in role.whole else owner.freeze)(recurse=False, keys=[leaf])
        if role.head is not head_of(self.model):
            attach_head(self.model, role.head)

    def add(
        self,
        name: str,
        spec: LoRASpec | None,
        weights: dict[str, mx.array] | None = None,
        head: ScoreHead | None = None,
    ) -> Role:
        """Add a role; the active one stays active.

        Args:
            spec: shape of its adapter; None: the base as it is, and then at most a head.
            weights: its adapter's and its own values of parameters, by full name; None: a fresh adapter, no effect yet.
        Raises:
            ModelError: the model does not have such layers, or the weights do not fit.
        """
        assert name not in self._roles, f"there is a role {name} already"
        role = Role(spec, head=head)
        with self.use(None):
            if spec is not None:
                role.layers = low_rank_layers(self.model, spec, f"role {name}")
                for path, layer in role.layers.items():
                    self._note_layer(path, layer.base)
            there = dict(tree_flatten(self.model.parameters()))
            whole = [n for n in weights or () if n.rpartition(".")[2] not in SAVED]
            if strange := [n for n in whole if n not in there]:
                raise ModelError(f"role {name}: the model has no parameter {strange[0]} (of {len(strange)} such)")
            self._note_parameters(whole)
            role.whole = {n: self._own[n] for n in whole}
        self._roles[name] = role
        if weights is not None:
            try:
                with self.use(name):
                    load_trained(self.model, weights, f"role {name}")
            except ModelError:
                del self._roles[name]
                raise
        return role

    def copy(self, source: str, name: str) -> Role:
        """Add a role that begins as a copy of another one; the arrays are shared until one of the two is trained."""
        assert name not in self._roles, f"there is a role {name} already"
        if source == self.active:
            self._leave()
        role = self._roles[source]
        layers = {path: _copy_layer(layer) for path, layer in role.layers.items()}
        head = None if role.head is None else ScoreHead.of(role.head.weight)
        self._roles[name] = Role(role.spec, layers, dict(role.whole), head)
        return self._roles[name]

    def weights(self, name: str) -> dict[str, mx.array]:
        """Return a role's own parameters, without its head."""
        with self.use(name):
            return trained_without_head(self.model)

    def load(self, name: str, folder: Path, base: str | None) -> Role:
        """Add a role from an adapter folder, with the head that lies there.

        Args:
            base: fingerprint of the model.
        Raises:
            ModelError: the folder has no adapter, or one of another base, or it does not fit.
        """
        config, weights = read_adapter(folder, base)
        head = None
        with self.use(None):
            spec = spec_of(config, self.model)
            if (folder / HEAD_FILE).is_file():
                load_head(Split(self.model), folder / HEAD_FILE, base)
                head = head_of(self.model)
                attach_head(self.model, None)
        return self.add(name, spec, weights, head)


def _copy_layer(layer: LowRank) -> LowRank:
    """Return a new layer with the same arrays; nothing is drawn from the random state."""
    new = copy.copy(layer)
    # A shallow copy shares its training flags and frozen names, which must be each role's own.
    new.dropout = copy.copy(layer.dropout)
    new._no_grad, new.dropout._no_grad = set(layer._no_grad), set(layer.dropout._no_grad)
    return new
