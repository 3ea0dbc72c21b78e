"""The Python API beside `train`: each use of a model by a plain call, and the parts of a training loop of one's own."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mlxft.config import full_path, hand_over
from mlxft.errors import ConfigError, DataError
from mlxft.runs import Run, load_run, versions

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy.typing as npt

    from mlxft.data.dataset import Encoded
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
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop, **sampling}
    found = sample_tokens(_loaded(model), prompts, samples=samples, seed=seed, **how)
    return [[completion.text for completion in group] for group in found]


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

    In a script that mlx.launch has started, all ranks call it, share the rows, and get the same result.

    Args:
        task: loss, a metric such as exact_match or f1, or a task file; or several.
        against: another model on the same rows, for paired differences; "base": what the run started from.
        options: format, template, shots, shots_from, limit, max_length, overflow, tokens, seed, confidence.
    Returns:
        The figures; `to_json()` has them as `mlxft eval --json` prints them.
    """
    from mlxft.distributed import joined
    from mlxft.study.evaluate import Asking, run_evaluation
    from mlxft.text import make_console

    asking = Asking((task,) if isinstance(task, str) else tuple(task), **options)
    other = None if against is None else _path(against)
    with joined():
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
    type: str | Sequence[str] = "f16",
    lora: bool = False,
    model: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> list[str]:
    """Write a run (or any model) as another program reads it.

    Args:
        format: peft: an adapter for PEFT; seq-cls: a reward model for transformers; gguf: one file for llama.cpp;
            ollama: a folder with such a file and a Modelfile.
        type: of the matrices, for gguf and ollama: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0 and others. With
            several, which gguf takes, NAME.gguf stands for NAME-TYPE.gguf of each.
        lora: for gguf, the adapter alone.
        model: the base, where the adapter does not say or it has moved.
        options: for gguf and ollama, as the options of `mlxft export`: imatrix, measure, probe.
    Returns:
        What there is to say of it, a sentence each. For gguf and ollama, the list's attribute `figures` holds the files
        and what was measured, as `mlxft export --json` prints them.
    """
    source, to = Path(_path(run)), Path(out)
    common: dict[str, Any] = {"model": model, "overwrite": overwrite}
    if format == "gguf":
        from mlxft.exports.gguf import export_gguf

        return export_gguf(source, to, kind=type, lora=lora, **common, **options)
    if format == "ollama" and not lora:
        from mlxft.exports.ollama import export_ollama

        return export_ollama(source, to, kind=type, **common, **options)
    if lora or type != "f16" or options:
        named = ", ".join([*(["lora"] if lora else []), *(["type"] if type != "f16" else []), *options])
        raise ConfigError(f"export: {named}: for format gguf, not {format}; leave it out")
    from mlxft.exports.peft import export_peft, export_seqcls

    writers = {"peft": export_peft, "seq-cls": export_seqcls}
    if format not in writers:
        raise ConfigError(f"export: format is {format!r}; expected peft, seq-cls, gguf or ollama")
    return writers[format](source, to, **common)


# --- a loop of one's own ----------------------------------------------------------------------------------------------
# What examples/sft_loop.py and examples/rl_loop.py are made of, beside mlx and `mlxft.functional`.


class SampledCompletion(NamedTuple):
    """A completion, and the tokens that it was sampled as.

    Attributes:
        prompt: ids of the prompt, chat template included.
        ids: ids as sampled, with the EOS that ended it.
        text: the completion as text, without EOS and what follows a stop string.
        finish: why it ended: "eos", "stop" or "length".
    """

    prompt: list[int]
    ids: list[int]
    text: str
    finish: str


def adapt(
    model: Loaded,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    layers: Literal["all"] | int | list[int] = "all",
    dora: bool = False,
    seed: int = 0,
) -> Loaded:
    """Put a fresh LoRA adapter on a model, and freeze everything else.

    The adapter has no effect at first, and is the one that `train` starts from with the same settings and seed. The
    global random state stays as it is.

    Args:
        model: what `load` returns for a base; it is changed in place, and set to training mode.
        rank, alpha: the update is a product of rank `rank`, multiplied by alpha / rank.
        dropout: on the input of the update, from 0 to below 1.
        targets: all-linear, attention, mlp, or name patterns such as q_proj, as `tune.targets`.
        layers: blocks with adapters: all, the last N, or a list of indices.
        dora: train the magnitudes of the weights' rows, too (Liu et al. 2024).
    Returns:
        The same `model`.
    Raises:
        ConfigError: a number is out of bounds, a target matches nothing, or the model has an adapter already.
    """
    import mlx.core as mx

    from mlxft.model.adapters import LoRASpec, attach, select_targets
    from mlxft.model.layers import LowRank, aside

    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        seen = f"rank is {rank}, alpha is {alpha:g} and dropout is {dropout:g}"
        raise ConfigError(f"adapt: {seen}; expected rank of at least 1, alpha above 0, and dropout from 0 to below 1")
    if any(isinstance(module, LowRank) for module in model.model.modules()):
        raise ConfigError("adapt: the model has an adapter already; load the base, or train the adapter that it has")
    paths = select_targets(model.model, targets, layers, dora)
    with aside():
        mx.random.seed(seed)
        attach(model.model, LoRASpec(tuple(paths), rank, alpha / rank, dropout, dora))
        mx.eval(model.model.parameters())
    model.model.train()
    vars(model).pop("split", None)  # of the model before
    return model


def tokenize(
    model: Loaded,
    rows: str | Path | Iterable[Mapping[str, Any]],
    *,
    format: str = "messages",
    train_on: str = "assistant",
    max_length: int = 2048,
    overflow: str = "error",
) -> list[Encoded]:
    """Turn rows into token ids, and say which of the tokens are trained.

    Args:
        model: what `load` returns; its tokenizer and chat template are used.
        rows: a file, or rows as mappings.
        format: of the rows, as `data.format`: messages, prompt-completion, text, sharegpt or alpaca.
        train_on: assistant (every turn of it), last, completion or all.
        max_length: tokens that a row may have.
        overflow: for longer rows: error, drop, truncate, or (texts) split.
    Returns:
        For each row its `ids`, (T,) int32, and `trained`, (T,) bool; several entries where the chat template writes
        earlier turns in another way later on.
    Raises:
        ConfigError, DataError: an argument or a row is wrong; all wrong rows are reported together.
    """
    from mlxft.data.dataset import encode_rows
    from mlxft.data.formats import convert
    from mlxft.data.sources import given_rows, read_rows

    found = read_rows(str(rows), "train") if isinstance(rows, (str, Path)) else given_rows(rows)
    examples = convert(found, format, chat=model.tokenizer.has_chat_template)
    options: dict[str, Any] = {"train_on": train_on, "max_length": max_length, "overflow": overflow}
    return list(encode_rows(examples, model.tokenizer, **options).rows)


def sample_tokens(
    model: Loaded,
    prompts: Iterable[_Prompt],
    *,
    samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    **sampling: Any,
) -> list[list[SampledCompletion]]:
    """Sample completions of many prompts at once, and return them with their token ids.

    The model is in evaluation mode meanwhile. `logprobs` at the same temperature is what the tokens were drawn by,
    unless top_p, top_k or min_p cut some off.

    Args:
        model, prompts, samples, stop, seed, sampling: as for `sample`.
    Returns:
        The completions of each prompt, in the order of the prompts.
    """
    from mlxft.data.dataset import encode_prompt
    from mlxft.model import sampling as s

    how = s.Sampling(max_tokens, temperature, stop=tuple(stop), **sampling)
    tokenizer = model.tokenizer
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    found = s.sample_batch(model.model, tokenizer, encoded, how, samples=samples, seed=seed)
    return [
        [SampledCompletion(prompt, c.ids, s.text_of(tokenizer, c, how, prompt), c.finish) for c in group]
        for prompt, group in zip(encoded, found)
    ]


def logprobs(
    model: Loaded,
    ids: mx.array | npt.ArrayLike,
    mask: mx.array | npt.ArrayLike,
    *,
    temperature: float = 1.0,
    grad: bool = True,
    base: bool = False,
) -> mx.array:
    """Compute the log-probability of each masked token after those before it, in nats.

    Logits exist for masked tokens only, and a chunk of them at a time, forward and backward.

    Args:
        model: what `load` or `adapt` returns.
        ids: (B, T) integers, padded on the right.
        mask: (B, T), non-zero for the tokens whose log-probability is wanted: never the first, which nothing
            predicts. It is read here and now, so it cannot be an input of a compiled function.
        temperature: of sampling; above 0.
        grad: whether a gradient will be asked for; False is quicker, and dropout is off.
        base: read the model without its adapter, as a reference; there is no gradient.
    Returns:
        (B, T) float32, 0 outside the mask.
    Raises:
        ConfigError: temperature is not above 0.
        DataError: shapes differ, the mask is empty, or it has a first token.
    """
    import mlx.core as mx
    import numpy as np

    from mlxft.model.cpu import as_trained, quicker
    from mlxft.model.layers import probing
    from mlxft.model.logits import Draw, rows_logprobs
    from mlxft.model.roles import Roles

    if not temperature > 0:
        raise ConfigError(f"logprobs: temperature is {temperature:g}; expected a number above 0")
    tokens, wanted = np.array(ids, dtype=np.int32), np.array(mask) != 0
    if tokens.ndim != 2 or tokens.shape != wanted.shape:
        raise DataError(f"logprobs: ids {tokens.shape} and mask {wanted.shape}; expected both to be (B, T)")
    if wanted[:, 0].any() or not wanted.any():
        why = "the first token of a row, which nothing predicts" if wanted.any() else "no token"
        raise DataError(f"logprobs: the mask has {why}; expected some of the tokens after the first")
    places = np.flatnonzero(wanted).astype(np.int32)
    labels = mx.array(tokens.reshape(-1)[places])
    arrays, draw, grad = (mx.array(tokens), mx.array(places - 1), labels), Draw(temperature), grad and not base

    def read() -> mx.array:
        return rows_logprobs(model.split, *arrays, grad=grad, draw=draw)

    with quicker(model.model):
        if grad:
            values = read()
        else:
            without = Roles(model.model, adopt="adapter").use(None) if base else nullcontext()
            with probing(model.model), without:
                values = as_trained(read)
    return mx.zeros(tokens.size).at[mx.array(places)].add(values).reshape(tokens.shape)


def save_adapter(model: Loaded, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model's adapter as a folder that mlxft's commands, `load` and mlx-lm read.

    Args:
        model: what `adapt` returned, trained since; or a loaded run or adapter.
        folder: appears when all of it is written; it names the base, and keeps the chat template.
        overwrite: replace an adapter folder that mlxft made.
    Returns:
        The folder.
    Raises:
        ConfigError: the model has no adapter, or the folder exists and may not be replaced.
        ExportError: writing failed; nothing is left of it.
    """
    from mlx.utils import tree_flatten

    from mlxft.files import flush, save_arrays, text_writer
    from mlxft.model.adapters import adapter_arrays, adapter_texts, attached_spec, trained_weights
    from mlxft.model.folder import check_destination, replace_folder
    from mlxft.model.heads import adapter_metadata, head_of
    from mlxft.model.layers import LEAVES, LowRank

    layers = {path: module for path, module in model.model.named_modules() if isinstance(module, LowRank)}
    if not layers or head_of(model.model) is not None:
        what = "a reward model, which mlxft.train saves" if layers else "no adapter; put one on it by mlxft.adapt"
        raise ConfigError(f"save_adapter: the model {'is' if layers else 'has'} {what}")
    out = Path(folder)
    check_destination(out, overwrite, "adapter")
    leaves = {f"{path}.{leaf}" for path in layers for leaf in LEAVES}
    weights = {n: v for n, v in tree_flatten(model.model.parameters()) if n in leaves} | trained_weights(model.model)
    base = {"model": full_path(model.source), "fingerprint": model.fingerprint, **model.options}
    about = {"base": base, "versions": versions()}
    with replace_folder(out, "adapter") as part:
        for name, text in adapter_texts(model, attached_spec(layers), about).items():
            (part / name).parent.mkdir(exist_ok=True)
            text_writer(text)(part / name)
        for name, arrays in adapter_arrays(weights).items():
            save_arrays(part / name, arrays, adapter_metadata(None))
            flush(part / name)
    return out
