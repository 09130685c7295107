"""Noise inside the secure sum costs no more accuracy than a trusted centre's, and far less than noise at each site.

Four hospitals learn heart disease under (epsilon, 1e-4)-differential privacy for each record, in three ways:

- `central`: DP-SGD on all records put together (`dp.train`), by somebody whom everyone would have to trust.
- `distributed-sgd`: every hospital adds a share of the noise, and whole numbers are summed.
- `local-sgd`: every hospital protects itself, and the mean of the updates is taken.

All take the same steps: clip norm, sampling rate, learning rate and number of steps are the same, and each has the
least noise with which its account comes to epsilon. They were chosen by `--tune`: the best mean AUC over the three ways
and the three epsilons, on a third of the training rows held out for that. Test rows took no part in the choice. (In a
study that choice is a release too, and is charged.)

The first table allows for no colluder and no drop-out: all four must stay. The second has the price of shares made for
fewer: for three that stay, one of whom tells its share, or both. Its noise is more than the account needs when everyone
stays; `accounted` is then below the epsilon promised. In its last line a hospital in turn is missing from every round.

Plans, contributions, decoding and server steps are those of a study. What is left out are the masks: the sum here is
of the whole numbers themselves, to which masked sums are equal (tests show that), so that ten seeds take minutes.
Beside them one study of each kind runs in full, with masks and with every round charged. Noise comes from seeds here,
so that figures come out again; a study takes it from the operating system.

A figure is the mean over seeds, with the lowest and highest beside it: AUC of the last model on the test rows of all
hospitals together, and accuracy as the mean over the hospitals, as FLamby has it. FLamby's own example of differential
privacy (du Terrail et al. 2022) is printed beside: fewer columns and rows, other training, its own account; its line
for epsilon 0.1 is at delta 1e-4.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from _harness import Figure, arguments, report
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import train_test_split

from dp import DistributedSgdPlan, Entropy, Spent, decode_gradient, spent
from protocols import load_data, parse_study, run_study
from protocols.datasets import SiteData, heart_reference, pooled
from protocols.fedavg import (
    ServerOptimizer,
    build_model,
    distributed_contribution,
    distributed_plan,
    evaluate,
    flatten,
    gradient_update,
    local_plan,
    private_update,
)
from protocols.study import Study

EPSILONS, DELTA = (1.0, 3.0, 8.0), 1e-4
ROUNDS, RATE, LEARNING_RATE = 50, 0.5, 1.0  # by --tune
GRID = [(rounds, rate, step) for rounds in (20, 50) for rate in (0.25, 0.5) for step in (0.5, 1.0, 2.0)]
FEATURES = 28
CPU = torch.device("cpu")
FLAMBY = {"none": 0.7125, "10": 0.698, "5": 0.705, "1": 0.703, "0.1": 0.606}
STUDY = """
name = "dp-heart"
rounds = {rounds}
sites = [{{ name = "cleveland" }}, {{ name = "hungarian" }}, {{ name = "switzerland" }}, {{ name = "va" }}]
task = {{ standardize = "public" }}
training = {{ algorithm = "fedsgd" }}
server = {{ learning_rate = {learning_rate} }}
"""
SHARED = """
protocol = {{ threshold = {threshold} }}
[privacy]
mechanism = "distributed-sgd"
records = {records}
colluders = {colluders}
"""
PRIVACY = """
epsilon = {epsilon}
delta = {delta}
sampling_rate = {rate}
l2_clip_norm = 1.0
"""
LOCAL = '[privacy]\nmechanism = "local-sgd"\n'


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: For tables.
        threshold: Of the sum, where noise is shared.
        colluders: Likewise.
        missing: Whether one hospital in turn is missing from every round.
    """

    name: str
    threshold: int = 4
    colluders: int = 0
    missing: bool = False


CENTRAL, SHARES, OWN = Setting("central"), Setting("distributed-sgd"), Setting("local-sgd")
PRICES = (
    Setting("one drop-out", threshold=3),
    Setting("one colluder", colluders=1),
    Setting("one drop-out and one colluder", threshold=3, colluders=1),
    Setting("one drop-out, and one in every round", threshold=3, missing=True),
)


@dataclass(frozen=True)
class Trial:
    """A setting at an epsilon, ready to be run with any seed.

    Attributes:
        promised: What it costs at the worst that it allows for.
        accounted: What it costs as it is run.
    """

    setting: Setting
    study: Study
    promised: Spent
    accounted: Spent


def make(setting: Setting, epsilon: float, records: int, rounds: int, rate: float, learning_rate: float) -> Trial:
    """Calibrate, once for all seeds."""
    kind = SHARED if setting.name not in ("central", "local-sgd") else LOCAL
    text = STUDY + kind + PRIVACY
    values = {"rounds": rounds, "rate": rate, "learning_rate": learning_rate, "epsilon": epsilon, "delta": DELTA}
    values |= {"records": records, "threshold": setting.threshold, "colluders": setting.colluders}
    study = parse_study(text.format(**values))
    plan = distributed_plan(study, FEATURES + 1) or local_plan(study)
    if isinstance(plan, DistributedSgdPlan):
        worst = plan.mechanism(rounds)
        actual = plan.mechanism(rounds, survivors=3 if setting.missing else 4)
    else:
        worst = actual = msgspec.structs.replace(plan, steps=rounds).mechanism()
    noise = msgspec.structs.replace(study.privacy, noise_multiplier=plan.noise_multiplier)
    study = msgspec.structs.replace(study, privacy=noise)  # so that no seed calibrates again
    return Trial(setting, study, spent([worst], DELTA), spent([actual], DELTA))


def train(trial: Trial, data: Mapping[str, SiteData], seed: int) -> torch.nn.Module:
    """The model of one run, from plans, contributions and steps as a study has them."""
    study = msgspec.structs.replace(trial.study, seed=seed)
    entropy: Entropy = np.random.default_rng([seed, 1]).bytes
    model = build_model(study, FEATURES)
    if trial.setting is CENTRAL:
        steps = {"steps": study.rounds, "learning_rate": study.server.learning_rate}
        private_update(
            model, pooled(data.values()), study, msgspec.structs.replace(local_plan(study), **steps), entropy
        )
        return model
    plan = distributed_plan(study, flatten(model).size) or local_plan(study)
    server = ServerOptimizer(model, study.server)
    names = sorted(data)
    for number in range(study.rounds):
        present = [data[name] for i, name in enumerate(names) if not trial.setting.missing or i != number % len(names)]
        at_sites = [(copy.deepcopy(model), rows) for rows in present]
        if isinstance(plan, DistributedSgdPlan):
            total = sum(distributed_contribution(own, rows, study, plan, entropy) for own, rows in at_sites)
            server.step(-decode_gradient(total, plan, study.privacy.records))
        else:
            updates = [private_update(own, rows, study, plan, entropy) for own, rows in at_sites]
            server.step(np.average([u.values for u in updates], axis=0, weights=[u.weight for u in updates]))
    return model


def without_noise(data: Mapping[str, SiteData], seed: int) -> torch.nn.Module:
    """The same number of steps on all records together, with nothing clipped, drawn or added."""
    study = parse_study(f"{STUDY}seed = {seed}\n".format(rounds=ROUNDS, learning_rate=LEARNING_RATE))
    model, rows = build_model(study, FEATURES), pooled(data.values())
    server = ServerOptimizer(model, study.server)
    for _ in range(study.rounds):
        server.step(gradient_update(model, rows, CPU).values.astype(np.float64))
    return model


def judge(models: Iterable[torch.nn.Module], data: Mapping[str, SiteData]) -> tuple[list[float], list[float]]:
    """For each model the AUC on all test rows together, and the mean over the hospitals of the accuracy."""
    together, models = pooled(data.values()), list(models)
    areas = [evaluate(model, together, CPU).auc or 0.0 for model in models]
    return areas, [float(np.mean([evaluate(model, d, CPU).accuracy for d in data.values()])) for model in models]


def tune(data: Mapping[str, SiteData], records: int) -> None:
    """Print every setting of the grid with its mean AUC on rows held out of the training rows, the best last."""
    inner = {}
    for name, rows in data.items():
        split = train_test_split(rows.train_x, rows.train_y, test_size=1 / 3, random_state=0, stratify=rows.train_y)
        inner[name] = SiteData(name, rows.features, split[0], split[2], split[1], split[3])
    kept = sum(rows.train_rows for rows in inner.values())
    found = []
    for rounds, rate, step in GRID:
        trials = [make(way, e, kept, rounds, rate, step) for way in (CENTRAL, SHARES, OWN) for e in EPSILONS]
        areas, _ = judge((train(trial, inner, seed) for trial in trials for seed in range(100, 103)), inner)
        found.append((float(np.mean(areas)), rounds, rate, step))
        print("mean AUC {:.4f}: {} rounds, rate {}, learning rate {}".format(*found[-1]), flush=True)
    print("best: AUC {:.4f}, {} rounds, rate {}, learning rate {}".format(*max(found)))
    print(f"on {kept} of the {records} training rows; test rows took no part")


def in_full(trial: Trial, data: Mapping[str, SiteData]) -> tuple[float, float]:
    """AUC and the largest epsilon of the study itself, masked and charged round by round."""
    run = run_study(trial.study, load_data(trial.study))
    if run.stopped is not None or any(record.outcome != "opened" for record in run.rounds[:-1]):
        raise SystemExit(f"a round was lost: {run.stopped}")
    return judge([run.model], data)[0][0], max(site.spent.epsilon for site in run.sites.values())


def figure(name: str, values: list[float]) -> Figure:
    return Figure(name, float(np.mean(values)), min(values), max(values), "", len(values))


def measure(options: Namespace, data: Mapping[str, SiteData], records: int) -> list[Figure]:
    seeds, rounds = (range(2), 4) if options.quick else (range(10), ROUNDS)
    areas, accuracies = judge((without_noise(data, seed) for seed in seeds), data)
    figures = [figure("no privacy: AUC", areas), figure("no privacy: accuracy", accuracies)]
    for epsilon in EPSILONS:
        means = {}
        for setting in (CENTRAL, SHARES, OWN, *PRICES):
            name = f"epsilon {epsilon:g}, {setting.name}"
            trial = make(setting, epsilon, records, rounds, RATE, LEARNING_RATE)
            areas, accuracies = judge((train(trial, data, seed) for seed in seeds), data)
            means[setting] = float(np.mean(areas))
            figures += [figure(f"{name}: AUC", areas), figure(f"{name}: accuracy", accuracies)]
            figures.append(figure(f"{name}: promised / epsilon", [trial.promised.epsilon / epsilon]))
            figures.append(figure(f"{name}: accounted", [trial.accounted.epsilon]))
            if setting in (SHARES, OWN):
                area, cost = in_full(trial, data)
                figures += [figure(f"{name}, masked study: AUC", [area]), figure(f"{name}, masked study: cost", [cost])]
        figures.append(figure(f"epsilon {epsilon:g}: central less distributed-sgd", [means[CENTRAL] - means[SHARES]]))
        print(f"epsilon {epsilon:g} done", file=sys.stderr, flush=True)
    return figures


def show(figures: list[Figure]) -> None:
    """The two tables and FLamby's."""
    at = {f.name: f for f in figures}
    console = Console(width=None if sys.stdout.isatty() else 120)
    none = at["no privacy: AUC"]
    for title, settings in (
        ("AUC", (CENTRAL, SHARES, OWN)),
        ("The price of what is tolerated: AUC", (SHARES, *PRICES)),
    ):
        table = Table("", title=title, title_justify="left")
        for epsilon in EPSILONS:
            table.add_column(f"epsilon {epsilon:g}", justify="right")
            table.add_column("accounted", justify="right")
        for setting in settings:
            cells = []
            for epsilon in EPSILONS:
                area = at[f"epsilon {epsilon:g}, {setting.name}: AUC"]
                cells += [f"{area.value:.3f} ({area.low:.3f} - {area.high:.3f})"]
                cells += [f"{at[f'epsilon {epsilon:g}, {setting.name}: accounted'].value:.4f}"]
            table.add_row(setting.name, *cells)
        console.print(table)
    console.print(f"No privacy: {none.value:.3f}. Each: mean over {none.turns} seeds (lowest - highest).")
    table = Table("epsilon", title="Accuracy, mean over the hospitals", title_justify="left")
    columns = ("FLamby's example", "central", "distributed-sgd", "local-sgd")
    for column in columns:
        table.add_column(column, justify="right")
    for epsilon in ("none", *(f"{e:g}" for e in EPSILONS), "5", "10", "0.1"):
        ours = [at.get(f"epsilon {epsilon}, {way}: accuracy") for way in columns[1:]]
        if epsilon == "none":
            ours = [at["no privacy: accuracy"]] * 3
        published = f"{FLAMBY[epsilon]:.3f}" if epsilon in FLAMBY else ""
        table.add_row(epsilon, published, *(f"{f.value:.3f}" if f else "" for f in ours))
    console.print(table)
    console.print("FLamby's has 13 columns of 740 rows, other training and its own account: no like for like.")


def draw(figures: list[Figure], path: Path) -> None:
    """AUC over epsilon for each way and for the dearest of the prices, with the range over seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "dp_heart"
    at = {f.name: f for f in figures}
    canvas, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(at["no privacy: AUC"].value, color="black", linestyle=":", label="no privacy")
    styles = zip((CENTRAL, SHARES, PRICES[2], OWN), ("s-", "o-", "^--", "v-"), (-2, -0.7, 0.7, 2), strict=True)
    for setting, style, shift in styles:
        found = [at[f"epsilon {epsilon:g}, {setting.name}: AUC"] for epsilon in EPSILONS]
        values = [f.value for f in found]
        spread = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
        label = f"distributed-sgd, tolerates {setting.name}" if setting is PRICES[2] else setting.name
        places = [epsilon * 1.02**shift for epsilon in EPSILONS]  # beside each other, to be told apart
        axes.errorbar(places, values, spread, fmt=style, capsize=3, markersize=5, linewidth=1, label=label)
    axes.set_xscale("log")
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.minorticks_off()
    axes.set(xlabel=f"epsilon per record, delta {DELTA:g}", ylabel="AUC, test rows of all four hospitals")
    axes.legend(loc="lower right")
    canvas.savefig(path, metadata={"Date": None})


def main() -> None:
    options = arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw AUC over epsilon to this file"),
            parser.add_argument("--tune", action="store_true", help="print how rounds, rate and step were chosen"),
        ),
    )
    torch.set_num_threads(1)
    raw = load_data(parse_study(STUDY.format(rounds=1, learning_rate=1.0)))
    data = {name: rows.standardized(*heart_reference(rows.features)) for name, rows in raw.items()}
    records = sum(rows.train_rows for rows in data.values())
    if options.tune:
        tune(data, records)
        return
    figures = measure(options, data, records)
    show(figures)
    if options.plot:
        draw(figures, options.plot)
    report("dp_heart", figures, options, ["torch", "numpy", "dp-accounting"], columns=("mean", "lowest - highest"))


if __name__ == "__main__":
    main()
