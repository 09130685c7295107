"""docs/flower_app.md: its files and its code, as they stand there."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from protocols.engines.flower import secure_grid
from protocols.engines.flower.engine import Patience
from protocols.site_file import load_site
from tests.flower.local_grid import LocalGrid
from tests.test_docs import blocks

DOCUMENT = "docs/flower_app.md"
SITES = ("cleveland", "hungarian", "switzerland", "va")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The document's files, made by its own commands."""
    folder = tmp_path_factory.mktemp("app")
    (agreement,) = blocks(DOCUMENT, "toml")
    (folder / "agreement.toml").write_text(agreement)
    for source in blocks(DOCUMENT, "python"):
        (folder / re.match(r"# (\w+\.py)\n", source)[1]).write_text(source)
    (script,) = blocks(DOCUMENT, "sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", script], cwd=folder, env={**os.environ, "PATH": path}, check=True, timeout=120)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for name in SITES:
        for path in (folder / "sites" / name).glob("site.state*"):
            path.unlink()
    yield folder
    for name in ("client_app", "server_app"):
        sys.modules.pop(name, None)


class Quick(secure_grid.FlowerEngine):
    """Over a grid in this process nobody has to wait for long."""

    def __init__(self, *arguments, **named):
        named["patience"] = Patience(gather=10.0, stage=30.0, resend=10.0, absent=0.5, poll=0.01)
        super().__init__(*arguments, **named)


def run(folder, grid, strategy):
    server = runpy.run_path(str(folder / "server_app.py"))["app"]
    server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"strategy": strategy}))
    return torch.load(folder / "model.pt", weights_only=True)


def plain_server(folder):
    """The document's server without its new line: the strategy on the grid itself."""
    source = (folder / "server_app.py").read_text()
    source = re.sub(r".*# new\n", "", source).replace("start(secure,", "start(grid,")
    assert "SecAggGrid(" not in source
    (folder / "plain").mkdir(exist_ok=True)
    (folder / "plain" / "server_app.py").write_text(source)
    return folder / "plain"


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_app_of_the_document_gives_the_model_that_it_gives_without_secure_sums(here, monkeypatch, strategy):
    import client_app

    monkeypatch.setattr(secure_grid, "FlowerEngine", Quick)
    configurations = {
        number: {"site": name, "site-config": str(here / "sites" / name / "site.toml")}
        for number, name in enumerate(SITES, 1)
    }
    secure = run(here, LocalGrid(configurations, client_app.app), strategy)
    without = ClientApp()
    without.train()(client_app.train)
    without.evaluate()(client_app.evaluate)
    monkeypatch.chdir(plain_server(here))
    plain = run(here / "plain", LocalGrid(configurations, without), strategy)
    torch.manual_seed(0)
    start = client_app.Net().state_dict()
    assert secure.keys() == plain.keys() == start.keys()
    for name, array in plain.items():
        assert secure[name].dtype == array.dtype
        np.testing.assert_allclose(secure[name], array, rtol=0, atol=1e-5)
        assert float((secure[name] - start[name]).abs().max()) > 1e-2


def test_the_app_of_the_document_runs_in_flowers_simulation(here):
    from protocols.engines.flower.link import environment

    done = subprocess.run(
        [sys.executable, "trial.py"],
        cwd=here,
        env=environment({"PYTHONPATH": str(here), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-5000:]
    assert len(re.findall(r"secure sum \((?:train|evaluate)\): 4 sites", told)) == 6, told[-5000:]
    assert (here / "model.pt").exists()
    for name in SITES:
        assert load_site(here / "sites" / name / "site.toml").state.exists()
