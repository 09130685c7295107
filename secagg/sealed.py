"""Authenticated encryption between two participants, through a server that must not read or move it.

AES-128-GCM (SP 800-38D) under a key that is derived for one sender, one receiver and one session and encrypts exactly
one message; so the nonce is constant. Sender and receiver are in the key and in the associated data: what u sent to v
does not open as what v sent to u (reflection), nor in another round (replay).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from secagg.errors import RemoteProtocolError
from secagg.prg import Label, derive, domain

TAG_BYTES = 16
_NONCE = bytes(12)


def channel_key(shared_secret: bytes, session_id: bytes, sender: int, receiver: int) -> bytes:
    """The 16-byte key for the one message from `sender` to `receiver` in this session."""
    return derive(shared_secret, Label.CHANNEL, session_id, sender, receiver)


def seal(key: bytes, session_id: bytes, sender: int, receiver: int, plaintext: bytes) -> bytes:
    """Encrypt and authenticate; 16 bytes longer than the plaintext. Once for each key."""
    return AESGCM(key).encrypt(_NONCE, plaintext, domain(Label.CHANNEL, session_id, sender, receiver))


def unseal(key: bytes, session_id: bytes, sender: int, receiver: int, box: bytes) -> bytes:
    """Check and decrypt.

    Raises:
        RemoteProtocolError: The box was not sealed for this session, sender and receiver, or was altered.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, box, domain(Label.CHANNEL, session_id, sender, receiver))
    except (InvalidTag, ValueError) as error:
        raise RemoteProtocolError(
            f"the encrypted shares from participant {sender} to {receiver} do not open: altered, reflected or replayed"
        ) from error
