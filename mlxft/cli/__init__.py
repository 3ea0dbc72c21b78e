"""The `mlxft` command. Each command's module is imported only when the command is called, so that --help is quick."""

from __future__ import annotations

import errno
import importlib
import io
import keyword
import os
import signal
import sys
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import mlxft
from mlxft.device import FAILURES, gpu_failure
from mlxft.errors import ConfigError, MlxftError, shorten, speak_flags
from mlxft.text import echo, guard_messages

# Section of --help -> command -> (module, one line of help, which is shown without importing the module).
SECTIONS = {
    "Train": {
        "init": ("start", "Look at your rows, and write a recipe for them."),
        "train": ("train", "Train a model as a recipe describes."),
        "launch": ("train", "Train on several Macs, or in several processes on this one."),
        "check": ("train", "Validate a recipe and show its rows as they are trained."),
        "sweep": ("train", "Search for better settings; stop the worse trials early."),
        "lr-find": ("train", "Suggest a learning rate from a range test."),
        "distill-cache": ("train", "Store what a teacher says, to distil without it in memory."),
        "recipes": ("train", "List the recipes that come with mlxft, and copy one."),
        "schema": ("train", "Print the JSON schema of recipes, for editors."),
        "demo": ("train", "Train a small model on built-in rows, as a demonstration."),
        "rlhf": ("train", "Demonstrate RLHF: SFT, a reward model, PPO, fuse."),
    },
    "Use": {
        "generate": ("use", "Generate a completion for a prompt."),
        "chat": ("use", "Chat with a model."),
        "compare": ("serve", "Show completions of several models side by side."),
        "serve": ("serve", "Serve models by OpenAI's API."),
        "sample": ("use", "Sample completions, score them, and write the best as SFT rows."),
        "score": ("use", "Score or rank completions with a reward model."),
        "label": ("use", "Judge completions by hand, for reward or preference training."),
    },
    "Export": {
        "fuse": ("export", "Fuse a run's adapter into its base."),
        "convert": ("export", "Write a model as an MLX folder, quantised or not."),
        "export": ("export", "Write a run or model for PEFT, transformers, llama.cpp or Ollama."),
        "import": ("export", "Import a PEFT adapter."),
        "push": ("export", "Push a run or model to the Hugging Face hub, with a model card."),
    },
    "Study": {
        "eval": ("use", "Evaluate a model on a file: loss and perplexity, or a task."),
        "fewshot": ("use", "Compare zero-shot, few-shot prompts and training on a few rows."),
        "runs": ("study", "List, show, compare, plot, report, watch and remove runs."),
        "studio": ("study", "Show runs, rows and completions in a browser; start, stop and judge."),
    },
    "Machine": {
        "completion": ("study", "Let the shell complete commands, options, runs and settings."),
        "doctor": ("study", "Check this machine: what is wrong, and how to fix it."),
        "selftest": ("study", "Compare this machine's numbers with the CPU's; takes some minutes."),
        "models": ("study", "List open models and which of them this machine can train."),
        "bench": ("study", "Time training on this machine, on models of known shapes."),
    },
}
COMMANDS = {name: about for commands in SECTIONS.values() for name, about in commands.items()}
TOGETHER = ("train", "eval", "sample")  # commands that the ranks of mlx.launch share


def _trust(context: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        from mlxft.model.load import trusting

        context.with_resource(trusting(True))


TRUST = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Allow Python code that comes with the model to run; read that code first.",
)


def reserve(path: Path) -> None:
    """Reserve `path` for this command until it ends; refuse if another mlxft process is working on it."""
    from mlxft.files import reserved

    click.get_current_context().with_resource(reserved(path))


class RunArg(click.ParamType[str]):
    """A model on the command line; the bare name of a run below runs/ becomes its path."""

    name = "model"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from mlxft.runs import named_run

        found = named_run(value)
        return str(found) if not os.path.exists(value) and found.exists() else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from mlxft.runs import list_runs

        runs = list_runs(Path("runs"), every=True) if os.path.isdir("runs") else []
        names = [CompletionItem(run.name) for run in runs if run.name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file"), *names]  # bash forgets what stands before the files


class PathArg(click.Path):
    """A path on the command line. An empty one is refused: pathlib would read it as the working folder.

    Args:
        run: a run is meant, whose bare name does.
    """

    def __init__(self, *, run: bool = False, **options: Any) -> None:
        super().__init__(path_type=Path, **options)
        self._run = run

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the path is empty; give a name", param, ctx)
        if self._run:
            value = RunArg().convert(os.fspath(value), param, ctx)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(value)
        except (OSError, ValueError) as e:  # too long, a loop of links, no permission
            self.fail(f"{shorten(os.fspath(value))!r}: {getattr(e, 'strerror', None) or e}", param, ctx)
        return super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self._run:
            return RunArg().shell_complete(ctx, param, incomplete)
        return super().shell_complete(ctx, param, incomplete)


class TextArg(click.ParamType[str]):
    """A text for a model. Python passes bytes of a command line that are not UTF-8 as lone surrogates."""

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


def _hinted(e: click.NoSuchOption, args: list[str]) -> click.UsageError:
    """Return the error with what mlxft has for another tool's flag."""
    from mlxft.foreign import UNSEEN, explain_flag

    command = None if e.ctx is None else e.ctx.command
    if command is None:
        return e
    options = {name for param in command.params for name in param.opts if name.startswith("-")}
    settings: list[str] = []
    if any(param.name == "overrides" for param in command.params):
        from mlxft.config import all_keys, config_class

        settings = all_keys(config_class("sft"))
    import yaml

    joined = next((text.partition("=")[2] for text in args if text.startswith(f"{e.option_name}=")), None)
    after = [joined] if joined else args[args.index(e.option_name) + 1 :] if e.option_name in args else []
    value: Any = UNSEEN
    given = list(takewhile(lambda text: not text.startswith("-") and (joined or "=" not in text), after))
    if given:
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(given[0]) if joined or len(given) == 1 else given
    elif e.option_name in args:  # a switch
        value = True
    said = explain_flag(e.option_name, options, settings, value)
    return click.UsageError(f"No such option: {e.option_name}{said}", e.ctx) if said else e


class _Lazy(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["mlxft.args"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as e:
            raise _hinted(e, ctx.meta["mlxft.args"]) from None

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
        from mlxft.lifeline import several_ranks

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no such command: {args[0]}{nearest(args[0], COMMANDS)}", ctx)
        if args and args[0] in COMMANDS and args[0] not in TOGETHER and several_ranks():
            raise ConfigError(
                f"mlxft {args[0]} runs in one process; start it without mlx.launch, or, where a rank starts it, with "
                "MLX_RANK removed from its environment"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))  # one column for all sections
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), text) for name, (_, text) in commands.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlxft.__version__, prog_name="mlxft")
def cli() -> None:
    """Fine-tune language models on this Mac.

    Example: mlxft train configs/quickstart.yaml
    """


def main() -> None:
    """Run the command line: print an error as one message, and exit with code 0, 1, 2 or 130."""
    speak_flags(True)
    try:
        if "MLXFT_LAUNCHED" in os.environ or "MLX_RANK" in os.environ:
            _main_of_rank()
        else:
            _main()
    finally:
        speak_flags(False)


def _complain(text: str) -> None:
    """Print an error, unless another rank prints it."""
    ranks = sys.modules.get("mlxft.distributed")
    if ranks is None or not ranks.spoken_for():
        echo(text, err=True)


def _main_of_rank() -> None:
    """Run the command line as a rank of `mlxft launch`, which needs to know how it ends, or of mlx.launch."""
    from mlxft.lifeline import follow_launcher, sign_off

    follow_launcher()
    try:
        _main()
    except SystemExit as e:
        sign_off(e.code if isinstance(e.code, int) else 1)
        raise
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        sign_off(1)
        raise


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows ? in its place
            stream.reconfigure(errors="replace")
    guard_messages()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a checkpoint is saved
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as e:
        text = io.StringIO()
        e.show(text)
        echo(text.getvalue(), nl=False, err=True)
        sys.exit(e.exit_code)
    except MlxftError as e:
        known = next(
            kind for kind in type(e).__mro__ if kind.__module__ == MlxftError.__module__
        )  # the name in the README
        _complain(f"{known.__name__}: {e}")
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone
        sys.exit(1)
    except (RuntimeError, MemoryError) as e:
        failure = gpu_failure(e)
        if failure is None:
            raise
        _complain(f"{type(e).__name__}: {FAILURES[failure][0]}: {shorten(' '.join(str(e).split()))}")
        sys.exit(1)
    except OSError as e:  # a name too long, no permission, or a file that has vanished
        if e.errno == errno.ENAMETOOLONG:
            _complain(f"ConfigError: the path is too long: {shorten(str(e.filename))}")
            sys.exit(ConfigError.exit_code)
        _complain(f"{type(e).__name__}: {e}")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
