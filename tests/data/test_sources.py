"""Every kind of file gives the same rows; what is wrong is said with its place, all at once."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from spreadsheets import xlsx

from mlxft.config import DataSettings, SourceSettings
from mlxft.data.dataset import load_splits, valid_source
from mlxft.data.sources import SPLITS, Problem, Row, find_split, read_rows, split_in
from mlxft.errors import ConfigError, DataError

ROWS = [{"text": "one"}, {"text": "café, 東京"}, {"text": 'a "quoted"\nline'}]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows in the kind of file that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        cells = [row["text"].replace('"', '""') for row in rows]
        path.write_text("text\n" + "".join(f'"{cell}"\n' for cell in cells), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]),
        ("a.json", ["a.json[0]", "a.json[1]", "a.json[2]"]),
        ("a.csv", ["a.csv:2", "a.csv:3", "a.csv:4"]),
        ("a.parquet", ["a.parquet:1", "a.parquet:2", "a.parquet:3"]),
    ],
)
def test_same_rows_from_every_kind(tmp_path: Path, name: str, places: list[str]) -> None:
    rows = list(read_rows(str(write(tmp_path / name)), "train"))
    assert rows == [Row(where, data) for where, data in zip(places, ROWS)]


def test_json_file_with_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{"text": "x"}\n\n{"text": "y"}\n')
    assert list(read_rows(str(path), "train")) == [Row("a.json:2", {"text": "x"}), Row("a.json:4", {"text": "y"})]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_byte_order_mark_is_not_data(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.data for row in read_rows(str(path), "train") if isinstance(row, Row)] == ROWS


def test_jsonl_goes_on_after_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\r\n\n{"text": \n[1]\n{"text": "\xff"}\n"s"\n{"text": "y"}')
    rows = list(read_rows(str(path), "train"))
    assert [row.where for row in rows] == [f"a.jsonl:{n}" for n in (1, 3, 4, 5, 6, 7)]
    problems = [row.text for row in rows if isinstance(row, Problem)]
    for text, words in zip(
        problems, ["not valid JSON", "the row is a list", "not UTF-8 (0xff)", "the row is a string"]
    ):
        assert words in text
    assert len(problems) == 4
    assert rows[-1] == Row("a.jsonl:7", {"text": "y"})


def test_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a\u2028b"}])
    assert list(read_rows(str(path), "train")) == [Row("a.jsonl:1", {"text": "a\u2028b"})]


def test_broken_json_array_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "x"},\n{"text" "y"}\n]')
    row, problem = read_rows(str(path), "train")
    assert (row.where, problem.where) == ("a.json[0]", "a.json:3")
    path.write_text('[{"text": "x"}, 3]')
    assert [row.where for row in read_rows(str(path), "train") if isinstance(row, Problem)] == ["a.json[1]"]


def test_csv_places_are_real_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\n"two\nlines",x\n\nonly one\ny,z\n')
    rows = list(read_rows(str(path), "train"))
    assert rows[0] == Row("a.csv:2", {"q": "two\nlines", "a": "x"})
    assert rows[1] == Problem("a.csv:5", "1 columns; the header names 2 (q, a)")
    assert rows[2] == Row("a.csv:6", {"q": "y", "a": "z"})


def test_csv_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q,q\n1,2\n")
    (problem,) = read_rows(str(path), "train")
    assert problem.where == "a.csv:1"
    assert "'q' twice" in str(problem)
    path.write_bytes(b"q\n\xc3\xa9\n\xe9t\xe9\n")
    (problem,) = read_rows(str(path), "train")
    assert problem.where == "a.csv:3"
    path.write_text('q\n"open\n')
    (problem,) = read_rows(str(path), "train")
    assert "not valid CSV" in str(problem)


def test_csv_field_longer_than_the_libraries_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"text": "x" * 200_000}])
    (row,) = read_rows(str(path), "train")
    assert isinstance(row, Row)
    assert len(row.data["text"]) == 200_000


@pytest.mark.parametrize(
    "name", ["train.jsonl", "valid.json", "validation.csv", "val.jsonl", "dev.jsonl", "eval.jsonl", "test.jsonl"]
)
def test_folder_answers_to_its_splits(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    stem = name.split(".")[0]
    split = stem if stem in ("train", "test") else "valid"
    assert [row.data for row in read_rows(str(tmp_path), split) if isinstance(row, Row)] == ROWS
    assert [find_split(tmp_path, other) is None for other in ("train", "valid", "test") if other != split] == [
        True,
        True,
    ]


def test_folder_without_or_with_two_of_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"no file for the valid split.*it has train\.jsonl"):
        read_rows(str(tmp_path), "valid")
    write(tmp_path / "train.csv")
    with pytest.raises(ConfigError, match=r"train\.jsonl and train\.csv could both be the train split"):
        read_rows(str(tmp_path), "train")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"trian\.jsonl: no such file \(did you mean train\.jsonl\?\)"):
        read_rows(str(tmp_path / "trian.jsonl"), "train")
    with pytest.raises(ConfigError, match="no folder"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"), "train")


def test_unknown_suffix_and_split(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ConfigError, match=r"'\.doc'; known are \.jsonl, \.json, \.csv, \.parquet"):
        read_rows(str(tmp_path / "a.doc"), "train")
    for name, way in (
        ("a b.docx", r"textutil -convert txt '.*a b\.docx'"),
        ("a.jsonl.gz", r"gunzip .*name .*a\.jsonl$"),
    ):
        (tmp_path / name).write_text("x")
        with pytest.raises(ConfigError, match=way):
            read_rows(str(tmp_path / name), "train")
    with pytest.raises(ConfigError, match="did you mean train"):
        read_rows(str(tmp_path), "trian")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "text\n"), ("b.csv", "")])
def test_no_rows_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: no rows"):
        list(read_rows(str(tmp_path / name), "train"))


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        list(read_rows(str(tmp_path / "a.parquet"), "train"))


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | None = None) -> list[tuple[Any, ...]]:
    """A `datasets` that knows one data set, and the calls made to it."""
    calls: list[tuple[Any, ...]] = []
    hub = ModuleType("datasets")

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        if name != "org/set":
            raise RuntimeError("404 Client Error")
        return rows or [{"text": "x"}, {"text": "y"}]

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setattr(hub, "get_dataset_split_names", lambda name, config: ["train", "validation"], raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return calls


@pytest.mark.parametrize(
    ("spec", "split", "call"),
    [
        ("hf:org/set", "train", ("org/set", None, "train")),
        ("hf:org/set", "valid", ("org/set", None, "validation")),
        ("hf:org/set:en", "train", ("org/set", "en", "train")),
        ("hf:org/set:test", "train", ("org/set", None, "test")),
        ("hf:org/set:en:extra", "train", ("org/set", "en", "extra")),
        ("hf:org/set:train[:10]", "train", ("org/set", None, "train[:10]")),
        ("hf:org/set:en:train[5%:10%]", "valid", ("org/set", "en", "train[5%:10%]")),
    ],
)
def test_hub_spec(monkeypatch: pytest.MonkeyPatch, spec: str, split: str, call: tuple[Any, ...]) -> None:
    calls = fake_hub(monkeypatch)
    rows = list(read_rows(spec, split))
    assert calls == [call]
    assert rows == [Row(f"org/set:{call[2]}[0]", {"text": "x"}), Row(f"org/set:{call[2]}[1]", {"text": "y"})]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch)
    with pytest.raises(
        DataError, match=r"hf:org/none: could not load it from the hub \(RuntimeError: 404.*download it"
    ):
        list(read_rows("hf:org/none", "train"))
    with pytest.raises(ConfigError, match="no test split; it has train, validation"):
        list(read_rows("hf:org/set", "test"))
    with pytest.raises(ConfigError, match="not a hub data set"):
        list(read_rows("hf:org/set:a:b:c", "train"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'mlxft\[data\]'"):
        list(read_rows("hf:org/set", "train"))


# --- halves of characters


def test_half_a_character_is_a_problem_with_its_place(tmp_path: Path) -> None:
    """One half of an emoji, as a program of UTF-16 cuts it; beside it rows that are well."""
    rows = [
        {"messages": [{"role": "user", "content": "hello \ud83d"}]},
        {"messages": [{"role": "user", "content": "hello \U0001f600, café"}]},
        {"tools": [{"function": {"na\udc00me": "x"}}], "é": 1},
        {"\ud800": "x"},
        {"text": "é", "more": {"deep": [["fine", "a\udfff"]]}},
    ]
    places = [
        "messages[0].content contains half of a character (U+D83D at 6)",
        None,
        "the name 'na\\udc00me' in tools[0].function contains half of a character (U+DC00 at 2)",
        "the name '\\ud800' in the row contains half of a character (U+D800 at 0)",
        "more.deep[0][1] contains half of a character (U+DFFF at 1)",
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        found = list(read_rows(str(tmp_path / name), "train"))
        assert len(found) == len(rows)
        for row, said, data in zip(found, places, rows):
            if said is None:
                assert row.where == (f"{name}:2" if name == "a.jsonl" else f"{name}[1]")
                assert isinstance(row, Row)
                assert row.data == data
            else:
                assert isinstance(row, Problem)
                assert row.text.startswith(said)
                row.text.encode()  # what is said of it can be printed


def test_bytes_that_are_half_a_character(tmp_path: Path) -> None:
    """What other programs put into csv and parquet: the half's own three bytes, which are not UTF-8."""
    half = b"\xed\xa0\xbd"
    (tmp_path / "a.csv").write_bytes(b"text\nfine\nhello " + half + b"\n")
    (problem,) = read_rows(str(tmp_path / "a.csv"), "train")
    assert problem == Problem("a.csv:3", "byte 7 of the line is not UTF-8 (0xed); save the file as UTF-8")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.array([b"fine", b"hello " + half, b"last"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    first, second, third = read_rows(str(tmp_path / "a.parquet"), "train")
    assert (first, third) == (Row("a.parquet:1", {"text": "fine"}), Row("a.parquet:3", {"text": "last"}))
    assert second == Problem("a.parquet:2", "byte 7 of a text is not UTF-8 (0xed); save the file as UTF-8")


def test_half_a_character_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, [{"text": "x"}, {"text": "\ud83d"}])
    first, second = read_rows("hf:org/set", "train")
    assert first == Row("org/set:train[0]", {"text": "x"})
    assert isinstance(second, Problem)
    assert (second.where, second.text[:37]) == ("org/set:train[1]", "text contains half of a character (U+")


# --- Arrow's null keys


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calling(name: str, **arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "in the"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "on"},
    ]


# Case: the tools of one row have other arguments than those of another, at several depths; the last has none.
SPARSE = [
    {"messages": calling("weather", city="Ulm"), "tools": [tool("weather", city={"type": "string"})]},
    {"messages": calling("add", x=1.0, y=2.0), "tools": [tool("add", x={"type": "number"}, y={"type": "number"})]},
    {
        "messages": calling("book", stay={"from": "Monday", "rooms": [{"beds": 2.0}, {"view": "sea"}]}),
        "tools": [tool("book", stay={"type": "object", "properties": {"rooms": {"type": "array"}}}), tool("now")],
    },
    {"messages": calling("now"), "tools": [tool("now")]},
]


def from_arrow(tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, schema: Any = None) -> Any:
    """The rows as parquet and the hub give them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    fake_hub(monkeypatch, table.to_pylist())
    return [[row.data for row in read_rows(spec, "train")] for spec in (str(tmp_path / "a.parquet"), "hf:org/set")]  # type: ignore[union-attr]


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A message's own null fields count as missing wherever they are read."""
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
    return {**row, "messages": turns}


def test_null_keys_of_tools_and_calls_are_gone_at_every_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in from_arrow(tmp_path, SPARSE, monkeypatch):
        assert list(map(without_nulls, found)) == SPARSE


def test_calls_without_a_wrapper_and_tools_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "dialog": [{"function_call": {"name": "a", "arguments": {"x": 1}}}],
            "apis": [{"name": "a", "parameters": {"x": 1}}],
        },
        {
            "dialog": [{"function_call": {"name": "b", "arguments": {"y": 1}}}],
            "apis": [{"name": "b", "parameters": {"y": 1}}],
        },
        {"dialog": [{"function_call": None}], "apis": []},
    ]
    for found in from_arrow(tmp_path, rows, monkeypatch):
        assert found == rows


def test_a_null_elsewhere_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other columns, and in jsonl everywhere."""
    rows = [{"answer": {"a": 1, "b": None}, "text": None}, {"answer": {"a": None, "b": 2}, "text": "x"}]
    for found in from_arrow(tmp_path, rows, monkeypatch):
        assert found == rows
    meant = {"tools": [{"name": "a", "parameters": {"default": None}}], "tool_calls": [{"arguments": {"x": None}}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(meant))
    assert [row.data for row in read_rows(str(tmp_path / "a.jsonl"), "train")] == [meant]  # type: ignore[union-attr]


def test_a_map_of_arrow_is_a_mapping_and_its_nulls_are_meant(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = pa.map_(pa.string(), pa.string())
    call = pa.struct([("name", pa.string()), ("arguments", given), ("id", pa.string())])
    schema = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("tool_calls", pa.list_(call))])))])
    calls = [[("city", "Ulm"), ("day", None)], []]
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "weather", "arguments": own, "id": None}]}]}
        for own in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    found = [row.data["messages"][0]["tool_calls"] for row in read_rows(str(tmp_path / "a.parquet"), "train")]  # type: ignore[union-attr]
    assert found == [
        [{"name": "weather", "arguments": {"city": "Ulm", "day": None}}],
        [{"name": "weather", "arguments": {}}],
    ]


def test_a_text_too_long_to_be_tokenized_at_once(tmp_path: Path) -> None:
    """Tokenizers would take gigabytes for it."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a" * 2**22}) + "\n" + json.dumps({"x": {"text": "a" * (2**22 + 1)}}) + "\n")
    whole, long = read_rows(str(path), "train")
    assert isinstance(whole, Row)
    assert isinstance(long, Problem)
    assert "4,194,305 characters" in long.text


def test_a_pipe_in_a_folder_of_rows_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match="device or a pipe"):
        read_rows(str(tmp_path), "train")


def rows_of(path: Path | list[str] | str, notes: list[str] | None = None) -> list[Row | Problem]:
    return list(read_rows(path if isinstance(path, list) else str(path), "train", notes))


LINES = [f"q{i},a{i}\n" for i in range(20)]


@pytest.mark.parametrize(
    ("line", "wrong", "left"),
    [
        ('x,"y\n', "not valid CSV", 5),  # opens a text that never ends
        ('x,"y" z\n', "not valid CSV", 19),
        ('x,"y\nx,y\nx,y\nx,y\nx,y"\n', "a quote in line 7 swallows the rows up to line 11", 19),
    ],
)
def test_a_stray_quote_swallows_no_rows_in_silence(line: str, wrong: str, left: int, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q,a\n" + "".join([*LINES[:5], line, *LINES[6:]]))
    found = rows_of(path)
    (problem,) = [row for row in found if isinstance(row, Problem)]
    assert problem.where == "a.csv:7"
    assert wrong in problem.text
    assert len(found) == left + 1


def test_texts_of_several_lines_are_no_swallowed_rows(tmp_path: Path) -> None:
    texts = [*(f'q{i},"one\ntwo"\n' for i in range(3)), 'x,"one, two\nthree, four\nfive, six\nseven, eight"\n']
    (tmp_path / "a.csv").write_text("q,a\n" + "".join(texts))
    assert [row.where for row in rows_of(tmp_path / "a.csv") if isinstance(row, Row)] == [
        f"a.csv:{line}" for line in (2, 4, 6, 8)
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "mac_roman"])
@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_csv_in_any_encoding_and_with_any_delimiter(encoding: str, sign: str, tmp_path: Path) -> None:
    lines = ["Frage", "Ort (ungefähr)"], ["Wo liegt Köln?", "am Rhein – westlich"], [f'"x{sign}y"', '"two\nlines"']
    (tmp_path / "a.csv").write_bytes("".join(sign.join(line) + "\n" for line in lines).encode(encoding))
    notes: list[str] = []
    first, second = rows_of(tmp_path / "a.csv", notes)
    assert first == Row("a.csv:2", {"Frage": "Wo liegt Köln?", "Ort (ungefähr)": "am Rhein – westlich"})
    assert second == Row("a.csv:3", {"Frage": f"x{sign}y", "Ort (ungefähr)": "two\nlines"})
    assert len(notes) == (not encoding.startswith("utf-8"))


@pytest.mark.parametrize(
    ("encoding", "named", "text"),
    [
        ("shift_jis", "CP932", "返品はできますか？,はい、三十日以内なら返品できます。"),
        ("gbk", "GB18030", "可以退货吗？,可以，三十天内可以退货。"),
        ("euc_kr", "CP949", "반품할 수 있나요?,네 삼십 일 이내에 가능합니다."),
        ("cp1251", "CP1251", "Можно ли вернуть товар?,Да в течение тридцати дней."),
        ("cp1250", "CP1250", "Czy mogę zwrócić towar?,Tak w ciągu trzydziestu dni możesz go oddać."),
    ],
)
@pytest.mark.parametrize("english", [0, 9])
def test_another_encoding_is_named_once(encoding: str, named: str, text: str, english: int, tmp_path: Path) -> None:
    """And is never read as a Western one, however few its words are."""
    rows = ["question,answer", *["Is it open?,It is."] * english, text, text]
    (path := tmp_path / "a.csv").write_bytes("\n".join(rows).encode(encoding))
    (problem,) = rows_of(path)
    assert isinstance(problem, Problem)
    assert named in problem.text
    assert f" -t UTF-8 {path} > {tmp_path}/a-utf8.csv" in problem.text
    lines = [json.dumps({"text": part}, ensure_ascii=False) for part in text.split(",") * 2]
    (path := tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode(encoding))
    (problem,) = rows_of(path)
    assert isinstance(problem, Problem)
    assert "iconv -f " in problem.text


def test_a_file_with_the_suffix_of_another_kind(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    xlsx(tmp_path / "book.csv", {"S": [["a", "b"], ["1", "2"]]})
    (tmp_path / "text.xlsx").write_text("a,b\n1,2\n")
    for name in ("book.csv", "text.xlsx"):
        notes: list[str] = []
        assert [row.data for row in read_rows(str(tmp_path / name), "train", notes)] == [{"a": "1", "b": "2"}]  # type: ignore[union-attr]
        assert "by its content" in notes[0]
    (tmp_path / "b.csv").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(DataError, match="not a readable spreadsheet"):
        rows_of(tmp_path / "b.csv")


def test_formulas_without_values(tmp_path: Path) -> None:
    """As openpyxl writes them: read as empty, an Answer column would be no column, and its rows prompts."""
    pytest.importorskip("python_calamine")
    rows: list[list[Any]] = [["Question", "Answer"], *([f"Q{i}?", "yes"] for i in range(3)), ["Q4?", ("=A1", None)]]
    xlsx(tmp_path / "few.xlsx", {"S": rows})
    notes: list[str] = []
    assert [row.data["Answer"] for row in read_rows(str(tmp_path / "few.xlsx"), "train", notes)] == ["yes"] * 3 + [""]  # type: ignore[union-attr]
    assert notes == ["few.xlsx: Answer: 1 formula has no value"]
    xlsx(tmp_path / "all.xlsx", {"No": [[None]], "S": [rows[0], *([f"Q{i}?", ("=A1", None)] for i in range(3))]})
    with pytest.raises(DataError, match=r"'Answer': the formulas have no stored value.*save it in a spreadsheet"):
        rows_of(tmp_path / "all.xlsx")
    xlsx(tmp_path / "empty.xlsx", {"S": [rows[0], ["Q?", ("=A1", "")]]})  # a formula whose value is an empty text
    assert len(rows_of(tmp_path / "empty.xlsx")) == 1
    (tmp_path / "a.csv").write_text("Question,Answer\nQ?,#REF!\n")
    with pytest.raises(DataError, match="#REF!"):
        rows_of(tmp_path / "a.csv")


def test_empty_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,\n,,\n1,2,\n , ,\n,,\n3,4,\n,,\n,,\n")
    notes: list[str] = []
    assert [row.where for row in rows_of(tmp_path / "a.csv", notes)] == ["a.csv:3", "a.csv:6"]
    assert notes == ["a.csv: 3 empty rows are left out"], "not those at the end"


def test_several_sheets_and_lists_are_named(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    xlsx(tmp_path / "a b.xlsx", {"One": [["q", "a"], ["1", "2"]], "Two": [["q", "a"], ["3", "4"]]})
    path = tmp_path / "a b.xlsx"
    with pytest.raises(
        DataError, match=r"2 sheets have rows; name one: 'data\.train=.*a b\.xlsx:One' or 'data\.train="
    ):
        rows_of(path)
    assert rows_of(f"{path}:Two") == [Row("a b.xlsx:Two:2", {"q": "3", "a": "4"})]
    with pytest.raises(DataError, match=r"no sheet 'Tow' \(did you mean Two\?\)"):
        rows_of(f"{path}:Tow")
    (tmp_path / "a.json").write_text(json.dumps({"easy": [{"q": "1"}], "hard": [{"q": "2"}]}))
    with pytest.raises(DataError, match=r"2 lists have rows; name one: data\.train=.*a\.json:easy or"):
        rows_of(tmp_path / "a.json")
    assert rows_of(f"{tmp_path / 'a.json'}:hard") == [Row("a.json:hard[0]", {"q": "2"})]


@pytest.mark.parametrize(
    ("text", "encodings"),
    [
        ("質問;営業時間は?九時から", "cp932 euc_jp"),
        ("ログイン;パスワード", "cp932 euc_jp"),
        ("问题;几点开门?上午九点到下午六点", "gb18030"),
        ("問題;幾點開門?上午九點到下午六點", "cp950"),
        ("질문;몇 시에 열어요?", "cp949"),
        ("вопрос;Когда вы открываетесь?", "cp1251 koi8_r cp866 iso8859_5 mac_cyrillic"),
        ("питання;Коли ви відкриваєтеся, їдьте", "cp1251 koi8_u"),
        ("ερώτηση;Πότε ανοίγετε; Εντός τριάντα ημερών", "cp1253"),
        ("שאלה;מתי אתם פותחים?", "cp1255"),
        ("pytanie;proszę przyjść wcześniej żeby łatwo", "cp1250 iso8859_2"),
        ("otázka;přijďte včas", "cp1250 iso8859_2"),
        ("kérdés;Reggel kilenckor, előbb nem", "cp1250"),
        ("soru;şimdiden bekleriz, açıyor", "cp1254"),
        ("question;réponse : déjà là, très près", "cp850"),
    ],
)
def test_a_short_text_shows_its_encoding(tmp_path: Path, text: str, encodings: str) -> None:
    for encoding in encodings.split():
        raw = f"{text}\n{text}\n".encode(encoding)
        (tmp_path / "a.csv").write_bytes(raw)
        (found,) = read_rows(str(tmp_path / "a.csv"), "train")
        assert isinstance(found, Problem)
        named = re.search(r"probably (\S+?)(?: or \S+)?; .*iconv -f (\S+) ", found.text)
        assert named is not None
        assert named[1] == named[2]
        assert raw.decode(named[1]) == raw.decode(encoding)


@pytest.mark.parametrize(
    ("text", "encodings"),
    [
        ("Größe;5 °C ± 2 m² ist schön", "cp1252"),
        ("Frage;Wann öffnen Sie? Früher", "cp1252 mac_roman"),
        ("question;À côté de la gare et très près", "cp1252 mac_roman"),
        ("opções;razão três então", "cp1252"),
        ("Köln und Señor Muñoz;São Paulo garçon Åland", "cp1252"),
        ("maður;að virðingu og þér", "cp1252"),
    ],
)
def test_western_texts_are_read(tmp_path: Path, text: str, encodings: str) -> None:
    for encoding in encodings.split():
        (tmp_path / "a.csv").write_bytes(f"{text}\n{text}\n".encode(encoding))
        notes: list[str] = []
        (row,) = read_rows(str(tmp_path / "a.csv"), "train", notes)
        assert isinstance(row, Row)
        assert ";".join(row.data.values()) == text
        assert notes == [f"a.csv: is not UTF-8 and read as {encoding}; look at a row with accents"]


def test_sheets_and_lists_that_are_named_for_splits_are_a_folders_files(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    book, lists = tmp_path / "a.xlsx", tmp_path / "a.json"
    names = {"Train set": "1", " validation": "2", "test": "3"}
    xlsx(book, {name: [["q"], [q]] for name, q in names.items()} | {"Notes": [["x"], ["y"]]})
    lists.write_text(json.dumps({name: [{"q": q}] for name, q in names.items()}))
    for path in (book, lists):
        for split, q in zip(SPLITS, names.values()):
            notes: list[str] = []
            assert [row.data for row in read_rows(str(path), split, notes) if isinstance(row, Row)] == [{"q": q}]
            assert list(names)[int(q) - 1] + " is read" in notes[0]
        data = DataSettings(train=str(path), format="text", fields={"text": "q"})
        assert valid_source(data) == SourceSettings(path=str(path))
        assert [example.item.text for example in load_splits(data, 0).valid] == ["2"]  # type: ignore[union-attr]
        assert split_in(str(path), "test") == f"{path}:test"
    # A sheet that is called so and is empty has no other in its place; without rows to train on none is meant so.
    xlsx(book, {"train": [["q"], ["1"]], "valid": [["q"]]})
    with pytest.raises(DataError, match="no rows"):
        list(read_rows(str(book), "valid"))
    xlsx(book, {"valid": [["q"], ["1"]], "Other": [["q"], ["2"]]})
    assert not split_in(str(book), "valid")
    with pytest.raises(DataError, match=r"2 sheets have rows; name one: data\.train=\S+:valid or"):
        list(read_rows(str(book), "train"))


def test_merged_cells_dates_numbers_and_formulas_are_what_they_show(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    cells = [
        ["q", "a", "day"],
        ["one", 42, (46000,)],
        [None, ("=1/8", "0.125"), (46000.75,)],
        ["x", 1.5, None],
    ]
    xlsx(tmp_path / "a.xlsx", {"S": cells}, merged="A2:A3")
    assert [row.data for row in rows_of(tmp_path / "a.xlsx") if isinstance(row, Row)] == [
        {"q": "one", "a": "42", "day": "2025-12-09"},
        {"q": "one", "a": "0.125", "day": "2025-12-09 18:00:00"},
        {"q": "x", "a": "1.5", "day": ""},
    ]


def test_several_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", ROWS[:1])
    first, second = (str(tmp_path / folder / "a.jsonl") for folder in ("one", "two"))
    assert [row.where for row in rows_of([first, second])] == [f"{first}:1", f"{second}:1"], "places that differ"
    assert rows_of(str(tmp_path / "*" / "*.jsonl")) == rows_of([first, second])
    for spec, said in (
        ([first, first], "named twice"),
        ([], "names no file"),
        (str(tmp_path / "*.csv"), "no file match"),
    ):
        with pytest.raises(ConfigError, match=said):
            rows_of(spec)
    assert rows_of(tmp_path / "one") == rows_of(first.replace("a.jsonl", "*.jsonl")), "the only file of a folder"
    (tmp_path / "one" / "b.jsonl").touch()
    with pytest.raises(ConfigError, match=r"by a pattern: .*one/\*\.jsonl"):
        rows_of(tmp_path / "one")


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# B\r\n\r\nShort.\n", newline="")
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} " + "word " * 200 for i in range(12)))
    notes: list[str] = []
    found = [row for row in rows_of(tmp_path, notes) if isinstance(row, Row)]
    assert [row.where for row in found] == ["a.txt[0]", "a.txt[1]", "a.txt[2]", "a.txt[3]", "b.md"]
    assert [row.data["text"].split()[0] for row in found] == ["0", "3", "6", "9", "#"], "cut between paragraphs"
    assert found[-1].data == {"text": "# B\n\nShort."}
    assert notes == ["a.txt: 12,047 characters in 4 rows, cut between paragraphs, each of at most 4,000 characters"]


def test_a_tree_of_messages_becomes_conversations(tmp_path: Path) -> None:
    said = [
        ("1", None, "prompter", None),
        ("2", "1", "assistant", 1),
        ("3", "1", "assistant", 0),
        ("4", "3", "prompter", 0),
    ]
    rows = [{"message_id": i, "parent_id": p, "role": role, "rank": rank, "text": f"t{i}"} for i, p, role, rank in said]
    (row,) = rows_of(write(tmp_path / "a.jsonl", rows))
    assert isinstance(row, Row)
    assert [turn["content"] for turn in row.data["messages"]] == ["t1", "t3"]


def test_exported_chats_without_a_completion_are_counted(tmp_path: Path) -> None:
    chats = [
        {"chat_messages": [{"sender": who, "text": who} for who in some]}
        for some in (["human"], ["human", "assistant"])
    ]
    (tmp_path / "a.json").write_text(json.dumps(chats))
    notes: list[str] = []
    (row,) = rows_of(tmp_path / "a.json", notes)
    assert row.where == "a.json[1]"
    assert notes == ["a.json: 1 of 2 exported chats have no completion in text and are left out"]


def test_json_is_decoded_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that pieces of the file cut anywhere, and numbers at their ends."""
    rows = [{"text": f"é{i} " * 3, "n": [i, i * 1.5, None, {"x": "}],["}]} for i in range(30)]
    (tmp_path / "a.json").write_text(f" [ {' , '.join(map(json.dumps, rows))} ]\n", "utf-8")
    (tmp_path / "b.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows) + "\n 12345")
    for chunk in (1, 7, 64):
        monkeypatch.setattr("mlxft.data.sources._CHUNK", chunk)
        assert [row.data for row in rows_of(tmp_path / "a.json") if isinstance(row, Row)] == rows
        *found, last = rows_of(tmp_path / "b.json")
        assert [row.data for row in found if isinstance(row, Row)] == rows
        assert last == Problem("b.json[30]", "the row is a number; expected an object with named fields, {...}")
    (tmp_path / "a.json").write_text('[{"text": "x"}\n{"text": "y"}]')
    assert rows_of(tmp_path / "a.json")[1] == Problem("a.json:2", "not valid JSON: expected ',' at column 1")
