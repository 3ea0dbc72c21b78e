"""Start: look at rows and propose a recipe for them, or turn another tool's configuration into one (`mlxft init`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mlxft.config import all_keys, config_class, dump_yaml, objectives, parse_config, read_yaml
from mlxft.data.formats import (
    TAKEN_BY,
    Columns,
    Completion,
    Conversation,
    Item,
    Labelled,
    Pair,
    Prompt,
    Ranked,
    Text,
    convert,
    few_of,
    recognise,
    wanted_completion,
)
from mlxft.data.sources import (
    SPLITS,
    Problem,
    Row,
    plain_name,
    read_rows,
    report_lines,
    split_in,
)
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.foreign import UNSEEN, is_hub_id, tool_of, translate_all
from mlxft.model.load import ALIASES, resolve
from mlxft.study.catalogue import fitting
from mlxft.text import counted, home_path, parse_json, read_small

RECIPE = "mlxft.yaml"
_MOST_ROWS = 20_000  # rows that are read for a proposal
_CHARACTERS = 3.5  # in a token, about; fewer in languages that tokenizers know less
_PROMPTS = 2  # of the rows, that the recipe samples at each validation
# Words of a text that give its language away; a library for this would be a dependency for one line of advice.
_WORDS = {
    "English": "the and is are of to what how you that with for",
    "German": "der die das und ist nicht ein eine wie was ich mit",
    "French": "le la les et est que une des vous pour dans comment",
    "Spanish": "el los las que una es por para como qué con del",
    "Italian": "il che una è per non come sono della gli nel cosa",
    "Portuguese": "os uma que é para não como você com dos das o",
    "Dutch": "het een en van is dat niet hoe wat zijn ik voor",
}
_SCRIPTS = {
    "Chinese": r"[\u4e00-\u9fff]",
    "Japanese": r"[\u3040-\u30ff]",
    "Korean": r"[\uac00-\ud7af]",
    "Arabic": r"[\u0600-\u06ff]",
    "Cyrillic script": r"[\u0400-\u04ff]",
    "Greek": r"[\u0370-\u03ff]",
    "Hebrew": r"[\u0590-\u05ff]",
    "Devanagari script": r"[\u0900-\u097f]",
}


# --- look -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What the rows of a source are like.

    Attributes:
        rows: how many were read; `more` says that there are others.
        format, fields: as data.format and data.fields.
        characters: median and maximum of a row's text.
        labels: different completions, if they are few.
        problems: rows that cannot be read, as they are named in messages; `wrong` counts them.
        valid: the source has validation rows of its own: in a folder, or under this name.
    """

    source: str
    rows: int
    more: bool
    format: str
    fields: dict[str, str]
    characters: tuple[int, int]
    duplicates: int
    labels: list[str]
    language: str
    prompts: list[str]
    wrong: int
    problems: list[str]
    valid: bool | str
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the facts as lines for a terminal."""
        found = [f"{self.source}: {counted(self.rows, 'rows')}{' (and more)' if self.more else ''}", *self.notes]
        median, most = self.characters
        found.append(f"text of a row: {median:,} characters (median), {most:,} at most; language: {self.language}")
        if self.labels:
            found.append(f"completions are labels: {', '.join(map(repr, self.labels))}")
        if self.duplicates:
            found.append(counted(self.duplicates, "rows are there more than once"))
        if self.wrong:
            found += [counted(self.wrong, "rows cannot be trained on:"), *(f"  {text}" for text in self.problems)]
        return found


def look(source: str) -> Look:
    """Read the rows of a source and say what they are like.

    Raises:
        ConfigError, DataError: there are none, or no format fits; the error has the settings to write.
    """
    notes: list[str] = []
    read = list(islice(read_rows(source, "train", notes), _MOST_ROWS + 1))
    more, read = len(read) > _MOST_ROWS, read[:_MOST_ROWS]
    found = recognise(read, name=Path(source).name)
    skipped: list[Any] = []
    if unread := [f"{row.where}: {row.text}" for row in read if isinstance(row, Problem)]:
        raise DataError(f"{report_lines(unread)}\nmend the file first: what follows such a place may be lost, too")
    columns = Columns()
    examples = convert(read, found.format, found.fields, skipped, columns=columns)
    texts = [_text_of(item) for _, item in examples]
    lengths = sorted(map(len, texts))
    completions = [wanted_completion(item) for _, item in examples]
    seen = Counter(json.dumps(row.data, sort_keys=True, default=str) for row in read if isinstance(row, Row))
    return Look(
        source=source,
        rows=len(examples),
        more=more,
        format=found.format,
        fields=found.fields,
        characters=(lengths[len(lengths) // 2], lengths[-1]),
        duplicates=sum(seen.values()) - len(seen),
        labels=sorted(set(few_of(completions) or [])),
        language=language_of(texts[:500]),
        prompts=[text for text in map(_prompt_of, (item for _, item in examples[:50])) if 0 < len(text) < 200][
            :_PROMPTS
        ],
        wrong=len(skipped),
        problems=[f"{problem.where}: {problem.text}" for problem in skipped[:3]],
        valid=bool(split_in(source, "valid")) or split_in(source, "test"),
        notes=[
            *notes,
            *found.notes,
            *(n for n in columns.notes() if n.startswith("columns")),
            *_ratings(columns, read),
        ],
    )


def _ratings(columns: Columns, rows: Sequence[Row | Problem]) -> list[str]:
    """Return a note on a column that rates completions, and is not used."""
    words = {"rating", "score", "stars", "quality", "grade"}
    for name in (n for n in columns.seen if n not in columns.read and words & set(plain_name(n).split("_"))):
        values = {str(row.data.get(name) or "") for row in rows if isinstance(row, Row)} - {""}
        with suppress(ValueError):
            if 1 < len({float(value) for value in values}) <= 20:
                way = "a column label of true and false lets objective: preference (loss kto) learn from bad ones, too"
                return [f"{name} seems to rate the completions, which are all trained alike; {way}"]
    return []


def _turns(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)


def _text_of(item: Item) -> str:
    """Return all text of a row, for its length and language."""
    if isinstance(item, Text):
        return item.text
    if isinstance(item, Conversation):
        return _turns(item.messages)
    if isinstance(item, Ranked):
        return _text_of(item.pairs[0]) if item.pairs else ""
    parts = [_turns(item.prompt)]
    if isinstance(item, Completion | Labelled):
        parts.append(_turns([item.completion] if isinstance(item.completion, dict) else item.completion))
    elif isinstance(item, Pair):
        parts.append(max((_turns([s] if isinstance(s, dict) else s) for s in (item.chosen, item.rejected)), key=len))
    return "\n".join(parts)


def _prompt_of(item: Item) -> str:
    """Return a row's single question, or an empty text."""
    if isinstance(item, Completion | Prompt | Pair | Labelled):
        turns = item.prompt
    elif isinstance(item, Conversation):
        turns = item.messages[:-1]
    else:
        return ""
    if isinstance(turns, str):
        return turns.strip()
    return str(turns[0]["content"]).strip() if len(turns) == 1 and turns[0]["role"] == "user" else ""


def language_of(texts: Sequence[str]) -> str:
    """Return the language of texts by the most telling words or their script, or "not known"."""
    text = " ".join(texts)[:200_000]
    letters = max(1, sum(char.isalpha() for char in text))
    scripts = {name: len(re.findall(pattern, text)) / letters for name, pattern in _SCRIPTS.items()}
    if scripts["Japanese"] > 0.1:
        return "Japanese"
    script = max(scripts, key=scripts.__getitem__)
    if scripts[script] > 0.3:
        return script
    words = Counter(re.findall(r"\w+", text.casefold()))
    shares = {name: sum(words[word] for word in known.split()) for name, known in _WORDS.items()}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] > 0.03 * sum(words.values()) else "not known"


# --- propose ----------------------------------------------------------------------------------------------------------


class ProposedBase(NamedTuple):
    """A base that fits this machine, the method it fits with, and why it is proposed."""

    name: str
    method: str  # lora or qlora
    why: str


def bases(most: int = 3) -> list[ProposedBase]:
    """Return the bases to choose from: the largest that fit by LoRA, then by QLoRA, and what is here already."""
    found: list[ProposedBase] = []
    for method in ("lora", "qlora"):
        for fit in [fit for fit in fitting(None, method) if fit.verdict == "fits"][:most]:
            if fit.model.name not in [base.name for base in found]:
                size = f"{fit.model.parameters / 1e9:.2g}B parameters, {(fit.needed or 0) / 1e9:.1f} GB in training"
                why = f"{size}; {fit.model.licence}; downloaded from the hub"
                found.append(ProposedBase(fit.model.name, method, why))
    for name in ALIASES:
        try:
            resolve(name)
        except ModelError:
            continue
        found.append(ProposedBase(name, "lora", "135M parameters; installed already; small, to try things out"))
    return found


@dataclass(frozen=True)
class Draft:
    """A proposed recipe: setting -> its value and the reason, in the order in which they are written."""

    settings: dict[str, tuple[Any, str]]

    def text(self, head: Sequence[str]) -> str:
        """Return the recipe as YAML, each setting with its reason, below `head` as comments."""
        lines = [f"# {line}".rstrip() for line in head]
        section = ""
        for key, (value, why) in self.settings.items():
            outer, _, leaf = key.rpartition(".")
            if outer != section:
                lines.append(f"{outer}:")
                section = outer
            written = _yaml(leaf, value).splitlines()
            indent = "  " if outer else ""
            lines += [f"{indent}{line}" for line in written]
            if why:
                lines[-len(written)] = f"{lines[-len(written)]:<36} # {why}"
        return "\n".join(lines) + "\n"

    def plain(self) -> dict[str, Any]:
        """Return the recipe as a mapping."""
        found: dict[str, Any] = {}
        for key, (value, _) in self.settings.items():
            at = found
            *outer, leaf = key.split(".")
            for name in outer:
                at = at.setdefault(name, {})
            at[leaf] = value
        return found


def _yaml(name: str, value: Any) -> str:
    return dump_yaml({name: value}).rstrip("\n")


def propose(
    seen: Look,
    base: ProposedBase,
    *,
    objective: str | None = None,
    method: str | None = None,
    valid: float | str | None = None,
) -> Draft:
    """Return a recipe for rows, with the reason for each setting. Its length and rate are left to mlxft's defaults.

    Args:
        objective: None: the one that takes the rows' format.
        method: None: that of the base.
        valid: share or source of validation rows; None: by the number of rows.
    Raises:
        ConfigError: the objective does not take the rows.
    """
    own, _, loss = TAKEN_BY[seen.format][0].partition(", with preference.loss: ")
    objective = objective or own
    settings: dict[str, tuple[Any, str]] = {}
    if objective != "sft":
        settings["objective"] = (objective, f"format {seen.format} is for it")
    settings["model.path"] = (base.name, base.why)
    method = method or base.method
    if method == "qlora":
        settings["model.quantize"] = (4, "QLoRA: a base of 4 bits takes a quarter of the memory")
    elif method == "full":
        settings["tune.method"] = ("full", "all weights are trained")
    elif method == "dora":
        settings["tune.method"] = ("dora", "LoRA with the size of each column apart")
    if method != "full":
        settings["tune.rank"] = (16, "8 to 64; more for more or harder rows")
        settings["tune.alpha"] = (32, "the update counts alpha / rank times")
    settings["data.train"] = (seen.source, f"{counted(seen.rows, 'rows')}{' and more' if seen.more else ''}")
    proposed, why = _held_out(seen)
    share = valid if valid is not None else (isinstance(seen.valid, str) and seen.valid) or proposed
    if share:
        settings["data.valid"] = (share, why if valid is None else "validation rows")
    settings["data.format"] = (seen.format, "found by the columns")
    if seen.fields:
        settings["data.fields"] = (seen.fields, "the format's fields: the rows' columns")
    if seen.wrong:
        settings["data.bad_rows"] = ("drop", counted(seen.wrong, "rows cannot be trained on"))
    longest = int(seen.characters[1] / _CHARACTERS)
    if longest > 1500:
        room = min(8192, 1 << longest.bit_length())
        settings["data.max_length"] = (room, f"tokens; the longest row has about {longest:,}")
        if seen.format == "text":
            settings["data.overflow"] = ("split", "longer texts become several rows")
        elif longest > 0.8 * room:
            settings["data.overflow"] = ("drop", "longer rows are left out")
    if loss and objective == "preference":
        settings["preference.loss"] = (loss, "for rows with one completion and its label")
    if objective in ("grpo", "ppo", "rloo", "reinforce", "online_dpo"):
        settings["rewards.rules"] = (
            [{"kind": "length", "max": 200}],
            "replace it by your own: rewards.function: file.py:name",
        )
    name = re.sub(r"[^\w.-]+", "-", Path(seen.source.removeprefix("hf:").partition(":")[0]).stem).strip(".-")
    settings["run.name"] = (name or "first", "the folder below runs/")
    if share or seen.valid:
        settings["run.eval_at_start"] = (True, "the loss before training, to compare with")
        if seen.prompts and objective == "sft" and seen.format != "text":
            settings["run.sample_prompts"] = (seen.prompts, "completed at each validation")
    return Draft(settings)


def _held_out(seen: Look) -> tuple[float | None, str]:
    if seen.valid:
        return None, "the file has them"
    if seen.rows < 20:
        return None, ""
    share = 0.1 if seen.rows < 1000 else 0.05 if seen.rows < 20_000 else 0.01
    return share, "this share is held out, to see whether training helps"


# --- from another tool ------------------------------------------------------------------------------------------------

_FORMATS = {
    "alpaca": "alpaca",
    "alpaca_chat": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "messages",
    "completion": "text",
    "openai": "messages",
    "pretraining": "text",
    "chatml": "messages",
}


@dataclass
class Converted:
    """What became of another tool's configuration: settings and what was said of them.

    Attributes:
        taken: lines on settings that are ours under another name.
        left: lines on settings that have no equal or are not needed.
    """

    tool: str
    settings: dict[str, Any]
    taken: list[str]
    left: list[str]

    def plan(self) -> Draft:
        """Return the recipe."""
        order = {name: i for i, name in enumerate(config_class("sft").model_fields)}
        keys = sorted(self.settings, key=lambda key: (order.get(s := key.partition(".")[0], len(order)), s))
        return Draft({key: (self.settings[key], "") for key in keys})


def convert_recipe(path: Path) -> Converted:
    """Turn a configuration of mlx_lm.lora, TRL, Axolotl or LLaMA-Factory (YAML or JSON) into a recipe.

    Raises:
        ConfigError: it cannot be read, or is not one of theirs.
    """
    try:
        raw = read_yaml(read_small(path), str(path))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
    tool = tool_of(raw) if isinstance(raw, dict) else None
    if tool is None or not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: not a configuration of mlx_lm.lora, TRL, Axolotl or LLaMA-Factory that mlxft knows; mlxft init "
            "DATA proposes a recipe for rows"
        )
    made = Converted(tool, {}, [], [])
    raw = {**_DEFAULTS.get(tool, {}), **raw}
    objective = _objective_of(raw)
    known = all_keys(config_class(objective))
    sources = raw.pop("datasets", None) if isinstance(raw.get("datasets"), list) else None
    _take_data(made, raw, sources, path.parent)
    if raw.get("reward_model") is True:  # which names no model
        del raw["reward_model"]
    for name, value, found in translate_all(raw, known):
        if value is None or value == "":  # a setting that is named and left open
            continue
        if found is None:
            made.left.append(f"{name}: not known to mlxft")
        elif not found.settings:
            made.left.append(f"{name}: {found.note}")
        else:
            sure = {key: given for key, given in found.settings.items() if given is not UNSEEN}
            if not sure:
                made.left.append(f"{name}: {value!r} has no direct equal; {found.say()}")
            for key, given in sure.items():
                if key not in made.settings:
                    made.settings[key] = given
                    made.taken.append(
                        f"{name} -> {key}: {json.dumps(given)}" + (f"  ({found.note})" if found.note else "")
                    )
    if objective != "sft":
        made.settings.setdefault("objective", objective)
    _agree(made, known)
    try:
        parse_config(made.plan().plain(), path.name)
    except ConfigError as e:
        made.left += [f"to be mended by hand: {line}" for line in str(e).splitlines()]
    return made


# What mlx_lm.lora does where its file is silent, and mlxft would do otherwise.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlx_lm.lora": {
        "learning_rate": 1e-5,
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
        "mask_prompt": False,
        "lr_schedule": "constant",
        "warmup_steps": 0,
    }
}
_TELLING = {
    "grpo": {"num_generations", "reward_funcs", "epsilon_high", "scale_rewards", "max_completion_length"},
    "ppo": {"num_ppo_epochs", "cliprange", "vf_coef", "ppo_epochs"},
    "preference": {"loss_type", "pref_loss", "pref_beta", "rl_beta", "rpo_alpha", "precompute_ref_log_probs"},
}


def _objective_of(raw: Mapping[str, Any]) -> str:
    """Return the objective that a configuration is for: as it says, or by its settings."""
    if raw.get("reward_model") is True:  # Axolotl
        return "reward"
    for _, _, found in translate_all({k: v for k, v in raw.items() if k in ("stage", "rl", "trainer_type")}, ()):
        if (named := (found.settings if found else {}).get("objective", UNSEEN)) is not UNSEEN:
            return str(named) if named in objectives() else "sft"
    names = {*raw, *(raw.get("trl") or {})} if isinstance(raw.get("trl"), dict) else {*raw}
    return next(
        (name for name, telling in _TELLING.items() if names & telling), "preference" if "beta" in names else "sft"
    )


def _take_data(made: Converted, raw: dict[str, Any], sources: list[Any] | None, folder: Path) -> None:
    """Take over the rows: Axolotl's list, LLaMA-Factory's names in dataset_info.json, or a folder, file or hub id."""
    named: list[tuple[str, dict[str, Any]]] = []
    if sources is not None:
        for each in sources:
            about = each if isinstance(each, dict) else {"path": str(each)}
            named.append((_source_of(about), about))
    elif made.tool == "LLaMA-Factory" and isinstance(raw.get("dataset"), str):
        where = Path(str(raw.pop("dataset_dir", "data")))
        known = _dataset_info(where) or _dataset_info(folder / where)
        for name in (part.strip() for part in raw.pop("dataset").split(",")):
            about = known.get(name, {})
            if "file_name" in about or "hf_hub_url" in about:
                path = str(where / about["file_name"]) if "file_name" in about else f"hf:{about['hf_hub_url']}"
                named.append((path, {"type": about.get("formatting", "alpaca"), **about}))
            else:
                made.left.append(f"dataset {name}: not in {where}/dataset_info.json; put its file into data.train")
    elif isinstance(raw.get("dataset_name"), str):
        split = raw.pop("dataset_train_split", None)
        parts = [raw.pop("dataset_name"), raw.pop("dataset_config", None) or ("default" if split else None), split]
        found = ":".join(str(part) for part in parts if part)
        named.append((f"hf:{found}" if is_hub_id(parts[0]) else str(parts[0]), {}))
    if not named:
        return
    made.settings["data.train"] = named[0][0]
    objective = _objective_of(raw)
    kto = "kto" in (raw.get("stage"), raw.get("rl"))
    about = named[0][1]
    read = {
        path: _columns_there(about, objective, kto, raw.get("stage") == "pt")
        if made.tool == "LLaMA-Factory"
        else _fields_there(about, objective, kto)
        for path, about in named
    }
    form, fields = read[named[0][0]]
    if isinstance(kind := about.get("type"), dict):
        made.settings["data.template"] = "none"
        made.taken.append("type of the rows -> data.fields, and data.template: none, as it makes plain text of them")
        if kind.get("system_prompt"):
            made.left.append(f"type.system_prompt: {kind['system_prompt']!r}: write it into data.fields.prompt")
    names = {*(about.get("message_property_mappings") or {}).values(), *(about.get("tags") or {}).values()}
    names |= {about[name] for name in ("message_field_role", "message_field_content") if name in about}
    if odd := names - {"role", "content", "from", "value", *_SPEAKERS}:
        made.left.append(f"names within turns ({', '.join(sorted(map(str, odd)))}): rename them to role and content")
    if form:
        made.settings["data.format"] = form
    made.settings |= {f"data.{name}": mapped for name, mapped in _renamed(fields).items()}
    made.taken.append(f"rows -> data.train: {named[0][0]}")
    if named[1:]:
        made.settings["data.mix"] = {
            f"more{i}": {"path": path} | ({"format": read[path][0]} if read[path][0] else {}) | _renamed(read[path][1])
            for i, (path, _) in enumerate(named[1:], 1)
        }
        made.taken.append(f"{counted(len(named) - 1, 'more sources')} -> data.mix")


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting `fields` with those that have other names in the rows, if there are some."""
    found = {ours: theirs for ours, theirs in fields.items() if theirs and theirs != ours}
    return {"fields": found} if found else {}


_SPEAKERS = ("human", "gpt", "user", "assistant", "system", "observation", "tool", "function_call", "function")
_Read: TypeAlias = tuple[str, dict[str, Any]]  # data.format, "" for auto, and data.fields


def _columns_there(about: Mapping[str, Any], objective: str, kto: bool, plain: bool) -> _Read:
    """Return how LLaMA-Factory reads rows: columns and tags of dataset_info.json, by its own defaults."""
    columns, turns = about.get("columns") or {}, about.get("type") == "sharegpt"
    prompt, said = columns.get("prompt", "instruction"), columns.get("response", "output")
    more = {"system": columns.get("system"), "tools": columns.get("tools")}
    chat = columns.get("messages", "conversations")
    if objective in ("preference", "reward") and not kto:
        sides = {side: columns.get(side, side) for side in ("chosen", "rejected")}
        return "preference", {"conversations" if turns else "prompt": chat if turns else prompt, **sides, **more}
    if kto:
        label = {"label": columns.get("kto_tag", "kto_tag")}
        named = {"conversations": chat} if turns else {"prompt": prompt, "completion": said}
        return "unpaired", {**({} if turns else named), **label, **more}
    if plain:
        return "text", {"text": prompt}
    if objective != "sft":
        return "prompts", {"prompt": chat if turns else prompt, **more}
    if turns:
        form = "messages" if (about.get("tags") or {}).get("role_tag", "from") == "role" else "sharegpt"
        return form, {"messages" if form == "messages" else "conversations": chat, **more}
    more.pop("tools")
    return "alpaca", {"instruction": prompt, "output": said, "input": columns.get("query"), **more}


def _fields_there(about: Mapping[str, Any], objective: str, kto: bool) -> _Read:
    """Return how Axolotl reads rows: `type` and the field_* settings; TRL has neither."""
    kind = about.get("type") or ""
    if not about:
        return "", {}
    if isinstance(kind, dict):
        ask, extra = kind.get("field_instruction", "instruction"), kind.get("field_input")
        text = str(kind.get("format") or ("{instruction} {input}" if extra else "{instruction}"))
        text = text.replace("{instruction}", f"{{{ask}}}").replace("{input}", f"{{{extra}}}" if extra else "")
        return "prompt-completion", {"prompt": text, "completion": kind.get("field_output", "output")}
    chat, name = about.get("field_messages"), str(kind).partition(".")[0]
    fields = {field: about.get(f"field_{field}") for field in ("prompt", "chosen", "rejected", "completion", "label")}
    if objective in ("preference", "reward"):
        kept = ("prompt", "completion", "label") if kto else ("prompt", "chosen", "rejected")
        chat = chat or ("messages" if kind in ("chat_template", "chat_template.default") else None)
        named = {"prompt": fields["prompt"] or chat, "system": about.get("field_system")}
        return "unpaired" if kto else "preference", {**{field: fields[field] for field in kept}, **named}
    if objective != "sft":
        return "", {}
    mapped = about.get("message_property_mappings") or {}
    role = mapped.get("role", about.get("message_field_role", "role"))
    form = "sharegpt" if role == "from" or name == "sharegpt" else _FORMATS.get(name, "")
    keys = {"text": ("text", about.get("field")), "sharegpt": ("conversations", chat), "messages": ("messages", chat)}
    return form, dict([keys[form]] if form in keys else [])


def _source_of(about: Mapping[str, Any]) -> str:
    path, files = str(about.get("path", "")), about.get("data_files")
    if files:
        return str(files[0] if isinstance(files, list) else files)
    if is_hub_id(path):
        name, split = about.get("name"), about.get("split")
        parts = [path, name or ("default" if split else None), split]
        return "hf:" + ":".join(str(part) for part in parts if part)
    return path


def _dataset_info(folder: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_small(folder / "dataset_info.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _agree(made: Converted, known: list[str]) -> None:
    """Leave out what cannot stand together, and say so."""
    found = made.settings
    for key in [key for key in found if key not in known and not key.startswith("data.mix") and key != "objective"]:
        made.left.append(f"{key}: not for objective {found.get('objective', 'sft')}")
        del found[key]
    if "report.project" in found and "report.to" not in found:
        found["report.to"] = ["wandb"]
    if isinstance(found.get("data.valid"), list):
        named = [_source_of(each) if isinstance(each, dict) else str(each) for each in found.pop("data.valid")]
        found |= {"data.valid": named if named[1:] else named[0]} if named else {}
    for keep, other in (("run.steps", "run.epochs"), ("batch.rows", "batch.tokens"), ("tune.scale", "tune.alpha")):
        if keep in found and other in found:
            made.left.append(f"{other}: {keep} is there, too, and decides")
            del found[other]
    if found.get("tune.method") == "full":
        for key in [
            key for key in found if key in ("tune.rank", "tune.alpha", "tune.scale", "tune.dropout", "tune.targets")
        ]:
            made.left.append(f"{key}: not with tune.method: full")
            del found[key]
    if "data.train" not in found:
        made.left.append("no rows: put a file into data.train")
        found["data.train"] = "train.jsonl"
    if "model.path" not in found:
        made.left.append("no model: put one into model.path")
        found["model.path"] = "smollm2-135m"
    source = home_path(found["data.train"]) if isinstance(found["data.train"], str) else None
    if source is not None and source.is_dir() and any((source / f"{n}.jsonl").exists() for n in SPLITS["valid"]):
        found.pop("data.valid", None)
