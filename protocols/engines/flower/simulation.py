"""A study over Flower's simulation: every site in a worker process of Ray, all on this machine.

Every site has its own files in a folder, as it would have on its own machine, and its state is on disk between two
messages; so what is tried here is what runs between machines, less the network.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from flwr.app import Context, Message
from flwr.app.typing import ConfigRecordValues
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from dp import DpError
from protocols.coordinator import Coordinator
from protocols.datasets import SiteData
from protocols.engines import Engine
from protocols.engines.faulty import Fault, Faulty
from protocols.engines.flower.bodies import packed, unpacked
from protocols.engines.flower.conduct import conduct
from protocols.engines.flower.engine import Patience
from protocols.engines.flower.link import QUIET
from protocols.errors import DataError, LinkError
from protocols.metrics import Metrics
from protocols.policy import PERMISSIVE
from protocols.rosters import PublicKey, new_identity, roster_of
from protocols.run import Listener, Run, SiteResult, check_faults, with_baselines
from protocols.site import own_standard
from protocols.site_file import SiteFile
from protocols.site_service import Entry, journal_of, open_host, read_journal
from protocols.study import Study
from secagg.errors import SecAggError

PATIENCE = Patience(gather=300.0, stage=3600.0, resend=3600.0, absent=300.0, poll=0.05)
"""How long the server of a simulation waits: all sites are there, and the machine may be busy."""


def simulate(
    study: Study,
    data: Mapping[str, SiteData],
    *,
    faults: tuple[Fault, ...] = (),
    baselines: bool = False,
    site_files: Mapping[str, SiteFile] | None = None,
    passphrase: str | None = None,
    listener: Listener | None = None,
    cpus: float = 1.0,
) -> Run:
    """Run a study with every site in a worker process.

    Args:
        study: What is to be done.
        data: Each site's raw rows, as from `protocols.run.load_data`.
        faults: Messages to lose on purpose.
        baselines: Whether to train the local, the pooled and the noiseless federated model as well.
        site_files: The sites' own files; where there are none, they are made for the run.
        passphrase: Of the sites' keys, where they are encrypted.
        listener: Called after every stage, for progress.
        cpus: Cores for each worker, which is also what says how many there are.

    Raises:
        StudyError, DataError: Before anything is trained.
        LinkError: Flower's simulation did not come to its end.
    """
    if missing := [name for name in study.site_names if name not in data]:
        raise DataError(f"no rows were given for {', '.join(missing)}")
    os.environ.update({**QUIET, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    with tempfile.TemporaryDirectory(prefix="secagg-") as name:
        folder = Path(name)
        files = dict(site_files) if site_files is not None else made_files(study, folder)
        for site in study.site_names:
            save_rows(folder / f"{site}.npz", data[site])
        roster = files[study.site_names[0]].roster
        ended: list[tuple[Run, Coordinator] | SecAggError | DpError] = []
        server = ServerApp()

        def wrap(engine: Engine) -> Engine:
            return Faulty(engine, faults) if faults else engine

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            # What is raised here ends in Flower's log; it is handed over to whoever called.
            try:
                ended.append(
                    conduct(
                        grid,
                        study,
                        roster,
                        patience=PATIENCE,
                        say=logging.getLogger("secagg").warning,
                        at_once=at_once(cpus),
                        wrap=wrap,
                        listener=listener,
                        checked=lambda coordinator: check_faults(study, coordinator.stages, faults),
                    )
                )
            except (SecAggError, DpError) as error:
                ended.append(error)

        with _quiet_flower():
            try:
                run_simulation(
                    server,
                    client_app(study, files, folder, passphrase),
                    num_supernodes=len(study.sites),
                    backend_config=backend_config(cpus),
                )
            except RuntimeError as error:
                raise LinkError(f"Flower's simulation could not run: {error}") from error
        if not ended:
            raise LinkError("Flower's simulation ended before the study did; its log above says why")
        if not isinstance(outcome := ended[0], tuple):
            raise outcome
        run, coordinator = outcome
        journals = {site: read_journal(journal_of(file)) for site, file in files.items()}
    run = _with_journals(run, journals)
    if baselines and run.stopped is None:
        mean, std = (np.array(values) for values in coordinator.standard)
        standardized = {
            site: rows.standardized(*((mean, std) if study.task.standardize == "global" else own_standard(study, rows)))
            for site, rows in data.items()
        }
        results = with_baselines(study, data, standardized, dict(run.sites), os.urandom)
        run = msgspec.structs.replace(run, sites=results)
    return run


def client_app(study: Study, files: Mapping[str, SiteFile], folder: Path, passphrase: str | None) -> ClientApp:
    """The app of all sites: a virtual node is the site of its number."""
    app = ClientApp()
    names = study.site_names

    def passed_on(message: Message, context: Context, *, hello: bool) -> Message:
        name = names[int(context.node_config["partition-id"])]
        with open_host(files[name], study, load_rows(folder / f"{name}.npz"), passphrase) as host:
            reply = host.hello() if hello else host.answer(unpacked(message) or b"")
        return Message(packed(reply), reply_to=message)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return passed_on(message, context, hello=True)

    @app.query("secagg")
    def answer(message: Message, context: Context) -> Message:
        return passed_on(message, context, hello=False)

    return app


def at_once(cpus: float) -> int:
    """How many requests to have on their way to workers of so many cores: enough that none waits for work.

    Flower looks at every message that is not answered yet for every site, ten times a second: with 200 of each, that
    takes a whole core. And the server holds as many requests, each with the model in it.
    """
    return max(16, int(4 * (os.cpu_count() or 1) / cpus))


def backend_config(cpus: float) -> dict[str, dict[str, ConfigRecordValues]]:
    """How Flower starts Ray: workers of so many cores each, on this machine alone, without small talk."""
    return {
        "client_resources": {"num_cpus": cpus, "num_gpus": 0.0},
        "init_args": {
            "logging_level": logging.WARNING,
            "log_to_driver": False,
            "_node_ip_address": "127.0.0.1",
        },
    }


def made_files(study: Study, folder: Path) -> dict[str, SiteFile]:
    """Keys and files for all sites, made for one run."""
    publics = [PublicKey(n, new_identity(folder / f"{n}.key", None, os.urandom).public) for n in study.site_names]
    roster = roster_of(publics)
    return {
        name: SiteFile(
            name=name,
            identity=folder / f"{name}.key",
            roster=roster,
            state=folder / f"{name}.state",
            counter=None,
            data=None,
            ledger=None,
            policy=PERMISSIVE,
        )
        for name in study.site_names
    }


def save_rows(path: Path, data: SiteData) -> None:
    """Write a site's rows for its worker."""
    np.savez(
        path,
        site=np.array(data.site),
        features=np.array(data.features),
        train_x=data.train_x,
        train_y=data.train_y,
        test_x=data.test_x,
        test_y=data.test_y,
    )


def load_rows(path: Path) -> SiteData:
    """A site's rows as `save_rows` wrote them."""
    with np.load(path, allow_pickle=False) as saved:
        features = tuple(str(name) for name in saved["features"])
        return SiteData(
            str(saved["site"]), features, saved["train_x"], saved["train_y"], saved["test_x"], saved["test_y"]
        )


def _with_journals(run: Run, journals: Mapping[str, list[Entry]]) -> Run:
    """The run with what only the sites know; here they are all on one machine."""
    per_round: dict[int, dict[str, Metrics]] = {}
    sites: dict[str, SiteResult] = {}
    for name, entries in journals.items():
        result = run.sites[name]
        for entry in entries:
            if entry.metrics is not None and entry.round is not None:
                per_round.setdefault(entry.round, {})[name] = entry.metrics
            elif entry.metrics is not None:
                result = msgspec.structs.replace(result, federated=entry.metrics)
            elif entry.log is not None:
                result = msgspec.structs.replace(result, log=(*result.log, entry.log))
            elif entry.spent is not None:
                result = msgspec.structs.replace(result, spent=entry.spent)
            else:
                result = msgspec.structs.replace(result, train_rows=entry.train_rows, test_rows=entry.test_rows)
        sites[name] = result
    return msgspec.structs.replace(run, per_round=per_round, sites=sites)


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower's log without its small talk, and without the advice to use the command that this is in place of."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
