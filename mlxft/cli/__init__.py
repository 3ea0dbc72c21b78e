"""The `mlxft` command. Each command's module is imported when it is called, so that --help is quick."""

from __future__ import annotations

import errno
import importlib
import io
import keyword
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

import mlxft
from mlxft.device import FAILURES, gpu_failure
from mlxft.errors import ConfigError, MlxftError, shorten, speak_flags
from mlxft.text import echo, guard_messages

# name -> (module, one line of help, shown without importing the module)
COMMANDS = {
    "train": ("train", "Train by a recipe."),
    "check": ("train", "Validate a recipe; show its rows as trained. Trains nothing."),
    "generate": ("use", "Answer a prompt."),
    "chat": ("use", "Talk with a model."),
    "sample": ("use", "Best of n, or rejection sampling: scored answers as rows for SFT."),
    "label": ("use", "Judge answers by hand, for a reward model or preference training."),
    "score": ("use", "Score or rank answers with a reward run."),
    "eval": ("use", "How good a model is on a file: loss, or a task, with errors and differences."),
    "sweep": ("train", "Find better settings: trials, the worse ones stopped early."),
    "lr-find": ("train", "Suggest a learning rate by a range test."),
    "fewshot": ("use", "Zero-shot, examples in the prompt, and tuned on a few: a table with intervals."),
    "fuse": ("export", "Fuse a run's adapter into its base."),
    "convert": ("export", "Write a model as an MLX folder, quantised or not."),
    "export": ("export", "Write a result for PEFT, transformers, llama.cpp or Ollama."),
    "import": ("export", "Read a PEFT adapter in."),
    "push": ("export", "Push a result to the Hugging Face hub, with a model card."),
    "runs": ("study", "List, show, compare, plot, report, watch and remove runs."),
    "doctor": ("study", "Look at this machine: what is wrong, and what mends it."),
    "selftest": ("study", "Hold this machine's numbers against the CPU's, in some minutes."),
    "bench": ("study", "Time training on this machine, on models of known shapes."),
    "schema": ("train", "Print the JSON schema of recipes, for editors."),
    "demo": ("train", "See it work: train a small model on built-in rows."),
    "rlhf": ("train", "See the whole road: SFT, a reward model, PPO, fuse."),
}


def _trust(context: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        from mlxft.model.load import trusting

        context.with_resource(trusting(True))


TRUST = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Let a model that brings Python code along run it: read it before.",
)


def reserve(path: Path) -> None:
    """Refuse to work on what another mlxft works on; until this command ends, others are refused."""
    from mlxft.files import reserved

    click.get_current_context().with_resource(reserved(path))


class PathArg(click.Path):
    """A path that a command is given. "" is none: pathlib takes it for the working folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("it is empty; give a name", param, ctx)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(value)
        except (OSError, ValueError) as e:  # too long, a circle of links, no permission
            self.fail(f"{shorten(os.fspath(value))!r}: {getattr(e, 'strerror', None) or e}", param, ctx)
        return super().convert(value, param, ctx)


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_") + "_" * keyword.iskeyword(cmd_name)
        command: click.Command = getattr(importlib.import_module(f"mlxft.cli.{COMMANDS[cmd_name][0]}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from mlxft.errors import nearest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no such command: {args[0]}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlxft.__version__, prog_name="mlxft")
def cli() -> None:
    """Fine-tune language models on this Mac.

    Example: mlxft train configs/quickstart.yaml
    """


def main() -> None:
    """Entry point: errors as one message, and the exit codes 0, 1, 2 and 130."""
    speak_flags(True)
    try:
        _main()
    finally:
        speak_flags(False)


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows ? instead
            stream.reconfigure(errors="replace")
    guard_messages()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is there is saved
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as e:
        text = io.StringIO()
        e.show(text)
        echo(text.getvalue(), nl=False, err=True)
        sys.exit(e.exit_code)
    except MlxftError as e:
        known = next(kind for kind in type(e).__mro__ if kind.__module__ == MlxftError.__module__)  # as README names it
        echo(f"{known.__name__}: {e}", err=True)
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone
        sys.exit(1)
    except (RuntimeError, MemoryError) as e:
        failure = gpu_failure(e)
        if failure is None:
            raise
        echo(f"{type(e).__name__}: {FAILURES[failure][0]}: {shorten(' '.join(str(e).split()))}", err=True)
        sys.exit(1)
    except OSError as e:  # a name too long, no permission, no such file after all
        if e.errno == errno.ENAMETOOLONG:
            echo(f"ConfigError: longer than a path can be: {shorten(str(e.filename))}", err=True)
            sys.exit(ConfigError.exit_code)
        echo(f"{type(e).__name__}: {e}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
