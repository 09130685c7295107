"""Who carries the bytes between coordinator and sites. An engine has one method, `exchange`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol


class Engine(Protocol):
    """Carries one stage: requests out, replies back."""

    def exchange(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Send each site its request and give the replies as they arrive, until the stage's deadline.

        A site that does not answer in time is just not among the replies. The site's name with a reply is the
        transport's word for who sent it, never the message's.
        """
