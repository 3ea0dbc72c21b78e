"""Scalar heads on a model's body: reward models and critics, their files, and scoring with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxft.data.dataset import EncodedCompletion, Slot, encode_completion, plan_epoch
from mlxft.errors import ConfigError, ModelError
from mlxft.model.folder import check_arrays, check_numbers
from mlxft.model.layers import probing
from mlxft.model.load import fits_base
from mlxft.model.logits import Split, ahead
from mlxft.text import home_path, parse_json

# --- heads ------------------------------------------------------------------------------------------------------------
# Scalar heads: one number from the hidden state of a token. A head stands in the model beside its body, as
# `score_head`, where the loop trains it and checkpoints hold it; on disk it is head.safetensors beside what it reads.

HEAD = "score_head"
CRITIC = "critic"  # what PPO trains beside a policy stands here
HEAD_FILE = "head.safetensors"
_WEIGHT = f"{HEAD}.weight"


class ScoreHead(nn.Module):
    """A linear map D -> 1 in float32, without a bias: centring has the scores' free constant.

    Drawn with standard deviation 1 / sqrt(D + 1) (Stiennon et al. 2020; Huang et al. 2024).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((1, width), scale=1 / math.sqrt(width + 1))

    @classmethod
    def of(cls, weight: mx.array) -> ScoreHead:
        """A head with this (1, D) weight; nothing is drawn from the random state."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.weight = weight.astype(mx.float32)
        return head

    def __call__(self, hidden: mx.array) -> mx.array:
        """(..., D) hidden states of any float type -> (...) float32."""
        return (hidden.astype(mx.float32) @ self.weight.astype(mx.float32).T)[..., 0]


class Saved(NamedTuple):
    """A head's file: its weight (1, D), the base it belongs to, and what was noted of it."""

    weight: mx.array
    fingerprint: str | None
    about: dict[str, Any]


def body_width(split: Split) -> int:
    """D, the width of what the body gives.

    Raises:
        ModelError: body and head of this model can not be told apart, so there are no hidden states to read.
    """
    if not split.separable:
        kind = type(split.model).__module__.rpartition(".")[2]
        raise ModelError(
            f"model.path: a scalar head reads the hidden states of a body, and this model ({kind}) does not keep its "
            "body apart from its output layer; choose another architecture"
        )
    with probing(split.model):
        return int(split.hidden(mx.array([[0]])).shape[-1])


def attach_head(model: nn.Module, head: ScoreHead | None) -> None:
    """Put a head into the model, in place of one that is there; None takes it out."""
    if head is not None:
        setattr(model, HEAD, head)
    elif HEAD in model:
        del model[HEAD]


def head_of(model: nn.Module) -> ScoreHead | None:
    """The model's head, if it has one."""
    found = model.get(HEAD)
    return found if isinstance(found, ScoreHead) else None


@contextmanager
def without_head(model: nn.Module) -> Iterator[ScoreHead | None]:
    """The model as mlx-lm knows it, inside the block; gives the head."""
    beside = {name: model[name] for name in (HEAD, CRITIC) if name in model}
    head = head_of(model)
    for name in beside:
        del model[name]
    try:
        yield head
    finally:
        for name, module in beside.items():
            setattr(model, name, module)


def read_scores(split: Split, ids: mx.array, last: mx.array) -> mx.array:
    """Scores (B,) float32 of (B, T) rows, padded on the right, by the model's head.

    Args:
        last: (B,) index of each row's last real token. By index, since the padding token may be the one that ends
            a row.
    """
    head = head_of(split.model)
    assert head is not None, "attach_head first"
    hidden = split.hidden(ids)
    rows = mx.arange(ids.shape[0]) * ids.shape[1] + last
    return head(hidden.reshape(-1, hidden.shape[-1])[rows])


def begin_head(split: Split, start: str, setting: str) -> None:
    """Attach the head of the model that training starts from, or a new one; what it does not read is frozen.

    Args:
        start: the run, adapter or model folder; it has a head where a reward model is trained further.
        setting: see `fix_unread`.
    Raises:
        ConfigError, ModelError: body and head can not be told apart, or the head does not fit.
    """
    width = body_width(split)
    found = find_head(start)
    if found is not None:
        load_head(split, found, None)
    else:
        attach_head(split.model, ScoreHead(width))
    fix_unread(split, setting)


def fix_unread(split: Split, setting: str) -> None:
    """Freeze what stands outside the body (an output layer): scores do not depend on it, and decay would eat it.

    Raises:
        ConfigError: a low-rank layer stands there, which `setting` must have named.
    """
    inside = {id(module) for module in split.body.modules()}
    for name, module in split.model.named_modules():
        if id(module) in inside or not name or name.split(".")[0] == HEAD or _around(module, inside):
            continue
        if any(leaf.startswith("lora_") for leaf in module):
            raise ConfigError(f"{setting}: {name} is not part of what gives a score; leave it out")
        module.freeze()


def _around(module: nn.Module, inside: set[int]) -> bool:
    """Whether the body lies in `module`."""
    return any(id(part) in inside for part in module.modules())


def find_head(path: str | Path | None) -> Path | None:
    """head.safetensors of a run, an adapter folder or a model folder; None where there is none."""
    if path is None:
        return None
    folder = home_path(path)
    found = [folder / part / HEAD_FILE for part in ("", "adapter", "model")]
    return next((file for file in found if file.is_file()), None)


def head_arrays(head: ScoreHead) -> dict[str, mx.array]:
    """What head.safetensors holds."""
    return {_WEIGHT: head.weight}


def adapter_metadata(head: ScoreHead | None) -> dict[str, str]:
    """What adapters.safetensors says of itself: the head it was saved with, so that no other one is read with it."""
    return {"format": "mlx"} | ({} if head is None else {"head": _digest(head.weight)})


def _digest(weight: mx.array) -> str:
    return blake2b(np.array(weight.astype(mx.float32)).tobytes(), digest_size=8).hexdigest()


def check_pair(file: Path, weight: mx.array) -> None:
    """ModelError where the adapter beside a head was saved with another one: a kill between the two files."""
    beside = file.with_name("adapters.safetensors")
    loaded: Any = mx.load(str(beside), return_metadata=True) if beside.is_file() else ({}, {})
    if loaded[1].get("head", _digest(weight)) != _digest(weight):
        raise ModelError(
            f"{file}: was not saved together with {beside.name}; go on with mlxft train --resume, which saves both"
        )


def head_metadata(fingerprint: str, about: dict[str, Any]) -> dict[str, str]:
    """What head.safetensors says of itself: the base, and what was noted (JSON)."""
    return {"format": "mlx", "fingerprint": fingerprint, "about": json.dumps(about)}


def read_head(file: Path) -> Saved:
    """A head from its file.

    Raises:
        ModelError: the file can not be read, or holds no head.
    """
    try:
        check_arrays(file)
        loaded: Any = mx.load(str(file), return_metadata=True)
        arrays, metadata = loaded
        about = parse_json(metadata.get("about", "{}"))
        if not isinstance(about, dict):
            raise ValueError("what it notes is not an object")
    except (OSError, RuntimeError, ValueError) as e:
        raise ModelError(f"{file}: can not read the head: {e}") from e
    weight = arrays.get(_WEIGHT)
    if weight is None or weight.ndim != 2 or weight.shape[0] != 1:
        raise ModelError(f"{file}: holds no head; expected {_WEIGHT} of shape (1, width), it has {sorted(arrays)}")
    check_numbers(file, arrays)
    return Saved(weight, metadata.get("fingerprint"), about)


def load_head(split: Split, file: Path, base: str | None) -> Saved:
    """Read a head and attach it.

    Args:
        base: fingerprint of the model; a head that names another base is refused.
    Raises:
        ModelError: of another base or width, or the file can not be read.
    """
    saved = read_head(file)
    check_pair(file, saved.weight)
    if base is not None and not fits_base(saved.fingerprint, base):
        raise ModelError(f"{file}: is the head of another base ({saved.fingerprint}), and this model is {base}")
    width = body_width(split)
    if saved.weight.shape[1] != width:
        raise ModelError(f"{file}: reads hidden states of width {saved.weight.shape[1]}, this model's have {width}")
    attach_head(split.model, ScoreHead.of(saved.weight))
    return saved


def trained_without_head(model: nn.Module) -> dict[str, mx.array]:
    """Trainable parameters without the head's: what an adapter's own file holds."""
    beside = (f"{HEAD}.", f"{CRITIC}.")
    return {n: v for n, v in tree_flatten(model.trainable_parameters()) if not n.startswith(beside)}


# --- scorer -----------------------------------------------------------------------------------------------------------

SCORING_TOKENS = 4096  # of a batch, padding included


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

    def encode(self, prompt: Any, reply: Any, where: str, tools: Any = None) -> EncodedCompletion:
        """An answer as it is scored: the very tokens that training reads."""
        return encode_completion(prompt, reply, self.tokenizer, where, tools, self.chat)

    def scores(
        self,
        answers: Sequence[EncodedCompletion],
        tokens: int = SCORING_TOKENS,
        on_done: Callable[[int], None] | None = None,
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
