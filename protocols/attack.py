"""The attack on a study's account: one site trains as the study says, with canaries among its records.

Under `privacy.mechanism = "local-sgd"` the account is about what leaves a site: the models of all its rounds. So the
attack needs neither the other sites nor the sums; it reads each model of the site as it is before it is encoded and
masked, which is the most that anyone could see. What canaries are, and what their scores show, is in
`dp.audit.canaries`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec
import torch
from msgspec import Struct
from torch import Tensor, nn

from dp import Budget, BudgetExceeded, Entropy
from dp.audit.canaries import Audit, CanaryRun, Judge, guess
from dp.sgd import DpSgdPlan
from protocols.datasets import SiteData, heart_reference
from protocols.errors import DataError, StudyError
from protocols.fedavg import build_model, local_plan, training_device
from protocols.run import threads_for
from protocols.study import Study

CANARIES = 5000
"""How many coins are tossed, where nobody says otherwise: a tenth of the noise shows up to an account of epsilon 8."""


class Attack(Struct, frozen=True, kw_only=True):
    """What the attack on a site's account found.

    Attributes:
        study: The study's name.
        site: The site's.
        train_rows: Its training rows.
        rounds: Rounds of training.
        steps: Steps in all of them together.
        audit: The account, and what the attack makes of it.
        ideal: The median audit of a release that costs exactly what the account says.
        best: The audit if every guess had been right. Where it does not contradict the account, no attack of this size
            could have.
    """

    study: str
    site: str
    train_rows: int
    rounds: int
    steps: int
    audit: Audit
    ideal: Audit
    best: Audit


def attack_study(
    study: Study,
    data: Mapping[str, SiteData],
    *,
    site: str | None = None,
    canaries: int = CANARIES,
    guesses: int | None = None,
    significance: float = 0.05,
    entropy: Entropy = os.urandom,
) -> Attack:
    """Attack the account of one site of a study. Its rows are trained on again, and nothing that comes out is kept.

    Args:
        study: With `privacy.mechanism = "local-sgd"`.
        data: Each site's raw rows, as from `load_data`.
        site: The site; the study's first if None. The account is the same for all, and so is the code.
        canaries: How many coins are tossed.
        guesses: How many of them are guessed, settled before anything is trained; a fifth of the canaries if None.
        significance: Chance of contradicting a true account.
        entropy: Source of coins, sampling and noise; fresh bytes at every call.

    Raises:
        StudyError: The study has no such account, its budget allows no round, or it has no such site.
        DataError: The model cannot take the site's rows.
        DpError: A number is out of its range, or training fails; nothing is trained in the first case.
    """
    privacy, name = study.privacy, study.site_names[0] if site is None else site
    if name not in study.site_names:
        raise StudyError(f"expected one of the sites {', '.join(study.site_names)}, got {name!r}")
    if privacy.mechanism != "local-sgd" or privacy.delta is None:
        raise StudyError(
            f'privacy.mechanism: expected "local-sgd", whose account the attack is on, got {privacy.mechanism!r}'
        )
    plan = local_plan(study)
    if plan is None:
        raise StudyError("privacy: expected a mechanism with an account, got none")
    rounds = _affordable_rounds(study, plan)
    # All that is claimed, and the number of guesses, are settled here, before a coin is tossed.
    claimed = msgspec.structs.replace(plan.mechanism(), steps=rounds * plan.steps)
    count = max(1, canaries // 5) if guesses is None else guesses
    judge = Judge(claimed, privacy.delta, canaries, count, significance, privacy.relation)
    model = build_model(study, len(data[name].features))
    with threads_for(model):
        run = _with_canaries(model, study, data[name], canaries, entropy)
        for _ in range(rounds):
            run.train(plan, entropy)
    guessed = guess(run.scores(), count)
    return Attack(
        study=study.name,
        site=name,
        train_rows=data[name].train_rows,
        rounds=rounds,
        steps=rounds * plan.steps,
        audit=judge.judge(run.right(guessed)),
        ideal=judge.ideal(),
        best=judge.judge(count),
    )


def _with_canaries(model: nn.Module, study: Study, data: SiteData, canaries: int, entropy: Entropy) -> CanaryRun:
    if study.task.standardize == "public":
        data = data.standardized(*heart_reference(data.features))
    device = training_device(study.device)
    model.to(device)
    x, y = torch.tensor(data.train_x, device=device), torch.tensor(data.train_y, device=device)
    try:
        return CanaryRun(model, x, y, _loss_per_row, canaries, entropy, study.privacy.relation)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"the model {type(model).__name__} raised {type(error).__name__}: {error}") from error


def _loss_per_row(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.reshape(-1), target, reduction="none")


def _affordable_rounds(study: Study, plan: DpSgdPlan) -> int:
    """How many rounds a site goes through before its budget stops it."""
    privacy = study.privacy
    if privacy.epsilon is None or privacy.delta is None:
        return study.rounds
    budget = Budget(epsilon=privacy.epsilon, delta=privacy.delta, relation=privacy.relation)
    low, high = 0, study.rounds + 1  # so many are affordable, so many are not
    middle = study.rounds
    while high - low > 1:
        try:
            budget.check([plan.mechanism()] * (middle - 1), plan.mechanism())
            low = middle
        except BudgetExceeded:
            high = middle
        middle = (low + high) // 2
    if not low:
        raise StudyError(f"privacy.epsilon: expected a budget for one round at least, got {privacy.epsilon:g}")
    return low
