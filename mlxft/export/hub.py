"""Pushing to the Hugging Face hub: what goes there, under which card, and the upload itself.

Only files of known kinds go: weights, tokenizer, configuration. Checkpoints, data, metrics and samples stay; paths of
this machine are cut out of what goes.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from mlxft.errors import ConfigError, ExportError, MlxftError, ModelError
from mlxft.export.base import find_base
from mlxft.export.card import Facts, Metadata, card, shortened
from mlxft.model.declared import NAMED_TEMPLATES, foreign, lies_in
from mlxft.model.heads import HEAD_FILE
from mlxft.model.source import brief
from mlxft.rundir import Run, open_run
from mlxft.temporary import MARK
from mlxft.text import parse_json, read_small

GOES = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile"),
    *("config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.jinja", "chat_template.json", "tokenizer.model", "*.tiktoken"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *("README.md", "LICENSE*", "NOTICE*"),
)
# Written by libraries that note where things lay.
MAY_HOLD_PATHS = {"config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json", "Modelfile"}
PICTURE = "curves.png"
Draw = Callable[[Sequence[dict[str, Any]], Path], list[Path]]


@dataclass(frozen=True)
class Shipment:
    """What would go to the hub.

    Args:
        files: name in the repository -> the file, or its bytes where they differ from it or were made.
        left_out: names of what lies beside and stays.
        notes: what its owner should know.
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
        """Bytes of each file."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in sorted(self.files.items())}


def pack(
    source: Path,
    repo: str,
    *,
    what: Literal["adapter", "model"] | None = None,
    run: Path | None = None,
    licence: str | None = None,
    own_card: Path | None = None,
    draw: Draw | None = None,
) -> Shipment:
    """Collect what goes, and write its card. Nothing is uploaded.

    Args:
        source: a run, its adapter, a folder that `fuse` or `export` wrote, or a .gguf file.
        what: refuse unless it is this.
        run: the run that a fused or exported folder came from, for the card.
        licence: of the base, where it is not known or wrong.
        own_card: a file to use in place of the card that would be written.
        draw: draws the events of a run into a file.
    Raises:
        ConfigError: no such repository name.  ModelError: there is nothing to push.
        ExportError: `what` is not there.
    """
    check_repo(repo)
    if not source.is_dir() and (source.suffix != ".gguf" or not source.is_file()):
        raise ModelError(
            f"{source}: {'is a file' if source.exists() else 'no such run or folder'}; name a run, an adapter, a "
            "folder that mlxft fuse or export wrote, or a .gguf file"
        )
    folder, trained = _place(source, what, run)
    kind, about = _kind(folder)
    if what is not None and (what == "adapter") != (kind in ("adapter", "peft")):
        raise ExportError(f"--what {what}: {folder} is {'an' if kind == 'adapter' else 'a'} {kind}")
    files, left_out, notes = _files(folder)
    events = _events(trained) if trained else []
    picture = None if own_card or not trained else _picture(events, draw, notes)
    if picture:
        files[PICTURE] = picture
    with foreign(f"{trained.dir if trained else folder}: what it says of itself can not be read"):
        facts = Facts(
            repo=repo,
            kind=kind,
            base=find_base(_base_path(about, trained), licence),
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
        with foreign(f"{trained.dir if trained else folder}: its metrics.jsonl can not be read"):
            text = without_home(card(facts, PICTURE if picture else None))
        if facts.base is None or not facts.base.licence:
            notes.append("the licence of the base is not known: give --licence, or fill it in on the card")
        if facts.config is None:
            notes.append("no run is known for this folder: --run RUN puts its data, recipe and results into the card")
    files["README.md"] = text.encode()
    return Shipment(repo, files, text, left_out, notes)


def check_repo(repo: str) -> None:
    """ConfigError unless `repo` is owner/name as the hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if repo.count("/") != 1:
        raise ConfigError(
            f"REPO: {repo!r} must be OWNER/NAME, such as ada/quickstart (your name or organisation first)"
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ConfigError(f"REPO: {repo!r} is no name for a repository: {brief(e)}") from e


def _place(source: Path, what: str | None, run: Path | None) -> tuple[Path, Run | None]:
    """The folder whose files go, and the run that made them."""
    trained = open_run(run) if run else None
    if (source / "config.yaml").exists() and not (source / "config.json").exists():
        trained = open_run(source)
        if run:
            raise ConfigError(f"--run: {source} is a run itself; leave --run out")
        result = trained.result
        if what is not None and what != result.name:
            way = f"fuse it first: mlxft fuse {source} OUT, then push OUT with --run {source}"
            raise ExportError(
                f"--what {what}: {source} has {result.name}/ only" + (f"; {way}" if what == "model" else "")
            )
        if not result.is_dir():
            raise ModelError(f"{source} has no result yet; go on with mlxft train --resume {source}")
        return result, trained
    parent = source.resolve().parent
    if trained is None and source.resolve().name in ("adapter", "model") and (parent / "config.yaml").exists():
        trained = open_run(parent)
    return source, trained


def _kind(folder: Path) -> tuple[str, Metadata]:
    """What lies in a folder, and the configuration that says so."""
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
        raise ModelError(f"{file}: can not be read: {brief(e)}") from e
    if not isinstance(found, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return found


def _files(folder: Path) -> tuple[dict[str, Path | bytes], list[str], list[str]]:
    """Files that go, names of those that stay, and what was changed on the way."""
    files: dict[str, Path | bytes] = {}
    left_out, notes = [], []
    inside = sorted([*folder.iterdir(), *folder.glob(f"{NAMED_TEMPLATES}/*.jinja")]) if folder.is_dir() else [folder]
    for file in inside:
        if file.is_dir() and file.name == NAMED_TEMPLATES:
            continue
        if file.name == MARK:
            continue
        name = file.relative_to(folder).as_posix() if file != folder else file.name
        if name.startswith(".") or not file.is_file() or not any(fnmatchcase(file.name, pattern) for pattern in GOES):
            left_out.append(name + ("/" if file.is_dir() else ""))
            continue
        if file != folder and not lies_in(folder, file):  # it may lead to any file of this machine
            raise ModelError(f"{file}: is a link out of its folder, and is not sent; put a copy there if it is yours")
        files[name] = file
        if name in MAY_HOLD_PATHS and (clean := _clean(file)) is not None:
            files[name] = clean
            notes.append(f"{name}: paths of this machine are cut down to their last part")
    if not any(n.endswith((".safetensors", ".gguf")) for n in files):
        raise ModelError(f"{folder}: has no weights (.safetensors or .gguf)")
    return files, left_out, notes


def _clean(file: Path) -> bytes | None:
    """A file without paths of this machine; None where it has none."""
    if file.suffix != ".json":
        text = file.read_text(encoding="utf-8")
        short = re.sub(r"(?m)^(FROM|ADAPTER)\s+(?:/|~|[A-Za-z]:)\S*[/\\]", r"\1 ./", text)
        return short.encode() if short != text else None
    before = _json(file)
    after = shortened(before)
    return (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode() if after != before else None


def without_home(text: str) -> str:
    """Text in which nothing names the user's home folder."""
    return text.replace(str(Path.home()) + "/", "~/") if str(Path.home()) != "/" else text


def _own(file: Path) -> str:
    try:
        return read_small(file)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--card: can not read {file}: {brief(e)}") from e


def _events(run: Run) -> list[dict[str, Any]]:
    try:
        return run.metrics()
    except (OSError, ValueError):  # none, or cut short
        return []


def _evaluations(run: Run) -> list[Metadata]:
    """What `mlxft eval` left in a run's folder; what can not be read is passed over."""
    found = []
    for file in sorted(run.dir.glob("eval/*/results.json")):
        with suppress(MlxftError):
            found.append(_json(file) or {})
    return [result for result in found if result.get("tasks")]


def _picture(events: list[dict[str, Any]], draw: Draw | None, notes: list[str]) -> bytes | None:
    """The curves; without them the card is poorer, and still good."""
    if draw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            return draw(events, Path(folder) / PICTURE)[0].read_bytes()
        except MlxftError as e:
            notes.append(f"no picture of the curves: {e}")
            return None


def _base_path(about: Metadata, run: Run | None) -> str | None:
    """What the base was loaded from."""
    if run is not None:
        return run.config.model.path
    noted = (about.get("mlxft") or {}).get("base") or {}
    path = noted.get("model") or about.get("base_model_name_or_path")
    return path if isinstance(path, str) else None


def upload(shipment: Shipment, *, public: bool, update: bool, message: str) -> str:
    """Send a shipment to the hub as one commit. Returns the address of the commit.

    Args:
        public: a new repository can be read by all.
        update: the repository may be there already.
    Raises:
        ConfigError: an empty message.
        ExportError: no token, no network, no right to write there, or the name is taken.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    import mlxft

    if not message.strip():
        raise ConfigError("--message: is empty")
    token, repo = get_token(), shipment.repo
    if token is None:
        raise ExportError("there is no Hugging Face token: set HF_TOKEN, or log in with: hf auth login")
    api = HfApi(token=token, library_name="mlxft", library_version=mlxft.__version__)
    with _told(shipment, token, "nothing was pushed"):
        there = api.repo_exists(repo)
        if there and not update:
            raise ExportError(f"{repo} is taken: choose another name, or give --update to add a commit to it")
        if there and not public and not api.repo_info(repo).private:
            raise ExportError(f"{repo} is there and public: say so with --public, or choose another name")
        if not there:
            api.create_repo(repo, private=not public)
    made = f"{repo} {'was there' if there else 'was made'}, its files did not arrive; once mended, push with --update"
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in sorted(shipment.files.items())
    ]
    with _told(shipment, token, made):
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


@contextmanager
def _told(shipment: Shipment, token: str, state: str) -> Iterator[None]:
    """The hub's errors as ExportErrors that say what to do, and never the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    owner = shipment.repo.split("/")[0]
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
            403: f"the token may not write to {owner}; it wants write access there",
            404: f"there is no such owner or repository, or the token may not see it: {shipment.repo}",
            409: f"{shipment.repo} is taken: choose another name, or give --update",
        }.get(code or 0, f"the hub answered {code}: {(e.server_message or brief(e))}".replace(token, "..."))
        raise ExportError(f"{why}; {state}") from e
    except ValueError as e:  # such as metadata of the card that it does not take
        raise ExportError(f"the hub refuses it: {brief(e)}; {state}") from e
    except Exception as e:  # its HTTP library, and with it the kind of error, differs between versions
        cause = f", {type(e.__cause__).__name__}: {brief(e.__cause__)}" if e.__cause__ else ""
        reason = f"{type(e).__name__}: {brief(e)}{cause}".replace(token, "...")
        raise ExportError(
            f"{constants.ENDPOINT} can not be reached or fails ({reason}); check the connection; {state}"
        ) from e
