"""Secure sums under an app: what comes out, and what a server that lies gets."""

import hashlib

import msgspec
import numpy as np
import pytest

from protocols.agreement import Agreement
from protocols.app_server import AppSums
from protocols.app_work import AppVectors, AppWork, Returned, Setting
from protocols.errors import DataError, StudyError
from protocols.messages import FinishRequest, Refusal, Reply, Request
from protocols.policy import Policy
from secagg.errors import BelowThreshold, DecodeError, LocalProtocolError, RemoteProtocolError
from secagg.wire import decode, encode
from tests.protocols.apps import (
    ARRAYS,
    SITES,
    TEXT,
    WEIGHTS,
    Clinics,
    evaluate_work,
    mean_of,
    moves,
    train_work,
    trained,
)

STAGES = ("MaskedInput", "ConsistencyCheck", "Unmask")
UNIT = 2.0**-16


def stage_of(request):
    message = decode(request, Request)
    return message.sum.stage if message.sum is not None else None


def losing(clinics, name, stage):
    """From that stage on nothing arrives at a site."""

    def change(to, request):
        if to == name and stage_of(request) == stage:
            clinics.away = frozenset({name})
        return None if to in clinics.away else request

    clinics.change = change


def is_mean_of(average, names):
    unit = UNIT * len(names) / sum(WEIGHTS[name] for name in names)  # each is off by less than one unit, unweighted
    shift = mean_of(names, {name: moves(name)["layer.weight"] for name in names})
    single = 4e-7  # and by the last bits of float32, at the site and at the end
    np.testing.assert_allclose(average.arrays["layer.weight"], ARRAYS["layer.weight"] + shift, atol=unit + single)
    shift = mean_of(names, {name: moves(name)["layer.bias"] for name in names})
    np.testing.assert_allclose(average.arrays["layer.bias"], ARRAYS["layer.bias"] + shift, rtol=0, atol=unit + 1e-12)
    loss = mean_of(names, {name: trained(name, train_work()).metrics["train_loss"] for name in names})
    assert average.metrics == {"train_loss": pytest.approx(loss, rel=0, abs=unit * 10 / 4 + 1e-12)}
    assert average.contributors == tuple(names)


# --- what comes out


def test_the_average_is_that_of_all_replies_by_weight():
    clinics = Clinics()
    average = clinics.sum()
    is_mean_of(average, SITES)
    assert average.weight == 82
    assert {name: array.dtype for name, array in average.arrays.items()} == {n: a.dtype for n, a in ARRAYS.items()}
    assert {name: array.shape for name, array in average.arrays.items()} == {n: a.shape for n, a in ARRAYS.items()}
    assert average.arrays["steps"] == 3


def test_evaluation_gives_metrics_and_weight_and_no_arrays():
    average = Clinics().sum(evaluate_work())
    assert average.arrays == {}
    expected = mean_of(SITES, {name: trained(name, evaluate_work()).metrics["eval_acc"] for name in SITES})
    assert average.metrics == {"eval_acc": pytest.approx(expected, rel=0, abs=4 * UNIT / 82)}
    assert average.weight == 82


def test_a_steady_sum_takes_three_trips():
    clinics = Clinics()
    for work in (train_work(), evaluate_work(), train_work(configs={"config": {"server-round": 2}})):
        assert clinics.sum(work) is not None
    assert [[stage.stage for stage in record.stages] for record in clinics.server.rounds] == [
        ["AdvertiseKeys", "ShareKeys", *STAGES],
        [*STAGES],
        [*STAGES],
    ]


def test_what_a_strategy_sent_is_what_the_app_gets():
    configs = {"config": {"lr": 0.5, "name": "a", "on": True, "raw": b"\0", "list": (1, 2)}, "more": {}}
    clinics, seen = Clinics(), []
    clinics.run = lambda name, work: seen.append(work) or trained(name, work)
    clinics.sum(AppWork.of("train.first", "weights", ARRAYS, configs))
    assert len(seen) == 4
    for work in seen:
        assert (work.message_type, work.key) == ("train.first", "weights")
        given = {record: {setting.name: setting.value for setting in entries} for record, entries in work.configs}
        assert given == configs
        assert [type(value) for value in given["config"].values()] == [float, str, bool, bytes, tuple]
        assert list(work.sent()) == list(ARRAYS)
        for name, array in work.sent().items():
            assert array.dtype == ARRAYS[name].dtype
            np.testing.assert_array_equal(array, ARRAYS[name])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_come_back_in_the_type_that_was_sent(dtype):
    clinics = Clinics()
    arrays = {"a": np.array([1.0, 2.0], dtype)}
    clinics.run = lambda name, work: Returned(
        {"a": work.sent()["a"] + np.array(0.5, dtype)}, {"num-examples": 3, "train_loss": 0.0}
    )
    average = clinics.sum(train_work(arrays))
    assert average.arrays["a"].dtype == dtype
    np.testing.assert_allclose(average.arrays["a"], [1.5, 2.5], atol=1e-3)


def test_a_model_without_entries_and_without_metrics_still_has_a_weight():
    clinics = Clinics(TEXT.split("[train]")[0])
    clinics.run = lambda name, work: Returned({}, {"num-examples": 2})
    average = clinics.sum(train_work({}))
    assert (average.weight, average.arrays, average.metrics) == (8, {}, {})


# --- who drops out


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_goes_at_a_stage_leaves_the_right_average(stage):
    clinics = Clinics()
    losing(clinics, "birch", stage)
    average = clinics.sum()
    is_mean_of(average, SITES if stage != "MaskedInput" else ("ash", "cedar", "dogwood"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_was_away_is_in_the_next_sum_but_one(stage):
    clinics = Clinics()
    losing(clinics, "birch", stage)
    clinics.sum()
    clinics.change, clinics.away = (lambda name, request: request), frozenset()
    clinics.sum(evaluate_work())
    moved = {
        **ARRAYS,
        "layer.bias": np.array([0.25, 0.25]),
    }  # over the same one, cohorts that differ by one are refused
    assert clinics.sum(train_work(moved)).contributors == SITES


def test_below_the_threshold_nothing_opens_and_the_next_sum_does():
    clinics = Clinics()
    clinics.away = frozenset({"ash", "birch"})
    assert clinics.sum() is None
    assert "2 participants left, 3 needed" in clinics.record.faults[-1]
    clinics.away = frozenset()
    is_mean_of(clinics.sum(), SITES)


def test_a_sample_is_summed_alone_and_the_others_get_keys():
    clinics = Clinics()
    chosen = ("ash", "cedar", "dogwood")
    is_mean_of(clinics.sum(among=chosen), chosen)
    assert {name for name, _ in clinics.ran} == set(chosen)
    assert clinics.sum(evaluate_work()).contributors == SITES


def test_a_sample_below_the_threshold_is_refused_before_anything_is_sent():
    clinics = Clinics()
    with pytest.raises(BelowThreshold, match="2 participants left, 3 needed"):
        clinics.sum(among=("ash", "birch"))
    assert clinics.ran == []
    assert clinics.server.finished
    is_mean_of(clinics.sum(), SITES)


def test_one_sum_at_a_time():
    clinics = Clinics()
    clinics.server.begin(train_work(), frozenset(SITES))
    with pytest.raises(LocalProtocolError, match="a sum is under way"):
        clinics.server.begin(train_work(), frozenset(SITES))


# --- what the app gives


def bad(**changes):
    """What birch gives in place of the right thing, and what its log says."""

    def run(name, work):
        right = trained(name, work)
        return msgspec.structs.replace(right, **changes) if name == "birch" else right

    return run


METRICS = {"num-examples": 25, "train_loss": 2.5}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metrics": {"num-examples": 25}}, "the metrics of train are 'num-examples': the agreement has"),
        ({"metrics": {**METRICS, "more": 1.0}}, "'more', 'num-examples', 'train_loss'"),
        ({"metrics": {"train_loss": 2.5}}, "the metrics of train are 'train_loss'"),
        ({"metrics": {**METRICS, "train_loss": 10.1}}, "metric 'train_loss': 10.1 is beyond 10"),
        ({"metrics": {**METRICS, "train_loss": -10.1}}, "metric 'train_loss': -10.1 is beyond 10"),
        ({"metrics": {**METRICS, "train_loss": float("nan")}}, "metric 'train_loss': nan is beyond 10"),
        ({"metrics": {**METRICS, "train_loss": 10**400}}, "is beyond 10"),
        ({"metrics": {**METRICS, "train_loss": True}}, "metric 'train_loss': expected a number, got bool"),
        ({"metrics": {**METRICS, "train_loss": [1.0]}}, "metric 'train_loss': expected a number, got list"),
        (
            {"metrics": {**METRICS, "num-examples": 2.5}},
            "'num-examples': expected a whole number from 0 to 10000",
        ),
        (
            {"metrics": {**METRICS, "num-examples": -1}},
            "'num-examples': expected a whole number from 0 to 10000",
        ),
        ({"metrics": {**METRICS, "num-examples": 10_001}}, "expected a whole number from 0 to 10000, got 10001"),
        ({"metrics": {**METRICS, "num-examples": 10**400}}, "expected a whole number from 0 to 10000"),
        ({"arrays": {}}, "the arrays came back without 'layer.weight', without 'layer.bias', without 'steps'"),
        ({"arrays": {**ARRAYS, "more": ARRAYS["layer.bias"]}}, "the arrays came back with 'more'"),
        ({"arrays": {**ARRAYS, "layer.bias": np.zeros(3)}}, "array 'layer.bias': expected float64 of shape (2,)"),
        ({"arrays": {**ARRAYS, "layer.bias": np.zeros((1, 2))}}, "got float64 of shape (1, 2)"),
        ({"arrays": {**ARRAYS, "layer.bias": np.zeros(2, np.float32)}}, "got float32 of shape (2,)"),
        ({"arrays": {**ARRAYS, "layer.bias": np.array([np.nan, 0])}}, "is nan; nothing was sent"),
        ({"arrays": {**ARRAYS, "layer.bias": np.array([0, -np.inf])}}, "is -inf; nothing was sent"),
        ({"arrays": {**ARRAYS, "steps": np.array(4)}}, "array 'steps': int64, and not as it was sent; set max_integer"),
    ],
)
def test_what_does_not_fit_the_agreement_does_not_leave_the_site(changes, told):
    clinics = Clinics()
    clinics.run = bad(**changes)
    average = clinics.sum()
    is_mean_of(average, ("ash", "cedar", "dogwood"))
    assert clinics.record.dropped["birch"] == "refused (data) at MaskedInput"
    assert told in clinics.log("birch")


def test_what_the_app_itself_refuses_is_told_at_the_site_alone():
    clinics = Clinics()

    def run(name, work):
        if name == "birch":
            raise DataError("patient 17 has no age")
        return trained(name, work)

    clinics.run = run
    assert clinics.sum().contributors == ("ash", "cedar", "dogwood")
    assert "patient 17" in clinics.log("birch")
    assert "patient 17" not in repr(clinics.server.rounds)


def test_evaluation_that_gives_arrays_is_refused():
    clinics = Clinics()
    clinics.run = bad(arrays=ARRAYS)
    assert clinics.sum(evaluate_work()).contributors == ("ash", "cedar", "dogwood")
    assert "the arrays came back with" in clinics.log("birch")


def test_a_large_update_is_clipped_and_the_site_says_so():
    clinics = Clinics()

    def run(name, work):
        right = trained(name, work)
        jump = {**right.arrays, "layer.bias": ARRAYS["layer.bias"] + 100.0}
        return Returned(jump, right.metrics) if name == "birch" else right

    clinics.run = run
    shifts = {name: moves(name)["layer.bias"] if name != "birch" else np.array([4.0, 4.0]) for name in SITES}
    average = clinics.sum()
    np.testing.assert_allclose(
        average.arrays["layer.bias"] - ARRAYS["layer.bias"], mean_of(SITES, shifts), atol=4 * UNIT
    )
    assert "2 of 9 entries were larger than 4.0 and were clipped" in clinics.log("birch")
    assert clinics.log("ash") == ""


def test_a_metric_at_its_largest_is_not_clipped():
    clinics = Clinics()
    clinics.run = lambda name, work: Returned(ARRAYS, {"num-examples": 3, "train_loss": -10.0})
    assert clinics.sum().metrics["train_loss"] == pytest.approx(-10.0, abs=4 * UNIT)
    assert clinics.log("birch") == ""


def test_integers_are_averaged_and_rounded_where_that_is_agreed():
    clinics = Clinics("max_integer_update = 1000\n" + TEXT)
    steps = {"ash": 4, "birch": 903, "cedar": 3, "dogwood": 3}
    clinics.run = lambda name, work: Returned(
        {**trained(name, work).arrays, "steps": np.array(steps[name])}, trained(name, work).metrics
    )
    average = clinics.sum()
    assert isinstance(average.arrays["steps"], np.ndarray)
    assert average.arrays["steps"].dtype == np.int64
    assert average.arrays["steps"] == round(mean_of(SITES, steps))


@pytest.mark.parametrize(("start", "moved", "expected"), [(250, 255, 255), (2**62 + 1, 2**62 + 6, 2**62 + 6)])
def test_integers_neither_wrap_nor_lose_their_low_bits(start, moved, expected):
    clinics = Clinics("max_integer_update = 1000\n" + TEXT)
    dtype = np.uint8 if start < 256 else np.int64
    clinics.run = lambda name, work: Returned({"a": np.array([moved], dtype)}, {"num-examples": 3, "train_loss": 0.0})
    average = clinics.sum(train_work({"a": np.array([start], dtype)}))
    assert average.arrays["a"].dtype == dtype
    assert average.arrays["a"].tolist() == [expected]


def test_flags_must_come_back_as_they_were_sent():
    clinics = Clinics("max_integer_update = 1000\n" + TEXT)
    clinics.run = lambda name, work: Returned(
        {"a": np.array([name == "birch"])}, {"num-examples": 3, "train_loss": 0.0}
    )
    average = clinics.sum(train_work({"a": np.array([False])}))
    assert average.contributors == ("ash", "cedar", "dogwood")
    assert average.arrays["a"].tolist() == [False]
    assert "such arrays are not averaged" in clinics.log("birch")


def test_weights_that_are_all_zero_have_no_mean():
    clinics = Clinics()
    clinics.run = lambda name, work: Returned(ARRAYS, {"num-examples": 0, "train_loss": 0.0})
    assert clinics.sum() is None
    assert "add up to 0" in clinics.record.faults[-1]


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.array([1], np.uint64), np.array([1], ">U2")])
def test_arrays_that_cannot_be_summed_are_not_sent(array):
    with pytest.raises(LocalProtocolError, match="array 'a': expected one of float16"):
        train_work({"a": array})


@pytest.mark.parametrize("kind", ["query", "trained", "", "query.train"])
def test_other_messages_are_no_work(kind):
    with pytest.raises(LocalProtocolError, match='expected a message of type "train" or "evaluate"'):
        AppWork.of(kind, "arrays", ARRAYS, {})


def test_arrays_without_entries_are_carried_like_others():
    arrays = {"none": np.zeros((0, 3), np.float32), "one": np.zeros(1), "last": np.zeros(0)}
    sent = train_work(arrays).sent()
    assert {name: (array.dtype, array.shape) for name, array in sent.items()} == {
        name: (array.dtype, array.shape) for name, array in arrays.items()
    }
    clinics = Clinics()
    clinics.run = lambda name, work: Returned(work.sent(), {"num-examples": 1, "train_loss": 0.0})
    assert clinics.sum(train_work(arrays)).arrays["none"].shape == (0, 3)


def test_big_endian_and_fortran_arrays_are_sent_as_they_are():
    array = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    np.testing.assert_array_equal(train_work({"a": array}).sent()["a"], array)


# --- a server that lies


def tampered(request, **changes):
    """A request whose work is another, with the digest to match."""
    message = decode(request, Request)
    work = msgspec.structs.replace(decode(message.sum.work, AppWork), **changes)
    encoded = encode(work)
    part = msgspec.structs.replace(message.sum, work=encoded, work_digest=hashlib.sha256(encoded).digest())
    return encode(msgspec.structs.replace(message, sum=part))


def with_sum(request, **changes):
    message = decode(request, Request)
    return encode(msgspec.structs.replace(message, sum=msgspec.structs.replace(message.sum, **changes)))


def at_input(change, *names):
    def changed(name, request):
        return change(request) if name in names and stage_of(request) == "MaskedInput" else request

    return changed


def other_arrays(request):
    data = bytearray(decode(decode(request, Request).sum.work, AppWork).data)
    data[0] ^= 1
    return tampered(request, data=memoryview(bytes(data)))


@pytest.mark.parametrize("names", [("birch",), ("ash", "birch"), ("ash", "birch", "cedar")])
def test_sites_that_are_sent_different_arrays_do_not_open_together(names):
    clinics = Clinics()
    clinics.change = at_input(other_arrays, *names)
    average = clinics.sum()
    if average is not None:  # three that agree are a sum of their own
        is_mean_of(average, ("ash", "cedar", "dogwood"))
        assert "birch" in clinics.record.dropped


def test_sites_that_are_sent_different_settings_do_not_open_together():
    clinics = Clinics()
    clinics.change = at_input(
        lambda request: tampered(request, configs=(("config", (Setting.of("lr", 9.0),)),)), "ash", "birch"
    )
    assert clinics.sum() is None


def test_work_that_is_not_what_the_digest_says_is_not_run():
    clinics = Clinics()
    clinics.change = at_input(lambda request: with_sum(request, work_digest=bytes(32)), "birch")
    clinics.sum()
    assert ("birch", "train") not in clinics.ran
    assert "not the one that the sum is said to be about" in clinics.log("birch")


def test_a_sum_for_evaluation_does_not_run_training():
    clinics = Clinics()
    clinics.change = at_input(lambda request: with_sum(request, purpose="evaluate"), "birch")
    clinics.sum()
    assert clinics.ran
    assert ("birch", "train") not in clinics.ran
    assert "the server asks to evaluate, and what came with it is for train" in clinics.log("birch")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"message_type": "query"}, 'expected a message of type "train" or "evaluate"'),
        ({"message_type": "train." + "a" * 123}, "not a AppWork: Expected `str` of length <= 128"),
        ({"data": memoryview(b"")}, "the arrays take 48 bytes, and 0 came"),
        ({"data": memoryview(bytes(49))}, "the arrays take 48 bytes, and 49 came"),
    ],
)
def test_work_that_makes_no_sense_is_refused(changes, told):
    clinics = Clinics()
    clinics.change = at_input(lambda request: tampered(request, **changes), "birch")
    clinics.sum()
    assert ("birch", "train") not in clinics.ran
    assert told in clinics.log("birch")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("dtype", "O", "got 'O'"),
        ("dtype", "f" * 17, "not a AppWork: Expected `str` of length <= 16"),
        ("name", "layer.bias", "comes twice"),
        ("name", "a" * 4097, "not a AppWork: Expected `str` of length <= 4096"),
        ("shape", (-2, -3), "not a AppWork: Expected `int` >= 0"),
        ("shape", (0, 1 << 40), "not a AppWork: Expected `int` <= 1099511627775"),
        ("shape", (1,) * 33, "not a AppWork: Expected `array` of length <= 32"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(field, value, told):
    clinics = Clinics()

    def change(request):
        arrays = decode(decode(request, Request).sum.work, AppWork).arrays
        return tampered(request, arrays=(msgspec.structs.replace(arrays[0], **{field: value}), *arrays[1:]))

    clinics.change = at_input(change, "birch")
    clinics.sum()
    assert ("birch", "train") not in clinics.ran
    assert told in clinics.log("birch")


@pytest.mark.parametrize(
    "setting", [Setting("a", (1, 2), (), False), Setting("a", (), (), False), Setting("a", (1,), (b"x",), True)]
)
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(LocalProtocolError, match="setting 'a': expected one value or a list of one type"):
        _ = setting.value
    assert Setting.of("a", ()).value == ()


def test_an_old_request_gets_no_second_vector():
    clinics, kept = Clinics(), {}

    def change(name, request):
        if name == "birch" and stage_of(request) == "MaskedInput":
            kept.setdefault("request", request)
        return request

    clinics.change = change
    clinics.sum()
    clinics.sum(evaluate_work())
    ran = len(clinics.ran)
    reply, _ = clinics.sites["birch"].handle(kept["request"], clinics.engine.states["birch"])
    assert decode(reply, Reply).sum == Refusal("protocol")
    assert len(clinics.ran) == ran


def test_a_retry_gets_the_identical_bytes_and_runs_nothing():
    clinics, states = Clinics(), []

    def change(name, request):
        if name == "birch" and stage_of(request) == "MaskedInput":
            first, state = clinics.sites["birch"].handle(request, clinics.engine.states["birch"])
            ran = len(clinics.ran)
            again, same = clinics.site("birch").handle(request, state)  # another process
            assert (again, same) == (first, state)
            assert len(clinics.ran) == ran
            clinics.engine.states["birch"] = state
            states.append(state)
        return request

    clinics.change = change
    is_mean_of(clinics.sum(), SITES)
    assert states


def test_a_site_takes_part_in_no_more_sums_than_agreed():
    clinics = Clinics(TEXT.replace("most_sums = 10", "most_sums = 2"))
    for number in range(2):
        assert clinics.sum(train_work(configs={"config": {"n": number}})) is not None
    assert clinics.memory("birch").keys_state == b""  # no keys were agreed for a third
    assert clinics.sum(train_work(configs={"config": {"n": 2}})) is None
    assert len(clinics.ran) == 8
    assert "the agreement has 2 sums, and all are done" in clinics.log("birch")


def test_keys_that_were_agreed_ahead_serve_no_sum_beyond_the_agreed():
    """A server whose copy says more has keys, and gets no vector under them."""
    clinics = Clinics(TEXT.replace("most_sums = 10", "most_sums = 1"))
    site, seen = clinics.sites["birch"], []

    def change(name, request):
        if name == "birch" and stage_of(request) == "MaskedInput":
            memory = msgspec.structs.replace(clinics.memory("birch"), trained=1)
            clinics.engine.states["birch"] = encode(memory)
            seen.append(request)
        return request

    clinics.change = change
    assert clinics.sum().contributors == ("ash", "cedar", "dogwood")
    assert seen
    assert ("birch", "train") not in clinics.ran
    assert "all are done" in "\n".join(site.log)


def test_two_cohorts_over_one_model_that_differ_by_one_site_are_not_both_confirmed():
    clinics = Clinics()
    assert clinics.sum() is not None
    # Another setting does not make it another model.
    assert clinics.sum(train_work(configs={"config": {"server-round": 2}}), ("ash", "birch", "cedar")) is None
    assert "differ by dogwood only" in clinics.log("ash")


def test_cohorts_over_another_model_or_of_another_function_are_not_compared():
    clinics = Clinics()
    assert clinics.sum() is not None
    assert clinics.sum(evaluate_work(), ("ash", "birch", "cedar")) is not None
    moved = {**ARRAYS, "layer.bias": np.array([0.25, 0.25])}
    assert clinics.sum(train_work(moved), ("ash", "birch", "cedar")) is not None


def test_a_cohort_below_the_policys_is_not_confirmed():
    """A threshold of 4 is what the policy asks for; a server that shows three is refused by the policy's own count."""
    policy = {"birch": Policy(smallest_cohort=4)}
    with pytest.raises(StudyError, match="birch asks for sums over at least 4 sites, and the agreement's"):
        Clinics(policies=policy)
    text = TEXT + "\n[protocol]\nthreshold = 4\n"
    clinics = Clinics(text, policies=policy)
    losing(clinics, "dogwood", "MaskedInput")
    assert clinics.sum() is None


def test_a_sum_that_is_kept_open_too_long_is_not_answered():
    clinics = Clinics(policies={"birch": Policy(longest_session=60)})

    def change(name, request):
        if stage_of(request) == "MaskedInput" and name == "ash":
            clinics.now += 61
        return request

    clinics.change = change
    clinics.sum()
    assert clinics.record.dropped["birch"] == "refused (policy) at MaskedInput"


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (Policy(schemes=("ckks",)), "the policy of birch allows ckks, the agreement has"),
        (Policy(epsilon=1.0, delta=1e-5), "and the agreement has no differential privacy"),
        (Policy(smallest_others=4), "at least 4 other sites in every sum, and the agreement has 3"),
    ],
)
def test_a_policy_refuses_an_agreement(policy, told):
    with pytest.raises(StudyError, match=told):
        Clinics(policies={"birch": policy})


def test_a_policy_asks_for_a_server_that_is_not_trusted():
    text = TEXT + '\n[protocol]\nmode = "semi-honest"\n'
    with pytest.raises(StudyError, match='asks for "active", the agreement has "semi-honest"'):
        Clinics(text)


def test_a_site_with_a_ledger_takes_part_in_no_app():
    with pytest.raises(StudyError, match="birch keeps a budget ledger, and the agreement has no differential privacy"):
        Clinics().site("birch", ledger=True)


def test_an_agreement_that_differs_at_one_site_leaves_it_out():
    clinics = Clinics(birch=TEXT.replace("train_loss = 10.0", "train_loss = 20.0"))
    average = clinics.sum()
    assert average.contributors == ("ash", "cedar", "dogwood")


def test_an_agreement_that_differs_at_two_sites_loses_the_sum():
    clinics = Clinics(**{name: TEXT.replace("most_sums = 10", "most_sums = 11") for name in ("ash", "birch")})
    assert clinics.sum() is None


def test_a_state_of_another_agreement_is_refused():
    clinics = Clinics()
    clinics.sum()
    other = Clinics(TEXT.replace("most_sums = 10", "most_sums = 11"))
    with pytest.raises(DecodeError, match="the state of birch is of another agreement"):
        other.sites["birch"].handle(b"x", clinics.engine.states["birch"])


def test_an_app_has_no_end_that_is_signed():
    clinics = Clinics()
    reply, _ = clinics.sites["birch"].handle(encode(Request(finish=FinishRequest(b"", bytes(32)))), b"")
    assert decode(reply, Reply).finish == Refusal("protocol")


@pytest.mark.parametrize("make", [lambda c: AppSums(c.agreement, c.roster, first=0), lambda c: c.site("birch")])
def test_a_roster_of_other_sites_is_refused(make):
    clinics = Clinics()
    clinics.agreement = msgspec.structs.replace(clinics.agreement, sites=("ash", "birch", "cedar"))
    with pytest.raises(StudyError, match="sites: the agreement has"):
        make(clinics)
    assert isinstance(clinics.agreement, Agreement)


def test_a_mean_of_another_length_is_refused():
    vectors = AppVectors(Clinics().agreement, train_work())
    assert vectors.dimension == 1 + 6 + 2 + 1
    with pytest.raises(RemoteProtocolError, match=r"expected 9 entries of a mean, got shape \(10,\)"):
        vectors.opened(np.zeros(10))
