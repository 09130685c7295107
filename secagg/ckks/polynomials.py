"""Polynomials modulo x^N + 1 and a prime, and encryptions of zero, computed by SEAL (through TenSEAL).

SEAL's objects go in and out as files in memory, which is the one way that TenSEAL gives to their residues. Keys and
noise that the protocol itself needs come from the caller's entropy; SEAL draws the randomness of an encryption from the
operating system.

A sum needs neither slots nor SEAL's own secret keys. So vectors of coefficients are encrypted and not of slots: a
context of SEAL's BFV scheme gives encryptions of zero as coefficients, to which the message is added, and transforms
ciphertexts of any content. `tests/secagg/test_ckks.py` decrypts the results with SEAL's own CKKS decryptor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal
import zstandard
from msgspec import Struct

from secagg.errors import LocalProtocolError
from secagg.prg import Stream

Residues = npt.NDArray[np.uint64]
"""Polynomials modulo a prime: shape [m, N], each entry below the prime."""

Integers = npt.NDArray[np.int64]

# SEAL's serialisation: magic, size of this header, version 4.3, compression, reserved, size of all.
_HEADER = struct.Struct("<HBBBBHQ")
_MAGIC, _MAJOR, _MINOR, _PLAIN, _ZSTD = 0xA15E, 4, 3, 0, 2
_NTT_FLAG = 32  # a ciphertext's identifier of parameters is before it
# Values at a time, so that intermediates stay in a level-2 cache.
_BLOCK = 1 << 15
# The most polynomials that SEAL takes as one ciphertext.
_BATCH = 16
# A fresh error is the difference of two counts over so many bits: deviation sqrt(42 / 4) = 3.24, as SEAL's own.
_ERROR_BITS = 21
ERROR_VARIANCE = 2 * _ERROR_BITS / 4
TERNARY_VARIANCE = 2 / 3


class Chain(Struct, frozen=True):
    """The ring of ciphertexts and the primes below it.

    Attributes:
        degree: N, a power of two.
        bits: Of the prime q that ciphertexts are modulo.
        special_bits: Of the prime p by which a fresh encryption is divided, and its noise with it.

    Raises:
        LocalProtocolError: Beyond what SEAL takes to be 128-bit secure for ternary secrets, or without such primes.
    """

    degree: int
    bits: int
    special_bits: int

    def __post_init__(self) -> None:
        most = seal.CoeffModulus.MaxBitCount(self.degree, seal.SEC_LEVEL_TYPE.TC128)
        if self.bits + self.special_bits > most or not 20 <= self.bits <= 60:
            raise LocalProtocolError(
                f"degree {self.degree} with primes of {self.bits} and {self.special_bits} bits: at most {most} bits in "
                "all are 128-bit secure, and a prime has 20 to 60"
            )
        _primes(self)

    @property
    def modulus(self) -> int:
        """Q."""
        return _primes(self)[0]

    @property
    def special(self) -> int:
        """P."""
        return _primes(self)[1]


@lru_cache(maxsize=64)
def _primes(chain: Chain) -> tuple[int, int]:
    try:
        q, p = seal.CoeffModulus.Create(chain.degree, [chain.bits, chain.special_bits])
    except (RuntimeError, ValueError) as error:
        raise LocalProtocolError(f"there are no such primes for degree {chain.degree}: {error}") from error
    return q.value(), p.value()


class Arithmetic:
    """Polynomials modulo x^N + 1 and one prime. Get it with `arithmetic`."""

    def __init__(self, degree: int, modulus: int) -> None:
        self.degree, self.modulus = degree, modulus
        self._context = _context(degree, [seal.Modulus(modulus)])
        self._evaluator = seal.Evaluator(self._context)
        identifier = self._context.first_parms_id()
        one = seal.Plaintext("1")
        self._evaluator.transform_to_ntt_inplace(one, identifier)
        with _File() as file:
            self._plain_prefix, _ = file.read(one, degree)
            empty = seal.Ciphertext(self._context, identifier)
            prefixes = []
            for count in range(2, _BATCH + 1):
                empty.resize(self._context, identifier, count)
                prefixes.append(file.read(empty, count * degree)[0])
        self._prefixes = dict(enumerate(prefixes, 2))

    def transformed(self, polynomials: Residues) -> Residues:
        """The number-theoretic transform of each, where products are entry by entry."""
        return self._each(polynomials, False, self._evaluator.transform_to_ntt_inplace)

    def scaled(self, transformed: Residues, factor: Residues) -> Residues:
        """Each of the transformed polynomials times one that is transformed, shape [N]; so are the results."""
        loaded = self._plain(factor)
        return self._each(transformed, True, lambda each: self._evaluator.multiply_plain_inplace(each, loaded))

    def products(self, polynomials: Residues, factor: Residues) -> Residues:
        """Each polynomial times one that is transformed, shape [N]; the results are polynomials again."""
        loaded, evaluator = self._plain(factor), self._evaluator

        def multiply(each: seal.Ciphertext) -> None:
            evaluator.transform_to_ntt_inplace(each)
            evaluator.multiply_plain_inplace(each, loaded)
            evaluator.transform_from_ntt_inplace(each)

        return self._each(polynomials, False, multiply)

    def add(self, total: Residues, summand: Residues) -> None:
        """Add in place, modulo the prime. Both hold residues; `total` is contiguous."""
        flat, other, spare = total.reshape(-1), summand.reshape(-1), _spare(total.size)
        for start in range(0, flat.size, _BLOCK):
            self._add(flat[start : start + _BLOCK], other[start : start + _BLOCK], spare)

    def add_signed(self, total: Residues, summand: Integers) -> None:
        """Add signed numbers of at most half the prime in place; `total` is contiguous."""
        flat, other, spare = total.reshape(-1), summand.reshape(-1), _spare(total.size)
        for start in range(0, flat.size, _BLOCK):
            self._add(flat[start : start + _BLOCK], self.embed(other[start : start + _BLOCK]), spare)

    def flood(self, total: Residues, stream: Stream, deviation: float) -> None:
        """Add Gaussian noise rounded to whole numbers in place (Box and Muller 1958); `total` is contiguous.

        Args:
            total: Residues.
            stream: Secure random bits, used for nothing else.
            deviation: Far above 1 and below 2^50.
        """
        flat, spare = total.reshape(-1), _spare(total.size)
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            self._add(part, self.embed(gaussian(stream, deviation, part.size)), spare)

    def _add(self, part: Residues, summand: Residues, spare: Residues) -> None:
        np.add(part, summand, out=part)
        # A sum below the prime wraps to a large number when the prime is taken off.
        np.minimum(part, np.subtract(part, np.uint64(self.modulus), out=spare[: part.size]), out=part)

    def embed(self, values: Integers) -> Residues:
        """Signed numbers of at most half the prime as residues."""
        residues = values.view(np.uint64)
        wrapped: Residues = np.minimum(residues, residues + np.uint64(self.modulus))
        return wrapped

    def centred(self, residues: Residues) -> Integers:
        """The representatives between minus and plus half the prime."""
        above = residues > np.uint64(self.modulus // 2)
        return np.where(above, residues - np.uint64(self.modulus), residues).view(np.int64)

    def _plain(self, transformed: Residues) -> seal.Plaintext:
        loaded = seal.Plaintext()
        with _File() as file:
            file.load(loaded, self._context, self._plain_prefix, transformed)
        return loaded

    def _each(self, polynomials: Residues, transformed: bool, apply: Callable[[seal.Ciphertext], None]) -> Residues:
        """What SEAL makes of polynomials, a batch at a time. It takes no single ones, and none that are all zero."""
        out = np.zeros_like(polynomials)
        rows = np.flatnonzero(polynomials.any(axis=1))
        with _File() as file:
            for start in range(0, len(rows), _BATCH):
                chosen = rows[start : start + _BATCH]
                batch = polynomials[chosen if len(chosen) > 1 else np.repeat(chosen, 2)]
                prefix = bytearray(self._prefixes[len(batch)])
                prefix[_NTT_FLAG] = transformed
                loaded = seal.Ciphertext()
                file.load(loaded, self._context, bytes(prefix), batch)
                apply(loaded)
                out[chosen] = file.read(loaded, batch.size)[1].reshape(batch.shape)[: len(chosen)]
        return out


@lru_cache(maxsize=8)
def arithmetic(degree: int, modulus: int) -> Arithmetic:
    """The one for this degree and prime; safe to share between threads."""
    return Arithmetic(degree, modulus)


def encryptions_of_zero(chain: Chain, public_key: tuple[Residues, Residues], count: int) -> Iterator[Residues]:
    """Fresh encryptions of zero by SEAL, as coefficients.

    Args:
        chain: The parameters.
        public_key: (b, a) with b = -(a s) + e, transformed; each of shape [2, N], modulo q and modulo p.
        count: How many.

    Yields:
        (c0, c1) of shape [2, N], modulo q: c0 + c1 s is small.
    """
    context = _context(chain.degree, seal.CoeffModulus.Create(chain.degree, [chain.bits, chain.special_bits]))
    template, key = seal.PublicKey(), seal.PublicKey()
    seal.KeyGenerator(context).create_public_key(template)
    with _File() as file:
        prefix, _ = file.read(template, 4 * chain.degree)
        file.load(key, context, prefix, np.stack(public_key))
        encryptor, fresh = seal.Encryptor(context, key), seal.Ciphertext()
        for _ in range(count):
            encryptor.encrypt_zero(fresh)
            yield file.read(fresh, 2 * chain.degree)[1].reshape(2, chain.degree)


def uniform(stream: Stream, degree: int, modulus: int) -> Residues:
    """A uniform polynomial, shape [N], by rejection."""
    mask, found = np.uint64((1 << modulus.bit_length()) - 1), np.empty(0, np.uint64)
    while found.size < degree:
        words = np.frombuffer(stream.read(16 * degree), "<u8") & mask
        found = np.concatenate([found, words[words < modulus]])
    return found[:degree]


def ternary(stream: Stream, degree: int) -> Integers:
    """A polynomial of -1, 0 and 1 with equal chances, shape [N]: a secret."""
    found = np.empty(0, np.int64)
    while found.size < degree:
        octets = np.frombuffer(stream.read(2 * degree), np.uint8)
        found = np.concatenate([found, octets[octets < 255].astype(np.int64) % 3 - 1])
    polynomial: Integers = found[:degree]
    return polynomial


def small_error(stream: Stream, degree: int) -> Integers:
    """Centred binomial noise of variance `ERROR_VARIANCE`, shape [N]."""
    words, mask = np.frombuffer(stream.read(8 * degree), "<u8"), np.uint64((1 << _ERROR_BITS) - 1)
    heads, tails = np.bitwise_count(words & mask), np.bitwise_count(words >> np.uint64(64 - _ERROR_BITS))
    noise: Integers = heads.astype(np.int64) - tails.astype(np.int64)
    return noise


def gaussian(stream: Stream, deviation: float, size: int) -> Integers:
    """Gaussian noise rounded to whole numbers, shape [size] (Box and Muller 1958); for deviations far above 1."""
    half = -(-size // 2)
    words = np.frombuffer(stream.read(16 * half), "<u8").reshape(2, half) >> np.uint64(11)
    first, angle = (words + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(first, out=first))
    radius *= deviation
    angle *= 2 * np.pi
    noise = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
    rounded: Integers = np.rint(noise, out=noise).astype(np.int64)
    return rounded


def _spare(size: int) -> Residues:
    return np.empty(min(size, _BLOCK), np.uint64)


@lru_cache(maxsize=8)
def _shared_context(degree: int, primes: tuple[int, ...]) -> seal.SEALContext:
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(degree)
    parameters.set_coeff_modulus([seal.Modulus(prime) for prime in primes])
    parameters.set_plain_modulus(2)  # of no consequence: nothing is encrypted in BFV's own way
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise LocalProtocolError(f"SEAL refuses these parameters: {context.parameters_error_message()}")
    return context


def _context(degree: int, moduli: list[seal.Modulus]) -> seal.SEALContext:
    return _shared_context(degree, tuple(modulus.value() for modulus in moduli))


class _File:
    """A file in memory through which SEAL's objects pass."""

    def __enter__(self) -> _File:
        self._descriptor = os.memfd_create("seal")
        self._path = f"/proc/self/fd/{self._descriptor}"
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, saved: seal.Ciphertext | seal.Plaintext | seal.PublicKey, count: int) -> tuple[bytes, Residues]:
        """What SEAL writes before an object's residues, and the residues, of which there are `count`."""
        saved.save(self._path)
        raw = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        compression, body = _HEADER.unpack_from(raw)[4], raw[_HEADER.size :]
        if compression == _ZSTD:
            body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
        elif compression != _PLAIN:
            raise LocalProtocolError(f"this build of TenSEAL compresses in a way that is not known here: {compression}")
        at = len(body) - 8 * count
        return body[:at], np.frombuffer(body, "<u8", offset=at)

    def load(
        self,
        into: seal.Ciphertext | seal.Plaintext | seal.PublicKey,
        context: seal.SEALContext,
        prefix: bytes,
        residues: Residues,
    ) -> None:
        """Let SEAL read residues behind what it wrote before others of the same shape; it reads no further."""
        size = _HEADER.size + len(prefix) + residues.nbytes
        header = _HEADER.pack(_MAGIC, _HEADER.size, _MAJOR, _MINOR, _PLAIN, 0, size)
        data = np.ascontiguousarray(residues, "<u8").reshape(-1).view(np.uint8).data
        written = os.pwritev(self._descriptor, [header, prefix, data], 0)
        if written != size:
            raise LocalProtocolError(f"wrote {written} of {size} bytes to a file in memory: is memory short?")
        into.load(context, self._path)
