"""The study file: what it may say, and the one line that comes out where it may not."""

import math
from functools import partial

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols import study as study_module
from protocols import toml_file
from protocols.errors import StudyError
from protocols.study import Study, demo_study, load_study, parse_study
from protocols.toml_file import table_at
from tests.protocols.hospitals import PRIVATE, SITES, fedsgd, study, table

TEXT = """
name = "three"
rounds = 2
sites = [{ name = "ash", data = "ash.csv" }, { name = "birch" }, { name = "cedar" }]

[task]
data = "csv"
features = ["age", "dose"]
target = "ill"
"""


def refusal(text):
    with pytest.raises(StudyError) as caught:
        parse_study(text, name="my.toml")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("my.toml: ")
    return line.removeprefix("my.toml: ")


def converted(made):
    """A study from tables, as the reader of a file makes it; gives the refusal's one line or the study."""
    return msgspec.convert(made, Study)


def refused(made):
    with pytest.raises(StudyError) as caught:
        converted(made)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_small_study_has_the_defaults_that_the_documentation_gives():
    made = parse_study(TEXT)
    assert made.site_names == ("ash", "birch", "cedar")
    assert made.threshold == 3
    assert (made.protocol.aggregation, made.protocol.mode) == ("masked", "active")
    assert (made.training.algorithm, made.training.local_epochs) == ("fedavg", 1)
    assert not made.private
    assert made.fixed_point.ring_bits == 34


def test_the_demo_study_is_private_over_four_hospitals():
    demo = demo_study()
    assert demo.site_names == ("cleveland", "hungarian", "switzerland", "va")
    assert demo.private
    assert demo.threshold == 3
    assert demo.local_steps == 4


# --- what msgspec finds: the path, what was expected, what came


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("colour = 1\n" + TEXT, "colour: unknown key"),
        (TEXT + 'standardise = "site"\n', "task.standardise: unknown key"),
        (TEXT.replace('{ name = "birch" }', '{ nam = "birch" }'), "sites[1].nam: unknown key"),
        (TEXT + "[server.options]\nbetas = 'x'\n", "server.options"),
        (TEXT.replace("rounds = 2", 'rounds = "2"'), "rounds: expected a whole number, got text ('2')"),
        (TEXT.replace("rounds = 2", "rounds = true"), "rounds: expected a whole number, got true or false (True)"),
        (TEXT.replace("rounds = 2", ""), "rounds: expected a value, got none"),
        (TEXT.replace("rounds = 2", "rounds = 2.5"), "rounds: expected a whole number, got a number (2.5)"),
        (TEXT.replace('"birch"', "3"), "sites[1].name: expected text, got a whole number (3)"),
        (TEXT.replace('["age", "dose"]', '["age", 7]'), "task.features[1]: expected text, got a whole number (7)"),
        (TEXT.replace('["age", "dose"]', '"age"'), "task.features: expected a list, got text ('age')"),
        (TEXT + '[protocol]\nmode = "honest"\n', 'protocol.mode: expected one of "active", "semi-honest", got'),
        (
            TEXT + '[privacy]\nrelation = "both"\n',
            'privacy.relation: expected one of "add-or-remove-one", "replace-one", got',
        ),
        ("task = 3\n" + TEXT[: TEXT.index("[task]")], "task: expected a table, got a whole number (3)"),
        ("name = ", "no valid TOML:"),
    ],
)
def test_a_file_that_says_it_wrongly_is_answered_in_one_line(text, line):
    assert refusal(text).startswith(line)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"missing\.toml: cannot be read: No such file"):
        load_study(tmp_path / "missing.toml")
    with pytest.raises(StudyError, match="cannot be read"):
        load_study(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(StudyError, match=r"latin\.toml: expected a text file in UTF-8") as caught:
        load_study(tmp_path / "latin.toml")
    assert "\n" not in str(caught.value)
    (tmp_path / "good.toml").write_text(TEXT)
    assert load_study(tmp_path / "good.toml") == parse_study(TEXT)


def test_the_value_at_a_path():
    made = {"sites": [{"name": "ash"}], "task": {"features": ["age"]}}
    assert table_at(made, "sites[0].name") == "ash"
    assert table_at(made, "task.features[0]") == "age"
    for nothing in ("sites[1].name", "sites[0]", "task.target", "sites.name", "task.features[0].x"):
        assert table_at(made, nothing) is None


# --- what no single field's type can say


@pytest.mark.parametrize(
    ("changes", "path", "expected", "came"),
    [
        ({"rounds": 0}, "rounds", "at least 1", "0"),
        ({"seed": -1}, "seed", "from 0", "-1"),
        ({"name": "a/b"}, "name", "letters", "'a/b'"),
        ({"name": ""}, "name", "letters", "''"),
        ({"name": "a\nb"}, "name", "letters", r"'a\nb'"),
        ({"sites": [{"name": n} for n in ("ash", "birch")]}, "sites", "at least 3", "2"),
        ({"sites": [{"name": n} for n in ("ash", "birch", "ash")]}, "sites[2].name", "of its own", "'ash'"),
        ({"sites": [{"name": n} for n in ("ash", "birch", "a/b")]}, "sites[2].name", "letters", "'a/b'"),
        ({"sites": [{"name": n} for n in ("ash", "birch", "")]}, "sites[2].name", "letters", "''"),
        ({"sites": []}, "sites", "at least 3", "0"),
        ({"task": {"features": []}}, "task.features", "columns", "[]"),
        ({"task": {"target": None}}, "task.target", "column", "None"),
        ({"task": {"standardize": "public"}}, "task.standardize", '"global", "site" or "none"', "'public'"),
        ({"task": {"test_fraction": 0.0}}, "task.test_fraction", "between 0 and 1", "0.0"),
        ({"task": {"test_fraction": 1.0}}, "task.test_fraction", "between 0 and 1", "1.0"),
        ({"task": {"test_fraction": math.nan}}, "task.test_fraction", "between 0 and 1", "nan"),
        ({"task": {"features": ["age", "age"]}}, "task.features", "each once", "['age', 'age']"),
        ({"task": {"features": ["age", "ill"]}}, "task.features", "none the target", "['age', 'ill']"),
        ({"task": {"split_seed": -1}}, "task.split_seed", "from 0 to 2^32 - 1", "-1"),
        ({"task": {"split_seed": 2**32}}, "task.split_seed", "from 0 to 2^32 - 1", "4294967296"),
        ({"seed": 2**63}, "seed", "below 2^63", "9223372036854775808"),
        ({"task": {"data": "heart-disease"}}, "sites[0].name", "cleveland", "'ash'"),
        ({"model": {"kind": "factory"}}, "model.factory", "package.module:function", "None"),
        ({"model": {"kind": "factory", "factory": "os"}}, "model.factory", "package.module:function", "'os'"),
        ({"model": {"factory": "a:b"}}, "model.factory", "none", "'a:b'"),
        ({"model": {"kind": "mlp", "hidden": []}}, "model.hidden", "at least 1", "[]"),
        ({"model": {"kind": "mlp", "hidden": [4, 0]}}, "model.hidden", "at least 1", "[4, 0]"),
        ({"training": {"local_epochs": 1}}, "training.local_epochs", "exactly one", "local_steps"),
        ({"training": {"local_steps": None}}, "training.local_epochs", "exactly one", "neither"),
        ({"training": {"local_steps": 0}}, "training.local_steps", "at least 1", "0"),
        ({"training": {"batch_size": 0}}, "training.batch_size", "at least 1", "0"),
        ({"training": {"algorithm": "fedsgd"}}, "training.local_steps", "none", "2"),
        ({"training": {"learning_rate": 0.0}}, "training.learning_rate", "above 0", "0.0"),
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate", "finite", "inf"),
        ({"training": {"momentum": 1.0}}, "training.momentum", "below 1", "1.0"),
        ({"training": {"momentum": -0.1}}, "training.momentum", "at least 0", "-0.1"),
        ({"server": {"learning_rate": -1.0}}, "server.learning_rate", "above 0", "-1.0"),
        ({"server": {"learning_rate": math.nan}}, "server.learning_rate", "finite", "nan"),
        ({"protocol": {"threshold": 5}}, "protocol.threshold", "3 to 4 for 4 sites", "5"),
        ({"protocol": {"threshold": 2}}, "protocol.threshold", "3 to 4 for 4 sites in active mode", "2"),
        ({"protocol": {"threshold": 0}}, "protocol.threshold", "3 to 4", "0"),
        ({"protocol": {"aggregation": "plain", "threshold": 5}}, "protocol.threshold", "1 to 4", "5"),
        ({"protocol": {"aggregation": "plain", "threshold": 0}}, "protocol.threshold", "1 to 4", "0"),
        ({"protocol": {"max_failed_rounds": 0}}, "protocol.max_failed_rounds", "at least 1", "0"),
        ({"privacy": {"epsilon": 1.0}}, "privacy.mechanism", "privacy.epsilon is set", "'none'"),
        ({"privacy": {"epsilon": 0.0}}, "privacy.mechanism", "privacy.epsilon is set", "'none'"),
        ({"privacy": {"noise_multiplier": 1.0}}, "privacy.mechanism", "privacy.noise_multiplier is set", "'none'"),
        ({"privacy": {**PRIVATE, "delta": None, "epsilon": 1.0}}, "privacy.delta", "a delta", "None"),
        ({"privacy": {**PRIVATE, "delta": 1.0}}, "privacy.delta", "between 0 and 1", "1.0"),
        ({"privacy": {**PRIVATE, "delta": 0.0}}, "privacy.delta", "between 0 and 1", "0.0"),
        ({"privacy": {**PRIVATE, "noise_multiplier": None}}, "privacy.epsilon", "epsilon, a noise_mult", "None"),
        ({"privacy": {**PRIVATE, "noise_multiplier": 0.0}}, "privacy.noise_multiplier", "above 0", "0.0"),
        ({"privacy": {**PRIVATE, "epsilon": -1.0}}, "privacy.epsilon", "above 0", "-1.0"),
        ({"privacy": {**PRIVATE, "l2_clip_norm": math.inf}}, "privacy.l2_clip_norm", "finite", "inf"),
        ({"privacy": {**PRIVATE, "sampling_rate": None}}, "privacy.sampling_rate", "at most 1", "None"),
        ({"privacy": {**PRIVATE, "sampling_rate": 1.5}}, "privacy.sampling_rate", "at most 1", "1.5"),
        ({"privacy": PRIVATE, "task": {"standardize": "global"}}, "task.standardize", '"none" under diff', "'global'"),
        ({"privacy": PRIVATE, "task": {"standardize": "site"}}, "task.standardize", '"none" under diff', "'site'"),
        ({"privacy": PRIVATE, "model": {"buffers": "average"}}, "model.buffers", '"refuse"', "'average'"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path_what_was_expected_and_what_came(changes, path, expected, came):
    line = refused(table(**changes))
    where, _, rest = line.partition(": ")
    wanted, _, got = rest.rpartition(", got ")
    assert where == path
    assert wanted.startswith("expected ")
    assert expected in wanted
    assert came in got


def test_private_fedsgd_takes_no_momentum():
    with pytest.raises(StudyError, match=r"^training\.momentum: expected 0 with fedsgd.*got 0\.5"):
        fedsgd(training={"momentum": 0.5}, privacy=PRIVATE)


@pytest.mark.parametrize("name", ["features", "target"])
def test_heart_disease_takes_neither_features_nor_a_target(name):
    made = table(("cleveland", "hungarian", "va"), task={"data": "heart-disease", "features": [], "target": None})
    made["task"][name] = {"features": ["age"], "target": "num"}[name]
    assert refused(made).startswith("task.features: expected no features or target")


def test_heart_disease_takes_no_paths():
    made = table(("cleveland", "hungarian", "va"), task={"data": "heart-disease", "features": [], "target": None})
    assert isinstance(converted(made), Study)
    made["sites"][1]["data"] = "mine.csv"
    assert refused(made).startswith("sites[1].data: expected no path")


@pytest.mark.parametrize("aggregation", ["masked", "plain"])
def test_fewer_than_three_sites_are_refused_before_anything_runs(aggregation):
    made = table(("ash", "birch"), protocol={"aggregation": aggregation})
    assert refused(made).startswith("sites: expected at least 3")


def test_a_ring_that_is_too_small_is_refused_with_the_numbers():
    line = refused(table(protocol={"ring_bits": 20}))
    assert line.startswith(
        "protocol: 4 clients x largest value 4.0 x weight 10000 x 2^16 needs a ring of 35 bits, got 20"
    )
    exact = converted(table(protocol={"ring_bits": 35}))
    assert exact.fixed_point.ring_bits == 35
    assert refused(table(protocol={"ring_bits": 34})).endswith("got 34: the sum could wrap")


def test_a_sum_that_no_ring_holds_is_refused_with_the_numbers():
    assert "64 is the most" in refused(table(protocol={"max_weight": 2**50}))


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": {"max_update": 1e308}},
        {"protocol": {"fraction_bits": 5000}},
    ],
)
def test_numbers_beyond_all_bounds_are_refused_like_others(changes):
    refused(table(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**64},
        {"seed": 10**30},
        {"model": {"kind": "mlp", "hidden": [10**20]}},
        {"training": {"local_steps": 10**20}},
        {"task": {"split_seed": -(10**20)}},
    ],
)
def test_an_integer_of_more_than_64_bits_is_refused_with_its_path(changes):
    refused(table(**changes))


# --- derived values


@pytest.mark.parametrize(
    ("n", "mode", "threshold", "colluders"),
    [(3, "active", 3, 1), (4, "active", 3, 1), (6, "active", 5, 3), (3, "semi-honest", 2, 1), (5, "semi-honest", 3, 2)],
)
def test_threshold_and_how_many_may_collude(n, mode, threshold, colluders):
    made = study([f"s{i}" for i in range(n)], protocol={"mode": mode})
    assert (made.threshold, made.colluders) == (threshold, colluders)
    # The least threshold is what it says: one lower is refused.
    assert "protocol.threshold" in refused(
        table([f"s{i}" for i in range(n)], protocol={"mode": mode, "threshold": threshold - 1})
    )


def test_a_plain_sum_needs_one_site_unless_told_otherwise():
    assert study(protocol={"aggregation": "plain"}).threshold == 1
    assert study(protocol={"aggregation": "plain", "threshold": 2}).threshold == 2


def test_local_steps_of_a_private_epoch_are_one_over_the_sampling_rate():
    made = table(privacy={**PRIVATE, "sampling_rate": 0.25})
    made["training"] = {"local_epochs": 2}
    assert converted(made).local_steps == 8
    assert study().local_steps == 2
    assert fedsgd().local_steps == 1
    made = table()
    made["training"] = {"local_epochs": 2}
    assert converted(made).local_steps is None


def test_uniform_weighting_needs_a_smaller_ring():
    assert study(training={"weighting": "uniform"}).fixed_point.max_weight == 1
    assert study().fixed_point.max_weight == 10_000


# --- the digest: what all sites must agree on


def alternatives():
    """For every leaf of a study's tables another value that is valid too, as (path, changes)."""
    plain = {
        ("name",): "other",
        ("rounds",): 2,
        ("seed",): 1,
        ("device",): "auto",
        ("task", "features"): ["dose", "age", "pulse"],
        ("task", "target"): "dead",
        ("task", "standardize"): "site",
        ("task", "test_fraction"): 0.5,
        ("task", "split_seed"): 1,
        ("task", "preprocessing"): "flamby",
        ("model", "kind"): "mlp",
        ("model", "hidden"): [3],
        ("model", "buffers"): "average",
        ("training", "local_steps"): 3,
        ("training", "batch_size"): 3,
        ("training", "learning_rate"): 0.25,
        ("training", "momentum"): 0.5,
        ("training", "weighting"): "uniform",
        ("server", "optimizer"): "Adam",
        ("server", "learning_rate"): 0.5,
        ("server", "options"): {"momentum": 0.5},
        ("protocol", "aggregation"): "plain",
        ("protocol", "mode"): "semi-honest",
        ("protocol", "threshold"): 4,
        ("protocol", "max_update"): 2.0,
        ("protocol", "max_weight"): 100,
        ("protocol", "fraction_bits"): 12,
        ("protocol", "ring_bits"): 40,
        ("protocol", "max_failed_rounds"): 1,
    }
    private = {
        ("privacy", "epsilon"): 3.0,
        ("privacy", "delta"): 1e-4,
        ("privacy", "noise_multiplier"): 2.0,
        ("privacy", "l2_clip_norm"): 2.0,
        ("privacy", "sampling_rate"): 0.25,
        ("privacy", "relation"): "replace-one",
    }
    for path, value in plain.items():
        yield pytest.param({}, path, value, id=".".join(path))
    for path, value in private.items():
        yield pytest.param({"privacy": PRIVATE}, path, value, id=".".join(path))


@pytest.mark.parametrize(("base", "path", "value"), list(alternatives()))
def test_the_digest_changes_with_every_field(base, path, value):
    changes = {key: dict(inner) for key, inner in base.items()}
    if len(path) == 1:
        changes[path[0]] = value
    else:
        changes.setdefault(path[0], {})[path[1]] = value
    assert study(**changes).digest != study(**base).digest


def test_the_digest_changes_with_the_sites_but_not_with_their_order_or_their_files():
    made = table()
    here = converted(made)
    made["sites"] = [{"name": name, "data": f"/somewhere/{name}.csv"} for name in reversed(SITES)]
    assert converted(made).digest == here.digest
    assert converted(made).site_names == here.site_names
    assert study(SITES[:3]).digest != here.digest
    assert study((*SITES[:3], "elm")).digest != here.digest


def test_the_digest_does_not_hang_on_how_the_options_are_ordered_in_the_file():
    one = TEXT + "[server.options]\nmomentum = 0.5\nnesterov = true\n"
    two = TEXT + "[server.options]\nnesterov = true\nmomentum = 0.5\n"
    assert parse_study(one).digest == parse_study(two).digest


def test_every_field_of_a_study_is_in_the_digests_test():
    """A field that is added to the study is added above as well."""
    covered = {param.values[1] for param in alternatives()}
    for field in msgspec.structs.fields(Study):
        inner = getattr(study_module, field.name.capitalize(), None)
        names = [(field.name, f.name) for f in msgspec.structs.fields(inner)] if inner else [(field.name,)]
        covered_elsewhere = {
            ("sites",),
            ("task", "data"),
            ("model", "factory"),
            ("training", "algorithm"),
            ("training", "local_epochs"),
            ("privacy", "mechanism"),
            ("privacy", "unit"),
            *(("privacy", key) for key in ("records", "grid", "colluders")),  # in test_distributed
            *(
                ("protocol", key) for key in ("keys", "holder", "statistical_security", "sum_error")
            ),  # in test_homomorphic
        }
        assert set(names) <= covered | covered_elsewhere


def test_a_private_study_and_a_plain_one_have_different_digests():
    assert study(privacy=PRIVATE).digest != study().digest


# --- whatever a file holds


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(0, 5),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["masked", "plain", "csv", "heart-disease", "fedsgd", "local-sgd", "global", "factory", "mlp"]),
    st.sampled_from([1e308, 1e200, 5e-324, 2**64, 10**30, 5000, -1]),
    st.none(),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    *[("task", key) for key in study_module.Task.__struct_fields__],
    *[("model", key) for key in study_module.Model.__struct_fields__],
    *[("training", key) for key in study_module.Training.__struct_fields__],
    *[("server", key) for key in study_module.Server.__struct_fields__],
    *[("protocol", key) for key in study_module.Protocol.__struct_fields__],
    *[("privacy", key) for key in study_module.Privacy.__struct_fields__],
    *[(key,) for key in Study.__struct_fields__],
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(private=st.booleans(), changes=st.lists(st.tuples(st.sampled_from(PATHS), values), min_size=1, max_size=3))
def test_whatever_a_table_holds_the_outcome_is_a_study_with_a_digest_or_one_line(private, changes):
    made = table(**({"privacy": PRIVATE} if private else {}))
    for path, value in changes:
        if len(path) == 1:
            made[path[0]] = value
        elif isinstance(made.setdefault(path[0], {}), dict):
            made[path[0]][path[1]] = value
    with pytest.MonkeyPatch.context() as patch:  # stands in for the TOML reader, so that any tables can be given
        patch.setattr(toml_file.tomllib, "loads", lambda _: made)
        check_outcome(lambda: parse_study(""))


def check_outcome(build):
    """A study that can be agreed on and summed, or one line."""
    try:
        outcome = build()
    except (StudyError, msgspec.ValidationError) as error:
        refusal = str(error)
    else:
        refusal = ""
        assert len(outcome.digest) == 32
        assert outcome.fixed_point.ring_bits <= 64
    assert "\n" not in refusal


EXTREMES = [0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.0, 5e-324, 1e-30, 1e30, 1e200, 1e308, math.inf, math.nan]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
@pytest.mark.parametrize("private", [False, True])
def test_whatever_number_a_field_holds_the_outcome_is_a_study_with_a_digest_or_one_line(private, path):
    for value in EXTREMES:
        changes = {"privacy": PRIVATE} if private else {"task": {"standardize": "global"}}
        made = table(**changes)
        if len(path) == 1:
            made[path[0]] = value
        else:
            made[path[0]] = {**made.get(path[0], {}), path[1]: value}
        check_outcome(partial(converted, made))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_whatever_text_a_file_holds_the_outcome_is_one_line(text):
    with pytest.raises(StudyError) as caught:
        parse_study(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["\\n", "a\\nb", "\\r\\n"])
def test_a_key_with_line_breaks_is_told_in_one_line(key):
    line = refusal(f'"{key}" = 1\n' + TEXT)
    assert "unknown key" in line
    assert "\r" not in line
