"""Vectors of whole numbers in int64, and what a sum modulo 2^b makes of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dp.errors import ParameterError

MAX_RING_BITS = 62
"""The widest ring whose sums fit into int64 with room to take them there."""


def wrapped(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """What a sum modulo 2^bits gives back: from -2^(bits-1) to 2^(bits-1) - 1."""
    half = 1 << (bits - 1)
    return ((values + half) & ((1 << bits) - 1)) - half


def check_whole(total: NDArray[np.int64], size: int) -> None:
    """Refuse what cannot be an opened sum.

    Raises:
        ParameterError: It is not whole numbers of shape (size,).
    """
    if total.shape != (size,) or total.dtype.kind not in "iu":
        raise ParameterError(f"expected whole numbers of shape ({size},), got {total.dtype} of shape {total.shape}")
