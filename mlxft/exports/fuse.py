"""Fuse an adapter into its base, measure how close the result is, choose precision, and convert models."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

import mlxft
from mlxft.config import Config
from mlxft.data.dataset import (
    Encoded,
    EncodedCompletion,
    encode,
    encode_completion,
    load_splits,
    plan_epoch,
    prompt_text,
)
from mlxft.data.formats import (
    Completion,
    Conversation,
    Example,
    Labelled,
    Pair,
    Prompt,
    Ranked,
    Text,
    convert,
    suggest_format,
)
from mlxft.data.sources import Problem, find_split, read_rows
from mlxft.errors import ConfigError, DataError, ExportError, MlxftError, ModelError
from mlxft.files import save_arrays
from mlxft.model.adapters import (
    base_noted,
    load_adapter,
    load_base_of,
    merge_adapters,
    read_adapter,
    read_adapter_config,
)
from mlxft.model.folder import check_destination, check_space, check_unused, save_folder, weight_bytes
from mlxft.model.heads import (
    HEAD_FILE,
    find_head,
    head_arrays,
    head_metadata,
    head_of,
    load_head,
    read_head,
    read_scores,
    without_head,
)
from mlxft.model.layers import QUANTIZED, LowRank, dense_weight, plain_layer, shift
from mlxft.model.load import Loaded, base_fingerprint, fits_base, without_weights
from mlxft.model.logits import Split, chunk_size
from mlxft.objectives.rewards import reads_chat
from mlxft.runs import find_adapter, open_run
from mlxft.text import home_path, parse_json

# --- sources ----------------------------------------------------------------------------------------------------------
# What is to be fused: runs and adapter folders, each with a weight, and the base under them all.


@dataclass(frozen=True)
class _Source:
    """An adapter to fuse.

    Attributes:
        weight: what its change is multiplied by.
        base: what it says of its base (see `base_noted`).
        config: the recipe of its run, where that is known.
    """

    folder: Path
    weight: float = 1.0
    base: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None

    @property
    def form(self) -> str:
        """The base in words: its name, and its bits where it was quantised for the training."""
        bits = self.base.get("quantize")
        return f"{self.base.get('model')}{f' in {bits} bits' if bits else ''}"


def parse_adapter(text: str) -> tuple[Path, float]:
    """`runs/a:0.7` -> runs/a and 0.7; without a number the weight is 1.

    Raises:
        ConfigError: what stands behind the colon is no number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or home_path(text).exists():
        return home_path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not name:
        raise ConfigError(f"--adapter {text}: {number!r} is no weight; expected FOLDER or FOLDER:NUMBER, as in a:0.7")
    return home_path(name), weight


def find_sources(run: Path | None, adapters: Sequence[tuple[Path, float]]) -> tuple[list[_Source], str | None]:
    """The adapters to fuse, and the base where `run` names one in place of a run.

    Raises:
        ModelError: no such run or adapter, one that was trained whole, or adapters of several bases.
        ConfigError: one is named twice.
    """
    named = [(folder, weight) for folder, weight in adapters]
    base = None
    if run is not None:
        place = home_path(run)
        if not adapters or _is_run(place) or (find_adapter(place) / "adapter_config.json").exists():
            named.insert(0, (run, 1.0))
        else:
            base = str(run)
    if not named:
        raise ConfigError("nothing to fuse: name a run, or adapters with --adapter")
    sources = [_source(home_path(path), weight) for path, weight in named]
    seen: dict[Path, Path] = {}
    for (path, _), source in zip(named, sources):
        if (real := source.folder.resolve()) in seen:
            raise ConfigError(
                f"--adapter: {path} is named twice; name it once, with the weight that it is to have (FOLDER:NUMBER)"
            )
        seen[real] = path
    _check_one_base(sources)
    return sources, base


def adapter_of(path: Path) -> Path:
    """The adapter's folder of a run, or the folder itself.

    Raises:
        ModelError: nothing there, a run that was trained whole or has no result yet, or something else.
    """
    folder = find_adapter(path)
    if (folder / "adapter_config.json").exists():
        return folder
    if not path.exists():
        raise ModelError(f"{path}: no such run or adapter")
    if (path / "model").is_dir():
        raise ModelError(
            f"{path}: was trained whole, there is no adapter; its model is {path / 'model'}, and can be used as it is "
            "(mlxft convert writes a copy)"
        )
    if _is_run(path):
        open_run(path)  # which says what is wrong with a file that is no recipe
        raise ModelError(f"{path} has no result yet; go on with mlxft train --resume {path}")
    raise ModelError(f"{path}: is neither a run nor an adapter (mlxft convert copies a model)")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and not (path / "config.json").exists()


def _source(path: Path, weight: float) -> _Source:
    folder = adapter_of(path)
    recipe = next((p / "config.yaml" for p in (path, folder.parent) if (p / "config.yaml").is_file()), None)
    try:
        config = open_run(recipe.parent).config if recipe else None
    except MlxftError:  # of another version: only its validation rows are missed
        config = None
    return _Source(folder, weight, base_noted(read_adapter_config(folder)), config)


def _check_one_base(sources: Sequence[_Source]) -> None:
    known = [source for source in sources if source.base.get("fingerprint")]
    for source in known[1:]:
        first = known[0]
        if not fits_base(source.base["fingerprint"], first.base["fingerprint"]):
            raise ModelError(
                f"adapters of two bases can not be merged: {first.folder} is of {first.base.get('model')} "
                f"({first.base['fingerprint']}), {source.folder} of {source.base.get('model')} "
                f"({source.base['fingerprint']})"
            )
    heads = [str(source.folder) for source in sources if find_head(source.folder)]
    if len(sources) > 1 and heads:
        raise ModelError(f"{heads[0]} is a reward model, whose head can not be merged; fuse it alone")


def load_shared_base(sources: Sequence[_Source], model: str | None) -> tuple[Loaded, list[str]]:
    """The base that the first adapter says it was trained on, or `model`; a reward model's head is attached.

    Returns:
        The base, and what is to be said of it: that the adapters were trained on several forms of it.
    Raises:
        ModelError: it is not there, or not what the adapters were trained on.
    """
    first = sources[0].folder
    loaded = load_base_of(model or first, first, {})
    fingerprint = base_fingerprint(loaded)
    for source in sources:
        read_adapter(source.folder, fingerprint)  # refuses another base's before anything is measured
    if (head := find_head(first)) is not None:
        load_head(Split(loaded.model), head, fingerprint)
    loaded.model.eval()
    forms = {source.form: source.folder for source in sources if source.base.get("model")}
    if len(forms) < 2:
        return loaded, []
    trained = ", ".join(f"{folder} on {form}" for form, folder in forms.items())
    bits = (loaded.config.get("quantization") or {}).get("bits")
    on = f"{loaded.source}, {f'quantised to {bits} bits' if bits else 'in float'}"
    way = "name another one first, or --model, to merge on its base"
    return loaded, [f"the adapters were trained on several forms of the base ({trained}); merged on {on}: {way}"]


def attach_sources(loaded: Loaded, sources: Sequence[_Source]) -> None:
    """Put the adapters onto the base.

    Raises:
        ModelError: one does not fit.
    """
    fingerprint = base_fingerprint(loaded)
    if len(sources) == 1 and sources[0].weight == 1.0:
        load_adapter(loaded.model, sources[0].folder, fingerprint)
    else:
        merge_adapters(loaded.model, [(s.folder, s.weight) for s in sources], fingerprint)
    loaded.model.eval()


# --- probe ------------------------------------------------------------------------------------------------------------
# Rows on which a fused model is compared with what it was made of: built-in ones, a file's, or held-out ones of a run.
#
# A run's recipe names the last. It may be a stranger's, so what it names is read only where that is asked for.

_TOKENS = 512  # of all probe rows together: enough to tell the precisions apart, quick to go through
VALID = "valid"  # in a file's place: the validation rows that the runs' recipes name
_LONGEST = 256  # of one row, so that no single one is the whole probe


@dataclass(frozen=True)
class Probe:
    """Encoded rows; `trained` says which tokens are compared (of scores: a row's last token is read).

    Attributes:
        source: where they are from, for messages.
        notes: what else there is to measure on.
    """

    rows: list[Encoded]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens are compared."""
        return sum(int(row.trained.sum()) for row in self.rows)


def find_probe(configs: Sequence[Config], tokenizer: Any, file: str | None, scores: bool) -> Probe:
    """The rows to compare on: built-in text, or `file`'s, which may be VALID.

    Rows that a run was trained on are never taken: on them it has learnt more than elsewhere.

    Args:
        configs: of the runs whose adapters are fused, as far as they are known.
        scores: whether answers are wanted, to be scored, in place of texts.
    Raises:
        ConfigError, DataError: the file is not there, or no row of it can be used.
    """
    if file is None:
        held = [c.data.valid if isinstance(c.data.valid, str) else c.data.train for c in configs if c.data.valid]
        hint = [f"--probe {VALID} measures on the run's own validation rows (of {', '.join(held)})"] if held else []
        return Probe(_encode(_built_in(scores), tokenizer, None, scores), "built-in text", tuple(hint))
    if file != VALID:
        config = configs[0] if configs else None
        rows = _encode(_file_examples(file, config, _chats(config, tokenizer)), tokenizer, config, scores)
        return Probe(rows, file)
    found: list[Encoded] = []
    for config in configs:
        examples = _held_out(config, tokenizer)
        found += _encode(examples, tokenizer, config, scores, _TOKENS // len(configs)) if examples else []
    if not found:
        raise ConfigError(f"--probe {VALID}: the run has no validation rows; name a file, or leave it out")
    return Probe(found, "validation rows")


def _chats(config: Config | None, tokenizer: Any) -> bool:
    """Whether texts go through the chat template."""
    return bool(tokenizer.has_chat_template) and (config is None or config.data.template == "auto")


def _held_out(config: Config, tokenizer: Any) -> list[Example]:
    """A run's validation rows; none where it had none."""
    data = config.data
    if isinstance(data.valid, float):
        return load_splits(data, config.run.seed, tokenizer=tokenizer)[1]
    spec = data.valid
    if spec is None and Path(data.train).is_dir() and find_split(Path(data.train), "valid"):
        spec = data.train
    if spec is None:
        return []
    skipped: list[Problem] | None = [] if data.invalid == "drop" else None
    return convert(read_rows(spec, "valid"), data.format, data.fields, skipped, chat=_chats(config, tokenizer))


def _file_examples(file: str, config: Config | None, chat: bool) -> list[Example]:
    """A file's rows, in the run's format where they have its fields, else in the one they look like."""
    rows = list(read_rows(file, "valid"))
    first = next((row.data for row in rows if not isinstance(row, Problem)), {})
    looks = suggest_format(first)
    if config is not None:
        try:
            return convert(rows, config.data.format, config.data.fields, chat=chat)
        except (ConfigError, DataError):
            if looks == config.data.format:
                raise
    if looks is None:
        raise DataError(
            f"{file}: rows have {', '.join(first) or 'no fields'}; a probe's have messages, text, prompt and "
            "completion, or prompt, chosen and rejected"
        )
    return convert(rows, looks, chat=chat)


def _built_in(scores: bool) -> list[Example]:
    """Rows that come with the package: questions with answers and reviews; pairs of answers to be scored."""
    folder = Path(mlxft.__file__).parent / "demo"
    if scores:
        return convert(read_rows(str(folder / "pairs.jsonl"), "valid"), "preference")
    examples: list[Example] = []
    lines = [(folder / name).read_text("utf-8").splitlines()[:60] for name in ("rows.jsonl", "reviews.jsonl")]
    for i, (chat, review) in enumerate(zip(*(map(parse_json, part) for part in lines)), 1):
        question, answer = (turn["content"] for turn in chat["messages"])
        examples.append(Example(f"rows.jsonl:{i}", Completion(question, answer)))
        examples.append(Example(f"reviews.jsonl:{i}", Text(review["review"])))
    return examples


def _encode(
    examples: Sequence[Example], tokenizer: Any, config: Config | None, scores: bool, budget: int = _TOKENS
) -> list[Encoded]:
    """Rows chosen by lot, the same each time, until there are `budget` tokens."""
    order = list(examples)
    random.Random(0).shuffle(order)
    chat = config is None or config.data.template == "auto"
    train_on = "all" if config is None else config.data.train_on or "assistant"
    found: list[Encoded] = []
    problem: DataError | None = None
    spent = 0
    for example in order:
        try:
            for row in _answers(example, tokenizer, chat) if scores else _texts(example, tokenizer, chat, train_on):
                cut = _cut(row, scores)
                if not cut.trained.any() or (found and spent + len(cut.ids) > budget):
                    continue
                found.append(cut)
                spent += len(cut.ids)
        except DataError as error:
            problem = error
        if spent >= budget - 16:
            break
    if not found:
        raise problem or DataError("no row has a token that a model would predict")
    return found


def _cut(row: Encoded, scores: bool) -> Encoded:
    """At most LONGEST tokens, with the first ones that count; of an answer to be scored, the last ones."""
    if len(row.ids) <= _LONGEST:
        return row
    first = int(np.argmax(row.trained))
    start = len(row.ids) - _LONGEST if scores else max(0, min(first - _LONGEST // 2, len(row.ids) - _LONGEST))
    trained = row.trained[start : start + _LONGEST].copy()
    trained[0] = False
    return Encoded(row.ids[start : start + _LONGEST], trained, row.where)


def _texts(example: Example, tokenizer: Any, chat: bool, train_on: str) -> Iterator[Encoded]:
    """What the model would say: trained tokens of a text, the preferred answer of a pair, a whole prompt."""
    where, item = example
    if isinstance(item, Prompt):
        given = item.prompt
        if isinstance(given, str) or not tokenizer.has_chat_template:
            text = given if isinstance(given, str) else "\n".join(str(turn.get("content")) for turn in given)
        else:
            text = prompt_text(given, tokenizer, where=where)
        yield from encode(Text(text), tokenizer, where, "all")
    elif isinstance(item, (Conversation, Completion, Text)):
        yield from encode(item, tokenizer, where, train_on, chat)
    else:
        yield next(_answers(example, tokenizer, chat))


def _answers(example: Example, tokenizer: Any, chat: bool) -> Iterator[Encoded]:
    """Answers as they are scored, each behind its prompt."""
    where, item = example
    if isinstance(item, Ranked):
        item = item.pairs[0]
    if isinstance(item, Pair):
        for reply in (item.chosen, item.rejected):
            yield _row(encode_completion(item.prompt, reply, tokenizer, where, item.tools, chat), where)
    elif isinstance(item, (Labelled, Completion)):
        tools = item.tools if isinstance(item, Labelled) else None
        yield _row(encode_completion(item.prompt, item.completion, tokenizer, where, tools, chat), where)
    elif isinstance(item, Conversation):
        *prompt, reply = item.messages
        yield _row(encode_completion(prompt, reply, tokenizer, where, item.tools, chat), where)
    else:
        raise DataError(f"{where}: has no answer to score")


def _row(reply: EncodedCompletion, where: str) -> Encoded:
    ids = np.concatenate([reply.prompt, reply.reply])
    trained = np.arange(len(ids)) >= max(1, len(reply.prompt))
    return Encoded(ids, trained, where)


def limited(probe: Probe, positions: int) -> Probe:
    """The same with at most so many tokens compared, for vocabularies whose logits take much memory."""
    rows: list[Encoded] = []
    for row in probe.rows:
        trained = row.trained & (np.cumsum(row.trained) <= positions)
        positions -= int(trained.sum())
        if trained.any():
            rows.append(Encoded(row.ids, trained, row.where))
    return replace(probe, rows=rows)


# --- fidelity ---------------------------------------------------------------------------------------------------------
# How much of an adaptation is left in another form of the model, measured on probe rows.
#
# Three models stand side by side: the base, the adapted one, and the fused one. Between two of them it measures the
# Kullback-Leibler divergence of what they predict, a mean over tokens, in nats; for reward models, the mean square of
# the difference of their scores. The share of the adaptation that is kept is 1 - D(adapted, fused) / D(adapted, base).

BATCH = 512  # tokens, padding included
_HELD = 256 << 20  # bytes of one model's log-probabilities, which are held for comparison

Outputs = list[mx.array]  # of a meter, in the order of its rows


class Gap(NamedTuple):
    """Between two models: a divergence, at least 0, and the share of tokens or pairs on which they agree."""

    divergence: float
    agreement: float


def _kl(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) in nats, (n,), of log-probabilities p and q (n, V), float32.

    As the sum of p (e^d - 1 - d) with d = q - p, whose terms are all at least 0: in the sum of -p d, two models that
    differ by little would cancel to noise (the terms p (e^d - 1) add up to 0). Small d go by the series.
    """
    d = q - p
    small = mx.abs(d) < 0.1
    near = mx.where(small, d, 0.0)
    series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    probability = mx.exp(p)
    # A token that p rules out counts for q's share of it only.
    far = mx.exp(q) - probability - mx.where(probability > 0, probability * d, 0.0)
    return mx.where(small, probability * series, far).sum(axis=-1)


def kept_share(fused: float, base: float) -> float | None:
    """1 - fused / base, from 0 to 1; None where the adaptation changes nothing, and there is nothing to keep."""
    if base <= 0:
        return None
    return min(1.0, max(0.0, 1.0 - fused / base))


class TextMeter:
    """Predictions at the tokens of probe rows that count."""

    name = "kl"

    def __init__(self, split: Split, probe: Probe, vocabulary: int) -> None:
        self._split = split
        self._chunk = chunk_size(vocabulary)
        self.probe = limited(probe, max(64, _HELD // (4 * vocabulary)))
        self.batches = list(_batches(self.probe.rows))

    def outputs(self) -> Outputs:
        """Log-probabilities, (n, V) float32, evaluated."""
        found: Outputs = []
        for rows, ids in self.batches:
            width = ids.shape[1]
            at = np.concatenate([b * width + np.flatnonzero(row.trained) - 1 for b, row in enumerate(rows)])
            positions = mx.array(at.astype(np.int32))
            split = self._split
            states = split.hidden(ids) if split.separable else split.call(ids)
            states = states.reshape(-1, states.shape[-1])[positions]
            for start in range(0, len(at), self._chunk):
                part = states[start : start + self._chunk]
                logits = (split.logits(part) if split.separable else part).astype(mx.float32)
                found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
                mx.eval(found[-1])
        return found

    def gap(self, one: Outputs, other: Outputs) -> Gap:
        """Mean KL(one || other) a token, and the share of tokens whose likeliest one is the same."""
        total = sum(float(_kl(p, q).sum()) for p, q in zip(one, other))
        same = sum(float((p.argmax(axis=-1) == q.argmax(axis=-1)).sum()) for p, q in zip(one, other))
        count = sum(p.shape[0] for p in one)
        return Gap(total / count, same / count)


class ScoreMeter:
    """Scores of probe answers by the model's head."""

    name = "squared score difference"

    def __init__(self, split: Split, probe: Probe) -> None:
        self._split = split
        self.probe = probe
        self.batches = list(_batches(probe.rows))

    def outputs(self) -> Outputs:
        """Scores, (n,) float32, evaluated."""
        found: Outputs = []
        for rows, ids in self.batches:
            last = mx.array([len(row.ids) - 1 for row in rows])
            found.append(read_scores(self._split, ids, last))
            mx.eval(found[-1])
        return found

    def gap(self, one: Outputs, other: Outputs) -> Gap:
        """Mean square of the difference, and the share of pairs of answers that both put into the same order."""
        a, b = (np.concatenate([np.array(part) for part in given]) for given in (one, other))
        upper = np.triu_indices(len(a), 1)
        same = (np.sign(a[:, None] - a[None])[upper] == np.sign(b[:, None] - b[None])[upper]) if len(a) > 1 else True
        return Gap(float(np.mean((a - b) ** 2)), float(np.mean(same)))


Meter = TextMeter | ScoreMeter


def _batches(rows: list[Encoded]) -> Iterator[tuple[list[Encoded], mx.array]]:
    """Rows of like length with their ids (B, T), padded on the right, where causal attention never sees it."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    for slot in plan_epoch(lengths, tokens=BATCH, seed=None):
        ids = np.zeros((len(slot.rows), slot.width), dtype=np.int32)
        for b, i in enumerate(slot.rows):
            ids[b, : lengths[i]] = rows[i].ids
        yield [rows[i] for i in slot.rows], mx.array(ids)


class Standin(nn.Module):
    """Stands in for a layer, with a weight that is made when it is used and gone after: no second model is held.

    Args:
        base: the layer, quantised or not, whose bias and kind it has.
        weight: makes the weight, dense.
    """

    def __init__(self, base: nn.Module, weight: Callable[[], mx.array]) -> None:
        super().__init__()
        self._now = lambda: plain_layer(base, weight())
        self._base = lambda: base
        if "bias" in base:
            self["bias"] = base["bias"]  # past setattr, which would look it up in the base

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return self._now()(*args, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output layer."""
        return self._now().as_linear(x)

    def __getattr__(self, key: str) -> Any:
        if key == "weight":
            return self._now().weight
        if key in self:
            return self[key]
        return getattr(self._base(), key)


@contextmanager
def standing_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block, these modules stand where the model has others of these names."""
    modules = dict(model.named_modules())
    before = [(path, modules[path]) for path in layers]
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(before))


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside the block, quantised layers compute with their weights unpacked.

    The same function; so all forms of a model are measured with the same arithmetic, and on a CPU it is 10 times as
    quick as packed products.
    """
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QUANTIZED)}
    with standing_in(model, {path: Standin(m, partial(dense_weight, m)) for path, m in packed.items()}):
        yield


# --- precision --------------------------------------------------------------------------------------------------------
# In how many bits each fused layer is written: the least that keep as much of the adaptation as is wished.
#
# Fusing into a quantised base rounds again, and a layer's rounding may be larger than its update. So each layer is
# tried in several forms, and for each the noise of its rounding is measured: how much its output moves on probe rows,
# relative to that output. Going up, the step that takes most noise away for its bytes comes first; that gives one row
# of assignments from "all as the base" to "all float", layer by layer, on which the smallest that keeps enough is
# searched by measuring whole models.

_BITS = (2, 3, 4, 5, 6, 8)
_TRIALS = 8  # most models measured in the search


class _Form(NamedTuple):
    """How a fused layer is written; 0 bits: float. `same`: as the base is, of which its update changes nothing."""

    bits: int
    group_size: int = 0
    mode: str = "affine"
    same: bool = False

    def layer(self, base: nn.Module, weight: mx.array) -> nn.Module:
        """The layer with `weight`, float32, in this form."""
        if self.same:
            return base
        dense = plain_layer(base, weight.astype(dense_weight(base).dtype))
        return dense.to_quantized(self.group_size, self.bits, mode=self.mode) if self.bits else dense

    def bytes(self, base: nn.Module) -> int:
        """What the layer's weight takes."""
        dense = dense_weight(base)
        if not self.bits:
            return int(dense.size * dense.dtype.size)
        # A scale and a bias a group; the other modes have one byte.
        extra = 2 * dense.dtype.size if self.mode == "affine" else 1
        return int(dense.size * self.bits // 8 + dense.size // self.group_size * extra)


FLOAT = _Form(0)
Forms = dict[str, _Form]  # path of a fused layer -> its form


def fused_paths(model: nn.Module) -> dict[str, LowRank]:
    """The model's low-rank layers."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


def own_form(base: nn.Module) -> _Form:
    """As the base is."""
    return _Form(base.bits, base.group_size, base.mode) if isinstance(base, QUANTIZED) else FLOAT


def with_bits(base: nn.Module, bits: int) -> _Form | None:
    """A quantised layer in other bits; None where its width does not go into groups. Float layers stay so."""
    own = own_form(base)
    if bits == own.bits or not own.bits:
        return own
    groups = own.group_size if own.mode == "affine" else 32  # float modes have only a few widths: affine takes over
    return _Form(bits, groups) if dense_weight(base).shape[-1] % groups == 0 else None


def uniform(model: nn.Module, bits: int | None) -> Forms:
    """All fused layers alike: None as their base is, 0 float, else so many bits where the base is quantised.

    Raises:
        ExportError: a layer can not have so many bits.
    """
    forms: Forms = {}
    for path, module in fused_paths(model).items():
        form = FLOAT if bits == 0 else own_form(module.base) if bits is None else with_bits(module.base, bits)
        if form is None:
            width, mode = dense_weight(module.base).shape[-1], module.base.mode
            raise ExportError(
                f"--bits {bits}: {path} is quantised as {mode} and {width} wide, which groups of 32 do not fill; "
                "leave --bits out, or use --dequantize"
            )
        forms[path] = form
    return forms


def model_bytes(model: nn.Module, forms: Forms, dequantize: bool = False) -> int:
    """What the model's weights take once its low-rank layers are fused in these forms.

    Args:
        dequantize: whether the layers that are not fused are unpacked too.
    """
    total = 0
    layers = fused_paths(model)
    modules = dict(model.named_modules())
    for name, value in tree_flatten(model.parameters()):
        owner, _, leaf = name.rpartition(".")
        if any(part in layers for part in accumulate(owner.split("."), lambda a, b: f"{a}.{b}")):
            total += value.nbytes if leaf == "bias" else 0
        elif not (dequantize and isinstance(modules.get(owner), QUANTIZED) and leaf in ("weight", "scales", "biases")):
            total += value.nbytes
        elif leaf == "weight":
            total += dense_weight(modules[owner]).nbytes
    return total + sum(forms[path].bytes(module.base) for path, module in layers.items())


def unchanged(model: nn.Module) -> set[str]:
    """Low-rank layers over quantised bases whose update is zero: they are written as they are, not rounded again."""
    off = {p: mx.abs(shift(m)).max() for p, m in fused_paths(model).items() if isinstance(m.base, QUANTIZED)}
    mx.eval(off)
    return {path for path, value in off.items() if value.item() == 0}


def standins(model: nn.Module, forms: Forms) -> dict[str, nn.Module]:
    """The fused layers in these forms, each made when it is used."""

    def standin(layer: LowRank, form: _Form) -> Standin:
        base = layer.base
        return Standin(base, lambda: dense_weight(form.layer(base, layer.fused_weight())))

    layers = fused_paths(model)
    return {path: standin(layers[path], form) for path, form in forms.items()}


class _Tap(nn.Module):
    """Runs a low-rank layer and notes how much its output would move in each form, and how large it is."""

    def __init__(self, layer: LowRank, forms: Sequence[_Form]) -> None:
        super().__init__()
        base, noted = layer.base, list[mx.array]()

        def note(y: mx.array, run: Callable[[nn.Module], mx.array]) -> mx.array:
            weight = layer.fused_weight()
            sizes = [y.astype(mx.float32).square().sum()]
            for form in forms:
                moved = plain_layer(base, dense_weight(form.layer(base, weight)).astype(mx.float32) - weight)
                moved.pop("bias", None)  # which rounding does not move
                sizes.append(run(moved).astype(mx.float32).square().sum())
            noted.append(mx.stack(sizes))
            mx.async_eval(noted[-1])
            return y

        # As functions: what a module holds as modules or lists is part of its weights.
        self._note = note
        self._layer = lambda: layer
        self._noted = lambda: noted

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        return self._note(self._layer()(x, *args, **options), lambda moved: moved(x, *args, **options))

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output layer."""
        return self._note(self._layer().as_linear(x), lambda moved: moved.as_linear(x))

    def noise(self, forms: int) -> list[float]:
        """Of each form, relative to the output; over all calls."""
        if not self._noted():  # a layer that these rows do not reach
            return [0.0] * forms
        sums: Any = mx.stack(self._noted()).sum(axis=0).tolist()
        size, *moved = sums
        return [m / size if size else 0.0 for m in moved]

    def __getattr__(self, key: str) -> Any:
        return self[key] if key in self else getattr(self._layer(), key)


class Option(NamedTuple):
    """A form that a layer can have: bytes of its weight, and noise as `_Tap` measures it."""

    form: _Form
    bytes: int
    noise: float


def options_of(model: nn.Module, meter: Meter) -> dict[str, list[Option]]:
    """What each fused layer can be, the base's own bits first, then more, then float."""
    taps: dict[str, _Tap] = {}
    forms: dict[str, list[_Form]] = {}
    bases = {path: module.base for path, module in fused_paths(model).items()}
    still = unchanged(model)
    for path, module in fused_paths(model).items():
        own = own_form(module.base)
        if path in still or not own.bits:
            forms[path] = [own._replace(same=True) if own.bits else own]
            continue
        more = (with_bits(module.base, bits) for bits in _BITS if bits > own.bits)
        forms[path] = [own, *(form for form in more if form is not None), FLOAT]
        taps[path] = _Tap(module, forms[path])
    with unpacked(model), standing_in(model, taps):
        meter.outputs()
    noise = {path: taps[path].noise(len(forms[path])) if path in taps else [0.0] for path in forms}
    return {
        path: [Option(form, form.bytes(bases[path]), off) for form, off in zip(forms[path], noise[path])]
        for path in forms
    }


class Ladder:
    """Assignments from all layers as their base to all float; a rung raises one layer.

    Attributes:
        bytes, noise: of each rung, over all fused layers; noise falls from rung to rung.
    """

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self._start = {path: given[0] for path, given in options.items()}
        steps: list[tuple[float, str, Option, Option]] = []
        for path, given in options.items():
            at = given[0]
            # The lower convex hull of noise over bytes: from each point on, the steepest way down.
            while better := [o for o in given if o.bytes > at.bytes and o.noise < at.noise]:
                to = max(better, key=lambda o: (at.noise - o.noise) / (o.bytes - at.bytes))
                steps.append(((at.noise - to.noise) / (to.bytes - at.bytes), path, at, to))
                at = to
        steps.sort(key=lambda step: -step[0])
        self._steps = steps
        start = self._start.values()
        self.bytes = list(accumulate((b.bytes - a.bytes for _, _, a, b in steps), initial=sum(o.bytes for o in start)))
        self.noise = list(accumulate((b.noise - a.noise for _, _, a, b in steps), initial=sum(o.noise for o in start)))

    def __len__(self) -> int:
        return len(self.bytes)

    def forms(self, rung: int) -> Forms:
        """The assignment at a rung, from 0."""
        found = {path: option.form for path, option in self._start.items()}
        for _, path, _, option in self._steps[:rung]:
            found[path] = option.form
        return found


@dataclass(frozen=True)
class Trial:
    """A model that was measured.

    Attributes:
        bytes: of all its weights.
        divergence, agreement: from the adapted model (see fidelity.py).
        kept: share of the adaptation, None where there is nothing to keep.
    """

    name: str
    bytes: int
    divergence: float
    agreement: float
    kept: float | None
    forms: Forms = field(repr=False)

    def meets(self, wish: float) -> bool:
        """Whether it keeps as much."""
        return self.kept is None or self.kept >= wish


def name_of(forms: Forms) -> str:
    """Its precisions: 4 bits; 4/6/8 bits; 4 bits/float; float."""
    bits = sorted({form.bits for form in forms.values()} - {0})
    packed = f"{'/'.join(map(str, bits))} bits" if bits else ""
    return "/".join(part for part in (packed, "float" if FLOAT in forms.values() else "") if part) or "as it is"


def search(ladder: Ladder, others: Sequence[Forms], measure: Callable[[Forms], Trial], wish: float) -> list[Trial]:
    """Measure assignments until the least that keeps `wish` is found; all that were measured, in that order.

    Args:
        others: assignments to measure beside the ladder's: of one precision for all layers.
    """
    plain_trial = measure(ladder.forms(0))
    trials = [plain_trial]
    if plain_trial.meets(wish) or len(ladder) == 1:
        return trials
    trials.append(measure(ladder.forms(len(ladder) - 1)))
    if not trials[-1].meets(wish):
        return trials
    trials += [measure(forms) for forms in others]
    low, high = 0, len(ladder) - 1
    lost = 1 - (plain_trial.kept or 0.0)
    for _ in range(_TRIALS):
        if high - low <= 1 or ladder.bytes[high] - ladder.bytes[low] <= 0.01 * ladder.bytes[high]:
            break
        # What is lost grows with the noise; so the rung that just keeps enough can be guessed, and the next is near.
        aim = ladder.noise[low] * (1 - wish) / max(lost, 1e-9)
        rung = next(i for i in range(len(ladder)) if ladder.noise[i] <= aim or i == len(ladder) - 1)
        if not low < rung < high:
            half = (ladder.bytes[low] * ladder.bytes[high]) ** 0.5
            rung = next(i for i in range(low + 1, high + 1) if ladder.bytes[i] >= half or i == high - 1)
        trials.append(measure(ladder.forms(rung)))
        if trials[-1].meets(wish):
            high = rung
        else:
            low, lost = rung, 1 - (trials[-1].kept or 0.0)
    return trials


def least(trials: Sequence[Trial], wish: float) -> Trial:
    """The smallest that keeps `wish`; where none does, the one that keeps most."""
    enough = [trial for trial in trials if trial.meets(wish)]
    return min(enough, key=lambda t: t.bytes) if enough else max(trials, key=lambda t: t.kept or 0.0)


# --- fuse -------------------------------------------------------------------------------------------------------------
# An adapter fused into its base: one folder that mlx-lm, LM Studio and transformers load, and how true it is.

_KEEP = 0.95  # share of the adaptation that is to be kept


@dataclass
class Fused:
    """What fusing did, or would have done.

    Attributes:
        layers: how many were fused.
        bytes: of the weights written.
        whole: between the adapted model and its base; what there is to keep.
        trials: the models that were measured; `chosen` is one of them.
        measure: what their divergences are (see fidelity.py).
    """

    out: Path
    layers: int
    adapters: list[_Source]
    probe: Probe
    measure: str
    whole: Gap
    trials: list[Trial]
    chosen: Trial
    keep: float
    notes: list[str] = field(default_factory=list)
    written: bool = False
    bytes: int = 0

    def lines(self) -> list[str]:
        """In words and a table."""
        of = f" of {len(self.adapters)} adapters" if len(self.adapters) > 1 else ""
        done = f"wrote {self.out} ({self.bytes / 1e6:,.1f} MB of weights)" if self.written else "nothing is written"
        scores = self.measure != "kl"
        unit = "squared difference" if scores else "KL a token"
        what = f"{len(self.probe.rows)} answers" if scores else f"{self.probe.tokens:,} tokens"
        same = "same order" if scores else "same likeliest token"
        lines = [
            f"fused {self.layers:,} layers{of}; {done}",
            *self.notes,
            (
                f"measured on {what} ({self.probe.source}); from the adapted model to its base:\n"
                f"{'mean ' if scores else ''}{unit}{' of scores' if scores else ''} {self.whole.divergence:.3g}, "
                f"{'pairs in the ' if scores else ''}{same} {self.whole.agreement:.1%}"
            ),
        ]
        rows = [("fused layers", "weights", unit, "kept", same)]
        for trial in sorted(self.trials, key=lambda t: t.bytes):
            kept = "-" if trial.kept is None else f"{trial.kept:.1%}"
            size = f"{trial.bytes / 1e6:,.1f} MB"
            rows.append((trial.name, size, f"{trial.divergence:.3g}", kept, f"{trial.agreement:.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        marks = [" ", *("*" if t is self.chosen else " " for t in sorted(self.trials, key=lambda t: t.bytes))]
        for mark, row in zip(marks, rows):
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
            lines.append(f"{mark} {'  '.join(cells)}".rstrip())
        if self.chosen.kept is None:
            lines.append("the adapter changes nothing on these rows: there is nothing to keep")
        return lines

    def to_json(self) -> dict[str, Any]:
        """For programs; bits 0 are float."""
        raised = {path: form.bits for path, form in self.chosen.forms.items()}
        return {
            "path": str(self.out),
            "written": self.written,
            "layers": self.layers,
            "bytes": self.bytes,
            "adapters": [{"path": str(source.folder), "weight": source.weight} for source in self.adapters],
            "probe": {"source": self.probe.source, "rows": len(self.probe.rows), "tokens": self.probe.tokens},
            "measure": self.measure,
            "adapted_to_base": self.whole.divergence,
            "adapted_to_fused": self.chosen.divergence,
            "kept": self.chosen.kept,
            "keep": self.keep,
            "agreement": self.chosen.agreement,
            "agreement_base": self.whole.agreement,
            "precision": self.chosen.name,
            "bits": raised,
            "tried": [
                {
                    "precision": t.name,
                    "bytes": t.bytes,
                    "adapted_to_fused": t.divergence,
                    "kept": t.kept,
                    "agreement": t.agreement,
                }
                for t in self.trials
            ],
            "notes": self.notes,
        }


class LostTooMuch(ExportError):
    """The fused model would keep less of the adaptation than is wished; `fused` says what was measured."""

    def __init__(self, text: str, fused: Fused) -> None:
        super().__init__(text)
        self.fused = fused


def fuse_layers(
    model: nn.Module, *, dequantize: bool = False, bits: int | None = None, forms: Forms | None = None
) -> Forms:
    """Replace every low-rank layer by a plain one that does the same.

    Args:
        dequantize: leave no layer of the model quantised.
        bits: of fused layers whose base is quantised; default: as the base.
        forms: of each fused layer, in place of these.
    Returns:
        Path of each fused layer -> what it became.
    """
    forms = uniform(model, 0 if dequantize else bits) if forms is None else forms
    for path, module in fused_paths(model).items():
        layer = forms[path].layer(module.base, module.fused_weight())
        mx.eval(layer.parameters())  # one dense weight at a time
        model.update_modules(tree_unflatten([(path, layer)]))
    if dequantize:
        rest = [
            (path, plain_layer(m, dense_weight(m))) for path, m in model.named_modules() if isinstance(m, QUANTIZED)
        ]
        model.update_modules(tree_unflatten(rest))
    return forms


def fused_config(loaded: Loaded, forms: Forms, dequantize: bool) -> dict[str, Any]:
    """config.json of the fused model: true to how each layer is quantised, as mlx-lm reads it."""
    config = copy.deepcopy(loaded.config)
    if dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        return config
    quantization = config.get("quantization")
    if quantization:
        for path, form in forms.items():
            own = quantization.get(path)
            before = own if isinstance(own, dict) else {**quantization, "bits": 0} if own is False else quantization
            was = _Form(before["bits"], before["group_size"], before.get("mode", "affine"))
            if form.same or form == was or (form.bits == was.bits == 0):
                continue
            quantization[path] = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
            if not form.bits:
                quantization[path] = False
        config["quantization_config"] = quantization
    return config


def fuse_sources(
    run: Path | None,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    model: str | None = None,
    dequantize: bool = False,
    bits: int | None = None,
    keep: float = _KEEP,
    probe: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> Fused:
    """Fuse a run or adapters into their base, measure what is kept of the adaptation, and write the folder `out`.

    On a quantised base the fused layers get the least precision that keeps `keep`, layer by layer.

    Args:
        run: a run or an adapter folder; with `adapters` also their base, or None.
        adapters: more of them, each with the number its change is multiplied by; all changes add up.
        model: the base, where the adapter does not say or it has moved.
        dequantize, bits: decide the precision, in place of what keeps enough.
        probe: a file of rows to measure on, or "valid": the validation rows of the runs; default: built-in text.
        force: write even what keeps less than `keep`.
        tell: told what is being done.
    Raises:
        ModelError: no such run, or an adapter of another base.
        LostTooMuch: less than `keep` would be kept; nothing is written.
        ConfigError: `out` is there and may not be replaced.
        ExportError: it can not be written.
    """
    check_destination(out, overwrite)
    sources, base = find_sources(run, adapters)
    tell("loading the base")
    loaded, notes = load_shared_base(sources, model or base)
    check_unused(out, [loaded.path, *(source.folder for source in sources)])
    if (dequantize or bits) and not any(isinstance(m, QUANTIZED) for m in loaded.model.modules()):
        raise ExportError("the base is not quantised: --dequantize and --bits have nothing to act on")
    check_space(out, 0 if dequantize else weight_bytes(loaded.model) // 2)
    configs = [source.config for source in sources if source.config is not None]
    rows = find_probe(configs, loaded.tokenizer, probe, head_of(loaded.model) is not None)
    meter = _meter(loaded, rows)
    tell("measuring the base")
    with unpacked(loaded.model):
        before = meter.outputs()
    attach_sources(loaded, sources)
    tell("measuring the adapted model")
    with unpacked(loaded.model):
        adapted = meter.outputs()
    whole = meter.gap(adapted, before)
    del before
    trials = _trials(loaded.model, meter, adapted, whole, keep, dequantize, bits, tell)
    chosen = least(trials, keep)
    fused = Fused(
        out, len(chosen.forms), sources, meter.probe, meter.name, whole, trials, chosen, keep, [*notes, *rows.notes]
    )
    if not chosen.meets(keep) and not force:
        raise LostTooMuch("\n".join([*fused.lines(), _too_little(fused, dequantize, bits)]), fused)
    tell("writing")
    check_space(out, chosen.bytes)
    fuse_layers(loaded.model, dequantize=dequantize, forms=chosen.forms)
    _write(out, loaded, sources[0], fused_config(loaded, chosen.forms, dequantize), overwrite)
    fused.written, fused.bytes = True, weight_bytes(loaded.model)
    return fused


def _meter(loaded: Loaded, probe: Probe) -> Meter:
    split = Split(loaded.model)
    if head_of(loaded.model) is not None:
        return ScoreMeter(split, probe)
    sizes = {**loaded.config, **(loaded.config.get("text_config") or {})}
    return TextMeter(split, probe, split.vocabulary or int(sizes.get("vocab_size") or 1 << 17))


def _trials(
    model: nn.Module,
    meter: Meter,
    adapted: Outputs,
    whole: Gap,
    keep: float,
    dequantize: bool,
    bits: int | None,
    tell: Callable[[str], object],
) -> list[Trial]:
    """Models with the fused layers in one form or another, measured."""

    def measure(forms: Forms) -> Trial:
        name = name_of(forms)
        tell(f"measuring {name}")
        layers = standins(model, forms)
        with unpacked(model), standing_in(model, layers):
            gap = meter.gap(adapted, meter.outputs())
        kept = kept_share(gap.divergence, whole.divergence)
        return Trial(name, model_bytes(model, forms, dequantize), *gap, kept, forms)

    quantized = any(isinstance(module.base, QUANTIZED) for module in fused_paths(model).values())
    if dequantize or bits or not quantized:
        return [measure(uniform(model, 0 if dequantize else bits))]
    tell("measuring each layer")
    options = options_of(model, meter)
    eights = {
        path: next((o.form for o in given if o.form.bits == 8), given[-1].form) for path, given in options.items()
    }
    others = [eights] if any(given[0].form.bits < 8 for given in options.values()) else []
    return search(Ladder(options), others, measure, keep)


def _too_little(fused: Fused, dequantize: bool, bits: int | None) -> str:
    """What to do where less is kept than is wished."""
    kept, float_too = fused.chosen.kept or 0.0, FLOAT in fused.chosen.forms.values()
    if float_too:
        way = "so small an update is lost in the type of the weights: train it longer or at a higher rate, or --force"
    else:
        forced = f"--bits {bits}" if bits else "--keep"
        way = f"leave {forced} out, --dequantize, or write it all the same with --force"
    wished = f"{kept:.1%} of the adaptation is kept, wished is {fused.keep:.1%} (--keep)"
    return f"{wished}, so {fused.out} is not written; {way}"


def _write(out: Path, loaded: Loaded, source: _Source, config: dict[str, Any], overwrite: bool) -> None:
    """The folder, with a reward model's head beside the weights."""
    file = find_head(source.folder)
    noted = read_head(file).about if file else {}
    if file:  # of a head that does not say it yet, its run knows
        noted["template"] = "auto" if reads_chat(source.folder, noted) else "none"
    with without_head(loaded.model) as head:

        def save_head(folder: Path) -> None:
            if head is not None:
                metadata = head_metadata(without_weights(base_fingerprint(loaded)), noted)
                save_arrays(folder / HEAD_FILE, head_arrays(head), metadata)

        options: dict[str, Any] = {"overwrite": overwrite, "source": loaded.path, "beside": save_head}
        save_folder(out, loaded.model, loaded.tokenizer, config, **options)


# --- convert ----------------------------------------------------------------------------------------------------------


def convert_model(
    src: str,
    dst: Path,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    group_size: int | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write `src` as a folder that mlx-lm and transformers read.

    Args:
        dtype: of floating weights; "auto" keeps the checkpoint's own (a .gguf: float16).
        quantize: bits; a .gguf that has as many keeps its own tensors. Without it a .gguf is dequantised and
            anything else stays as it is.
        dequantize: write plain weights from a quantised checkpoint.
    Returns:
        path, source, model_type, dtype, quantization (or None), parameters, bytes of weights, bits_per_weight.
    Raises:
        ConfigError: settings that exclude each other; or `dst` is there and may not be replaced.
        ModelError: `src` can not be loaded.  ExportError: the disk is too small or writing failed.
    """
    from mlxft.model.load import count_parameters, load

    if dequantize and quantize:
        raise ConfigError(f"convert: dequantize and quantize={quantize} exclude each other; do one, then the other")
    if group_size is not None and not quantize:
        raise ConfigError(f"convert: group_size {group_size} is for quantising; give quantize too, or leave it out")
    check_destination(dst, overwrite)
    loaded = load(
        src,
        dtype="own" if dtype == "auto" else dtype,
        quantize=0 if dequantize else quantize,
        group_size=group_size,
        trust_remote_code=trust_remote_code,
        revision=revision,
        lazy=True,
    )
    save_folder(dst, loaded.model, loaded.tokenizer, loaded.config, overwrite=overwrite, source=loaded.path)
    parameters, size = count_parameters(loaded.model), weight_bytes(loaded.model)
    return {
        "path": str(dst),
        "source": src,
        "model_type": loaded.config["model_type"],
        "dtype": loaded.config.get("torch_dtype", loaded.config.get("dtype")),
        "quantization": loaded.config.get("quantization"),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": round(8 * size / parameters, 3),
    }
