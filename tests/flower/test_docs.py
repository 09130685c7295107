"""docs/flower.md, "From a laptop to five hospitals": every command is run, each where the document says."""

import re
import shutil
from pathlib import Path

import pytest

from protocols.datasets import heart_disease
from protocols.output import load_run
from protocols.rosters import load_roster
from protocols.study import load_study
from secagg.keys import fingerprint
from tests.flower.deployment import Processes, free_ports

DOCUMENT = Path(__file__).parents[2] / "docs" / "flower.md"
HOSPITALS = ("centre", "east", "north", "south", "west")


def blocks(at):
    """The blocks for some place: what else is said of each, and its text."""
    text = DOCUMENT.read_text()
    found = re.findall(r"<!-- at: ([\w ]+)(?:; ([^>]+))? -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("<!-- at: ")
    assert len(found) + 1 == text.count("```") // 2  # all but the study file
    return [(more, block) for place, more, block in found if place == at]


@pytest.fixture
def laptop(tmp_path):
    """Rows of the four hospitals of heart disease, the largest one's in two halves."""
    (study,) = re.findall(r"`study.toml`:\n\n```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "study.toml").write_text(study.replace("rounds = 3", "rounds = 1"))  # every stage takes seconds
    data = heart_disease("full")
    shares = {
        "centre": ("cleveland", slice(0, None, 2)),
        "east": ("hungarian", slice(None)),
        "north": ("switzerland", slice(None)),
        "south": ("va", slice(None)),
        "west": ("cleveland", slice(1, None, 2)),
    }
    for name, (origin, rows) in shares.items():
        columns = [data[origin].features.index(column) for column in ("age", "thalach", "oldpeak")]
        x, y = data[origin].train_x[rows][:, columns], data[origin].train_y[rows]
        lines = [",".join([*(f"{value:g}" for value in row), f"{int(label)}"]) for row, label in zip(x, y, strict=True)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text("\n".join(["age,stay,priors,readmitted", *lines]) + "\n")
    return tmp_path


def test_the_laptops_part(laptop):
    with Processes(laptop) as here:
        for _, block in blocks("laptop"):
            here.done(block, laptop)
        first, second = (
            load_run(laptop / "runs" / name, load_study(laptop / "study.toml")) for name in ("first", "second")
        )
    assert [r.outcome for r in first.rounds] == ["opened"] * 3
    assert [r.outcome for r in second.rounds] == ["opened"] * 3
    assert all(abs(a - b) < 1e-3 for a, b in zip(*(weights(run) for run in (first, second)), strict=True))
    assert {path.name for path in (laptop / "trial").iterdir()} >= {"README.md", "ca.crt", "link", *HOSPITALS}


def test_five_hospitals(laptop):
    study = load_study(laptop / "study.toml")
    port = free_ports(1 + len(HOSPITALS))
    link = laptop / "link"
    link.mkdir()
    shutil.copy(laptop / "study.toml", link)
    (link / "runs").mkdir()

    def here(block, name=None):
        """A block as it is typed: with this hospital's name, and on this machine's ports."""
        if name is not None:
            block = block.replace("north", name)
            node_port = port + 1 + HOSPITALS.index(name)
            block = block.replace("flower-supernode ", f"flower-supernode --port {node_port} ")
        return block.replace("link.example:443", f"localhost:{port}").replace("8000", str(port))

    run_all, serve, connect, report = blocks("every hospital")
    with Processes(laptop, {"HOME": str(link)}) as machine:
        for name in HOSPITALS:
            passphrase = laptop / name / "passphrase.txt"
            passphrase.write_text("six random words do well enough\n")
            passphrase.chmod(0o600)
            machine.done(here(run_all[1], name), laptop / name)
            shutil.copy(laptop / name / f"{name}.pub", link)
            shutil.copy(laptop / name / "node.key.pub", link / f"{name}.node.pub")
        started = 0
        for more, block in blocks("link"):
            if more.startswith("file: "):
                path = link / more.removeprefix("file: ")
                path.parent.mkdir(exist_ok=True)
                path.write_text(here(block).replace("/etc/secagg", str(link)))
            elif more == "stays":
                machine.start("link", here(block), link)
                machine.wait_for("link", "Uvicorn running on")
            elif more == "each hospital":
                for name in HOSPITALS:
                    machine.done(here(block, name), link)
                    prepare(laptop / name, name, link)
                    machine.start(f"{name}-site", here(serve[1], name), laptop / name)
                    machine.start(f"{name}-node", here(connect[1], name), laptop / name)
            else:
                told = machine.done(here(block), link)
                started += "secagg run" in block
        assert serve[0] == connect[0] == "stays"
        assert started == 1
        assert "round 0" in told
        run = load_run(link / "runs" / "third", study)
        assert [record.outcome for record in run.rounds] == ["opened"] * 3
        assert all(record.contributors == HOSPITALS for record in run.rounds[:2])
        for name in HOSPITALS:
            shown = machine.done(here(report[1], name), laptop / name)
            assert "the end" in shown
            assert f"{name}: " in shown


def prepare(folder, name, link):
    """What comes to a hospital, and the file in which it says what it heard over the telephone."""
    shutil.copy(link / "link.crt", folder / "ca.crt")  # no proxy here
    for file in ("roster.toml", "study.toml"):
        shutil.copy(link / file, folder)
    heard = "".join(f'{m.name} = "{fingerprint(m.identity)}"\n' for m in load_roster(link / "roster.toml").members)
    (folder / "site.toml").write_text(
        f'name = "{name}"\nidentity = "{name}.key"\nroster = "roster.toml"\nstate = "{name}.state"\ndata = "rows.csv"\n'
        f"\n[fingerprints]\n{heard}"
    )


def weights(run):
    from protocols.fedavg import flatten

    return flatten(run.model).tolist()
