"""Encoded rows on the disk, so that the next start over the same rows need not encode them.

An entry is named by a hash of all that encoding depends on: the rows' content (wherever they came from), what is
trained, the chat template, the tokenizer and the versions of what does the work. It is only a cache: what can not be
read is encoded again, and what can not be written is not.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxft.data import chat as chat_module
from mlxft.data import encode
from mlxft.data.chat import day_of, thinking_of
from mlxft.data.encode import Encoded
from mlxft.data.formats import Example

LIMIT = 2 * 10**9  # bytes; the entries used last stay
_ABANDONED = 3600.0  # seconds after which a file that was never finished is of a process that died


def cache_folder() -> Path | None:
    """$MLXFT_CACHE, or ~/.cache/mlxft/tokens; None where there is no home."""
    given = os.environ.get("MLXFT_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "mlxft" / "tokens"
    except RuntimeError:
        return None


def encoding_key(rows: str, tokenizer: Any, train_on: str, chat: bool) -> str | None:
    """Name of the entry for rows of a fingerprint, or None where it can not be told what the tokenizer does."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    template = getattr(inner, "chat_template", None)
    backend = getattr(inner, "backend_tokenizer", None)
    if not getattr(inner, "is_fast", False) or backend is None:
        return None
    # A template that is code, of mlx-lm or of a repository, has no text to compare.
    if getattr(tokenizer, "_chat_template", None) is not None or not isinstance(template, (str, dict, type(None))):
        return None
    # The texts of the code stand for what it does: a number to be raised by hand would be forgotten.
    code = blake2b(Path(encode.__file__).read_bytes() + Path(chat_module.__file__).read_bytes())
    facts = {
        "rows": rows,
        "code": code.hexdigest(),
        "versions": [version(p) for p in ("transformers", "tokenizers", "mlx-lm")],
        "options": [train_on, chat, day_of(tokenizer), thinking_of(tokenizer), getattr(tokenizer, "_mlxft_rows", None)],
        "tokenizer": type(inner).__name__,
        "special": {k: str(v) for k, v in inner.special_tokens_map.items()},
        "eos": sorted(getattr(tokenizer, "eos_token_ids", ())),
        "thinking": bool(getattr(tokenizer, "has_thinking", False)),
        "template": template,
    }
    digest = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20)
    digest.update(backend.to_str().encode())
    return digest.hexdigest()


def read(key: str, examples: Sequence[Example]) -> list[Encoded] | None:
    """The entry's rows, or None if there is none, or none that is whole."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{key}.npz"
    try:
        with path.open("rb") as raw, np.load(raw) as file:  # the archive's own checksums tell a damaged one
            ids, trained, lengths, sources = (file[n] for n in ("ids", "trained", "lengths", "sources"))
            ends, counts = (file[n].tolist() for n in ("ends", "end_counts"))
        stops = np.cumsum(lengths)
        if not (ids.shape == trained.shape == (int(lengths.sum()),) and lengths.shape == sources.shape):
            return None
        wheres = [examples[i].where for i in sources.tolist()]
        ids, trained = ids.astype(np.int32, copy=False), trained.astype(np.bool_, copy=False)
        rest = iter(ends)
        turns = [tuple(islice(rest, count)) for count in counts]
        rows = [Encoded(ids[e - n : e], trained[e - n : e], w, t) for e, n, w, t in zip(stops, lengths, wheres, turns)]
        with suppress(OSError):
            os.utime(path)  # used now: among the last to go
    except Exception:  # a file of any content may stand there, and numpy's readers raise whatever they meet
        return None
    return rows


def write(key: str, rows: Sequence[Encoded], sources: Sequence[int]) -> None:
    """Make an entry of rows and the indices of the examples that they come from; whole, or not at all."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name of its own: another process may be writing the same entry, and the last rename wins.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", delete=False) as file:
            try:
                np.savez(
                    file,
                    ids=np.concatenate([r.ids for r in rows]).astype(np.int32),
                    trained=np.concatenate([r.trained for r in rows]),
                    lengths=np.array([len(r.ids) for r in rows], dtype=np.int64),
                    sources=np.array(sources, dtype=np.int64),
                    ends=np.array([end for r in rows for end in r.ends], dtype=np.int64),
                    end_counts=np.array([len(r.ends) for r in rows], dtype=np.int64),
                )
                file.close()
                os.replace(file.name, folder / f"{key}.npz")
            except BaseException:
                os.unlink(file.name)
                raise
        _prune(folder)
    except OSError:
        return


def _prune(folder: Path) -> None:
    """Delete the entries used longest ago, so that the rest stays within LIMIT, and what was never finished."""
    found = []
    for path in [*folder.glob("*.npz"), *folder.glob(".tmp-*")]:
        with suppress(OSError):  # another process deleted it
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for changed, size, path in sorted(found, reverse=True):
        unfinished = path.name.startswith(".tmp-")
        total += 0 if unfinished else size
        if (unfinished and time.time() - changed > _ABANDONED) or (not unfinished and total > LIMIT):
            with suppress(OSError):
                path.unlink()
