"""Vectors over the ring Z_{2^b}: the numbers that masks hide and that a sum is made of.

A ring of up to 32 bits lives in `uint32`, a wider one (up to 64) in `uint64`. Arithmetic wraps in the machine word and
is reduced to b bits only when a vector leaves the process: 2^b divides 2^32 and 2^64, so the order does not matter.
On the wire a vector is little-endian and packed to exactly b bits a value.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from secagg.errors import DecodeError, LocalProtocolError

RingVector = npt.NDArray[np.unsignedinteger[Any]]
"""`uint32` for rings of up to 32 bits, else `uint64`; shape [d]."""

# Values packed at a time: a block and its packed words stay in a level-2 cache.
_PACK_BLOCK = 1 << 15


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
        little = vector.dtype.newbyteorder("<")
        if self.bits == self.word_bits:
            return vector.astype(little, copy=False).tobytes()
        values, words = self._group()
        block = _PACK_BLOCK // values * values
        mask = vector.dtype.type(self.modulus - 1)
        out = np.empty((-(-vector.size // values), words), little)
        for start in range(0, vector.size, block):
            part = vector[start : start + block] & mask
            if part.size % values:
                part = np.concatenate([part, np.zeros(-part.size % values, part.dtype)])
            rows = part.reshape(-1, values)
            packed = np.zeros((rows.shape[0], words), vector.dtype)
            for column in range(values):
                word, offset = divmod(column * self.bits, self.word_bits)
                packed[:, word] |= rows[:, column] << offset
                if offset + self.bits > self.word_bits:
                    packed[:, word + 1] |= rows[:, column] >> (self.word_bits - offset)
            out[start // values : start // values + rows.shape[0]] = packed
        return out.tobytes()[: self.packed_size(vector.size)]

    def unpack(self, data: bytes, size: int) -> RingVector:
        """Read `size` values back.

        Raises:
            DecodeError: Another length than `packed_size(size)`, or unused bits at the end that are not zero.
        """
        if len(data) != self.packed_size(size):
            raise DecodeError(
                f"{size} values of {self.bits} bits take {self.packed_size(size)} bytes, got {len(data)} bytes"
            )
        unused = -self.bits * size % 8
        if unused and data[-1] >> (8 - unused):
            raise DecodeError(f"the last {unused} bits of a packed vector are unused and must be zero")
        little = self.dtype.newbyteorder("<")
        if self.bits == self.word_bits:
            return np.frombuffer(data, little).astype(self.dtype)
        values, words = self._group()
        block = _PACK_BLOCK // values
        groups = -(-size // values)
        padded = data + bytes(groups * words * self.dtype.itemsize - len(data))
        packed = np.frombuffer(padded, little).reshape(groups, words)
        out = np.empty((groups, values), self.dtype)
        mask = self.dtype.type(self.modulus - 1)
        for start in range(0, groups, block):
            part = packed[start : start + block].astype(self.dtype, copy=False)
            for column in range(values):
                word, offset = divmod(column * self.bits, self.word_bits)
                value = part[:, word] >> offset
                if offset + self.bits > self.word_bits:
                    value |= part[:, word + 1] << (self.word_bits - offset)
                np.bitwise_and(value, mask, out=out[start : start + block, column])
        return out.reshape(-1)[:size].copy() if groups * values != size else out.reshape(-1)

    def _group(self) -> tuple[int, int]:
        """The smallest run of values that fills whole words: (values, words)."""
        common = gcd(self.bits, self.word_bits)
        return self.word_bits // common, self.bits // common
