"""The agreement: what it may say, and that whoever says something else has another digest."""

import msgspec
import pytest

from protocols.agreement import Agreement, load_agreement, parse_agreement
from protocols.errors import StudyError
from protocols.study import Protocol
from tests.protocols.apps import SITES, TEXT, agreement

OTHERS = {
    "name": "other",
    "sites": ("ash", "birch", "cedar", "elm"),
    "most_sums": 11,
    "weight": "rows",
    "max_integer_update": 5,
    "protocol": Protocol(max_update=5.0),
    "train": {"train_loss": 11.0},
    "evaluate": {"eval_auc": 1.0},
}


def test_the_smallest_agreement_has_the_strict_defaults():
    given = parse_agreement('name = "a"\nsites = ["x", "y", "z"]\nmost_sums = 1\n')
    assert (given.threshold, given.protocol.mode, given.protocol.aggregation) == (3, "active", "masked")
    assert given.metrics("train") == given.metrics("evaluate") == {}
    assert given.weight == "num-examples"


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(Agreement)])
def test_every_field_is_in_the_digest(field):
    other = msgspec.structs.replace(agreement(), **{field: OTHERS[field]})
    assert other.digest != agreement().digest


def test_the_order_of_names_makes_no_difference():
    turned = msgspec.structs.replace(agreement(), sites=SITES[::-1])
    assert turned.digest == agreement().digest
    assert turned.site_names == SITES
    several = msgspec.structs.replace(agreement(), train={"b": 1.0, "a": 2.0})
    assert several.digest == msgspec.structs.replace(agreement(), train={"a": 2.0, "b": 1.0}).digest
    assert list(several.metrics("train")) == ["a", "b"]


def test_metrics_are_scaled_to_the_largest_entry_and_need_no_wider_ring():
    wide = msgspec.structs.replace(agreement(), train={"loss": 1e6})
    assert wide.fixed_point("train").ring_bits == agreement().fixed_point("train").ring_bits


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('name = "tiny"', 'name = "a/b"'), "sums.toml: name: expected 1 to 64 letters"),
        (('"dogwood"]', '"ash"]'), "sums.toml: sites[3]: expected a name of its own, got 'ash'"),
        (('"dogwood"]', '"a b"]'), "sums.toml: sites[3]: expected 1 to 64 letters, digits"),
        (('["ash", "birch", "cedar", "dogwood"]', '["ash", "birch"]'), "sums.toml: sites: expected at least 3"),
        (("most_sums = 10\n", ""), "sums.toml: most_sums: expected a value, got none"),
        (("most_sums = 10", "most_sums = 0"), "sums.toml: most_sums: expected at least 1 and below 2^53, got 0"),
        (("most_sums = 10", "most_sums = 1e3"), "sums.toml: most_sums: expected a whole number, got a number (1000.0)"),
        (("most_sums", "max_integer_update = 0\nmost_sums"), "max_integer_update: expected at least 1 and below 2^53"),
        (("most_sums", 'weight = ""\nmost_sums'), "sums.toml: weight: expected a name of 1 to 64 characters"),
        (("train_loss = 10.0", "train_loss = 0.0"), "sums.toml: train.train_loss: expected its largest absolute value"),
        (("train_loss = 10.0", "train_loss = inf"), "train.train_loss: expected its largest absolute value"),
        (("train_loss = 10.0", "train_loss = nan"), "train.train_loss: expected its largest absolute value"),
        (("train_loss = 10.0", "num-examples = 1.0"), "train.num-examples: expected none: the weight's bound is"),
        (("eval_acc = 1.0", '"a\\n" = 1.0'), "evaluate.a\\n: expected a name of 1 to 64 characters in one line"),
        (("[train]", "[trains]"), "sums.toml: trains: unknown key; did you mean train?"),
        (("[train]", '[protocol]\naggregation = "plain"\n[train]'), 'protocol.aggregation: expected "masked"'),
        (("[train]", '[protocol]\naggregation = "ckks"\n[train]'), 'protocol.aggregation: expected "masked"'),
        (("[train]", "[protocol]\nring_bits = 64\n[train]"), "protocol.ring_bits: expected nothing: an app's strategy"),
        (("[train]", "[protocol]\nmax_failed_rounds = 1\n[train]"), "protocol.max_failed_rounds: expected nothing"),
        (("[train]", '[protocol]\nkeys = "shared"\n[train]'), "protocol.keys: expected nothing, as"),
        (("[train]", "[protocol]\nthreshold = 2\n[train]"), "protocol.threshold: expected 3 to 4 for 4 sites"),
        (("[train]", "[protocol]\nmax_update = 0.0\n[train]"), "protocol.max_update: expected a finite number above 0"),
        (("[train]", "[protocol]\nmax_weight = 1000000000000\n[train]"), "sums.toml: protocol: largest value 4.0 x"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_path(change, told):
    text = TEXT.replace(*change)
    assert text != TEXT
    with pytest.raises(StudyError) as caught:
        parse_agreement(text, name="sums.toml")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(StudyError, match="cannot be read"):
        load_agreement(tmp_path / "agreement.toml")
    (tmp_path / "agreement.toml").write_text(TEXT)
    assert load_agreement(tmp_path / "agreement.toml") == agreement()
