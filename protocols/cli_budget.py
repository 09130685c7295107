"""The commands `secagg budget`: what a site has spent, whether its ledger holds, and what a plan would cost."""

from __future__ import annotations

import enum
import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from dp.ledger_rows import Partition
    from dp.ledger_store import Stored
    from protocols.site_file import SiteFile
    from secagg.keys import Identity

budget_app = typer.Typer(
    name="budget",
    help="Look after a site's privacy budget: make its ledger, show, verify and export it, and plan.",
    no_args_is_help=True,
    add_completion=False,
)
_MOST_PLANS = 100
_MOST_TOLD = 20
_SHOWS = """\
What this shows, to whoever trusts that the roster has the right keys:
- every row is as the site signed it, in its place, and none in between is gone;
- the account, made anew from the mechanisms by two methods, keeps to the caps and to what the studies promised."""
_SHOWS_NOT = """\
What this does not show:
- that the site released nothing without its ledger, or that a mechanism was carried out as it is described;
- that no rows are gone after the last one that another site holds a receipt for (above)."""


# The names of dp.Relation and dp.mechanisms.Unit, without what they bring along: the command should start at once.
class RelationName(enum.StrEnum):
    """Which data sets are neighbours."""

    add_or_remove_one = "add-or-remove-one"
    replace_one = "replace-one"


class UnitName(enum.StrEnum):
    """Whose privacy is accounted."""

    record = "record"
    participant = "participant"


class ReleaseName(enum.StrEnum):
    """What a release is for."""

    training = "training"
    statistic = "statistic"
    tuning = "tuning"


class Format(enum.StrEnum):
    """How a statement is written."""

    json = "json"
    csv = "csv"
    md = "md"


LedgerArgument = Annotated[Path, typer.Argument(metavar="LEDGER", help="A site's budget ledger.", show_default=False)]
DeltaOption = Annotated[float, typer.Option("--delta", help="At which epsilon is meant.", show_default=False)]
RelationOption = Annotated[RelationName, typer.Option("--relation", help="Which data sets are neighbours.")]
SiteFileOption = Annotated[
    Path, typer.Option("--site-file", metavar="SITE.TOML", help="Whose ledger, and its key.", show_default=False)
]
PassphraseOption = Annotated[
    Path | None, typer.Option("--passphrase-file", metavar="FILE", help="The passphrase of the site's key.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@budget_app.command("new")
def new(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="The file to make.", show_default=False)],
    site_file: SiteFileOption,
    epsilon: Annotated[float, typer.Option("--epsilon", help="The most that may be spent.", show_default=False)],
    delta: DeltaOption,
    records: Annotated[
        int, typer.Option("--records", help="How many units the site has; delta is at most 1/this.", show_default=False)
    ],
    relation: RelationOption = RelationName.add_or_remove_one,
    unit: Annotated[UnitName, typer.Option("--unit", help="Whose privacy.")] = UnitName.record,
    column: Annotated[
        str | None, typer.Option("--column", help="The column that the parts take values of; it must never change.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", metavar="COHORT=VALUE,...", help="A cohort, disjoint from all other parts."),
    ] = None,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a site's ledger, once. Disjoint cohorts can be declared now and never again."""
    import time

    from dp import DpError
    from dp.ledger_rows import Cap
    from dp.mechanisms import Relation, Unit
    from protocols.ledger_file import create_ledger
    from protocols.site_file import load_site
    from secagg.errors import SecAggError

    try:
        cap = Cap(epsilon=epsilon, delta=delta, relation=Relation(relation), unit=Unit(unit), records=records)
        partition = _partition(column, part or [])
        site = load_site(site_file)
        identity = _identity(site, passphrase_file)
        create_ledger(ledger, site=site.name, identity=identity, cap=cap, time=time.time(), partition=partition)
    except (SecAggError, DpError) as error:
        _refuse(error)
    typer.echo(
        f"{ledger}  the budget of {site.name}: epsilon {epsilon:g} at delta {delta:g} ({relation}, unit {unit}).\n"
        "Keep it like a bank account: back it up, and never put an older copy back."
    )


@budget_app.command("charge")
def charge(
    ledger: LedgerArgument,
    site_file: SiteFileOption,
    study: Annotated[str, typer.Option("--study", help="What it belongs to, by a name.", show_default=False)],
    noise: Annotated[
        float,
        typer.Option("--noise", help="Deviation of the Gaussian noise over the sensitivity.", show_default=False),
    ],
    sensitivity: Annotated[
        float, typer.Option("--sensitivity", help="How far one record moves the result, in l2 norm, at most.")
    ] = 1.0,
    rate: Annotated[
        float, typer.Option("--rate", help="Chance of a record to be in it, by a coin of its own that stays secret.")
    ] = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="How many such results.")] = 1,
    release: Annotated[ReleaseName, typer.Option("--release", help="What for.")] = ReleaseName.statistic,
    cohort: Annotated[str, typer.Option("--cohort", help="Which records, by a name.")] = "all",
    passphrase_file: PassphraseOption = None,
) -> None:
    """Charge a release that is made outside of a study, before it is made; refused above a cap (exit 4).

    For results with Gaussian noise, such as a published count or mean, or the runs of a search for good settings. What
    is charged is what these options say. The noise is up to you.
    """
    import hashlib
    import time

    from dp import BudgetExceeded, DpError, ParameterError, PoissonSampledGaussian
    from protocols.cli import Exit, fail
    from protocols.ledger_file import open_ledger
    from protocols.site_file import load_site
    from secagg.errors import SecAggError

    digest = hashlib.sha256(b"secagg charge\0" + study.encode()).digest()  # there is no study file to take it of
    try:
        if steps < 1:
            raise ParameterError(f"--steps should be at least 1, is {steps}")
        mechanism = PoissonSampledGaussian(
            sampling_rate=rate, noise_multiplier=noise, steps=steps, l2_clip_norm=sensitivity
        )
        site = load_site(site_file)
        identity = _identity(site, passphrase_file)
        with open_ledger(ledger, site=site.name, identity=identity, roster=site.roster) as opened:
            cap = opened.cap
            reserved = opened.reserve(
                mechanism,
                study=study,
                study_digest=digest,
                cohort=cohort,
                release=release.value,
                relation=cap.relation,
                delta=cap.delta,
                budget=site.policy.budget,
                time=time.time(),
            )
            opened.commit(reserved, mechanism, time=time.time())
            spent = opened.spent(cohort)
    except BudgetExceeded as error:
        fail(f"{ledger}: not charged, and not to be released: {error}", Exit.BUDGET)
    except (SecAggError, DpError) as error:
        _refuse(error)
    typer.echo(
        f"{ledger}  row {reserved.sequence}: charged, and may be released now. Epsilon {spent.epsilon:.4f} of "
        f"{cap.epsilon:g} is spent on the cohort {cohort}, at delta {cap.delta:g} ({cap.relation})."
    )


@budget_app.command("show")
def show(
    ledger: LedgerArgument,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.SVG", help="Also draw it, as SVG, PDF or PNG.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what each study has cost each cohort, and what is left."""
    import msgspec
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dp import DpError
    from protocols import ledger_report as report
    from protocols.cli import Exit, fail
    from protocols.errors import OutputError

    stored = _read(ledger)
    try:
        told = report.statement(stored.rows)
        lines = report.lines_over_time(stored.rows, told.costs)
    except DpError as error:
        fail(f"{ledger}: {error}", Exit.UNPROVEN)
    if plot is not None:
        try:
            report.plot(plot, told.site, told.costs, lines, told.cap)
        except OutputError as error:
            fail(error, Exit.NOT_WRITTEN)
    if json:
        over_time = [[{"time": time, "epsilon": epsilon} for time, epsilon in line] for line in lines]
        costs = [{**msgspec.to_builtins(c), "over_time": line} for c, line in zip(told.costs, over_time, strict=True)]
        content = {"site": told.site, "cap": told.cap, "unit": told.unit, "spent": told.spent, "costs": costs}
        _print_json(content)
        return
    screen = Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("study", "cohort", "releases", "open", "epsilon", "cohort in all", "left", "over time"):
        table.add_column(heading, justify="left" if heading in ("study", "cohort", "over time") else "right")
    for cost, line in zip(told.costs, lines, strict=True):
        numbers = f"{cost.alone.epsilon:.3f}", f"{cost.together.epsilon:.3f}", f"{cost.left:.3f}"
        cells = cost.study, cost.cohort, str(sum(cost.releases)), str(cost.open), *numbers
        table.add_row(*map(Text, cells), report.sparkline(line, told.cap))
    screen.print(table)
    spent = told.spent
    summary = (
        f"\n{told.site}: epsilon {spent.epsilon:.3f} of {told.cap:g} is spent by the worst-hit {told.unit}, at "
        f"delta {spent.delta:g} ({spent.relation}). Epsilons of studies do not add up; `left` is the cap less what the "
        "cohort has spent in all."
    )
    screen.print(summary, highlight=False, markup=False, soft_wrap=True)
    screen.print("Nothing was checked: see secagg budget verify.", highlight=False)


@budget_app.command("verify")
def verify(
    ledger: LedgerArgument,
    roster: Annotated[
        Path, typer.Option("--roster", help="The sites' keys, from where you trust them.", show_default=False)
    ],
    receipts: Annotated[
        list[Path] | None,
        typer.Option("--receipts", metavar="OTHER_LEDGER", help="Another site's ledger; once for each."),
    ] = None,
    site: Annotated[str | None, typer.Option("--site", help="Whose ledger it should be.")] = None,
    json: JsonOption = False,
) -> None:
    """Check a ledger: chain, signatures, clock, other sites' receipts, and the account by two methods.

    Exits with 5 where anything does not hold, and names it.
    """
    from dp.ledger_check import examine
    from protocols.cli import Exit, fail
    from protocols.ledger_file import verifier
    from protocols.rosters import load_roster
    from secagg.errors import SecAggError

    try:
        keys = load_roster(roster)
    except SecAggError as error:
        _refuse(error)
    stored = _read(ledger)
    others = {str(path): _read(path) for path in receipts or []}
    verdict = examine(stored, verifier(keys), site=site, others=others)
    if json:
        _print_json({"holds": not verdict.findings, **_plain(verdict)})
    elif not verdict.findings and verdict.total is not None:
        total = verdict.total
        rows = "1 row" if verdict.rows == 1 else f"{verdict.rows} rows"
        witness = (
            f"other sites hold receipts up to row {verdict.witnessed}"
            if verdict.witnessed
            else "no receipt of another site was given, so that an older copy would not show"
        )
        typer.echo(
            f"{ledger}: the ledger of {verdict.site}, {rows}; {witness}.\n"
            f"Epsilon {total.epsilon:.4f} by {total.accountant.upper()}, {total.epsilon_rdp:.4f} by RDP, at delta "
            f"{total.delta:g} ({total.relation}). Everything holds.\n\n{_SHOWS}\n{_SHOWS_NOT}"
        )
    if verdict.findings:
        for finding in verdict.findings[:_MOST_TOLD]:
            typer.echo(f"  {finding}", err=True)
        if (more := len(verdict.findings) - _MOST_TOLD) > 0:
            typer.echo(f"  and {more} more; --json has all", err=True)
        fail(f"{ledger} does not hold: {len(verdict.findings)} findings, listed above", Exit.UNPROVEN)


@budget_app.command("plan")
def plan(
    rounds: Annotated[list[int], typer.Option("--rounds", help="How many; may be given several times.")],
    rate: Annotated[list[float], typer.Option("--rate", help="Share of records drawn; may be given several times.")],
    delta: DeltaOption,
    noise: Annotated[
        list[float] | None, typer.Option("--noise", help="Noise multiplier; may be given several times.")
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Instead of --noise: the noise for this epsilon.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps in a round.")] = 1,
    relation: RelationOption = RelationName.add_or_remove_one,
    json: JsonOption = False,
) -> None:
    """Tell what a plan would cost: epsilon for rounds, rate and noise; or the noise for an epsilon."""
    from rich.console import Console
    from rich.table import Table

    from dp import DpError, ParameterError, PoissonSampledGaussian, Relation, calibrate_noise_multiplier, spent

    told = []
    try:
        if bool(noise) == bool(epsilon):
            raise ParameterError("expected --noise or --epsilon, and not both")
        if not rounds or not rate or steps < 1 or min(rounds) < 1:
            raise ParameterError("expected at least one round, one step in it, and a rate")
        plans = list(itertools.product(rounds, rate, noise or epsilon or []))
        if len(plans) > _MOST_PLANS:
            raise ParameterError(f"expected at most {_MOST_PLANS} plans at a time, got {len(plans)}")
        for count, q, given in plans:
            sigma = given
            if epsilon:
                sigma = calibrate_noise_multiplier(given, delta, q, count * steps, Relation(relation))
                sigma = math.ceil(sigma * 10_000) / 10_000  # as it is printed
            mechanism = PoissonSampledGaussian(
                sampling_rate=q, noise_multiplier=sigma, steps=count * steps, l2_clip_norm=1.0
            )
            cost = spent([mechanism], delta, Relation(relation))
            told.append((count, steps, q, sigma, cost.epsilon, cost.epsilon_rdp))
    except DpError as error:
        _refuse(error)
    names = "rounds", "steps", "rate", "noise", "epsilon", "epsilon_rdp"
    if json:
        plans_told = [dict(zip(names, line, strict=True)) for line in told]
        _print_json({"delta": delta, "relation": relation, "plans": plans_told})
        return
    table = Table(box=None, pad_edge=False)
    for name in ("rounds", "steps in each", "rate", "noise", "epsilon", "by RDP"):
        table.add_column(name, justify="right")
    for count, each, q, sigma, by_pld, by_rdp in told:
        table.add_row(str(count), str(each), f"{q:g}", f"{sigma:.4f}", f"{by_pld:.4f}", f"{by_rdp:.4f}")
    Console().print(table)
    typer.echo(f"Per record, at delta {delta:g}, {relation}, with Poisson sampling; noise added by each site itself.")


@budget_app.command("export")
def export(
    ledger: LedgerArgument,
    format: Annotated[Format, typer.Option("--format", help="The statement, or with csv the releases.")] = Format.md,
    roster: Annotated[
        Path | None, typer.Option("--roster", help="Check the rows against it first, and say so.")
    ] = None,
) -> None:
    """Print the statement for a data-protection officer, or every release as a table."""
    from dp import DpError
    from dp.ledger_check import examine
    from protocols import ledger_report as report
    from protocols.cli import Exit, fail
    from protocols.ledger_file import verifier
    from protocols.rosters import load_roster
    from secagg.errors import SecAggError

    stored = _read(ledger)
    checked = None
    try:
        if roster is not None:
            keys = load_roster(roster)
            if findings := examine(stored, verifier(keys)).findings:
                fail(f"{ledger} does not hold: {findings[0]}; see secagg budget verify", Exit.UNPROVEN)
            checked = f"the roster {roster}"
        told = report.statement(stored.rows, checked)
    except SecAggError as error:
        _refuse(error)
    except DpError as error:
        fail(f"{ledger}: {error}", Exit.UNPROVEN)
    if format is Format.json:
        sys.stdout.buffer.write(report.as_json(told))
    else:
        typer.echo(report.as_csv(told) if format is Format.csv else report.as_markdown(told), nl=False)


def _read(ledger: Path) -> Stored:
    """A ledger's rows, or the end of the command: a missing file is bad input, a damaged one does not hold."""
    from dp.errors import LedgerError, LedgerLocked
    from dp.ledger_store import read_rows
    from protocols.cli import Exit, fail

    try:
        stored = read_rows(ledger)
    except LedgerLocked as error:
        _refuse(error)
    except LedgerError as error:
        fail(error, Exit.UNPROVEN if ledger.is_file() else Exit.BAD_INPUT)
    if not stored.rows:
        fail(f"{ledger}: holds no rows: they were deleted", Exit.UNPROVEN)
    return stored


def _identity(site: SiteFile, passphrase_file: Path | None) -> Identity:
    """The site's key, with its passphrase from a file or typed, where it has one.

    Raises:
        KeyFileError: It cannot be read, or nobody is there to type.
    """
    from protocols.errors import KeyFileError
    from protocols.rosters import needs_passphrase, read_passphrase

    passphrase = None
    if passphrase_file is not None:
        passphrase = read_passphrase(passphrase_file)
    elif needs_passphrase(site.identity):
        if not sys.stdin.isatty():
            raise KeyFileError("a passphrase is typed on a terminal, and this is none; give --passphrase-file")
        passphrase = str(typer.prompt("Passphrase", hide_input=True))
    return site.load_identity(passphrase)


def _partition(column: str | None, parts: list[str]) -> Partition | None:
    from dp import ParameterError
    from dp.ledger_rows import Partition

    if column is None and not parts:
        return None
    if column is None:
        raise ParameterError("--part says which values of a column a cohort takes; name the column with --column")
    split: dict[str, tuple[str, ...]] = {}
    for part in parts:
        cohort, found, values = part.partition("=")
        if not found or not all(values.split(",")) or cohort in split:
            raise ParameterError(f"--part: expected COHORT=VALUE,VALUE with each cohort once, got {part!r}")
        split[cohort] = tuple(values.split(","))
    return Partition(column=column, parts=split)


def _plain(verdict: object) -> dict[str, object]:
    import msgspec

    plain: dict[str, object] = msgspec.to_builtins(verdict)
    return plain


def _print_json(content: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _refuse(error: Exception) -> NoReturn:
    from protocols.cli import Exit, fail

    fail(error, Exit.BAD_INPUT)
