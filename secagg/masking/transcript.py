"""What an active session leaves for others to check: who signed what, round by round.

The server writes a `Record` of every sum that it opened, made of what the participants signed on the way. A record's
digest goes into the subject of the next sum, so that the participants of a round sign what they were shown of the past;
at the end they sign the digest of the last record (`Closing`). `examine` checks all of it against a roster, offline and
without trust in whoever wrote it.

It shows, for each record, that at least t participants of the roster signed its parameters, survivors and subject, and
that all of it, the digest of the sum included, was settled before they masked a vector for the next record, or signed
the end. While at most n - t participants help the server, no other survivors were signed by t in such a round, and so
the others gave shares for none; and where each of the others signs one end only, no other transcript of that study
holds, but for signatures at the end beyond the t that it needs: those can be left out unnoticed.

Participants sign the digest of a past that they cannot see. So it does not show that a sum was opened or is the right
one, what anyone's vector was, or that no sum was left out: the server can call any lost, and end with any record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar, cast

from msgspec import Meta, Struct

from secagg.errors import DecodeError, SecAggError
from secagg.keys import Identity, Roster, verify
from secagg.masking.client import keys_payload, survivors_payload
from secagg.masking.messages import Advertisement, Commitment, Confirmation
from secagg.masking.params import Mode, Params, Session, Subject, Terms, differences, least_threshold
from secagg.masking.server import Opened
from secagg.prg import Label, domain
from secagg.wire import Counter, Digest, Message, Number, Signature, decode_any, encode

E = TypeVar("E")
NO_RECORD = bytes(32)
"""Stands for the record before the first."""
# Who forges a transcript must not fill the examiner's memory.
_MOST_PROBLEMS = 100


class Record(Message, frozen=True, tag=True):
    """One opened sum.

    Attributes:
        threshold: t.
        mode: "active": nothing else is signed.
        suite: The primitives.
        context: Digest of the study's configuration.
        round: Number of the round.
        subject: What was summed.
        directory: U1, with the keys that each signed.
        commitments: U2, with the commitment that each signed.
        survivors: U3, in ascending order.
        confirmations: U4, with the signature of each over subject and survivors.
        sum_digest: SHA-256 of the opened sum, packed to the ring's bits.
    """

    threshold: Counter
    mode: Mode
    suite: Annotated[str, Meta(max_length=64)]
    context: Digest
    round: Counter
    subject: Subject
    directory: dict[Number, Advertisement]
    commitments: dict[Number, Commitment]
    survivors: Annotated[tuple[Number, ...], Meta(max_length=1 << 16)]
    confirmations: dict[Number, Confirmation]
    sum_digest: Digest

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the record, and through `subject.previous` for all before it."""
        return hashlib.sha256(domain(Label.RECORD, b"") + encode(self)).digest()


class Closing(Message, frozen=True, tag=True):
    """The end of a transcript: the digest of its last record, signed by those who were there at the end."""

    context: Digest
    head: Digest
    signatures: dict[Number, Signature]


class Findings(Struct, frozen=True):
    """What came of examining a transcript.

    Attributes:
        records: The opened sums, in order.
        closing: The end, or None where it is missing.
        problems: What is wrong, each in a sentence that says where; empty where all is well.
    """

    records: tuple[Record, ...]
    closing: Closing | None
    problems: tuple[str, ...]


def record(opened: Opened) -> Record:
    """The record of an opened sum."""
    session, subject = opened.session, opened.subject
    return Record(
        threshold=session.params.threshold,
        mode=session.params.mode,
        suite=session.params.suite,
        context=session.context,
        round=session.round,
        subject=subject,
        directory=opened.directory,
        commitments=opened.commitments,
        survivors=tuple(sorted(opened.survivors)),
        confirmations=opened.confirmations,
        sum_digest=hashlib.sha256(subject.ring.pack(opened.total)).digest(),
    )


def sign_head(identity: Identity, context: bytes, head: bytes) -> bytes:
    """A participant's signature at the end: this is the last record that it was shown."""
    return identity.sign(Label.SIGN_TRANSCRIPT, context, head)


def verify_head(public: bytes, signature: bytes, context: bytes, head: bytes) -> bool:
    """Whether `signature` is `public`'s over the end of a transcript."""
    return verify(public, signature, Label.SIGN_TRANSCRIPT, context, head)


def write(entries: list[Record | Closing]) -> bytes:
    """The bytes of a transcript: before each entry its length, 4 bytes, big-endian."""
    encoded = [encode(entry) for entry in entries]
    return b"".join(len(each).to_bytes(4, "big") + each for each in encoded)


def read(data: bytes) -> list[Record | Closing]:
    """The entries of a transcript.

    Raises:
        DecodeError: Cut off, or not a transcript; the message says at which entry and byte.
    """
    return list(_entries(data))


def examine(data: bytes, roster: Roster) -> Findings:
    """Check a transcript against a roster.

    Whatever follows on the end, or on a hundred problems, is not looked at.

    Args:
        data: As `write` made it.
        roster: The participants' keys, from where the examiner trusts them to be right.

    Raises:
        DecodeError: Not a transcript at all, or cut off in an entry.
    """
    records, digests, problems = list[Record](), list[bytes](), list[str]()
    entries = _entries(data)
    for entry in entries:
        if isinstance(entry, Closing):
            at_end = _problems_at_end(entry, next(entries, None), records, digests, roster)
            problems += [*_problems_of_order(records, digests), *(f"the end: {problem}" for problem in at_end)]
            return Findings(tuple(records), entry, tuple(problems))
        problems += [f"round {entry.round}: {problem}" for problem in _problems(entry, roster)]
        records.append(entry)
        digests.append(entry.digest)
        if len(problems) >= _MOST_PROBLEMS:
            problems.append(f"round {entry.round}: so much is wrong up to here that nothing behind it was examined")
            return Findings(tuple(records), None, tuple(problems))
    problems += _problems_of_order(records, digests)
    if not records:
        problems.append("the transcript is empty")
    problems.append("the end: it is missing: the transcript was cut short, or its study never came to an end")
    return Findings(tuple(records), None, tuple(problems))


def _entries(data: bytes) -> Iterator[Record | Closing]:
    start = number = 0
    while start < len(data):
        where = f"entry {number} of the transcript, at byte {start}"
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            raise DecodeError(f"{where}: cut off: {len(data) - start} bytes are left, {end - start} were expected")
        try:
            yield cast(Record | Closing, decode_any(data[start + 4 : end], Record | Closing))
        except DecodeError as error:
            raise DecodeError(f"{where}: {error}") from error
        start, number = end, number + 1


def _problems(entry: Record, roster: Roster) -> list[str]:
    """Everything wrong inside one record, most telling first."""
    if entry.mode != "active":
        if entry.confirmations or any(ad.signature for ad in entry.directory.values()):
            return ["it says semi-honest, where nothing is signed, and holds signatures: the mode was changed"]
        return ["the session was semi-honest: nothing in it is signed, so there is nothing to check"]
    try:
        params = Params(roster, entry.threshold, entry.mode, entry.suite)
        session = Session(params, entry.context, entry.round)
    except SecAggError as error:
        return [f"the parameters are none that this roster can have had: {error}"]
    # What comes after the keys is judged by what they were signed for: a record that says another round or threshold
    # than its participants is told once, and not by every signature in it.
    told = {ad.terms for ad in entry.directory.values()}
    sid = told.pop().session_id if len(told) == 1 else session.id
    return [
        *_problems_of_sets(entry, session),
        *_problems_of_keys(entry, session),
        *_problems_of_commitments(entry, session, sid),
        *_problems_of_confirmations(entry, session, sid),
    ]


def _problems_of_sets(entry: Record, session: Session) -> list[str]:
    survivors = frozenset(entry.survivors)
    sets = {
        "those who advertised keys": frozenset(entry.directory),
        "those who shared them": frozenset(entry.commitments),
        "the survivors": survivors,
        "those who confirmed": frozenset(entry.confirmations),
    }
    problems, before, outer = [], "the roster", frozenset(range(len(session.params.roster)))
    for name, members in sets.items():
        if not members <= outer:
            problems.append(f"{_names(session, members - outer)} among {name} but not in {before}")
        if len(members) < session.params.threshold:
            problems.append(f"{name} are {len(members)}, and the threshold is {session.params.threshold}")
        before, outer = name, members
    if list(entry.survivors) != sorted(survivors):
        problems.append("the survivors are not in ascending order, or one comes twice")
    return problems


def _problems_of_keys(entry: Record, session: Session) -> list[str]:
    problems, failed, terms = [], list[int](), session.terms
    others: dict[Terms, list[int]] = {}
    for u, ad in _on_roster(entry.directory, session):
        payload = keys_payload(u, ad.channel_key, ad.mask_key)
        if not _signed(session, u, ad.signature, Label.SIGN_KEYS, ad.terms.session_id, payload):
            failed.append(u)
        elif ad.terms != terms:
            others.setdefault(ad.terms, []).append(u)
    if failed:
        problems.append(
            f"the keys of {_names(session, failed)} are not signed under this roster: they were changed, or the roster "
            "has another name or key than the one that was used"
        )
    for told, members in others.items():
        problems.append(f"{_names(session, members)} made keys for {_told_apart(told, terms, session)}")
    owners: dict[bytes, set[int]] = {}
    for u, ad in entry.directory.items():
        for key in (ad.channel_key, ad.mask_key):
            owners.setdefault(key, set()).add(u)
    if len(owners) != 2 * len(entry.directory):
        shared = [u for u, ad in entry.directory.items() if ad.channel_key == ad.mask_key]
        shared += [u for us in owners.values() if len(us) > 1 for u in us]
        problems.append(f"a public key comes twice, at {_names(session, shared)}")
    return problems


def _problems_of_commitments(entry: Record, session: Session, sid: bytes) -> list[str]:
    failed = [
        u
        for u, committed in _on_roster(entry.commitments, session)
        if not _signed(session, u, committed.signature, Label.SIGN_COMMITMENT, sid, committed.digest)
    ]
    return [f"the commitments of {_names(session, failed)} are not signed by them for this session"] if failed else []


def _problems_of_confirmations(entry: Record, session: Session, sid: bytes) -> list[str]:
    problems, failed, payload = [], list[int](), survivors_payload(entry.survivors)
    others: dict[Subject, list[int]] = {}
    for u, confirmation in _on_roster(entry.confirmations, session):
        if confirmation.subject != entry.subject:
            others.setdefault(confirmation.subject, []).append(u)
        sum_id = confirmation.subject.sum_id(sid)
        if not _signed(session, u, confirmation.signature, Label.SIGN_SURVIVORS, sum_id, payload):
            failed.append(u)
    for subject, members in others.items():
        told = differences(entry.subject, subject)
        problems.append(f"{_names(session, members)} confirmed something else: the record has {told}")
    if failed and len(failed) == len(entry.confirmations):
        problems.append(
            f"nobody's signature fits the survivors {_names(session, entry.survivors)} and what was summed: other "
            "survivors were signed, or something else was summed"
        )
    elif failed:
        problems.append(f"{_names(session, failed)} did not sign these survivors and this subject")
    return problems


def _problems_of_order(records: list[Record], digests: list[bytes]) -> list[str]:
    """Where records do not follow on each other."""
    problems = []
    rounds = {digest: entry.round for entry, digest in zip(records, digests, strict=True)}
    for i, entry in enumerate(records):
        where, last = f"round {entry.round}", records[i - 1] if i else None
        if last is not None and entry.round <= last.round:
            problems.append(f"{where}: comes after round {last.round}: it was moved, or comes twice")
        if entry.subject.previous != (digests[i - 1] if i else NO_RECORD):
            told = _shown_before(entry.subject.previous, rounds, last)
            problems.append(f"{where}: its participants were shown {told}")
        if last is not None and entry.context != last.context:
            apart = f"to study {entry.context.hex()[:16]}, that to {last.context.hex()[:16]}"
            problems.append(f"{where}: belongs to another study than round {last.round} before it: this {apart}")
        if last is not None and entry.threshold != last.threshold:
            problems.append(
                f"{where}: has threshold {entry.threshold}, and round {last.round} before it {last.threshold}"
            )
    return problems


def _shown_before(shown: bytes, rounds: dict[bytes, int], last: Record | None) -> str:
    """What a record's participants were shown as the one before, against `last`, which stands there."""
    if last is None:
        return "a record before it, and here it is the first: records before it were left out"
    if shown == NO_RECORD:
        return f"no record before it, and here round {last.round} is: records before it were added"
    if shown in rounds:
        added = f"records were moved, or that of round {last.round} added"
        return f"the record of round {rounds[shown]} before it, and here round {last.round} is: {added}"
    left_out = f"that of round {last.round} was changed, or records behind it left out"
    return f"another record before it than those in this transcript: {left_out}"


def _problems_at_end(
    closing: Closing,
    behind: Record | Closing | None,
    records: list[Record],
    digests: list[bytes],
    roster: Roster,
) -> list[str]:
    problems = []
    if behind is not None:
        told = "another end" if isinstance(behind, Closing) else f"the record of round {behind.round}"
        problems.append(f"{told} follows behind it, and nothing may")
    if not records:
        return [*problems, "there is no record before it"]
    last = records[-1]
    if closing.context != last.context:
        apart = f"study {closing.context.hex()[:16]}, they to {last.context.hex()[:16]}"
        problems.append(f"it belongs to another study than the records: it to {apart}")
    if closing.head in digests[:-1]:
        signed = records[digests.index(closing.head)].round
        told = f"it was signed behind the record of round {signed}"
        problems.append(f"{told}, and stands behind that of round {last.round}")
    elif closing.head != digests[-1]:
        problems.append(
            f"the record of round {last.round} is not the one whose digest was signed: it was changed, or records "
            "behind it left out"
        )
    for u, signature in closing.signatures.items():
        if u >= len(roster):
            problems.append(f"{roster.name(u)} is not on the roster")
        elif not verify_head(roster.members[u].identity, signature, closing.context, closing.head):
            problems.append(f"the signature of {roster.name(u)} does not fit")
    if len(closing.signatures) < last.threshold:
        problems.append(f"{len(closing.signatures)} participants signed it, and the threshold is {last.threshold}")
    return problems


def _told_apart(told: Terms, terms: Terms, session: Session) -> str:
    """How the terms that keys were signed for differ from the record's."""
    apart = []
    if told.params != terms.params:
        roster, threshold = session.params.roster, session.params.threshold
        each = range(least_threshold(len(roster), "active"), len(roster) + 1)
        fits = next((t for t in each if Params(roster, t).digest == told.params), None)
        apart.append(
            f"threshold {fits}, the record has {threshold}"
            if fits is not None
            else "another roster than this one: it has another name or key"
        )
    if told.context != terms.context:
        apart.append(f"study {told.context.hex()[:16]}, the record has {terms.context.hex()[:16]}")
    if told.round != terms.round:
        apart.append(f"round {told.round}, the record has {terms.round}")
    return "; for ".join(apart)


def _on_roster(by_number: dict[int, E], session: Session) -> list[tuple[int, E]]:
    return [(u, each) for u, each in by_number.items() if u < len(session.params.roster)]


def _signed(session: Session, u: int, signature: bytes, label: Label, bound_to: bytes, payload: bytes) -> bool:
    return verify(session.params.roster.members[u].identity, signature, label, bound_to, payload)


def _names(session: Session, participants: Iterable[int]) -> str:
    """Names in order; a list that no roster can have is cut short."""
    numbers = sorted(set(participants))
    most = len(session.params.roster)
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return session.names(set(numbers[:most])) + more
