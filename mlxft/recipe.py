"""Recipes: YAML and KEY=VALUE overrides in, a validated Config out, and back to YAML for the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlxft.config import Config, config_class
from mlxft.errors import ConfigError
from mlxft.explain import explain


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the first would be ignored in silence."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str, origin: str) -> Any:
    """Parse YAML; a key given twice, or bad syntax, is a ConfigError that names the line."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: not valid YAML: {getattr(e, 'problem', None) or e}") from e


def _override(raw: dict[str, Any], text: str) -> None:
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {text!r}: expected KEY=VALUE, for example tune.rank=16")
    *sections, leaf = key.strip().split(".")
    at = raw
    for name in sections:
        below = at.setdefault(name, {})
        if below is None:
            below = at[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {text!r}: {name} is a value, not a section")
        at = below
    at[leaf] = read_yaml(value, f"override {key}")
    # `run.epochs=3` on the command line replaces the recipe's `run.steps`, and so on: the later choice wins.
    for pair in (("steps", "epochs"), ("tokens", "rows"), ("scale", "alpha")):
        if leaf in pair:
            at.pop(pair[1 - pair.index(leaf)], None)


def parse_config(raw: Any, origin: str = "config", name: str | None = None) -> Config:
    """Validate a mapping; all errors are reported at once, with the value seen and the nearest right name.

    Args:
        raw: what the YAML held, overrides applied.
        origin: the file named in errors.
        name: the run's name where the recipe gives none.
    Raises:
        ConfigError: every problem, one a line.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: expected a mapping of settings, found {type(raw).__name__}")
    kind = config_class(str(raw.get("objective", "sft")))
    try:
        config = kind.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in explain(e, kind))) from None
    run = config.run if config.run.name else config.run.model_copy(update={"name": name or config.objective})
    model, data = config.model, config.data
    if Path(model.path).expanduser().exists():  # a run stays usable from another folder
        model = model.model_copy(update={"path": str(Path(model.path).expanduser().resolve())})
    local = {
        k: str(Path(v).resolve())
        for k, v in (("train", data.train), ("valid", data.valid))
        if isinstance(v, str) and Path(v).exists()
    }
    return config.model_copy(update={"run": run, "model": model, "data": data.model_copy(update=local)})


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `KEY=VALUE` overrides.

    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: can not read the recipe: {getattr(e, 'strerror', None) or e}") from e
    raw = read_yaml(text, str(path))
    raw = {} if raw is None else raw
    if isinstance(raw, dict):
        for text in overrides:
            _override(raw, text)
    return parse_config(raw, str(path), path.stem)


def dump_config(config: Config, versions: dict[str, str]) -> str:
    """The full resolved configuration as YAML, with the versions it ran under."""
    resolved = config.model_dump(mode="json", exclude={"versions"})
    if config.tune.method == "full":  # low-rank settings would be refused when this is read again
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in {"method", "layers", "train", "freeze"}}
    return yaml.safe_dump(resolved | {"versions": versions}, sort_keys=False, allow_unicode=True)
