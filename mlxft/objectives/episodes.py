"""Episodes: conversations of a model with an environment, which replies to its turns, runs its tools and rewards it.

The model's turns are kept as sampled. What stands between two of them (the end of a turn, observations, the prompt of
the next turn) is what the chat template adds to the conversation; it is in the context and is never trained.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, model_validator

from mlxft.config import Settings, error_of, hand_over, handed_over, named_by, read_yaml, validated
from mlxft.data.chat import (
    MARKS,
    Chat,
    Tools,
    answer_of,
    by_template,
    decode_completion,
    opening_after,
    split_thoughts,
    until_stop,
)
from mlxft.data.dataset import Ids, context_ids, prompt_text
from mlxft.data.formats import Message, message_at, tools_of
from mlxft.distributed import Portion
from mlxft.errors import ConfigError, DataError, EpisodeError, half_character, shorten
from mlxft.model.sampling import Sampled, Sampling, TurnStart, sample_turns
from mlxft.objectives.rewards import Rewards, Scores, ToScore, as_number

# --- protocol ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that a model wrote.

    Attributes:
        name, arguments: as the parser of the model's family reads them; not checked against the tool's schema.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a model wrote in one turn.

    Attributes:
        text: all of it, without the token or text that ended it.
        answer: the text without its thoughts.
        calls: the tool calls in it; none where the environment has no tools.
        finished: whether the model ended the turn; False: it was cut off at rollout.max_tokens or the last token that
            the episode may have.
    """

    text: str
    answer: str
    calls: tuple[ToolCall, ...] = ()
    finished: bool = True


@dataclass(frozen=True)
class Observation:
    """How an environment replies to a turn.

    Attributes:
        messages: messages of role tool or user; or a text, which is a tool's message where the turn has calls, else a
            user's. What the model sees before its next turn.
        reward: of the turn; None: none.
        end: whether the episode ends here. The messages of an end are shown, but the model does not see them.
    """

    messages: str | Sequence[Message] = ()
    reward: float | None = None
    end: bool = False


class Environment:
    """What replies to a model's turns. Each episode has an object of its own.

    Subclassing is optional: any class with `reset` and `step` will do, and both may be coroutines, which run side by
    side for all episodes; plain methods run one after another. An episode that is sampled again (after a crash) must
    meet the same environment, so all randomness has to come from the seed.

    Attributes:
        tools: JSON schemas of tools, which go into the chat template; the same for all episodes.
    """

    tools: Sequence[dict[str, Any]] = ()

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        """Begin an episode.

        Args:
            row: the fields of the prompt's row.
            seed: of everything random in this episode.
        Returns:
            None, or a first observation, which follows the row's prompt: a text of the user, or messages.
        """
        return

    def step(self, turn: Turn) -> Any:
        """Return the `Observation` that follows a turn of the model."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def rows(self, valid: bool) -> list[dict[str, Any]]:
        """Return the rows that `data.train: environment` (or `data.valid`) stands for; by default there are none."""
        return []


# --- settings ---------------------------------------------------------------------------------------------------------

BUILT_IN = {"calculator": "Calculator", "search": "Search", "words": "Words"}
_WAYS = f"file.py:Class, package.module:Class, verifiers:ID, or {', '.join(BUILT_IN)}"


class EnvironmentSettings(Settings):
    """The section `environment`: what replies to the model's turns. A plain text is its `path`."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"]})

    path: str | None = Field(None, description=f"Environment: {_WAYS}. Default: none; a completion is one turn.")
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of the environment's class.")
    turns: int = Field(8, ge=1, le=10**4, description="Most turns of the model in an episode.")
    tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of an episode after its prompt, observations included; default: what data.max_length "
        "leaves.",
    )
    seconds: float = Field(60.0, gt=0, description="Seconds that a call of the environment may take.")
    on_error: Literal["observe", "end"] = Field(
        "observe",
        description="Where tool calls cannot be parsed or a step raises: show the model the error, or end the episode.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> EnvironmentSettings:
        given = [n for n, f in type(self).model_fields.items() if n != "path" and getattr(self, n) != f.get_default()]
        given = [n for n in given if n != "options" or self.options]
        if self.path is None and given:
            raise ValueError(f"{', '.join(given)}: there is no environment; give environment.path, or leave it out")
        return self


def read_environment(text: str | None) -> EnvironmentSettings | None:
    """Return the settings that an option gives: a name or path, or YAML of the section `environment`; None for None.

    Raises:
        ConfigError: it is not YAML of such settings.
    """
    if text is None:
        return None
    found = read_yaml(text, "--environment")
    settings = validated(EnvironmentSettings, found if isinstance(found, dict) else {"path": text}, "--environment")
    if settings.path is None:
        raise ConfigError("--environment: path is needed")
    return settings


def find_environment(settings: EnvironmentSettings) -> Callable[[], Any]:
    """Return what makes an environment for an episode.

    Raises:
        ConfigError: there is no such environment, or it cannot be made with its options.
    """
    spec = settings.path
    assert spec is not None
    name, _, inside = spec.partition(":")
    own = importlib.import_module("mlxft.objectives.environments")
    if spec in BUILT_IN:
        kind = getattr(own, BUILT_IN[spec])
    elif name == "verifiers" and inside:
        return own.from_verifiers(inside, settings.options)
    elif name == "python":
        kind = handed_over("environment.path", spec)
    elif ":" in spec:
        kind = named_by("environment.path", spec, "class; expected one with reset and step")
    else:
        raise ConfigError(f"environment.path: no such environment {spec!r}; expected {_WAYS}")
    return partial(kind, **settings.options)


# --- calls of environments --------------------------------------------------------------------------------------------

_MOST_HUNG = 8  # threads that are left behind before a run is stopped
_GRACE = 0.5  # seconds by which a coroutine's own limit comes before the thread's


class TookTooLong(Exception):
    """A call of an environment exceeded its limit."""


async def _result(call: Callable[[], Any]) -> Any:
    """Return the result of a function or coroutine; what would end the thread is an error like others."""
    try:
        found = call()
        return await found if inspect.isawaitable(found) else found
    except (Exception, asyncio.CancelledError, GeneratorExit):  # the last two: it is stopped
        raise
    except SystemExit as error:
        raise RuntimeError(f"it called sys.exit({error})") from error
    except BaseException as error:  # a panic of Rust, KeyboardInterrupt, outcomes of pytest
        raise RuntimeError(error_of(error)) from error


class _Calls:
    """Calls code of environments on an event loop in a thread of its own, which is left behind where it hangs.

    Args:
        on_hang: called when a thread is left behind.
    """

    def __init__(self, seconds: float, on_hang: Callable[[], None]) -> None:
        self._seconds, self._on_hang = seconds, on_hang
        self._start()

    def _start(self) -> None:
        loop = self._loop = asyncio.new_event_loop()

        def run() -> None:
            try:
                loop.run_forever()
                left = asyncio.all_tasks(loop)
                for task in left:
                    task.cancel()
                if left:
                    loop.run_until_complete(asyncio.wait(left, timeout=1.0))
            finally:
                loop.close()

        self._thread = threading.Thread(target=run, name="mlxft environment", daemon=True)
        self._thread.start()

    def __enter__(self) -> _Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)

    def all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return what each call returns or raises; TookTooLong for one that exceeds the limit."""
        found: list[Any] = []
        futures = self._submit(calls)
        for k in range(len(calls)):
            try:
                found.append(futures[k].result(self._seconds + _GRACE))
            except Exception as error:
                if futures[k].done():
                    found.append(error)
                    continue
                found.append(TookTooLong())
                self._leave(futures[k:])
                futures[k + 1 :] = self._submit(calls[k + 1 :])
        return found

    def _submit(self, calls: Sequence[Callable[[], Any]]) -> list[concurrent.futures.Future[Any]]:
        loop = self._loop

        async def run(call: Callable[[], Any]) -> Any:
            if loop is not self._loop:  # left behind, and alive again
                return None
            task = asyncio.ensure_future(_result(call))
            done, _ = await asyncio.wait({task}, timeout=self._seconds)
            if done:
                return task.result()
            task.cancel()
            raise TookTooLong

        return [asyncio.run_coroutine_threadsafe(run(call), loop) for call in calls]

    def _leave(self, futures: Sequence[concurrent.futures.Future[Any]]) -> None:
        """Continue on another thread: one that runs code cannot be stopped."""
        stuck = self._loop
        self._start()
        for future in futures:
            future.cancel()
        stuck.call_soon_threadsafe(stuck.stop)
        self._on_hang()


# --- episodes ---------------------------------------------------------------------------------------------------------

LIMITS = ("turns", "tokens", "seconds")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt.

    Attributes:
        ids: (P,) int32, as the model sees them; text: decoded.
        row, where: the row it comes from, and its place.
        asked: the text or the messages that were rendered.
    """

    ids: Ids
    text: str
    row: dict[str, Any]
    where: str
    asked: str | list[Message]


@dataclass
class Episode:
    """A conversation of the model with an environment.

    Attributes:
        begin: the tokens of the prompt that stand before `ids`; a first observation replaces those after them.
        ids, own: the ids after them, and whether the policy wrote each.
        messages: the whole conversation.
        turns: of the model.
        rewards: (index among the policy's tokens, reward) of each turn that has one.
        ended: "end" where the environment ended it, "error", or the limit that was reached: turns, tokens, seconds.
        errors, unparsed: steps that raised, and turns whose tool calls cannot be parsed.
        failure: what the last of these steps raised, or "".
        last: where the last turn starts in `ids`, and in `messages`.
        text, opening: of the last turn, and the mark of a thought that was open before it, or "".
    """

    prompt: EncodedPrompt
    environment: Any
    begin: int
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    rewards: list[tuple[int, float]] = field(default_factory=list)
    ended: str = ""
    errors: int = 0
    unparsed: int = 0
    failure: str = ""
    last: tuple[int, int] = (0, 0)
    text: str = ""
    opening: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what other ranks need to know of it, as JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("prompt", "environment")}

    @classmethod
    def of(cls, known: Mapping[str, Any], prompt: EncodedPrompt) -> Episode:
        """Return an episode of another rank, by its `to_json`."""
        return cls(
            prompt, None, **{**known, "rewards": [tuple(pair) for pair in known["rewards"]], "last": (*known["last"],)}
        )

    def add(self, ids: Sequence[int], own: bool) -> None:
        """Add ids, of the policy or not."""
        self.ids += ids
        self.own += [own] * len(ids)

    @property
    def turn_rewards(self) -> npt.NDArray[np.float32]:
        """Return (N,) the environment's reward at each of the policy's tokens: a turn's stands at its last one."""
        found = np.zeros(sum(self.own), np.float32)
        for index, value in self.rewards:
            found[index] += value
        return found


class Episodes:
    """Plays episodes of an environment.

    Args:
        chat: whether prompts are rendered by the chat template; without it observations are appended as they are.
        rewarded: whether something else gives rewards, so that the environment need not.
    Attributes:
        tools: schemas of the environment's tools.
    Raises:
        ConfigError: there is no such environment, or it cannot be made.
    """

    def __init__(self, settings: EnvironmentSettings, tokenizer: Any, chat: bool, rewarded: bool) -> None:
        self.settings, self.tokenizer, self.rewarded = settings, tokenizer, rewarded
        self.chat = chat and bool(tokenizer.has_chat_template)
        self.name = f"environment {settings.path}"
        self.make, self._hung = find_environment(settings), 0
        try:
            self._first = self.make()
            tools = list(getattr(self._first, "tools", ()))
        except KeyboardInterrupt:
            raise
        except ConfigError as error:  # of an environment that mlxft brings
            raise ConfigError(f"{self.name}: {error}") from error
        except BaseException as error:  # whatever the user's class raises, or ends the process with
            raise ConfigError(f"{self.name}: it cannot be made with environment.options: {error_of(error)}") from error
        self.tools: Tools = [_checked_tool(tool, f"{self.name}: tools[{i}]") for i, tool in enumerate(tools)]
        lacks = [name for name in ("reset", "step") if not callable(getattr(self._first, name, None))]
        if lacks:
            raise ConfigError(f"{self.name}: {type(self._first).__name__} has no {' and no '.join(lacks)}")
        self.parser = _parser(tokenizer) if self.chat else None
        if self.tools and self.chat and self.parser is None:
            raise ConfigError(
                f"{self.name}: it has tools, and mlx-lm has no parser for the tool calls of this chat template; choose "
                "a model that was trained to call tools, or set model.chat_template to a template with tools"
            )

    def rows(self, split: str, given: str | None) -> str | None:
        """Return where the rows of a split are; the environment's own where `given` is environment.

        Raises:
            ConfigError: it has none, or cannot give them.
        """
        if given != "environment":
            return given
        try:
            rows = list(self._first.rows(split != "train")) if hasattr(self._first, "rows") else []
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ConfigError(f"data.{split}: {self.name}: rows cannot be read: {error_of(error)}") from error
        if not rows:
            raise ConfigError(f"data.{split}: {self.name} has no rows of its own; give a file of prompts")
        return hand_over(f"data.{split}", "environment", rows)

    def score(self, episodes: Sequence[Episode], rewards: Rewards, *, tokens: int) -> Scores:
        """Return the rewards of episodes: of their last turns, after what was said before, and their environments'."""
        items = []
        for e in episodes:
            context, (at, message) = [*e.prompt.ids[: e.begin].tolist(), *e.ids], e.last
            before = context[: e.begin + at]
            text = e.prompt.text if not at else str(self.tokenizer.decode(before))
            asked = e.messages[:message] if self.chat else text
            ids, reply, ended = np.array(before, np.int32), np.array(e.ids[at:], np.int32), e.ended == "end"
            items.append(ToScore(ids, reply, text, e.text, e.prompt.row, ended, e.prompt.where, asked, e.opening))
        scores = rewards.score(items, tokens=tokens)
        own = np.array([sum(value for _, value in e.rewards) for e in episodes], np.float32)
        return Scores(scores.total + own, {**scores.components, "environment": own})

    def tools_of(self, row: Mapping[str, Any]) -> Tools | None:
        """Return the tools that a row's prompt names: its own and the environment's."""
        return [*(tools_of(row) or ()), *self.tools] or None

    def check(self, prompt: EncodedPrompt) -> None:
        """Check with a prompt that the chat template can write an observation after a turn.

        Raises:
            DataError: it cannot.
        """
        functions = [tool.get("function", tool) for tool in self.tools[:1]]
        calls = [ToolCall(str(function["name"]), {}) for function in functions]
        opening = opening_after(self.tokenizer, prompt.ids.tolist())
        self.follow(_asked(prompt), _turns(_sound(opening), calls), [_checked("textqz1x", calls, "")], prompt, None)

    def play(
        self,
        model: nn.Module,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        *,
        most: int,
        seed: int,
        rows: int | None = None,
        part: Portion | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Episode]:
        """Sample an episode for each prompt.

        Args:
            sampling: of a turn.
            most: tokens of prompt and episode together.
            rows: most episodes decoded at one time.
            part: the stretch of all prompts that these are, on whose numbers all randomness depends.
            on_done: called with the number of episodes finished since its last call.
        Raises:
            DataError: the chat template cannot write an observation.
            EpisodeError: the environment cannot be reset, does not reply by the protocol, or hangs too often.
        """
        with _Calls(self.settings.seconds, self._note_hung) as calls:
            playing = _Playing(self, sampling, most, calls, on_done or (lambda n: None))
            starts = playing.begin(prompts, seed, part.start if part is not None else 0)
            sample_turns(model, self.tokenizer, starts, sampling, playing.reply, seed=seed, rows=rows, part=part)
        return playing.episodes

    def _note_hung(self) -> None:
        self._hung += 1
        if self._hung >= _MOST_HUNG:
            raise EpisodeError(
                f"{self.name}: {self._hung} calls took longer than environment.seconds ({self.settings.seconds:g}) and "
                "cannot be stopped, so each keeps a thread: correct the environment (coroutines can be stopped), or "
                "raise environment.seconds"
            )

    def follow(
        self,
        before: list[Message],
        turns: Sequence[Message],
        replies: Sequence[list[Message]],
        prompt: EncodedPrompt,
        last: int | None,
        sound: Message | None = None,
    ) -> tuple[list[Message], list[int]]:
        """Return a turn with what follows it as messages, and the ids from the turn's end to the next turn.

        Args:
            turns, replies: forms of the turn and of the observation, the first that the chat template takes is used.
            last: the turn's last id.
            sound: a turn that stands for one that was cut off or is malformed, where the template takes no form of it.
        Raises:
            DataError: the template writes none of them, or rewrites earlier turns.
        """
        if not self.chat:
            text = "".join(str(message["content"]) for message in replies[0])
            return [turns[0], *replies[0]], context_ids(self.tokenizer, text, plain=False, where=prompt.where)
        problems = []
        for turn, reply in product([*turns, *([sound] if sound else [])], replies):
            try:
                text = self._written(before, turn, reply, prompt)
            except DataError as error:
                problems.append(error)
                continue
            ends = self.tokenizer.eos_token_ids
            if last in ends:  # the model has ended the turn
                marks = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in ends]
                mark = next((mark for mark in marks if text.lstrip().startswith(mark)), "")
                text = text.lstrip()[len(mark) :] if mark else text
            ids = context_ids(self.tokenizer, text, plain=False, where=prompt.where)
            return [turns[0] if turn is sound else turn, *reply], ids
        raise problems[0]

    def _written(self, before: list[Message], turn: Message, reply: list[Message], prompt: EncodedPrompt) -> str:
        """Return what the template writes from a turn's end to the next turn."""

        def written(chat: Chat) -> str:
            whole = chat.render([*before, turn, *reply], generation=True)
            plain = chat.render(before, generation=True) + turn["content"]
            if "tool_calls" not in turn and whole.startswith(plain):  # the turn is written as it was sampled
                replace(chat, tools=None).check_written(reply, whole[len(plain) :], {})
                return whole[len(plain) :]
            # It may be written in another form (calls in other white space), if what follows does not depend on that.
            head = chat.render([*before, turn])
            if not whole.startswith(head):
                raise chat.error(
                    f"{self.name}: this chat template rewrites earlier turns where a message of role "
                    f"{reply[0]['role']} follows, while an episode's turns stay in the context as sampled; set "
                    "model.chat_template to one that keeps them",
                    len(before) + 1,
                )
            replace(chat, tools=None).check_written(reply, whole[len(head) :], {})
            _, written, end = chat.render([*before, {"role": "assistant", "content": _STAND_IN}]).rpartition(_STAND_IN)
            if not written:
                raise chat.error(f"{self.name}: this chat template does not write the model's turns")
            return end + whole[len(head) :]

        messages = [*before, turn, *reply]
        return by_template(self.tokenizer, messages, self.tools_of(prompt.row), prompt.where, written)


_STAND_IN = "textqz0x"


def _sound(opening: str) -> str:
    """Return a turn after a prompt that may open a thought, which it then closes."""
    closing = dict(MARKS).get(opening)
    return _STAND_IN if closing is None else f"thoughtqzx\n{closing}\n\n{_STAND_IN}"


@dataclass
class _Playing:
    """Episodes that are being played.

    Attributes:
        most: tokens of prompt and episode together.
    """

    owner: Episodes
    sampling: Sampling
    most: int
    calls: _Calls
    on_done: Callable[[int], None]
    episodes: list[Episode] = field(default_factory=list)

    def begin(self, prompts: Sequence[EncodedPrompt], seed: int, number_of_first: int) -> list[TurnStart]:
        """Make and reset an environment for each prompt, and return what stands before each first turn."""
        owner = self.owner
        self.episodes = [Episode(prompt, None, len(prompt.ids), messages=_asked(prompt)) for prompt in prompts]

        def reset(number: int, episode: Episode) -> Any:
            episode.environment = owner.make()
            own = int(np.random.default_rng([seed, number_of_first + number]).integers(1 << 32))
            return episode.environment.reset(dict(episode.prompt.row), own)

        found = self.calls.all([partial(reset, number, episode) for number, episode in enumerate(self.episodes)])
        starts = []
        for episode, first in zip(self.episodes, found):
            at = f"{owner.name}: {episode.prompt.where}: reset"
            if isinstance(first, TookTooLong):
                raise EpisodeError(f"{at} took longer than environment.seconds ({owner.settings.seconds:g})")
            if isinstance(first, BaseException):
                raise EpisodeError(f"{at} raised {error_of(first)}") from first
            if first is not None and (observed := _checked(first, (), at)):
                self._open(episode, observed)
            start = self._start(episode, [*episode.prompt.ids[: episode.begin].tolist(), *episode.ids])
            if start is None:
                raise DataError(f"{at}: the first observation leaves no room for a turn: raise data.max_length")
            starts.append(start)
        return starts

    def _open(self, episode: Episode, observed: list[Message]) -> None:
        """Let an episode begin with a first observation."""
        prompt, tokenizer = episode.prompt, self.owner.tokenizer
        episode.messages += observed
        if self.owner.chat:
            tools = self.owner.tools_of(prompt.row)
            text = prompt_text(episode.messages, tokenizer, tools=tools, where=prompt.where)
            whole = context_ids(tokenizer, text, plain=False, where=prompt.where)
            # It stands before the prompt of the first turn, with which the row's prompt ends.
            both = zip(whole, prompt.ids.tolist())
            episode.begin = next((i for i, (a, b) in enumerate(both) if a != b), min(len(whole), len(prompt.ids)))
            episode.add(whole[episode.begin :], False)
        else:
            text = "".join(str(message["content"]) for message in observed)
            episode.add(context_ids(tokenizer, text, plain=False, where=prompt.where), False)

    def _start(self, episode: Episode, ids: Sequence[int]) -> TurnStart | None:
        """Return what the context gets before a turn; None where there is no room for the turn."""
        left = self.most - episode.begin - len(episode.ids)
        if (tokens := self.owner.settings.tokens) is not None:
            left = min(left, tokens - len(episode.ids))
        return TurnStart(ids, min(left, self.sampling.max_tokens)) if left > 0 else None

    def reply(self, turns: list[tuple[int, Sampled]]) -> list[TurnStart | None]:
        """Give turns to their environments, and return what each episode gets before its next turn, if there is one."""
        going = [self.episodes[number] for number, _ in turns]
        read = [self._read(episode, sampled) for episode, (_, sampled) in zip(going, turns)]
        asked = [partial(e.environment.step, turn) for e, turn in zip(going, read) if isinstance(turn, Turn)]
        found = iter(self.calls.all(asked))
        starts = []
        for episode, (_, sampled), turn in zip(going, turns, read):
            at = f"{self.owner.name}: {episode.prompt.where}: step {episode.turns}"
            if isinstance(turn, Turn):
                reply = next(found)
                if isinstance(reply, BaseException) and not isinstance(reply, TookTooLong):
                    episode.errors, episode.failure = episode.errors + 1, error_of(reply)
                calls: Sequence[ToolCall] = turn.calls
            else:
                reply, calls = turn, (_UNPARSED,)
            starts.append(self._next(episode, sampled, calls, self._observation(episode, reply, at), at))
        self.on_done(sum(start is None for start in starts))
        return starts

    def _read(self, episode: Episode, sampled: Sampled) -> Turn | ValueError:
        """Add a turn to its episode, and return it as its environment gets it, or why its calls cannot be parsed."""
        owner = self.owner
        context = [*episode.prompt.ids[: episode.begin].tolist(), *episode.ids]
        opening = episode.opening = opening_after(owner.tokenizer, context)
        episode.last = len(episode.ids), len(episode.messages)
        episode.add(sampled.ids, True)
        episode.turns += 1
        text = decode_completion(owner.tokenizer, sampled.ids)
        episode.text = until_stop(text, self.sampling.stop, opening, self.sampling.stop_in_answer)
        try:
            raw = split_thoughts(self._raw(sampled), opening)[1]
            tools = owner.tools_of(episode.prompt.row)
            calls = owner.parser.read(raw, tools) if tools and owner.parser is not None else []
        except ValueError as error:
            episode.unparsed += 1
            return error
        return Turn(episode.text, answer_of(episode.text, opening), tuple(calls), sampled.finish != "length")

    def _raw(self, sampled: Sampled) -> str:
        """Return all of a turn as text, its special tokens too, but for the one that ended it."""
        return str(self.owner.tokenizer.decode(sampled.ids[: -1 if sampled.finish == "eos" else None]))

    def _observation(self, episode: Episode, reply: Any, at: str) -> Observation:
        """Return the observation that a step gave, or one of its error."""
        if isinstance(reply, Observation):
            if reply.reward is not None and as_number(reply.reward) is None:
                raise EpisodeError(f"{at}: its reward is {reply.reward!r:.60}; expected a finite number or None")
            if not reply.messages and not reply.end:
                raise EpisodeError(f"{at}: it returned no messages and no end; the model needs one of them")
            return reply
        if isinstance(reply, TookTooLong):
            episode.ended = "seconds"
            return Observation()
        if not isinstance(reply, BaseException):
            raise EpisodeError(f"{at}: it returned {reply!r:.60}; expected an mlxft.Observation")
        if self.owner.settings.on_error == "end":
            episode.ended = "error"
        return Observation(f"Error: {error_of(reply)}".encode("utf-8", "replace").decode())

    def _next(
        self, episode: Episode, sampled: Sampled, calls: Sequence[ToolCall], observation: Observation, at: str
    ) -> TurnStart | None:
        """Record what follows a turn, and return what the context gets before the next one; None: the episode ended."""
        owner, number = self.owner, as_number(observation.reward)
        if number is not None:
            episode.rewards.append((sum(episode.own) - 1, number))
        if observation.end:
            episode.ended = "end"
            if not episode.rewards and not owner.rewarded:
                raise EpisodeError(
                    f"{at}: the episode ended without any reward; return one with the Observation, or give rewards"
                )
        elif not episode.ended and episode.turns >= owner.settings.turns:
            episode.ended = "turns"
        replies = [_checked(observation.messages, calls, at)]
        if calls == (_UNPARSED,):  # the template may refuse a tool's message without a call
            calls, replies = (), [*replies, _checked(observation.messages, (), at)]
        turns = _turns(self._raw(sampled), calls)
        if episode.ended:
            episode.environment = None
            episode.messages += [turns[0], *replies[0]]
            return None
        thinks = all(part.strip() for part in split_thoughts(turns[0]["content"], episode.opening))
        standing = {"role": "assistant", "content": _sound(episode.opening)}
        sound = None if thinks and sampled.finish != "length" else standing
        messages, ids = owner.follow(episode.messages, turns, replies, episode.prompt, sampled.ids[-1], sound)
        episode.messages += messages
        episode.add(ids, False)
        start = self._start(episode, ids)
        if start is None:
            episode.ended, episode.environment = "tokens", None
            del episode.ids[-len(ids) :], episode.own[-len(ids) :]  # no turn follows
        return start


_UNPARSED = ToolCall("", {})


def _asked(prompt: EncodedPrompt) -> list[Message]:
    """Return the messages of a prompt."""
    return [{"role": "user", "content": prompt.asked}] if isinstance(prompt.asked, str) else [*prompt.asked]


def _turns(text: str, calls: Sequence[ToolCall]) -> list[Message]:
    """Return the forms of a turn as a message: its text as it stands, and, with calls, those by themselves."""
    found: list[Message] = [{"role": "assistant", "content": text}]
    if calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        ids = [{"id": _call_id(i), "type": "function", "function": f} for i, f in enumerate(functions)]
        found.append({"role": "assistant", "content": "", "tool_calls": ids})
    return found


def _call_id(index: int) -> str:
    return f"call{index:05d}"  # nine letters, as Mistral's templates require


def _checked(given: Any, calls: Sequence[ToolCall], at: str) -> list[Message]:
    """Return what an environment says as messages.

    Raises:
        EpisodeError: it is neither a text nor messages of role tool or user.
    """
    if isinstance(given, str):
        given = [{"role": "tool" if calls else "user", "content": given}]
    if not isinstance(given, Sequence):
        raise EpisodeError(f"{at}: its messages are {given!r:.60}; expected a text or a list of messages")
    try:
        messages = [message_at(dict(message), f"messages[{i}]") for i, message in enumerate(given)]
        if half := half_character(messages, "messages"):
            raise DataError(half)
    except (DataError, TypeError, ValueError) as error:
        raise EpisodeError(f"{at}: {error}") from error
    wrong = [message["role"] for message in messages if message["role"] not in ("tool", "user")]
    if wrong:
        raise EpisodeError(f"{at}: a message has role {wrong[0]}; expected tool or user")
    tools = [message for message in messages if message["role"] == "tool"]
    for i, (message, call) in enumerate(zip(tools, calls)):
        message.setdefault("tool_call_id", _call_id(i))
        message.setdefault("name", call.name or "unknown")
    return messages


def _checked_tool(tool: Any, at: str) -> dict[str, Any]:
    """Return a tool's schema; raise ConfigError where it is not one that names a function."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        wanted = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise ConfigError(f"{at} is {shorten(repr(tool))}; expected a JSON schema such as {wanted}")
    return dict(tool)


class _Parser(NamedTuple):
    """mlx-lm's parser of tool calls for a family of models: the marks around a call, and what reads its inside."""

    begin: str
    end: str
    parse: Callable[[str, Tools], Any]

    def read(self, text: str, tools: Tools) -> list[ToolCall]:
        """Return the tool calls in a turn.

        Raises:
            ValueError: one of them cannot be parsed.
        """
        found = []
        while self.begin in text:
            text = text.partition(self.begin)[2]
            inside, _, text = text.partition(self.end) if self.end else (text, "", "")
            try:
                parsed = self.parse(inside, tools)
            except Exception as error:  # each parser has errors of its own
                raise ValueError(f"the tool call cannot be parsed: {shorten(str(error))}") from error
            for call in parsed if isinstance(parsed, list) else [parsed]:
                name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
                if not isinstance(name, str) or not isinstance(arguments, dict):
                    raise ValueError("the tool call cannot be parsed: it needs a name and arguments, a mapping")
                if half := half_character(call, "the call"):  # JSON can hold it, and an environment may repeat it
                    raise ValueError(f"the tool call cannot be parsed: {half}")
                found.append(ToolCall(name, arguments))
        return found


def _parser(tokenizer: Any) -> _Parser | None:
    """Return the parser of the tokenizer's tool calls; None if mlx-lm has none."""
    if getattr(tokenizer, "tool_parser", None) is not None:
        return _Parser(tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser)
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    # The template of model.chat_template or of a .gguf file is not there when mlx-lm looks.
    name = _infer_tool_parser(tokenizer)
    if name is None:
        return None
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return _Parser(module.tool_call_start, module.tool_call_end, module.parse_tool_call)
