"""Vectors over the ring Z_{2^b}: the numbers that masks hide and that a sum is made of.

A ring of up to 32 bits lives in `uint32`, a wider one (up to 64) in `uint64`. Arithmetic wraps in the machine word and
is reduced to b bits only when a vector leaves the process: 2^b divides 2^32 and 2^64, so the order does not matter.
On the wire a vector is little-endian and packed to exactly b bits a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from secagg.errors import DecodeError, LocalProtocolError

RingVector = npt.NDArray[np.unsignedinteger[Any]]
"""`uint32` for rings of up to 32 bits, else `uint64`; shape [d]."""

# Values packed at a time: a block and its packed bytes stay in a level-2 cache.
_PACK_BLOCK = 1 << 16


class Ring(Struct, frozen=True):
    """The integers modulo 2**bits, and how vectors of them look in memory and on the wire.

    Attributes:
        bits: Width b of the ring, 1 to 64.

    Raises:
        LocalProtocolError: `bits` is out of range.

    >>> ring = Ring(26)
    >>> ring.unpack(ring.pack(np.arange(5, dtype=np.uint32)), 5)
    array([0, 1, 2, 3, 4], dtype=uint32)
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 64:
            raise LocalProtocolError(f"a ring has 1 to 64 bits, not {self.bits}")

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """`uint32` for at most 32 bits, else `uint64`."""
        return np.dtype(np.uint32) if self.bits <= 32 else np.dtype(np.uint64)

    @property
    def word_bits(self) -> int:
        """Width of the machine word that holds one value: 32 or 64."""
        return 8 * self.dtype.itemsize

    @property
    def modulus(self) -> int:
        """2**bits."""
        return 1 << self.bits

    def zeros(self, size: int) -> RingVector:
        """A vector of `size` zeros, to add into."""
        return np.zeros(size, self.dtype)

    def check(self, vector: RingVector, size: int) -> None:
        """Refuse what is no contiguous vector of `size` words of this ring.

        Raises:
            LocalProtocolError: Another type, shape, dtype or layout.
        """
        if not isinstance(vector, np.ndarray):
            raise LocalProtocolError(f"expected a numpy vector of {self.dtype}, got {type(vector).__name__}")
        if vector.dtype != self.dtype or vector.shape != (size,):
            raise LocalProtocolError(
                f"expected shape ({size},) and dtype {self.dtype} for a ring of {self.bits} bits, "
                f"got {vector.shape} and {vector.dtype}"
            )
        if not vector.flags.c_contiguous:
            raise LocalProtocolError("expected a contiguous vector, got a strided view; pass a copy")

    def reduce(self, vector: RingVector) -> RingVector:
        """Bring every value below 2**bits, in place, and return the same array."""
        if self.bits != self.word_bits:
            np.bitwise_and(vector, vector.dtype.type(self.modulus - 1), out=vector)
        return vector

    def embed(self, values: npt.NDArray[np.int64]) -> RingVector:
        """Signed whole numbers as ring elements, modulo 2**bits; the inverse of `signed` where they fit."""
        return self.reduce(values.astype(self.dtype))

    def signed(self, vector: RingVector) -> npt.NDArray[np.int64]:
        """The representatives in [-2**(bits-1), 2**(bits-1)), as `int64` (two's complement)."""
        shift = 64 - self.bits
        return (vector.astype(np.uint64) << np.uint64(shift)).view(np.int64) >> np.int64(shift)

    def packed_size(self, size: int) -> int:
        """Bytes on the wire for `size` values: bits * size / 8, rounded up."""
        return (self.bits * size + 7) // 8

    def pack(self, vector: RingVector) -> bytes:
        """Write each value's low `bits` bits one after another, little-endian; unused bits at the end are zero."""
        self.check(vector, np.size(vector))
        if self.bits == self.word_bits:
            return vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()
        values, octets = self._run()
        block = _PACK_BLOCK // values * values
        mask = vector.dtype.type(self.modulus - 1)
        out = np.zeros(-(-vector.size // values) * octets + self.dtype.itemsize, np.uint8)
        for start in range(0, vector.size, block):
            part = vector[start : start + block] & mask
            for where, shift, words, spill in self._columns(out[start // values * octets :], part.size):
                value = part[where]
                words |= value << shift
                if spill is not None:
                    spill |= (value >> (self.word_bits - shift)).astype(np.uint8)
        return out[: self.packed_size(vector.size)].tobytes()

    def unpack(self, data: bytes | memoryview, size: int) -> RingVector:
        """Read `size` values back.

        Raises:
            DecodeError: Another length than `packed_size(size)`, or unused bits at the end that are not zero.
        """
        self._check_packed(data, size)  # before so many values are allocated
        out = self.zeros(size)
        self.add_packed(out, data)
        return out

    def add_packed(self, total: RingVector, data: bytes | memoryview) -> None:
        """Add a packed vector, in place and block by block: nothing of its size is allocated.

        Args:
            total: Shape [d] over this ring; wraps in its machine word.
            data: d values as `pack` writes them.

        Raises:
            LocalProtocolError: `total` is no contiguous vector of this ring.
            DecodeError: What `unpack` refuses; `total` is as it was.
        """
        self.check(total, np.size(total))
        self._check_packed(data, total.size)
        if self.bits == self.word_bits:
            np.add(total, np.frombuffer(data, self.dtype.newbyteorder("<")), out=total)
            return
        values, octets = self._run()
        block = _PACK_BLOCK // values * values
        mask = self.dtype.type(self.modulus - 1)
        view, length = memoryview(data), block // values * octets + self.dtype.itemsize
        for start in range(0, total.size, block):
            part = total[start : start + block]
            packed = view[start // values * octets :][:length]
            if len(packed) < length:  # at the end, where a word may reach over it
                packed = memoryview(bytes(packed) + bytes(self.dtype.itemsize))
            for where, shift, words, spill in self._columns(packed, part.size):
                value = words >> shift
                if spill is not None:
                    value |= spill.astype(self.dtype) << (self.word_bits - shift)
                part[where] += value & mask

    def _check_packed(self, data: bytes | memoryview, size: int) -> None:
        if len(data) != self.packed_size(size):
            raise DecodeError(
                f"{size} values of {self.bits} bits take {self.packed_size(size)} bytes, got {len(data)} bytes"
            )
        unused = -self.bits * size % 8
        if unused and data[-1] >> (8 - unused):
            raise DecodeError(f"the last {unused} bits of a packed vector are unused and must be zero")

    def _run(self) -> tuple[int, int]:
        """The smallest run of values that fills whole bytes and at least a machine word: (values, bytes)."""
        common = gcd(self.bits, 8)
        times = -(-self.dtype.itemsize * common // self.bits)
        return 8 // common * times, self.bits // common * times

    def _columns(
        self, packed: npt.NDArray[np.uint8] | memoryview, size: int
    ) -> Iterator[tuple[slice, int, RingVector, npt.NDArray[np.uint8] | None]]:
        """Where `size` packed values stand: the first values of all runs, then the second ones, and so on.

        A value starts at bit `shift` of a word that starts at any byte, and ends in it or in the byte after it. Words
        of one column do not overlap, because a run is no shorter than a word.

        Args:
            packed: The bytes, and after them room for a word, over which the last one may reach.
            size: How many values.

        Yields:
            The values' places among the `size`, shift, words, and the bytes after the words or None where none is
            needed. Words and bytes are views of `packed`.
        """
        values, octets = self._run()
        word = self.dtype.newbyteorder("<")
        for column in range(min(values, size)):
            at, shift = divmod(column * self.bits, 8)
            where = slice(column, size, values)
            shape = (len(range(column, size, values)),)
            words = np.ndarray(shape, word, packed, at, (octets,))
            spills = shift + self.bits > self.word_bits
            spill = np.ndarray(shape, np.uint8, packed, at + word.itemsize, (octets,)) if spills else None
            yield where, shift, words, spill
