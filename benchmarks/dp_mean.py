"""The mean of vectors under distributed noise is about as good as under a trusted server's Gaussian.

The setting is that of Kairouz, Liu and Steinke 2021, section 6: vectors on a sphere of radius 10 in 250 dimensions, one
for each participant, delta 1e-5, sums modulo 2^b; k = 2 deviations are kept from wrapping, and nothing is assumed about
how alike the vectors are (`alignment` 1; 1/n and k = 4 where they are said to be independent). A figure is the mean
squared error of the opened sum over the variance of the central Gaussian, both with the least noise that costs epsilon
by `dp.spent`; its quartiles are over repetitions.

Targets are the paper's ratios and a tenth. There the whole numbers are accounted by RDP, where here PLD is proved.
"""

from __future__ import annotations

import os

import numpy as np
from _harness import Figure, arguments, report
from scipy.special import erfc

from dp import (
    ParameterError,
    ParticipantPlan,
    calibrate_noise_multiplier,
    decode_participants,
    participant_contribution,
    solve_participant_plan,
)

DIMENSION, CLIP, DELTA = 250, 10.0, 1e-5
TWO_DEVIATIONS, FOUR_DEVIATIONS = float(erfc(2 / np.sqrt(2))), float(erfc(4 / np.sqrt(2)))
BITS = (10, 12, 14, 16)


def errors(plan: ParticipantPlan, repetitions: int, rng: np.random.Generator) -> list[float]:
    """Mean squared errors of a coordinate of the opened sum, one for each repetition."""
    out = []
    for _ in range(repetitions):
        vectors = rng.normal(size=(plan.shares, DIMENSION))
        vectors *= CLIP / np.linalg.norm(vectors, axis=1, keepdims=True)
        seed = rng.bytes(32)
        total = np.zeros(plan.padded, np.int64)
        for vector in vectors:
            total += participant_contribution(vector, plan, seed, os.urandom)
        # What a secure sum opens is known modulo 2^b only.
        opened = total % (1 << plan.ring_bits)
        out.append(float(np.mean((decode_participants(opened, plan, seed) - vectors.sum(axis=0)) ** 2)))
    return out


def main() -> None:
    options = arguments(__doc__)
    settings = [(100, 3.0, bits, "discrete-gaussian", 1.0) for bits in BITS]
    if not options.quick:
        settings += [(1000, 3.0, bits, "discrete-gaussian", 1.0) for bits in BITS]
        settings += [(1000, 3.0, bits, "discrete-gaussian", 1 / 1000) for bits in (10, 12)]
        settings += [(100, 3.0, bits, "skellam", 1.0) for bits in (12, 16)]
        settings += [(100, epsilon, bits, "discrete-gaussian", 1.0) for epsilon in (1.0, 10.0) for bits in (12, 16)]
    rng, figures = np.random.default_rng(0), []
    for shares, epsilon, bits, noise, alignment in settings:
        name = f"n={shares}, epsilon {epsilon:g}, {bits} bits"
        name += ", Skellam" if noise == "skellam" else ""
        name += "" if alignment == 1.0 else ", independent vectors"
        variance = (CLIP * calibrate_noise_multiplier(epsilon, DELTA, 1.0, 1)) ** 2
        try:
            plan = solve_participant_plan(
                ring_bits=bits,
                shares=shares,
                dimension=DIMENSION,
                l2_clip_norm=CLIP,
                epsilon=epsilon,
                delta=DELTA,
                noise=noise,
                # Where little is kept for likeness, as little must be left to chance.
                wrap_probability=TWO_DEVIATIONS if alignment == 1.0 else FOUR_DEVIATIONS,
                alignment=alignment,
            )
        except ParameterError as error:
            print(f"{name}: {error}")
            continue
        repetitions = (100 if options.quick else 400) if shares == 100 else 40
        mse = errors(plan, repetitions, rng)
        # The mean is what is published; the median of skewed values would flatter.
        figure = Figure.of(name, [e / variance for e in mse])
        figures.append(Figure(name, float(np.mean(mse)) / variance, figure.low, figure.high, "", repetitions))
    report("dp_mean", figures, options, ["numpy", "dp-accounting"], columns=("mean", "quartiles"))


if __name__ == "__main__":
    main()
