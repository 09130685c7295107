"""The app of docs/flower_app.md between processes: a SuperLink, four SuperNodes, TLS and node authentication."""

import re
from pathlib import Path

import pytest

from tests.flower.deployment import SITES, Deployment
from tests.test_docs import blocks

PROJECT = """\
[project]
name = "heart-app"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "someone"

[tool.flwr.app.components]
serverapp = "heart_app.server_app:app"
clientapp = "heart_app.client_app:app"

[tool.flwr.app.config]
strategy = "fedavg"
"""


class AppDeployment(Deployment):
    """Nodes that run the app themselves, with the site's files by their own configuration."""

    def start_site(self, site):
        """No process beside the node; its README's agreement is in the site's folder."""
        (agreement,) = blocks("docs/flower_app.md", "toml")
        (self.folder / site / "agreement.toml").write_text(agreement)
        self.start(f"{site}-site", "echo answers on")

    def start_node(self, site):
        command = self.commands(site)[2]
        given = f"site-config='{self.folder}/{site}/site.toml' site='{site}'"
        changed = re.sub(r"--node-config \".*\"", lambda _: f'--node-config "{given}"', command)
        assert changed != command
        self.start(f"{site}-node", changed)

    def write_app(self):
        """The document's code as a package, with the server's files in it."""
        package = self.base / "app" / "heart_app"
        package.mkdir(parents=True)
        (self.base / "app" / "pyproject.toml").write_text(PROJECT)
        (package / "__init__.py").write_text("")
        for source in blocks("docs/flower_app.md", "python")[:2]:
            name = re.match(r"# (\w+\.py)\n", source)[1]
            source = source.replace("from client_app import", "from heart_app.client_app import")
            for file in ("agreement.toml", "roster.toml"):
                source = source.replace(f'"{file}"', f'Path(__file__).parent / "{file}"')
            source = source.replace('"model.pt"', repr(str(self.base / "model.pt")))
            source = source.replace("num_rounds=3", "num_rounds=1")
            (package / name).write_text("from pathlib import Path\n\n" + source)
        (package / "agreement.toml").write_text(blocks("docs/flower_app.md", "toml")[0])
        (package / "roster.toml").write_text((self.folder / "link" / "roster.toml").read_text())
        return self.base / "app"

    def run_app(self):
        home = f"FLWR_HOME={self.folder}/home FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 COLUMNS=1000"
        self.start("run", f"{home} exec flwr run {self.write_app()} secagg --stream")


@pytest.mark.slow
def test_the_app_of_the_document_trains_between_processes():
    with AppDeployment() as deployment:
        deployment.run_app()
        deployment.wait_for("run", r"Strategy execution finished|Traceback|Error", seconds=1500)
        told = deployment.told("run")
        nodes = "\n".join(deployment.told(f"{site}-node")[-2000:] for site in SITES)
        assert len(re.findall(r"secure sum \((?:train|evaluate)\): 4 sites", told)) == 2, told[-6000:] + nodes
        assert Path(deployment.base / "model.pt").exists()
