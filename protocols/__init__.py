"""Studies over several sites: secure sums around federated averaging, with differential privacy at the sites.

`run_study` runs a whole study on this machine; `Coordinator` and `Site` are its two halves, bytes in and bytes out, for
an engine that carries them between machines; `secure_mean` is the masked sum by itself. The names are loaded when first
asked for, so that the command starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocols.aggregation import secure_mean
    from protocols.coordinator import Coordinator
    from protocols.datasets import SiteData, heart_disease, read_csv
    from protocols.errors import DataError, OutputError, StudyError
    from protocols.fedavg import ServerOptimizer, local_update
    from protocols.policy import Policy
    from protocols.rosters import load_roster
    from protocols.rounds import drive
    from protocols.run import Run, load_data, run_study
    from protocols.site import Site
    from protocols.site_file import SiteFile, load_site
    from protocols.state_file import StateFile
    from protocols.study import Study, load_study, parse_study

__all__ = [
    "Coordinator",
    "DataError",
    "OutputError",
    "Policy",
    "Run",
    "ServerOptimizer",
    "Site",
    "SiteData",
    "SiteFile",
    "StateFile",
    "Study",
    "StudyError",
    "drive",
    "heart_disease",
    "load_data",
    "load_roster",
    "load_site",
    "load_study",
    "local_update",
    "parse_study",
    "read_csv",
    "run_study",
    "secure_mean",
]

_HOME = {
    "aggregation": ("secure_mean",),
    "coordinator": ("Coordinator",),
    "datasets": ("SiteData", "heart_disease", "read_csv"),
    "errors": ("DataError", "OutputError", "StudyError"),
    "fedavg": ("ServerOptimizer", "local_update"),
    "policy": ("Policy",),
    "rosters": ("load_roster",),
    "rounds": ("drive",),
    "run": ("Run", "load_data", "run_study"),
    "site": ("Site",),
    "site_file": ("SiteFile", "load_site"),
    "state_file": ("StateFile",),
    "study": ("Study", "load_study", "parse_study"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"protocols.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
