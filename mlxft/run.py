"""Train: build data, model, objective and optimiser from a Config, run the loop, and write the run folder."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from rich.console import Console

from mlxft.build import (
    agreed,
    base_skeleton,
    check_head,
    crowded,
    decide_checkpointing,
    fit_tokens,
    is_open,
    learning_notes,
    load_base,
    make_objective,
    prepare,
    settle_by_measure,
    settled,
    traffic,
)
from mlxft.config import Config, dump_config, flat, hand_over, load_config, override_all, parse_config, put
from mlxft.data.dataset import encode_prompt, sample_texts
from mlxft.device import Blas, Failure, awake, gpu_failed, gpu_failure, in_use
from mlxft.distributed import Ranks, check_same, current, joined, measure_network
from mlxft.errors import CheckpointError, ConfigError, MlxftError, ModelError, TrainingError, switch
from mlxft.files import Held, digest, hold, save_arrays, write_beside, write_text
from mlxft.model.adapters import LoRASpec, adapter_arrays, adapter_texts, load_trained, trained_weights
from mlxft.model.folder import save_folder
from mlxft.model.heads import HEAD_FILE, adapter_metadata, head_arrays, head_metadata, without_head
from mlxft.model.layers import (
    INPUTS,
    LowRank,
    checkpoint_layers,
    is_checkpointed,
    limits,
    measure_inputs,
    set_random_state,
)
from mlxft.model.load import (
    Loaded,
    base_fingerprint,
    chat_template_files,
    count_parameters,
    fits_base,
    sampled_digest,
    without_weights,
)
from mlxft.model.logits import Packing
from mlxft.model.sampling import Sampling, complete
from mlxft.model.shard import shard_base, sharding_of, shares
from mlxft.objectives.base import Objective
from mlxft.runs import Run, check_folder, find_adapter, make_folder, recorded, versions
from mlxft.text import VALUE, Event, counted, make_console, validation_figure
from mlxft.trainer import checkpoint
from mlxft.trainer.loop import Hooks, Loop, Progress, loop_state
from mlxft.trainer.optim import Optimizer
from mlxft.trainer.report import EventFile, Reporter, Sink, Stopped, check_installed, make_trackers, terminal


def as_config(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> Config:
    """Return a Config from a recipe file, a mapping, or itself; overrides and what is `given` replace its settings."""
    if isinstance(config, (str, Path)):
        return load_config(Path(config), overrides, given=given)
    if isinstance(config, Config) and not (overrides or given):
        return config
    raw = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, Config) else deepcopy(dict(config))
    problems = override_all(raw, overrides)
    if problems:
        raise ConfigError("\n".join(problems))
    for key, value in (given or {}).items():
        put(raw, key, value, set(given or ()), key)
    return parse_config(raw)


def _given(
    rows: Iterable[Mapping[str, Any]] | None,
    valid_rows: Iterable[Mapping[str, Any]] | None,
    rewards: Sequence[Callable[..., Any]] | None,
    objective: str | type[Objective] | None,
    environment: str | Callable[..., Any] | None,
    model: Loaded | None,
) -> dict[str, Any]:
    """The settings that stand for objects, which are handed over."""
    found: dict[str, Any] = {}
    if rows is not None:
        found["data.train"] = hand_over("data.train", "rows", list(rows))
    if valid_rows is not None:
        found["data.valid"] = hand_over("data.valid", "valid_rows", list(valid_rows))
    if rewards is not None:
        names = [getattr(f, "__name__", type(f).__name__) for f in rewards]
        unique = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        found["rewards.function"] = {hand_over("rewards.function", name, f): 1.0 for name, f in zip(unique, rewards)}
    if isinstance(objective, str):
        found["objective"] = objective
    elif objective is not None:
        name = getattr(objective, "__name__", type(objective).__name__)
        found["objective"] = hand_over("objective", name, objective)
    if isinstance(environment, str):
        found["environment.path"] = environment
    elif environment is not None:
        name = getattr(environment, "__name__", type(environment).__name__)
        found["environment.path"] = hand_over("environment.path", name, environment)
    if model is not None:
        found["model.path"] = model.source
    return found


def _check_given_model(config: Config, loaded: Loaded) -> None:
    """Refuse a model that is not what the recipe describes, or that has an adapter already."""
    if any(isinstance(module, LowRank) for module in loaded.model.modules()):
        raise ConfigError("model: it has an adapter already; load the base, and name the adapter by model.adapter")
    bits = (loaded.config.get("quantization") or {}).get("bits")
    if config.model.quantize not in (None, bits):
        raise ConfigError(f"model.quantize: {config.model.quantize}; the model that was given has {bits or 'all'} bits")
    wanted = config.model.dtype
    types = {str(v.dtype).rpartition(".")[2] for _, v in tree_flatten(loaded.model.parameters())} & {
        "float32",
        "bfloat16",
        "float16",
    }
    if wanted != "auto" and types and wanted not in types:
        raise ConfigError(f"model.dtype: {wanted}; the model that was given is of {', '.join(sorted(types))}")


class Assembled(NamedTuple):
    """Parts that the loop needs.

    Attributes:
        spec: the result of `prepare`.
        config: the recipe, with batch.tokens and memory.checkpoint as decided on this machine.
        notes: messages about the memory that training will take.
    """

    spec: LoRASpec | None
    optimizer: Optimizer
    config: Config
    notes: list[str]


def assemble(
    config: Config, loaded: Loaded, objective: Objective, correct: bool = False, begun: bool = False
) -> Assembled:
    """Prepare model and objective for the loop; `objective.compiled` then says whether the step is compiled.

    Args:
        correct: whether batch.tokens: auto is corrected by a measured step (see `is_open`), now or when the resumed
            run began.
        begun: whether a run is resumed, which was measured when it began.
    Raises:
        ConfigError, ModelError: model and objective do not fit each other, the recipe or the machine.
    """
    ranks, shard, measure = current(), config.distributed.shard, config.memory.measure
    if begun:
        config = config.model_copy(update={"memory": config.memory.model_copy(update={"measure": False})})
    config = config.sharded
    correct = correct and shard != "base"
    if shard == "base" and objective.steps_per_rollout():
        raise ConfigError(
            f"distributed.shard: base: objective {config.objective} works on rollouts, and each token that is sampled "
            "would gather the whole base; leave it out, and set model.quantize: 4 for a smaller base"
        )
    parted = shard == "base" and ranks.size > 1
    # A model that is larger than this machine is planned for without its weights, and cut before anything reads them.
    bare = base_skeleton(config) if parted else loaded.model
    spec = prepare(config, loaded)
    shared = shares(bare, ranks.size) if parted else None
    if parted:
        checkpointing, notes = decide_checkpointing(config, bare, objective, bare=True)
        assert ranks.group is not None
        shard_base(loaded.model, ranks.group)
        ranks.alike = True
    if spec is not None and spec.quantize_aware is not None:
        measure_inputs(loaded.model, sample_texts(loaded.tokenizer), begin=True)
        found = {n: v for n, v in trained_weights(loaded.model).items() if n.rpartition(".")[2] in (INPUTS, "lora_a")}
        loaded.model.load_weights(list(ranks.arrays_from_first(found).items()), strict=False)
    objective.prepare(loaded.model, base_fingerprint(loaded))
    check_head(config, loaded.model)
    if not parted:
        checkpointing, notes = decide_checkpointing(config, loaded.model, objective, refuse=not correct)
    if ranks.size > 1:
        who = f"{ranks.size} ranks ({', '.join(ranks.hosts)})"
        measured = {"as measured": ranks.network}
        notes.append(f"{who}: {traffic(config, loaded.model, shared).text(measured)}")
    mx.eval(loaded.model.parameters())
    if config.batch.pack:
        Packing(loaded.model, objective.summary().packed)  # raises if the model cannot be packed
    checkpoint_layers(loaded.model, checkpointing)
    group = ranks.group if shard == "optimizer" else None
    optimizer = Optimizer(config.optim, loaded.model, objective.clip_groups(), config.tune.lora_plus, group)
    taken = None
    if correct and config.memory.measure:
        config, taken, said = fit_tokens(config, loaded.model, objective, optimizer)
        notes += said
    notes += settle_by_measure(config, loaded.model, objective, optimizer, taken)
    # Record what was decided on this machine, so that a run resumed elsewhere computes in the same way.
    checkpoint = "on" if is_checkpointed(loaded.model) else "off"
    memory = config.memory.model_copy(update={"checkpoint": checkpoint, "measure": measure})
    settings = config.run.model_copy(update={"compile": "on" if objective.compiled else "off"})
    config = config.model_copy(update={"memory": memory, "run": settings})
    if ranks.size > 1:
        own, config = config, agreed(config, ranks, begun)
        checkpoint_layers(loaded.model, config.memory.checkpoint == "on")
        objective.compiled = config.run.compile == "on"
        if config.batch.budget != own.batch.budget:
            objective.rebatch(config)
    return Assembled(spec, optimizer, config, notes)


class _Saver:
    """Writes the checkpoints of a run, and its adapter or model."""

    def __init__(self, run: Run, held: Held, loaded: Loaded, spec: LoRASpec | None, objective: Objective) -> None:
        self.held = held
        self.run, self.loaded, self.spec, self.objective = run, loaded, spec, objective

    def checkpoint(self, state: dict[str, Any], optimizer: dict[str, mx.array], say: Callable[[str], None]) -> None:
        """Save a checkpoint; see `save_checkpoint`."""
        self.held.check()
        weights = trained_weights(self.loaded.model)
        snapshot = checkpoint.Snapshot(weights, optimizer, state, self.objective.arrays())
        folder = self.run.dir / "checkpoints"
        checkpoint.save_checkpoint(folder, state["progress"]["step"], snapshot, self.run.config.run.keep, say)

    def result(self) -> None:
        """Write adapter/ or model/ from the current weights."""
        self.held.check()
        model, config, out = self.loaded.model, self.run.config, self.run.result
        fingerprint, noted = base_fingerprint(self.loaded), self.objective.about()
        with without_head(model) as head:
            weights = trained_weights(model)

            def save_head(folder: Path) -> None:
                if head is not None:
                    of = without_weights(fingerprint) if config.tune.method == "full" else fingerprint
                    metadata = head_metadata(of, {**noted, "template": config.data.template})
                    write_beside(folder / HEAD_FILE, lambda p: save_arrays(p, head_arrays(head), metadata))

            if config.tune.method == "full":
                source = self.loaded.path if self.loaded.path and self.loaded.path.is_dir() else None
                tokenizer, about = self.loaded.tokenizer, self.loaded.config
                save_folder(out, model, tokenizer, about, overwrite=True, source=source, beside=save_head)
                return
        base = config.model.model_dump(mode="json", exclude={"adapter"})
        base = {"model": base.pop("path"), "fingerprint": fingerprint, **base}
        about = {"base": base, "objective": config.objective, "versions": versions(), **noted}
        for name, text in adapter_texts(self.loaded, self.spec, about).items():
            write_text(out / name, text)
        save_head(out)
        for name, arrays in adapter_arrays(weights).items():
            write_beside(out / name, partial(save_arrays, arrays=arrays, metadata=adapter_metadata(head)))


def _keep_template(loaded: Loaded, folder: Path) -> None:
    """Write the chat template that is trained with into a folder, because its original file may change or vanish."""
    for name, text in chat_template_files(loaded.tokenizer).items():
        write_text(folder / name, text)


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *overrides: str,
    rows: Iterable[Mapping[str, Any]] | None = None,
    valid_rows: Iterable[Mapping[str, Any]] | None = None,
    rewards: Sequence[Callable[..., Any]] | None = None,
    objective: str | type[Objective] | None = None,
    environment: str | Callable[..., Any] | None = None,
    model: Loaded | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    sinks: Sequence[Sink] = (),
) -> Run:
    """Train a model as a recipe describes.

    What is given as an object replaces the recipe's setting of that kind. A run that was given objects is resumed with
    the same ones; rows are compared by what they hold.

    Args:
        config: a recipe file, a mapping of settings, or a Config.
        overrides: KEY=VALUE, as on the command line.
        rows, valid_rows: rows in the recipe's data.format, in place of data.train and data.valid.
        rewards: functions called as f(prompts, completions, rows) -> list of floats, in place of rewards.function.
        objective: a subclass of Objective, or a name.
        environment: a class with `reset` and `step` (see `Environment`), or a name, in place of environment.path.
        model: what `load` returns for a base, in place of model.path; it is trained.
        resume: continue from the latest checkpoint; without one, start over.
        overwrite: replace the run folder if it exists.
        console: a rich Console to report to; default: the terminal.
        sinks: objects with event(dict) and close(), which get every event; raising Stopped ends the run.
    Returns:
        The finished run.
    Raises:
        ConfigError, DataError, ModelError: something does not fit; nothing has been written.
        CheckpointError: saving or resuming failed; what was saved before stays.
        TrainingError: the loss is not a number, memory has run out, or macOS has stopped the GPU's work.
        KeyboardInterrupt: the run was interrupted, and a checkpoint was saved.
    """
    given = _given(rows, valid_rows, rewards, objective, environment, model)
    found = as_config(config, overrides, given)
    if model is not None:
        _check_given_model(found, model)
    return train_config(found, resume=resume, overwrite=overwrite, console=console, base=model, sinks=sinks)


def train_config(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    base: Loaded | None = None,
    sinks: Sequence[Sink] = (),
) -> Run:
    """`train` by settings that are read; `base` is what `load_base` gives for them, where it is at hand."""
    console = console or make_console()
    if config.sweep.space:
        raise ConfigError(
            "sweep: this recipe is for mlxft sweep; train the sweep's best.yaml, or remove the section sweep"
        )
    with joined(config.distributed.timeout, training=True) as ranks:
        first = ranks.first
        notes = _check_ranks(config, ranks, resume)
        count = ranks.size if ranks.size > 1 else None
        config = config.model_copy(update={"distributed": config.distributed.model_copy(update={"ranks": count})})
        correct, begun = is_open(config), resume and ranks.from_first((config.run_dir / "config.yaml").exists())
        config = agreed(settled(config, resume), ranks, begun)
        run = Run(config.run_dir, config)
        if not first:
            console = make_console(file=io.StringIO())
        else:
            check_folder(run, resume, overwrite)
            check_installed(config.report.to)
        with hold(run.dir) if first else nullcontext() as held:
            return _train_held(run, held, resume, overwrite, console, base, sinks, correct, begun, notes)


def _check_ranks(config: Config, ranks: Ranks, resume: bool) -> list[str]:
    """Check that all ranks have one recipe, and give them their weights; return notes."""
    settings, wanted = config.distributed, config.distributed.ranks
    if wanted not in (None, ranks.size) and not resume:
        raise ConfigError(
            f"distributed.ranks: {wanted} processes are to train together, and {ranks.size} "
            f"{'is' if ranks.size == 1 else 'are'} here: mlxft launch -n {wanted} (or --hosts) starts them"
        )
    if isinstance(settings.weights, list):
        if len(settings.weights) != ranks.size and not (ranks.size == 1 and resume):
            raise ConfigError(f"distributed.weights: has {len(settings.weights)} numbers for {ranks.size} ranks")
        ranks.weights = [w / sum(settings.weights) for w in settings.weights] if ranks.size > 1 else [1.0]
    if ranks.size > 1:
        # What stands in files is compared by what it holds, once it is read.
        elsewhere = ("model.path", "model.adapter", "data.train", "data.valid", "run.dir", "versions")
        recipe = {k: v for k, v in flat(config.model_dump(mode="json")).items() if not k.startswith(elsewhere)}
        used = versions()
        used["python"] = used["python"].rpartition(".")[0]
        check_same(ranks, {"version of": used, "setting": recipe})
    stored = config.run_dir / "config.yaml"
    before = load_config(stored, looked_at=True).distributed.ranks if resume and stored.is_file() else ranks.size
    before = ranks.from_first(before or 1)
    if before == ranks.size:
        return []
    numbers = "the same rows and denominators, so its numbers differ by rounding only"
    if config.tune.dropout or config.tune.neftune:
        numbers = "the same rows and denominators, but each rank draws other noise (tune.dropout, tune.neftune)"
    return [f"the run began on {before} ranks and continues on {ranks.size}: {numbers}"]


def _train_held(
    run: Run,
    held: Held | None,
    resume: bool,
    overwrite: bool,
    console: Console,
    base: Loaded | None,
    sinks: Sequence[Sink],
    correct: bool,
    begun: bool,
    notes: list[str],
) -> Run:
    """Train in a run folder that this process holds; None: rank 0 holds it."""
    ranks = current()
    loaded = base or load_base(run.config, lazy=True, template=run.template if resume else None)
    objective = make_objective(run.config, loaded.tokenizer)
    asked, run = run.config, Run(run.dir, objective.config)
    if ranks.size > 1:
        check_same(ranks, {"hash of": _hashes(run.config, loaded, objective)})
    if ranks.size > 1:
        ranks.network = measure_network(ranks)
    spec, optimizer, config, expected = assemble(run.config, loaded, objective, correct, begun)
    total = total_steps(config, objective)
    run = Run(run.dir, config)
    mx.reset_peak_memory()
    if held is not None:
        make_folder(run, resume, overwrite)
    progress = _restore(run, loaded, objective, optimizer, total, notes) if resume else Progress()
    facts = describe_start(config, loaded, objective, total)
    if ranks.size > 1:
        facts |= {"ranks": ranks.size, "hosts": ranks.hosts, "network": ranks.network._asdict()}
        if (sharded := sharding_of(loaded.model)) is not None:
            facts |= {"base_bytes": sharded.whole, "base_bytes_per_rank": sharded.resident}
    if held is None:  # rank 0 writes and reports
        with limits(config.memory.limit, config.memory.cache), awake(config.run.keep_awake):
            return _train(run, loaded, objective, optimizer, total, progress, None, Reporter([]))
    saver = _Saver(run, held, loaded, spec, objective)
    notes = [*learning_notes(asked, objective, total), *notes]
    for line in [*start_lines(facts), *objective.summary().notes, *expected, *crowded(config), *notes]:
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    with recorded(held):
        write_text(run.dir / "config.yaml", dump_config(config, versions()))
        _keep_template(loaded, run.dir)
        reporter = _reporter(run, held, progress.step, total, console, sinks)

        def end(lost: str) -> None:
            reporter.event({"event": "failed", "step": progress.step, "text": lost})
            reporter.close()

        ranks.on_lost = end  # where this rank waits for one that does not come back
        try:
            kind, after = ("resume", f" after step {progress.step} of {total}") if progress.step else ("start", "")
            text = f"training{after}; everything is written to {run.dir}"
            reporter.event({"event": kind, "step": progress.step, **facts, "text": text})
            with limits(config.memory.limit, config.memory.cache), awake(config.run.keep_awake):
                return _train(run, loaded, objective, optimizer, total, progress, saver, reporter)
        finally:
            reporter.close()


class _InPlace:
    """Ends a run whose folder was moved or removed, since nobody would find what it writes."""

    def __init__(self, held: Held) -> None:
        self._held = held

    def event(self, event: Event) -> None:
        self._held.check()

    def close(self) -> None:
        pass


def _reporter(run: Run, held: Held, step: int, total: int, console: Console, sinks: Sequence[Sink]) -> Reporter:
    """Return the reporter of a run that continues after `step`."""
    since = step or None  # None: start over and keep no events
    files: list[Sink] = [_InPlace(held), EventFile(run.dir / "metrics.jsonl", since)]
    files.append(EventFile(run.dir / "samples.jsonl", since, ("sample",)))
    settings = {
        k: v for k, v in flat(run.config.model_dump(mode="json", exclude={"versions"})).items() if v is not None
    }
    trackers = make_trackers(run.config.report, run.dir, settings, step)
    reporter = Reporter([*files, terminal(console, total, step), *trackers, *sinks])
    for tracker in trackers:
        tracker.tell = reporter.say
    return reporter


def _train(
    run: Run,
    loaded: Loaded,
    objective: Objective,
    optimizer: Optimizer,
    total: int,
    progress: Progress,
    saver: _Saver | None,
    reporter: Reporter,
) -> Run:
    """Run the loop with its hooks, and save the adapter or model at its end; without a saver, rank 0 saves."""
    settings = run.config.run
    full = run.config.tune.method == "full"

    def save_result() -> None:
        if saver is not None:
            saver.result()

    def on_checkpoint(p: Progress) -> None:
        optimized = optimizer.gathered(keep=saver is not None)
        if saver is None:
            return
        saver.checkpoint({**loop_state(loop), "base": base_fingerprint(loaded)}, optimized, reporter.say)
        # Without validation the last weights are the best known; a whole model is only written at the end.
        if p.best_step is None and not full:
            save_result()

    def on_samples(p: Progress) -> None:
        for prompt in settings.sample_prompts if saver is not None or current().alike else ():
            ids = encode_prompt(prompt, loaded.tokenizer, chat=run.config.data.template == "auto")
            likeliest = Sampling(settings.sample_tokens or 64, temperature=0.0)
            answer = complete(loaded.model, loaded.tokenizer, ids, likeliest)
            reporter.event({"event": "sample", "step": p.step, "prompt": prompt, "answer": answer})

    hooks = Hooks(reporter.event, on_checkpoint, lambda p: save_result(), on_samples)
    loop = Loop(loaded.model, objective, optimizer, run.config, total, progress, hooks)
    try:
        finished = loop.run()
    except Stopped as e:
        reporter.event({"event": e.run_status, "step": progress.step, "text": str(e)})
        raise
    except (MlxftError, RuntimeError, MemoryError) as e:
        told = _gpu_failed(failure, progress, run) if (failure := gpu_failure(e)) is not None else e
        if told is e and isinstance(e, RuntimeError) and (lost := current().lost(2.0)):  # amid a sharded step
            told = TrainingError(lost)
        reporter.event({"event": "failed", "step": progress.step, "text": str(told)})
        raise told from None
    if not finished:
        text = f"stopped after step {progress.step} of {total}; a checkpoint is saved, resume with: {run.resume}"
        reporter.event({"event": "interrupted", "step": progress.step, "text": text})
        raise KeyboardInterrupt
    if progress.best_step is None:
        save_result()  # even if it exists: a kill may have come between the last checkpoint and this
    early = " (stopped early)" if progress.stopped_early else ""
    text = f"done after {counted(progress.step, 'steps')}{early}{_best(progress, objective)}; {run.result}"
    end = {"best_loss": progress.best_loss, "best_step": progress.best_step, "elapsed_s": progress.elapsed_s}
    reporter.event({"event": "end", "step": progress.step, **end, "text": text})
    return run


def _best(progress: Progress, objective: Objective) -> str:
    if progress.best_step is None or progress.best_loss is None:
        return ""
    valued = {VALUE: -progress.best_loss} if objective.valued else {}
    name, value = validation_figure({"event": "eval", "loss": progress.best_loss} | valued)
    return f"; best validation {name} {value:.4f} at step {progress.best_step}"


def _gpu_failed(failure: Failure, progress: Progress, run: Run) -> TrainingError:
    when, saved = f"after step {progress.step}", checkpoint.checkpoints(run.dir / "checkpoints")
    anew = f"another run.name or {switch('overwrite')}"
    if not saved:
        return gpu_failed(failure, f"{when}; there is no checkpoint yet", f". Then start over, with {anew}")
    when += f"; the checkpoint of step {saved[-1].name.removeprefix('step-')} is intact"
    others = f"Changing these settings makes another run, with {anew}"
    return gpu_failed(failure, when, f". {others}; without changes, resume with: {run.resume}")


MOST_EPOCHS = 1000  # epochs counted one by one; longer runs use their mean


def total_steps(config: Config, objective: Objective) -> int:
    """Return the number of steps (optimiser updates) of the whole run."""
    if config.run.steps is not None:
        return config.run.steps
    # Add up epochs one by one: each combines rows of different lengths, so their numbers of batches differ.
    epochs = config.run.epochs or objective.default_epochs() or 1.0
    part, whole = math.modf(epochs)
    count = min(int(whole) + (part > 0), MOST_EPOCHS)
    sizes = [objective.steps_per_epoch(e) for e in range(count)]
    steps = [size for size in sizes if size is not None]
    if len(steps) < count:
        raise ConfigError(f"run.epochs: objective {config.objective} does not say how long one is; give run.steps")
    if count == MOST_EPOCHS:
        return round(sum(steps) / count * (whole + part))
    return max(1, sum(steps[: int(whole)]) + (round(part * steps[-1]) if part else 0))


def describe_start(config: Config, loaded: Loaded, objective: Objective, total: int) -> dict[str, Any]:
    """Return facts about the training that is about to start, as JSON."""
    model = loaded.model
    trained, stored = (
        sum(v.size for _, v in tree_flatten(found)) for found in (model.trainable_parameters(), model.parameters())
    )
    with without_head(model):
        base = count_parameters(model)
        # Count every parameter of a critic or head, even if a critic starts with the same arrays as the policy.
        beside = stored - sum(v.size for _, v in tree_flatten(model.parameters()))
    blas = in_use()
    return {
        "objective": config.objective,
        "base": config.model.path,
        "method": config.tune.method,
        "trainable_parameters": trained,
        "total_parameters": base + beside,
        "steps": total,
        "data": objective.summary().counts,
        **({"blas": blas.to_json()} if blas is not None else {}),
    }


def start_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts of `describe_start` as lines of text."""
    share = 100 * facts["trainable_parameters"] / facts["total_parameters"]
    counts = ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {v:,}" for k, v in facts["data"].items())
    return [
        (
            f"{facts['objective']} of {facts['base']} by {facts['method']}: {facts['trainable_parameters']:,} of "
            f"{facts['total_parameters']:,} parameters are trained ({share:.2f} %), {facts['steps']:,} steps"
        ),
        counts,
        *(Blas(**facts["blas"]).lines() if "blas" in facts else []),
    ]


def _hashes(config: Config, loaded: Loaded, objective: Objective) -> dict[str, str]:
    """Return hashes of what a recipe only names, and what has to be the same on all ranks."""
    found = {"the base": base_fingerprint(loaded), "the data": objective.fingerprint()}
    if loaded.path is not None:
        found["the base's weights"] = sampled_digest(loaded.path)
    for path in (config.model.adapter, getattr(getattr(config, "rewards", None), "adapter", None)):
        if path is not None and (folder := find_adapter(Path(path))).is_dir():
            found[f"the adapter {path}"] = sampled_digest(folder)
    named = re.findall(r'"([^"]+\.py):', config.model_dump_json())
    for file in sorted({name for name in named if Path(name).is_file()}):
        found[file] = digest(Path(file))
    return found


def _restore(
    run: Run, loaded: Loaded, objective: Objective, optimizer: Optimizer, total: int, notes: list[str]
) -> Progress:
    """Restore model, optimiser and objective from the latest complete checkpoint."""
    ranks = current()
    snapshot = checkpoint.load_newest(run.dir / "checkpoints", notes.append) if ranks.first else None
    if ranks.size > 1 and ranks.from_first(snapshot is not None):
        snapshot = snapshot or checkpoint.Snapshot({}, {}, {})
        held = (ranks.arrays_from_first(v) for v in (snapshot.weights, snapshot.optimizer, snapshot.objective))
        weights, optimized, own = held
        snapshot = checkpoint.Snapshot(weights, optimized, ranks.from_first(snapshot.state), own)
    if snapshot is None:
        notes.append("there is no checkpoint yet: starting over")
        return Progress()
    state = snapshot.state
    if state["data"] != objective.fingerprint():
        raise CheckpointError(f"{run.dir}: the training data has changed since the run began; start a new run")
    if not fits_base(state.get("base"), base_fingerprint(loaded)):
        path = run.config.model.path
        raise CheckpointError(f"{run.dir}: the base {path} has changed since the run began; start a new run")
    try:
        load_trained(loaded.model, snapshot.weights, f"step-{state['step']}")
    except ModelError as e:
        raise CheckpointError(str(e)) from e
    optimizer.load(snapshot.optimizer)
    objective.load_state_dict(state["objective"])
    objective.load_arrays(snapshot.objective)
    set_random_state(state["random"])
    progress = Progress(**state["progress"])
    if progress.weights is not None and len(progress.weights) != ranks.size:
        progress.weights = None
    if progress.stopped_early:
        notes.append("the run stopped early, by run.patience: a longer run would have stopped there, too")
    elif progress.step >= total:
        notes.append("the run is already complete: nothing is left to train")
    elif progress.step == state["total_steps"] and progress.step % (run.config.run.eval_every or 1):
        notes.append(
            f"the run is extended: its validation after step {progress.step}, its last one until now, counts for the "
            "best weights, though a run of this length from the start would not have had it"
        )
    return progress
