"""Floats to ring elements and back, with a proof that the sum cannot wrap.

A participant's vector x of floats with weight w becomes [w, round(w x 2^f)] in two's complement over Z_{2^b}. The
weight is the vector's first entry, so it is masked like the rest: whoever opens the sum learns the sum of the weights
and the weighted mean, and neither from a single participant.

Rounding is stochastic, without bias, from a keystream (Bonawitz et al. 2019, "Federated learning with autotuned
communication-efficient secure aggregation", section 2), and clips after it rounds, so no value can exceed its bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from secagg.errors import EmptySum, HeadroomError, LocalProtocolError, RemoteProtocolError
from secagg.prg import Stream
from secagg.ring import Ring, RingVector

Floats = npt.NDArray[np.floating[Any]]

# Values at a time, so that every intermediate stays in a level-2 cache.
_BLOCK = 1 << 16
# float32 holds integers exactly up to here; beyond it the arithmetic is float64.
_FLOAT32_EXACT = 1 << 23
_FLOAT64_EXACT = 1 << 53
_MAX_FRACTION_BITS = 100
_LIMBS = 5
_LIMB_MODULUS = 1 << 32 * _LIMBS
_LIMB_FRACTION = 80


class Encoded(Struct, frozen=True):
    """A participant's vector, ready to be masked.

    Attributes:
        vector: Ring elements, shape [1 + d]; the weight, then the values.
        clipped: How many of the d values lay outside [-max_value, max_value] and were clipped.
    """

    vector: RingVector
    clipped: int


class ExactSum(Struct, frozen=True):
    """Exact sums of numbers in any unit, for statistics: each number as five limbs of 32 bits.

    A number is rounded to a multiple of 2**-80 and written modulo 2**160 as limbs. The ring is wide enough that summing
    limbs never wraps, and the limbs' sums give the numbers' sum, which is kept below 2**79. A limb takes a ring
    element, so this is for tens of numbers and not for models.

    Attributes:
        clients: The most participants in one sum.
    """

    clients: int

    @property
    def ring(self) -> Ring:
        """The ring of the sum: 32 bits and room for all clients."""
        return Ring(32 + self.clients.bit_length())

    @property
    def limit(self) -> float:
        """What a participant's numbers must stay below in absolute value: 2**79 / clients."""
        return 2.0**79 / self.clients

    def dimension(self, numbers: int) -> int:
        """Ring elements for so many numbers."""
        return _LIMBS * numbers

    def encode(self, numbers: Sequence[float]) -> RingVector:
        """One participant's vector, shape [5 x numbers].

        Raises:
            LocalProtocolError: NaN, infinity, or an absolute value of `limit` or more.
        """
        out = np.zeros((len(numbers), _LIMBS), self.ring.dtype)
        for i, number in enumerate(numbers):
            if not abs(number) < self.limit:
                raise LocalProtocolError(f"number {i} is {number}; expected a finite one below {self.limit:.3g}")
            units = round(Fraction(number) * 2**_LIMB_FRACTION) % _LIMB_MODULUS
            out[i] = [units >> 32 * limb & 0xFFFFFFFF for limb in range(_LIMBS)]
        return out.reshape(-1)

    def decode(self, total: RingVector) -> list[Fraction]:
        """The exact sums, one fraction for each number."""
        sums = []
        for limbs in total.reshape(-1, _LIMBS).tolist():
            units = sum(value << 32 * limb for limb, value in enumerate(limbs)) % _LIMB_MODULUS
            signed = units - _LIMB_MODULUS if units >= _LIMB_MODULUS // 2 else units
            sums.append(Fraction(signed, 2**_LIMB_FRACTION))
        return sums


class FixedPoint(Struct, frozen=True):
    """How floats become ring elements, the same at every participant of a sum. Make it with `plan`.

    Attributes:
        clients: The most participants in one sum.
        max_value: Largest absolute value of an entry; larger ones are clipped.
        max_weight: Largest weight of a participant.
        fraction_bits: f: the unit is 2**-f.
        ring_bits: b: the ring is Z_{2^b}.

    Raises:
        HeadroomError: The sum could wrap.
        LocalProtocolError: A parameter that makes no sense.
    """

    clients: int
    max_value: float
    max_weight: int
    fraction_bits: int
    ring_bits: int

    def __post_init__(self) -> None:
        needed = _needed_bits(self.clients, self.max_value, self.max_weight, self.fraction_bits)
        if self.ring_bits < needed:
            raise HeadroomError(
                f"{self.clients} clients x largest value {self.max_value} x weight {self.max_weight} "
                f"x 2^{self.fraction_bits} needs a ring of {needed} bits, got {self.ring_bits}: the sum could wrap"
            )
        Ring(self.ring_bits)

    @property
    def ring(self) -> Ring:
        """The ring of the sum."""
        return Ring(self.ring_bits)

    @property
    def unit_limit(self) -> int:
        """Largest absolute value of an entry of weight 1, in units of 2**-f."""
        return _unit_limit(self.max_value, self.fraction_bits)

    def encode(self, values: Floats, weight: int, stream: Stream) -> Encoded:
        """One participant's contribution [w, round(w x 2^f)].

        Args:
            values: `float32` or `float64`, shape [d].
            weight: Integer from 0 to `max_weight`; 0 contributes nothing to the mean.
            stream: Secure random bits for the rounding, used for this vector only.

        Raises:
            LocalProtocolError: Another dtype or shape, NaN or infinity, or a weight out of range.
        """
        if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype not in (np.float32, np.float64):
            got = f"{values.dtype}, shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
            raise LocalProtocolError(f"expected a vector of float32 or float64, got {got}")
        if isinstance(weight, bool) or not isinstance(weight, int | np.integer):
            raise LocalProtocolError(f"expected an integer weight, got {weight!r} ({type(weight).__name__})")
        if not 0 <= weight <= self.max_weight:
            raise LocalProtocolError(f"the weight must be 0 to {self.max_weight}, got {weight}")
        limit = int(weight) * self.unit_limit
        work = np.dtype(np.float32) if values.dtype == np.float32 and limit < _FLOAT32_EXACT else np.dtype(np.float64)
        signed = np.dtype(np.int32) if self.ring.dtype == np.uint32 else np.dtype(np.int64)
        out = np.empty(1 + values.size, self.ring.dtype)
        out[0] = weight
        entries = out[1:].view(signed)
        scale, clipped = work.type(int(weight) * 2.0**self.fraction_bits), 0
        rounder = _Rounder(work, min(values.size, _BLOCK), stream)
        for start in range(0, values.size, _BLOCK):
            block = values[start : start + _BLOCK]
            largest = max(block.max(), -block.min())  # NaN in either makes the comparison below false
            if not largest <= np.finfo(block.dtype).max:
                bad = start + int(np.flatnonzero(~np.isfinite(block))[0])
                raise LocalProtocolError(
                    f"entry {bad} of the vector is {values[bad]}; nothing was sent. A model that diverges gives this: "
                    "lower its learning rate"
                )
            if largest > self.max_value:
                clipped += int(np.count_nonzero(np.abs(block) > self.max_value))
                block = np.clip(block, -self.max_value, self.max_value)
            rounded = rounder.round(block, scale)
            if float(largest) * float(scale) > limit - 1:
                np.clip(rounded, -limit, limit, out=rounded)
            entries[start : start + _BLOCK] = rounded
        return Encoded(self.ring.reduce(out), clipped)

    def decode(self, total: RingVector, *, error: float = 0.0) -> tuple[int, npt.NDArray[np.float64]]:
        """The opened sum as (sum of weights, weighted mean of shape [d]).

        Args:
            total: The sum; its first entry, the weights, exact.
            error: By how many units an entry may be off because the sum was opened with noise.

        Raises:
            EmptySum: All weights were zero.
            RemoteProtocolError: A sum that no honest participants can have produced.
        """
        weight = int(total[0])
        if weight == 0:
            raise EmptySum("the weights of all participants add up to 0: there is no mean")
        if weight > self.clients * self.max_weight:
            raise RemoteProtocolError(
                f"the weights add up to {weight}, more than {self.clients} clients x {self.max_weight}: "
                "a participant sent a vector outside its bounds"
            )
        mean = np.empty(total.size - 1)
        for start in range(0, mean.size, _BLOCK):
            sums = self.ring.signed(total[1 + start : 1 + start + _BLOCK])
            if max(int(sums.max()), -int(sums.min())) > weight * self.unit_limit + error:
                raise RemoteProtocolError(
                    f"an entry of the sum exceeds sum of weights x largest value = {weight} x {self.max_value}: "
                    "a participant sent a vector outside its bounds"
                )
            np.divide(sums, weight * 2.0**self.fraction_bits, out=mean[start : start + _BLOCK])
        return weight, mean


def plan(
    clients: int, max_value: float, max_weight: int = 1, *, fraction_bits: int = 16, ring_bits: int | None = None
) -> FixedPoint:
    """The smallest ring in which the sum cannot wrap.

    Args:
        clients: The most participants in one sum.
        max_value: Largest absolute value of an entry; larger ones are clipped.
        max_weight: Largest weight of a participant.
        fraction_bits: f: values are rounded to multiples of 2**-f after weighting.
        ring_bits: A wanted ring, refused where it is too small. By default the smallest that holds the sum.

    Raises:
        HeadroomError: The sum needs more than `ring_bits`, or more than 64 bits.

    >>> plan(clients=100, max_value=4.0, max_weight=1000).ring_bits
    36
    """
    needed = _needed_bits(clients, max_value, max_weight, fraction_bits)
    return FixedPoint(clients, max_value, max_weight, fraction_bits, needed if ring_bits is None else ring_bits)


def _needed_bits(clients: int, max_value: float, max_weight: int, fraction_bits: int) -> int:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (clients, max_weight, fraction_bits))
    if not whole or clients < 1 or max_weight < 1 or fraction_bits < 0 or not (isfinite(max_value) and max_value > 0):
        raise LocalProtocolError(
            "expected whole numbers of clients >= 1, weight >= 1 and fraction bits >= 0, and a finite largest value "
            f"above 0, got {clients!r}, {max_weight!r}, {fraction_bits!r}, {max_value!r}"
        )
    if fraction_bits > _MAX_FRACTION_BITS:
        raise HeadroomError(f"fraction bits must be at most {_MAX_FRACTION_BITS}, got {fraction_bits}")
    one = max_weight * _unit_limit(max_value, fraction_bits)
    largest = clients * one
    # Two's complement holds -2^(b-1) to 2^(b-1)-1. The weight's entry is unsigned and needs no sign bit.
    needed = max(largest.bit_length() + 1, (clients * max_weight).bit_length())
    if needed > 64:
        raise HeadroomError(
            f"{clients} clients x largest value {max_value} x weight {max_weight} x 2^{fraction_bits} needs a ring of "
            f"{needed} bits, and 64 is the most: lower the largest value, the weight or the fraction bits"
        )
    if one > _FLOAT64_EXACT:
        raise HeadroomError(
            f"largest value {max_value} x weight {max_weight} x 2^{fraction_bits} is beyond 2^53, where float64 has no "
            "more fractions to round: lower the largest value, the weight or the fraction bits"
        )
    return needed


def _unit_limit(max_value: float, fraction_bits: int) -> int:
    limit: int = ceil(Fraction(max_value) * 2**fraction_bits)
    return limit


class _Rounder:
    """Stochastic rounding of blocks, through buffers that are allocated once."""

    def __init__(self, dtype: np.dtype[Any], size: int, stream: Stream) -> None:
        self._stream = stream
        self._bits = np.empty(size, np.uint32)
        self._scaled, self._low, self._uniform = (np.empty(size, dtype) for _ in range(3))

    def round(self, block: Floats, scale: np.floating[Any]) -> Floats:
        """Floor of v = block x scale, plus 1 with probability v - floor(v); valid until the next call.

        The probability is exact in float32, where 24 bits and a fraction compare without rounding, and exact to 2^-32
        in float64.
        """
        n = block.size
        bits, scaled, low, uniform = self._bits[:n], self._scaled[:n], self._low[:n], self._uniform[:n]
        np.multiply(block, scale, out=scaled)
        np.floor(scaled, out=low)
        np.subtract(scaled, low, out=scaled)
        self._stream.fill(bits)
        if scaled.dtype == np.float32:
            np.right_shift(bits, np.uint32(8), out=bits)
            uniform[:] = bits.view(np.int32)
            np.multiply(uniform, np.float32(2.0**-24), out=uniform)
        else:
            uniform[:] = bits
            np.multiply(uniform, 2.0**-32, out=uniform)
        # 1 where the fraction exceeds the uniform number, else 0: a difference of floats has the right sign.
        np.subtract(scaled, uniform, out=scaled)
        np.ceil(scaled, out=scaled)
        return np.add(low, scaled, out=low)
