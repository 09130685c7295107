"""Sums of private vectors: numpy in, numpy out.

The participants' steps are in `secagg.masking.client`, the server's in `secagg.masking.server`; this page lists what
goes around them. Nothing here opens a socket, reads a clock or logs a value.
"""

from secagg.errors import (
    BelowThreshold,
    DecodeError,
    EmptySum,
    HeadroomError,
    LocalProtocolError,
    RemoteProtocolError,
    SecAggError,
)
from secagg.fixed_point import FixedPoint, plan
from secagg.keys import Identity, Member, Roster, fingerprint
from secagg.masking.params import Params, Session, Subject, least_threshold
from secagg.prg import Entropy, Stream, deterministic_entropy
from secagg.ring import Ring, RingVector

__all__ = [
    "BelowThreshold",
    "DecodeError",
    "EmptySum",
    "Entropy",
    "FixedPoint",
    "HeadroomError",
    "Identity",
    "LocalProtocolError",
    "Member",
    "Params",
    "RemoteProtocolError",
    "Ring",
    "RingVector",
    "Roster",
    "SecAggError",
    "Session",
    "Stream",
    "Subject",
    "deterministic_entropy",
    "fingerprint",
    "least_threshold",
    "plan",
]
