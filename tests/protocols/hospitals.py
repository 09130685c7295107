"""Made-up hospitals and studies over them, small enough for the everyday suite."""

import hashlib
import warnings

import msgspec
import numpy as np
import torch
from typer.testing import CliRunner

from protocols.aggregation import Unprotected
from protocols.cli import app
from protocols.coordinator import Coordinator
from protocols.datasets import SiteData
from protocols.engines.faulty import Faulty
from protocols.engines.in_process import InProcess
from protocols.fedavg import build_model
from protocols.messages import Answer, Reply, Request
from protocols.policy import PERMISSIVE
from protocols.run import drive
from protocols.site import Site
from protocols.study import Study
from secagg.keys import Identity, Roster
from secagg.prg import deterministic_entropy
from secagg.wire import decode, encode

SITES = ("ash", "birch", "cedar", "dogwood")
FEATURES = ("age", "dose", "pulse")
STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")
PRIVATE = {"mechanism": "local-sgd", "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.5}


def table(sites=SITES, **changes):
    """A study's tables as plain values; a dict among the changes is merged into its table."""
    base = {
        "name": "tiny",
        "rounds": 1,
        "sites": [{"name": site} if isinstance(site, str) else site for site in sites],
        "task": {"data": "csv", "features": list(FEATURES), "target": "ill"},
        "training": {"local_steps": 2, "learning_rate": 0.5},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def study(sites=SITES, **changes):
    return msgspec.convert(table(sites, **changes), Study)


def fedsgd(sites=SITES, *, learning_rate=0.5, **changes):
    """A study of one gradient a round, whose outcome is easy to compute from the rows put together."""
    changes = {"server": {"learning_rate": learning_rate}, **changes}
    built = table(sites, **changes)
    built["training"] = {"algorithm": "fedsgd", **changes.get("training", {})}
    return msgspec.convert(built, Study)


def hospital(name, *, rows=12, seed=0, scale=1.0):
    """A hospital's rows: both classes in both parts, the features near 0 and of spread about `scale`."""
    rng = np.random.default_rng([seed, *name.encode()])
    x = scale * rng.normal(size=(rows + 6, len(FEATURES)))
    y = np.arange(rows + 6) % 2
    return SiteData(name, FEATURES, x[:rows], y[:rows], x[rows:], y[rows:])


def hospitals(sites=SITES, seed=0):
    """Every site's rows; no two sites have equally many."""
    return {name: hospital(name, rows=8 + 3 * i, seed=seed) for i, name in enumerate(sites)}


def command(*arguments):
    """What a sub-command of `secagg` did; anything but a proper end is a failure here."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeeded(*arguments):
    """What a sub-command printed that went well and had nothing to complain of."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def write_csv(path, data):
    """A hospital's rows as its own table, with the class in the column `ill`."""
    lines = [",".join((*data.features, "ill"))]
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        lines += [",".join([*(f"{v:.6f}" for v in row), f"{int(label)}"]) for row, label in zip(x, y, strict=True)]
    path.write_text("\n".join(lines) + "\n")


class World:
    """A study under way: its sites, its coordinator, and the engine between them.

    All sites have one clock, `now`, which stands still unless a test moves it.
    """

    def __init__(self, study, data=None, *, own_study=None, seed=b"world", policy=PERMISSIVE):
        self.study, self.policy, self.now = study, policy, 1000.0
        self.data = data or hospitals(study.site_names)
        entropy = deterministic_entropy(seed)
        self.identities = {name: Identity.generate(entropy) for name in study.site_names}
        self.roster = Roster.of({name: identity.public for name, identity in self.identities.items()})
        self.entropy = {name: deterministic_entropy(seed + name.encode()) for name in study.site_names}
        self.sites = {name: self.site(name, (own_study or {}).get(name, study)) for name in study.site_names}
        self.engine = InProcess(self.sites.values())
        self.coordinator = self.another_coordinator()

    def site(self, name, study=None, data=None, policy=None):
        return Site(
            study or self.study,
            name,
            self.identities[name],
            self.roster,
            data or self.data[name],
            policy=policy or self.policy,
            entropy=self.entropy[name],
            clock=lambda: self.now,
        )

    def restart(self, name):
        """A new process: only the state is left."""
        self.sites[name] = self.engine.sites[name] = self.site(name)

    def another_coordinator(self, study=None):
        study = study or self.study
        columns = len(next(iter(self.data.values())).features)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Unprotected)
            return Coordinator(study, self.roster, build_model(study, columns), columns)

    @property
    def states(self):
        return self.engine.states

    @property
    def model(self):
        return self.coordinator.model

    @property
    def rounds(self):
        return self.coordinator.rounds

    def run(self, *faults):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Unprotected)
            drive(self.coordinator, Faulty(self.engine, faults))
        return self

    def stage(self, lost=()):
        """Carry one stage; the replies of `lost` do not arrive."""
        for name, reply in self.engine.exchange(self.coordinator.requests()):
            if name not in lost:
                self.coordinator.receive(name, reply)
        self.coordinator.close_stage()

    def until(self, stage, number=0):
        """Carry stages until one asks for that stage, of the sum or of the keys of that number; gives its requests."""
        while not self.coordinator.finished:
            requests = dict(self.coordinator.requests())
            if any((stage, number) in asked(request) for request in requests.values()):
                return requests
            self.stage()
        raise AssertionError(f"the study ended before {stage} of round {number}")

    def ask(self, name, request):
        """Let a site handle a request; its state moves on."""
        reply, self.states[name] = self.sites[name].handle(request, self.states[name])
        return reply


class Tampering:
    """An engine whose replies one function may change on their way: `change(name, request, reply)`, both decoded."""

    def __init__(self, engine, change):
        self.engine, self.change = engine, change
        self.sites, self.states = engine.sites, engine.states

    def exchange(self, requests):
        for name, reply in self.engine.exchange(requests):
            yield name, encode(self.change(name, decode(requests[name], Request), decode(reply, Reply)))


def spoilt(reply, part):
    """A reply with the last bit of one part's message flipped."""
    body = bytearray(getattr(reply, part).body)
    body[-1] ^= 1
    return msgspec.structs.replace(reply, **{part: Answer(memoryview(body))})


def part_at(stage):
    """Whose stage it is: the key agreement's or the sum's."""
    return "keys" if stage in STAGES[:2] else "sum"


def other_part(message, part, **changes):
    """A request or reply of which one part is another."""
    return msgspec.structs.replace(message, **{part: msgspec.structs.replace(getattr(message, part), **changes)})


def changed(request, part, **changes):
    """An encoded request of which one part is another."""
    return encode(other_part(decode(request, Request), part, **changes))


def with_work(request, work):
    """A request about another model, with the digest that goes with it."""
    return changed(request, "sum", work=work, work_digest=hashlib.sha256(work).digest())


def asked(request):
    """The (stage, number) of a request's parts."""
    message = decode(request, Request)
    return [(part.stage, part.round) for part in (message.sum, message.keys) if part is not None]


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().astype(np.float64)


def pooled_gradient(model, sites, weights=None):
    """The weighted mean of the sites' mean gradients: with the row counts as weights, that of all rows together."""
    weights = weights or {site.site: site.train_rows for site in sites}
    total = 0.0
    for site in sites:
        x, y = torch.tensor(site.train_x), torch.tensor(site.train_y)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x).reshape(-1), y)
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        total = total + weights[site.site] * gradient.double().numpy()
    return total / sum(weights.values())


def normed(features):
    """A factory for `model.kind = "factory"`: a network with BatchNorm statistics."""
    return torch.nn.Sequential(torch.nn.Linear(features, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))


def explosive(features):
    """A factory: fine when it is judged, NaN when it is trained."""

    class Explosive(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * (float("nan") if self.training else 1.0)

    return Explosive(features, 1)


def breaking(features):
    """A factory: torch itself raises when it is trained."""

    class Breaking(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x[:, :1] if self.training else x)

    return Breaking(features, 1)
