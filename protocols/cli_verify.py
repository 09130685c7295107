"""The command `secagg verify`: what the sites of a study signed, checked offline."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protocols.study import Study
    from secagg.keys import Roster
    from secagg.masking.transcript import Findings, Record

# A thousand sums of a hundred sites make 50 MB.
_LARGEST_BYTES = 1 << 28
_LONGEST_LINE = 1000

_SHOWS = (
    "in every round listed, at least the threshold of sites signed that they used this study configuration (digest "
    "above), threshold and suite, were given this model (digest), and were shown this set of survivors",
    "as long as no more sites help the server than may be missing (all but the threshold), no other set was signed by "
    "enough in that round; and a site gives its part only for a set that the threshold of sites signed",
    "those who signed a round were told of one and the same past: the server had settled on each sum's digest before "
    "it asked for the next sum listed, and on the last one's before the end was signed",
)
_SHOWS_NOT = (
    "that a sum was opened, or is the right sum of the vectors, or that a vector was honest: nobody signs the sum, and "
    "its digest is the server's word",
    "that no other sum was opened: the server may call a round lost after the sites gave their parts, and sites sign "
    "the end without seeing the records, so it may leave out the last ones (each site knows what it has confirmed)",
    "that all went on to the planned end, or how many more sites signed that end than are named here",
    "that the model was stepped along the sum, how privately it was trained, or what the sites' machines keep",
)


def verify(
    transcript: Annotated[
        Path, typer.Argument(metavar="TRANSCRIPT", help="The transcript.bin of a run.", show_default=False)
    ],
    roster: Annotated[
        Path, typer.Option("--roster", help="The sites' keys, from where you trust them.", show_default=False)
    ],
    study: Annotated[
        Path | None, typer.Option("--study", help="Also check that the sums were about this study file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON and nothing else.")] = False,
) -> None:
    """Check what the sites of a study signed, offline and with no trust in the server.

    Exits with 5 where anything does not hold, and names it.
    """
    import msgspec

    from protocols.cli import Exit, fail
    from protocols.rosters import load_roster
    from secagg.errors import DecodeError, SecAggError
    from secagg.masking.transcript import examine

    try:
        keys, expected = load_roster(roster), None
        if study is not None:
            from protocols.study import load_study

            expected = load_study(study)
    except SecAggError as error:
        fail(error, Exit.BAD_INPUT)
    try:
        findings = examine(_read(transcript), keys)
    except FileNotFoundError:
        fail(
            f"{transcript}: there is no such file; plain and semi-honest studies leave none, because nothing in them "
            "is signed, nor does one without an opened sum",
            Exit.BAD_INPUT,
        )
    except OSError as error:
        fail(f"{transcript}: cannot be read: {error.strerror or error}", Exit.BAD_INPUT)
    except DecodeError as error:
        fail(f"{transcript}: {_line(str(error))}", Exit.BAD_INPUT)
    problems = [_line(problem) for problem in findings.problems]
    if expected is not None and findings.records and findings.records[0].context != expected.digest:
        problems.append(
            f"the sums were about another study configuration: digest {findings.records[0].context.hex()[:16]}, and "
            f"that of {study} is {expected.digest.hex()[:16]}"
        )
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(_plain(findings, keys, problems))) + b"\n")
    else:
        _print(findings, keys, expected, holds=not problems)
    if problems:
        if not json:
            for problem in problems:
                typer.echo(f"  {problem}", err=True)
        told = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        fail(f"{transcript} does not hold under {roster}: {told}, listed above", Exit.UNPROVEN)


def _read(path: Path) -> bytes:
    from secagg.errors import DecodeError

    with path.open("rb") as file:
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise DecodeError(f"expected a transcript of at most {_LARGEST_BYTES} bytes, and there are more")
    return data


def _line(text: str) -> str:
    """Text with words of a stranger in it as one line that can neither move the cursor nor fill the screen."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONGEST_LINE])
    return plain if len(text) <= _LONGEST_LINE else f"{plain}..."


def _gaps(records: tuple[Record, ...]) -> list[tuple[int, int]]:
    """First and last of each run of rounds that came before the last record and are not on record."""
    rounds = [-1, *sorted(record.round for record in records)]
    return [(a + 1, b - 1) for a, b in pairwise(rounds) if b > a + 1]


def _plain(findings: Findings, roster: Roster, problems: list[str]) -> dict[str, object]:
    closing = findings.closing
    return {
        "holds": not problems,
        "problems": problems,
        "rounds": [_plain_record(record, roster) for record in findings.records],
        "rounds_not_on_record": _gaps(findings.records),
        "end": None if closing is None else {"head": closing.head.hex(), "signed": _names(closing.signatures, roster)},
        "shows": _SHOWS if not problems else (),
        "does_not_show": _SHOWS_NOT,
    }


def _plain_record(record: Record, roster: Roster) -> dict[str, object]:
    return {
        "round": record.round,
        "purpose": record.subject.purpose,
        "threshold": record.threshold,
        "suite": record.suite,
        "study_digest": record.context.hex(),
        "model_digest": record.subject.model_digest.hex(),
        "dimension": record.subject.dimension,
        "ring_bits": record.subject.ring_bits,
        "sum_digest": record.sum_digest.hex(),
        "advertised": _names(record.directory, roster),
        "shared": _names(record.commitments, roster),
        "survivors": _names(record.survivors, roster),
        "confirmed": _names(record.confirmations, roster),
    }


def _names(numbers: Iterable[int], roster: Roster) -> list[str]:
    return [roster.name(u) for u in sorted(numbers)]


def _print(findings: Findings, roster: Roster, study: Study | None, *, holds: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = Console()
    if not holds and findings.records:
        screen.print("What the file says, which does not hold:\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("round", "summed", "model", "sum", "survivors", "signed by"):
        table.add_column(heading, justify="right" if heading == "round" else "left")
    for record in findings.records:
        survivors = _names(record.survivors[: len(roster)], roster)
        cells = (
            str(record.round),
            _line(record.subject.purpose),
            record.subject.model_digest.hex()[:12],
            record.sum_digest.hex()[:12],
            ", ".join(survivors),
            f"{len(record.confirmations)} of {len(roster)}",
        )
        table.add_row(*map(Text, cells))
    if findings.records:
        screen.print(table)
    if not holds or findings.closing is None:
        return
    first, signed = findings.records[0], _names(findings.closing.signatures, roster)
    lines = [
        f"\n{_sums(len(findings.records))} over study {first.context.hex()[:16]} (threshold {first.threshold} of "
        f"{len(roster)}); the end is signed by {', '.join(signed)}. Everything holds."
    ]
    if gaps := [str(a) if a == b else f"{a} to {b}" for a, b in _gaps(findings.records)]:
        lines.append(
            f"Numbers of rounds not on record: {', '.join(gaps)}. Ask the sites if they gave their parts there."
        )
    if study is not None:
        trained = sum(record.subject.purpose == "train" for record in findings.records)
        lines.append(f"Of the {study.rounds} rounds of training in the study file, {trained} are on record.")
    lines.append("\nWhat this shows, if the roster has the right keys, and with no trust in the server:")
    lines += [f"- {claim};" for claim in _SHOWS[:-1]] + [f"- {_SHOWS[-1]}."]
    lines.append("What this does not show:")
    lines += [f"- {claim};" for claim in _SHOWS_NOT[:-1]] + [f"- {_SHOWS_NOT[-1]}."]
    screen.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _sums(count: int) -> str:
    return "1 sum" if count == 1 else f"{count} sums"
