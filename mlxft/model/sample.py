"""Text out of a model: the only file that touches mlx-lm's generator."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Prompt = str | list[dict[str, Any]]


def render_prompt(tokenizer: TokenizerWrapper, prompt: Prompt, system: str | None = None) -> list[int]:
    """Token ids up to where the answer starts: by the chat template if there is one, else the text as it stands.

    Raises:
        ConfigError: `system` is given where it has no place.
        DataError: messages without a chat template, or messages that the template refuses.
    """
    if not tokenizer.has_chat_template:
        if not isinstance(prompt, str):
            raise DataError("this tokenizer has no chat template, so messages have no form; give text, or a template")
        if system is not None:
            raise ConfigError("this tokenizer has no chat template, so system has no place; write it into the prompt")
        ids: list[int] = tokenizer.encode(prompt)
        return ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        if messages and messages[0].get("role") == "system":
            raise ConfigError("system is given, and the messages start with one of their own; keep one of them")
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))
    except Exception as error:  # templates raise their own refusals, and jinja's
        raise DataError(f"the chat template refuses these messages: {type(error).__name__}: {error}") from error


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt | Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Pieces of an answer as they come; they end at any eos id, at a stop string (not shown) or at max_tokens.

    MLX's global random state is never drawn from, and every module's training flag is as before at the end.

    Args:
        prompt: ids, or text or messages to render.
        temperature: 0 takes the most likely token.
        top_p, top_k, min_p: filters as mlx-lm applies them (before the temperature); 1, 0 and 0 switch them off.
        seed: the same seed gives the same text; None draws a new one from the system.
    Raises:
        ConfigError, DataError: at the call, not at the first piece.
    """
    _check(max_tokens, temperature, top_p, top_k, min_p, stop)
    ids = _ids(tokenizer, prompt)
    if not ids:
        raise DataError("the prompt is empty: there is no token to go on from")
    sampler = _sampler(temperature, top_p, top_k, min_p, seed)
    return _stop_at(_pieces(model, tokenizer, ids, max_tokens, sampler), tuple(stop))


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt | Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> str:
    """The whole answer; arguments as for `stream`."""
    return "".join(
        stream(
            model,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=stop,
        )
    )


def _ids(tokenizer: TokenizerWrapper, prompt: Any) -> list[int]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
        return render_prompt(tokenizer, prompt)
    return [int(token) for token in prompt]


def _check(max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, stop: Sequence[str]) -> None:
    wrong = []
    if max_tokens < 1:
        wrong.append(f"max_tokens is {max_tokens}; at least 1")
    if not 0 <= temperature < math.inf:
        wrong.append(f"temperature is {temperature}; at least 0")
    if not 0 < top_p <= 1:
        wrong.append(f"top_p is {top_p}; above 0 and at most 1")
    if top_k < 0:
        wrong.append(f"top_k is {top_k}; at least 0 (0 is off)")
    if not 0 <= min_p <= 1:
        wrong.append(f"min_p is {min_p}; from 0 to 1")
    if isinstance(stop, str) or not all(stop):
        wrong.append(f"stop is {stop!r}; a list of strings, none of them empty")
    if wrong:
        raise ConfigError("sampling: " + "; ".join(wrong))


def _sampler(
    temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None
) -> Callable[[mx.array], mx.array]:
    """(1, V) log-probabilities -> (1,) ids.

    With keys of its own: mlx-lm's samplers draw from the global state, and evaluating between two training steps
    would then change the training.
    """
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    if temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    key = mx.random.key(int.from_bytes(os.urandom(7), "big") if seed is None else seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        logprobs = logprobs.astype(mx.float32)
        if top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p, 1)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, top_k)
        return mx.random.categorical(logprobs / temperature, key=now)

    return sample


def _pieces(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    ids: list[int],
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array],
) -> Iterator[str]:
    """Text as its tokens come. Dropout is off meanwhile."""
    from mlx_lm.generate import stream_generate
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

    # The wrapper's own detokenizer drops a leading space, which belongs to the text where a prompt is plain text.
    text = NaiveStreamingDetokenizer(tokenizer._tokenizer)
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for step in stream_generate(model, tokenizer, mx.array(ids), max_tokens=max_tokens, sampler=sampler):
            if step.finish_reason == "stop":
                break
            text.add_token(step.token)
            if piece := text.last_segment:
                yield piece
        text.finalize()
        if piece := text.last_segment:
            yield piece
    finally:
        for module, training in flags:
            module._training = training


def _stop_at(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Pieces up to the first stop string; text that may be the start of one waits until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        if ends := [at for at in (held.find(s) for s in stop) if at >= 0]:
            held = held[: min(ends)]
            break
        longest = min(len(held), max((len(s) for s in stop), default=1) - 1)
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(held[-n:]) for s in stop)), 0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held
