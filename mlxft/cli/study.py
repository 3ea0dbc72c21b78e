"""Commands about runs and about this machine: runs, studio, completion, doctor, selftest, models, bench."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlxft.cli import PathArg
from mlxft.text import echo, home_path, json_text, make_console

# --- runs -------------------------------------------------------------------------------------------------------------
# mlxft runs.

_DEFAULT = Path("runs")


def _names(ctx: click.Context, param: click.Parameter, typed: str) -> list[str]:
    """Return the names of runs for shell completion."""
    from mlxft.runs import list_runs

    place = _place(ctx, ctx.params.get("place"))
    return [r.name for r in list_runs(place, every=True) if r.name.startswith(typed)] if place.is_dir() else []


def _place(ctx: click.Context, given: Path | None) -> Path:
    """Return the folder that holds the run folders; --dir may be given before or after the subcommand."""
    above = ctx.parent.params.get("place") if ctx.parent else None
    return home_path(given or above or _DEFAULT)


def _in(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--dir", "place", type=PathArg(file_okay=False), help="Folder that holds the run folders (default: runs)."
    )(command)


_NAME = click.argument("name", shell_complete=_names)
_NAMES = click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=_names)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _print_json(found: Any) -> None:
    echo(json_text(found, indent=2, default=str))


@click.group(invoke_without_command=True)
@_in
@click.option("--all", "every", is_flag=True, help="Also list runs in subfolders, such as the trials of a sweep.")
@_JSON
@click.pass_context
def runs(ctx: click.Context, place: Path | None, every: bool, as_json: bool) -> None:
    """List runs, oldest first; the subcommands show, compare, plot, report, watch and remove runs.

    \b
    Example: mlxft runs
             mlxft runs compare sft-lora sft-dora
             mlxft runs report sft-lora --out report.html

    The status of a run is running, done, interrupted (by Ctrl-C or killed; mlxft train --resume continues it), failed,
    half-written (files are missing) or unfinished (written by an older version).
    """
    if ctx.invoked_subcommand is not None:
        if every or as_json:
            raise click.UsageError(f"give --all and --json after {ctx.invoked_subcommand}, if it has them")
        return
    from mlxft.runs import list_runs, sure_place

    where = _place(ctx, place)
    found = list_runs(sure_place(where), every) if place is not None or where.is_dir() else []
    if as_json:
        _print_json([r.to_json() for r in found])
    elif not found:
        echo(f"no runs in {where}; train one: mlxft train RECIPE")
    else:
        from mlxft.study.report import show_list

        show_list(make_console(), found)


@runs.command()
@_NAME
@_in
@_JSON
@click.pass_context
def show(ctx: click.Context, name: str, place: Path | None, as_json: bool) -> None:
    """Show one run: its metrics, the settings that differ from the defaults, sample completions and files.

    Example: mlxft runs show sft-lora
    """
    from mlxft.runs import find_run
    from mlxft.study.report import details, show_details

    found = details(find_run(name, _place(ctx, place)))
    _print_json(found.to_json()) if as_json else show_details(make_console(), found)


@runs.command()
@_NAMES
@_in
@_JSON
@click.pass_context
def compare(ctx: click.Context, names: tuple[str, ...], place: Path | None, as_json: bool) -> None:
    """Show how runs differ, in settings and in metrics.

    Example: mlxft runs compare sft-lora sft-dora
    """
    if len(names) < 2:
        raise click.UsageError("name at least two runs")
    from mlxft.runs import find_run
    from mlxft.study.report import compare_runs as compare_runs
    from mlxft.study.report import details, show_comparison

    found = compare_runs([details(find_run(name, _place(ctx, place)), name) for name in names])
    _print_json(found.to_json()) if as_json else show_comparison(make_console(), found)


@runs.command()
@_NAMES
@_in
@click.option("--out", type=PathArg(dir_okay=False), help="File to write: .png, .svg or .pdf.  [default: NAME.png]")
@_OVERWRITE
@click.pass_context
def plot(ctx: click.Context, names: tuple[str, ...], place: Path | None, out: Path | None, overwrite: bool) -> None:
    """Plot the curves of runs: loss, learning rate, gradient norm, memory and the objective's metrics.

    \b
    Example: mlxft runs plot sft-lora --out sft-lora.svg
             mlxft runs plot sft-lora sft-dora --out both.png
    """
    from mlxft.study.report import plot_runs

    for path in plot_runs([*names], _place(ctx, place), out, overwrite):
        echo(f"wrote {path}")


@runs.command()
@_NAME
@_in
@click.option(
    "--out", type=PathArg(dir_okay=False), help="HTML file to write.  [default: report.html in the run folder]"
)
@_OVERWRITE
@click.pass_context
def report(ctx: click.Context, name: str, place: Path | None, out: Path | None, overwrite: bool) -> None:
    """Write one self-contained HTML page about a run.

    Example: mlxft runs report sft-lora --out sft-lora.html
    """
    from mlxft.runs import find_run
    from mlxft.study.report import write_report

    echo(f"wrote {write_report(find_run(name, _place(ctx, place)), out, overwrite)}")


@runs.command()
@_NAMES
@_in
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.pass_context
def rm(ctx: click.Context, names: tuple[str, ...], place: Path | None, yes: bool) -> None:
    """Remove run folders with their weights and checkpoints. A run that is training is not removed.

    Example: mlxft runs rm old-1 old-2
    """
    from mlxft.runs import find_removable, remove_run

    found = find_removable([*names], _place(ctx, place))
    for folder, size in found.items():
        echo(f"{folder}: {size / 1e6:,.1f} MB")
    if not yes:
        click.confirm(f"Remove {'it' if len(found) == 1 else f'these {len(found)} runs'}?", abort=True)
    for folder in found:
        remove_run(folder)
        echo(f"removed {folder}")


@runs.command()
@_NAME
@_in
@click.pass_context
def watch(ctx: click.Context, name: str, place: Path | None) -> None:
    """Show a run that another process trains, until it ends.

    Exit code 0 if the run is done, 1 if it failed or was interrupted.

    Example: mlxft runs watch sft-lora
    """
    from mlxft.runs import find_run
    from mlxft.runs import watch as watch_run
    from mlxft.study.report import ending

    info = watch_run(find_run(name, _place(ctx, place)), make_console())
    echo(ending(info))
    ctx.exit(0 if info.status == "done" else 1)


# --- completion -------------------------------------------------------------------------------------------------------

_SHELLS = ("zsh", "bash", "fish")
_NO_SPACE = {  # after KEY=, in click's scripts for bash and zsh
    "COMPREPLY+=($value)": "COMPREPLY+=($value); [[ $value == *= ]] && compopt -o nospace",
    "compadd -U -V unsorted -a completions": "compadd -U -V unsorted -- ${completions:#*=}\n"
    "        compadd -U -V unsorted -S '' -- ${(M)completions:#*=}",
}


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS), required=False)
@click.option("--install", is_flag=True, help="Set it up for this user: write the file, and the line that reads it.")
def completion(shell: str | None, install: bool) -> None:
    """Print the script by which SHELL (default: the one in $SHELL) completes commands, options, runs and settings.

    \b
    Example: mlxft completion --install
             mlxft completion zsh > mlxft.zsh
    """
    from click.shell_completion import get_completion_class

    from mlxft.cli import cli

    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell) if shell in _SHELLS else None
    if kind is None:
        raise click.UsageError(f"the shell is {shell or 'unknown'}; give one of {', '.join(_SHELLS)}")
    script = kind(cli, {}, "mlxft", "_MLXFT_COMPLETE").source()
    for theirs, ours in _NO_SPACE.items():
        script = script.replace(theirs, ours)
    for line in _set_up_completion(shell, script) if install else [script]:
        echo(line)


def _set_up_completion(shell: str, script: str) -> list[str]:
    """Write the script, and let the shell's start-up file read it; return what was done."""
    from mlxft.files import write_text

    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    file = config / "fish/completions/mlxft.fish" if shell == "fish" else config / f"mlxft/completion.{shell}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, script)
    done = [f"wrote {file}"]
    if shell == "zsh":
        start = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        line = f"(( $+functions[compdef] )) || {{ autoload -Uz compinit; compinit }}; source {shlex.quote(str(file))}"
    else:  # a terminal of macOS starts bash as a login shell
        start = home / (".bash_profile" if sys.platform == "darwin" else ".bashrc")
        line = f"source {shlex.quote(str(file))}"
    if shell != "fish":
        before = start.read_text("utf-8", "surrogateescape") if start.exists() else ""
        if line in before.splitlines():
            done.append(f"{start} reads it already")
        else:
            with start.open("a", encoding="utf-8") as opened:
                opened.write(f"{'' if before.endswith(chr(10)) or not before else chr(10)}{line}\n")
            done.append(f"added to {start}: {line}")
    return [*done, "open a new terminal for it"]


# --- studio -----------------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port on this machine (default: 8765, or the next that is free)."
)
@click.option("--dir", "place", default="runs", show_default=True, help="Folder that holds the runs, in this folder.")
@click.option("--no-open", is_flag=True, help="Print the address only; do not open a browser.")
def studio(port: int | None, place: str, no_open: bool) -> None:
    """Show and start runs, look at rows, compare models and judge completions in a browser.

    It works in the current folder and is reached from this machine only, by an address with a token. Ctrl-C ends it;
    runs that it has started continue.

    \b
    Example: mlxft studio
             mlxft studio --port 9000 --no-open
    """
    from mlxft.studio.app import run_studio
    from mlxft.studio.work import Workplace

    run_studio(Workplace(Path.cwd(), place), port, not no_open)


# --- doctor -----------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for an issue report.")
def doctor(as_json: bool) -> None:
    """Check this machine: chip, memory, Python, MLX, disks and extras; say what is wrong and how to fix it.

    Exit code 1 if something is wrong. The command computes nothing and writes nothing.

    \b
    Example: mlxft doctor
    """
    from rich.table import Table
    from rich.text import Text

    from mlxft.doctor import doctor_report, examine, sound

    findings = examine(Path("runs"))
    if as_json:
        echo(json_text(doctor_report(findings), indent=2))
    else:
        console = make_console()
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
        for f in findings:
            table.add_row(Text(f.state, styles[f.state]), f.name, Text(f.value))
            if f.mend:
                table.add_row("", "", Text(f"-> {f.mend}"))
        console.print(table)
    if not sound(findings):
        raise SystemExit(1)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for an issue report.")
def selftest(as_json: bool) -> None:
    """Compare this machine's numbers with float32 on the CPU: operations, SFT, DPO, PPO, resume, fuse and memory.

    The test takes a minute or two, downloads nothing, and writes to a temporary folder. Exit code 1 if a check fails.

    \b
    Example: mlxft selftest
    """
    from mlxft.selftest import Check, selftest_report
    from mlxft.selftest import selftest as run

    console = make_console()

    def print_check(check: Check) -> None:
        if not as_json:
            outcome = check.error or f"{check.found:.1e} of {check.allowed:.1e}"
            state = "ok    " if check.passed else "FAILED"
            console.print(f"{state}  {check.name}: {outcome}, {check.seconds:.1f} s", soft_wrap=True)

    checks = run(print_check)
    if as_json:
        echo(json_text(selftest_report(checks), indent=2))
    if not all(check.passed for check in checks):
        raise SystemExit(1)


class _Gigabytes(click.FloatRange):
    """A number of gigabytes, perhaps with its unit."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number: Any = re.sub(r"\s*Gi?B?\s*$", "", str(value), flags=re.I)
        return super().convert(number, param, ctx)


@click.command()
@click.option(
    "--memory",
    type=_Gigabytes(0, min_open=True),
    metavar="GB",
    help="For a Mac with this memory, not this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(memory: float | None, as_json: bool) -> None:
    """List models with open weights by size, and by which methods this machine can train them.

    Each cell says whether a method fits (lora, qlora with a base of 4 bits, dora, full) and the memory that it takes by
    the memory plan. Nothing is downloaded. After mlxft bench sft-lora sft-qlora, the table has speeds, too.

    \b
    Example: mlxft models
             mlxft models --memory 16
    """
    from mlxft.study.catalogue import fits_to_json, show_fits

    found = fits_to_json(memory)
    if as_json:
        echo(json_text(found, indent=2))
    else:
        show_fits(make_console(), found, "this machine" if memory is None else f"a Mac with {memory:g} GB")


@click.command()
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--shape", default="smollm2-135m", show_default=True, help="Shape of the model; its weights are random.")
@click.option(
    "--steps", default=8, show_default=True, type=click.IntRange(2, 1000), help="Number of timed steps per job."
)
@click.option("--against", type=click.Choice(["mlx_lm"]), help="Also run the jobs that mlx_lm has, right after ours.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(jobs: tuple[str, ...], shape: str, steps: int, against: str | None, as_json: bool) -> None:
    """Time training and sampling on this machine: SFT with LoRA and QLoRA, DPO, GRPO, PPO and sampling.

    JOB is one of sft-lora, sft-lora-packed, sft-lora-checkpointed, sft-qlora, dpo, grpo, ppo and sampling (default:
    all). --shape is one of smollm2-135m, qwen3-0.6b, qwen2.5-1.5b, llama-3.2-3b and qwen3-8b. Nothing is downloaded.
    The table rows at the end are meant for docs/performance.md; mlxft models reads the speeds, too. Exit code 1 if a
    job fails.

    \b
    Example: mlxft bench --shape qwen3-0.6b --against mlx_lm
             mlxft bench sft-qlora --shape llama-3.2-3b
    """
    from mlxft.selftest import JOBS, bench_markdown
    from mlxft.selftest import bench as run

    console = make_console()

    def print_job(found: dict[str, Any]) -> None:
        if as_json:
            return
        outcome = found.get("error") or f"{found['tokens_per_s']:.0f} tokens/s, {found['peak_gb']:.2f} GB"
        more = f", {found['share']:.0%} of the machine's products" if "share" in found else ""
        more += f", {found['sampled_per_s']:.0f} sampled/s" if "sampled_per_s" in found else ""
        console.print(f"{found['side']:>6}  {found['job']}: {outcome}{more}", soft_wrap=True)

    found = run(jobs or tuple(JOBS), shape, steps, against is not None, print_job)
    if as_json:
        echo(json_text(found, indent=2))
    else:
        command = " ".join(
            ["mlxft bench", *jobs, f"--shape {shape} --steps {steps}", *(["--against mlx_lm"] if against else [])]
        )
        echo("\n".join(["", *bench_markdown(found, command)]))
    if any("error" in job for job in found["jobs"]):
        raise SystemExit(1)
