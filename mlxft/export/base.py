"""What a run started from, in words that hold elsewhere: its id on the hub, and its licence."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mlxft.export.card import HUB_ID, KNOWN, Base, Metadata, code
from mlxft.model.source import ALIASES
from mlxft.text import home_path


def find_base(path: str | None, licence: str | None = None) -> Base | None:
    """The base, with its licence from its own card or LICENSE where that lies on this machine.

    Args:
        path: alias, local folder, .gguf file or hub id.
        licence: beats what is found.
    """
    if path is None:
        return Base("an unnamed base", licence={"license": licence}) if licence else None
    given: Metadata = {"license": licence} if licence else {}
    if path in ALIASES and path in KNOWN:
        hub, known, _ = KNOWN[path]
        return Base(hub, hub, given or {"license": known}, alias=path)
    local = home_path(path)
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", str(local))  # of the hub's own cache
    if cached and HUB_ID.fullmatch(hub := "/".join(cached.groups())):
        return Base(hub, hub, given or folder_licence(local))
    if local.exists() or path.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(path):
        found = folder_licence(local if local.is_dir() else local.parent) if local.exists() else {}
        return Base(f"a local copy of {code(local.name)}", None, given or found)
    return Base(path, path, given or _cached_licence(path))


def _cached_licence(repo: str) -> Metadata:
    """The licence of a hub model, by its card: in the cache, else asked of the hub once, else unknown."""
    from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

    try:
        if isinstance(file := try_to_load_from_cache(repo, "README.md"), str):
            data = ModelCard.load(file, ignore_metadata_errors=True).data
        else:  # not as a download, which tries for half a minute where there is no network
            data = HfApi().model_info(repo, timeout=5).card_data
    except Exception:  # no network, no card, no access: each means that it is not known
        return {}
    return _licence_of(data.to_dict()) if data else {}


def _licence_of(data: Metadata) -> Metadata:
    keys = ("license", "license_name", "license_link")
    return {k: data[k] for k in keys if isinstance(data.get(k), str)} if isinstance(data.get("license"), str) else {}


def folder_licence(folder: Path) -> Metadata:
    """The licence that a model folder states: in the head of README.md, or as a well-known LICENSE file."""
    readme = folder / "README.md"
    if readme.is_file() and (head := re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)):
        try:
            data = yaml.safe_load(head[1])
        except yaml.YAMLError:
            data = None
        if isinstance(data, dict) and (found := _licence_of(data)):
            return found
    for file in (f for n in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (f := folder / n).is_file()):
        text = " ".join(file.read_text("utf-8", "replace")[:3000].split())
        for words, name in (("Apache License Version 2.0", "apache-2.0"), ("MIT License", "mit")):
            if words in text:
                return {"license": name}
        return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", f"{folder.name}-license".lower())}
    return {}
