"""Fuse an adapter into its base, measure how close the result is, choose precision, and convert models."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.config import Config, DataSettings
from mlxft.data.dataset import (
    Encoded,
    built_in_examples,
    load_splits,
    plan_epoch,
    sample_rows,
    sample_texts,
    valid_source,
)
from mlxft.data.formats import (
    Example,
    convert,
    suggest_format,
    with_usual_names,
)
from mlxft.data.sources import Problem, Row, read_rows
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
from mlxft.model.folder import brief, check_destination, check_space, check_unused, save_folder, weight_bytes
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
from mlxft.model.layers import (
    FLOAT,
    QUANTIZED,
    LowRank,
    WeightForm,
    dense_weight,
    form_of,
    low_rank_of,
    measure_inputs,
    plain_layer,
    quantization_of,
    shift,
    standing_in,
    standins,
    unpacked,
)
from mlxft.model.load import (
    Loaded,
    base_fingerprint,
    context_of,
    copy_sharing_arrays,
    count_parameters,
    fits_base,
    load,
    without_weights,
)
from mlxft.model.logits import Split, chunk_size
from mlxft.objectives.rewards import reads_chat
from mlxft.runs import find_adapter, open_run, runs_there
from mlxft.text import aligned, home_path

# --- sources ----------------------------------------------------------------------------------------------------------
# Runs and adapter folders to fuse, each with a weight, and the base that they share.


@dataclass(frozen=True)
class _Source:
    """An adapter to fuse.

    Attributes:
        weight: multiplier of its update.
        base: what it notes about its base (see `base_noted`).
        config: the recipe of its run, if known.
        aware: bits for which it was trained quantisation-aware, if it was.
    """

    folder: Path
    weight: float = 1.0
    base: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None
    aware: int | None = None

    @property
    def form(self) -> str:
        """The base's name, and its bits if it was quantised for training."""
        bits = self.base.get("quantize")
        return f"{self.base.get('model')}{f' in {bits} bits' if bits else ''}"


def parse_adapter(text: str) -> tuple[Path, float]:
    """Split `runs/a:0.7` into path and weight; without a number the weight is 1.

    Raises:
        ConfigError: no number follows the colon.
    """
    name, colon, number = text.rpartition(":")
    if not colon or home_path(text).exists():
        return home_path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not name:
        raise ConfigError(
            f"--adapter {text}: {number!r} is not a weight; expected FOLDER or FOLDER:NUMBER, as in a:0.7"
        )
    return home_path(name), weight


def find_sources(run: Path | None, adapters: Sequence[tuple[Path, float]]) -> tuple[list[_Source], str | None]:
    """Return the adapters to fuse, and the base if `run` names one instead of a run.

    Raises:
        ModelError: a run or adapter is missing or was fully fine-tuned, or the adapters have different bases.
        ConfigError: an adapter is named twice.
    """
    named = list(adapters)
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
    seen: set[Path] = set()
    for (path, _), source in zip(named, sources):
        if (real := source.folder.resolve()) in seen:
            raise ConfigError(f"--adapter: {path} is named twice; name it once, with its total weight (FOLDER:NUMBER)")
        seen.add(real)
    _check_one_base(sources)
    return sources, base


def adapter_of(path: Path) -> Path:
    """Return the adapter folder of a run, or the folder itself.

    Raises:
        ModelError: the path is missing, a fully fine-tuned or unfinished run, or neither a run nor an adapter.
    """
    folder = find_adapter(path)
    if (folder / "adapter_config.json").exists():
        return folder
    if not path.exists():
        raise ModelError(f"{path}: no such run or adapter{runs_there(path)}")
    if (path / "model").is_dir():
        raise ModelError(
            f"{path}: was fully fine-tuned and has no adapter; its model is {path / 'model'}, which can be used as it "
            "is (mlxft convert writes a copy)"
        )
    if _is_run(path):
        open_run(path)  # raises if config.yaml is not a recipe
        raise ModelError(f"{path} has no result yet; continue it with mlxft train --resume {path}")
    raise ModelError(f"{path}: is neither a run nor an adapter (mlxft convert copies a model)")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and not (path / "config.json").exists()


def _source(path: Path, weight: float) -> _Source:
    folder = adapter_of(path)
    adapter = read_adapter_config(folder)
    return _Source(folder, weight, base_noted(adapter), recipe_of(path), adapter.get("mlxft", {}).get("quantize_aware"))


def recipe_of(path: Path) -> Config | None:
    """Return the recipe of a run, or of the run that an adapter or model folder is in, if there is one."""
    recipe = next((p for p in (path, path.parent, find_adapter(path).parent) if (p / "config.yaml").is_file()), None)
    try:
        return open_run(recipe).config if recipe else None
    except MlxftError:  # a run of another version: only its rows are missed
        return None


def _check_one_base(sources: Sequence[_Source]) -> None:
    known = [source for source in sources if source.base.get("fingerprint")]
    for source in known[1:]:
        if not fits_base(source.base["fingerprint"], known[0].base["fingerprint"]):
            one, two = (
                f"{s.folder} is for {s.base.get('model')} ({s.base['fingerprint']})" for s in (known[0], source)
            )
            raise ModelError(f"adapters of two bases cannot be merged: {one}, {two}")
    head = next((source.folder for source in sources if find_head(source.folder)), None)
    if len(sources) > 1 and head:
        raise ModelError(f"{head} is a reward model, whose head cannot be merged; fuse it alone")


def load_shared_base(sources: Sequence[_Source], model: str | None) -> tuple[Loaded, list[str]]:
    """Load the base that the first adapter names, or `model`, and attach a reward model's head.

    Returns:
        The base, and a note if the adapters were trained on several forms of it.
    Raises:
        ModelError: the base is missing, or is not the one that the adapters were trained on.
    """
    first = sources[0].folder
    loaded = load_base_of(model or first, first, {})
    fingerprint = base_fingerprint(loaded)
    for source in sources:
        read_adapter(source.folder, fingerprint)  # refuses an adapter of another base before anything is measured
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


def _alone(sources: Sequence[_Source]) -> bool:
    return len(sources) == 1 and sources[0].weight == 1.0


def _trained_for(sources: Sequence[_Source]) -> tuple[int | None, list[str]]:
    """Return the bits for which what is fused was trained quantisation-aware, if it was, and notes about that."""
    if not _alone(sources):
        said = "was trained for {} bits alone: merged, its update is rounded again"
        return None, [f"{s.folder} {said.format(s.aware)}" for s in sources if s.aware]
    aware, said = sources[0].aware, "trained for {} bits (tune.quantize_aware): the adapted model is the rounded one"
    return aware, [said.format(aware)] if aware else []


def _attach_sources(loaded: Loaded, sources: Sequence[_Source], rounds: bool) -> list[LowRank]:
    """Put what is fused onto its base, and return its layers, which know their inputs if they are to be rounded."""
    fingerprint = base_fingerprint(loaded)
    if _alone(sources):
        load_adapter(loaded.model, sources[0].folder, fingerprint)
    else:
        merge_adapters(loaded.model, [(s.folder, s.weight) for s in sources], fingerprint)
    loaded.model.eval()
    layers = list(low_rank_of(loaded.model).values())
    if rounds and any(isinstance(layer.base, QUANTIZED) for layer in layers):
        measure_inputs(loaded.model, sample_texts(loaded.tokenizer))
    return layers


# --- probe ------------------------------------------------------------------------------------------------------------
# Rows on which the fused model is compared with the adapted one: built-in rows, a file's, or a run's validation rows.
#
# Validation rows are read only on request, since the recipe that names them may be a stranger's.

_TOKENS = 512  # of all probe rows together: enough to compare precisions, quick to compute
# Instead of a file: the validation or training rows that the runs' recipes name.
_VALID, _TRAIN = "valid", "train"
_STREAMED = 4096  # rows that are read of a stream


@dataclass(frozen=True)
class Probe:
    """Encoded rows; `trained` marks the tokens that are compared (for scores, a row's last token is read).

    Attributes:
        source: where the rows come from, for messages.
        notes: what else could be measured on.
    """

    rows: list[Encoded]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of compared tokens."""
        return sum(int(row.trained.sum()) for row in self.rows)


def find_probe(
    configs: Sequence[Config],
    tokenizer: Any,
    file: str | None,
    scores: bool = False,
    budget: int = _TOKENS,
    option: str = "--probe",
) -> Probe:
    """Return rows to compute something on: built-in text, a file's rows, or the runs' own.

    What is compared is never computed on training rows, on which a run has learnt more than elsewhere.

    Args:
        configs: of the runs whose adapters are fused, as far as they are known.
        file: a file, "valid" or "train" for the runs' validation or training rows; None for the built-in text.
        scores: take completions to be scored instead of texts.
        budget: number of tokens.
        option: what names the rows, for messages.
    Raises:
        ConfigError, DataError: the file is missing, or has no usable row.
    """
    if file is None:
        held = [(c.data.held_out or c.data.sources["train"]).path for c in configs if c.data.valid]
        hint = (
            [f"--probe {_VALID} measures on the run's own validation rows (of {', '.join(map(str, held))})"]
            if held
            else []
        )
        return Probe(
            sample_rows(built_in_examples(scores), tokenizer, None, scores, budget), "built-in text", tuple(hint)
        )
    if file not in (_VALID, _TRAIN):
        config = configs[0] if configs else None
        rows = sample_rows(_file_examples(file, config, _chats(config, tokenizer)), tokenizer, config, scores, budget)
        return Probe(rows, file)
    found: list[Encoded] = []
    for config in configs:
        if examples := _held_out(config, tokenizer) if file == _VALID else _learnt(config, tokenizer):
            found += sample_rows(examples, tokenizer, config, scores, budget // len(configs))
    what = {_VALID: "validation", _TRAIN: "training"}[file]
    if not found:
        seen = f"the run has no {what} rows" if configs else "no run is known here"
        raise ConfigError(f"{option} {file}: {seen}; name a file of rows, or leave the option out")
    return Probe(found, f"{what} rows")


def _chats(config: Config | None, tokenizer: Any) -> bool:
    return bool(tokenizer.has_chat_template) and (config is None or config.data.template == "auto")


def _held_out(config: Config, tokenizer: Any) -> list[Example]:
    """Return a run's validation rows, if it had any."""
    data = config.data
    if isinstance(data.valid, float):
        return load_splits(data, config.run.seed, tokenizer=tokenizer, mix=True)[1]
    source = valid_source(data)
    if source is None:
        return []
    return _converted(read_rows(source.path, "valid"), data.of(source), config, tokenizer)


def _converted(rows: Iterable[Row | Problem], data: DataSettings, config: Config, tokenizer: Any) -> list[Example]:
    skipped: list[Problem] | None = [] if data.bad_rows == "drop" else None
    return convert(rows, data.format, data.fields, skipped, chat=_chats(config, tokenizer))


def _learnt(config: Config, tokenizer: Any) -> list[Example]:
    """Return a run's training rows, those of data.train; of a stream, which may not fit in memory, the first ones."""
    data = config.data
    if data.stream:
        firsts = [(islice(read_rows(s.path, "train"), _STREAMED), data.of(s)) for s in data.sources.values()]
        return [example for rows, read in firsts for example in _converted(rows, read, config, tokenizer)]
    return load_splits(data, config.run.seed, tokenizer=tokenizer, mix=True)[0]


def _file_examples(file: str, config: Config | None, chat: bool) -> list[Example]:
    """Return a file's rows, in the run's format if they have its fields, else in the format that they look like."""
    rows = list(read_rows(file, "valid"))
    first = next((row.data for row in rows if not isinstance(row, Problem)), {})
    if (looks := suggest_format(first)) is None:
        named = with_usual_names(rows, ("messages", "prompt-completion", "text", "preference"))
        looks = suggest_format(next((row.data for row in named if not isinstance(row, Problem)), {}))
    else:
        named = rows
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
    return convert(named, looks, chat=chat)


# --- fidelity ---------------------------------------------------------------------------------------------------------
# How much of an adaptation another form of the model keeps, measured on probe rows.
#
# Between two of three models (the base, the adapted one and the fused one), D is the Kullback-Leibler divergence of
# their predictions, a mean over tokens, in nats; for reward models, the mean squared difference of their scores. The
# share of the adaptation that is kept is 1 - D(adapted, fused) / D(adapted, base).

_BATCH = 512  # tokens, padding included
_HELD = 256 << 20  # bytes of one model's log-probabilities, which are held for comparison


class Gap(NamedTuple):
    """Between two models: a divergence, at least 0, and the share of tokens or pairs on which they agree."""

    divergence: float
    agreement: float


def _kl(p: mx.array, q: mx.array) -> mx.array:
    """Return KL(p || q) in nats, (n,), of log-probabilities p and q (n, V), float32.

    Computed as the sum of p (e^d - 1 - d) with d = q - p, whose terms are all at least 0: in the sum of -p d, two
    models that differ by little would cancel to noise (the terms p (e^d - 1) add up to 0). Small d use the series.
    """
    d = q - p
    small = mx.abs(d) < 0.1
    near = mx.where(small, d, 0.0)
    series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    probability = mx.exp(p)
    # Where p is 0, only q's share counts.
    far = mx.exp(q) - probability - mx.where(probability > 0, probability * d, 0.0)
    return mx.where(small, probability * series, far).sum(axis=-1)


class Meter:
    """Compares models on probe rows by their predictions, or by their scores if the model has a score head."""

    def __init__(self, loaded: Loaded, probe: Probe) -> None:
        self._split = Split(loaded.model)
        self.scores = head_of(loaded.model) is not None
        sizes = {**loaded.config, **(loaded.config.get("text_config") or {})}
        vocabulary = self._split.vocabulary or int(sizes.get("vocab_size") or 1 << 17)
        self._chunk = chunk_size(vocabulary)
        self.probe = probe if self.scores else _limited(probe, max(64, _HELD // (4 * vocabulary)))
        self._batches = list(_batches(self.probe.rows))

    def read(self) -> list[mx.array]:
        """Return log-probabilities (n, V) at the compared tokens, or scores (n,), of each batch or chunk; float32."""
        found = []
        with unpacked(self._split.model):
            for rows, ids in self._batches:
                last = mx.array([len(row.ids) - 1 for row in rows])
                for part in [read_scores(self._split, ids, last)] if self.scores else self._logprobs(rows, ids):
                    mx.eval(part)
                    found.append(part)
        return found

    def _logprobs(self, rows: list[Encoded], ids: mx.array) -> Iterator[mx.array]:
        split, width = self._split, ids.shape[1]
        at = np.concatenate([b * width + np.flatnonzero(row.trained) - 1 for b, row in enumerate(rows)])
        states = split.hidden(ids) if split.separable else split.call(ids)
        states = states.reshape(-1, states.shape[-1])[mx.array(at.astype(np.int32))]
        for start in range(0, len(at), self._chunk):
            part = states[start : start + self._chunk]
            logits = (split.logits(part) if split.separable else part).astype(mx.float32)
            yield logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def read_from(self, logits: Callable[[Sequence[int]], Any]) -> list[mx.array]:
        """Return what `read` does of a model in another program: ids (T,) of a row -> logits (T, V)."""
        found = []
        for rows, _ in self._batches:
            parts = [logits(row.ids.tolist())[np.flatnonzero(row.trained) - 1] for row in rows]
            whole = np.concatenate(parts).astype(np.float32)
            for start in range(0, len(whole), self._chunk):
                chunk = mx.array(whole[start : start + self._chunk])
                found.append(chunk - mx.logsumexp(chunk, axis=-1, keepdims=True))
        return found

    def gap(self, one: list[mx.array], other: list[mx.array]) -> Gap:
        """Return the mean KL(one || other) a token, and how often the likeliest token is the same.

        For scores: the mean squared difference, and the share of pairs of completions that both order alike.
        """
        if self.scores:
            a, b = (np.concatenate([np.array(part) for part in parts]) for parts in (one, other))
            pairs = np.triu_indices(len(a), 1)
            same = np.sign(a[:, None] - a)[pairs] == np.sign(b[:, None] - b)[pairs]
            return Gap(float(np.mean((a - b) ** 2)), float(np.mean(same)) if len(a) > 1 else 1.0)
        count = sum(len(p) for p in one)
        total = sum(float(_kl(p, q).sum()) for p, q in zip(one, other))
        equal = sum(float((p.argmax(axis=-1) == q.argmax(axis=-1)).sum()) for p, q in zip(one, other))
        return Gap(total / count, equal / count)


def _limited(probe: Probe, positions: int) -> Probe:
    """Limit the compared tokens, since the logits of a large vocabulary take much memory."""
    rows: list[Encoded] = []
    for row in probe.rows:
        trained = row.trained & (np.cumsum(row.trained) <= positions)
        positions -= int(trained.sum())
        if trained.any():
            rows.append(Encoded(row.ids, trained, row.where))
    return replace(probe, rows=rows)


def _batches(rows: list[Encoded]) -> Iterator[tuple[list[Encoded], mx.array]]:
    """Yield rows of similar length with their ids (B, T), padded on the right, where causal attention never sees it."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    for slot in plan_epoch(lengths, tokens=_BATCH, seed=None):
        ids = np.zeros((len(slot.rows), slot.width), dtype=np.int32)
        for b, i in enumerate(slot.rows):
            ids[b, : lengths[i]] = rows[i].ids
        yield [rows[i] for i in slot.rows], mx.array(ids)


# --- precision --------------------------------------------------------------------------------------------------------
# The bits of each fused layer: the fewest that keep as much of the adaptation as --keep asks for.
#
# Fusing into a quantised base rounds again, and a layer's rounding may be larger than its update; least on the base's
# own grid (`WeightForm.rounded`), and none where the layer was trained so. The noise of a form
# is the relative error of the layer's weight. A step gives one layer more bits; sorted by noise per byte, the steps
# lead from all layers as the base is to all in float, and bisection finds how many of them are needed.

_BITS = (2, 3, 4, 5, 6, 8)


_Forms = dict[str, WeightForm]  # path of a fused layer -> its form


def _form(base: nn.Module, bits: int | None = None) -> WeightForm | None:
    """Return `form_of`; what is not quantised stays so."""
    return form_of(base, bits) if isinstance(base, QUANTIZED) else FLOAT


def uniform(model: nn.Module, bits: int | None) -> _Forms:
    """Return one form for all fused layers: None as the base is, 0 float, else this many bits if it is quantised.

    Layers that were trained quantisation-aware have the form of their training, or are float.

    Raises:
        ExportError: a layer cannot have this many bits.
    """
    forms: _Forms = {}
    for path, module in low_rank_of(model).items():
        form = _form(module.base, bits) if module.form is None or bits == 0 else module.form
        if module.form is not None and bits not in (None, 0, module.form.bits):
            raise ExportError(
                f"--bits {bits}: was trained for {module.form.bits} bits (tune.quantize_aware), and other bits would "
                "round its weights again; leave --bits out, or use --dequantize"
            )
        if form is None:
            width, mode = dense_weight(module.base).shape[-1], module.base.mode
            raise ExportError(
                f"--bits {bits}: {path} is quantised as {mode} and {width} wide, which groups of 32 do not fill; "
                "leave --bits out, or use --dequantize"
            )
        forms[path] = form
    return forms


def _fused_layers(model: nn.Module, forms: _Forms, dequantize: bool) -> dict[str, nn.Module]:
    """Return the layers that replace the model's; nothing is computed yet."""
    fused = {path: forms[path].layer(m) for path, m in low_rank_of(model).items()}
    if dequantize:
        inside = tuple(f"{path}." for path in fused)
        for path, module in model.named_modules():
            if isinstance(module, QUANTIZED) and not path.startswith(inside):
                fused[path] = plain_layer(module, dense_weight(module))
    return fused


def _steps(model: nn.Module) -> tuple[_Forms, list[tuple[str, WeightForm]]]:
    """Return all fused layers as their bases are, and single steps up, the one with most noise per byte first."""
    start: _Forms = {}
    steps: list[tuple[float, str, WeightForm]] = []
    for path, module in low_rank_of(model).items():
        base, own = module.base, _form(module.base)
        assert own is not None
        if not own.bits or not mx.any(shift(module)).item():
            start[path] = replace(own, same=bool(own.bits))
            continue
        start[path] = own
        weight = module.adapted_weight()
        points: list[tuple[WeightForm, int, float]] = []
        for bits in (own.bits, *(bits for bits in _BITS if bits > own.bits), 0):
            if (form := _form(base, bits)) is not None:
                layer = form.layer(module)
                error = (dense_weight(layer).astype(mx.float32) - weight).square().sum() / weight.square().sum()
                points.append((form, weight_bytes(layer), float(error)))
        # The lower convex hull of noise over bytes: from each point on, the steepest way down.
        at, *rest = points
        while rest := [p for p in rest if p[1] > at[1] and p[2] < at[2]]:
            slope, to = max(((at[2] - p[2]) / (p[1] - at[1]), p) for p in rest)
            steps.append((slope, path, to[0]))
            at = to
    steps.sort(key=lambda step: -step[0])
    return start, [(path, form) for _, path, form in steps]


@dataclass(frozen=True)
class Trial:
    """A measured model.

    Attributes:
        bytes: of all its weights.
        gap: from the adapted model.
        kept: share of the adaptation, None if there is nothing to keep.
    """

    name: str
    bytes: int
    gap: Gap
    kept: float | None
    forms: _Forms = field(repr=False)

    def meets(self, keep: float) -> bool:
        """Return whether it keeps this share."""
        return self.kept is None or self.kept >= keep

    def to_json(self) -> dict[str, Any]:
        """Return what was measured."""
        return {
            "precision": self.name,
            "bytes": self.bytes,
            "adapted_to_fused": self.gap.divergence,
            "kept": self.kept,
            "agreement": self.gap.agreement,
        }


def _search(model: nn.Module, measure: Callable[[_Forms], Trial], keep: float) -> list[Trial]:
    """Measure models until the smallest that keeps enough is known within 1 % of its bytes."""
    start, steps = _steps(model)

    def trial(count: int) -> Trial:
        return measure({**start, **dict(steps[:count])})

    trials = [trial(0)]
    if trials[0].meets(keep) or not steps:
        return trials
    trials.append(trial(len(steps)))
    if not trials[-1].meets(keep):
        return trials
    low, high = (0, trials[0].bytes), (len(steps), trials[1].bytes)
    while high[0] - low[0] > 1 and high[1] - low[1] > 0.01 * high[1]:
        middle = (low[0] + high[0]) // 2
        trials.append(trial(middle))
        at = (middle, trials[-1].bytes)
        low, high = (low, at) if trials[-1].meets(keep) else (at, high)
    return trials


# --- recipes ----------------------------------------------------------------------------------------------------------
# mlx-lm's own quantisers (mlx_lm.quant), which take the whole model, fused in float, and rows to calibrate on.
#
# mixed gives more bits to the layers that change the predictions most; awq scales weights by what they multiply and
# clips them; gptq lets the columns that are rounded later make up for those before; dwq trains the scales of a
# quantised model towards the float model's predictions.

# The bits that each can write: mixed has a step above them, and mlx-lm's gptq packs, and its dwq trains, no others.
_RECIPES = {"mixed": _BITS[:-1], "awq": _BITS, "gptq": (2, 4, 8), "dwq": _BITS[:-1]}
_CALIBRATION = 1 << 14  # tokens
_SEGMENT = 256  # tokens; two segments are computed at once
_RATE, _EPOCHS = 1e-5, 4  # of dwq


def _check_recipe(recipe: str | None, rows: str | None, bits: int | None, dequantize: bool) -> None:
    """Refuse options that exclude each other."""
    if recipe is None:
        if rows is not None:
            raise ConfigError("--rows is what a --recipe calibrates on: name one, or leave it out")
        return
    if recipe not in _RECIPES:
        raise ConfigError(f"--recipe {recipe}: expected {', '.join(_RECIPES)}")
    if dequantize:
        raise ConfigError(f"--recipe {recipe} quantises and --dequantize writes float: leave one out")
    if bits and bits not in _RECIPES[recipe]:
        able = ", ".join(name for name, some in _RECIPES.items() if bits in some)
        known = ", ".join(map(str, _RECIPES[recipe]))
        raise ConfigError(f"--recipe {recipe} --bits {bits}: {recipe} takes {known} bits; {bits} bits: {able}")


def _others(recipe: str) -> str:
    return " or ".join(name for name in _RECIPES if name != recipe)


class _Progress(io.TextIOBase):
    """Gives what a tool prints, and how far its bars are, to `tell`."""

    def __init__(self, name: str, tell: Callable[[str], object]) -> None:
        self._name, self._tell, self._streams = name, tell, (sys.stdout, sys.stderr)
        # A rich console on stderr, which `tell` may update, still writes there.
        self.rich_proxied_file = getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        for line in re.split(r"[\r\n]+", text):
            if (said := line.split("|")[0].strip()) and not said.startswith("\x1b"):
                with contextlib.redirect_stdout(self._streams[0]), contextlib.redirect_stderr(self._streams[1]):
                    self._tell(f"{self._name}: {said}")
        return len(text)


@contextmanager
def _tool(recipe: str, tell: Callable[[str], object]) -> Iterator[None]:
    """Keep a tool's output off the terminal and NumPy's random state as it is, and type its errors."""
    progress, state = _Progress(recipe, tell), np.random.get_state()
    try:
        with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(progress):
            yield
    except MlxftError:
        raise
    except Exception as error:  # they raise nearly anything about an architecture that they do not know
        raise ExportError(
            f"--recipe {recipe}: mlx-lm's tool failed on this model ({brief(error)}); try --recipe {_others(recipe)}, "
            "or leave --recipe out"
        ) from error
    finally:
        np.random.set_state(state)


def _segments(configs: Sequence[Config], loaded: Loaded, rows: str | None, probe: Probe) -> tuple[mx.array, list[str]]:
    """Return ids (N, T) to calibrate on, none of them of a row that is measured, and a note about them."""
    found = find_probe(configs, loaded.tokenizer, rows, budget=_CALIBRATION, option="--rows")
    measured = {row.ids.tobytes() for row in probe.rows}
    ids = [row.ids for row in found.rows if row.ids.tobytes() not in measured]
    if not ids:
        raise ConfigError(f"--rows {rows}: all its rows are measured on; name other rows there, or others with --probe")
    left = len(found.rows) - len(ids)
    whole = np.concatenate(ids)
    width = min(_SEGMENT, context_of(loaded.config) or _SEGMENT, len(whole))
    segments = whole[: len(whole) // width * width].reshape(-1, width).astype(np.int32)
    without = f", without the {left} rows of it that are measured on" if left else ""
    return mx.array(segments), [f"calibrated on {segments.size:,} tokens of {found.source}{without}"]


def _group_size(model: nn.Module) -> int:
    """Return the size of groups that fill every layer."""
    widths = {path: m.weight.shape[-1] for path, m in model.named_modules() if hasattr(m, "to_quantized")}
    for size in (64, 32):
        odd = [path for path, width in widths.items() if width % size]
        if not odd:
            return size
    raise ExportError(f"--recipe: {odd[0]} is {widths[odd[0]]} wide, which groups of 32 do not fill; leave it out")


def _rounded(loaded: Loaded, bits: int, size: int, predicate: Callable[[str, nn.Module], Any] | None = None) -> Loaded:
    """Return a quantised copy of a float model."""
    from mlx_lm.utils import quantize_model

    packed = copy_sharing_arrays(loaded)
    quantize_model(packed.model, packed.config, size, bits, quant_predicate=predicate)
    return packed


def _mixed(loaded: Loaded, segments: mx.array, bits: int, size: int, batch: int) -> Loaded:
    """Quantise to `bits`, or the next more where that changes the predictions most, up to half of what more takes."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import compute_bits_per_weight

    more = _BITS[_BITS.index(bits) + 1]
    forms = (bits, size, more, size)
    found = dict(estimate_sensitivities(loaded.model, segments, *forms, batch_size=batch))
    target = sum(compute_bits_per_weight(_rounded(loaded, each, size).model) for each in (bits, more)) / 2
    least = estimate_threshold(loaded.model, found, target, *forms)
    return _rounded(
        loaded, bits, size, lambda path, _: {"bits": more, "group_size": size} if found[path] > least else True
    )


def _awq(loaded: Loaded, segments: mx.array, bits: int, size: int, batch: int) -> Loaded:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    kind = loaded.config["model_type"]
    if kind not in AWQ_MODEL_CONFIGS:
        known = ", ".join(AWQ_MODEL_CONFIGS)
        raise ExportError(
            f"--recipe awq: mlx-lm's tool takes {known}, and this model is {kind}; try --recipe {_others('awq')}"
        )
    student = copy_sharing_arrays(loaded)
    awq_quantize(student.model, segments, AWQ_MODEL_CONFIGS[kind], size, bits, embed_bits=max(4, bits))
    return student


def _gptq(loaded: Loaded, segments: mx.array, bits: int, size: int, batch: int) -> Loaded:
    from mlx_lm.quant.gptq import gptq_quantize

    student = copy_sharing_arrays(loaded)
    kinds = {path: value.dtype for path, value in tree_flatten(student.model.parameters())}
    student.model.set_dtype(mx.float32)  # sums of squares, which half precision loses
    gptq_quantize(student.model, segments, bits, size, max(6, bits), size, batch_size=batch)
    values = {path: value for path, value in tree_flatten(student.model.parameters()) if value.dtype == mx.float32}
    back = [
        (path, v.astype(kinds.get(path) or kinds[f"{path.rpartition('.')[0]}.weight"])) for path, v in values.items()
    ]
    student.model.update(tree_unflatten(back))
    return student


def _dwq(loaded: Loaded, segments: mx.array, bits: int, size: int, batch: int) -> Loaded:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    student = _rounded(loaded, bits, size)
    student.model.freeze()  # the tool unfreezes scales and biases
    scales = next(m.scales for m in student.model.modules() if "scales" in m)
    rows = [(row, 0) for row in np.array(segments)]
    batch = min(batch, len(rows))
    options = {"batch_size": batch, "max_seq_length": segments.shape[1], "seed": 0, "dtype": scales.dtype}
    optimizer = Adam(_RATE, bias_correction=True)
    dwq_quantize(
        student.model, lambda ids, *_, **__: loaded.model(ids), optimizer, rows * _EPOCHS, rows[:batch], **options
    )
    student.model.eval()
    return student


def _follow(
    recipe: str,
    loaded: Loaded,
    bits: int,
    segments: mx.array,
    judge: Callable[[str, Loaded, _Forms], Trial],
    tell: Callable[[str], object],
) -> tuple[Loaded, list[Trial]]:
    """Fuse an adapted model in float and quantise it by a recipe.

    Args:
        judge: measures a model, with its name and the forms of its fused layers.
    Returns:
        The quantised model, and as trials the float one, plainly rounded to `bits`, and by the recipe.
    """
    forms = fuse_layers(loaded.model, dequantize=True)
    loaded = replace(loaded, config=_fused_config(loaded))
    trials = [judge("float", loaded, forms)]

    def judge_packed(name: str, packed: Loaded) -> Trial:
        modules = dict(packed.model.named_modules())
        found = {path: _form(modules[path]) or FLOAT for path in forms}
        return judge(f"{name}{_name(found)}", packed, found)

    size = _group_size(loaded.model)
    run = {"mixed": _mixed, "awq": _awq, "gptq": _gptq, "dwq": _dwq}[recipe]
    with _tool(recipe, tell):
        plain = _rounded(loaded, bits, size)
    trials.append(judge_packed("plain ", plain))
    del plain
    with _tool(recipe, tell):
        student = run(loaded, segments, bits, size, max(1, _BATCH // segments.shape[1]))
        mx.eval(student.model.parameters())
    trials.append(judge_packed(f"{recipe}, ", student))
    if not math.isfinite(trials[-1].gap.divergence):
        raise ExportError(f"--recipe {recipe}: its model computes NaN; try --recipe {_others(recipe)}")
    return replace(student, config=_fused_config(replace(student, config=loaded.config))), trials


# --- fuse -------------------------------------------------------------------------------------------------------------
# One folder that mlx-lm, LM Studio and transformers load, with what is kept of the adaptation.

_KEEP = 0.95  # share of the adaptation to keep


@dataclass
class Fused:
    """What fusing did, or would have done.

    Attributes:
        bytes: of the weights written.
        scores: reward models were compared, by their scores.
        recipe: that of mlx-lm's quantisers by which the model was quantised.
        whole: between the adapted model and its base; what there is to keep.
        trials: the measured models; `chosen` is one of them.
    """

    out: Path
    adapters: list[_Source]
    probe: Probe
    scores: bool
    whole: Gap
    trials: list[Trial]
    chosen: Trial
    keep: float
    notes: list[str] = field(default_factory=list)
    written: bool = False
    bytes: int = 0
    recipe: str | None = None

    def lines(self) -> list[str]:
        """Return a summary and a table."""
        several = f" of {len(self.adapters)} adapters" if len(self.adapters) > 1 else ""
        done = f"wrote {self.out} ({self.bytes / 1e6:,.1f} MB of weights)" if self.written else "nothing is written"
        if self.scores:
            unit, same, what = "squared difference", "same order", f"{len(self.probe.rows)} completions"
            whole = f"mean squared difference of scores {self.whole.divergence:.3g}, pairs in the same order"
        else:
            unit, same, what = "KL a token", "same likeliest token", f"{self.probe.tokens:,} tokens"
            whole = f"KL a token {self.whole.divergence:.3g}, same likeliest token"
        lines = [
            f"fused {len(self.chosen.forms):,} layers{several}; {done}",
            *self.notes,
            f"measured on {what} ({self.probe.source}); from the adapted model to its base:",
            f"{whole} {self.whole.agreement:.1%}",
        ]
        rows = [("  fused layers", "weights", unit, "kept", same)]
        for trial in sorted(self.trials, key=lambda t: t.bytes):
            gap, kept = trial.gap, "-" if trial.kept is None else f"{trial.kept:.1%}"
            found = (f"{trial.bytes / 1e6:,.1f} MB", f"{gap.divergence:.3g}", kept, f"{gap.agreement:.1%}")
            rows.append((f"{'*' if trial is self.chosen else ' '} {trial.name}", *found))
        lines += aligned(rows)
        if self.chosen.kept is None:
            lines.append("the adapter changes nothing on these rows: there is nothing to keep")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON; bits 0 are float."""
        return {
            **self.chosen.to_json(),
            "path": str(self.out),
            "written": self.written,
            "layers": len(self.chosen.forms),
            "bytes": self.bytes,
            "adapters": [{"path": str(source.folder), "weight": source.weight} for source in self.adapters],
            "probe": {"source": self.probe.source, "rows": len(self.probe.rows), "tokens": self.probe.tokens},
            "measure": "squared score difference" if self.scores else "kl",
            "adapted_to_base": self.whole.divergence,
            "keep": self.keep,
            "recipe": self.recipe,
            "agreement_base": self.whole.agreement,
            "bits": {path: form.bits for path, form in self.chosen.forms.items()},
            "tried": [trial.to_json() for trial in self.trials],
            "notes": self.notes,
        }


class LostTooMuch(ExportError):
    """The fused model would keep less of the adaptation than --keep asks for; `fused` holds what was measured."""

    def __init__(self, text: str, fused: Fused) -> None:
        super().__init__(text)
        self.fused = fused


def fuse_layers(
    model: nn.Module, *, dequantize: bool = False, bits: int | None = None, forms: _Forms | None = None
) -> _Forms:
    """Replace every low-rank layer by a plain one that computes the same.

    Args:
        dequantize: leave no layer of the model quantised.
        bits: of fused layers whose base is quantised; default: as the base.
        forms: of each fused layer, instead of these.
    Returns:
        Path of each fused layer -> its form.
    """
    forms = uniform(model, 0 if dequantize else bits) if forms is None else forms
    for path, layer in _fused_layers(model, forms, dequantize).items():
        mx.eval(layer.parameters())  # one dense weight at a time
        model.update_modules(tree_unflatten([(path, layer)]))
    return forms


def _fused_config(loaded: Loaded) -> dict[str, Any]:
    """Return the config.json of a model whose layers are fused, with the quantisation of each as mlx-lm reads it."""
    config = {k: v for k, v in loaded.config.items() if k not in ("quantization", "quantization_config")}
    if not any(isinstance(m, QUANTIZED) for m in loaded.model.modules()):
        return config
    quantization = quantization_of(loaded.model, loaded.config.get("quantization"))
    return {**config, "quantization": quantization, "quantization_config": quantization}


def fuse_sources(
    run: Path | None,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    model: str | None = None,
    dequantize: bool = False,
    bits: int | None = None,
    keep: float = _KEEP,
    recipe: str | None = None,
    rows: str | None = None,
    probe: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> Fused:
    """Fuse a run or adapters into their base, measure what is kept of the adaptation, and write the folder `out`.

    On a quantised base, each fused layer gets as few bits as together keep `keep`.

    Args:
        run: a run or an adapter folder; with `adapters` also their base, or None.
        adapters: more of them, each with the multiplier of its update; all updates add up.
        model: the base, if the adapter does not name it or it has moved.
        dequantize, bits: set the precision instead of searching for it.
        recipe: quantise the whole fused model by a tool of mlx-lm: mixed, awq, gptq or dwq, to `bits` (default: 4).
        rows: what the recipe calibrates on: a file, or "train" or "valid" for the run's own; default: built-in text.
        probe: a file of rows to measure on, or "valid": the validation rows of the runs; default: built-in text.
        force: write even what keeps less than `keep`.
        tell: called with what is being done.
    Raises:
        ModelError: there is no such run, or an adapter has another base.
        LostTooMuch: less than `keep` would be kept; nothing is written.
        ConfigError: `out` exists and may not be replaced.
        ExportError: `out` cannot be written.
    """
    _check_recipe(recipe, rows, bits, dequantize)
    check_destination(out, overwrite)
    sources, base = find_sources(run, adapters)
    tell("loading the base")
    loaded, notes = load_shared_base(sources, model or base)
    check_unused(out, [loaded.path, *(source.folder for source in sources)])
    aware, said = _trained_for(sources)
    _check_precision(loaded, recipe, aware, dequantize or bits is not None)
    check_space(out, 0 if dequantize or recipe else weight_bytes(loaded.model) // 2)
    configs = [source.config for source in sources if source.config is not None]
    meter = Meter(loaded, find_probe(configs, loaded.tokenizer, probe, head_of(loaded.model) is not None))
    segments, calibrated = _segments(configs, loaded, rows, meter.probe) if recipe else (None, [])
    tell("measuring the base")
    before = meter.read()
    layers = _attach_sources(loaded, sources, rounds=not (recipe or dequantize))
    tell("measuring the adapted model")
    adapted = meter.read()
    whole = meter.gap(adapted, before)
    del before

    judge = partial(_judged, meter, adapted, whole, tell)

    def measure(forms: _Forms) -> Trial:
        with standing_in(loaded.model, _fused_layers(loaded.model, forms, dequantize)):
            size = weight_bytes(loaded.model)
        with standing_in(loaded.model, standins(loaded.model, forms)):
            return judge(_name(forms), loaded, forms, size)

    if recipe and segments is not None:
        loaded, trials = _follow(recipe, loaded, bits or 4, segments, judge, tell)
    elif dequantize or bits or aware or not any(isinstance(m.base, QUANTIZED) for m in layers):
        trials = [measure(uniform(loaded.model, 0 if dequantize else bits))]
    else:
        tell("measuring each layer")
        trials = _search(loaded.model, measure, keep)
    enough = [trials[-1]] if recipe else [trial for trial in trials if trial.meets(keep)]
    chosen = min(enough, key=lambda t: t.bytes) if enough else max(trials, key=lambda t: t.kept or 0.0)
    notes += [*said, *calibrated, *(_no_closer(trials) if recipe else []), *meter.probe.notes]
    fused = Fused(out, sources, meter.probe, meter.scores, whole, trials, chosen, keep, notes, recipe=recipe)
    if chosen.meets(keep) or force:
        _write_fused(fused, loaded, dequantize, overwrite, tell)
        return fused
    raise LostTooMuch("\n".join([*fused.lines(), _too_little(fused, bits)]), fused)


def _write_fused(
    fused: Fused, loaded: Loaded, dequantize: bool, overwrite: bool, tell: Callable[[str], object]
) -> None:
    """Write the model that was chosen, which a recipe has fused already."""
    tell("writing")
    check_space(fused.out, fused.chosen.bytes)
    if fused.recipe is None:
        fuse_layers(loaded.model, dequantize=dequantize, forms=fused.chosen.forms)
        loaded = replace(loaded, config=_fused_config(loaded))
    _write(fused.out, loaded, fused.adapters[0], loaded.config, overwrite)
    fused.written, fused.bytes = True, weight_bytes(loaded.model)


def _judged(
    meter: Meter,
    adapted: list[mx.array],
    whole: Gap,
    tell: Callable[[str], object],
    name: str,
    form: Loaded,
    forms: _Forms,
    size: int | None = None,
) -> Trial:
    """Measure a form of the adapted model; `size`: bytes of its weights, if they are not as it holds them now."""
    tell(f"measuring {name}")
    gap = meter.gap(adapted, Meter(form, meter.probe).read())
    kept = min(1.0, max(0.0, 1.0 - gap.divergence / whole.divergence)) if whole.divergence > 0 else None
    return Trial(name, weight_bytes(form.model) if size is None else size, gap, kept, forms)


def _check_precision(loaded: Loaded, recipe: str | None, aware: int | None, asked: bool) -> None:
    """Refuse a precision that the model cannot have, or a recipe for it."""
    if recipe is None:
        if asked and not (aware or any(isinstance(m, QUANTIZED) for m in loaded.model.modules())):
            raise ExportError("the base is not quantised: --dequantize and --bits have nothing to act on")
    elif head_of(loaded.model) is not None:
        raise ExportError(
            f"--recipe {recipe}: is for models that write, and this is a reward model, whose head mlx-lm's tools do "
            "not know; leave it out"
        )
    elif aware:
        raise ExportError(
            f"--recipe {recipe}: was trained for {aware} bits (tune.quantize_aware), and a recipe would round its "
            "weights again; leave it out"
        )


def _no_closer(trials: Sequence[Trial]) -> list[str]:
    """Return a note if the recipe, the last trial, is no closer than plain rounding, the one before."""
    plain, made = trials[-2:]
    same = made.gap.divergence >= plain.gap.divergence
    return [f"{made.name} is no closer to the adapted model than {plain.name} on these rows"] if same else []


def _name(forms: _Forms) -> str:
    """Name the precisions: 4 bits; 4/6/8 bits; 4 bits/float; float."""
    bits = sorted({form.bits for form in forms.values()} - {0})
    packed = [f"{'/'.join(map(str, bits))} bits"] if bits else []
    return "/".join([*packed, "float"] if FLOAT in forms.values() else packed) or "as it is"


def _too_little(fused: Fused, bits: int | None) -> str:
    """Say what to do if too little is kept."""
    if fused.recipe:
        way = "try more --bits or another --recipe, leave --recipe out, or write it anyway with --force"
    elif FLOAT in fused.chosen.forms.values():
        way = "so small an update is lost in the type of the weights: train it longer or at a higher rate, or --force"
    else:
        way = f"leave {f'--bits {bits}' if bits else '--keep'} out, --dequantize, or write it anyway with --force"
    kept = f"{fused.chosen.kept or 0.0:.1%} of the adaptation is kept, --keep asks for {fused.keep:.1%}"
    return f"{kept}, so {fused.out} is not written; {way}"


def _write(out: Path, loaded: Loaded, source: _Source, config: dict[str, Any], overwrite: bool) -> None:
    """Write the folder, with a reward model's head beside the weights."""
    file = find_head(source.folder)
    noted = read_head(file).about if file else {}
    if file:  # an older head does not note its template, but its run does
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
    measure: bool = False,
    probe: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write `src` as a folder that mlx-lm and transformers read.

    Args:
        dtype: of floating weights; "auto" keeps the checkpoint's own (a .gguf: float16).
        quantize: bits. A .gguf is quantised again as it is read, unless most of it has as many bits; without it, a
            .gguf is dequantised and anything else stays as it is.
        dequantize: write plain weights from a quantised checkpoint.
        measure: compare what is written with `src` in float, on built-in text or on the rows of `probe`.
    Returns:
        path, source, model_type, dtype, quantization (or None), parameters, bytes of weights, bits_per_weight, and with
        `measure` measured: kl (a token), agreement (share of the same likeliest token), tokens, source.
    Raises:
        ConfigError: settings exclude each other; or `dst` exists and may not be replaced.
        ModelError: `src` cannot be loaded.
        ExportError: the disk is too small, or writing failed.
    """
    if dequantize and quantize:
        raise ConfigError(f"convert: dequantize and quantize={quantize} exclude each other; do one, then the other")
    if group_size is not None and not quantize:
        raise ConfigError(f"convert: group_size {group_size} is for quantising; give quantize too, or leave it out")
    check_destination(dst, overwrite)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "lazy": True}
    rows, plain = None, None
    if measure:  # before the other model is in memory
        whole = load(src, quantize=0, **options)
        rows = find_probe([], whole.tokenizer, probe)
        plain = Meter(whole, rows).read()
        del whole
    own = "own" if dtype == "auto" else dtype
    loaded = load(src, dtype=own, quantize=0 if dequantize else quantize, group_size=group_size, **options)
    measured: dict[str, Any] = {}
    if rows is not None and plain is not None:
        meter = Meter(loaded, rows)
        gap = meter.gap(plain, meter.read())
        found = {"kl": gap.divergence, "agreement": gap.agreement, "tokens": meter.probe.tokens, "source": rows.source}
        measured = {"measured": found}
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
        **measured,
    }
