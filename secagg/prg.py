"""Keys from secrets, and keystream from keys.

`derive` is the only way a key is made (HKDF-SHA256, RFC 5869) and `Label` is the one table of what keys, hashes and
signatures are for: two purposes never share an input. Keystream is AES-128 in counter mode (SP 800-38A) from a zero
counter; that is safe because every key is used for one stream only.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secagg.errors import LocalProtocolError
from secagg.ring import RingVector

Entropy = Callable[[int], bytes]
"""Where randomness comes from: `os.urandom`, or a deterministic stream in a test. Called with a number of bytes."""

KEY_BYTES = 16
# Keystream at a time. Large enough to hide the call, small enough to be added while it is still in cache.
_BLOCK_BYTES = 1 << 18
_LINE_BYTES = 64
_ZEROS = memoryview(bytes(_BLOCK_BYTES))


class Label(bytes, enum.Enum):
    """What a derived key, a hash or a signature is for. Every use in the library is listed here, once."""

    PARAMS = b"parameters"
    SESSION = b"session"
    SUBJECT = b"subject of a sum"
    MASKS = b"masks of a sum"
    FINGERPRINT = b"fingerprint"
    SELF_MASK = b"mask: own"
    PAIRWISE_SECRET = b"pairwise secret"
    PAIRWISE_MASK = b"mask: pairwise"
    CHANNEL = b"channel"
    COMMIT_SELF_MASK = b"commitment: own mask seed"
    SIGN_KEYS = b"signature: keys"
    SIGN_COMMITMENT = b"signature: commitment"
    SIGN_SURVIVORS = b"signature: survivors"
    SIGN_TRANSCRIPT = b"signature: transcript"
    SIGN_LEDGER = b"signature: budget ledger"
    RECORD = b"record of a sum"
    CKKS_UNIFORM = b"ckks: common polynomial"
    CKKS_SECRET = b"ckks: share of the joint key"
    CKKS_FLOOD = b"ckks: flooding"
    CKKS_KEY = b"ckks: joint key"
    CKKS_UPLOAD = b"ckks: upload"
    CKKS_UPLOADS = b"ckks: uploads of a sum"
    COMMIT_CKKS_SEED = b"commitment: ckks seed"
    COMMIT_CKKS_SHARE = b"commitment: ckks key share"
    SIGN_CKKS_CHANNEL = b"signature: ckks channel key"
    SIGN_CKKS_COMMITMENT = b"signature: ckks commitment"
    SIGN_CKKS_HOLDER = b"signature: ckks holder's key"
    SIGN_CKKS_UPLOAD = b"signature: ckks upload"
    SIGN_CKKS_UPLOADS = b"signature: ckks uploads"
    ROUNDING = b"rounding"
    ENTROPY = b"entropy"
    STAGE = b"entropy of a stage"


def domain(label: Label, session_id: bytes, *numbers: int) -> bytes:
    """The unambiguous prefix for everything hashed, signed or derived: label, session id, fixed-width numbers."""
    tag = b"secagg-1/" + label.value
    return len(tag).to_bytes(1, "big") + tag + session_id + b"".join(n.to_bytes(8, "big") for n in numbers)


def derive(secret: bytes, label: Label, session_id: bytes, *numbers: int) -> bytes:
    """A 16-byte key for one purpose, from a secret (HKDF-SHA256; the session id is the salt).

    Args:
        secret: Input keying material: a shared X25519 secret or a random seed.
        label: The purpose.
        session_id: 32 bytes that bind the key to study, roster and round; of a sum, to what is summed as well.
        numbers: Identities and counters that set keys of the same purpose apart.
    """
    info = domain(label, session_id, *numbers)
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=session_id, info=info).derive(secret)


def add_keystream(vector: RingVector, key: bytes, sign: int) -> None:
    """Add (sign +1) or subtract (sign -1) the keystream of `key`, in place: a mask over the whole ring.

    See `add_keystreams`.
    """
    add_keystreams(vector, [(key, sign)])


def add_keystreams(vector: RingVector, masks: Sequence[tuple[bytes, int]]) -> None:
    """Add or subtract several keystreams, in place.

    All masks are applied to one stretch of the vector before the next, so that it is fetched from memory once and not
    once for each mask.

    Args:
        vector: Contiguous `uint32` or `uint64`, shape [d]. Wraps in its machine word.
        masks: (key, sign) pairs: 16 bytes, used for this mask and nothing else; +1 or -1.

    Raises:
        LocalProtocolError: A key of another length, or another sign; the vector is as it was.
    """
    for _, sign in masks:
        if sign not in (1, -1):
            raise LocalProtocolError(f"a mask is added (+1) or subtracted (-1), got {sign}")
    streams = [(_keystream(key).update_into, np.add if sign > 0 else np.subtract) for key, sign in masks]
    # Buffers are per call, not per process: threads must not share them.
    buffer = bytearray(min(vector.nbytes, _BLOCK_BYTES))
    words = np.frombuffer(buffer, vector.dtype)
    # A short first stretch, so that the others start on a cache line.
    start, size = 0, min(vector.size, -vector.ctypes.data % _LINE_BYTES // vector.itemsize or words.size)
    while start < vector.size:
        part, mask = vector[start : start + size], words[:size]
        zeros, stretch = _ZEROS[: mask.nbytes], memoryview(buffer)[: mask.nbytes]
        for update_into, step in streams:
            update_into(zeros, stretch)
            if sys.byteorder == "big":
                mask.byteswap(inplace=True)
            step(part, mask, out=part)
        start, size = start + size, min(words.size, vector.size - start - size)


class Stream:
    """A cryptographically secure stream of random words: AES-128-CTR under one key.

    Used for stochastic rounding, and as a deterministic source of entropy where a run must be repeated bit for bit.
    It does not pickle, and its repr shows nothing.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = _keystream(key)

    def __reduce__(self) -> str:
        raise LocalProtocolError("a keystream holds a secret and is not pickled")

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._cipher.update(bytes(count))

    def fill(self, words: npt.NDArray[np.uint32]) -> None:
        """Overwrite a contiguous vector with the next words, each uniform over 32 bits."""
        target = words.view(np.uint8).data
        for start in range(0, len(target), _BLOCK_BYTES):
            stretch = target[start : start + _BLOCK_BYTES]
            self._cipher.update_into(_ZEROS[: len(stretch)], stretch)
        if sys.byteorder == "big":
            words.byteswap(inplace=True)


def deterministic_entropy(seed: bytes) -> Entropy:
    """Entropy that repeats itself: for tests, test vectors and comparing engines. Never for data that matters."""
    return Stream(derive(seed, Label.ENTROPY, bytes(32))).read


def _keystream(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise LocalProtocolError(f"a keystream takes a key of {KEY_BYTES} bytes, got {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
