"""Runs the attacks of `attacks.md`, each against a copy of the library without the guard and against the library.

    python docs/attacks.py

A guard is removed by its text: a `diff` block names the file and shows the lines that go and those that come. Where
they do not stand in the file exactly once, the document is out of date and nothing is run. The library itself is never
changed: the copy is in a folder of its own, and an attack on it runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "attacks.md"


class Attack(NamedTuple):
    """A section of the document.

    Attributes:
        title: Its heading.
        guard: The diff that removes the guard.
        script: What the attacker runs, what every attack shares included.
        without: What the document says that it prints without the guard.
        here: What it says that it prints here.
    """

    title: str
    guard: str
    script: str
    without: str
    here: str


def attacks(text: str) -> list[Attack]:
    """The attacks of the document. The first Python block is what all of them share."""
    head, *sections = re.split(r"^## (?=\d)", text, flags=re.MULTILINE)
    shared = block(head, "python")[0]
    found = []
    for section in sections:
        (guard,), (script,) = block(section, "diff"), block(section, "python")
        without, here = block(section, "text")
        found.append(Attack(section.partition("\n")[0], guard, shared + script, without, here))
    return found


def block(text: str, language: str) -> list[str]:
    """The contents of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def remove(guard: str, folder: Path) -> None:
    """Apply a diff in a copy of the tree.

    Raises:
        ValueError: The lines that should go do not stand in the file exactly once.
    """
    first, *lines = guard.splitlines()
    file = folder / first.removeprefix("--- ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    source = file.read_text(encoding="utf-8")
    if source.count(before) != 1:
        raise ValueError(f"{first}: expected these lines once, found them {source.count(before)} times:\n{before}")
    file.write_text(source.replace(before, after), encoding="utf-8")


def run_without(attack: Attack) -> str:
    """What an attack prints with a copy of the library that lacks the guard."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "secagg", Path(folder, "secagg"), ignore=shutil.ignore_patterns("__pycache__"))
        remove(attack.guard, Path(folder))
        path = os.pathsep.join((folder, str(ROOT)))
        done = subprocess.run(
            [sys.executable, "-c", attack.script],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    return done.stdout + "".join(done.stderr.splitlines(keepends=True)[-1:])


def run_here(attack: Attack) -> str:
    """What it prints with the library as it is."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(attack.script, DOCUMENT.name, "exec"), {})
        except Exception as error:  # as the interpreter would tell it
            print(*traceback.format_exception_only(error), sep="", end="")
    return printed.getvalue()


def main() -> None:
    """Print what happens."""
    sys.path.insert(0, str(ROOT))
    for attack in attacks(DOCUMENT.read_text(encoding="utf-8")):
        print(f"{attack.title}\n\nWithout the guard:\n\n{run_without(attack)}\nHere:\n\n{run_here(attack)}")


if __name__ == "__main__":
    main()
