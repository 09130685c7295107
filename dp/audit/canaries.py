"""Canaries in DP-SGD: made-up records that look for a hole in the account, and the judgement of what they found.

A canary is a record whose gradient is known: ten times as long as the clip norm, along a coordinate that nothing else
moves. It sits among the real records, and is drawn, clipped, summed and covered with noise by the very code that they
go through, `dp.sgd.train`, which is not told of it. Whether it is there at all is decided by a fair coin. The attacker
sees every model that training gives out, and guesses the coins from how far it has moved along each canary's direction.

The coordinates are extra parameters, one for each canary. So real gradients and other canaries do not blur the score,
the small models of hospitals take thousands of canaries, and the model itself trains as it would without them: a
canary's gradient on it is zero, and a record's on the extra parameters is zero too. That is as strong as an attack on
one record can be, since clipping lets none have a longer gradient. What it cannot see is a fault that touches the
model's own parameters alone, such as noise that is left out of one layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from dp.accounting import Spent, spent
from dp.audit.bounds import account_curve, gaussian_epsilon, one_run_epsilon, one_run_mu, rules_out
from dp.csprng import Csprng, Entropy
from dp.errors import ParameterError
from dp.mechanisms import PoissonSampledGaussian, Relation, check_count, check_positive
from dp.sgd import DpSgdPlan, DpSgdReport, Loss, train

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OVERLONG = 10.0  # a canary's gradient over the clip norm, so that clipping left out is seen


class CanaryRun:
    """A model in training, with canaries among its records.

    Under add-or-remove-one a canary is a record or is none; under replace-one it always is, and the coin decides
    between a gradient and its opposite. Either way the two outcomes of one coin are neighbouring data sets, as the
    account counts them, and a canary is one record of it.

    The coins are known to `right` alone, and the scores are a function of what training gave out.

    Args:
        model: To be trained in place, as `dp.sgd.train` takes it; float32 parameters on x's device.
        x: The real records, (n, ...), at least one; a dtype that holds whole numbers up to `canaries` exactly.
        y: Their targets, (n, ...), on x's device.
        loss: Gives one loss for each record, (b,).
        canaries: m, how many coins are tossed, at least 1.
        entropy: Called once for 32 fresh secret bytes, from which the coins come. Training must have other bytes.
        relation: Of the account that is to be tested.

    Raises:
        ParameterError: x and y do not fit together, there is no canary, or x cannot number the canaries.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: Loss,
        canaries: int,
        entropy: Entropy,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    ) -> None:
        check_count("canaries", canaries)
        if canaries < 1 or len(x) != len(y) or len(x) == 0:
            raise ParameterError(
                f"there should be at least one canary and one record, and as many targets as records: {canaries} "
                f"canaries, {len(x)} records, {len(y)} targets"
            )
        self._coins = Csprng(entropy).bernoulli(canaries, 0.5)
        numbers = np.arange(1, canaries + 1)
        present = numbers[self._coins]
        if relation is Relation.REPLACE_ONE:
            present = np.where(self._coins, numbers, -numbers)
        self._records = len(x)
        self._x = _numbered(x, torch.from_numpy(present))
        self._y = torch.cat([y, y[:1].expand(len(present), *y.shape[1:])])
        self._loss = loss
        self._model = _WithCanaries(model, x, canaries)

    def train(self, plan: DpSgdPlan, entropy: Entropy) -> DpSgdReport:
        """Trains on records and canaries, and gives out the model; as often as there are rounds.

        Args:
            plan: What to do, as without canaries. A step is divided by the expected draw of real records, which hides
                how many canaries there are.
            entropy: As of `dp.sgd.train`.

        Returns:
            What was done, as `dp.sgd.train` says it: the claim that is tested.

        Raises:
            DpError: As `dp.sgd.train`.
        """
        length = _OVERLONG * plan.l2_clip_norm

        def loss(output: Tensor, target: Tensor) -> Tensor:
            inner, sign, value = output[:, :-2], output[:, -2], output[:, -1]
            real = self._loss(inner.reshape(len(inner), *self._model.output_shape), target)
            # Where one is taken, the other has a gradient of exactly zero.
            return torch.where(sign == 0, real, length * sign * value)

        return train(self._model, self._x, self._y, loss, plan, entropy, public_size=self._records)

    def scores(self) -> NDArray[np.float64]:
        """Gives what the attacker sees of each canary, (m,): how far the model has gone against its gradient.

        That is the inner product of the canary's gradient with the sum of all noisy gradients, those of a round weighed
        by its momentum, up to a positive factor that all canaries share.
        """
        return -self._model.directions.weight.detach().cpu().double().numpy().reshape(-1)

    def right(self, guesses: NDArray[np.int8]) -> int:
        """Counts the right ones of some `guess`; ask once, when the guesses are final.

        Args:
            guesses: (m,), 1 for in, -1 for out (its opposite, under replace-one), 0 for no guess.

        Raises:
            ParameterError: Another shape, or other values.
        """
        if guesses.shape != self._coins.shape or not np.isin(guesses, (-1, 0, 1)).all():
            raise ParameterError(f"guesses should be {len(self._coins)} of -1, 0 and 1")
        return int(np.count_nonzero(guesses == np.where(self._coins, 1, -1)))


class _WithCanaries(nn.Module):
    """A model beside a parameter for each canary; the last column of a flat row is the canary's number, 0 for none."""

    def __init__(self, model: nn.Module, x: Tensor, canaries: int) -> None:
        super().__init__()
        self.model = model
        self.directions = nn.Embedding(canaries, 1, device=x.device)
        nn.init.zeros_(self.directions.weight)
        self.record_shape = x.shape[1:]
        was_training = model.training
        model.eval()
        with torch.no_grad():
            self.output_shape = model(x[:1]).shape[1:]
        model.train(was_training)

    def forward(self, rows: Tensor) -> Tensor:
        number = rows[:, -1].long()
        output = self.model(rows[:, :-1].reshape(len(rows), *self.record_shape)).reshape(len(rows), -1)
        # A record looks up the first direction as well: the loss leaves that out.
        value = self.directions((number.abs() - 1).clamp(min=0))
        return torch.cat([output, number.sign()[:, None].to(output.dtype), value], dim=1)


def _numbered(x: Tensor, present: Tensor) -> Tensor:
    """Adds canaries to records: flat rows with the canary's number at the end, (n + present, f + 1)."""
    number = torch.cat([torch.zeros(len(x), dtype=torch.int64), present]).to(x.device)
    column = number.to(x.dtype)
    if not torch.equal(column.to(torch.int64), number):
        raise ParameterError(f"records of dtype {x.dtype} cannot number {len(present)} canaries; use float32 or int64")
    # A canary passes through the model as a copy of the first record, which the model can take for certain; what comes
    # out is thrown away.
    flat = torch.cat([x, x[:1].expand(len(present), *x.shape[1:])]).reshape(len(number), -1)
    return torch.cat([flat, column[:, None]], dim=1)


def guess(scores: NDArray[np.float64], guesses: int) -> NDArray[np.int8]:
    """Guesses the coins of the canaries with the most telling scores: half of the guesses in, half out.

    Args:
        scores: (m,), the higher the more likely in.
        guesses: r, how many to guess, chosen before training. At most m; of an odd number one more is in.

    Returns:
        (m,), int8: 1 for in, -1 for out, 0 for no guess.

    Raises:
        ParameterError: r is not from 1 to m, or a score is not a number.

    >>> guess(np.array([0.3, -2.0, 5.0, 0.1]), 2)
    array([ 0, -1,  1,  0], dtype=int8)
    """
    check_count("guesses", guesses)
    if not 1 <= guesses <= len(scores):
        raise ParameterError(f"of {len(scores)} canaries 1 to {len(scores)} should be guessed, not {guesses}")
    if np.isnan(scores).any():
        raise ParameterError("a score is not a number")
    order = np.argsort(scores, kind="stable")
    made = np.zeros(len(scores), dtype=np.int8)
    made[order[: guesses // 2]] = -1
    made[order[len(scores) - (guesses - guesses // 2) :]] = 1
    return made


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """An account beside what an attack makes of it.

    Attributes:
        account: What the releases cost, as claimed.
        canaries: m, coins tossed.
        guesses: r, how many of them were guessed.
        right: v, how many of the guesses were right.
        significance: Chance of contradicting a true account, of both tests together.
        one_run: Lower bound on epsilon at the account's delta, by `one_run_epsilon` at half the significance.
        mu: Lower bound by `one_run_mu` at half the significance. It takes the release for a Gaussian one.
        f_dp: The epsilon that it stands for at the account's delta. Not what decides: an account is more than one
            (epsilon, delta), and no Gaussian's exactly.
        curve_ruled_out: Whether `rules_out` rejects the account's own trade-off function, at half the significance.
    """

    account: Spent
    canaries: int
    guesses: int
    right: int
    significance: float
    one_run: float
    mu: float
    f_dp: float
    curve_ruled_out: bool

    @property
    def contradicts(self) -> bool:
        """Whether the attack is better than the account allows. If it is not, that does not make the account true."""
        return self.curve_ruled_out or self.one_run > self.account.epsilon


class Judge:
    """Judges audits of one account; made before training, from what is claimed.

    Args:
        mechanism: What the canaries will go through, as claimed: the steps of all rounds together.
        delta: Of the account, more than 0 and less than 1.
        canaries: m, coins tossed.
        guesses: r, how many will be guessed.
        significance: Chance of contradicting a true account that is taken. Two tests share it, half each (Bonferroni).
        relation: Of the account.

    Attributes:
        account: What the releases cost.

    Raises:
        ParameterError: A number is out of its range.
    """

    def __init__(
        self,
        mechanism: PoissonSampledGaussian,
        delta: float,
        canaries: int,
        guesses: int,
        significance: float = 0.05,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    ) -> None:
        check_positive("significance", significance)
        check_count("canaries", canaries)
        check_count("guesses", guesses)
        if significance >= 1.0:
            raise ParameterError(f"significance should be more than 0 and less than 1, is {significance!r}")
        if not 1 <= guesses <= canaries:
            raise ParameterError(f"of {canaries} canaries 1 to {canaries} should be guessed, not {guesses}")
        self._mechanism = mechanism
        self.account = spent([mechanism], delta, relation)
        self._counts = canaries, guesses
        self._significance = significance
        self._curve = account_curve(mechanism, relation)

    def judge(self, right: int) -> Audit:
        """Gives what so many right guesses mean.

        Args:
            right: v, at most the number of guesses.

        Raises:
            ParameterError: It is more than that.
        """
        counts, each = (*self._counts, right), self._significance / 2
        mu = one_run_mu(*counts, each)
        return Audit(
            account=self.account,
            canaries=counts[0],
            guesses=counts[1],
            right=right,
            significance=self._significance,
            one_run=one_run_epsilon(*counts, self.account.delta, each),
            mu=mu,
            f_dp=gaussian_epsilon(mu, self.account.delta),
            curve_ruled_out=rules_out(*counts, self._curve, each),
        )

    def ideal(self, runs: int = 101, seed: int = 0) -> Audit:
        """Gives the median audit of a release that costs exactly what the account says, by simulation.

        The simulated attacker adds up what every step shows of a canary, without momentum and without rounding: how
        often it was drawn, and noise.

        Args:
            runs: How many audits to simulate, at least 1.
            seed: Of the simulation, which protects nothing.
        """
        canaries, guesses = self._counts
        generator, m = np.random.default_rng(seed), self._mechanism
        deviation = m.noise_multiplier * math.sqrt(m.steps)
        opposite = self.account.relation is Relation.REPLACE_ONE
        right = []
        for _ in range(runs):
            coins = generator.random(canaries) < 0.5
            sign = np.where(coins, 1.0, -1.0 if opposite else 0.0)
            drawn = generator.binomial(m.steps, m.sampling_rate, canaries)
            scores = sign * drawn + deviation * generator.standard_normal(canaries)
            right.append(int(np.count_nonzero(guess(scores, guesses) == np.where(coins, 1, -1))))
        return self.judge(int(np.median(right)))
