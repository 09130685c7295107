"""The tool that removes guards removes what it says, and knows every guard by one name."""

from __future__ import annotations

import pytest
from cosmic_ray.mutating import mutate_code

from tests.guards.operators import OPERATORS
from tests.guards.run import find_guards, load_config, sample

EXAMPLES = [(name, example) for name, operator in OPERATORS.items() for example in operator.examples()]


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)])
def test_an_operator_does_what_its_examples_say(name, example):
    mutated = mutate_code(example.pre_mutation_code, OPERATORS[name](), example.occurrence)
    assert (example.pre_mutation_code if mutated is None else mutated) == example.post_mutation_code


@pytest.fixture(scope="module")
def guards():
    return find_guards()


def test_the_guards_of_every_module_are_found_and_each_has_a_name_of_its_own(guards):
    assert len({guard.key for guard in guards}) == len(guards) > 100
    assert {guard.operator for guard in guards} == OPERATORS.keys()
    assert {"secagg/keys.py", "secagg/masking/server.py", "secagg/wire.py"} <= {guard.key.file for guard in guards}


def test_every_justification_is_of_a_guard_that_is_there(guards):
    assert load_config().justified.keys() <= {guard.key for guard in guards}


def test_a_guards_name_outlives_moving_and_laying_out_anew(tmp_path):
    def names(text):
        (tmp_path / "secagg").mkdir(exist_ok=True)
        (tmp_path / "secagg/a.py").write_text(text)
        return [guard.key for guard in find_guards(tmp_path)]

    before = names("class A:\n    def f(self, a):\n        if a or (self.b == 'c'):\n            raise X('one')\n")
    text = 'class A:\n    def f(self, a):\n        if (\n            a\n            or (self.b == "c")  # why'
    assert before == names(f"\n\n{text}\n        ):\n            raise X('another')\n")
    assert [key.guard for key in before] == [
        "a in: if a or self.b == 'c'",
        "self.b == 'c' in: if a or self.b == 'c'",
        "if a or self.b == 'c': raise X",
    ]
    assert {key.function for key in before} == {"A.f"}


def test_a_sample_is_the_same_for_the_same_seed_and_leaves_no_module_out(guards):
    chosen = sample(guards, 30, "seed")
    assert chosen == sample(guards, 30, "seed") != sample(guards, 30, "other")
    assert len(set(chosen)) == 30
    assert {guard.key.file for guard in chosen} == {guard.key.file for guard in guards}
    assert sample(guards, 10**6, "seed") == sorted(guards)
