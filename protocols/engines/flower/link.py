"""A running SuperLink, from the side of whoever runs a study on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.engines.flower.engine import Patience, Say
from protocols.engines.flower.server_app import ORDER, ROSTER, SAYS, STUDY, Order
from protocols.errors import LinkError, SiteFileError
from protocols.rosters import load_roster, roster_text
from protocols.toml_file import Section, parse, read_text

_PROJECT = """\
[project]
name = "secagg-study"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "secagg"

[tool.flwr.app.components]
serverapp = "secagg_study.server:app"
clientapp = "secagg_study.client:app"
"""
_SERVER = """\
from pathlib import Path

from protocols.engines.flower.server_app import app_of

app = app_of(Path(__file__).parent)
"""
_CLIENT = """\
from protocols.engines.flower.client_app import app

__all__ = ["app"]
"""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}
"""Environment of every process of Flower: it calls nobody, installs nothing, and looks for work often."""


class _Table(Section, frozen=True):
    address: str
    root_certificates: str
    roster: str
    patience: Patience = msgspec.field(default_factory=Patience)


class Link(Struct, frozen=True):
    """Where a SuperLink is, and how long its server waits.

    Attributes:
        address: Host and port.
        root_certificates: Path of the certificate that its own is checked against.
        roster: Path of the server's copy of the roster.
        patience: How long to wait for sites and answers.
    """

    address: str
    root_certificates: Path
    roster: Path
    patience: Patience


def load_link(path: Path) -> Link:
    """Read a `link.toml`; relative paths start at its folder.

    Raises:
        SiteFileError: It is missing, or says what cannot be.
    """
    table = parse(read_text(path, SiteFileError), _Table, name=str(path), error_type=SiteFileError)
    folder = path.absolute().parent
    return Link(table.address, folder / table.root_certificates, folder / table.roster, table.patience)


def write_app(folder: Path, study_text: str, link: Link, order: Order) -> None:
    """Write the app that goes to the SuperLink: it names the installed package, and holds the study for the server.

    Raises:
        KeyFileError: The link's roster cannot be read.
    """
    package = folder / "secagg_study"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PROJECT)
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(_SERVER)
    (package / "client.py").write_text(_CLIENT)
    (package / STUDY).write_text(study_text)
    (package / ROSTER).write_text(roster_text(load_roster(link.roster)))
    (package / ORDER).write_bytes(msgspec.json.encode(order))


def flower_home(folder: Path, link: Link) -> None:
    """Write the configuration by which `flwr` finds the link under the name `secagg`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        "[superlink]\n"
        'default = "secagg"\n\n'
        "[superlink.secagg]\n"
        f'address = "{link.address}"\n'
        f'root-certificates = "{link.root_certificates}"\n'
    )


def submit(study: Path, link: Link, out: Path, say: Say, *, resume: bool = False) -> None:
    """Have a SuperLink run a study, and wait for the end.

    Args:
        study: The study file.
        link: Where the SuperLink is.
        out: Folder for the run, on the SuperLink's machine.
        say: Told what the server says, a line for every stage.
        resume: Go on with a run whose server went down.

    Raises:
        LinkError: The link cannot be reached, or the server failed; the message holds what it said.
    """
    with tempfile.TemporaryDirectory(prefix="secagg-") as name:
        folder = Path(name)
        write_app(folder / "app", read_text(study, LinkError), link, Order(str(out.absolute()), link.patience, resume))
        flower_home(folder / "home", link)
        command = [program("flwr"), "run", str(folder / "app"), "secagg", "--stream"]
        done, lines = False, list[str]()
        with subprocess.Popen(
            command,
            env=environment({"FLWR_HOME": str(folder / "home"), "COLUMNS": "1000"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout or ():
                lines = [*lines[-29:], line.rstrip()]
                if SAYS in line:
                    told = line.rstrip().split(SAYS, 1)[1]
                    say(told)
                    done = done or told.startswith("written to ")
            process.wait()
    if not done:
        raise LinkError(
            f"the study did not come to its end at {link.address}; the last that was heard of it:\n" + "\n".join(lines)
        )


def program(name: str) -> str:
    """The path of a command of Flower, beside this Python or on the path.

    Raises:
        LinkError: There is none.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise LinkError(f"{name} is not installed: pip install 'secagg[flower]'")
    return found


def environment(further: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process of Flower, in which it finds its own commands."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **QUIET, **further}
