"""A site's state on disk: crashes at every step, full disks, and the operator who puts an older copy back."""

import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.errors import StateError
from protocols.messages import Answer, Reply
from protocols.state_file import StateFile, answer
from secagg.errors import LocalProtocolError
from secagg.wire import decode
from tests.protocols.hospitals import World, study

# Whatever touches the disk, in the module where it is looked up.
STEPS = ("open", "write", "fsync", "replace", "unlink", "close")


class Chain:
    """A site in miniature: the answer hangs on state and request, a retry gets the same answer from the same state."""

    def handle(self, request, state):
        last, _, reply = state.partition(b"|")
        if last == hashlib.sha256(request).hexdigest().encode():
            return reply, state
        reply = hashlib.sha256(state + request).hexdigest().encode()
        return reply, hashlib.sha256(request).hexdigest().encode() + b"|" + reply


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in between catches it and goes on."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "north.state"


def counter_of(path):
    return path.with_name(path.name + ".counter")


def saved(path, *states, counter=None):
    """Save some states, one after the other."""
    with StateFile(path, counter) as store:
        for state in states:
            store.load()
            store.save(state)
    return path


def loaded(path, counter=None):
    with StateFile(path, counter) as store:
        return store.load()


def refused(path, says=None, counter=None):
    """Loading is refused, in one line, and changes no file."""
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    with StateFile(path, counter) as store:
        with pytest.raises(StateError, match=says) as caught:
            store.load()
        with pytest.raises(LocalProtocolError):
            store.save(b"all the same")
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before
    return str(caught.value)


# --- what is kept, and how


def test_a_site_that_saved_nothing_starts_with_no_state_and_no_files(path):
    assert loaded(path) == b""
    assert {p.name for p in path.parent.iterdir()} == {"north.state.lock"}


@pytest.mark.parametrize("states", [(b"one",), (b"one", b"two", b"three"), (b"",), (bytes(1 << 20),)])
def test_the_last_state_comes_back(path, states):
    assert loaded(saved(path, *states)) == states[-1]
    assert counter_of(path).read_text().splitlines()[:2] == ["secagg counter 1", str(len(states))]


def test_state_and_counter_are_for_the_owner_only_whatever_the_umask_and_from_the_start(path, monkeypatch):
    modes, write = set(), os.write

    def looking(descriptor, content):
        modes.add(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", looking)
    before = os.umask(0)
    try:
        saved(path, b"one", b"two")
    finally:
        os.umask(before)
    assert modes == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o777])
def test_a_state_that_others_may_open_is_refused_with_what_to_do(path, mode):
    saved(path, b"secret")
    path.chmod(mode)
    line = refused(path, f"mode {mode:04o}")
    assert f"chmod 600 {path}" in line
    path.chmod(0o400)
    assert loaded(path) == b"secret"


def test_a_left_over_of_a_killed_process_gives_neither_its_mode_nor_its_content(path):
    for left in (path.with_name("north.state.new"), path.with_name("north.state.counter.new")):
        left.write_bytes(b"left over" * 100)
        left.chmod(0o666)
    assert loaded(saved(path, b"one")) == b"one"
    assert {p.name for p in path.parent.iterdir()} == {"north.state", "north.state.counter", "north.state.lock"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {0o600}


def test_a_secret_is_not_written_into_a_file_that_someone_else_has_made_meanwhile(path, monkeypatch):
    trap = path.with_name("north.state.new")
    trap.touch()
    trap.chmod(0o666)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as if it were made just after that
    with pytest.raises(StateError, match="File exists"):
        saved(path, b"secret")
    assert trap.read_bytes() == b""


def test_a_link_to_the_state_stays_a_link(path, tmp_path):
    (tmp_path / "disk").mkdir()
    path.symlink_to(tmp_path / "disk" / "state")
    saved(path, b"one")
    assert path.is_symlink()
    assert loaded(tmp_path / "disk" / "state") == b"one"


@pytest.mark.parametrize("name", ["north.state", "north.state.lock", "north.state.new", "../{}/north.state"])
def test_the_counter_is_a_file_of_its_own(path, name):
    with pytest.raises(StateError, match="the counter cannot have the name"):
        StateFile(path, path.parent / name.format(path.parent.name))


def test_the_two_copies_of_one_state_have_different_digests(path, tmp_path):
    """The counter file may lie where others read it: what it holds must not confirm a guess at the state."""
    (tmp_path / "other").mkdir()
    saved(path, b"guessable")
    saved(tmp_path / "other" / "north.state", b"guessable")
    assert counter_of(path).read_bytes() != counter_of(tmp_path / "other" / "north.state").read_bytes()


def test_nothing_of_the_state_shows(path):
    saved(path, b"top secret")
    with StateFile(path) as store:
        store.load()
        assert "secret" not in repr(store) + repr(vars(store)) + repr(store._read_state())


def test_a_state_is_saved_only_as_the_successor_of_one_that_was_loaded(path):
    store = StateFile(path)
    for step in (store.load, lambda: store.save(b"one"), lambda: store.update(lambda s: (None, b"one"))):
        with pytest.raises(LocalProtocolError, match="inside `with`"):
            step()
    with store:
        with pytest.raises(LocalProtocolError, match="load it first"):
            store.save(b"one")
        store.load()
        store.save(b"one")
        with pytest.raises(LocalProtocolError, match="load it first"):
            store.save(b"two")
    with pytest.raises(LocalProtocolError, match="inside `with`"):
        store.load()
    with store:
        store.load()
    with store, pytest.raises(LocalProtocolError, match="load it first"):
        store.save(b"what was loaded before it was closed does not count")


# --- the older copy


def copies(path):
    """The two files as they are now, to be put back later."""
    return {p: p.read_bytes() for p in (path, counter_of(path)) if p.exists()}


def put_back(path, content):
    path.write_bytes(content)
    path.chmod(0o600)


@pytest.mark.parametrize("saves", [2, 3, 10])
def test_an_older_state_is_refused_and_both_saves_are_named(path, saves):
    saved(path, b"old")
    older = path.read_bytes()
    saved(path, *[b"new %d" % i for i in range(1, saves)])
    put_back(path, older)
    line = refused(path, "an older copy was put back")
    assert f"holds save 1, and {counter_of(path)} tells of save {saves}" in line
    assert "put the newest copy back" in line


@pytest.mark.parametrize("saves", [3, 4, 10])
def test_an_older_counter_is_refused(path, saves):
    saved(path, b"old")
    older = counter_of(path).read_bytes()
    saved(path, *[b"new %d" % i for i in range(1, saves)])
    counter_of(path).write_bytes(older)
    assert f"tells of save 1, and {path} holds save {saves}" in refused(path, "put the newest counter file back")


def test_another_state_with_the_same_number_is_refused(path):
    saved(path, b"one")
    files_then = copies(path)
    saved(path, b"two")
    fork = path.read_bytes()
    for name, content in files_then.items():
        put_back(name, content)
    saved(path, b"two")  # even where both copies came to the very same state
    put_back(path, fork)
    refused(path, r"save 2 does not belong to save 2")


def test_a_state_one_ahead_that_follows_on_another_past_is_refused(path, tmp_path):
    (tmp_path / "other").mkdir()
    other = saved(tmp_path / "other" / "state", b"a", b"b")
    saved(path, b"one")
    put_back(path, other.read_bytes())
    refused(path, r"save 2 does not belong to save 1")


def test_two_sites_do_not_share_a_counter(path, tmp_path):
    counter = tmp_path / "counter"
    saved(path, b"one", counter=counter)
    refused(tmp_path / "south.state", "the state was deleted or moved", counter)
    saved(tmp_path / "south.state", b"one")
    refused(tmp_path / "south.state", "does not belong", counter)


def test_a_state_that_is_gone_is_not_taken_for_a_fresh_start(path):
    saved(path, b"one", b"two")
    path.unlink()
    line = refused(path, "the state was deleted or moved")
    assert f"{counter_of(path)} tells of save 2" in line


def test_a_counter_that_is_gone_is_not_taken_for_a_fresh_start(path):
    for _ in range(2):
        saved(path, b"one")
        content = counter_of(path).read_bytes()
        counter_of(path).unlink()
        refused(path, "counter file .* is missing")
        counter_of(path).write_bytes(content)


def test_a_dangling_link_is_no_fresh_start(path, tmp_path):
    saved(path, b"one")
    store = StateFile(path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with store, pytest.raises(StateError, match="cannot be read"):
        store.load()


# --- damage


def test_a_state_or_counter_cut_short_anywhere_or_longer_is_refused(path):
    saved(path, b"one", b"two")
    for name in (path, counter_of(path)):
        whole = name.read_bytes()
        for cut in [*range(len(whole)), None]:
            name.write_bytes(whole[:cut] if cut is not None else whole + b"\0")
            refused(path, "damaged, cut short or no")
        name.write_bytes(whole)
    assert loaded(path) == b"two"


def test_a_bit_that_flips_anywhere_is_noticed(path):
    saved(path, *(b"%d" % i for i in range(11)))
    for name in (path, counter_of(path)):
        whole = name.read_bytes()
        for i in range(len(whole)):
            name.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            refused(path)
        name.write_bytes(whole)
    assert loaded(path) == b"10"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_whatever_the_files_hold_the_outcome_is_our_error(path, garbage, of_counter, with_magic):
    for name in (path, counter_of(path)):
        name.unlink(missing_ok=True)
    saved(path, b"one")
    magic = b"secagg counter 1\n" if of_counter else b"secagg state 1\n"
    (counter_of(path) if of_counter else path).write_bytes(magic * with_magic + garbage)
    refused(path)


def test_a_state_of_another_version_is_refused_though_it_is_whole(path):
    saved(path, b"one")
    content = path.read_bytes()[:-32].replace(b"secagg state 1\n", b"secagg state 2\n")
    path.write_bytes(content + hashlib.sha256(content).digest())
    refused(path, "no state file of this version")


def test_a_folder_or_a_pipe_is_refused_and_not_waited_for(path):
    path.mkdir()
    refused(path, "expected a plain file|cannot be read")
    path.rmdir()
    os.mkfifo(path, 0o600)
    refused(path, "expected a plain file")
    path.unlink()
    saved(path, b"one")
    counter_of(path).unlink()
    counter_of(path).mkdir()
    refused(path, "cannot be read")


# --- one at a time


def test_a_second_opener_is_told_whether_process_thread_or_the_same_object(path):
    store = StateFile(path)
    with store:
        for again in (StateFile(path), store, StateFile(path.parent / ".." / path.parent.name / path.name)):
            with pytest.raises(StateError, match="in use by another process or thread"), again:
                pass
        told = []

        def open_it():
            try:
                loaded(path)
            except StateError as error:
                told.append(str(error))

        thread = threading.Thread(target=open_it)
        thread.start()
        thread.join()
        assert len(told) == 1
        code = f"from protocols.state_file import StateFile\nwith StateFile({str(path)!r}): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert "StateError" in other.stderr
    assert loaded(path) == b""


def test_an_opener_who_was_refused_takes_nobodys_lock_away_and_leaves_nothing_open(path):
    with StateFile(path):
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            with pytest.raises(StateError, match="in use"), StateFile(path):
                pass
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_after_a_load_that_was_refused_nothing_is_saved_over_what_was_loaded_before(path):
    saved(path, b"one")
    older = path.read_bytes()
    saved(path, b"two")
    with StateFile(path) as store:
        store.load()
        put_back(path, older)
        with pytest.raises(StateError, match="an older copy was put back"):
            store.load()
        with pytest.raises(LocalProtocolError, match="load it first"):
            store.save(b"three")


def test_a_step_that_fails_leaves_the_file_closed_and_as_it_was(path):
    saved(path, b"one")
    with pytest.raises(ZeroDivisionError), StateFile(path) as store:
        store.update(lambda state: 1 // 0)
    assert loaded(path) == b"one"


def test_threads_that_share_an_open_file_answer_one_after_the_other_from_each_others_states(path):
    inside, other_done, seen = threading.Event(), threading.Event(), []

    def slow(state):
        inside.set()
        other_done.wait(0.5)  # without turns, the other would be done by now
        seen.append(state)
        return None, b"slow"

    def quick(state):
        seen.append(state)
        return None, b"quick"

    with StateFile(path) as store:

        def other():
            inside.wait()
            store.update(quick)
            other_done.set()

        thread = threading.Thread(target=other)
        thread.start()
        store.update(slow)
        thread.join()
        assert seen == [b"", b"slow"]
        assert store.load() == b"quick"


def test_a_folder_that_is_not_there_and_a_disk_without_locks_are_told(tmp_path, path, monkeypatch):
    with pytest.raises(StateError, match="cannot be opened: No such file"), StateFile(tmp_path / "no" / "state"):
        pass

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StateError, match="keep the state on a local disk"), StateFile(path):
        pass


def test_a_lock_file_that_is_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "north.state.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="cannot be opened"), StateFile(path):
        pass
    assert not (tmp_path / "elsewhere").exists()


# --- crashes and full disks, at every step


class Stumble:
    """Lets so many calls to the disk pass, and raises at the next, before it or after it; at all later ones too."""

    def __init__(self, monkeypatch, steps, passes, error, *, after=False):
        self.calls, self.passes, self.error, self.after = 0, passes, error, after
        for name in steps:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call):
        def stumbling(*args, **kwargs):
            self.calls += 1
            if self.calls == self.passes + 1 and self.after:
                call(*args, **kwargs)
            if self.calls > self.passes:
                raise self.error
            return call(*args, **kwargs)

        return stumbling


def calls_of_a_save(path, monkeypatch, steps):
    with StateFile(path) as store, monkeypatch.context() as patch:
        counting = Stumble(patch, steps, 10**6, Killed())
        answer(Chain(), store, b"counted")
    return counting.calls


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_step_never_loses_the_state_and_a_retry_gets_the_same_reply(path, monkeypatch, before, after):
    requests = [b"request %d" % i for i in range(before + 1)]
    twin, state = Chain(), b""
    for request in requests:
        expected, state = twin.handle(request, state)
    calls = calls_of_a_save(path.with_name("counted"), monkeypatch, STEPS)
    assert calls > 15
    for passes in range(calls + 1):
        for name in (path, counter_of(path)):
            name.unlink(missing_ok=True)
        with StateFile(path) as store:
            for request in requests[:-1]:
                answer(Chain(), store, request)
        with pytest.MonkeyPatch.context() as patch:
            Stumble(patch, STEPS, passes, Killed(), after=after)
            try:
                with StateFile(path) as store:
                    answer(Chain(), store, requests[-1])
            except (Killed, OSError):
                pass
        _close_what_the_crash_left_open()
        with StateFile(path) as store:
            assert answer(Chain(), store, requests[-1]) == expected
            assert answer(Chain(), store, requests[-1]) == expected
            assert store.load() == state
        assert {p.name for p in path.parent.glob("north.state*")} == {
            "north.state",
            "north.state.counter",
            "north.state.lock",
        }


def _close_what_the_crash_left_open():
    """A killed process's locks go with it; here the process goes on."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "north.state" in str(entry.readlink()):
                os.close(int(entry.name))
        except FileNotFoundError:
            continue


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_full_or_broken_disk_is_told_and_leaves_a_state_that_answers_the_same(path, monkeypatch, code, fresh):
    steps = ("write", "fsync", "replace")
    calls = calls_of_a_save(path.with_name("counted"), monkeypatch, steps)
    assert calls > 7
    before = b"" if fresh else Chain().handle(b"first", b"")[1]
    expected, after = Chain().handle(b"second", before)
    told = set()
    for passes in range(calls):
        for name in (path, counter_of(path)):
            name.unlink(missing_ok=True)
        with StateFile(path) as store:
            if not fresh:
                answer(Chain(), store, b"first")
            with pytest.MonkeyPatch.context() as patch:
                Stumble(patch, steps, passes, OSError(code, os.strerror(code)))
                try:
                    reply = answer(Chain(), store, b"second")
                except StateError as error:
                    told.add(str(error))
                else:
                    # Only the very first save has a step more.
                    assert not fresh
                    assert reply == expected
            assert store.load() in (before, after)
            assert answer(Chain(), store, b"second") == expected
        assert not list(path.parent.glob("north*.new"))
    assert all(f"could not be saved: {os.strerror(code)}; nothing was answered" in line for line in told)
    assert {line.split(":")[0] for line in told} == {str(path), str(counter_of(path))}


def test_a_disk_that_is_full_while_the_state_is_written_keeps_the_old_one(path, monkeypatch):
    saved(path, b"old")
    kept = copies(path)
    write = os.write

    def half(descriptor, content):
        if len(content) > 3:
            return write(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with StateFile(path) as store, pytest.raises(StateError, match="No space left"):
            store.update(lambda _: (None, b"new"))
    assert copies(path) == kept
    assert {p.name for p in path.parent.iterdir()} == {"north.state", "north.state.counter", "north.state.lock"}
    assert loaded(path) == b"old"


def test_a_write_that_takes_a_part_only_is_carried_on(path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    assert loaded(saved(path, b"x" * 1000)) == b"x" * 1000


def events_of(path, monkeypatch, act):
    """What happens on the disk, in order: which file or folder, and what is done to it."""
    events = []
    with monkeypatch.context() as patch:

        def spy(name, call):
            def spying(first, *rest, **kwargs):
                what = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else Path(first)
                events.append((name, what.name))
                return call(first, *rest, **kwargs)

            return spying

        for name in ("write", "fsync", "replace"):
            patch.setattr(os, name, spy(name, getattr(os, name)))
        act(events)
    return events


def test_the_state_is_durable_before_the_counter_and_both_before_the_reply_leaves(path, monkeypatch):
    saved(path, b"one")
    folder = path.parent.name

    class Telling(Chain):
        def handle(self, request, state):
            events.append(("handle", ""))
            return super().handle(request, state)

    def act(log):
        nonlocal events
        events = log
        with StateFile(path) as store:
            answer(Telling(), store, b"request")
            log.append(("reply", ""))

    events = []
    assert events_of(path, monkeypatch, act) == [
        ("handle", ""),
        ("write", "north.state.new"),
        ("fsync", "north.state.new"),
        ("replace", "north.state.new"),
        ("fsync", folder),
        ("write", "north.state.counter.new"),
        ("fsync", "north.state.counter.new"),
        ("replace", "north.state.counter.new"),
        ("fsync", folder),
        ("reply", ""),
    ]


def test_a_state_ahead_of_its_counter_is_made_durable_before_the_counter_follows(path, monkeypatch):
    saved(path, b"one")
    counter = counter_of(path).read_bytes()
    saved(path, b"two")
    counter_of(path).write_bytes(counter)
    events = events_of(path, monkeypatch, lambda _: loaded(path))
    assert events[:2] == [("fsync", path.parent.name), ("write", "north.state.counter.new")]
    assert loaded(path) == b"two"
    path.unlink()
    refused(path, "tells of save 2")


def test_a_file_system_that_cannot_sync_folders_is_good_enough_and_one_that_fails_to_is_not(path, monkeypatch):
    fsync = os.fsync

    def failing(code):
        def call(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        return call

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    saved(path, b"one")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(StateError, match="could not be saved"):
        saved(path, b"two")


def test_a_retry_writes_nothing(path, monkeypatch):
    with StateFile(path) as store:
        first = answer(Chain(), store, b"request")
        assert events_of(path, monkeypatch, lambda _: answer(Chain(), store, b"request")) == []
        assert answer(Chain(), store, b"request") == first


# --- real sites


def answered(reply):
    return isinstance(decode(reply, Reply).sum, Answer)


def two_requests_to_mask():
    """A world before its masks are given, and what an honest and a lying server then ask of birch.

    The second server has lost dogwood on the way, so that its sum is over others than the first one's.
    """
    world = World(study())
    servers = world.coordinator, world.another_coordinator()
    for stage in range(2):
        requests, _ = [server.requests() for server in servers]
        for name, reply in world.engine.exchange(requests):
            for server in servers if (stage, name) != (1, "dogwood") else servers[:1]:
                server.receive(name, reply)
        for server in servers:
            server.close_stage()
    assert {server.stage for server in servers} == {"MaskedInput"}
    return world, [server.requests()["birch"] for server in servers]


def test_a_site_whose_state_was_rolled_back_does_not_mask_again_and_would_without_the_guard(path, monkeypatch):
    world, (honest, lying) = two_requests_to_mask()
    birch = world.sites["birch"]
    saved(path, world.states["birch"])
    backup = path.read_bytes()
    with StateFile(path) as store:
        first = answer(birch, store, honest)
        assert answered(first)
        assert not answered(answer(birch, store, lying))

    put_back(path, backup)
    with StateFile(path) as store:
        for request in (honest, lying):
            with pytest.raises(StateError, match="an older copy was put back"):
                answer(birch, store, request)

    monkeypatch.setattr(StateFile, "_refuse_older_copy", lambda *_: None)
    with StateFile(path) as store:
        second = answer(birch, store, lying)
    assert answered(second)
    assert second != first


def test_a_crash_between_answer_and_save_gives_the_identical_masked_vector(path, monkeypatch):
    world, (honest, _) = two_requests_to_mask()
    saved(path, world.states["birch"])
    with StateFile(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(StateFile, "save", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                answer(world.sites["birch"], store, honest)
        lost, _ = world.sites["birch"].handle(honest, store.load())
        assert answer(world.site("birch"), store, honest) == lost


CRASHING = """
import os, shutil, signal, sys
from pathlib import Path
from protocols.state_file import StateFile, answer
from tests.protocols.test_state_file import STEPS
from tests.protocols.test_state_file import two_requests_to_mask

folder = Path(sys.argv[1])
world, (honest, _) = two_requests_to_mask()
birch = world.sites["birch"]
expected = birch.handle(honest, world.states["birch"])[0]
with StateFile(folder / "start") as store:
    store.load()
    store.save(world.states["birch"])

def deadly(call, left, after):
    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return dying

deaths = 0
for passes, after in ((passes, after) for passes in range(1000) for after in (False, True)):
    for name in ("", ".counter"):
        shutil.copy(folder / f"start{name}", folder / f"birch.state{name}")
    child = os.fork()
    if not child:
        left = [passes]
        for name in STEPS:
            setattr(os, name, deadly(getattr(os, name), left, after))
        with StateFile(folder / "birch.state") as store:
            answer(birch, store, honest)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    with StateFile(folder / "birch.state") as store:
        assert answer(birch, store, honest) == expected, (passes, after)
    if not status:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    deaths += 1
print(deaths)
"""


def test_a_real_site_killed_at_any_call_to_the_disk_gives_the_identical_masked_vector(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
