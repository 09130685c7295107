"""Noise that is added inside the secure sum, and the budget ledger that a site writes before each round."""

import msgspec
import numpy as np
import pytest

import protocols.fedavg
from dp import DiscreteGaussianSum, Relation, Unit, spent
from dp.ledger import Cap
from dp.ledger_check import examine
from dp.ledger_store import read_rows
from protocols.engines.faulty import Fault
from protocols.errors import StudyError
from protocols.ledger_file import create_ledger, open_ledger, verifier
from protocols.memory import remember
from protocols.messages import Reply
from protocols.policy import PERMISSIVE
from protocols.sessions import Sums
from protocols.site import Site
from secagg.prg import deterministic_entropy
from secagg.wire import decode
from tests.protocols.hospitals import SITES, World, fedsgd, parameters, pooled_gradient, study

ROWS = 50
NOISY = {
    "mechanism": "distributed-sgd",
    "delta": 1e-3,
    "noise_multiplier": 1.0,
    "sampling_rate": 0.5,
    "records": ROWS,
    "grid": 1 << 16,
}


def noisy(**changes):
    privacy = {**NOISY, **changes.pop("privacy", {})}
    return fedsgd(privacy=privacy, **changes)


def charged(world, name):
    return remember(world.states[name]).charged


def test_the_step_is_that_of_all_records_together_where_the_noise_is_negligible():
    """Rate 1, no clipping, next to no noise: the mean over all rows, as if they were in one place."""
    world = World(noisy(privacy={"sampling_rate": 1.0, "noise_multiplier": 1e-3, "l2_clip_norm": 50.0}))
    rows = sum(data.train_rows for data in world.data.values())
    assert rows == ROWS
    expected = parameters(world.model) - 0.5 * pooled_gradient(
        world.model, [site.data for site in world.sites.values()]
    )
    world.run()
    assert world.rounds[0].outcome == "opened"
    assert parameters(world.model) == pytest.approx(expected, abs=5e-3)


def test_the_opened_sum_holds_the_noise_of_all_shares_and_no_more(monkeypatch):
    """No record is drawn, so that the sums are noise alone: of the four survivors, where three are promised."""
    rare = 1e-9
    made = noisy(rounds=50, privacy={"sampling_rate": rare})
    world = World(made)
    steps = []
    monkeypatch.setattr(type(world.coordinator._optimizer), "step", lambda self, mean: steps.append(mean))
    world.run()
    noise = np.array(steps) * rare * ROWS  # in units of the clip norm
    assert noise.shape == (50, 4)
    share = protocols.fedavg.distributed_plan(made, 4).share_sigma / NOISY["grid"]
    assert share * np.sqrt(3) == pytest.approx(1.0, rel=1e-2)  # the promise: noise_multiplier
    assert np.std(noise) == pytest.approx(share * np.sqrt(4), rel=0.25)  # 5 standard errors


def test_more_survivors_than_promised_are_more_noise_and_less_is_charged():
    everyone = World(noisy(rounds=2)).run()
    fewer = World(noisy(rounds=2)).run(Fault("dogwood", "MaskedInput", 0))
    for world, survivors in ((everyone, {4}), (fewer, {3})):
        kinds = charged(world, "ash")
        assert all(isinstance(kind, DiscreteGaussianSum) for kind in kinds)
        assert {kind.survivors for kind in kinds} == survivors
        assert sum(kind.steps for kind in kinds) == 2
    cost = [spent(charged(world, "ash"), 1e-3).epsilon for world in (everyone, fewer)]
    assert cost[0] < cost[1]


def test_a_site_that_never_sees_who_survived_is_charged_the_promise():
    """It gave its vector: what was opened under it, it cannot know."""
    world = World(noisy()).run(Fault("ash", "ConsistencyCheck"))
    assert remember(world.states["ash"]).pending is not None
    assert [kind.survivors for kind in charged(world, "ash")] == [3]
    assert [kind.survivors for kind in charged(world, "birch")] == [4]


def test_the_shares_are_for_the_threshold_less_the_colluders():
    plans = {c: protocols.fedavg.distributed_plan(noisy(privacy={"colluders": c}), 4) for c in (0, 1, 2)}
    shares = {c: plan.share_sigma for c, plan in plans.items()}
    assert shares[1] / shares[0] == pytest.approx(np.sqrt(3 / 2), rel=1e-3)
    assert shares[2] / shares[0] == pytest.approx(np.sqrt(3), rel=1e-3)


def test_an_epsilon_is_kept_with_as_few_survivors_as_may_be():
    world = World(noisy(rounds=3, privacy={"noise_multiplier": None, "epsilon": 2.0}))
    world.run(*(Fault("dogwood", "MaskedInput", number) for number in range(3)))
    assert [record.outcome for record in world.rounds[:3]] == ["opened"] * 3
    cost = world.sites["ash"].spent(world.states["ash"])
    assert 1.9 < cost.epsilon <= 2.0
    assert cost.unit is Unit.RECORD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {"aggregation": "plain"}}, "protocol.aggregation"),
        ({"privacy": {"records": None}}, "privacy.records"),
        ({"privacy": {"records": 0}}, "privacy.records"),
        ({"privacy": {"grid": 1}}, "privacy.grid"),
        ({"privacy": {"colluders": 3}}, "privacy.colluders"),
        ({"privacy": {"colluders": -1}}, "privacy.colluders"),
    ],
)
def test_a_study_that_cannot_be_is_refused_with_its_path(changes, message):
    with pytest.raises(StudyError, match=f"^{message}: "):
        noisy(**changes)


@pytest.mark.parametrize(("key", "value"), [("records", 51), ("grid", 1 << 17), ("colluders", 1)])
def test_the_sites_must_agree_on_how_the_noise_is_shared(key, value):
    assert noisy(privacy={key: value}).digest != noisy().digest


def test_distributed_noise_takes_one_gradient_a_round():
    with pytest.raises(StudyError, match=r"^training\.algorithm: "):
        study(privacy=NOISY, task={"standardize": "none"})


@pytest.mark.parametrize(("key", "value"), [("records", 5), ("grid", 64), ("colluders", 1)])
def test_its_keys_are_refused_where_the_noise_is_local(key, value):
    local = {"mechanism": "local-sgd", "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.5, key: value}
    with pytest.raises(StudyError, match=rf"^privacy\.{key}: "):
        fedsgd(privacy=local)


def test_a_grid_too_coarse_for_the_model_is_refused_before_anything_is_sent():
    world = World(noisy())
    with pytest.raises(StudyError, match=r"^privacy"):
        Sums(noisy(privacy={"grid": 2}), world.roster, 3, 100)


def test_a_ring_that_the_study_names_is_used_and_refused_where_the_noise_does_not_fit():
    world = World(noisy())
    needed = Sums(noisy(), world.roster, 3, 4).noisy_ring.bits
    wider = Sums(noisy(protocol={"ring_bits": needed + 5}), world.roster, 3, 4)
    assert wider.noisy_ring.bits == wider.subject("train", bytes(32), bytes(32)).ring_bits == needed + 5
    for bits in (needed - 1, -3):
        with pytest.raises(StudyError, match=rf"^protocol\.ring_bits: a ring of {bits} bits is too small"):
            Sums(noisy(protocol={"ring_bits": bits}), world.roster, 3, 4)
    with pytest.raises(StudyError, match=r"^protocol\.ring_bits: "):
        Sums(noisy(protocol={"ring_bits": 65}), world.roster, 3, 4)


# --- participants


PARTICIPANTS = {"mechanism": "distributed-participant", "epsilon": 50.0, "delta": 1e-3, "l2_clip_norm": 5.0}


def participants(**changes):
    privacy = {**PARTICIPANTS, **changes.pop("privacy", {})}
    training = {"weighting": "uniform", **changes.pop("training", {})}
    return study(privacy=privacy, training=training, task={"standardize": "none"}, **changes)


def test_the_model_moves_by_the_mean_of_the_participants_updates_but_for_noise_and_rounding():
    """At an epsilon that hides nothing, next to the same study without noise."""
    noisy_one = World(participants(privacy={"epsilon": 100.0})).run()
    plain = World(study(training={"weighting": "uniform"}, task={"standardize": "none"})).run()
    assert noisy_one.rounds[0].outcome == "opened"
    assert parameters(noisy_one.model) == pytest.approx(parameters(plain.model), abs=0.4)
    assert parameters(noisy_one.model) != pytest.approx(parameters(plain.model), abs=1e-12)


def test_the_account_is_of_participants_and_of_those_who_survived():
    world = World(participants(rounds=2)).run(Fault("dogwood", "MaskedInput", 0))
    (kind,) = charged(world, "ash")
    assert (kind.unit, kind.survivors, kind.steps) == (Unit.PARTICIPANT, 3, 2)
    cost = world.sites["ash"].spent(world.states["ash"])
    assert cost.unit is Unit.PARTICIPANT
    assert cost.epsilon <= 50.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"sampling_rate": 0.5}}, "privacy.sampling_rate"),
        ({"privacy": {"records": 5}}, "privacy.records"),
        ({"privacy": {"grid": 64}}, "privacy.grid"),
        ({"privacy": {"unit": "record"}}, "privacy.unit"),
        ({"privacy": {"epsilon": None, "noise_multiplier": 1.0}}, "privacy.noise_multiplier"),
        ({"training": {"weighting": "records"}}, "training.weighting"),
        ({"protocol": {"aggregation": "plain"}}, "protocol.aggregation"),
    ],
)
def test_a_study_of_participants_that_cannot_be_is_refused_with_its_path(changes, message):
    with pytest.raises(StudyError, match=f"^{message}: "):
        participants(**changes)


def test_a_ring_too_small_for_the_participants_noise_is_refused():
    with pytest.raises(StudyError, match=r"^privacy: a ring of 3 bits is too small"):
        World(participants(protocol={"ring_bits": 3}))


# --- the ledger


def with_ledgers(tmp_path, a_study, *, cap, seed=b"world", policy=PERMISSIVE):
    """A world whose sites write ledgers, the same sites for all seeds; gives it and the open ledgers."""
    world = World(a_study)
    world.entropy = {name: deterministic_entropy(seed + name.encode()) for name in SITES}
    ledgers = {}
    for name in SITES:
        identity, path = world.identities[name], tmp_path / f"{name}.ledger"
        if not path.exists():
            limit = Cap(epsilon=cap, delta=1e-3, relation=Relation.ADD_OR_REMOVE_ONE, unit=Unit.RECORD, records=20)
            create_ledger(path, site=name, identity=identity, cap=limit, time=0.0)
        ledgers[name] = open_ledger(path, site=name, identity=identity, roster=world.roster)
        site = Site(
            a_study,
            name,
            identity,
            world.roster,
            world.data[name],
            policy=policy,
            ledger=ledgers[name],
            entropy=world.entropy[name],
        )
        world.sites[name] = world.engine.sites[name] = site
    return world, ledgers


@pytest.mark.parametrize("privacy", ["distributed-sgd", "local-sgd"])
def test_what_the_ledger_says_is_what_the_site_remembers(tmp_path, privacy):
    local = {"mechanism": "local-sgd", "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.5}
    made = noisy(rounds=3) if privacy == "distributed-sgd" else fedsgd(rounds=3, privacy=local)
    world, ledgers = with_ledgers(tmp_path, made, cap=50.0)
    world.run(Fault("dogwood", "MaskedInput", 1))
    for name in SITES:
        with ledgers[name] as ledger:
            assert ledger.spent("all").epsilon == pytest.approx(spent(charged(world, name), 1e-3).epsilon)


def test_a_cap_that_another_study_has_used_up_stops_the_round_before_anything_is_computed(tmp_path):
    world, ledgers = with_ledgers(tmp_path, noisy(name="first"), cap=3.0)
    world.run()
    with ledgers["ash"] as ledger:
        before = ledger.spent("all").epsilon
        rows = ledger.head().sequence
    assert before < 3.0
    for ledger in ledgers.values():
        ledger.__exit__(None, None, None)
    tight = {"noise_multiplier": 0.7}
    world, ledgers = with_ledgers(tmp_path, noisy(name="second", privacy=tight), cap=3.0)
    world.run()
    assert world.coordinator.stopped is not None
    assert "budget" in world.coordinator.stopped
    assert set(world.rounds[0].dropped.values()) == {"refused (budget) at MaskedInput"}
    assert all(site.evaluations == [] or site.evaluations[0].round is None for site in world.sites.values())
    with ledgers["ash"] as ledger:
        assert ledger.spent("all").epsilon == before
        assert ledger.head().sequence == rows


def test_a_cap_in_the_sites_policy_holds_for_all_studies_of_the_ledger(tmp_path):
    """The ledger itself would allow both; each by itself keeps to the policy."""
    once = spent([protocols.fedavg.distributed_plan(noisy(), 4).mechanism()], 1e-3).epsilon
    policy = msgspec.structs.replace(PERMISSIVE, epsilon=once, delta=1e-3)
    for name in ("first", "second"):
        world, ledgers = with_ledgers(tmp_path, noisy(name=name), cap=50.0, policy=policy)
        world.run()
        rows = ledgers["ash"].head().sequence
        cost = ledgers["ash"].spent("all").epsilon
        for ledger in ledgers.values():
            ledger.close()
        if name == "first":
            assert world.coordinator.stopped is None
            before = rows, cost
    assert "budget" in world.coordinator.stopped
    assert (rows, cost) == before
    assert cost < once
    assert all(site.evaluations == [] or site.evaluations[0].round is None for site in world.sites.values())


def test_a_site_with_a_ledger_takes_no_part_in_a_study_without_differential_privacy(tmp_path):
    """Exact sums cost more than any cap, also those for the standardisation alone."""
    for made in (study(), study(task={"standardize": "global"})):
        with pytest.raises(StudyError, match=r"^privacy\.mechanism: ash keeps a budget ledger, .* above every cap$"):
            with_ledgers(tmp_path, made, cap=50.0)


def test_a_study_that_is_run_again_costs_again(tmp_path):
    """Its rounds have the same numbers and other noise: what is opened then has not been paid for."""
    costs = []
    for seed in (b"one", b"two"):
        world, ledgers = with_ledgers(tmp_path, noisy(), cap=50.0, seed=seed)
        world.run()
        costs.append(ledgers["ash"].spent("all").epsilon)
        for ledger in ledgers.values():
            ledger.__exit__(None, None, None)
    assert costs[1] > 1.2 * costs[0]


def test_a_site_that_is_asked_again_after_a_crash_is_charged_once(tmp_path):
    world, ledgers = with_ledgers(tmp_path, noisy(), cap=50.0)
    request = world.until("MaskedInput")["ash"]
    before = world.states["ash"]
    first = decode(world.ask("ash", request), Reply)
    spent_once = ledgers["ash"].spent("all").epsilon
    world.states["ash"] = before  # it went down before it kept its state
    again = decode(world.ask("ash", request), Reply)
    assert (again.sum, again.keys) == (first.sum, first.keys)
    assert ledgers["ash"].spent("all").epsilon == spent_once > 0


def test_a_ledger_that_fails_in_the_middle_costs_the_round_and_does_not_stop_the_site(tmp_path):
    world, ledgers = with_ledgers(tmp_path, noisy(), cap=50.0)
    world.until("MaskedInput")
    ledgers["ash"]._database.execute("PRAGMA query_only = 1")
    world.run()
    assert world.rounds[0].dropped["ash"] == "refused (data) at MaskedInput"
    assert world.rounds[0].outcome == "opened"


def test_a_round_that_was_reserved_and_never_confirmed_stays_at_its_worst(tmp_path):
    world, ledgers = with_ledgers(tmp_path, noisy(), cap=50.0)
    world.run(Fault("ash", "ConsistencyCheck"))
    promise = world.sites["ash"]._plan.mechanism()
    with ledgers["ash"] as ledger:
        assert ledger.spent("all").epsilon == pytest.approx(spent([promise], 1e-3).epsilon)


# --- what the sites keep of each other's ledgers


@pytest.mark.parametrize("aggregation", ["masked", "ckks"])
def test_every_site_keeps_the_ends_of_the_others_ledgers(tmp_path, aggregation):
    world, ledgers = with_ledgers(tmp_path, noisy(rounds=2, protocol={"aggregation": aggregation}), cap=50.0)
    world.run()
    for name in SITES:
        with ledgers[name] as ledger:
            kept = ledger._account.receipts
            assert {site for site, _ in kept} == set(SITES) - {name}
            assert {receipt.sequence > 3 for receipt in kept.values()} == {True}


def test_a_ledger_put_back_shows_against_what_another_site_kept(tmp_path):
    world, ledgers = with_ledgers(tmp_path, noisy(rounds=2), cap=50.0)
    old = tmp_path / "old"
    old.mkdir()
    for file in tmp_path.glob("ash.ledger*"):
        (old / file.name).write_bytes(file.read_bytes())
    world.run()
    for ledger in ledgers.values():
        ledger.__exit__(None, None, None)
    for file in tmp_path.glob("ash.ledger*"):
        file.unlink()
    for file in old.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own, others = [read_rows(tmp_path / f"{name}.ledger") for name in ("ash", "birch")]
    findings = examine(own, verify=verifier(world.roster), others={"birch.ledger": others}).findings
    assert any("birch" in str(finding) for finding in findings)


def test_a_site_does_not_go_on_with_a_ledger_that_is_older_than_its_state(tmp_path):
    world, ledgers = with_ledgers(tmp_path, noisy(rounds=3), cap=50.0)
    before = {file: file.read_bytes() for file in tmp_path.glob("ash.ledger*")}
    world.until("MaskedInput", 1)
    ledgers["ash"].__exit__(None, None, None)
    for file in tmp_path.glob("ash.ledger*"):
        file.unlink()
    for file, content in before.items():
        file.write_bytes(content)
    site = world.sites["ash"]
    site._ledger = open_ledger(
        tmp_path / "ash.ledger", site="ash", identity=world.identities["ash"], roster=world.roster
    )
    world.run()
    assert world.rounds[1].dropped["ash"].startswith("refused")
    assert "ledger" in site.log[0]
    assert [record.outcome for record in world.rounds[:3]] == ["opened"] * 3


@pytest.mark.parametrize("spoilt", [b"{", b"", b"null", b'{"site":"ash"}', b"\xff" * 1024])
def test_receipts_that_are_none_cost_nobody_the_round(tmp_path, spoilt):
    world, _ = with_ledgers(tmp_path, noisy(), cap=50.0)
    world.until("Unmask")
    world.coordinator._open.messages["birch"] = msgspec.structs.replace(
        world.coordinator._open.messages["birch"],
        sum=msgspec.structs.replace(world.coordinator._open.messages["birch"].sum, receipts=(spoilt,)),
    )
    world.run()
    assert world.rounds[0].outcome == "opened"
    assert world.rounds[0].dropped == {}
    assert "a receipt of another site's ledger" in world.sites["birch"].log[0]
