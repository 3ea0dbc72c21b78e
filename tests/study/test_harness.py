"""A model of ours as lm-eval calls one. lm-eval itself is heavy: a stand-in with its interface calls the model here,
and the numbers are those that lm-eval gave (tests/golden/lm_eval_choice.json)."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxft.errors import ConfigError, DataError
from mlxft.model.load import Loaded
from mlxft.study.evaluate import Asking

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/lm_eval_choice.json").read_text("utf-8"))


class TemplateLM:
    """As lm_eval.api.model's: pairs of texts become ids, of which the model says how likely they are."""

    tokenizer: Any = None

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            before, whole = self.tok_encode(context), self.tok_encode(context + continuation)  # type: ignore[attr-defined]
            pairs.append(((context, continuation), before, whole[len(before) :]))
        found: list[tuple[float, bool]] = self._loglikelihood_tokens(pairs)  # type: ignore[attr-defined]
        return found


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def simple_evaluate(model: Any, tasks: list[str], limit: int | None, **options: Any) -> dict[str, Any]:
    """Its local task of multiple choice."""
    if tasks == ["broken"]:
        raise ConnectionError("no network")
    items = GOLDEN["items"][:limit]
    right = []
    for item in items:
        found = model.loglikelihood([asked(item["question"], f" {choice}") for choice in item["choices"]])
        assert [logprob for logprob, _ in found] == pytest.approx(item["logprobs"], abs=1e-3)
        right.append(float(np.argmax([logprob for logprob, _ in found]) == item["answer"]))
    accuracy = {"acc,none": float(np.mean(right)), "acc_stderr,none": "N/A", "alias": "local"}
    return {"results": {"local": accuracy}, "n-samples": {"local": {"effective": len(items)}}, "n-shot": {"local": 0}}


def windows(token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int) -> Any:
    """Disjoint ones: each is predicted from the token before it on."""
    for start in range(0, len(token_list), max_seq_len):
        part = token_list[start : start + max_seq_len]
        yield [token_list[start - 1] if start else prefix_token, *part[:-1]], part


def harness() -> Any:
    """The module, imported while the stand-ins are there."""
    return importlib.import_module("mlxft.study.lm_eval")


@pytest.fixture(autouse=True)
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    manager = SimpleNamespace(all_tasks=["local", "broken"])
    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.tasks": {"TaskManager": lambda include_path: manager},
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": lambda pair: (pair[0][:1], pair[1]),
        },
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("mlxft.study.lm_eval", None)
    yield
    sys.modules.pop("mlxft.study.lm_eval", None)


def a_model(loaded: Loaded, limit: int = 512) -> Any:
    module = harness()
    return module.EvalModel(loaded, Asking(max_length=limit, tokens=256))


def test_a_local_task_gives_lm_evals_numbers(tiny_model_dir: Path) -> None:
    found = harness().run_tasks(str(tiny_model_dir), ["local"])
    assert found["tasks"] == {
        "local": {"n": 20, "shots": 0, "figures": {"acc": {"value": pytest.approx(GOLDEN["acc"]), "se": None}}}
    }
    assert harness().run_tasks(str(tiny_model_dir), ["local"], Asking(limit=3))["tasks"]["local"]["n"] == 3


def test_rolling_log_likelihood_is_of_every_token(tiny_model: Loaded) -> None:
    text = "the cat is in the house and on the"
    ids = [tiny_model.tokenizer.eos_token_id, *tiny_model.tokenizer.encode(text)]
    logits = tiny_model.model(mx.array([ids[:-1]]))[0]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    whole = float(logprobs[np.arange(len(ids) - 1), ids[1:]].sum())
    one, other = a_model(tiny_model).loglikelihood_rolling([asked(text), asked("in")])
    assert one == pytest.approx(whole, abs=1e-3)
    assert other > one
    cut = a_model(tiny_model, limit=8)
    assert cut.loglikelihood_rolling([asked(text)])[0] != pytest.approx(whole, abs=1e-3)
    assert cut.cut == 0


def test_a_long_request_loses_its_beginning(tiny_model: Loaded) -> None:
    model = a_model(tiny_model, limit=8)
    text = "the cat is in the house and on the"
    (found,) = model.loglikelihood([asked(text, " in")])
    assert model.cut == 1
    ids = tiny_model.tokenizer.encode(text)[-8:]
    logits = tiny_model.model(mx.array([ids]))[0, -1]
    expected = logits[tiny_model.tokenizer.encode(" in")[0]] - mx.logsumexp(logits)
    assert found[0] == pytest.approx(expected.item(), abs=1e-4)


def test_answers_end_before_a_stop_text(tiny_model: Loaded) -> None:
    model = a_model(tiny_model)
    long, same = model.generate_until(
        [asked("the", {"max_gen_toks": 12, "until": []}), asked("the", {"max_tokens": 12})]
    )
    assert long == same
    stop = long[4:6]
    (short,) = model.generate_until([asked("the", {"max_gen_toks": 12, "until": [stop]})])
    assert short == long[: long.index(stop)]
    drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    assert model.generate_until([asked("the", drawn)]) != [long]


def test_tasks_are_given_answers_without_thoughts(tiny_model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxft.model.sampling import Sampled

    said = {"in": "<think>\n\nor on?</think>\n\non", "<think>": "or on?</think>on", "the": "<think>or"}
    module = harness()
    encode = tiny_model.tokenizer.encode

    def sample(model: Any, tokenizer: Any, prompts: Any, *args: Any, **other: Any) -> list[list[Sampled]]:
        return [[Sampled([*encode(said[tokenizer.decode(p)]), tokenizer.eos_token_id], "eos")] for p in prompts]

    monkeypatch.setattr(module, "sample_batch", sample)
    requests = [asked(prompt, {"until": ["\n\n"]}) for prompt in said]
    assert module.EvalModel(tiny_model, Asking(max_length=512, tokens=256)).generate_until(requests) == ["on", "on", ""]
    whole = module.EvalModel(tiny_model, Asking(max_length=512, tokens=256, thoughts="keep"))
    assert whole.generate_until(requests) == ["<think>", "or on?</think>on", "<think>or"]


def test_until_does_not_end_a_thought(tiny_model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    module = harness()
    seen: list[bool] = []
    sample = module.sample_batch
    monkeypatch.setattr(
        module,
        "sample_batch",
        lambda m, t, p, how, **o: (seen.append(how.stop_in_answer), sample(m, t, p, how, **o))[1],
    )
    for thoughts in ("drop", "keep"):
        asking = Asking(max_length=512, tokens=256, thoughts=thoughts)
        module.EvalModel(tiny_model, asking).generate_until([asked("in", {"max_tokens": 2})])
    assert seen == [True, False]


def test_a_continuation_that_joins_its_context_is_not_certain(tiny_model: Loaded) -> None:
    """ " t" + "he" is one token. The two of one context are cut at one place; that of the other context stays."""
    model = a_model(tiny_model)
    pairs = [("in t", "he"), ("in t", "o"), ("in", " the"), ("", "the in")]
    found = [logprob for logprob, _ in model.loglikelihood([asked(*pair) for pair in pairs])]
    encode = tiny_model.tokenizer.encode
    eos = tiny_model.tokenizer.eos_token_id
    for (context, text), cut, logprob in zip(pairs, (1, 1, 1, 1), found):
        ids = encode(context + text) if context else [eos, *encode(text)]
        logits = tiny_model.model(mx.array([ids[:-1]]))[0]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[np.arange(len(ids) - 1), ids[1:]]
        assert logprob == pytest.approx(float(logprobs[cut - 1 :].sum()), abs=1e-3)
    assert max(found) < 0


def test_what_lm_eval_does_not_know(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"lm-eval has no locl \(did you mean local\?\)"):
        harness().run_tasks(str(tiny_model_dir), ["locl"])
    with pytest.raises(ConfigError, match="there is no folder"):
        harness().run_tasks(str(tiny_model_dir), ["local"], include_path="/nowhere")
    with pytest.raises(ConfigError, match="--tasks is empty"):
        harness().run_tasks(str(tiny_model_dir), [])
    with pytest.raises(DataError, match="could not run broken: ConnectionError: no network"):
        harness().run_tasks(str(tiny_model_dir), ["broken"])


def test_figures_of_lm_eval() -> None:
    values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}
    assert harness()._as_figures(values) == {"acc": {"value": 0.5, "se": 0.1}, "em, strict": {"value": 1.0, "se": None}}
