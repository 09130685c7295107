"""Randomness that privacy may rest on: an AES-256-CTR keystream keyed from the operating system.

`torch` and `numpy` draw noise from generators that are seeded with 64 bits and give up their state after a few hundred
outputs. Worse, the same `torch.manual_seed` at two hospitals gives the same noise, and whoever subtracts their updates
has cancelled it. Noise and sampling here never touch those generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

from dp.errors import ParameterError

Entropy = Callable[[int], bytes]
"""`entropy(n)` gives n fresh secret bytes. `os.urandom` in production; a fixed sequence in a test."""

_KEY_BYTES = 32
_BLOCK = 1 << 16  # values transformed at a time, so that the intermediates stay in the cache


class Csprng:
    """A stream of secret random numbers, made for one training run and then dropped.

    It is neither picklable nor copyable: a second copy would repeat the stream, and noise used twice cancels. For the
    same reason make one after forking, never before.

    Args:
        entropy: Called once, for 32 bytes. The stream is a function of these bytes alone.

    Raises:
        ParameterError: `entropy` gave anything other than 32 bytes.
    """

    __slots__ = ("_keystream",)

    def __init__(self, entropy: Entropy) -> None:
        key = entropy(_KEY_BYTES)
        if not isinstance(key, bytes) or len(key) != _KEY_BYTES:
            came = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise ParameterError(f"entropy({_KEY_BYTES}) should give {_KEY_BYTES} bytes, gave {came}")
        # The key is used for one stream only, so a constant initial counter repeats nothing.
        self._keystream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "Csprng(<secret>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ParameterError("a Csprng is neither pickled nor copied: two copies would give the same noise")

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """Draws uniform 64-bit words.

        Args:
            n: How many, at least 0.

        Returns:
            Array (n,), uint64.

        Raises:
            ParameterError: n is negative.
        """
        if n < 0:
            raise ParameterError(f"n should be at least 0, is {n}")
        return np.frombuffer(self._keystream.update(bytes(8 * n)), dtype="<u8").astype(np.uint64, copy=False)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Draws uniform numbers of the open interval (0, 1).

        They are the odd multiples of 2^-53: symmetric around 1/2, every one exact in float64, and neither 0 nor 1, at
        which a quantile function is infinite.

        Args:
            n: How many.

        Returns:
            Array (n,), float64.
        """
        return ((self.uint64(n) >> np.uint64(12)).astype(np.float64) * 2.0 + 1.0) * 2.0**-53

    def gaussian(self, n: int) -> NDArray[np.float64]:
        """Draws from the standard normal distribution, as the quantiles of `uniform`.

        The largest magnitude that can come out is 8.2, beyond which the true distribution has mass 2^-52. One draw
        alone shows its float64 grid; noise that hides data is summed from several (see `dp.sgd`).

        Args:
            n: How many.

        Returns:
            Array (n,), float64.
        """
        out = np.empty(n, dtype=np.float64)
        for start in range(0, n, _BLOCK):
            ndtri(self.uniform(min(_BLOCK, n - start)), out=out[start : start + _BLOCK])
        return out

    def bernoulli(self, n: int, p: float) -> NDArray[np.bool_]:
        """Tosses n independent coins, as Poisson sampling needs.

        Each is true with probability ceil(p 2^53) / 2^53; 0 is never and 1 is always.

        Args:
            n: How many.
            p: Probability of true, 0 to 1.

        Returns:
            Array (n,), bool.

        Raises:
            ParameterError: p is not a probability.
        """
        if not 0.0 <= p <= 1.0:
            raise ParameterError(f"p should be from 0 to 1, is {p}")
        # Both sides are exact: 53-bit integers, and p scaled by a power of two.
        return (self.uint64(n) >> np.uint64(11)).astype(np.float64) < p * 2.0**53
