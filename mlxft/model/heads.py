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
from mlxft.model.folder import read_arrays
from mlxft.model.layers import probing
from mlxft.model.load import fits_base
from mlxft.model.logits import Split, ahead
from mlxft.text import home_path, parse_json

# --- heads ------------------------------------------------------------------------------------------------------------
# A scalar head computes one number from a token's hidden state. In memory it is the model's module `score_head`, where
# the loop trains it and checkpoints include it; on disk it is head.safetensors beside the adapter or model.

HEAD = "score_head"
CRITIC = "critic"  # module of a policy: PPO's critic, trained beside it
HEAD_FILE = "head.safetensors"
_WEIGHT = f"{HEAD}.weight"


class ScoreHead(nn.Module):
    """A linear map D -> 1 in float32, without a bias: the constant of scores is free, and centring sets it.

    The initial standard deviation is 1 / sqrt(D + 1) (Stiennon et al. 2020; Huang et al. 2024).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((1, width), scale=1 / math.sqrt(width + 1))

    @classmethod
    def of(cls, weight: mx.array) -> ScoreHead:
        """Return a head with this (1, D) weight; nothing is drawn from the random state."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.weight = weight.astype(mx.float32)
        return head

    def __call__(self, hidden: mx.array) -> mx.array:
        """Map (..., D) hidden states of any float type to (...) scores in float32."""
        return (hidden.astype(mx.float32) @ self.weight.astype(mx.float32).T)[..., 0]


class Saved(NamedTuple):
    """Content of a head's file: its weight (1, D), the fingerprint of its base, and notes."""

    weight: mx.array
    fingerprint: str | None
    about: dict[str, Any]


def body_width(split: Split, reader: str = "a scalar head") -> int:
    """Return D, the width of the body's hidden states.

    Args:
        reader: what reads them, for the message.
    Raises:
        ModelError: body and head of this model cannot be separated, so there are no hidden states to read.
    """
    if not split.separable:
        kind = type(split.model).__module__.rpartition(".")[2]
        raise ModelError(
            f"model.path: {reader} reads hidden states, and the body of this model ({kind}) cannot be separated "
            "from its output layer; choose another architecture"
        )
    with probing(split.model):
        return int(split.hidden(mx.array([[0]])).shape[-1])


def attach_head(model: nn.Module, head: ScoreHead | None) -> None:
    """Put a head into the model in place of the present one; None removes it."""
    if head is not None:
        setattr(model, HEAD, head)
    elif HEAD in model:
        del model[HEAD]


def head_of(model: nn.Module) -> ScoreHead | None:
    """Return the model's head, if it has one."""
    found = model.get(HEAD)
    return found if isinstance(found, ScoreHead) else None


@contextmanager
def without_head(model: nn.Module) -> Iterator[ScoreHead | None]:
    """Take head and critic out of the model inside the block, as mlx-lm expects it; yield the head."""
    beside = {name: model.pop(name) for name in (HEAD, CRITIC) if name in model}
    try:
        yield beside.get(HEAD)
    finally:
        for name, module in beside.items():
            setattr(model, name, module)


def read_scores(split: Split, ids: mx.array, last: mx.array) -> mx.array:
    """Return the scores (B,), float32, of right-padded rows (B, T) by the model's head.

    Args:
        last: (B,) index of each row's last real token: the padding token may also be the one that ends a row.
    """
    head = head_of(split.model)
    assert head is not None, "attach_head first"
    hidden = split.hidden(ids)
    rows = mx.arange(ids.shape[0]) * ids.shape[1] + last
    return head(hidden.reshape(-1, hidden.shape[-1])[rows])


def begin_head(split: Split, start: str, setting: str) -> None:
    """Attach the head of the model that training starts from, or a new one, and freeze what it does not read.

    Args:
        start: the run, adapter or model folder; it has a head if it is a reward model.
        setting: see `fix_unread`.
    Raises:
        ConfigError, ModelError: body and head cannot be separated, or the head does not fit.
    """
    found = find_head(start)
    if found is not None:
        load_head(split, found, None)
    else:
        attach_head(split.model, ScoreHead(body_width(split)))
    fix_unread(split, setting)


def fix_unread(split: Split, setting: str) -> None:
    """Freeze modules outside the body (an output layer): scores do not depend on them, and weight decay would act.

    Raises:
        ConfigError: one of them is a low-rank layer, which `setting` must have named.
    """
    body = {id(module) for module in split.body.modules()}
    for name, module in split.model.named_modules():
        if not name or name.split(".")[0] == HEAD or not body.isdisjoint(map(id, module.modules())):
            continue
        if any(leaf.startswith("lora_") for leaf in module):
            raise ConfigError(f"{setting}: scores do not depend on {name}; leave it out")
        module.freeze()


def find_head(path: str | Path | None) -> Path | None:
    """Return head.safetensors of a run, an adapter folder or a model folder; None if there is none."""
    if path is None:
        return None
    folder = home_path(path)
    found = [folder / part / HEAD_FILE for part in ("", "adapter", "model")]
    return next((file for file in found if file.is_file()), None)


def head_arrays(head: ScoreHead) -> dict[str, mx.array]:
    """Return the arrays of head.safetensors."""
    return {_WEIGHT: head.weight}


def adapter_metadata(head: ScoreHead | None) -> dict[str, str]:
    """Return the metadata of adapters.safetensors: a digest of the head it is saved with, for `check_pair`."""
    return {"format": "mlx"} | ({} if head is None else {"head": _digest(head.weight)})


def _digest(weight: mx.array) -> str:
    return blake2b(np.array(weight.astype(mx.float32)).tobytes(), digest_size=8).hexdigest()


def check_pair(file: Path, weight: mx.array) -> None:
    """Raise a ModelError if the adapter beside a head was saved with another head: a kill between the two files."""
    beside = file.with_name("adapters.safetensors")
    loaded: Any = mx.load(str(beside), return_metadata=True) if beside.is_file() else ({}, {})
    if loaded[1].get("head", _digest(weight)) != _digest(weight):
        raise ModelError(
            f"{file}: was not saved together with {beside.name}; resume the run with mlxft train --resume, which saves "
            "both"
        )


def head_metadata(fingerprint: str, about: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of head.safetensors: its base's fingerprint, and notes (JSON)."""
    return {"format": "mlx", "fingerprint": fingerprint, "about": json.dumps(about)}


def read_head(file: Path) -> Saved:
    """Read a head from its file.

    Raises:
        ModelError: the file cannot be read, or has no head.
    """
    arrays, metadata = read_arrays(file)
    try:
        about = parse_json(metadata.get("about", "{}"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ModelError(f"{file}: its notes are not a JSON object")
    weight = arrays.get(_WEIGHT)
    if weight is None or weight.ndim != 2 or weight.shape[0] != 1:
        raise ModelError(f"{file}: has no head; expected {_WEIGHT} of shape (1, width), it has {sorted(arrays)}")
    return Saved(weight, metadata.get("fingerprint"), about)


def load_head(split: Split, file: Path, base: str | None) -> Saved:
    """Read a head and attach it.

    Args:
        base: fingerprint of the model; a head that names another base is refused.
    Raises:
        ModelError: the head has another base or width, or cannot be read.
    """
    saved = read_head(file)
    check_pair(file, saved.weight)
    if base is not None and not fits_base(saved.fingerprint, base):
        raise ModelError(f"{file}: is the head of another base ({saved.fingerprint}), and this model is {base}")
    if (own := saved.weight.shape[1]) != (width := body_width(split)):
        raise ModelError(f"{file}: reads hidden states of width {own}, and this model's have {width}")
    attach_head(split.model, ScoreHead.of(saved.weight))
    return saved


def trained_without_head(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters without those of head and critic, as adapters.safetensors has them."""
    beside = (f"{HEAD}.", f"{CRITIC}.")
    return {n: v for n, v in tree_flatten(model.trainable_parameters()) if not n.startswith(beside)}


# --- scorer -----------------------------------------------------------------------------------------------------------

SCORING_TOKENS = 4096  # of a batch, padding included


@dataclass
class Scorer:
    """A reward model, ready to score.

    Attributes:
        chat: whether texts become a user and an assistant turn when there is a chat template.
        mean, std: of the scores of the run's validation rows; None if it had none.
    """

    split: Split
    tokenizer: Any
    chat: bool
    mean: float | None
    std: float | None

    def encode(self, prompt: Any, completion: Any, where: str, tools: Any = None) -> EncodedCompletion:
        """Encode a completion for scoring: the same tokens as in training."""
        return encode_completion(prompt, completion, self.tokenizer, where, tools, self.chat)

    def scores(
        self,
        rows: Sequence[EncodedCompletion],
        tokens: int = SCORING_TOKENS,
        on_done: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Return the score of each completion; rows of similar length share a batch of `tokens`.

        Args:
            on_done: called after each batch with its number of rows.
        """
        if not rows:
            return []
        lengths = np.array([len(row.prompt) + len(row.reply) for row in rows], dtype=np.int64)
        found = np.zeros(len(rows))

        def read(slot: Slot) -> mx.array:
            # Padded on the right, where causal attention never sees it.
            ids = np.zeros((len(slot.rows), slot.width), dtype=np.int32)
            for b, i in enumerate(slot.rows):
                ids[b, : lengths[i]] = np.concatenate(rows[i])
            last = mx.array((lengths[list(slot.rows)] - 1).astype(np.int32))
            return read_scores(self.split, mx.array(ids), last)

        slots = plan_epoch(lengths, tokens=tokens, seed=None)
        for places, values in ahead(((list(slot.rows), slot) for slot in slots), read):
            found[places] = np.array(values)
            if on_done is not None:
                on_done(len(places))
        return [float(value) for value in found]
