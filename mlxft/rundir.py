"""Run folders from outside: whether one may be written, what is in one, and loading its result for use."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxft.errors import CheckpointError, ConfigError, MlxftError, ModelError
from mlxft.owned import check_replaceable, claim, empty, is_empty, read_mark
from mlxft.temporary import clear
from mlxft.text import home_path, parse_json, read_file

if TYPE_CHECKING:
    from mlxft.config import Config
    from mlxft.model.load import Loaded

# What may differ when a run goes on; all else would make it another run.
FREE_ON_RESUME = {
    "model.trust_remote_code",
    "run.report_every",
    "run.save_every",
    "run.keep",
    "run.keep_awake",
    "memory.measure",
    "run.dir",
    "run.name",
    "run.sample_prompts",
    "run.sample_tokens",
    "report.to",
    "report.project",
}


@dataclass(frozen=True)
class Run:
    """A run folder."""

    dir: Path
    config: Config

    @property
    def result(self) -> Path:
        """The trained adapter, or the trained model's folder."""
        return self.dir / ("model" if self.config.tune.method == "full" else "adapter")

    @property
    def template(self) -> Path | None:
        """Where the chat template is that it was trained with, if it keeps one; see `kept_template`."""
        from mlxft.model.adapters import kept_template

        return kept_template(self.dir, None)

    @property
    def resume(self) -> str:
        """The command that goes on with it."""
        from mlxft.recipe import function_override

        function = getattr(getattr(self.config, "rewards", None), "function", None)
        given = [] if function is None else [function_override(function)]
        return shlex.join(["mlxft", "train", "--resume", str(self.dir), *given])

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, all or of one kind."""
        lines = read_file(self.dir / "metrics.jsonl").decode().splitlines()
        found = [parse_json(line) for line in lines if line.endswith("}")]
        return [e for e in found if event in (None, e["event"])]


def versions() -> dict[str, str]:
    """What a run ran under."""
    names = ("mlxft", "mlx", "mlx-lm", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and no model's."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").exists()


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run, or the folder itself."""
    inside = path / "adapter"
    return inside if (inside / "adapter_config.json").exists() else path


def load(path: str | Path | Run, adapter: str | Path | None = None, *, scores: bool = False, **options: Any) -> Loaded:
    """Load for use: a run, an adapter folder, a fused or any other model, with an adapter if one is named.

    Args:
        path: also a Run, as `train` and `open_run` return it.
        scores: a reward run is wanted, and its head is attached; without it text is, and a reward run is refused.
        options: as for mlxft.model.load.load; they override what the run or adapter says of its base.
    Raises:
        ModelError: nothing there, the adapter belongs to another base, or it is not of the wanted kind.
    """
    from mlxft.data.encode import end_completions, turn_end
    from mlxft.model.adapters import load_with_adapter
    from mlxft.model.heads import load_head
    from mlxft.model.load import base_fingerprint
    from mlxft.model.load import load as load_model
    from mlxft.model.logits import Split

    path = path.dir if isinstance(path, Run) else path
    folder = home_path(path)
    if adapter is None and is_run(folder):
        run = open_run(folder)
        if not run.result.exists():
            raise ModelError(f"{folder} has no result yet; go on with {run.resume}")
        path, adapter = (run.result, None) if run.config.tune.method == "full" else (path, run.result)
    elif adapter is None and (folder / "adapter_config.json").exists():
        adapter = folder
    if adapter is None:
        head = _checked_head(home_path(path), scores)
        loaded = load_model(str(path), **options)
    else:
        adapter = find_adapter(home_path(adapter))
        head = _checked_head(adapter, scores)
        loaded = load_with_adapter(path, adapter, options)
    if head is not None:
        load_head(Split(loaded.model), head, base_fingerprint(loaded))
        loaded.model.eval()
    # Of a base model the makers' EOS tokens may not know the template that it is spoken to by.
    end_completions(loaded.tokenizer, turn_end(loaded.tokenizer))
    return loaded


def _checked_head(folder: Path, scores: bool) -> Path | None:
    """The head in a folder, which is there if and only if `scores` are wanted."""
    from mlxft.model.adapters import read_adapter_config
    from mlxft.model.heads import HEAD_FILE

    head = folder / HEAD_FILE if (folder / HEAD_FILE).is_file() else None
    noted = read_adapter_config(folder).get("mlxft", {}) if (folder / "adapter_config.json").is_file() else {}
    if head is None and noted.get("objective") == "reward":
        raise ModelError(f"{folder} is a reward model's adapter without its head: {HEAD_FILE} belongs beside it")
    if scores and head is None:
        raise ModelError(
            f"{folder} gives text, not scores: it has no {HEAD_FILE}; name a run of objective: reward (others answer "
            "prompts: mlxft generate)"
        )
    if head is not None and not scores:
        raise ModelError(f"{folder} is a reward model: it gives scores, not text; use mlxft score, or name a policy")
    return head


def open_run(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        CheckpointError: it is no run folder.
    """
    from mlxft.recipe import load_config

    folder = home_path(folder)
    try:
        config = load_config(folder / "config.yaml", looked_at=True)
    except MlxftError as e:
        raise CheckpointError(f"{folder} is no run folder: {e}") from e
    run = config.run.model_copy(update={"dir": folder.resolve().parent, "name": folder.resolve().name})
    return Run(folder, config.model_copy(update={"run": run}))


def check_folder(run: Run, resume: bool, overwrite: bool) -> None:
    """Refuse what may not be written to: before anything is loaded, and again before anything is written."""
    if resume and overwrite:
        raise ConfigError("give --resume or --overwrite, not both")
    if run.dir.exists() and not run.dir.is_dir():
        raise ConfigError(f"run.name: {run.dir} is a file")
    if not run.dir.exists():
        return
    if overwrite:
        check_replaceable(run.dir, "run")
        _check_unused(run)
    elif is_empty(run.dir):
        return
    elif not resume:
        raise ConfigError(
            f"{run.dir} exists; go on with --resume, replace it with --overwrite, or choose another run.name"
        )
    else:
        _check_resumable(run)


def _check_resumable(run: Run) -> None:
    """Refuse to go on in a folder that no run made, or with settings of another run."""
    from mlxft.recipe import load_config

    file = run.dir / "config.yaml"
    stored = load_config(file, looked_at=True) if file.is_file() else None
    # An older version's run has no mark; what it ran under stands in no recipe that a person writes.
    mark = read_mark(run.dir)
    if not (stored and stored.versions) if mark is None else mark.kind != "run":
        raise ConfigError(f"{run.dir}: is not a run folder that mlxft made, so nothing is written there")
    if run.config.tune.method == "full":
        check_replaceable(run.result, "model")
    for folder in (run.result, run.dir / "checkpoints"):
        if folder.is_symlink():
            raise ConfigError(
                f"{folder}: is a link; what is behind it is neither replaced nor removed, put it back here"
            )
    if stored is not None:
        _check_same(stored, run.config)


def _check_unused(run: Run) -> None:
    """Refuse to replace a folder that holds the files that are to be trained on."""
    model, data = run.config.model, run.config.data
    used = {
        "model.path": model.path,
        "model.adapter": model.adapter,
        "model.chat_template": model.chat_template,
        "data.train": data.train,
        "data.valid": data.valid if isinstance(data.valid, str) else None,
    }
    gone = run.dir.resolve()
    inside = [k for k, v in used.items() if v is not None and gone in (p := Path(v).absolute(), *p.parents)]
    if inside:
        raise ConfigError(f"{run.dir}: {', '.join(inside)} lies in this run folder; choose another run.name")


def _check_same(before: Config, now: Config) -> None:
    """Refuse a setting that makes it another run, by name."""
    from mlxft.recipe import flat

    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    free = set(FREE_ON_RESUME)
    if now.optim.schedule == "constant" and (now.optim.warmup == 0 or now.optim.warmup >= 1):
        free |= {"run.steps", "run.epochs"}  # the learning rate does not depend on the length then
    keys = [k for k in {**old, **new} if k not in free and not k.startswith("versions") and old.get(k) != new.get(k)]
    if keys:
        lines = [f"{k}: the run has {old.get(k)!r}, asked for is {new.get(k)!r}" for k in keys]
        raise ConfigError("can not resume with other settings:\n  " + "\n  ".join(lines))


def make_folder(run: Run, resume: bool, overwrite: bool) -> None:
    """Make the run folder, which is held, ready to be written to; what a run left in it is gone with `overwrite`."""
    try:
        check_folder(run, resume, overwrite)
        if overwrite:
            empty(run.dir)
        if not resume or is_empty(run.dir):
            claim(run.dir, "run")
        for folder in (run.dir, run.result, run.dir / "checkpoints"):
            clear(folder)
    except OSError as e:
        raise ConfigError(f"run.dir: can not write to {run.dir}: {e.strerror or e}") from e
