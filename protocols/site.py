"""A hospital in a study: its rows, its training, its keys and its privacy budget. Bytes in, bytes out.

`Site.handle` answers one request of the coordinator. All that must survive between two messages is in the state bytes
that it takes and gives; what the site keeps for its own eyes (why it refused, how the model does on its test rows) is
in `log` and `evaluations` and never leaves.
"""

from __future__ import annotations

import hashlib
import math
import os

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct

from dp import (
    Budget,
    BudgetExceeded,
    DpError,
    PoissonSampledGaussian,
    Spent,
    calibrate_noise_multiplier,
    coalesce,
    spent,
)
from dp.sgd import DpSgdPlan
from protocols.datasets import SiteData, heart_reference, require_both_classes
from protocols.errors import DataError
from protocols.fedavg import (
    build_model,
    evaluate,
    flatten,
    gradient_update,
    load_model_bytes,
    local_update,
    private_plan,
    private_update,
    training_device,
)
from protocols.messages import Answer, Purpose, Reason, Refusal, Request, Work
from protocols.metrics import Metrics
from protocols.policy import Policy
from protocols.sessions import Sums
from protocols.study import Study
from secagg.errors import DecodeError, LocalProtocolError, RemoteProtocolError, SecAggError
from secagg.keys import Identity, Roster
from secagg.prg import Entropy, Label, Stream, derive
from secagg.ring import RingVector
from secagg.wire import SecretState, decode, encode


class Evaluation(Struct, frozen=True):
    """How a model did on the site's test rows: the one sent for `round`, or the finished one (None)."""

    round: int | None
    metrics: Metrics


class Memory(SecretState, frozen=True):
    """What a site remembers between two messages.

    Attributes:
        round: The last round that it began; none yet is -1.
        purpose: Of that round.
        work_digest: Of that round.
        stages_done: Stages of that round that it has answered; 0 once the round is over for it.
        sum_state: State of the secure sum.
        round_seed: Secret from which the randomness of the next stage comes, and the next such secret. A site that
            answered and went down before it kept its state gives the identical answer when it is asked again. Empty
            once the round is over for it.
        trained: Rounds of training that it has contributed to.
        cohorts: Sums that it has confirmed: what was summed, and the numbers of those in the sum.
        steps: Local steps taken in the study.
        mechanisms: Everything charged to the privacy budget, the running round included.
        last_request: Digest of the last request, to tell a retry from a second one.
        last_reply: What was answered to it.
    """

    round: int = -1
    purpose: Purpose = "train"
    work_digest: bytes = b""
    stages_done: int = 0
    sum_state: bytes = b""
    round_seed: bytes = b""
    trained: int = 0
    cohorts: tuple[tuple[bytes, tuple[int, ...]], ...] = ()
    steps: int = 0
    mechanisms: tuple[PoissonSampledGaussian, ...] = ()
    last_request: bytes = b""
    last_reply: bytes = b""


class Site:
    """One participant of a study.

    Args:
        study: The site's own copy; what the server says about it is not asked for.
        name: Its name in study and roster.
        identity: Its long-term key.
        roster: All participants' keys, as compared by fingerprint.
        data: Its rows, raw.
        policy: What it agrees to, whatever the study says.
        entropy: Source of keys, masks, rounding and privacy noise.

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
        entropy: Entropy = os.urandom,
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
        self._study, self._identity, self._entropy = study, identity, entropy
        self._device = training_device(study.device)
        entries = flatten(build_model(study, len(data.features))).size
        self._sums = Sums(study, roster, len(data.features), entries)
        self._me = roster.number(name)
        self._raw = data
        self._data = None if study.task.standardize == "global" else data.standardized(*_own_standard(study, data))
        self._plan = _private_plan(study)

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

    def spent(self, state: bytes) -> Spent | None:
        """What this site's records have cost so far, or None in a study without differential privacy.

        Raises:
            DecodeError: The state is not this site's.
        """
        if not self._study.private:
            return None
        privacy = self._study.privacy
        return spent(_remember(state).mechanisms, privacy.delta or 0.0, privacy.relation)

    def handle(self, request: bytes, state: bytes) -> tuple[bytes, bytes]:
        """Answer one request.

        What goes wrong in a round does not raise: the site refuses, says why in one word to the coordinator and in
        full to its own `log`, and is out of the round. A retry of the last request gets the identical bytes back,
        because a second vector under the same masks would show the difference of the two.

        Args:
            request: An encoded `Request`.
            state: What the last call gave; empty at the start of the study.

        Returns:
            The encoded reply and the next state.

        Raises:
            DecodeError: The state is not this site's.
        """
        memory = _remember(state)
        if memory.stages_done >= len(self._sums.scheme.stages):
            raise DecodeError("not a state of this site: it has done more stages than its study's sums have")
        digest = hashlib.sha256(request).digest()
        if digest == memory.last_request:
            return memory.last_reply, state
        reply: Answer | Refusal
        try:
            message = decode(request, Request)
            memory = self._admit(message, memory)
            # From here on the round is charged, whatever comes of it.
            reply, memory = self._act(message, memory)
        except (SecAggError, DpError) as error:
            self.log.append(f"{self.name}: {error}")
            reply = Refusal(_reason(error))
            memory = msgspec.structs.replace(memory, stages_done=0, sum_state=b"", round_seed=b"")
        encoded = encode(reply)
        return encoded, encode(msgspec.structs.replace(memory, last_request=digest, last_reply=encoded))

    def _admit(self, message: Request, memory: Memory) -> Memory:
        """Check that the message follows on the last one, and charge the round if it is the one to contribute at.

        Raises:
            RemoteProtocolError: It does not follow.
            BudgetExceeded: The round would cost too much; nothing is charged.
        """
        if message.purpose == "finish":
            return memory
        stages = self._sums.scheme.stages
        if message.stage == stages[0]:
            self._check_agreed(message.purpose, memory)
            if message.round <= memory.round:
                raise RemoteProtocolError(f"round {message.round} comes after round {memory.round}: each comes once")
            memory = msgspec.structs.replace(
                memory,
                round=message.round,
                purpose=message.purpose,
                work_digest=message.work_digest,
                stages_done=0,
                round_seed=self._entropy(32),
            )
        if message.stage != stages[memory.stages_done]:
            raise RemoteProtocolError(f"stage {message.stage} came where {stages[memory.stages_done]} was due")
        if (message.round, message.purpose, message.work_digest) != (memory.round, memory.purpose, memory.work_digest):
            raise RemoteProtocolError(f"round {memory.round} goes on with another number, purpose or model digest")
        if (shown := self._sums.scheme.cohort(message.stage, message.body)) is not None:
            memory = self._confirm_cohort(memory, shown)
        contributes = message.stage == self._sums.scheme.contributes_at
        if contributes and hashlib.sha256(message.work or b"").digest() != memory.work_digest:
            raise RemoteProtocolError("the model that came is not the one that the round was begun with")
        if contributes and message.purpose == "train":
            memory = msgspec.structs.replace(memory, trained=memory.trained + 1)
        if self._plan is None or message.purpose != "train":
            return memory
        release = self._plan.mechanism()
        if contributes or message.stage == stages[0]:
            self._check_budget(memory, release)
        if not contributes:
            return memory
        return msgspec.structs.replace(memory, mechanisms=coalesce((*memory.mechanisms, release)))

    def _confirm_cohort(self, memory: Memory, shown: frozenset[int]) -> Memory:
        # What is summed for training depends on the model; the moments are the same whatever the server sends.
        subject = memory.work_digest if memory.purpose == "train" else memory.purpose.encode()
        earlier = (frozenset(cohort) for summed, cohort in memory.cohorts if summed == subject)
        self._policy.check_cohort(earlier, shown, self._sums.roster.name)
        return msgspec.structs.replace(memory, cohorts=(*memory.cohorts, (subject, tuple(sorted(shown)))))

    def _check_agreed(self, purpose: Purpose, memory: Memory) -> None:
        """Refuse sums that the study does not have: whatever the server asks for, a site gives no more than agreed."""
        if purpose == "standardize" and (self._study.task.standardize != "global" or memory.trained):
            raise RemoteProtocolError("the server asks for sums of raw features, which the study does not have (now)")
        if purpose == "train" and memory.trained >= self._study.rounds:
            raise RemoteProtocolError(f"the study has {self._study.rounds} rounds of training, and all are done")

    def _check_budget(self, memory: Memory, release: PoissonSampledGaussian) -> None:
        privacy = self._study.privacy
        if privacy.epsilon is not None and privacy.delta is not None:
            budget = Budget(epsilon=privacy.epsilon, delta=privacy.delta, relation=privacy.relation)
            budget.check(memory.mechanisms, release)

    def _act(self, message: Request, memory: Memory) -> tuple[Answer, Memory]:
        """Answer a message that was admitted."""
        if message.purpose == "finish":
            self._evaluate(None, decode(message.work or b"", Work))
            return Answer(b""), memory
        scheme, vector, steps = self._sums.scheme, None, 0
        # One way: a later state cannot tell what an earlier stage drew, which is what it must have forgotten.
        here, after = (derive(memory.round_seed, Label.STAGE, message.work_digest, i) for i in (0, 1))
        entropy = Stream(here).read
        if message.stage == scheme.contributes_at:
            vector, steps = self._contribute(message, memory, entropy)
        if message.stage == scheme.stages[0]:
            session = self._sums.session(message.round, message.purpose, message.work_digest)
            body, sum_state = scheme.begin(session, self._me, self._identity, entropy, vector)
        else:
            body, sum_state = scheme.step(
                message.stage, memory.sum_state, message.body, self._identity, entropy, vector
            )
        done = (memory.stages_done + 1) % len(scheme.stages)
        memory = msgspec.structs.replace(
            memory,
            stages_done=done,
            sum_state=sum_state if done else b"",
            round_seed=after if done else b"",
            steps=memory.steps + steps,
        )
        return Answer(body), memory

    def _contribute(self, message: Request, memory: Memory, entropy: Entropy) -> tuple[RingVector, int]:
        """The site's vector for this round, over the ring, and how many local steps it took."""
        work = decode(message.work or b"", Work)
        if message.purpose == "standardize":
            return self._sums.exact.encode(self._moments()), 0
        model, study = self._evaluate(message.round, work), self._study
        if self._plan is not None:
            update = private_update(model, self.data, study, self._plan, entropy)
        elif study.training.algorithm == "fedsgd":
            update = gradient_update(model, self.data, self._device)
        else:
            seed = (study.seed, self._me)
            update = local_update(model, self.data, study.training, self._device, seed=seed, steps_done=memory.steps)
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


def _remember(state: bytes) -> Memory:
    if not state:
        return Memory()
    try:
        return decode(state, Memory)
    except DpError as error:
        raise DecodeError(f"not a site's state: {error}") from error


def _reason(error: Exception) -> Reason:
    if isinstance(error, BudgetExceeded):
        return "budget"
    return "data" if isinstance(error, LocalProtocolError | DataError | DpError) else "protocol"


def _own_standard(study: Study, data: SiteData) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means and deviations that need nobody else."""
    if study.task.standardize == "public":
        return heart_reference(data.features)
    if study.task.standardize == "site":
        return data.train_x.mean(axis=0, dtype=np.float64), data.train_x.std(axis=0, ddof=1, dtype=np.float64)
    return np.zeros(len(data.features)), np.ones(len(data.features))


def _private_plan(study: Study) -> DpSgdPlan | None:
    privacy = study.privacy
    if not study.private or privacy.delta is None:
        return None
    noise = privacy.noise_multiplier
    if noise is None:
        noise = calibrate_noise_multiplier(
            privacy.epsilon or 0.0,
            privacy.delta,
            privacy.sampling_rate or 0.0,
            study.rounds * (study.local_steps or 1),
            privacy.relation,
        )
    return private_plan(study, noise)
