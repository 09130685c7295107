"""What every participant pins: who takes part, how many must stay, and what is summed.

Keys are agreed for a `Session`: the study's parameters and the number of a round. They may be agreed a round ahead,
when the next model is not known yet. What is summed under them, the model above all, is a `Subject`, and joins the
session's digest before a mask is made. A participant builds both from its own study file, its own roster and what it
was given to work on. Their digests are in every signature and every derived key: participants that disagree on anything
here get nothing but noise and failed signatures out of each other. Beside each signature goes what was signed for, so
that it can be said what they disagree on.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct, msgpack

from secagg.errors import LocalProtocolError
from secagg.keys import Roster
from secagg.prg import Label, domain
from secagg.ring import Ring
from secagg.wire import Counter, Digest, Message

SUITE = "X25519-Ed25519-HKDFSHA256-AES128CTR-AES128GCM"
Mode = Literal["active", "semi-honest"]
Purpose = Annotated[str, Meta(max_length=32)]
# One masked vector must fit a message.
MAX_DIMENSION = 1 << 27


def least_threshold(participants: int, mode: Mode) -> int:
    """The smallest t for which the mode's guarantee holds.

    Active: floor(2n/3) + 1 (Bonawitz et al. 2017, theorem 6.5): no two sets of survivors can both be signed by t
    while up to n - t of the participants help the server. Semi-honest: a majority.
    """
    return 2 * participants // 3 + 1 if mode == "active" else participants // 2 + 1


class Params(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The part that stays the same for a whole study.

    Attributes:
        roster: All participants and their Ed25519 keys; at least three.
        threshold: t: how many must be left at every step, and how many shares open a secret.
        mode: "active" (signed keys, consistency check; a server that lies is caught) or "semi-honest" (neither: only
            for a server that is trusted to follow the protocol).
        suite: The primitives. There is one.

    Raises:
        LocalProtocolError: A threshold that the mode does not allow, or another suite.
    """

    roster: Roster
    threshold: int
    mode: Mode = "active"
    suite: str = SUITE

    def __post_init__(self) -> None:
        n = len(self.roster)
        if self.mode not in get_args(Mode):
            raise LocalProtocolError(f"expected mode 'active' or 'semi-honest', got {self.mode!r}")
        least = least_threshold(n, self.mode)
        if not least <= self.threshold <= n:
            raise LocalProtocolError(
                f"the threshold of {n} participants in {self.mode} mode must be {least} to {n}, got {self.threshold}"
            )
        if self.suite != SUITE:
            raise LocalProtocolError(f"expected suite {SUITE}, got {self.suite}")

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        return hashlib.sha256(domain(Label.PARAMS, b"") + msgpack.encode(self)).digest()

    @property
    def active(self) -> bool:
        """Whether keys are signed and survivors confirmed."""
        return self.mode == "active"


class Terms(Message, frozen=True):
    """What a session is about, in digests: what participants show each other of it.

    Attributes:
        params: Digest of `Params`.
        context: Digest of the study's configuration.
        round: Number of the round.
    """

    params: Digest
    context: Digest
    round: Counter

    @property
    def session_id(self) -> bytes:
        """32 bytes that stand for the session."""
        return hashlib.sha256(domain(Label.SESSION, b"") + msgpack.encode(self)).digest()


class Session(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the keys of one round are agreed for.

    Attributes:
        params: As pinned for the study.
        context: 32-byte digest of the study's configuration.
        round: Number of the round, from 0. A participant advertises keys for each number once.

    Raises:
        LocalProtocolError: A number below 0, or a digest of another length.
    """

    params: Params
    context: bytes
    round: int

    def __post_init__(self) -> None:
        if not 0 <= self.round < 1 << 62:
            raise LocalProtocolError(f"a round has a number from 0, got {self.round}")
        if len(self.context) != 32:
            raise LocalProtocolError("the digest of a study's configuration has 32 bytes")

    @property
    def terms(self) -> Terms:
        """The session in digests; costs a hash over the roster, so ask once per step."""
        return Terms(self.params.digest, self.context, self.round)

    @property
    def id(self) -> bytes:
        """32 bytes that stand for everything above."""
        return self.terms.session_id

    def names(self, participants: frozenset[int] | set[int]) -> str:
        """The participants' names in order, for error messages."""
        return ", ".join(self.params.roster.name(u) for u in sorted(participants)) or "nobody"


class Subject(Message, frozen=True):
    """What one sum is of.

    Attributes:
        purpose: What is summed ("train", "standardize", ...).
        model_digest: 32-byte digest of what the participants were given to work on, the current model.
        previous: 32-byte digest of the record of the sum before (`secagg.masking.transcript`), zeros where there is
            none: participants who sign this sum have been shown the same past.
        dimension: Entries of a vector.
        ring_bits: b of Z_{2^b}.

    Raises:
        LocalProtocolError: A dimension or ring out of range, a purpose too long, or a digest of another length.
    """

    purpose: Purpose
    model_digest: Digest
    previous: Digest
    dimension: Counter
    ring_bits: Counter

    def __post_init__(self) -> None:
        if not 1 <= self.dimension <= MAX_DIMENSION:
            raise LocalProtocolError(f"a vector has 1 to {MAX_DIMENSION} entries, got {self.dimension}")
        if len(self.purpose) > 32:
            raise LocalProtocolError(f"a purpose has at most 32 characters, got {len(self.purpose)}")
        if len(self.model_digest) != 32 or len(self.previous) != 32:
            raise LocalProtocolError("the digests of a sum's subject have 32 bytes")
        Ring(self.ring_bits)

    @property
    def ring(self) -> Ring:
        """The ring that is summed in."""
        return Ring(self.ring_bits)

    def sum_id(self, session_id: bytes) -> bytes:
        """32 bytes for session and subject together: what masks and the survivors' signatures are bound to."""
        return hashlib.sha256(domain(Label.SUBJECT, session_id) + msgpack.encode(self)).digest()


_TOLD = {
    "params": "roster, threshold or mode",
    "context": "study configuration",
    "model_digest": "model",
    "previous": "record of the sum before",
    "ring_bits": "bits of the ring",
}


def differences(theirs: Terms | Subject, ours: Terms | Subject) -> str:
    """What two participants disagree on, with the digests: for error messages. Empty where they agree."""
    told = []
    for field in ours.__struct_fields__:
        a, b = getattr(theirs, field), getattr(ours, field)
        if a != b:
            a, b = (value.hex()[:16] if isinstance(value, bytes) else repr(value) for value in (a, b))
            told.append(f"{_TOLD.get(field, field)} {a} where {b} was expected")
    return ", ".join(told)
