"""All sites in this process, one after the other: for trying out, for research on one machine, and for tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from protocols.site import Site


class InProcess:
    """Sites as objects. Their states are bytes here too, as they would be on disk.

    Attributes:
        sites: By name.
        states: Each site's state after its last message.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        self.states = dict.fromkeys(self.sites, b"")

    def exchange(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Let each site handle its request."""
        for name, request in requests.items():
            reply, self.states[name] = self.sites[name].handle(request, self.states[name])
            yield name, reply
