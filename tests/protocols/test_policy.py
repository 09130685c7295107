"""A site's own conditions, and the server that tries to get around them."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch

from dp import Relation, spent
from protocols.engines.faulty import Fault
from protocols.errors import StudyError
from protocols.fedavg import build_model, gradient_update
from protocols.memory import remember
from protocols.policy import PERMISSIVE, Policy
from secagg.errors import RemoteProtocolError
from secagg.masking.params import SUITE
from secagg.wire import encode
from tests.protocols.hospitals import SITES, World, fedsgd, study


@pytest.mark.parametrize(
    ("changes", "policy", "says"),
    [
        ({"aggregation": "plain"}, Policy(), r'^protocol\.aggregation: the policy of ash allows masked, .*"plain"$'),
        ({"mode": "semi-honest"}, Policy(), r'^protocol\.mode: the policy of ash asks for "active", .*"semi-honest"$'),
        ({"threshold": 3}, Policy(smallest_cohort=4), r"^protocol\.threshold: .* at least 4 sites, .* threshold is 3$"),
        ({}, Policy(smallest_others=4), r"^sites: the policy of ash asks for at least 4 other sites .* study has 3$"),
    ],
)
def test_a_study_below_the_sites_conditions_is_refused(changes, policy, says):
    world = World(study(protocol=changes))
    with pytest.raises(StudyError, match=says):
        world.site("ash", policy=policy)


def test_the_default_policy_is_strict_and_takes_the_default_study():
    world = World(study())
    world.site("ash", policy=Policy())
    world.site("ash", policy=None)
    assert Policy() == Policy(
        smallest_cohort=3,
        smallest_others=2,
        schemes=("masked", "ckks"),
        suites=(SUITE,),
        semi_honest=False,
        smallest_difference=2,
        longest_session=86_400,
        epsilon=None,
        delta=None,
        relation=Relation.ADD_OR_REMOVE_ONE,
    )


@pytest.mark.parametrize("changes", [{"aggregation": "plain"}, {"mode": "semi-honest"}])
def test_research_on_one_machine_may_do_without(changes):
    World(study(protocol=changes)).site("ash", policy=PERMISSIVE)


def test_a_suite_that_the_site_does_not_allow_is_refused():
    with pytest.raises(StudyError, match=f"^protocol: the policy of ash allows {SUITE}, the study has ROT13$"):
        Policy().check_study("ash", study(), "ROT13")
    Policy().check_study("ash", study(), SUITE)
    PERMISSIVE.check_study("ash", study(protocol={"aggregation": "plain"}), "none")


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ({"smallest_cohort": 0}, "smallest_cohort: expected 1 to 65536 sites, got 0"),
        ({"smallest_cohort": 65537}, "smallest_cohort: expected 1 to 65536 sites, got 65537"),
        ({"smallest_others": -1}, "smallest_others: expected 0 to 65536 sites, got -1"),
        ({"smallest_difference": -1}, "smallest_difference: expected 0 to 65536 sites, got -1"),
        ({"schemes": ()}, r"schemes: expected a list of masked or ckks.*, got \[\]"),
        ({"schemes": ("masked", "masked")}, r"schemes: expected .* each at most once"),
        ({"schemes": ("open",)}, r"schemes: expected .*, got \['open'\]"),
        ({"suites": ()}, r"suites: expected a list of X25519-.*, got \[\]"),
        ({"suites": (SUITE, SUITE)}, "suites: expected .* each at most once"),
        ({"suites": ("ROT13",)}, r"suites: expected .*, got \['ROT13'\]"),
        *[
            ({"longest_session": seconds}, "longest_session: expected 1 second to 30 days, in seconds, got")
            for seconds in (0, 0.5, -1, 30 * 86_400 + 1, math.inf, math.nan)
        ],
        ({"epsilon": 1.0}, r"epsilon: expected an epsilon and a delta, or neither, got \[1\.0, None\]"),
        ({"delta": 1e-5}, r"epsilon: expected an epsilon and a delta, or neither, got \[None, 1e-05\]"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused_by_its_name(condition, says):
    with pytest.raises(StudyError, match=rf"^policy\.{says}"):
        Policy(**condition)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"epsilon": 0.0}, "epsilon should be a positive finite number, is 0.0"),
        ({"epsilon": math.inf}, "epsilon should be a positive finite number, is inf"),
        ({"delta": 0.0}, "delta should be a positive finite number, is 0.0"),
        ({"delta": 1.0}, "delta should be less than 1, is 1.0"),
    ],
)
def test_a_cap_that_makes_no_sense_is_refused(bad, says):
    with pytest.raises(StudyError, match=f"^policy: {says}$"):
        Policy(**{"epsilon": 8.0, "delta": 1e-5, **bad})


def test_the_limits_of_the_conditions_are_conditions():
    Policy(smallest_cohort=65536, smallest_others=0, smallest_difference=0, longest_session=1)
    Policy(smallest_cohort=1, smallest_others=65536, smallest_difference=65536, longest_session=30 * 86_400)


def cohort(policy, shown, me, earlier=()):
    policy.check_cohort(map(frozenset, earlier), frozenset(shown), SITES.__getitem__, me)


@pytest.mark.parametrize(
    ("policy", "shown", "me", "taken"),
    [
        (Policy(), {0, 1, 2}, 0, True),
        (Policy(), {0, 1}, 0, False),
        (Policy(), set(), 0, False),
        (Policy(smallest_others=0), {0, 1}, 0, False),
        (Policy(smallest_others=0, smallest_cohort=2), {0, 1}, 0, True),
        (Policy(smallest_others=3), {0, 1, 2}, 0, False),
        (Policy(smallest_others=3), {0, 1, 2, 3}, 0, True),
        (Policy(smallest_others=3), {1, 2, 3}, 0, True),
        (PERMISSIVE, {0}, 0, True),
    ],
)
def test_a_sum_over_too_few_is_refused_and_they_are_named(policy, shown, me, taken):
    if taken:
        cohort(policy, shown, me)
        return
    with pytest.raises(RemoteProtocolError, match=f"a sum over {len(shown)} sites") as caught:
        cohort(policy, shown, me)
    assert (", ".join(SITES[number] for number in sorted(shown)) or "none") in str(caught.value)


def test_cohorts_that_differ_by_too_few_are_refused_and_the_difference_is_named():
    policy = Policy(smallest_difference=2)
    for shown, who in (({0, 1, 2}, "dogwood"), ({0, 1, 3}, "cedar")):
        with pytest.raises(RemoteProtocolError, match=f"differ by {who} only"):
            cohort(policy, shown, 0, earlier=[{0, 1, 2, 3}])
    cohort(policy, {0, 1, 2}, 0, earlier=[{0, 1, 2}, {0, 1, 3}])
    with pytest.raises(RemoteProtocolError, match="differ by cedar, dogwood only"):
        cohort(Policy(smallest_difference=3), {0, 1, 2}, 0, earlier=[{0, 1, 3}])
    cohort(Policy(smallest_difference=0), {0, 1, 2}, 0, earlier=[{0, 1, 2, 3}])


def test_a_round_that_goes_on_for_too_long_is_refused_and_so_is_a_clock_that_was_set_back():
    policy = Policy(longest_session=60)
    for seconds in (-1, 0, 1.5, 60):  # a clock may be set right meanwhile, by a little
        policy.check_age(seconds)
    for seconds in (60.1, 86_400, -61, -1e9, math.inf, -math.inf, math.nan):
        with pytest.raises(RemoteProtocolError, match="the policy allows 0 to 60"):
            policy.check_age(seconds)
    Policy().check_age(86_400)
    with pytest.raises(RemoteProtocolError, match="86401 seconds ago"):
        Policy().check_age(86_401)
    PERMISSIVE.check_age(30 * 86_400)


def world_with(policy, made):
    world = World(made)
    for name in SITES:
        world.engine.sites[name] = world.sites[name] = world.site(name, policy=policy)
    return world


def two_rounds_over_one_model(policy, mode="active"):
    """The server never moves the model, and leaves birch out of the second round."""
    world = world_with(policy, fedsgd(rounds=2, protocol={"mode": mode}))
    means = []
    world.coordinator._optimizer.step = means.append
    world.run(Fault("birch", "MaskedInput", 1))
    return world, means


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
def test_two_cohorts_over_one_model_show_the_difference_and_are_refused(mode):
    world, means = two_rounds_over_one_model(Policy(smallest_difference=0, semi_honest=True), mode)
    first, second = (record.weight for record in world.rounds[:2])
    stolen = (means[0] * first - means[1] * second) / (first - second)
    own = gradient_update(build_model(world.study, 3), world.sites["birch"].data, torch.device("cpu"))
    assert first - second == own.weight
    np.testing.assert_allclose(stolen, own.values, atol=1e-4)

    world, means = two_rounds_over_one_model(Policy(semi_honest=True), mode)
    assert [record.outcome for record in world.rounds[:2]] == ["opened", "failed"]
    assert len(means) == 1
    assert all("differ by birch only" in world.sites[name].log[-1] for name in SITES if name != "birch")


def test_two_sums_of_moments_over_different_cohorts_are_refused():
    made = study(task={"standardize": "global"})
    for smallest, cohorts in ((0, {SITES, tuple(name for name in SITES if name != "birch")}), (2, {SITES})):
        world = world_with(Policy(smallest_difference=smallest), made)
        world.coordinator._purposes.insert(0, "standardize")
        world.run(Fault("birch", "MaskedInput", 1))
        opened = {r.contributors for r in world.rounds if r.purpose == "standardize" and r.outcome == "opened"}
        assert opened == cohorts


def test_the_same_cohort_may_be_asked_again_and_other_models_with_any():
    world = world_with(Policy(), fedsgd(rounds=3)).run(Fault("birch", "MaskedInput", 1))
    assert [record.outcome for record in world.rounds[:3]] == ["opened"] * 3
    world = world_with(Policy(), fedsgd(rounds=2))
    world.coordinator._optimizer.step = lambda mean: None
    world.run()
    assert [record.outcome for record in world.rounds[:2]] == ["opened"] * 2


# --- the cap on epsilon

LOCAL = {"mechanism": "local-sgd", "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.5}


def capped(epsilon, delta=1e-3, relation=Relation.ADD_OR_REMOVE_ONE):
    return msgspec.structs.replace(PERMISSIVE, epsilon=epsilon, delta=delta, relation=relation)


def private(**privacy):
    return fedsgd(rounds=3, privacy={**LOCAL, **privacy})


def whole_cost(made, delta=1e-3, relation=Relation.ADD_OR_REMOVE_ONE):
    planned = World(made).sites["ash"]._plan.mechanism()
    return spent([planned] * made.rounds, delta, relation).epsilon


def taken_up(made, policy):
    World(made).site("ash", policy=policy)


def test_a_study_without_differential_privacy_is_refused_under_a_cap():
    with pytest.raises(
        StudyError, match=r"^privacy\.mechanism: the policy of ash allows epsilon 100 at delta 0\.001, .* no"
    ):
        taken_up(study(), capped(100.0))
    taken_up(study(), PERMISSIVE)


@pytest.mark.parametrize(
    "made",
    [
        private(),
        private(epsilon=2.0, noise_multiplier=None),
        private(mechanism="distributed-sgd", records=50, grid=1 << 16),
    ],
    ids=["noise says it", "epsilon says it", "distributed"],
)
def test_a_study_whose_rounds_come_to_more_than_the_cap_is_not_taken_up(made):
    """It is refused before its first round, not in the middle of it."""
    cost = whole_cost(made)
    taken_up(made, capped(cost))
    with pytest.raises(StudyError, match=rf"^privacy: the policy of ash allows epsilon .*, .* come to {cost:.4f}$"):
        taken_up(made, capped(cost - 1e-3))


def test_a_study_cannot_hide_its_cost_behind_a_delta_or_a_relation_of_its_own():
    """Its epsilon is small at its delta; at the site's it is not."""
    made = private(epsilon=2.0, noise_multiplier=None, delta=0.02)
    taken_up(made, capped(2.0, delta=0.02))
    assert whole_cost(made, delta=1e-6) > 3.0
    with pytest.raises(StudyError, match="allows epsilon 2 at delta 1e-06"):
        taken_up(made, capped(2.0, delta=1e-6))
    made = private(epsilon=2.0, noise_multiplier=None)
    with pytest.raises(StudyError, match=r"allows epsilon 2 at delta 0\.001 \(replace-one\)"):
        taken_up(made, capped(2.0, relation=Relation.REPLACE_ONE))


def test_what_the_state_says_was_spent_counts_against_the_cap_before_a_round():
    world = World(private(), policy=capped(whole_cost(private())))
    memory = remember(world.states["ash"])
    once = world.sites["ash"]._plan.mechanism()
    spent_already = msgspec.structs.replace(memory, mechanisms=(msgspec.structs.replace(once, steps=3),))
    world.states["ash"] = encode(spent_already)
    world.run()
    assert all(record.dropped["ash"] == "refused (budget) at AdvertiseKeys" for record in world.rounds[:1])
    assert "ash" not in world.rounds[0].contributors
    assert {"birch", "cedar", "dogwood"} == set(world.rounds[0].contributors)
