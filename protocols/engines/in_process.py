"""All sites in this process, one after the other: for trying out, for research on one machine, and for tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from protocols.homomorphic import Holder
from protocols.site import Site
from protocols.state_file import StateFile, answer


class InProcess:
    """Sites as objects. Their states are bytes here too, as they would be on disk, or really are there.

    Args:
        sites: Those that take part, and the holder of their keys if there is one.
        stores: Open state files of those that keep their state on disk, by name.

    Attributes:
        sites: By name.
        states: Each site's state after its last message.
    """

    def __init__(self, sites: Iterable[Site | Holder], stores: Mapping[str, StateFile] | None = None) -> None:
        self.sites = {site.name: site for site in sites}
        self.states = dict.fromkeys(self.sites, b"")
        self._stores = stores or {}

    def exchange(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Let each site handle its request."""
        for name, request in requests.items():
            site, store = self.sites[name], self._stores.get(name)
            if store is not None:
                reply = answer(site, store, request)
                self.states[name] = store.load()
            else:
                reply, self.states[name] = site.handle(request, self.states[name])
            yield name, reply
