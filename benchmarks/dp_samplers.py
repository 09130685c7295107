"""A million whole numbers of exact noise take as long as a million floats of inexact noise.

numpy's normal, whose seed of 64 bits and float64 grid no privacy should rest on, runs in the same process, in turn.
What a table takes to build, once for each deviation, is measured apart, without its cache.
"""

from __future__ import annotations

import os
from fractions import Fraction
from statistics import median

import numpy as np
from _harness import Figure, arguments, in_turns, report

from dp import Csprng, DiscreteGaussian, Skellam
from dp.samplers import _gaussian_table, _skellam_table

MILLION = 1_000_000
SIGMAS = (1, 5, 100, 20_000)


def main() -> None:
    options = arguments(__doc__)
    count, turns = (MILLION // 10, 3) if options.quick else (MILLION, 11)
    generator, floats = Csprng(os.urandom), np.random.default_rng()
    gaussians = {sigma: DiscreteGaussian(sigma) for sigma in SIGMAS}
    skellams = {sigma: Skellam(sigma**2) for sigma in SIGMAS}
    times = in_turns(
        {
            "numpy's normal": lambda: floats.standard_normal(count),
            "AES-CTR words of 64 bits": lambda: generator.uint64(count),
            **{f"discrete Gaussian, sigma {s}": lambda g=g: g.draw(generator, count) for s, g in gaussians.items()},
            **{f"Skellam, sigma {s}": lambda k=k: k.draw(generator, count) for s, k in skellams.items()},
        },
        turns,
    )
    building = in_turns(
        {
            "table of a discrete Gaussian, sigma 4096": lambda: _gaussian_table.__wrapped__(Fraction(4096**2)),
            "table of a Skellam, sigma 20000": lambda: _skellam_table.__wrapped__(Fraction(20_000**2)),
        },
        1 if options.quick else 3,
    )
    figures = []
    for name, samples in times.items():
        each = samples.each_of(count)
        wall = median(each.wall) * MILLION
        figures.append(Figure.of(f"1M {name}", [s * MILLION * 1000 for s in each.cpu], "CPU-ms", wall))
        if "sigma" in name:
            figures.append(Figure.ratio(f"{name} / numpy's normal", samples, times["numpy's normal"]))
    figures += [Figure.cpu_seconds(name, samples) for name, samples in building.items()]
    report("dp_samplers", figures, options, ["numpy", "cryptography", "mpmath"])


if __name__ == "__main__":
    main()
