"""Noise in shares where the privacy unit is one record: one step of DP-SGD over the records of several sites."""

from __future__ import annotations

import math
from contextlib import closing
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dp.csprng import Csprng, Entropy
from dp.distributed.whole import MAX_RING_BITS, check_whole
from dp.errors import DpError, ParameterError
from dp.mechanisms import DiscreteGaussianSum, Unit, check_count, check_positive, check_shares
from dp.samplers import DiscreteGaussian

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dp.sgd import Loss

_FINEST_GRID = 1 << 28  # up to here a vector's norm in float64 is right to far less than the 1/2 that rounding leaves


class DistributedSgdPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How sites take one step of DP-SGD together; fixed and accounted before it begins, the same at every site.

    Attributes:
        sampling_rate: Chance of each record, at whatever site, to be in a step; more than 0 and at most 1.
        noise_multiplier: Standard deviation of the noise that counts, over the sensitivity: of `threshold` less
            `colluders` shares together. Whatever survives beyond that makes the noise larger.
        l2_clip_norm: C, the longest gradient of one record before rounding, in the gradient's unit; positive.
        grid: How many steps of the grid C is long, and so the sensitivity in whole numbers; 1 to 2^28.
        dimension: d, how many trainable numbers the model has, at least 1.
        shares: How many sites take part.
        threshold: The fewest with whom the sum is opened.
        colluders: How many sites in the sum may tell each other their shares of noise.
        grad_sample_mode: As in `DpSgdPlan`.

    Raises:
        ParameterError: A field is out of its range, or the grid is so coarse that rounding could use up the whole clip.
    """

    sampling_rate: float
    noise_multiplier: float
    l2_clip_norm: float
    grid: int
    dimension: int
    shares: int
    threshold: int
    colluders: int = 0
    grad_sample_mode: Literal["hooks", "functorch"] = "hooks"

    def __post_init__(self) -> None:
        check_positive("noise_multiplier", self.noise_multiplier)
        check_positive("l2_clip_norm", self.l2_clip_norm)
        check_count("grid", self.grid, at_least=1)
        check_count("dimension", self.dimension, at_least=1)
        check_shares(self.shares, self.threshold, self.colluders)
        if self.grid > _FINEST_GRID:
            raise ParameterError(f"grid should be at most 2^28, is {self.grid}")
        if self.dimension >= 4 * self.grid**2:
            raise ParameterError(
                f"a grid of {self.grid} is too coarse for {self.dimension} numbers: rounding may move a gradient by "
                f"sqrt(d) / 2 = {math.sqrt(self.dimension) / 2:.1f} steps of the grid, and only fewer than {self.grid} "
                "leave anything of the clip; sixteen times sqrt(d) is a good grid"
            )
        if self.grad_sample_mode not in ("hooks", "functorch"):
            raise ParameterError(f"grad_sample_mode should be 'hooks' or 'functorch', is {self.grad_sample_mode!r}")
        self.mechanism()

    @property
    def clip_to(self) -> float:
        """What a record's gradient is clipped to, C (1 - sqrt(d) / (2 grid)), to leave room for rounding."""
        return self.l2_clip_norm * (1.0 - math.sqrt(self.dimension) / (2 * self.grid))

    @property
    def share_sigma(self) -> float:
        """Sigma of one share, in steps of the grid: the least float with which threshold less colluders are enough."""
        counted = self.threshold - self.colluders
        wanted = (Fraction(self.noise_multiplier) * self.grid) ** 2
        sigma = self.noise_multiplier * self.grid / math.sqrt(counted)
        while counted * Fraction(sigma) ** 2 < wanted:
            sigma = math.nextafter(sigma, math.inf)
        return sigma

    def mechanism(self, steps: int = 1, survivors: int | None = None) -> DiscreteGaussianSum:
        """Gives what steps of this plan release, for the account.

        Args:
            steps: How many.
            survivors: How many sites were in the sum; None for the promise made beforehand, the threshold.
        """
        return DiscreteGaussianSum(
            unit=Unit.RECORD,
            sampling_rate=self.sampling_rate,
            steps=steps,
            l2_sensitivity=float(self.grid),
            dimension=self.dimension,
            l2_clip_norm=self.l2_clip_norm,
            scale=self.grid / self.l2_clip_norm,
            shares=self.shares,
            threshold=self.threshold,
            colluders=self.colluders,
            survivors=self.threshold if survivors is None else survivors,
            share_sigma=self.share_sigma,
        )

    def ring_bits(self, records: int, steps: int = 1, failure: float = 2.0**-40) -> int:
        """Gives the ring that the sums need, so that they come out whole.

        All steps' sums stay in range except with probability `failure`. In range means: no more records are drawn than
        a binomial variable exceeds with half of that probability, each adding at most the grid to a coordinate, and the
        noise stays below where Chernoff's bound gives the other half, the discrete Gaussian's moments being at most
        the Gaussian's (Canonne, Kamath and Steinke 2020). A sum out of range comes out wrong, but no less private.

        Args:
            records: Of all sites together, at least 1.
            steps: How many sums.
            failure: More than 0, less than 1.

        Returns:
            b, for sums modulo 2^b read as from -2^(b-1) to 2^(b-1) - 1.

        Raises:
            ParameterError: It is more than 62, or an argument is out of its range.
        """
        check_count("records", records, at_least=1)
        check_count("steps", steps, at_least=1)
        check_positive("failure", failure, at_most=1.0)
        drawn = int(stats.binom.isf(failure / 2 / steps, records, self.sampling_rate))
        variance = self.shares * self.share_sigma**2
        noise = math.sqrt(2 * variance * math.log(4 * self.dimension * steps / failure))
        bits = (drawn * self.grid + math.ceil(noise)).bit_length() + 1
        if bits > MAX_RING_BITS:
            raise ParameterError(f"sums of this plan need a ring of {bits} bits, and {MAX_RING_BITS} is the most")
        return bits

    def check_ring(self, ring_bits: int, records: int, steps: int = 1) -> None:
        """Refuses a ring in which sums of this plan could wrap, before anything is drawn.

        Args:
            ring_bits: b.
            records: Of all sites together.
            steps: How many sums.

        Raises:
            ParameterError: It is smaller than `ring_bits(records, steps)`.
        """
        needed = self.ring_bits(records, steps)
        if ring_bits < needed:
            raise ParameterError(
                f"a ring of {ring_bits} bits is too small for the records and the noise of this plan: it needs "
                f"{needed}; use a wider ring or a coarser grid"
            )


def sgd_contribution(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, plan: DistributedSgdPlan, entropy: Entropy
) -> NDArray[np.int64]:
    """Computes what one site puts into the secure sum of one step.

    Every record is drawn by its own coin; the gradients of those drawn are clipped, rounded to the grid and summed, and
    the site's share of noise is added. The privacy unit is one record, and the guarantee that of `plan.mechanism()`: it
    is about the opened sum, and holds only for what the secure sum hides. Nothing else may leave the site: this vector
    by itself has too little noise, and the number of records drawn is secret.

    Not covered: floating-point kernels may give a record's gradient other last digits where other records are computed
    along with it, and the guarantee takes every record's gradient as its own. In float32 that is about 1e-7 of the
    gradient, which rounding hides but for the few numbers that lie as close to the middle between two steps.

    Args:
        model: As for `dp.train`. It stays as it was.
        x: Records, (n, ...); n may be 0: the share of noise is due all the same.
        y: Targets, (n, ...).
        loss: As for `dp.train`.
        plan: The same at every site.
        entropy: Called once for 32 fresh secret bytes.

    Returns:
        Whole numbers, (d,), in the order of the model's trainable parameters; not yet modulo anything.

    Raises:
        UnsupportedModel: The model has a part that clipping per record cannot bound.
        ParameterError: x, y, the loss, the model or the sizes do not fit together.
        DpError: A loss or gradient is not finite. It says something about the records, and is for the site's own eyes.
    """
    from dp.sgd import clipped_gradients

    generator = Csprng(entropy)
    drawn = np.flatnonzero(generator.bernoulli(len(x), plan.sampling_rate))
    total = np.zeros(plan.dimension, np.int64)
    chunks = clipped_gradients(model, x, y, loss, drawn, plan.clip_to, plan.dimension, plan.grad_sample_mode)
    with closing(chunks):  # takes the hooks off the model at once, whatever happens
        for chunk in chunks:
            total += round_clipped(chunk, plan).sum(axis=0)
    return total + DiscreteGaussian(plan.share_sigma).draw(generator, plan.dimension)


def round_clipped(gradients: NDArray[np.float64], plan: DistributedSgdPlan) -> NDArray[np.int64]:
    """Rounds clipped gradients to the grid, such that no record's whole numbers are longer than the grid.

    In steps of the grid a gradient of norm C (1 - sqrt(d) / (2 grid)) has norm grid - sqrt(d) / 2. Rounding to the
    nearest moves each coordinate by at most 1/2, hence the vector by at most sqrt(d) / 2; so the result's norm is at
    most the grid. That is so in real numbers. In float64 the norm may have come out a little short; so the whole
    numbers' own norms are compared with the grid, exactly, and a record that is beyond is rounded towards 0 instead,
    which never lengthens a vector. So the bound holds for whatever is returned, not just up to float64's rounding.

    Args:
        gradients: (b, d), each of norm `plan.clip_to` up to rounding in float64.
        plan: For its grid.

    Returns:
        Whole numbers, (b, d), each row of norm at most `plan.grid`.

    Raises:
        DpError: A gradient is not finite, or was not clipped.
    """
    scaled = gradients * (plan.grid / plan.l2_clip_norm)
    not_clipped = "a gradient is not finite or longer than its clip norm; nothing was sent"
    if not bool((np.einsum("ij,ij->i", scaled, scaled) <= 1.01 * plan.grid**2).all()):
        raise DpError(not_clipped)
    whole = np.rint(scaled).astype(np.int64)
    # Rows are now shorter than 1.01 grid + sqrt(d) / 2 < 2^30, so that no square overflows.
    beyond = np.flatnonzero(_squares(whole) > plan.grid**2)
    whole[beyond] = np.trunc(scaled[beyond]).astype(np.int64)
    if bool((_squares(whole[beyond]) > plan.grid**2).any()):
        raise DpError(not_clipped)
    return whole


def _squares(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    squares: NDArray[np.int64] = np.einsum("ij,ij->i", rows, rows)
    return squares


def decode_gradient(total: NDArray[np.int64], plan: DistributedSgdPlan, records: int) -> NDArray[np.float64]:
    """Turns an opened sum into the mean gradient that a step goes against. Anyone may do it: the sum is public.

    The divisor is the expected number of records in a step, a constant: how many there were is secret.

    Args:
        total: The opened sum as signed whole numbers, (d,).
        plan: The same as at the sites.
        records: Of all sites together, as published; at least 1.

    Returns:
        (d,), in the gradient's unit.

    Raises:
        ParameterError: The sum is not whole numbers of shape (d,), or `records` is no count.
    """
    check_count("records", records, at_least=1)
    check_whole(total, plan.dimension)
    step: float = plan.l2_clip_norm / plan.grid
    return total.astype(np.float64) * (step / (plan.sampling_rate * records))
