"""The commands `secagg site` and `secagg deploy`: a hospital's own process, and a folder to try a deployment with."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

site_app = typer.Typer(
    name="site", help="A hospital's own process in a study.", no_args_is_help=True, add_completion=False
)
deploy_app = typer.Typer(
    name="deploy", help="Try a study over several machines on one.", no_args_is_help=True, add_completion=False
)


@site_app.callback()
def _site() -> None:
    """A hospital's own process in a study."""


@deploy_app.callback()
def _deploy() -> None:
    """Try a study over several machines on one."""


@site_app.command("serve")
def serve(
    site: Annotated[Path, typer.Argument(metavar="SITE.TOML", help="The site's own file.", show_default=False)],
    study: Annotated[
        Path,
        typer.Option("--study", metavar="STUDY.TOML", help="The site's own copy of the study.", show_default=False),
    ],
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Where messages come in; site.sock beside SITE.TOML if not given.")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", metavar="FILE", help="The passphrase of the site's key.")
    ] = None,
) -> None:
    """Hold a site's key, rows and state, and answer what its SuperNode passes on, until it is ended."""
    from dp import DpError
    from protocols.cli import Exit, fail
    from protocols.rosters import read_passphrase
    from protocols.site_service import open_site
    from protocols.site_service import serve as answer_on
    from protocols.study import load_study
    from secagg.errors import SecAggError

    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        passphrase = read_passphrase(passphrase_file) if passphrase_file is not None else None
        with open_site(site, load_study(study), passphrase) as host:
            path = socket or site.absolute().with_name("site.sock")
            typer.echo(f"{host.site.name} answers on {path}")
            answer_on(host, path, lambda: bool(ended))
    except (SecAggError, DpError) as error:
        fail(error, Exit.BAD_INPUT)


@site_app.command("report")
def report(
    site: Annotated[Path, typer.Argument(metavar="SITE.TOML", help="The site's own file.", show_default=False)],
) -> None:
    """Show what a site has kept for itself: how each model did on its rows, what was spent, what it refused."""
    from rich.console import Console
    from rich.table import Table

    from protocols.cli import Exit, fail
    from protocols.site_file import load_site
    from protocols.site_service import journal_of, read_journal
    from secagg.errors import SecAggError

    try:
        file = load_site(site)
        entries = read_journal(journal_of(file))
    except SecAggError as error:
        fail(error, Exit.BAD_INPUT)
    screen = Console(highlight=False)
    if not entries:
        screen.print(f"{file.name} has answered nothing yet", markup=False)
        return
    rows = next((entry for entry in entries if entry.train_rows is not None), None)
    if rows is not None:
        screen.print(f"{file.name}: {rows.train_rows} training rows, {rows.test_rows} test rows", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("model of")
    for heading in ("accuracy", "AUC", "log loss"):
        table.add_column(heading, justify="right")
    for entry in entries:
        if (judged := entry.metrics) is not None:
            of = "the end" if entry.round is None else f"round {entry.round}"
            values = (judged.accuracy, judged.auc, judged.log_loss)
            table.add_row(of, *("-" if value is None else f"{value:.3f}" for value in values))
    screen.print(table)
    spent = [entry.spent for entry in entries if entry.spent is not None]
    if spent:
        last = spent[-1]
        screen.print(f"Spent on a {last.unit}: epsilon {last.epsilon:.3f} at delta {last.delta:g} ({last.relation})")
    for entry in entries:
        if entry.log is not None:
            screen.print(entry.log, markup=False)


@deploy_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made by this command.", show_default=False)],
    study: Annotated[
        Path, typer.Option("--study", metavar="STUDY.TOML", help="The study to be run.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address of the link.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the link.")] = 8000,
    node_port: Annotated[int, typer.Option(help="Port of the first site's SuperNode on its own machine.")] = 9094,
) -> None:
    """Make certificates, keys and every site's files for a trial on this machine, and a README of the commands."""
    from protocols.cli import Exit, fail
    from protocols.deploy import deploy
    from secagg.errors import SecAggError
    from secagg.keys import fingerprint

    try:
        roster = deploy(folder, study, host=host, port=port, node_port=node_port)
    except SecAggError as error:
        fail(error, Exit.BAD_INPUT)
    typer.echo(f"{folder}/README.md  the commands, in the order to start them in")
    width = max(len(member.name) for member in roster.members)
    for member in roster.members:
        typer.echo(f"{member.name:{width}}  {fingerprint(member.identity)}")
