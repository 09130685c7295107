"""Every error that the secure sum raises, so that a caller can tell its own mistake from a peer's lie.

All of them are values of `SecAggError`. A message says what was expected and what came; it never holds a secret.
"""

from __future__ import annotations

from collections.abc import Iterable


class SecAggError(Exception):
    """Base of all errors raised by this library."""


class LocalProtocolError(SecAggError):
    """The caller's own fault: wrong shape, wrong range, a parameter that makes no sense. Nothing was sent."""


class RemoteProtocolError(SecAggError):
    """Someone else broke the protocol.

    Attributes:
        culprits: Names of the participants that are known to have lied. Empty where the fault cannot be pinned on
            anyone (it may then be the server).
    """

    def __init__(self, message: str, culprits: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.culprits = frozenset(culprits)


class BelowThreshold(SecAggError):
    """Fewer participants than the threshold are left, so the sum cannot be opened and nothing was revealed.

    Attributes:
        stage: The protocol stage that came up short.
        present: How many participants were left.
        needed: The threshold.
    """

    def __init__(self, stage: str, present: int, needed: int) -> None:
        super().__init__(
            f"{stage}: {present} participants left, {needed} needed; the round is lost, nothing is revealed"
        )
        self.stage = stage
        self.present = present
        self.needed = needed


class DecodeError(SecAggError):
    """Bytes from the wire or from disk are not a message of the expected kind."""


class HeadroomError(SecAggError):
    """The sum could wrap around the ring, or the wanted ring is wider than 64 bits."""


class EmptySum(SecAggError):
    """The sum was opened and its weights add up to zero, so there is no mean to speak of."""
