"""Policy, reference, reward model and critic as roles over one base."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.errors import ModelError
from mlxft.model.adapters import (
    LoRASpec,
    adapter_config,
    attached_spec,
    count_all,
    load_trained,
    read_adapter,
    spec_of,
)
from mlxft.model.folder import replace_folder
from mlxft.model.heads import (
    HEAD_FILE,
    ScoreHead,
    adapter_metadata,
    attach_head,
    head_arrays,
    head_metadata,
    head_of,
    load_head,
    trained_without_head,
)
from mlxft.model.layers import LEAVES, LowRank, adaptable, wrap
from mlxft.model.logits import Split

# --- roles ------------------------------------------------------------------------------------------------------------
# Several roles over one base: policy, reference, reward, value. Each is an adapter, and a scalar head if it has one.
#
# A role owns the low-rank layers it puts around the base's; the base's own layers, packed or not, are in all of them.
# To switch is to put other layers into the model's places: no array is copied or computed, and a compiled function
# that has `model.state` among its inputs sees the arrays that stand there. Where a role has no adapter the base's own
# layer stands, so that the bare base is the base to the last bit, and a role costs its own arrays only.


@dataclass
class Role:
    """What one role puts into the model: layers by path, values of parameters it has of its own, a head."""

    spec: LoRASpec | None
    layers: dict[str, LowRank] = field(default_factory=dict)
    whole: dict[str, mx.array] = field(default_factory=dict)
    head: ScoreHead | None = None


class _Back:
    """Gives the model back to the role that had it, at the end of a `with` block."""

    def __init__(self, roles: Roles, before: str | None) -> None:
        self._roles, self._before = roles, before

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._roles.use(self._before)


class Roles:
    """The roles of a model.

    A compiled function must have `model.state` among its inputs, and traces again where a role's shapes differ.
    Python values it was traced with stay as they are, a role's dropout among them.

    Args:
        model: a base, or one with an adapter.
        adopt: the role that what is trainable in `model` now becomes: its adapter, parameters trained whole, its
            head. It stays active. Without it the model must be bare.
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
            self._learn(path, layer.base)
        whole = {n: v for n, v in trained_without_head(model).items() if n not in leaves}
        self._learn_whole(whole)
        self._roles[adopt] = Role(attached_spec(adapted), adapted, whole, head_of(model))
        self.active = adopt

    @property
    def names(self) -> list[str]:
        """The roles there are, in the order they came."""
        return list(self._roles)

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def arrays(self) -> list[mx.array]:
        """All that roles hold, and what the base had where they differ."""
        found = list(self._own.values())
        for role in self._roles.values():
            layers = [layer.parameters() for layer in role.layers.values()]
            held = [layers, role.whole, {} if role.head is None else role.head.parameters()]
            found += [value for _, value in tree_flatten(held)]
        return found

    def _learn(self, path: str, base: nn.Module) -> None:
        """Note where a layer stands."""
        holder: Any = self.model
        *above, key = path.split(".")
        for part in above:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        self._places[path] = (holder, int(key) if isinstance(holder, list) else key)
        self._base[path] = base

    def _learn_whole(self, names: Iterable[str]) -> None:
        """Note where parameters stand, and their values in the base."""
        modules = dict(self.model.named_modules())
        for name in names:
            if name not in self._owners:
                owner, _, leaf = name.rpartition(".")
                count_all(modules[owner], leaf)
                self._owners[name] = modules[owner], leaf
                self._own[name] = modules[owner][leaf]

    def use(self, name: str | None) -> _Back:
        """Make a role active, None for the bare base. As a context manager it gives back what was active before."""
        before = self.active
        if before != name:
            self._leave()
            self._enter(self._roles[name] if name is not None else Role(None))
            self.active = name
        return _Back(self, before)

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
            # Past the module's own setter: the key is there, and keeps its place in the order of parameters.
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
        """A new role; which one is active stays.

        Args:
            spec: its adapter's shape; None: the base as it is, and then at most a head.
            weights: of its adapter and of parameters it has of its own, by full name; None: fresh, without effect.
        Raises:
            ModelError: the model has no such layers, or the weights do not fit.
        """
        assert name not in self._roles, f"there is a role {name} already"
        role = Role(spec, head=head)
        with self.use(None):
            modules = dict(self.model.named_modules())
            paths = spec.paths if spec is not None else ()
            unfit = [p for p in paths if p not in modules or not adaptable(modules[p])]
            if unfit:
                raise ModelError(f"role {name}: the model has no layer {unfit[0]} to adapt (of {len(unfit)} such)")
            for path in paths:
                assert spec is not None
                self._learn(path, modules[path])
                layer = wrap(modules[path], spec.rank, spec.scale, spec.dropout, spec.dora)
                layer.freeze()
                layer.unfreeze(recurse=False, keys=[k for k in LEAVES if k in layer])
                role.layers[path] = layer
            whole = [n for n in weights or () if n.rpartition(".")[2] not in LEAVES]
            there = dict(tree_flatten(self.model.parameters()))
            strange = [n for n in whole if n not in there]
            if strange:
                raise ModelError(f"role {name}: the model has no parameter {strange[0]} (of {len(strange)} such)")
            self._learn_whole(whole)
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
        """A new role that begins where another one is; the arrays are shared until one of the two is trained."""
        assert name not in self._roles, f"there is a role {name} already"
        if source == self.active:
            self._leave()
        of = self._roles[source]
        layers = {path: _twin(layer) for path, layer in of.layers.items()}
        head = None if of.head is None else ScoreHead.of(of.head.weight)
        self._roles[name] = Role(of.spec, layers, dict(of.whole), head)
        return self._roles[name]

    def drop(self, name: str) -> None:
        """Forget a role that is not active; its memory is free."""
        assert name != self.active, f"{name} is active"
        del self._roles[name]

    def weights(self, name: str) -> dict[str, mx.array]:
        """What a role has of its own, without its head."""
        with self.use(name):
            return trained_without_head(self.model)

    def save(self, name: str, folder: Path, about: dict[str, Any]) -> None:
        """Write a role as an adapter folder, with its head: all of it or nothing.

        Args:
            about: noted in adapter_config.json under `mlxft`; its base.fingerprint is what `load` compares.
        Raises:
            ExportError: it can not be written.
        """
        role = self._roles[name]
        fingerprint = str(about.get("base", {}).get("fingerprint", ""))
        weights = self.weights(name)
        config = adapter_config(role.spec, self.model, about)
        if role.spec is None and not weights:  # a bare base with a head: an adapter of no layers
            config = adapter_config(LoRASpec((), 1, 1.0), self.model, about)
        with replace_folder(folder, "adapter") as part:
            (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            arrays = dict(sorted(weights.items()))
            mx.save_safetensors(str(part / "adapters.safetensors"), arrays, adapter_metadata(role.head))
            if role.head is not None:
                saved = head_metadata(fingerprint, {k: v for k, v in about.items() if k == "reward"})
                mx.save_safetensors(str(part / HEAD_FILE), head_arrays(role.head), saved)

    def load(self, name: str, folder: Path, base: str | None) -> Role:
        """A new role from an adapter folder, with the head that lies there.

        Args:
            base: fingerprint of the model.
        Raises:
            ModelError: not an adapter, of another base, or it does not fit.
        """
        config, weights = read_adapter(folder, base)
        with self.use(None):
            spec = spec_of(config, self.model)
        role = self.add(name, spec, weights)
        if (folder / HEAD_FILE).is_file():
            try:
                with self.use(name):
                    load_head(Split(self.model), folder / HEAD_FILE, base)
            except ModelError:
                del self._roles[name]
                raise
        return role

    def nbytes(self, name: str) -> int:
        """Bytes that a role has of its own."""
        role = self._roles[name]
        own = [v for layer in role.layers.values() for k, v in layer.items() if k in LEAVES or k == "_norm2"]
        own += role.whole.values()
        return sum(v.nbytes for v in own) + (role.head.weight.nbytes if role.head is not None else 0)


def _twin(layer: LowRank) -> LowRank:
    """The same layer with the same arrays, as an object of its own; nothing is drawn from the random state."""
    twin = copy.copy(layer)
    # A shallow copy shares what says whether it trains: that is each role's own.
    twin.dropout = copy.copy(layer.dropout)
    twin._no_grad, twin.dropout._no_grad = set(layer._no_grad), set(layer.dropout._no_grad)
    return twin
