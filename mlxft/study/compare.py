"""Hold several models open, with the weights of a shared base in memory once, and compare their completions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from rich.console import Console

from mlxft.data.dataset import encode_prompt, end_completions, turn_end
from mlxft.data.formats import Prompt, convert, unwritten
from mlxft.data.sources import read_rows
from mlxft.device import backend
from mlxft.errors import CheckpointError, ConfigError
from mlxft.model.adapters import ask_as_trained, base_noted, load_base_of, read_adapter_config, template_of
from mlxft.model.load import ALIASES, Loaded, base_fingerprint, load, load_tokenizer, resolve, stated_name
from mlxft.model.roles import Roles
from mlxft.model.sampling import Sampling, sample_batch, stream, text_of
from mlxft.runs import is_run, list_runs, locate, named_run, open_run
from mlxft.study.evaluate import base_of
from mlxft.text import bar, home_path

PromptLike = str | list[dict[str, Any]]  # a prompt: a text, or messages

# --- open -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to be used, perhaps an adapter on a base that it shares with others.

    Only one of those that share a base is in place at a time: use it inside `active`, in one thread.
    """

    name: str
    loaded: Loaded  # with its own tokenizer
    roles: Roles
    role: str | None  # None: the base without an adapter

    @contextmanager
    def active(self) -> Iterator[Loaded]:
        """Put the model in place for the length of the block."""
        with self.roles.use(self.role):
            yield self.loaded


class ModelSource(NamedTuple):
    """A model as it was named: its short name, its base with the options to load it, and its adapter."""

    name: str
    path: str
    options: dict[str, Any]
    adapter: Path | None = None


class Bases:
    """Bases in memory, each once, and the adapters that were opened on them, as roles. Use it in one thread.

    Args:
        most: bases to keep; another one takes their place. None: no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self._held: dict[Any, tuple[Loaded, Roles]] = {}
        self._most = most

    def open(self, source: ModelSource) -> OpenModel:
        """Load what of a model is not in memory, or has changed since.

        Raises:
            ModelError, CheckpointError: it cannot be loaded.
        """
        name, path, options, adapter = source
        key = _base_key(path, options)
        if key in self._held:
            template = options.get("chat_template") if adapter is None else template_of(adapter)
            tokenizer = load_tokenizer(path, template)
        else:
            if self._most is not None and len(self._held) >= self._most:
                self.clear()
            loaded = load(path, **options) if adapter is None else load_base_of(adapter, adapter, {})
            self._held[key] = loaded, Roles(loaded.model)
            tokenizer = loaded.tokenizer
        loaded, roles = self._held[key]
        role = None if adapter is None else f"{adapter} {_changed(adapter)}"
        if adapter is not None and role is not None:
            if role not in roles.names:
                roles.load(role, adapter, base_fingerprint(loaded))
            ask_as_trained(tokenizer, adapter)
        end_completions(tokenizer, turn_end(tokenizer))
        return OpenModel(name, replace(loaded, tokenizer=tokenizer), roles, role)

    def arrays(self) -> list[Any]:
        """Return all weights, for `mx.eval`."""
        return [(loaded.model.parameters(), roles.arrays()) for loaded, roles in self._held.values()]

    def clear(self) -> None:
        """Let go of all bases, and of their memory."""
        self._held.clear()
        gc.collect()
        mx.clear_cache()


def open_models(given: Sequence[str]) -> dict[str, OpenModel]:
    """Load models by their names; adapters of one base, and the base itself, share its weights.

    Args:
        given: runs, adapters, folders, hub ids or .gguf files, as NAME=PATH or as PATH, whose last part is the name
            then; `base` is the base of the first run or adapter.
    Returns:
        Name -> model, in the given order.
    Raises:
        ConfigError: two have the same name, or there is no base. ModelError: one cannot be loaded.
    """
    if not given:
        raise ConfigError("no model is given; name a run, an adapter, a folder or a hub id")
    bare = [text == "base" and not Path("base").exists() for text in given]
    tuned = [text for text, is_base in zip(given, bare) if not is_base]
    named = {text: model_source(text) for text in tuned}
    sources: dict[str, ModelSource] = {}
    for text, is_base in zip(given, bare):
        source = base_source(tuned) if is_base else named[text]
        if source.name in sources:
            first = given[list(sources).index(source.name)]
            raise ConfigError(f"two models are called {source.name}: {first} and {text}; name one: NAME=PATH")
        sources[source.name] = source
    bases = Bases()
    found = {name: bases.open(source) for name, source in sources.items()}
    mx.eval(bases.arrays())
    return found


def model_source(text: str) -> ModelSource:
    """Return where a model is that is named as on the command line; raise ModelError if there is none."""
    name, path = _named(text)
    at, adapter, _ = locate(path)
    noted = {} if adapter is None else base_noted(read_adapter_config(adapter))
    base = noted.pop("model", None)
    options = {k: v for k, v in noted.items() if k in ("dtype", "quantize", "group_size")}
    return ModelSource(name, str(at) if base is None else stated_name(base), options, adapter)


def base_source(tuned: Sequence[str]) -> ModelSource:
    """Return the base of the first run or adapter among models; raise ConfigError if there is none."""
    for text in tuned:
        with suppress(ConfigError):
            return ModelSource("base", *base_of(_named(text)[1]))
    raise ConfigError("base: give a run or an adapter beside it, whose base is meant; or the base's own name")


def _named(text: str) -> tuple[str, str]:
    """Return the name and the path of a model on the command line."""
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name and not home_path(text).exists():
        return name, str(found) if (found := named_run(path)).exists() else path
    place = named_run(text)
    if text in ALIASES or not place.exists():
        return text, text
    text, place = text if home_path(text).exists() else str(place), place.resolve()
    inside = place.name in ("adapter", "model") and is_run(place.parent)
    return (place.parent if inside else place).name.removesuffix(".gguf"), text


def _base_key(path: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what is equal for models whose base has the same weights in the same numbers, and is the same file yet."""
    dtype = options.get("dtype", "auto")
    dtype = {"cpu": "float32"}.get(backend(), "own") if dtype == "auto" else dtype
    place = resolve(path).resolve()
    return place, _changed(place), dtype, options.get("quantize"), options.get("group_size")


def _changed(path: Path) -> int:
    """Return when a file, or the weights of a folder, were last changed."""
    weights = [*path.glob("*.safetensors")] or [path]
    try:
        return max(each.stat().st_mtime_ns for each in weights)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from e


# --- compare ----------------------------------------------------------------------------------------------------------


def latest_and_base(place: Path) -> list[str]:
    """Return the names of the base of the latest run with trained weights, and of the run; reward models do not count.

    Raises:
        ConfigError: there is no such run.
    """
    for info in reversed(list_runs(place) if place.is_dir() else []):
        if info.objective != "reward" and any((info.dir / part).is_dir() for part in ("adapter", "model")):
            return ["base", str(info.dir)]
    raise ConfigError(f"no run in {place} has trained weights; give --models, such as --models base,runs/a")


def sampled_by(given: Sequence[str]) -> list[PromptLike]:
    """Return the run.sample_prompts of the last run among models.

    Raises:
        ConfigError: none of them is a run with such prompts.
    """
    for text in reversed(given):
        folder = home_path(_named(text)[1])
        if is_run(folder) and (prompts := open_run(folder).config.run.sample_prompts):
            return [*prompts]
    raise ConfigError("no prompt is given, and the run has no run.sample_prompts; give a prompt, or a file of prompts")


def stream_each(
    models: Iterable[OpenModel],
    prompt: PromptLike,
    sampling: Sampling,
    *,
    system: str | None = None,
    seed: int | None = None,
    until: Callable[[], bool] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (name, piece of text) as each model completes a prompt, one model after the other.

    Args:
        seed: the same seed gives the same texts; None: a new one for each.
        until: called after each token; True ends the completion.
    Raises:
        DataError, ConfigError: a chat template refuses the prompt.
    """
    for model in models:
        with model.active() as loaded:
            ids = encode_prompt(prompt, loaded.tokenizer, system=system)
            for piece in stream(loaded.model, loaded.tokenizer, ids, sampling, seed=seed, until=until):
                yield model.name, piece


def compare_prompts(
    models: Mapping[str, OpenModel],
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    *,
    system: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Complete prompts by every model, and return for each its prompt and its completions by the model's name."""
    found: list[dict[str, Any]] = [{"prompt": unwritten(prompt), "completions": {}} for prompt in prompts]
    with bar(console, len(models) * len(prompts), "completions") as advance:
        for model in models.values():
            with model.active() as loaded:
                ids = [encode_prompt(prompt, loaded.tokenizer, system=system) for prompt in prompts]
                how = replace(sampling, stop_at_eos=bool(loaded.tokenizer.eos_token_ids))
                groups = sample_batch(loaded.model, loaded.tokenizer, ids, how, seed=seed, on_done=advance)
                for line, before, (completion,) in zip(found, ids, groups):
                    line["completions"][model.name] = text_of(loaded.tokenizer, completion, how, before)
    return found


def prompts_of_file(file: str) -> list[PromptLike]:
    """Read prompts from a file: the lines of a .txt file, or rows of data.format: prompts.

    Raises:
        ConfigError, DataError: there is no such file, or it has no prompts.
    """
    if file.endswith(".txt"):
        lines = home_path(file).read_text("utf-8").splitlines()
        return [line for line in lines if line.strip()]
    return [item.prompt for _, item in convert(read_rows(file, "test"), "prompts") if isinstance(item, Prompt)]
