"""The self-check behind `secagg doctor`: what is installed, and whether its cryptography computes what it should.

Nothing is printed and nothing leaves the machine; the command prints the list that `run_checks` gives. Each primitive
the library stands on is run on published answers with `cryptography`, then compared byte for byte with `pycryptodome`
on random inputs: two libraries written apart do not make the same mistake.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.resources import files

import msgspec
import numpy as np
from cryptography.exceptions import InternalError, InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocols.aggregation import secure_mean
from secagg.errors import SecAggError
from secagg.prg import add_keystreams

REQUIRED: Mapping[str, tuple[str, str]] = {
    "python": ("3.11", ""),
    "secagg": ("", ""),
    "torch": ("2.6", "3"),
    "numpy": ("2.1", "3"),
    "cryptography": ("45", ""),
    "pycryptodome": ("3.21", ""),
    "opacus": ("1.6", "2"),
    "dp-accounting": ("0.6", "0.7"),
}
"""Distribution to the first version that will do and the first that will not; empty where there is no such bound."""

SLOW_AES_GB_PER_S = 0.3
"""Below this much AES-128-CTR keystream in 1e9 bytes per second on one core, AES runs in software."""

# What the two libraries raise: cryptography for a primitive that its OpenSSL lacks or a key it refuses, pycryptodome
# ValueError, TypeError, and OSError or ImportError where a compiled part of it is missing.
_LIBRARY_ERRORS = (
    UnsupportedAlgorithm, InternalError, InvalidSignature, InvalidTag, ValueError, TypeError, OSError, ImportError,
)  # fmt: skip
_RANDOM_LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 1000, 4096)
_BUFFER = 256 * 1024


@dataclass(frozen=True)
class Check:
    """One finding of the self-check.

    Attributes:
        name: What was checked, unique in the list.
        ok: Whether it is as it should be.
        detail: One line: what was found and, where `ok` is false, what was expected and what to do.
    """

    name: str
    ok: bool
    detail: str


class _Finding(Exception):
    """A check came out wrong; the message is its detail."""


class _NoSecondOpinion(Exception):
    """This pycryptodome does not have the primitive."""


def run_checks() -> list[Check]:
    """Runs every check: versions, speed, known answers, refusals, second opinions.

    Returns:
        The findings, in a fixed order. Takes less than a second; raises nothing for a check that fails.
    """
    return [
        *version_checks(),
        aes_speed_check(),
        *known_answer_checks(),
        *refusal_checks(),
        *second_opinion_checks(),
        *own_checks(),
    ]


def version_checks() -> list[Check]:
    """Compares what is installed with `REQUIRED`.

    Returns:
        One check per entry, named `version <distribution>`.
    """
    return [_guarded(f"version {name}", partial(_version, name, *bounds)) for name, bounds in REQUIRED.items()]


def aes_speed_check() -> Check:
    """Measures AES-128-CTR keystream on one core, over a 256 KiB buffer, best of 5 runs of about 10 ms.

    Returns:
        A check that is ok whatever the speed (slow is not wrong); the detail says it in GB/s, 1 GB being 1e9 bytes.
    """
    return _guarded("aes-128-ctr speed", _aes_speed)


def known_answer_checks(vectors: bytes | None = None) -> list[Check]:
    """Runs `cryptography` on published answers: RFC 7748, 8032 and 5869, SP 800-38A, FIPS 180-4, McGrew and Viega.

    Args:
        vectors: A JSON list of `Vector`; None reads the one that is installed with this package.

    Returns:
        One check, `known answers`, that every primitive has some; then one per answer, named
        `known answer <primitive>, <source>`.
    """
    try:
        known = _load_vectors(vectors)
    except (_Finding, OSError, msgspec.DecodeError) as error:
        return [Check("known answers", False, f"expected the list of published answers: {error}; reinstall secagg")]
    return [Check("known answers", True, f"{len(known)} for {len(PRIMITIVES)} primitives")] + [
        _guarded(f"known answer {vector.primitive}, {vector.source}", partial(_known_answer, vector))
        for vector in known
    ]


def refusal_checks() -> list[Check]:
    """Changes one bit of a signature, a sealed message and its tag, which `cryptography` must all refuse.

    Returns:
        One check per primitive, named `refusal <primitive>`.
    """
    return [_guarded("refusal Ed25519", _ed25519_refuses), _guarded("refusal AES-128-GCM", _aes_gcm_refuses)]


def second_opinion_checks() -> list[Check]:
    """Compares `cryptography` with `pycryptodome` on random inputs, byte for byte.

    Returns:
        One check per primitive, named `second opinion <primitive>`. Where this pycryptodome lacks the primitive the
        check is ok and says that there is none.
    """
    return [_guarded(f"second opinion {name}", partial(_second_opinion, name)) for name in PRIMITIVES]


def own_checks() -> list[Check]:
    """Runs this library's own: a mask against pycryptodome's keystream, a masked mean against a plain one.

    Returns:
        Two checks, named `own masks` and `own masked mean`.
    """
    return [_guarded("own masks", _own_masks), _guarded("own masked mean", _own_mean)]


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except _Finding as finding:
        return Check(name, False, str(finding))
    except _LIBRARY_ERRORS as error:
        return Check(name, False, f"{type(error).__name__}: {error}; reinstall secagg, cryptography and pycryptodome")


def _own_masks() -> str:
    key, size = os.urandom(16), 100_003
    keystream = np.frombuffer(_aes_ctr_second(key, bytes(16), bytes(4 * size)), "<u4")
    vector = np.arange(size, dtype=np.uint32)
    add_keystreams(vector, [(key, +1)])
    if not np.array_equal(vector, np.arange(size, dtype=np.uint32) + keystream):
        raise _Finding("a mask is not the keystream that pycryptodome gives; do not use this installation")
    return f"a mask of {size} values is pycryptodome's keystream"


def _own_mean() -> str:
    values = {name: np.array([1.0, -2.0, 4.0]) * factor for name, factor in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    try:
        total, mean = secure_mean(values, {"a": 1, "b": 2, "c": 1}, max_value=16.0)
    except SecAggError as error:
        raise _Finding(f"a masked mean of three failed: {error}; do not use this installation") from error
    if total != 4 or mean.tolist() != [2.0, -4.0, 8.0]:
        raise _Finding(f"a masked mean of three is {mean.tolist()}, not [2.0, -4.0, 8.0]; do not use this installation")
    return "three participants, five rounds, exact"


def _version(name: str, least: str, below: str) -> str:
    bounds = " and ".join([f">= {least}"] * bool(least) + [f"< {below}"] * bool(below)) or "any version"
    try:
        found = platform.python_version() if name == "python" else metadata.version(name)
    except metadata.PackageNotFoundError:
        raise _Finding(f"expected {bounds}, not installed: `pip install {name}`") from None
    if _number(found) < _number(least) or (below and _number(found) >= _number(below)):
        raise _Finding(f"expected {bounds}, found {found}: install a version in these bounds")
    return found


def _number(version: str) -> tuple[int, ...]:
    # Bounds are releases, so what follows the numbers (2.13.0+cpu, 3.0rc1) does not decide.
    leading = re.match(r"[0-9.]*", version)
    return tuple(int(part) for part in (leading.group() if leading else "").split(".") if part)


def _aes_speed() -> str:
    zeros, keystream = bytes(_BUFFER), bytearray(_BUFFER)
    encryptor = Cipher(AES(bytes(16)), CTR(bytes(16))).encryptor()
    best = 0.0
    for _ in range(5):
        start, done, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < 0.01:
            done += encryptor.update_into(zeros, keystream)
            elapsed = time.perf_counter() - start
        best = max(best, done / elapsed / 1e9)
    slow = "; the processor's AES instructions seem to be missing or unused" if best < SLOW_AES_GB_PER_S else ""
    return f"{best:.2f} GB/s of keystream on one core{slow}"


def _load_vectors(vectors: bytes | None) -> list[Vector]:
    if vectors is None:
        vectors = files("protocols").joinpath("data/known_answers.json").read_bytes()
    known = msgspec.json.decode(vectors, type=list[Vector])
    if odd := set(PRIMITIVES).symmetric_difference(vector.primitive for vector in known):
        raise _Finding(f"an answer for each of {sorted(PRIMITIVES)}, missing or unknown is {sorted(odd)}")
    return known


def _known_answer(vector: Vector) -> str:
    got = PRIMITIVES[vector.primitive].run(*map(bytes.fromhex, vector.inputs))
    if got != bytes.fromhex(vector.expected):
        raise _Finding(f"expected {vector.expected}, got {got.hex()}: do not use this installation")
    return f"{len(got)} bytes as published"


def _second_opinion(name: str) -> str:
    primitive, count = PRIMITIVES[name], 0
    for length in _RANDOM_LENGTHS:
        inputs = primitive.random_inputs(length)
        try:
            first, second = primitive.run(*inputs), primitive.second(*inputs)
        except _NoSecondOpinion:
            return f"none: pycryptodome {metadata.version('pycryptodome')} does not have it"
        if first != second:
            raise _Finding(
                f"cryptography and pycryptodome differ on inputs {[value.hex() for value in inputs]}: "
                f"{first.hex()} and {second.hex()}; do not use this installation"
            )
        count += 1
    return f"cryptography and pycryptodome agree on {count} random inputs"


def _ed25519_refuses() -> str:
    key, message = Ed25519PrivateKey.from_private_bytes(os.urandom(32)), os.urandom(64)
    signature = bytearray(key.sign(message))
    verify: Callable[[bytes, bytes], None] = Ed25519PublicKey.from_public_bytes(
        key.public_key().public_bytes_raw()
    ).verify
    verify(bytes(signature), message)
    signature[0] ^= 1
    try:
        verify(bytes(signature), message)
    except InvalidSignature:
        return "a changed signature is refused"
    raise _Finding("expected a changed signature to be refused, it was accepted: do not use this installation")


def _aes_gcm_refuses() -> str:
    cipher, nonce = AESGCM(os.urandom(16)), os.urandom(12)
    sealed = cipher.encrypt(nonce, os.urandom(64), b"label")
    cipher.decrypt(nonce, sealed, b"label")
    for position in (0, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[position] ^= 1
        try:
            cipher.decrypt(nonce, bytes(changed), b"label")
        except InvalidTag:
            continue
        raise _Finding(f"expected a change of byte {position} to be refused, it was accepted: do not use it")
    return "a changed ciphertext and a changed tag are refused"


class Vector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One published answer.

    Attributes:
        primitive: A key of `PRIMITIVES`.
        source: The document and the place in it.
        inputs: The primitive's arguments, in hex.
        expected: What it must give, in hex.
    """

    primitive: str
    source: str
    inputs: tuple[str, ...]
    expected: str


@dataclass(frozen=True)
class Primitive:
    """One cryptographic function of bytes, from two libraries.

    Attributes:
        run: With `cryptography`, as the library uses it.
        second: The same function with `pycryptodome`.
        random_inputs: Gives random inputs for it, the variable one among them of the given length in bytes.
    """

    run: Callable[..., bytes]
    second: Callable[..., bytes]
    random_inputs: Callable[[int], tuple[bytes, ...]]


def _x25519(scalar: bytes, point: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(scalar).exchange(X25519PublicKey.from_public_bytes(point))


def _x25519_second(scalar: bytes, point: bytes) -> bytes:
    from Crypto.Protocol import DH

    if not hasattr(DH, "import_x25519_private_key"):
        raise _NoSecondOpinion
    private, public = DH.import_x25519_private_key(scalar), DH.import_x25519_public_key(point)
    return bytes(DH.key_agreement(static_priv=private, static_pub=public, kdf=bytes))


def _x25519_public(scalar: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(scalar).public_key().public_bytes_raw()


def _x25519_public_second(scalar: bytes) -> bytes:
    from Crypto.Protocol import DH

    if not hasattr(DH, "import_x25519_private_key"):
        raise _NoSecondOpinion
    return bytes(DH.import_x25519_private_key(scalar).public_key().export_key(format="raw"))


def _ed25519(seed: bytes, message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


def _ed25519_second(seed: bytes, message: bytes) -> bytes:
    from Crypto.Signature import eddsa

    return bytes(eddsa.new(eddsa.import_private_key(seed), "rfc8032").sign(message))


def _ed25519_public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def _ed25519_public_second(seed: bytes) -> bytes:
    from Crypto.Signature import eddsa

    return bytes(eddsa.import_private_key(seed).public_key().export_key(format="raw"))


def _hkdf(secret: bytes, salt: bytes, info: bytes, length: bytes) -> bytes:
    return HKDF(hashes.SHA256(), length[0], salt, info).derive(secret)


def _hkdf_second(secret: bytes, salt: bytes, info: bytes, length: bytes) -> bytes:
    from Crypto.Hash import SHA256
    from Crypto.Protocol.KDF import HKDF as OTHER_HKDF

    derived = OTHER_HKDF(secret, length[0], salt, SHA256, context=info)
    return derived if isinstance(derived, bytes) else b"".join(derived)


def _aes_ctr(key: bytes, counter: bytes, data: bytes) -> bytes:
    return Cipher(AES(key), CTR(counter)).encryptor().update(data)


def _aes_ctr_second(key: bytes, counter: bytes, data: bytes) -> bytes:
    from Crypto.Cipher import AES as OTHER_AES

    return bytes(OTHER_AES.new(key, OTHER_AES.MODE_CTR, nonce=b"", initial_value=counter).encrypt(data))


def _aes_gcm(key: bytes, nonce: bytes, data: bytes, label: bytes) -> bytes:
    return AESGCM(key).encrypt(nonce, data, label)


def _aes_gcm_second(key: bytes, nonce: bytes, data: bytes, label: bytes) -> bytes:
    from Crypto.Cipher import AES as OTHER_AES

    cipher = OTHER_AES.new(key, OTHER_AES.MODE_GCM, nonce=nonce)
    cipher.update(label)
    return b"".join(cipher.encrypt_and_digest(data))


def _sha256(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()


def _sha256_second(data: bytes) -> bytes:
    from Crypto.Hash import SHA256

    return bytes(SHA256.new(data).digest())


def _random(*lengths: int) -> tuple[bytes, ...]:
    return tuple(os.urandom(length) for length in lengths)


PRIMITIVES: dict[str, Primitive] = {
    "X25519": Primitive(_x25519, _x25519_second, lambda _: (os.urandom(32), _x25519_public(os.urandom(32)))),
    "X25519 public key": Primitive(_x25519_public, _x25519_public_second, lambda _: _random(32)),
    "Ed25519": Primitive(_ed25519, _ed25519_second, lambda n: _random(32, n)),
    "Ed25519 public key": Primitive(_ed25519_public, _ed25519_public_second, lambda _: _random(32)),
    # The last input is how many bytes to derive, as one byte.
    "HKDF-SHA256": Primitive(_hkdf, _hkdf_second, lambda n: (*_random(32, 32, n), bytes([1 + n % 255]))),
    "AES-128-CTR": Primitive(_aes_ctr, _aes_ctr_second, lambda n: _random(16, 16, n)),
    "AES-128-GCM": Primitive(_aes_gcm, _aes_gcm_second, lambda n: _random(16, 12, n, 32)),
    "SHA-256": Primitive(_sha256, _sha256_second, lambda n: _random(n)),
}
"""The primitives that the library stands on, by name."""
