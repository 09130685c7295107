"""What a site remembers between two messages, as the bytes that it keeps."""

from __future__ import annotations

import msgspec

from dp import DpError, Mechanism, coalesce
from dp.ledger import Receipt
from protocols.messages import Purpose
from secagg.errors import DecodeError
from secagg.wire import SecretState, decode


class Memory(SecretState, frozen=True):
    """Everything that a site must know of what it did before.

    The keys of one sum are agreed while another sum is under way, so there are two places: one for keys that are being
    agreed or wait for their sum, one for the sum that is running.

    Attributes:
        study: Digest of the study, or of the agreement, that all of this is about; none yet is empty.
        advertised: The last round that it advertised keys for; none yet is -1.
        keys_done: Stages of that agreement that it has answered; 0 once the keys are used or lost.
        keys_state: State of the secure sum there.
        keys_began: When it advertised them, seconds.
        round: The last sum that it contributed to; none yet is -1.
        purpose: Of that sum.
        work_digest: Of that sum.
        previous: Digest of the record of the sum before, as it was shown then.
        stages_done: Stages of that sum that it has answered; 0 once the sum is over for it.
        sum_state: State of the secure sum there.
        sum_began: When the sum's keys were advertised, seconds.
        seed: Secret from which the randomness of the next answer comes. A site that answered and went down before it
            kept its state gives the identical answer when it is asked again.
        trained: Sums that count against what was agreed: a study's rounds of training, an app's sums of either kind.
        cohorts: Sums that it has confirmed: what was summed, and the numbers of those in the sum.
        steps: Local steps taken in the study.
        mechanisms: Everything charged to the privacy budget but `pending`.
        pending: What is charged for a sum whose survivors are not known, as if they were as few as may be.
        reservation: Row of the ledger where the last round is reserved.
        ledger_head: The end of its own ledger when it last answered; an older one is refused.
        finished: Whether it has signed the end of the study.
        last_request: Digest of the last request, to tell a retry from a second one.
        last_reply: What was answered to it.
        compared: What the sum depends on, by which its cohort is compared with those of others.
    """

    study: bytes = b""
    advertised: int = -1
    keys_done: int = 0
    keys_state: bytes = b""
    keys_began: float = 0.0
    round: int = -1
    purpose: Purpose = "train"
    work_digest: bytes = b""
    previous: bytes = b""
    stages_done: int = 0
    sum_state: bytes = b""
    sum_began: float = 0.0
    seed: bytes = b""
    trained: int = 0
    cohorts: tuple[tuple[bytes, tuple[int, ...]], ...] = ()
    steps: int = 0
    mechanisms: tuple[Mechanism, ...] = ()
    pending: Mechanism | None = None
    reservation: int = 0
    ledger_head: Receipt | None = None
    finished: bool = False
    last_request: bytes = b""
    last_reply: bytes = b""
    compared: bytes = b""

    @property
    def charged(self) -> tuple[Mechanism, ...]:
        """Everything charged to the privacy budget."""
        return self.mechanisms if self.pending is None else coalesce((*self.mechanisms, self.pending))

    def without_keys(self) -> Memory:
        """The keys that wait for a sum are used up, or lost."""
        return msgspec.structs.replace(self, keys_done=0, keys_state=b"")

    def without_sum(self) -> Memory:
        """The sum is over for this site."""
        return msgspec.structs.replace(self, stages_done=0, sum_state=b"")


def remember(state: bytes) -> Memory:
    """A site's memory from the bytes that it kept; none are the start of a study.

    Raises:
        DecodeError: Not a memory.
    """
    if not state:
        return Memory()
    try:
        return decode(state, Memory)
    except DpError as error:
        raise DecodeError(f"not a site's state: {error}") from error
