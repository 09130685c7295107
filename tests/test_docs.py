"""What the documents show is what happens."""

from __future__ import annotations

import ast
import pkgutil
import re
import runpy
from pathlib import Path

import msgspec
import pytest

from protocols.agreement import Agreement, parse_agreement
from protocols.study import Study, demo_study, parse_study

ROOT = Path(__file__).parent.parent
DIAGRAMS, NOTEBOOK = (runpy.run_path(str(ROOT / "docs" / name)) for name in ("diagrams.py", "attacks.py"))
ATTACKS = NOTEBOOK["attacks"]((ROOT / "docs" / "attacks.md").read_text(encoding="utf-8"))


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_example(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(ROOT / "docs" / "examples" / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_opposite_gradients_leave_every_model_at_zero(capsys):
    lines = run_example("averaged_gradient.py", capsys)
    assert lines == [f"round {n}: mean gradient [0. 0.], theta [0. 0.]" for n in (1, 2, 3)]


def test_two_clients_learn_over_ten_rounds_of_federated_averaging(capsys):
    lines = run_example("two_clients.py", capsys)
    losses = [float(re.search(r"loss (\d\.\d+)", line)[1]) for line in lines]
    assert len(lines) == 10
    assert losses == sorted(losses, reverse=True)
    assert lines[-1].endswith("accuracy 1.000")


def test_the_readme_python_runs(capsys):
    sources = blocks("README.md", "python")
    assert sources
    for source in sources:
        exec(compile(source, "README.md", "exec"), {})
    assert "[2. 3.]" in capsys.readouterr().out


def test_the_study_file_in_the_docs_is_a_study():
    (text,) = blocks("docs/study.md", "toml")
    assert parse_study(text).site_names == ("north", "south", "west")


def test_what_privacy_costs_is_what_was_measured():
    """Every line of the tables of docs/study.md, and README's figures in their order."""
    content = msgspec.json.decode((ROOT / "benchmarks" / "results" / "dp_heart.json").read_bytes())
    measured = {figure["name"]: figure["value"] for figure in content["figures"]}
    assert not content["quick"]
    assert not content["missed"]
    section = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").partition("## What privacy costs")[2]
    rows = re.findall(r"^\| ([\w, -]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert len(rows) == 8
    shown = {}
    for name, *values in rows:
        setting = "distributed-sgd" if name == "everyone" else name
        shown[setting] = [f"{measured[f'epsilon {e}, {setting}: AUC']:.3f}" for e in (1, 3, 8)]
        assert values == shown[setting], name
    told = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("Noise inside the secure sum")[2].partition("##")[0]
    )
    figures = [value for way in ("distributed-sgd", "central", "local-sgd") for value in shown[way]]
    assert [f"0{value}" for value in re.findall(r"(?<!\d)\.\d{3}", told)] == [
        *figures,
        f"{measured['no privacy: AUC']:.3f}",
    ]


def test_the_agreement_in_the_docs_is_one_and_every_key_is_told():
    (text,) = blocks("docs/flower_app.md", "toml")
    assert parse_agreement(text).site_names == ("cleveland", "hungarian", "switzerland", "va")
    told = (ROOT / "docs" / "flower_app.md").read_text(encoding="utf-8")
    for field in msgspec.structs.fields(Agreement):
        tables = {"protocol": "protocol.mode", "train": "train.NAME", "evaluate": "evaluate.NAME"}
        assert f"`{tables.get(field.name, field.name)}`" in told, field.name


def test_what_a_round_over_flower_costs_is_what_was_measured():
    content = msgspec.json.decode((ROOT / "benchmarks" / "results" / "flower.json").read_bytes())
    measured = {figure["name"]: figure["value"] for figure in content["figures"]}
    assert not content["quick"]
    assert not content["missed"]
    text = (ROOT / "docs" / "flower.md").read_text(encoding="utf-8").partition("## What a round costs")[2]
    kind, rows = "", 0
    for name, *values in re.findall(
        r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE
    ):
        named = {"CPU-s at all clients": "clients", "CPU-s of all": "all processes", "seconds on": "wall"}
        kind = next((short for long, short in named.items() if name.startswith(long)), kind)
        side = "ours / theirs" if name.startswith("ratio") else name.rpartition(", ")[2]
        figures = [(n, drop) for n in (4, 20) for drop in ("full", "drop-out")]
        for value, (n, drop) in zip(values, figures, strict=True):
            key = f"n={n}, {drop}: {kind}, {side}" if side == "ours / theirs" else f"n={n}, {side}, {drop}: {kind}"
            assert abs(float(value) - measured[key]) <= 0.51 * 10 ** -len(value.partition(".")[2]), key
        rows += 1
    assert rows == 9
    told = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("Over Flower, in the same")[2].partition("\n\n")[0]
    )
    expected = [f"{measured[f'n={n}, full: clients, ours / theirs']:.2f}" for n in (20, 4)]
    expected += [f"{measured[f'n={n}, ours: upload']:.1f}" for n in (20, 4)]
    expected += [f"{measured['n=20, theirs: upload']:.1f}"]
    expected += [f"{measured['n=200, a tenth drops out: peak memory of all processes together'] / 1000:.1f}"]
    assert re.findall(r"\d\.\d+", told) == expected


def documented_keys() -> set[str]:
    """Paths named in the first column of the table of docs/study.md; a bare name continues the row's first table."""
    keys = set()
    for line in (ROOT / "docs" / "study.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names = re.findall(r"`([\w.]+)`", line.split("|")[1])
            table = names[0].rpartition(".")[0]
            keys |= {name if "." in name or not table else f"{table}.{name}" for name in names}
    return keys


def test_every_key_of_a_study_is_documented_and_no_other():
    expected = set()
    for field in msgspec.structs.fields(Study):
        inner = field.type if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) else None
        names = [f"{field.name}.{f.name}" for f in msgspec.structs.fields(inner)] if inner else [field.name]
        expected |= set(names)
    mentioned = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert documented_keys() <= expected
    for key in expected - documented_keys():
        assert f"`{key}" in mentioned, key


def test_every_function_that_the_protocol_document_names_exists():
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    homes = {"client": "secagg.masking.client", "server": "secagg.masking.server"}
    for home, name in re.findall(r"`(client|server)\.(\w+)`", text):
        assert pkgutil.resolve_name(f"{homes[home]}.{name}")
    for path in re.findall(r"`((?:secagg|protocols)(?:\.\w+)+)`", text):
        assert pkgutil.resolve_name(path)


def test_the_diagrams_are_what_the_code_gives():
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert DIAGRAMS["written"](text) == text, "python docs/diagrams.py writes them"


@pytest.mark.parametrize("name", ["participant", "server", "site", "trips"])
def test_a_block_that_the_document_has_no_place_for_is_told(name):
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=f"expected <!-- {name}: .* found them 0 times"):
        DIAGRAMS["written"](text.replace(f"<!-- end of {name} -->", ""))


def test_every_state_and_every_step_of_a_module_is_in_its_diagram():
    for home, states in (("client", "CLIENT_STATES"), ("server", "SERVER_STATES")):
        module = pkgutil.resolve_name(f"secagg.masking.{home}")
        arrows = DIAGRAMS["arrows"](module, DIAGRAMS[states])
        assert {kind for arrow in arrows for kind in (arrow.source, arrow.target)} == {None, *DIAGRAMS[states]}
        named = re.findall(rf"`{home}\.(\w+)`", (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8"))
        assert {arrow.function for arrow in arrows} - {"start"} <= set(named)


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.title for attack in ATTACKS])
def test_an_attack_succeeds_without_the_guard_and_fails_here(attack):
    assert NOTEBOOK["run_without"](attack) == attack.without
    assert NOTEBOOK["run_here"](attack) == attack.here


@pytest.mark.parametrize("source", ["", "if a:\n    b()\n" * 2], ids=["gone", "twice"])
def test_a_guard_that_is_not_where_the_document_says_is_told(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    with pytest.raises(ValueError, match=f"expected these lines once, found them {len(source) // 12} times"):
        NOTEBOOK["remove"]("--- a.py\n-if a:\n-    b()\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == source


@pytest.mark.parametrize("document", ["attacks.md", "threat_model.md"])
def test_every_test_and_module_that_a_document_names_exists(document):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    named = re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", text)
    assert len(named) == text.count("::")
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
    for path in re.findall(r"`((?:secagg|protocols|dp)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_line_of_the_threat_model_is_shown_by_a_test():
    text = (ROOT / "docs" / "threat_model.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for row in table.splitlines()[2:]:
        assert "::test_" in row.split("|")[4], row


def test_the_demo_is_private_and_masked():
    study = demo_study()
    assert study.private
    assert study.protocol.aggregation == "masked"
    assert study.protocol.mode == "active"


@pytest.mark.parametrize(
    "document",
    ["README.md", "SECURITY.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))],
)
def test_links_between_documents_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
