"""Recipes: YAML and KEY=VALUE overrides in, a validated Config out, and back to YAML for the run folder."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shlex
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mlxft.config import Config, config_class
from mlxft.errors import ConfigError, half_character, shorten
from mlxft.explain import explain
from mlxft.settings import Settings
from mlxft.text import home_path, read_small

S = TypeVar("S", bound=Settings)
_MOST = 20_000  # values in a recipe: a thousand times what one has
_DEEPEST = 100
_LONGEST = 3000  # bytes of a path; 4096 with what stands below it
# Settings of which one excludes the other.
PAIRS = (("run.steps", "run.epochs"), ("batch.tokens", "batch.rows"), ("tune.scale", "tune.alpha"))


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2, in which a key given twice is an error: the first would be ignored in silence."""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than a text."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _str(loader: _Loader, node: yaml.ScalarNode) -> str:
    # JSON, which YAML 1.2 holds, writes characters beyond 16 bits as two escapes.
    return str(loader.construct_scalar(node)).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:str", _str)
# YAML 1.1, which PyYAML reads, has octals in 010, minutes in 1:30, booleans in yes, no, on and off, and dates.
_OTHERS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag not in _OTHERS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _form, _first in (  # section 10.3.2 of YAML 1.2.2
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_form})$"), list(_first))


def read_yaml(text: str | bytes, origin: str, kind: Any = _Loader) -> Any:
    """Parse YAML 1.2.

    Args:
        kind: the loader, where YAML 1.1 will do and speed counts.
    Raises:
        ConfigError: bad syntax, a key given twice, or aliases that make much of little; it names the line.
    """
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _extent(node, {})
        if size > _MOST or depth > _DEEPEST:
            seen = f"more than {_MOST:,} values, aliases counted out" if size > _MOST else "values nested too deep"
            seen = "an alias holds itself" if size == math.inf else seen
            raise ConfigError(f"{origin}: {seen}; a recipe has some dozens, at most {_DEEPEST} deep")
        return loader.construct_document(node)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{origin}{place}: not valid YAML: {getattr(e, 'problem', None) or ' '.join(str(e).split())}"
        ) from e
    except ConfigError:
        raise
    except (ValueError, TypeError, RecursionError) as e:  # a number of 5,000 digits, or brackets without end
        raise ConfigError(f"{origin}: not valid YAML: {e}") from e


def _extent(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values a node is once each alias is what it stands for, and how deep; endless if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf
        parts = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = [_extent(n, known) for n in parts] if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(n for n, _ in below), 1 + max((deep for _, deep in below), default=0)
    return known[id(node)]


def override(key: str, value: object) -> str:
    """KEY=VALUE for a text or path, whatever YAML would take it for."""
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def function_override(function: Any) -> str:
    """KEY=VALUE for a `rewards.function`, which may be a mapping."""
    return f"rewards.function={function if isinstance(function, str) else json.dumps(function)}"


def _override(raw: dict[str, Any], text: str, chosen: set[str]) -> None:
    """Put one KEY=VALUE into `raw`; `chosen` holds the keys of all overrides."""
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {shorten(text)!r}: expected KEY=VALUE, for example tune.rank=16")
    put(raw, key.strip(), read_yaml(value, f"override {shorten(key)}"), chosen, f"override {shorten(text)!r}")


def put(raw: dict[str, Any], key: str, value: Any, chosen: set[str], origin: str) -> None:
    """Set a dotted `key` in `raw`; `chosen` holds all keys that are being set.

    Raises:
        ConfigError: there is a value where a section would have to be.
    """
    *sections, leaf = key.split(".")
    if len(sections) > _DEEPEST // 2:
        raise ConfigError(f"{origin}: a key of {len(sections) + 1:,} parts; no setting has so many")
    at = raw
    for name in sections:
        below = at.setdefault(name, {})
        if below is None:
            below = at[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{origin}: {shorten(name)} is a value, not a section")
        at = below
    at[leaf] = value
    # `run.epochs=3` on the command line replaces the recipe's `run.steps`, and so on: the later choice wins.
    for pair in PAIRS:
        if key in pair and at[leaf] is not None:
            other = pair[1 - pair.index(key)]
            if other not in chosen:  # both on the command line exclude each other, as both in a recipe do
                at.pop(other.rpartition(".")[2], None)


def _override_all(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply all overrides. Returns what is wrong with some."""
    problems = []
    chosen = {text.partition("=")[0] for text in overrides}
    for text in overrides:
        try:
            _override(raw, text, chosen)
        except ConfigError as e:
            problems.append(str(e))
    return problems


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
    config = _validate(raw, origin)
    _check_paths(config, origin)
    run = {"name": config.run.name or name or config.objective, "dir": home_path(config.run.dir)}
    model = {k: full_path(v) for k, v in (("path", config.model.path), ("adapter", config.model.adapter))}
    template = config.model.chat_template
    model["chat_template"] = None if template is None else Path(full_path(template))
    data = {k: full_path(v) for k, v in (("train", config.data.train), ("valid", config.data.valid))}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
        }
    )


def _validate(raw: dict[Any, Any], origin: str) -> Config:
    """A Config, or every problem in one ConfigError."""
    try:
        kind = config_class(str("sft" if raw.get("objective") is None else raw["objective"]))
    except ConfigError as e:
        # What else is wrong can still be said, but not of the objective's own sections.
        known = {k: v for k, v in raw.items() if k in Config.model_fields and k != "objective"}
        problems = [f"{origin}: {e}"]
        try:
            validated(Config, known, origin)
        except ConfigError as more:
            problems.append(str(more))
        raise ConfigError("\n".join(problems)) from e
    return validated(kind, raw, origin)


def validated(kind: type[S], raw: Mapping[Any, Any], origin: str) -> S:
    """A mapping as settings.

    Args:
        origin: the file named in errors.
    Raises:
        ConfigError: every problem, one a line.
    """
    if half := half_character(raw):
        raise ConfigError(f"{origin}: {half}")
    # `tune:` with nothing below it is an empty section.
    raw = {k: v for k, v in raw.items() if v is not None or k not in kind.model_fields}
    problems: dict[str, None] = {}
    while True:
        try:
            found = kind.model_validate(raw)
            break
        except ValidationError as e:
            problems |= dict.fromkeys(explain(e, kind))
            unknown = [error["loc"] for error in e.errors() if error["type"] == "extra_forbidden"]
            if not unknown:
                break
            # A section's keys are held against each other only where all are known: look again without the others.
            raw = copy.deepcopy(raw)
            for *place, leaf in unknown:
                at: Any = raw
                for name in place:
                    at = at[name]
                del at[leaf]
    if problems:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in problems))
    return found


def full_path(value: Any) -> Any:
    """The full path of a file or folder that is there, so that a run stays usable from another folder; else `value`."""
    path = home_path(value) if isinstance(value, (str, Path)) else None
    try:
        return str(path.resolve()) if path is not None and path.exists() else value
    except (OSError, ValueError):  # too long for a path
        return value


def _check_paths(config: Config, origin: str) -> None:
    """ConfigError where a path is longer than any file system takes."""
    named = {"model": "path adapter chat_template", "data": "train valid", "run": "dir", "rewards": "adapter function"}
    paths: dict[str, Any] = {
        f"{section}.{name}": getattr(getattr(config, section, None), name, None)
        for section, names in named.items()
        for name in names.split()
    }
    wrong = [
        f"{origin}: {name}: longer than a path can be ({_LONGEST} bytes, 255 a name): {shorten(str(path))}"
        for name, given in paths.items()
        for path in (given if isinstance(given, Mapping) else [given])
        if isinstance(path, str | Path)
        and (len(os.fsencode(path)) > _LONGEST or any(len(os.fsencode(p)) > 255 for p in Path(path).parts))
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[Any, Any], list[str]]:
    """What a recipe says, overrides applied, and what is wrong with some of these.

    Raises:
        ConfigError: missing file, bad YAML, or no mapping.
    """
    raw = _read_mapping(path)
    return raw, _settle(raw, overrides, "versions" in raw)


def read_settings(path: Path, kind: type[S], example: str) -> S:
    """Settings of another kind than a Config from a YAML file.

    Args:
        example: where one can be seen, in words, for who gives a recipe instead.
    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    raw = _read_mapping(path)
    if {"objective", "data", "tune"} & raw.keys():
        raise ConfigError(f"{path}: is a recipe of mlxft train; {example}")
    return validated(kind, raw, str(path))


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = read_small(path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: can not read the recipe: {getattr(e, 'strerror', None) or e}") from e
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw or {}


def _settle(raw: dict[Any, Any], overrides: Sequence[str], of_run: bool, looked_at: bool = False) -> list[str]:
    """Apply overrides to settings; those of a run decide nothing that only the user does. Returns the problems."""
    model, rewards = raw.get("model"), raw.get("rewards")
    if of_run and isinstance(model, dict):
        model.pop("trust_remote_code", None)
    named = rewards.pop("function", None) if of_run and not looked_at and isinstance(rewards, dict) else None
    problems = _override_all(raw, overrides)
    if named is not None and "function" not in raw["rewards"]:
        raw["rewards"]["function"] = named
        given = shlex.quote(function_override(named))
        problems.append(
            f"rewards.function: the run folder names Python to be run, and may be someone else's; read it, and add "
            f"{given}, or go on by your own recipe: mlxft train RECIPE --resume"
        )
    return problems


def load_config(path: Path, overrides: Sequence[str] = (), *, of_run: bool = False, looked_at: bool = False) -> Config:
    """Read a recipe and apply `KEY=VALUE` overrides.

    Args:
        of_run: the file is a run folder's, which may be someone else's: it decides neither that a model's code is
            trusted nor which Python gives rewards; overrides do. What a run wrote is known by its `versions`, too.
        looked_at: so, and nothing is trained by it: the rewards that it names are not asked for.
    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    raw = _read_mapping(path)
    problems = _settle(raw, overrides, of_run or looked_at or "versions" in raw, looked_at)
    try:
        config = parse_config(raw, str(path), path.stem.lstrip("."))
    except ConfigError as e:
        problems.append(str(e))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config, versions: dict[str, str]) -> str:
    """The full resolved configuration as YAML, with the versions it ran under."""
    resolved = config.model_dump(mode="json", exclude={"versions", "sweep"})
    # Settings that do not apply would be refused when this is read again.
    if config.model.adapter is not None:  # it brings its own rank, targets and so on
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in config.tune.model_fields_set}
    elif config.tune.method == "full":
        kept = {"method", "layers", "train", "freeze", "router_aux"}
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in kept}
    return dump_yaml(resolved | {"versions": versions})


def dump_yaml(value: Any) -> str:
    """Write YAML that `read_yaml` reads as it was."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, of sections within sections."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
