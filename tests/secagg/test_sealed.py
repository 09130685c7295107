"""Boxes open for their one sender, receiver and session, unaltered; and for nobody else."""

import pytest
from Crypto.Cipher import AES

from secagg import RemoteProtocolError
from secagg.prg import Label, domain
from secagg.sealed import TAG_BYTES, channel_key, seal, unseal

SHARED = b"\x11" * 32
SESSION = bytes(range(32))
OTHER_SESSION = bytes(32)
TEXT = b"shares of u for v"
KEY = channel_key(SHARED, SESSION, 1, 2)
BOX = seal(KEY, SESSION, 1, 2, TEXT)


def test_a_box_opens_for_whom_it_was_sealed():
    assert unseal(KEY, SESSION, 1, 2, BOX) == TEXT
    assert len(BOX) == len(TEXT) + TAG_BYTES
    assert TEXT not in BOX


def test_a_box_is_aes_gcm_by_another_library_too():
    cipher = AES.new(KEY, AES.MODE_GCM, nonce=bytes(12))
    cipher.update(domain(Label.CHANNEL, SESSION, 1, 2))
    assert b"".join(cipher.encrypt_and_digest(TEXT)) == BOX


@pytest.mark.parametrize(
    ("session", "sender", "receiver"),
    [(OTHER_SESSION, 1, 2), (SESSION, 2, 1), (SESSION, 3, 2), (SESSION, 1, 3)],
    ids=["replayed", "reflected", "another sender", "moved to another receiver"],
)
def test_a_box_opens_in_no_other_place_though_the_key_were_the_same(session, sender, receiver):
    with pytest.raises(RemoteProtocolError, match="altered, reflected or replayed") as caught:
        unseal(KEY, session, sender, receiver, BOX)
    assert caught.value.culprits == frozenset()


def test_each_direction_pair_and_session_has_its_own_key():
    """So the constant nonce meets each key once."""
    places = [(s, u, v) for s in (SESSION, OTHER_SESSION) for u in range(4) for v in range(4)]
    keys = {channel_key(SHARED, *place) for place in places}
    assert len(keys) == len(places)
    assert SHARED[:16] not in keys


@pytest.mark.parametrize("at", range(len(BOX)))
def test_a_box_with_any_byte_changed_does_not_open(at):
    for flip in (1, 0x80, 0xFF):
        spoiled = bytearray(BOX)
        spoiled[at] ^= flip
        with pytest.raises(RemoteProtocolError):
            unseal(KEY, SESSION, 1, 2, bytes(spoiled))


@pytest.mark.parametrize("length", [*range(len(BOX)), len(BOX) + 1])
def test_a_box_of_another_length_does_not_open(length):
    with pytest.raises(RemoteProtocolError):
        unseal(KEY, SESSION, 1, 2, (BOX + b"\0")[:length])


@pytest.mark.parametrize("key", [bytes(16), KEY[:15] + bytes(1), KEY + KEY, KEY[:15], b""], ids=bytes.hex)
def test_a_box_opens_under_no_other_key_also_none_that_aes_would_not_take(key):
    with pytest.raises(RemoteProtocolError, match="altered, reflected or replayed"):
        unseal(key, SESSION, 1, 2, BOX)
