"""The command `secagg`."""

from __future__ import annotations

import datetime
import enum
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from protocols.cli_attack import attack
from protocols.cli_budget import budget_app
from protocols.cli_keys import keys_app
from protocols.cli_site import deploy_app, site_app
from protocols.cli_verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocols.coordinator import Coordinator
    from protocols.run import Run
    from protocols.study import Study

app = typer.Typer(
    name="secagg",
    help="Learn one model, or compute one statistic, from data that no hospital may show.",
    epilog="Exit codes: 0 done; 1 too many rounds were lost; 2 bad input; 3 the run could not be written; "
    "4 the privacy budget stopped the study early; 5 a transcript or a ledger does not hold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app)
budget_app.command()(attack)
app.add_typer(budget_app)
app.add_typer(site_app)
app.add_typer(deploy_app)
app.command()(verify)


class Exit(enum.IntEnum):
    """What the command tells the shell."""

    LOST = 1
    BAD_INPUT = 2
    NOT_WRITTEN = 3
    BUDGET = 4
    UNPROVEN = 5


class Aggregation(enum.StrEnum):
    """How updates are summed."""

    masked = "masked"
    ckks = "ckks"
    plain = "plain"


class EngineName(enum.StrEnum):
    """Who carries the messages."""

    in_process = "in-process"
    simulation = "simulation"
    flower = "flower"


Out = Annotated[Path | None, typer.Option("--out", help="Folder for the run; runs/NAME-DATE-TIME if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print the run as JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the run's folder.")]
Drop = Annotated[
    list[str] | None,
    typer.Option("--drop", metavar="SITE:STAGE[:ROUND]", help="Lose the site's connection there, to see what happens."),
]
AggregationOption = Annotated[Aggregation | None, typer.Option(help="Sum updates this way, whatever the study says.")]


@app.command()
def demo(
    out: Out = None,
    aggregation: AggregationOption = None,
    drop: Drop = None,
    show_study: Annotated[
        bool, typer.Option("--show-study", help="Print the demo's study.toml, to start your own from, and end.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Four hospitals learn one model of heart disease: masked sums, DP-SGD at each, a drop-out on the way.

    The data ship with the package (UCI Heart Disease). Without --drop, the va hospital drops out of round 7.
    """
    from protocols.study import DEMO_TEXT, demo_study

    if show_study:
        sys.stdout.write(DEMO_TEXT)
        return
    study = demo_study()
    stage = {Aggregation.ckks: "EncryptedInput", Aggregation.plain: "Submit"}.get(
        aggregation or Aggregation.masked, "MaskedInput"
    )
    _run(study, Path(), out, aggregation, drop or [f"va:{stage}:7"], baselines=True, json=json, quiet=quiet)


@app.command()
def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.TOML", help="The study file.", show_default=False)],
    out: Out = None,
    aggregation: AggregationOption = None,
    drop: Drop = None,
    sites: Annotated[
        Path | None,
        typer.Option(
            "--sites",
            metavar="FOLDER",
            help="Use the sites' own files, NAME.toml each: keys, roster, policy, data, state on disk.",
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", metavar="FILE", help="The passphrase of the sites' keys, with --sites."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also train the local, pooled and noiseless models, to compare with.")
    ] = True,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="Who carries the messages: one process after the other here, Flower's simulation over Ray here, or "
            "a running SuperLink to the sites' own machines."
        ),
    ] = EngineName.in_process,
    link: Annotated[
        Path | None, typer.Option("--link", metavar="LINK.TOML", help="Where the SuperLink is, with --engine flower.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run of the same --out whose server went down.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a study, with all its sites on this machine or over Flower with each on its own."""
    from protocols.study import load_study
    from secagg.errors import SecAggError

    if engine is EngineName.flower:
        given = {"--drop": drop, "--sites": sites, "--passphrase-file": passphrase_file, "--aggregation": aggregation}
        if refused := [name for name, value in given.items() if value]:
            fail(f"{', '.join(refused)}: has no meaning with --engine flower: that is up to each site", Exit.BAD_INPUT)
        _run_at_link(study, link, out, resume=resume, json=json, quiet=quiet)
        return
    if link is not None or resume:
        fail("--link and --resume go with --engine flower", Exit.BAD_INPUT)

    try:
        loaded = load_study(study)
    except SecAggError as error:
        fail(error, Exit.BAD_INPUT)
    _run(
        loaded,
        study.parent,
        out,
        aggregation,
        drop or [],
        baselines=baselines,
        json=json,
        quiet=quiet,
        sites=sites,
        passphrase_file=passphrase_file,
        engine=engine,
    )


@app.command()
def doctor(
    server_view: Annotated[
        bool, typer.Option("--server-view", help="Run a study, and look for traces of updates in what its server gets.")
    ] = False,
    json: Json = False,
) -> None:
    """Check this machine: versions, speed, and every primitive against known answers and a second library."""
    from protocols.doctor import run_checks

    checks = run_checks()
    if server_view:
        from protocols.server_view import examine, record, viewing_study

        checks += examine(record(viewing_study()))
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(checks)) + b"\n")
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in checks:
            table.add_row(
                Text("ok", "green") if check.ok else Text("FAILED", "red"), Text(check.name), Text(check.detail)
            )
        Console().print(table)
    failed = [check.name for check in checks if not check.ok]
    if failed:
        fail(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}", 1)


def main() -> None:
    """Entry point of the command."""
    app()


def _run(
    study: Study,
    directory: Path,
    out: Path | None,
    aggregation: Aggregation | None,
    drop: list[str],
    *,
    baselines: bool,
    json: bool,
    quiet: bool,
    sites: Path | None = None,
    passphrase_file: Path | None = None,
    engine: EngineName = EngineName.in_process,
) -> None:
    from dp import DpError
    from protocols.aggregation import Unprotected
    from protocols.engines.faulty import Fault
    from protocols.errors import OutputError
    from protocols.output import check_target
    from protocols.rosters import read_passphrase
    from protocols.run import load_data, load_sites, run_study
    from secagg.errors import SecAggError

    screen = Console(stderr=True, quiet=quiet or json)
    folder = out or _folder(study)
    try:
        if aggregation is not None:
            protocol = msgspec.structs.replace(study.protocol, aggregation=aggregation.value)
            study = msgspec.structs.replace(study, protocol=protocol)
        check_target(folder)
        site_files = load_sites(study, sites) if sites is not None else None
        passphrase = read_passphrase(passphrase_file) if passphrase_file is not None else None
        data = load_data(study, directory, site_files)
        faults = tuple(Fault.parse(text) for text in drop)
        _announce(screen, study)
        with _progress(screen) as progress, warnings.catch_warnings():
            warnings.simplefilter("always", Unprotected)
            # Also with --quiet: that a run protects nothing is never kept quiet.
            warnings.showwarning = lambda message, *_: _say("Warning", message)
            task = progress.add_task("", total=study.rounds, stage="")

            def listener(coordinator: Coordinator) -> None:
                done = sum(r.purpose == "train" and r.outcome != "running" for r in coordinator.rounds)
                progress.update(task, completed=done, stage=coordinator.stage)
                if coordinator.finished and baselines:
                    progress.update(task, stage="training the baselines")

            carried: Callable[..., Run] = run_study
            if engine is EngineName.simulation:
                from protocols.engines.flower.simulation import simulate as carried
            result = carried(
                study,
                data,
                faults=faults,
                baselines=baselines,
                site_files=site_files,
                passphrase=passphrase,
                listener=listener,
            )
    except OutputError as error:
        fail(error, Exit.NOT_WRITTEN)
    except (SecAggError, DpError) as error:
        fail(error, Exit.BAD_INPUT)
    _conclude(result, folder, json=json, quiet=quiet)


def _folder(study: Study) -> Path:
    stamp = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{study.name.replace(' ', '-')}-{stamp}"


def _run_at_link(study: Path, link: Path | None, out: Path | None, *, resume: bool, json: bool, quiet: bool) -> None:
    """Have a SuperLink run a study; its server writes the run's folder."""
    from protocols.errors import LinkError, OutputError
    from protocols.output import check_target, load_run
    from protocols.study import load_study
    from secagg.errors import SecAggError

    screen = Console(stderr=True, quiet=quiet or json)
    try:
        if link is None:
            raise LinkError("--engine flower: expected --link LINK.TOML, which says where the SuperLink is")
        try:
            from protocols.engines.flower.link import load_link, submit
        except ImportError as error:
            raise LinkError(f"--engine flower: {error}; pip install 'secagg[flower]'") from error
        loaded = load_study(study)
        folder = out or _folder(loaded)
        check_target(folder)
        _announce(screen, loaded)
        submit(study, load_link(link), folder, lambda line: screen.print(Text(line)), resume=resume)
    except OutputError as error:
        fail(error, Exit.NOT_WRITTEN)
    except SecAggError as error:
        fail(error, Exit.BAD_INPUT)
    try:
        result = load_run(folder, loaded)
    except OutputError as error:
        fail(f"{error}; the server wrote it on the SuperLink's machine", Exit.NOT_WRITTEN)
    _conclude(result, folder, json=json, quiet=quiet, written=True)


def _conclude(result: Run, folder: Path, *, json: bool, quiet: bool, written: bool = False) -> None:
    """Write the run's folder, unless that is done, report, and end with the run's exit code."""
    from protocols.errors import OutputError
    from protocols.output import as_json, write_run
    from secagg.errors import SecAggError

    failure: SecAggError | None = None
    files = sorted(path.name for path in folder.iterdir()) if written else []
    try:
        files = files or write_run(result, folder)  # before anything is printed, which may fail as well
    except OutputError as error:
        failure = error
    if json:
        sys.stdout.buffer.write(msgspec.json.encode(as_json(result)) + b"\n")
    else:
        _report(Console(quiet=quiet), result)
    if failure is not None:
        fail(failure, Exit.NOT_WRITTEN)
    if quiet:
        sys.stdout.write(f"{folder}\n")
    elif not json:
        Console().print(Text(f"Written to {folder}: {', '.join(files)}", style="dim"), soft_wrap=True)
    if result.stopped is not None:
        fail(f"the study ended early: {result.stopped}", Exit.BUDGET if "budget" in result.stopped else Exit.LOST)


def fail(error: object, code: int) -> NoReturn:
    """End the command with a line on standard error and an exit code."""
    _say("Error", error)
    raise typer.Exit(code)


def _say(kind: str, message: object) -> None:
    """One line on standard error; brackets in it are text and not markup."""
    Console(stderr=True).print(Text.assemble((f"{kind}:", "bold red"), f" {message}"), soft_wrap=True)


def _announce(screen: Console, study: Study) -> None:
    privacy = study.privacy
    promise = "without differential privacy"
    if study.private:
        target = (
            f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else f"noise {privacy.noise_multiplier:g}"
        )
        where = "over all sites, noise inside the sum," if study.distributed else "at each site"
        promise = f"DP-SGD {where} to {target}, delta {privacy.delta:g}"
    screen.print(
        f"{study.name}: {len(study.sites)} sites, {study.rounds} rounds, {study.protocol.aggregation} sums "
        f"(threshold {study.threshold}), {promise}",
        highlight=False,
        markup=False,
    )


def _progress(screen: Console) -> Progress:
    columns = TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[stage]}")
    return Progress(*columns, TimeElapsedColumn(), console=screen, transient=True)


def _report(screen: Console, result: Run) -> None:
    """What federation gained, what it cost, and what privacy was spent."""
    from protocols.output import stage_totals, statement, summary

    if any(site.federated for site in result.sites.values()):
        for measure, title in (("accuracy", "Accuracy"), ("auc", "AUC")):
            screen.print(_gains(result, measure, f"{title} on each site's own test rows"))
            screen.print()
    else:
        screen.print("How the model does on its own rows, each site has for itself: secagg site report SITE.TOML\n")
    if told := summary(result):
        screen.print(f"{told}\n", highlight=False)
    stages = Table(title="Cost", title_justify="left", box=None, pad_edge=False)
    for heading in ("stage", "seconds", "kB up", "kB down"):
        stages.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, total in stage_totals(result).items():
        stages.add_row(
            stage, f"{total['seconds']:.2f}", f"{total['bytes_up'] / 1000:.1f}", f"{total['bytes_down'] / 1000:.1f}"
        )
    screen.print(stages)
    check = ", the budget's checks included" if result.study.private else ""
    cost = f"{result.seconds:.1f} s in all, {result.cpu_seconds:.1f} CPU-s for all sites and the server{check}.\n"
    screen.print(cost, highlight=False)
    for record in result.rounds:
        for site, why in record.dropped.items():
            left = "the sum of the others was recovered" if record.outcome == "opened" else "the round was lost"
            screen.print(f"Round {record.number}: {site}: {why}; {left}.", highlight=False, markup=False)
    for entry in [line for site in result.sites.values() for line in site.log][:10]:
        screen.print(entry, style="yellow", highlight=False, markup=False)
    screen.print(statement(result), highlight=False)


def _gains(result: Run, measure: str, title: str) -> Table:
    columns = {"federated": "federated"}
    if any(site.local for site in result.sites.values()):
        columns = {"local": "own rows only", "federated": "federated", "pooled": "rows pooled"}
    if any(site.without_privacy for site in result.sites.values()):
        noisy = {"federated": "federated, private", "without_privacy": "federated, no noise"}
        columns = {"local": "own rows only", **noisy, "pooled": "rows pooled"}
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("site", no_wrap=True)
    private = result.study.private
    for heading in ("train rows", "test rows", *columns.values(), *(["epsilon spent"] if private else [])):
        table.add_column(heading, justify="right", width=max(5, *map(len, heading.split())))
    every: list[list[float | None]] = []
    for name, site in result.sites.items():
        every.append([getattr(getattr(site, column), measure, None) for column in columns])
        epsilon = [] if site.spent is None else [f"{site.spent.epsilon:.3f}"]
        rows = ("-" if rows is None else str(rows) for rows in (site.train_rows, site.test_rows))
        table.add_row(name, *rows, *map(_figure, every[-1]), *epsilon)
    table.add_row("mean", "", "", *(_figure(_mean(values)) for values in zip(*every, strict=True)), style="bold")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
