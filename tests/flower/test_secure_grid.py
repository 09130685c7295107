"""Flower's own strategies over secure sums, and a server that would rather have single replies."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from protocols.app_work import Setting
from protocols.engines.flower.contents import content_of, work_of
from protocols.engines.flower.engine import Patience
from protocols.engines.flower.secure_mod import SecAggMod
from protocols.errors import LinkError, StudyError
from protocols.messages import Request
from secagg.errors import LocalProtocolError
from secagg.wire import decode
from tests.flower.apps import SITES, START, TEXT, WEIGHTS, Clinic, arrays, user_app
from tests.flower.local_grid import body_of, with_body
from tests.protocols.test_app_sums import other_arrays, tampered, with_sum

STAGES = ("MaskedInput", "ConsistencyCheck", "Unmask")
ROUNDS = 3
# Each of four updates is off by less than one unit before weighting, in three rounds, and float32 by its last bits.
CLOSE = 3 * 4 * 2.0**-16 / sum(WEIGHTS.values()) + 1e-6


@pytest.fixture
def clinic(tmp_path):
    return Clinic(tmp_path)


def numbers(record):
    return {name: array.numpy() for name, array in record.items()}


def close(result, other, atol=CLOSE):
    ours, theirs = numbers(result.arrays), numbers(other.arrays)
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_allclose(ours[name], array, atol=atol, err_msg=name)
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        mine, plain = getattr(result, kind), getattr(other, kind)
        assert mine.keys() == plain.keys()
        for number, metrics in plain.items():
            assert dict(mine[number]) == pytest.approx(dict(metrics), abs=10 * atol)


def messages(content=None, kind="train", nodes=(1, 2, 3, 4)):
    record = content or RecordDict({"arrays": arrays(), "config": ConfigRecord({"server-round": 1})})
    return [Message(record, node, kind) for node in nodes]


def request_of(message):
    body = body_of(message)
    return decode(body, Request) if body else None


def stage_of(message):
    request = request_of(message)
    return request.sum.stage if request is not None and request.sum is not None else None


def at_input(change, *nodes):
    def arriving(node, message):
        if node in nodes and stage_of(message) == "MaskedInput":
            return with_body(message, change(body_of(message)))
        return message

    return arriving


# --- stock strategies


@pytest.mark.parametrize(
    "make",
    [
        FedAvg,
        lambda: FedAdam(eta=0.1, eta_l=0.1, beta_1=0.9, beta_2=0.99, tau=0.05),
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.5),
        lambda: FedProx(proximal_mu=0.1),
        lambda: strategy.FedYogi(eta=0.1, tau=0.05),
        lambda: strategy.FedAdagrad(eta=0.1, tau=0.05),
    ],
    ids=["FedAvg", "FedAdam", "FedAvgM", "FedProx", "FedYogi", "FedAdagrad"],
)
def test_a_stock_strategy_gives_what_it_gives_without_secure_sums(clinic, make):
    given = {"num_rounds": ROUNDS, "train_config": ConfigRecord({"lr": 0.1})}
    result = make().start(clinic.secure(), arrays(), **given)
    plain = make().start(clinic.plain(), arrays(), **given)
    close(result, plain, atol=CLOSE if make is FedAvg else 100 * CLOSE)
    assert len(result.train_metrics_clientapp) == ROUNDS
    assert len(result.evaluate_metrics_clientapp) == ROUNDS


def test_the_sites_get_the_strategys_settings_and_each_is_asked_once_a_round(clinic):
    FedProx(proximal_mu=0.25).start(clinic.secure(), arrays(), num_rounds=2, train_config=ConfigRecord({"lr": 0.5}))
    expected = [
        (name, kind, {**({"lr": 0.5, "proximal-mu": 0.25} if kind == "train" else {}), "server-round": number})
        for number in (1, 2)
        for kind in ("train", "evaluate")
        for name in SITES
    ]
    assert sorted(clinic.seen, key=repr) == sorted(expected, key=repr)


def test_a_steady_batch_takes_three_trips(clinic):
    secure = clinic.secure()
    FedAvg().start(secure, arrays(), num_rounds=2)
    assert [len(record.stages) for record in secure.rounds] == [5, 3, 3, 3]
    assert [record.purpose for record in secure.rounds] == ["train", "evaluate"] * 2
    assert len(secure.transcript) == 4


def test_the_server_sees_no_reply_of_a_site_in_the_clear(clinic):
    replies = []
    clinic.grid.on_reply = lambda node, message, reply: replies.append(reply) or reply
    FedAvg().start(clinic.secure(), arrays(), num_rounds=1)
    assert len(replies) > 30
    for reply in replies:
        assert not reply.content.array_records
        assert not reply.content.metric_records
        assert [*reply.content] == ["secagg"]


def test_a_sample_of_the_sites_is_summed_alone(clinic):
    secure = clinic.secure()
    result = FedAvg(fraction_train=0.75, fraction_evaluate=0.0, min_available_nodes=4).start(
        secure, arrays(), num_rounds=2
    )
    assert len(result.train_metrics_clientapp) == 2
    for record in secure.rounds:
        assert len(record.contributors) == 3
        assert record.weight == sum(WEIGHTS[name] for name in record.contributors)
    trained = [name for name, _, settings in clinic.seen if settings["server-round"] == 1]
    assert sorted(trained) == sorted(secure.rounds[0].contributors)


def test_a_sample_below_the_threshold_fails_and_the_strategy_keeps_its_model(clinic):
    result = FedAvg(fraction_train=0.5, fraction_evaluate=0.0).start(clinic.secure(), arrays(), num_rounds=2)
    assert result.train_metrics_clientapp == {}
    assert clinic.seen == []


def test_a_custom_action_of_the_app_is_the_one_that_runs(tmp_path):
    app, ran = user_app([SecAggMod()]), []

    @app.train("first")
    def first(message, context):
        ran.append(context.node_config["name"])
        metrics = MetricRecord({"train_loss": 1.0, "num-examples": 2})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    clinic = Clinic(tmp_path, app=app)
    (reply,) = clinic.secure().send_and_receive(messages(kind="train.first"))
    assert sorted(ran) == [*SITES]
    assert dict(reply.content["metrics"]) == {"train_loss": pytest.approx(1.0, abs=1e-4), "num-examples": 8}


def test_one_reply_stands_for_all(clinic):
    batch = messages()
    (reply,) = clinic.secure().send_and_receive(batch)
    assert [*reply.content] == ["metrics", "arrays"]
    assert reply.metadata.message_type == "train"
    assert reply.metadata.src_node_id == batch[0].metadata.dst_node_id
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS.values())


@pytest.mark.parametrize("make", [FedAvg, lambda: FedAdam(eta=0.1, eta_l=0.1, tau=0.05)], ids=["FedAvg", "FedAdam"])
def test_a_strategy_that_widens_types_does_not_reach_the_app_with_them(tmp_path, make):
    """FedAvg makes floats of integers, FedAdam float64 of float32; PyTorch gives back the model's own types."""
    app, seen = ClientApp(mods=[SecAggMod()]), []

    @app.train()
    def train(message, context):
        came = {name: array.numpy() for name, array in message.content["arrays"].items()}
        seen.append({name: array.dtype.name for name, array in came.items()})
        gone = {"weight": (came["weight"] + 0.5).astype(np.float32), "num_batches_tracked": np.array(5, np.int64)}
        metrics = MetricRecord({"train_loss": 1.0, "num-examples": 2})
        return Message(RecordDict({"arrays": arrays(gone), "metrics": metrics}), reply_to=message)

    clinic = Clinic(tmp_path, "max_integer_update = 1000\n" + TEXT, app=app)
    start = arrays({"weight": np.zeros(2, np.float32), "num_batches_tracked": np.array(2, np.int64)})
    given = make()
    given.fraction_evaluate = 0.0
    result = given.start(clinic.secure(), start, num_rounds=3)
    assert len(result.train_metrics_clientapp) == 3
    assert len(seen) == 12
    assert {tuple(types.items()) for types in seen} == {(("weight", "float32"), ("num_batches_tracked", "int64"))}


def test_no_messages_are_no_sum(clinic):
    assert clinic.secure().send_and_receive([]) == []
    assert clinic.grid.sent == []


# --- what cannot be right is refused


@pytest.mark.parametrize(
    "make",
    [
        strategy.FedMedian,
        strategy.FedTrimmedAvg,
        strategy.Krum,
        strategy.MultiKrum,
        strategy.Bulyan,
        strategy.QFedAvg,
        lambda: strategy.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 4),
        lambda: strategy.DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 4),
        lambda: strategy.DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, 4),
        lambda: strategy.DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.1, 4),
        strategy.FedXgbBagging,
        strategy.FedXgbCyclic,
    ],
)
def test_a_strategy_that_needs_single_replies_is_refused(clinic, make):
    given = make(client_learning_rate=0.1) if make is strategy.QFedAvg else make()
    trees = ArrayRecord({"0": Array(np.zeros(4, np.uint8))})
    with pytest.raises(LocalProtocolError, match="works on single replies, and a secure sum has none"):
        given.start(clinic.secure(), trees, num_rounds=1)
    assert clinic.seen == []


def test_a_strategy_of_ones_own_is_told_what_it_gets(clinic, caplog):
    class Mine(FedAvg):
        pass

    with caplog.at_level(logging.WARNING, "flwr"):
        logging.getLogger("flwr").addHandler(caplog.handler)
        try:
            Mine(fraction_evaluate=0.0).start(clinic.secure(), arrays(), num_rounds=2)
        finally:
            logging.getLogger("flwr").removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if "Mine is not one of Flower's" in record.getMessage()]
    assert len({id(record) for record in caplog.records if "Mine" in record.getMessage()}) == len(set(told)) == 1


def test_a_batch_that_is_not_the_same_for_all_is_refused(clinic):
    other = RecordDict({"arrays": arrays(), "config": ConfigRecord({"server-round": 2})})
    with pytest.raises(LocalProtocolError, match="the messages of a batch differ"):
        clinic.secure().send_and_receive([*messages(nodes=(1, 2, 3)), *messages(other, nodes=(4,))])
    shared = messages()[0].content
    with pytest.raises(LocalProtocolError, match="of different types"):
        clinic.secure().send_and_receive([*messages(shared, nodes=(1, 2)), *messages(shared, "evaluate", (3, 4))])
    assert clinic.seen == []


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"config": ConfigRecord({})}),
        RecordDict({"arrays": arrays(), "more": arrays()}),
        RecordDict({"arrays": arrays(), "metrics": MetricRecord({"a": 1})}),
    ],
)
def test_content_that_cannot_be_summed_is_refused(clinic, content):
    with pytest.raises(LocalProtocolError, match="expected one ArrayRecord and ConfigRecords"):
        clinic.secure().send_and_receive(messages(content))


def test_arrays_of_another_serialisation_are_refused(clinic):
    content = RecordDict({"arrays": ArrayRecord({"a": Array("float32", (1,), "pickle", b"")})})
    with pytest.raises(LocalProtocolError, match="expected NumPy's serialisation, got 'pickle'"):
        clinic.secure().send_and_receive(messages(content))


def test_settings_that_flower_does_not_take_are_refused_by_the_site(clinic, capfd):
    configs = (("config", (Setting("a", (1, "x"), (), True),)),)
    clinic.grid.on_message = at_input(lambda body: tampered(body, configs=configs), 2)
    secure = clinic.secure()
    secure.send_and_receive(messages())
    assert secure.rounds[-1].dropped["birch"] == "refused (data) at MaskedInput"
    assert "settings that Flower does not take" in capfd.readouterr().err


def test_a_message_is_the_same_after_it_was_carried():
    settings = ConfigRecord({"a": 1, "b": 1.0, "c": "x", "d": b"y", "e": True, "f": [1, 2], "g": [b"a"], "h": [True]})
    content = RecordDict({"w": arrays(), "one": settings, "two": ConfigRecord({})})
    again = content_of(work_of(Message(content, 1, "evaluate.x")))
    assert [*again] == [*content]
    assert dict(again["one"]) == dict(settings)
    assert [type(value) for value in again["one"].values()] == [type(value) for value in settings.values()]
    for name, array in content["w"].items():
        assert again["w"][name].data == array.data


def test_single_messages_go_neither_way(clinic):
    secure = clinic.secure()
    with pytest.raises(LocalProtocolError, match="no single replies"):
        secure.push_messages(messages())
    with pytest.raises(LocalProtocolError, match="no single replies"):
        secure.pull_messages(["a"])


# --- a server that asks for more


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_plain_message_gets_an_error_and_the_app_is_not_run(clinic, kind):
    for reply in clinic.grid.send_and_receive(messages(kind=kind)):
        assert reply.has_error()
        assert reply.error.reason == "this site answers secure sums only: run the strategy over SecAggGrid"
    assert clinic.seen == []


def test_a_record_of_ours_beside_the_arrays_does_not_get_them(clinic):
    content = RecordDict({"arrays": arrays(), "config": ConfigRecord({}), "secagg": ConfigRecord({})})
    for reply in clinic.grid.send_and_receive(messages(content)):
        assert reply.has_error()
    content = RecordDict({"arrays": arrays(), "config": ConfigRecord({}), "secagg": ConfigRecord({"body": b"\1\2"})})
    for reply in clinic.grid.send_and_receive(messages(content)):
        assert [*reply.content] == ["secagg"]
    assert clinic.seen == []


def test_a_plain_strategy_on_the_grid_inside_learns_nothing(clinic):
    result = FedAvg().start(clinic.grid, arrays(), num_rounds=1)
    assert result.train_metrics_clientapp == result.evaluate_metrics_clientapp == {}
    assert clinic.seen == []


def test_two_sites_that_are_sent_other_arrays_open_nothing(clinic):
    clinic.grid.on_message = at_input(other_arrays, 1, 2)
    secure = clinic.secure()
    replies = secure.send_and_receive(messages())
    assert len(replies) == 4
    assert all(reply.has_error() for reply in replies)
    assert secure.rounds[-1].outcome == "failed"


def test_work_for_one_function_does_not_run_the_other(clinic):
    """The digest fits and the sum is for evaluation, but it came in a message that runs training."""
    change = lambda body: with_sum(tampered(body, message_type="evaluate"), purpose="evaluate")  # noqa: E731
    clinic.grid.on_message = at_input(change, 2)
    (reply,) = clinic.secure().send_and_receive(messages())
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS.values()) - WEIGHTS["birch"]
    assert [name for name, kind, _ in clinic.seen if name == "birch"] == []


def test_a_request_that_is_replayed_gets_no_second_vector(clinic):
    kept = []

    def keep(node, message):
        if node == 2 and stage_of(message) == "MaskedInput":
            kept.append(body_of(message))
        return message

    clinic.grid.on_message = keep
    secure = clinic.secure()
    FedAvg().start(secure, arrays(), num_rounds=1)
    ran, trained = len(clinic.seen), clinic.memory("birch").trained
    old = with_body(messages(nodes=(2,))[0], kept[0])
    (reply,) = clinic.grid.send_and_receive([old])
    assert b"protocol" in body_of(reply)
    assert len(body_of(reply)) < 100
    assert (len(clinic.seen), clinic.memory("birch").trained) == (ran, trained)


def test_a_state_that_was_put_back_gives_no_answer(clinic, capfd):
    state = clinic.folder / "birch" / "site.state"
    kept = []

    def keep(node, message):
        if node == 2 and stage_of(message) == "MaskedInput" and not kept:
            kept.append(state.read_bytes())
        return message

    clinic.grid.on_message = keep
    secure = clinic.secure(patience=Patience(gather=5.0, stage=2.0, resend=5.0, absent=0.3, poll=0.01))
    secure.send_and_receive(messages())
    state.write_bytes(kept[0])
    (reply,) = secure.send_and_receive(messages(kind="evaluate"))
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS[n] // 2 for n in SITES if n != "birch")
    assert "an older copy was put back" in capfd.readouterr().err
    assert [name for name, kind, _ in clinic.seen if kind == "evaluate"].count("birch") == 0


def test_a_reply_that_is_lost_is_given_again_and_nothing_is_run_again(clinic):
    lost = []

    def lose(node, message, reply):
        if node == 2 and stage_of(message) in STAGES and stage_of(message) not in lost:
            lost.append(stage_of(message))
            return None
        return reply

    clinic.grid.on_reply = lose
    patience = Patience(gather=5.0, stage=10.0, resend=1.0, absent=0.3, poll=0.01)
    (reply,) = clinic.secure(patience=patience).send_and_receive(messages())
    assert lost == [*STAGES]
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS.values())
    assert [name for name, _, _ in clinic.seen].count("birch") == 1


# --- drop-outs and sites that differ


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_goes_at_a_stage_leaves_the_average_of_the_others(clinic, stage):
    def go(node, message):
        if node == 2 and stage_of(message) == stage:
            clinic.grid.offline.add(2)
        return message

    clinic.grid.on_message = go
    (reply,) = clinic.secure().send_and_receive(messages())
    left = SITES if stage != "MaskedInput" else ("ash", "cedar", "dogwood")
    plain = clinic.plain().send_and_receive(messages(nodes=[clinic.node[name] for name in left]))
    total = sum(WEIGHTS[name] for name in left)
    assert reply.content["metrics"]["num-examples"] == total
    for name in START:
        mean = sum(r.content["arrays"][name].numpy() * r.content["metrics"]["num-examples"] for r in plain) / total
        np.testing.assert_allclose(reply.content["arrays"][name].numpy(), mean, atol=CLOSE)


def test_below_the_threshold_the_strategy_goes_on_with_the_model_it_has(clinic):
    gone = []

    def go(node, message):
        request = request_of(message)
        if request is not None and request.sum is not None and len(gone) < 2 and node in (1, 2) and not message_late():
            gone.append(node)
            return None
        return None if node in gone and not message_late() else message

    def message_late():
        return any(record.outcome == "failed" for record in secure.rounds)

    clinic.grid.on_message = go
    secure = clinic.secure(patience=Patience(gather=5.0, stage=1.5, resend=5.0, absent=0.3, poll=0.01))
    result = FedAvg(fraction_evaluate=0.0).start(secure, arrays(), num_rounds=2)
    assert [record.outcome for record in secure.rounds] == ["failed", "opened"]
    assert [*result.train_metrics_clientapp] == [2]
    assert result.arrays is not None


def test_the_app_that_raises_leaves_its_site_out_and_its_text_at_home(tmp_path, capfd):
    app = ClientApp(mods=[SecAggMod()])
    good = user_app()

    @app.train()
    def train(message, context):
        if context.node_config["name"] == "birch":
            raise RuntimeError("patient 17 has no age")
        return good(message, context)

    clinic = Clinic(tmp_path, app=app)
    replies = []
    clinic.grid.on_reply = lambda node, message, reply: replies.append(reply) or reply
    (reply,) = clinic.secure().send_and_receive(messages())
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS.values()) - WEIGHTS["birch"]
    assert "raised RuntimeError: patient 17 has no age" in capfd.readouterr().err
    assert "patient" not in repr(replies)


def test_an_error_that_the_app_gives_stays_at_home(tmp_path, capfd):
    app, good = ClientApp(mods=[SecAggMod()]), user_app()

    @app.train()
    def train(message, context):
        if context.node_config["name"] == "birch":
            return Message(Error(1, "patient 17 has no age"), reply_to=message)
        return good(message, context)

    clinic = Clinic(tmp_path, app=app)
    secure, replies = clinic.secure(), []
    clinic.grid.on_reply = lambda node, message, reply: replies.append(reply) or reply
    secure.send_and_receive(messages())
    assert secure.rounds[-1].dropped["birch"] == "refused (data) at MaskedInput"
    assert "the app's function for train gave an error: patient 17" in capfd.readouterr().err
    assert "patient" not in repr(replies)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda m: RecordDict({"arrays": m["arrays"]}), "got 1 ArrayRecord, 0 MetricRecord, 0 ConfigRecord"),
        (lambda m: RecordDict({"metrics": MetricRecord({"num-examples": 1})}), "got 0 ArrayRecord, 1 MetricRecord"),
        (
            lambda m: RecordDict(
                {"arrays": m["arrays"], "metrics": MetricRecord({"num-examples": 1}), "more": ConfigRecord({"a": b"x"})}
            ),
            "got 1 ArrayRecord, 1 MetricRecord, 1 ConfigRecord",
        ),
        (
            lambda m: RecordDict({"arrays": m["arrays"], "metrics": MetricRecord({"num-examples": 1})}),
            "the metrics of train are 'num-examples': the agreement has 'num-examples', 'train_loss'",
        ),
        (
            lambda m: RecordDict(
                {"arrays": m["arrays"], "metrics": MetricRecord({"num-examples": 1, "train_loss": 11.0})}
            ),
            "metric 'train_loss': 11.0 is beyond 10",
        ),
        (
            lambda m: RecordDict(
                {"a": arrays({"b": np.zeros(1)}), "metrics": MetricRecord({"num-examples": 1, "train_loss": 1.0})}
            ),
            "the arrays came back without 'layer.weight'",
        ),
        (
            lambda m: RecordDict(
                {
                    "arrays": arrays({**START, "layer.bias": np.zeros((2, 1), np.float32)}),
                    "metrics": MetricRecord({"num-examples": 1, "train_loss": 1.0}),
                }
            ),
            "array 'layer.bias': expected float32 of shape (2,) as it was sent, got float32 of shape (2, 1)",
        ),
    ],
)
def test_what_the_agreement_does_not_have_does_not_leave_the_site(tmp_path, capfd, content, told):
    app, good = ClientApp(mods=[SecAggMod()]), user_app()

    @app.train()
    def train(message, context):
        if context.node_config["name"] == "birch":
            return Message(content(message.content), reply_to=message)
        return good(message, context)

    clinic = Clinic(tmp_path, app=app)
    secure = clinic.secure()
    (reply,) = secure.send_and_receive(messages())
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS.values()) - WEIGHTS["birch"]
    assert secure.rounds[-1].dropped["birch"] == "refused (data) at MaskedInput"
    assert told in capfd.readouterr().err


def test_a_site_with_another_agreement_is_named_and_nothing_is_asked(clinic):
    (clinic.folder / "birch" / "agreement.toml").write_text(TEXT.replace("most_sums = 20", "most_sums = 30"))
    with pytest.raises(StudyError, match=r"birch has another agreement\.toml .*give both the same file"):
        FedAvg().start(clinic.secure(), arrays(), num_rounds=1)
    assert clinic.seen == []


def test_an_agreement_that_is_changed_later_gives_no_answer(clinic, capfd):
    secure = clinic.secure(patience=Patience(gather=5.0, stage=2.0, resend=5.0, absent=0.3, poll=0.01))
    secure.send_and_receive(messages())
    (clinic.folder / "birch" / "agreement.toml").write_text(TEXT.replace("most_sums = 20", "most_sums = 30"))
    (reply,) = secure.send_and_receive(messages(kind="evaluate"))
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS[n] // 2 for n in SITES if n != "birch")
    assert "the state of birch is of another agreement" in capfd.readouterr().err


def test_a_sites_policy_is_its_own(tmp_path, capfd):
    clinic = Clinic(tmp_path, policy="[policy]\nepsilon = 1.0\ndelta = 1e-5\n")
    with pytest.raises(LinkError, match=r"0 of 4 sites came .* SecAggMod in the app"):
        FedAvg().start(
            clinic.secure(patience=Patience(gather=1.0, stage=1.0, resend=1.0, absent=0.3, poll=0.05)),
            arrays(),
            num_rounds=1,
        )
    assert "and the agreement has no differential privacy" in capfd.readouterr().err


def test_a_node_without_files_says_what_to_give_it(tmp_path, capfd):
    clinic = Clinic(tmp_path)
    del clinic.grid.configurations[2]["site-config"]
    (reply,) = clinic.secure(
        patience=Patience(gather=1.0, stage=5.0, resend=1.0, absent=0.3, poll=0.05)
    ).send_and_receive(messages())
    assert reply.content["metrics"]["num-examples"] == sum(WEIGHTS.values()) - WEIGHTS["birch"]
    assert "node-config: expected site-config='PATH' of this site's site.toml, got none" in capfd.readouterr().err


def test_another_run_over_the_same_sites_goes_on_where_the_first_one_ended(clinic):
    first = FedAvg(fraction_evaluate=0.0).start(clinic.secure(), arrays(), num_rounds=1)
    FedAvg(fraction_evaluate=0.0).start(clinic.secure(), first.arrays, num_rounds=1)
    assert clinic.memory("birch").trained == 2


def test_a_timeout_of_the_strategy_ends_the_sum(clinic):
    clinic.grid.on_message = lambda node, message: None if stage_of(message) == "MaskedInput" else message
    replies = clinic.secure().send_and_receive(messages(), timeout=1.0)
    assert all(reply.has_error() for reply in replies)
    assert "no answer at MaskedInput" in replies[0].error.reason
