"""Studies whose sums are CKKS: the same model as through masks, whoever holds the key, and whoever leaves."""

import gc
import warnings

import numpy as np
import pytest

from protocols.aggregation import Unprotected
from protocols.engines.faulty import Fault
from protocols.errors import StudyError
from protocols.homomorphic import Holder
from protocols.memory import remember
from protocols.messages import Answer, KeysRequest, Reply, Request, SumRequest
from protocols.policy import Policy
from protocols.run import run_study
from protocols.sessions import Sums
from secagg.ckks import client
from secagg.keys import Identity, Roster
from secagg.prg import deterministic_entropy
from secagg.wire import decode, encode
from tests.protocols.hospitals import PRIVATE, SITES, World, changed, fedsgd, hospitals, parameters, study
from tests.protocols.test_distributed import NOISY

STAGES = ("AdvertiseKeys", "ShareKeys", "RevealKey", "CommitInput", "ConsistencyCheck", "EncryptedInput", "Decrypt")
UNIT = 2.0**-16


def ckks(keys="threshold", mode="active", **changes):
    protocol = {"aggregation": "ckks", "keys": keys, "mode": mode, **changes.pop("protocol", {})}
    if keys == "holder":
        protocol["holder"] = "trustee"
    return fedsgd(protocol=protocol, **changes)


def ran(made, *faults):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unprotected)
        return run_study(made, hospitals(), faults=faults, entropy=deterministic_entropy(b"run"))


@pytest.fixture(scope="module")
def masked():
    return parameters(ran(fedsgd(rounds=2)).model)


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
@pytest.mark.parametrize("keys", ["threshold", "holder", "shared"])
def test_the_model_is_that_of_masked_sums(masked, keys, mode):
    run = ran(ckks(keys, mode, rounds=2))
    assert run.stopped is None
    assert [record.outcome for record in run.rounds] == ["opened"] * 3
    assert all(record.contributors == SITES for record in run.rounds[:2])
    assert not any(record.dropped or record.faults for record in run.rounds)
    # Both round an update to 2^-16 at random, after weighting; the sums are exact.
    assert parameters(run.model) == pytest.approx(masked, abs=2 * UNIT)


def test_an_error_that_a_study_allows_halves_the_upload_and_is_kept_and_the_weights_stay_exact():
    allowed, wide = 2.0**14, {"model": {"kind": "mlp", "hidden": [600]}}
    exact, lossy = (ran(ckks(protocol={"sum_error": error}, **wide)) for error in (0.0, allowed))
    uploads = [
        next(stage.bytes_up for stage in run.rounds[0].stages if stage.stage == "EncryptedInput")
        for run in (exact, lossy)
    ]
    assert uploads[1] < 0.6 * uploads[0]
    rows = sum(site.train_rows for site in exact.sites.values())
    assert exact.rounds[0].weight == lossy.rounds[0].weight == rows
    apart = np.abs(parameters(lossy.model) - parameters(exact.model)).max()
    assert UNIT < apart < 0.5 * allowed * UNIT / rows + UNIT  # a step is half a mean gradient


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_leaves_at_any_stage_is_recovered(stage, mode):
    if mode == "semi-honest" and stage in ("CommitInput", "ConsistencyCheck"):
        stage = "EncryptedInput"
    run = ran(ckks(mode=mode), Fault("cedar", stage, 0))
    record = run.rounds[0]
    assert record.outcome == "opened"
    assert set(record.contributors) == (set(SITES) if stage == "Decrypt" else set(SITES) - {"cedar"})
    assert record.dropped == {"cedar": f"no answer at {stage}"}


@pytest.mark.parametrize("stage", STAGES)
def test_too_few_lose_the_round_and_the_model_stays(stage):
    made = ckks(protocol={"max_failed_rounds": 1})
    run = ran(made, Fault("cedar", stage), Fault("birch", stage))
    assert run.rounds[0].outcome == "failed"
    assert "2 participants left, 3 needed" in run.stopped
    assert parameters(run.model) == pytest.approx(parameters(World(fedsgd()).model))


@pytest.mark.parametrize("stage", ["AdvertiseKeys", "Decrypt"])
def test_without_the_holder_nothing_is_opened(stage):
    run = ran(ckks("holder", rounds=2), Fault("trustee", stage, 0))
    assert run.rounds[0].outcome == "failed"
    assert run.rounds[0].dropped["trustee"] == f"no answer at {stage}"
    assert [record.outcome for record in run.rounds[1:]] == ["opened"] * 2


def test_moments_for_standardising_are_exact():
    made = {"task": {"standardize": "global"}, "rounds": 1}
    masked, ours = ran(fedsgd(**made)), ran(ckks(**made))
    assert parameters(ours.model) == pytest.approx(parameters(masked.model), abs=2 * UNIT)
    assert ours.rounds[0].purpose == "standardize"
    assert ours.rounds[0].weight == masked.rounds[0].weight


def test_noise_inside_the_sum_is_summed_exactly_and_the_survivors_are_charged():
    """The whole numbers and their noise come out as they went in."""
    protocol = {"aggregation": "ckks"}
    world = World(fedsgd(privacy=NOISY, protocol=protocol)).run(Fault("dogwood", "EncryptedInput", 0))
    assert world.rounds[0].outcome == "opened"
    assert [kind.survivors for kind in remember(world.states["ash"]).charged] == [3]


def reachable(root):
    """Every bytes-like object that can be reached from an object, without the module and class objects."""
    seen, todo, found = set(), [root], []
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | type(gc)) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, bytes | bytearray | memoryview):
            found.append(bytes(thing))
        elif isinstance(thing, np.ndarray):
            found.append(thing.tobytes())
        todo += gc.get_referents(thing)
        if hasattr(thing, "__struct_fields__"):
            todo += [getattr(thing, name) for name in thing.__struct_fields__]
    return found


def test_the_server_holds_no_secret_of_the_key():
    """At every stage, all that it was sent and all that can be reached from it."""
    world, received = World(ckks()), []
    seeds = set()
    while not world.coordinator.finished:
        for name, reply in world.engine.exchange(world.coordinator.requests()):
            received.append(reply)
            world.coordinator.receive(name, reply)
        for name in SITES:
            memory = remember(world.states[name])
            for state in (memory.keys_state, memory.sum_state):
                if state and hasattr(kept := client.decode_state(state), "seed"):
                    seeds.add(kept.seed)
        held = b"\0".join(reachable(world.coordinator))
        assert not any(seed in held for seed in seeds)
        world.coordinator.close_stage()
    assert len(seeds) == len(SITES)
    assert not any(seed in reply for seed in seeds for reply in received)
    # The search finds what is there: the session's context is the study's digest.
    assert world.study.digest in b"\0".join(reachable(World(world.study).coordinator))


def test_a_site_restarted_before_every_message_gives_the_same_sum():
    world = World(ckks())
    while not world.coordinator.finished:
        for name in SITES:
            world.restart(name)
        world.stage()
    assert world.rounds[0].outcome == "opened"


def test_a_site_asked_again_answers_with_the_identical_bytes():
    world = World(ckks())
    for stage in ("CommitInput", "EncryptedInput", "Decrypt"):
        request = world.until(stage)["ash"]
        first = world.ask("ash", request)
        assert world.ask("ash", request) == first


def test_a_second_decryption_is_refused():
    world = World(ckks())
    request = world.until("Decrypt")["ash"]
    world.ask("ash", request)
    again = changed(request, "sum", receipts=(b"another request",))
    assert not isinstance(decode(world.ask("ash", again), Reply).sum, Answer)
    assert "stage Decrypt came where Recover was due" in world.sites["ash"].log[-1]


# --- the holder


def holder_of(made):
    identities = {name: Identity.generate(deterministic_entropy(name.encode())) for name in (*SITES, "trustee")}
    sums = Sums(made, Roster.of({name: identity.public for name, identity in identities.items()}), 3, 4)
    return Holder(sums.params, sums.setting, made.digest, identities["trustee"]), identities, sums


def test_a_holder_makes_one_key_a_round_and_opens_one_sum_with_it():
    trustee, _, _ = holder_of(ckks("holder"))
    keys = encode(Request(keys=KeysRequest(0, "AdvertiseKeys", b"")))
    reply, state = trustee.handle(keys, b"")
    assert trustee.handle(keys, state) == (reply, state)
    again = encode(Request(keys=KeysRequest(0, "AdvertiseKeys", b"x")))
    reply, state = trustee.handle(again, state)
    assert not isinstance(decode(reply, Reply).keys, Answer)
    assert "a key for round 0 after one for round 0" in trustee.log[-1]
    asked = encode(Request(sum=SumRequest(0, "train", "Decrypt", bytes(32), bytes(32), b"none")))
    for text in ("expected message version 1", "there is no key for round 0 (any more)"):
        reply, state = trustee.handle(asked, state)
        assert not isinstance(decode(reply, Reply).sum, Answer)
        assert text in trustee.log[-1]
        asked = encode(Request(sum=SumRequest(0, "train", "Decrypt", bytes(32), bytes(32), b"no")))


def test_a_holder_that_is_sent_garbage_refuses():
    trustee, _, _ = holder_of(ckks("holder"))
    reply, _ = trustee.handle(b"\1garbage", b"")
    assert not isinstance(decode(reply, Reply).sum, Answer)
    assert "not a Request" in trustee.log[0]


def test_the_holders_key_must_be_on_the_roster_and_its_own():
    made = ckks("holder")
    _, identities, sums = holder_of(made)
    with pytest.raises(StudyError, match=r"sites: the study has .*'trustee'"):
        Sums(made, Roster.of({name: identities[name].public for name in SITES}), 3, 4)
    with pytest.raises(StudyError, match=r"protocol\.holder: this is not the key"):
        Holder(sums.params, sums.setting, made.digest, identities["ash"])


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": "holder"}, r"protocol\.holder: expected the name of a party that is none of the sites, got None"),
        ({"keys": "holder", "holder": "ash"}, r"protocol\.holder: expected the name .*, got 'ash'"),
        ({"holder": "trustee"}, r'protocol\.holder: expected none, as protocol\.keys is "threshold"'),
        ({"statistical_security": 19}, r"protocol\.statistical_security: expected 20 to 64 bits, got 19"),
        ({"statistical_security": 65}, r"protocol\.statistical_security"),
        ({"sum_error": -1.0}, r"protocol\.sum_error: expected a finite number from 0, got -1.0"),
        ({"sum_error": float("inf")}, r"protocol\.sum_error"),
        ({"threshold": 2}, r"protocol\.threshold: expected 3 to 4"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes, message):
    with pytest.raises(StudyError, match=message):
        study(protocol={"aggregation": "ckks", **changes})


@pytest.mark.parametrize("key", ["keys", "holder", "statistical_security", "sum_error"])
def test_keys_of_ckks_are_refused_for_other_sums(key):
    value = {"keys": "shared", "holder": "trustee", "statistical_security": 40, "sum_error": 1.0}[key]
    with pytest.raises(StudyError, match=rf'protocol\.{key}: expected nothing, as protocol\.aggregation is "masked"'):
        study(protocol={key: value})


def test_shared_keys_and_noise_shares_do_not_go_together():
    with pytest.raises(StudyError, match=r'protocol\.keys: expected "threshold" or "holder" where noise is shared'):
        fedsgd(privacy=NOISY, protocol={"aggregation": "ckks", "keys": "shared"})


def test_parameters_that_no_secure_ring_holds_are_refused_before_anything_is_sent():
    made = ckks(protocol={"statistical_security": 64})
    with pytest.raises(StudyError, match="no parameters that are 128-bit secure"):
        Sums(made, World(made).roster, 3, 1 << 26)


@pytest.mark.parametrize(("keys", "allowed"), [("threshold", True), ("holder", False), ("shared", False)])
def test_a_site_takes_part_where_nobody_has_the_key_unless_its_policy_says_otherwise(keys, allowed):
    made = ckks(keys)
    if allowed:
        Policy().check_study("ash", made)
        return
    with pytest.raises(StudyError, match=f'the policy of ash allows masked, ckks, the study has "ckks-{keys}"'):
        Policy().check_study("ash", made)
    Policy(schemes=(f"ckks-{keys}",)).check_study("ash", made)


def test_the_policys_smallest_cohort_is_asked_for_before_anything_is_decrypted():
    world = World(ckks(), policy=Policy(smallest_cohort=3, smallest_others=3))
    world.run(Fault("dogwood", "EncryptedInput", 0))
    assert world.rounds[0].outcome == "failed"
    assert "asks for at least 3, and for 3 beside this one" in world.sites["ash"].log[0]


def test_shared_keys_are_warned_of_in_every_run():
    with pytest.warns(Unprotected, match="every site can decrypt"):
        run_study(ckks("shared"), hospitals())


def test_a_private_study_goes_through_ckks_with_the_same_account():
    made = ckks(rounds=2, privacy=PRIVATE)
    spent = {name: site.spent.epsilon for name, site in ran(made).sites.items()}
    same = {name: site.spent.epsilon for name, site in ran(fedsgd(rounds=2, privacy=PRIVATE)).sites.items()}
    assert spent == same
