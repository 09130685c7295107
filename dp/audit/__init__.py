"""Attacks as audit: how much privacy an attack's success rules out, beside what the account says.

`bounds` turns counts of right guesses into lower bounds on epsilon; `canaries` makes the attack on DP-SGD and judges
it. The names of `canaries` are loaded when first asked for, so that the bounds need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dp.audit.bounds import (
    account_curve,
    gaussian_curve,
    gaussian_epsilon,
    one_run_epsilon,
    one_run_mu,
    one_run_p_value,
    rules_out,
    several_runs_epsilon,
    several_runs_mu,
)

if TYPE_CHECKING:
    from dp.audit.canaries import Audit, CanaryRun, Judge, guess

__all__ = [
    "Audit",
    "CanaryRun",
    "Judge",
    "account_curve",
    "gaussian_curve",
    "gaussian_epsilon",
    "guess",
    "one_run_epsilon",
    "one_run_mu",
    "one_run_p_value",
    "rules_out",
    "several_runs_epsilon",
    "several_runs_mu",
]

_NEEDS_TORCH = frozenset({"Audit", "CanaryRun", "Judge", "guess"})


def __getattr__(name: str) -> object:
    if name in _NEEDS_TORCH:
        from dp.audit import canaries

        return getattr(canaries, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
