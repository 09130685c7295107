"""A round over Flower's simulation costs less than one of Flower's own SecAgg+, and a drop-out does not change that.

Theirs is `SecAggPlusWorkflow` and `secaggplus_mod` with their defaults over the complete graph, with our threshold.
Ours is a study with its defaults (active mode: signed, with a consistency check; theirs trusts its server). Rounds of
the two take turns in one simulation, over the same workers. Both sides' clients evaluate the model that came on four
rows and compute the same gradient in the same way, which costs little.

CPU seconds at the clients are those of the worker processes, all threads, from a message's arrival in the app to its
reply, for all participants of a round together; on our side with opening and saving the site's files. Those of all
processes have Ray, Flower's queues and the server in them as well. An upload is what a client sends in a round, all
stages together. The site that drops out has its keys shared and gets no message after that; the one that drops out
early has not, and gets none from the first stage on.

A study of 200 sites, a tenth of which drops out in every round, runs in a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
from _flower_given import mean_of, rows_of, study_of, update_of, weight_of
from _flower_many import many
from _harness import Figure, arguments, report
from _processes import cpu_seconds
from flwr.app import Context, Message
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from protocols.coordinator import Coordinator
from protocols.engines import Engine
from protocols.engines.faulty import Fault, Faulty
from protocols.engines.flower.conduct import conduct
from protocols.engines.flower.link import QUIET
from protocols.engines.flower.simulation import (
    PATIENCE,
    at_once,
    backend_config,
    client_app,
    load_rows,
    made_files,
    save_rows,
)
from protocols.fedavg import flatten
from protocols.study import Study

MILLION = 1_000_000


@dataclass
class Round:
    """What a round took.

    Attributes:
        side: "ours" or "theirs".
        kind: "first", "full", "drop-out" (after the keys were shared) or "early drop-out" (before).
        stages: Wall seconds of each.
        clients: CPU seconds in the client apps.
        everything: CPU seconds of all processes.
        upload: Bytes that a client sent for each parameter.
        opened: Whether there was a sum.
        error: Largest error of the mean, where there was one.
    """

    side: str
    kind: str
    stages: dict[str, float] = field(default_factory=dict)
    clients: float = 0.0
    everything: float = 0.0
    upload: float = 0.0
    opened: bool = False
    error: float = 0.0

    @property
    def wall(self) -> float:
        return sum(self.stages.values())


class Watch:
    """Reads the clocks and what the clients wrote down, around a round and its stages."""

    def __init__(self, log: Path) -> None:
        self._log = log
        log.touch()

    def begin(self) -> None:
        self._seen, self._everything = self._log.stat().st_size, cpu_seconds()
        self._at = time.perf_counter()
        self.stages: dict[str, float] = {}

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.stages[name], self._at = now - self._at, now

    def end(self, side: str, kind: str) -> Round:
        lines = self._log.read_bytes()[self._seen :].split()
        return Round(side, kind, self.stages, sum(map(float, lines)), cpu_seconds() - self._everything)


class Metered:
    """Both sides' client apps as one; what each call takes in its worker is written down."""

    def __init__(self, ours: ClientApp, theirs: ClientApp, log: Path) -> None:
        self._ours, self._theirs, self._log = ours, theirs, log

    def __call__(self, message: Message, context: Context) -> Message:
        app = self._theirs if message.metadata.message_type == "train" else self._ours
        before = time.process_time()
        reply = app(message, context)
        with self._log.open("a") as log:
            log.write(f"{time.process_time() - before}\n")
        return reply


class TheirClient(NumPyClient):
    """Computes the same gradient as `Site` does."""

    def __init__(self, study: Study, folder: Path, number: int) -> None:
        self._study, self._number = study, number
        self._rows = load_rows(folder / f"{study.site_names[number]}.npz")

    def fit(self, parameters: list[np.ndarray], config: dict[str, object]) -> tuple[list[np.ndarray], int, dict]:
        update = update_of(self._study, self._rows, parameters[0])
        return [update.values], update.weight, {"site": self._number}


class Losing:
    """A grid that does not deliver to some nodes."""

    def __init__(self, grid: Grid, lost: set[int]) -> None:
        self._grid, self._lost = grid, lost
        self.received = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        kept = [message for message in messages if message.metadata.dst_node_id not in self._lost]
        replies = list(self._grid.send_and_receive(kept, timeout=timeout))
        contents = [reply.content for reply in replies if reply.has_content()]
        self.received += sum(record.count_bytes() for content in contents for record in content.values())
        return replies

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)


class TheirStrategy(FedAvg):
    """Keeps the mean, and whose it is."""

    mean: np.ndarray | None = None
    sites: tuple[int, ...] = ()

    def aggregate_fit(self, server_round, results, failures):
        self.sites = tuple(result.metrics["site"] for _, result in results)
        self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return super().aggregate_fit(server_round, results, failures)


class TheirRound(SecAggPlusWorkflow):
    """One round of SecAgg+, watched, with a drop-out or none."""

    def __init__(self, study: Study, watch: Watch, kind: str) -> None:
        super().__init__(num_shares=1.0, reconstruction_threshold=study.threshold)
        self._n, self._watch, self._kind, self._lost = len(study.sites), watch, kind, set()

    def run(self, grid: Grid, context: Context, d: int) -> Round:
        start = ndarrays_to_parameters([np.zeros(d, np.float32)])
        n = self._n
        strategy = TheirStrategy(min_fit_clients=n, min_available_clients=n, initial_parameters=start)
        losing = Losing(grid, self._lost)
        legacy = LegacyContext(context, ServerConfig(num_rounds=1), strategy)
        DefaultWorkflow(fit_workflow=self, evaluate_workflow=lambda grid, context: None)(losing, legacy)
        done = self._watch.end("theirs", self._kind)
        done.upload = losing.received / n / d
        done.opened = strategy.mean is not None
        if done.opened:
            done.error = float(np.abs(strategy.mean - mean_of(strategy.sites, d)).max())
        return done

    def setup_stage(self, grid, context, state):
        if self._kind == "early drop-out":
            self._lost.add(random.choice(sorted(grid.get_node_ids())))
        self._watch.begin()
        return self._staged("setup", super().setup_stage(grid, context, state))

    def share_keys_stage(self, grid, context, state):
        return self._staged("share keys", super().share_keys_stage(grid, context, state))

    def collect_masked_vectors_stage(self, grid, context, state):
        if self._kind == "drop-out":
            self._lost.add(random.choice(sorted(grid.get_node_ids())))
        return self._staged("collect masked vectors", super().collect_masked_vectors_stage(grid, context, state))

    def unmask_stage(self, grid, context, state):
        return self._staged("unmask", super().unmask_stage(grid, context, state))

    def _staged(self, name: str, going_on: bool) -> bool:
        self._watch.stage(name)
        return going_on


def kind_of(number: int) -> str:
    """Of our round of that number: the site that drops out of one is away in the next, and back after that."""
    return "first" if number == 0 else ("early drop-out", "full", "drop-out")[number % 3]


def simulation(n: int, d: int, turns: int, protocol: str = "") -> list[Round]:
    """Rounds of both sides in turn: ours are full, with a drop-out, and with one away, `turns` times."""
    study = study_of(n, d, 1 + 3 * turns, protocol)
    faults = tuple(
        Fault(study.site_names[number % n], "MaskedInput", number)
        for number in range(study.rounds)
        if kind_of(number) == "drop-out"
    )
    rounds: list[Round] = []
    failed: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="secagg-") as name:
        folder = Path(name)
        files = made_files(study, folder)
        for u, site in enumerate(study.site_names):
            save_rows(folder / f"{site}.npz", rows_of(u))
        watch = Watch(folder / "cpu")
        server = ServerApp()

        def in_turn(grid: Grid, context: Context) -> None:
            TheirRound(study, watch, "first").run(grid, context, d)  # to warm the workers up

            def after_stage(coordinator: Coordinator) -> None:
                record = next(record for record in reversed(coordinator.rounds) if record.stages)
                watch.stage(record.stages[-1].stage)
                if record.outcome == "running" or record.purpose == "finish":
                    return
                ours = watch.end("ours", kind_of(record.number))
                ours.upload = sum(stage.bytes_up for stage in record.stages) / len(record.contributors) / d
                ours.opened = record.outcome == "opened"
                rounds.append(ours)
                check_ours(study, coordinator, ours, d)
                rounds.append(TheirRound(study, watch, ours.kind).run(grid, context, d))
                watch.begin()

            def wrap(engine: Engine) -> Faulty:
                watch.begin()
                return Faulty(engine, faults)

            conduct(
                grid,
                study,
                files[study.site_names[0]].roster,
                patience=PATIENCE,
                say=print,
                at_once=at_once(1.0),
                wrap=wrap,
                listener=after_stage,
            )

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                in_turn(grid, context)
            except BaseException as error:
                failed.append(error)
                raise

        theirs = ClientApp(
            lambda context: TheirClient(study, folder, int(context.node_config["partition-id"])).to_client(),
            mods=[secaggplus_mod],
        )
        app = Metered(client_app(study, files, folder, None), theirs, folder / "cpu")
        run_simulation(server, app, num_supernodes=n, backend_config=backend_config(1.0))
    if failed:
        raise failed[0]
    return rounds


def check_ours(study: Study, coordinator: Coordinator, done: Round, d: int) -> None:
    """Compare the model with the exact sums so far, to the last bit."""
    model = np.zeros(d, np.float32)
    for record in coordinator.rounds:
        if record.outcome == "opened":
            sites = [study.site_names.index(name) for name in record.contributors]
            model += mean_of(sites, d).astype(np.float32)
            if record.weight != weight_of(sites) or record.faults:
                raise SystemExit(f"round {record.number} went wrong: {record}")
    if not np.array_equal(flatten(coordinator.model), model):
        raise SystemExit("our model is not the sum of the survivors' vectors")


def summed_up(name: str, rounds: list[Round]) -> list[Figure]:
    """The figures of one number of participants."""
    figures: list[Figure] = []
    chosen = {(side, kind): _of(rounds, side, kind) for side in ("ours", "theirs") for kind in ("full", "drop-out")}
    chosen["ours", "first"] = _of(rounds, "ours", "first")
    for (side, kind), some in chosen.items():
        what = f"{name}, {side}, {kind}"
        figures.append(Figure.of(f"{what}: wall", [each.wall for each in some], "s"))
        figures += [
            Figure.of(f"{what}: wall, {stage}", [each.stages[stage] for each in some], "s") for stage in some[0].stages
        ]
        figures.append(Figure.of(f"{what}: clients", [each.clients for each in some], "CPU-s"))
        figures.append(Figure.of(f"{what}: all processes", [each.everything for each in some], "CPU-s"))
    for side in ("ours", "theirs"):
        full = chosen[side, "full"]
        figures.append(Figure.of(f"{name}, {side}: upload", [each.upload for each in full], "bytes/parameter"))
        figures.append(Figure.of(f"{name}, {side}: largest error of the mean", [each.error for each in full]))
        early = [float(each.opened) for each in _of(rounds, side, "early drop-out")]
        figures.append(Figure.of(f"{name}, {side}, early drop-out: share of rounds that gave a sum", [mean(early)]))
    for kind in ("full", "drop-out"):
        ours, theirs = chosen["ours", kind], chosen["theirs", kind]
        for what in ("clients", "everything", "wall"):
            title = "all processes" if what == "everything" else what
            ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(ours, theirs, strict=True)]
            figures.append(Figure.of(f"{name}, {kind}: {title}, ours / theirs", ratios))
    return figures


def _of(rounds: list[Round], side: str, kind: str) -> list[Round]:
    """The rounds of a kind; their first is to warm the workers up, and our first has two stages more."""
    found = [each for each in rounds if (each.side, each.kind) == (side, kind)]
    if kind != "early drop-out" and not all(each.opened for each in found):
        raise SystemExit(f"{side}: a round of kind {kind} gave no sum")
    return found


def summed_up_many(n: int, told: dict) -> list[Figure]:
    """The figures of a large study."""
    name = f"n={n}, a tenth drops out"
    last = len(told["survivors"]) - 1  # in which no keys are agreed ahead
    figures = [
        Figure.of(f"{name}: wall, whole study of {last + 1} rounds", [told["wall"]], "s"),
        Figure.of(f"{name}: wall, start of Ray and workers", [told["start"]], "s"),
        Figure.of(f"{name}: all processes, start included", [told["cpu"]], "CPU-s"),
        Figure.of(f"{name}: peak memory of the server", [told["server"] / 1e6], "MB"),
        Figure.of(f"{name}: of which before the study", [told["server, bare"] / 1e6], "MB"),
        Figure.of(f"{name}: peak memory of all processes together", [told["together"] / 1e6], "MB"),
        Figure.of(f"{name}: upload", told["upload"][1:last] or told["upload"], "bytes/parameter"),
        Figure.of(f"{name}: survivors in a steady round", told["survivors"][1:], "sites"),
        Figure.of(f"{name}: sums right to the last bit", [1.0]),  # or `many` would not have come back
    ]
    for kind, numbers in (("first", [0]), ("steady", range(1, last))):
        found: dict[str, list[float]] = {}
        for number, stage, seconds in told["stages"]:
            if number in numbers:
                found.setdefault(stage, []).append(seconds)
        figures += [Figure.of(f"{name}, {kind}: wall, {stage}", seconds, "s") for stage, seconds in found.items()]
    return figures


def main() -> None:
    options = arguments(__doc__.splitlines()[0], _further)
    # Ray's workers would make way for whatever else runs here, and the server would not.
    os.environ.update({**QUIET, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"})
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # a round that is lost is what is measured
    d, turns, repeats, large = (10_000, 1, 1, 20) if options.quick else (MILLION, 3, 2, 200)
    figures: list[Figure] = []
    for n in (4, 20):
        rounds = [each for _ in range(repeats) for each in simulation(n, d, turns)]
        figures += summed_up(f"n={n}", rounds)
    if not options.small:
        figures += summed_up_many(large, many(large, d // 10, 3 if options.quick else 5))
    report("flower", figures, options, ["flwr", "ray", "numpy", "torch", "cryptography"])


def _further(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", action="store_true", help="leave the study of 200 sites out")


if __name__ == "__main__":
    main()
