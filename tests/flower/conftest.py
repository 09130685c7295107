"""Everything here is about Flower, takes minutes, and is no part of the everyday suite: `make test-flower`."""

import tempfile
from pathlib import Path

import pytest

from protocols.deploy import deploy
from tests.flower.deployment import SITES, STUDY
from tests.protocols.conftest import one_thread

__all__ = ["one_thread"]  # and a process that is forked from several threads hangs


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.flower)


class Ward:
    """Four hospitals' own processes under one grid, and what it takes to run a study over them."""

    def __init__(self, folder, *, rounds, more, seeds):
        from tests.flower.local_grid import Hospital, LocalGrid

        self.study_path = folder / "study.toml"
        self.study_path.write_text(STUDY.format(rounds=rounds, more=more))
        self.folder = folder / "d"
        deploy(self.folder, self.study_path)
        self.hospitals = {site: Hospital(self.folder / site, seed=site.encode() if seeds else None) for site in SITES}
        self.node = {site: number for number, site in enumerate(SITES, 1)}
        self.site = {number: site for site, number in self.node.items()}
        self.grid = LocalGrid({self.node[site]: {"site-socket": str(self.hospitals[site].socket)} for site in SITES})
        self.lines = []
        self.records = []

    def start(self):
        for hospital in self.hospitals.values():
            hospital.start()
        return self

    @property
    def study(self):
        from protocols.study import load_study

        return load_study(self.study_path)

    @property
    def roster(self):
        from protocols.rosters import load_roster

        return load_roster(self.folder / "link" / "roster.toml")

    def run(self, **changes):
        from protocols.engines.flower.conduct import conduct
        from protocols.engines.flower.engine import Patience

        patience = Patience(gather=10.0, stage=20.0, resend=3.0, absent=0.6, poll=0.02)
        given = {"patience": patience, "say": self.lines.append, **changes}
        return conduct(self.grid, given.pop("study", self.study), given.pop("roster", self.roster), **given)


@pytest.fixture(scope="session")
def warm(one_thread):
    """Everything that training imports is there before a process is forked."""
    from protocols.run import load_data, run_study
    from protocols.study import parse_study

    study = parse_study(STUDY.format(rounds=1, more=""))
    run_study(study, load_data(study))


@pytest.fixture
def ward(warm):
    """Makes wards; their processes are ended whatever the test does."""
    made = []
    with tempfile.TemporaryDirectory(prefix="secagg-") as name:

        def make(*, rounds=2, more="", seeds=False, start=True):
            folder = Path(name) / str(len(made))
            folder.mkdir()
            made.append(Ward(folder, rounds=rounds, more=more, seeds=seeds))
            return made[-1].start() if start else made[-1]

        try:
            yield make
        finally:
            for each in made:
                for hospital in each.hospitals.values():
                    print(hospital.told())
                    hospital.close()
