"""The budget ledger: never less than was spent, whoever kills, races, edits or puts back."""

import hashlib
import multiprocessing
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dp import ledger as ledger_module
from dp import ledger_check, ledger_rows, ledger_store
from dp.accounting import Spent, spent
from dp.errors import BudgetExceeded, DpError, LedgerError, LedgerLocked, ParameterError
from dp.ledger import Cap, Ledger, Partition, Receipt
from dp.ledger_check import examine, replay, timeline
from dp.ledger_rows import Row, decode_mechanism, encode_mechanism
from dp.ledger_store import read_rows
from dp.mechanisms import DiscreteGaussianSum, PoissonSampledGaussian, Relation, Unit

ADD, REPLACE = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()) for name in ("north", "west")
}
PUBLIC = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}


def signer(site):
    return KEYS[site].sign


def verify(site, payload, signature):
    try:
        Ed25519PublicKey.from_public_bytes(PUBLIC[site]).verify(signature, payload)
    except Exception:
        return False
    return True


def gaussian(steps=1, noise=2.0, rate=1.0):
    """Without sampling and with few steps, the account is quick."""
    return PoissonSampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps, l2_clip_norm=1.0)


def noise_shares(survivors, **changed):
    fields = {
        "unit": Unit.RECORD,
        "sampling_rate": 1.0,
        "steps": 1,
        "l2_sensitivity": 64.0,
        "dimension": 10,
        "l2_clip_norm": 1.0,
        "scale": 64.0,
        "shares": 5,
        "threshold": 3,
        "colluders": 0,
        "survivors": survivors,
        "share_sigma": 100.0,
    }
    return DiscreteGaussianSum(**{**fields, **changed})


def cap(epsilon=10.0, **changed):
    fields = {"delta": 1e-5, "relation": ADD, "unit": Unit.RECORD, "records": 1000}
    return Cap(epsilon=epsilon, **{**fields, **changed})


def made(folder, site="north", **how):
    path = Path(folder) / f"{site}.ledger"
    Ledger.create(path, site=site, sign=signer(site), cap=how.pop("cap", cap()), time=how.pop("time", 1.0), **how)
    return path


def opened(path, site="north", **how):
    return Ledger.open(path, site=site, sign=signer(site), verify=verify, **how)


def reserve(ledger, mechanism=None, **how):
    """Reserve with what a test does not care for filled in; the clock is the one of the ledger."""
    fields = {
        "study": "heart",
        "study_digest": b"heart",
        "cohort": "all",
        "release": "training",
        "relation": ADD,
        "delta": 1e-5,
        "time": 2.0,
    }
    return ledger.reserve(gaussian() if mechanism is None else mechanism, **{**fields, **how})


@pytest.fixture
def path(tmp_path):
    return made(tmp_path)


def epsilon_of(path, cohort="all", site="north"):
    with opened(path, site) as ledger:
        return ledger.spent(cohort).epsilon


def of(*mechanisms, delta=1e-5, relation=ADD):
    return spent(mechanisms, delta, relation).epsilon


def holds(path, **how):
    verdict = examine(read_rows(path), verify, **how)
    assert verdict.findings == ()
    return verdict


def named(path, *says, others=None, **how):
    """The check of a ledger names what is wrong, in lines that have these words."""
    others = {str(other): read_rows(other) for other in others or []}
    findings = examine(read_rows(path), verify, others=others, **how).findings
    assert findings
    for words in says:
        assert any(words in finding for finding in findings), findings
    assert all("\n" not in finding for finding in findings)
    return findings


# --- reserve, run, commit


def test_a_reservation_counts_at_its_worst_until_it_is_committed_as_what_it_was(path):
    with opened(path) as ledger:
        assert ledger.spent("all").epsilon == 0.0
        reservation = reserve(ledger, noise_shares(3))
        assert ledger.spent("all").epsilon == of(noise_shares(3))
        ledger.commit(reservation, noise_shares(5), time=3.0)
        assert ledger.spent("all").epsilon == of(noise_shares(5)) < of(noise_shares(3))
    assert epsilon_of(path) == of(noise_shares(5))
    assert holds(path).total.epsilon == of(noise_shares(5))


def test_a_process_that_ends_after_reserving_has_spent_it(path):
    with opened(path) as ledger:
        reserve(ledger, gaussian(4))
    assert epsilon_of(path) == of(gaussian(4))


def test_a_later_process_commits_by_the_number_of_the_row(path):
    with opened(path) as ledger:
        number = reserve(ledger, gaussian(4)).sequence
    with opened(path) as ledger:
        ledger.commit(number, gaussian(2), time=3.0)
    assert epsilon_of(path) == of(gaussian(2))


def test_releases_of_all_studies_and_kinds_compose(path):
    with opened(path) as ledger:
        for study, kind in (("a", "training"), ("b", "statistic"), ("b", "tuning")):
            reserve(ledger, study=study, study_digest=study.encode(), release=kind)
        assert ledger.spent("all").epsilon == of(gaussian(3))
    rows = read_rows(path).rows
    assert [c.releases for c in ledger_check.costs(replay(rows))] == [(1, 0, 0), (0, 1, 1)]


def test_what_would_exceed_the_cap_is_refused_and_nothing_is_written(tmp_path):
    limit = of(gaussian(3))
    path = made(tmp_path, cap=cap(limit))
    with opened(path) as ledger:
        for _ in range(3):
            reserve(ledger)
        before = ledger.head()
        with pytest.raises(BudgetExceeded) as caught:
            reserve(ledger)
        assert (caught.value.spent, caught.value.next, caught.value.budget) == (limit, of(gaussian(4)), limit)
        assert ledger.head() == before
    assert len(read_rows(path).rows) == 4


def test_what_a_commit_gives_back_can_be_spent(tmp_path):
    path = made(tmp_path, cap=cap(of(gaussian(3))))
    with opened(path) as ledger:
        reservation = reserve(ledger, gaussian(3))
        with pytest.raises(BudgetExceeded):
            reserve(ledger)
        ledger.commit(reservation, gaussian(0), time=3.0)
        reserve(ledger, gaussian(3), time=3.0)


def test_a_study_keeps_to_its_own_epsilon_under_its_own_relation(path):
    promise = {"epsilon": of(gaussian(2), relation=REPLACE), "relation": REPLACE, "delta": 1e-4}
    promise["epsilon"] = of(gaussian(2), relation=REPLACE, delta=1e-4)
    with opened(path) as ledger:
        reserve(ledger, **promise)
        reserve(ledger, study_digest=b"another", study="another")
        reserve(ledger, **promise)
        with pytest.raises(BudgetExceeded) as caught:
            reserve(ledger, **promise)
        assert caught.value.budget == promise["epsilon"]
    holds(path)


def test_a_release_dearer_than_its_reservation_is_recorded_counted_and_told(path):
    with opened(path) as ledger:
        reservation = reserve(ledger, noise_shares(5))
        with pytest.raises(LedgerError, match="row 3: the release cost more than row 2 had reserved"):
            ledger.commit(reservation, noise_shares(3), time=3.0)
        assert ledger.spent("all").epsilon == of(noise_shares(3))
    assert epsilon_of(path) == of(noise_shares(3))
    named(path, "row 2: the release cost more than this row had reserved for it")


def test_committing_again_changes_nothing_and_as_something_else_is_refused(path):
    with opened(path) as ledger:
        reservation = reserve(ledger, gaussian(3))
        ledger.commit(reservation, gaussian(2), time=3.0)
        head = ledger.head()
        ledger.commit(reservation, gaussian(2), time=4.0)
        assert ledger.head() == head
        with pytest.raises(LedgerError, match="row 2 was committed as"):
            ledger.commit(reservation, gaussian(1), time=4.0)
        for number in (1, 3, 99):
            with pytest.raises(LedgerError, match=f"row {number} is no reservation"):
                ledger.commit(number, gaussian(1), time=4.0)
        with pytest.raises(LedgerError, match="hides another unit"):
            ledger.commit(reserve(ledger, time=4.0), noise_shares(3, unit=Unit.PARTICIPANT), time=4.0)
        assert ledger.spent("all").epsilon == of(gaussian(3))


def test_without_a_reference_every_reservation_is_charged_and_with_one_the_same_is_found_again(path):
    with opened(path) as ledger:
        assert reserve(ledger).sequence != reserve(ledger).sequence
        first = reserve(ledger, reference="round 1")
        assert reserve(ledger, reference="round 1", time=5.0) == first
        assert reserve(ledger, reference="round 2").sequence > first.sequence
        assert reserve(ledger, reference="round 1", study_digest=b"x").sequence > first.sequence
        assert reserve(ledger, reference="round 1", cohort="x").sequence > first.sequence
    with opened(path) as ledger:
        assert reserve(ledger, reference="round 1") == first
        ledger.commit(first, gaussian(), time=6.0)
        assert reserve(ledger, reference="round 1", time=7.0) == first
        for another in ({"mechanism": gaussian(2)}, {"release": "tuning"}, {"epsilon": 9.0}, {"delta": 1e-6}):
            with pytest.raises(LedgerError, match="for another release"):
                reserve(ledger, reference="round 1", time=7.0, **another)
        assert ledger.spent("all").epsilon == of(gaussian(6))


def test_whole_numbers_given_for_floats_do_not_break_the_chain(tmp_path):
    path = made(tmp_path, cap=cap(9, records=100), time=1)
    whole = PoissonSampledGaussian(sampling_rate=1, noise_multiplier=2, steps=1, l2_clip_norm=1)
    with opened(path) as ledger:
        ledger.commit(reserve(ledger, whole, time=2, epsilon=8), whole, time=3)
        ledger.set_cap(8, time=4)
    holds(path)


# --- cohorts


PARTS = Partition(column="born", parts={"old": ("1940", "1950"), "young": ("1990",)})


def test_cohorts_overlap_whatever_they_are_called(path):
    with opened(path) as ledger:
        reserve(ledger, cohort="men")
        reserve(ledger, cohort="women")
        assert ledger.spent("men").epsilon == ledger.spent("anything").epsilon == of(gaussian(2))


def test_parts_of_the_declared_partition_compose_in_parallel(tmp_path):
    path = made(tmp_path, partition=PARTS, cap=cap(of(gaussian(3))))
    with opened(path) as ledger:
        reserve(ledger, gaussian(3), cohort="old")
        reserve(ledger, gaussian(2), cohort="young")
        assert ledger.spent("old").epsilon == ledger.spent("all").epsilon == of(gaussian(3))
        assert ledger.spent("young").epsilon == of(gaussian(2))
        for cohort in ("old", "all"):
            with pytest.raises(BudgetExceeded):
                reserve(ledger, cohort=cohort)
        reserve(ledger, cohort="young")
        with pytest.raises(BudgetExceeded):
            reserve(ledger, cohort="undeclared")
    assert holds(path).total.epsilon == of(gaussian(3))


def test_a_cohort_that_is_no_part_is_charged_to_every_part(tmp_path):
    path = made(tmp_path, partition=PARTS)
    with opened(path) as ledger:
        reserve(ledger, cohort="all")
        reserve(ledger, cohort="old")
        assert ledger.spent("old").epsilon == of(gaussian(2))
        assert ledger.spent("young").epsilon == of(gaussian(1))


def test_under_replace_one_even_parts_overlap_because_a_record_may_move_from_one_to_the_other(tmp_path):
    path = made(tmp_path, partition=PARTS, cap=cap(50.0, relation=REPLACE))
    with opened(path) as ledger:
        reserve(ledger, cohort="old")
        reserve(ledger, cohort="young")
        assert ledger.spent("old").epsilon == of(gaussian(2), relation=REPLACE)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"old": ("1940",)}, "at least 2 parts"),
        ({"old": ("1940",), "young": ("1940", "1990")}, "'1940' is in 'old' and 'young'"),
        ({"old": ("1940", "1940"), "young": ("1990",)}, "'1940' is in 'old' and 'old'"),
        ({"old": ("1940",), "young": ()}, "at least one value"),
        ({"": ("1940",), "young": ("1990",)}, "cohort should be"),
    ],
)
def test_what_is_no_partition_is_refused(parts, says):
    with pytest.raises(ParameterError, match=says):
        Partition(column="born", parts=parts)


def test_a_ledger_for_participants_takes_no_release_that_hides_a_record_and_the_other_way_round_it_does(tmp_path):
    with opened(made(tmp_path, cap=cap(unit=Unit.PARTICIPANT))) as ledger:
        with pytest.raises(ParameterError, match="hides a record"):
            reserve(ledger)
        reserve(ledger, noise_shares(3, unit=Unit.PARTICIPANT))
    with opened(made(tmp_path, "west"), "west") as ledger:
        reserve(ledger, noise_shares(3, unit=Unit.PARTICIPANT))


# --- bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": float("nan")},
        {"delta": 0.00101},
        {"records": -1},
        {"relation": "add"},
        {"unit": "patient"},
    ],
)
def test_a_cap_out_of_range_is_refused(bad):
    with pytest.raises(ParameterError):
        cap(**bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": 0.00101}, "delta should be at most 1/1000"),
        ({"relation": "add-or-remove-one"}, "relation"),
        ({"release": "leak"}, "release"),
        ({"study": ""}, "study"),
        ({"study": "\x1b[2J"}, "study"),
        ({"cohort": ""}, "cohort"),
        ({"cohort": "x" * 201}, "cohort"),
        ({"reference": "a\nb"}, "reference"),
        ({"mechanism": "gaussian"}, "mechanism"),
        ({"time": float("inf")}, "time"),
    ],
)
def test_a_reservation_out_of_range_is_refused_before_anything_is_written(path, bad, says):
    with opened(path) as ledger:
        with pytest.raises(ParameterError, match=says):
            reserve(ledger, **bad)
        assert ledger.head().sequence == 1
        reserve(ledger)
    holds(path)


@pytest.mark.parametrize("when", [1.9, -1.0, float("nan")])
def test_a_clock_that_ran_backwards_stops_everything(path, when):
    with opened(path) as ledger:
        reservation = reserve(ledger)
        receipt = other_receipt(path.parent)
        for act in (
            lambda: reserve(ledger, time=when),
            lambda: ledger.commit(reservation, gaussian(), time=when),
            lambda: ledger.set_cap(3.0, time=when),
            lambda: ledger.record_receipts([receipt], time=when),
        ):
            with pytest.raises(LedgerError, match="the clock ran backwards"):
                act()
        assert ledger.head().sequence == 2
        reserve(ledger, time=2.0)


def test_a_missing_ledger_is_told_and_none_is_made(tmp_path):
    with pytest.raises(LedgerError, match=r"there is no ledger\. Put it back"):
        opened(tmp_path / "none")
    with pytest.raises(LedgerError, match="there is no ledger"):
        read_rows(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_another_sites_ledger_and_another_sites_key_are_refused(path, tmp_path):
    with pytest.raises(LedgerError, match="is the ledger of 'north', expected that of 'west'"):
        opened(path, "west")
    with (
        Ledger.open(path, site="north", sign=signer("west"), verify=verify) as ledger,
        pytest.raises(LedgerError, match="the key at hand is not that of 'north'"),
    ):
        reserve(ledger)
    holds(path)
    named(path, "is the ledger of 'north', expected that of 'west'", site="west")


@pytest.mark.parametrize("content", [b"", b"no ledger", b"SQLite format 3\x00" + bytes(4080)])
def test_a_file_that_is_no_ledger_is_told(tmp_path, content):
    path = tmp_path / "north.ledger"
    path.write_bytes(content)
    for look in (opened, read_rows):
        with pytest.raises(LedgerError, match="no ledger"):
            look(path)


def test_a_ledger_is_never_overwritten_and_made_whole_or_not_at_all(path, tmp_path, monkeypatch):
    content = path.read_bytes()
    with pytest.raises(LedgerError, match="exists already"):
        made(tmp_path)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(LedgerError, match="could not be made"):
        made(tmp_path / "nowhere")
    monkeypatch.setattr(ledger_store, "insert", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("full")))
    with pytest.raises(LedgerError, match="could not be made"):
        made(tmp_path, "west")
    assert [p.name for p in tmp_path.iterdir()] == ["north.ledger"]


def test_the_file_syncs_in_full_and_is_in_wal_mode(path):
    with opened(path) as ledger:
        assert ledger._database.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert ledger._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_rows_cannot_be_changed_or_deleted_without_dropping_the_triggers(path):
    with opened(path) as ledger:
        reserve(ledger)
    database = sqlite3.connect(path)
    for statement in (
        "UPDATE row SET delta = 0.5",
        "DELETE FROM row",
        "UPDATE row SET sequence = 9 WHERE sequence = 2",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="never changed or deleted"):
            database.execute(statement)
    database.close()
    holds(path)


def test_a_ledger_that_another_process_has_locked_is_told_and_nothing_is_written(path):
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with opened(path, patience=0.05) as ledger:
        with pytest.raises(LedgerLocked, match="locked by another process"):
            reserve(ledger)
        holder.execute("ROLLBACK")
        assert ledger.head().sequence == 1
        reserve(ledger)
    holder.close()
    assert holds(path).rows == 2


def test_a_full_disk_is_told_nothing_is_charged_and_it_goes_on_when_there_is_room(path):
    with opened(path) as ledger:
        reservation = reserve(ledger, gaussian(3))
        pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")

        def fill():
            for number in range(1000):
                reserve(ledger, gaussian(0), study=f"{number:0200}")

        with pytest.raises(LedgerError, match="the disk is full"):
            fill()
        before, cost = ledger.head(), ledger.spent("all").epsilon
        with pytest.raises(LedgerError, match="the disk is full"):
            ledger.commit(reservation, gaussian(1), time=5.0)
        assert (ledger.head(), ledger.spent("all").epsilon) == (before, cost)
        ledger._database.execute("PRAGMA max_page_count = 1000000")
        ledger.commit(reservation, gaussian(1), time=5.0)
        assert ledger.spent("all").epsilon < cost
    holds(path)


def test_a_disk_that_only_reads_is_told(path, monkeypatch):
    with opened(path) as ledger:
        ledger._database.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerError, match="cannot be read or written"):
            reserve(ledger)


def test_a_change_of_the_cap_is_a_row_and_an_equal_one_is_none(path):
    with opened(path) as ledger:
        ledger.set_cap(10.0, time=2.0)
        assert ledger.head().sequence == 1
        reserve(ledger, gaussian(4))
        ledger.set_cap(0.5, time=3.0)
        assert ledger.cap == cap(0.5)
        with pytest.raises(BudgetExceeded):
            reserve(ledger, time=3.0)
        for bad in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ParameterError):
                ledger.set_cap(bad, time=4.0)
        ledger.set_cap(20.0, time=4.0)
        reserve(ledger, time=4.0)
    assert [row.kind for row in read_rows(path).rows] == ["open", "reserve", "cap", "cap", "reserve"]
    holds(path)


def test_every_kind_of_mechanism_comes_back_as_it_was():
    for mechanism in (gaussian(), noise_shares(4), noise_shares(3, unit=Unit.PARTICIPANT)):
        assert decode_mechanism(encode_mechanism(mechanism)) == mechanism
    with pytest.raises(ParameterError, match="expected a mechanism"):
        encode_mechanism(msgspec.to_builtins(gaussian()))
    text = encode_mechanism(gaussian())
    for bad in ("", "{}", text.replace("Poisson", "Fish"), text.replace('"steps":1', '"steps":-1'), text + " "):
        with pytest.raises(ParameterError):
            decode_mechanism(bad)
    with pytest.raises(ParameterError, match="no others"):
        decode_mechanism(text.replace("{", '{"a":1,', 1))


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
from tests.dp.test_ledger import *

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
from tests.dp.test_ledger import *

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


# --- receipts


def other_receipt(folder, rows=1, site="west"):
    path = Path(folder) / f"{site}.ledger"
    if not path.exists():
        made(folder, site)
    with opened(path, site) as ledger:
        while ledger.head().sequence < rows:
            reserve(ledger)
        return ledger.head()


def test_receipts_of_others_are_kept_once_and_the_newest_only(path, tmp_path):
    old, new = other_receipt(tmp_path), other_receipt(tmp_path, 3)
    with opened(path) as ledger:
        ledger.record_receipts([new], time=2.0)
        head = ledger.head()
        ledger.record_receipts([new, old], time=3.0)
        assert ledger.head() == head
        newer = other_receipt(tmp_path, 4)
        ledger.record_receipts([newer, new, old], time=3.0)
        assert ledger.head().sequence == head.sequence + 1
    holds(path, others={"west": read_rows(tmp_path / "west.ledger")})
    verdict = examine(read_rows(tmp_path / "west.ledger"), verify, others={"north": read_rows(path)})
    assert verdict.findings == ()
    assert verdict.witnessed == 4


def test_receipts_that_are_not_signed_by_their_site_or_are_ones_own_are_not_kept(path, tmp_path):
    receipt = other_receipt(tmp_path)
    forged = [
        msgspec.structs.replace(receipt, sequence=9),
        msgspec.structs.replace(receipt, digest="0" * 64),
        msgspec.structs.replace(receipt, ledger="0" * 32),
        msgspec.structs.replace(receipt, site="north"),
        msgspec.structs.replace(receipt, site="nobody"),
        msgspec.structs.replace(receipt, signature=""),
        msgspec.structs.replace(receipt, signature="no digits"),
    ]
    with opened(path) as ledger:
        for bad in (*forged, ledger.head()):
            with pytest.raises(LedgerError):
                ledger.record_receipts([receipt, bad], time=2.0)
        assert ledger.head().sequence == 1


def test_two_pasts_of_one_ledger_show_and_both_receipts_are_kept(path, tmp_path):
    other = tmp_path / "west.ledger"
    other_receipt(tmp_path)
    shutil.copy(other, tmp_path / "backup")
    one = other_receipt(tmp_path, 2)
    shutil.copy(tmp_path / "backup", other)
    with opened(other, "west") as ledger:
        reserve(ledger, study="another past")
        two = ledger.head()
    with opened(path) as ledger:
        ledger.record_receipts([one], time=2.0)
        with pytest.raises(LedgerError, match="two different receipts are signed for row 2 of 'west'"):
            ledger.record_receipts([two], time=2.0)
        assert ledger.head().sequence == 3
    named(other, "contradicts its ledger: it has another row there", others=[path])


def test_a_site_refuses_to_go_on_with_an_older_copy_when_it_is_shown_its_own_receipt(path, tmp_path):
    with opened(path) as ledger:
        ledger.require(ledger.head())
        shutil.copy(path, tmp_path / "backup")
        reserve(ledger)
        receipt = ledger.head()
        ledger.require(receipt)
    shutil.copy(tmp_path / "backup", path)
    with opened(path) as ledger:
        with pytest.raises(LedgerError, match="ends at row 1 or has another row there: an older copy was put back"):
            ledger.require(receipt)
        with pytest.raises(LedgerError, match="not signed by 'north'"):
            ledger.require(msgspec.structs.replace(receipt, sequence=1))
        reserve(ledger, study="another past")
        with pytest.raises(LedgerError, match="another row there"):
            ledger.require(receipt)


# --- tampered ledgers, each named


@pytest.fixture
def spent_ledger(tmp_path):
    """Rows 1 open, 2 reserve, 3 commit, 4 cap, 5 reserve, 6 commit, 7 reserve; west holds a receipt for row 7."""
    path = made(tmp_path)
    with opened(path) as ledger:
        ledger.commit(reserve(ledger, gaussian(3), time=10.0), gaussian(2), time=11.0)
        ledger.set_cap(9.0, time=12.0)
        ledger.commit(reserve(ledger, gaussian(3), time=13.0), gaussian(2), time=14.0)
        reserve(ledger, gaussian(1), time=15.0)
        receipt = ledger.head()
    made(tmp_path, "west")
    with opened(tmp_path / "west.ledger", "west") as other:
        other.record_receipts([receipt], time=20.0)
    holds(path, others={"west": read_rows(tmp_path / "west.ledger")})
    return path


TRIGGERS = ("no_update", "no_delete")


def tamper(path, *statements, restore=True):
    """Do to a ledger what its triggers forbid, and put the triggers back as if nothing had been."""
    database = sqlite3.connect(path, isolation_level=None)
    for name in TRIGGERS:
        database.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        database.execute(*statement) if isinstance(statement, tuple) else database.execute(statement)
    if restore:
        for name in TRIGGERS:
            database.execute(ledger_store._SCHEMA[name])
    database.close()


def put(path, row):
    """Write a row in the place of the one with its number, or at a place of its own."""
    tamper(path, ("DELETE FROM row WHERE sequence = ?", (row.sequence,)))
    database = sqlite3.connect(path, isolation_level=None)
    ledger_store.insert(database, row)
    database.close()


def refused(path, says, site="north"):
    """The site does not open it either."""
    with pytest.raises(LedgerError, match=says):
        opened(path, site)


def test_1_an_edited_row(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET study = 'kidney' WHERE sequence = 5")
    named(spent_ledger, "row 5: edited: its content is not the one that its digest was taken of")
    refused(spent_ledger, "row 5: edited")


def test_2_the_last_row_deleted(spent_ledger, tmp_path):
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 7")
    findings = named(
        spent_ledger,
        "row 7 was written and then deleted: the ledger ends at row 6",
        "the receipt for row 7 of 'north' contradicts its ledger: it ends at row 6",
        others=[tmp_path / "west.ledger"],
    )
    assert len(findings) == 2
    refused(spent_ledger, "row 7 was written and then deleted")


def test_2_the_last_row_deleted_with_all_traces_shows_by_the_receipt(spent_ledger, tmp_path):
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 7", "UPDATE sqlite_sequence SET seq = 6")
    holds(spent_ledger)
    named(spent_ledger, "it ends at row 6: an older copy was put back", others=[tmp_path / "west.ledger"])


def test_3_a_middle_row_deleted(spent_ledger):
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 4")
    named(spent_ledger, "row 4 is missing: row 5 comes after row 3")
    refused(spent_ledger, "row 4 is missing")
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 5")
    named(spent_ledger, "rows 4 to 5 are missing")


def test_3_a_middle_row_deleted_and_the_rest_renumbered(spent_ledger):
    tamper(
        spent_ledger,
        "DELETE FROM row WHERE sequence = 4",
        *(f"UPDATE row SET sequence = {n - 1} WHERE sequence = {n}" for n in (5, 6, 7)),
    )
    named(spent_ledger, "row 4: moved or renumbered: it was row 5", "row 7 was written and then deleted")


def test_4_two_rows_swapped(spent_ledger):
    tamper(
        spent_ledger, *(f"UPDATE row SET sequence = {b} WHERE sequence = {a}" for a, b in ((5, 99), (6, 5), (99, 6)))
    )
    named(spent_ledger, "row 5: moved or renumbered: it was row 6", "row 6: moved or renumbered: it was row 5")
    refused(spent_ledger, "row 5: moved")


def test_5_signed_anew_with_another_key(spent_ledger):
    row = read_rows(spent_ledger).rows[6]
    put(spent_ledger, msgspec.structs.replace(row, mechanism=encode_mechanism(gaussian(0))).signed(signer("west")))
    assert named(spent_ledger, "row 7: not signed with the key of 'north'") == (
        "row 7: not signed with the key of 'north': edited, inserted or another's",
    )
    refused(spent_ledger, "row 7: not signed")


def test_6_the_cap_changed(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET epsilon = 99.0 WHERE sequence = 4")
    named(spent_ledger, "row 4: edited")
    tamper(spent_ledger, "UPDATE row SET epsilon = 99.0 WHERE sequence = 1")
    named(spent_ledger, "row 1: edited", "row 4: edited")


def test_7_the_mechanism_changed(spent_ledger):
    weaker = encode_mechanism(gaussian(2, noise=20.0))
    tamper(spent_ledger, ("UPDATE row SET mechanism = ? WHERE sequence = 6", (weaker,)))
    named(spent_ledger, "row 6: edited")
    row = read_rows(spent_ledger).rows[5]
    digest = row.computed_digest()
    tamper(spent_ledger, ("UPDATE row SET digest = ? WHERE sequence = 6", (digest,)))
    named(spent_ledger, "row 6: not signed", "row 7: does not follow on row 6")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_8_the_file_truncated(spent_ledger, share):
    content = spent_ledger.read_bytes()
    spent_ledger.write_bytes(content[: int(len(content) * share)])
    for look in (read_rows, opened):
        with pytest.raises(LedgerError, match="put the newest copy back"):
            look(spent_ledger)


def test_9_an_older_copy_put_back_shows_by_another_sites_receipt(tmp_path):
    path = made(tmp_path)
    with opened(path) as ledger:
        reserve(ledger)
    backup = path.read_bytes()
    with opened(path) as ledger:
        reserve(ledger)
        receipt = ledger.head()
    made(tmp_path, "west")
    with opened(tmp_path / "west.ledger", "west") as other:
        other.record_receipts([receipt], time=20.0)
    path.write_bytes(backup)
    assert holds(path).witnessed == 0
    named(path, "row 2: the receipt for row 3 of 'north' contradicts", others=[tmp_path / "west.ledger"])
    with opened(path) as ledger:
        for _ in range(3):
            reserve(ledger, study="goes on")
    named(path, "it has another row there: an older copy was put back", others=[tmp_path / "west.ledger"])
    path.unlink()
    made(tmp_path)
    named(path, "it was replaced by another one, begun anew", others=[tmp_path / "west.ledger"])


def test_10_a_row_inserted(spent_ledger):
    rows = read_rows(spent_ledger).rows
    false = msgspec.structs.replace(rows[6], sequence=8, previous=rows[6].digest, kind="commit", refers=7)
    put(spent_ledger, msgspec.structs.replace(false, digest=false.computed_digest()))
    named(spent_ledger, "row 8: not signed with the key of 'north'")
    refused(spent_ledger, "row 8: not signed")


def test_10_an_old_row_inserted_again(spent_ledger):
    row = read_rows(spent_ledger).rows[5]
    database = sqlite3.connect(spent_ledger, isolation_level=None)
    ledger_store.insert(database, msgspec.structs.replace(row, sequence=8))
    database.close()
    named(spent_ledger, "row 8: moved or renumbered: it was row 6")


def test_11_another_sites_ledger_under_the_sites_name(spent_ledger, tmp_path):
    path = tmp_path / "west.ledger"
    tamper(path, "UPDATE row SET site = 'north'")
    named(path, "row 1: edited")
    for row in read_rows(path).rows:
        put(path, row.signed(signer("west")))
    named(path, "row 1: not signed with the key of 'north'")
    refused(path, "row 1: not signed")


def test_11_rows_of_two_ledgers_of_one_site_mixed(spent_ledger, tmp_path):
    (tmp_path / "again").mkdir()
    twin = made(tmp_path / "again")
    with opened(twin) as ledger:
        for _ in range(6):
            reserve(ledger, gaussian(0))
    put(spent_ledger, read_rows(twin).rows[6])
    named(spent_ledger, "row 7: does not follow on row 6")


def test_12_the_clock_changed(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET time = 1.5 WHERE sequence = 5")
    named(spent_ledger, "row 5: edited")


def chained(path, rows):
    """Rows written anew from there on, by the holder of the key."""
    before = rows[0]
    for row in rows[1:]:
        # Each by whom it names: a site may have the help of another.
        before = msgspec.structs.replace(row, previous=before.digest).signed(signer(row.site))
        put(path, before)


@pytest.mark.parametrize(
    ("number", "changed", "says"),
    [
        (5, {"time": 1.5}, "row 5: the clock ran backwards, by 10.500 seconds since row 4"),
        (7, {"delta": 0.5}, "row 7: says what cannot be: delta should be at most 1/1000"),
        (7, {"delta": None}, "row 7: says what cannot be"),
        (7, {"unit": "participant"}, "row 7: says what cannot be: unit should be 'record'"),
        (7, {"relation": "none"}, "row 7: says what cannot be: relation"),
        (7, {"study": "\x1b[31m"}, "row 7: says what cannot be: study"),
        (7, {"mechanism": "{}"}, "row 7: says what cannot be: not a mechanism"),
        (7, {"site": "west"}, "row 7: is of another ledger"),
        (7, {"ledger": "0" * 32}, "row 7: is of another ledger"),
        (7, {"kind": "open"}, "row 7: a second first row"),
        (7, {"kind": "commit", "refers": 2}, "row 7: commits row 2 a second time"),
        (7, {"kind": "commit", "refers": 4}, "row 7: commits row 4, which is no reservation"),
        (6, {"cohort": "other"}, "row 6: has another cohort than row 5"),
        (6, {"mechanism": encode_mechanism(gaussian(4))}, "row 5: the release cost more than this row had reserved"),
        (4, {"epsilon": 0.1}, "row 5: reserves up to epsilon"),
        (7, {"epsilon": 0.1}, "study 'heart': promised epsilon 0.1, and has cost"),
        (4, {"epsilon": None}, "row 4: says what cannot be"),
        (4, {"kind": "receipt", "detail": "{}"}, "row 4: says what cannot be"),
        (1, {"detail": '{"records":1,"partition":{"column":"x","parts":{}}}'}, "row 1: says what cannot be"),
    ],
)
def test_what_the_holder_of_the_key_writes_must_still_make_sense(spent_ledger, number, changed, says):
    rows = list(read_rows(spent_ledger).rows)
    rows[number - 1] = msgspec.structs.replace(rows[number - 1], **changed)
    first = rows[0].signed(signer("north"))
    put(spent_ledger, first)
    chained(spent_ledger, [first, *rows[1:]])
    named(spent_ledger, says)


def test_a_ledger_written_anew_by_the_holder_of_the_key_shows_by_the_receipt_only(spent_ledger, tmp_path):
    rows = list(read_rows(spent_ledger).rows)
    rows[5] = msgspec.structs.replace(rows[5], mechanism=encode_mechanism(gaussian(0)))
    chained(spent_ledger, rows)
    holds(spent_ledger)
    named(spent_ledger, "contradicts its ledger: it has another row there", others=[tmp_path / "west.ledger"])


def test_dropped_triggers_and_added_views_are_named(spent_ledger):
    tamper(spent_ledger, restore=False)
    named(spent_ledger, "the trigger 'no_update' is gone", "the trigger 'no_delete' is gone")
    refused(spent_ledger, "the trigger 'no_update' is gone")
    database = sqlite3.connect(spent_ledger)
    database.execute("CREATE VIEW more AS SELECT * FROM row")
    database.close()
    named(spent_ledger, "holds 'more', which this software never made")


def test_a_view_in_the_place_of_the_table_is_no_ledger(spent_ledger):
    tamper(spent_ledger, "ALTER TABLE row RENAME TO old", "CREATE VIEW row AS SELECT * FROM old", restore=False)
    with pytest.raises(LedgerError, match="holds no table of rows as this version makes it"):
        read_rows(spent_ledger)


def test_all_rows_deleted_and_values_of_other_types_are_told(spent_ledger):
    tamper(spent_ledger, "UPDATE row SET study = X'00ff' WHERE sequence = 5")
    for look in (read_rows, opened):
        with pytest.raises(LedgerError, match="row 5: damaged or edited"):
            look(spent_ledger)
    tamper(spent_ledger, "DELETE FROM row")
    named(spent_ledger, "holds no rows")
    refused(spent_ledger, "holds no row")


def test_a_row_changed_while_the_ledger_is_open_stops_the_site(spent_ledger):
    with opened(spent_ledger) as ledger:
        tamper(spent_ledger, "UPDATE row SET digest = 'x' WHERE sequence = 7")
        with pytest.raises(LedgerError, match="row 7 was changed since it was read"):
            reserve(ledger, time=30.0)


def test_receipts_in_other_ledgers_are_held_against_their_signatures(spent_ledger, tmp_path):
    other = tmp_path / "west.ledger"
    rows = list(read_rows(other).rows)
    receipt = msgspec.json.decode(rows[1].detail, type=Receipt)
    lie = msgspec.json.encode(msgspec.structs.replace(receipt, sequence=99)).decode()
    chained(other, [rows[0], msgspec.structs.replace(rows[1], detail=lie)])
    named(spent_ledger, "row 2: the receipt for row 99 of 'north' is not signed by 'north'", others=[other])


def test_two_ledgers_of_one_site_are_no_witnesses(spent_ledger, tmp_path):
    named(spent_ledger, "are of the same site", others=[spent_ledger])


def test_a_tampered_witness_is_named_and_its_signed_receipts_count_all_the_same(spent_ledger, tmp_path):
    other = tmp_path / "west.ledger"
    tamper(other, "UPDATE row SET time = 99.0 WHERE sequence = 2")
    tamper(spent_ledger, "DELETE FROM row WHERE sequence = 7", "UPDATE sqlite_sequence SET seq = 6")
    named(spent_ledger, f"{other}: row 2: edited", "it ends at row 6", others=[other])


# --- the account made anew


def test_accountants_that_disagree_are_a_finding(spent_ledger):
    def wrong(mechanisms, delta, relation):
        cost = spent(mechanisms, delta, relation)
        return msgspec.structs.replace(cost, epsilon_rdp=max(0.0, cost.epsilon - 0.03))

    findings = named(spent_ledger, "all releases: the two accountants disagree", accountant=wrong)
    assert any("study 'heart'" in finding for finding in findings)

    def nearly(mechanisms, delta, relation):
        cost = spent(mechanisms, delta, relation)
        return msgspec.structs.replace(cost, epsilon_rdp=max(0.0, cost.epsilon - 0.015))

    assert examine(read_rows(spent_ledger), verify, accountant=nearly).findings == ()


def test_spending_that_falls_is_a_finding(spent_ledger):
    def forgetful(mechanisms, delta, relation):
        mechanisms = list(mechanisms)
        return spent(mechanisms[-1:], delta, relation) if len(mechanisms) < 2 else spent([gaussian(1)], delta, relation)

    named(spent_ledger, "row 6: what was spent falls from epsilon", accountant=forgetful)


def test_the_line_over_time_ends_at_what_is_spent(spent_ledger):
    rows = read_rows(spent_ledger).rows
    line = timeline(rows, lambda _: True)
    assert [moment for moment, _ in line] == [10.0, 11.0, 13.0, 14.0, 15.0]
    assert line[-1][1] == of(gaussian(5))
    assert line[0][1] == of(gaussian(3))
    assert timeline(rows, lambda _: True, points=2) == (line[1], line[4])
    assert timeline(rows, lambda _: False) == ()


def test_every_error_is_ours():
    assert issubclass(LedgerLocked, LedgerError)
    assert issubclass(LedgerError, DpError)
    assert isinstance(Row.__struct_fields__, tuple)
    assert isinstance(spent([], 0.5), Spent)
    assert ledger_rows.COLUMNS[0] == "sequence"
