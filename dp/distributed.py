"""Noise in shares: every participant of a secure sum adds a little, and the opened sum has all of it.

A site that protects its own update adds all the noise that its records need, and a sum of n updates has n times the
variance that one trusted server would have added. Here each site adds a share, in whole numbers, before the secure sum
masks it; what is opened carries the noise of one. Nobody but the secure sum's threshold stands in for that trusted
server, so shares are made such that as few as the threshold, less the colluders that a study allows for, are enough.

Two ways are offered, one for each privacy unit. `DistributedSgdPlan` hides a record: hospitals with many patients each
take a step together. `ParticipantPlan` hides a participant with all that it holds, in one vector from each.
(Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation"; Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning".)

Whole numbers here are int64. A secure sum adds them modulo 2^b; the caller takes them there, and its sums back.
"""

from __future__ import annotations

import math
from contextlib import closing
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from dp.accounting import Budget, calibrate
from dp.csprng import Csprng, Entropy
from dp.errors import DpError, ParameterError
from dp.mechanisms import (
    DiscreteGaussianSum,
    Relation,
    SkellamSum,
    Unit,
    check_count,
    check_positive,
    check_shares,
    rounded_l2,
)
from dp.samplers import DiscreteGaussian, Skellam

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dp.sgd import Loss

_FINEST_GRID = 1 << 28  # up to here a vector's norm in float64 is right to far less than the 1/2 that rounding leaves
_MAX_RING_BITS = 62
_TRIES = 64
_SEED_BYTES = 32


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
        if bits > _MAX_RING_BITS:
            raise ParameterError(f"sums of this plan need a ring of {bits} bits, and {_MAX_RING_BITS} is the most")
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
    _check_whole(total, plan.dimension)
    step: float = plan.l2_clip_norm / plan.grid
    return total.astype(np.float64) * (step / (plan.sampling_rate * records))


class ParticipantPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How each participant's vector becomes whole numbers with a share of noise; the same at every participant.

    Make it with `solve_participant_plan`.

    Attributes:
        dimension: Of a vector, at least 1. Vectors are padded with zeros to the next power of two.
        l2_clip_norm: c, the longest vector, in its own unit; longer ones are shortened to it. Positive.
        ring_bits: b, at most 62: sums are modulo 2^b.
        scale: Whole steps per unit of a vector (1 / gamma in the papers), positive.
        share_sigma: Standard deviation of a share of noise, in whole steps. (Of a discrete Gaussian, its parameter.)
        shares: How many participants are planned.
        threshold: The fewest with whom the sum is opened.
        colluders: How many participants in the sum may tell each other their shares.
        noise: The distribution of a share.
        beta: The chance with which rounding a vector is repeated at most, 0 to less than 1. The larger, the shorter are
            the vectors that are let through, and the less noise is needed; 0 lets everything through.

    Raises:
        ParameterError: A field is out of its range.
    """

    dimension: int
    l2_clip_norm: float
    ring_bits: int
    scale: float
    share_sigma: float
    shares: int
    threshold: int
    colluders: int = 0
    noise: Literal["discrete-gaussian", "skellam"] = "discrete-gaussian"
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        check_count("dimension", self.dimension, at_least=1)
        check_positive("l2_clip_norm", self.l2_clip_norm)
        check_count("ring_bits", self.ring_bits, at_least=1)
        if self.ring_bits > _MAX_RING_BITS:
            raise ParameterError(f"ring_bits should be at most {_MAX_RING_BITS}, is {self.ring_bits}")
        check_positive("scale", self.scale)
        check_positive("share_sigma", self.share_sigma)
        if self.noise not in ("discrete-gaussian", "skellam"):
            raise ParameterError(f"noise should be 'discrete-gaussian' or 'skellam', is {self.noise!r}")
        self.mechanism()

    @property
    def padded(self) -> int:
        """How many whole numbers a participant sends: the least power of two that is at least `dimension`."""
        return 1 << (self.dimension - 1).bit_length()

    @property
    def l2_sensitivity(self) -> float:
        """The longest vector of whole numbers that is let through."""
        return rounded_l2(self.l2_clip_norm * self.scale, self.padded, self.beta)

    def mechanism(self, steps: int = 1, survivors: int | None = None) -> DiscreteGaussianSum | SkellamSum:
        """Gives what sums under this plan release, for the account.

        Args:
            steps: How many.
            survivors: How many participants were in the sum; None for the promise made beforehand, the threshold.
        """
        common = {
            "unit": Unit.PARTICIPANT,
            "sampling_rate": 1.0,
            "steps": steps,
            "l2_sensitivity": self.l2_sensitivity,
            "dimension": self.padded,
            "l2_clip_norm": self.l2_clip_norm,
            "scale": self.scale,
            "shares": self.shares,
            "threshold": self.threshold,
            "colluders": self.colluders,
            "survivors": self.threshold if survivors is None else survivors,
        }
        if self.noise == "skellam":
            return SkellamSum(**common, share_variance=self.share_sigma**2)  # type: ignore[arg-type]
        return DiscreteGaussianSum(**common, share_sigma=self.share_sigma)  # type: ignore[arg-type]


def solve_participant_plan(
    *,
    ring_bits: int,
    shares: int,
    dimension: int,
    l2_clip_norm: float,
    epsilon: float,
    delta: float,
    steps: int = 1,
    threshold: int | None = None,
    colluders: int = 0,
    noise: Literal["discrete-gaussian", "skellam"] = "discrete-gaussian",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    beta: float = math.exp(-0.5),
    wrap_probability: float = 1e-4,
    alignment: float = 1.0,
) -> ParticipantPlan:
    """Finds the least noise that keeps to an epsilon, and with it the finest scale that a ring has room for.

    The finer the scale, the less rounding costs, and the sooner sums wrap. A coordinate of the rotated sum has variance
    at most `alignment` c^2 n^2 / d, the noise n sigma^2, and rounding n / (4 scale^2), c being the clip norm, n the
    shares, d the padded dimension and sigma a share's deviation before scaling. With k = sqrt(2) erfcinv(p), the scale

        sqrt(2^(2b) - n k^2) / (2 k sqrt(alignment c^2 n^2 / d + n sigma^2))

    puts 2^(b-1) at k deviations (Kairouz, Liu and Steinke 2021, section 5.3). Wrapping costs accuracy, never privacy.

    Args:
        ring_bits: b.
        shares: How many participants are planned.
        dimension: Of a vector.
        l2_clip_norm: c.
        epsilon: What all steps together may cost, positive.
        delta: More than 0 and less than 1.
        steps: How many sums, at least 1.
        threshold: The fewest with whom the sum is opened; all by default.
        colluders: How many participants in the sum may tell each other their shares.
        noise: The distribution of a share.
        relation: Which data sets are neighbours; the privacy unit is one participant.
        beta: As in `ParticipantPlan`.
        wrap_probability: p, the chance that a coordinate wraps, more than 0 and less than 1.
        alignment: How alike the vectors are: 1 where they may all be the same, 1 / shares where they are independent.

    Returns:
        The plan, whose `mechanism(steps)` costs at most epsilon, and at most 0.1 % less.

    Raises:
        ParameterError: An argument is out of its range, or the ring is too small for that epsilon.
    """
    check_count("steps", steps, at_least=1)
    check_positive("wrap_probability", wrap_probability, at_most=1.0 - 2.0**-53)
    check_positive("alignment", alignment)
    check_positive("l2_clip_norm", l2_clip_norm)
    Budget(epsilon=epsilon, delta=delta, relation=relation)
    # With all that does not depend on the noise; what is refused from here on, is so because of the ring.
    blank = ParticipantPlan(
        dimension=dimension,
        l2_clip_norm=l2_clip_norm,
        ring_bits=ring_bits,
        scale=1.0 / l2_clip_norm,
        share_sigma=1.0,
        shares=shares,
        threshold=shares if threshold is None else threshold,
        colluders=colluders,
        noise=noise,
        beta=beta,
    )
    counted = blank.threshold - blank.colluders
    deviations = math.sqrt(2) * float(special.erfcinv(wrap_probability))
    room = 4.0**ring_bits - shares * deviations**2
    too_small = (
        f"a ring of {ring_bits} bits is too small for {shares} shares, dimension {dimension} and epsilon {epsilon}: "
        "use a wider ring or a larger epsilon"
    )
    if room <= 0:
        raise ParameterError(too_small)

    def plan(noise_multiplier: float) -> ParticipantPlan:
        sigma = noise_multiplier * l2_clip_norm / math.sqrt(counted)
        spread = math.sqrt(alignment * (l2_clip_norm * shares) ** 2 / blank.padded + shares * sigma**2)
        scale = math.sqrt(room) / (2 * deviations * spread)
        return msgspec.structs.replace(blank, scale=scale, share_sigma=sigma * scale)

    try:
        return plan(calibrate(lambda z: plan(z).mechanism(steps), epsilon, delta, relation))
    except ParameterError as error:
        raise ParameterError(too_small) from error


def participant_contribution(
    vector: NDArray[np.floating], plan: ParticipantPlan, rotation_seed: bytes, entropy: Entropy
) -> NDArray[np.int64]:
    """Computes what one participant puts into the secure sum.

    The vector is clipped, padded, rotated (so that no coordinate is large), scaled, rounded at random without bias,
    again if that made it too long, and given a share of noise (Kairouz, Liu and Steinke 2021, Algorithm 1). The privacy
    unit is the participant, and the guarantee that of `plan.mechanism()`; it is about the opened sum.

    Rounding is repeated at most 64 times; each time is too long with probability at most `plan.beta`. After that the
    vector is rounded towards 0, which never lengthens it. So the bound that the guarantee rests on always holds.

    Args:
        vector: Floats, (d,).
        plan: The same at every participant.
        rotation_seed: 32 bytes, public, the same at every participant of one sum; chosen apart from the vectors.
        entropy: Called once for 32 fresh secret bytes.

    Returns:
        Whole numbers, (padded,), from -2^(b-1) to 2^(b-1) - 1: what wraps has wrapped.

    Raises:
        ParameterError: The vector has another shape, or the seed another length.
        DpError: The vector is not finite.
    """
    if vector.shape != (plan.dimension,):
        raise ParameterError(f"expected a vector of shape ({plan.dimension},), got {vector.shape}")
    values = np.zeros(plan.padded)
    values[: plan.dimension] = vector
    if not bool(np.isfinite(values).all()):
        raise DpError("the vector is not finite; nothing was sent")
    largest = np.abs(values).max()
    if largest > plan.l2_clip_norm:  # so that no square overflows
        values *= plan.l2_clip_norm / largest
    norm = np.linalg.norm(values)
    if norm > plan.l2_clip_norm:
        values *= plan.l2_clip_norm / norm
    scaled = _hadamard(values * _signs(rotation_seed, plan.padded)) * plan.scale
    generator = Csprng(entropy)
    whole = _round_within(scaled, plan.l2_sensitivity, generator)
    mechanism = plan.mechanism()
    if isinstance(mechanism, SkellamSum):
        noise = Skellam(mechanism.share_variance).draw(generator, plan.padded)
    else:
        noise = DiscreteGaussian(mechanism.share_sigma).draw(generator, plan.padded)
    return _wrapped(whole + noise, plan.ring_bits)


def decode_participants(total: NDArray[np.int64], plan: ParticipantPlan, rotation_seed: bytes) -> NDArray[np.float64]:
    """Turns an opened sum into the sum of the participants' vectors. Anyone may do it: the sum is public.

    Args:
        total: The opened sum, (padded,), whole numbers right modulo 2^b.
        plan: The same as at the participants.
        rotation_seed: The same as at the participants.

    Returns:
        (d,), in the vectors' unit: a sum. Who takes part is public, and so is the divisor for a mean.

    Raises:
        ParameterError: The sum is not whole numbers of shape (padded,), or the seed has another length.
    """
    _check_whole(total, plan.padded)
    centred = _wrapped(total.astype(np.int64), plan.ring_bits)
    return (_hadamard(centred / plan.scale) * _signs(rotation_seed, plan.padded))[: plan.dimension]


def _round_within(values: NDArray[np.float64], longest: float, generator: Csprng) -> NDArray[np.int64]:
    """Rounds (d,) at random, without bias before anything is repeated, to whole numbers of norm at most `longest`."""
    low = np.floor(values)
    fraction = values - low
    # The square of a float is right to 2^-52; a little less than it is below the true square.
    limit = math.floor(longest**2 * (1 - 2.0**-50))
    for _ in range(_TRIES):
        whole = (low + (generator.uniform(len(values)) < fraction)).astype(np.int64)
        if int(whole @ whole) <= limit:
            return whole
    return np.trunc(values).astype(np.int64)


def _signs(seed: bytes, n: int) -> NDArray[np.float64]:
    """Gives n signs, the same for the same seed."""
    if not isinstance(seed, bytes) or len(seed) != _SEED_BYTES:
        raise ParameterError(f"rotation_seed should be {_SEED_BYTES} bytes")
    words = Csprng(lambda _: seed).uint64(-(-n // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=n).astype(np.float64)
    return 1.0 - 2.0 * bits


def _hadamard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives the orthonormal Walsh-Hadamard transform of (2^k,), which is its own inverse."""
    out = values.copy().reshape(1, -1)
    while out.shape[1] > 1:
        left, right = np.hsplit(out, 2)
        out = np.concatenate([left + right, left - right])
    # The result comes with the bits of its indices reversed. Reversing them commutes with the transform, so that twice
    # this is still the identity.
    out *= 1.0 / math.sqrt(values.size)
    return out.reshape(-1)


def _wrapped(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    half = 1 << (bits - 1)
    return ((values + half) & ((1 << bits) - 1)) - half


def _check_whole(total: NDArray[np.int64], size: int) -> None:
    if total.shape != (size,) or total.dtype.kind not in "iu":
        raise ParameterError(f"expected whole numbers of shape ({size},), got {total.dtype} of shape {total.shape}")
