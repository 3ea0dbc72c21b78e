"""Environments that mlxft brings: a calculator, a word game, a search over rows, and those of the package verifiers."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

from mlxft.config import error_of
from mlxft.data.formats import Message
from mlxft.data.sources import Row, read_rows
from mlxft.errors import ConfigError, EpisodeError, missing_extra
from mlxft.objectives.episodes import Environment, Observation, ToolCall, Turn
from mlxft.objectives.rewards import last_number

# --- tools ------------------------------------------------------------------------------------------------------------


class _WithTool(Environment):
    """A question, and one tool that helps with it. A turn without calls is the answer."""

    def describe(self) -> tuple[str, str, str, str]:
        """Return the tool's name and description, and those of its only argument, a text."""
        raise NotImplementedError

    def run(self, argument: str) -> str:
        """Return what the tool says."""
        raise NotImplementedError

    def is_right(self, answer: str) -> bool:
        """Return whether the final answer is right."""
        raise NotImplementedError

    @property
    def tools(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the tool's schema."""
        name, what, argument, about = self.describe()
        properties = {argument: {"type": "string", "description": about}}
        parameters = {"type": "object", "properties": properties, "required": [argument]}
        return [{"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}]

    def reset(self, row: dict[str, Any], seed: int) -> None:
        if not isinstance(row.get("answer"), str | int | float):
            raise ValueError("the row needs an answer, a text or a number")
        self.wanted = str(row["answer"])

    def step(self, turn: Turn) -> Observation:
        if turn.calls:
            return Observation([{"role": "tool", "content": self._result(call)} for call in turn.calls])
        return Observation(reward=float(self.is_right(turn.answer)), end=True)

    def _result(self, call: ToolCall) -> str:
        name, _, argument, _ = self.describe()
        if call.name != name:
            return f"Error: there is no tool {call.name[:60]!r}; there is {name}"
        value = call.arguments.get(argument)
        if not isinstance(value, str):
            return f"Error: {name} needs {argument}, a text"
        try:
            return self.run(value)
        except ValueError as error:
            return f"Error: {error}"


# --- calculator -------------------------------------------------------------------------------------------------------

_LONGEST, _DEEPEST, _BITS = 200, 40, 1000  # characters, nested parentheses and signs, size of a number
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\*\*|[-+*/%^()]))")


def calculate(expression: str) -> Fraction:
    """Return the exact value of an arithmetic expression: + - * / % ^ (or **) and parentheses. No Python is run.

    Raises:
        ValueError: it is not such an expression, or it or a number in it is too large.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression has {len(expression):,} characters; at most {_LONGEST} are read")
    tokens: list[str] = []
    at = 0
    while expression[at:].strip():
        found = _TOKEN.match(expression, at)
        if found is None:
            raise ValueError(f"unexpected {expression[at:].strip()[:1]!r}")
        tokens.append(found[1] or found[2])
        at = found.end()
    value, rest = _sum(tokens, 0)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}")
    return value


_Parsed = tuple[Fraction, list[str]]


def _sum(tokens: list[str], depth: int) -> _Parsed:
    value, rest = _product(tokens, depth)
    while rest and rest[0] in ("+", "-"):
        sign = rest[0]
        other, rest = _product(rest[1:], depth)
        value = _bounded(value + other if sign == "+" else value - other)
    return value, rest


def _product(tokens: list[str], depth: int) -> _Parsed:
    value, rest = _signed(tokens, depth)
    while rest and rest[0] in ("*", "/", "%"):
        sign = rest[0]
        other, rest = _signed(rest[1:], depth)
        if sign != "*" and not other:
            raise ValueError("division by zero")
        value = _bounded(value * other if sign == "*" else value / other if sign == "/" else value % other)
    return value, rest


def _signed(tokens: list[str], depth: int) -> _Parsed:
    """Parse a signed number or power. A power binds closer than a sign before it: -2^2 is -4."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST}")
    if tokens and tokens[0] in ("+", "-"):
        value, rest = _signed(tokens[1:], depth + 1)
        return (-value if tokens[0] == "-" else value), rest
    value, rest = _atom(tokens, depth)
    if rest and rest[0] in ("^", "**"):
        power, rest = _signed(rest[1:], depth + 1)
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
        if power.denominator != 1 or abs(power) * max(size, 1) > _BITS:
            raise ValueError("the exponent is too large, or not a whole number")
        if not value and power < 0:
            raise ValueError("division by zero")
        value = value ** int(power)
    return value, rest


def _atom(tokens: list[str], depth: int) -> _Parsed:
    if not tokens:
        raise ValueError("the expression ends too early")
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:], depth + 1)
        if rest[:1] != [")"]:
            raise ValueError("a parenthesis is not closed")
        return value, rest[1:]
    if tokens[0][-1] not in "0123456789.":
        raise ValueError(f"unexpected {tokens[0]!r}")
    return _bounded(Fraction(tokens[0])), tokens[1:]


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
        raise ValueError("the numbers are too large")
    return value


def _shown(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


class Calculator(_WithTool):
    """Arithmetic with a calculator as the tool; 1 for the right number.

    Args:
        count: rows of its own. numbers, largest: in each of their expressions. seed: of them.
    """

    def __init__(self, count: int = 1000, numbers: int = 3, largest: int = 99, seed: int = 0) -> None:
        self._own = count, numbers, largest, seed

    def describe(self) -> tuple[str, str, str, str]:
        return "calculate", "Evaluate an arithmetic expression.", "expression", "For example (12 + 7) * 3."

    def run(self, argument: str) -> str:
        return _shown(calculate(argument))

    def is_right(self, answer: str) -> bool:
        said, wanted = last_number(answer), last_number(self.wanted)
        return said is not None and wanted is not None and math.isclose(said, wanted, rel_tol=1e-6, abs_tol=1e-9)

    def rows(self, valid: bool) -> list[dict[str, Any]]:
        count, numbers, largest, seed = self._own
        rng = random.Random(f"{seed} {valid}")
        rows = []
        for _ in range(max(1, count // 10) if valid else count):
            text = str(rng.randint(1, largest))
            for _ in range(numbers - 1):
                text = f"({text})" if rng.random() < 0.3 else text
                text = f"{text} {rng.choice('+-*')} {rng.randint(1, largest)}"
            asked = f"What is {text}? Use the calculator, then reply with the number alone."
            rows.append({"prompt": asked, "answer": _shown(calculate(text))})
        return rows


# --- search -----------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\w+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class _Index:
    """Texts, found by BM25 (Robertson and Zaragoza 2009; k1 = 1.2, b = 0.75)."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self._counts = texts, [Counter(_words(text)) for text in texts]
        self._sizes = [count.total() for count in self._counts]
        self._mean = max(1.0, sum(self._sizes) / len(texts))
        self._rows: dict[str, list[int]] = {}
        for i, count in enumerate(self._counts):
            for word in count:
                self._rows.setdefault(word, []).append(i)

    def find(self, query: str, most: int) -> list[str]:
        """Return the best texts, best first; none without a word of the query."""
        scores: Counter[int] = Counter()
        for word in dict.fromkeys(_words(query)):
            rows = self._rows.get(word, [])
            rarity = math.log(1 + (len(self.texts) - len(rows) + 0.5) / (len(rows) + 0.5))
            for i in rows:
                n = self._counts[i][word]
                scores[i] += rarity * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * self._sizes[i] / self._mean))  # type: ignore[assignment]
        return [self.texts[i] for i, _ in sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:most]]


@lru_cache(maxsize=4)
def _index(path: str, field: str) -> _Index:
    values = [row.data.get(field) for row in read_rows(path, "train") if isinstance(row, Row)]
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        raise ConfigError(f"environment.options.path: {path} has no rows with a text in {field!r}")
    return _Index(texts)


class Search(_WithTool):
    """Questions with a search over the rows of a file as the tool; 1 where the reply contains the row's `answer`.

    Args:
        path: file of rows. field: of a row, its text. most: texts that a search returns.
    """

    def __init__(self, path: str, field: str = "text", most: int = 3) -> None:
        self._index, self._most = _index(path, field), most

    def describe(self) -> tuple[str, str, str, str]:
        return "search", "Search the documents, and return the passages that fit best.", "query", "Words to look for."

    def run(self, argument: str) -> str:
        found = self._index.find(argument, self._most)
        return "\n\n".join(found) or "Nothing was found."

    def is_right(self, answer: str) -> bool:
        return f" {' '.join(_words(self.wanted))} " in f" {' '.join(_words(answer))} "


# --- words ------------------------------------------------------------------------------------------------------------

_TEXT = (
    "apple arrow badge beach berry blade board bread brick bride brush cabin camel candy cargo chain chair chalk chest "
    "chief child civil clock cloth cloud coach coast coral couch cover crane cream crown dance delta diary dough dozen "
    "draft dream dress drink eagle earth elbow faith feast fence field flame forest fruit ghost giant glass globe "
    "glove grain grape grass green guest guide heart honey horse hotel house human image ivory jelly jewel juice knife "
    "label lemon light linen lunch maple march metal model money month motor mouse mouth music night nurse ocean olive "
    "onion paint panel paper party peach pearl phone piano pilot plain plant plate queen quiet radio river robot round "
    "salad scale sheep shirt shore skirt slice smile snake spice spoon stage stone storm sugar table tiger tower train "
    "trail uncle valley violin wagon water whale wheat white woman world yacht young zebra"
)
_LIST = _TEXT.split()


class Words(Environment):
    """Hangman: a turn guesses the word where it names it, else its first letter. A turn's reward is the share it finds.

    Args:
        lives: wrong guesses that end the game.
    """

    def __init__(self, lives: int = 6) -> None:
        self._lives = lives

    def rows(self, valid: bool) -> list[dict[str, Any]]:
        rules = "Guess my word, a letter at a time. Reply with one letter, or with the whole word, and nothing else: "
        words = [word for i, word in enumerate(_LIST) if (i % 10 == 0) is valid]
        return [{"prompt": rules + " ".join("_" * len(word)), "word": word} for word in words]

    def reset(self, row: dict[str, Any], seed: int) -> None:
        if not isinstance(row.get("word"), str):
            raise ValueError("the row needs a word")
        self.word, self.found, self.wrong = row["word"].casefold(), set[str](), list[str]()

    def step(self, turn: Turn) -> Observation:
        said, before = _words(turn.answer), self._share()
        guess = next((letter for letter in "".join(said) if letter.isalpha()), "")
        if self.word in said:
            self.found |= set(self.word)
        elif guess and guess in self.word and guess not in self.found:
            self.found.add(guess)
        else:
            self.wrong.append(guess or "nothing")
        won, gain = self._share() == 1, self._share() - before
        if won or len(self.wrong) >= self._lives:
            return Observation("Right!" if won else f"The word was {self.word}.", gain, end=True)
        return Observation(self._shown(), gain)

    def _share(self) -> float:
        return sum(letter in self.found for letter in self.word) / len(self.word)

    def _shown(self) -> str:
        shown = " ".join(letter if letter in self.found else "_" for letter in self.word)
        wrong = f" Wrong so far: {', '.join(self.wrong)}." if self.wrong else ""
        return f"{shown}{wrong} {self._lives - len(self.wrong)} wrong guesses are left."


# --- verifiers --------------------------------------------------------------------------------------------------------
# Environments of the package verifiers (its classic protocol, versions 0.1.14 to 0.3): its rollout runs as it is, with
# a client whose model is the episode.


def from_verifiers(name: str, options: dict[str, Any]) -> Callable[[], Verified]:
    """Return what makes episodes of an environment of the package verifiers.

    Raises:
        ConfigError: the package is not there or has another protocol, or the environment cannot be loaded or used.
    """
    try:
        import verifiers
    except ImportError:
        raise ConfigError(f"environment.path: verifiers:{name}: {missing_extra('verifiers', 'verifiers')}") from None
    if not hasattr(verifiers, "load_environment"):
        raise ConfigError(
            f"environment.path: verifiers:{name}: verifiers {getattr(verifiers, '__version__', '')} has another "
            "protocol than 0.1.14 to 0.3: pip install 'mlxft[verifiers]'"
        )
    # It sets handlers of its own, which would keep an interrupted run from its checkpoint.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        found = verifiers.load_environment(name, **options)
    except Exception as error:  # whatever its module raises
        raise ConfigError(f"environment.path: verifiers:{name}: {error_of(error)}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if found.rubric.has_group_rewards:
        raise ConfigError(f"environment.path: verifiers:{name}: it rewards groups of rollouts, not each rollout")
    return partial(Verified, found)


class Verified(Environment):
    """An episode in an environment of the package verifiers.

    Args:
        inner: the environment, which all episodes share: their state is apart.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.tools = [
            {"type": "function", "function": {key: getattr(tool, key) for key in ("name", "description", "parameters")}}
            for tool in inner.tool_defs or ()
        ]

    def rows(self, valid: bool) -> list[dict[str, Any]]:
        if valid and self._inner.eval_dataset is None and getattr(self._inner, "eval_dataset_source", None) is None:
            return []
        data = self._inner.get_eval_dataset() if valid else self._inner.get_dataset()
        return [{key: value for key, value in row.items() if value is not None} for row in data.to_list()]

    async def reset(self, row: dict[str, Any], seed: int) -> list[Message] | None:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        given = {"example_id": 0, **row, "prompt": prompt}
        self._asks: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._turns: asyncio.Queue[Turn] = asyncio.Queue()
        self._rollout = asyncio.ensure_future(self._inner.rollout(given, _client(self._ask), "mlxft", {}))
        self._known: list[Message] = []
        first = await self._next(0)
        if first is None:
            raise EpisodeError(f"the rollout ended before its first turn: {self._rollout.result().get('error')}")
        return first[len(prompt) :] or None

    async def step(self, turn: Turn) -> Observation:
        await self._turns.put(turn)
        added = await self._next(1)
        if added is not None:
            return Observation(added)
        state = self._rollout.result()
        if state.get("error") is not None:
            raise state["error"]
        await self._inner.rubric.score_rollout(state)
        return Observation(_plain(state.get("final_env_response") or []), float(state["reward"]), end=True)

    async def _ask(self, prompt: Sequence[Any]) -> Turn:
        """Take the place of the model in a rollout."""
        await self._asks.put(_plain(prompt))
        return await self._turns.get()

    async def _next(self, turns: int) -> list[Message] | None:
        """Return what the rollout adds to the messages that are known, and `turns`; None where it has ended."""
        asked = asyncio.ensure_future(self._asks.get())
        await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            asked.cancel()
            return None
        messages, known = asked.result(), self._known
        if messages[: len(known)] != known:
            raise EpisodeError("this environment rewrites the conversation, while an episode's turns stay as sampled")
        self._known = messages
        return messages[len(known) + turns :]


def _plain(messages: Any) -> list[Message]:
    """Return the messages of verifiers as mappings."""
    listed = messages if isinstance(messages, list) else [{"role": "user", "content": messages}]
    return [dict(m) if isinstance(m, dict) else m.model_dump(exclude_none=True) for m in listed]


def _client(ask: Callable[[Sequence[Any]], Any]) -> Any:
    """Return a client of verifiers whose model is `ask`."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage
    from verifiers.types import ToolCall as Call

    async def get_response(self: Any, prompt: Any, model: str, *_: Any, **__: Any) -> Any:
        turn: Turn = await ask(prompt)
        calls = [
            Call(id=f"call{i:05d}", name=c.name, arguments=json.dumps(c.arguments)) for i, c in enumerate(turn.calls)
        ]
        reason = "tool_calls" if calls else "stop" if turn.finished else "length"
        message = ResponseMessage(
            content=turn.text, tool_calls=calls or None, finish_reason=reason, is_truncated=not turn.finished
        )
        return Response(id="", created=0, model=model, message=message)

    named: dict[str, Any] = dict.fromkeys(Client.__abstractmethods__, get_response)
    return type("EpisodeClient", (Client,), {**named, "get_response": get_response})(None)
