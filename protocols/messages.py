"""What the coordinator and the sites say to each other, around the messages of the secure sum."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from secagg.wire import Counter, Digest, Message

Purpose = Literal["standardize", "train", "evaluate"]
Reason = Literal["budget", "data", "policy", "protocol"]
Stage = Annotated[str, Meta(max_length=32)]
LedgerEnd = Annotated[bytes, Meta(max_length=1024)]

Moments = Annotated[tuple[float, ...], Meta(max_length=1 << 16)]


class Work(Message, frozen=True):
    """What a site needs to compute its contribution; its digest is in the masks and signatures of the sum.

    Attributes:
        model: safetensors bytes of the model's state; empty before the first round of training.
        mean: Of each feature over all sites, where the study standardises globally; else empty.
        std: The same for the deviation.
    """

    model: bytes
    mean: Moments = ()
    std: Moments = ()


class KeysRequest(Message, frozen=True):
    """Agree on keys for a sum to come.

    Attributes:
        round: Number of that sum, counted over the whole study; each only once.
        stage: Stage of the key agreement.
        body: Message of the secure sum.
    """

    round: Counter
    stage: Stage
    body: bytes


class SumRequest(Message, frozen=True):
    """Take part in a sum.

    Attributes:
        round: Its number.
        purpose: What is summed.
        stage: Stage of the sum.
        work_digest: SHA-256 of the encoded `Work`.
        previous: Digest of the record of the sum before, zeros where there is none.
        body: Message of the secure sum.
        work: The encoded `Work`, at the stage at which the site contributes.
        receipts: At the last stage, the ends of the sites' ledgers as they came with the stage before.
    """

    round: Counter
    purpose: Purpose
    stage: Stage
    work_digest: Digest
    previous: Digest
    body: bytes
    work: bytes | None = None
    receipts: Annotated[tuple[LedgerEnd, ...], Meta(max_length=1 << 16)] = ()


class FinishRequest(Message, frozen=True):
    """The study is over: the encoded last `Work`, and the digest of the record of its last sum."""

    work: bytes
    head: Digest


class Request(Message, frozen=True):
    """Coordinator to site: what there is to do in this stage. The keys of the next sum travel with the sum before."""

    sum: SumRequest | None = None
    keys: KeysRequest | None = None
    finish: FinishRequest | None = None


class Answer(Message, frozen=True, tag=True):
    """A site's message of the secure sum; at the finish its signature over the transcript's head, if there is one."""

    body: memoryview


class Refusal(Message, frozen=True, tag=True):
    """The site does not take part, and why in one word.

    The word says no more than the server would see anyway; the whole message stays in the site's own log.
    """

    reason: Reason


Part = Answer | Refusal


class Reply(Message, frozen=True):
    """Site to coordinator: a part for each part of the request.

    `receipt` is the end of the site's budget ledger, signed, in JSON; the coordinator hands it to the other sites, who
    keep it, so that a ledger that is rolled back later does not agree with them. Empty where the site has no ledger.
    """

    sum: Part | None = None
    keys: Part | None = None
    finish: Part | None = None
    receipt: LedgerEnd = b""
