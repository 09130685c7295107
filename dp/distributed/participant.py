"""Noise in shares where the privacy unit is a participant: one vector from each, protected with all that it holds."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special

from dp.accounting import Budget, calibrate
from dp.csprng import Csprng, Entropy
from dp.distributed.rotation import hadamard, signs
from dp.distributed.whole import MAX_RING_BITS, check_whole, wrapped
from dp.errors import DpError, ParameterError
from dp.mechanisms import DiscreteGaussianSum, Relation, SkellamSum, Unit, check_count, check_positive, rounded_l2
from dp.samplers import DiscreteGaussian, Skellam

_TRIES = 64


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
        if self.ring_bits > MAX_RING_BITS:
            raise ParameterError(f"ring_bits should be at most {MAX_RING_BITS}, is {self.ring_bits}")
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
    scaled = hadamard(values * signs(rotation_seed, plan.padded)) * plan.scale
    generator = Csprng(entropy)
    whole = _round_within(scaled, plan.l2_sensitivity, generator)
    mechanism = plan.mechanism()
    if isinstance(mechanism, SkellamSum):
        noise = Skellam(mechanism.share_variance).draw(generator, plan.padded)
    else:
        noise = DiscreteGaussian(mechanism.share_sigma).draw(generator, plan.padded)
    return wrapped(whole + noise, plan.ring_bits)


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
    check_whole(total, plan.padded)
    centred = wrapped(total.astype(np.int64), plan.ring_bits)
    return (hadamard(centred / plan.scale) * signs(rotation_seed, plan.padded))[: plan.dimension]


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
