"""The server of a study: the model, its optimiser, and one secure sum after the other.

The coordinator is driven from outside and knows neither sockets nor clocks:

    while requests := coordinator.requests():
        for site, reply in engine.exchange(requests):
            coordinator.receive(site, reply)
        coordinator.close_stage()

A site that does not answer, refuses, or sends something wrong is out of the round. A round that loses too many sites
leaves the model as it was.

The keys of the next sum are agreed while a sum is under way, in the same messages. All sites are asked for keys, those
too that are out of the running sum: so a site that was away takes part again. Only the first sum, and one whose keys
too few have agreed on, begins with the stages of the key agreement by themselves.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Literal

import msgspec
import torch
from msgspec import Struct

from dp import ParticipantPlan, decode_gradient, decode_participants
from protocols.aggregation import KeyServer, Staged, Sum, SumServer, Unprotected
from protocols.fedavg import ServerOptimizer, flatten, load_model_bytes, model_bytes, model_digest, rotation_seed
from protocols.messages import (
    Answer,
    FinishRequest,
    KeysRequest,
    Part,
    Purpose,
    Refusal,
    Reply,
    Request,
    SumRequest,
    Work,
)
from protocols.sessions import Sums
from protocols.study import Study
from secagg.errors import DecodeError, RemoteProtocolError, SecAggError
from secagg.keys import Roster
from secagg.masking.transcript import NO_RECORD, Closing, Record, read, verify_head, write
from secagg.wire import Digest, Message, decode, encode

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
    """One sum of the study.

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


class _Checkpoint(Message, frozen=True):
    """All that a server needs to go on after it went down, less what it was told in the sum that was under way."""

    study: Digest
    number: int
    head: Digest
    model: bytes
    optimizer: bytes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    failed: int
    purposes: tuple[Purpose, ...]
    rounds: bytes
    transcript: bytes
    stopped: str | None


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
        sums: What the study fixes about its sums.
        transcript: Records of the opened sums, and at the end the sites' signatures; empty where nothing is signed.
        stopped: Why the study ended before its last round, or None.

    Raises:
        StudyError: Study, roster and model do not belong together.

    Warns:
        Unprotected: The study's sums are plain, or every site has their key.
    """

    def __init__(self, study: Study, roster: Roster, model: torch.nn.Module, features: int) -> None:
        self.model = model
        self.rounds: list[RoundRecord] = []
        self.transcript: list[Record | Closing] = []
        self.stopped: str | None = None
        self._study = study
        self.sums = Sums(study, roster, features, flatten(model).size)
        self._optimizer = ServerOptimizer(model, study.server)
        if study.protocol.aggregation == "plain":
            text = 'aggregation = "plain" protects nothing: the server reads every site\'s update'
            warnings.warn(text, Unprotected, stacklevel=2)
        if study.protocol.keys == "shared":
            text = 'keys = "shared": every site can decrypt the update of any other whose upload it gets hold of'
            warnings.warn(text, Unprotected, stacklevel=2)
        self._purposes: list[Purpose] = ["standardize"] if study.task.standardize == "global" else []
        self._purposes += ["train"] * study.rounds
        self._finished = False
        self._mean: tuple[float, ...] = ()
        self._std: tuple[float, ...] = ()
        self._failed = 0
        self._number = -1  # of the keys that were asked for last
        self._head = NO_RECORD
        self._sum: SumServer | None = None
        self._keys: KeyServer | None = None
        self._without_keys: dict[str, str] = {}  # who is out of the key agreement under way, and why
        self._signatures: dict[int, bytes] = {}
        self._open = _Outgoing({})
        self._heard: set[str] = set()
        self._answered: set[str] = set()
        self._bytes_up = 0
        self._receipts: dict[str, bytes] = {}  # ends of the sites' ledgers, as they came in the last stage
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to ask."""
        return self._finished

    @property
    def standard(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each feature over all sites; empty before they are summed, or where they are not."""
        return self._mean, self._std

    @property
    def purpose(self) -> Purpose | Literal["finish"] | None:
        """Of the sum that is under way or next, or None at the end."""
        return None if self._finished else self.rounds[-1].purpose

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages that sites are asked in."""
        scheme = self.sums.scheme
        return (*(scheme.setup or scheme.ahead.values()), *scheme.stages, "Finish")

    @property
    def stage(self) -> str:
        """Name of the stage that is under way: the sum's, or the key agreement's where that is by itself."""
        if self._sum is not None:
            return self._sum.stage
        return self._keys.stage if self._keys is not None else "Finish"

    def checkpoint(self) -> bytes:
        """All that another coordinator needs to go on from here, after 32 bytes of SHA-256 over it.

        Nothing in it is more secret than the model.
        """
        saved = encode(
            _Checkpoint(
                study=self._study.digest,
                number=self._number,
                head=self._head,
                model=model_bytes(self.model),
                optimizer=self._optimizer.state,
                mean=self._mean,
                std=self._std,
                failed=self._failed,
                purposes=tuple(self._purposes),
                rounds=msgspec.msgpack.encode(self.rounds),
                transcript=write(self.transcript),
                stopped=self.stopped,
            )
        )
        return hashlib.sha256(saved).digest() + saved

    def resume(self, checkpoint: bytes) -> None:
        """Go on from another coordinator's checkpoint, before anything is sent.

        The round that was under way is lost, and if it was one of training, it is not made up for: sites may have
        given their vectors in it, and take part in so many rounds as the study has and no more. The numbers of keys
        that sites may have been asked for already are passed over.

        Raises:
            DecodeError: Not a checkpoint of this study.
        """
        digest, body = checkpoint[:32], checkpoint[32:]
        if hashlib.sha256(body).digest() != digest:
            raise DecodeError("the checkpoint is damaged or cut short: the study must begin again, under another name")
        saved = decode(body, _Checkpoint)
        if saved.study != self._study.digest:
            raise DecodeError(
                f"the checkpoint is of another study (digest {saved.study.hex()[:16]}, this one has "
                f"{self._study.digest.hex()[:16]})"
            )
        try:
            rounds = msgspec.msgpack.decode(saved.rounds, type=list[RoundRecord])
        except msgspec.MsgspecError as error:
            raise DecodeError(f"the checkpoint's rounds: {error}") from error
        load_model_bytes(self.model, saved.model)
        self._optimizer.resume(saved.optimizer)
        self.rounds, self.transcript, self.stopped = rounds, read(saved.transcript), saved.stopped
        self._mean, self._std, self._failed = saved.mean, saved.std, saved.failed
        self._purposes, self._head = list(saved.purposes), saved.head
        self._number = saved.number + 1  # keys for one number more may have been asked for since
        self._sum = self._keys = None
        if rounds and rounds[-1].outcome == "running":
            if rounds[-1].purpose == "finish":
                rounds.pop()
            else:
                rounds[-1].outcome = "failed"
                rounds[-1].faults.append("the server went down in this round")
                if rounds[-1].purpose == "train" and self._purposes:
                    self._purposes.pop(0)
        self._next()

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
        name = self.sums.participants.name
        if self._sum is None and self._keys is None:
            finish = Request(finish=FinishRequest(self._work, self._head))
            return {name(u): finish for u in self.sums.participants.everyone}
        on_sum: dict[int, SumRequest] = {}
        on_keys: dict[int, KeysRequest] = {}
        if self._sum is not None:
            record, stage = self.rounds[-1], self._sum.stage
            work = self._work if stage == self.sums.scheme.stages[0] else None
            digest, purpose = model_digest(self._work), self._purposes[0]
            receipts = tuple(self._receipts.values()) if stage == self.sums.scheme.last else ()
            on_sum = {
                u: SumRequest(record.number, purpose, stage, digest, self._head, body, work, receipts)
                for u, body in self._sum.requests().items()
            }
        if (keys := self._keys_now()) is not None:
            on_keys = {u: KeysRequest(self._number, keys.stage, body) for u, body in keys.requests().items()}
        return {name(u): Request(on_sum.get(u), on_keys.get(u)) for u in sorted(on_sum.keys() | on_keys.keys())}

    def _keys_now(self) -> KeyServer | None:
        """The key agreement, if a stage of it is part of the stage that is under way."""
        by_itself = self._sum is None
        ahead = self.sums.scheme.ahead.get(self.stage)
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
            self._take_signature(site, message.finish)

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
            stage.receive(self.sums.participants.number(site), part.body)
            self._answered.add(site)
        except SecAggError as error:
            out.setdefault(site, f"sent a wrong message at {stage.stage}")
            self._fault(f"{site}: {error}")

    def _take_signature(self, site: str, part: Part | None) -> None:
        record, number = self.rounds[-1], self.sums.participants.number(site)
        if not isinstance(part, Answer):
            record.dropped[site] = f"refused ({part.reason}) at Finish" if part else "sent a wrong message at Finish"
            return
        if self.sums.signed:
            signature, public = bytes(part.body), self.sums.roster.members[number].identity
            if not verify_head(public, signature, self._study.digest, self._head):
                record.dropped[site] = "sent a wrong message at Finish"
                self._fault(f"{site}: did not sign the end of the transcript")
                return
            self._signatures[number] = signature
        self._answered.add(site)

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
            self._purposes.pop(0)
            self._failed = 0
            self._sum = None
            self._next()

    def _end(self, record: RoundRecord) -> None:
        record.outcome = "opened"
        self._finished = True
        if self.transcript:
            self.transcript.append(Closing(self._study.digest, self._head, dict(sorted(self._signatures.items()))))

    def _apply(self, record: RoundRecord, result: Sum) -> None:
        """Put an opened sum to its use; the model moves only after every check."""
        name = self.sums.participants.name
        if record.purpose == "standardize":
            weight = self._take_moments(self.sums.exact.decode(result.total))
        elif (plan := self.sums.distributed) is not None:
            weight, noisy = 0, self.sums.noisy_ring.signed(result.total)
            if isinstance(plan, ParticipantPlan):
                updates = decode_participants(noisy, plan, rotation_seed(model_digest(self._work)))
                self._optimizer.step(updates / len(result.contributors))
            else:
                self._optimizer.step(-decode_gradient(noisy, plan, self._study.privacy.records or 1))
        else:
            weight, mean = self.sums.fixed_point.decode(result.total, error=self._study.protocol.sum_error)
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
        if rows.denominator != 1 or not 2 <= rows <= len(self.sums.roster) * self._study.protocol.max_weight:
            raise RemoteProtocolError(f"the sites' rows add up to {float(rows)}: a site sent sums outside its bounds")
        first, second = sums[1 : half + 1], sums[half + 1 :]
        variances = [(b - a * a / rows) / (rows - 1) for a, b in zip(first, second, strict=True)]
        self._mean = tuple(float(a / rows) for a in first)
        self._std = tuple(math.sqrt(max(0.0, float(v))) for v in variances)
        return int(rows)

    def _fail(self, record: RoundRecord, error: SecAggError) -> None:
        record.outcome = "failed"
        self._fault(str(error))
        self._failed += 1
        self._sum = None
        broke = [site for site, why in record.dropped.items() if why.startswith("refused (budget)")]
        if broke:
            self.stopped = f"the privacy budget of {', '.join(broke)} is spent: {error}"
        elif self._failed >= self._study.protocol.max_failed_rounds:
            self.stopped = f"{self._failed} rounds in a row were lost, the last with: {error}"
        if self.stopped is not None:
            self._purposes.clear()
        elif record.purpose == "train":
            self._purposes.pop(0)
        self._next()

    def _next(self) -> None:
        """Go on to the next sum in line, or to the finish."""
        if not self._purposes:
            self._keys = None
        self._begin()

    def _begin(self) -> None:
        """Begin the next sum if its keys are agreed, else what it takes to agree on them."""
        self._work = encode(Work(model_bytes(self.model), self._mean, self._std))
        if not self._purposes:
            self.rounds.append(RoundRecord(self._number + 1, "finish"))
            return
        if self._keys is None:
            self._agree_ahead()
        if not self.rounds or self.rounds[-1].outcome != "running":
            self.rounds.append(RoundRecord(self._number, self._purposes[0]))
        keys = self._keys
        if keys is None or keys.members is None:
            return
        record, name = self.rounds[-1], self.sums.roster.name
        record.dropped.update({name(u): self._without_keys.get(name(u), "no keys") for u in self._away(keys.members)})
        self._sum = keys.begin(self.sums.subject(self._purposes[0], model_digest(self._work), self._head))
        self._keys = None
        if len(self._purposes) > 1:
            self._agree_ahead()

    def _away(self, members: frozenset[int]) -> list[int]:
        return [u for u in range(len(self.sums.roster)) if u not in members]

    def _agree_ahead(self) -> None:
        """Start to agree on keys under the next number."""
        self._number += 1
        self._without_keys = {}
        self._keys = self.sums.scheme.keys(self.sums.session(self._number))
