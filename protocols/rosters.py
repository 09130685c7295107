"""Who is who, as files: a site's secret key, its public key for the others, and the roster of all.

The secret key is PKCS #8 in PEM, as every tool writes it. A public key and the roster are TOML for people to read: for
each site a name, a key and the fingerprint to compare over the telephone.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from msgspec import Struct

from protocols.errors import KeyFileError
from protocols.files import PRIVATE, read_private, write_new
from protocols.toml_file import Section, parse, read_text
from secagg.errors import LocalProtocolError
from secagg.keys import PUBLIC_BYTES, Identity, Member, Roster, fingerprint
from secagg.prg import Entropy

# PKCS #8 as `cryptography` writes it tries a passphrase in 2048 rounds of PBKDF2, so the passphrase must be long.
SHORTEST_PASSPHRASE = 16
_LONGEST_PASSPHRASE = 1023
_READABLE = 0o644
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ROSTER_HEAD = """\
# Who takes part, and their public keys. Compare each fingerprint with the site over the telephone, and write it into
# the [fingerprints] of your own site.toml.
"""


class _Entry(Section, frozen=True):
    """A site's public key in a file; the struct is also that of a `.pub` file."""

    name: str
    key: str
    fingerprint: str


class _RosterFile(Section, frozen=True):
    """A roster.toml."""

    member: tuple[_Entry, ...]


class PublicKey(Struct, frozen=True):
    """A site's name and its Ed25519 public key of 32 bytes."""

    name: str
    key: bytes

    @property
    def fingerprint(self) -> str:
        """What people compare."""
        return fingerprint(self.key)


def new_identity(path: Path, passphrase: str | None, entropy: Entropy) -> Identity:
    """Make a site's long-term key and write it to a file that must not be there yet.

    Args:
        path: Of the file, made with mode 0600.
        passphrase: To encrypt it with, or None to leave that out.
        entropy: Source of the key; the operating system's, but in tests.

    Raises:
        KeyFileError: There is something of that name, it could not be written, or the passphrase is too short or long.
    """
    protection: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        encoded = _encoded(passphrase)
        if len(passphrase) < SHORTEST_PASSPHRASE or len(encoded) > _LONGEST_PASSPHRASE:
            raise KeyFileError(
                f"expected a passphrase of at least {SHORTEST_PASSPHRASE} characters and at most {_LONGEST_PASSPHRASE} "
                f"bytes, got {len(passphrase)} characters; six random words do well"
            )
        protection = BestAvailableEncryption(encoded)
    secret = entropy(PUBLIC_BYTES)
    key = Ed25519PrivateKey.from_private_bytes(secret)
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection), PRIVATE)
    return Identity(secret)


def load_identity(path: Path, passphrase: str | None = None) -> Identity:
    """A site's long-term key from its file.

    Args:
        path: Of an Ed25519 key in PEM.
        passphrase: Of an encrypted one.

    Raises:
        KeyFileError: It cannot be read, others may read it, it is no such key, or the passphrase does not belong to it.
    """
    content = read_private(path, KeyFileError)
    try:
        key = load_pem_private_key(content, None if passphrase is None else _encoded(passphrase))
    except TypeError as error:
        why = "is encrypted: give its passphrase" if passphrase is None else "is not encrypted: give no passphrase"
        raise KeyFileError(f"{path}: {why}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = "; or the passphrase is wrong" if passphrase is not None else ""
        raise KeyFileError(f"{path}: expected a secret key in PEM{wrong}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: expected an Ed25519 key, got another kind")
    return Identity(key.private_bytes_raw())


def needs_passphrase(path: Path) -> bool:
    """Whether a secret key's file says that it is encrypted.

    Raises:
        KeyFileError: It cannot be read, or others may read it.
    """
    return b"-----BEGIN ENCRYPTED" in read_private(path, KeyFileError)


def read_passphrase(path: Path) -> str:
    """The passphrase in a file of one line that nobody but its owner may open.

    Raises:
        KeyFileError: It cannot be read, others may read it, or it is not one line of text.
    """
    try:
        text = read_private(path, KeyFileError).decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: expected a passphrase in UTF-8") from error
    if not text or not text.isprintable():
        raise KeyFileError(f"{path}: expected a passphrase in one line")
    return text


def write_public_key(path: Path, public: PublicKey) -> None:
    """Write a site's public key to a file that must not be there yet.

    Raises:
        KeyFileError: The name cannot be a site's, there is something of that name, or it could not be written.
    """
    _write(path, _entry(check_name(public.name), public.key).encode(), _READABLE)


def load_public_key(path: Path) -> PublicKey:
    """A site's public key from its file.

    Raises:
        KeyFileError: It cannot be read, or its fingerprint is not that of its key.
    """
    entry = parse(read_text(path, KeyFileError), _Entry, name=str(path), error_type=KeyFileError)
    return _public(entry, str(path))


def roster_of(publics: list[PublicKey]) -> Roster:
    """The roster of these sites.

    Raises:
        KeyFileError: Fewer than three, or a name or a key twice.
    """
    names = [public.name for public in publics]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KeyFileError(f"a roster has each name once, got {', '.join(twice)} more than once")
    try:
        return Roster.of({public.name: public.key for public in publics})
    except LocalProtocolError as error:
        raise KeyFileError(str(error)) from error


def roster_text(roster: Roster) -> str:
    """A roster as the text of its file."""
    entries = (f"\n[[member]]\n{_entry(member.name, member.identity)}" for member in roster.members)
    return _ROSTER_HEAD + "".join(entries)


def roster_digest(roster: Roster) -> bytes:
    """32 bytes of SHA-256 over a roster's file: two sites with the same digest trust the same keys."""
    return hashlib.sha256(roster_text(roster).encode()).digest()


def write_roster(path: Path, roster: Roster) -> None:
    """Write a roster to a file that must not be there yet.

    Raises:
        KeyFileError: A name cannot be a site's, there is something of that name, or it could not be written.
    """
    for member in roster.members:
        check_name(member.name)
    _write(path, roster_text(roster).encode(), _READABLE)


def load_roster(path: Path) -> Roster:
    """A roster from its file.

    Raises:
        KeyFileError: It cannot be read, a fingerprint is not that of its key, a name or key comes twice, or there are
            fewer than three sites.
    """
    file = parse(read_text(path, KeyFileError), _RosterFile, name=str(path), error_type=KeyFileError)
    publics = [_public(entry, f"{path}: member[{i}]") for i, entry in enumerate(file.member)]
    try:
        return roster_of(publics)
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from error


def member(roster: Roster, name: str) -> Member | None:
    """The member of that name, if there is one."""
    return next((member for member in roster.members if member.name == name), None)


def check_name(name: str) -> str:
    """The name, if it can be a site's.

    Raises:
        KeyFileError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"expected a name of 1 to 64 letters, digits, '_', '-' or '.', got {name!r}")
    return name


def _public(entry: _Entry, where: str) -> PublicKey:
    """An entry whose key is one, and whose fingerprint is that key's."""
    try:
        check_name(entry.name)
    except KeyFileError as error:
        raise KeyFileError(f"{where}: {error}") from error
    if not re.fullmatch(r"[0-9a-f]{64}", entry.key):
        raise KeyFileError(f"{where}: expected the key of {entry.name} as 64 hexadecimal digits, got {entry.key!r}")
    public = PublicKey(entry.name, bytes.fromhex(entry.key))
    if entry.fingerprint != public.fingerprint:
        raise KeyFileError(
            f"{where}: the key of {entry.name} has the fingerprint {public.fingerprint}, the file says "
            f"{entry.fingerprint!r}: the file was damaged or changed; get it again from whoever made it"
        )
    return public


def _entry(name: str, key: bytes) -> str:
    return f'name = "{name}"\nkey = "{key.hex()}"\nfingerprint = "{fingerprint(key)}"\n'


def _encoded(passphrase: str) -> bytes:
    try:
        return passphrase.encode()
    except UnicodeEncodeError:  # holds the passphrase
        raise KeyFileError("expected a passphrase of text in UTF-8") from None


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        write_new(path, content, mode)
    except FileExistsError as error:
        raise KeyFileError(f"{path} exists already, and is not overwritten; name another, or move it away") from error
    except OSError as error:
        raise KeyFileError(f"{path}: could not be written: {error.strerror or error}") from error
