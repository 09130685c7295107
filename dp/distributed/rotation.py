"""The public rotation of participants' vectors, after which no coordinate is large: random signs, Walsh-Hadamard."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dp.csprng import Csprng
from dp.errors import ParameterError

_SEED_BYTES = 32


def signs(seed: bytes, n: int) -> NDArray[np.float64]:
    """Gives n signs, the same for the same seed.

    Args:
        seed: 32 bytes, public.
        n: How many.

    Raises:
        ParameterError: The seed is not 32 bytes.
    """
    if not isinstance(seed, bytes) or len(seed) != _SEED_BYTES:
        raise ParameterError(f"rotation_seed should be {_SEED_BYTES} bytes")
    words = Csprng(lambda _: seed).uint64(-(-n // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=n).astype(np.float64)
    return 1.0 - 2.0 * bits


def hadamard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives the orthonormal Walsh-Hadamard transform of (2^k,), which is its own inverse."""
    out = values.copy().reshape(1, -1)
    while out.shape[1] > 1:
        left, right = np.hsplit(out, 2)
        out = np.concatenate([left + right, left - right])
    # The result comes with the bits of its indices reversed. Reversing them commutes with the transform, so that twice
    # this is still the identity.
    out *= 1.0 / math.sqrt(values.size)
    return out.reshape(-1)
