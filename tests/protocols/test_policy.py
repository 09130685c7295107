"""A site's own conditions, and the server that tries to get around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protocols.engines.faulty import Fault
from protocols.errors import StudyError
from protocols.fedavg import build_model, gradient_update
from protocols.policy import PERMISSIVE, Policy
from tests.protocols.hospitals import SITES, World, fedsgd, study


@pytest.mark.parametrize(
    ("changes", "policy", "says"),
    [
        ({"aggregation": "plain"}, Policy(), r'^protocol\.aggregation: the policy of ash allows masked, .*"plain"$'),
        ({"mode": "semi-honest"}, Policy(), r'^protocol\.mode: the policy of ash asks for "active", .*"semi-honest"$'),
        ({"threshold": 3}, Policy(smallest_cohort=4), r"^protocol\.threshold: .* at least 4 sites, .* threshold is 3$"),
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
    assert Policy() == Policy(smallest_cohort=3, schemes=("masked",), semi_honest=False, smallest_difference=2)


@pytest.mark.parametrize("changes", [{"aggregation": "plain"}, {"mode": "semi-honest"}])
def test_research_on_one_machine_may_do_without(changes):
    World(study(protocol=changes)).site("ash", policy=PERMISSIVE)


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
