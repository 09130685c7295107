"""What runs at the SuperLink: the study's coordinator, from the files that came with the app."""

from __future__ import annotations

from pathlib import Path

import msgspec
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from msgspec import Struct

from protocols.coordinator import Coordinator
from protocols.engines.flower.conduct import conduct
from protocols.engines.flower.engine import Patience
from protocols.errors import LinkError
from protocols.output import write_run
from protocols.rosters import load_roster
from protocols.study import load_study

STUDY, ROSTER, ORDER = "study.toml", "roster.toml", "order.json"
SAYS = "secagg: "
"""What a line of the log begins with that is for whoever runs the study."""


class Order(Struct, frozen=True, forbid_unknown_fields=True):
    """What whoever runs a study asks of the server, beside the study.

    Attributes:
        out: Folder for the run, on the SuperLink's machine.
        patience: How long to wait.
        resume: Go on with a run whose server went down.
    """

    out: str
    patience: Patience
    resume: bool = False


def app_of(folder: Path) -> ServerApp:
    """The server app over the files in a folder: `study.toml`, `roster.toml` and `order.json`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_at_link(grid, folder)

    return app


def checkpoint_of(out: Path) -> Path:
    """Where the server keeps what it takes to go on with a run."""
    return out.with_name(f".{out.name}.checkpoint")


def run_at_link(grid: Grid, folder: Path) -> None:
    """Carry a study, telling of every stage in the log, and write the run's folder.

    Raises:
        SecAggError: What a server can see to be wrong; the log has it in one line.
    """
    study, roster = load_study(folder / STUDY), load_roster(folder / ROSTER)
    try:
        order = msgspec.json.decode((folder / ORDER).read_bytes(), type=Order)
    except (OSError, msgspec.MsgspecError) as error:
        raise LinkError(f"{folder / ORDER}: expected what `secagg run` writes there: {error}") from error
    out = Path(order.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    run, _ = conduct(
        grid,
        study,
        roster,
        patience=order.patience,
        say=say,
        listener=tell,
        checkpoint=checkpoint_of(out),
        resume=order.resume,
    )
    write_run(run, out)
    checkpoint_of(out).unlink(missing_ok=True)
    say(f"written to {out}")


def say(line: str) -> None:
    """One line for whoever runs the study."""
    print(f"{SAYS}{line}", flush=True)


def tell(coordinator: Coordinator) -> None:
    """Say how the stage went that was just closed."""
    record = next(record for record in reversed(coordinator.rounds) if record.stages)
    stage = record.stages[-1]
    dropped = "".join(f"; {site}: {why}" for site, why in record.dropped.items())
    say(
        f"round {record.number}, {record.purpose}, {stage.stage}: {stage.answered} of {stage.asked} answered in "
        f"{stage.seconds:.1f} s{dropped}"
    )
