"""Judging answers by hand: sampled from a model or two, or held in a file; shown blind, in random order."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from mlxft.data.formats import Message, Ranked, list_at, read_prompts, string_at, tools_of, unwritten
from mlxft.data.preference import read_preference
from mlxft.data.published import in_our_fields
from mlxft.data.sources import Problem, read_rows, report_lines
from mlxft.errors import ConfigError, DataError
from mlxft.study.judgements import TIE, Journal, Row, WinRate, win_rate
from mlxft.study.terminal import Keys, choices, keys_help, show

if TYPE_CHECKING:
    from mlxft.model.sample import Sampling

MOST = 9  # answers that a digit can choose
_AGAIN = 4  # more samples where answers are empty or alike


@dataclass(frozen=True)
class Source:
    """Where answers come from. `against` is a second model: then each gives one answer."""

    sampling: Sampling
    model: str | None = None
    adapter: str | None = None
    against: str | None = None
    n: int = 2
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The model of each answer."""
        own = f"{self.model} with {self.adapter}" if self.adapter else str(self.model)
        return [own, self.against] if self.against else [own] * self.n


class Task(NamedTuple):
    """A prompt to judge: its answers and, where known, the model of each; None where they are to be sampled."""

    id: str
    prompt: str | list[Message]
    answers: list[str] | None
    models: list[str] | None
    tools: list[dict[str, Any]] | None = None


class Shown(NamedTuple):
    """A task's answers, as sampled or held, and the order they are shown in."""

    answers: list[str]
    models: list[str] | None
    order: list[int]


class Summary(NamedTuple):
    """What a file of judgements holds, of how many prompts."""

    judged: int
    skipped: int
    total: int
    win_rate: WinRate | None


def read_tasks(spec: str) -> list[Task]:
    """Prompts of a file, in order; rows may hold answers: `answers` (and `models`), or `chosen` and `rejected`.

    Raises:
        ConfigError: no such file. DataError: rows that do not fit, all in one.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    seen: Counter[str] = Counter()
    for row in read_rows(spec, "train"):
        try:
            if isinstance(row, Problem):
                raise DataError(row.text)
            data = in_our_fields(row.data, ("preference", "ratings"))
            prompt, answers, models = _task(data)
            tools = tools_of(data)
        except DataError as e:
            problems.append(f"{row.where}: {e}")
            continue
        said = json.dumps([unwritten(prompt), answers, *([tools] if tools else [])], sort_keys=True)
        name = blake2b(said.encode(), digest_size=8).hexdigest()
        seen[name] += 1
        tasks.append(Task(name if seen[name] == 1 else f"{name}-{seen[name]}", prompt, answers, models, tools))
    if problems:
        raise DataError(report_lines(problems))
    return tasks


def _task(row: Row) -> tuple[str | list[Message], list[str] | None, list[str] | None]:
    name = next((name for name in ("answers", "completions") if row.get(name) is not None), None)
    if name is None and row.get("chosen") is not None and row.get("rejected") is not None:
        return _held_pair(row)
    if row.get("prompt") is None:
        raise DataError(f"no field 'prompt'; the row has {', '.join(map(str, row)) or 'none'}")
    prompt = read_prompts(row).prompt
    if name is None:
        return prompt, None, None
    answers = [string_at(text, f"{name}[{i}]") for i, text in enumerate(list_at(row[name], name, "texts"))]
    if not 2 <= len(set(answers)) == len(answers) <= MOST:
        raise DataError(f"{name} has {len(answers)} texts, {len(set(answers))} of them different; expected 2 to {MOST}")
    models = row.get("models")
    if models is not None and len(models := [str(m) for m in list_at(models, "models", "names")]) != len(answers):
        raise DataError(f"models has {len(models)} names for {len(answers)} {name}; expected one for each")
    return prompt, answers, models


def _held_pair(row: Row) -> tuple[str | list[Message], list[str], None]:
    item = read_preference(row)
    pairs = item.pairs if isinstance(item, Ranked) else (item,)
    turns = [pairs[0].chosen, *(pair.rejected for pair in pairs)]
    answers = [turn if isinstance(turn, str) else str(turn["content"]) for turn in turns]
    if any("tool_calls" in turn for turn in turns if isinstance(turn, dict)):
        raise DataError("an answer has tool_calls; only texts can be judged")
    if len(set(answers)) < len(answers):
        raise DataError("two answers are the same; expected a difference to judge")
    return pairs[0].prompt, answers, None


def label(spec: str, out: Path, source: Source, console: Console) -> Summary:
    """Judge the prompts of a file, from where the last time ended, until all are judged or `q` is pressed.

    Each judgement is a line of `out`, on the disk before the next prompt is shown, and is a row of data.format:
    preference. Skipped prompts stand in a file beside it.

    Raises:
        ConfigError: settings that do not go together, or `out` holds judgements of other models.
        DataError: the file's rows do not fit.
    """
    tasks = read_tasks(spec)
    _check(tasks, source, Path(spec), out)
    judged = Journal(out)
    try:
        skipped = Journal(out.with_name(out.name + ".skipped"))
        try:
            _check_models(judged, tasks, source)
            _Session(tasks, judged, skipped, source, console).run()
            known = {task.id for task in tasks}
            done, left = (sum(row["id"] in known for row in journal.rows) for journal in (judged, skipped))
            own = source.names[0] if source.model else None
            return Summary(done, left, len(tasks), win_rate(judged.rows, own))
        finally:
            skipped.close()
    finally:
        judged.close()


def _check(tasks: list[Task], source: Source, spec: Path, out: Path) -> None:
    wrong = []
    asked = any(task.answers is None for task in tasks)
    if spec.exists() and out.exists() and spec.samefile(out):
        wrong.append("--out is the file of prompts; choose another")
    if asked and source.model is None:
        wrong.append(f"{spec} holds prompts without answers; name a --model to sample them from")
    if not asked and source.model is not None:
        wrong.append(f"--model: {spec} holds all answers already; leave it out to judge those")
    if source.model is None and (source.adapter or source.against):
        wrong.append("--adapter and --against go with --model")
    if source.against and source.n != 2:
        wrong.append(f"--against compares one answer of each model; --n is {source.n}")
    if source.against and len(set(source.names)) == 1:
        wrong.append("--against is the model itself; name another, or leave it out")
    if asked and not source.against and source.sampling.temperature == 0:
        wrong.append("--temperature 0 gives the same answer each time; raise it to have answers that differ")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _check_models(judged: Journal, tasks: list[Task], source: Source) -> None:
    """A file of judgements compares one thing: its win rate is of two models, not of any."""
    sampled = {task.id for task in tasks if task.answers is None}
    for row in judged.rows:
        if row["id"] in sampled and set(row.get("models") or ()) != set(source.names):
            before = " and ".join(sorted(set(row.get("models") or ["none"])))
            raise ConfigError(
                f"--out: {judged.path} holds judgements of {before}; choose another file for "
                f"{' and '.join(sorted(set(source.names)))}"
            )


class _Session:
    """A sitting: the prompts that are not done yet, one after the other."""

    def __init__(self, tasks: list[Task], judged: Journal, skipped: Journal, source: Source, console: Console) -> None:
        self.tasks, self.judged, self.skipped = tasks, judged, skipped
        self.source, self.console = source, console
        self._sample = _sampler(source)
        self._answers: dict[str, Shown] = {}

    def run(self) -> None:
        with Keys() as keys:
            while (found := self._next()) is not None:
                number, task = found
                shown = self._shown(task)
                if len(shown.answers) < 2:
                    self._no_choice(task, shown)
                elif not self._judge(keys, number, task, shown):
                    return

    def _next(self) -> tuple[int, Task] | None:
        done = {row["id"] for journal in (self.judged, self.skipped) for row in journal.rows}
        return next(((i, task) for i, task in enumerate(self.tasks, 1) if task.id not in done), None)

    def _shown(self, task: Task) -> Shown:
        if task.id not in self._answers:
            answers, models = task.answers, task.models
            if answers is None:
                with self.console.status("sampling answers"):
                    answers, models = self._sample(task)
            order = list(range(len(answers)))
            # Other answers' lengths, models and places in the file must not show through the order.
            random.Random(f"{self.source.seed} {task.id}").shuffle(order)
            self._answers[task.id] = Shown(answers, models, order)
        return self._answers[task.id]

    def _no_choice(self, task: Task, shown: Shown) -> None:
        """Two models that say the same are tied; otherwise there is nothing to learn."""
        if self.source.against and shown.answers:
            models = self.source.names
            same = Shown(shown.answers * 2, models, [0, 1])
            self.judged.append({**self._line(task, same, TIE), "auto": True})
            self.console.print("both models gave the same answer: a tie")
        else:
            self.skipped.append({"id": task.id, "turn": self._turn(), "auto": True})
            self.console.print("the answers are empty or all the same: skipped")

    def _judge(self, keys: Keys, number: int, task: Task, shown: Shown) -> bool:
        """One prompt until it is judged, skipped, or another one is to be shown; False is to quit."""
        count, note = len(shown.answers), ""
        keys.forget()
        show(self.console, f"{number} of {len(self.tasks)}", task.prompt, [shown.answers[i] for i in shown.order])
        self.console.print(keys_help(count))
        while True:
            key = keys.key()
            if key == "q":
                return False
            if key == "u" and self._undo():
                return True
            if key == "s":
                self.skipped.append({"id": task.id, "turn": self._turn()})
                return True
            if key in choices(count) or key == "t":
                verdict = TIE if key == "t" else shown.order[choices(count)[key]]
                row = self._line(task, shown, verdict)
                self.judged.append({**row, "note": note} if note else row)
                return True
            if key == "n":
                note = keys.line(lambda: self.console.print("note: ", end=""))
            elif key.strip():
                self.console.print("nothing to undo" if key == "u" else keys_help(count))

    def _turn(self) -> int:
        return 1 + max((row["turn"] for journal in (self.judged, self.skipped) for row in journal.rows), default=0)

    def _undo(self) -> bool:
        """Take back the last judgement or skip by hand, and what no hand did since."""
        journals = (self.judged, self.skipped)
        if not any(not row.get("auto") for journal in journals for row in journal.rows):
            return False
        while True:
            last = max((journal for journal in journals if journal.rows), key=lambda journal: journal.rows[-1]["turn"])
            if not last.undo().get("auto"):
                return True

    def _line(self, task: Task, shown: Shown, verdict: int | str) -> Row:
        best = 0 if isinstance(verdict, str) else verdict
        rest = [text for i, text in enumerate(shown.answers) if i != best]
        return {
            "id": task.id,
            "prompt": unwritten(task.prompt),
            "chosen": shown.answers[best],
            "rejected": rest[0] if len(rest) == 1 else rest,
            **({"tools": task.tools} if task.tools else {}),
            **({"tie": True} if verdict == TIE else {}),
            "answers": shown.answers,
            "models": shown.models,
            "shown": shown.order,
            "judgement": verdict,
            "turn": self._turn(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _sampler(source: Source) -> Callable[[Task], tuple[list[str], list[str]]]:
    """From a task to different answers and their models, the same each time. Models are loaded when first needed."""
    loaded: list[Any] = []

    def ask(task: Task, which: int, attempt: int, count: int) -> list[str]:
        from mlxft.data.encode import encode_prompt
        from mlxft.model.batch_sample import sample_batch, text_of
        from mlxft.rundir import load

        if not loaded:
            loaded.append(load(str(source.model), source.adapter))
            if source.against:
                loaded.append(load(source.against))
        model, tokenizer = loaded[which].model, loaded[which].tokenizer
        said = f"{source.seed} {task.id} {which} {attempt}".encode()
        seed = int.from_bytes(blake2b(said, digest_size=7).digest(), "big")
        how = replace(source.sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        ids = encode_prompt(task.prompt, tokenizer, tools=task.tools)
        (found,) = sample_batch(model, tokenizer, [ids], how, samples=count, seed=seed)
        return [text_of(tokenizer, answer, how) for answer in found]

    def several(task: Task, which: int, count: int) -> list[str]:
        """At most `count` texts, all different, none of them blank."""
        texts: list[str] = []
        for attempt in range(1 if source.sampling.temperature == 0 else 1 + _AGAIN):
            for text in ask(task, which, attempt, count - len(texts)):
                if text.strip() and text not in texts:
                    texts.append(text)
            if len(texts) == count:
                break
        return texts

    def sample(task: Task) -> tuple[list[str], list[str]]:
        if not source.against:
            texts = several(task, 0, source.n)
            return texts, source.names[: len(texts)]
        # A second model that says the same is a result.
        first, second = several(task, 0, 1), several(task, 1, 1)
        if not first or not second:
            return [], []
        return (first, source.names[:1]) if first == second else (first + second, source.names)

    return sample
