"""The rows of a budget ledger as values: what one says, how it is chained and signed, and what all of them add up to.

Pure: no file, no clock, no key. A row holds a mechanism and never an epsilon alone: epsilons of several releases add up
to nothing useful. What signs and what verifies comes from outside, as callables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from dp.errors import LedgerError, ParameterError
from dp.mechanisms import Mechanism, PoissonSampledGaussian, Relation, Unit, check_count, check_positive

Sign: TypeAlias = Callable[[bytes], bytes]
"""The site's signature over a payload."""
Verify: TypeAlias = Callable[[str, bytes, bytes], bool]
"""`verify(site, payload, signature)`: whether that is the site's signature. False for a site that nobody knows."""
Release: TypeAlias = Literal["training", "statistic", "tuning"]
Kind: TypeAlias = Literal["open", "cap", "reserve", "commit", "receipt"]

_CHAIN = b"secagg ledger 1\n"
_START = "0" * 64  # what the first row names as the one before it
_LONGEST_TEXT = 200
_FARTHEST = 20  # how far a row may have been moved to be recognised


class Partition(Struct, frozen=True, kw_only=True):
    """Cohorts that share no record, because each takes other values of one and the same column.

    Attributes:
        column: The column. Its value must never change for a record or, where the unit is the patient, for a patient: a
            year of birth will do, the ward that someone is on will not.
        parts: For each cohort's name the values that it takes.

    Raises:
        ParameterError: A value comes in two parts, a part has none, or there are fewer than two parts.
    """

    column: str
    parts: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        _check_text("the partition's column", self.column)
        if len(self.parts) < 2:
            raise ParameterError(f"a partition should have at least 2 parts, has {len(self.parts)}")
        taken: dict[str, str] = {}
        for cohort, values in self.parts.items():
            _check_text("a part's cohort", cohort)
            if not values:
                raise ParameterError(f"the part {cohort!r} should take at least one value of {self.column}, takes none")
            for value in values:
                if value in taken:
                    raise ParameterError(
                        f"parts should share no value of {self.column}: {value!r} is in {taken[value]!r} and {cohort!r}"
                    )
                taken[value] = cohort


class Cap(Struct, frozen=True, kw_only=True):
    """The most that a site lets be spent on any one unit of its records, over all studies together.

    Attributes:
        epsilon: The largest epsilon, positive.
        delta: At which it is meant; at most 1 / records.
        relation: Under which it is meant.
        unit: Whose privacy is accounted.
        records: How many units there are, or a number that there are at least of.

    Raises:
        ParameterError: A field is out of its range.
    """

    epsilon: float
    delta: float
    relation: Relation
    unit: Unit
    records: int

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        check_count("records", self.records)
        check_delta(self.delta, self.records)
        if not isinstance(self.relation, Relation) or not isinstance(self.unit, Unit):
            raise ParameterError(f"expected a dp.Relation and a dp.Unit, got {self.relation!r} and {self.unit!r}")


class Receipt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The end of a site's ledger as it was once, signed by that site; kept by the others.

    A ledger that does not hold this row any more has been rolled back or replaced.

    Attributes:
        site: Whose ledger.
        ledger: Which one: drawn when it was made, 32 hexadecimal digits.
        sequence: Number of the last row.
        digest: Of that row, 64 hexadecimal digits. It stands for all rows before as well.
        signature: The site's, 128 hexadecimal digits.
    """

    site: str
    ledger: str
    sequence: int
    digest: str
    signature: str

    def signed_by(self, verify: Verify) -> bool:
        """Whether the signature is that of `site`."""
        try:
            signature = bytes.fromhex(self.signature)
        except ValueError:
            return False
        return verify(self.site, signed_payload(self.site, self.ledger, self.sequence, self.digest), signature)


class Row(Struct, frozen=True, kw_only=True):
    """One row, as it is stored. Its fields are the table's columns, in this order.

    Attributes:
        sequence: 1, 2, 3, ...
        time: When, in Unix seconds by the site's clock.
        kind: "open" is the first row, with the cap and the partition. "cap" is another cap. "reserve" charges a release
            before it is made, at its worst case. "commit" says what it was. "receipt" keeps the end of another ledger.
        site: Whose ledger.
        ledger: Which one.
        study: Name of the study, of "reserve" and "commit".
        study_digest: Of the study's configuration, in hexadecimal digits.
        cohort: Which records.
        release: What for: "training", "statistic" or "tuning".
        unit: Whose privacy.
        relation: What the study promises under; of "open", what the cap is meant under.
        delta: The same.
        epsilon: The same; None where a study promises none.
        mechanism: As canonical JSON with its kind.
        refers: Of "commit", the sequence number of its reservation; otherwise 0.
        reference: What the caller calls this release, to find the reservation again after a crash; may be empty.
        detail: JSON: of "open" the number of records and the partition, of "receipt" the receipt.
        previous: Digest of the row before.
        digest: Of everything above.
        signature: The site's, over site, ledger, sequence and digest.
    """

    sequence: int
    time: float
    kind: Kind
    site: str
    ledger: str
    study: str = ""
    study_digest: str = ""
    cohort: str = ""
    release: str = ""
    unit: str = ""
    relation: str = ""
    delta: float | None = None
    epsilon: float | None = None
    mechanism: str = ""
    refers: int = 0
    reference: str = ""
    detail: str = ""
    previous: str = _START
    digest: str = ""
    signature: str = ""

    def computed_digest(self) -> str:
        """The digest that belongs to the content."""
        content = [getattr(self, name) for name in COLUMNS if name not in ("digest", "signature")]
        return hashlib.sha256(_CHAIN + msgspec.json.encode(content)).hexdigest()

    def signed(self, sign: Sign) -> Row:
        """The row with its digest and the site's signature."""
        digest = self.computed_digest()
        signature = sign(signed_payload(self.site, self.ledger, self.sequence, digest)).hex()
        return msgspec.structs.replace(self, digest=digest, signature=signature)

    def receipt(self) -> Receipt:
        """The ledger's end, if this is the last row."""
        return Receipt(
            site=self.site, ledger=self.ledger, sequence=self.sequence, digest=self.digest, signature=self.signature
        )


COLUMNS: tuple[str, ...] = Row.__struct_fields__


class Opening(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The detail of a first row."""

    records: int
    partition: Partition | None


class Charge(Struct, frozen=True, kw_only=True):
    """One release in the account.

    Attributes:
        reserved: The row that charged it.
        planned: The mechanism there, the worst case.
        actual: What was committed, or None as long as nothing was.
    """

    reserved: Row
    planned: Mechanism
    actual: Mechanism | None = None

    @property
    def counted(self) -> Mechanism:
        """What the account counts: a release that was never committed may have been made, at its worst."""
        return self.planned if self.actual is None else self.actual


class Account:
    """What the rows so far add up to.

    Attributes:
        last: The last row.
        cap: In force now.
        partition: Declared in the first row, or None.
        charges: By the sequence number of the reservation, in order.
        receipts: The newest of each ledger of each other site.
    """

    def __init__(self) -> None:
        self.last: Row | None = None
        self.partition: Partition | None = None
        self.charges: dict[int, Charge] = {}
        self.receipts: dict[tuple[str, str], Receipt] = {}
        self.references: dict[tuple[str, str, str], int] = {}
        self._cap: Cap | None = None

    @property
    def cap(self) -> Cap:
        """In force now."""
        if self._cap is None:
            raise LedgerError("a ledger without a first row has no cap")
        return self._cap

    def apply(self, row: Row) -> None:
        """Take up the next row, without looking at digests and signatures.

        Raises:
            LedgerError: It says what cannot follow; the account is as before.
        """
        try:
            self._refuse_misplaced(row)
            getattr(self, f"_apply_{row.kind}")(row)
        except (ParameterError, msgspec.DecodeError) as error:
            raise LedgerError(f"row {row.sequence}: says what cannot be: {error}") from error
        self.last = row

    def together(self, cohort: str, relation: Relation) -> list[list[Charge]]:
        """The charges that may all have fallen on one and the same record of a cohort.

        Cohorts count as overlapping unless both are parts of the partition. A cohort that is no part may hold records
        of every part, so that there is a list for each. Under replace-one all overlap: a record replaced may move
        from one part to another, and then both releases change.
        """
        every = list(self.charges.values())
        parts = frozenset(self.partition.parts) if self.partition is not None else frozenset()
        if not parts or relation is Relation.REPLACE_ONE:
            return [every]
        met = [cohort] if cohort in parts else sorted(parts)
        return [[c for c in every if c.reserved.cohort == part or c.reserved.cohort not in parts] for part in met]

    def _refuse_misplaced(self, row: Row) -> None:
        _check_text("site", row.site)
        for name in ("study", "study_digest", "cohort", "unit", "reference"):
            _check_text(name, getattr(row, name), least=0)
        if not math.isfinite(row.time):
            raise ParameterError(f"time should be a finite number of seconds, is {row.time!r}")
        if self.last is None:
            if row.kind != "open":
                raise LedgerError(f"row {row.sequence}: expected a first row of kind open, got {row.kind}")
            return
        if row.kind == "open":
            raise LedgerError(f"row {row.sequence}: a second first row")
        if (row.site, row.ledger) != (self.last.site, self.last.ledger):
            raise LedgerError(
                f"row {row.sequence}: is of another ledger: of {row.site!r}, {row.ledger[:8]!r}, and the rows before "
                f"are of {self.last.site!r}, {self.last.ledger[:8]!r}"
            )
        if row.time < self.last.time:
            raise LedgerError(
                f"row {row.sequence}: the clock ran backwards, by {self.last.time - row.time:.3f} seconds since row "
                f"{self.last.sequence}"
            )

    def _apply_open(self, row: Row) -> None:
        opening = msgspec.json.decode(row.detail, type=Opening)
        self._cap = Cap(
            epsilon=_given(row.epsilon),
            delta=_given(row.delta),
            relation=_relation(row),
            unit=_unit(row),
            records=opening.records,
        )
        self.partition = opening.partition

    def _apply_cap(self, row: Row) -> None:
        self._cap = msgspec.structs.replace(self.cap, epsilon=_given(row.epsilon))

    def _apply_reserve(self, row: Row) -> None:
        _check_text("study", row.study)
        _check_text("cohort", row.cohort)
        if row.release not in ("training", "statistic", "tuning"):
            raise ParameterError(f"release should be training, statistic or tuning, is {row.release!r}")
        mechanism = decode_mechanism(row.mechanism)
        if row.unit != unit_of(mechanism).value:
            raise ParameterError(f"unit should be {unit_of(mechanism).value!r}, the mechanism's, is {row.unit!r}")
        if self.cap.unit is Unit.PARTICIPANT and unit_of(mechanism) is Unit.RECORD:
            raise ParameterError(
                "the ledger accounts for participants, and a mechanism that hides a record says nothing of them"
            )
        _relation(row)
        check_delta(_given(row.delta), self.cap.records)
        if row.epsilon is not None:
            check_positive("epsilon", row.epsilon)
        key = row.study_digest, row.cohort, row.reference
        if row.reference and key in self.references:
            raise LedgerError(f"row {row.sequence}: reserves {row.reference!r} a second time")
        self.charges[row.sequence] = Charge(reserved=row, planned=mechanism)
        if row.reference:
            self.references[key] = row.sequence

    def _apply_commit(self, row: Row) -> None:
        charge = self.charges.get(row.refers)
        if charge is None:
            raise LedgerError(f"row {row.sequence}: commits row {row.refers}, which is no reservation")
        if charge.actual is not None:
            raise LedgerError(f"row {row.sequence}: commits row {row.refers} a second time")
        changed = [name for name in KEPT_BY_COMMIT if getattr(row, name) != getattr(charge.reserved, name)]
        if changed:
            raise LedgerError(f"row {row.sequence}: has another {', '.join(changed)} than row {row.refers}")
        actual = decode_mechanism(row.mechanism)
        if unit_of(actual) is not unit_of(charge.planned):
            raise LedgerError(f"row {row.sequence}: commits a release that hides another unit than row {row.refers}")
        self.charges[row.refers] = msgspec.structs.replace(charge, actual=actual)

    def _apply_receipt(self, row: Row) -> None:
        receipt = msgspec.json.decode(row.detail, type=Receipt)
        _check_text("the receipt's site", receipt.site)
        self.receipts[receipt.site, receipt.ledger] = receipt


KEPT_BY_COMMIT = (
    "study",
    "study_digest",
    "cohort",
    "release",
    "unit",
    "relation",
    "delta",
    "epsilon",
    "reference",
)


def signed_payload(site: str, ledger: str, sequence: int, digest: str) -> bytes:
    """What a site signs for each row, and what makes a receipt."""
    return msgspec.json.encode([site, ledger, sequence, digest])


def encode_mechanism(mechanism: object) -> str:
    """A mechanism as canonical JSON, with its kind.

    Raises:
        ParameterError: It is none that could be read back.
    """
    try:
        # There and back, so that a whole number given for a float is written as a float.
        back: Mechanism = msgspec.json.decode(msgspec.json.encode(mechanism), type=Mechanism)
    except (TypeError, msgspec.MsgspecError) as error:
        raise ParameterError(f"expected a mechanism of dp.mechanisms, got {mechanism!r}") from error
    if back != mechanism:
        raise ParameterError(f"expected a mechanism of dp.mechanisms, got {mechanism!r}")
    return msgspec.json.encode(back, order="sorted").decode()


def decode_mechanism(text: str) -> Mechanism:
    """A mechanism from its canonical JSON.

    Raises:
        ParameterError: It is none, or not in the one form that it is written in.
    """
    try:
        mechanism: Mechanism = msgspec.json.decode(text, type=Mechanism)
    except msgspec.MsgspecError as error:
        raise ParameterError(f"not a mechanism that is known here: {error}") from error
    if msgspec.json.encode(mechanism, order="sorted").decode() != text:
        raise ParameterError("a mechanism should be written as canonical JSON, with all its fields and no others")
    return mechanism


def row_from(values: Mapping[str, object], number: object) -> Row:
    """A row from what the database holds.

    Raises:
        LedgerError: A column is of another type.
    """
    try:
        return msgspec.convert(dict(values), Row)
    except msgspec.ValidationError as error:
        raise LedgerError(f"row {number!r}: damaged or edited: {error}") from error


def check_row(row: Row, before: Row | None, verify: Verify) -> None:
    """Refuse a row that is not the next of the chain, or is not as the site signed it.

    Raises:
        LedgerError: The message tells what was done to it, as far as that shows.
    """
    number, expected = row.sequence, 1 if before is None else before.sequence + 1
    if number != expected:
        missing = (
            f"row {expected} is missing" if number == expected + 1 else f"rows {expected} to {number - 1} are missing"
        )
        raise LedgerError(f"{missing}: row {number} comes after row {expected - 1}")
    if row.computed_digest() != row.digest:
        for was in range(max(1, number - _FARTHEST), number + _FARTHEST):
            if msgspec.structs.replace(row, sequence=was).computed_digest() == row.digest:
                raise LedgerError(f"row {number}: moved or renumbered: it was row {was}")
        raise LedgerError(f"row {number}: edited: its content is not the one that its digest was taken of")
    if row.previous != (_START if before is None else before.digest):
        raise LedgerError(
            f"row {number}: does not follow on row {number - 1}: one of the two was inserted, moved or written anew"
        )
    if not row.receipt().signed_by(verify):
        raise LedgerError(f"row {number}: not signed with the key of {row.site!r}: edited, inserted or another's")


def check_delta(delta: float, records: int) -> None:
    """Refuse a delta that is no probability, or at which losing one record outright would be allowed.

    Raises:
        ParameterError: It is not more than 0, is 1 or more, or is above 1 / records.
    """
    check_positive("delta", delta)
    if delta >= 1.0:
        raise ParameterError(f"delta should be less than 1, is {delta!r}")
    if delta * records > 1.0:
        raise ParameterError(
            f"delta should be at most 1/{records}, one over the number of records, is {delta!r}: above it, releasing a "
            "record in full would keep to the guarantee"
        )


def mechanisms_of(charges: Iterable[Charge]) -> tuple[Mechanism, ...]:
    """What the account counts of these charges."""
    return tuple(charge.counted for charge in charges)


def unit_of(mechanism: Mechanism) -> Unit:
    """Whose presence a mechanism hides."""
    return Unit.RECORD if isinstance(mechanism, PoissonSampledGaussian) else mechanism.unit


def _relation(row: Row) -> Relation:
    try:
        return Relation(row.relation)
    except ValueError as error:
        raise ParameterError(f"relation should be one of {', '.join(Relation)}, is {row.relation!r}") from error


def _unit(row: Row) -> Unit:
    try:
        return Unit(row.unit)
    except ValueError as error:
        raise ParameterError(f"unit should be one of {', '.join(Unit)}, is {row.unit!r}") from error


def _given(value: float | None) -> float:
    if value is None:
        raise ParameterError("epsilon and delta should be given")
    return value


def _check_text(name: str, text: str, least: int = 1) -> None:
    # It is shown on terminals and in tables of people who do not trust who wrote it.
    if not isinstance(text, str) or not least <= len(text) <= _LONGEST_TEXT or not text.isprintable():
        raise ParameterError(f"{name} should be {least} to {_LONGEST_TEXT} printable characters, is {text!r}")
