"""FLamby's Fed-Heart-Disease through the masked protocol gives the accuracies that were published for plain FedAvg.

du Terrail et al. 2022, "FLamby: datasets and benchmarks for cross-silo federated learning": Linear(13, 1), batch 4,
SGD, 100 local updates a round, 15 rounds, seeds 42 to 46. Once as published, each hospital standardising with its own
means (learning rate 1e-3), and once with means over all hospitals from a secure sum (1e-2). "Pooled test" is the test
rows of all hospitals, standardised with the means over all training rows.
"""

from __future__ import annotations

import numpy as np
import torch
from _harness import Figure, arguments, report

from protocols import parse_study, run_study
from protocols.datasets import SiteData, heart_disease, pooled
from protocols.fedavg import evaluate
from protocols.run import Run

SEEDS = (42, 43, 44, 45, 46)
PUBLISHED = {
    "cleveland": 0.7308,
    "hungarian": 0.7191,
    "switzerland": 0.6500,
    "va": 0.6400,
    "mean": 0.6850,
    "pooled": 0.7480,
}
STUDY = """
name = "flamby-heart"
rounds = {rounds}
seed = {seed}
sites = [{{ name = "cleveland" }}, {{ name = "hungarian" }}, {{ name = "switzerland" }}, {{ name = "va" }}]

[task]
preprocessing = "flamby"
standardize = "{standardize}"

[training]
local_steps = 100
batch_size = 4
learning_rate = {learning_rate}
"""


def pooled_test(data: dict[str, SiteData]) -> SiteData:
    raw = pooled(data.values())
    x = raw.train_x.astype(np.float64)
    return raw.standardized(x.mean(axis=0), x.std(axis=0, ddof=1))


def accuracies(run: Run, pooled_rows: SiteData) -> dict[str, float]:
    each = {name: site.federated.accuracy for name, site in run.sites.items()}
    together = evaluate(run.model, pooled_rows, torch.device("cpu")).accuracy
    return {**each, "mean": sum(each.values()) / len(each), "pooled": together}


def measure(standardize: str, learning_rate: float, seeds: tuple[int, ...], rounds: int) -> list[dict[str, float]]:
    data = heart_disease("flamby")
    together = pooled_test(data)
    results = []
    for seed in seeds:
        study = parse_study(
            STUDY.format(seed=seed, standardize=standardize, learning_rate=learning_rate, rounds=rounds)
        )
        run = run_study(study, data)
        if run.stopped is not None or any(record.outcome != "opened" for record in run.rounds):
            raise SystemExit(f"a round was lost: {run.stopped}")
        results.append(accuracies(run, together))
    return results


def figures(prefix: str, results: list[dict[str, float]]) -> list[Figure]:
    """The mean over seeds, as published, with the lowest and highest seed beside it."""
    rows = []
    for name in PUBLISHED:
        values = [result[name] for result in results]
        rows.append(Figure(f"{prefix}: {name}", sum(values) / len(values), min(values), max(values), "", len(values)))
    return rows


def main() -> None:
    options = arguments(__doc__ or "")
    seeds, rounds = (SEEDS[:1], 2) if options.quick else (SEEDS, 15)
    rows = [Figure(f"published FedAvg: {name}", value, value, value, "", 5) for name, value in PUBLISHED.items()]
    rows += figures("masked, own means", measure("site", 1e-3, seeds, rounds))
    rows += figures("masked, global means", measure("global", 1e-2, seeds, rounds))
    report("flamby_heart", rows, options, ["torch", "numpy"], columns=("mean over seeds", "lowest - highest"))


if __name__ == "__main__":
    main()
