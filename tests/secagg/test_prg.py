"""Keys and keystream: the same bytes as another library's, uniform over the ring, and no input used for two ends."""

import itertools
import pickle
import threading

import numpy as np
import pytest
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import LocalProtocolError, Ring, Stream, deterministic_entropy
from secagg.prg import _BLOCK_BYTES, KEY_BYTES, Label, add_keystream, derive, domain
from tests.secagg.simulation import assert_uniform

KEY = bytes(range(16))
SESSION = bytes(range(32))


def keystream(key, count):
    """AES-128-CTR from a zero counter, by pycryptodome."""
    return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(count))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("extra", [-3, -1, 0, 1, 7])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_the_mask_is_aes_ctr_byte_for_byte_over_block_boundaries(dtype, extra, blocks):
    size = max(0, blocks * _BLOCK_BYTES // np.dtype(dtype).itemsize + extra)
    vector = np.zeros(size, dtype)
    add_keystream(vector, KEY, +1)
    little = np.dtype(dtype).newbyteorder("<")
    assert vector.astype(little).tobytes() == keystream(KEY, vector.nbytes)


def test_the_mask_of_the_zero_key_is_the_published_block():
    """AES-128 of the zero block under the zero key is 66e94bd4ef8a2c3b884cfa59ca342b2e."""
    vector = np.zeros(4, np.uint32)
    add_keystream(vector, bytes(16), +1)
    assert vector.astype("<u4").tobytes().hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"


@settings(deadline=None, max_examples=50)
@given(
    key=st.binary(min_size=16, max_size=16),
    size=st.integers(0, 300),
    wide=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_added_then_subtracted_gives_back_the_vector(key, size, wide, seed):
    vector = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint64)
    vector = vector if wide else vector.astype(np.uint32)
    before = vector.copy()
    add_keystream(vector, key, +1)
    assert size < 8 or (vector != before).any()
    add_keystream(vector, key, -1)
    assert (vector == before).all()


def test_a_shorter_mask_is_the_beginning_of_a_longer_one():
    long, short = np.zeros(200_000, np.uint32), np.zeros(70_001, np.uint32)
    add_keystream(long, KEY, +1)
    add_keystream(short, KEY, +1)
    assert (long[: len(short)] == short).all()


@pytest.mark.parametrize("bits", [1, 3, 8, 20, 32, 33, 64])
def test_a_mask_is_uniform_over_the_whole_ring_the_top_value_included(bits):
    """Chi-square on the low and the high bits of the reduced value, false alarm 1e-6 each, for one fixed key."""
    ring, cells = Ring(bits), min(8, bits)
    vector = ring.zeros(1 << 16)
    add_keystream(vector, KEY, +1)
    ring.reduce(vector)
    assert_uniform(vector & vector.dtype.type((1 << cells) - 1), 1 << cells)
    assert_uniform(vector >> vector.dtype.type(bits - cells), 1 << cells)
    if bits <= 8:
        assert vector.max() == ring.modulus - 1
        assert vector.min() == 0


@pytest.mark.parametrize("sign", [0, 2, -2])
def test_a_sign_that_is_neither_is_refused(sign):
    with pytest.raises(LocalProtocolError, match=f"got {sign}"):
        add_keystream(np.zeros(4, np.uint32), KEY, sign)


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(17), bytes(24), bytes(32)], ids=len)
def test_a_key_of_another_length_is_refused_even_where_aes_would_take_it(key):
    for use in (lambda: add_keystream(np.zeros(4, np.uint32), key, 1), lambda: Stream(key)):
        with pytest.raises(LocalProtocolError, match=f"16 bytes, got {len(key)}"):
            use()


def test_derive_is_hkdf_sha256_with_the_session_as_salt():
    for label, numbers in itertools.product(Label, [(), (0,), (7, 2**63)]):
        info = domain(label, SESSION, *numbers)
        assert derive(b"secret", label, SESSION, *numbers) == HKDF(b"secret", 16, SESSION, SHA256, 1, info)
    assert len(derive(b"secret", Label.CHANNEL, SESSION)) == KEY_BYTES


def test_a_domain_is_version_label_session_and_fixed_width_numbers():
    assert domain(Label.CHANNEL, SESSION, 1, 258) == (
        b"\x10secagg-1/channel" + SESSION + bytes(7) + b"\x01" + bytes(6) + b"\x01\x02"
    )


def test_every_difference_gives_another_key():
    secrets = [b"secret", b"other"]
    sessions = [SESSION, bytes(32)]
    numbers = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (256,), (0, 256)]
    keys = [derive(*each[:3], *each[3]) for each in itertools.product(secrets, Label, sessions, numbers)]
    assert len(set(keys)) == len(keys) == 2 * len(Label) * 2 * len(numbers)


def test_labels_are_distinct_and_no_domain_begins_another():
    assert len(Label) == len(set(Label)) == len(Label.__members__)
    domains = [domain(label, SESSION) for label in Label]
    for a, b in itertools.permutations(domains, 2):
        assert not a.startswith(b)
    assert all(len(label.value) + len(b"secagg-1/") < 256 for label in Label)


def test_a_stream_is_the_keystream_in_order_however_it_is_read():
    whole = keystream(KEY, 4 * 400_000)
    stream = Stream(KEY)
    assert stream.read(8) == whole[:8]
    small, large, none = np.zeros(3, np.uint32), np.zeros(300_000, np.uint32), np.zeros(0, np.uint32)
    for words in (small, large, none):  # the second is more than one block
        stream.fill(words)
    assert small.astype("<u4").tobytes() == whole[8:20]
    assert large.astype("<u4").tobytes() == whole[20 : 20 + 1_200_000]
    assert stream.read(5) == whole[1_200_020:1_200_025]


def test_a_stream_does_not_pickle_and_shows_nothing():
    stream = Stream(KEY)
    with pytest.raises(LocalProtocolError):
        pickle.dumps(stream)
    assert KEY.hex() not in repr(stream)
    assert repr(KEY)[2:-1] not in repr(stream)


def test_deterministic_entropy_repeats_itself_and_differs_by_seed():
    first, again, other = (deterministic_entropy(seed) for seed in (b"a", b"a", b"b"))
    said = [first(32), first(32)]
    assert said == [again(32), again(32)]
    assert len({*said, other(32)}) == 3


def test_threads_that_mask_at_the_same_time_do_not_mix_their_keystreams():
    keys = [bytes([i]) * 16 for i in range(4)]
    expected = []
    for key in keys:
        vector = np.zeros(300_000, np.uint32)
        add_keystream(vector, key, +1)
        expected.append(vector)
    start, wrong = threading.Barrier(len(keys)), []

    def work(i):
        start.wait()
        for _ in range(10):
            vector = np.zeros(300_000, np.uint32)
            add_keystream(vector, keys[i], +1)
            if (vector != expected[i]).any():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
