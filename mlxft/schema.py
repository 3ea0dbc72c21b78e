"""The JSON schema of recipes, made from the settings as they are declared, for editors."""

from __future__ import annotations

from typing import Any

from mlxft.config import Config, objective_sections, objectives

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """The schema (draft 2020-12) of a recipe of any objective.

    An objective's own sections are there for it only, with its own defaults; unknown settings are refused.
    """
    root = Config.model_json_schema()
    defs: Schema = root["$defs"]
    required = set(root["required"])
    rules = []
    names = objectives()
    everyone = list(dict.fromkeys(s for name in names for s in objective_sections(name)))
    for name in names:
        own = objective_sections(name)
        sections: Schema = {}
        for section in everyone:
            if section not in own:
                sections[section] = False
                continue
            found = own[section].model_json_schema()
            defs |= found.pop("$defs", {})
            defs[f"{name}.{section}"] = _or_empty(found)
            sections[section] = {"$ref": f"#/$defs/{name}.{section}"}
        # Without objective a recipe is of the default one, for which the condition holds then.
        condition: Schema = {"properties": {"objective": {"const": name}}}
        if name != Config.model_fields["objective"].default:
            condition["required"] = ["objective"]
        rules.append({"if": condition, "then": {"properties": sections}})
    root["properties"]["objective"]["enum"] = names
    root["properties"] |= {s: {"description": _used_by(s)} for s in everyone}
    root |= {"allOf": rules, "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mlxft recipe"}
    for section, place in root["properties"].items():
        if section not in required and "$ref" in place:
            _or_empty(defs[place["$ref"].rpartition("/")[2]])
    _switches(root)
    return root


def _or_empty(section: Schema) -> Schema:
    """`tune:` with nothing below it is an empty section."""
    section["type"] = [section["type"], "null"]
    return section


def _used_by(section: str) -> str:
    """What a section of some objectives is for."""
    kinds = {name: objective_sections(name)[section] for name in objectives() if section in objective_sections(name)}
    about = (next(iter(kinds.values())).__doc__ or "").strip().splitlines()[0]
    return f"{about} For objective {', '.join(kinds)}."


def _switches(node: Any) -> None:
    """Programs that write YAML 1.1 write on and off as true and false: both are right where on and off are."""
    if isinstance(node, dict):
        if {"on", "off"} <= set(node.get("enum", ())):
            node["enum"] = [*node["enum"], True, False]
            node.pop("type", None)
        for part in node.values():
            _switches(part)
    elif isinstance(node, list):
        for part in node:
            _switches(part)
