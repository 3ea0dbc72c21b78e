"""Two processes evaluate and sample as one: the same numbers and rows, and only rank 0 prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from ranks import Result, row_writer, run_ranks

pytestmark = pytest.mark.invariant
_TASK = {
    "prompt": "{question}",
    "answer": "answer",
    "max_tokens": 6,
    "temperature": 1.0,
    "metrics": ["f1", {"kind": "function", "function": "f.py:size"}],
}

# Name -> arguments of mlxft. A file of one row leaves a rank without work.
EVALS = {
    "loss": ["texts.jsonl", "--tokens", "64", "--max-length", "24", "--overflow", "split"],
    "loss of chats": ["rows.jsonl", "--tokens", "64", "--against", "{other}"],
    "choice": ["choices.jsonl", "--task", "choice", "--tokens", "64", "--against", "{other}"],
    "choice, plain": ["choices.jsonl", "--task", "choice", "--template", "none"],
    "completions": ["choices.jsonl", "--task", "task.yaml", "--shots", "1", "--shots-from", "more.jsonl"],
    "one row": ["rows.jsonl", "--task", "f1", "--task", "loss", "--limit", "1"],
    "metrics": ["rows.jsonl", "--task", "exact_match", "--task", "f1", "--task", "json", "--overflow", "drop"],
    "episodes": ["prompts.jsonl", "--environment", "{{path: 'guess.py:Guess', turns: 3}}", "--against", "{other}"],
}
SAMPLES = {
    "best": ["prompts.jsonl", "--function", "f.py:size", "--keep", "best"],
    "all": ["prompts.jsonl", "--function", "f.py:size", "--keep", "all"],
    "episodes": ["prompts.jsonl", "--environment", "guess.py:Guess", "--keep", "all"],
}
_SCRIPT = """
import json, sys
import mlxft
from mlxft.cli import cli
from mlxft.lifeline import own_rank
from mlxft.model import sampling
from mlxft.objectives import episodes
from mlxft.study import evaluate
counts = {}
def count(module, name, size):
    inner = getattr(module, name)
    def counting(*args, **options):
        counts[name] = counts.get(name, 0) + size(args)
        return inner(*args, **options)
    setattr(module, name, counting)
count(evaluate, "make_batch", lambda args: len(args[0]))
count(evaluate, "_read", lambda args: evaluate._size(args[1])[1])
count(sampling, "sample_batch", lambda args: len(args[2]))
count(episodes, "sample_turns", lambda args: len(args[2]))
for args in json.loads(open(sys.argv[1]).read()):
    print("\\n" + json.dumps(args) + "\\n" if own_rank() == 0 else "", end="", flush=True)
    cli.main(args, standalone_mode=False)
out, model = sys.argv[2:]
found = mlxft.evaluate(model, "rows.jsonl", task=["loss", "f1"])
done = dict(counts)
open(f"{out}/api-{own_rank()}.json", "w").write(json.dumps(found.to_json()))
try:
    mlxft.evaluate(model, f"other-{own_rank()}.jsonl")
    said = ""
except mlxft.errors.ConfigError as error:
    said = str(error)
open(f"{out}/error-{own_rank()}.txt", "w").write(said)
open(f"{out}/counts-{own_rank()}.json", "w").write(json.dumps(done))
"""


class Done(NamedTuple):
    """What a launch left: a folder with the files of each case, and each rank's output."""

    folder: Path
    ranks: list[Result]


def _rows(folder: Path) -> None:
    rng, text, write = row_writer(folder)

    def choice() -> dict[str, Any]:
        return {"question": text(2, 9), "choices": [text(1, 4) for _ in range(3)], "answer": rng.randrange(3)}

    write("texts.jsonl", lambda: {"text": text(2, 40)}, 13)
    write("rows.jsonl", lambda: {"prompt": text(2, 8), "completion": text(1, 20)}, 11)
    write("prompts.jsonl", lambda: {"prompt": text(2, 8)}, 7)
    write("choices.jsonl", choice, 9)
    write("more.jsonl", choice, 5)
    for rank in (0, 1):
        write(f"other-{rank}.jsonl", lambda: {"prompt": text(2, 8), "completion": text(1, 20)}, 4)
    (folder / "task.yaml").write_text(yaml.safe_dump(_TASK))
    (folder / "f.py").write_text(
        "def size(prompts, completions, rows):\n    return [len(text) + len(prompts[i]) / 100 for i, text in "
        "enumerate(completions)]\n"
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, make_model_dir: Any) -> dict[int, Done]:
    """All cases by one process and by two, by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    _rows(folder)
    other = make_model_dir(folder / "other", "qwen2")
    (folder / "script.py").write_text(_SCRIPT)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for size in (1, 2):
            out = folder / str(size)
            out.mkdir()
            model, how = str(tiny_model_dir), ["--n", "3", "--seed", "5", "--max-tokens", "6", "--cut-off", "--json"]
            commands = [
                ["eval", model, *(a.format(other=other) for a in args), "--out", str(out / name), "--json"]
                for name, args in EVALS.items()
            ]
            commands += [
                ["sample", *args, "--model", model, "--out", str(out / f"{name}.jsonl"), *how]
                for name, args in SAMPLES.items()
            ]
            (folder / "commands.json").write_text(json.dumps(commands))
            ranks = run_ranks(["script.py", "commands.json", str(out), model], size)
            assert [code for code, _, _ in ranks] == [0] * size, "\n".join(errors[-3000:] for _, _, errors in ranks)
            found[size] = Done(out, ranks)
    return found


def _near(value: Any) -> Any:
    """The value, whose floats may differ by rounding."""
    if isinstance(value, dict):
        return {key: _near(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_near(part) for part in value]
    return pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", EVALS)
def test_ranks_evaluate_as_one_process(done: dict[int, Done], name: str):
    alone, together = (done[size].folder / name for size in (1, 2))
    figures, same = (_json(folder / "results.json") for folder in (alone, together))
    assert same == _near(figures)
    lines = _lines(together / "predictions.jsonl")
    assert lines == _near(_lines(alone / "predictions.jsonl"))
    rows = [(line["task"], line["row"]) for line in lines]
    assert len(set(rows)) == len(rows) == sum(task["rows"] for task in figures["tasks"])


@pytest.mark.parametrize("name", SAMPLES)
def test_ranks_sample_as_one_process(done: dict[int, Done], name: str):
    alone, together = (_lines(done[size].folder / f"{name}.jsonl") for size in (1, 2))
    assert together == _near(alone)
    assert len(together) == (7 if name == "best" else 21)


def test_each_row_is_computed_once(done: dict[int, Done]):
    """Rows of losses, tokens of choices, prompts that are completed, and episodes."""
    (alone,), ranks = ([_json(done[n].folder / f"counts-{rank}.json") for rank in range(n)] for n in (1, 2))
    for kind, whole in alone.items():
        shares = [counts[kind] for counts in ranks]
        assert sum(shares) == whole
        assert min(shares) > 0.3 * whole, kind


def test_only_rank_0_prints(done: dict[int, Done]):
    def said(size: int) -> str:
        return done[size].ranks[0][1].replace(str(done[size].folder), "")

    assert done[2].ranks[1][1:] == ("", "")
    printed = [json.loads(line) for line in said(2).splitlines() if line]
    assert printed == _near([json.loads(line) for line in said(1).splitlines() if line])
    assert len(printed) == 2 * (len(EVALS) + len(SAMPLES))


def test_evaluate_returns_the_same_on_all_ranks(done: dict[int, Done]):
    alone = _json(done[1].folder / "api-0.json")
    for rank in (0, 1):
        assert _json(done[2].folder / f"api-{rank}.json") == _near(alone)


def test_ranks_with_other_rows_are_refused(done: dict[int, Done]):
    assert (done[1].folder / "error-0.txt").read_text("utf-8") == ""
    for rank in (0, 1):
        said = (done[2].folder / f"error-{rank}.txt").read_text("utf-8")
        assert "rank 1" in said
        assert "its rows" in said


@pytest.mark.parametrize("args", [["runs"], ["eval", "model", "--tasks", "arc_easy"]])
def test_other_commands_run_in_one_process(args: list[str]):
    for code, out, errors in run_ranks(["-m", "mlxft", *args]):
        assert (code, out) == (2, "")
        assert "in one process" in errors
        assert len(errors.splitlines()) == 1
