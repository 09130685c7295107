"""Noise in shares: every participant of a secure sum adds a little, and the opened sum has all of it.

A site that protects its own update adds all the noise that its records need, and a sum of n updates has n times the
variance that one trusted server would have added. Here each site adds a share, in whole numbers, before the secure sum
masks it; what is opened carries the noise of one. Nobody but the secure sum's threshold stands in for that trusted
server, so shares are made such that as few as the threshold, less the colluders that a study allows for, are enough.

Two ways are offered, one for each privacy unit. `DistributedSgdPlan` (in `record`) hides a record: hospitals with many
patients each take a step together. `ParticipantPlan` (in `participant`) hides a participant with all that it holds, in
one vector from each.
(Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation"; Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning".)

Whole numbers here are int64. A secure sum adds them modulo 2^b; the caller takes them there, and its sums back.
"""

from __future__ import annotations

from dp.distributed.participant import (
    ParticipantPlan,
    decode_participants,
    participant_contribution,
    solve_participant_plan,
)
from dp.distributed.record import DistributedSgdPlan, decode_gradient, sgd_contribution

__all__ = [
    "DistributedSgdPlan",
    "ParticipantPlan",
    "decode_gradient",
    "decode_participants",
    "participant_contribution",
    "sgd_contribution",
    "solve_participant_plan",
]
