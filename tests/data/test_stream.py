"""Rows on the disk are the rows in memory; a mixture draws what its weights say; both resume at every step."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlxft.config import Config, objective_class, parse_config
from mlxft.data import dataset
from mlxft.data.dataset import Mixture, Plan, StoredRows, pack_epoch, plan_epoch
from mlxft.errors import CheckpointError, ConfigError, DataError
from mlxft.files import temporary
from mlxft.model.load import Loaded
from mlxft.objectives.base import OffPolicy

Recipe = Callable[..., dict[str, Any]]
WORDS = ["the", "in", "on", "and", "or", "a", "is", "of", "to", "at"]


def text(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def make_row(format: str, i: int) -> dict[str, Any]:
    rng = random.Random(f"{format} {i}")
    prompt = f"{i} {text(rng)}"
    if format == "messages":
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(rng)}]
        return {"messages": turns * rng.randint(1, 2)}
    if format == "sharegpt":
        return {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": text(rng)}]}
    return {
        "prompt-completion": {"prompt": prompt, "completion": f" {text(rng)}"},
        "text": {"text": prompt},
        "alpaca": {"instruction": prompt, "input": "", "output": text(rng)},
        "preference": {"prompt": prompt, "chosen": text(rng) + " x", "rejected": text(rng), "margin": i / 3},
        "ratings": {"prompt": prompt, "answers": [text(rng) + f" {k}" for k in range(3)], "ratings": [3, 1, i % 3]},
    }[format]


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_rows(path: Path, count: int, format: str = "messages", start: int = 0) -> str:
    return save(path, [make_row(format, i) for i in range(start, start + count)])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_BLOCK", 7)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of rows that were really encoded."""
    calls: list[str] = []
    real = dataset.encode

    def watched(item: Any, tokenizer: Any, where: str, *rest: Any) -> Any:
        calls.append(where)
        return real(item, tokenizer, where, *rest)

    monkeypatch.setattr(dataset, "encode", watched)
    return calls


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Config]:
    """`settings(objective, **{"stream": True})`: a recipe; names without a dot are of the section data."""

    def make(objective: str = "sft", **changes: Any) -> Config:
        sections: dict[str, dict[str, Any]] = {
            "model": {"path": str(tiny_model_dir)},
            "data": {"train": str(tmp_path / "a.jsonl"), "format": "messages", "max_length": 400},
            "batch": {"tokens": 300},
            "run": {"seed": 3},
        }
        for name, value in changes.items():
            section, _, leaf = name.rpartition(".")
            sections.setdefault(section or "data", {})[leaf] = value
        return parse_config({"objective": objective, **sections})

    return make


def build(config: Config, tokenizer: Any) -> Any:
    return objective_class(config.objective)(config, tokenizer)


def rows_of(objective: Any, valid: bool = False) -> list[tuple[Any, ...]]:
    found = getattr(objective.valid if valid else getattr(objective, "train", objective), "rows", None)
    found = objective.valid if found is None else found
    return [tuple(v.tolist() if isinstance(v, np.ndarray) else v for v in row) for row in found]


# --- the same rows and batches


@pytest.mark.invariant
@pytest.mark.parametrize(
    ("objective", "format"),
    [
        *(("sft", format) for format in ("messages", "prompt-completion", "text", "sharegpt", "alpaca")),
        *((objective, format) for objective in ("reward", "preference") for format in ("preference", "ratings")),
    ],
)
def test_streamed_rows_are_those_in_memory(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, objective: str, format: str
) -> None:
    save_rows(tmp_path / "a.jsonl", 40, format)
    save_rows(tmp_path / "v.jsonl", 9, format, 40)
    # Tie-free ratings, as preference losses want them.
    options = {"format": format, "valid": str(tmp_path / "v.jsonl"), "max_length": 90, "overflow": "drop"}
    if format == "ratings":
        rows = [{**make_row(format, i), "ratings": [3, 1, 2]} for i in range(40)]
        save(tmp_path / "a.jsonl", rows)
        save(tmp_path / "v.jsonl", rows[:9])
    memory, stream = (build(settings(objective, stream=on, **options), tiny_tokenizer) for on in (False, True))
    rows = stream.train.rows if objective == "sft" else stream.rows
    assert isinstance(rows, StoredRows)
    assert rows_of(memory) == rows_of(stream)
    assert rows_of(memory, valid=True) == rows_of(stream, valid=True)
    for one, other in zip(memory.train.rows if objective == "sft" else memory.rows, rows):
        assert [getattr(v, "dtype", None) for v in one] == [getattr(v, "dtype", None) for v in other]
    assert [memory.plan(e) for e in range(3)] == [stream.plan(e) for e in range(3)]
    assert memory.shapes() == stream.shapes()
    assert memory.summary() == stream.summary()
    assert memory.previews(3)[2].where == stream.previews(3)[2].where
    assert memory.steps_per_epoch(1) == stream.steps_per_epoch(1)


def test_parquet_and_the_hub_are_streamed(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [make_row("prompt-completion", i) for i in range(25)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    hub = ModuleType("datasets")
    monkeypatch.setattr(hub, "load_dataset", lambda name, config, split: rows, raising=False)
    monkeypatch.setattr(hub, "get_dataset_split_names", lambda name, config: ["train"], raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for spec in (str(tmp_path / "a.parquet"), "hf:org/set"):
        options = {"train": spec, "format": "prompt-completion"}
        memory, stream = (build(settings(stream=on, **options), tiny_tokenizer) for on in (False, True))
        assert rows_of(memory) == rows_of(stream)
    before = stream.fingerprint()
    rows.append(rows[0])
    assert build(settings(stream=True, **options), tiny_tokenizer).fingerprint() != before


@pytest.mark.invariant
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("count", [2, 61, 400])
def test_every_row_once_an_epoch(
    settings: Callable[..., Config],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pack: bool,
    count: int,
) -> None:
    """Over several windows of batches, and several blocks of packed rows."""
    monkeypatch.setattr(dataset, "WINDOW", 3)
    monkeypatch.setattr(dataset, "PACKED", 50)
    save_rows(tmp_path / "a.jsonl", count, "text")
    config = settings(stream=True, format="text", **{"batch.pack": pack, "batch.accumulate": 2})
    orders = []
    for seen in by_epoch(build(config, tiny_tokenizer), 3):
        assert Counter(seen) == Counter(f"a.jsonl:{i + 1}" for i in range(count))
        orders.append(seen)
    assert count < 20 or len(set(map(tuple, orders))) == 3
    again = list(by_epoch(build(config, tiny_tokenizer), 3))
    assert again == orders
    if count > 20:
        other = settings(stream=True, format="text", **{"batch.pack": pack, "batch.accumulate": 2, "run.seed": 4})
        assert next(by_epoch(build(other, tiny_tokenizer), 1)) != orders[0]


def by_epoch(objective: OffPolicy, epochs: int, model: Any = None) -> Iterator[list[str]]:
    seen: list[str] = []
    for step in objective.steps(model):
        seen += [row for batch in step.micro_batches for row in batch.rows]
        if step.ends_epoch:
            yield seen
            seen, epochs = [], epochs - 1
            if not epochs:
                return


@pytest.mark.invariant
def test_the_order_has_nothing_of_the_file_s() -> None:
    """What docs/data.md says: any order of all rows is as likely; a row moves by a third of the file on average."""
    lengths = np.random.default_rng(0).integers(5, 400, 30_000).astype(np.int32)
    for plan in (plan_epoch(lengths, tokens=2048, seed=0), pack_epoch(lengths, width=512, tokens=2048, seed=0)):
        trained = np.empty(len(lengths))
        trained[[row for slot in plan for row in slot.rows]] = np.arange(len(lengths))
        moved = np.abs(trained - np.arange(len(lengths))).mean() / len(lengths)
        assert moved == pytest.approx(1 / 3, abs=0.02)
        assert abs(np.corrcoef(trained, np.arange(len(lengths)))[0, 1]) < 0.03


def taken(objective: OffPolicy, count: int) -> list[Any]:
    """Rows, ids and sources of the next steps, and the state after each."""
    found = []
    for step in islice(objective.steps(None), count):  # type: ignore[arg-type]
        batches = [(batch.rows, batch.data.ids.tolist(), batch.data.labels.tolist()) for batch in step.micro_batches]
        found.append((batches, step.ends_epoch, step.sources, json.loads(json.dumps(objective.state_dict()))))
    return found


@pytest.mark.invariant
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_resumed_at_every_step(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, pack: bool, mixed: bool
) -> None:
    save_rows(tmp_path / "a.jsonl", 23)
    save_rows(tmp_path / "b.jsonl", 11, start=100)
    mix = {"b": {"path": str(tmp_path / "b.jsonl"), "weight": 1.7}} if mixed else {}
    config = settings(stream=True, mix=mix, **{"batch.pack": pack})
    whole = taken(build(config, tiny_tokenizer), 40)
    assert sum(ends for _, ends, *_ in whole) > 1
    for at in range(1, 40):
        resumed = build(config, tiny_tokenizer)
        resumed.load_state_dict(whole[at - 1][3])
        assert taken(resumed, min(3, 40 - at)) == whole[at : at + 3]


def test_memory_does_not_grow_with_the_rows(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Of Python and numpy, per row, from encoding to the first epoch's steps: the index, and not the row."""
    peaks = []
    for count in (50, 500, 4500):  # what is imported and made once comes first
        save_rows(tmp_path / "a.jsonl", count, "text")
        config = settings(stream=True, format="text", **{"batch.tokens": 2048})
        tracemalloc.start()
        for _ in by_epoch(build(config, tiny_tokenizer), 1):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 4000 < 100  # a row in memory takes some 1,000


# --- what is kept on the disk


def test_a_second_run_encodes_nothing_and_a_change_does(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, cache: Path, encoded: list[str]
) -> None:
    def encodes(**changes: Any) -> bool:
        before = len(encoded)
        objective = build(settings(stream=True, **changes), tiny_tokenizer)
        assert len(objective.train.rows) > 0
        return len(encoded) > before

    save_rows(tmp_path / "a.jsonl", 20)
    assert encodes()
    for change in ({}, {"batch.tokens": 64}, {"run.seed": 9}, {"batch.pack": True}):
        assert not encodes(**change)
    for change in ({"max_length": 399}, {"train_on": "last"}, {"bad_rows": "drop"}, {"overflow": "drop"}):
        assert encodes(**change)
        assert not encodes(**change)
    assert not encodes()
    assert len(list(cache.glob("*.rows"))) == 5
    save_rows(tmp_path / "b.jsonl", 5)
    mix = {"b": {"path": str(tmp_path / "b.jsonl"), "weight": 0.5}}
    assert encodes(mix=mix)
    assert not encodes(mix={"b": {**mix["b"], "weight": 2}}), "weights draw from the same rows"
    eos, tiny_tokenizer._tokenizer.eos_token = tiny_tokenizer._tokenizer.eos_token, "<|endoftext|>"
    try:
        assert encodes(), "another tokenizer"
    finally:
        tiny_tokenizer._tokenizer.eos_token = eos
    stamp = (tmp_path / "a.jsonl").stat()
    content = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(content.replace("the", "and", 1))
    os.utime(tmp_path / "a.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert encodes(), "the same size and time, and another row"


class Killed(BaseException):
    pass


def test_what_a_killed_process_left_is_not_read(
    settings: Callable[..., Config],
    tiny_tokenizer: Any,
    tmp_path: Path,
    cache: Path,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_rows(tmp_path / "a.jsonl", 20)
    real = dataset._packed

    def killed(row: Any) -> bytes:
        if len(encoded) > 10:
            raise Killed
        return real(row)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_packed", killed)
        with pytest.raises(Killed):
            build(settings(stream=True), tiny_tokenizer)
    assert not list(cache.glob("*.rows"))
    half = temporary(cache / "x.rows", 2**22 - 3)  # of a process that is no more
    half.write_bytes(b"half")
    stream = build(settings(stream=True), tiny_tokenizer)
    assert rows_of(stream) == rows_of(build(settings(), tiny_tokenizer))
    assert not half.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "facts", "folder"])
def test_a_damaged_file_is_made_again(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, cache: Path, encoded: list[str], damage: str
) -> None:
    save_rows(tmp_path / "a.jsonl", 20)
    first = rows_of(build(settings(stream=True), tiny_tokenizer))
    (file,) = cache.glob("*.rows")
    raw = file.read_bytes()
    changed = {
        "empty": b"",
        "cut": raw[: len(raw) // 2],
        "text": b"not rows",
        "facts": raw.replace(b'"shape"', b'"shbpe"'),
    }
    if damage == "folder":
        file.unlink()
        file.mkdir()
        with pytest.raises(CheckpointError, match="cannot write"):
            build(settings(stream=True), tiny_tokenizer)
        return
    file.write_bytes(changed[damage])
    before = len(encoded)
    assert rows_of(build(settings(stream=True), tiny_tokenizer)) == first
    assert len(encoded) == 2 * before
    assert file.read_bytes() == raw


def test_a_row_that_has_changed_on_the_disk_is_refused(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, cache: Path
) -> None:
    save_rows(tmp_path / "a.jsonl", 20)
    build(settings(stream=True), tiny_tokenizer)
    (file,) = cache.glob("*.rows")
    raw = bytearray(file.read_bytes())
    raw[200] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"\.rows: is damaged at row \d+; delete it"):
        list(build(settings(stream=True), tiny_tokenizer).train.rows)


def test_a_full_disk_says_so(
    settings: Callable[..., Config],
    tiny_tokenizer: Any,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_rows(tmp_path / "a.jsonl", 20)

    def full(row: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "_packed", full)
    with pytest.raises(CheckpointError, match=r"data\.stream: cannot write .*No space left on device.*MLXFT_CACHE"):
        build(settings(stream=True), tiny_tokenizer)
    assert not list(cache.iterdir())


def test_files_that_were_not_used_for_a_day_go_beyond_the_limit(
    settings: Callable[..., Config],
    tiny_tokenizer: Any,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataset, "STORED_LIMIT", 1)
    for name in ("a", "b", "c"):
        save_rows(tmp_path / f"{name}.jsonl", 5)
        build(settings(stream=True, train=str(tmp_path / f"{name}.jsonl")), tiny_tokenizer)
    files = list(cache.glob("*.rows"))
    assert len(files) == 3, "however large: a run of today reads them"
    os.utime(files[0], (1000, 1000))
    save_rows(tmp_path / "d.jsonl", 5)
    build(settings(stream=True, train=str(tmp_path / "d.jsonl")), tiny_tokenizer)
    assert set(cache.glob("*.rows")) & set(files) == set(files[1:])


# --- bad rows, and refusals


def test_bad_rows_are_reported_as_in_memory(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, encoded: list[str]
) -> None:
    rows = [make_row("messages", i) for i in range(60)]
    for i in range(20, 50):
        rows[i] = {"messages": [{"role": "asistant", "content": "x"}]}
    save(tmp_path / "a.jsonl", rows)
    texts = []
    for on in (False, True):
        with pytest.raises(DataError) as caught:
            build(settings(stream=on), tiny_tokenizer)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "a.jsonl:21: messages[0].role is 'asistant'" in texts[1]
    assert "... and 10 more\n30 of 60 rows do not fit" in texts[1]
    assert len(encoded) == 14, "after the first bad row nothing is encoded"
    memory, stream = (build(settings(stream=on, bad_rows="drop"), tiny_tokenizer) for on in (False, True))
    assert rows_of(memory) == rows_of(stream)
    assert memory.summary().notes == stream.summary().notes
    assert any(note.startswith("30 rows are left out") for note in stream.summary().notes)


def test_rows_that_are_too_long_or_have_no_template_name_their_line(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save(tmp_path / "a.jsonl", [*(make_row("text", i) for i in range(30)), {"text": "the " * 900}])
    with pytest.raises(DataError, match=r"(?s)a\.jsonl:31: \d+ tokens; data\.max_length is 400.*after a\.jsonl:31"):
        build(settings(stream=True, format="text"), tiny_tokenizer)
    with pytest.raises(DataError, match="no row is left to train on, of 31: 31 rows were longer"):
        build(settings(stream=True, format="text", max_length=2, overflow="drop"), tiny_tokenizer)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl: no rows"):
        build(settings(stream=True, format="text"), tiny_tokenizer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"valid": 0.1}, r"valid: a share \(0\.1\).*a file of their own"),
        ({"shots": 3}, "shots draws from all rows.*leave stream out"),
        ({"cache": False}, "leave cache: false out"),
        ({"train": "python:rows"}, r"data\.train: rows that a program gives are in memory already"),
        ({"train": "a.csv"}, r"data\.train: .*a \.csv file is read whole.*convert it"),
        ({"objective": "ppo", "format": "prompts"}, r"data\.stream: is for the objectives sft"),
        ({"objective": "preference", "format": "preference", "preference.loss": "kto"}, r"data\.stream: loss kto"),
        ({"objective": "preference", "format": "preference", "preference.precompute": True}, r"preference\.precompute"),
    ],
    ids=str,
)
def test_what_needs_all_rows_is_refused(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    save_rows(tmp_path / "a.jsonl", 5)
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "r.py").write_text("def f(prompts, completions, rows):\n    return [0.0]\n")
    if changes.get("train") == "a.csv":
        changes = {**changes, "train": str(tmp_path / changes["train"])}
    if changes.get("objective") == "ppo":
        changes = {**changes, "rewards.function": f"{tmp_path}/r.py:f"}
    with pytest.raises(ConfigError, match=said):
        build(settings(stream=True, **changes), tiny_tokenizer)


def test_a_tokenizer_that_cannot_be_compared_is_refused(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_rows(tmp_path / "a.jsonl", 5)
    monkeypatch.setattr(dataset, "encoding_key", lambda *_: None)
    with pytest.raises(ConfigError, match=r"data\.stream: .*no tokenizer\.json"):
        build(settings(stream=True), tiny_tokenizer)


# --- mixtures


def mixture(rows: dict[str, int], weights: dict[str, str], seed: int = 0) -> Mixture:
    starts = np.cumsum([0, *rows.values()]).tolist()
    sizes = np.arange(starts[-1], dtype=np.int32)
    return Mixture({name: Fraction(weights[name]) for name in rows}, tuple(starts), sizes, sizes, seed)


@pytest.mark.invariant
@pytest.mark.parametrize("weight", ["1", "2", "0.5", "0.3", "0.07", "2.7", "3.333"])
@pytest.mark.parametrize("rows", [15, 40, 101])
def test_a_source_is_used_as_its_weight_says(weight: str, rows: int) -> None:
    """After every epoch weight x rows x epochs of them, to the row; no row twice more than another."""
    mixed = mixture({"a": 20, "b": rows}, {"a": "1", "b": weight})
    uses: Counter[int] = Counter(dict.fromkeys(range(20, 20 + rows), 0))
    previous: list[int] = []
    for epoch in range(12):
        drawn = mixed.epoch(epoch).tolist()
        assert Counter(row for row in drawn if row < 20) == Counter(range(20))
        uses.update(row for row in drawn if row >= 20)
        assert uses.total() == int((epoch + 1) * Fraction(weight) * rows)
        assert max(uses.values()) - min(uses.values()) <= 1
        assert drawn != previous or weight in ("1", "2")
        previous = drawn
        assert mixture({"a": 20, "b": rows}, {"a": "1", "b": weight}).epoch(epoch).tolist() == drawn
    if weight == "0.5":  # which rows come together is drawn for each pass
        sets = [frozenset(mixed.epoch(epoch).tolist()) for epoch in range(12)]
        assert len(set(sets)) == 12
    other = mixture({"a": 20, "b": rows}, {"a": "1", "b": weight}, seed=1)
    assert other.epoch(0).tolist() != mixed.epoch(0).tolist()


@pytest.mark.invariant
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_an_epoch_of_a_mixture(
    settings: Callable[..., Config], tiny_model: Loaded, tmp_path: Path, stream: bool, objective: str
) -> None:
    tiny_tokenizer, model = tiny_model.tokenizer, tiny_model.model
    format = "messages" if objective == "sft" else "preference"
    save_rows(tmp_path / "a.jsonl", 30, format)
    mix = {}
    for name, count, weight in (("b", 10, 2), ("c", 25, 0.4)):
        mix[name] = {"path": save_rows(tmp_path / f"{name}.jsonl", count, format, 100), "weight": weight}
    built = build(settings(objective, format=format, stream=stream, mix=mix), tiny_tokenizer)
    wanted = {"a": 30, "b": 20, "c": 10}
    for epoch, seen in enumerate(by_epoch(built, 3, model)):
        assert Counter(row[0] for row in seen) == wanted, epoch
        assert set(Counter(row for row in seen if row[0] == "b").values()) == {2}
    # The steps count what they use.
    fresh = build(settings(objective, format=format, stream=stream, mix=mix), tiny_tokenizer)
    sums = Counter[str]()
    tokens = trained = 0
    for step in islice(fresh.steps(model), fresh.steps_per_epoch()):
        sums.update({name: rows for name, (rows, _, _) in step.sources.items()})
        assert sum(t for _, t, _ in step.sources.values()) <= sum(b.tokens for b in step.micro_batches)
        tokens += sum(t for _, t, _ in step.sources.values())
        trained += sum(t for _, _, t in step.sources.values())
    assert dict(sums) == {"train": 30, "b": 20, "c": 10}
    counts = fresh.summary().counts
    kind, of = ("rows", "trained tokens") if objective == "sft" else ("pairs", "response tokens")
    assert [counts[f"{kind} of {name}"] for name in sums] == [30, 20, 10]
    assert counts[kind] == 60
    assert counts["tokens"] == tokens
    assert counts[of] == trained == sum(counts[f"{of} of {name}"] for name in sums)


def test_a_mixture_in_memory_and_streamed_are_the_same(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save_rows(tmp_path / "a.jsonl", 30)
    mix = {"b": {"path": save_rows(tmp_path / "b.jsonl", 12, start=50), "weight": 0.3}}
    memory, stream = (build(settings(stream=on, mix=mix), tiny_tokenizer) for on in (False, True))
    assert taken(memory, 30) == taken(stream, 30)
    assert memory.summary() == stream.summary()


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_each_source_is_read_by_its_own_format_and_fields(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path, format: str
) -> None:
    """Given, or found where its rows do not fit those of data.train; a resumed run keeps what was found."""
    save_rows(tmp_path / "a.jsonl", 9)
    asked = [{"Kunde": "k", "Anliegen": f"the {i}", "Reaktion": "is of it"} for i in range(8)]
    mix = {
        "b": {"path": save(tmp_path / "b.jsonl", asked), "fields": {"prompt": "Anliegen", "completion": "Reaktion"}},
        "c": {"path": save_rows(tmp_path / "c.jsonl", 7, "alpaca")},
        "d": {"path": save_rows(tmp_path / "d.jsonl", 6, start=40)},
        "e": {"path": save_rows(tmp_path / "e.jsonl", 5, "text"), "format": "text"},
    }
    mix["b"] |= {} if format == "auto" else {"format": "prompt-completion"}
    mix["c"] |= {} if format == "auto" else {"format": "auto"}
    valid = {"path": str(tmp_path / "b.jsonl"), "format": "text", "fields": {"text": "{Anliegen}: {Reaktion}"}}
    config = settings(format=format, mix=mix, valid=valid)
    found = dataset.with_format(config).data
    assert list(found.formats.values()) == ["messages", "prompt-completion", "alpaca", "messages", "text", "text"]
    assert found.mix["d"].format is None, "its rows fit data.train"
    assert found.notes[-1] == "c: rows are read as data.format: alpaca"
    assert config.data.as_begun(found).model_dump() == found.model_dump()
    memory, stream = (build(settings(format=format, mix=mix, valid=valid, stream=on), tiny_tokenizer) for on in (0, 1))
    assert taken(memory, 30) == taken(stream, 30)
    assert rows_of(memory, valid=True) == rows_of(stream, valid=True)
    assert memory.summary().counts["rows"] == 35
    assert (
        tiny_tokenizer.decode(rows_of(memory, valid=True)[3][0]).removesuffix("<|im_end|>").endswith("the 3: is of it")
    )


def test_a_source_that_is_read_wrong_names_its_own_settings(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save_rows(tmp_path / "a.jsonl", 9)
    rows = [{"x": f"q {i}", "y": f"a {i}"} for i in range(8)]
    odd = save(tmp_path / "odd.jsonl", rows)
    for at, changes in (("data.mix.b", {"mix": {"b": {"path": odd}}}), ("data.valid", {"valid": odd})):
        with pytest.raises(DataError, match=rf"{at}.*odd.*\n.*\n  {at}.format=(\S+) '{at}.fields=(.*)'\n") as error:
            build(settings(format="auto", **changes), tiny_tokenizer)
        format, fields = re.search(r"format=(\S+) '\S+fields={(.*)}'", str(error.value)).groups()  # type: ignore[union-attr]
        own = {"path": odd, "format": format, "fields": dict(part.split(": ") for part in fields.split(", "))}
        build(
            settings(format="auto", **({"valid": own} if at == "data.valid" else {"mix": {"b": own}})), tiny_tokenizer
        )
    wrong = {"path": odd, "format": "prompt-completion", "fields": {"prompt": "x", "completion": "z"}}
    with pytest.raises(ConfigError, match=r"data\.mix\.b\.fields\.completion is 'z'"):
        build(settings(mix={"b": wrong}), tiny_tokenizer)
    with pytest.raises(
        DataError, match=r"1 file has other columns: odd\.jsonl; .*: data\.mix\.odd\.path=\S+odd\.jsonl"
    ):
        build(settings(format="auto", train=[str(tmp_path / "a.jsonl"), odd]), tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"data\.mix\.b\.format: preference is not for objective sft"):
        build(settings(mix={"b": {"path": odd, "format": "preference"}}), tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"data\.valid: pat: no such setting \(did you mean path"):
        settings(valid={"path": odd, "pat": odd})


def test_validation_rows_are_held_out_of_data_train_alone(
    settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save_rows(tmp_path / "a.jsonl", 20)
    mix = {"b": {"path": save_rows(tmp_path / "b.jsonl", 12, start=50)}}
    for changes, rows in (({"valid": 0.25}, 15), ({"shots": 4}, 4)):
        built = build(settings(mix=mix, **changes), tiny_tokenizer)
        assert built.summary().counts["rows of train"] == rows
        assert built.summary().counts["rows of b"] == 12
    assert {row[2][0] for row in rows_of(build(settings(mix=mix, valid=0.25), tiny_tokenizer), valid=True)} == {"a"}


def test_sources_that_cannot_be_mixed(settings: Callable[..., Config], tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_rows(tmp_path / "a.jsonl", 5)
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "r.py").write_text("def f(prompts, completions, rows):\n    return [0.0]\n")

    def mixes(source: dict[str, Any], name: str = "b", **changes: Any) -> None:
        build(settings(mix={name: source}, **changes), tiny_tokenizer)

    a = str(tmp_path / "a.jsonl")
    for on in (False, True):
        with pytest.raises(DataError, match=r"none\.jsonl: no rows"):
            mixes({"path": str(tmp_path / "none.jsonl")}, stream=on)
        with pytest.raises(ConfigError, match=r"data\.mix\.b\.path: .*no such file"):
            mixes({"path": str(tmp_path / "missing.jsonl")}, stream=on)
        with pytest.raises(ConfigError, match=r"data\.mix\.b\.weight: 0\.1 of 5 rows.*at least 0\.2"):
            mixes({"path": a, "weight": 0.1}, stream=on)
    with pytest.raises(ConfigError, match=r"data\.mix\.b\.weight: .*greater than 0"):
        mixes({"path": a, "weight": 0})
    with pytest.raises(ConfigError, match=r"train is the name of the rows of data\.train"):
        mixes({"path": a}, "train")
    with pytest.raises(ConfigError, match=r"data\.mix: is for the objectives sft"):
        mixes({"path": a}, objective="ppo", format="prompts", **{"rewards.function": f"{tmp_path}/r.py:f"})
    with pytest.raises(ConfigError, match=r"data\.mix: loss kto"):
        mixes({"path": a}, objective="preference", format="preference", **{"preference.loss": "kto"})
    with pytest.raises(ConfigError, match=r"data\.mix: objective .* one source"):
        dataset.load_encoded(settings(mix={"b": {"path": a}}), tiny_tokenizer)


def test_plans_of_more_rows_than_are_packed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to that number the plan is the one of all rows, as runs that are resumed have begun."""
    lengths = np.random.default_rng(0).integers(2, 60, 100)
    whole = pack_epoch(lengths, width=64, rows=2, seed=0)
    monkeypatch.setattr(dataset, "PACKED", 100)
    assert pack_epoch(lengths, width=64, rows=2, seed=0) == whole
    monkeypatch.setattr(dataset, "PACKED", 30)
    parts = pack_epoch(lengths, width=64, rows=2, seed=0)
    assert isinstance(parts, Plan)
    assert sorted(row for slot in parts for row in slot.rows) == list(range(100))
    assert parts.sums(lengths).tolist() == [sum(lengths[list(slot.rows)]) for slot in parts]
