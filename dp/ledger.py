"""A site's privacy budget on disk: charged before anything is trained, and never less than what was spent.

A release is paid for in three steps: reserve it at its worst case, run it, commit what it was. A process that is killed
anywhere in between leaves the reservation, which counts in full. Rows are only ever added; each holds the digest of the
one before and is signed with the site's key. What the chain cannot show by itself, that an older copy was put back and
rows at its end are gone, shows against the receipts that other sites keep.

    with Ledger.open(path, site="north", sign=sign, verify=verify) as ledger:
        reservation = ledger.reserve(worst_case, study="heart", ..., time=now)
        ...  # train, and send
        ledger.commit(reservation, what_was_released, time=later)

The file is SQLite in WAL mode with full synchronisation, for a local disk: SQLite's locks do not hold on most network
file systems.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec import Struct

from dp.accounting import Budget, Spent, spent
from dp.errors import LedgerError, ParameterError
from dp.ledger_rows import (
    KEPT_BY_COMMIT,
    Account,
    Cap,
    Charge,
    Kind,
    Opening,
    Partition,
    Receipt,
    Release,
    Row,
    Sign,
    Verify,
    check_row,
    encode_mechanism,
    mechanisms_of,
    unit_of,
)
from dp.ledger_store import DAMAGED, connect, highest, insert, make, missing_at_the_end, rows_after, told
from dp.mechanisms import Mechanism, Relation

__all__ = ["Cap", "Ledger", "Partition", "Receipt", "Release", "Reservation"]

_NOT_ABOVE = 1e-3  # by how much a committed release may seem to cost more than its reservation: the grids


class Reservation(Struct, frozen=True, kw_only=True):
    """A release that is paid for.

    Attributes:
        sequence: Number of its row; enough to commit it.
        mechanism: What was reserved, the worst case.
    """

    sequence: int
    mechanism: Mechanism


class Ledger:
    """A site's open ledger; made by `create` and `open`. Several processes may have it open, and take turns.

    Args:
        path: The file.
        site: Whose it is.
        sign: Signs with the site's key.
        verify: Checks a site's signature, this one's and the others'.
        patience: Seconds to wait for another process that is writing.
    """

    def __init__(self, path: Path, site: str, sign: Sign, verify: Verify, patience: float) -> None:
        self.path = path
        self.site = site
        self._sign = sign
        self._verify = verify
        self._account = Account()
        self._database = connect(path, patience)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        site: str,
        sign: Sign,
        cap: Cap,
        time: float,
        partition: Partition | None = None,
    ) -> None:
        """Make a site's ledger, once. Afterwards a ledger that is not there is an error.

        Args:
            path: Of the file, which must not be there yet; made whole or not at all, with mode 0600.
            site: Whose it is.
            sign: Signs with the site's key.
            cap: The most that may be spent.
            time: Now, in Unix seconds.
            partition: Cohorts that are disjoint. This is the only time to declare them.

        Raises:
            LedgerError: There is something of that name, or it could not be written.
        """
        first = Row(
            sequence=1,
            time=float(time),
            kind="open",
            site=site,
            ledger=os.urandom(16).hex(),
            unit=cap.unit,
            relation=cap.relation.value,
            delta=float(cap.delta),
            epsilon=float(cap.epsilon),
            detail=msgspec.json.encode(Opening(records=cap.records, partition=partition)).decode(),
        )
        Account().apply(first)
        make(Path(path), first.signed(sign))

    @classmethod
    def open(cls, path: str | Path, *, site: str, sign: Sign, verify: Verify, patience: float = 60.0) -> Ledger:
        """Open a site's ledger, and check all of it: the chain, the signatures, whose it is.

        Args:
            path: The file.
            site: Whose it should be.
            sign: Signs with the site's key.
            verify: Checks a site's signature, this one's and the others'.
            patience: Seconds to wait for another process that is writing; it may be accounting for some of them.

        Returns:
            The ledger, to be used with `with`.

        Raises:
            LedgerError: It is missing, damaged, edited, or another site's.
            LedgerLocked: Another process holds it for longer than that.
        """
        ledger = cls(Path(path), site, sign, verify, patience)
        try:
            ledger._catch_up()
            ledger._refuse_another_site()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. What was reserved and not committed stays charged."""
        self._database.close()

    @property
    def cap(self) -> Cap:
        """The most that may be spent."""
        self._catch_up()
        return self._account.cap

    def reserve(
        self,
        mechanism: Mechanism,
        *,
        study: str,
        study_digest: bytes,
        cohort: str,
        release: Release,
        relation: Relation,
        delta: float,
        time: float,
        epsilon: float | None = None,
        budget: Budget | None = None,
        reference: str = "",
    ) -> Reservation:
        """Charge a release before it is made; it may be made when this has returned, and not before.

        Args:
            mechanism: The release at its worst: with as few survivors as it would still be made with.
            study: Name of the study.
            study_digest: Of its configuration.
            cohort: Which records, by a name. Two cohorts count as overlapping unless both were declared disjoint when
                the ledger was made.
            release: What for.
            relation: What the study promises under.
            delta: At which the study promises.
            time: Now, in Unix seconds; not before the last row's.
            epsilon: What all of the study's releases together may cost under that relation and delta, or None.
            budget: A further limit, beside the ledger's cap, on all that the ledger holds; or None. It is not recorded.
            reference: A name for this release within study and cohort. Asking again under it gives the same
                reservation, for a process that was killed and does the same once more. Only for what comes out the same
                to the byte when it is done again; without one, every call is charged.

        Returns:
            The reservation, to commit.

        Raises:
            BudgetExceeded: The site's cap, the budget or the study's epsilon would be exceeded. Nothing is written.
            ParameterError: A number is out of its range, delta is above one over the records, or another unit
                than the ledger's.
            LedgerError: The clock ran backwards, the ledger was changed by other hands, the reference is taken by
                another mechanism, or it could not be written; then nothing was.
            LedgerLocked: Another process is writing.
        """
        if not isinstance(relation, Relation):
            raise ParameterError(f"relation should be a dp.Relation, is {relation!r}")
        text = encode_mechanism(mechanism)
        with self._writing():
            row = msgspec.structs.replace(
                self._next("reserve", time),
                study=study,
                study_digest=study_digest.hex(),
                cohort=cohort,
                release=release,
                unit=unit_of(mechanism).value,
                relation=relation.value,
                delta=float(delta),
                epsilon=None if epsilon is None else float(epsilon),
                mechanism=text,
                reference=reference,
            )
            taken = self._account.references.get((row.study_digest, cohort, reference)) if reference else None
            if taken is not None:
                charge = self._account.charges[taken]
                before = charge.reserved
                if any(getattr(before, name) != getattr(row, name) for name in (*KEPT_BY_COMMIT, "mechanism")):
                    raise LedgerError(
                        f"{self.path}: row {taken} has reserved {reference!r} for another release; what is done again "
                        "under a reference must be the same"
                    )
                return Reservation(sequence=taken, mechanism=charge.planned)
            self._refuse_above(row, mechanism, budget)
            self._append(row)
        return Reservation(sequence=row.sequence, mechanism=mechanism)

    def commit(self, reservation: Reservation | int, actual: Mechanism, *, time: float) -> None:
        """Say what a reserved release was; from then on it counts at that.

        Committing the same again changes nothing.

        Args:
            reservation: From `reserve`, or its sequence number.
            actual: What was released. No steps say that nothing has left the site.
            time: Now, in Unix seconds.

        Raises:
            LedgerError: There is no such reservation, it was committed as something else, or this could not be written:
                it counts at its worst then. Or it costs more than was reserved: that is written, because it has
                happened, and the account counts it in full.
            LedgerLocked: Another process is writing.
        """
        number = reservation if isinstance(reservation, int) else reservation.sequence
        text = encode_mechanism(actual)
        with self._writing():
            charge = self._account.charges.get(number)
            if charge is None:
                raise LedgerError(f"{self.path}: row {number} is no reservation")
            if charge.actual is not None:
                if charge.actual != actual:
                    raise LedgerError(f"{self.path}: row {number} was committed as {charge.actual}, not as {actual}")
                return
            kept = {name: getattr(charge.reserved, name) for name in KEPT_BY_COMMIT}
            row = self._next("commit", time)
            self._append(msgspec.structs.replace(row, mechanism=text, refers=number, **kept))
        if costs_more(charge, actual, self._account.cap):
            raise LedgerError(
                f"{self.path}: row {row.sequence}: the release cost more than row {number} had reserved for it. It is "
                "recorded and counted as it was; the reservation was not its worst case"
            )

    def set_cap(self, epsilon: float, *, time: float) -> None:
        """Put another cap in force, in a row that an auditor sees. Equal to the one in force, nothing is written.

        Args:
            epsilon: The largest, under the ledger's own delta and relation. Below what is spent it stops all releases.
            time: Now, in Unix seconds.

        Raises:
            ParameterError: Epsilon is not a positive number.
            LedgerError, LedgerLocked: It could not be written.
        """
        with self._writing():
            if self._account.cap.epsilon != epsilon:
                self._append(msgspec.structs.replace(self._next("cap", time), epsilon=float(epsilon)))

    def head(self) -> Receipt:
        """The ledger's end as a receipt, for the other sites to keep.

        Raises:
            LedgerError, LedgerLocked: It could not be read.
        """
        self._catch_up()
        return self._last.receipt()

    def require(self, receipt: Receipt) -> None:
        """Refuse to go on with a ledger that is behind an earlier receipt of its own.

        Args:
            receipt: Of this ledger, kept anywhere else or echoed by another site.

        Raises:
            LedgerError: The receipt is not of this site's making; or the ledger does not hold the row: it was rolled
                back or replaced.
        """
        if not receipt.signed_by(self._verify):
            raise LedgerError(f"{self.path}: the receipt for row {receipt.sequence} is not signed by {receipt.site!r}")
        self._catch_up()
        with told(self.path):
            found = self._database.execute(
                "SELECT site, ledger, digest FROM row WHERE sequence = ?", (receipt.sequence,)
            ).fetchone()
        if found is None or tuple(found) != (receipt.site, receipt.ledger, receipt.digest):
            raise LedgerError(
                f"{self.path}: there is a receipt for row {receipt.sequence} of {receipt.site!r}, and the ledger "
                f"ends at row {self._last.sequence} or has another row there: an older copy was put back, or another "
                "ledger was begun; put the newest copy back"
            )

    def record_receipts(self, receipts: Iterable[Receipt], *, time: float) -> None:
        """Keep the ends of other sites' ledgers. What is older than, or equal to, what is kept already is left out.

        Args:
            receipts: As they came with the others' messages.
            time: Now, in Unix seconds.

        Raises:
            LedgerError: A receipt is not signed by its site, or is one's own; none are kept then. Or two different
                receipts for the same row are signed, which are kept: that site's ledger has two pasts.
        """
        receipts = sorted(receipts, key=lambda r: (r.site, r.ledger, r.sequence))
        for receipt in receipts:
            if receipt.site == self.site:
                raise LedgerError(f"{self.path}: a receipt of this site's own ledger is not kept in it; see `require`")
            if not receipt.signed_by(self._verify):
                raise LedgerError(
                    f"{self.path}: a receipt for row {receipt.sequence} is not signed by {receipt.site!r}"
                )
        forked: list[str] = []
        with self._writing():
            for receipt in receipts:
                kept = self._account.receipts.get((receipt.site, receipt.ledger))
                if kept is not None and kept.sequence == receipt.sequence and kept.digest != receipt.digest:
                    forked.append(f"row {receipt.sequence} of {receipt.site!r}")
                elif kept is not None and kept.sequence >= receipt.sequence:
                    # A server that sends an old message again must not make a site look as if it had rolled back.
                    continue
                detail = msgspec.json.encode(receipt).decode()
                self._append(msgspec.structs.replace(self._next("receipt", time), detail=detail))
        if forked:
            raise LedgerError(
                f"{self.path}: two different receipts are signed for {forked[0]}: that ledger was rolled back and went "
                "on differently, or was copied; both are kept"
            )

    def spent(self, cohort: str) -> Spent:
        """What has been spent on the records of a cohort, whatever of it is not committed at its worst.

        Args:
            cohort: Its name.

        Returns:
            The largest over the records that may be in it, under the cap's delta and relation.
        """
        self._catch_up()
        return spent_on(self._account, cohort)

    @property
    def _last(self) -> Row:
        if self._account.last is None:
            raise LedgerError(f"{self.path}: holds no row; {DAMAGED}")
        return self._account.last

    def _refuse_another_site(self) -> None:
        if self._last.site != self.site:
            raise LedgerError(f"{self.path}: is the ledger of {self._last.site!r}, expected that of {self.site!r}")

    def _next(self, kind: Kind, time: float) -> Row:
        """The row that comes next, with nothing in it yet."""
        last = self._last
        if not time >= last.time:
            raise LedgerError(
                f"{self.path}: the clock ran backwards: it says {time:.3f}, and row {last.sequence} was written at "
                f"{last.time:.3f}; set the clock right, or wait until it is past that"
            )
        return Row(
            sequence=last.sequence + 1,
            time=float(time),
            kind=kind,
            site=last.site,
            ledger=last.ledger,
            previous=last.digest,
        )

    def _append(self, row: Row) -> None:
        row = row.signed(self._sign)
        if not row.receipt().signed_by(self._verify):
            raise LedgerError(f"{self.path}: the key at hand is not that of {self.site!r}")
        try:
            self._account.apply(row)
        except LedgerError as error:
            if isinstance(error.__cause__, ParameterError):
                raise error.__cause__ from None
            raise LedgerError(f"{self.path}: {error}") from error
        insert(self._database, row)

    def _refuse_above(self, row: Row, mechanism: Mechanism, further: Budget | None) -> None:
        """Refuse a release above the site's cap, above a further budget, or above its study's own epsilon."""
        cap = self._account.cap
        limits = [(Budget(epsilon=cap.epsilon, delta=cap.delta, relation=cap.relation), "")]
        if further is not None:
            limits.append((further, ""))
        if row.epsilon is not None and row.delta is not None:
            own = Budget(epsilon=row.epsilon, delta=row.delta, relation=Relation(row.relation))
            limits.append((own, row.study_digest))
        for budget, study in limits:
            for group in self._account.together(row.cohort, budget.relation):
                so_far = mechanisms_of(c for c in group if not study or c.reserved.study_digest == study)
                budget.require(so_far, mechanism)

    def _catch_up(self) -> None:
        """Read what was written since, by this process or another, and check it."""
        before = self._account.last
        with told(self.path), self._one_moment():
            if before is not None:
                query = "SELECT digest FROM row WHERE sequence = ?"
                kept = self._database.execute(query, (before.sequence,)).fetchone()
                if kept is None or kept["digest"] != before.digest:
                    raise LedgerError(f"{self.path}: row {before.sequence} was changed since it was read; {DAMAGED}")
            try:
                for row in rows_after(self._database, 0 if before is None else before.sequence):
                    check_row(row, self._account.last, self._verify)
                    self._account.apply(row)
            except LedgerError as error:
                raise LedgerError(f"{self.path}: {error}") from error
            given = highest(self._database)
        if given > self._last.sequence:
            raise LedgerError(f"{self.path}: {missing_at_the_end(self._last.sequence, given)}; {DAMAGED}")

    @contextlib.contextmanager
    def _one_moment(self) -> Iterator[None]:
        """All that is read inside is of one moment, whoever writes meanwhile."""
        if self._database.in_transaction:
            yield
            return
        self._database.execute("BEGIN")
        try:
            yield
        finally:
            self._database.execute("ROLLBACK")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer's turn. Whatever is raised inside, nothing of it is written."""
        with told(self.path):
            self._database.execute("BEGIN IMMEDIATE")
        before = self._account.last
        try:
            self._catch_up()
            before = self._account.last
            with told(self.path):
                yield
                self._database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            if self._account.last is not before:
                self._account = Account()  # took up what is not written after all; read afresh when next asked
            raise


def spent_on(account: Account, cohort: str) -> Spent:
    """What has been spent on the records of a cohort: the largest over those that may be in it."""
    cap = account.cap
    costs = (spent(mechanisms_of(group), cap.delta, cap.relation) for group in account.together(cohort, cap.relation))
    return max(costs, key=lambda cost: cost.epsilon)


def costs_more(charge: Charge, actual: Mechanism, cap: Cap) -> bool:
    """Whether a release came out dearer than it was reserved, at the cap's delta or well below it."""
    if actual == charge.planned:
        return False
    for delta in (cap.delta, cap.delta * 1e-3):
        planned, came = (spent([m], delta, cap.relation) for m in (charge.planned, actual))
        if came.epsilon > planned.epsilon + _NOT_ABOVE or came.epsilon_rdp > planned.epsilon_rdp + _NOT_ABOVE:
            return True
    return False
