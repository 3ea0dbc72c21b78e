"""Recipes, overrides and rows that no one means: one message each, at once, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import dump_yaml, load_config, read_yaml

Refused = Callable[..., str]
NESTED = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGED = "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}]}}\n" for i in range(1, 40))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 150))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NESTED, "aliases"),
        (MERGED, "aliases"),
        (CHAIN, "nested too deep"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a: " + "[" * 150 + "]" * 150, "nested too deep"),
        ("[" * 50_000, "not valid YAML"),
        ("#" * 300_000, "more than 262,144 characters"),
        ("x: \x1b[2J\n", "special characters are not allowed"),
    ],
    ids=["aliases", "merges", "chain", "self", "nested", "endless", "long", "escape"],
)
def test_recipes_that_make_much_of_little(text: str, said: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, "utf-8")
    for command in ("check", "train", "sweep"):
        err = refused(2, command, str(tmp_path / "bad.yaml"))
        assert said in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"run.name={'x' * 300}", "longer than 200 bytes"),
        ('run.name="a\\0"', "NUL"),
        ('run.name="a\\e[2J"', "run.name: does not fit"),
        ('run.name="\\ud83d"', "half of a character"),
        (f"run.dir={'x' * 300}", "run.dir: the path is too long"),
        (f"model.adapter={'x/' * 3000}", "model.adapter: the path is too long"),
        (f"model.path={'x' * 300}", "model.path: the path is too long"),
        (f"data.train={'x/' * 3000}", "data.train: the path is too long"),
        (f"data.valid={'x' * 300}", "data.valid: the path is too long"),
        ('model.path="a\\0"', "model.path: contains the character NUL"),
        ('run.sample_prompts=["\\ud83d"]', "half of a character"),
        ("memory.limit=1e308", "memory.limit: "),
        ("memory.cache=1e308", "memory.cache: "),
        (f"run.steps=1{'0' * 400}", "401 digits"),
        (f"run.steps=1{'0' * 5000}", "not valid YAML"),
        (f"tune.layers=[1{'0' * 400}]", "401 digits"),
        ("run.epochs=1e12", "run.epochs: "),
        ("tune.rank=2147483648", "tune.rank: "),
        ("tune.rank=100000000", "tune.rank: "),
        ("data.max_length=1000000000000", "data.max_length: "),
        ("tune.targets=[]", "targets is empty"),
        ("tune.targets=''", "targets is empty"),
        ("objective=''", "no such objective ''"),
        (f"{'.'.join('a' * 3000)}=1", "3,000 parts"),
        (f"{'x' * 100_000}=1", "no such setting"),
        ("model.chat_template=/dev/zero", "a device or a pipe"),
        ("data.train=/dev/zero", "a device or a pipe"),
        ("data.train=hf:../..", "is not a name of a data set"),
        ("data.train=hf:/etc", "is not a name of a data set"),
        ("data.train=hf:org/name", "there is a file or folder org/name here"),
        ("run.steps=1:30", "run.steps: "),
    ],
    ids=lambda value: value[:40],
)
def test_settings_that_no_one_means(
    override: str, said: str, write: Callable[..., str], refused: Refused, tmp_path: Path
) -> None:
    recipe = write()
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_text('{"text": "local"}\n', "utf-8")
    for command in ("check", "train"):
        err = refused(2, command, recipe, override)
        assert said in err
        assert len(err) < 600
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("rewards", [{"adapter": "x" * 5000}, {"function": "x" * 300 + ".py:f"}], ids=str)
def test_rewards_of_names_that_no_file_can_have(
    rewards: dict[str, str], write: Callable[..., str], refused: Refused
) -> None:
    recipe = write(objective="ppo", rewards=rewards, **{"data.format": "prompts"})
    for command in ("check", "train"):
        assert f"rewards.{next(iter(rewards))}: the path is too long" in refused(2, command, recipe)


@pytest.mark.parametrize("command", ["generate hi --model", "push a/b", "train", "fuse out", "runs show"])
def test_names_on_a_command_line_that_no_file_can_have(command: str, refused: Refused) -> None:
    first, *rest = command.split()
    at = {"push": 0, "fuse": 0}.get(first, len(rest))
    said = refused(2, first, *rest[:at], "x" * 300, *rest[at:]).splitlines()[
        -1
    ]  # below click's usage, where it is click's
    assert "the path is too long: " in said or "File name too long" in said
    assert len(said) < 600


@pytest.mark.parametrize("kind", ["prompts", "samples", "max_tokens"])
def test_counts_of_a_rollout(kind: str, write: Callable[..., str], refused: Refused) -> None:
    on_policy = {"objective": "ppo", "data.format": "prompts", "rewards": {"rules": [{"kind": "length", "max": 3}]}}
    assert f"rollout.{kind}: " in refused(2, "check", write(**on_policy), f"rollout.{kind}=1000000000000")
    assert "ppo.epochs: " in refused(2, "check", write(**on_policy), "ppo.epochs=1000000000000")


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, "/dev/zero"])
def test_schemas_without_end(schema: Any, write: Callable[..., str], refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', "utf-8")
    rules = {"rules": [{"kind": "json_schema", "schema": schema}]}
    changes = {"data.train": "prompts.jsonl", "data.format": "prompts", "objective": "ppo", "rewards": rules}
    assert "rewards.rules[0].schema: " in refused(2, "check", write(**changes, **{"rollout.max_tokens": 4}))


def test_what_check_accepts_of_extremes_train_begins(write: Callable[..., str], mlxft: Callable[..., Any]) -> None:
    many = ["run.keep=1000000000000", "optim.warmup=1e308", "batch.accumulate=1000000000000", "memory.limit=1e6"]
    for command in ("check", "train"):
        assert mlxft(command, write(), *many).code == 0


def test_many_epochs_are_not_planned_one_by_one(write: Callable[..., str], mlxft: Callable[..., Any]) -> None:
    done = mlxft("check", write(**{"run.steps": None}), "run.epochs=1e6", "--json")
    assert json.loads(done.out)["steps"] == 5_000_000


def test_a_rank_that_does_not_fit_is_refused_before_it_is_made(write: Callable[..., str], refused: Refused) -> None:
    err = refused(2, "train", write(), "tune.rank=65536", "memory.limit=0.02")
    assert "training needs" in err


def test_files_that_are_none(write: Callable[..., str], refused: Refused, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = write()
    os.mkfifo(tmp_path / "fifo.jsonl")
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for rows in ("fifo.jsonl", "zero.jsonl"):
        for args in (["check", recipe, f"data.train={rows}"], ["check", recipe, f"data.valid={rows}"]):
            assert "a device or a pipe" in refused(2, *args)
        assert "a device or a pipe" in refused(2, *["eval", str(tiny_model_dir), rows])
    for name in ("fifo.yaml", "zero.yaml"):
        assert "a device or a pipe" in refused(2, *["train", name])
        task = ["eval", str(tiny_model_dir), "rows-10.jsonl", "--task", name]
        assert "a device or a pipe" in refused(2, *task)


DEEP, LONG = "[" * 150 + "]" * 150, "9" * 5000


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.jsonl", '{"messages": [], "a": 1, "a": 2}', "x.jsonl:1: not valid JSON: the key 'a' is given twice"),
        ("x.jsonl", '{"messages": [{"role": "user", "role": "system"}]}', "the key 'role' is given twice"),
        ("x.json", '[{"a": 1, "a": 2}]', "the key 'a' is given twice"),
        ("x.json", f'[{{"a": {LONG}}}]', "not valid JSON: Exceeds the limit"),
        ("x.jsonl", f'{{"a": {LONG}}}', "x.jsonl:1: not valid JSON: Exceeds the limit"),
        ("x.jsonl", f'{{"a": {DEEP}}}', "nested more than 100 deep"),
        ("x.json", f'[{{"a": {DEEP}}}]', "nested more than 100 deep"),
        ("x.jsonl", '{"a": ' + "[" * 100_000, "not valid JSON"),
        ("x.parquet", "PAR1 damaged PAR1", "x.parquet: not a readable parquet file"),
        ("x.jsonl", '{"text": "\\ud83d"}', "half of a character"),
    ],
)
def test_rows_that_no_one_means(
    name: str, text: str, said: str, write: Callable[..., str], refused: Refused, tmp_path: Path
) -> None:
    recipe = write()
    (tmp_path / name).write_text(text, "utf-8")
    for command in ("check", "train"):
        err = refused(1, command, recipe, f"data.train={name}")
        assert said in err
        assert len(err) < 600


def test_damaged_parquet_is_refused_wherever_it_is_damaged(
    write: Callable[..., str], mlxft: Callable[..., Any], tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    recipe = write(**{"data.format": "text"})
    pq.write_table(pa.table({"text": ["a b c"] * 50, "n": list(range(50))}), tmp_path / "x.parquet")
    good = (tmp_path / "x.parquet").read_bytes()
    assert mlxft("check", recipe, "data.train=x.parquet", "--rows", "0").code == 0
    for at in range(0, len(good), len(good) // 12):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]):
            (tmp_path / "x.parquet").write_bytes(bad)
            done = mlxft("check", recipe, "data.train=x.parquet", "--rows", "0")
            assert done.code == 0 or "x.parquet" in done.err, done
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "x.parquet")
    assert "two columns 'text'" in mlxft("check", recipe, "data.train=x.parquet").err


def test_scalars_are_read_as_yaml_1_2_has_them() -> None:
    text = "[010, 0o10, 0x10, 1e3, 2e-4, .5, 1., 1:30, 1_000, yes, no, on, off, y, true, False, ~, 2026-11-26, '=', =]"
    wanted = [10, 8, 16, 1e3, 2e-4, 0.5, 1.0, "1:30", "1_000", "yes", "no", "on", "off", "y"]
    assert read_yaml(text, "x") == [*wanted, True, False, None, "2026-11-26", "=", "="]


@pytest.mark.parametrize("text", ["1e5", "010", "0o17", "yes", "1:30", "null", "~", "2026-11-26", "=", "-.inf", ""])
def test_texts_that_look_like_something_else_are_quoted(text: str) -> None:
    assert read_yaml(dump_yaml({"a": text}), "x") == {"a": text}
    assert yaml.safe_load(dump_yaml({"a": text})) == {"a": text}, "for other programs, too"


def test_a_run_of_such_a_name_is_read_again(write: Callable[..., str], mlxft: Callable[..., Any]) -> None:
    assert mlxft("train", write(), "run.name='1e5'", "run.sample_prompts=['0o17', yes]").code == 0
    again = load_config(Path("runs/1e5/config.yaml"))
    assert (again.run.name, again.run.sample_prompts) == ("1e5", ["0o17", "yes"])


@pytest.mark.parametrize("option", ["--samples", "--n"])
def test_counts_on_the_command_line(option: str, refused: Refused, tiny_model_dir: Path) -> None:
    model = ["--model", str(tiny_model_dir), option, "1000000000000"]
    asked = ["sample", "p.jsonl", "--out", "o.jsonl"] if option == "--n" else ["generate", "--batch", "p.jsonl"]
    assert option in refused(2, *asked, *model)


def test_what_fails_in_every_trial_is_refused_before_the_first(write: Callable[..., str], refused: Refused) -> None:
    pytest.importorskip("optuna")
    space = {"space": {"optim.lr": {"log": [1e-4, 1e-2]}}, "trials": 2}
    recipe = write(sweep=space, **{"data.valid": 0.3, "run.name": "s"})
    assert "training needs" in refused(2, "sweep", recipe, "memory.limit=0.0001")
    endless = {"space": {"tune.rank": {"int": [1, 2**40]}}, "sampler": "grid"}
    assert "tune.rank" in refused(2, "sweep", write(sweep=endless, **{"data.valid": 0.3}))
    steps = {"space": {"run.steps": {"int": [1, 2**40]}}, "sampler": "grid"}
    assert "combinations" in refused(2, "sweep", write(sweep=steps, **{"data.valid": 0.3}))
