"""A user's own Flower app, and four sites' files to put secure sums under it."""

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from protocols.agreement import load_agreement
from protocols.engines.flower.engine import Patience
from protocols.engines.flower.secure_grid import SecAggGrid
from protocols.engines.flower.secure_mod import SecAggMod
from protocols.memory import remember
from protocols.rosters import PublicKey, load_roster, new_identity, roster_of, write_roster
from protocols.site_file import load_site
from secagg.keys import fingerprint
from secagg.prg import deterministic_entropy
from tests.flower.local_grid import LocalGrid
from tests.protocols import apps
from tests.protocols.apps import SITES, WEIGHTS

TEXT = apps.TEXT.replace("most_sums = 10", "most_sums = 20")
PATIENCE = Patience(gather=5.0, stage=10.0, resend=5.0, absent=0.3, poll=0.01)
START = {
    "layer.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "layer.bias": np.array([0.5, -0.5], np.float32),
}


def arrays(values=START):
    return ArrayRecord({name: Array(array) for name, array in values.items()})


def user_app(mods=(), seen=None):
    """Training pulls each site's model half-way to a target of its own; nothing in it knows of secure sums."""
    app = ClientApp(mods=list(mods))
    seen = seen if seen is not None else []

    def target(name, key, array):
        return np.random.default_rng([*name.encode(), *key.encode()]).normal(size=array.shape).astype(array.dtype)

    @app.train()
    def train(message, context):
        name = context.node_config["name"]
        seen.append((name, "train", dict(message.content["config"])))
        came = {key: array.numpy() for key, array in message.content["arrays"].items()}
        moved = {key: array + (target(name, key, array) - array) / 2 for key, array in came.items()}
        metrics = MetricRecord({"train_loss": float(WEIGHTS[name]) / 10, "num-examples": WEIGHTS[name]})
        return Message(RecordDict({"arrays": arrays(moved), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        name = context.node_config["name"]
        seen.append((name, "evaluate", dict(message.content["config"])))
        total = sum(float(np.abs(array.numpy()).sum()) for array in message.content["arrays"].values())
        metrics = MetricRecord({"eval_acc": 1 / (1 + total), "num-examples": WEIGHTS[name] // 2})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def write_files(folder, text=TEXT, sites=SITES, policy=""):
    """A folder for each site with its key, roster, agreement and site.toml, and one for the server."""
    publics = {}
    for name in sites:
        (folder / name).mkdir()
        identity = new_identity(folder / name / "site.key", None, deterministic_entropy(name.encode()))
        publics[name] = identity.public
    roster = roster_of([PublicKey(name, key) for name, key in publics.items()])
    pinned = "".join(f'{name} = "{fingerprint(key)}"\n' for name, key in publics.items())
    for name in (*sites, "server"):
        (folder / name).mkdir(exist_ok=True)
        write_roster(folder / name / "roster.toml", roster)
        (folder / name / "agreement.toml").write_text(text)
    for name in sites:
        (folder / name / "site.toml").write_text(
            f'name = "{name}"\nidentity = "site.key"\nroster = "roster.toml"\nstate = "site.state"\n'
            f"[fingerprints]\n{pinned}\n{policy}"
        )


class Clinic:
    """Four sites' SuperNodes with the user's app under `SecAggMod`, and the server's side of it."""

    def __init__(self, folder, text=TEXT, policy="", app=None):
        self.folder, self.seen = folder, []
        write_files(folder, text, policy=policy)
        self.node = {name: number for number, name in enumerate(SITES, 1)}
        configurations = {
            number: {"site-config": str(folder / name / "site.toml"), "name": name}
            for name, number in self.node.items()
        }
        self.grid = LocalGrid(configurations, app or user_app([SecAggMod()], self.seen))

    def secure(self, **changes):
        given = {"patience": PATIENCE, **changes}
        server = self.folder / "server"
        ours = load_agreement(server / "agreement.toml"), load_roster(server / "roster.toml")
        return SecAggGrid(self.grid, *ours, **given)

    def plain(self):
        """The same app on the same nodes without the mod."""
        return LocalGrid(self.grid.configurations, user_app())

    def memory(self, name):
        with load_site(self.folder / name / "site.toml").state_file() as store:
            return remember(store.load())
