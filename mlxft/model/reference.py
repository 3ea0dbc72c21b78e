"""The policy that training began with, asked for log-probabilities: a role of the same model, or numbers kept of it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxft.model.cpu import as_trained
from mlxft.model.logprobs import ahead
from mlxft.model.random import probing
from mlxft.model.roles import Roles
from mlxft.model.shared import Sharing
from mlxft.temporary import clear, temporary

FILE = "reference.npz"
Stacked = Iterator[tuple[list[int], dict[str, mx.array]]]


class Reference:
    """Log-probabilities of answers by the reference.

    Args:
        sharing: of the model as it is before the first step, with what is trained.
        adapted: it began with an adapter that is not without effect, so that the reference is that adapter; else it is
            the bare base.
    """

    def __init__(self, sharing: Sharing, adapted: bool) -> None:
        self._sharing = sharing
        self._roles: Roles | None = Roles(sharing.split.model, adopt="policy")
        self._name = "reference" if adapted else None
        if adapted:
            self._roles.copy("policy", "reference")
        self._jobs: list[Any] = []
        self._file: tuple[Path, str] | None = None
        self._known: list[list[Any]] | None = None
        self._unasked = False

    def precompute(self, data: Iterable[Stacked], folder: Path, key: str) -> None:
        """Take the numbers from now on from one pass over `data` (a list of sets), made when first asked.

        Args:
            data: of each set all answers, in batches with their places in it.
            folder: where the numbers are kept, under a `key` that names all they depend on but the weights.
        """
        self._jobs = list(data)
        self._file = folder / FILE, key

    def held(self) -> list[mx.array]:
        """Its arrays, and those that the model had when training began."""
        return [] if self._roles is None else self._roles.arrays()

    @contextmanager
    def unasked(self) -> Iterator[None]:
        """Inside the block numbers that are to be precomputed, and are not known yet, are zeros."""
        self._unasked = True
        try:
            yield
        finally:
            self._unasked = False

    def logprobs(self, arrays: dict[str, mx.array], which: int, places: Sequence[int]) -> mx.array:
        """(N,) float32, on their way, of the answers' tokens, in the order of `arrays["labels"]`.

        Args:
            arrays: of a batch, as `Sharing` takes them.
            which, places: the set and the answers' places in it, for numbers that were precomputed.
        """
        if self._file is not None:
            if self._unasked and self._known is None:
                return mx.zeros(arrays["labels"].shape)
            if self._known is None:
                self._file = self._file[0], self._digest(self._file[1])
                self._known = self._read() or self._compute()
                self._roles, self._jobs = None, []  # the reference's own memory is free
            return mx.array(np.concatenate([self._known[which][i] for i in places]))
        return self._ask(arrays)

    def _ask(self, arrays: dict[str, mx.array]) -> mx.array:
        assert self._roles is not None
        with probing(self._roles.model), self._roles.use(self._name):
            values = as_trained(lambda: self._sharing.logprobs(arrays, grad=False))
        # Before anything else is asked for, so that its activations never stand beside the policy's; not waited for.
        mx.async_eval(values)
        return values

    def _digest(self, key: str) -> str:
        """Of the key and the reference's own weights: a path does not say whether what lies there is still the same."""
        assert self._roles is not None
        digest = hashlib.blake2b(key.encode(), digest_size=16)
        with self._roles.use(self._name):
            for name, value in tree_flatten(self._roles.model.parameters()):
                digest.update(f" {name} {value.shape} {value.dtype} ".encode())
                digest.update(np.array(value.reshape(-1).view(mx.uint8)).data)
        return digest.hexdigest()

    def _compute(self) -> list[list[Any]]:
        assert self._file is not None
        found: list[list[Any]] = []
        for job in self._jobs:
            rows: dict[int, Any] = {}
            batches = (((places, arrays["lengths"]), arrays) for places, arrays in job)
            for (places, lengths), values in ahead(batches, self._ask):
                ends = np.cumsum(np.array(lengths).astype(np.int64))[:-1]
                rows |= dict(zip(places, np.split(np.array(values), ends)))
            found.append([rows[i] for i in range(len(rows))])
        self._write(found)
        return found

    def _write(self, found: list[list[Any]]) -> None:
        assert self._file is not None
        path, key = self._file
        arrays: dict[str, Any] = {"key": np.array(key)}
        for i, rows in enumerate(found):
            arrays[f"values{i}"] = np.concatenate(rows) if rows else np.zeros(0, dtype=np.float32)
            arrays[f"lengths{i}"] = np.array([len(row) for row in rows], dtype=np.int64)
        beside = temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(path.parent)
            np.savez(beside, **arrays)
            os.replace(beside, path)
        except OSError:  # it is only a cache: a resumed run computes them again
            beside.unlink(missing_ok=True)

    def _read(self) -> list[list[Any]] | None:
        assert self._file is not None
        path, key = self._file
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                if str(file["key"]) != key:
                    return None
                count = sum(name.startswith("values") for name in file.files)
                return [np.split(file[f"values{i}"], np.cumsum(file[f"lengths{i}"])[:-1]) for i in range(count)]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged, or not there
            return None
