"""What every participant pins before a round: who takes part, how many must stay, and which model it is about.

None of this comes from the server. A participant builds its own `Session` from its own study file and roster, and the
session's digest is in every signature and every derived key: participants that disagree on anything here get nothing
but noise and failed signatures out of each other.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from msgspec import Struct, msgpack

from secagg.errors import LocalProtocolError
from secagg.keys import Roster
from secagg.prg import Label, domain
from secagg.ring import Ring

SUITE = "X25519-Ed25519-HKDFSHA256-AES128CTR-AES128GCM"
Mode = Literal["active", "semi-honest"]
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
    def active(self) -> bool:
        """Whether keys are signed and survivors confirmed."""
        return self.mode == "active"


class Session(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One secure sum: the study's parameters, and what sets this round apart from all others.

    Attributes:
        params: As pinned for the study.
        context: 32-byte digest of the study's configuration.
        purpose: What is summed ("train", "standardize", ...).
        round: Number of the round, from 0. A participant takes part in each number once.
        model_digest: 32-byte digest of what the participants were given to work on, the current model.
        dimension: Entries of a vector.
        ring_bits: b of Z_{2^b}.

    Raises:
        LocalProtocolError: A dimension or ring out of range, or a digest of another length.
    """

    params: Params
    context: bytes
    purpose: str
    round: int
    model_digest: bytes
    dimension: int
    ring_bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.dimension <= MAX_DIMENSION:
            raise LocalProtocolError(f"a vector has 1 to {MAX_DIMENSION} entries, got {self.dimension}")
        if self.round < 0:
            raise LocalProtocolError(f"a round has a number from 0, got {self.round}")
        if len(self.context) != 32 or len(self.model_digest) != 32:
            raise LocalProtocolError("the digests of a session have 32 bytes")
        Ring(self.ring_bits)

    @property
    def ring(self) -> Ring:
        """The ring that is summed in."""
        return Ring(self.ring_bits)

    @property
    def id(self) -> bytes:
        """32 bytes that stand for everything above; costs a hash over the roster, so ask once per step."""
        return hashlib.sha256(domain(Label.SESSION, b"") + msgpack.encode(self)).digest()

    def names(self, participants: frozenset[int] | set[int]) -> str:
        """The participants' names in order, for error messages."""
        return ", ".join(self.params.roster.name(u) for u in sorted(participants)) or "nobody"
