"""The server of a study: the model, its optimiser, and one secure sum after the other.

The coordinator is driven from outside and knows neither sockets nor clocks:

    while requests := coordinator.requests():
        for site, reply in engine.exchange(requests):
            coordinator.receive(site, reply)
        coordinator.close_stage()

A site that does not answer, refuses, or sends something wrong is out of the round. A round that loses too many sites
leaves the model as it was.
"""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Literal

import torch
from msgspec import Struct

from protocols.aggregation import Sum, SumServer, Unprotected
from protocols.fedavg import ServerOptimizer, flatten, model_bytes, model_digest
from protocols.messages import Purpose, Refusal, Reply, Request, Work
from protocols.sessions import Sums
from protocols.study import Study
from secagg.errors import RemoteProtocolError, SecAggError
from secagg.keys import Roster
from secagg.wire import decode_any, encode

# Enough to see what goes on; whoever floods the server must not fill its memory.
_MOST_FAULTS = 100


class StageRecord(Struct, frozen=True):
    """One stage of one round, as the server saw it.

    Attributes:
        stage: Its name.
        asked: How many sites were asked.
        answered: How many answers were taken.
        bytes_down: Sent to all sites together.
        bytes_up: Received from all sites together.
        seconds: Wall time, as measured by whoever drives the coordinator.
    """

    stage: str
    asked: int
    answered: int
    bytes_down: int
    bytes_up: int
    seconds: float


class RoundRecord(Struct):
    """One sum of the study.

    Attributes:
        number: Counted over the whole study, from 0.
        purpose: What was summed.
        outcome: "running", "opened" or "failed".
        contributors: Sites in the sum.
        dropped: Sites that are not in it or left before its end, and why.
        faults: Wrong messages, with the sender where one is to blame.
        weight: Sum of the contributors' weights.
        stages: In order.
    """

    number: int
    purpose: Purpose
    outcome: Literal["running", "opened", "failed"] = "running"
    contributors: tuple[str, ...] = ()
    dropped: dict[str, str] = {}
    faults: list[str] = []
    weight: int = 0
    stages: list[StageRecord] = []


class Coordinator:
    """The server's side of a whole study.

    Args:
        study: What is to be done.
        roster: The sites and their keys.
        model: The initial model; stepped in place.
        features: Columns of a row, as the sites have them.

    Attributes:
        model: The current global model.
        rounds: What has happened so far.
        stopped: Why the study ended before its last round, or None.

    Raises:
        StudyError: Study, roster and model do not belong together.

    Warns:
        Unprotected: The study's sums are plain.
    """

    def __init__(self, study: Study, roster: Roster, model: torch.nn.Module, features: int) -> None:
        self.model = model
        self.rounds: list[RoundRecord] = []
        self.stopped: str | None = None
        self._study = study
        self._sums = Sums(study, roster, features, flatten(model).size)
        self._optimizer = ServerOptimizer(model, study.server)
        if study.protocol.aggregation == "plain":
            text = 'aggregation = "plain" protects nothing: the server reads every site\'s update'
            warnings.warn(text, Unprotected, stacklevel=2)
        self._purposes: list[Purpose] = ["standardize"] if study.task.standardize == "global" else []
        self._purposes += ["train"] * study.rounds
        self._purposes.append("finish")
        self._mean: tuple[float, ...] = ()
        self._std: tuple[float, ...] = ()
        self._failed = 0
        self._sum: SumServer | None = None
        self._requests: dict[str, bytes] = {}
        self._answered: set[str] = set()
        self._bytes_up = 0
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to ask."""
        return not self._purposes

    @property
    def purpose(self) -> Purpose | None:
        """Of the sum that is under way, or None at the end."""
        return self._purposes[0] if self._purposes else None

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages that sites are asked in."""
        return (*self._sums.scheme.stages, "Finish")

    @property
    def stage(self) -> str:
        """Name of the stage that is under way."""
        return self._sum.stage if self._sum is not None else "Finish"

    def requests(self) -> dict[str, bytes]:
        """What to send to which site in this stage; empty when the study is done."""
        if self.finished:
            return {}
        if self._requests:
            return dict(self._requests)  # asked again within the stage: the same, and what has come is kept
        roster, work = self._sums.roster, None
        bodies = dict.fromkeys(range(len(roster)), b"")
        if self._sum is not None:
            bodies = self._sum.requests()
        if self._sum is None or self.stage == self._sums.scheme.contributes_at:
            work = self._work
        requests = {
            roster.name(u): encode(
                Request(self._number, self._purposes[0], self.stage, model_digest(self._work), body, work)
            )
            for u, body in bodies.items()
        }
        self._requests = requests
        self._answered, self._bytes_up = set(), 0
        return dict(requests)

    def receive(self, site: str, reply: bytes) -> None:
        """Take a site's answer to this stage's request. What is wrong with it is recorded, and the site is out.

        Args:
            site: Who sent it, by the transport's word.
            reply: An encoded `Answer` or `Refusal`.
        """
        record = self.rounds[-1]
        if site not in self._requests or site in self._answered or site in record.dropped:
            if len(record.faults) < _MOST_FAULTS:
                record.faults.append(f"{site}: answered unasked, late or twice; ignored")
            return
        self._bytes_up += len(reply)
        try:
            message: Reply = decode_any(reply, Reply)  # type: ignore[assignment]
            if isinstance(message, Refusal):
                record.dropped[site] = f"refused ({message.reason}) at {self.stage}"
                return
            if self._sum is not None:
                self._sum.receive(self._sums.roster.number(site), message.body)
        except SecAggError as error:
            record.dropped[site] = f"sent a wrong message at {self.stage}"
            record.faults.append(f"{site}: {error}")
            return
        self._answered.add(site)

    def close_stage(self, seconds: float = 0.0) -> None:
        """End the stage: whoever has not answered has dropped out.

        Args:
            seconds: How long the stage took, for the record.
        """
        record = self.rounds[-1]
        record.stages.append(
            StageRecord(
                stage=self.stage,
                asked=len(self._requests),
                answered=len(self._answered),
                bytes_down=sum(map(len, self._requests.values())),
                bytes_up=self._bytes_up,
                seconds=seconds,
            )
        )
        for site in self._requests:
            if site not in self._answered:
                record.dropped.setdefault(site, f"no answer at {self.stage}")
        self._requests = {}
        if self._sum is None:
            record.outcome = "opened"
            self._purposes.clear()
            return
        try:
            self._sum.close()
            result = self._sum.result
            if result is not None:
                self._apply(record, result)
        except SecAggError as error:
            self._fail(record, error)
        else:
            if result is not None:
                self._purposes.pop(0)
                self._failed = 0
                self._begin()

    def _apply(self, record: RoundRecord, result: Sum) -> None:
        """Put an opened sum to its use; the model moves only after every check."""
        name = self._sums.roster.name
        if record.purpose == "standardize":
            weight = self._take_moments(self._sums.exact.decode(result.total))
        else:
            weight, mean = self._sums.fixed_point.decode(result.total)
            self._optimizer.step(mean)
        record.outcome, record.weight = "opened", weight
        record.contributors = tuple(name(u) for u in sorted(result.contributors))
        record.faults += [
            f"{name(u)}: its shares of another's secret do not fit the rest: it lied, or was given such shares"
            for u in sorted(result.suspects)
        ]

    def _take_moments(self, sums: list[Fraction]) -> int:
        """Means and deviations (divisor n - 1) from the sums of rows, features and their squares; gives the rows."""
        rows, half = sums[0], len(sums) // 2
        if rows.denominator != 1 or not 2 <= rows <= len(self._sums.roster) * self._study.protocol.max_weight:
            raise RemoteProtocolError(f"the sites' rows add up to {float(rows)}: a site sent sums outside its bounds")
        first, second = sums[1 : half + 1], sums[half + 1 :]
        variances = [(b - a * a / rows) / (rows - 1) for a, b in zip(first, second, strict=True)]
        self._mean = tuple(float(a / rows) for a in first)
        self._std = tuple(math.sqrt(max(0.0, float(v))) for v in variances)
        return int(rows)

    def _fail(self, record: RoundRecord, error: SecAggError) -> None:
        record.outcome = "failed"
        record.faults.append(str(error))
        self._failed += 1
        broke = [site for site, why in record.dropped.items() if why.startswith("refused (budget)")]
        if broke:
            self.stopped = f"the privacy budget of {', '.join(broke)} is spent: {error}"
        elif self._failed >= self._study.protocol.max_failed_rounds:
            self.stopped = f"{self._failed} rounds in a row were lost, the last with: {error}"
        if self.stopped is not None:
            self._purposes[:-1] = []
        elif record.purpose == "train":
            self._purposes.pop(0)
        self._begin()

    def _begin(self) -> None:
        """Start on the next purpose in line."""
        purpose = self._purposes[0]
        self._number = len(self.rounds)
        self._work = encode(Work(model_bytes(self.model), self._mean, self._std))
        self.rounds.append(RoundRecord(self._number, purpose))
        self._sum = None
        if purpose != "finish":
            session = self._sums.session(self._number, purpose, model_digest(self._work))
            self._sum = self._sums.scheme.server(session)
