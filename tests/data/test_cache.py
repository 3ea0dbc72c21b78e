"""Encoded rows come back from the disk as they were, whatever stands there, and only where nothing has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxft.data import dataset
from mlxft.data.chat import set_day
from mlxft.data.dataset import Dataset, Encoded, data_fingerprint, encode_rows
from mlxft.data.formats import Completion, Conversation, Example, Text
from mlxft.errors import DataError
from mlxft.files import temporary

Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of rows that were really encoded."""
    calls: list[str] = []
    real = dataset.encode

    def watched(item: Any, tokenizer: Any, where: str, *rest: Any) -> list[Encoded]:
        calls.append(where)
        return real(item, tokenizer, where, *rest)

    monkeypatch.setattr(dataset, "encode", watched)
    return calls


def examples(n: int = 3, name: str = "a.jsonl", answer: str = "Yes.") -> list[Example]:
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]
    return [Example(f"{name}:{i}", Conversation(turns[:1] * i + turns)) for i in range(n)]


def make(rows: list[Example], tok: Any, **options: Any) -> Dataset[Encoded]:
    return encode_rows(
        rows, tok, **{"train_on": "assistant", "max_length": 500, "overflow": "error", "cache": True, **options}
    )


def same(a: Dataset[Encoded], b: Dataset[Encoded]) -> bool:
    return a.counts == b.counts and [(r.ids.tolist(), r.trained.tolist(), r.where, r.ends) for r in a.rows] == [
        (r.ids.tolist(), r.trained.tolist(), r.where, r.ends) for r in b.rows
    ]


def key(rows: list[Example], tok: Any, train_on: str, chat: bool) -> str | None:
    return dataset.encoding_key(data_fingerprint(rows), tok, train_on, chat)


def test_the_second_time_nothing_is_encoded(tokenizer: Make, folder: Path, encoded: list[str]) -> None:
    first = make(examples(), tokenizer("chatml"))
    assert len(encoded) == 3
    again = make(examples(), tokenizer("chatml"))
    assert len(encoded) == 3
    assert same(first, again)
    for row, other in zip(first.rows, again.rows):
        assert (row.ids.dtype, row.trained.dtype) == (other.ids.dtype, other.trained.dtype) == (np.int32, np.bool_)
    assert len(list(folder.iterdir())) == 1


def test_rows_that_become_several_keep_their_places(tokenizer: Make, folder: Path, encoded: list[str]) -> None:
    """A template that drops earlier thoughts makes a row of each turn."""
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]
    rows = [Example(f"a:{i}", Conversation(turns * 2)) for i in range(2)]
    tok = tokenizer("qwen3", thinking=True)
    first = make(rows, tok)
    assert [row.where for row in first.rows] == ["a:0", "a:0", "a:1", "a:1"]
    assert same(first, make(rows, tok))
    assert len(encoded) == 2


def test_another_place_or_length_needs_no_encoding(tokenizer: Make, folder: Path, encoded: list[str]) -> None:
    tok = tokenizer("chatml")
    make(examples(), tok)
    moved = make(examples(name="elsewhere.jsonl"), tok)
    assert [row.where for row in moved.rows] == [f"elsewhere.jsonl:{i}" for i in range(3)]
    assert make(examples(), tok, max_length=30, overflow="drop").counts.dropped == 2
    with pytest.raises(DataError, match=r"a\.jsonl:2: 50 tokens; data\.max_length is 40"):
        make(examples(), tok, max_length=40)
    assert len(encoded) == 3


def test_whatever_encoding_depends_on_is_seen(
    tokenizer: Make, folder: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tok = tokenizer("chatml")
    keys = [
        key(examples(), tok, "assistant", True),
        key(examples(answer="No."), tok, "assistant", True),
        key(examples()[::-1], tok, "assistant", True),
        key(examples(2), tok, "assistant", True),
        key(examples(), tok, "last", True),
        key(examples(), tok, "assistant", False),
        key(examples(), tokenizer("chatml", bos=True), "assistant", True),
        key(examples(), tokenizer("llama3"), "assistant", True),
        key([Example("a", Text("xy"))], tok, "assistant", True),
        key([Example("a", Completion("x", "y"))], tok, "assistant", True),
    ]
    monkeypatch.setattr(dataset, "version", lambda package: "0")
    keys.append(key(examples(), tok, "assistant", True))
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_a_template_that_writes_the_date_is_encoded_daily(tokenizer: Make) -> None:
    import copy

    tok = copy.deepcopy(tokenizer("chatml"))
    tok._tokenizer.chat_template += "{# strftime_now('%d') #}"
    found = []
    for day in (date(2026, 1, 1), date(2026, 1, 2)):
        for asked in (tok, plain := copy.deepcopy(tokenizer("chatml"))):
            set_day(asked, day)
        found.append((key(examples(), tok, "assistant", True), key(examples(), plain, "assistant", True)))
    (dated, undated), (later, same_as_before) = found
    assert dated != later
    assert undated == same_as_before


def test_a_tokenizer_that_can_not_be_compared_is_not_cached(tokenizer: Make, folder: Path, encoded: list[str]) -> None:
    class Slow:
        """As mlx-lm's wrapper, around something without a tokenizer.json."""

        def __getattr__(self, name: str) -> Any:
            if name in ("_tokenizer", "is_fast", "backend_tokenizer"):
                raise AttributeError(name)
            return getattr(tokenizer("none"), name)

    for _ in range(2):
        make([Example("a", Text("abc"))], Slow(), train_on="all")
    assert len(encoded) == 2
    assert not folder.exists()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = bytearray()
    elif how == "cut":
        data = data[: len(data) // 2]
    elif how == "bit":
        data[data.index(b"ids.npy") + 200] ^= 1  # within the numbers of ids
    elif how == "text":
        data = bytearray(b"not an archive")
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["empty", "cut", "bit", "text", "other arrays", "other numbers", "folder"])
def test_a_damaged_entry_is_encoded_again(tokenizer: Make, folder: Path, encoded: list[str], how: str) -> None:
    tok = tokenizer("chatml")
    first = make(examples(), tok)
    (entry,) = folder.iterdir()
    if how == "other arrays":
        np.savez(entry, ids=np.zeros(3))
    elif how == "other numbers":
        one = np.ones(1, dtype=np.int64)
        np.savez(entry, ids=one, trained=one, lengths=one, sources=one * 9)
    elif how == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        damage(entry, how)
    assert same(first, make(examples(), tok))
    assert len(encoded) == 6
    assert same(first, make(examples(), tok))
    assert len(encoded) == (9 if how == "folder" else 6), "what can be rewritten is whole again"
    assert not list(folder.glob(".tmp-*"))


def test_a_folder_that_can_not_be_written_changes_nothing(
    tokenizer: Make, folder: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("a file stands in the way")
    first = make(examples(), tokenizer("chatml"))
    assert same(first, make(examples(), tokenizer("chatml")))
    assert len(encoded) == 6
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_leaves_nothing(
    tokenizer: Make, folder: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, **arrays: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    make(examples(), tokenizer("chatml"))
    assert list(folder.iterdir()) == []


def test_rows_that_can_not_be_encoded_are_told_each_time(tokenizer: Make, folder: Path) -> None:
    bad = [Example("a:1", Conversation([{"role": "system", "content": "x"}, *examples(1)[0].item.messages]))]
    for _ in range(2):
        with pytest.raises(DataError, match=r"^a:1: "):
            make([*examples(), *bad], tokenizer("gemma"))
    assert not folder.exists()


def test_switched_off(tokenizer: Make, folder: Path, encoded: list[str]) -> None:
    for _ in range(2):
        make(examples(), tokenizer("chatml"), cache=False)
    assert len(encoded) == 6
    assert not folder.exists()


def test_the_entries_used_last_stay(tokenizer: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer("chatml")
    names = []
    for i, answer in enumerate(("a", "b", "c")):
        make(examples(answer=answer), tok)
        (new,) = {p.name for p in folder.iterdir()} - set(names)
        names.append(new)
        os.utime(folder / new, (1000 + i, 1000 + i))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    busy, dead = (temporary(folder / "x.npz", pid) for pid in (os.getppid(), ended.pid))
    for unfinished in (busy, dead):
        unfinished.write_bytes(b"x")
    size = (folder / names[0]).stat().st_size
    make(examples(answer="a"), tok)  # used: now the newest
    monkeypatch.setattr(dataset, "LIMIT", 3 * size + size // 2)
    make(examples(answer="d"), tok)
    left = {p.name for p in folder.iterdir()}
    assert len(left) == 4
    assert {names[0], names[2], busy.name} < left


def test_where_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLXFT_CACHE", str(tmp_path))
    assert dataset.cache_folder() == tmp_path
    monkeypatch.delenv("MLXFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert dataset.cache_folder() == tmp_path / "home" / ".cache" / "mlxft" / "tokens"


_WRITER = """
import numpy as np
from mlxft.data.dataset import Encoded, write_cache
rows = [Encoded(np.arange(5000, dtype=np.int32), np.ones(5000, dtype=np.bool_), "x") for _ in range(40)]
for _ in range(30):
    write_cache("entry", rows, range(40))
"""


def test_two_processes_write_one_entry(folder: Path) -> None:
    """At no moment is there an entry that is not whole."""
    places = [Example(f"a:{i}", Text("x")) for i in range(40)]
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER], stderr=subprocess.PIPE) for _ in range(2)]
    entry, seen, deadline = folder / "entry.npz", 0, time.monotonic() + 60
    while any(w.poll() is None for w in writers) and time.monotonic() < deadline:
        if entry.exists():
            rows = dataset.read_cache("entry", places)
            assert rows is not None
            assert len(rows) == 40
            assert rows[39].ids.tolist() == list(range(5000))
            seen += 1
        time.sleep(0.005)
    assert [w.communicate()[1] for w in writers] == [b"", b""]
    assert seen > 1
    assert [p.name for p in folder.iterdir()] == ["entry.npz"]
    shutil.rmtree(folder)
