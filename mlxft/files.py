"""Write files under a temporary name, fsync and rename them; replace or delete only what mlxft itself made."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlxft.errors import CheckpointError, ConfigError, switch
from mlxft.text import parse_json, read_file

if TYPE_CHECKING:
    import mlx.core as mx

# --- temporary --------------------------------------------------------------------------------------------------------
# Files and folders with a temporary name. A killed process leaves them behind, and the next command that works in the
# folder removes them.
#
# The name contains the process id, so that files of a running process are left alone.

MARK = ".mlxft.json"  # marks folders that mlxft made; see the section "owned"
# .tmp-mlxft-PID-NAME; .NAME.partial-PID, a folder being written; .NAME.old-PID, one that is being replaced.
_OURS = re.compile(r"\.tmp-mlxft-(?P<pid>\d+)-.+|\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<by>\d+)", re.DOTALL)


def temporary(path: Path, pid: int | None = None) -> Path:
    """Return the temporary name of a process (default: this one) for `path`, with the same file extension for MLX."""
    end = os.fsencode(path.name)[-100:].decode("utf-8", "ignore")  # a name has at most 255 bytes
    return path.with_name(f".tmp-mlxft-{pid or os.getpid()}-{end}")


def writer(path: Path) -> int | None:
    """Return the id of another running process that has a temporary name for this path, else None."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            found = _OURS.fullmatch(name)
            pid = int(found["pid"] or 0) if found else 0
            if pid not in (0, os.getpid()) and name == temporary(path, pid).name and _lives(pid):
                return pid
    return None


def discard(path: Path) -> None:
    """Rename a file or folder, then remove it, so that a kill never leaves a part of it under its name."""
    gone = temporary(path.with_name(f"gone-{path.name}"))
    with suppress(OSError):
        path.rename(gone)
        _remove(gone)


def clear(folder: Path) -> None:
    """Remove what ended processes left under temporary names in a folder.

    A folder that was moved aside to be replaced, but was not replaced, gets its name back.
    """
    with suppress(OSError):
        for entry in sorted(p for p in folder.iterdir() if p.name.startswith(".")):
            found = _OURS.fullmatch(entry.name)
            if found is None or _lives(int(found["pid"] or found["by"])):
                continue
            if found["kind"] and not (entry / MARK).is_file():  # without a mark it may be the user's
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
    except PermissionError:  # it belongs to another user
        return True
    return pid > 0


# --- owned ------------------------------------------------------------------------------------------------------------
# Find what mlxft itself made in a folder; only this section replaces or deletes any of it.
#
# A folder is ours if it has a mark, `.mlxft.json`, which nothing else writes. The mark names the kind of the folder,
# which implies the file names that mlxft uses there, and lists whatever else mlxft wrote into it. All other files are
# the user's: a command that would have deleted them lists them and refuses. Folders of older versions have no mark.

HOLDER = ".mlxft.pid"
# Files that may be deleted in any folder, and in ours: from killed processes, macOS, and Python code of a model.
_ANYWHERE = (HOLDER, ".tmp-mlxft-*", ".DS_Store")
_LITTER = (*_ANYWHERE, ".*.partial-*", ".*.old-*", "__pycache__")
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_ADAPTER = ("adapter_config.json", "adapters.safetensors", "inputs.safetensors", "head.safetensors", *_TEMPLATES)
CHECKPOINT = ("digests.json", "state.json", "weights.safetensors", "optimizer.safetensors", "objective.safetensors")
_RUN = ("config.yaml", "metrics.jsonl", "samples.jsonl", "status.json", "trackers.json", "reference.npz", "report.html")
_SWEEP = ("sweep.db", "sweep.db-journal", "best.yaml", "history.png", "importance.png", "trials/*/")
EVALUATION = ("predictions.jsonl", "results.json")
_ROWS = tuple(f"data/{name}.jsonl" for name in ("sft", "pairs", "prompts", "held-out"))
# Kind -> its description, and the names in it. A subfolder is listed with a slash at the end if it has its own mark,
# and with ** if another program fills it. Folders that are written at once (models, adapters) list all their names in
# the mark.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (
        "a run folder",
        (
            *_RUN,
            *_TEMPLATES,
            *(f"adapter/{name}" for name in _ADAPTER),
            *(f"checkpoints/step-*/{name}" for name in CHECKPOINT),
            *(f"eval/*/{name}" for name in EVALUATION),
            *("model/", "wandb/**", "tensorboard/**"),
        ),
    ),
    "sweep": ("a sweep", _SWEEP),
    "fewshot": (
        "a few-shot study",
        ("study.json", "fewshot.json", "fewshot.md", "fewshot.png", "cells/*.json", "runs/*/"),
    ),
    "eval": ("an evaluation", EVALUATION),
    "model": ("a model folder", ()),
    "adapter": ("an adapter folder", ()),
    "ollama": ("a folder for Ollama", ()),
    "demo": ("a folder of mlxft demo", ("run/", "fused/")),
    "rlhf": ("a folder of mlxft rlhf", ("sft/", "reward/", "ppo/", "fused/", *_ROWS)),
}


class Mark(NamedTuple):
    """Content of a mark: the folder's kind, and names in it besides those that the kind always has."""

    kind: str
    names: tuple[str, ...] = ()


def read_mark(folder: Path) -> Mark | None:
    """Return the mark of a folder; None if there is none, or it cannot be read."""
    file = folder / MARK
    try:
        found = parse_json(file.read_text(encoding="utf-8")) if stat.S_ISREG(file.lstat().st_mode) else {}
        kind, names = found["mlxft"], found["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return (
        Mark(kind, tuple(map(str, names)))
        if isinstance(kind, str) and kind in KINDS and isinstance(names, list)
        else None
    )


def claim(folder: Path, kind: str, names: Iterable[str] = ()) -> None:
    """Mark an existing folder, which is empty or ours, as made by mlxft.

    Raises:
        CheckpointError, ConfigError: the mark cannot be written.
    """
    beside = temporary(folder / "mark")
    text = json.dumps({"mlxft": kind, "files": sorted(names)}, indent=1) + "\n"
    try:
        with _writing(folder):
            beside.write_text(text, "utf-8", "backslashreplace")
            os.replace(beside, folder / MARK)
    finally:
        beside.unlink(missing_ok=True)


def note(path: Path) -> None:
    """Record in the mark that mlxft wrote `path`, if it is in a folder of ours: it is removed with the folder."""
    if (found := our_folder(path)) is not None and not is_ours(path):
        folder, mark = found
        with suppress(CheckpointError, ConfigError):  # without the record it is kept like a user's file
            claim(folder, mark.kind, {*mark.names, path.absolute().relative_to(folder).as_posix()})


def our_folder(path: Path) -> tuple[Path, Mark] | None:
    """Return the nearest folder of ours that contains a path, and its mark."""
    marks = ((folder, read_mark(folder)) for folder in path.absolute().parents)
    return next(((folder, mark) for folder, mark in marks if mark is not None), None)


def is_ours(path: Path) -> bool:
    """Return whether mlxft wrote a file, which is in a folder of ours."""
    found = our_folder(path)
    return found is not None and _fits([*path.absolute().relative_to(found[0]).parts], found[1])


def is_empty(folder: Path) -> bool:
    """Return whether a folder contains nothing but a mark and files that may be deleted."""
    known = _ANYWHERE if read_mark(folder) is None else (*_LITTER, MARK)
    return all(_is_any(p.name, known) for p in folder.iterdir())


def is_of_kind(folder: Path, kind: str, file: str) -> bool:
    """Return whether a folder is empty, or its mark has this kind and this file is in it."""
    mark = read_mark(folder)
    if not folder.is_dir() or (mark is not None and mark.kind != kind):
        return False
    return is_empty(folder) or (mark is not None and (folder / file).is_file())


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace or delete what mlxft did not make.

    Raises:
        ConfigError: `folder` exists, and is neither empty nor a folder of this kind with nothing else in it.
    """
    try:
        _check_replaceable(folder, kind)
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be read: {e.strerror or e}") from e


def _check_replaceable(folder: Path, kind: str) -> None:
    wanted, kept = KINDS[kind][0], "so it is neither replaced nor removed; choose another name, or remove it yourself"
    if folder.is_symlink():
        raise ConfigError(f"{folder}: is a link, {kept}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: exists and is a file; give the name of a folder")
    if is_empty(folder):
        return
    mark = read_mark(folder)
    if mark is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        raise ConfigError(f"{folder}: is not {wanted} that this version of mlxft made (it has {there}), {kept}")
    if mark.kind != kind:
        raise ConfigError(f"{folder}: is {KINDS[mark.kind][0]}, not {wanted}, {kept}")
    if foreign := _survey(folder)[1]:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ConfigError(
            f"{folder}: contains files that mlxft did not make ({', '.join(foreign[:5])}{more}), so nothing in it is "
            "replaced or removed; move them elsewhere first, or choose another name"
        )


def empty(folder: Path, part: str = "") -> None:
    """Delete what mlxft made in a folder, or in its subfolder `part`; other files, the folder and its mark stay."""
    below = folder / part
    for path in _survey(folder)[0]:
        if path not in (folder / MARK, folder / HOLDER) and below in path.parents:
            path.unlink(missing_ok=True)
    for at, _, _ in os.walk(below, topdown=False):
        if Path(at) != folder:
            with suppress(OSError):  # the folder is not empty
                os.rmdir(at)


def remove(folder: Path) -> None:
    """Delete a folder of ours, or an empty one; it stays if it contains files that are not ours."""
    empty(folder)
    if is_empty(folder):
        for path in _survey(folder)[0]:
            path.unlink(missing_ok=True)
        folder.rmdir()


def remove_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Delete the files with these names in a folder, and the folder at once if nothing else is in it.

    Returns:
        The names of other files, which stay in the folder.
    """
    ours = {p for p in folder.iterdir() if p.name in names and p.is_file() and not p.is_symlink()}
    foreign = sorted(p.name for p in folder.iterdir() if p not in ours and not _is_any(p.name, _ANYWHERE))
    if not foreign:
        discard(folder)
    for path in sorted(ours, key=lambda p: names.index(p.name)) if foreign else ():
        path.unlink()
    return foreign


class Held(NamedTuple):
    """A folder in which only this process works. `locked` is False if its file system has no locks."""

    folder: Path
    fd: int
    locked: bool

    def check(self) -> None:
        """Raise a CheckpointError if the folder is no longer in its place."""
        if not _is_same(self.fd, self.folder):
            raise CheckpointError(f"{self.folder} was removed or renamed while it was written to; start again")


@contextmanager
def hold(folder: Path, wait: bool = False) -> Iterator[Held]:
    """Hold a folder, so that no other mlxft process works in it. The folder is made if needed, and removed if unused.

    The lock is on the folder itself and ends with its process, however that ends. It outlasts `empty`.

    Args:
        wait: wait until another process is done, instead of refusing.
    Raises:
        CheckpointError: another process, which is named, works there.
        ConfigError: the folder cannot be made or written.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    held = _take(folder, wait)
    try:
        with _writing(folder):
            (folder / HOLDER).write_text(f"{os.getpid()} on {platform.node()}", "utf-8")
        yield held
    finally:
        with suppress(OSError, CheckpointError):
            held.check()
            (folder / HOLDER).unlink(missing_ok=True)
        with suppress(OSError):  # the folder is not empty
            for path in made:
                if path.exists():
                    path.rmdir()
        os.close(held.fd)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        kind = CheckpointError if e.errno == errno.ENOSPC else ConfigError
        raise kind(f"cannot write to {folder}: {e.strerror or e}") from e


def _take(folder: Path, wait: bool) -> Held:
    """Make, open and lock a folder."""
    while True:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            held = Held(folder, fd, _lock(fd, folder, wait))
        except BaseException:
            os.close(fd)
            raise
        if _is_same(fd, folder):
            return held
        os.close(fd)  # the process that held the folder has removed it


def is_held(folder: Path) -> bool:
    """Return whether a process works in this folder now."""
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
    """Raise a CheckpointError if another process works in this folder."""
    if is_held(folder):
        holder = ""
        with suppress(OSError, ValueError):
            holder = read_file(folder / HOLDER).decode()
        raise CheckpointError(
            f"{folder} is in use now, by process {holder or '?'}; wait for it (mlxft runs watch shows a run), or "
            "choose another name"
        )


def _is_same(fd: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(folder))
    except OSError:
        return False


def _lock(fd: int, folder: Path, wait: bool) -> bool:
    """Lock an open folder. Return False if its file system has no locks."""
    for _ in range(100):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            time.sleep(0.01)  # `is_held` in another process holds it for a moment
        except OSError:
            return False
    refuse_if_held(folder)
    return _lock(fd, folder, wait)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Reserve a file or folder name, so that no other mlxft process works on it. Errors of writing come later.

    Raises:
        CheckpointError: another process, which is named, works on it.
    """
    path = path.absolute()
    made = [p for p in path.parents if not os.path.lexists(p)]
    try:
        if path.name and not is_stream(path):
            with suppress(OSError, ValueError):
                path.parent.mkdir(parents=True, exist_ok=True)
                clear(path.parent)
                temporary(path).touch()
            if (pid := writer(path)) is not None:
                raise CheckpointError(
                    f"{path} is being written now, by process {pid}; wait for it, or give another name"
                )
        yield
    finally:
        with suppress(OSError, ValueError):
            temporary(path).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()  # fails if something has been written into it


def is_stream(path: Path) -> bool:
    """Return whether a path is a device or a pipe, which is written to and never replaced by a file."""
    if str(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd"):  # /dev/stdout may be a link to a file
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_writable(path: Path, option: str) -> None:
    """Refuse, before the work, a path that cannot be written. Missing parent folders are made when it is written.

    Raises:
        ConfigError: the path cannot be written.
    """
    try:
        with suppress(FileNotFoundError):
            path.lstat()
        if os.path.exists(path) and not os.access(path, os.W_OK):  # a rename would replace it anyway
            raise OSError(errno.EACCES, "it is read-only")
        probe = temporary(next(p for p in path.absolute().parents if os.path.lexists(p)) / "probe")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as e:
        raise ConfigError(f"{option}: cannot write {path}: {getattr(e, 'strerror', None) or e}") from e


def check_file(path: Path, overwrite: bool, option: str = "--out") -> None:
    """Refuse, before the work, a file that cannot be written, or that exists and may not be replaced.

    Raises:
        ConfigError: the file cannot be written or replaced.
    """
    if not path.name or os.path.isdir(path):
        raise ConfigError(
            f"{option}: cannot write {str(path)!r}: the name is empty or a folder; give the name of a file"
        )
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{option}: cannot write to {path}")
        return
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(
            f"{option}: {path} exists already; give another name, or replace it with {switch('overwrite')}"
        )
    check_writable(path, option)


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fits(at: list[str], mark: Mark, whole: bool = True) -> bool:
    """Return whether a path, split at its slashes, is one that mlxft uses; if not `whole`, whether one begins so."""
    given = [pattern.split("/") for pattern in KINDS[mark.kind][1]]
    given = [parts for parts in given if len(parts) == len(at) or (not whole and any(parts[len(at) :]))]
    if any(all(map(fnmatchcase, at, parts)) and (whole or len(parts) > len(at)) for parts in given):
        return True
    name = "/".join(at)
    return name.rstrip("/") in mark.names if whole else any(known.startswith(f"{name}/") for known in mark.names)


def _all_below(path: Path) -> list[Path]:
    """Return a file or link, or all files and links below a folder."""
    if path.is_symlink() or not path.is_dir():
        return [path]
    return [found for below in path.iterdir() for found in _all_below(below)]


def _survey(top: Path) -> tuple[list[Path], list[str]]:
    """Return the files below a folder that mlxft made, and the names of others; a folder counts for all in it."""
    mark, ours, foreign = read_mark(top), [], []
    known = _ANYWHERE if mark is None else (*_LITTER, MARK)

    def look(folder: Path, above: list[str]) -> None:
        for path in sorted(folder.iterdir()):
            at, is_folder = [*above, path.name], path.is_dir() and not path.is_symlink()
            name = "/".join(at)
            if _is_any(path.name, known) or (mark and f"{name}/**" in KINDS[mark.kind][1]):
                ours.extend(_all_below(path))
            elif mark is None or not (path.is_symlink() or is_folder or path.is_file()):
                foreign.append(name)
            elif is_folder and _fits([*at, ""], mark) and (read_mark(path) or is_empty(path)):
                inner = _survey(path)
                ours.extend(inner[0])
                foreign.extend(f"{name}/{below}" for below in inner[1])
            elif is_folder and _fits(at, mark, whole=False):
                look(path, at)
            elif not is_folder and not path.is_symlink() and _fits(at, mark):
                ours.append(path)
            else:
                foreign.append(name + "/" * is_folder)

    look(top, [])
    return ours, foreign


# --- files ------------------------------------------------------------------------------------------------------------


def flush(path: Path) -> None:
    """Make a file or folder survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS fsync leaves data in the drive's cache
        try:
            os.fsync(fd) if full is None else fcntl.fcntl(fd, full)
        except OSError as e:
            if full is None or e.errno not in (errno.ENOTSUP, errno.EINVAL):  # not every file system supports it
                raise
            os.fsync(fd)
    finally:
        os.close(fd)


_FULL = 1 << 16  # free bytes of a full disk
_SHORT = re.compile(r"requested and \d+ written|Unable to write")  # NumPy, MLX


def explained(error: Exception, folder: Path) -> Exception:
    """Return an error of writing to a folder, with the reason if another library only says how much was written.

    Call it before what was written is removed, since the space on the disk is the reason that is looked for.
    """
    if (getattr(error, "errno", None) or errno.ENOSPC) != errno.ENOSPC or "are needed" in str(error):
        return error
    with suppress(OSError):
        if (free := shutil.disk_usage(folder).free) < _FULL:
            return OSError(errno.ENOSPC, f"No space left on device ({free:,} bytes are free)")
    if _SHORT.search(str(error)):
        return OSError(errno.EFBIG, f"a quota or a limit on the size of files is reached ({error})")
    return error


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn a failure to write `what` into a CheckpointError that names the reason."""
    try:
        yield
    except (OSError, RuntimeError, UnicodeError) as e:
        cause = explained(e, what.parent)
        reason = getattr(cause, "strerror", None) or str(cause)
        raise CheckpointError(f"cannot write {what}: {reason}; what was saved before is unchanged") from cause


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file through `write(temporary)`, and rename it into place once it is complete.

    Raises:
        CheckpointError: the file cannot be written (full disk, no permission); an existing file stays.
    """
    part = temporary(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(path.parent)
            write(part)
            flush(part)
            os.replace(part, path)
            flush(path.parent)
    finally:
        with suppress(OSError):  # its parent may not be a folder
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_beside(path, text_writer(text))


def write_result(path: Path, write: Callable[[Path], None]) -> None:
    """Write an output file of a command as `write_beside` does; in a folder of ours it counts as ours.

    A device or a pipe is written to directly.
    """
    if is_stream(path):
        with writing(path):
            write(path)
        return
    write_beside(path, write)
    note(path)


def text_writer(text: str) -> Callable[[Path], None]:
    """Return a function that writes a text; halves of characters, which UTF-8 cannot encode, are written as escapes."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    return write


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as safetensors. Raise an OSError if not all of them fit on the disk."""
    need = sum(v.nbytes for v in arrays.values())
    check_room(path.parent, need)  # mlx does not always notice a full disk
    try:
        import mlx.core as mx

        mx.save_safetensors(str(path), dict(sorted(arrays.items())), metadata or {"format": "mlx"})
        whole = path.stat().st_size >= need
    except RuntimeError:  # mlx says how many bytes it could not write
        whole = False
        if shutil.disk_usage(path.parent).free > _FULL:
            raise
    if not whole:
        raise OSError(errno.ENOSPC, f"No space left on device ({need:,} bytes are needed)")


def check_room(folder: Path, need: int) -> None:
    """Raise an OSError if the disk of a folder has less than `need` bytes free."""
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(errno.ENOSPC, f"No space left on device ({need:,} bytes are needed, {free:,} are free)")


def digest(path: Path) -> str:
    """Return a hash of a file's content."""
    h = hashlib.blake2b(digest_size=16)
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
