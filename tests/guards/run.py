"""Remove every check in the modules of `guards.toml`, one at a time, and tell which removals no test notices.

`make guards` does it for all, `make guards SAMPLE=40` for some of every module. It works in copies of the tree, so the
tree itself is never changed, and needs nothing but the tests' own dependencies and cosmic-ray.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import use_mutation
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import TestOutcome

from tests.guards.operators import OPERATORS, tidy

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("guards.toml")
# Hypothesis's "ci" profile draws the same examples every time.
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=ci"]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs")


class Key(NamedTuple):
    """What a justification names a guard by: no line number, so that it outlives edits elsewhere."""

    file: str
    function: str
    guard: str


class Guard(NamedTuple):
    """A check, and how cosmic-ray is told to remove it."""

    key: Key
    line: int
    operator: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.key.file}:{self.line}  {self.key.function}: {self.key.guard}"


class Outcome(NamedTuple):
    """What came of removing a guard.

    Attributes:
        kind: "killed", "survived", "timed out" or "broken": the module no longer imports, which shows nothing.
        by: The test that noticed, or what broke.
    """

    guard: Guard
    kind: str
    by: str = ""


class Config(NamedTuple):
    """Whose guards, which tests to run for each package, and the guards that are known to survive."""

    modules: list[str]

    timeout_s: float
    steps: dict[str, list[list[str]]]
    first: dict[str, list[str]]
    justified: dict[Key, str]


def load_config(path: Path = CONFIG) -> Config:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    entries = table.get("justified", [])
    justified = {Key(e["file"], e["function"], e["guard"]): e["why"] for e in entries}
    if len(justified) != len(entries) or not all(why.strip() for why in justified.values()):
        raise SystemExit(f"{path.name}: a guard is justified twice, or without a reason")
    return Config(table["modules"], table["timeout_s"], table["steps"], table.get("first", {}), justified)


def find_guards(root: Path = ROOT) -> list[Guard]:
    """All guards by file and line. Of those with the same text in one function, all but the first are numbered."""
    guards = []
    for path in sorted({path for pattern in load_config().modules for path in root.glob(pattern)}):
        tree = get_ast_from_path(path)
        nodes = list(ast_nodes(tree))
        if wrong := next((node for node in nodes if node.type in ("error_node", "error_leaf")), None):
            raise SystemExit(f"{path}:{wrong.start_pos[0]}: the parser does not know this syntax, so guards are missed")
        found = []
        for name, operator in OPERATORS.items():
            removals = ((node, removal) for node in nodes for removal in operator().removals(node))
            for occurrence, (node, removal) in enumerate(removals):
                found.append((removal.at.start_pos, function_of(node), removal.text, name, occurrence))
        seen: Counter[tuple[str, str]] = Counter()
        for (line, _), function, text, name, occurrence in sorted(found):
            seen[function, text] += 1
            count = seen[function, text]
            key = Key(path.relative_to(root).as_posix(), function, text if count == 1 else f"{text} #{count}")
            guards.append(Guard(key, line, name, occurrence))
    return guards


def function_of(node) -> str:
    """The qualified name of the function, or of the class or module attribute, that a node belongs to."""
    around = []
    while node is not None:
        around.insert(0, node)
        node = node.parent
    names = [each.name.value for each in around if each.type in ("funcdef", "classdef")]
    if not any(each.type == "funcdef" for each in around):
        names += [tidy(each.children[0]) for each in around if each.type == "expr_stmt"]
    return ".".join(names)


def sample(guards: list[Guard], size: int, seed: str) -> list[Guard]:
    """So many guards, from every module in turn, so that none is left out while there is room."""
    draw = random.Random(seed)
    by_file: dict[str, list[Guard]] = {}
    for guard in draw.sample(guards, len(guards)):
        by_file.setdefault(guard.key.file, []).append(guard)
    turns = sorted(by_file.values(), key=lambda of_file: draw.random())
    chosen: list[Guard] = []
    while len(chosen) < min(size, len(guards)):
        chosen += [of_file.pop() for of_file in turns if of_file]
    return sorted(chosen[:size])


def pytest_run(paths: Iterable[str], timeout_s: float) -> tuple[str, str]:
    """("passed", "killed", "timed out" or "broken"; the test that failed, or the end of the output)."""
    outcome, output = run_tests(shlex.join([*PYTEST, *paths]), timeout_s)
    if outcome == TestOutcome.SURVIVED:
        return "passed", ""
    if output == "timeout":
        return "timed out", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S*?::[^\n\[]*?)(?:\[| - |$)", output, re.MULTILINE)
    return ("killed", failed[1].strip()) if failed else ("broken", output[-2000:])


def try_guard(guard: Guard, config: Config) -> Outcome:
    """Remove a guard in the copy of the tree that is the working folder, and run tests until one fails."""
    first = config.first.get(guard.key.file, [])
    with use_mutation(Path(guard.key.file), OPERATORS[guard.operator](), guard.occurrence) as (_, mutated):
        try:
            compile(mutated, guard.key.file, "exec")
        except SyntaxError as error:
            return Outcome(guard, "broken", str(error))
        for paths in ([first] if first else []) + config.steps[guard.key.file.partition("/")[0]]:
            kind, by = pytest_run(paths, config.timeout_s)
            if kind != "passed":
                return Outcome(guard, kind, by)
    return Outcome(guard, "survived")


def use_copy(folder: Path) -> None:
    """Make a copy of the tree the one that this process's tests import and run in."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)


def check_copies(copies: list[Path], config: Config) -> None:
    """Make sure that the tests can be collected there, and that they import the copy: each fails when it is broken."""
    use_copy(copies[0])
    steps = [step for package in config.steps.values() for step in package]
    paths = [path for step in (*config.first.values(), *steps) for path in step]
    # Leaves compiled modules and tests behind, so that no later run has to compile more than one.
    collected = subprocess.run([*PYTEST, "--collect-only", *paths], check=False, capture_output=True, text=True)
    if collected.returncode:
        raise SystemExit(f"the tests do not even collect:\n{collected.stdout[-3000:]}")
    for other in copies[1:]:
        shutil.copytree(copies[0], other)
    for copy in copies:
        use_copy(copy)
        module = Path("secagg/__init__.py")
        whole = module.read_bytes()
        module.write_text("raise RuntimeError('the copy is imported')\n")
        outcome, output = run_tests(shlex.join([*PYTEST, "--tb=line", "tests/secagg/test_keys.py"]), config.timeout_s)
        module.write_bytes(whole)
        if outcome != TestOutcome.KILLED or "the copy is imported" not in output:
            raise SystemExit(f"the tests in {copy} do not import secagg from there; is it installed over the copy?")


def _start_worker(folders: multiprocessing.Queue[Path]) -> None:
    use_copy(folders.get())


def try_all(guards: list[Guard], config: Config, workers: int) -> Iterator[Outcome]:
    """Outcomes as they come, and at the end a check of the tests that failed: with all guards in place they pass."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="guards-") as folder, contextlib.chdir(here):
        copies = [Path(folder).resolve() / f"copy{i}" for i in range(workers)]
        shutil.copytree(ROOT, copies[0], ignore=NOT_COPIED)
        check_copies(copies, config)
        folders: multiprocessing.Queue[Path] = multiprocessing.Queue()
        for copy in copies:
            folders.put(copy)
        with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(folders,)) as pool:
            killers = set()
            try:
                for future in as_completed([pool.submit(try_guard, guard, config) for guard in guards]):
                    outcome = future.result()
                    if outcome.kind == "killed":
                        killers.add(outcome.by)
                    yield outcome
            finally:  # interrupted: what has not begun is not waited for
                pool.shutdown(wait=True, cancel_futures=True)
        if killers:
            kind, by = pytest_run(sorted(killers), config.timeout_s)
            if kind != "passed":
                raise SystemExit(f"a test fails though no guard is removed, so its failing shows nothing: {kind} {by}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="try so many guards only, spread over all modules")
    parser.add_argument("--seed", help="what the sample is drawn from; by default the commit")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="try only guards whose line of output contains this")
    parser.add_argument("--list", action="store_true", help="list the guards and stop")
    parser.add_argument("--verbose", action="store_true", help="also tell by which test each guard was noticed")
    options = parser.parse_args()

    started = time.monotonic()
    config, guards = load_config(), find_guards()
    stale = config.justified.keys() - {guard.key for guard in guards}
    chosen = [guard for guard in guards if options.only in str(guard)]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if options.sample:
        # Justified guards outlive every test, which takes longest and shows what is known: a full run checks them.
        seed = options.seed or commit()
        chosen = sample([guard for guard in chosen if guard.key not in config.justified], options.sample, seed)
        print(f"{len(chosen)} of {len(guards)} guards, seed {seed}", flush=True)

    totals: Counter[str] = Counter()
    for guard, kind, by in try_all(chosen, config, options.workers):
        justified = guard.key in config.justified
        verdict = f"{'justified' if justified else 'unjustified'} survivor" if kind == "survived" else kind
        if justified and kind in ("killed", "timed out"):
            verdict = "justified but noticed"
        totals[verdict] += 1
        if kind != "killed" or justified or options.verbose:
            note = config.justified[guard.key] if verdict == "justified survivor" else by
            print(f"{verdict}: {guard}" + (f"  ({note})" if note else ""), flush=True)
    for key in sorted(stale):
        print(f"justified but no such guard: {key.file}  {key.function}: {key.guard}")
    kinds = ("killed", "justified survivor", "unjustified survivor", "timed out", "justified but noticed", "broken")
    counts = ", ".join(f"{kind} {totals[kind]}" for kind in kinds if totals[kind] or kind in kinds[:4])
    print(f"guards {len(guards)}, tried {len(chosen)}: {counts}; {time.monotonic() - started:.0f} s")
    return int(bool(stale or totals["unjustified survivor"] or totals["justified but noticed"] or totals["broken"]))


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return result.stdout.strip() or "0"


if __name__ == "__main__":
    sys.exit(main())
