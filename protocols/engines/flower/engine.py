"""The engine over a Flower grid: a stage's requests out, its replies back as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid
from msgspec import Struct

from protocols.engines.flower.bodies import HELLO, MESSAGE, packed, unpacked
from protocols.errors import LinkError, StudyError
from protocols.hello import Hello
from secagg.errors import DecodeError
from secagg.wire import decode

Say = Callable[[str], None]


class Patience(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long the server waits, in seconds.

    Attributes:
        gather: For all sites to come, before the first stage. After that, those who are there begin without the rest.
        stage: For the answers of a stage. Long enough for the slowest site to train.
        resend: Until the same request is sent again to a site that has not answered. It gets the identical answer from
            a site that was down in the meantime, or whose answer was lost.
        absent: A stage ends early where all that have not answered have been away for so long.
        poll: Between two looks for answers.
    """

    gather: float = 120.0
    stage: float = 600.0
    resend: float = 60.0
    absent: float = 10.0
    poll: float = 0.2

    def __post_init__(self) -> None:
        for key in ("gather", "stage", "resend", "absent", "poll"):
            if not 0 < getattr(self, key) <= 30 * 86_400:
                raise LinkError(f"{key}: expected seconds above 0, up to 30 days, got {getattr(self, key)!r}")


class FlowerEngine:
    """Carries a study's messages over a grid.

    A node says which site it is. That is not proven: with node authentication the SuperLink tells who is registered,
    and whoever claims another's name has not its key, so that what it signs is refused, and the site is out of the
    round.

    Args:
        grid: As Flower gives it to a server app.
        sites: Names of the study's sites.
        study: Digest of the study.
        roster: Digest of the roster.
        patience: How long to wait.
        say: Told in one line what a person should know.
        at_once: Requests on their way at a time, or None for all at once. Only for where each of them gets a reply, if
            only an error: one that is lost keeps another from being sent.
        clock: Gives seconds; only differences matter.
        sleep: Waits so many seconds.
        hello: Type of the messages that ask who a node is.
        agreed: What `study` is the digest of, for messages.
        beside: What runs at a site beside its SuperNode, for messages.

    Attributes:
        message_type: Type of the messages that carry requests.
        deadline: No stage lasts beyond this time of the clock.
    """

    def __init__(
        self,
        grid: Grid,
        sites: tuple[str, ...],
        *,
        study: bytes,
        roster: bytes,
        patience: Patience | None = None,
        say: Say = lambda line: None,
        at_once: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        hello: str = HELLO,
        agreed: str = "study",
        beside: str = "`secagg site serve` beside it",
    ) -> None:
        self.message_type, self.deadline = MESSAGE, float("inf")
        self._hello, self._agreed, self._beside = hello, agreed, beside
        self._grid, self._sites, self._patience = grid, sites, patience or Patience()
        self._study, self._roster, self._say, self._at_once = study, roster, say, at_once
        self._clock, self._sleep = clock, sleep
        self._online: frozenset[int] = frozenset()
        self._looked = float("-inf")
        self._node_of: dict[str, int] = {}
        self._greeted: dict[str, int] = {}  # hello messages without answer, and their nodes
        self._settled: set[int] = set()  # nodes that have said who they are, for good or ill
        self._refused: dict[str, str] = {}  # why nodes are not taken, by the site that they claim to be

    def gather(self, least: int) -> None:
        """Wait for the sites.

        Args:
            least: How many the study needs.

        Raises:
            StudyError: Two nodes claim to be the same site, or a site has another study or roster.
            LinkError: Fewer than `least` have come in time.
        """
        ends = self._clock() + self._patience.gather
        while len(self._node_of) < len(self._sites) and self._clock() < ends:
            self._roll_call()
            if self._refused:
                raise StudyError("; ".join(self._refused.values()))
            self._sleep(self._patience.poll)
        missing = [name for name in self._sites if name not in self._node_of]
        if len(self._node_of) < least:
            raise LinkError(
                f"{len(self._node_of)} of {len(self._sites)} sites came within {self._patience.gather:g} s, and "
                f"{least} are needed; without {', '.join(missing)}: is their SuperNode registered and running, and "
                f"{self._beside}?"
            )
        if missing:
            self._say(f"without {', '.join(missing)} for now: not here after {self._patience.gather:g} s")

    def present(self) -> dict[str, int]:
        """The sites that are here now, and their nodes."""
        self._roll_call()
        return {name: node for name, node in self._node_of.items() if node in self._online}

    def exchange(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Send each site its request and give the replies as they come.

        Ends when all have answered, at the stage's deadline, or where all others have been away for a while.
        """
        start = self._clock()
        ends = min(start + self._patience.stage, self.deadline)
        waiting = set(requests)
        sent: dict[str, str] = {}
        due = dict.fromkeys(requests, start)
        while waiting and (now := self._clock()) < ends:
            self._roll_call()
            here = {name for name in waiting if self._node_of.get(name) in self._online}
            for name in sorted(here - set(sent.values())):
                if self._at_once is not None and len(sent) >= self._at_once:
                    break
                if due[name] <= now and (identifier := self._send(name, requests[name], ends)) is not None:
                    sent[identifier] = name
            if not here and not sent and now >= start + self._patience.absent:
                return
            for message in self._grid.pull_messages(list(sent)) if sent else ():
                name = sent.pop(message.metadata.reply_to_message_id)
                body = self._body(name, message)
                if body is None:
                    due[name] = now + min(5.0, self._patience.resend)
                else:
                    waiting.remove(name)
                    yield name, body
            if waiting:
                self._sleep(self._patience.poll)

    def _send(self, name: str, body: bytes, ends: float) -> str | None:
        """Send a request; it is void after a while, so that a site never has two to answer."""
        left = ends - self._clock()
        message = Message(
            packed(body),
            self._node_of[name],
            self.message_type,
            ttl=max(1.0, min(self._patience.resend, left)),
            group_id="secagg",
        )
        identifiers = list(self._grid.push_messages([message]))
        return identifiers[0] if identifiers and identifiers[0] else None

    def _body(self, name: str, message: Message) -> bytes | None:
        """The reply's body, or None where there is none and the site is asked again."""
        if message.has_error():
            return None  # the node went away, or the message is void
        try:
            body = unpacked(message)
        except LinkError as error:
            self._say(f"{name}: {error}")
            return None
        if body is None:
            self._say(f"{name}: could not answer; its own log says why")
        return body

    def _roll_call(self) -> None:
        """See who is there, and ask those who have not said who they are."""
        if (now := self._clock()) >= self._looked + 1.0:
            self._looked, self._online = now, frozenset(self._grid.get_node_ids())
            for node in self._online - self._settled - set(self._greeted.values()):
                message = Message(packed(b""), node, self._hello, ttl=self._patience.resend, group_id="secagg")
                identifiers = list(self._grid.push_messages([message]))
                if identifiers and identifiers[0]:
                    self._greeted[identifiers[0]] = node
        if self._greeted:
            for message in self._grid.pull_messages(list(self._greeted)):
                node = self._greeted.pop(message.metadata.reply_to_message_id)
                if not message.has_error():
                    self._settle(node, message)

    def _settle(self, node: int, message: Message) -> None:
        try:
            body = unpacked(message)
            if body is None:
                return  # its own process is not up yet; asked again
            hello = decode(body, Hello)
        except (LinkError, DecodeError) as error:
            self._settled.add(node)
            self._say(f"node {node}: does not say which site it is ({error}); it is not asked")
            return
        self._settled.add(node)
        name = hello.name
        if name not in self._sites:
            self._say(f"node {node}: says it is {name!r}, which is none of the {self._agreed}'s sites; it is not asked")
            return
        if hello.study != self._study:
            self._refuse(name, f"{self._agreed}.toml", hello.study, self._study)
        elif hello.roster != self._roster:
            self._refuse(name, "roster", hello.roster, self._roster)
        elif (other := self._node_of.get(name)) is not None and other in self._online:
            self._refused[name] = f"two nodes say that they are {name} ({other} and {node}): end the one that is not"
            self._say(self._refused[name])
        else:
            self._node_of[name] = node

    def _refuse(self, name: str, what: str, theirs: bytes, ours: bytes) -> None:
        self._refused[name] = (
            f"{name} has another {what} (digest {theirs.hex()[:16]}) than the server ({ours.hex()[:16]}): give both "
            "the same file"
        )
        self._say(self._refused[name])
