"""A hospital's own process: it holds the key, the rows and the state, and answers over a socket on the same machine.

What carries the messages between machines runs beside it, under an account of its own, and passes bytes on. So code
that comes with the messages never runs where the secrets are, and what goes wrong here is told here alone: outside it
is one word.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from dp import DpError, Spent
from protocols.datasets import SiteData, heart_disease, read_csv
from protocols.errors import ServiceError, SiteFileError
from protocols.fedavg import build_model
from protocols.hello import Hello
from protocols.ledger_file import open_ledger
from protocols.metrics import Metrics
from protocols.rosters import roster_digest
from protocols.run import threads_for
from protocols.site import Site
from protocols.site_file import SiteFile, load_site
from protocols.site_socket import ANSWER, FAILED, HELLO, MESSAGE, receive, send
from protocols.state_file import StateFile, answer
from protocols.study import Study
from secagg.errors import SecAggError
from secagg.prg import Entropy
from secagg.wire import encode

# Whoever connects and says nothing must not keep the site from answering others.
_PATIENCE = 60.0
# The longest path of a socket that Linux takes.
_LONGEST_PATH = 107


class Entry(Struct, frozen=True, omit_defaults=True):
    """One line of a site's journal.

    Attributes:
        round: Whose model `metrics` are of; None for the finished one.
        metrics: How that model did on the site's test rows.
        spent: What the site's records have cost so far.
        log: Why it refused or clipped something.
        train_rows: Rows that it trains on.
        test_rows: Rows that it tests on.
    """

    round: int | None = None
    metrics: Metrics | None = None
    spent: Spent | None = None
    log: str | None = None
    train_rows: int | None = None
    test_rows: int | None = None


class SiteHost:
    """A site with all that is its own, ready to answer.

    Args:
        site: The site.
        store: Its state on disk, open.
        roster: Digest of its roster, for whoever asks what it is part of.
        study: Its study.
        journal: Where its own figures go, one JSON object in a line, for the site's eyes only; or None.
    """

    def __init__(self, site: Site, store: StateFile, roster: bytes, study: Study, journal: Path | None) -> None:
        self.site = site
        self._store, self._journal = store, journal
        self._private = study.private
        self._hello = encode(Hello(site.name, study.digest, roster))
        self._told = 0, 0

    def hello(self) -> bytes:
        """Who this is, and the digests of the study and roster that it goes by: an encoded `Hello`."""
        return self._hello

    def answer(self, request: bytes) -> bytes:
        """Answer a request of the coordinator from the state on disk.

        Raises:
            StateError, DecodeError: As `protocols.state_file.answer`; nothing may be sent.
        """
        reply = answer(self.site, self._store, request)
        self._write_journal()
        return reply

    def _write_journal(self) -> None:
        site, (evaluations, lines) = self.site, self._told
        new = [Entry(round=e.round, metrics=e.metrics) for e in site.evaluations[evaluations:]]
        new += [Entry(log=line) for line in site.log[lines:]]
        self._told = len(site.evaluations), len(site.log)
        if not new:
            return
        if self._private and (spent := site.spent(self._store.load())) is not None:
            new.append(Entry(spent=spent))
        for entry in new:
            _tell(_readable(entry))
        if self._journal is not None:
            # A journal that cannot be written costs the site nothing but its journal.
            with contextlib.suppress(OSError):
                write_journal(self._journal, new)


def _tell(line: str) -> None:
    """A line for the site's own log. One that cannot be written, as on a full disk, must not keep it from answering."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _readable(entry: Entry) -> str:
    if entry.log is not None:
        return entry.log
    if entry.spent is not None:
        return f"spent so far: epsilon {entry.spent.epsilon:.3f} at delta {entry.spent.delta:g}"
    which = "the finished model" if entry.round is None else f"the model that round {entry.round} starts from"
    accuracy = entry.metrics.accuracy if entry.metrics is not None else None
    return f"{which}: accuracy {accuracy:.3f} on this site's test rows" if accuracy is not None else which


def write_journal(path: Path, entries: list[Entry]) -> None:
    """Add lines to a site's journal, which nobody but its owner may read.

    Raises:
        OSError: It cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "ab") as file:
        file.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))


def read_journal(path: Path) -> list[Entry]:
    """A site's journal; empty where there is none.

    Raises:
        SiteFileError: It cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SiteFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return [msgspec.json.decode(line, type=Entry) for line in lines]
    except msgspec.MsgspecError as error:
        raise SiteFileError(f"{path}: expected a site's journal: {error}") from error


def journal_of(file: SiteFile) -> Path:
    """Where a site's journal is: beside its state."""
    return file.state.with_name(f"{file.state.name}.journal")


def rows_of(study: Study, file: SiteFile) -> SiteData:
    """A site's own rows, raw.

    Raises:
        SiteFileError: Its file does not say where they are.
        DataError: They cannot be used.
    """
    task = study.task
    if task.data == "heart-disease":
        return heart_disease(task.preprocessing, test_fraction=task.test_fraction, split_seed=task.split_seed)[
            file.name
        ]
    if file.data is None:
        raise SiteFileError(f"{file.name}: data: expected the path of this site's rows in its site.toml, got none")
    return read_csv(
        file.data,
        site=file.name,
        features=task.features,
        target=task.target or "",
        test_fraction=task.test_fraction,
        split_seed=task.split_seed,
    )


@contextmanager
def open_site(
    path: str | Path, study: Study, passphrase: str | None = None, *, entropy: Entropy = os.urandom
) -> Iterator[SiteHost]:
    """Open all that a site has, from its own file: key, roster, policy, rows, ledger and state.

    Args:
        path: The site's file.
        study: The site's own copy.
        passphrase: Of its key, where that is encrypted.
        entropy: Source of keys, masks, rounding and privacy noise; the operating system's, but in tests.

    Raises:
        SecAggError: Any of it is missing, or does not fit the rest.
        LedgerError: Its ledger cannot be used.
    """
    file = load_site(path)
    if file.name not in study.site_names:
        raise SiteFileError(
            f"{path}: name: expected one of the study's sites {', '.join(study.site_names)}, got {file.name!r}"
        )
    with open_host(file, study, rows_of(study, file), passphrase, entropy=entropy) as host:
        yield host


@contextmanager
def open_host(
    file: SiteFile, study: Study, data: SiteData, passphrase: str | None = None, *, entropy: Entropy = os.urandom
) -> Iterator[SiteHost]:
    """The same as `open_site` where the site's file is read, and its rows are there already."""
    identity = file.load_identity(passphrase)
    with threads_for(build_model(study, len(data.features))), ExitStack() as opened:
        ledger = None
        if file.ledger is not None:
            ledger = opened.enter_context(
                open_ledger(file.ledger, site=file.name, identity=identity, roster=file.roster)
            )
        site = Site(study, file.name, identity, file.roster, data, policy=file.policy, ledger=ledger, entropy=entropy)
        store = opened.enter_context(file.state_file())
        journal = journal_of(file)
        if not store.load():
            with contextlib.suppress(OSError):
                write_journal(journal, [Entry(train_rows=data.train_rows, test_rows=data.test_rows)])
        yield SiteHost(site, store, roster_digest(file.roster), study, journal)


def serve(host: SiteHost, path: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Answer on a socket, one question after the other, until `stop` says so.

    Args:
        host: The site.
        path: Of the socket, made with mode 0660: whoever is in the group may pass messages on.
        stop: Asked a few times a second.

    Raises:
        ServiceError: There can be no socket of that name.
    """
    with _listening(path) as listening:
        while not stop():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(_PATIENCE)
                try:
                    _answer(host, connection)
                except (OSError, ServiceError) as error:  # they are gone; the state is safe, and they ask again
                    _tell(f"{host.site.name}: a question was not answered: {error}")


def _answer(host: SiteHost, connection: socket.socket) -> None:
    kind, body = receive(connection)
    if kind == HELLO:
        send(connection, ANSWER, host.hello())
        return
    if kind != MESSAGE:
        raise ServiceError(f"expected a question of kind {HELLO!r} or {MESSAGE!r}, got {kind!r}")
    try:
        reply = host.answer(body)
    except (SecAggError, DpError) as error:
        # Such as a full disk. Why is for the site's own log.
        _tell(f"{host.site.name}: {error}")
        send(connection, FAILED, b"")
        return
    send(connection, ANSWER, reply)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ServiceError(f"{path}: the path of a socket has at most {_LONGEST_PATH} bytes; name a shorter one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            if path.is_socket():
                # Of a process that was killed. One that runs holds the state's lock, so that this one is not here.
                path.unlink()
            listening.bind(str(path))
            path.chmod(0o660)
        except OSError as error:
            raise ServiceError(f"{path}: there can be no socket: {error.strerror or error}") from error
        listening.listen(8)
        listening.settimeout(0.2)
        try:
            yield listening
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
