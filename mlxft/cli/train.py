"""Commands that train: train, launch, check, sweep, lr-find, distill-cache, recipes, schema, demo, rlhf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from mlxft.cli import PathArg, reserve
from mlxft.text import counted, echo, json_text, make_console

# --- train ------------------------------------------------------------------------------------------------------------
# mlxft train, mlxft launch, mlxft check.

DEFAULT = Path("mlxft.yaml")  # what mlxft init writes
_ROWS = (".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx", ".xls", ".ods", ".parquet", ".txt", ".md")


def _settings(ctx: click.Context, param: click.Parameter, typed: str) -> list[str]:
    """Return the settings for shell completion, as KEY=."""
    from mlxft.config import Config

    # The objectives' own sections are not among them: they would import MLX for each key press.
    sections = {name: getattr(place.annotation, "model_fields", ()) for name, place in Config.model_fields.items()}
    keys = [f"{section}.{key}=" for section, own in sections.items() for key in own]
    return [key for key in ["objective=", *keys] if key.startswith(typed)]


_RECIPE = click.argument("recipe", type=PathArg(), required=False)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_settings)
_MODEL = click.option("--model", help="Model to train, without a recipe: a hub id, folder or .gguf file (model.path).")
_DATA = click.option("--data", help="Rows to train on, without a recipe: a file, folder or hf:org/name (data.train).")


def takes_recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command RECIPE, KEY=VALUE, --model and --data; it gets them as `recipe` and `overrides`."""

    @functools.wraps(command)
    def run(recipe: Path | None, overrides: tuple[str, ...], model: str | None, data: str | None, **rest: Any) -> Any:
        from mlxft.config import override

        if recipe is not None and "=" in str(recipe) and not recipe.exists():
            recipe, overrides = None, (str(recipe), *overrides)
        named = [override(key, value) for key, value in (("model.path", model), ("data.train", data)) if value]
        return command(recipe=recipe, overrides=(*named, *overrides), **rest)

    for add in (_DATA, _MODEL, OVERRIDES, _RECIPE):
        run = add(run)
    return run


def _file(recipe: Path | None, overrides: Sequence[str]) -> Path | None:
    """Return the recipe to read: RECIPE, the one that mlxft init wrote here, or None where KEY=VALUE say it all."""
    if recipe is not None:
        given = [str(recipe), *(text for text in overrides if "=" not in text)]
        rows = [text for text in given if text.startswith("hf:") or Path(text).suffix.lower() in _ROWS]
        if recipe.suffix.lower() in (".yaml", ".yml"):
            if rows:
                raise click.UsageError(f"{rows[0]} holds rows: give data.train={rows[0]}")
        elif rows or len(given) > 1:
            file = (rows or given[1:])[0]
            model = next((text for text in given if text != file), "MODEL")
            way = f"give --model {model} --data {file}; or mlxft init {file}"
            raise click.UsageError(f"{file} holds rows, not a recipe: {way}")
        elif not recipe.exists() or (recipe / "config.json").exists():
            raise click.UsageError(f"{recipe}: no such recipe; a model is given so: --model {recipe} --data FILE")
        if recipe.is_dir():
            raise click.UsageError(
                f"{recipe} is a folder; give a recipe (to resume a run: mlxft train --resume {recipe})"
            )
        return recipe
    if any(text.startswith(("model.path=", "data.train=")) for text in overrides):
        return None
    if DEFAULT.is_file():
        echo(f"recipe: {DEFAULT}", err=True)
        return DEFAULT
    raise click.UsageError(
        "give a recipe; or --model MODEL --data FILE; or run mlxft init FILE first, which writes a recipe for your rows"
    )


RESUME = click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Resume from the latest checkpoint in RUN (default: the recipe's run folder).",
)
REPLACE = click.option("--overwrite", is_flag=True, help="Replace the run folder if it exists.")


@click.command()
@takes_recipe
@RESUME
@REPLACE
def train(recipe: Path | None, overrides: tuple[str, ...], resume: str | None, overwrite: bool) -> None:
    """Train a model as RECIPE describes. KEY=VALUE overrides a setting.

    \b
    Example: mlxft train configs/sft-lora.yaml optim.lr=2e-4
             mlxft train --model smollm2-135m --data my.jsonl
             mlxft train --resume sft-lora
    """
    path, overrides = _recipe(recipe, overrides, resume)
    from mlxft.config import load_config
    from mlxft.run import train as run

    from_run = path is not None and path.name == "config.yaml" and resume is not None
    config = load_config(path, overrides, of_run=from_run)
    if path is not None and from_run:  # the run folder may have been moved since
        place = {"dir": path.resolve().parent.parent, "name": path.resolve().parent.name}
        config = config.model_copy(update={"run": config.run.model_copy(update=place)})
    done = run(config, resume=resume is not None, overwrite=overwrite)
    from mlxft.distributed import current

    if current().first:
        echo("next:\n" + "\n".join(f"  {command}" for command in done.next_commands()))


@click.command()
@takes_recipe
@RESUME
@REPLACE
@click.option("--hosts", metavar="A,B,...", help="Names or addresses of the Macs; rank 0 runs on the first.")
@click.option(
    "--hostfile", type=PathArg(exists=True, dir_okay=False), help="Hostfile of mlx.distributed_config, for --hosts."
)
@click.option(
    "-n", "count", type=click.IntRange(1, 1024), help="Number of processes on each host; without --hosts, on this Mac."
)
@click.option(
    "--backend",
    type=click.Choice(["ring", "jaccl", "jaccl-ring", "mpi", "nccl"]),
    help="How MLX connects the processes (default: the hostfile's, or ring; with CUDA nccl).",
)
@click.option("--python", help="Python that runs mlxft on every host (default: this one's path).")
@click.option("--cwd", metavar="DIR", help="Working folder on every host (default: this one's path).")
@click.option(
    "--starting-port",
    type=click.IntRange(1024, 65000),
    default=32323,
    show_default=True,
    help="First port on which the processes listen for each other.",
)
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment variable for all ranks; can be repeated.")
def launch(
    recipe: Path | None,
    overrides: tuple[str, ...],
    resume: str | None,
    overwrite: bool,
    hosts: str | None,
    hostfile: Path | None,
    count: int | None,
    backend: str | None,
    python: str | None,
    cwd: str | None,
    starting_port: int,
    env: tuple[str, ...],
) -> None:
    """Train a model as RECIPE describes on several Macs; each takes a part of every batch.

    On each host `mlxft train` is started by mlx.launch, over ssh without a password. Before that the hosts are
    checked: the same versions, the working folder and the recipe must be there.

    Ctrl-C stops all ranks after the step, with a checkpoint; a second one stops them at once, and a third kills them.

    \b
    Example: mlxft launch -n 2 configs/sft-lora.yaml
             mlxft launch --hosts a.local,b.local configs/sft-lora.yaml optim.lr=2e-4
             mlxft launch --hostfile hosts.json --backend jaccl --resume runs/sft-lora
    """
    import sys

    from mlxft.launch import check_cluster, check_environment, find_cluster
    from mlxft.launch import launch as run

    if hostfile is not None and (hosts is not None or count is not None):
        raise click.UsageError("--hostfile names the host of each rank: give it without --hosts and -n")
    check_environment(env)
    path, settings = _recipe(recipe, overrides, resume)
    if cwd is None and (path is None or path.exists()):  # an error is written once, not by every rank
        from mlxft.config import load_config

        load_config(path, settings, of_run=path is not None and path.name == "config.yaml" and resume is not None)
    if recipe is None and resume is None:
        recipe = path
    cluster = find_cluster(hosts, hostfile, count or 1, backend)
    given = [str(each) for each in (recipe, resume) if each and "=" not in str(each)]
    check_cluster(cluster, python or sys.executable, cwd, given, starting_port, env)
    command = [python or sys.executable, "-m", "mlxft", "train", *([str(recipe)] if recipe else []), *overrides]
    command += ["--overwrite"] * overwrite + (
        [f"--resume={resume}" if resume else "--resume"] if resume is not None else []
    )
    code = run(command, cluster, cwd=cwd, starting_port=starting_port, env=env)
    click.get_current_context().exit(code)


def _recipe(recipe: Path | None, overrides: tuple[str, ...], resume: str | None) -> tuple[Path | None, tuple[str, ...]]:
    """Return the file to read, or None where the overrides say it all, and the overrides.

    `--resume` takes a run (its name or folder), a recipe, or nothing; in the last case RECIPE is a run or a recipe.
    """
    if resume and "=" in resume:
        overrides, resume = (resume, *overrides), ""
    if resume and recipe is not None:
        raise click.UsageError("give one recipe, or --resume with one run folder")
    if resume is None:
        return _file(recipe, overrides), overrides
    path = Path(resume) if resume else recipe
    if path is None:
        return _file(None, overrides), overrides
    from mlxft.runs import find_run, named_run

    path = named_run(path)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        path = find_run(str(path), Path("runs"))
    if path.is_dir():
        if not (path / "config.yaml").exists():
            raise click.UsageError(f"{path} is not a run folder: it has no config.yaml")
        return path / "config.yaml", overrides
    return path, overrides


@click.command()
@takes_recipe
@click.option("--rows", default=2, show_default=True, type=click.IntRange(0), help="Number of rows to show.")
@click.option(
    "--time", is_flag=True, help="Load the weights and time a few steps, to estimate how long training takes."
)
@click.option(
    "--device",
    type=click.Choice(["metal", "cuda", "cpu"]),
    help="Device that the memory plan is for (default: this machine's).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts, the memory plan and the rows as JSON.")
def check(
    recipe: Path | None,
    overrides: tuple[str, ...],
    rows: int,
    time: bool,
    device: Literal["metal", "cuda", "cpu"] | None,
    as_json: bool,
) -> None:
    """Validate RECIPE and its data, and show what would be trained and how much memory it takes.

    Nothing is written. Without --time no weights are loaded.

    \b
    Example: mlxft check configs/sft-lora.yaml data.train=my.jsonl
             mlxft check configs/sft-lora.yaml --time
             mlxft check configs/sft-lora.yaml --device metal
    """
    if time and device:
        raise click.UsageError("--time measures this machine: give --device or --time, not both")
    from mlxft.check import check as run
    from mlxft.config import load_config

    run(load_config(_file(recipe, overrides), overrides), rows, make_console(), as_json, time, device)


# --- sweep ------------------------------------------------------------------------------------------------------------
# mlxft sweep, mlxft lr-find.


@click.command()
@takes_recipe
@click.option(
    "--trials", type=click.IntRange(1, 10**6), help="Total number of trials, including those of earlier calls."
)
@click.option("--time", "limit", metavar="TIME", help="Time limit of this call, e.g. 2h, 30m, 1h30m.")
@click.option("--name", help="Folder of the sweep, below run.dir (default: the run's name).")
@click.option("--overwrite", is_flag=True, help="Start over and delete the existing trials.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the trials, the best one and the importance of each setting as JSON."
)
def sweep(
    recipe: Path | None,
    overrides: tuple[str, ...],
    trials: int | None,
    limit: str | None,
    name: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Search for better settings for RECIPE: train it with different ones, and stop the worse trials early.

    The recipe names the settings to vary in its sweep section:

    \b
      sweep:
        space:
          optim.lr: {log: [1.0e-5, 1.0e-2]}    # also float, int, log_int: [low, high]
          tune.rank: {choice: [4, 8, 16, 32]}
        metric: loss        # a validation metric; others need direction: minimize or maximize
        sampler: tpe        # or random, grid
        pruner: halving     # or median, none

    The same command resumes a sweep that was killed or interrupted. The best settings are written to best.yaml.

    \b
    Example: mlxft sweep configs/sweep.yaml --trials 12
             mlxft sweep configs/sweep.yaml --time 2h data.train=my.jsonl
    """
    from mlxft.study.sweep import sweep as run

    console = make_console(stderr=as_json)
    path = _file(recipe, overrides)
    if path is None:
        raise click.UsageError("a sweep needs a recipe, whose section sweep says what to vary")
    found = run(path, overrides, trials=trials, limit=limit, name=name, overwrite=overwrite, console=console)
    if as_json:
        echo(json_text(found.to_json()))
    else:
        found.print(console)


@click.command("lr-find")
@takes_recipe
@click.option("--min", "low", default=1e-7, show_default=True, help="First learning rate.")
@click.option("--max", "high", default=1.0, show_default=True, help="Last learning rate.")
@click.option("--steps", default=100, show_default=True, help="Number of steps from the first rate to the last.")
@click.option("--plot", type=PathArg(), help="Plot the loss against the rate into this file: .png, .svg or .pdf.")
@click.option("--overwrite", is_flag=True, help="Replace the plot if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the rates, the losses and the suggestion as JSON.")
def lr_find(
    recipe: Path | None,
    overrides: tuple[str, ...],
    low: float,
    high: float,
    steps: int,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Suggest a learning rate for RECIPE: train at a rising rate, and see where the loss falls (Smith 2015).

    The suggestion is a tenth of the rate at which the smoothed loss was lowest, before it first rose by a quarter of
    its whole fall. The test ends when the loss diverges, and leaves no run folder behind.

    \b
    Example: mlxft lr-find configs/sft-lora.yaml --plot lr.png
             mlxft lr-find configs/sft-lora.yaml --min 1e-6 --max 1e-1 --steps 200
    """
    from mlxft.config import load_config
    from mlxft.files import check_file
    from mlxft.study.lr_find import lr_find as run

    console = make_console(stderr=as_json)
    if plot is not None:
        reserve(plot)
        check_file(plot, overwrite, "--plot")
    found = run(load_config(_file(recipe, overrides), overrides), low, high, steps, plot, console)
    if as_json:
        echo(json_text(found.to_json()))
        return
    for line in found.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        echo(f"plot: {plot}")


# --- distill-cache ----------------------------------------------------------------------------------------------------


@click.command("distill-cache")
@takes_recipe
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def distill_cache(recipe: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Store what the teacher of RECIPE says in the folder distill.cache, so that training needs no teacher in memory.

    At each token of a completion the log-probabilities of its distill.top_k likeliest tokens are stored. Rows without
    completions (data.format: prompts) get those that the teacher samples. Only the teacher is loaded. A command that
    was interrupted continues where it was.

    \b
    Example: mlxft distill-cache configs/distill.yaml distill.on_policy=0 distill.cache=teacher
             mlxft train configs/distill.yaml distill.on_policy=0 distill.cache=teacher
    """
    from mlxft.build import settled
    from mlxft.config import load_config
    from mlxft.model.load import load_tokenizer
    from mlxft.objectives.distill import store_teacher

    console = make_console(stderr=as_json)
    config = settled(load_config(_file(recipe, overrides), overrides), resume=False)
    m = config.model
    tokenizer = load_tokenizer(m.path, m.chat_template, trust_remote_code=m.trust_remote_code)
    found = store_teacher(config, tokenizer, console)
    if as_json:
        echo(json_text(found))
    else:
        echo(f"{counted(found['rows'], 'rows')}, {found['tokens']:,} tokens, {found['bytes'] / 1e6:.1f} MB")


# --- schema -----------------------------------------------------------------------------------------------------------
# mlxft schema.


@click.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check YAML as it is typed.

    \b
    Example: mlxft schema > recipe.schema.json

    VS Code (with its YAML extension), Neovim, Helix and other editors that use yaml-language-server then need one line
    at the top of a recipe:

    \b
        # yaml-language-server: $schema=recipe.schema.json
    """
    from mlxft.config import recipe_schema

    echo(json_text(recipe_schema(), indent=2))


# --- recipes ----------------------------------------------------------------------------------------------------------


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes that come with mlxft; `copy` writes one, to be trained as it is or changed.

    \b
    Example: mlxft recipes
             mlxft recipes copy sft-lora
    """
    if context.invoked_subcommand is None:
        from rich.table import Table

        from mlxft.demo.recipes import recipe_names

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, about in recipe_names().items():
            table.add_row(name, about)
        make_console().print(table)


@recipes.command()
@click.argument("name")
@click.argument("file", type=PathArg(dir_okay=False), required=False)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def copy(name: str, file: Path | None, overwrite: bool) -> None:
    """Write the recipe NAME to FILE (default: NAME.yaml), and beside it the rows and the code that it names.

    Example: mlxft recipes copy dpo-lora my-dpo.yaml
    """
    from mlxft.demo.recipes import copy_recipe

    recipe, *others = copy_recipe(name, file, overwrite)
    echo(f"wrote {recipe}" + "".join(f", {path}" for path in others))


# --- demo -------------------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--dir",
    "folder",
    default="demo-run",
    show_default=True,
    type=PathArg(),
    help="Folder for the run and the fused model; what an earlier demo left there is replaced.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(folder: Path, overrides: tuple[str, ...]) -> None:
    """Teach SmolLM2-135M ten facts that it cannot know, fuse the adapter, and ask the fused model about them.

    Example: mlxft demo
    """
    from mlxft.demo.walk import walk

    walk(folder, overrides, make_console())


@click.command()
@click.option(
    "--dir",
    "folder",
    default="rlhf-run",
    show_default=True,
    type=PathArg(),
    help="Folder for the runs and the fused model; what an earlier rlhf left there is replaced.",
)
@click.option("--reviews", help="File of rows with `review` and `label` (great or other); default: built-in rows.")
@click.argument("overrides", nargs=-1, metavar="[RUN:KEY=VALUE]...")
def rlhf(folder: Path, reviews: str | None, overrides: tuple[str, ...]) -> None:
    """Run RLHF from start to end on SmolLM2-135M: SFT, a reward model from pairs of reviews, PPO and fuse.

    At the end completions from before and after PPO are shown side by side.

    Example: mlxft rlhf ppo:run.steps=40
    """
    from mlxft.demo.rlhf import walk_rlhf

    walk_rlhf(folder, reviews, overrides, make_console())
