"""What goes wrong between a server and four hospitals' own processes, and how each of it ends."""

import itertools
import resource
import time

import msgspec
import pytest

from protocols.coordinator import Coordinator
from protocols.engines.flower.bodies import MESSAGE
from protocols.engines.flower.conduct import planned_cost
from protocols.engines.flower.engine import Patience
from protocols.engines.in_process import InProcess
from protocols.errors import LinkError, StudyError
from protocols.fedavg import flatten
from protocols.hello import Hello
from protocols.messages import Request, Work
from protocols.rosters import roster_digest
from protocols.run import drive, load_data
from protocols.site import Site
from protocols.site_file import load_site
from protocols.site_service import read_journal, rows_of
from secagg.prg import deterministic_entropy
from secagg.wire import decode, encode
from tests.flower.deployment import SITES
from tests.flower.local_grid import body_of, is_request, with_body
from tests.protocols.hospitals import with_work

SHORT = Patience(gather=10.0, stage=5.0, resend=3.0, absent=0.6, poll=0.02)
"""For rounds in which somebody never answers."""
STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")


def stage_of(message):
    """Stage and number of the sum in a request, or of its keys where there is no sum."""
    request = decode(body_of(message), Request)
    part = request.sum or request.keys
    return (part.stage, part.round) if part is not None else ("Finish", None)


def outcomes(run):
    return [record.outcome for record in run.rounds if record.purpose == "train"]


def model_in_process(ward, rounds=None):
    """The same study in one process, from the same seeds."""
    study = ward.study
    sites = []
    for name in study.site_names:
        file = load_site(ward.folder / name / "site.toml")
        sites.append(
            Site(
                study,
                name,
                file.load_identity(),
                file.roster,
                rows_of(study, file),
                policy=file.policy,
                entropy=deterministic_entropy(name.encode()),
            )
        )
    from protocols.engines.flower.conduct import feature_names
    from protocols.fedavg import build_model

    columns = len(feature_names(study))
    coordinator = Coordinator(study, ward.roster, build_model(study, columns), columns)
    drive(coordinator, InProcess(sites))
    return coordinator


def killing(ward, site, stage, number, *, reply, restart):
    """kill -9 of a site's process as a request of that stage comes, or as its answer leaves; once."""
    done = []

    def strike():
        done.append(time.monotonic())
        ward.hospitals[site].kill()
        if restart:
            ward.hospitals[site].start()
        else:
            ward.grid.offline.add(ward.node[site])

    def due(node, message):
        return node == ward.node[site] and is_request(message) and stage_of(message) == (stage, number)

    def on_message(node, message):
        if not reply and not done and due(node, message):
            strike()
        return message

    def on_reply(node, message, answer):
        if reply and not done and due(node, message):
            strike()
            return None  # lost with the process
        return answer

    ward.grid.on_message, ward.grid.on_reply = on_message, on_reply
    return done


def test_the_model_equals_the_one_of_the_same_study_in_one_process_bit_for_bit(ward):
    here = ward(seeds=True, rounds=2)
    run, _ = here.run()
    alone = model_in_process(here)
    assert outcomes(run) == ["opened", "opened"]
    assert flatten(run.model).tobytes() == flatten(alone.model).tobytes()
    assert run.transcript
    assert [r.contributors for r in run.rounds] == [r.contributors for r in alone.rounds]


def test_sums_under_ckks_are_carried_as_well(ward):
    here = ward(rounds=1, more='protocol = { aggregation = "ckks" }')
    run, _ = here.run()
    assert outcomes(run) == ["opened"]
    assert run.rounds[0].contributors == SITES


def test_a_holder_of_keys_is_refused_before_anything_is_asked(ward):
    here = ward(rounds=1, start=False)
    protocol = msgspec.structs.replace(here.study.protocol, aggregation="ckks", keys="holder", holder="notary")
    with pytest.raises(StudyError, match="notary has its keys in process only"):
        here.run(study=msgspec.structs.replace(here.study, protocol=protocol))
    assert not here.grid.sent


@pytest.mark.parametrize(("stage", "reply"), [(s, r) for s in STAGES[2:] for r in (False, True)])
def test_a_site_that_is_killed_and_started_again_within_a_stage_is_still_in_the_sum(ward, stage, reply):
    here = ward(seeds=False)
    struck = killing(here, "va", stage, 0, reply=reply, restart=True)
    run, _ = here.run()
    assert struck
    assert outcomes(run) == ["opened", "opened"]
    assert run.rounds[0].contributors == SITES
    assert not any(record.dropped for record in run.rounds)


@pytest.mark.parametrize(
    ("stage", "reply", "contributors"),
    [
        ("MaskedInput", False, SITES[:3]),  # before its vector has left
        ("MaskedInput", True, SITES[:3]),  # as it leaves
        ("ConsistencyCheck", False, SITES),  # after its vector arrived
        ("Unmask", False, SITES),
    ],
)
def test_a_site_that_is_killed_for_good_leaves_the_right_sum_of_the_others(ward, stage, reply, contributors):
    here = ward(rounds=1)
    struck = killing(here, "va", stage, 0, reply=reply, restart=False)
    run, _ = here.run()
    assert struck
    assert outcomes(run) == ["opened"]
    assert run.rounds[0].contributors == contributors
    assert run.rounds[0].dropped["va"].startswith("no answer at")
    assert run.rounds[0].weight == sum(load_data(here.study)[site].train_rows for site in contributors)


def test_two_of_four_sites_that_are_killed_lose_the_round_and_the_study_says_so(ward):
    here = ward(rounds=1, more="protocol = { max_failed_rounds = 1 }")
    here.grid.on_message = lambda node, message: (
        None
        if is_request(message) and stage_of(message)[0] == "MaskedInput" and here.site[node] in ("va", "cleveland")
        else message
    )
    run, _ = here.run(patience=SHORT)
    assert outcomes(run) == ["failed"]
    assert "2 participants left, 3 needed" in run.stopped


def test_a_study_goes_on_from_the_last_finished_round_after_the_server_was_killed(ward, tmp_path):
    here = ward(rounds=3, more='server = { optimizer = "Adam", learning_rate = 0.1 }')
    checkpoint = tmp_path / "checkpoint"

    class Killed(Exception):
        pass

    def end(coordinator):
        if coordinator.rounds[-1].number == 1 and coordinator.stage == "ConsistencyCheck":
            raise Killed

    with pytest.raises(Killed):
        here.run(checkpoint=checkpoint, listener=end)
    run, _ = here.run(checkpoint=checkpoint, resume=True)
    assert outcomes(run) == ["opened", "failed", "opened"]
    assert run.rounds[1].faults == ["the server went down in this round"]
    assert run.rounds[2].contributors == SITES
    assert run.stopped is None


def test_a_server_that_is_killed_after_every_stage_comes_to_the_end(ward, tmp_path):
    here = ward(rounds=2)
    checkpoint = tmp_path / "checkpoint"

    class Killed(Exception):
        pass

    for stages in itertools.count(1):
        seen = []

        def end(coordinator, seen=seen, stages=stages):
            seen.append(coordinator.stage)
            if len(seen) == stages and not coordinator.finished:
                raise Killed

        try:
            run, _ = here.run(checkpoint=checkpoint, resume=checkpoint.exists(), listener=end)
            break
        except Killed:
            continue
    assert len(outcomes(run)) == 2
    assert run.rounds[-1].purpose == "finish"


def test_a_checkpoint_of_another_study_is_refused(ward, tmp_path):
    here = ward(rounds=1, start=False)
    other = ward(rounds=2, start=False)
    columns = 28
    from protocols.fedavg import build_model

    mine, theirs = (Coordinator(w.study, w.roster, build_model(w.study, columns), columns) for w in (here, other))
    with pytest.raises(Exception, match="checkpoint is of another study"):
        mine.resume(theirs.checkpoint())
    with pytest.raises(LinkError, match="no run to go on with"):
        here.run(checkpoint=tmp_path / "none", resume=True)


def test_a_site_with_another_study_is_named_and_nothing_is_asked_of_anyone(ward):
    here = ward(rounds=1, start=False)
    path = here.folder / "va" / "study.toml"
    path.write_text(path.read_text().replace("rounds = 1", "rounds = 2"))
    for hospital in here.hospitals.values():
        hospital.start()
    with pytest.raises(StudyError, match=r"va has another study\.toml"):
        here.run()
    assert not [kind for _, kind in here.grid.sent if kind == MESSAGE]


def test_a_site_with_another_roster_is_named_and_nothing_is_asked_of_anyone(ward):
    here, other = ward(rounds=1, start=False), ward(rounds=1, start=False)
    for name in ("roster.toml", "site.toml", "site.key"):
        (here.folder / "va" / name).write_bytes((other.folder / "va" / name).read_bytes())
    for hospital in here.hospitals.values():
        hospital.start()
    with pytest.raises(StudyError, match="va has another roster"):
        here.run()
    assert not [kind for _, kind in here.grid.sent if kind == MESSAGE]


def test_two_nodes_with_one_name_are_refused(ward):
    here = ward(rounds=1)
    here.grid.add(9, here.grid.configurations[1])
    here.grid.on_message = lambda node, message: time.sleep(here.site.get(node) == "va") or message  # comes last
    with pytest.raises(StudyError, match="two nodes say that they are cleveland"):
        here.run()


def test_a_node_that_takes_another_sites_name_is_in_no_sum(ward):
    here, other = ward(rounds=1), ward(rounds=1, start=False)
    here.grid.offline.add(here.node["va"])
    here.grid.add(9, {"site-socket": str(other.hospitals["va"].start().socket)})  # with a key of its own
    claim = encode(Hello("va", here.study.digest, roster_digest(here.roster)))
    here.grid.on_reply = lambda node, message, reply: (
        with_body(reply, claim) if node == 9 and not is_request(message) else reply
    )
    run, _ = here.run()
    assert (9, MESSAGE) in here.grid.sent
    assert outcomes(run) == ["opened"]
    assert run.rounds[0].contributors == SITES[:3]
    assert run.rounds[0].dropped["va"] == "sent a wrong message at AdvertiseKeys"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (encode(Hello("stranger", bytes(32), bytes(32))), "says it is 'stranger', which is none of the study's sites"),
        (b"garbage", "does not say which site it is"),
    ],
    ids=["another name", "no name"],
)
def test_a_node_that_is_none_of_the_sites_is_not_asked(ward, told, says):
    here = ward(rounds=1)
    here.grid.add(9, here.grid.configurations[1])
    here.grid.on_reply = lambda node, message, reply: with_body(reply, told) if node == 9 else reply
    run, _ = here.run()
    assert outcomes(run) == ["opened"]
    assert any(says in line for line in here.lines)
    assert (9, MESSAGE) not in here.grid.sent


def test_a_node_without_a_site_behind_it_is_missing_and_said_so(ward):
    here = ward(rounds=1)
    here.hospitals["va"].kill()
    here.hospitals["cleveland"].kill()
    with pytest.raises(LinkError, match=r"2 of 4 sites came .* without cleveland, va"):
        here.run(patience=Patience(gather=4.0, stage=2.0, resend=1.0, absent=0.3, poll=0.02))


def test_a_site_that_comes_late_takes_part_from_then_on(ward):
    here = ward(rounds=2)
    here.grid.offline.add(here.node["va"])

    def arrive(coordinator):
        if coordinator.rounds[-1].number == 0 and coordinator.stage == "ConsistencyCheck":
            here.grid.offline.clear()

    run, _ = here.run(listener=arrive, patience=Patience(gather=3.0, stage=20.0, resend=3.0, absent=0.6, poll=0.02))
    assert any("without va" in line for line in here.lines)
    assert run.rounds[0].contributors == SITES[:3]
    assert outcomes(run) == ["opened", "opened"]


def test_a_server_that_sends_two_sites_different_models_opens_nothing_of_both(ward):
    here = ward(rounds=1, more="protocol = { max_failed_rounds = 1 }")

    def swap(node, message):
        if is_request(message) and here.site[node] in ("va", "cleveland"):
            request = decode(body_of(message), Request)
            if request.sum is not None and request.sum.work is not None:
                work = decode(request.sum.work, Work)
                model = bytearray(work.model)
                model[-1] ^= 1
                other = encode(Work(bytes(model), work.mean, work.std))
                return with_body(message, with_work(body_of(message), other))
        return message

    here.grid.on_message = swap
    run, _ = here.run()
    assert outcomes(run) == ["failed"]
    assert run.stopped is not None


def full_disk():
    """No file of this process grows beyond some bytes: what a full disk looks like."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))


def test_a_site_whose_disk_is_full_does_not_answer_and_says_why_in_its_own_log(ward):
    here = ward(rounds=1, start=False)
    here.hospitals["va"].limit = full_disk
    for hospital in here.hospitals.values():
        hospital.start()
    run, _ = here.run(patience=SHORT)
    assert outcomes(run) == ["opened"]
    assert "va" not in run.rounds[0].contributors
    assert any("va: could not answer; its own log says why" in line for line in here.lines)
    assert "could not be saved" in here.hospitals["va"].told()


def test_a_disk_that_has_room_again_within_the_stage_costs_nothing(ward):
    here = ward(rounds=1, start=False)
    here.hospitals["va"].limit = full_disk
    for hospital in here.hospitals.values():
        hospital.start()

    def mend(node, message, reply):
        if here.hospitals["va"].limit and "could not be saved" in here.hospitals["va"].told():
            here.hospitals["va"].limit = None
            here.hospitals["va"].restart()
        return reply

    here.grid.on_reply = mend
    run, _ = here.run()
    assert run.rounds[0].contributors == SITES


PRIVATE = """
training = { local_steps = 2 }
[privacy]
mechanism = "local-sgd"
delta = 1e-4
noise_multiplier = 1.0
sampling_rate = 0.2
"""


def test_what_a_killed_site_has_spent_is_never_counted_as_less(ward):
    here = ward(rounds=2, more=PRIVATE)
    killing(here, "va", "MaskedInput", 0, reply=True, restart=True)
    patience = Patience(gather=30.0, stage=120.0, resend=3.0, absent=0.6, poll=0.02)  # noise is calibrated first
    run, coordinator = here.run(patience=patience)
    assert outcomes(run) == ["opened", "opened"]
    for site in SITES:
        spent = [entry.spent for entry in read_journal(here.folder / site / "site.state.journal") if entry.spent]
        assert spent[-1].epsilon == pytest.approx(planned_cost(here.study, coordinator).epsilon, rel=1e-9)
        assert run.sites[site].spent.epsilon >= spent[-1].epsilon - 1e-12


def test_a_ledger_that_is_exhausted_mid_study_takes_its_site_out_and_names_the_budget(ward):
    from dp.ledger_rows import Cap
    from protocols.ledger_file import create_ledger, open_ledger

    here = ward(rounds=3, more=PRIVATE, start=False)
    file = load_site(here.folder / "va" / "site.toml")
    one = planned_cost(here.study, _Begun(here, 1)).epsilon
    three = planned_cost(here.study, _Begun(here, 3)).epsilon
    create_ledger(
        here.folder / "va" / "ledger.db",
        site="va",
        identity=file.load_identity(),
        cap=Cap(
            epsilon=(one + three) / 2,
            delta=1e-4,
            relation=here.study.privacy.relation,
            unit=here.study.unit,
            records=132,
        ),
        time=time.time(),
    )
    toml = here.folder / "va" / "site.toml"
    toml.write_text(toml.read_text().replace("[fingerprints]", 'ledger = "ledger.db"\n\n[fingerprints]', 1))
    for hospital in here.hospitals.values():
        hospital.start()
    run, _ = here.run()
    refused = [record.dropped.get("va", "") for record in run.rounds if record.purpose == "train"]
    assert refused[0] == ""
    assert any(why.startswith("refused (budget)") for why in refused[1:])
    assert outcomes(run) == ["opened"] * 3  # the others go on
    here.hospitals["va"].kill()
    with open_ledger(
        file.ledger or here.folder / "va" / "ledger.db", site="va", identity=file.load_identity(), roster=file.roster
    ) as ledger:
        assert ledger.head() is not None


class _Begun:
    """As much of a coordinator as the planned cost looks at."""

    def __init__(self, ward, rounds):
        from protocols.coordinator import RoundRecord
        from protocols.fedavg import build_model

        self.model = build_model(ward.study, 28)
        self.rounds = [RoundRecord(number, "train") for number in range(rounds)]
