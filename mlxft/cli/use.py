"""mlxft generate, mlxft chat."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlxft.cli import TRUST, PathArg, reserve
from mlxft.text import echo, echo_completion


class Text(click.ParamType[str]):
    """A text for a model. What is not UTF-8 on a command line comes as halves of characters."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from mlxft.errors import half_character

        text = str(value)
        try:
            return text.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as e:
            self.fail(f"not UTF-8 (byte {e.start + 1} is 0x{e.object[e.start]:02x})", param, ctx)
        except UnicodeEncodeError:
            self.fail(str(half_character(text)), param, ctx)


def _utf8(said: bytes) -> str:
    try:
        return said.decode("utf-8")
    except UnicodeDecodeError as e:
        raise click.UsageError(f"standard input is not UTF-8 (byte {e.start + 1} is 0x{said[e.start]:02x})") from e


def sampling(temperature: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of commands that sample; `temperature` is what it is if it is not given."""
    options = [
        click.option("--model", required=True, help="Run, adapter or fused folder, hub id, .gguf or smollm2-135m."),
        click.option("--adapter", help="Adapter folder or run to put on the model."),
        click.option("--system", type=Text(), help="System prompt."),
        click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1, 10**6)),
        click.option(
            "--temperature", default=temperature, show_default=True, type=click.FloatRange(0), help="0: most likely."
        ),
        click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True)),
        click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: off."),
        click.option("--min-p", default=0.0, show_default=True, type=click.FloatRange(0, 1)),
        click.option(
            "--stop", multiple=True, type=Text(), help="Ends an answer, and is not shown; can be given several times."
        ),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text."),
        TRUST,
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.argument("prompt", type=Text(), required=False)
@click.option("--batch", metavar="FILE", help="Answer the prompts of a file instead; a line of JSON each.")
@click.option("--out", type=PathArg(dir_okay=False), help="With --batch: write the lines there.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --out if it exists.")
@click.option("--samples", type=click.IntRange(1, 10_000), help="With --batch: answers a prompt.  [default: 1]")
@sampling(temperature=0.0)
def generate(
    prompt: str | None,
    batch: str | None,
    out: Path | None,
    overwrite: bool,
    samples: int | None,
    model: str,
    adapter: str | None,
    system: str | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Answer PROMPT (or standard input), as the text comes; or the prompts of a file, in batches.

    \b
    Example: mlxft generate --model runs/quickstart "How many days of leave are there?"
             mlxft generate --model runs/quickstart --batch prompts.jsonl --out answers.jsonl
    """
    from mlxft.owned import check_file

    if batch is not None:
        _refuse(prompt, batch, out, samples, options["temperature"])
        if out is not None:
            reserve(out)
            check_file(out, overwrite)
    elif out is not None or samples is not None:
        raise click.UsageError("--out and --samples go with --batch")
    elif prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, pipe one in, or name a file of them with --batch")
        prompt = _utf8(sys.stdin.buffer.read())
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    from mlxft.data.encode import encode_prompt
    from mlxft.model.sample import Sampling, stream
    from mlxft.rundir import load

    how = Sampling(**options)
    loaded = load(model, adapter)
    if batch is not None:
        from mlxft.study.answers import Asked, write_answers

        write_answers(Asked(batch, loaded, system), how, samples or 1, seed, out)
        return
    ids = encode_prompt(prompt or "", loaded.tokenizer, system=system)
    for piece in stream(loaded.model, loaded.tokenizer, ids, how, seed=seed):
        echo_completion(piece)
    echo()


def _refuse(prompt: str | None, batch: str, out: Path | None, samples: int | None, temperature: float) -> None:
    """What does not go with --batch."""
    if prompt is not None:
        raise click.UsageError("give a PROMPT or --batch, not both")
    if out is not None and os.path.exists(out) and Path(batch).exists() and out.samefile(batch):
        raise click.UsageError("--out is the file of prompts; choose another")
    if (samples or 1) > 1 and temperature == 0:
        raise click.UsageError(f"--samples {samples} at temperature 0 would be {samples} times the same; raise it")


@click.command()
@sampling(temperature=0.0)
def chat(model: str, adapter: str | None, system: str | None, seed: int | None, **options: Any) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it.

    Example: mlxft chat --model runs/quickstart
    """
    from mlxft.model.sample import Sampling, stream
    from mlxft.rundir import load

    how = Sampling(**options)
    loaded = load(model, adapter)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:
            echo()
            return
        if not said.strip():
            return
        said = _utf8(said.encode("utf-8", "surrogateescape"))
        messages.append({"role": "user", "content": said})
        pieces = []
        for piece in stream(loaded.model, loaded.tokenizer, messages, how, seed=seed):
            pieces.append(piece)
            echo_completion(piece)
        echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})
