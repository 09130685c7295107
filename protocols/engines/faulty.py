"""An engine that loses messages on purpose, to see what a study makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from protocols.engines import Engine
from protocols.errors import StudyError
from protocols.messages import Request
from secagg.wire import decode


class Fault(Struct, frozen=True):
    """One thing that goes wrong.

    Attributes:
        site: Whose message it is.
        stage: At which stage. Where keys are agreed ahead, their stages are part of the sum's before, and that
            is lost with them.
        round: In which round, or None for every one.
        kind: "lost-request" (the site never sees it), "lost-reply" (the site has done its work) or "corrupt" (one bit
            of the reply is flipped).
    """

    site: str
    stage: str
    round: int | None = None
    kind: Literal["lost-request", "lost-reply", "corrupt"] = "lost-request"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault from `SITE:STAGE` or `SITE:STAGE:ROUND`.

        Raises:
            StudyError: Another form.

        >>> Fault.parse("va:MaskedInput:3")
        Fault(site='va', stage='MaskedInput', round=3, kind='lost-request')
        """
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(parts) or not (len(parts) == 2 or parts[2].isdecimal()):
            raise StudyError(f"a drop-out is given as SITE:STAGE or SITE:STAGE:ROUND, got {text!r}")
        return cls(parts[0], parts[1], int(parts[2]) if len(parts) == 3 else None)


class _Some(Mapping[str, bytes]):
    """The requests to some of the sites, looked up when they are sent: all of them take much memory."""

    def __init__(self, requests: Mapping[str, bytes], names: tuple[str, ...]) -> None:
        self._requests, self._names = requests, names

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return self._requests[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Faulty:
    """Wraps another engine and makes the listed faults happen."""

    def __init__(self, engine: Engine, faults: tuple[Fault, ...]) -> None:
        self._engine, self._faults = engine, faults

    def exchange(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """The wrapped engine's exchange, less what is lost."""
        hit = {name: self._fault(name, decode(request, Request)) for name, request in requests.items()}
        names = tuple(name for name, fault in hit.items() if fault is None or fault.kind != "lost-request")
        for name, reply in self._engine.exchange(_Some(requests, names)):
            fault = hit[name]
            if fault is None:
                yield name, reply
            elif fault.kind == "corrupt":
                yield name, reply[:-1] + bytes([reply[-1] ^ 1])

    def _fault(self, site: str, request: Request) -> Fault | None:
        parts: list[tuple[str, int | None]] = [
            (part.stage, part.round) for part in (request.sum, request.keys) if part is not None
        ]
        if request.finish is not None:
            parts.append(("Finish", None))
        for fault in self._faults:
            for stage, number in parts:
                if (fault.site, fault.stage) == (site, stage) and (fault.round is None or fault.round == number):
                    return fault
        return None
