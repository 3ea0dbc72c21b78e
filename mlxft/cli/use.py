"""mlxft generate, mlxft chat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click


def sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that generate and chat share."""
    options = [
        click.option("--model", required=True, help="Run, adapter or fused folder, hub id, .gguf or smollm2-135m."),
        click.option("--adapter", help="Adapter folder or run to put on the model."),
        click.option("--system", help="System prompt."),
        click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1)),
        click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: most likely."),
        click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True)),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _utf8(said: bytes) -> str:
    try:
        return said.decode("utf-8")
    except UnicodeDecodeError as e:
        raise click.UsageError(f"standard input is not UTF-8 (byte {e.start + 1} is 0x{said[e.start]:02x})") from e


@click.command()
@click.argument("prompt", required=False)
@sampling
def generate(prompt: str | None, model: str, adapter: str | None, system: str | None, **options: Any) -> None:
    """Answer PROMPT (or standard input), as the text comes.

    Example: mlxft generate --model runs/quickstart "How many days of leave are there?"
    """
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or pipe one in")
        prompt = _utf8(sys.stdin.buffer.read())
    if not prompt.strip():
        raise click.UsageError("the prompt is empty")
    from mlxft.model.sample import render_prompt, stream
    from mlxft.rundir import load

    loaded = load(model, adapter)
    ids = render_prompt(loaded.tokenizer, prompt, system)
    for piece in stream(loaded.model, loaded.tokenizer, ids, **options):
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@sampling
def chat(model: str, adapter: str | None, system: str | None, **options: Any) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it.

    Example: mlxft chat --model runs/quickstart
    """
    from mlxft.model.sample import stream
    from mlxft.rundir import load

    loaded = load(model, adapter)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:
            click.echo()
            return
        if not said.strip():
            return
        said = _utf8(said.encode("utf-8", "surrogateescape"))
        messages.append({"role": "user", "content": said})
        pieces = []
        for piece in stream(loaded.model, loaded.tokenizer, messages, **options):
            pieces.append(piece)
            click.echo(piece, nl=False)
        click.echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})
