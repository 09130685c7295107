"""A hospital's own process: what it answers on its socket, what it keeps for itself, and that nothing gets it down."""

import errno
import os
import socket
import stat
import struct
import threading
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from protocols import site_service, state_file
from protocols.coordinator import Coordinator
from protocols.deploy import deploy
from protocols.engines.in_process import InProcess
from protocols.errors import ServiceError, SiteFileError, StateError
from protocols.fedavg import build_model, flatten
from protocols.hello import Hello
from protocols.messages import Answer, Reply, Request
from protocols.rosters import load_roster, roster_digest
from protocols.run import drive
from protocols.site import Site
from protocols.site_file import load_site
from protocols.site_service import journal_of, open_site, read_journal, rows_of, serve
from protocols.site_socket import ANSWER, HELLO, MESSAGE, ask, receive, send
from protocols.study import load_study
from secagg.prg import deterministic_entropy
from secagg.wire import LIMIT_BYTES, decode, encode
from tests.protocols.hospitals import FEATURES, SITES, hospital, succeeded, write_csv
from tests.protocols.hospitals import command as secagg

STUDY = """\
name = "tiny"
rounds = 2
sites = [{sites}]
task = {{ data = "csv", features = ["age", "dose", "pulse"], target = "ill" }}
training = {{ local_steps = 2, learning_rate = 0.5 }}
"""
PRIVATE = '[privacy]\nmechanism = "local-sgd"\ndelta = 1e-3\nnoise_multiplier = 1.0\nsampling_rate = 0.5\n'


class Trial:
    """Four made-up hospitals, each with its own folder, and short paths for their sockets."""

    def __init__(self, folder, more=""):
        for i, name in enumerate(SITES):
            write_csv(folder / f"{name}.csv", hospital(name, rows=20 + 3 * i))
        self.path = folder / "study.toml"
        sites = ", ".join(f'{{ name = "{name}", data = "{name}.csv" }}' for name in SITES)
        self.path.write_text(STUDY.format(sites=sites) + more)
        self.folder = folder / "d"
        deploy(self.folder, self.path)
        self.study = load_study(self.path)
        self.roster = load_roster(self.folder / "link" / "roster.toml")

    def file(self, name):
        return self.folder / name / "site.toml"

    def journal(self, name):
        return read_journal(journal_of(load_site(self.file(name))))

    def coordinator(self):
        return Coordinator(self.study, self.roster, build_model(self.study, len(FEATURES)), len(FEATURES))

    def request(self, name):
        """The first request of a study to a site."""
        return self.coordinator().requests()[name]


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths of sockets are relative, and so short
    return Trial(tmp_path)


def answers(path):
    try:
        return bool(ask(path, HELLO))
    except ServiceError:
        return False


@contextmanager
def served(trial, name, entropy=os.urandom):
    """A site that answers in a thread; gives the path of its socket."""
    path = trial.folder.parent / f"{name}.sock"
    ended = threading.Event()
    with open_site(trial.file(name), trial.study, entropy=entropy) as host:
        thread = threading.Thread(target=serve, args=(host, path, ended.is_set))
        thread.start()
        try:
            while not answers(path):
                assert thread.is_alive()
                ended.wait(0.01)
            yield path
        finally:
            ended.set()
            thread.join()


class OverSockets:
    """An engine that asks each site over its socket."""

    def __init__(self, paths):
        self.paths = paths

    def exchange(self, requests):
        for name, request in requests.items():
            yield name, ask(self.paths[name], MESSAGE, request)


def test_a_study_over_sockets_gives_the_model_of_one_process_bit_for_bit(trial):
    with ExitStack() as stack:
        paths = {n: stack.enter_context(served(trial, n, deterministic_entropy(n.encode()))) for n in SITES}
        over = trial.coordinator()
        drive(over, OverSockets(paths))
    files = {name: load_site(trial.file(name)) for name in SITES}
    sites = [
        Site(
            trial.study,
            name,
            files[name].load_identity(),
            files[name].roster,
            rows_of(trial.study, files[name]),
            entropy=deterministic_entropy(name.encode()),
        )
        for name in SITES
    ]
    alone = trial.coordinator()
    drive(alone, InProcess(sites))
    assert [record.outcome for record in over.rounds] == ["opened"] * 3
    assert flatten(over.model).tobytes() == flatten(alone.model).tobytes()
    assert over.transcript


def test_a_site_says_who_it_is_and_what_it_goes_by(trial):
    with served(trial, "ash") as path:
        told = decode(ask(path, HELLO), Hello)
    assert told == Hello("ash", trial.study.digest, roster_digest(trial.roster))


def test_the_same_question_gets_the_same_answer_from_the_next_process_too(trial):
    request = trial.request("ash")
    with served(trial, "ash") as path:
        first = ask(path, MESSAGE, request)
        assert ask(path, MESSAGE, request) == first
    with served(trial, "ash") as path:
        assert ask(path, MESSAGE, request) == first


def test_the_socket_is_for_owner_and_group_and_goes_with_the_process(trial):
    with served(trial, "ash") as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


def test_the_socket_of_a_process_that_was_killed_is_replaced(trial):
    path = trial.folder.parent / "ash.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    with served(trial, "ash") as path:
        assert ask(path, HELLO)


def test_a_file_in_the_sockets_place_is_left_alone(trial):
    path = trial.folder.parent / "precious"
    path.write_text("rows")
    with open_site(trial.file("ash"), trial.study) as host, pytest.raises(ServiceError, match="there can be no socket"):
        serve(host, path)
    assert path.read_text() == "rows"


def test_a_path_that_is_too_long_for_a_socket_is_told(trial):
    path = trial.folder / ("a" * 120)
    with open_site(trial.file("ash"), trial.study) as host, pytest.raises(ServiceError, match="at most 107 bytes"):
        serve(host, path)


def test_a_second_process_of_a_site_is_refused(trial):
    with (
        served(trial, "ash"),
        pytest.raises(StateError, match="in use by another process"),
        open_site(trial.file("ash"), trial.study),
    ):
        pass


GARBAGE = {
    "nothing": b"",
    "half a header": b"m\0\0",
    "another kind": struct.pack(">cQ", b"x", 0),
    "a length that lies": struct.pack(">cQ", b"m", 100) + b"short",
    "more than is taken": struct.pack(">cQ", b"m", LIMIT_BYTES + 1),
}


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_its_sender_the_answer_and_nobody_else(trial, sent, capsys):
    with served(trial, "ash") as path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        assert ask(path, HELLO)
    assert "ash: a question was not answered" in capsys.readouterr().err


def test_who_connects_and_says_nothing_holds_nobody_up_for_long(trial, monkeypatch):
    monkeypatch.setattr(site_service, "_PATIENCE", 0.05)
    with served(trial, "ash") as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as idle:
        idle.connect(str(path))
        assert ask(path, HELLO, patience=10)


def test_bytes_that_are_no_request_get_a_refusal_in_the_protocol(trial):
    with served(trial, "ash") as path:
        reply = decode(ask(path, MESSAGE, b"garbage"), Reply)
    assert reply.sum.reason == "protocol"


def test_a_site_that_cannot_keep_its_state_does_not_answer_and_tells_why_to_itself_alone(trial, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    request = trial.request("ash")
    with served(trial, "ash") as path:
        with monkeypatch.context() as patched:
            patched.setattr(state_file, "replace_private", full)
            with pytest.raises(ServiceError, match="could not answer; its own log says why") as caught:
                ask(path, MESSAGE, request)
        assert "space" not in str(caught.value)
        assert "No space left on device" in capsys.readouterr().err
        assert isinstance(decode(ask(path, MESSAGE, request), Reply).keys, Answer)  # there is room again


def test_where_no_site_answers_the_error_says_what_to_start(tmp_path):
    with pytest.raises(ServiceError, match="start it with `secagg site serve`"):
        ask(tmp_path / "none.sock", HELLO)
    with pytest.raises(ServiceError, match=r"expected site-socket='PATH'.*got None"):
        ask(None, HELLO)


@pytest.mark.parametrize("claimed", [LIMIT_BYTES + 1, 2**64 - 1])
def test_an_answer_is_not_believed_its_length(claimed):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">cQ", ANSWER, claimed))
        with pytest.raises(ServiceError, match="expected a message of at most"):
            receive(ours)


def test_a_question_without_a_body_is_asked_of_one_who_answers_at_once():
    """The other side may have answered and closed before an empty body is sent."""
    ours, theirs = socket.socketpair()
    with ours:

        class Closing:
            def __init__(self):
                self.calls = 0

            def sendall(self, content):
                self.calls += 1
                ours.sendall(content)
                theirs.close()

        closing = Closing()
        send(closing, HELLO, b"")
        assert closing.calls == 1


# --- what it keeps for itself


def test_the_journal_has_every_models_metrics_and_is_the_sites_alone(trial):
    with ExitStack() as stack:
        paths = {name: stack.enter_context(served(trial, name)) for name in SITES}
        drive(trial.coordinator(), OverSockets(paths))
    for name in SITES:
        first, *others = trial.journal(name)
        assert first.train_rows + first.test_rows == 26 + 3 * SITES.index(name)
        assert [entry.round for entry in others if entry.metrics] == [0, 1, None]
    path = journal_of(load_site(trial.file("ash")))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    told = succeeded("site", "report", trial.file("ash"))
    assert "ash: " in told
    assert [line.split()[0:2] for line in told.splitlines()[2:]] == [["round", "0"], ["round", "1"], ["the", "end"]]


def test_the_journal_of_a_private_study_tells_what_was_spent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trial = Trial(tmp_path, PRIVATE)
    with ExitStack() as stack:
        paths = {name: stack.enter_context(served(trial, name)) for name in SITES}
        drive(trial.coordinator(), OverSockets(paths))
    spent = [entry.spent.epsilon for entry in trial.journal("ash") if entry.spent]
    assert spent == sorted(spent)
    assert len(set(spent)) == 2
    assert f"Spent on a record: epsilon {spent[-1]:.3f} at delta 0.001" in succeeded(
        "site", "report", trial.file("ash")
    ).replace("\n", " ")


def test_why_a_site_refused_is_in_its_journal_and_not_in_its_answer(trial):
    request = encode(Request())
    with served(trial, "ash") as path:
        ask(path, MESSAGE, b"garbage")
        ask(path, MESSAGE, request)
    (refusal,) = [entry.log for entry in trial.journal("ash") if entry.log]
    assert refusal.startswith("ash: ")
    assert refusal in succeeded("site", "report", trial.file("ash")).replace("\n", " ")


def test_a_journal_that_cannot_be_written_costs_the_site_nothing_else(trial):
    journal_of(load_site(trial.file("ash"))).mkdir()
    with served(trial, "ash") as path:
        assert isinstance(decode(ask(path, MESSAGE, trial.request("ash")), Reply).keys, Answer)


def test_a_log_that_cannot_be_written_costs_the_site_nothing_else(trial, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

    request = trial.request("ash")
    with served(trial, "ash") as path, monkeypatch.context() as patched:
        patched.setattr("sys.stderr", Full())
        assert decode(ask(path, MESSAGE, b"garbage"), Reply).sum.reason == "protocol"
        assert isinstance(decode(ask(path, MESSAGE, request), Reply).keys, Answer)


def test_a_journal_is_not_written_through_a_link(trial):
    victim = trial.folder / "victim"
    journal_of(load_site(trial.file("ash"))).symlink_to(victim)
    with served(trial, "ash") as path:
        ask(path, MESSAGE, b"garbage")
    assert not victim.exists()


@pytest.mark.parametrize("content", ["no json", '{"unheard": }'])
def test_a_journal_that_is_none_is_told(trial, content):
    path = journal_of(load_site(trial.file("ash")))
    path.write_text(content)
    with pytest.raises(SiteFileError, match="expected a site's journal"):
        read_journal(path)
    assert secagg("site", "report", trial.file("ash")).exit_code == 2


def test_a_site_that_has_answered_nothing_has_nothing_to_report(trial):
    assert succeeded("site", "report", trial.file("ash")) == "ash has answered nothing yet\n"


# --- what it begins with


def test_a_site_that_is_none_of_the_studys_is_refused(trial):
    other = load_study(trial.path)
    path = trial.file("ash")
    path.write_text(path.read_text().replace('name = "ash"', 'name = "oak"', 1))
    with pytest.raises(SiteFileError), open_site(path, other):
        pass


def test_a_site_without_rows_is_told_where_to_name_them(trial):
    path = trial.file("ash")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("data")]
    path.write_text("\n".join(lines))
    with (
        pytest.raises(SiteFileError, match=r"data: expected the path of this site's rows in its site\.toml"),
        open_site(path, trial.study),
    ):
        pass


def test_the_command_tells_what_is_wrong_in_one_line(trial):
    for arguments in (["none.toml", "--study", trial.path], [trial.file("ash"), "--study", "none.toml"]):
        refused = partial(secagg, "site", "serve")(*arguments)
        assert refused.exit_code == 2
        (line,) = refused.stderr.splitlines()
        assert "none.toml" in line
