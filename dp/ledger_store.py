"""The file of a budget ledger: its table, the triggers that keep rows as they are, and reading it without touching it.

What a row says is in `dp.ledger_rows`; when one may be written, in `dp.ledger`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from dp.errors import LedgerError, LedgerLocked
from dp.ledger_rows import COLUMNS, Row, row_from

_MODE = 0o600
_TYPES = {
    "sequence": "INTEGER PRIMARY KEY AUTOINCREMENT",  # remembers the highest, so that deleting the last leaves a trace
    "time": "REAL NOT NULL",
    "delta": "REAL",
    "epsilon": "REAL",
    "refers": "INTEGER NOT NULL",
}
_TRIGGER = "CREATE TRIGGER {0} BEFORE {1} ON row BEGIN SELECT RAISE(ABORT, 'rows are never changed or deleted'); END"
_SCHEMA = {
    "row": "CREATE TABLE row ({})".format(", ".join(f"{name} {_TYPES.get(name, 'TEXT NOT NULL')}" for name in COLUMNS)),
    "no_update": _TRIGGER.format("no_update", "UPDATE"),
    "no_delete": _TRIGGER.format("no_delete", "DELETE"),
}
_INSERT = f"INSERT INTO row ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{name}' for name in COLUMNS)})"  # noqa: S608
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM row WHERE sequence > ? ORDER BY sequence"  # noqa: S608
DAMAGED = "damaged, cut short or no ledger; put the newest copy back, one that the other sites' receipts agree with"


class Stored(Struct, frozen=True):
    """What a ledger's file holds, unchecked.

    Attributes:
        rows: In the order of their numbers.
        highest: The highest number that was ever given to a row, as far as the file tells.
        problems: What of the table and its triggers is missing or not ours.
    """

    rows: tuple[Row, ...]
    highest: int
    problems: tuple[str, ...]


def make(path: Path, first: Row) -> None:
    """Make a file with its first row, signed: whole or not at all, durable, for its owner only.

    Raises:
        LedgerError: There is something of that name, or it could not be written.
    """
    partial = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")  # stays with the file
            database.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.values():
                database.execute(statement)
            insert(database, first)
            database.execute("COMMIT")
        _sync(partial)
        os.link(partial, path)  # unlike a rename, refuses a name that is taken
        _sync(path.parent)
    except FileExistsError as error:
        raise LedgerError(f"{path}: exists already, and a ledger is never overwritten") from error
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"{path}: could not be made: {error}") from error
    finally:
        for end in ("", "-wal", "-shm", "-journal"):
            partial.with_name(f"{partial.name}{end}").unlink(missing_ok=True)


def connect(path: Path, patience: float) -> sqlite3.Connection:
    """Open a file to write to it.

    Raises:
        LedgerError: It is missing, cannot be opened, or is no ledger of this version.
        LedgerLocked: Another process keeps it locked for longer than `patience` seconds.
    """
    if not path.exists():
        raise LedgerError(
            f"{path}: there is no ledger. Put it back: without it nobody knows what was spent. For a site's very first "
            "study, make one with secagg budget new"
        )
    with told(path):
        # Not to make a file, should it have gone away in between.
        uri = f"{path.absolute().as_uri()}?mode=rw"
        database = sqlite3.connect(uri, uri=True, timeout=patience, isolation_level=None)
    problems: tuple[str, ...] = ("cannot be read",)
    try:
        with told(path):
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA synchronous = FULL")
            problems = _problems(database) or _damage(database)
    finally:
        if problems:
            database.close()
    if problems:
        raise LedgerError(f"{path}: {problems[0]}; {DAMAGED}")
    return database


def insert(database: sqlite3.Connection, row: Row) -> None:
    """Add a row, inside a transaction."""
    database.execute(_INSERT, msgspec.structs.asdict(row))


def rows_after(database: sqlite3.Connection, sequence: int) -> Iterator[Row]:
    """The rows with higher numbers, in order.

    Raises:
        LedgerError: One cannot be read.
    """
    for values in database.execute(_SELECT, (sequence,)):
        yield row_from(dict(values), values["sequence"])


def highest(database: sqlite3.Connection) -> int:
    """The highest number that was ever given to a row, as far as the file tells."""
    found = database.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'row'").fetchone()[0]
    return found if isinstance(found, int) else 0


def missing_at_the_end(last: int, highest: int) -> str:
    """What to say of a ledger whose file remembers more rows than it holds."""
    rows = f"row {highest} was" if highest == last + 1 else f"rows {last + 1} to {highest} were"
    return f"{rows} written and then deleted: the ledger ends at row {last}"


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Tells SQLite's errors as ours.

    Raises:
        LedgerError: In the place of any error of SQLite's.
        LedgerLocked: Another process has the file locked.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerLocked(f"{path}: locked by another process; wait until it is done, or end it") from error
        if code == sqlite3.SQLITE_FULL:
            why = "the disk is full; nothing was written, and nothing may be released"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
            why = f"cannot be read or written: {error}; nothing may be released"
        else:
            why = f"{error}; {DAMAGED}"
        raise LedgerError(f"{path}: {why}") from error


def read_rows(path: str | Path) -> Stored:
    """What a ledger's file holds, for whoever only looks. The file is copied first, and not touched.

    Raises:
        LedgerError: It is missing, damaged, cut short or no ledger.
        LedgerLocked: It changes all the time while it is copied.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="secagg-ledger-") as folder:
        copy = Path(folder) / "ledger"
        try:
            _copy(path, copy)
        except FileNotFoundError as error:
            raise LedgerError(f"{path}: there is no ledger") from error
        except OSError as error:
            raise LedgerError(f"{path}: cannot be read: {error.strerror or error}") from error
        with told(path), contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as database:
            return _read(path, database)


def _read(path: Path, database: sqlite3.Connection) -> Stored:
    database.row_factory = sqlite3.Row
    # The file may be from someone who wants more to be run in it than a look.
    database.execute("PRAGMA trusted_schema = OFF")
    problems = _problems(database)
    if problems and problems[0].startswith("holds no table"):
        raise LedgerError(f"{path}: {problems[0]}; {DAMAGED}")
    if damage := _damage(database):
        raise LedgerError(f"{path}: {damage[0]}; {DAMAGED}")
    try:
        return Stored(tuple(rows_after(database, -(2**62))), highest(database), problems)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from error


def _problems(database: sqlite3.Connection) -> tuple[str, ...]:
    """What of the table and the triggers is missing, changed or not ours; the table comes first."""
    found = dict(tuple(pair) for pair in database.execute("SELECT name, sql FROM sqlite_schema"))
    found.pop("sqlite_sequence", None)  # SQLite's own
    problems = []
    for name, statement in _SCHEMA.items():
        if found.pop(name, None) != statement:
            problems.append(
                "holds no table of rows as this version makes it"
                if name == "row"
                else f"the trigger {name!r} is gone or replaced, so that rows can be changed"
            )
    return (*problems, *(f"holds {name!r}, which this software never made" for name in sorted(found)))


def _damage(database: sqlite3.Connection) -> tuple[str, ...]:
    """What SQLite finds wrong with the file itself; part of a page may be gone without any query noticing."""
    found = str(database.execute("PRAGMA integrity_check(1)").fetchone()[0])
    return () if found == "ok" else (found.splitlines()[-1],)


def _copy(path: Path, copy: Path) -> None:
    """Copy a ledger with what SQLite keeps beside it, both as they were at one moment."""
    beside = {path: copy, path.with_name(f"{path.name}-wal"): copy.with_name(f"{copy.name}-wal")}
    for _ in range(20):
        before = [_look(source) for source in beside]
        for source, target in beside.items():
            target.unlink(missing_ok=True)
            if source == path or source.exists():
                shutil.copyfile(source, target)
        if before == [_look(source) for source in beside]:
            return
    raise LedgerLocked(f"{path}: another process writes to it all the time; look again when it is done")


def _look(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
