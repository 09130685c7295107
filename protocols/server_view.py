"""What the server of a study receives, recorded in a real run and tested: `secagg doctor --server-view`.

The tests know what the server does not, each site's true vector, and look for any trace of it. A test that finds
nothing proves nothing; one that finds something has found a mask that hides less than it should. Each alarm is false
with a stated chance.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
from msgspec import Struct
from scipy.special import chdtrc, erfc

from protocols.aggregation import Unprotected
from protocols.coordinator import Coordinator
from protocols.doctor import Check
from protocols.engines.in_process import InProcess
from protocols.fedavg import build_model
from protocols.memory import Memory
from protocols.messages import Answer, Part, Reply, Request, SumRequest
from protocols.policy import PERMISSIVE
from protocols.rounds import drive
from protocols.run import load_data
from protocols.site import Site
from protocols.study import Study, demo_study
from secagg.errors import DecodeError
from secagg.keys import SIGNATURE_BYTES, Identity, Roster
from secagg.masking import messages
from secagg.prg import Entropy
from secagg.ring import Ring, RingVector
from secagg.wire import Message, decode

FALSE_ALARM = 1e-6
"""Chance that a check fails on masks that are perfect."""

_BUCKETS = 256
_MESSAGES: Mapping[str, type[Message]] = {
    "AdvertiseKeys": messages.Advertisement,
    "ShareKeys": messages.EncryptedShares,
    "MaskedInput": messages.MaskedInput,
    "ConsistencyCheck": messages.Confirmation,
    "Unmask": messages.UnmaskShares,
}


class Seen(Struct, frozen=True):
    """One vector as the server got it, beside what it hides.

    Attributes:
        site: Whose.
        round: In which round.
        received: What came, over the ring, shape [dimension].
        truth: The site's true vector over the ring; the first entry is its weight.
    """

    site: str
    round: int
    received: RingVector
    truth: RingVector


class View(Struct, frozen=True):
    """Everything that the server received in a study.

    Attributes:
        ring: Of the sums.
        vectors: All masked vectors.
        replies: (stage, part) of everything in every message.
    """

    ring: Ring
    vectors: list[Seen]
    replies: list[tuple[str, Part | None]]


def viewing_study() -> Study:
    """The demo's four hospitals with a network large enough for the statistics, three rounds, without privacy noise."""
    text = {"kind": "mlp", "hidden": (128,)}
    table = msgspec.to_builtins(demo_study()) | {"rounds": 3, "model": text, "privacy": {}}
    return msgspec.convert(table, Study)


def record(study: Study, entropy: Entropy = os.urandom) -> View:
    """Run a study with all its sites in this process and keep what the server receives.

    Args:
        study: Its data must ship with the package.
        entropy: Source of keys, masks and rounding.
    """
    data = load_data(study)
    identities = {name: Identity.generate(entropy) for name in study.site_names}
    roster = Roster.of({name: identity.public for name, identity in identities.items()})
    columns = len(next(iter(data.values())).features)
    sites = [
        _Witness(study, name, identities[name], roster, data[name], policy=PERMISSIVE, entropy=entropy)
        for name in study.site_names
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unprotected)
        coordinator = Coordinator(study, roster, build_model(study, columns), columns)
    engine = _Recording(sites, study.fixed_point.ring)
    drive(coordinator, engine)
    return View(engine.ring, engine.vectors, engine.replies)


def examine(view: View) -> list[Check]:
    """Look for traces of the sites' vectors in what the server received.

    Returns:
        Checks named `server view: ...`; each is false on perfect masks with a chance of at most `FALSE_ALARM`.
    """
    return [_only_messages(view), _uniform(view), _uncorrelated(view), _unrepeated(view), _weights_hidden(view)]


class _Witness(Site):
    """A site that keeps its last true vector, to compare with what the server got."""

    vector: RingVector | None = None

    def _contribute(self, message: SumRequest, memory: Memory, entropy: Entropy) -> tuple[RingVector, int]:
        vector, steps = super()._contribute(message, memory, entropy)
        self.vector = vector.copy()
        return vector, steps


class _Recording:
    """An engine that keeps all replies, and the vectors in them."""

    def __init__(self, sites: list[_Witness], ring: Ring) -> None:
        self._engine, self._witnesses = InProcess(sites), {site.name: site for site in sites}
        self.ring = ring
        self.vectors: list[Seen] = []
        self.replies: list[tuple[str, Part | None]] = []

    def exchange(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        for name, encoded in self._engine.exchange(requests):
            request, reply = decode(requests[name], Request), decode(encoded, Reply)
            asked = [
                (part.stage, told) for part, told in ((request.sum, reply.sum), (request.keys, reply.keys)) if part
            ]
            self.replies += asked if request.finish is None else [("Finish", reply.finish)]
            truth = self._witnesses[name].vector
            training = request.sum is not None and request.sum.work is not None and request.sum.purpose == "train"
            if request.sum is not None and training and truth is not None and isinstance(reply.sum, Answer):
                packed = decode(reply.sum.body, messages.MaskedInput).packed
                self.vectors.append(Seen(name, request.sum.round, self.ring.unpack(packed, truth.size), truth))
            yield name, encoded


def _only_messages(view: View) -> Check:
    name = "server view: nothing but the protocol's messages"
    for stage, reply in view.replies:
        body = reply.body if isinstance(reply, Answer) else b""
        if stage == "Finish" and len(body) in (0, SIGNATURE_BYTES):
            continue
        try:
            decode(body, _MESSAGES[stage])
        except (DecodeError, KeyError) as error:
            return Check(name, False, f"a reply at {stage} is none of the masked protocol's messages: {error!r}")
    return Check(
        name, True, f"{len(view.replies)} replies hold keys, sealed shares, masked vectors, signatures, shares"
    )


def _uniform(view: View) -> Check:
    chances = [p for seen in view.vectors for p in _chances_of_uniform(view.ring, seen.received)]
    return _verdict("masked vectors are uniform over the ring", chances, "chi-square of the top and the low 8 bits")


def _uncorrelated(view: View) -> Check:
    chances = []
    for seen in view.vectors:
        masked = view.ring.signed(seen.received[1:]).astype(np.float64)
        true = view.ring.signed(seen.truth[1:]).astype(np.float64)
        if masked.std() == 0.0 or true.std() == 0.0:
            continue
        r = float(np.corrcoef(masked, true)[0, 1])
        chances.append(float(erfc(abs(r) * math.sqrt(masked.size / 2))))
    return _verdict("no correlation with the true update", chances, "Pearson's r")


def _unrepeated(view: View) -> Check:
    pairs = itertools.combinations(view.vectors, 2)
    chances = [
        p
        for a, b in pairs
        if a.received.size == b.received.size
        for p in _chances_of_uniform(view.ring, view.ring.reduce(a.received - b.received))
    ]
    return _verdict("no mask comes twice", chances, "differences of all pairs of vectors are uniform")


def _weights_hidden(view: View) -> Check:
    name = "server view: no weight in the clear"
    shown = [seen for seen in view.vectors if seen.received[0] == seen.truth[0]]
    if shown:
        seen = shown[0]
        return Check(name, False, f"{seen.site} shows its weight {int(seen.truth[0])} in round {seen.round}")
    return Check(name, True, f"{len(view.vectors)} weights are masked like the rest")


def _chances_of_uniform(ring: Ring, vector: RingVector) -> list[float]:
    """Chance of a chi-square at least this large from uniform values, for the top 8 bits and the low 8 bits."""
    top = vector >> vector.dtype.type(max(0, ring.bits - 8))
    return [_chi_square(part) for part in (top, vector & vector.dtype.type(255))]


def _chi_square(values: RingVector) -> float:
    counts = np.bincount(values.astype(np.int64), minlength=_BUCKETS)
    expected = values.size / _BUCKETS
    return float(chdtrc(_BUCKETS - 1, ((counts - expected) ** 2 / expected).sum()))


def _verdict(what: str, chances: list[float], how: str) -> Check:
    name = f"server view: {what}"
    if not chances:
        return Check(name, False, "no vector came that could be tested")
    bound, least = FALSE_ALARM / len(chances), min(chances)
    told = f"{len(chances)} tests ({how}), least chance {least:.2g}, alarm below {bound:.2g}"
    return Check(name, least >= bound, told)
