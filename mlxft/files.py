"""Write and remove files: beside, then rename, then fsync; and replace or delete only what mlxft itself made."""

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
from typing import NamedTuple

import mlx.core as mx

from mlxft.errors import CheckpointError, ConfigError, switch
from mlxft.text import parse_json, read_file

# --- temporary --------------------------------------------------------------------------------------------------------
# Files and folders under a temporary name, which a kill leaves behind and the next command that works there removes.
#
# The name holds the process id: what a living process is writing is left alone.

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


# --- owned ------------------------------------------------------------------------------------------------------------
# What in a folder mlxft made itself, and the only way to replace or delete any of it.
#
# A folder is ours by its mark, `.mlxft.json`, which nothing else writes: it names the kind of the folder, from which
# the names follow that mlxft gives there, and whatever else mlxft wrote into it. All other files are the user's: they
# are named and kept, and the command that would have deleted them is refused. Folders of older versions have no mark.

HOLDER = ".mlxft.pid"
# What nobody misses, in any folder and in ours: of killed processes, of macOS, of Python where a model has own code.
_ANYWHERE = (HOLDER, ".tmp-mlxft-*", ".DS_Store")
_LITTER = (*_ANYWHERE, ".*.partial-*", ".*.old-*", "__pycache__")
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_ADAPTER = ("adapter_config.json", "adapters.safetensors", "head.safetensors", *_TEMPLATES)
CHECKPOINT = ("digests.json", "state.json", "weights.safetensors", "optimizer.safetensors", "objective.safetensors")
_RUN = ("config.yaml", "metrics.jsonl", "samples.jsonl", "status.json", "trackers.json", "reference.npz", "report.html")
_SWEEP = ("sweep.db", "sweep.db-journal", "best.yaml", "history.png", "importance.png", "trials/*/")
EVALUATION = ("predictions.jsonl", "results.json")
_ROWS = tuple(f"data/{name}.jsonl" for name in ("sft", "pairs", "prompts", "held-out"))
# Kind -> what it is called, and the names in it. A folder is named, with a slash behind it, where it has a mark of its
# own, and with ** where another program fills it. Folders that are written at once (models, adapters) have all their
# names in the mark.
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
    "adapter": ("an adapter's folder", ()),
    "ollama": ("a folder for Ollama", ()),
    "demo": ("the folder of a demo", ("run/", "fused/")),
    "rlhf": ("the folder of a walk of rlhf", ("sft/", "reward/", "ppo/", "fused/", *_ROWS)),
}


class Mark(NamedTuple):
    """What a mark says: the folder's kind, and names in it beside those that the kind always has."""

    kind: str
    names: tuple[str, ...] = ()


def read_mark(folder: Path) -> Mark | None:
    """The mark of a folder; None where there is none, or none that can be read."""
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
    """Mark a folder, which is there and empty or ours, as made by mlxft.

    Raises:
        CheckpointError, ConfigError: it can not be written.
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
    """Remember that mlxft has written `path`, if it lies in a folder of ours: it goes with the folder."""
    if (found := our_folder(path)) is not None and not is_ours(path):
        folder, mark = found
        with suppress(CheckpointError, ConfigError):  # then it is kept as if it were the user's
            claim(folder, mark.kind, {*mark.names, path.absolute().relative_to(folder).as_posix()})


def our_folder(path: Path) -> tuple[Path, Mark] | None:
    """The nearest folder of ours that a path lies in, and its mark."""
    marks = ((folder, read_mark(folder)) for folder in path.absolute().parents)
    return next(((folder, mark) for folder, mark in marks if mark is not None), None)


def is_ours(path: Path) -> bool:
    """Whether mlxft has written a file, which lies in a folder of ours."""
    found = our_folder(path)
    return found is not None and _fits([*path.absolute().relative_to(found[0]).parts], found[1])


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a mark and what nobody misses."""
    known = _ANYWHERE if read_mark(folder) is None else (*_LITTER, MARK)
    return all(_is_any(p.name, known) for p in folder.iterdir())


def is_of_kind(folder: Path, kind: str, file: str) -> bool:
    """Whether a folder is empty or, by its mark, of this kind, with this file in it."""
    mark = read_mark(folder)
    if not folder.is_dir() or (mark is not None and mark.kind != kind):
        return False
    return is_empty(folder) or (mark is not None and (folder / file).is_file())


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace or delete what mlxft did not make.

    Raises:
        ConfigError: `folder` is there, and is not an empty folder or one of this kind with nothing else in it.
    """
    try:
        _check_replaceable(folder, kind)
    except OSError as e:
        raise ConfigError(f"{folder}: can not be read: {e.strerror or e}") from e


def _check_replaceable(folder: Path, kind: str) -> None:
    wanted, mine = KINDS[kind][0], "so it is neither replaced nor removed; choose another name, or remove it yourself"
    if folder.is_symlink():
        raise ConfigError(f"{folder}: is a link, {mine}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: exists and is a file; give a folder's name")
    if is_empty(folder):
        return
    mark = read_mark(folder)
    if mark is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        raise ConfigError(f"{folder}: is not {wanted} that this version of mlxft made (it has {there}), {mine}")
    if mark.kind != kind:
        raise ConfigError(f"{folder}: is {KINDS[mark.kind][0]}, not {wanted}, {mine}")
    if foreign := _survey(folder)[1]:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ConfigError(
            f"{folder}: holds what mlxft did not make ({', '.join(foreign[:5])}{more}), so nothing in it is replaced "
            "or removed; move that elsewhere first, or choose another name"
        )


def empty(folder: Path, part: str = "") -> None:
    """Delete what mlxft made in a folder, or in one part of it. What is not ours stays, and the folder and its mark."""
    below = folder / part
    for path in _survey(folder)[0]:
        if path not in (folder / MARK, folder / HOLDER) and below in path.parents:
            path.unlink(missing_ok=True)
    for at, _, _ in os.walk(below, topdown=False):
        if Path(at) != folder:
            with suppress(OSError):  # it is not empty
                os.rmdir(at)


def remove(folder: Path) -> None:
    """Delete a folder of ours, or an empty one; what is not ours stays, and the folder with it."""
    empty(folder)
    if is_empty(folder):
        for path in _survey(folder)[0]:
            path.unlink(missing_ok=True)
        folder.rmdir()


def remove_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Delete the files of these names in a folder, and the folder with them: all at once, if nothing else is in it.

    Returns:
        What else is in it, and stays with the folder.
    """
    ours = {p for p in folder.iterdir() if p.name in names and p.is_file() and not p.is_symlink()}
    foreign = sorted(p.name for p in folder.iterdir() if p not in ours and not _is_any(p.name, _ANYWHERE))
    if not foreign:
        discard(folder)
    for path in sorted(ours, key=lambda p: names.index(p.name)) if foreign else ():
        path.unlink()
    return foreign


class Held(NamedTuple):
    """A folder that this process alone works in. `locked` is False where its file system has no locks."""

    folder: Path
    fd: int
    locked: bool

    def check(self) -> None:
        """CheckpointError where the folder is no longer in its place."""
        if not _is_same(self.fd, self.folder):
            raise CheckpointError(f"{self.folder} was removed or renamed while it was written to; start again")


@contextmanager
def hold(folder: Path, wait: bool = False) -> Iterator[Held]:
    """Be the only mlxft that works in a folder, which is made if need be; if nothing comes into it, it goes again.

    The lock lies on the folder itself and ends with its process, however that ends. It outlasts `empty`.

    Args:
        wait: until another one has done, in place of a refusal.
    Raises:
        CheckpointError: another process works there; it is named.
        ConfigError: the folder can not be made or written.
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
        with suppress(OSError):  # it is not empty
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
        raise kind(f"can not write to {folder}: {e.strerror or e}") from e


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
        os.close(fd)  # who had it has removed the folder


def is_held(folder: Path) -> bool:
    """Whether a process works in this folder now."""
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
    """CheckpointError where another process works in this folder."""
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
    """Lock an open folder. False: its file system has no locks."""
    for _ in range(100):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            time.sleep(0.01)  # a look from outside holds it for a moment
        except OSError:
            return False
    refuse_if_held(folder)
    return _lock(fd, folder, wait)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Be the only mlxft that works on a file or folder of this name. Who can not write there is told so by others.

    Raises:
        CheckpointError: another process does; it is named.
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
                folder.rmdir()  # unless something has come into it


def is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe: it is written to, and never replaced by a file."""
    if str(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd"):  # /dev/stdout may lead to a file
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_writable(path: Path, option: str) -> None:
    """Refuse, before the work, a name that nothing can be written under. Folders above it are made when it is written.

    Raises:
        ConfigError: so it is.
    """
    try:
        with suppress(FileNotFoundError):
            path.lstat()
        if os.path.exists(path) and not os.access(path, os.W_OK):  # a rename would replace it all the same
            raise OSError(errno.EACCES, "it is read-only")
        probe = temporary(next(p for p in path.absolute().parents if os.path.lexists(p)) / "probe")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as e:
        raise ConfigError(f"{option}: can not write {path}: {getattr(e, 'strerror', None) or e}") from e


def check_file(path: Path, overwrite: bool, option: str = "--out") -> None:
    """Refuse, before the work, a file that can not be written, or that is there and may not be replaced.

    Raises:
        ConfigError: so it is.
    """
    if not path.name or os.path.isdir(path):
        raise ConfigError(f"{option}: can not write {str(path)!r}: it is a folder, or empty; give a file's name")
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{option}: can not write to {path}")
        return
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(
            f"{option}: {path} exists already; give another name, or replace it with {switch('overwrite')}"
        )
    check_writable(path, option)


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fits(at: list[str], mark: Mark, whole: bool = True) -> bool:
    """Whether a name, cut at its slashes, is one that mlxft gives; or, where not `whole`, how one begins."""
    given = [pattern.split("/") for pattern in KINDS[mark.kind][1]]
    given = [parts for parts in given if len(parts) == len(at) or (not whole and any(parts[len(at) :]))]
    if any(all(map(fnmatchcase, at, parts)) and (whole or len(parts) > len(at)) for parts in given):
        return True
    name = "/".join(at)
    return name.rstrip("/") in mark.names if whole else any(known.startswith(f"{name}/") for known in mark.names)


def _all_below(path: Path) -> list[Path]:
    """A file or link, or all files and links below a folder."""
    if path.is_symlink() or not path.is_dir():
        return [path]
    return [found for below in path.iterdir() for found in _all_below(below)]


def _survey(top: Path) -> tuple[list[Path], list[str]]:
    """The files below a folder that mlxft made, and the names of the others; a folder stands for all in it."""
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
    """Make a file or folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)  # of macOS, where fsync leaves it in the drive's own memory
        try:
            os.fsync(fd) if full is None else fcntl.fcntl(fd, full)
        except OSError as e:
            if full is None or e.errno not in (errno.ENOTSUP, errno.EINVAL):  # not every file system has it
                raise
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn a failure to write `what` into a CheckpointError that says why and what is safe."""
    try:
        yield
    except (OSError, RuntimeError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise CheckpointError(f"can not write {what}: {reason}; what was saved before is untouched") from e


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file through `write(temporary)`, and rename it into place once it is whole.

    Raises:
        CheckpointError: it can not be written (full disk, no permission); the file that was there stays.
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
        with suppress(OSError):  # its folder may be no folder
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_beside(path, text_writer(text))


def write_result(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file that a command was asked for; in a folder of ours it counts as ours. See `write_beside`.

    A device or a pipe is written to as it is.
    """
    if is_stream(path):
        with writing(path):
            write(path)
        return
    write_beside(path, write)
    note(path)


def text_writer(text: str) -> Callable[[Path], None]:
    """What writes a text: half of a character, which UTF-8 has no form for, as the escape that JSON has for it."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    return write


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as safetensors. An OSError where the disk took less than all of it."""
    need = sum(v.nbytes for v in arrays.values())
    check_room(path.parent, need)  # mlx does not always notice a full disk
    try:
        mx.save_safetensors(str(path), dict(sorted(arrays.items())), metadata or {"format": "mlx"})
        whole = path.stat().st_size >= need
    except RuntimeError:  # or says how many bytes it could not write
        whole = False
        if shutil.disk_usage(path.parent).free > 1 << 16:
            raise
    if not whole:
        raise OSError(errno.ENOSPC, f"No space left on device ({need:,} bytes are needed)")


def check_room(folder: Path, need: int) -> None:
    """Raise an OSError where the disk of a folder has less than `need` bytes free."""
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(errno.ENOSPC, f"No space left on device ({need:,} bytes are needed, {free:,} are free)")


def digest(path: Path) -> str:
    """Hash of a file's content."""
    h = hashlib.blake2b(digest_size=16)
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
