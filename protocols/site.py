"""A hospital in a study: its rows, its training, its keys and its privacy budget. Bytes in, bytes out.

`Site.handle` answers one request of the coordinator. All that must survive between two messages is in the state bytes
that it takes and gives; what the site keeps for its own eyes (why it refused, how the model does on its test rows) is
in `log` and `evaluations` and never leaves.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct

from dp import (
    Budget,
    DpError,
    Mechanism,
    PoissonSampledGaussian,
    Spent,
    coalesce,
    spent,
)
from dp.distributed import DistributedSgdPlan, ParticipantPlan, participant_contribution
from dp.errors import LedgerError
from dp.ledger import Ledger, Receipt
from dp.sgd import DpSgdPlan
from protocols.datasets import SiteData, heart_reference, require_both_classes
from protocols.errors import DataError, StudyError
from protocols.fedavg import (
    build_model,
    distributed_contribution,
    entry_count,
    evaluate,
    gradient_update,
    load_model_bytes,
    local_plan,
    local_update,
    private_update,
    rotation_seed,
    training_device,
)
from protocols.memory import Memory, remember
from protocols.messages import FinishRequest, SumRequest, Work
from protocols.metrics import Metrics
from protocols.participant import Participant
from protocols.policy import Policy
from protocols.sessions import Sums
from protocols.study import Study
from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.keys import Identity, Roster
from secagg.masking.params import Session, Subject
from secagg.masking.transcript import sign_head
from secagg.prg import Entropy, Label, Stream, derive
from secagg.ring import RingVector
from secagg.wire import decode


class Evaluation(Struct, frozen=True):
    """How a model did on the site's test rows: the one sent for `round`, or the finished one (None)."""

    round: int | None
    metrics: Metrics


class Site(Participant):
    """One participant of a study.

    Args:
        study: The site's own copy; what the server says about it is not asked for.
        name: Its name in study and roster.
        identity: Its long-term key.
        roster: All participants' keys, as compared by fingerprint.
        data: Its rows, raw.
        policy: What it agrees to, whatever the study says.
        ledger: Its budget ledger, open. Every round of training is reserved there before anything is computed, and is
            refused where all that the ledger holds, other studies included, would cost too much. With one, a study
            without differential privacy is refused.
        entropy: Source of keys, masks, rounding and privacy noise.
        clock: Gives the time in seconds, against the policy's longest session.

    Attributes:
        log: Why it refused, in full. For the site's own eyes.
        evaluations: Every model it was sent, on its own test rows. For the site's own eyes.

    Raises:
        StudyError: The study, roster, name and model do not belong together, or the policy refuses the study.
        DataError: Rows that cannot be used; the message names the site.
    """

    def __init__(
        self,
        study: Study,
        name: str,
        identity: Identity,
        roster: Roster,
        data: SiteData,
        *,
        policy: Policy | None = None,
        ledger: Ledger | None = None,
        entropy: Entropy = os.urandom,
        clock: Callable[[], float] = time.time,
    ) -> None:
        policy = policy or Policy()
        policy.check_study(name, study)
        self.evaluations: list[Evaluation] = []
        require_both_classes(name, data.labels)
        weighted = study.training.weighting == "records" or study.task.standardize == "global"
        if weighted and data.train_rows > study.protocol.max_weight:
            raise DataError(
                f"site {name}: {data.train_rows} training rows are more than protocol.max_weight = "
                f"{study.protocol.max_weight}; raise that at every site"
            )
        self._study, self._ledger = study, ledger
        self._device = training_device(study.device)
        entries = entry_count(build_model(study, len(data.features)))
        self._sums = Sums(study, roster, len(data.features), entries)
        super().__init__(
            name,
            identity,
            self._sums.roster,
            self._sums.scheme,
            study.digest,
            policy=policy,
            entropy=entropy,
            clock=clock,
        )
        self._raw = data
        self._data = None if study.task.standardize == "global" else data.standardized(*own_standard(study, data))
        self._plan = self._sums.distributed or local_plan(study)
        self._policy.check_cost(name, self._whole_study(), ledger=ledger is not None)

    @property
    def standardized(self) -> bool:
        """Whether its rows are standardised yet; with `standardize = "global"` that takes the first sum."""
        return self._data is not None

    @property
    def data(self) -> SiteData:
        """The rows, standardised.

        Raises:
            LocalProtocolError: They are standardised globally and that has not happened yet.
        """
        if self._data is None:
            raise LocalProtocolError("the means and deviations over all sites have not come yet")
        return self._data

    def refuse_used(self, state: bytes) -> None:
        """Refuse a state from which a study cannot begin.

        Raises:
            StudyError: It has been used already.
            DecodeError: It is not this site's.
        """
        memory = remember(state)
        if memory.study:
            raise StudyError(
                f"the state of {self.name} is of a study that has begun already (keys for round {memory.advertised}): "
                "a study runs once on a state; give it a state file of its own in site.toml"
            )

    def spent(self, state: bytes) -> Spent | None:
        """What this site's records have cost so far, or None in a study without differential privacy.

        Raises:
            DecodeError: The state is not this site's.
        """
        if not self._study.private:
            return None
        privacy = self._study.privacy
        return spent(remember(state).charged, privacy.delta or 0.0, privacy.relation)

    def _session(self, number: int) -> Session:
        return self._sums.session(number)

    def _subject(self, message: SumRequest) -> Subject:
        return self._sums.subject(message.purpose, message.work_digest, message.previous)

    def _compared(self, message: SumRequest) -> bytes:
        # What is summed for training depends on the model; the moments are the same whatever the server sends.
        return message.work_digest if message.purpose == "train" else message.purpose.encode()

    def _check_more(self, memory: Memory) -> None:
        self._check_rounds(memory)
        self._check_budget(memory)

    def _charge(self, message: SumRequest, memory: Memory, seed: bytes) -> Memory:
        if message.purpose != "train":
            return memory
        self._check_budget(memory)
        memory = msgspec.structs.replace(memory, trained=memory.trained + 1)
        if self._plan is None:
            return memory
        planned = self._plan.mechanism()
        memory = msgspec.structs.replace(memory, reservation=self._reserve(message, memory, planned, seed))
        if isinstance(planned, PoissonSampledGaussian):
            return msgspec.structs.replace(memory, mechanisms=coalesce((*memory.mechanisms, planned)))
        return msgspec.structs.replace(memory, mechanisms=memory.charged, pending=planned)

    def _contributed(self, message: SumRequest, memory: Memory) -> None:
        if isinstance(self._plan, DpSgdPlan) and message.purpose == "train":
            self._commit(memory, self._plan.mechanism())

    def _confirmed(self, memory: Memory, shown: frozenset[int]) -> Memory:
        if not isinstance(self._plan, DistributedSgdPlan | ParticipantPlan) or memory.purpose != "train":
            return memory
        # More survivors than promised, more noise. From here on this site gives its part for no other set.
        actual = self._plan.mechanism(survivors=len(shown))
        self._commit(memory, actual)
        return msgspec.structs.replace(memory, mechanisms=coalesce((*memory.mechanisms, actual)), pending=None)

    def _receipt(self, memory: Memory) -> tuple[bytes, Memory]:
        if self._ledger is None:
            return b"", memory
        try:
            head = self._ledger.head()
        except LedgerError as error:
            self.log.append(f"{self.name}: {error}")
            return b"", memory
        return msgspec.json.encode(head), msgspec.structs.replace(memory, ledger_head=head)

    def _finish(self, message: FinishRequest, memory: Memory) -> tuple[bytes, Memory]:
        """See how the last model does, and sign the end: what came before it, and that nothing comes after."""
        self._evaluate(None, decode(message.work, Work))
        if not self._sums.signed:
            return b"", memory
        return sign_head(self._identity, self._study.digest, message.head), memory

    def _check_rounds(self, memory: Memory) -> None:
        if memory.trained >= self._study.rounds:
            raise RemoteProtocolError(f"the study has {self._study.rounds} rounds of training, and all are done")

    def _check_agreed(self, message: SumRequest, memory: Memory) -> None:
        purpose = message.purpose
        if purpose == "evaluate":
            raise RemoteProtocolError("the server asks for sums of metrics, which a study does not have")
        if purpose == "standardize" and (self._study.task.standardize != "global" or memory.trained):
            raise RemoteProtocolError("the server asks for sums of raw features, which the study does not have (now)")
        if purpose == "train":
            self._check_rounds(memory)

    def _reserve(self, message: SumRequest, memory: Memory, planned: Mechanism, seed: bytes) -> int:
        """Write a round into the ledger before it costs anything; gives the row's number.

        Asked again after a crash, this site draws the same from the same seed, and finds the row that it wrote. From
        any other seed, as when the study is run again, the round is another one and costs again.

        Raises:
            BudgetExceeded: The ledger's cap, the policy's or the study's budget does not allow it.
            LedgerError: The ledger cannot be written, or does not hold.
        """
        if self._ledger is None:
            return 0
        if memory.ledger_head is not None:
            self._ledger.require(memory.ledger_head)
        privacy = self._study.privacy
        reserved = self._ledger.reserve(
            planned,
            study=self._study.name,
            study_digest=self._study.digest,
            cohort="all",
            release="training",
            relation=privacy.relation,
            delta=privacy.delta or 0.0,
            epsilon=privacy.epsilon,
            budget=self._policy.budget,
            time=self._clock(),
            reference=f"round {message.round} {derive(seed, Label.STAGE, message.work_digest, 3).hex()}",
        )
        return reserved.sequence

    def _on_receipts(self, receipts: tuple[bytes, ...]) -> None:
        """Keep the ends of the others' ledgers. What is wrong with one is for the log: it is no fault of this round."""
        if self._ledger is None or not receipts:
            return
        try:
            ends = [msgspec.json.decode(receipt, type=Receipt) for receipt in receipts]
            self._ledger.record_receipts([end for end in ends if end.site != self.name], time=self._clock())
        except (msgspec.MsgspecError, ValueError, OverflowError, DpError) as error:
            self.log.append(f"{self.name}: a receipt of another site's ledger: {error}")

    def _commit(self, memory: Memory, actual: Mechanism) -> None:
        """Say in the ledger what a reserved round has really cost; one that is never said counts as reserved."""
        if self._ledger is not None:
            self._ledger.commit(memory.reservation, actual, time=self._clock())

    def _check_budget(self, memory: Memory) -> None:
        """Refuse a round that would cost more than the study promises, or than the site's policy allows."""
        if self._plan is None:
            return
        privacy, planned = self._study.privacy, self._plan.mechanism()
        if privacy.epsilon is not None and privacy.delta is not None:
            budget = Budget(epsilon=privacy.epsilon, delta=privacy.delta, relation=privacy.relation)
            budget.require(memory.charged, planned)
        if self._policy.budget is not None:
            self._policy.budget.require(memory.charged, planned)

    def _whole_study(self) -> Mechanism | None:
        """What all rounds together release at their worst; None without differential privacy."""
        if self._plan is None:
            return None
        once = self._plan.mechanism()
        return msgspec.structs.replace(once, steps=once.steps * self._study.rounds)

    def _contribute(self, message: SumRequest, memory: Memory, entropy: Entropy) -> tuple[RingVector, int]:
        """The site's vector for this round, over the ring, and how many local steps it took."""
        work = decode(message.work or b"", Work)
        if message.purpose == "standardize":
            return self._sums.exact.encode(self._moments()), 0
        model, study = self._evaluate(message.round, work), self._study
        if isinstance(self._plan, DistributedSgdPlan):
            noisy = distributed_contribution(model, self.data, study, self._plan, entropy)
            return self._sums.noisy_ring.embed(noisy), 1
        if isinstance(self._plan, DpSgdPlan):
            update = private_update(model, self.data, study, self._plan, entropy)
        elif study.training.algorithm == "fedsgd":
            update = gradient_update(model, self.data, self._device)
        else:
            seed = (study.seed, self._me)
            update = local_update(model, self.data, study.training, self._device, seed=seed, steps_done=memory.steps)
        if isinstance(self._plan, ParticipantPlan):
            turned = rotation_seed(message.work_digest)
            noisy = participant_contribution(update.values.astype(np.float64), self._plan, turned, entropy)
            return self._sums.noisy_ring.embed(noisy), update.steps
        weight, fixed = update.weight if study.training.weighting == "records" else 1, self._sums.fixed_point
        encoded = fixed.encode(update.values, weight, Stream(entropy(16)))
        if encoded.clipped:
            self.log.append(
                f"{self.name}: round {message.round}: {encoded.clipped} of {update.values.size} entries were larger "
                f"than {fixed.max_value} and were clipped; raise protocol.max_update if that is not meant"
            )
        return encoded.vector, update.steps

    def _moments(self) -> list[float]:
        """Number of training rows, sum of each feature, sum of each feature's square."""
        columns, limit = self._raw.train_x.astype(np.float64).T, self._sums.exact.limit
        squares = [math.fsum(column) for column in columns**2]
        for name, square in zip(self._raw.features, squares, strict=True):
            if square >= limit:
                raise DataError(
                    f"column {name!r} is too large to be summed: its squares add up to {square:.3g}, and {limit:.3g} "
                    "is the limit; give it in a larger unit"
                )
        return [self._raw.train_rows, *map(math.fsum, columns), *squares]

    def _evaluate(self, number: int | None, work: Work) -> torch.nn.Module:
        """Take over the model (and the global standard, if there is one) and see how it does on the test rows."""
        if self._study.task.standardize == "global":
            self._data = self._raw.standardized(np.array(work.mean), np.array(work.std))
        model = build_model(self._study, len(self._raw.features))
        load_model_bytes(model, work.model)
        self.evaluations.append(Evaluation(number, evaluate(model, self.data, self._device)))
        return model.cpu()


def own_standard(study: Study, data: SiteData) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means and deviations that need nobody else."""
    if study.task.standardize == "public":
        return heart_reference(data.features)
    if study.task.standardize == "site":
        return data.train_x.mean(axis=0, dtype=np.float64), data.train_x.std(axis=0, ddof=1, dtype=np.float64)
    return np.zeros(len(data.features)), np.ones(len(data.features))
