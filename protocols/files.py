"""Files that must be whole, durable, or for their owner's eyes only.

The writers raise `OSError` as it comes, and leave what was there before; who calls them says what that means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from secagg.errors import SecAggError

PRIVATE = 0o600


def read_private(path: Path, error_type: type[SecAggError]) -> bytes:
    """The content of a file that nobody but its owner may open.

    Raises:
        SecAggError: Of the given type: it cannot be read, is no plain file, or others may read or write it.
    """
    try:
        # Not to wait for a writer, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            # Of the open file and not of the path, which could be moved in between.
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise error_type(f"{path}: expected a plain file")
            if mode & 0o077:
                raise error_type(
                    f"{path}: holds a secret, and others than its owner may open it (mode {stat.S_IMODE(mode):04o}); "
                    f"allow the owner only: chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {error.strerror or error}") from error


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not be there yet: whole or not at all, and durable.

    Raises:
        FileExistsError: There is something of that name.
        OSError: It could not be written; nothing of it is left.
    """
    partial = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        _write(partial, content, mode)
        os.link(partial, path)  # unlike a rename, refuses a name that is taken
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_private(path: Path, content: bytes) -> None:
    """Put a file of mode 0600 in the place of an older one, in one move, and durably. For one process at a time.

    Raises:
        OSError: It could not be written. The older one is in place and whole; or, where only the folder could not be
            made durable, the new one.
    """
    partial = partial_of(path)
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        _write(partial, content, PRIVATE)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Where the next content of a file is before it is put in place."""
    return path.with_name(f"{path.name}.new")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: They may not be.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network file systems that cannot: there a rename is done when the server has it.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write and make durable a file that is not there, of that mode from the start."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
