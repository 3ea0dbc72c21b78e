"""Files that are whole or not there: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from mlxft.errors import CheckpointError
from mlxft.owned import is_stream, note
from mlxft.temporary import clear, temporary


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
