"""A server that goes down goes on from its checkpoint: all it had is there, and nothing is asked of sites twice."""

import msgspec
import numpy as np
import pytest

from protocols.messages import Request
from secagg.errors import DecodeError
from secagg.masking.transcript import Closing, examine, write
from secagg.wire import decode
from tests.protocols.hospitals import SITES, World, fedsgd, parameters, study

ADAM = {"optimizer": "Adam", "learning_rate": 0.1}
STEADY = 3  # stages of a steady round: MaskedInput, ConsistencyCheck, Unmask
FIRST = 5


def resumed(world, checkpoint):
    """Another server, over the same sites."""
    world.coordinator = world.another_coordinator()
    world.coordinator.resume(checkpoint)
    return world


def after(world, stages):
    for _ in range(stages):
        world.stage()
    return world.coordinator.checkpoint()


def outcomes(world):
    return [record.outcome for record in world.rounds if record.purpose == "train"]


def test_the_model_and_the_optimisers_memory_are_those_of_the_last_finished_round():
    built = fedsgd(rounds=3, server=ADAM)
    world = World(built)
    checkpoint = after(world, FIRST)  # the first round is over, and the second begun
    before = parameters(world.model)
    resumed(world, checkpoint)
    assert np.array_equal(parameters(world.model), before)
    world.run()
    assert outcomes(world) == ["opened", "failed", "opened"]
    whole = World(fedsgd(rounds=2, server=ADAM)).run()  # as many rounds as were not lost
    assert np.allclose(parameters(world.model), parameters(whole.model), atol=1e-3)


def test_without_the_optimisers_memory_the_model_would_be_another_one(monkeypatch):
    world = World(fedsgd(rounds=3, server=ADAM))
    checkpoint = after(world, FIRST)
    monkeypatch.setattr("protocols.fedavg.ServerOptimizer.resume", lambda self, state: None)
    resumed(world, checkpoint).run()
    whole = World(fedsgd(rounds=2, server=ADAM)).run()
    assert not np.allclose(parameters(world.model), parameters(whole.model), atol=1e-3)


@pytest.mark.parametrize("stages", range(FIRST + STEADY + 2))
@pytest.mark.parametrize("answered", [False, True])
def test_wherever_it_goes_down_the_study_comes_to_its_end(stages, answered):
    world = World(study(rounds=2, task={"standardize": "global"}))
    checkpoint = after(world, stages)
    if answered:  # the sites have answered once more, and nobody knows
        world.stage()
    resumed(world, checkpoint).run()
    trained = [record for record in world.rounds if record.purpose == "train"]
    assert len(trained) == 2  # one that was lost is not made up for
    assert [r.outcome for r in trained].count("failed") <= 1
    assert world.rounds[-1].purpose == "finish"
    assert world.rounds[-1].outcome == "opened"
    assert not world.rounds[-1].dropped
    assert all(record.contributors == SITES for record in world.rounds if record.outcome == "opened" and record.weight)
    numbers = [record.number for record in world.rounds]
    assert numbers == sorted(set(numbers))


def test_a_site_is_never_asked_for_keys_or_a_vector_under_a_number_that_it_has_seen():
    world = World(study(rounds=3))
    asked = set()

    def see(requests):
        for name, request in requests.items():
            message = decode(request, Request)
            for part in (message.sum, message.keys):
                if part is not None and part.stage in ("AdvertiseKeys", "MaskedInput"):
                    assert (name, part.stage, part.round) not in asked
                    asked.add((name, part.stage, part.round))

    checkpoint = world.coordinator.checkpoint()
    while not world.coordinator.finished:
        see(dict(world.coordinator.requests()))
        world.stage()  # and the server goes down before it has kept what came
        resumed(world, checkpoint)
        see(dict(world.coordinator.requests()))
        world.stage()
        checkpoint = world.coordinator.checkpoint()
    assert len(outcomes(world)) == 3


def test_the_transcript_goes_on_and_holds():
    world = World(study(rounds=3))
    resumed(world, after(world, FIRST + 1)).run()
    transcript = world.coordinator.transcript
    assert len(transcript) == 2 + 1
    assert isinstance(transcript[-1], Closing)
    findings = examine(write(transcript), world.roster)
    assert not findings.problems


def test_lost_rounds_in_a_row_are_still_counted():
    world = World(study(rounds=4, protocol={"max_failed_rounds": 2}))
    while world.rounds[0].outcome == "running":
        world.stage(lost=SITES[:2])
    resumed(world, world.coordinator.checkpoint())
    while not world.coordinator.finished:
        world.stage(lost=SITES[:2])
    assert world.coordinator.stopped.startswith("2 rounds in a row were lost")


def test_a_study_that_was_stopped_stays_stopped():
    world = World(study(rounds=4, protocol={"max_failed_rounds": 1}))
    while world.coordinator.stopped is None:
        world.stage(lost=SITES[:2])
    resumed(world, world.coordinator.checkpoint())
    assert world.coordinator.stopped.startswith("1 rounds in a row were lost")
    assert world.run().rounds[-1].purpose == "finish"
    assert len(outcomes(world)) == 1


def test_the_finish_is_signed_once_and_told_again():
    world = World(study(rounds=1))
    world.until("Unmask")
    world.stage()
    assert world.coordinator.stage == "Finish"
    checkpoint = world.coordinator.checkpoint()
    world.stage()  # all have signed, and nobody knows
    resumed(world, checkpoint).run()
    assert len(world.coordinator.transcript[-1].signatures) == len(SITES)


def test_a_checkpoint_of_another_study_is_refused_and_both_are_named():
    mine, other = World(study(rounds=1)), World(study(rounds=2))
    with pytest.raises(DecodeError, match="the checkpoint is of another study") as caught:
        mine.coordinator.resume(other.coordinator.checkpoint())
    assert mine.study.digest.hex()[:16] in str(caught.value)
    assert other.study.digest.hex()[:16] in str(caught.value)


def test_a_checkpoint_that_is_damaged_is_refused_and_the_server_stays_as_it_was():
    world = World(fedsgd(rounds=2, server=ADAM))
    checkpoint = after(world, FIRST)
    fresh = world.another_coordinator()
    before, rounds = parameters(fresh.model), msgspec.msgpack.encode(fresh.rounds)
    for position in range(0, len(checkpoint), max(1, len(checkpoint) // 200)):
        damaged = bytearray(checkpoint)
        damaged[position] ^= 0xFF
        for given in (bytes(damaged), checkpoint[:position]):
            with pytest.raises(DecodeError, match="damaged or cut short"):
                fresh.resume(given)
    assert np.array_equal(parameters(fresh.model), before)
    assert msgspec.msgpack.encode(fresh.rounds) == rounds


def test_a_checkpoint_holds_nothing_that_the_server_was_told_in_the_running_sum():
    world = World(study(rounds=1))
    world.until("Unmask")
    (vector,) = {bytes(reply) for name, reply in world.engine.exchange(world.coordinator.requests()) if name == "ash"}
    assert len(vector) > 64
    assert vector[-64:] not in world.coordinator.checkpoint()
