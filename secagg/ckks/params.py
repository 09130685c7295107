"""How integers become coefficients of ciphertexts, and how much noise hides the key when a sum is opened.

A sum's phase, c0 + c1 s, is scale x message + error, and the error tells of the joint key (Li and Micciancio 2021, "On
the security of homomorphic encryption on approximate numbers"). So everyone who gives a partial decryption adds
Gaussian noise of the deviation that Li, Micciancio, Schultz and Sorrell ask for (CRYPTO 2022, "Securing approximate
homomorphic encryption using differential privacy"): sqrt(12 tau) 2^(s/2) t, with tau ciphertexts opened
under one key, s bits of statistical security, and t the Euclidean length of a ciphertext's error. It is the length and
not the deviation of one coefficient, since divergences of all N coefficients add up.

A ring element of b bits goes into as many digits as it takes for each digit's sum to stay clear of that noise; the sum
of the ring is then exact. Where a study says what error it can do with, one digit may do, its low bits in the noise.
What is added to the exact sum does not depend on any vector: messages are coefficients, and enter without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from secagg.ckks.polynomials import ERROR_VARIANCE, TERNARY_VARIANCE, Chain, Residues, arithmetic
from secagg.errors import HeadroomError, LocalProtocolError, RemoteProtocolError
from secagg.keys import Member
from secagg.masking.params import Session, Subject
from secagg.ring import Ring, RingVector

Keys = Literal["threshold", "holder", "shared"]

STATISTICAL_SECURITY = 30
"""s: as OpenFHE's default for noise flooding."""
# The chance that garbage passes for a sum, bits.
_GARBAGE_BITS = 64
_LEAST_CHECKED = 4
# The chance that noise exceeds its bound anywhere in a sum, bits.
_FAILURE_BITS = 40
# An error's length over the square root of N, in deviations of one coefficient: never as much as that.
_LENGTH = 1.1
_DEGREES = ((2048, 14), (4096, 20))
_LEAST_BITS, _MOST_BITS = 30, 60


class Need(Struct, frozen=True):
    """A sum that the parameters must hold.

    Attributes:
        dimension: Entries of a vector.
        ring_bits: b of the ring that they are in.
        error: Largest error of an entry of the sum, in units of the ring; 0 for an exact sum. The first entry, which
            holds the weight, is exact in any case.

    Raises:
        LocalProtocolError: A sum of nothing, no ring, or an error below 0.
    """

    dimension: int
    ring_bits: int
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise LocalProtocolError(f"expected at least 1 entry, got {self.dimension}")
        Ring(self.ring_bits)
        if not (math.isfinite(self.error) and self.error >= 0):
            raise LocalProtocolError(f"expected a finite error of at least 0, got {self.error}")


class Packing(Struct, frozen=True):
    """How the vectors of one sum lie in ciphertexts. Make it with `packing`.

    Attributes:
        chain: The ring of the ciphertexts.
        need: What is summed.
        digits: Coefficients that an entry takes.
        digit_bits: Of each but the last.
        scale: What a digit is multiplied by.
        head: Number, bits and scale of digits of the first entry, exact and by themselves, where the others are not
            exact.
        deviation: Of the noise with which each partial decryption is flooded, in units of a coefficient.
        checked: Coefficients of every ciphertext that are zero, and come out small if all decryptions are right.
        bound: What the noise of an opened coefficient exceeds with a chance below 2^-40 in the whole sum.
    """

    chain: Chain
    need: Need
    digits: int
    digit_bits: int
    scale: int
    head: tuple[int, int, int] | None
    deviation: float
    bound: float
    checked: int

    @property
    def ciphertexts(self) -> int:
        """How many ciphertexts a vector takes."""
        return -(-self._coefficients // self._used)

    @property
    def upload_bytes(self) -> int:
        """Bytes of a participant's encrypted vector."""
        return 2 * self.half_bytes

    @property
    def half_bytes(self) -> int:
        """Bytes of all c0 of a vector, or of all c1, or of a partial decryption."""
        return self.ring.packed_size(self.ciphertexts * self.chain.degree)

    @property
    def ring(self) -> Ring:
        """Wide enough for a residue: how residues are packed."""
        return Ring(self.chain.bits)

    @property
    def _used(self) -> int:
        """Coefficients of a ciphertext that hold digits."""
        return self.chain.degree - self.checked

    @property
    def _coefficients(self) -> int:
        return self.digits * self.need.dimension + (self.head[0] if self.head else 0)

    def encode(self, vector: RingVector) -> npt.NDArray[np.int64]:
        """Scaled digits of a vector over the ring, shape [ciphertexts, N]; below half the modulus in absolute value."""
        values = Ring(self.need.ring_bits).signed(vector)
        parts = [each * self.scale for each in _split(values, self.digits, self.digit_bits)]
        if self.head is not None:
            digits, bits, scale = self.head
            parts += [each * scale for each in _split(values[:1], digits, bits)]
        used = self._used
        flat = np.zeros(self.ciphertexts * used, np.int64)
        flat[: self._coefficients] = np.concatenate(parts)
        out = np.zeros((self.ciphertexts, self.chain.degree), np.int64)
        out[:, :used] = flat.reshape(-1, used)
        return out

    def decode(self, phase: Residues) -> RingVector:
        """The sum over the ring from its opened phase, shape [ciphertexts, N] modulo q.

        Raises:
            RemoteProtocolError: The phase is not that of a sum.
        """
        centred = arithmetic(self.chain.degree, self.chain.modulus).centred(phase)
        used = self._used
        if np.abs(centred[:, used:]).max() > self.bound:
            raise RemoteProtocolError(
                "the sum does not open: a partial decryption is wrong, or a ciphertext; who sent it cannot be told"
            )
        flat = centred[:, :used].reshape(-1)[: self._coefficients]
        body = self.digits * self.need.dimension
        ring = Ring(self.need.ring_bits)
        total = _join(flat[:body].reshape(self.digits, -1), self.digit_bits, self.scale)
        if self.head is not None:
            digits, bits, scale = self.head
            total[:1] = _join(flat[body:].reshape(digits, 1), bits, scale)
        return ring.reduce(total.astype(ring.dtype))


def packing(chain: Chain, participants: int, need: Need, security: int = STATISTICAL_SECURITY) -> Packing:
    """The packing of fewest digits that holds a sum.

    Args:
        chain: The ring of the ciphertexts.
        participants: The most that give keys, and the most whose vectors are summed.
        need: What is summed.
        security: s: statistical security of the flooding, bits.

    Raises:
        HeadroomError: No number of digits holds it: the noise takes the whole modulus.
    """
    for digits in range(1, need.ring_bits + 1):
        found = _packing(chain, participants, need, security, digits)
        if found is not None:
            return found
    raise HeadroomError(
        f"a sum of {participants} vectors of {need.dimension} entries of {need.ring_bits} bits does not fit a modulus "
        f"of {chain.bits} bits of degree {chain.degree}: its noise takes all of it"
    )


def choose(participants: int, needs: Sequence[Need], security: int = STATISTICAL_SECURITY) -> Chain:
    """The chain with which all sums of a study together take the fewest bytes.

    Raises:
        HeadroomError: No chain that is 128-bit secure holds all of them.
        LocalProtocolError: A statistical security that is none, or no sums.
    """
    if not needs:
        raise LocalProtocolError("expected the sums that the parameters must hold, got none")
    if not 20 <= security <= 64:
        raise LocalProtocolError(f"expected a statistical security of 20 to 64 bits, got {security}")
    best: tuple[int, Chain] | None = None
    for degree, special in _DEGREES:
        for bits in range(_LEAST_BITS, _MOST_BITS + 1):
            try:
                chain = Chain(degree, bits, special)
                size = sum(packing(chain, participants, need, security).upload_bytes for need in needs)
            except (LocalProtocolError, HeadroomError):
                continue
            if best is None or size < best[0]:
                best = size, chain
    if best is None:
        raise HeadroomError(
            f"no parameters that are 128-bit secure hold sums of {participants} vectors of "
            f"{max(need.dimension for need in needs)} entries with statistical security {security}: lower that, or use "
            "masks"
        )
    return best[1]


def ciphertext_deviation(chain: Chain, participants: int) -> float:
    """Deviation of a coefficient of the error of a sum of as many fresh encryptions under their joint key.

    SEAL divides an encryption under q p by p: what is left of its error is small beside the rounding, which is
    multiplied by the joint secret, a sum of ternary ones.
    """
    n, degree = participants, chain.degree
    key = degree * n * TERNARY_VARIANCE  # expected square of the joint secret's length
    fresh = (degree * n * ERROR_VARIANCE * TERNARY_VARIANCE + ERROR_VARIANCE * (1 + key)) / float(chain.special) ** 2
    return math.sqrt(n * (fresh + (1 + key) / 12))


def _packing(chain: Chain, participants: int, need: Need, security: int, digits: int) -> Packing | None:
    checked = _LEAST_CHECKED
    while True:
        deviation, bound = _noise(chain, participants, need, security, digits, chain.degree - checked)
        # Of garbage, a coefficient passes with the share of the modulus that noise may take.
        spread = math.log2(chain.modulus / (2 * bound))
        if spread * checked >= _GARBAGE_BITS:
            break
        checked = math.ceil(_GARBAGE_BITS / spread) if spread > 0 else chain.degree
        if checked > chain.degree // 2:
            return None
    error, head = need.error if digits == 1 else 0.0, None
    fitted = _scaled(chain, participants, need.ring_bits, digits, bound, error)
    if fitted is not None and error:
        each = range(1, need.ring_bits + 1)
        exact = ((n, _scaled(chain, participants, need.ring_bits, n, bound, 0.0)) for n in each)
        head = next(((n, *found) for n, found in exact if found is not None), None)
        if head is None:
            return None
    return None if fitted is None else Packing(chain, need, digits, *fitted, head, deviation, bound, checked)


def _noise(chain: Chain, participants: int, need: Need, security: int, digits: int, used: int) -> tuple[float, float]:
    """(deviation of the flooding, bound of an opened coefficient's noise) where ciphertexts hold `used` digits."""
    # With digits for the first entry alone, of which there are never more than bits.
    count = -(-(digits * need.dimension + (need.ring_bits if need.error else 0)) // used)
    error = ciphertext_deviation(chain, participants)
    deviation = math.sqrt(12 * count) * 2 ** (security / 2) * _LENGTH * math.sqrt(chain.degree) * error
    tail = -NormalDist().inv_cdf(2.0 ** -(_FAILURE_BITS + 1) / (count * chain.degree))
    return deviation, tail * (math.sqrt(participants) * deviation + error)


def _scaled(
    chain: Chain, participants: int, ring_bits: int, digits: int, bound: float, error: float
) -> tuple[int, int] | None:
    """(bits of a digit, scale) with which the sums of digits stay within half the modulus, if they do."""
    digit_bits = -(-ring_bits // digits)
    scale = math.ceil(bound / (math.floor(error) + 0.5)) + 1
    # Digits are balanced; the ring's signed sum bounds that of the last, but for what the others carry into it.
    lower = participants << (digit_bits - 1) if digits > 1 else 0
    last = (1 << max(0, ring_bits - 1 - (digits - 1) * digit_bits)) + (participants if digits > 1 else 0)
    if max(lower, last) * scale + bound >= chain.modulus // 2:
        return None
    return digit_bits, scale


def _split(values: npt.NDArray[np.int64], digits: int, bits: int) -> list[npt.NDArray[np.int64]]:
    """Balanced digits, lowest first; the last is what is left, with the sign."""
    out, rest = [], values
    for _ in range(digits - 1):
        low = rest & np.int64((1 << bits) - 1)
        carry = low >> np.int64(bits - 1)
        out.append(low - (carry << np.int64(bits)))
        rest = (rest >> np.int64(bits)) + carry
    return [*out, rest]


def _join(phases: npt.NDArray[np.int64], bits: int, scale: int) -> npt.NDArray[np.uint64]:
    """Sums of digits, of shape [digits, d] and with noise below half the scale, to sums modulo 2^64."""
    total = np.zeros(phases.shape[1], np.uint64)
    for i, phase in enumerate(phases):
        rounded = (phase + np.int64(scale // 2)) // np.int64(scale)
        total += rounded.view(np.uint64) << np.uint64(bits * i)
    return total


class Setting(Struct, frozen=True):
    """What a study fixes about its CKKS sums, beside what it fixes about any.

    Attributes:
        chain: The ring of the ciphertexts.
        keys: Who can decrypt: "threshold" (nobody alone; any `threshold` of the session together can stand in for those
            who left), "holder" (a party that gives no vector), or "shared" (every participant: for comparison only).
        security: s: statistical security of the flooding, bits.
        holder: Name and Ed25519 key of the holder, with keys = "holder". It has no place on the roster; its number is
            the first behind it.
        error: Largest error of an entry, in units of the ring, of sums whose purpose is `lossy`.
        lossy: The purpose of the sums that need not be exact.

    Raises:
        LocalProtocolError: A holder without need, or none where one is needed.
    """

    chain: Chain
    keys: Keys = "threshold"
    security: int = STATISTICAL_SECURITY
    holder: Member | None = None
    error: float = 0.0
    lossy: str = "train"

    def __post_init__(self) -> None:
        if (self.holder is not None) != (self.keys == "holder"):
            came = "none" if self.holder is None else self.holder.name
            raise LocalProtocolError(f'expected a holder with keys = "holder" and with no others, got {came}')

    def packing(self, session: Session, subject: Subject) -> Packing:
        """How the vectors of a sum lie in ciphertexts.

        Raises:
            HeadroomError: They do not fit.
        """
        error = self.error if subject.purpose == self.lossy else 0.0
        need = Need(subject.dimension, subject.ring_bits, error)
        return packing(self.chain, len(session.params.roster), need, self.security)
