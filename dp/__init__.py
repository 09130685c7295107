"""What a release of hospitals' data costs in differential privacy, and training that keeps to the price.

Mechanisms are values, `spent` gives their epsilon, `Budget` refuses what would cost too much, and `train` runs DP-SGD
on one site's records. Plans of `dp.distributed` put noise in shares into sums over several sites. The names of `dp.sgd`
are loaded when first asked for, so that an auditor needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dp.accounting import Budget, Spent, calibrate, calibrate_noise_multiplier, coalesce, spent
from dp.csprng import Csprng, Entropy
from dp.distributed import (
    DistributedSgdPlan,
    ParticipantPlan,
    decode_gradient,
    decode_participants,
    participant_contribution,
    sgd_contribution,
    solve_participant_plan,
)
from dp.errors import BudgetExceeded, DpError, ParameterError, UnsupportedModel
from dp.mechanisms import DiscreteGaussianSum, Mechanism, PoissonSampledGaussian, Relation, SkellamSum, Unit
from dp.samplers import DiscreteGaussian, Skellam

if TYPE_CHECKING:
    from dp.sgd import DpSgdPlan, DpSgdReport, train

__all__ = [
    "Budget",
    "BudgetExceeded",
    "Csprng",
    "DiscreteGaussian",
    "DiscreteGaussianSum",
    "DistributedSgdPlan",
    "DpError",
    "DpSgdPlan",
    "DpSgdReport",
    "Entropy",
    "Mechanism",
    "ParameterError",
    "ParticipantPlan",
    "PoissonSampledGaussian",
    "Relation",
    "Skellam",
    "SkellamSum",
    "Spent",
    "Unit",
    "UnsupportedModel",
    "calibrate",
    "calibrate_noise_multiplier",
    "coalesce",
    "decode_gradient",
    "decode_participants",
    "participant_contribution",
    "sgd_contribution",
    "solve_participant_plan",
    "spent",
    "train",
]

_NEEDS_TORCH = frozenset({"DpSgdPlan", "DpSgdReport", "train"})


def __getattr__(name: str) -> object:
    if name in _NEEDS_TORCH:
        from dp import sgd

        return getattr(sgd, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
