"""What the coordinator and the sites say to each other, around the messages of the secure sum."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from secagg.wire import Digest, Message

Purpose = Literal["standardize", "train", "finish"]
Reason = Literal["budget", "data", "policy", "protocol"]


Moments = Annotated[tuple[float, ...], Meta(max_length=1 << 16)]


class Work(Message, frozen=True):
    """What a site needs to compute its contribution; its digest is in the round's session id.

    Attributes:
        model: safetensors bytes of the model's state; empty before the first round of training.
        mean: Of each feature over all sites, where the study standardises globally; else empty.
        std: The same for the deviation.
    """

    model: bytes
    mean: Moments = ()
    std: Moments = ()


class Request(Message, frozen=True):
    """Coordinator to site.

    Attributes:
        round: Number of the sum, counted over the whole study; each only once.
        purpose: What is summed.
        stage: Stage of the secure sum, or "Finish".
        work_digest: SHA-256 of the encoded `Work`.
        body: Message of the secure sum.
        work: The encoded `Work`, at the stage at which the site contributes and at the finish.
    """

    round: Annotated[int, Meta(ge=0)]
    purpose: Purpose
    stage: Annotated[str, Meta(max_length=32)]
    work_digest: Digest
    body: bytes
    work: bytes | None = None


class Answer(Message, frozen=True, tag=True):
    """Site to coordinator: its message of the secure sum, empty at the finish."""

    body: bytes


class Refusal(Message, frozen=True, tag=True):
    """Site to coordinator: it does not take part, and why in one word.

    The word says no more than the server would see anyway; the whole message stays in the site's own log.
    """

    reason: Reason


Reply = Answer | Refusal
