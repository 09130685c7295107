"""The server of a study: the model, its optimiser, and one secure sum after the other.

The coordinator is driven from outside and knows neither sockets nor clocks:

    while requests := coordinator.requests():
        for site, reply in engine.exchange(requests):
            coordinator.receive(site, reply)
        coordinator.close_stage()

A site that does not answer, refuses, or sends something wrong is out of the round. A round that loses too many sites
leaves the model as it was.

How sums follow on each other, and what a site that fails means for one, is in `protocols.rounds`.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from fractions import Fraction
from typing import Literal

import msgspec
import torch

from dp import ParticipantPlan, decode_gradient, decode_participants
from protocols.aggregation import Sum, Unprotected
from protocols.fedavg import ServerOptimizer, flatten, load_model_bytes, model_bytes, model_digest, rotation_seed
from protocols.messages import Answer, FinishRequest, Part, Purpose, Request, Work
from protocols.rounds import RoundRecord, Rounds
from protocols.sessions import Sums
from protocols.study import Study
from secagg.errors import DecodeError, RemoteProtocolError, SecAggError
from secagg.keys import Roster
from secagg.masking.params import Subject
from secagg.masking.transcript import Closing, read, verify_head, write
from secagg.wire import Digest, Message, decode, encode


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


class Coordinator(Rounds):
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
        self.sums = Sums(study, roster, features, flatten(model).size)
        super().__init__(self.sums.scheme, self.sums.participants, self.sums.session)
        self.model = model
        self.stopped: str | None = None
        self._study = study
        self._optimizer = ServerOptimizer(model, study.server)
        if study.protocol.aggregation == "plain":
            text = 'aggregation = "plain" protects nothing: the server reads every site\'s update'
            warnings.warn(text, Unprotected, stacklevel=2)
        if study.protocol.keys == "shared":
            text = 'keys = "shared": every site can decrypt the update of any other whose upload it gets hold of'
            warnings.warn(text, Unprotected, stacklevel=2)
        self._purposes: list[Purpose] = ["standardize"] if study.task.standardize == "global" else []
        self._purposes += ["train"] * study.rounds
        self._mean: tuple[float, ...] = ()
        self._std: tuple[float, ...] = ()
        self._failed = 0
        self._signatures: dict[int, bytes] = {}
        self._begin()

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

    def _ask(self) -> dict[str, Request]:
        if self._sum is not None or self._keys is not None:
            return super()._ask()
        finish = Request(finish=FinishRequest(self._work, self._head))
        return {self.participants.name(u): finish for u in self.participants.everyone}

    def _due(self) -> Purpose:
        return self._purposes[0]

    def _subject(self, purpose: Purpose) -> Subject:
        return self.sums.subject(purpose, model_digest(self._work), self._head)

    def _take_finish(self, site: str, part: Part | None) -> None:
        record, number = self.rounds[-1], self.participants.number(site)
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

    def _end(self, record: RoundRecord) -> None:
        record.outcome = "opened"
        self._finished = True
        if self.transcript:
            self.transcript.append(Closing(self._study.digest, self._head, dict(sorted(self._signatures.items()))))

    def _apply(self, record: RoundRecord, result: Sum) -> None:
        """Put an opened sum to its use; the model moves only after every check."""
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
        self._tell(record, result, weight)

    def _opened(self, record: RoundRecord) -> None:
        self._purposes.pop(0)
        self._failed = 0
        self._next()

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
        self._lose(record, error)
        self._failed += 1
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
        self._work = encode(Work(model_bytes(self.model), self._mean, self._std))
        if self._purposes:
            self._begin_sum(self._purposes[0], more=len(self._purposes) > 1)
        else:
            self.rounds.append(RoundRecord(self._number + 1, "finish"))
