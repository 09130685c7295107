"""A site's own file: what it may say, the roster that it pins, and the one line where something is wrong."""

import os
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dp import Relation
from protocols import site_file
from protocols.errors import KeyFileError, SiteFileError, StateError
from protocols.policy import Policy
from protocols.rosters import PublicKey, new_identity, roster_of, write_roster
from protocols.site_file import load_site
from secagg.keys import Identity, fingerprint
from secagg.masking.params import SUITE
from secagg.prg import deterministic_entropy

SITES = ("north", "south", "west")
DOCUMENT = Path(__file__).parents[2] / "docs" / "site.md"


def swapped_roster(here, name="south"):
    """Someone puts a roster in place in which one site has another key."""
    keys = {**here.keys, name: Identity.generate(deterministic_entropy(b"mallory")).public}
    here.roster.unlink()
    write_roster(here.roster, roster_of([PublicKey(*pair) for pair in keys.items()]))
    return keys[name]


class Here:
    """A folder with a site's files."""

    def __init__(self, folder, sites=SITES):
        self.folder, self.roster, self.file = folder, folder / "roster.toml", folder / "site.toml"
        entropy = deterministic_entropy(b"site file")
        self.keys = {name: new_identity(folder / f"{name}.key", None, entropy).public for name in sites}
        write_roster(self.roster, roster_of([PublicKey(*pair) for pair in self.keys.items()]))
        self.pins = {name: fingerprint(key) for name, key in self.keys.items()}
        self.write()

    def text(self, policy=""):
        pins = "".join(f'"{name}" = "{pin}"\n' for name, pin in self.pins.items())
        return (
            'name = "north"\nidentity = "north.key"\nroster = "roster.toml"\nstate = "north.state"\n'
            f"[policy]\n{policy}\n[fingerprints]\n{pins}"
        )

    def write(self, text=None, **pins):
        self.pins |= pins
        self.file.write_text(self.text() if text is None else text)
        return self

    def refused(self, says, error_type=SiteFileError):
        with pytest.raises(error_type, match=says) as caught:
            load_site(self.file)
        line = str(caught.value)
        assert "\n" not in line
        if error_type is SiteFileError:
            assert line.startswith(f"{self.file}: ")
        return line


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path)


def test_the_least_file_has_the_strict_defaults_and_whole_paths(here, monkeypatch):
    monkeypatch.chdir("/")
    site = load_site(here.file)
    assert site.name == "north"
    assert [m.name for m in site.roster.members] == list(SITES)
    assert site.policy == Policy()
    assert (site.identity, site.state) == (here.folder / "north.key", here.folder / "north.state")
    assert (site.counter, site.data) == (None, None)
    monkeypatch.chdir(here.folder)
    assert load_site("site.toml") == site


def test_everything_that_it_may_say(here):
    policy = (
        f'smallest_cohort = 5\nsmallest_others = 4\nschemes = ["masked", "plain"]\nsuites = ["{SUITE}"]\n'
        "semi_honest = true\nsmallest_difference = 3\nlongest_session = 3600\n"
        'epsilon = 8.0\ndelta = 1e-5\nrelation = "replace-one"\n'
    )
    paths = 'counter = "/mnt/other/count"\ndata = "../rows.csv"\n'
    site = load_site(here.write(paths + here.text(policy)).file)
    assert site.counter == Path("/mnt/other/count")
    assert site.data == here.folder / "../rows.csv"
    assert site.policy == Policy(
        smallest_cohort=5,
        smallest_others=4,
        schemes=("masked", "plain"),
        suites=(SUITE,),
        semi_honest=True,
        smallest_difference=3,
        longest_session=3600,
        epsilon=8.0,
        delta=1e-5,
        relation=Relation.REPLACE_ONE,
    )


# --- the roster that it pins


def test_a_swapped_roster_is_refused_and_the_member_and_both_fingerprints_are_named(here):
    for name in SITES:
        other = fingerprint(swapped_roster(here, name))
        line = here.refused(f"fingerprints.{name}: the roster roster.toml has a key of {name}")
        assert other in line
        assert here.pins[name] in line


def test_a_swapped_roster_passes_without_the_pins(here, monkeypatch):
    swapped_roster(here)
    monkeypatch.setattr(site_file, "_refuse_unpinned", lambda *_: None)
    load_site(here.file)


def test_a_roster_with_one_more_is_refused(here):
    here.roster.unlink()
    entropy = deterministic_entropy(b"site file")
    keys = {**here.keys, "zebra": Identity.generate(lambda n: entropy(96 + n)[96:]).public}
    write_roster(here.roster, roster_of([PublicKey(*pair) for pair in keys.items()]))
    line = here.refused("fingerprints.zebra: expected the fingerprint that zebra told you, got none")
    assert fingerprint(keys["zebra"]) in line


def test_a_roster_with_one_less_is_refused(here):
    here.write(zebra=here.pins["north"]).refused("fingerprints.zebra: nobody of that name is on the roster")


def test_every_member_is_pinned_also_the_site_itself(here):
    for name in SITES:
        pin = here.pins.pop(name)
        here.write().refused(f"fingerprints.{name}: expected the fingerprint that {name} told you")
        here.write(**{name: pin})
    load_site(here.file)


def test_a_site_that_is_not_on_its_roster_is_refused(here):
    here.write(here.text().replace('name = "north"', 'name = "east"'))
    here.refused("name: 'east' is not on the roster, which has north, south, west")


def test_a_fingerprint_may_be_typed_in_capitals_and_without_spaces(here):
    pin = here.pins["south"]
    for typed in (pin.upper(), pin.replace(" ", ""), f"  {pin.replace(' ', '  ')} "):
        load_site(here.write(south=typed).file)
    for typed in ("", "0521", pin[:-1], pin + "0", pin.replace(" ", "-"), "x" * 32, "１" * 32):
        line = here.write(south=typed).refused("fingerprints.south: expected 32 hexadecimal digits")
        assert repr(typed) in line
    digits = pin.replace(" ", "")
    for i in range(32):
        other = digits[:i] + format(int(digits[i], 16) ^ 1, "x") + digits[i + 1 :]
        here.write(south=other).refused("you pinned")


# --- its key and its state


def test_the_key_must_be_the_one_on_the_roster(here):
    assert load_site(here.file).load_identity().public == here.keys["north"]
    here.write(here.text().replace("north.key", "south.key"))
    with pytest.raises(KeyFileError, match="this is another site's key") as caught:
        load_site(here.file).load_identity()
    assert here.pins["north"] in str(caught.value)
    assert here.pins["south"] in str(caught.value)


def test_an_encrypted_key_takes_its_passphrase(here):
    keys = {**here.keys, "north": new_identity(here.folder / "closed.key", "sixteen letters!", os.urandom).public}
    here.roster.unlink()
    write_roster(here.roster, roster_of([PublicKey(*pair) for pair in keys.items()]))
    here.write(here.text().replace("north.key", "closed.key").replace(here.pins["north"], fingerprint(keys["north"])))
    site = load_site(here.file)
    assert site.load_identity("sixteen letters!").public == keys["north"]
    with pytest.raises(KeyFileError, match="is encrypted"):
        site.load_identity()


def test_the_state_is_where_the_file_says(here):
    with load_site(here.file).state_file() as store:
        store.load()
        store.save(b"state")
    assert (here.folder / "north.state").exists()
    assert (here.folder / "north.state.counter").exists()
    (here.folder / "other").mkdir()
    here.write('counter = "other/count"\n' + here.text())
    with load_site(here.file).state_file() as store, pytest.raises(StateError, match="other/count is missing"):
        store.load()


@pytest.mark.parametrize("how", ["{}", "./{}", "{folder}/{}", "link"])
@pytest.mark.parametrize("of", ["north.key", "roster.toml", "rows.csv", "site.toml"])
@pytest.mark.parametrize("key", ["state", "counter"])
def test_a_save_takes_no_other_files_place(here, key, of, how):
    (here.folder / "link").symlink_to(of)
    paths = {"state": "north.state", "counter": "north.counter", key: how.format(of, folder=here.folder)}
    head = "".join(f'{k} = "{v}"\n' for k, v in paths.items())
    here.write(f'data = "rows.csv"\n{head}' + here.text().replace('state = "north.state"\n', ""))
    here.refused(f"a save would write over .*{of}")


@pytest.mark.parametrize("ending", [".counter", ".lock", ".new", ".counter.new"])
def test_nor_does_what_lies_beside_the_state(here, ending):
    (here.folder / "north.key").rename(here.folder / f"north.state{ending}")
    here.write(here.text().replace("north.key", f"north.state{ending}"))
    here.refused("a save would write over identity")


def test_nor_where_a_link_leads(here):
    (here.folder / "north.key").rename(here.folder / "north.state")
    (here.folder / "north.key").symlink_to("north.state")
    here.refused("a save would write over identity")


def test_state_and_counter_are_two_files(here):
    here.write('counter = "./north.state"\n' + here.text()).refused("counter: .*the counter cannot have the name of")


# --- what it says wrongly


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "north"', "", "name: expected a value, got none"),
        ('identity = "north.key"', "", "identity: expected a value, got none"),
        ('roster = "roster.toml"', "", "roster: expected a value, got none"),
        ('state = "north.state"', "", "state: expected a value, got none"),
        ("[fingerprints]", "[finger]", "finger: unknown key; did you mean fingerprints"),
        ("[policy]", "[policies]", "policies: unknown key; did you mean policy"),
        ("[policy]", "[policy]\nsmallest_cohorts = 3", r"policy\.smallest_cohorts: unknown key; did you mean smalle"),
        ("[policy]", '[policy]\nsmallest_cohort = "3"', r"policy\.smallest_cohort: expected a whole number, got text"),
        ("[policy]", "[policy]\nsmallest_cohort = 0", r"policy\.smallest_cohort: expected 1 to 65536 sites, got 0"),
        ("[policy]", "[policy]\nsemi_honest = 1", r"policy\.semi_honest: expected true or false, got a whole number"),
        ("[policy]", '[policy]\nschemes = ["open"]', r'policy\.schemes\[0\]: .*"masked", "plain", got|policy.schemes'),
        ("[policy]", "[policy]\nschemes = []", r"policy\.schemes: expected a list of masked or ckks"),
        ("[policy]", '[policy]\nsuites = ["ROT13"]', r"policy\.suites: expected a list of X25519-"),
        ("[policy]", '[policy]\nlongest_session = "1d"', r"policy\.longest_session: expected a number, got text"),
        ("[policy]", "[policy]\nepsilon = 8.0", r"policy\.epsilon: expected an epsilon and a delta, or neither"),
        ("[policy]", "[policy]\nepsilon = 8.0\ndelta = 2.0", r"policy: delta should be less than 1"),
        ("[policy]", '[policy]\nrelation = "any"', r"policy\.relation: expected .*add-or-remove-one.*"),
        ("[policy]", "[policy]\nlongest_session = nan", r"policy\.longest_session: expected 1 second to 30 days"),
        ('"north.state"', '""', "state: expected a path, got ''"),
        ('"north.state"', '"a\\u0000b"', "state: expected a path, got"),
        ('"north.key"', "7", r"identity: expected text, got a whole number \(7\)"),
        ('name = "north"', 'name = "nor th"', "name: expected a name of 1 to 64 letters"),
        ('name = "north"', 'name = "nor\\nth"', "name: expected a name of 1 to 64 letters"),
        ("[fingerprints]", "[fingerprints]\neast = 7", r"fingerprints\[\.\.\.\]: expected text, got a whole number"),
        ('name = "north"', "name = ", "no valid TOML"),
        ('name = "north"', '"\\n" = 1', "unknown key"),
    ],
)
def test_a_file_that_says_it_wrongly_is_answered_in_one_line(here, old, new, says):
    assert old in here.text()
    here.write(here.text().replace(old, new, 1)).refused(says)


def test_a_file_or_roster_that_cannot_be_read_is_named(here):
    here.roster.write_text("")
    assert here.refused("member: expected a value", KeyFileError).startswith(str(here.roster))
    here.roster.unlink()
    assert here.refused("cannot be read: No such file", KeyFileError).startswith(str(here.roster))
    here.file.write_bytes(b"\xff")
    here.refused("expected a text file in UTF-8")
    here.file.unlink()
    here.refused("cannot be read: No such file")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40), st.integers(0, 400), st.integers(0, 5))
def test_whatever_is_in_the_file_the_outcome_is_a_site_or_one_line(tmp_path, garbage, at, cut):
    here = Here.__new__(Here) if (tmp_path / "north.key").exists() else Here(tmp_path)
    if not hasattr(here, "folder"):
        here.folder, here.roster, here.file = tmp_path, tmp_path / "roster.toml", tmp_path / "site.toml"
        here.pins = dict.fromkeys(SITES, "0" * 32)
    text = here.text()
    here.file.write_bytes((text[:at] + garbage + text[at + cut :]).encode("utf-8", "replace"))
    told = ""
    try:
        load_site(here.file)
    except (SiteFileError, KeyFileError) as error:
        told = str(error)
    assert "\n" not in told


# --- the document


def test_the_site_file_in_the_docs_is_one(here):
    (text,) = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for name, pin in here.pins.items():
        text = re.sub(rf'^{name} = ".*"$', f'{name} = "{pin}"', text, flags=re.MULTILINE)
    site = load_site(here.write(text).file)
    assert site.name == "north"
    assert site.policy == Policy(longest_session=7200, epsilon=8.0, delta=1e-5)


def test_every_key_of_a_site_file_is_documented_with_its_default_and_no_other():
    rows = {}
    section = DOCUMENT.read_text().partition("## site.toml")[2].partition("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            key, default, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            rows[key.strip("`")] = default
    fields = {field.name: field for field in msgspec.structs.fields(site_file._Table)}
    keys = {name for name in fields if name not in ("policy", "fingerprints")}
    keys |= {f"policy.{key}" for key in Policy.__struct_fields__} | {"fingerprints.NAME"}
    assert set(rows) == keys
    for key in Policy.__struct_fields__:
        value = getattr(Policy(), key)
        shown = msgspec.json.encode(value).decode().replace(SUITE, "...") if key != "longest_session" else "86400"
        shown = "none" if value is None else shown
        assert rows[f"policy.{key}"].strip("`").replace(SUITE, "...") == shown, key
