"""A study of many sites over Flower's simulation, in a process of its own: is it right, and what does it take?

In every round a tenth of the sites drops out after it has shared its keys, another tenth each time. They are away in
the round after that, as they have missed the agreement on its keys. What comes out is compared with the exact sum of
the survivors, to the last bit of the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
from _flower_given import mean_of, rows_of, study_of, weight_of
from _processes import PeakMemory, cpu_seconds, peak_of_self

from protocols.coordinator import Coordinator
from protocols.engines.faulty import Fault
from protocols.engines.flower.simulation import simulate
from protocols.fedavg import flatten


def many(n: int, d: int, rounds: int) -> dict:
    """Run `play` in a process of its own."""
    command = [sys.executable, __file__, str(n), str(d), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def play(n: int, d: int, rounds: int) -> dict:
    """The study; gives seconds, bytes of memory, and what was counted.

    Raises:
        SystemExit: Any of it is wrong.
    """
    study = study_of(n, d, rounds)
    lost = [set(range(number % 10, n, 10)) for number in range(rounds)]
    faults = tuple(
        Fault(study.site_names[u], "MaskedInput", number) for number, sites in enumerate(lost) for u in sorted(sites)
    )
    bare = peak_of_self()
    began, cpu = time.perf_counter(), cpu_seconds()
    at: list[float] = []
    spent: list[float] = []
    stages: list[tuple[int, str, float]] = []

    def after_stage(coordinator: Coordinator) -> None:
        record = next(record for record in reversed(coordinator.rounds) if record.stages)
        # The first stage's time is without its end, as nothing tells when it began.
        seconds = time.perf_counter() - at[0] if at else record.stages[-1].seconds
        stages.append((record.number, record.stages[-1].stage, seconds))
        spent[:] = [cpu_seconds()]  # while the workers are there still
        at[:] = [time.perf_counter()]

    with PeakMemory() as memory:
        run = simulate(
            study, {name: rows_of(u) for u, name in enumerate(study.site_names)}, faults=faults, listener=after_stage
        )
    wall = time.perf_counter() - began
    away: set[int] = set()
    model = np.zeros(d, np.float32)
    for number, record in enumerate(run.rounds[:rounds]):
        left = sorted(set(range(n)) - away - lost[number])
        contributors = tuple(study.site_names[u] for u in left)
        came = record.number, record.outcome, record.contributors, record.weight
        if came != (number, "opened", contributors, weight_of(left)) or record.faults:
            raise SystemExit(f"round {number} went wrong: {record}")
        model += mean_of(left, d).astype(np.float32)
        away = lost[number]
    if not np.array_equal(flatten(run.model), model) or run.stopped:
        raise SystemExit("the model is not the sum of the survivors' vectors")
    sums = [record for record in run.rounds if record.purpose == "train"]
    return {
        "stages": stages,
        "start": wall - run.seconds,
        "wall": run.seconds,
        "cpu": spent[0] - cpu,
        "server": peak_of_self(),
        "server, bare": bare,
        "together": memory.together,
        "survivors": [len(record.contributors) for record in sums],
        "upload": [sum(s.bytes_up for s in r.stages) / len(r.contributors) / d for r in sums],
    }


if __name__ == "__main__":
    print(json.dumps(play(*map(int, sys.argv[1:]))))
