"""What a site says when it is asked who it is."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from secagg.wire import Digest, Message


class Hello(Message, frozen=True):
    """A site's name, and the digests of the study and the roster that it goes by.

    Nothing in it is signed, and nothing is believed of it: it tells a server early where files differ. Who speaks for
    a site shows in the signatures of the protocol.
    """

    name: Annotated[str, Meta(max_length=64)]
    study: Digest
    roster: Digest
