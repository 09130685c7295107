"""The budget ledger among processes: never less than was spent, whoever races and whoever is killed."""

import multiprocessing
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dp import ledger as ledger_module
from dp import ledger_check
from dp.errors import BudgetExceeded, LedgerLocked
from dp.ledger_store import read_rows
from tests.dp.ledgers import (
    cap,
    gaussian,
    holds,
    made,
    of,
    opened,
    reserve,
    verify,
)

# --- several processes


def race(path, attempts, barrier, results):
    barrier.wait()
    for _ in range(attempts):
        with opened(path) as ledger:
            try:
                reserve(ledger)
            except BudgetExceeded:
                continue
            results.put(1)


def test_a_row_that_another_process_writes_while_one_reads_is_not_missing(tmp_path, monkeypatch):
    """The number that the file has given last is of the same moment as the rows."""
    path = made(tmp_path)
    with opened(path) as reader, opened(path) as writer:
        original = ledger_module.highest

        def meanwhile(database):
            if database is reader._database:
                reserve(writer)
            return original(database)

        monkeypatch.setattr(ledger_module, "highest", meanwhile)
        before = reader.head().sequence
        monkeypatch.undo()
        assert reader.head().sequence > before


def test_processes_that_race_never_go_above_the_cap_together(tmp_path):
    path = made(tmp_path, cap=cap(of(gaussian(5))))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    racers = [context.Process(target=race, args=(path, 4, barrier, results)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
        assert racer.exitcode == 0
    assert sum(row.kind == "reserve" for row in read_rows(path).rows) == 5
    assert results.qsize() == 5
    assert holds(path).total.epsilon == of(gaussian(5))


def test_two_who_have_the_ledger_open_see_each_others_spending(tmp_path):
    path = made(tmp_path, cap=cap(of(gaussian(2))))
    with opened(path) as one, opened(path) as two:
        reserve(one)
        reserve(two)
        for ledger in (one, two):
            with pytest.raises(BudgetExceeded):
                reserve(ledger)
            assert ledger.spent("all").epsilon == of(gaussian(2))


def test_a_look_at_a_ledger_in_use_sees_a_whole_one_and_leaves_no_trace(path):
    with opened(path) as ledger:
        reserve(ledger)
        before = sorted(p.name for p in path.parent.iterdir())
        assert len(read_rows(path).rows) == 2
        assert sorted(p.name for p in path.parent.iterdir()) == before
    os.chmod(path, 0o400)
    content = path.read_bytes()
    assert len(read_rows(path).rows) == 2
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["north.ledger"]


def test_a_look_while_others_write_never_sees_a_torn_ledger(path):
    stop = threading.Event()

    def write():
        with opened(path) as ledger:
            while not stop.is_set():
                ledger.set_cap(random.uniform(5, 10), time=2.0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        looked = 0
        for _ in range(20):
            try:
                assert examine_chain(read_rows(path)) == []
                looked += 1
            except LedgerLocked:
                continue
    finally:
        stop.set()
        writer.join()
    holds(path)


def examine_chain(stored):
    return ledger_check._chain(stored, verify)


# --- killed


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from dp.accounting import Spent
from dp.ledger import Ledger
from dp.ledger_check import replay
from dp.ledger_store import read_rows
from tests.dp.ledgers import *
from tests.dp.test_ledger_processes import examine_chain

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
path, log = made(folder, cap=cap(1e6)), folder / "released"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def releases(seed, mode):
    # In a process of its own, until it is killed. The account is not what this is about, and takes its time.
    import dp.ledger
    dp.ledger.spent = lambda *_: Spent(epsilon=0.0, epsilon_rdp=0.0, delta=1e-5, relation=ADD)
    draw = random.Random(seed)

    def sign(payload):
        if mode == "sign" and draw.random() < 0.2:
            die()
        return KEYS["north"].sign(payload)

    with Ledger.open(path, site="north", sign=sign, verify=verify) as ledger:
        if mode == "step":
            # SQLite calls back at every step of its own machine: the kill falls inside of a statement.
            left = [draw.randrange(1, 3000)]
            def step():
                left[0] -= 1
                if left[0] <= 0:
                    die()
            ledger._database.set_progress_handler(step, 1)
        while True:
            planned, actual = gaussian(draw.randrange(2, 4)), gaussian(draw.randrange(0, 3))
            reservation = reserve(ledger, planned)
            # The release: from here on it may be out in the world.
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, b"%d %d\\n" % (reservation.sequence, actual.steps))
            os.close(descriptor)
            if mode == "run" and draw.random() < 0.3:
                die()
            ledger.commit(reservation, actual, time=2.0)
            if mode == "between" and draw.random() < 0.3:
                die()

reserved = committed = 0
for seed in range(kills):
    mode = ("sign", "step", "run", "between", "clock")[seed % 5]
    child = os.fork()
    if not child:
        releases(seed, mode)
    if mode == "clock":
        time.sleep(random.Random(seed).uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    released = dict(map(int, line.split()) for line in log.read_text().splitlines()) if log.exists() else {}
    assert examine_chain(read_rows(path)) == []
    charges = replay(read_rows(path).rows).charges
    # Every release is charged, and at no less than it was.
    assert set(released) <= set(charges)
    for number, charge in charges.items():
        assert charge.counted.steps >= released.get(number, 0)
        assert charge.actual is None or charge.actual.steps == released[number]
    reserved, committed = len(charges), sum(charge.actual is not None for charge in charges.values())
total = sum(released.values())
with opened(path) as ledger:
    assert ledger.spent("all").epsilon >= of(gaussian(total))
print(reserved, committed, total)
"""


def script(text, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def survive(tmp_path, kills):
    reserved, committed, total = map(int, script(KILLED, tmp_path, kills).split())
    assert kills / 10 < committed < reserved  # kills fell on either side of the commit
    assert total > 0


def test_kills_at_any_point_never_lose_spending(tmp_path):
    survive(tmp_path, 20)


@pytest.mark.slow
def test_two_hundred_kills_never_lose_spending(tmp_path):
    survive(tmp_path, 200)


MAKING = """
import os, signal, sys
from pathlib import Path
from dp import ledger_store
from dp.ledger_store import read_rows
from tests.dp.ledgers import *
from tests.dp.test_ledger_processes import examine_chain

def deadly(call, left):
    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return dying

for step in range(1000):
    folder = Path(sys.argv[1]) / str(step)
    folder.mkdir()
    child = os.fork()
    if not child:
        left = [step]
        for name in ("open", "close", "fsync", "link", "unlink"):
            setattr(os, name, deadly(getattr(os, name), left))
        ledger_store.insert = deadly(ledger_store.insert, left)
        made(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if (folder / "north.ledger").exists():
        holds(folder / "north.ledger")
    else:
        made(folder)
    if not status:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(step)
"""


def test_a_ledger_that_was_being_made_when_the_process_was_killed_is_whole_or_not_there(tmp_path):
    assert int(script(MAKING, tmp_path)) > 8
