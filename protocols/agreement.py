"""What sites agree on before they let the secure sum under an app of somebody else's: a small TOML file.

The server and every site have a copy of their own. Its digest is in every mask, so that whoever has another copy is in
no sum, and a site takes part in nothing that its copy does not say.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Literal

import msgspec

from protocols.errors import StudyError
from protocols.study import Protocol, check_names, check_protocol
from protocols.toml_file import Section, parse, read_text
from secagg.errors import HeadroomError
from secagg.fixed_point import FixedPoint, plan
from secagg.keys import Roster
from secagg.masking.params import Params, Session, least_threshold

FORMAT = 1
Kind = Literal["train", "evaluate"]


class Agreement(Section, frozen=True):
    """The file's content.

    Attributes:
        name: For people.
        sites: Names of all sites, at least three, as on the roster.
        most_sums: Sums that a site takes part in, of training and of evaluation together.
        weight: Name of the metric that says how much a site's reply weighs: a whole number, 0 to
            `protocol.max_weight`.
        max_integer_update: Largest change of an entry of an array of integers, such as BatchNorm's
            `num_batches_tracked`; such entries are averaged like all others, and rounded. Without it, arrays of
            integers must come back as they were sent.
        protocol: How vectors are summed. `max_update` is of an entry's change; larger ones are clipped.
        train: Metrics that training gives beside the weight, each with its largest absolute value. One that is larger
            is refused at the site: clipped, it would be wrong without anyone's notice.
        evaluate: The same of evaluation.

    Raises:
        StudyError: What cannot be; the message names the key.
    """

    name: str
    sites: tuple[str, ...]
    most_sums: int
    weight: str = "num-examples"
    max_integer_update: int | None = None
    protocol: Protocol = Protocol()
    train: dict[str, float] = msgspec.field(default_factory=dict)
    evaluate: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.name, self.sites, "sites[{}]")
        table, default = self.protocol, Protocol()
        if table.aggregation != "masked":
            _refuse("protocol.aggregation", '"masked", the only way to sum under an app', table.aggregation)
        for key in ("ring_bits", "max_failed_rounds"):
            if (came := getattr(table, key)) != getattr(default, key):
                _refuse(f"protocol.{key}", "nothing: an app's strategy has no use for it", came)
        check_protocol(table, self.sites)
        for key, value in (("most_sums", self.most_sums), ("max_integer_update", self.max_integer_update)):
            if value is not None and not 1 <= value < 1 << 53:
                _refuse(key, "at least 1 and below 2^53", value)
        _check_name("weight", self.weight)
        for kind, metrics in (("train", self.train), ("evaluate", self.evaluate)):
            for name, largest in metrics.items():
                _check_name(f"{kind}.{name}", name)
                if name == self.weight:
                    _refuse(f"{kind}.{name}", "none: the weight's bound is protocol.max_weight", largest)
                if not (math.isfinite(largest) and largest > 0):
                    _refuse(f"{kind}.{name}", "its largest absolute value, a finite number above 0", largest)
        try:
            _ = self.fixed_point("train"), self.fixed_point("evaluate")
        except HeadroomError as error:
            raise StudyError(f"protocol: {error}") from error

    @property
    def site_names(self) -> tuple[str, ...]:
        """All sites in the order of the roster."""
        return tuple(sorted(self.sites))

    @property
    def threshold(self) -> int:
        """How many sites must stay in a sum."""
        return self.protocol.threshold or least_threshold(len(self.sites), self.protocol.mode)

    @property
    def digest(self) -> bytes:
        """32 bytes of SHA-256 over all of it; the order of names makes no difference."""
        agreed = msgspec.structs.replace(self, sites=self.site_names)
        content = msgspec.msgpack.encode(agreed, order="sorted")
        return hashlib.sha256(b"secagg agreement %d\0" % FORMAT + content).digest()

    def metrics(self, kind: Kind) -> dict[str, float]:
        """Names of the metrics in the order in which they are summed, with their largest absolute values."""
        return dict(sorted((self.train if kind == "train" else self.evaluate).items()))

    def fixed_point(self, kind: Kind) -> FixedPoint:
        """How values become ring elements. Metrics are scaled so that their largest value is the largest entry."""
        table = self.protocol
        largest = table.max_update if kind == "train" else 1.0
        return plan(len(self.sites), largest, table.max_weight, fraction_bits=table.fraction_bits)

    def params(self, roster: Roster) -> Params:
        """Participants, threshold and mode of every sum.

        Raises:
            StudyError: The roster is of other sites.
        """
        names = tuple(member.name for member in roster.members)
        if names != self.site_names:
            raise StudyError(f"sites: the agreement has {list(self.site_names)}, the roster {list(names)}")
        return Params(roster, self.threshold, self.protocol.mode)

    def session(self, params: Params, number: int) -> Session:
        """What the keys of one sum are agreed for."""
        return Session(params, self.digest, number)


def load_agreement(path: str | Path) -> Agreement:
    """Read an agreement.

    Raises:
        StudyError: The file is missing, is no TOML, or asks for what cannot be; one line, with the path in the file.
    """
    return parse_agreement(read_text(path, StudyError), name=str(path))


def parse_agreement(text: str, *, name: str = "agreement.toml") -> Agreement:
    """An agreement from the text of its file; `name` is the file's, for messages.

    Raises:
        StudyError: As `load_agreement`.
    """
    return parse(text, Agreement, name=name, error_type=StudyError)


def _check_name(path: str, name: str) -> None:
    if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,64}", name):
        _refuse(path, "a name of 1 to 64 characters in one line", name)


def _refuse(path: str, expected: str, came: object) -> None:
    raise StudyError(f"{path}: expected {expected}, got {came!r}")
