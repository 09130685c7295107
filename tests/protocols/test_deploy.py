"""The folder that `secagg deploy init` writes: what is in it fits together, and nothing of it is left half made."""

import os
import re
import shlex
import shutil
import ssl
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest

from protocols import deploy as deploying
from protocols.deploy import deploy
from protocols.errors import OutputError
from protocols.rosters import load_roster
from protocols.site_file import load_site
from protocols.study import load_study
from secagg.keys import fingerprint
from tests.protocols.hospitals import command as secagg

SITES = ("cleveland", "hungarian", "switzerland", "va")
STUDY = 'name = "heart"\nrounds = 1\nsites = [{}]\n'
CSV = """\
name = "rows"
rounds = 1
sites = [{ name = "a", data = "rows/a.csv" }, { name = "b", data = "rows/b.csv" }, { name = "c", data = "/rows/c.csv" }]
task = { data = "csv", features = ["x"], target = "y" }
"""


def study(folder, names=SITES, text=None):
    path = folder / "study.toml"
    path.write_text(text or STUDY.format(", ".join(f'{{ name = "{name}" }}' for name in names)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    deploy(folder / "trial", study(folder), host="link.example", port=8443, node_port=9100)
    return folder / "trial"


def test_every_sites_files_load_under_one_roster_and_its_own_key(made):
    rosters = [load_roster(made / "link" / "roster.toml")]
    for name in SITES:
        file = load_site(made / name / "site.toml")
        assert file.name == name
        assert file.load_identity().public == file.roster.members[file.roster.number(name)].identity
        assert load_study(made / name / "study.toml") == load_study(made.parent / "study.toml")
        rosters.append(file.roster)
    assert all(roster == rosters[0] for roster in rosters)
    assert [member.name for member in rosters[0].members] == list(SITES)


def test_secrets_are_closed_to_everybody_else(made):
    secrets = [made / "link" / "server.key"] + [made / name / key for name in SITES for key in ("site.key", "node.key")]
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    found = [path for path in made.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(found) == sorted(secrets)
    assert all(stat.S_IMODE((made / name).stat().st_mode) == 0o700 for name in SITES)
    contents = [path.read_bytes() for path in secrets]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize(
    ("name", "accepted"), [("link.example", True), ("127.0.0.1", True), ("link", True), ("other.example", False)]
)
def test_the_links_certificate_holds_for_its_names_by_the_authority_that_sites_have(made, name, accepted):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / "link" / "server.crt", made / "link" / "server.key")
    client = ssl.create_default_context(cafile=made / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(theirs, ours, server_hostname=name)
    answering = server.wrap_bio(ours, theirs, server_side=True)

    def shake():
        done = [False, False]
        while not all(done):
            for i, side in enumerate((asking, answering)):
                try:
                    side.do_handshake()
                    done[i] = True
                except ssl.SSLWantReadError:
                    continue

    if accepted:
        shake()
        return
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake()


def test_the_readme_has_a_block_for_each_part_and_all_that_it_names_is_there(made):
    text = (made / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1 + 3 * len(SITES) + 1
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["The link", *SITES, "Run the study"]
    named = {word for block in blocks for word in shlex.split(block) if word.startswith(str(made))}
    assert named
    assert all(Path(word.rstrip(";")).exists() for word in named), named
    assert len(set(re.findall(r"--port (\d+)", text))) == 1 + len(SITES)
    subprocess.run(["bash", "-n"], input="\n".join(blocks), text=True, check=True)


def test_paths_of_rows_lead_to_the_same_files_from_a_sites_folder(tmp_path):
    deploy(tmp_path / "deep" / "trial", study(tmp_path, text=CSV))
    own = {name: load_site(tmp_path / "deep" / "trial" / name / "site.toml").data for name in "abc"}
    assert {name: Path(os.path.normpath(path)) for name, path in own.items()} == {
        "a": tmp_path / "rows" / "a.csv",
        "b": tmp_path / "rows" / "b.csv",
        "c": Path("/rows/c.csv"),
    }


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_units_are_units(made, tmp_path):
    for unit in (made / "link" / "secagg-link.service", *(made / "va").glob("*.service")):
        copy = tmp_path / unit.name
        # What it starts is not installed here.
        copy.write_text(re.sub(r"/opt/secagg/bin/[\w-]+", "/bin/true", unit.read_text()))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
        )
        assert unit.name not in done.stderr, done.stderr


def test_only_the_calls_of_nodes_pass_from_outside(made):
    text = (made / "link" / "nginx.conf").read_text()
    assert re.findall(r"location (\S+) ", text) == ["/v1/fleet/", "/"]
    assert re.search(r"location / {\s+return 403;", text)
    assert "--host 127.0.0.1" in (made / "link" / "secagg-link.service").read_text()


refused = [
    ({"host": "a b"}, "host: expected the name or address of the link, got 'a b'"),
    ({"port": 0}, "expected ports from 1 to 65535, got 0 for the link"),
    ({"node_port": 65_534}, "65534 to 65537 for the nodes"),
]


@pytest.mark.parametrize(("given", "says"), refused)
def test_an_address_that_cannot_be_is_refused_before_anything_is_written(tmp_path, given, says):
    with pytest.raises(OutputError, match=says):
        deploy(tmp_path / "trial", study(tmp_path), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize("name", ["link", "home", ".."])
def test_a_site_whose_name_is_taken_is_refused(tmp_path, name):
    text = CSV.replace('name = "a"', f'name = "{name}"')
    with pytest.raises(OutputError, match=re.escape(name)):
        deploy(tmp_path / "trial", study(tmp_path, text=text))
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "trial").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        deploy(tmp_path / "trial", study(tmp_path))
    assert not list((tmp_path / "trial").iterdir())


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, content, mode):
        if path.name == "compose.yaml":
            raise OSError(28, "No space left on device")
        written(path, content, mode)

    written = deploying.write_new
    monkeypatch.setattr(deploying, "write_new", full)
    with pytest.raises(OutputError, match="No space left on device"):
        deploy(tmp_path / "trial", study(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_the_command_shows_fingerprints_and_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(tmp_path)
    run = partial(secagg, "deploy", "init", "trial", "--study")
    done = run("study.toml")
    assert done.exit_code == 0, done.output
    head, *lines = done.stdout.splitlines()
    assert head.startswith("trial/README.md")
    shown = dict(re.split(r"\s+", line, maxsplit=1) for line in lines)
    assert shown == {m.name: fingerprint(m.identity) for m in load_roster(Path("trial/link/roster.toml")).members}
    again = run("study.toml")
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    missing = run("other.toml")
    assert missing.exit_code == 2
    assert "other.toml" in missing.stderr
