"""What every benchmark shares: fair timing, the machine, a table, JSON, and targets that can fail.

A script measures, makes `Figure`s of what it measured, and hands them to `report`. Everything that is compared is run
in turns in the same process, so that a busy machine slows both sides; a ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

TARGETS = Path(__file__).with_name("targets.toml")


@dataclass(frozen=True)
class Samples:
    """CPU and wall seconds of one call, once for each turn."""

    cpu: list[float]
    wall: list[float]

    def each_of(self, count: int) -> Samples:
        """Of one, where a call did `count` of them."""
        return Samples([value / count for value in self.cpu], [value / count for value in self.wall])


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: Unique in the script; targets refer to it.
        value: The median.
        low: Lower quartile.
        high: Upper quartile.
        unit: Of the three; a ratio has none.
        turns: How many measurements.
        wall: Median wall seconds of one call, where the figure is a time.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    turns: int
    wall: float | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str = "", wall: float | None = None) -> Figure:
        low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return cls(name, median(values), low, high, unit, len(values), wall)

    @classmethod
    def cpu_seconds(cls, name: str, samples: Samples) -> Figure:
        return cls.of(name, samples.cpu, "CPU-s", median(samples.wall))

    @classmethod
    def ratio(cls, name: str, over: Samples, under: Samples) -> Figure:
        return cls.of(name, [a / b for a, b in zip(over.cpu, under.cpu, strict=True)])


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int, least_seconds: float = 0.02) -> dict[str, Samples]:
    """Time each call `turns` times, one after another in turn, after one warm-up.

    A call shorter than `least_seconds` is repeated until it takes that long; the samples are of a single call.
    """
    repeats, samples = {}, {name: Samples([], []) for name in calls}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, round(least_seconds / max(time.perf_counter() - began, 1e-9)))
    for turn in range(turns):
        order = list(calls)
        for name in order if turn % 2 == 0 else reversed(order):
            call = calls[name]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            samples[name].cpu.append((time.process_time() - cpu) / repeats[name])
            samples[name].wall.append((time.perf_counter() - wall) / repeats[name])
    return samples


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Processor, cores, load, and the versions that matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, f":{model}").split(":", 1)[1].strip()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": f"{model}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def arguments(
    description: str, further: Callable[[argparse.ArgumentParser], object] | None = None
) -> argparse.Namespace:
    """The options of every benchmark; `further` adds those of one of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer turns and smaller rounds: does it still run?")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    if further is not None:
        further(parser)
    return parser.parse_args()


def report(
    benchmark: str,
    figures: Sequence[Figure],
    options: argparse.Namespace,
    packages: Sequence[str],
    columns: tuple[str, str] = ("median", "quartiles"),
) -> None:
    """Print the table, write the JSON, and leave with status 1 where `--check` finds a missed target.

    A target is `figure = {at_most = x}` or `{at_least = x}` in the table `[benchmark]` of targets.toml. A target
    whose figure was not measured counts as missed.
    """
    targets = tomllib.loads(TARGETS.read_text()).get(benchmark, {})
    about, values = machine(packages), {figure.name: figure.value for figure in figures}
    missed = [name for name, target in targets.items() if name not in values or not _meets(values[name], target)]
    table = Table("figure", title=benchmark, title_justify="left")
    for column in (*columns, "unit", "wall s", "turns", "target"):
        table.add_column(column, justify="left" if column == "unit" else "right")
    for f in figures:
        target = ", ".join(f"{word.replace('_', ' ')} {bound}" for word, bound in targets.get(f.name, {}).items())
        wall = "" if f.wall is None else f"{f.wall:.4g}"
        style = "red" if f.name in missed else None
        spread = f"{f.low:.4g} - {f.high:.4g}"
        table.add_row(f.name, f"{f.value:.4g}", spread, f.unit, wall, str(f.turns), target, style=style)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    if options.json:
        content = {
            "benchmark": benchmark,
            "quick": options.quick,
            "machine": about,
            "figures": [asdict(figure) for figure in figures],
            "targets": targets,
            "missed": missed,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if missed:
        console.print(f"targets missed: {', '.join(missed)}")
    if missed and options.check:
        sys.exit(1)


def _meets(value: float, target: Mapping[str, float]) -> bool:
    return value <= target.get("at_most", float("inf")) and value >= target.get("at_least", float("-inf"))
