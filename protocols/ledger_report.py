"""What a budget ledger says, for people: lines over time, a picture, and the statement for a data-protection officer.

The statement keeps to the order of NIST SP 800-226 (2025) and of "How to DP-fy ML" (Ponomareva et al. 2023).
"""

from __future__ import annotations

import csv
import datetime
import io
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import Struct

from dp.accounting import Spent
from dp.ledger import spent_on
from dp.ledger_check import NO_COHORT, Cost, costs, replay, timeline
from dp.ledger_rows import Account, Charge, Row, encode_mechanism
from dp.mechanisms import PoissonSampledGaussian, Relation, Unit
from protocols.errors import OutputError

_BARS = "▁▂▃▄▅▆▇█"
_UNITS = {
    Unit.RECORD: "One record of this site. Someone with several records is protected as a group of that many, which "
    "costs more than what is stated here.",
    Unit.PARTICIPANT: "One participant of the secure sum, with everything that it holds.",
}
_RELATIONS = {
    Relation.ADD_OR_REMOVE_ONE: "add-or-remove-one: two data sets are neighbours if one has one unit more.",
    Relation.REPLACE_ONE: "replace-one: two data sets are neighbours if they are equal in size and differ in one unit.",
}
_COVERED = """\
Covered is every release that was reserved in this ledger: training, statistics and tuning runs, of all studies, also \
those that were reserved and never committed, at their worst. Not covered are: what this site releases without its \
ledger; records that the same person has at other sites; who among the site's own staff has seen what; later studies \
whose noise was chosen by looking at what earlier ones had released, for which plain composition proves nothing."""
_LOCAL = "This site adds all of the noise itself; the guarantee holds against everybody who sees its contribution."
_SHARED = """\
Every site adds a share of the noise and the secure sum opens the total; the guarantee holds against whoever sees the \
opened sums and at most as many colluding sites as the mechanism names, as long as the secure sum holds."""


class Statement(Struct, frozen=True, kw_only=True):
    """The statement about a ledger, in its order.

    Attributes:
        site: Whose ledger.
        sections: Heading and text.
        costs: By study and cohort.
        unit: Whose privacy.
        spent: By the worst-hit unit.
        cap: The largest epsilon allowed.
        releases: All charges.
    """

    site: str
    sections: tuple[tuple[str, str], ...]
    costs: tuple[Cost, ...]
    unit: Unit
    spent: Spent
    cap: float
    releases: tuple[Charge, ...]


def statement(rows: Sequence[Row], checked: str | None = None) -> Statement:
    """The statement about a ledger's rows.

    Args:
        rows: Of a ledger that has at least its first.
        checked: Against what the rows were checked, or None if they were not.

    Raises:
        LedgerError: A row cannot follow on those before it.
    """
    account = replay(rows)
    cap, by_study, total = account.cap, costs(account), spent_on(account, NO_COHORT)
    charges = tuple(account.charges.values())
    last = rows[-1]
    sections = {
        "Setting": _setting(last.site, charges),
        "Unit": _UNITS[cap.unit],
        "Relation": _RELATIONS[cap.relation],
        "Accesses covered": _COVERED,
        "Outputs": _outputs(by_study),
        "Accountant": f"{total.accountant.upper()}; RDP beside it as the cross-check. All releases that may have met "
        f"the same record are composed together. {_cohorts(account)}",
        "Sampling": _sampling(charges),
        "Epsilon": f"{total.epsilon:.4f} by {total.accountant.upper()} ({total.epsilon_rdp:.4f} by RDP), for the "
        f"worst-hit {cap.unit}; the site's cap is {cap.epsilon:g}.",
        "Delta": f"{cap.delta:g}, which is at most 1/{cap.records}; so many units the site has stated to have.",
        "Reproducibility": f"Recomputed from {len(rows)} rows, the last of {when(last.time)} with the digest "
        f"{last.digest} (ledger {last.ledger}), by secagg {version('secagg')}, dp-accounting "
        f"{version('dp-accounting')}, Python {platform.python_version()}. "
        + (f"Rows checked against {checked}." if checked is not None else "The rows' signatures were not checked."),
    }
    return Statement(
        site=last.site,
        sections=tuple(sections.items()),
        costs=by_study,
        unit=cap.unit,
        spent=total,
        cap=cap.epsilon,
        releases=charges,
    )


def as_json(told: Statement) -> bytes:
    """The statement as JSON, with every release."""
    content = {
        "site": told.site,
        "statement": {heading.lower().replace(" ", "_"): text for heading, text in told.sections},
        "spent": told.spent,
        "cap": told.cap,
        "unit": told.unit,
        "costs": told.costs,
        "releases": [_release(charge) for charge in told.releases],
    }
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def as_csv(told: Statement) -> str:
    """Every release as a line of a table."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    lines = [_release(charge) for charge in told.releases]
    writer.writerow(_RELEASE_COLUMNS)
    writer.writerows([_cell(line[column]) for column in _RELEASE_COLUMNS] for line in lines)
    return file.getvalue()


def as_markdown(told: Statement) -> str:
    """The statement as a document."""
    lines = [f"# Differential privacy spent at {_escaped(told.site)}", ""]
    for heading, text in told.sections:
        lines += [f"## {heading}", "", _escaped(text), ""]
    lines += [
        "## By study and cohort",
        "",
        "| study | cohort | training | statistics | tuning | not committed | its epsilon | the cohort's | left |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in told.costs:
        numbers = (
            *cost.releases,
            cost.open,
            *(f"{e:.4f}" for e in (cost.alone.epsilon, cost.together.epsilon, cost.left)),
        )
        lines.append(f"| {' | '.join(map(_escaped, (cost.study, cost.cohort, *map(str, numbers))))} |")
    return "\n".join(lines) + "\n"


def lines_over_time(rows: Sequence[Row], told: Sequence[Cost]) -> list[tuple[tuple[float, float], ...]]:
    """For each study and cohort how its epsilon grew."""
    return [
        timeline(
            rows,
            lambda c, cost=cost: (c.reserved.study_digest, c.reserved.cohort) == (cost.study_digest, cost.cohort),  # type: ignore[misc]
        )
        for cost in told
    ]


def sparkline(line: Sequence[tuple[float, float]], cap: float) -> str:
    """A line over time in one word; a full block is the cap."""
    return "".join(_BARS[min(len(_BARS) - 1, int(epsilon / cap * len(_BARS)))] for _, epsilon in line)


def plot(
    path: Path, site: str, told: Sequence[Cost], lines: Sequence[Sequence[tuple[float, float]]], cap: float
) -> None:
    """Draw how each study's epsilon grew, to an SVG, PDF or PNG by the name's ending.

    Raises:
        OutputError: It could not be written.
    """
    from matplotlib.figure import Figure  # slow to load: only those who want a picture pay

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for cost, line in zip(told, lines, strict=True):
        times = [datetime.datetime.fromtimestamp(time, datetime.UTC) for time, _ in line]
        # Names may hold a $, which would be read as mathematics.
        label = f"{cost.study}, {cost.cohort}".replace("$", r"\$")
        axes.step(times, [epsilon for _, epsilon in line], where="post", marker="o", markersize=3, label=label)  # type: ignore[arg-type]
    axes.axhline(cap, color="black", linestyle="--", linewidth=1, label=f"cap {cap:g}")
    axes.set(
        ylim=(0, None), xlabel="time (UTC)", ylabel="epsilon", title=f"Privacy spent at {site}".replace("$", r"\$")
    )
    axes.tick_params(axis="x", rotation=30)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: could not be written: {error}") from error


def when(time: float) -> str:
    """A time for people."""
    try:
        return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):  # a clock that was very wrong
        return f"second {time:.0f}"


def _setting(site: str, charges: Sequence[Charge]) -> str:
    kinds = {isinstance(charge.counted, PoissonSampledGaussian) for charge in charges}
    text = f"Releases from the records of {site}, which stay there."
    return " ".join([text, *([_LOCAL] if True in kinds else []), *([_SHARED] if False in kinds else [])])


def _outputs(by_study: Sequence[Cost]) -> str:
    training, statistics, tuning = (sum(cost.releases[kind] for cost in by_study) for kind in range(3))
    return (
        f"{training} releases of training, {statistics} of statistics, {tuning} of tuning runs, in {len(by_study)} "
        f"pairs of study and cohort; {sum(cost.open for cost in by_study)} of them were never committed, and count at "
        "their worst."
    )


def _cohorts(account: Account) -> str:
    if account.partition is None or account.cap.relation is Relation.REPLACE_ONE:
        return "All cohorts count as overlapping."
    parts = ", ".join(account.partition.parts)
    return (
        f"Cohorts count as overlapping, except for {parts}: each takes other values of the column "
        f"{account.partition.column!r}, which was signed before anything was spent."
    )


def _sampling(charges: Sequence[Charge]) -> str:
    rates = sorted({charge.counted.sampling_rate for charge in charges if charge.counted.steps})
    drawn = [f"{rate:g}" for rate in rates if rate < 1]
    if not drawn:
        return "None is assumed: every unit counts as being in every release."
    return (
        f"Poisson sampling is assumed, at rates {', '.join(drawn)}: every unit joins a step by its own coin, and who "
        "joined stays secret. It holds where this software drew: dp.sgd and dp.distributed toss these coins, with "
        "randomness of the operating system. The ledger records the assumption and cannot see the draw."
    )


_RELEASE_COLUMNS = (
    "study",
    "study_digest",
    "cohort",
    "release",
    "reference",
    "unit",
    "relation",
    "delta",
    "promised_epsilon",
    "reserved_at",
    "row",
    "status",
    "counted_mechanism",
    "reserved_mechanism",
)


def _release(charge: Charge) -> dict[str, object]:
    row = charge.reserved
    values = (
        row.study,
        row.study_digest,
        row.cohort,
        row.release,
        row.reference,
        row.unit,
        row.relation,
        row.delta,
        row.epsilon,
        when(row.time),
        row.sequence,
        "committed" if charge.actual is not None else "reserved, counts at its worst",
        encode_mechanism(charge.counted),
        encode_mechanism(charge.planned),
    )
    return dict(zip(_RELEASE_COLUMNS, values, strict=True))


def _cell(value: object) -> object:
    # A spreadsheet runs what begins like this.
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@") else "" if value is None else value


def _escaped(text: str) -> str:
    for sign in "\\|<>`*[]":
        text = text.replace(sign, f"\\{sign}")
    return text
