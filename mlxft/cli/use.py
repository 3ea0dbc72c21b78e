"""Commands that use a model: generate, chat, sample, score, eval, label, fewshot."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxft.cli import TRUST, PathArg, RunArg, TextArg, reserve
from mlxft.errors import ConfigError
from mlxft.text import echo, echo_completion, json_text, make_console

if TYPE_CHECKING:
    from mlxft.study.evaluate import Evaluation

# --- use --------------------------------------------------------------------------------------------------------------
# mlxft generate, mlxft chat.


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise click.UsageError(f"standard input is not UTF-8 (byte {e.start + 1} is 0x{data[e.start]:02x})") from e


_MODELS = "a run, adapter or fused folder, hub id, .gguf or smollm2-135m"


def sampling(temperature: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a command that samples; `temperature` is the default of --temperature."""
    options = [
        click.option("--model", type=RunArg(), required=True, help=f"Model: {_MODELS}."),
        click.option("--adapter", type=RunArg(), help="Adapter folder or run to apply to the model."),
        click.option("--system", type=TextArg(), help="System prompt."),
        click.option(
            "--max-tokens",
            default=512,
            show_default=True,
            type=click.IntRange(1, 10**6),
            help="Maximum length of a completion in tokens.",
        ),
        click.option(
            "--temperature",
            default=temperature,
            show_default=True,
            type=click.FloatRange(0),
            help="Sampling temperature; 0 always takes the most likely token.",
        ),
        click.option(
            "--top-p",
            default=1.0,
            show_default=True,
            type=click.FloatRange(0, 1, min_open=True),
            help="Sample from the most likely tokens that together have this probability.",
        ),
        click.option(
            "--top-k",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Sample from this many most likely tokens; 0 means all.",
        ),
        click.option(
            "--min-p",
            default=0.0,
            show_default=True,
            type=click.FloatRange(0, 1),
            help="Drop tokens with less than this share of the most likely token's probability.",
        ),
        click.option(
            "--stop",
            multiple=True,
            type=TextArg(),
            help="Text that ends a completion and is not shown; can be given several times.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed for sampling."),
        TRUST,
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.argument("prompt", type=TextArg(), required=False)
@click.option("--batch", metavar="FILE", help="Complete the prompts of a file instead; write one JSON line for each.")
@click.option("--out", type=PathArg(dir_okay=False), help="With --batch: file to write the lines to.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --out if it exists.")
@click.option("--samples", type=click.IntRange(1, 10_000), help="With --batch: completions per prompt.  [default: 1]")
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
    """Generate a completion for PROMPT (or standard input) and print it as it is sampled.

    With --batch, complete the prompts of a file instead, many at once.

    \b
    Example: mlxft generate --model runs/quickstart "How many days of leave are there?"
             mlxft generate --model runs/quickstart --batch prompts.jsonl --out answers.jsonl
    """
    from mlxft.files import check_file

    if batch is not None:
        _refuse(prompt, batch, out, samples, options["temperature"])
        if out is not None:
            reserve(out)
            check_file(out, overwrite)
    elif out is not None or samples is not None:
        raise click.UsageError("--out and --samples go with --batch")
    elif prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, pipe one in, or give a file of prompts with --batch")
        prompt = _utf8(sys.stdin.buffer.read())
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    from mlxft.data.dataset import encode_prompt
    from mlxft.model.sampling import Sampling, stream
    from mlxft.runs import load_run

    how = Sampling(**options)
    loaded = load_run(model, adapter)
    if batch is not None:
        from mlxft.study.generate import Asked, write_completions

        write_completions(Asked(batch, loaded, system), how, samples or 1, seed, out)
        return
    ids = encode_prompt(prompt or "", loaded.tokenizer, system=system)
    for piece in stream(loaded.model, loaded.tokenizer, ids, how, seed=seed):
        echo_completion(piece)
    echo()


def _refuse(prompt: str | None, batch: str, out: Path | None, samples: int | None, temperature: float) -> None:
    """Raise a UsageError for what cannot be combined with --batch."""
    if prompt is not None:
        raise click.UsageError("give a PROMPT or --batch, not both")
    if out is not None and os.path.exists(out) and Path(batch).exists() and out.samefile(batch):
        raise click.UsageError("--out is the file of prompts; choose another")
    if (samples or 1) > 1 and temperature == 0:
        raise click.UsageError(
            f"--samples {samples} at temperature 0 would give {samples} equal completions; raise --temperature"
        )


@click.command()
@sampling(temperature=0.0)
def chat(model: str, adapter: str | None, system: str | None, seed: int | None, **options: Any) -> None:
    """Chat with a model; an empty line or Ctrl-D ends the chat.

    Example: mlxft chat --model runs/quickstart
    """
    from mlxft.model.sampling import Sampling, stream
    from mlxft.runs import load_run

    how = Sampling(**options)
    loaded = load_run(model, adapter)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:
            echo()
            return
        if not line.strip():
            return
        line = _utf8(line.encode("utf-8", "surrogateescape"))
        messages.append({"role": "user", "content": line})
        pieces = []
        for piece in stream(loaded.model, loaded.tokenizer, messages, how, seed=seed):
            pieces.append(piece)
            echo_completion(piece)
        echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})


# --- sample -----------------------------------------------------------------------------------------------------------
# mlxft sample.


@click.command()
@click.argument("prompts")
@click.option("--n", default=8, show_default=True, type=click.IntRange(1, 10_000), help="Completions per prompt.")
@click.option(
    "--keep",
    default="best",
    show_default=True,
    help="Which completions to keep: best (one per prompt), all, or above:X (those that score above X).",
)
@click.option("--reward", type=RunArg(), metavar="RUN", help="Run of a reward model that scores the completions.")
@click.option(
    "--function", metavar="FILE.py:NAME", help="Function that scores the completions, as rewards.function in a recipe."
)
@click.option(
    "--environment",
    metavar="ENV",
    help="Environment of whole conversations, which may reward them: a name or path as in a recipe, or YAML such as "
    "'{path: calculator, turns: 4}'. PROMPTS may be `environment`, for its own rows.",
)
@click.option(
    "--cut-off", is_flag=True, help="Also keep completions cut off at --max-tokens, which SFT would treat as complete."
)
@click.option("--out", required=True, type=PathArg(dir_okay=False), help="File to write the rows for SFT to.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@sampling(temperature=1.0)
def sample(
    prompts: str,
    n: int,
    keep: str,
    reward: str | None,
    function: str | None,
    environment: str | None,
    cut_off: bool,
    out: Path,
    overwrite: bool,
    as_json: bool,
    model: str,
    adapter: str | None,
    system: str | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Sample completions for the prompts in the file PROMPTS, score them, and write the best as rows for SFT.

    OUT is read with data.format: prompt-completion (with --environment: messages); each row also holds its score.

    \b
    Example: mlxft sample prompts.jsonl --model runs/sft --reward runs/reward-lora --out best.jsonl
             mlxft sample prompts.jsonl --model runs/sft --function rewards.py:score --keep above:0.5 --out good.jsonl
             mlxft sample environment --environment calculator --model runs/grpo --out conversations.jsonl
    """
    if environment is None and (reward is None) == (function is None):
        raise click.UsageError("give either --reward or --function, which scores the completions, or an --environment")
    if n > 1 and options["temperature"] == 0:
        raise click.UsageError(f"--n {n} at temperature 0 would give {n} equal completions; raise --temperature")
    if os.path.exists(out) and Path(prompts).exists() and out.samefile(prompts):
        raise click.UsageError("--out is the file of prompts; choose another")
    from mlxft.distributed import joined
    from mlxft.files import check_file
    from mlxft.model.sampling import Sampling
    from mlxft.objectives.episodes import read_environment
    from mlxft.objectives.rewards import RewardsSettings
    from mlxft.runs import load_run
    from mlxft.study.generate import Choice, best_of_n, read_keep

    with joined() as ranks:
        if ranks.first:
            reserve(out)
            check_file(out, overwrite)
        rewards = RewardsSettings(adapter=reward, function=function)
        choice = Choice(n, read_keep(keep, n), cut_off, Sampling(**options), rewards, read_environment(environment))
        how: dict[str, Any] = {"seed": seed, "system": system, "console": make_console(stderr=True)}
        done = best_of_n(prompts, load_run(model, adapter), choice, out, **how)
        if ranks.first:
            echo(json_text(done.to_json()) if as_json else str(done))


# --- score ------------------------------------------------------------------------------------------------------------
# mlxft score.


@click.command()
@click.argument("run", type=RunArg())
@click.argument("file")
@click.option(
    "--tokens",
    default=4096,
    show_default=True,
    type=click.IntRange(1),
    help="Number of tokens in a batch, padding included.",
)
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row, then one with the summary.")
def score(run: str, file: str, tokens: int, as_json: bool) -> None:
    """Score the completions in FILE with the reward model of RUN.

    A row with messages, or prompt and completion, gets one score; one with chosen and rejected gets two; one with
    prompt and answers gets a ranking.

    Example: mlxft score runs/reward-lora test.jsonl
    """
    from mlxft.study.score import score_file as run_score
    from mlxft.study.score import summarise, tables

    rows = run_score(run, file, make_console(stderr=True), tokens=tokens)
    for row in rows:
        echo(json_text(row.to_json()) if as_json else str(row))
    summary = summarise(rows)
    if as_json:
        echo(json_text({"summary": summary}))
        return
    for line in tables(summary):
        echo(line)
    plain = {k: v for k, v in summary.items() if isinstance(v, int | float)}
    echo(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in plain.items()))


# --- eval -------------------------------------------------------------------------------------------------------------
# mlxft eval.


@click.command()
@click.argument("model", type=RunArg())
@click.argument("file", required=False)
@click.option("--adapter", type=RunArg(), help="Adapter folder or run to apply to the model.")
@click.option(
    "--format",
    "format_",
    help="Format of the rows, as in data.format (default: the run's, else the one that the rows fit).",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="What to measure: loss (default), pairs (default for pairs), choice, exact_match, contains, number, f1, json, "
    "file.py:function, reward:RUN, or a YAML file; can be given several times.",
)
@click.option(
    "--environment",
    metavar="ENV",
    help="Measure the reward of episodes in this environment: a name or path as in a recipe, or YAML such as "
    "'{path: calculator, turns: 4}'. FILE has prompts, or is `environment`, for its own rows.",
)
@click.option(
    "--template",
    type=click.Choice(["auto", "none"]),
    help="auto applies the chat template; none gives prompts as plain text, as lm-eval does (default: the task's, else "
    "the run's, else auto).",
)
@click.option(
    "--thoughts",
    type=click.Choice(["drop", "keep"]),
    help="drop removes a completion's thoughts before scoring; keep scores all of it (default: the task's, else drop).",
)
@click.option(
    "--shots", default=0, show_default=True, type=click.IntRange(0), help="Number of solved rows in each prompt."
)
@click.option("--shots-from", metavar="FILE", help="File that the solved rows are taken from.")
@click.option(
    "--against",
    type=RunArg(),
    metavar="MODEL",
    help="Model to compare with, by paired difference: base, or another run or model.",
)
@click.option(
    "--answers",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="With a loss: also complete the prompts of this many rows, the first ones, and keep the completions.",
)
@click.option("--limit", type=click.IntRange(1), help="Evaluate only the first rows (with --tasks: of each task).")
@click.option(
    "--max-length", type=click.IntRange(2), help="Maximum length of a row in tokens (default: the model's context)."
)
@click.option(
    "--overflow",
    default="error",
    show_default=True,
    type=click.Choice(["error", "drop", "truncate", "split"]),
    help="What to do with longer rows; truncate and split (format text) work only for the loss.",
)
@click.option(
    "--tokens",
    default=2048,
    show_default=True,
    type=click.IntRange(1),
    help="Number of tokens in a batch, padding included.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Seed for few-shot rows, sampling and bootstrap.",
)
@click.option(
    "--out",
    type=PathArg(file_okay=False),
    help="Folder for predictions.jsonl and results.json (default: eval/FILE in the run folder).",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation in the folder of --out.")
@click.option("--tasks", "harness", metavar="NAMES", help="lm-eval tasks to run instead of FILE, separated by commas.")
@click.option("--include-path", metavar="DIR", help="With --tasks: folder with more lm-eval task files.")
@click.option("--chat", is_flag=True, help="With --tasks: apply the chat template.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def eval(
    model: str,
    file: str | None,
    out: Path | None,
    overwrite: bool,
    against: str | None,
    adapter: str | None,
    tasks: tuple[str, ...],
    harness: str | None,
    include_path: str | None,
    environment: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate MODEL (a run, adapter, fused or any other model) on FILE: loss and perplexity, or a task.

    Each figure comes with its standard error. A task with choices compares log-likelihoods; the other tasks score the
    model's completions. configs/eval-reviews.yaml is an example of a task in YAML.

    \b
    Example: mlxft eval runs/quickstart mlxft/demo/valid.jsonl --against base
             mlxft eval runs/a test.jsonl --task f1 --task contains --json
             mlxft eval runs/a environment --environment calculator --against base
             mlxft eval runs/a --tasks arc_easy,hellaswag --limit 100
    """
    if harness is not None:
        _refuse_beside_tasks(file, out, against, tasks, {**options, "environment": environment})
        _by_harness(model, adapter, harness, include_path, options, as_json)
        return
    if file is None:
        raise click.UsageError("give a FILE, or lm-eval tasks with --tasks")
    if include_path is not None or options.pop("chat"):
        raise click.UsageError("--include-path and --chat go with --tasks")
    if bool(options["shots"]) != (options["shots_from"] is not None):
        raise click.UsageError("--shots and --shots-from go together")
    from mlxft.distributed import joined
    from mlxft.files import EVALUATION
    from mlxft.objectives.episodes import read_environment
    from mlxft.study.evaluate import Asking, check_out, run_episodes, run_evaluation

    options["format"] = options.pop("format_")
    asking = Asking(tasks or ("loss",), **options)
    how: dict[str, Any] = {"adapter": adapter, "against": against, "console": make_console(stderr=True)}
    if (met := read_environment(environment)) is not None:
        _refuse_beside_environment(tasks, options)
    with joined() as ranks:
        if ranks.first:
            if out is not None:
                reserve(out / EVALUATION[0])
            check_out(out, overwrite, adapter or model)
        if met is not None:
            found = run_episodes(model, file, met, asking, **how)
        else:
            found = run_evaluation(model, file, asking, **how)
        if ranks.first:
            _give(found, adapter or model, file, out, as_json)


def _give(found: Evaluation, model: str, file: str, out: Path | None, as_json: bool) -> None:
    """Print the results and write them."""
    from mlxft.study.evaluate import default_out, show_evaluation

    folder = out or default_out(model, file, found)
    # Print before writing, so that a full disk does not lose the results.
    if as_json:
        echo(json_text(found.to_json()))
    else:
        show_evaluation(make_console(), found)
    if folder is not None:
        found.write(folder)
    if not as_json:
        echo(f"predictions: {folder / 'predictions.jsonl'}" if folder else "give --out DIR to keep the predictions")


def _refuse_beside_environment(tasks: tuple[str, ...], options: dict[str, Any]) -> None:
    """Raise a UsageError for options that episodes do not use."""
    given = {"--task": tasks, "--overflow": options["overflow"] != "error", "--shots-from": options["shots_from"]}
    given |= {f"--{name.replace('_', '-')}": options[name] for name in ("format", "template", "thoughts", "max_length")}
    if unused := [name for name, value in given.items() if value]:
        raise click.UsageError(f"{', '.join(unused)}: not with --environment, which rewards whole episodes")


def _refuse_beside_tasks(
    file: str | None, out: Path | None, against: str | None, tasks: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Raise a UsageError for options that lm-eval's tasks do not use."""
    given = {
        "FILE": file,
        "--task": tasks,
        "--against": against,
        "--environment": options["environment"],
        "--format": options["format_"],
        "--template": options["template"],
        "--shots-from": options["shots_from"],
        "--out": out,
        "--overflow": options["overflow"] != "error",
    }
    if unused := [name for name, value in given.items() if value]:
        raise click.UsageError(f"{', '.join(unused)}: not with --tasks: lm-eval's tasks bring their own rows")


def _by_harness(
    model: str, adapter: str | None, names: str, include_path: str | None, options: dict[str, Any], as_json: bool
) -> None:
    from mlxft.lifeline import several_ranks

    if several_ranks():
        raise ConfigError("--tasks: lm-eval's tasks run in one process; start it without mlx.launch")
    from mlxft.study.evaluate import Asking
    from mlxft.study.lm_eval import run_tasks, show_tasks

    found = run_tasks(
        model,
        [name.strip() for name in names.split(",") if name.strip()],
        Asking(**{name: options[name] for name in ("shots", "limit", "max_length", "tokens", "seed", "thoughts")}),
        adapter=adapter,
        include_path=include_path,
        chat=options["chat"],
        console=make_console(stderr=True),
    )
    if as_json:
        echo(json_text(found))
    else:
        show_tasks(make_console(), found)


# --- label ------------------------------------------------------------------------------------------------------------
# mlxft label.


@click.command()
@click.argument("files", nargs=-1, metavar="[PROMPTS]")
@click.option("--recipe", type=PathArg(), help="YAML file with these settings; options override it.")
@click.option(
    "--model",
    type=RunArg(),
    help=f"Model that is sampled: {_MODELS}.",
)
@click.option("--adapter", type=RunArg(), help="Adapter folder or run to apply to the model.")
@click.option(
    "--against",
    type=RunArg(),
    help="Another model or run: one completion from each is judged, and the win rate is printed.",
)
@click.option("--n", default=2, show_default=True, type=click.IntRange(2, 9), help="Completions per prompt.")
@click.option("--out", type=PathArg(), help="File of judgements, one per line; an existing file is continued.")
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(1, 10**6),
    help="Maximum length of a completion in tokens.",
)
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0), help="Sampling temperature.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed for the completions and their order."
)
@click.option("--agreement", is_flag=True, help="Compare the files of two labellers instead: Cohen's kappa.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the counts and the win rate as JSON.")
@click.pass_context
def label(
    context: click.Context,
    /,
    files: tuple[str, ...],
    recipe: Path | None,
    agreement: bool,
    as_json: bool,
    **source: Any,
) -> None:
    """Judge completions of the prompts in the file PROMPTS by hand, without seeing which model wrote them.

    OUT is then read with data.format: preference. A row is {"prompt": ...}; a row that also has "answers", or "chosen"
    and "rejected", is judged as it is, without a model.

    \b
    Example: mlxft label prompts.jsonl --model runs/sft --out pairs.jsonl
             mlxft label --recipe configs/label.yaml --model runs/sft
             mlxft label --agreement ann.jsonl ben.jsonl
    """
    typed = click.core.ParameterSource.COMMANDLINE
    given = {name for name in context.params if context.get_parameter_source(name) == typed}
    if agreement:
        if len(files) != 2 or given - {"files", "agreement", "as_json"}:
            raise click.UsageError("--agreement takes two files of judgements, and nothing else")
        from mlxft.study.label import agreement as compare

        found = compare(Path(files[0]), Path(files[1]))
        echo(json_text(found._asdict()) if as_json else str(found))
        return
    if recipe is not None:
        files, source = _with_recipe(recipe, files, source, given)
    if source["model"] is None and (unused := sorted(given & {"n", "max_tokens", "temperature"})):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise click.UsageError(f"{names}: without --model nothing is sampled; give --model, or leave this out")
    out = source.pop("out")
    if len(files) != 1 or out is None:
        raise click.UsageError("give one file of prompts, and --out; on the command line or in a --recipe")
    reserve(out)
    from mlxft.model.sampling import Sampling
    from mlxft.study.label import LabelSource
    from mlxft.study.label import label as judge

    how = Sampling(source.pop("max_tokens"), source.pop("temperature"))
    done = judge(files[0], out, LabelSource(how, **source), make_console(stderr=as_json))
    win = done.win_rate
    if as_json:
        rate = None if win is None else {**win._asdict(), "rate": win.rate, "interval": win.interval}
        echo(json_text({**done._asdict(), "win_rate": rate}))
        return
    echo(f"{done.judged} of {done.total} prompts judged, {done.skipped} skipped: {out}")
    if win is not None:
        echo(str(win))


def _with_recipe(
    recipe: Path, files: tuple[str, ...], source: dict[str, Any], given: set[str]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the files and settings of the command line, completed by those of the recipe."""
    from mlxft.study.label import read_label_recipe

    settings = read_label_recipe(recipe)
    prompts = settings.pop("prompts", None)
    source |= {k: v for k, v in settings.items() if k not in given}
    return files or (() if prompts is None else (prompts,)), source


# --- fewshot ----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("recipe", type=PathArg())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--test",
    required=True,
    metavar="FILE",
    help="File of the rows to evaluate; they are never trained on or shown in a prompt.",
)
@click.option("--k", "ks", metavar="K,K,...", help="Numbers of examples, for every method (default: 0,1,4,16).")
@click.option("--in-context", metavar="K,K,...", help="Numbers of examples in the prompt, where they differ from --k.")
@click.option(
    "--tuned", metavar="K,K,...", help="Numbers of examples per label that are trained on; all means every row."
)
@click.option("--both", metavar="K,K,...", help="Numbers of examples that are trained on and also shown in the prompt.")
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Number of random draws of the examples; all is run once.",
)
@click.option("--task", metavar="TASK", help="Task, as in mlxft eval (default: one that fits the recipe's rows).")
@click.option("--limit", type=click.IntRange(1), help="Evaluate only the first rows.")
@click.option(
    "--least-steps",
    default=30,
    show_default=True,
    type=click.IntRange(1),
    help="Minimum number of training steps, where the recipe's epochs over few rows give fewer.",
)
@click.option(
    "--overflow",
    type=click.Choice(["error", "drop"]),
    default="error",
    show_default=True,
    help="What to do with rows that do not fit the context together with their examples; drop counts them.",
)
@click.option(
    "--out", type=PathArg(file_okay=False), help="Folder of the study (default: the run folder's name with -fewshot)."
)
@click.option("--overwrite", is_flag=True, help="Replace another study in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def fewshot(
    recipe: Path,
    overrides: tuple[str, ...],
    test: str,
    ks: str | None,
    in_context: str | None,
    tuned: str | None,
    both: str | None,
    seeds: int,
    task: str | None,
    limit: int | None,
    least_steps: int,
    overflow: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure what a few examples bring: shown in the prompt, trained on as RECIPE describes, or both.

    Every method is compared with zero-shot. Without --k, only the methods that are given are run. The same command
    resumes a study that was stopped.

    \b
    Example: mlxft fewshot configs/fewshot-reviews.yaml --k 0,1,4,16,all --test test.jsonl
             mlxft fewshot configs/fewshot-reviews.yaml --in-context 4 --tuned 16,all --test test.jsonl
    """
    from mlxft.study.fewshot import StudyPlan, read_ks
    from mlxft.study.fewshot import fewshot as run

    given = {"in_context": in_context, "tuned": tuned, "both": both}
    numbers = read_ks(ks, given)
    plan = StudyPlan(test, *numbers, seeds, limit, task, least_steps, overflow)
    study = run(recipe, overrides, plan, out=out, overwrite=overwrite, console=make_console(stderr=True))
    message = study.plot()
    if as_json:
        echo(json_text(study.to_json()))
        return
    study.show(make_console())
    echo(message)
