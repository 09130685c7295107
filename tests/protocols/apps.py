"""Sites under an app of somebody else's, without any framework: the app is a function from work to what it returns."""

import numpy as np

from protocols.agreement import parse_agreement
from protocols.app_server import AppSums
from protocols.app_site import AppSite
from protocols.app_work import AppWork, Returned
from protocols.engines.in_process import InProcess
from protocols.memory import Memory
from protocols.rounds import drive
from secagg.keys import Identity, Roster
from secagg.prg import deterministic_entropy
from secagg.wire import decode

SITES = ("ash", "birch", "cedar", "dogwood")
TEXT = """\
name = "tiny"
sites = ["ash", "birch", "cedar", "dogwood"]
most_sums = 10

[train]
train_loss = 10.0

[evaluate]
eval_acc = 1.0
"""
WEIGHTS = {"ash": 10, "birch": 25, "cedar": 7, "dogwood": 40}
ARRAYS = {
    "layer.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "layer.bias": np.array([0.5, -0.5]),
    "steps": np.array(3, np.int64),
}


def agreement(text=TEXT):
    return parse_agreement(text)


def train_work(arrays=ARRAYS, configs=None):
    return AppWork.of("train", "arrays", arrays, configs or {"config": {"lr": 0.1, "server-round": 1}})


def evaluate_work(arrays=ARRAYS, configs=None):
    return AppWork.of("evaluate", "arrays", arrays, configs or {})


def moves(name):
    """How much a site's training moves each array of floats."""
    rng = np.random.default_rng([*name.encode()])
    return {key: rng.normal(size=np.shape(array)) for key, array in ARRAYS.items() if array.dtype.kind == "f"}


def trained(name, work):
    """What the app gives at a site."""
    metrics = {"num-examples": WEIGHTS[name]}
    if work.kind == "evaluate":
        return Returned({}, {**metrics, "eval_acc": WEIGHTS[name] / 50})
    arrays = {
        key: (array + moves(name)[key]).astype(array.dtype) if array.dtype.kind == "f" else array
        for key, array in work.sent().items()
    }
    return Returned(arrays, {**metrics, "train_loss": WEIGHTS[name] / 10})


def mean_of(names, values):
    return sum(WEIGHTS[name] * values[name] for name in names) / sum(WEIGHTS[name] for name in names)


class Clinics:
    """Four sites, the server of their sums, and an engine between them whose messages a test may lose or change.

    `change(name, request)` gives what arrives at a site, None for nothing.
    """

    def __init__(self, text=TEXT, *, policies=None, seed=b"apps", **sites):
        entropy = deterministic_entropy(seed)
        self.identities = {name: Identity.generate(entropy) for name in SITES}
        self.roster = Roster.of({name: identity.public for name, identity in self.identities.items()})
        self.agreement, self.now, self.ran = agreement(text), 1000.0, []
        self.run = trained
        self.sites = {
            name: self.site(name, agreement(sites.get(name, text)), (policies or {}).get(name)) for name in SITES
        }
        self.engine = InProcess(self.sites.values())
        self.server = AppSums(self.agreement, self.roster, first=5)
        self.change = lambda name, request: request
        self.away = frozenset()

    def site(self, name, own=None, policy=None, **changes):
        def run(work):
            self.ran.append((name, work.kind))
            return self.run(name, work)

        return AppSite(
            own or self.agreement,
            name,
            self.identities[name],
            self.roster,
            run,
            policy=policy,
            clock=lambda: self.now,
            **changes,
        )

    def exchange(self, requests):
        arriving = {}
        for name, request in requests.items():
            if name not in self.away and (changed := self.change(name, request)) is not None:
                arriving[name] = changed
        return self.engine.exchange(arriving)

    def sum(self, work=None, among=SITES):
        self.server.begin(work or train_work(), frozenset(among))
        drive(self.server, self)
        return self.server.average

    @property
    def record(self):
        return self.server.rounds[-1]

    def log(self, name):
        return "\n".join(self.sites[name].log)

    def memory(self, name):
        return decode(self.engine.states[name], Memory)
