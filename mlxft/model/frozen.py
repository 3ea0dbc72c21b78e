"""Frozen models that an objective reads: a reference, a reward model, a teacher; and what they take in memory.

An objective names them (`Objective.frozen`), the memory plan counts them, and `FrozenModels` opens them: as a role on
the base that is trained where that is possible, and else as a model of its own.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxft.config import Config
from mlxft.distributed import Ranks, current
from mlxft.errors import CheckpointError, ModelError
from mlxft.files import write_beside
from mlxft.model.adapters import base_noted, load_with_adapter, read_adapter_config
from mlxft.model.cpu import as_trained
from mlxft.model.heads import HEAD_FILE, load_head
from mlxft.model.layers import LEAVES, aside, probing
from mlxft.model.load import base_fingerprint, fits_base, load, resolve, skeleton
from mlxft.model.logits import Split, ahead
from mlxft.model.memory import Residents
from mlxft.model.prefix import Completions, Sharing
from mlxft.model.roles import Roles
from mlxft.model.shard import sharding_of


class FrozenSource(NamedTuple):
    """A frozen model as a recipe names it.

    Attributes:
        name: what it is for: reference, reward, teacher.
        folder: of an adapter or of a whole model; None: what is trained, as it is when training begins.
        quantize: bits to which a whole model is quantised when it is loaded; None: as it is.
    """

    name: str
    folder: Path | None = None
    quantize: int | None = None


class FrozenModel:
    """A frozen model that is ready to be read.

    Attributes:
        split: the model that holds it.
        tokenizer: its own; None: that of the model that is trained.
        role: its name among the roles of the trained model; None: it is the bare base, or a model of its own.
    """

    def __init__(
        self, split: Split, roles: Roles | None = None, role: str | None = None, tokenizer: Any = None
    ) -> None:
        self.split, self.role, self.tokenizer = split, role, tokenizer
        self._roles = roles

    @property
    def shared(self) -> bool:
        """Return whether it stands on the base that is trained."""
        return self._roles is not None

    @contextmanager
    def reading(self) -> Iterator[Split]:
        """Put it in place, without dropout, for the length of the block."""
        with probing(self.split.model):
            if self._roles is None:
                yield self.split
            else:
                with self._roles.use(self.role):
                    yield self.split

    def arrays(self) -> list[mx.array]:
        """Return what it holds beside the base that is trained, its head included."""
        if self._roles is None:
            return [value for _, value in tree_flatten(self.split.model.parameters())]
        if self.role is None:
            return []
        head = self._roles[self.role].head
        return [*self._roles.weights(self.role).values(), *([head.weight] if head is not None else [])]


class FrozenModels:
    """Opens frozen models beside a model that is trained.

    Args:
        model: with what the recipe trains; from now on its role "policy".
        fingerprint: of its base; None: nothing is opened as a role on it.
        path: the base's name (model.path). A fine-tuned base has the fingerprint of its origin: where the names lead to
            different places, an adapter is opened on its own base.
    """

    def __init__(self, model: nn.Module, fingerprint: str | None, path: str | None = None) -> None:
        self.roles, self.split = Roles(model, adopt="policy"), Split(model)
        self._fingerprint, self._path = fingerprint, path
        self._apart: list[FrozenModel] = []  # models of their own

    def start(self, name: str, config: Config) -> FrozenModel:
        """Return the trained model as it is now: the bare base where a fresh adapter is trained, else a copy."""
        if is_bare(config):
            return self.base()
        self.roles.copy("policy", name)
        return FrozenModel(self.split, self.roles, name)

    def base(self) -> FrozenModel:
        """Return the base that is trained, without any role's adapter."""
        return FrozenModel(self.split, self.roles)

    def arrays(self) -> list[mx.array]:
        """Return what all of them hold, and what the base had where training replaces it."""
        return [*self.roles.arrays(), *(value for model in self._apart for value in model.arrays())]

    def open(self, source: FrozenSource) -> FrozenModel:
        """Load a frozen model from its folder, with the head that lies there.

        Raises:
            ModelError: it cannot be loaded.
        """
        folder = source.folder
        assert folder is not None, "what is trained is not loaded: see start"
        if source.quantize is None and same_base(folder, self._fingerprint, self._path):
            self.roles.load(source.name, folder, self._fingerprint)
            found = FrozenModel(self.split, self.roles, source.name)
            mx.eval(found.arrays())
            return found
        self._apart.append(open_apart(source))
        return self._apart[-1]


def open_apart(source: FrozenSource) -> FrozenModel:
    """Load a frozen model as a model of its own, with the head that lies in its folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    folder = source.folder
    assert folder is not None, "what is trained is not loaded: see FrozenModels.start"
    options: dict[str, Any] = {} if source.quantize is None else {"quantize": source.quantize}
    is_adapter = (folder / "adapter_config.json").is_file()
    loaded = load_with_adapter(folder, folder, options) if is_adapter else load(str(folder), **options)
    split = Split(loaded.model)
    if (folder / HEAD_FILE).is_file():
        load_head(split, folder / HEAD_FILE, base_fingerprint(loaded))
    loaded.model.freeze()
    loaded.model.eval()
    mx.eval(loaded.model.parameters())
    return FrozenModel(split, tokenizer=loaded.tokenizer)


def same_base(folder: Path, fingerprint: str | None, path: str | None) -> bool:
    """Return whether a folder holds an adapter of a base with the same shapes and, as far as is known, weights."""
    if fingerprint is None or not (folder / "adapter_config.json").is_file():
        return False
    recorded = base_noted(read_adapter_config(folder))
    if "fingerprint" not in recorded or not fits_base(recorded["fingerprint"], fingerprint):
        return False
    name = recorded.get("model")
    if path is None or name is None or name == path:
        return True
    places = [resolve(each, weights=False).resolve() for each in (name, path)]
    return places[0] == places[1]


def is_bare(config: Config) -> bool:
    """Return whether training starts from the bare base and leaves it as it is: that of a fresh adapter."""
    return config.tune.method != "full" and config.model.adapter is None


@aside()
def frozen_residents(sources: Sequence[FrozenSource], config: Config, model: nn.Module) -> Residents:
    """Return the bytes of frozen models, for the memory plan; nothing of them is loaded.

    Args:
        model: what is trained, with or without weights.
    """
    trained = tree_flatten(model.trainable_parameters())
    if config.model.adapter is None:  # without its adapter the base is what it was, but for parameters trained whole
        trained = [(name, value) for name, value in trained if name.rpartition(".")[2] not in LEAVES]
    found, apart, notes = dict[str, int](), set[str](), list[str]()
    for source in sources:
        if source.folder is None:
            found[source.name] = sum(value.nbytes for _, value in trained)
        else:
            found[source.name], shared, note = _stored(source, source.folder, config)
            notes += note
            apart |= set() if shared else {source.name}
    return Residents(found, apart=frozenset(apart), notes=tuple(notes))


def _stored(source: FrozenSource, folder: Path, config: Config) -> tuple[int, bool, list[str]]:
    """Return the bytes of a frozen model in a folder, whether it stands on the trained base, and notes on it."""
    name, m = source.name, config.model
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    is_adapter = (folder / "adapter_config.json").is_file()
    try:
        own = skeleton(m.path, dtype=m.dtype, quantize=m.quantize, group_size=m.group_size).fingerprint
        if source.quantize is None and same_base(folder, own, m.path):
            return stored, True, []
        weights = sum(value.nbytes for _, value in tree_flatten(frozen_skeleton(source).parameters()))
    except ModelError as error:
        what = f"the base of the {name} model" if is_adapter else f"the {name} model"
        return stored, False, [f"{what} is not counted{'' if is_adapter else ' but for its files'}: {error}"]
    if not is_adapter:
        return weights, False, [f"the {name} model is a whole model of its own"]
    return stored + weights, False, [f"the {name} model has a base of its own ({_base_of(folder)['model']})"]


def _base_of(folder: Path) -> dict[str, Any]:
    base: dict[str, Any] = read_adapter_config(folder).get("mlxft", {}).get("base", {})
    return base


def frozen_skeleton(source: FrozenSource) -> nn.Module:
    """Return a model of its own without weights; of an adapter its base."""
    folder = source.folder
    assert folder is not None, "what is trained is a skeleton already"
    options, path = dict[str, Any](), str(folder)
    if (folder / "adapter_config.json").is_file():
        base = _base_of(folder)
        path = base.get("model", "")
        options = {k: base[k] for k in ("dtype", "quantize", "group_size") if base.get(k) is not None}
    if source.quantize is not None:
        options["quantize"] = source.quantize
    return skeleton(path, **options).model


# --- reference --------------------------------------------------------------------------------------------------------

_FILE = "reference.npz"
Stacked = Iterator[tuple[list[int], Completions]]


class Reference:
    """The reference's log-probabilities of a data set's completions, asked when they are needed or computed once.

    Args:
        models: of the model that is trained, before its first step; `model` is the reference among them.
        sharing: of the same model.
    """

    def __init__(self, models: FrozenModels, model: FrozenModel, sharing: Sharing) -> None:
        self._models: FrozenModels | None = models
        self._model, self._sharing = model, sharing
        self._jobs: list[Any] = []
        self._file: tuple[Path, str] | None = None
        self._known: list[list[Any]] | None = None
        self._unasked = False

    def precompute(self, data: Iterable[Stacked], folder: Path, key: str) -> None:
        """Take the numbers from now on from one pass over `data`, made when they are first asked for.

        Args:
            data: of each set all completions, in batches with their places in it.
            folder: where the numbers are kept, under a `key` that names all they depend on but the weights.
        """
        self._jobs = list(data)
        self._file = folder / _FILE, key

    def arrays(self) -> list[mx.array]:
        """Return what it keeps in memory: the weights that the model had when training began."""
        return [] if self._models is None else self._models.arrays()

    @contextmanager
    def unasked(self) -> Iterator[None]:
        """Give zeros inside the block for numbers that are to be computed once and are not known yet."""
        self._unasked = True
        try:
            yield
        finally:
            self._unasked = False

    def logprobs(self, rows: Completions, which: int, places: Sequence[int]) -> mx.array:
        """Return (N,) float32, on their way, of the completions' tokens, in the order of their labels.

        Args:
            which, places: the set, and the completions' places in it, for numbers that were computed before.
        """
        if self._file is None:
            return self._ask(rows)
        if self._known is None and self._unasked:
            return mx.zeros(rows.labels.shape)
        self.settle()
        assert self._known is not None
        return mx.array(np.concatenate([self._known[which][i] for i in places]))

    def settle(self) -> None:
        """Compute now what is to be computed once; all ranks call it, each computes a share, and rank 0 keeps it."""
        if self._file is None or self._unasked or self._known is not None:
            return
        self._file = self._file[0], self._digest(self._file[1])
        ranks = current()
        (kept, *_) = ranks.gather_arrays((self._read() or {}) if ranks.first else {})
        if not kept:
            kept = self._compute(ranks)
            if ranks.first:
                self._write(kept)
        sets = range(len(self._jobs))
        self._known = [np.split(kept[f"values{i}"], np.cumsum(kept[f"lengths{i}"])[:-1]) for i in sets]
        self._models, self._jobs = None, []  # the reference's own memory is free
        del self._model

    def _ask(self, rows: Completions) -> mx.array:
        with self._model.reading():
            values = as_trained(lambda: self._sharing.logprobs(rows, grad=False))
        # Before anything else is asked for, so that its activations never stand beside the policy's; not waited for.
        mx.async_eval(values)
        return values

    def _digest(self, key: str) -> str:
        """Hash the key and the reference's weights: what lies at a path may have changed."""
        digest = hashlib.blake2b(key.encode(), digest_size=16)
        with self._model.reading() as split:
            # A sharded base is known by its fingerprint, which is in the key.
            kept = split.model.trainable_parameters() if sharding_of(split.model) else split.model.parameters()
            for name, value in tree_flatten(kept):
                digest.update(f" {name} {value.shape} {value.dtype} ".encode())
                digest.update(np.array(value.reshape(-1).view(mx.uint8)).data)
        return digest.hexdigest()

    def _compute(self, ranks: Ranks) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, job in enumerate(self._jobs):
            batches = (((counts, places, rows.lengths), rows) for (places, rows), counts in ranks.turns(job))
            mine: dict[str, Any] = {name: [np.zeros(0, np.int64)] for name in ("places", "lengths")}
            mine["values"] = [np.zeros(0, np.float32)]
            for (counts, places, lengths), values in ahead(batches, self._ask):
                for name, part in (("places", places), ("lengths", np.array(lengths)), ("values", np.array(values))):
                    mine[name] += [np.asarray(part, mine[name][0].dtype)] * counts
            known: dict[int, Any] = {}
            for theirs in ranks.gather_arrays({name: np.concatenate(parts) for name, parts in mine.items()}):
                ends = np.cumsum(theirs["lengths"])[:-1]
                known |= dict(zip(theirs["places"].tolist(), np.split(theirs["values"], ends)))
            every = [known[place] for place in range(len(known))]
            found[f"values{i}"] = np.concatenate([np.zeros(0, np.float32), *every])
            found[f"lengths{i}"] = np.array([len(row) for row in every], dtype=np.int64)
        return found

    def _write(self, found: dict[str, Any]) -> None:
        assert self._file is not None
        path, key = self._file
        with suppress(CheckpointError):  # it is only a cache: a resumed run computes them again
            write_beside(path, lambda beside: np.savez(beside, key=np.array(key), **found))

    def _read(self) -> dict[str, Any] | None:
        assert self._file is not None
        path, key = self._file
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                if str(file["key"]) != key:
                    return None
                return {
                    f"{name}{i}": file[f"{name}{i}"] for i in range(len(self._jobs)) for name in ("values", "lengths")
                }
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged, or not there
            return None
