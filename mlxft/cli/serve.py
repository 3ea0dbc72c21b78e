"""Commands that hold several models open: serve, compare."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.cli import TRUST, TextArg
from mlxft.errors import ConfigError
from mlxft.text import echo, json_text, make_console

_MAX_TOKENS = click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(1, 10**6),
    help="Maximum length of a completion in tokens.",
)
_TEMPERATURE = click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Sampling temperature; 0 always takes the most likely token.",
)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all networks.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web page whose scripts may ask, such as http://localhost:3000; can be given several times; * means all.",
)
@_MAX_TOKENS
@_TEMPERATURE
@TRUST
def serve(
    models: tuple[str, ...], host: str, port: int, origins: tuple[str, ...], max_tokens: int, temperature: float
) -> None:
    """Serve models by OpenAI's API, for its clients and for chat programs; Ctrl-C stops it.

    MODEL (default: the latest run below runs) is a run, an adapter, a fused model, a folder, a hub id or a .gguf
    file. A request chooses one by name: the last part of its path, or NAME of NAME=MODEL; `base` is the base of the
    first run. Adapters of one base share its weights in memory. --max-tokens and --temperature hold for requests that
    do not say.

    \b
    Example: mlxft serve runs/quickstart
             mlxft serve base runs/a runs/b --port 8000
    """
    from mlxft.study.compare import latest_and_base, open_models
    from mlxft.study.serve import serve_models

    opened = open_models(models or latest_and_base(Path("runs"))[1:])
    serve_models(opened, host, port, origins=origins, max_tokens=max_tokens, temperature=temperature)


@click.command()
@click.argument("prompt", type=TextArg(), metavar="[PROMPT|FILE]", required=False)
@click.option(
    "--models",
    metavar="MODEL,MODEL,...",
    help="Models, as in mlxft serve (default: the latest run below runs and its base).",
)
@click.option("--system", type=TextArg(), help="System prompt.")
@_MAX_TOKENS
@_TEMPERATURE
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed for sampling.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print JSON: for each prompt the completions by model.")
def compare(
    prompt: str | None,
    models: str | None,
    system: str | None,
    seed: int,
    as_json: bool,
    max_tokens: int,
    temperature: float,
) -> None:
    """Show completions of several models side by side, of PROMPT or of each prompt in FILE (.jsonl, .txt and others).

    Without PROMPT, the prompts are the run.sample_prompts of the last run that is named.

    \b
    Example: mlxft compare "How many days of leave are there?"
             mlxft compare prompts.jsonl --models base,runs/a,runs/b
    """
    from mlxft.model.sampling import Sampling
    from mlxft.study.compare import compare_prompts, latest_and_base, open_models, prompts_of_file, sampled_by
    from mlxft.study.label import show_side_by_side

    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    given = [name.strip() for name in models.split(",") if name.strip()] if models else latest_and_base(Path("runs"))
    prompts = sampled_by(given) if prompt is None else prompts_of_file(prompt) if _is_file(prompt) else [prompt]
    if not prompts:
        raise ConfigError(f"{prompt}: has no prompts")
    sampling = Sampling(max_tokens, temperature)
    shown = make_console(stderr=True)
    found = compare_prompts(open_models(given), prompts, sampling, system=system, seed=seed, console=shown)
    if as_json:
        echo(json_text(found, indent=2))
        return
    for number, line in enumerate(found, 1):
        completions = line["completions"]
        title = f"{number} of {len(found)}"
        show_side_by_side(make_console(), title, line["prompt"], [*completions.values()], [*completions])


def _is_file(text: str) -> bool:
    """Return whether an argument names a file of prompts, not a prompt."""
    try:
        return Path(text).suffix != "" and Path(text).is_file()
    except (OSError, ValueError):  # too long for a path
        return False
