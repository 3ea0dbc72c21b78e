"""The Python API beside `train`: generate, sample, score, evaluate, fuse and export, each by a plain call."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxft.config import hand_over
from mlxft.errors import ConfigError
from mlxft.runs import Run, load_run

if TYPE_CHECKING:
    from mlxft.exports.fuse import Fused
    from mlxft.model.load import Loaded
    from mlxft.study.evaluate import Evaluation

_Prompt = str | list[dict[str, Any]]
Named = str | Path | Run


def _loaded(model: Loaded | Named) -> Loaded:
    return load_run(model) if isinstance(model, (str, Path, Run)) else model


def _path(model: Named) -> str:
    return str(model.dir if isinstance(model, Run) else model)


def generate(
    model: Loaded | Named,
    prompt: _Prompt,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    **sampling: Any,
) -> str:
    """Complete a prompt.

    Args:
        model: what `load` returns; or a run, adapter, folder or hub id.
        prompt: a text, or messages; they go through the model's chat template where it has one.
        temperature: 0 takes the likeliest token.
        stop: texts that end the completion, not included.
        seed: the same seed gives the same completion; default: a new one.
        sampling: top_p, top_k, min_p, stop_at_eos.
    Raises:
        ConfigError, DataError, ModelError: an argument is wrong, or the model cannot be had.
    """
    from mlxft.model import sampling as s

    how = s.Sampling(max_tokens, temperature, stop=tuple(stop), **sampling)
    loaded = _loaded(model)
    return s.complete(loaded.model, loaded.tokenizer, prompt, how, seed=seed)


def sample(
    model: Loaded | Named,
    prompts: Iterable[_Prompt],
    *,
    samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    **sampling: Any,
) -> list[list[str]]:
    """Sample completions of many prompts at once.

    Args:
        samples: completions of each prompt.
        seed: the same seed gives the same completions.
        model, prompts, stop, sampling: as for `generate`.
    Returns:
        The completions of each prompt, in the order of the prompts.
    """
    from mlxft.data.dataset import encode_prompt
    from mlxft.model import sampling as s

    how = s.Sampling(max_tokens, temperature, stop=tuple(stop), **sampling)
    loaded = _loaded(model)
    ids = [encode_prompt(prompt, loaded.tokenizer) for prompt in prompts]
    found = s.sample_batch(loaded.model, loaded.tokenizer, ids, how, samples=samples, seed=seed)
    return [
        [s.text_of(loaded.tokenizer, completion, how, prompt) for completion in of_one]
        for prompt, of_one in zip(ids, found)
    ]


def score(run: str | Path | Run, rows: str | Path | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Score or rank completions with a reward model.

    Args:
        run: a run of objective reward, or its adapter or model folder.
        rows: a file, or rows: messages; prompt and completion; prompt, chosen and rejected; or prompt and answers.
    Returns:
        For each row its scores, as `mlxft score --json` prints them.
    """
    from mlxft.study.score import score_file as score_file
    from mlxft.text import make_console

    quiet = make_console(file=io.StringIO())
    if isinstance(rows, (str, Path)):
        return [row.to_json() for row in score_file(_path(run), str(rows), quiet)]
    return [row.to_json() for row in score_file(_path(run), hand_over("data.test", "rows", list(rows)), quiet)]


def evaluate(
    model: Named, file: str | Path, *, task: str | Sequence[str] = "loss", against: Named | None = None, **options: Any
) -> Evaluation:
    """Evaluate a model on a file: loss and perplexity, or tasks with their standard errors.

    Args:
        task: loss, a metric such as exact_match or f1, or a task file; or several.
        against: another model on the same rows, for paired differences; "base": what the run started from.
        options: format, template, shots, shots_from, limit, max_length, overflow, tokens, seed, confidence.
    Returns:
        The figures; `to_json()` has them as `mlxft eval --json` prints them.
    """
    from mlxft.study.evaluate import Asking, run_evaluation
    from mlxft.text import make_console

    asking = Asking((task,) if isinstance(task, str) else tuple(task), **options)
    other = None if against is None else _path(against)
    return run_evaluation(_path(model), str(file), asking, against=other, console=make_console(file=io.StringIO()))


def fuse(run: Named, out: str | Path, **options: Any) -> Fused:
    """Fuse a run's adapter into its base, and measure how close the fused model is.

    Args:
        out: the folder to write.
        options: as the options of `mlxft fuse`: bits, dequantize, keep, overwrite and so on.
    """
    from mlxft.exports.fuse import fuse_sources as fuse_run

    return fuse_run(Path(_path(run)), Path(out), **options)


def export(
    run: Named,
    out: str | Path,
    *,
    format: Literal["peft", "seq-cls", "gguf", "ollama"],
    type: str = "f16",
    lora: bool = False,
    model: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a run (or any model) as another program reads it.

    Args:
        format: peft: an adapter for PEFT; seq-cls: a reward model for transformers; gguf: one file for llama.cpp;
            ollama: a folder with such a file and a Modelfile.
        type: of the matrices, for gguf and ollama: f32, f16, bf16 or q8_0.
        lora: for gguf, the adapter alone.
        model: the base, where the adapter does not say or it has moved.
    Returns:
        What there is to say of it, a sentence each.
    """
    source, to = Path(_path(run)), Path(out)
    if format in ("gguf", "ollama"):
        from mlxft.exports.gguf import check_arguments, export_gguf
        from mlxft.exports.ollama import export_ollama

        check_arguments(type, lora)
        if format == "gguf":
            return export_gguf(source, to, kind=type, lora=lora, model=model, overwrite=overwrite)
        return export_ollama(source, to, kind=type, model=model, overwrite=overwrite)
    if lora or type != "f16":
        raise ConfigError(f"export: type and lora are for format gguf, not {format}; leave them out")
    from mlxft.exports.peft import export_peft, export_seqcls

    writers = {"peft": export_peft, "seq-cls": export_seqcls}
    if format not in writers:
        raise ConfigError(f"export: format is {format!r}; expected peft, seq-cls, gguf or ollama")
    return writers[format](source, to, model=model, overwrite=overwrite)
