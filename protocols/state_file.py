"""A site's state between two messages, on disk, where an older copy of it does not pass for the newest.

A site that answers from an older state would mask a second vector with keys that have masked one already, and forget
what privacy it has spent. So every save has a number, and the number of the last save is kept a second time, in the
counter file. A state whose number is behind the counter's is an older copy, from a backup for example, and is refused.

The counter file only helps where it is not restored together with the state: put it on other storage than what is
backed up and restored. Nothing on one machine can tell that the whole machine was put back, both files together, or
that a copy of the machine runs beside it. Keep snapshots of a site's machine for everything but these two files.

One save is, in this order: the state with the next number, durably; the counter with that number and the state's
digest, durably; and only then may the reply leave. A process that is killed between the two leaves a state that is one
ahead of the counter, and whose reply has not left. That state is taken up, if it is the successor of the very state
that the counter stands for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from msgspec import Struct

from protocols.errors import StateError
from protocols.files import PRIVATE, partial_of, read_private, replace_private, sync_folder
from secagg.errors import LocalProtocolError
from secagg.wire import SecretState

_MAGIC = b"secagg state 1\n"
# Magic, number of the save, digest of the save before, and a nonce.
_HEADER = struct.Struct(f">{len(_MAGIC)}sQ32s16s")
_DIGEST_BYTES = 32
_COUNTER = re.compile(rb"secagg counter 1\n(0|[1-9][0-9]{0,18})\n([0-9a-f]{64})\n")
_PUT_BACK = "put the newest copy back; without one, this site's part in the study is over (docs/site.md)"
_USED = "an answer from it would mask a second vector with used keys, and forget what privacy is spent"
T = TypeVar("T")


class _Mark(Struct, frozen=True):
    """Which save it is: its number, and the digest of the whole content."""

    number: int
    digest: bytes


_NOTHING_SAVED = _Mark(0, bytes(_DIGEST_BYTES))


class _Saved(SecretState, frozen=True):
    """One save: its number, the digest of the one before, its own, and the state."""

    number: int
    previous: bytes
    digest: bytes
    state: bytes


class Handles(Protocol):
    """What answers a request from a state: `Site`."""

    def handle(self, request: bytes, state: bytes) -> tuple[bytes, bytes]:
        """The reply and the next state."""


class StateFile:
    """The file with a site's state, of one site in one study; a context manager that one process holds at a time.

    Args:
        path: The state; a secret, of mode 0600. Beside it, `.lock` and for a moment `.new`.
        counter: The number of the last save, by default beside the state with `.counter`. Meant for other storage: see
            above.

    Attributes:
        files: Every file that it makes, replaces or removes.

    Raises:
        StateError: The two are the same file.
    """

    def __init__(self, path: str | Path, counter: str | Path | None = None) -> None:
        # Where links lead, so that a file is replaced and not the link to it.
        self.path = Path(os.path.realpath(path))
        self.counter = Path(os.path.realpath(counter if counter is not None else f"{self.path}.counter"))
        self._lock_path = self.path.with_name(f"{self.path.name}.lock")
        beside = partial_of(self.path), partial_of(self.counter)
        self.files = frozenset((self.path, self._lock_path, self.counter, *beside))
        if len(self.files) < 5:
            raise StateError(f"{self.counter}: the counter cannot have the name of the state or of what is beside it")
        self._lock: int | None = None
        self._at: _Mark | None = None
        self._turn = threading.RLock()

    def __enter__(self) -> StateFile:
        """Take the lock.

        Raises:
            StateError: Someone has the file open, in this process or another, or there is no such folder.
        """
        try:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE)
        except OSError as error:
            raise StateError(f"{self._lock_path}: cannot be opened: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StateError(
                f"{self.path}: in use by another process or thread of this site; a site answers one message after the "
                "other: wait until that one is done, or end it"
            ) from error
        except OSError as error:
            os.close(lock)
            raise StateError(
                f"{self._lock_path}: cannot be locked: {error.strerror or error}; keep the state on a local disk"
            ) from error
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._turn:
            if self._lock is not None:
                os.close(self._lock)  # the file stays: who deletes a lock file takes the next one's lock away
            self._lock = self._at = None

    def load(self) -> bytes:
        """The state of the last save, or no bytes where nothing was saved.

        Raises:
            StateError: An older copy, or another's; damaged or missing; readable by others. Nothing is changed.
            LocalProtocolError: The file is not open.
        """
        with self._turn:
            self._refuse_closed()
            self._at = None
            saved, mark = self._read_state(), self._read_counter()
            self._refuse_older_copy(saved, mark)
            if saved is None:
                self._at = _NOTHING_SAVED
                return b""
            at = _Mark(saved.number, saved.digest)
            if mark is None or mark.number < at.number:
                # A crash between the two files. The state must be durable before the counter is.
                with self._told_as(self.path):
                    sync_folder(self.path.parent)
                self._write_counter(at)
            self._at = at
            return saved.state

    def save(self, state: bytes) -> None:
        """Save the successor of the state that was loaded; after that, and not before, its reply may leave.

        Raises:
            StateError: It could not be saved, for example because the disk is full. What is on disk is whole: the
                state before, or this one, from which the same request gets the same reply.
            LocalProtocolError: The file is not open, or this state follows on no `load`.
        """
        with self._turn:
            self._refuse_closed()
            at, self._at = self._at, None
            if at is None:
                raise LocalProtocolError("a state is saved once for each time that it was loaded: load it first")
            # The nonce keeps the digest, which lies in the counter file, from telling what a guess at the state is.
            header = _HEADER.pack(_MAGIC, at.number + 1, at.digest, os.urandom(16))
            digest = _digest(header, state)
            if at == _NOTHING_SAVED:
                # So that a state without a counter is never a crash in the very first save.
                self._write_counter(at)
            with self._told_as(self.path):
                replace_private(self.path, b"".join((header, state, digest)))
            self._write_counter(_Mark(at.number + 1, digest))

    def update(self, step: Callable[[bytes], tuple[T, bytes]]) -> T:
        """Load the state, take a step from it, save what comes of it, and only then give the step's result.

        Threads that share an open file take their turns.

        Args:
            step: From a state to a result and the next state. When it raises, nothing is saved.

        Raises:
            StateError, LocalProtocolError: As `load` and `save`.
        """
        with self._turn:
            before = self.load()
            result, after = step(before)
            if after != before:
                self.save(after)
            return result

    def _refuse_older_copy(self, saved: _Saved | None, mark: _Mark | None) -> None:
        """Refuse any pair of files that saves and crashes do not leave behind."""
        if saved is None:
            if mark is not None and mark != _NOTHING_SAVED:
                raise StateError(
                    f"{self.path}: missing, but {self.counter} tells of save {mark.number}: the state was deleted or "
                    f"moved; {_PUT_BACK}"
                )
            return
        if mark is None:
            raise StateError(
                f"{self.path}: holds save {saved.number}, but the counter file {self.counter} is missing: without it "
                "nobody can tell whether this is the newest copy; put it back, or name it where it is"
            )
        if saved.number < mark.number:
            raise StateError(
                f"{self.path}: an older copy was put back: it holds save {saved.number}, and {self.counter} tells of "
                f"save {mark.number}; {_USED}; {_PUT_BACK}"
            )
        if saved.number > mark.number + 1:
            raise StateError(
                f"{self.counter}: an older copy, or another site's: it tells of save {mark.number}, and {self.path} "
                f"holds save {saved.number}; put the newest counter file back"
            )
        if (saved.digest if saved.number == mark.number else saved.previous) != mark.digest:
            raise StateError(
                f"{self.path}: its save {saved.number} does not belong to save {mark.number} of {self.counter}: "
                f"the two are of different sites, studies or copies of a machine; {_USED}; {_PUT_BACK}"
            )

    def _read_state(self) -> _Saved | None:
        if not os.path.lexists(self.path):
            return None
        content = memoryview(read_private(self.path, StateError))
        size, digest = len(content) - _DIGEST_BYTES, bytes(content[-_DIGEST_BYTES:])
        if size < _HEADER.size or content[: len(_MAGIC)] != _MAGIC or _digest(content[:size]) != digest:
            raise StateError(f"{self.path}: damaged, cut short or no state file of this version; {_PUT_BACK}")
        _, number, previous, _ = _HEADER.unpack_from(content)
        return _Saved(number, previous, digest, bytes(content[_HEADER.size : size]))

    def _read_counter(self) -> _Mark | None:
        try:
            content = self.counter.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self.counter}: cannot be read: {error.strerror or error}") from error
        if (found := _COUNTER.fullmatch(content)) is None:
            raise StateError(
                f"{self.counter}: damaged, cut short or no counter file of this version; put the newest copy back"
            )
        return _Mark(int(found[1]), bytes.fromhex(found[2].decode()))

    def _write_counter(self, mark: _Mark) -> None:
        with self._told_as(self.counter):
            replace_private(self.counter, b"secagg counter 1\n%d\n%s\n" % (mark.number, mark.digest.hex().encode()))

    def _refuse_closed(self) -> None:
        if self._lock is None:
            raise LocalProtocolError("a state file is open inside `with` only")

    @contextlib.contextmanager
    def _told_as(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateError(
                f"{path}: could not be saved: {error.strerror or error}; nothing was answered. Make room or mend the "
                "disk, and the site answers when it is asked again"
            ) from error


def answer(site: Handles, store: StateFile, request: bytes) -> bytes:
    """Answer a request from the state on disk; the reply is given when its state is safe.

    A process that is killed at any point of this and asked again gives the bytes that it would have given, or may have
    given: all randomness of an answer is in the state before it. (To the very first request, from no state, it may give
    others; then none have left.)

    Args:
        site: The site whose state it is.
        store: Open.
        request: As it came.

    Returns:
        The encoded reply.

    Raises:
        StateError: The state is not the newest, or could not be saved; nothing may be sent.
        DecodeError: The state is not this site's.
    """
    return store.update(lambda state: site.handle(request, state))


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
