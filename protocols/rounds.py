"""A server's side of one secure sum after the other: stages, answers, drop-outs, and keys agreed ahead.

It is driven from outside and knows neither sockets nor clocks:

    while requests := rounds.requests():
        for site, reply in engine.exchange(requests):
            rounds.receive(site, reply)
        rounds.close_stage()

A site that does not answer, refuses, or sends something wrong is out of the sum. What is summed, and what becomes of
it, is a subclass's affair: a study's (`protocols.coordinator`), or the app of somebody else's (`protocols.app_server`).

The keys of the next sum are agreed while a sum is under way, in the same messages. All sites are asked for keys, those
too that are out of the running sum: so a site that was away takes part again. Only the first sum, and one whose keys
too few have agreed on, begins with the stages of the key agreement by themselves.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeVar

from msgspec import Struct

from protocols.aggregation import KeyServer, Scheme, Staged, Sum, SumServer
from protocols.engines import Engine
from protocols.messages import KeysRequest, Part, Purpose, Refusal, Reply, Request, SumRequest
from protocols.sessions import Participants
from secagg.errors import DecodeError, RemoteProtocolError, SecAggError
from secagg.masking.params import Session, Subject
from secagg.masking.transcript import NO_RECORD, Closing, Record
from secagg.wire import decode, encode

R = TypeVar("R", bound="Rounds")
# Enough to see what goes on; whoever floods the server must not fill its memory.
_MOST_FAULTS = 100


class StageRecord(Struct, frozen=True):
    """One stage of one round, as the server saw it.

    Attributes:
        stage: Its name.
        asked: How many sites were asked.
        answered: How many answers were taken.
        bytes_down: Sent to all sites together, what is for the next round's keys included.
        bytes_up: Received from all sites together, likewise.
        seconds: Wall time, as measured by whoever drives the coordinator.
    """

    stage: str
    asked: int
    answered: int
    bytes_down: int
    bytes_up: int
    seconds: float


class RoundRecord(Struct):
    """One sum.

    Attributes:
        number: Of the sum. Numbers ascend; one whose keys too few have agreed on ahead is passed over.
        purpose: What was summed, or "finish".
        outcome: "running", "opened" or "failed".
        contributors: Sites in the sum.
        dropped: Sites that are not in it or left before its end, and why.
        faults: Wrong messages, with the sender where one is to blame.
        weight: Sum of the contributors' weights; 0 where there are none.
        stages: In order.
    """

    number: int
    purpose: Purpose | Literal["finish"]
    outcome: Literal["running", "opened", "failed"] = "running"
    contributors: tuple[str, ...] = ()
    dropped: dict[str, str] = {}
    faults: list[str] = []
    weight: int = 0
    stages: list[StageRecord] = []


class _Outgoing(Mapping[str, bytes]):
    """One stage's requests, encoded when they are looked up; `sent` has the bytes of those that were."""

    def __init__(self, messages: dict[str, Request]) -> None:
        self.messages = messages
        self.sent: dict[str, int] = {}

    def __getitem__(self, site: str) -> bytes:
        encoded = encode(self.messages[site])
        self.sent[site] = len(encoded)
        return encoded

    def __iter__(self) -> Iterator[str]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)


class Rounds(ABC):
    """The server's side of a series of secure sums.

    Args:
        scheme: How vectors are summed.
        participants: Names and numbers of all who are asked.
        session: What the keys of the sum of a number are agreed for.
        first: Number of the first sum.

    Attributes:
        participants: As given.
        rounds: What has happened so far.
        transcript: Records of the opened sums; empty where nothing is signed.
    """

    def __init__(
        self, scheme: Scheme, participants: Participants, session: Callable[[int], Session], *, first: int = 0
    ) -> None:
        self.participants = participants
        self.rounds: list[RoundRecord] = []
        self.transcript: list[Record | Closing] = []
        self._scheme, self._session = scheme, session
        self._finished = False
        self._number = first - 1  # of the keys that were asked for last
        self._head = NO_RECORD
        self._work = b""
        self._among: frozenset[int] | None = None  # who is asked for a vector; None for all
        self._sum: SumServer | None = None
        self._keys: KeyServer | None = None
        self._without_keys: dict[str, str] = {}  # who is out of the key agreement under way, and why
        self._open = _Outgoing({})
        self._heard: set[str] = set()
        self._answered: set[str] = set()
        self._bytes_up = 0
        self._receipts: dict[str, bytes] = {}  # ends of the sites' ledgers, as they came in the last stage

    @abstractmethod
    def _due(self) -> Purpose:
        """Of the sum that is under way or next."""

    @abstractmethod
    def _subject(self, purpose: Purpose) -> Subject:
        """What the next sum is of."""

    @abstractmethod
    def _begin(self) -> None:
        """Begin the next sum if its keys are agreed, else what it takes to agree on them: see `_begin_sum`."""

    @abstractmethod
    def _apply(self, record: RoundRecord, result: Sum) -> None:
        """Put an opened sum to its use; raises `SecAggError` where it is of none."""

    @abstractmethod
    def _opened(self, record: RoundRecord) -> None:
        """A sum is over and was of use."""

    @abstractmethod
    def _fail(self, record: RoundRecord, error: SecAggError) -> None:
        """A sum, or the agreement on its keys, is lost."""

    def _end(self, record: RoundRecord) -> None:  # noqa: B027 - not every series has an end
        """The stage that is closed was the end."""

    def _take_finish(self, site: str, part: Part | None) -> None:
        """Take a site's part of the end."""
        self._fault(f"{site}: answered to an end that there is none of")

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to ask."""
        return self._finished

    @property
    def stage(self) -> str:
        """Name of the stage that is under way: the sum's, or the key agreement's where that is by itself."""
        if self._sum is not None:
            return self._sum.stage
        return self._keys.stage if self._keys is not None else "Finish"

    def requests(self) -> Mapping[str, bytes]:
        """What to send to which site in this stage; empty when the study is done.

        Each is encoded when it is looked up, so that the model is not in memory once for each site.
        """
        if not self._finished and not self._open:  # asked again within the stage: the same, and what has come is kept
            self._open = _Outgoing(self._ask())
            self._heard, self._answered, self._bytes_up = set(), set(), 0
            self._receipts = {}
        return self._open

    def _ask(self) -> dict[str, Request]:
        name = self.participants.name
        on_sum: dict[int, SumRequest] = {}
        on_keys: dict[int, KeysRequest] = {}
        if self._sum is not None:
            record, stage = self.rounds[-1], self._sum.stage
            work = self._work if stage == self._scheme.stages[0] else None
            digest, purpose = hashlib.sha256(self._work).digest(), self._due()
            receipts = tuple(self._receipts.values()) if stage == self._scheme.last else ()
            on_sum = {
                u: SumRequest(record.number, purpose, stage, digest, self._head, body, work, receipts)
                for u, body in self._sum.requests().items()
                if self._among is None or u in self._among
            }
        if (keys := self._keys_now()) is not None:
            on_keys = {u: KeysRequest(self._number, keys.stage, body) for u, body in keys.requests().items()}
        return {name(u): Request(on_sum.get(u), on_keys.get(u)) for u in sorted(on_sum.keys() | on_keys.keys())}

    def _keys_now(self) -> KeyServer | None:
        """The key agreement, if a stage of it is part of the stage that is under way."""
        by_itself = self._sum is None
        ahead = self._scheme.ahead.get(self.stage)
        return self._keys if self._keys is not None and (by_itself or ahead == self._keys.stage) else None

    def receive(self, site: str, reply: bytes) -> None:
        """Take a site's answer to this stage's request. What is wrong with it is recorded, and the site is out.

        Args:
            site: Who sent it, by the transport's word.
            reply: An encoded `Reply`.
        """
        request = self._open.messages.get(site)
        if request is None or site in self._heard:
            self._fault(f"{site}: answered unasked, late or twice; ignored")
            return
        self._heard.add(site)
        self._bytes_up += len(reply)
        try:
            message = decode(reply, Reply)
        except DecodeError as error:
            self._fault(f"{site}: {error}")
            for part, out in ((request.sum, self.rounds[-1].dropped), (request.keys, self._without_keys)):
                if part is not None:
                    out.setdefault(site, f"sent a wrong message at {part.stage}")
            if request.finish is not None:
                self.rounds[-1].dropped[site] = "sent a wrong message at Finish"
            return
        if message.receipt:
            self._receipts[site] = message.receipt
        if request.sum is not None:
            self._take(site, self._sum, message.sum, self.rounds[-1].dropped)
        if request.keys is not None:
            self._take(site, self._keys, message.keys, self._without_keys)
        if request.finish is not None:
            self._take_finish(site, message.finish)

    def _take(self, site: str, stage: Staged | None, part: Part | None, out: dict[str, str]) -> None:
        """Hand a part of a reply to the sum or the key agreement it belongs to; who fails there is out of it."""
        if stage is None:
            return
        if isinstance(part, Refusal):
            out.setdefault(site, f"refused ({part.reason}) at {stage.stage}")
            return
        try:
            if part is None:
                raise RemoteProtocolError(f"{site} sent nothing for stage {stage.stage}", [site])
            stage.receive(self.participants.number(site), part.body)
            self._answered.add(site)
        except SecAggError as error:
            out.setdefault(site, f"sent a wrong message at {stage.stage}")
            self._fault(f"{site}: {error}")

    def _fault(self, text: str) -> None:
        faults = self.rounds[-1].faults
        if len(faults) < _MOST_FAULTS:
            faults.append(text)

    def close_stage(self, seconds: float = 0.0) -> None:
        """End the stage: whoever has not answered has dropped out.

        Args:
            seconds: How long the stage took, for the record.
        """
        if self._finished:
            return
        record, keys = self.rounds[-1], self._keys_now()
        asked, silent = self._open.messages, self._open.keys() - self._heard
        record.stages.append(
            StageRecord(
                stage=self.stage,
                asked=len(self._open),
                answered=len(self._answered),
                bytes_down=sum(self._open.sent.values()),
                bytes_up=self._bytes_up,
                seconds=seconds,
            )
        )
        for site in (site for site in asked if site in silent):
            if keys is not None and asked[site].keys is not None:
                self._without_keys.setdefault(site, f"no answer at {keys.stage}")
            if asked[site].sum is not None or asked[site].finish is not None:
                record.dropped.setdefault(site, f"no answer at {self.stage}")
        self._open = _Outgoing({})
        if self._sum is None and self._keys is None:
            self._end(record)
            return
        lost = self._close_keys(keys)
        if self._sum is not None:
            self._close_sum(record, self._sum)
        elif lost is not None:
            record.dropped.update(self._without_keys)
            self._fail(record, lost)
        else:
            self._begin()

    def _close_keys(self, keys: KeyServer | None) -> SecAggError | None:
        """End a stage of the key agreement; if too few are left, the next sum must agree on keys by itself."""
        if keys is None:
            return None
        try:
            keys.close()
        except SecAggError as error:
            self._keys = None
            return error
        return None

    def _close_sum(self, record: RoundRecord, running: SumServer) -> None:
        try:
            running.close()
            result = running.result
            if result is not None:
                if result.record is not None:  # of every opened sum, whether it is of any use or not
                    self.transcript.append(result.record)
                    self._head = result.record.digest
                self._apply(record, result)
        except SecAggError as error:
            self._fail(record, error)
            return
        if result is not None:
            self._sum = None
            self._opened(record)

    def _begin_sum(self, purpose: Purpose, *, more: bool) -> None:
        """Begin a sum over `_work` if its keys are agreed, else what it takes to agree on them.

        Args:
            purpose: What is summed.
            more: Whether to agree meanwhile on the keys of another sum after it.
        """
        if self._keys is None:
            self._agree_ahead()
        if not self.rounds or self.rounds[-1].outcome != "running":
            self.rounds.append(RoundRecord(self._number, purpose))
        keys = self._keys
        if keys is None or keys.members is None:
            return
        record, name = self.rounds[-1], self.participants.roster.name
        record.dropped.update({name(u): self._without_keys.get(name(u), "no keys") for u in self._away(keys.members)})
        self._sum = keys.begin(self._subject(purpose))
        self._keys = None
        if more:
            self._agree_ahead()

    def _tell(self, record: RoundRecord, result: Sum, weight: int) -> None:
        """Write down what an opened sum is of."""
        name = self.participants.name
        record.outcome, record.weight = "opened", weight
        record.contributors = tuple(name(u) for u in sorted(result.contributors))
        record.faults += [
            f"{name(u)}: its shares of another's secret do not fit the rest: it lied, or was given such shares"
            for u in sorted(result.suspects)
        ]

    def _lose(self, record: RoundRecord, error: SecAggError) -> None:
        """The sum under way is no more; the keys for the next one stay."""
        record.outcome = "failed"
        self._fault(str(error))
        self._sum = None

    def _away(self, members: frozenset[int]) -> list[int]:
        return [u for u in range(len(self.participants.roster)) if u not in members]

    def _agree_ahead(self) -> None:
        """Start to agree on keys under the next number."""
        self._number += 1
        self._without_keys = {}
        self._keys = self._scheme.keys(self._session(self._number))


def drive(rounds: R, engine: Engine, listener: Callable[[R], None] | None = None) -> None:
    """Carry stages over an engine, timing each, until there is nothing left to ask.

    Args:
        rounds: The server's side.
        engine: Carries the messages.
        listener: Called after every stage.
    """
    while requests := rounds.requests():
        start = time.perf_counter()
        for site, reply in engine.exchange(requests):
            rounds.receive(site, reply)
        rounds.close_stage(time.perf_counter() - start)
        if listener is not None:
            listener(rounds)
