"""A study from its first stage to its end over a Flower grid, as a `Run`: what a server knows of it, and no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr.serverapp import Grid

from dp import Mechanism, Spent, coalesce, spent
from protocols.coordinator import Coordinator
from protocols.datasets import heart_disease
from protocols.engines import Engine
from protocols.engines.flower.engine import FlowerEngine, Patience, Say
from protocols.errors import LinkError, StudyError
from protocols.fedavg import build_model, distributed_plan, flatten, local_plan
from protocols.files import replace_private
from protocols.rosters import roster_digest
from protocols.rounds import drive
from protocols.run import Listener, Run, SiteResult, threads_for
from protocols.study import Study
from secagg.keys import Roster
from secagg.masking.transcript import write


def conduct(
    grid: Grid,
    study: Study,
    roster: Roster,
    *,
    patience: Patience,
    say: Say,
    at_once: int | None = None,
    wrap: Callable[[Engine], Engine] = lambda engine: engine,
    listener: Listener | None = None,
    checked: Callable[[Coordinator], None] = lambda coordinator: None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> tuple[Run, Coordinator]:
    """Carry a study to its end.

    Args:
        grid: As Flower gives it to a server app.
        study: The server's copy; a site with another is refused.
        roster: The server's copy, likewise.
        patience: How long to wait for sites.
        say: Told in one line what a person should know.
        at_once: Requests on their way at a time, as `FlowerEngine` takes it.
        wrap: Puts another engine around this one.
        listener: Called after every stage.
        checked: Called before anything is sent; what it raises ends the run.
        checkpoint: Where to keep, after every stage, what it takes to go on; or None.
        resume: Go on from there.

    Returns:
        The run, without what only sites know: their rows, metrics and logs. What they have spent is what the study
        plans for the rounds that were begun; each site's own account is what counts.

    Raises:
        StudyError: Study, roster and sites do not belong together.
        LinkError: Too few sites came, or the checkpoint cannot be read or written.
        DecodeError: The checkpoint is not one of this study.
    """
    if study.protocol.holder is not None:
        raise StudyError(f"protocol.holder: {study.protocol.holder} has its keys in process only: not over Flower yet")
    columns = feature_names(study)
    model = build_model(study, len(columns))
    with threads_for(model):
        coordinator = Coordinator(study, roster, model, len(columns))
        if checkpoint is not None and resume:
            try:
                coordinator.resume(checkpoint.read_bytes())
            except OSError as error:
                raise LinkError(f"{checkpoint}: no run to go on with: {error.strerror or error}") from error
        checked(coordinator)
        engine = FlowerEngine(
            grid,
            study.site_names,
            study=study.digest,
            roster=roster_digest(roster),
            patience=patience,
            say=say,
            at_once=at_once,
        )
        engine.gather(study.threshold)

        def after_stage(coordinator: Coordinator) -> None:
            if checkpoint is not None:
                try:
                    replace_private(checkpoint, coordinator.checkpoint())
                except OSError as error:
                    raise LinkError(f"{checkpoint}: could not be written: {error.strerror or error}") from error
            if listener is not None:
                listener(coordinator)

        wall, cpu = time.perf_counter(), time.process_time()
        drive(coordinator, wrap(engine), after_stage)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    planned = planned_cost(study, coordinator)
    run = Run(
        study=study,
        roster=roster,
        model=coordinator.model,
        features=columns,
        rounds=coordinator.rounds,
        transcript=write(coordinator.transcript),
        per_round={},
        sites={name: SiteResult(None, None, None, planned, ()) for name in study.site_names},
        stopped=coordinator.stopped,
        seconds=wall,
        cpu_seconds=cpu,
    )
    return run, coordinator


def feature_names(study: Study) -> tuple[str, ...]:
    """Names of a row's columns, as every site has them."""
    if study.task.data == "heart-disease":
        return next(iter(heart_disease(study.task.preprocessing).values())).features
    return study.task.features


def planned_cost(study: Study, coordinator: Coordinator) -> Spent | None:
    """What the rounds that were begun cost each site's records by the study's plan; None without differential privacy.

    The relation is the study's, the unit the mechanism's. Rounds that failed count as if all had been charged.
    """
    plan = distributed_plan(study, flatten(coordinator.model).size) or local_plan(study)
    begun = sum(record.purpose == "train" for record in coordinator.rounds)
    if plan is None or not begun:
        return None
    mechanisms: list[Mechanism] = [plan.mechanism()] * begun
    return spent(coalesce(mechanisms), study.privacy.delta or 0.0, study.privacy.relation)
