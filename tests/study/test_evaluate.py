"""Tasks asked of a tiny model: next to lm-eval's own, to a plain computation, and to what answers are worth by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxft.data.sources import Row
from mlxft.errors import ConfigError, DataError
from mlxft.model.load import Loaded, load
from mlxft.model.logits import Split
from mlxft.study import evaluate as evaluate_module
from mlxft.study import tasks
from mlxft.study.evaluate import Asking, Evaluated, Request, loglikelihoods, paired_differences, run_task
from mlxft.study.tasks import Case, Task, make_cases, read_task

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/lm_eval_choice.json").read_text("utf-8"))
PLAIN = Task(name="plain", prompt="{question}", choices="choices", answer="answer", template="none")


def cases_of(rows: list[dict[str, Any]], task: Task) -> list[Case]:
    return make_cases([Row(f"rows.jsonl:{n}", row) for n, row in enumerate(rows, 1)], task)


def test_multiple_choice_is_lm_evals(tiny_model: Loaded) -> None:
    """20 items, 61 choices of one to several tokens: the same log-likelihoods, and each item judged alike."""
    found = run_task(tiny_model, cases_of(GOLDEN["items"], PLAIN), PLAIN)
    for line, item in zip(found.predictions, GOLDEN["items"]):
        assert line["logprobs"] == pytest.approx(item["logprobs"], abs=1e-3)
        assert line["scores"] == {"accuracy": item["acc"], "accuracy_norm": item["acc_norm"]}
    figures = found.figures()
    assert figures["accuracy"].value == pytest.approx(GOLDEN["acc"])
    assert figures["accuracy_norm"].value == pytest.approx(GOLDEN["acc_norm"])
    assert figures["accuracy"].se == pytest.approx(np.std([i["acc"] for i in GOLDEN["items"]], ddof=1) / 20**0.5)


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 300, n).tolist()) for n in (4, 9, 30, 31)]
    shared = tuple(rng.integers(3, 300, 60).tolist())
    ends = [(5,), (6,), (5, 7), (5, 7, 8), ()]
    asked = [Request(prompt, end) for prompt in prompts for end in ends]
    asked += [Request(shared + prompt, end) for prompt in prompts for end in ends[:2]]
    return [*asked, Request((*prompts[0], 5), (7,))]  # a context that another's continuation runs through


def naive(loaded: Loaded, request: Request) -> tuple[float, bool]:
    if not request.continuation:
        return 0.0, True
    logits = loaded.model(mx.array([request.context + request.continuation[:-1]]))[0].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[len(request.context) - 1 :]
    greedy = bool((logprobs.argmax(axis=-1) == request.continuation).all())
    return float(logprobs[np.arange(len(logprobs)), list(request.continuation)].sum()), greedy


@pytest.mark.parametrize("tokens", [16, 200, 100_000])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_log_likelihoods_are_those_of_each_row_alone(
    kind: str, tokens: int, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever is shared, padded or batched; gpt_neox can not be taken apart, so nothing is shared."""
    loaded = load(str(make_model_dir(tmp_path / kind, kind)), dtype="float32")
    told: list[int] = []
    found = loglikelihoods(Split(loaded.model), requests(), tokens, told.append)
    assert sum(told) == len(requests())
    for got, request in zip(found, requests()):
        logprob, greedy = naive(loaded, request)
        assert got.logprob == pytest.approx(logprob, abs=1e-3)
        assert got.greedy == greedy
    greedy_one = Request((5, 6), (int(mx.argmax(loaded.model(mx.array([[5, 6]]))[0, -1]).item()),))
    assert loglikelihoods(Split(loaded.model), [greedy_one], tokens)[0].greedy


def test_what_rows_begin_with_is_computed_once(tiny_model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten questions behind a long beginning; and four choices behind each of two long questions."""
    sizes: list[int] = []
    read = evaluate_module._read
    monkeypatch.setattr(
        evaluate_module,
        "_read",
        lambda s, batch, *a: (sizes.append(evaluate_module._size(batch)[0]), read(s, batch, *a))[1],
    )
    beginning = tuple(range(3, 103))
    loglikelihoods(Split(tiny_model.model), [Request((*beginning, 200 + i), (7,)) for i in range(10)], 2048)
    assert sum(sizes) == 110
    sizes.clear()
    asked = [Request((9 + q, *beginning), (c, 5, 6)) for q in range(2) for c in (3, 4, 7, 8)]
    loglikelihoods(Split(tiny_model.model), asked, 2048)
    assert sum(sizes) == 2 * (101 + 4 * 2)


def test_loss_is_token_weighted(tiny_model: Loaded) -> None:
    rows = [{"text": "the cat is in the house"}, {"text": "the"}, {"text": "an end of it"}]
    task = read_task("loss")
    found = run_task(tiny_model, cases_of(rows, task), task, Asking(tokens=16))
    sums, counts = [], []
    for row in rows:
        ids = [*tiny_model.tokenizer.encode(row["text"]), tiny_model.tokenizer.eos_token_id]
        sums.append(-naive(tiny_model, Request(tuple(ids[:1]), tuple(ids[1:])))[0])
        counts.append(len(ids) - 1)
    figures = found.figures()
    assert figures["loss"].value == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert figures["perplexity"].value == pytest.approx(np.exp(sum(sums) / sum(counts)), rel=1e-4)
    assert [line["tokens"] for line in found.predictions] == counts
    assert found.scores["loss"] == pytest.approx(np.array(sums) / counts, rel=1e-5)
    assert figures["loss"].n == 3


def test_loss_of_a_chat_is_of_its_answers_only(tiny_model: Loaded) -> None:
    turns = [{"role": "user", "content": "in or on?"}, {"role": "assistant", "content": "the"}]
    task = read_task("loss")
    found = run_task(tiny_model, cases_of([{"messages": turns}], task), task)
    assert found.predictions[0]["tokens"] == 2  # "the" and what ends the turn
    template = Task(prompt="{q}", answer="{a}")
    same = run_task(tiny_model, cases_of([{"q": "in or on?", "a": "the"}], template), template)
    assert same.scores["loss"] == pytest.approx(found.scores["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "score"),
    [
        (tasks.exact_match, " Paris\n", "Paris", 1),
        (tasks.exact_match, "paris", "Paris", 0),
        (tasks.contains, "It is Paris.", "Paris", 1),
        (tasks.contains, "It is paris.", "Paris", 0),
        (tasks.contains, "It is Paris.", "", 0),
        (tasks.number, "so 3 and 4 make $1,007.50", "1007.5", 1),
        (tasks.number, "none", "1", 0),
        (tasks.f1, "The cat sat", "a cat sat down!", 0.8),  # 2 of 2 and 2 of 3 words
        (tasks.f1, "dog dog", "dog", 2 / 3),
        (tasks.f1, "", "dog", 0),
        (tasks.f1, "the", "a", 1),
    ],
)
def test_what_an_answer_is_worth(metric: Any, said: str, wanted: str, score: float) -> None:
    assert metric(said, wanted) == pytest.approx(score)


def test_metrics_have_settings() -> None:
    assert tasks.exact_match("PARIS", "Paris", ignore_case=True) == 1
    assert tasks.number("#### 12\nI like 7", "12", pattern=r"#### (\d+)") == 1
    assert tasks.number("11.8", "12", tolerance=0.5) == 1


def written(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, answers: list[str], task: Task, rows: Any) -> Evaluated:
    """A result of `answers` as a model would have written them: by the ids that it samples."""
    from mlxft.model.sampling import Sampled

    def sample(model: Any, tokenizer: Any, prompts: Any, sampling: Any, **other: Any) -> list[list[Sampled]]:
        ids = [tokenizer.encode(a, add_special_tokens=False) for a in answers]
        return [[Sampled([*i, tokenizer.eos_token_id], "eos")] for i in ids]

    monkeypatch.setattr("mlxft.study.evaluate.sample_shared", sample)
    return run_task(loaded, cases_of(rows, task), task)


def test_written_answers_are_judged(tiny_model: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.py").write_text("def size(prompts, completions, rows):\n    return [len(c) for c in completions]\n")
    schema = {"type": "object", "required": ["a"]}
    judged = ["exact_match", "contains", "f1", "number", "json"]
    judged += [{"kind": "regex", "pattern": "^4"}, {"kind": "json", "schema": schema, "name": "fits"}]
    judged += [{"kind": "function", "function": f"{tmp_path}/f.py:size"}]
    task = Task.model_validate({"prompt": "{q}?", "answer": "a", "metrics": judged})
    rows = [{"q": "x", "a": "4"}, {"q": "y", "a": ["3", "4 in all"]}, {"q": "z", "a": 5}]
    found = written(tiny_model, monkeypatch, ["4", "4 in all", '{"a": 5}'], task, rows)
    expected = {
        "exact_match": [1, 1, 0],
        "contains": [1, 1, 1],
        "f1": [1, 1, 1],  # "a" is an article
        "number": [1, 1, 1],
        "json": [1, 0, 1],
        "regex": [1, 1, 0],
        "fits": [0, 0, 1],
        "size": [1, 8, 8],
    }
    assert {name: values.tolist() for name, values in found.scores.items()} == expected
    assert found.predictions[1]["target"] == ["3", "4 in all"]
    assert found.predictions[0]["prompt"] == [{"role": "user", "content": "x?"}]


def test_thoughts_are_not_judged(tiny_model: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each completion's thought says something else than its answer; targets have thoughts too."""
    (tmp_path / "f.py").write_text("def size(prompts, completions, rows):\n    return [len(c) for c in completions]\n")
    judged: list[Any] = ["exact_match", "contains", "f1", "number", "json", {"kind": "regex", "pattern": "^4"}]
    judged += [{"kind": "regex", "pattern": "^<think>", "name": "form"}]
    judged += [{"kind": "contains", "thoughts": "keep", "name": "whole"}]
    judged += [{"kind": "function", "function": f"{tmp_path}/f.py:size"}]
    task = Task.model_validate({"prompt": "{q}?", "answer": "a", "metrics": judged})
    rows = [{"q": "x", "a": "4"}, {"q": "y", "a": ["<think>3</think>4"]}, {"q": "z", "a": 4}, {"q": "z", "a": "5"}]
    said = ["<think>\n\n</think>\n\n4", "3</think>4", "<think>4", "<think>5 or</think>4"]
    found = written(tiny_model, monkeypatch, said, task, rows)
    right = [1, 1, 0, 0]
    expected = dict.fromkeys(("exact_match", "contains", "f1", "number"), right)
    expected |= {"json": [1, 1, 0, 1], "regex": [1, 1, 0, 1], "form": [1, 0, 1, 1], "whole": [1, 0, 1, 1]}
    assert {name: v.tolist() for name, v in found.scores.items()} == {**expected, "size": [len(text) for text in said]}
    assert [line["prediction"] for line in found.predictions] == said
    assert [line["answer"] for line in found.predictions] == ["4", "4", "", "4"]
    assert found.notes == ["1 of 4 completions are thoughts without an answer (thoughts: keep scores them)"]
    keep = task.model_copy(update={"thoughts": "keep"})
    whole = written(tiny_model, monkeypatch, said, keep, rows)
    assert whole.scores["exact_match"].tolist() == [0, 0, 0, 0]
    assert whole.scores["number"].tolist() == [1, 1, 1, 0]
    assert "answer" not in whole.predictions[0]
    assert whole.notes == []


@pytest.mark.parametrize("template", ["auto", "none"])
def test_prompts_that_open_a_thought(
    template: str, tiny_model: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} <think>\n{% endif %}"
    prompt = "{q}" if template == "auto" else "{q} <think>\n"
    task = Task.model_validate({"prompt": prompt, "answer": "a", "metrics": ["contains"], "template": template})
    said = ["3 or 5</think>4", "3 or 4", "on"]
    found = written(tiny_model, monkeypatch, said, task, [{"q": "in <think>?", "a": "4"}] * 3)
    assert found.scores["contains"].tolist() == [1, 0, 0]
    assert [line["answer"] for line in found.predictions] == ["4", "", ""]
    # What stands before, a mark in the question included, opens nothing.
    tiny_model.tokenizer.chat_template = "{{ messages[0].content }} so "
    task = Task.model_validate({"prompt": "{q}", "answer": "a", "metrics": ["contains"], "template": template})
    found = written(tiny_model, monkeypatch, ["3 or 4"], task, [{"q": "in <think>?", "a": "4"}])
    assert found.scores["contains"].tolist() == [1]


def test_a_choice_stands_where_the_template_has_an_answer(tiny_model: Loaded) -> None:
    """After the empty thought that a template writes, or without the thought that its generation prompt opens."""
    rows = [{"q": "in", "choices": ["the", "an"], "answer": "an"}]
    task = Task(prompt="{q}", choices="choices", answer="answer")
    turn = "{% for m in messages %}{{ m.role }}: BEFORE{{ m.content }}\n{% endfor %}"
    asks = "{% if add_generation_prompt %}assistant: OPEN{% endif %}"
    empty = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    templates = {
        turn.replace("BEFORE", empty) + asks.replace("OPEN", ""): "<think>\n\n</think>\n\n",
        turn.replace("BEFORE", empty) + asks.replace("OPEN", "<think>\n"): "<think>\n\n</think>\n\n",
        turn.replace("BEFORE", "") + asks.replace("OPEN", "<think>\n"): "",
        turn.replace("BEFORE", "") + asks.replace("OPEN", "so "): "so ",
        "{{ messages[0].content }}; " + asks: "OPEN",  # a template that has no answered turns
    }
    for template, before in templates.items():
        tiny_model.tokenizer.chat_template = template
        (line,) = run_task(tiny_model, cases_of(rows, task), task).predictions
        text = ("in; " if "[0]" in template else "user: in\n") + f"assistant: {before}"
        for said, logprob in zip(rows[0]["choices"], line["logprobs"]):
            ids = [tuple(tiny_model.tokenizer.encode(t, add_special_tokens=False)) for t in (text, text + said)]
            expected = naive(tiny_model, Request(ids[0], ids[1][len(ids[0]) :]))[0]
            assert logprob == pytest.approx(expected, abs=1e-3), template


def test_empty_answers_are_counted_and_wrong(tiny_model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task.model_validate({"prompt": "{q}", "answer": "a", "metrics": ["exact_match", "f1", "number", "json"]})
    found = written(tiny_model, monkeypatch, ["", " "], task, [{"q": "x", "a": "4"}] * 2)
    assert all(not values.any() for values in found.scores.values())
    assert found.notes == ["2 of 2 completions are empty"]


def test_a_model_writes_and_is_cut_off(tiny_model: Loaded) -> None:
    task = Task.model_validate({"prompt": "{q}", "answer": "a", "metrics": ["exact_match"], "max_tokens": 3})
    found = run_task(tiny_model, cases_of([{"q": "the", "a": "x"}, {"q": "in the house", "a": "x"}], task), task)
    ends = [line["finish"] for line in found.predictions]
    cut = ends.count("length")
    assert (cut > 0) == any("cut off at 3 tokens" in note for note in found.notes)
    again = run_task(tiny_model, cases_of([{"q": "the", "a": found.predictions[0]["prediction"]}], task), task)
    assert again.scores["exact_match"].tolist() == [1.0]


def test_a_chat_template_is_told_of_tools(tiny_model: Loaded) -> None:
    tiny_model.tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}{{ messages[0].content }} so "
    turns = [{"role": "user", "content": "in"}, {"role": "assistant", "content": "the"}]
    task = Task(format="messages", choices=["the", "an"])
    rows = [{"messages": turns, "tools": tools} for tools in (None, [{"name": "search"}])]
    bare, told = (line["logprobs"] for line in run_task(tiny_model, cases_of(rows, task), task).predictions)
    assert bare != pytest.approx(told, abs=1e-3)
    texts = ["in so ", "searchin so "]
    for text, found in zip(texts, (bare, told)):
        before = tuple(tiny_model.tokenizer.encode(text, add_special_tokens=False))
        end = tuple(tiny_model.tokenizer.encode(f"{text}the", add_special_tokens=False)[len(before) :])
        assert found[0] == pytest.approx(naive(tiny_model, Request(before, end))[0], abs=1e-3)


def test_shots_are_earlier_turns_or_blocks(tiny_model: Loaded) -> None:
    chat = PLAIN.model_copy(update={"template": "auto", "system": "Answer."})
    case, *shots = cases_of(GOLDEN["items"][:3], chat)
    (line,) = run_task(tiny_model, [case], chat, shots=shots).predictions
    assert [m["role"] for m in line["prompt"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert line["prompt"][2]["content"] == "four"
    (line,) = run_task(tiny_model, [case], PLAIN, shots=shots).predictions
    assert line["prompt"] == "Two and two are four\n\nA cat is an animal\n\nThe sky on a clear day is"
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: prompt, 2 shots and completion take \d+ tokens; the context has 30"
    ):
        run_task(tiny_model, [case], PLAIN, Asking(max_length=30), shots=shots)
    with pytest.raises(ConfigError, match="not a loss"):
        run_task(tiny_model, [case], read_task("loss"), shots=shots)


def test_rows_that_do_not_fit_are_left_out_and_counted(tiny_model: Loaded) -> None:
    rows = [*GOLDEN["items"][:2], {**GOLDEN["items"][2], "question": "the cat is in the house " * 20}]
    found = run_task(tiny_model, cases_of(rows, PLAIN), PLAIN, Asking(max_length=60, overflow="drop"))
    assert found.rows == ["rows.jsonl:1", "rows.jsonl:2"]
    assert found.notes[0].startswith("1 of 3 rows are left out")


def a_result(kind: str, values: list[float], weights: list[float] | None = None) -> Evaluated:
    name = "loss" if kind == "loss" else "accuracy"
    of = {name: np.array(weights)} if weights else {}
    return Evaluated("t", kind, [str(i) for i in range(len(values))], {name: np.array(values)}, [], of)


def test_a_comparison_counts_rows_won_and_lost() -> None:
    (pair,) = paired_differences(a_result("choice", [1, 1, 0, 1, 1]), a_result("choice", [0, 1, 1, 0, 0]))
    assert (pair.won, pair.lost, pair.tied, pair.n) == (3, 1, 1, 5)
    assert pair.difference == pytest.approx(0.4)
    assert pair.low < 0.4 < pair.high
    (pair,) = paired_differences(a_result("loss", [1, 2], [1, 3]), a_result("loss", [2, 2.4], [1, 3]))
    assert (pair.won, pair.lost) == (2, 0), "less loss is better"
    assert pair.difference == pytest.approx((-1 - 3 * 0.4) / 4)
    ulp = 2.0**-23
    (pair,) = paired_differences(a_result("loss", [1 + ulp, 2, 3]), a_result("loss", [1, 2 + 2 * ulp, 2.9]))
    assert (pair.won, pair.lost, pair.tied) == (0, 1, 2), "what is no more than rounding is a tie"
    with pytest.raises(ConfigError, match="tokenise the same text differently"):
        paired_differences(a_result("loss", [1, 2], [1, 3]), a_result("loss", [2, 2], [1, 2]))
    with pytest.raises(ConfigError, match="same rows"):
        paired_differences(a_result("choice", [1]), a_result("choice", [1, 0]))
