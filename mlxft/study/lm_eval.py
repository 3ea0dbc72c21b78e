"""Run tasks of lm-eval (EleutherAI's evaluation harness, extra `eval`) on a model.

Importing this file needs lm-eval; without it the import raises a ConfigError that names the extra.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.data.chat import answer_of, opening_of
from mlxft.data.dataset import context_ids
from mlxft.errors import ConfigError, DataError, MlxftError, missing_extra, nearest
from mlxft.model.load import Loaded, context_of
from mlxft.model.logits import Split
from mlxft.model.sampling import Sampling, sample_batch, text_of
from mlxft.runs import load_run
from mlxft.study.evaluate import Asking, Request, encode_choices, loglikelihoods
from mlxft.text import bar, parse_json

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as e:
    raise ConfigError(f"--tasks: {missing_extra('lm-eval', 'eval')}") from e

_MAX_TOKENS = 256  # of a completion where the task does not say: lm-eval's default
_CONTEXT = 2048  # where the model's config has none
_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class EvalModel(TemplateLM):
    """A loaded model with the interface of lm-eval.

    Args:
        asking: its max_length (the beginning of longer requests is cut off, as in lm-eval's own models), tokens, seed,
            and thoughts: "keep" gives tasks completions with their thoughts.
    """

    def __init__(self, loaded: Loaded, asking: Asking, console: Console | None = None) -> None:
        super().__init__()
        self.loaded, self.tokenizer, self._asking, self._console = loaded, loaded.tokenizer, asking, console
        self.limit = asking.max_length or context_of(loaded.config) or _CONTEXT
        self._split, self._drops = Split(loaded.model), asking.thoughts != "keep"
        self.cut = 0  # requests that were longer

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no EOS token, with which lm-eval starts a text")
        return int(eos)

    @property
    def tokenizer_name(self) -> str:
        """Return a name for lm-eval's caches."""
        return str(self.loaded.source).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, by default without a BOS, as lm-eval's model of transformers does."""
        return context_ids(self.tokenizer, string, plain=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of texts after contexts; see `encode_choices`."""
        of_context: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            of_context[request.args[0]].append(i)
        asked: list[Any] = [None] * len(requests)
        for context, members in of_context.items():
            texts = [requests[i].args[1] for i in members]
            for i, request in zip(members, self._requests(context, texts)):
                asked[i] = (requests[i].args, list(request.context), list(request.continuation))
        return self._loglikelihood_tokens(asked)

    def _requests(self, context: str, texts: Sequence[str]) -> list[Request]:
        if context:
            return encode_choices(self.tokenizer, context, texts, plain=True, special=False).requests
        first = self.eot_token_id
        every = [self.tok_encode(text) for text in texts]
        # As lm-eval: a text that begins with that token does not get it twice.
        return [Request((first,), tuple(ids[1:] if ids[:1] == [first] else ids)) for ids in every]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            # The last token is predicted and is not an input.
            room = max(1, self.limit + 1 - len(continuation))
            self.cut += len(context) > room
            asked.append(Request(tuple(context[-room:]), tuple(continuation)))
        with bar(self._console, len(asked), "log-likelihoods") as advance:
            found = loglikelihoods(self._split, asked, self._asking.tokens, advance)
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, in windows of the context's length."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            own = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self.limit, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in own]
            windows += pairs
            counts.append(len(pairs))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return completions that end before a stop text."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        texts = [""] * len(requests)
        with bar(self._console, len(requests), "completions") as advance:
            for how, members in groups.items():
                sampling = replace(self._sampling(parse_json(how)), stop_in_answer=self._drops)
                room = max(1, self.limit - sampling.max_tokens)
                prompts = [self.tok_encode(requests[i].args[0]) or [self.eot_token_id] for i in members]
                self.cut += sum(len(ids) > room for ids in prompts)
                model, cut, seed = self.loaded.model, [ids[-room:] for ids in prompts], self._asking.seed
                found = sample_batch(model, self.tokenizer, cut, sampling, seed=seed, on_done=advance)
                for i, ids, (completion,) in zip(members, prompts, found):
                    text = text_of(self.tokenizer, completion, sampling, ids)
                    texts[i] = answer_of(text, opening_of(requests[i].args[0])) if self._drops else text
        return texts

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        """Return the sampling of lm-eval's settings; greedy unless do_sample."""
        until = given.get("until") or ()
        stop = (until,) if isinstance(until, str) else until
        most = next((given[name] for name in _NAMES if given.get(name)), _MAX_TOKENS)
        drawn: dict[str, Any] = {"temperature": 0.0}
        if given.get("do_sample"):
            drawn = {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in given}
        ends = bool(self.tokenizer.eos_token_ids)
        return Sampling(int(most), stop=tuple(text for text in stop if text), stop_at_eos=ends, **drawn)


def run_tasks(
    model: str,
    names: Sequence[str],
    asking: Asking | None = None,
    *,
    adapter: str | None = None,
    include_path: str | None = None,
    chat: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval.

    Args:
        names: tasks, groups or tags of lm-eval, or from the folder `include_path`.
        asking: its shots (0: as in each task), limit (the first questions of each task), max_length, tokens, seed and
            thoughts.
        chat: whether questions go through the chat template.
    Returns:
        {"tasks": {name: {"n", "shots", "figures": {metric: {"value", "se"}}}}, "groups": ..., "notes": [...]}
    Raises:
        ConfigError: lm-eval does not have a task. ModelError: there is no such model.
        DataError: a task's rows cannot be loaded, or it fails.
    """
    asking = asking or Asking()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path: there is no folder {include_path}")
    manager = TaskManager(include_path=include_path)
    if not names:
        raise ConfigError("--tasks is empty; expected e.g. arc_easy,hellaswag")
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        said = [f"{name}{nearest(name, known)}" for name in unknown]
        raise ConfigError(f"--tasks: lm-eval has no {', '.join(said)}; `lm-eval ls tasks` lists all {len(known):,}")
    loaded = load_run(model, adapter)
    if chat and not loaded.tokenizer.has_chat_template:
        raise ConfigError("--chat: this model has no chat template")
    lm = EvalModel(loaded, asking, console)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=list(names),
            num_fewshot=asking.shots or None,
            limit=asking.limit,
            task_manager=manager,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=asking.seed,
            numpy_random_seed=asking.seed,
            torch_random_seed=None,
            fewshot_random_seed=asking.seed,
        )
    except MlxftError:
        raise
    except Exception as e:  # tasks fetch data sets and run their own code
        raise DataError(f"lm-eval could not run {', '.join(names)}: {type(e).__name__}: {str(e)[:500]}") from e
    return _as_json(found, lm.cut, lm.limit)


def _as_json(found: dict[str, Any], cut: int, limit: int) -> dict[str, Any]:
    tasks = {
        name: {
            "n": found.get("n-samples", {}).get(name, {}).get("effective"),
            "shots": found.get("n-shot", {}).get(name),
            "figures": _as_figures(values),
        }
        for name, values in found["results"].items()
    }
    notes = [f"{cut:,} requests were longer than {limit:,} tokens, and their beginning is cut off"] if cut else []
    groups = {name: _as_figures(values) for name, values in (found.get("groups") or {}).items()}
    return {"tasks": tasks, "groups": groups, "notes": notes}


def _as_figures(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return lm-eval's {"acc,none": 0.5, "acc_stderr,none": 0.1, ...} as {"acc": {"value": 0.5, "se": 0.1}, ...}."""
    every: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, selection = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{selection}")
            name = metric if selection == "none" else f"{metric}, {selection}"
            every[name] = {"value": float(value), "se": float(error) if isinstance(error, int | float) else None}
    return every


def show_tasks(console: Console, found: dict[str, Any]) -> None:
    """Print a table of all tasks."""
    table = Table()
    for name in ("task", "n", "shots", "metric", "value ± standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", overflow="fold")
    groups = {name: {"n": None, "shots": None, "figures": of} for name, of in found["groups"].items()}
    for name, task in (found["tasks"] | groups).items():
        for metric, figure in task["figures"].items():
            error = f" ± {figure['se']:.4f}" if figure["se"] is not None else ""
            cells = (name, task["n"], task["shots"], metric, f"{figure['value']:.4f}{error}")
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))
    console.print(table)
    for note in found["notes"]:
        console.print(Text(f"note: {note}"))
