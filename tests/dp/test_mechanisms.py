import math

import dp_accounting
import msgspec
import pytest

from dp import ParameterError, PoissonSampledGaussian, Relation

GOOD = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 10, "l2_clip_norm": 2.0}


def test_event():
    once = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    assert PoissonSampledGaussian(**GOOD).event() == dp_accounting.SelfComposedDpEvent(once, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (f, v)
        for f in ("sampling_rate", "noise_multiplier", "l2_clip_norm")
        for v in (0.0, -1.0, math.nan, math.inf, "1")
    ]
    + [("sampling_rate", 1.0001), ("noise_multiplier", True), ("steps", -1), ("steps", 1.5), ("steps", True)],
)
def test_what_makes_no_sense_is_refused(field, value):
    with pytest.raises(ParameterError, match=field):
        PoissonSampledGaussian(**{**GOOD, field: value})


def test_edges_are_allowed():
    PoissonSampledGaussian(**{**GOOD, "sampling_rate": 1.0, "steps": 0})


def test_it_survives_encoding_and_is_checked_on_the_way_back():
    mechanism = PoissonSampledGaussian(**GOOD)
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(mechanism), type=PoissonSampledGaussian) == mechanism
    with pytest.raises(ParameterError, match="noise_multiplier"):
        msgspec.json.decode(msgspec.json.encode({**GOOD, "noise_multiplier": 0.0}), type=PoissonSampledGaussian)


def test_relations_map_to_dp_accountings():
    names = dp_accounting.NeighboringRelation
    assert Relation("add-or-remove-one").neighboring_relation() is names.ADD_OR_REMOVE_ONE
    assert Relation("replace-one").neighboring_relation() is names.REPLACE_ONE
