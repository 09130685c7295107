"""A run as a folder: all of it or nothing, and never a run that is lost for want of a place."""

import errno
import json
import math
import os
import re
import resource
import tempfile
from contextlib import contextmanager
from importlib.metadata import version

import msgspec
import pytest
import safetensors.torch
import torch

from protocols import output
from protocols.aggregation import Unprotected
from protocols.engines.faulty import Fault
from protocols.errors import OutputError
from protocols.fedavg import model_bytes
from protocols.output import as_json, check_target, load_run, stage_totals, statement, write_run
from protocols.rosters import load_roster
from protocols.run import run_study
from secagg.keys import fingerprint
from secagg.masking.transcript import examine
from tests.protocols.hospitals import PRIVATE, SITES, STAGES, fedsgd, hospitals, study

FILES = {"model.safetensors", "run.json", "roster.toml", "transcript.bin"}


@pytest.fixture(scope="module")
def run():
    return run_study(study(rounds=2, privacy=PRIVATE), hospitals(), faults=(Fault("birch", "MaskedInput", 1),))


@pytest.fixture
def spare(tmp_path, monkeypatch):
    """The system's temporary folder, for this test."""
    folder = tmp_path / "spare"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- what is in it


def test_a_run_is_written_whole_and_reads_back(run, tmp_path):
    write_run(run, tmp_path / "out")
    assert set(everything(tmp_path)) == {"out", *(f"out/{name}" for name in FILES)}
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t.tolist() for name, t in tensors.items()} == {
        name: t.tolist() for name, t in run.model.state_dict().items()
    }
    fresh = torch.nn.Linear(3, 1)
    fresh.load_state_dict(tensors)
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["study_digest"] == run.study.digest.hex()
    assert (tmp_path / "out" / "run.json").read_bytes().endswith(b"}\n")
    findings = examine(
        (tmp_path / "out" / "transcript.bin").read_bytes(), load_roster(tmp_path / "out" / "roster.toml")
    )
    assert (len(findings.records), findings.problems) == (2, ())
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_run_of_another_process_is_read_with_all_that_its_server_knew(run, tmp_path):
    write_run(run, tmp_path / "out")
    back = load_run(tmp_path / "out", run.study)
    assert model_bytes(back.model) == model_bytes(run.model)
    assert (back.rounds, back.sites, back.transcript, back.stopped) == (
        run.rounds,
        run.sites,
        run.transcript,
        run.stopped,
    )
    assert as_json(back)["statement"] == as_json(run)["statement"]


def test_a_folder_that_is_no_run_of_the_study_is_told(run, tmp_path):
    with pytest.raises(OutputError, match="the run cannot be read"):
        load_run(tmp_path, run.study)
    write_run(run, tmp_path / "out")
    with pytest.raises(OutputError, match="holds the run of another study"):
        load_run(tmp_path / "out", study(rounds=7))
    for content in ("[]", "{}", "no json"):
        (tmp_path / "out" / "run.json").write_text(content)
        with pytest.raises(OutputError, match="expected a run's folder"):
            load_run(tmp_path / "out", run.study)


def test_run_json_tells_the_configuration_the_versions_and_every_round(run):
    written = json.loads(msgspec.json.encode(as_json(run)))
    assert written["format"] == 1
    assert written["study"]["privacy"]["noise_multiplier"] == 1.0
    assert written["study"]["training"]["local_steps"] == 2
    assert written["study"]["rounds"] == 2
    assert re.fullmatch(r"[0-9a-f]{64}", written["study_digest"])
    for package in ("secagg", "torch", "numpy", "opacus", "dp-accounting", "cryptography"):
        assert written["versions"][package] == version(package)
    assert written["machine"]["cores"] == os.cpu_count()
    assert written["roster"] == {m.name: fingerprint(m.identity) for m in run.roster.members}
    assert written["stopped"] is None
    assert written["seconds"] > 0
    assert written["cpu_seconds"] > 0
    assert [r["outcome"] for r in written["rounds"]] == ["opened"] * 3
    for number, record in enumerate(written["rounds"][:2]):
        asked = SITES  # the model reaches a site with the request at which it contributes
        if number == 1:
            asked = tuple(name for name in SITES if name != "birch")
            assert record["dropped"] == {"birch": "no answer at MaskedInput"}
        assert set(record["test_metrics_before"]) == set(asked)
        for metrics in record["test_metrics_before"].values():
            assert set(metrics) == {"accuracy", "auc", "log_loss", "rows"}
        # The keys of the second sum are agreed while the first is under way.
        assert [stage["stage"] for stage in record["stages"]] == list(STAGES if number == 0 else STAGES[2:])
        for stage in record["stages"]:
            assert stage["seconds"] > 0
            assert stage["bytes_up"] > 0
            assert stage["bytes_down"] > 0
    for name in SITES:
        site = written["sites"][name]
        assert site["spent"]["epsilon"] > 0
        assert site["spent"]["delta"] == 1e-3
        assert site["spent"]["relation"] == "add-or-remove-one"
        assert site["federated"]["rows"] == 6
    assert written["sites"]["birch"]["spent"]["epsilon"] < written["sites"]["ash"]["spent"]["epsilon"]


def test_a_run_in_which_nothing_was_signed_has_no_transcript(tmp_path):
    unsigned = run_study(fedsgd(protocol={"mode": "semi-honest"}), hospitals())
    write_run(unsigned, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"transcript.bin"}


def test_run_json_holds_no_training_row(run):
    text = msgspec.json.encode(as_json(run)).decode()
    for data in hospitals().values():
        for value in data.train_x.ravel():
            assert repr(float(value)) not in text


def test_the_totals_of_the_stages_are_the_sums_over_the_rounds(run):
    written = as_json(run)
    assert written["stages"] == stage_totals(run)
    for stage in (*STAGES, "Finish"):
        entries = [s for record in run.rounds for s in record.stages if s.stage == stage]
        total = written["stages"][stage]
        assert total["bytes_up"] == sum(s.bytes_up for s in entries)
        assert total["bytes_down"] == sum(s.bytes_down for s in entries)
        assert total["seconds"] == pytest.approx(sum(s.seconds for s in entries))


def test_a_run_json_that_holds_what_json_cannot_is_json_all_the_same(run, tmp_path):
    odd = msgspec.structs.replace(run, seconds=math.inf)
    write_run(odd, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seconds"] is None


# --- the statement


def test_the_statement_tells_the_worst_epsilon_and_what_is_not_covered(run):
    text = statement(run)
    worst = max(result.spent.epsilon for result in run.sites.values())
    assert f"({worst:.3f}, 0.001)-differential privacy" in text
    assert "add-or-remove-one" in text
    assert "at most 1 of the 4 hospitals help it." in text
    assert "training rows took part" in text


def test_the_statement_of_a_run_without_privacy_claims_none():
    text = statement(run_study(fedsgd(protocol={"mode": "semi-honest"}), hospitals()))
    assert "There is no differential privacy" in text
    assert "it follows the protocol itself" in text


def test_the_statement_of_a_plain_run_claims_nothing_for_the_sum():
    with pytest.warns(Unprotected):
        plain = run_study(fedsgd(protocol={"aggregation": "plain"}), hospitals())
    text = statement(plain)
    assert "The server saw every hospital's update" in text
    assert "never one of them" not in text


def test_uniform_weights_tell_no_number_of_rows():
    made = study(privacy=PRIVATE, training={"weighting": "uniform"})
    assert "training rows took part" not in statement(run_study(made, hospitals()))


# --- where it cannot go


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_what_exists_is_refused_before_training_and_left_alone(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already; name another folder with --out"):
        check_target(target)
    assert everything(tmp_path) == ["out"]


def test_a_target_that_can_be_written_leaves_no_trace_of_the_check(tmp_path):
    check_target(tmp_path / "new" / "deep" / "out")
    assert everything(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="nothing can be written there"):
        check_target(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_refused_before_training(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="nothing can be written there: Permission denied"):
        check_target(tmp_path / "closed" / "out")


def test_a_disk_that_is_full_before_training_is_refused(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", full)
    with pytest.raises(OutputError, match="No space left on device"):
        check_target(tmp_path / "out")


def full_disk(monkeypatch, under):
    """Syncing any file below these folders fails, as where the disk is full."""
    real, names = os.fsync, [str(folder) for folder in under]

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if any(path.startswith(name + "/") for name in names):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(output.os, "fsync", fsync)


def test_a_full_disk_leaves_no_half_folder_and_keeps_the_run_in_the_spare_place(run, tmp_path, spare, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    full_disk(monkeypatch, [home])
    with pytest.raises(OutputError, match="No space left on device; the run is kept in") as caught:
        write_run(run, home / "out")
    assert "\n" not in str(caught.value)
    assert everything(home) == []
    (kept,) = spare.iterdir()
    assert str(kept) in str(caught.value)
    assert {path.name for path in kept.iterdir()} == FILES
    assert (kept / "model.safetensors").read_bytes() == model_bytes(run.model)
    assert json.loads((kept / "run.json").read_text())["format"] == 1


def test_where_the_spare_place_is_full_as_well_the_message_says_so_and_nothing_is_left(
    run, tmp_path, spare, monkeypatch
):
    home = tmp_path / "home"
    home.mkdir()
    full_disk(monkeypatch, [home, spare])
    with pytest.raises(OutputError, match="the run is lost: free some space and run again"):
        write_run(run, home / "out")
    assert everything(home) == []
    assert everything(spare) == []


def test_where_there_is_no_spare_place_the_error_is_still_one_of_ours(run, tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    full_disk(monkeypatch, [tmp_path])
    monkeypatch.setattr(output.tempfile, "gettempdir", nowhere)
    with pytest.raises(OutputError):
        write_run(run, tmp_path / "out")
    assert everything(tmp_path) == []


def test_a_folder_that_appeared_during_training_is_not_written_over(run, tmp_path, spare):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="the run is kept in"):
        write_run(run, tmp_path / "out")
    assert everything(tmp_path / "out") == ["precious"]
    (kept,) = spare.iterdir()
    assert {path.name for path in kept.iterdir()} == FILES


def test_a_parent_that_vanished_during_training_is_made_again(run, tmp_path):
    write_run(run, tmp_path / "gone" / "deep" / "out")
    assert {path.name for path in (tmp_path / "gone" / "deep" / "out").iterdir()} == FILES


def test_a_parent_that_became_a_file_during_training_costs_no_run(run, tmp_path, spare):
    (tmp_path / "gone").write_text("")
    with pytest.raises(OutputError, match="the run is kept in"):
        write_run(run, tmp_path / "gone" / "out")
    (kept,) = spare.iterdir()
    assert {path.name for path in kept.iterdir()} == FILES


def test_an_interruption_while_writing_leaves_no_half_folder(run, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(run, tmp_path / "out")
    assert everything(tmp_path) == []


@contextmanager
def file_limit(size):
    """How large a file may become, for this process; lifted at once, because the test's own output may be a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_a_real_write_that_fails_part_of_the_way_leaves_nothing(run, tmp_path, monkeypatch, limit):
    """At the first byte, in the model and in run.json; the spare place has not been looked for before."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(temporary))
    with pytest.raises(OutputError, match=r"File too large.*free some space"), file_limit(limit):
        write_run(run, home / "out")
    assert everything(home) == []
    assert everything(temporary) == []
