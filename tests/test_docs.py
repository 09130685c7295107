"""What the documents show is what happens."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path

import msgspec
import pytest

from protocols.study import Study, demo_study, parse_study

ROOT = Path(__file__).parent.parent


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
    for path in re.findall(r"`(secagg(?:\.\w+)+)`", text):
        assert pkgutil.resolve_name(path)


def test_the_demo_is_private_and_masked():
    study = demo_study()
    assert study.private
    assert study.protocol.aggregation == "masked"
    assert study.protocol.mode == "active"


@pytest.mark.parametrize("document", ["README.md", "docs/protocol.md", "docs/threat_model.md", "SECURITY.md"])
def test_links_between_documents_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
