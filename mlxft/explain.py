"""What is wrong with a recipe, in words: one line a problem, with the value seen and the nearest right name."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mlxft.config import objective_sections, objectives
from mlxft.errors import nearest, shorten


def all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every setting below `kind`."""
    names: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += all_keys(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def explain(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line a problem; the branches of a union become one problem."""
    problems: dict[str, list[tuple[str, Any]]] = {}
    for e in error.errors():
        location = _location(e["loc"], kind)
        if e["type"] == "extra_forbidden":
            text = "no such setting" + nearest_key(location, kind)
            problems.setdefault(location, []).append((text, None))
        elif e["type"] == "missing":
            for needed in _needed(location, kind):
                problems.setdefault(needed, []).append(("is needed" + _help(needed, kind), None))
        elif e["type"] == "string_pattern_mismatch":
            problems.setdefault(location, []).append(("does not fit" + _help(location, kind), (e["input"],)))
        elif e["type"] in ("model_type", "model_attributes_type"):
            text = f"is a section; expected settings below it, such as {_first_keys(location, kind)}"
            problems.setdefault(location, []).append((text, (e["input"],)))
        elif e["type"] == "value_error":
            problems.setdefault(location, []).append((str(e["ctx"]["error"]), None))
        elif e["type"] == "literal_error" and isinstance(e["input"], str):
            text = f"expected {e['ctx']['expected']}" + nearest(e["input"], e["ctx"]["expected"].split("'"))
            problems.setdefault(location, []).append((text, (e["input"],)))
        else:
            problems.setdefault(location, []).append((e["msg"][0].lower() + e["msg"][1:], (e["input"],)))
    lines = []
    for location, found in problems.items():
        texts = list(dict.fromkeys(text for text, _ in found))
        seen = f"; seen {found[0][1][0]!r}" if found[0][1] is not None else ""
        location, seen = shorten(location), shorten(seen)
        lines.append(f"{location}: {' or '.join(texts)}{seen}" if location else " or ".join(texts))
    return lines


def _location(loc: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """The dotted setting of a pydantic location, without the names of union branches."""
    parts: list[str] = []
    at: Any = kind
    for part in loc:
        if at is None:
            break
        parts.append(str(part))
        if isinstance(at, type) and issubclass(at, BaseModel):
            names = {f.alias or name: f for name, f in at.model_fields.items()}
            at = _section(names[str(part)].annotation) if str(part) in names else None
        else:  # a key or a number within dict[str, Section] or list[Section]
            at = get_args(at)[-1]
    return ".".join(parts)


def _section(annotation: Any) -> Any:
    """The annotation if it is a section, or a list or mapping of sections; else None."""
    inner = get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else annotation
    return annotation if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def nearest_key(location: str, kind: type[BaseModel]) -> str:
    """The nearest right name: within the section, then the same leaf in another section, then anywhere."""
    keys = all_keys(kind)
    section, _, leaf = location.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    siblings |= {k: k for k in kind.model_fields if not section}
    elsewhere = [k for k in keys if k.rpartition(".")[2] == leaf]
    owners = [] if section else [name for name in objectives() if leaf in objective_sections(name)]
    if owners:
        return f" for this objective; it belongs to {' and '.join(owners)}"
    inner = _inner(location, kind)
    if inner is not None:
        return nearest(leaf, [f.alias or name for name, f in inner.model_fields.items()])
    # The section's name would make all of its settings look alike: leaves are compared with leaves.
    close = nearest(leaf, siblings).removeprefix(" (did you mean ").removesuffix("?)")
    found = elsewhere or ([siblings[close]] if close else [])
    return f" (did you mean {' or '.join(found)}?)" if found else nearest(location, keys)


def _inner(location: str, kind: type[BaseModel]) -> type[BaseModel] | None:
    """The section of which a location within a list or mapping of sections is a setting."""
    at: Any = kind
    for name in location.split("."):
        field = at.model_fields.get(name)
        at = _section(field.annotation) if field else None
        if get_origin(at) in (list, dict):
            found: type[BaseModel] = get_args(at)[-1]
            return found
        if at is None:
            return None
    return None


def _needed(location: str, kind: type[BaseModel]) -> list[str]:
    """The missing setting; of a missing section, what must stand in it."""
    field = kind.model_fields.get(location)
    below = field.annotation if field else None
    if not (isinstance(below, type) and issubclass(below, BaseModel)):
        return [location]
    return [f"{location}.{name}" for name, inner in below.model_fields.items() if inner.is_required()]


def _first_keys(location: str, kind: type[BaseModel]) -> str:
    inner = _inner(location, kind)
    if inner is not None:
        return ", ".join([f.alias or name for name, f in inner.model_fields.items()][:3])
    return ", ".join([k for k in all_keys(kind) if k.startswith(f"{location}.")][:3])


def _help(location: str, kind: type[BaseModel]) -> str:
    at: Any = _inner(location, kind) or kind
    for part in location.split(".") if at is kind else location.split(".")[-1:]:
        field = at.model_fields.get(part)
        if field is None:
            return ""
        description, at = field.description, field.annotation
    return f": {description}" if description else ""
