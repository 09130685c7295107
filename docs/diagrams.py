"""Writes the state diagrams and the table of trips in `protocol.md` from the code.

    python docs/diagrams.py

A diagram's arrows are a module's transition functions: the state that one takes, the state that it gives, and the
messages in and out are read off its signature. What stands between a pair of markers in the document is replaced.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args, get_type_hints

from protocols.aggregation import Masked
from secagg.masking import client, server
from secagg.masking.params import Session
from secagg.wire import Message

DOCUMENT = Path(__file__).parent / "protocol.md"
CLIENT_STATES: tuple[type, ...] = get_args(client.ClientState)
SERVER_STATES: tuple[type, ...] = tuple(
    kind for _, kind in inspect.getmembers(server, inspect.isclass) if kind.__module__ == server.__name__
)


class Arrow(NamedTuple):
    """One transition: from no state at the beginning."""

    source: type | None
    target: type
    function: str
    comes: tuple[str, ...]
    goes: tuple[str, ...]


def arrows(module: ModuleType, states: tuple[type, ...]) -> list[Arrow]:
    """The public functions of a module from a state, or from the session, to a state; in the order of the module."""
    found = []
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_"):
            hints = get_type_hints(function)
            given = kinds(hints.pop("return"))
            targets = [kind for kind in given if kind in states]
            taken = [kind for hint in hints.values() for kind in kinds(hint)]
            sources: list[type | None] = [kind for kind in taken if kind in states]
            if Session in taken:
                sources.append(None)
            comes, goes = messages(taken), messages(given)
            found += [Arrow(a, b, name, comes, goes) for a, b in itertools.product(sources, targets)]
    return found


def kinds(hint: Any) -> list[type]:
    """The classes in a type: those of a tuple, a union, and the values of a mapping."""
    inner = get_args(hint)
    return [kind for each in inner for kind in kinds(each)] if inner else [hint]


def messages(of: list[type]) -> tuple[str, ...]:
    """Names of those that go over the wire."""
    return tuple(kind.__name__ for kind in of if isinstance(kind, type) and issubclass(kind, Message))


def states_of(module: ModuleType, states: tuple[type, ...]) -> Iterator[str]:
    """A diagram of one side."""
    found = arrows(module, states)
    yield from ("```mermaid", "stateDiagram-v2")
    for source, target, function, comes, goes in found:
        begin = "[*]" if source is None else source.__name__
        label = f"{function} ({', '.join(comes)})" if comes else function
        yield f"    {begin} --> {target.__name__}: {label}" + (f" / {', '.join(goes)}" if goes else "")
    ends = {arrow.target for arrow in found} - {arrow.source for arrow in found}
    yield from (f"    {state.__name__} --> [*]" for state in states if state in ends)
    yield "```"


def places() -> Iterator[str]:
    """A diagram of what a site keeps: the keys that wait for a sum, and the sum that is under way."""
    scheme = Masked("active")
    after = dict(zip((*scheme.setup, *scheme.stages), CLIENT_STATES, strict=True))
    first, last = scheme.stages[0], scheme.stages[-1]
    yield from ("```mermaid", "stateDiagram-v2")
    for place, stages, leaves in (("keys", scheme.setup, f"{first}, on to the sum"), ("sum", scheme.stages[:-1], last)):
        ids = [f"{place}{i}" for i in range(len(stages) + 1)]
        held = ["nothing", *(after[stage].__name__ for stage in stages)]
        yield f'    state "place of the {place}" as {place} {{'
        yield from (f'        state "{what}" as {each}' for each, what in zip(ids, held, strict=True))
        yield f"        [*] --> {ids[0]}"
        for each, following, stage in zip(ids, [*ids[1:], ids[0]], [*stages, leaves], strict=True):
            yield f"        {each} --> {following}: {stage}"
        yield "    }"
    yield "```"


def trips() -> Iterator[str]:
    """A table of what travels together."""
    yield from ("| mode | trip | sum r | keys of sum r + 1 |", "|---|---|---|---|")
    for mode in ("active", "semi-honest"):
        scheme = Masked(mode)
        for number, stage in enumerate(scheme.stages, 1):
            yield f"| {mode} | {number} | {stage} | {scheme.ahead.get(stage, '')} |"


def blocks() -> dict[str, str]:
    """Every marker's name and what belongs there."""
    return {
        "participant": "\n".join(states_of(client, CLIENT_STATES)),
        "server": "\n".join(states_of(server, SERVER_STATES)),
        "site": "\n".join(places()),
        "trips": "\n".join(trips()),
    }


def written(text: str) -> str:
    """The document with every block as the code has it.

    Raises:
        ValueError: A pair of markers is missing.
    """
    for name, block in blocks().items():
        begin, end = f"<!-- {name}: written by docs/diagrams.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        text, count = pattern.subn(lambda _, whole=f"{begin}\n\n{block}\n\n{end}": whole, text)
        if count != 1:
            raise ValueError(f"{DOCUMENT.name}: expected {begin} and {end} once, found them {count} times")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
