"""status.json of a run folder: running, done, interrupted or failed, and since when.

Reading needs nothing but the standard library, so that hundreds of runs are listed in an instant.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlxft.errors import CheckpointError
from mlxft.owned import Held
from mlxft.text import parse_json, read_file

STATUS_FILE = "status.json"


def read_status(folder: Path) -> dict[str, Any] | None:
    """What status.json holds; None: there is none (an older version's run), or it is not one."""
    try:
        found = parse_json(read_file(folder / STATUS_FILE))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("status"), str) else None


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def recorded(held: Held) -> Iterator[None]:
    """Write down that a folder is trained in, and how that ends.

    An exception may say how it is to be told, by an attribute `run_status`.
    """
    from mlxft.trainer.files import write_text

    folder = held.folder

    def write(**changes: Any) -> None:
        held.check()
        record.update(changes)
        write_text(folder / STATUS_FILE, json.dumps(record, indent=2) + "\n")

    before = read_status(folder) or {}
    record: dict[str, Any] = {"pid": os.getpid(), "host": platform.node(), "started": before.get("started") or now()}
    write(status="running", locked=held.locked, **({"resumed": now()} if before else {}))
    try:
        yield
    except BaseException as e:
        status = getattr(e, "run_status", "interrupted" if isinstance(e, KeyboardInterrupt) else "failed")
        told = str(e) or type(e).__name__
        with suppress(CheckpointError):  # a full disk: what went wrong first is what is to be told
            write(status=status, ended=now(), **({"error": told} if status == "failed" else {}))
        raise
    write(status="done", ended=now())
