"""Who is who: Ed25519 identities, the roster that pins them, and X25519 key agreement.

The roster is the list of a study's participants and their long-term public keys. It is a file at every site, compared
by fingerprint over the telephone, and never comes from the server. A participant is known inside the protocol by its
position in the roster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from msgspec import Struct

from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.prg import Entropy, Label, domain

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64


class Identity:
    """A participant's long-term Ed25519 key (RFC 8032). Its repr shows the public half only; it does not pickle."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise LocalProtocolError(f"an Ed25519 secret has 32 bytes, got {len(secret)}")
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy) -> Identity:
        """A fresh identity from 32 bytes of entropy."""
        return cls(entropy(32))

    def sign(self, label: Label, session_id: bytes, payload: bytes) -> bytes:
        """A 64-byte signature over purpose, session and payload."""
        return self._key.sign(domain(label, session_id) + payload)

    def __repr__(self) -> str:
        return f"Identity({fingerprint(self.public)})"

    def __reduce__(self) -> str:
        raise LocalProtocolError("an identity holds a secret and is not pickled")


def verify(public: bytes, signature: bytes, label: Label, session_id: bytes, payload: bytes) -> bool:
    """Whether `signature` is `public`'s over purpose, session and payload."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, domain(label, session_id) + payload)
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(public: bytes) -> str:
    """A public key for people to compare: 32 hexadecimal digits (128 bits of SHA-256) in groups of four."""
    digest = hashlib.sha256(domain(Label.FINGERPRINT, b"") + public).hexdigest()[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


class Member(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One line of the roster: a name and an Ed25519 public key of 32 bytes."""

    name: str
    identity: bytes


class Roster(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The participants of a study in the order of their names; a participant's number is its place here.

    Raises:
        LocalProtocolError: Fewer than three members, a name or key that comes twice, names out of order, or a key of
            another length. With two participants each learns the other's value from the sum, so three is the least.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [m.name for m in self.members]
        if len(names) < 3:
            raise LocalProtocolError(
                f"a secure sum needs at least 3 participants, got {len(names)} "
                f"({', '.join(names) or 'none'}): with two, the sum shows each the other's value"
            )
        if names != sorted(set(names)):
            raise LocalProtocolError(f"roster names must be distinct and in order, got {names}")
        if len({m.identity for m in self.members}) != len(names):
            raise LocalProtocolError("two members of the roster have the same public key")
        for m in self.members:
            if len(m.identity) != PUBLIC_BYTES:
                raise LocalProtocolError(f"the key of {m.name} has {len(m.identity)} bytes, expected {PUBLIC_BYTES}")

    @classmethod
    def of(cls, identities: Mapping[str, bytes]) -> Roster:
        """A roster from names and public keys."""
        return cls(tuple(Member(name, identities[name]) for name in sorted(identities)))

    def __len__(self) -> int:
        return len(self.members)

    def name(self, participant: int) -> str:
        """The name of a participant by its number, or `#number` for one that is not on the roster."""
        return self.members[participant].name if 0 <= participant < len(self.members) else f"#{participant}"

    def number(self, name: str) -> int:
        """The number of a participant by its name.

        Raises:
            LocalProtocolError: Nobody of that name.
        """
        for number, member in enumerate(self.members):
            if member.name == name:
                return number
        raise LocalProtocolError(f"{name!r} is not on the roster, which has {[m.name for m in self.members]}")


class AgreementKey:
    """An X25519 key pair that lives for one round. Its repr shows nothing; it does not pickle."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The 32-byte shared secret with the holder of `public` (RFC 7748). Never a key by itself: `derive` from it.

        Raises:
            RemoteProtocolError: A key of another length, or a point of low order, which would make the result known.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise RemoteProtocolError("an X25519 public key is malformed or of low order") from error

    def __repr__(self) -> str:
        return "AgreementKey(...)"

    def __reduce__(self) -> str:
        raise LocalProtocolError("an agreement key holds a secret and is not pickled")


def refuse_low_order(public: bytes) -> None:
    """Raise `RemoteProtocolError` for a key with which every agreement comes out the same, known value."""
    _PROBE.agree(public)


def agreement_public(secret: bytes) -> bytes:
    """The X25519 public key of a 32-byte secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


# Any scalar shows a low-order point: all of them give zero.
_PROBE = AgreementKey(bytes(31) + b"\x40")
