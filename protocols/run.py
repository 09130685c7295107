"""A whole study on one machine: every site is an object here, and the coordinator is driven to the end.

Because all sites are on this machine, the result can say what no deployment could: how each site's own model does, and
one trained on all rows put together. Those are the baselines that a federated model is judged by.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from dp import Spent
from protocols.coordinator import Coordinator
from protocols.datasets import SiteData, heart_disease, pooled, read_csv
from protocols.engines.faulty import Fault, Faulty
from protocols.engines.in_process import InProcess
from protocols.errors import DataError, StudyError
from protocols.fedavg import build_model, entry_count, evaluate, local_update, training_device
from protocols.homomorphic import Holder
from protocols.ledger_file import open_ledger
from protocols.metrics import Metrics
from protocols.policy import PERMISSIVE, Policy
from protocols.rounds import RoundRecord, drive
from protocols.site import Site
from protocols.site_file import SiteFile, load_site
from protocols.study import Privacy, Study, Training
from secagg.errors import SecAggError
from secagg.keys import Identity, Roster
from secagg.masking.transcript import write
from secagg.prg import Entropy

# Below this many parameters, threads wait for each other longer than they work.
_SMALL_MODEL = 200_000

Listener = Callable[[Coordinator], None]


class SiteResult(Struct, frozen=True):
    """What came out for one site.

    Attributes:
        train_rows: Rows it trained on, or None where only the site knows.
        test_rows: Rows that every figure here is measured on, likewise.
        federated: The study's model.
        spent: Privacy cost of its records, or None without differential privacy.
        log: What it refused or clipped, and why.
        local: A model trained at this site alone, as long and without noise; None where no baselines were asked for.
        without_privacy: The same study without differential privacy; None where it had none.
        pooled: A model trained on all sites' rows together, without noise.
    """

    train_rows: int | None
    test_rows: int | None
    federated: Metrics | None
    spent: Spent | None
    log: tuple[str, ...]
    local: Metrics | None = None
    without_privacy: Metrics | None = None
    pooled: Metrics | None = None


class Run(Struct, frozen=True):
    """A finished study.

    Attributes:
        study: What was asked for.
        roster: The sites' public keys, made for this run.
        model: The last global model.
        features: Names of its inputs.
        rounds: What happened in each sum.
        transcript: What the sites signed, for `secagg verify`; empty where nothing is signed.
        per_round: For each round of training, each site's metrics of the model that the round started from.
        sites: By name.
        stopped: Why the study ended early, or None.
        seconds: Wall time of the study itself, without baselines.
        cpu_seconds: Its CPU time.
    """

    study: Study
    roster: Roster
    model: torch.nn.Module
    features: tuple[str, ...]
    rounds: list[RoundRecord]
    transcript: bytes
    per_round: dict[int, dict[str, Metrics]]
    sites: dict[str, SiteResult]
    stopped: str | None
    seconds: float
    cpu_seconds: float


def load_sites(study: Study, folder: Path) -> dict[str, SiteFile]:
    """The sites' own files, `NAME.toml` in a folder: for a trial of a deployment on one machine.

    Raises:
        SiteFileError, KeyFileError: A file is missing or wrong.
        StudyError: The sites do not all have the same roster.
    """
    files = {name: load_site(folder / f"{name}.toml") for name in study.site_names}
    for name, file in files.items():
        if file.name != name:
            raise StudyError(f"{folder / name}.toml: expected the file of site {name}, got that of {file.name}")
    first = study.site_names[0]
    if differing := [name for name, file in files.items() if file.roster != files[first].roster]:
        raise StudyError(f"sites: {', '.join(differing)} have another roster than {first}")
    return files


def load_data(
    study: Study, directory: Path = Path(), site_files: Mapping[str, SiteFile] | None = None
) -> dict[str, SiteData]:
    """Every site's rows, raw.

    Args:
        study: Says which data.
        directory: Where relative paths of sites' files start: the folder of the study file.
        site_files: The sites' own files; a path of rows there comes before the study's.

    Raises:
        DataError: Rows that cannot be used, by site, file, column and line.
        StudyError: A site without a path, where the study needs one.
    """
    task = study.task
    if task.data == "heart-disease":
        every = heart_disease(task.preprocessing, test_fraction=task.test_fraction, split_seed=task.split_seed)
        return {name: every[name] for name in study.site_names}
    data = {}
    for i, entry in enumerate(study.sites):
        own = site_files[entry.name].data if site_files is not None else None
        if own is None and entry.data is None:
            raise StudyError(f"sites[{i}].data: expected the path of {entry.name}'s file, got none")
        data[entry.name] = read_csv(
            own or directory / (entry.data or ""),
            site=entry.name,
            features=task.features,
            target=task.target or "",
            test_fraction=task.test_fraction,
            split_seed=task.split_seed,
        )
    return {name: data[name] for name in study.site_names}


def run_study(
    study: Study,
    data: Mapping[str, SiteData],
    *,
    faults: tuple[Fault, ...] = (),
    baselines: bool = False,
    policy: Policy = PERMISSIVE,
    site_files: Mapping[str, SiteFile] | None = None,
    passphrase: str | None = None,
    entropy: Entropy = os.urandom,
    listener: Listener | None = None,
) -> Run:
    """Run a study with all its sites in this process.

    Args:
        study: What is to be done.
        data: Each site's raw rows, as from `load_data`.
        faults: Messages to lose on purpose.
        baselines: Whether to train the local, the pooled and the noiseless federated model as well.
        policy: Of every site that has no file of its own.
        site_files: The sites' own files: their keys, roster and policies are used, and their states kept on disk.
        passphrase: Of the sites' keys, where they are encrypted.
        entropy: Source of all keys, masks, rounding and privacy noise.
        listener: Called after every stage, for progress.

    Raises:
        StudyError, DataError: Before anything is trained.
        StateError, KeyFileError: A site's file cannot be used. A state that cannot be saved ends the run at once.
    """
    if missing := [name for name in study.site_names if name not in data]:
        raise DataError(f"no rows were given for {', '.join(missing)}")
    features = {data[name].features for name in study.site_names}
    if len(features) != 1:
        raise DataError(f"the sites' columns differ: {sorted(features)}")
    files = site_files or {}
    identities = {
        name: files[name].load_identity(passphrase) if name in files else Identity.generate(entropy)
        for name in study.site_names
    }
    holder = study.protocol.holder
    if holder is not None:
        if files:
            raise StudyError(f"protocol.holder: {holder} has no file here; sites' own files go without a holder")
        identities[holder] = Identity.generate(entropy)
    roster = Roster.of({name: identity.public for name, identity in identities.items()})
    (columns,) = features
    model = build_model(study, len(columns))
    with threads_for(model), ExitStack() as opened:
        ledgers = {
            name: opened.enter_context(
                open_ledger(file.ledger, site=name, identity=identities[name], roster=file.roster)
            )
            for name, file in files.items()
            if file.ledger is not None
        }
        sites = [
            Site(
                study,
                name,
                identities[name],
                files[name].roster if name in files else roster,
                data[name],
                policy=files[name].policy if name in files else policy,
                ledger=ledgers.get(name),
                entropy=entropy,
            )
            for name in study.site_names
        ]
        stores = {name: opened.enter_context(file.state_file()) for name, file in files.items()}
        for site in sites:
            if site.name in stores:
                site.refuse_used(stores[site.name].load())
        coordinator = Coordinator(study, roster, model, len(columns))
        check_faults(study, coordinator.stages, faults)
        sums = coordinator.sums
        others = []
        if holder is not None and sums.setting is not None:
            others.append(Holder(sums.params, sums.setting, study.digest, identities[holder], entropy))
        in_process = InProcess([*sites, *others], stores)
        wall, cpu = time.perf_counter(), time.process_time()
        drive(coordinator, Faulty(in_process, faults) if faults else in_process, listener)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        results = {
            site.name: SiteResult(
                train_rows=data[site.name].train_rows,
                test_rows=data[site.name].test_rows,
                federated=next((e.metrics for e in reversed(site.evaluations) if e.round is None), None),
                spent=site.spent(in_process.states[site.name]),
                log=tuple(site.log),
            )
            for site in sites
        }
        if baselines and coordinator.stopped is None:
            # A site that the global standard never reached has no rows to compare on.
            standardized = {site.name: site.data for site in sites if site.standardized}
            results = with_baselines(study, data, standardized, results, entropy)
    per_round: dict[int, dict[str, Metrics]] = {}
    for site in sites:
        for evaluation in site.evaluations:
            if evaluation.round is not None:
                per_round.setdefault(evaluation.round, {})[site.name] = evaluation.metrics
    return Run(
        study=study,
        roster=roster,
        model=coordinator.model,
        features=columns,
        rounds=coordinator.rounds,
        transcript=write(coordinator.transcript),
        per_round=per_round,
        sites=results,
        stopped=coordinator.stopped,
        seconds=wall,
        cpu_seconds=cpu,
    )


def check_faults(study: Study, stages: tuple[str, ...], faults: tuple[Fault, ...]) -> None:
    """Refuse a fault of a site or at a stage that the study does not have.

    Raises:
        StudyError: The message names those that it has.
    """
    for fault in faults:
        if fault.site not in (*study.site_names, study.protocol.holder):
            raise StudyError(f"a drop-out of {fault.site!r}, who is none of the sites {', '.join(study.site_names)}")
        if fault.stage not in stages:
            raise StudyError(f"a drop-out at {fault.stage!r}, which is none of the stages {', '.join(stages)}")


def with_baselines(
    study: Study,
    data: Mapping[str, SiteData],
    standardized: Mapping[str, SiteData],
    results: dict[str, SiteResult],
    entropy: Entropy,
) -> dict[str, SiteResult]:
    """The sites' results with what a local, a pooled and a noiseless model would do; needs all rows in one place.

    Args:
        study: What was done.
        data: Each site's rows, raw.
        standardized: The rows as the sites trained on them; a site that is missing here gets no baselines.
        results: As the study left them.
        entropy: Source of the noiseless study's keys.
    """
    device = training_device(study.device)
    pooled_model = _alone(study, pooled(standardized.values()), device)
    noiseless: Mapping[str, SiteResult] = {}
    if study.private:
        noiseless = run_study(_without_privacy(study, data), data, entropy=entropy).sites
    for name, rows in standardized.items():
        results[name] = msgspec.structs.replace(
            results[name],
            local=_judge(_alone(study, rows, device), rows, device),
            pooled=_judge(pooled_model, rows, device),
            without_privacy=noiseless[name].federated if name in noiseless else None,
        )
    return results


def _judge(model: torch.nn.Module, data: SiteData, device: torch.device) -> Metrics | None:
    """A baseline's metrics, or None where it has diverged: that must not cost the study its result."""
    try:
        return evaluate(model, data, device)
    except SecAggError:
        return None


def _alone(study: Study, data: SiteData, device: torch.device) -> torch.nn.Module:
    """A model from the study's start, trained on these rows alone for as many steps as a site takes in the study."""
    model = build_model(study, len(data.features))
    training = _plain_training(study, data.train_rows)
    steps = study.rounds * (training.local_steps or 1)
    if training.local_epochs is not None:
        steps = study.rounds * training.local_epochs * -(-data.train_rows // training.batch_size)
    training = msgspec.structs.replace(training, local_steps=steps, local_epochs=None)
    local_update(model, data, training, device, seed=(study.seed, len(study.sites)), steps_done=0)
    return model


def _plain_training(study: Study, rows: int) -> Training:
    """The study's local training as plain mini-batch SGD: the same number of steps over the same share of the rows."""
    training = study.training
    if training.algorithm == "fedsgd":
        return msgspec.structs.replace(
            training, algorithm="fedavg", local_steps=1, batch_size=rows, learning_rate=study.server.learning_rate
        )
    if study.private and study.privacy.sampling_rate is not None:
        batch = max(1, round(study.privacy.sampling_rate * rows))
        return msgspec.structs.replace(training, local_steps=study.local_steps, local_epochs=None, batch_size=batch)
    return training


def _without_privacy(study: Study, data: Mapping[str, SiteData]) -> Study:
    rows = sum(site.train_rows for site in data.values()) // len(data)
    training = study.training if study.training.algorithm == "fedsgd" else _plain_training(study, rows)
    return msgspec.structs.replace(study, privacy=Privacy(), training=training)


@contextmanager
def threads_for(model: torch.nn.Module) -> Iterator[None]:
    """One thread for a small model, torch's own choice for a large one."""
    before = torch.get_num_threads()
    if entry_count(model) < _SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
