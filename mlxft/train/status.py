"""status.json of a run folder: running, done, interrupted or failed, and since when; and who is training in it.

Reading needs nothing but the standard library, so that hundreds of runs are listed in an instant.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlxft.errors import CheckpointError

STATUS_FILE = "status.json"


def read_status(folder: Path) -> dict[str, Any] | None:
    """What status.json holds; None: there is none (an older version's run), or it is not one."""
    try:
        found = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("status"), str) else None


def is_held(folder: Path) -> bool:
    """Whether a process is training in this folder now. The lock ends with its process, however that ends."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(fd)
    return False


def refuse_if_held(folder: Path) -> None:
    """CheckpointError where another process is training in this folder."""
    if is_held(folder):
        status = read_status(folder) or {}
        raise CheckpointError(
            f"{folder} is being trained now, by process {status.get('pid', '?')} on {status.get('host', '?')}; "
            f"see it with mlxft runs watch {folder}"
        )


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _lock(fd: int, folder: Path) -> bool:
    """Hold the folder until `fd` is closed. False: its file system has no locks."""
    for _ in range(100):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)  # a look from outside holds it for a moment
        except OSError:
            return False
    refuse_if_held(folder)
    return False


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Hold the folder while training in it, and write down how that ends.

    An exception may say how it is to be told, by an attribute `run_status`.
    """
    from mlxft.train.files import write_text

    def write(**changes: Any) -> None:
        record.update(changes)
        write_text(folder / STATUS_FILE, json.dumps(record, indent=2) + "\n")

    before = read_status(folder) or {}
    record: dict[str, Any] = {"pid": os.getpid(), "host": platform.node(), "started": before.get("started") or now()}
    fd = os.open(folder, os.O_RDONLY)
    try:
        locked = _lock(fd, folder)
        write(status="running", locked=locked, **({"resumed": now()} if before else {}))
        try:
            yield
        except BaseException as e:
            status = getattr(e, "run_status", "interrupted" if isinstance(e, KeyboardInterrupt) else "failed")
            told = str(e) or type(e).__name__
            with suppress(CheckpointError):  # a full disk: what went wrong first is what is to be told
                write(status=status, ended=now(), **({"error": told} if status == "failed" else {}))
            raise
        write(status="done", ended=now())
    finally:
        os.close(fd)
