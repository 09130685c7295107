"""Vectors over Z_{2^b}: exact width, fixed byte order, one form for each vector."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import DecodeError, LocalProtocolError, Ring
from secagg.ring import _PACK_BLOCK


def drawn(ring, size, seed=0):
    """Values from the whole ring, its least and its greatest first."""
    rng = np.random.default_rng(seed)
    vector = rng.integers(0, np.uint64(ring.modulus - 1), size, dtype=np.uint64, endpoint=True).astype(ring.dtype)
    vector[:2] = [0, ring.modulus - 1][: len(vector[:2])]
    return vector


def by_the_book(ring, vector):
    """Packing with one Python integer: value i stands at bit i * b, the whole is little-endian."""
    number = sum(int(value) << (i * ring.bits) for i, value in enumerate(vector))
    return number.to_bytes((ring.bits * len(vector) + 7) // 8, "little")


@pytest.mark.parametrize("bits", range(1, 65))
def test_packing_is_what_the_definition_says_and_unpacks_to_the_same(bits):
    ring = Ring(bits)
    for size in (0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 130):
        vector = drawn(ring, size)
        packed = ring.pack(vector)
        assert packed == by_the_book(ring, vector)
        assert len(packed) == ring.packed_size(size) == -(-bits * size // 8)
        back = ring.unpack(packed, size)
        assert back.dtype == ring.dtype
        assert back.shape == (size,)
        assert (back == vector).all()


@pytest.mark.parametrize("bits", [1, 20, 26, 33, 36, 52, 63])
def test_packing_over_several_blocks_is_the_same_as_in_one(bits):
    ring = Ring(bits)
    for size in (_PACK_BLOCK - 1, _PACK_BLOCK, _PACK_BLOCK + 1, 2 * _PACK_BLOCK + 12345):
        vector = drawn(ring, size)
        packed = ring.pack(vector)
        # A run of 64 values fills whole bytes, so runs can be packed apart.
        assert packed == b"".join(by_the_book(ring, vector[i : i + 64].tolist()) for i in range(0, size, 64))
        assert (ring.unpack(packed, size) == vector).all()


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (4, [1, 2, 15], "210f"),
        (12, [0xABC, 0x123], "bc3a12"),
        (20, [0x12345, 0xABCDE, 0xFFFFF], "4523e1cdabffff0f"),
        (32, [0x01020304, 0xFFFFFFFE], "04030201feffffff"),
        (36, [0x123456789, 0xABCDEF012], "896745232101efcdab"),
        (64, [0x0102030405060708], "0807060504030201"),
    ],
)
def test_the_byte_order_is_fixed(bits, values, expected):
    ring = Ring(bits)
    assert ring.pack(np.array(values, ring.dtype)).hex() == expected
    assert ring.unpack(bytes.fromhex(expected), len(values)).tolist() == values


@settings(deadline=None, max_examples=200)
@given(bits=st.integers(1, 64), size=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_pack_sends_only_the_low_bits_and_unpack_inverts_it(bits, size, seed):
    ring = Ring(bits)
    dirty = np.random.default_rng(seed).integers(0, 2**ring.word_bits - 1, size, dtype=ring.dtype, endpoint=True)
    packed = ring.pack(dirty)
    assert ring.unpack(packed, size).tolist() == [int(v) % ring.modulus for v in dirty]
    assert ring.pack(ring.unpack(packed, size)) == packed


def test_pack_does_not_change_its_argument():
    vector = np.full(100, 2**32 - 1, np.uint32)
    Ring(20).pack(vector)
    assert (vector == 2**32 - 1).all()


@pytest.mark.parametrize(("bits", "size"), [(20, 1), (1, 3), (26, 5), (33, 1), (63, 7), (12, 33)])
def test_padding_bits_that_are_not_zero_are_refused(bits, size):
    ring = Ring(bits)
    packed = ring.pack(drawn(ring, size))
    for bit in range(bits * size % 8, 8):
        spoiled = packed[:-1] + bytes([packed[-1] | 1 << bit])
        with pytest.raises(DecodeError, match="must be zero"):
            ring.unpack(spoiled, size)


@pytest.mark.parametrize("bits", [1, 20, 32, 36, 64])
def test_another_length_is_refused(bits):
    ring = Ring(bits)
    packed = ring.pack(drawn(ring, 16))
    for wrong in (b"", packed[:-1], packed + b"\0", packed * 2):
        with pytest.raises(DecodeError, match=f"16 values of {bits} bits take {len(packed)} bytes, got {len(wrong)}"):
            ring.unpack(wrong, 16)


@pytest.mark.parametrize("bits", range(1, 65))
def test_adding_a_packed_vector_is_unpacking_it_and_adding(bits):
    """At every byte that a message may have it at, and wrapping in the machine word."""
    ring = Ring(bits)
    for size in (0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 130):
        packed, before = ring.pack(drawn(ring, size, seed=1)), np.iinfo(ring.dtype).max - drawn(ring, size, seed=2)
        within = [memoryview(bytes(at) + packed + b"\xff" * 9)[at : at + len(packed)] for at in (1, 4, 7)]
        for data in (packed, *within):
            total = before.copy()
            assert ring.add_packed(total, data) is None
            assert (total == before + ring.unpack(packed, size)).all()
            assert (ring.unpack(data, size) == ring.unpack(packed, size)).all()


@pytest.mark.parametrize("bits", [1, 20, 26, 27, 32, 33, 36, 52, 59, 63, 64])
@pytest.mark.parametrize("size", [_PACK_BLOCK - 1, _PACK_BLOCK, _PACK_BLOCK + 1, 2 * _PACK_BLOCK + 12345])
def test_adding_over_several_blocks_is_the_same_as_in_one(bits, size):
    ring = Ring(bits)
    vector, total = drawn(ring, size), drawn(ring, size, seed=1)
    expected = total + vector
    ring.add_packed(total, ring.pack(vector))
    assert (total == expected).all()


@pytest.mark.parametrize("bits", [1, 20, 27, 36, 63])
def test_a_packed_vector_that_is_refused_adds_nothing(bits):
    ring, size = Ring(bits), _PACK_BLOCK + 1  # the last value is in a block of its own
    total = drawn(ring, size, seed=1)
    before, packed = total.copy(), ring.pack(drawn(ring, size))
    for wrong in (b"", packed[:-1], packed + b"\0", packed * 2, packed[:-1] + bytes([packed[-1] | 0x80])):
        for data in (wrong, memoryview(wrong)):
            with pytest.raises(DecodeError) as refused:
                ring.unpack(data, size)
            with pytest.raises(DecodeError) as added:
                ring.add_packed(total, data)
            assert str(added.value) == str(refused.value)
            assert (total == before).all()


@pytest.mark.parametrize(
    "total",
    [
        [1, 2, 3],
        np.zeros(3, np.uint64),
        np.zeros(3, np.int32),
        np.zeros((2, 2), np.uint32),
        np.zeros(6, np.uint32)[::2],
    ],
    ids=["list", "wide", "signed", "matrix", "strided"],
)
def test_a_packed_vector_is_added_only_to_a_vector_of_the_ring(total):
    packed = Ring(20).pack(drawn(Ring(20), np.size(total)))
    with pytest.raises(LocalProtocolError):
        Ring(20).add_packed(total, packed)
    assert np.sum(total) in (0, 6)


@pytest.mark.parametrize("bits", [20, 26, 32, 36, 63, 64])
def test_adding_a_packed_vector_takes_no_memory_of_its_size(bits):
    ring = Ring(bits)
    peaks = []
    for size in (1 << 20, 1 << 22):
        total, packed = ring.zeros(size), memoryview(b"\1" + ring.pack(drawn(ring, size)))[1:]
        tracemalloc.start()
        ring.add_packed(total, packed)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1 << 21  # some blocks; the larger vector has 16 MiB or more
    assert peaks[1] < peaks[0] + 4096


def test_an_unpacked_vector_can_be_added_into():
    for bits in (20, 32, 64):
        ring = Ring(bits)
        vector = ring.unpack(ring.pack(drawn(ring, 7)), 7)
        vector += ring.zeros(7)


@pytest.mark.parametrize("bits", [1, 2, 20, 31, 32, 33, 63, 64])
def test_signed_reads_twos_complement(bits):
    ring, half = Ring(bits), 1 << (bits - 1)
    for value in {-half, -half + 1, -1, 0, 1, half - 1}:
        if -half <= value < half:
            assert ring.signed(np.array([value % ring.modulus], ring.dtype)).tolist() == [value]
    assert ring.signed(ring.zeros(1)).dtype == np.int64


@pytest.mark.parametrize("bits", [1, 20, 31, 32, 33, 63, 64])
def test_reduce_brings_values_below_the_modulus_in_place(bits):
    ring = Ring(bits)
    vector = np.array([0, 1, 2**ring.word_bits - 1, 2 ** (ring.word_bits - 1)], ring.dtype)
    expected = [int(v) % ring.modulus for v in vector]
    assert ring.reduce(vector) is vector
    assert vector.tolist() == expected


@pytest.mark.parametrize("bits", [-1, 0, 65, 128])
def test_a_ring_has_1_to_64_bits(bits):
    with pytest.raises(LocalProtocolError, match=f"1 to 64 bits, not {bits}"):
        Ring(bits)


def test_word_and_modulus():
    assert [(Ring(b).word_bits, Ring(b).dtype) for b in (1, 32, 33, 64)] == [
        (32, np.uint32),
        (32, np.uint32),
        (64, np.uint64),
        (64, np.uint64),
    ]
    assert Ring(36).modulus == 2**36


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        ([1, 2, 3], "got list"),
        (np.zeros(4, np.uint32), r"got \(4,\)"),
        (np.zeros((3, 1), np.uint32), r"got \(3, 1\)"),
        (np.zeros(3, np.uint64), "uint64"),
        (np.zeros(3, np.int32), "int32"),
        (np.zeros(3), "float64"),
        (np.zeros(3, ">u4"), ">u4"),
        (np.zeros(6, np.uint32)[::2], "strided"),
    ],
    ids=["list", "long", "matrix", "wide", "signed", "float", "big-endian", "strided"],
)
def test_what_is_no_vector_of_the_ring_is_refused(vector, says):
    with pytest.raises(LocalProtocolError, match=says):
        Ring(20).check(vector, 3)
    Ring(20).check(np.zeros(3, np.uint32), 3)


@pytest.mark.parametrize("vector", [np.zeros((3, 2), np.uint32), np.zeros(3, np.uint64), np.zeros(6, np.uint32)[::2]])
def test_pack_checks_its_vector(vector):
    with pytest.raises(LocalProtocolError):
        Ring(20).pack(vector)


def test_pack_refuses_what_is_no_array():
    with pytest.raises(LocalProtocolError):
        Ring(20).pack([1, 2, 3])


def test_a_length_that_the_bytes_do_not_have_is_refused_before_anything_is_allocated():
    with pytest.raises(DecodeError, match="70368744177664 values of 26 bits take"):
        Ring(26).unpack(b"", 1 << 46)
