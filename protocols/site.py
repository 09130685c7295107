"""A hospital in a study: its rows, its training, its keys and its privacy budget. Bytes in, bytes out.

`Site.handle` answers one request of the coordinator. All that must survive between two messages is in the state bytes
that it takes and gives; what the site keeps for its own eyes (why it refused, how the model does on its test rows) is
in `log` and `evaluations` and never leaves.
"""

from __future__ import annotations

import hashlib
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
    BudgetExceeded,
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
from protocols.errors import DataError, PolicyRefusal, StudyError
from protocols.fedavg import (
    build_model,
    distributed_contribution,
    evaluate,
    flatten,
    gradient_update,
    load_model_bytes,
    local_plan,
    local_update,
    private_update,
    rotation_seed,
    training_device,
)
from protocols.memory import Memory, remember
from protocols.messages import (
    Answer,
    FinishRequest,
    KeysRequest,
    Part,
    Purpose,
    Reason,
    Refusal,
    Reply,
    Request,
    SumRequest,
    Work,
)
from protocols.metrics import Metrics
from protocols.policy import Policy
from protocols.sessions import Sums
from protocols.study import Study
from secagg.errors import DecodeError, LocalProtocolError, RemoteProtocolError, SecAggError
from secagg.keys import Identity, Roster
from secagg.masking.transcript import sign_head
from secagg.prg import Entropy, Label, Stream, derive
from secagg.ring import RingVector
from secagg.wire import decode, encode


class Evaluation(Struct, frozen=True):
    """How a model did on the site's test rows: the one sent for `round`, or the finished one (None)."""

    round: int | None
    metrics: Metrics


class Site:
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
        self._policy = policy or Policy()
        self._policy.check_study(name, study)
        self.name = name
        self.log: list[str] = []
        self.evaluations: list[Evaluation] = []
        require_both_classes(name, data.labels)
        weighted = study.training.weighting == "records" or study.task.standardize == "global"
        if weighted and data.train_rows > study.protocol.max_weight:
            raise DataError(
                f"site {name}: {data.train_rows} training rows are more than protocol.max_weight = "
                f"{study.protocol.max_weight}; raise that at every site"
            )
        self._study, self._identity, self._entropy, self._clock = study, identity, entropy, clock
        self._ledger = ledger
        self._device = training_device(study.device)
        entries = flatten(build_model(study, len(data.features))).size
        self._sums = Sums(study, roster, len(data.features), entries)
        self._scheme = self._sums.scheme
        self._me = self._sums.roster.number(name)
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

    def handle(self, request: bytes, state: bytes) -> tuple[bytes, bytes]:
        """Answer one request.

        What goes wrong does not raise: the site refuses that part of the request, says why in one word to the
        coordinator and in full to its own `log`, and is out of that sum. A retry of the last request gets the identical
        bytes back, because a second vector under the same masks would show the difference of the two.

        Args:
            request: An encoded `Request`.
            state: What the last call gave; empty at the start of the study.

        Returns:
            The encoded reply and the next state.

        Raises:
            DecodeError: The state is not this site's.
        """
        memory = remember(state)
        if memory.stages_done >= len(self._scheme.stages) or memory.keys_done > len(self._scheme.setup):
            raise DecodeError("not a state of this site: it has done more stages than its study's sums have")
        if memory.study not in (b"", self._study.digest):
            raise DecodeError(
                f"the state of {self.name} is of another study (digest {memory.study.hex()[:16]}, this one has "
                f"{self._study.digest.hex()[:16]}): each study has a state of its own"
            )
        digest = hashlib.sha256(request).digest()
        if digest == memory.last_request:
            return memory.last_reply, state
        reply, memory = self._answer(request, memory)
        encoded = encode(reply)
        return encoded, encode(msgspec.structs.replace(memory, last_request=digest, last_reply=encoded))

    def _answer(self, request: bytes, memory: Memory) -> tuple[Reply, Memory]:
        try:
            message = decode(request, Request)
        except DecodeError as error:
            return Reply(sum=self._refuse(error)), memory
        # What is drawn now depends on the seed kept before alone, so that it comes out the same if asked again. What is
        # drawn later cannot be told from it, nor the other way round: the next seed is a one-way and a fresh one.
        seed = memory.seed or self._entropy(32)
        fresh = derive(seed + self._entropy(32), Label.STAGE, bytes(32), 0)
        memory = msgspec.structs.replace(memory, study=self._study.digest, seed=fresh)
        on_sum = on_keys = on_finish = None
        if message.sum is not None:
            on_sum, memory = self._on_sum(message.sum, memory, seed)
        if message.keys is not None:
            on_keys, memory = self._on_keys(message.keys, memory, seed)
        if message.finish is not None:
            on_finish, memory = self._on_finish(message.finish, memory)
        receipt = b""
        if self._ledger is not None and isinstance(on_sum, Answer):
            try:
                head = self._ledger.head()
            except LedgerError as error:
                self.log.append(f"{self.name}: {error}")
            else:
                memory, receipt = msgspec.structs.replace(memory, ledger_head=head), msgspec.json.encode(head)
        return Reply(on_sum, on_keys, on_finish, receipt), memory

    def _refuse(self, error: Exception) -> Refusal:
        self.log.append(f"{self.name}: {error}")
        return Refusal(_reason(error))

    def _on_keys(self, message: KeysRequest, memory: Memory, seed: bytes) -> tuple[Part, Memory]:
        scheme = self._scheme
        try:
            memory = self._admit_keys(message, memory)
            session = self._sums.session(message.round)
            entropy = Stream(derive(seed, Label.STAGE, session.id, 1)).read
            body, keys_state = scheme.agree(
                message.stage, session, self._me, memory.keys_state, message.body, self._identity, entropy
            )
        except (SecAggError, DpError) as error:
            return self._refuse(error), memory.without_keys()
        memory = msgspec.structs.replace(memory, keys_done=memory.keys_done + 1, keys_state=keys_state)
        return Answer(memoryview(body)), memory

    def _admit_keys(self, message: KeysRequest, memory: Memory) -> Memory:
        """Check that the message follows on the last one.

        Raises:
            RemoteProtocolError: It does not follow, or the study has no more sums.
            BudgetExceeded: The sum would cost too much.
        """
        setup = self._scheme.setup
        self._check_open(memory)
        if setup and message.stage == setup[0]:
            if message.round <= memory.advertised:
                raise RemoteProtocolError(
                    f"round {message.round} comes after round {memory.advertised}: each comes once"
                )
            self._check_rounds(memory)
            self._check_budget(memory)
            memory = msgspec.structs.replace(memory.without_keys(), advertised=message.round, keys_began=self._clock())
        elif message.round != memory.advertised:
            raise RemoteProtocolError(f"keys of round {message.round} follow on those of round {memory.advertised}")
        due = setup[memory.keys_done] if memory.keys_done < len(setup) else "the sum"
        if message.stage != due:
            raise RemoteProtocolError(f"stage {message.stage} came where {due} was due")
        self._policy.check_age(self._clock() - memory.keys_began)
        return memory

    def _on_sum(self, message: SumRequest, memory: Memory, seed: bytes) -> tuple[Part, Memory]:
        scheme, steps = self._scheme, 0
        try:
            memory = self._admit_sum(message, memory, seed)
            # From here on the round is charged, whatever comes of it.
            self._keep_receipts(message.receipts)
            if message.stage == scheme.stages[0]:
                entropy = Stream(derive(seed, Label.STAGE, message.work_digest, 2)).read
                vector, steps = self._contribute(message, memory, entropy)
                session = self._sums.session(message.round)
                subject = self._sums.subject(message.purpose, message.work_digest, message.previous)
                body, sum_state = scheme.contribute(
                    session, self._me, memory.sum_state, message.body, subject, vector, self._identity
                )
                if isinstance(self._plan, DpSgdPlan) and message.purpose == "train":
                    self._commit(memory, self._plan.mechanism())
            else:
                body, sum_state = scheme.step(message.stage, memory.sum_state, message.body, self._identity)
        except (SecAggError, DpError) as error:
            memory = memory.without_sum()
            waiting = memory.advertised if memory.keys_done == len(scheme.setup) else None
            if message.stage == scheme.stages[0] and message.round == waiting:
                memory = memory.without_keys()  # no second try under them
            return self._refuse(error), memory
        memory = msgspec.structs.replace(
            memory, stages_done=memory.stages_done + 1, sum_state=sum_state, steps=memory.steps + steps
        )
        if memory.stages_done == len(scheme.stages):
            memory = memory.without_sum()
        return Answer(memoryview(body)), memory

    def _admit_sum(self, message: SumRequest, memory: Memory, seed: bytes) -> Memory:
        """Check that the message follows on the last one, and charge the round if it is the one to contribute at.

        Raises:
            RemoteProtocolError: It does not follow, or asks for less than the policy's conditions.
            BudgetExceeded: The round would cost too much; nothing is charged.
        """
        stages = self._scheme.stages
        self._check_open(memory)
        if message.stage == stages[0]:
            memory = self._begin_sum(message, memory)
        ours = memory.round, memory.purpose, memory.work_digest, memory.previous
        if (message.round, message.purpose, message.work_digest, message.previous) != ours:
            raise RemoteProtocolError(f"round {memory.round} goes on with another number, purpose, model or past")
        if message.stage != stages[memory.stages_done]:
            raise RemoteProtocolError(f"stage {message.stage} came where {stages[memory.stages_done]} was due")
        self._policy.check_age(self._clock() - memory.sum_began)
        if (shown := self._scheme.cohort(message.stage, message.body)) is not None:
            memory = self._confirm_cohort(memory, shown)
        if message.stage != stages[0] or message.purpose != "train":
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

    def _begin_sum(self, message: SumRequest, memory: Memory) -> Memory:
        """Move the keys that wait for this sum to their use."""
        setup = self._scheme.setup
        if message.round <= memory.round:
            raise RemoteProtocolError(f"round {message.round} comes after round {memory.round}: each comes once")
        if setup and (message.round != memory.advertised or memory.keys_done != len(setup)):
            raise RemoteProtocolError(f"round {message.round} begins, and no keys were agreed for it")
        self._check_agreed(message.purpose, memory)
        if hashlib.sha256(message.work or b"").digest() != message.work_digest:
            raise RemoteProtocolError("the model that came is not the one that the sum is said to be about")
        return msgspec.structs.replace(
            memory.without_keys(),
            round=message.round,
            purpose=message.purpose,
            work_digest=message.work_digest,
            previous=message.previous,
            stages_done=0,
            sum_state=memory.keys_state,
            sum_began=memory.keys_began if setup else self._clock(),
        )

    def _on_finish(self, message: FinishRequest, memory: Memory) -> tuple[Part, Memory]:
        """See how the last model does, and sign the end: what came before it, and that nothing comes after."""
        try:
            self._check_open(memory)
            self._evaluate(None, decode(message.work, Work))
        except (SecAggError, DpError) as error:
            return self._refuse(error), memory
        signature = b""
        if self._sums.signed:
            signature = sign_head(self._identity, self._study.digest, message.head)
        memory = msgspec.structs.replace(memory.without_keys().without_sum(), finished=True)
        return Answer(memoryview(signature)), memory

    def _confirm_cohort(self, memory: Memory, shown: frozenset[int]) -> Memory:
        # What is summed for training depends on the model; the moments are the same whatever the server sends.
        subject = memory.work_digest if memory.purpose == "train" else memory.purpose.encode()
        earlier = (frozenset(cohort) for summed, cohort in memory.cohorts if summed == subject)
        self._policy.check_cohort(earlier, shown, self._sums.roster.name, self._me)
        if isinstance(self._plan, DistributedSgdPlan | ParticipantPlan) and memory.purpose == "train":
            # More survivors than promised, more noise. From here on this site gives its part for no other set.
            actual = self._plan.mechanism(survivors=len(shown))
            self._commit(memory, actual)
            memory = msgspec.structs.replace(memory, mechanisms=coalesce((*memory.mechanisms, actual)), pending=None)
        return msgspec.structs.replace(memory, cohorts=(*memory.cohorts, (subject, tuple(sorted(shown)))))

    def _check_open(self, memory: Memory) -> None:
        if memory.finished:
            raise RemoteProtocolError("the study is finished: its end is signed, and nothing comes after it")

    def _check_rounds(self, memory: Memory) -> None:
        if memory.trained >= self._study.rounds:
            raise RemoteProtocolError(f"the study has {self._study.rounds} rounds of training, and all are done")

    def _check_agreed(self, purpose: Purpose, memory: Memory) -> None:
        """Refuse sums that the study does not have: whatever the server asks for, a site gives no more than agreed."""
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

    def _keep_receipts(self, receipts: tuple[bytes, ...]) -> None:
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


def _reason(error: Exception) -> Reason:
    if isinstance(error, BudgetExceeded):
        return "budget"
    if isinstance(error, PolicyRefusal):
        return "policy"
    return "data" if isinstance(error, LocalProtocolError | DataError | DpError) else "protocol"


def own_standard(study: Study, data: SiteData) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means and deviations that need nobody else."""
    if study.task.standardize == "public":
        return heart_reference(data.features)
    if study.task.standardize == "site":
        return data.train_x.mean(axis=0, dtype=np.float64), data.train_x.std(axis=0, ddof=1, dtype=np.float64)
    return np.zeros(len(data.features)), np.ones(len(data.features))
