"""Files and folders under a temporary name, which a kill leaves behind and the next command that works there removes.

The name holds the process id: what a living process is writing is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

MARK = ".mlxft.json"  # of folders that mlxft made; see mlxft.owned
# .tmp-mlxft-PID-NAME; .NAME.partial-PID, a folder being written; .NAME.old-PID, one that is being replaced.
_OURS = re.compile(r"\.tmp-mlxft-(?P<pid>\d+)-.+|\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<by>\d+)", re.DOTALL)


def temporary(path: Path, pid: int | None = None) -> Path:
    """Return a process's (this one's) name beside `path` for what is to take its place, with its ending for MLX."""
    end = os.fsencode(path.name)[-100:].decode("utf-8", "ignore")  # a name has 255 bytes at most
    return path.with_name(f".tmp-mlxft-{pid or os.getpid()}-{end}")


def writer(path: Path) -> int | None:
    """The other process that lives and has a temporary name for this path."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            found = _OURS.fullmatch(name)
            pid = int(found["pid"] or 0) if found else 0
            if pid not in (0, os.getpid()) and name == temporary(path, pid).name and _lives(pid):
                return pid
    return None


def discard(path: Path) -> None:
    """Remove a file or folder under another name: what a kill leaves of it is never taken for the whole."""
    gone = temporary(path.with_name(f"gone-{path.name}"))
    with suppress(OSError):
        path.rename(gone)
        _remove(gone)


def clear(folder: Path) -> None:
    """Remove what processes that have ended left under temporary names in a folder.

    A folder that was moved aside to be replaced, and whose successor is not there, gets its name back.
    """
    with suppress(OSError):
        for entry in sorted(p for p in folder.iterdir() if p.name.startswith(".")):
            found = _OURS.fullmatch(entry.name)
            if found is None or _lives(int(found["pid"] or found["by"])):
                continue
            if found["kind"] and not (entry / MARK).is_file():  # others may be the user's
                continue
            whole = folder / found["name"] if found["kind"] == "old" else None
            if whole is not None and not os.path.lexists(whole):
                entry.rename(whole)
            else:
                _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return pid > 0
