"""A folder to try a deployment with: certificates, keys, every site's files, and the commands that start each part.

Everything in it listens on this machine. Between machines, every site makes its own keys (docs/site.md) and the
certificates come from whoever makes them for the hospitals; the files are the same.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from protocols.deploy_texts import (
    COMPOSE_HEAD,
    COMPOSE_SITE,
    LINK_UNIT,
    NGINX,
    NODE_UNIT,
    README_HEAD,
    README_SITE,
    SITE_UNIT,
)
from protocols.errors import OutputError
from protocols.files import PRIVATE, write_new
from protocols.rosters import PublicKey, new_identity, roster_of, write_public_key, write_roster
from protocols.study import Study, load_study
from protocols.toml_file import read_text
from secagg.keys import Roster, fingerprint

_READABLE = 0o644
_DAYS = 30
_LAST_PORT = 65_535


def deploy(folder: Path, study: Path, *, host: str = "127.0.0.1", port: int = 8000, node_port: int = 9094) -> Roster:
    """Write the folder.

    Args:
        folder: Must not be there yet.
        study: The study file; every site gets a copy.
        host: Address that the link is reached at, by the certificate too.
        port: Of the link.
        node_port: Of the first site's SuperNode, on its own machine; the next ones follow.

    Returns:
        The roster, to compare fingerprints.

    Raises:
        StudyError: The study file cannot be used.
        OutputError: The folder is there already, or cannot be written; or there is no such address or port.
    """
    if not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", host):
        raise OutputError(f"host: expected the name or address of the link, got {host!r}")
    loaded = load_study(study)
    last = node_port + len(loaded.sites) - 1
    if not (1 <= port <= _LAST_PORT and 1 <= node_port <= last <= _LAST_PORT):
        raise OutputError(
            f"expected ports from 1 to {_LAST_PORT}, got {port} for the link and {node_port} to {last} for the nodes"
        )
    if taken := sorted({"link", "home", ".", ".."} & set(loaded.site_names)):
        raise OutputError(f"sites: {', '.join(taken)} cannot be a folder beside link and home; name it otherwise")
    text = read_text(study, OutputError)
    folder, study = folder.absolute(), study.absolute()
    if os.path.lexists(folder):
        raise OutputError(f"{folder} exists already; name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            roster = _fill(partial, folder, loaded, text, study, host, port)
            _commands(partial, folder, loaded.site_names, host, port, node_port, study)
            partial.chmod(0o755)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise OutputError(f"{folder}: could not be written: {error.strerror or error}; name a new folder") from error
    return roster


def _fill(partial: Path, folder: Path, study: Study, text: str, path: Path, host: str, port: int) -> Roster:
    """Keys, certificates and everybody's files, in a folder that will have another name."""
    for name in ("link", "home"):
        (partial / name).mkdir()
    _certificates(partial, host)
    for name in study.site_names:
        (partial / name).mkdir(mode=0o700)
    roster = roster_of([_keys(partial / name, name) for name in study.site_names])
    write_roster(partial / "link" / "roster.toml", roster)
    _write(partial / "link" / "link.toml", _link_toml(host, port))
    _write(
        partial / "home" / "config.toml",
        f'[superlink]\ndefault = "secagg"\n\n[superlink.secagg]\naddress = "{host}:{port}"\n'
        f'root-certificates = "{folder / "ca.crt"}"\n',
    )
    for entry in study.sites:
        write_roster(partial / entry.name / "roster.toml", roster)
        _write(partial / entry.name / "study.toml", text)
        data = os.path.relpath(path.parent / entry.data, folder / entry.name) if entry.data is not None else None
        _write(partial / entry.name / "site.toml", _site_toml(entry.name, roster, data))
    return roster


def _write(path: Path, text: str, mode: int = _READABLE) -> None:
    write_new(path, text.encode(), mode)


def _keys(folder: Path, name: str) -> PublicKey:
    """A site's identity, and the key by which the link knows its node."""
    made = PublicKey(name, new_identity(folder / "site.key", None, os.urandom).public)
    write_public_key(folder / "site.pub", made)
    node = ec.generate_private_key(ec.SECP384R1())
    write_new(folder / "node.key", node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), PRIVATE)
    write_new(
        folder / "node.pub", node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n", _READABLE
    )
    return made


def _certificates(folder: Path, host: str) -> None:
    """A certificate authority of this folder's own, and the link's certificate by it."""
    now = datetime.datetime.now(datetime.UTC)
    ends = now + datetime.timedelta(days=_DAYS)
    authority_key, link_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "secagg trial")])
    made = (
        x509.CertificateBuilder()
        .subject_name(authority)
        .issuer_name(authority)
        .public_key(authority_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    link = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "secagg link")]))
        .issuer_name(authority)
        .public_key(link_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .add_extension(_usage(signs=False), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    private = link_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new(folder / "ca.crt", made.public_bytes(Encoding.PEM), _READABLE)
    write_new(folder / "link" / "server.crt", link.public_bytes(Encoding.PEM), _READABLE)
    # The authority's own key is not kept: it signs this one certificate.
    write_new(folder / "link" / "server.key", private, PRIVATE)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _names(host: str) -> list[x509.GeneralName]:
    """What the link is called: by its own processes, among the containers of the compose file, and by hospitals."""
    loopback = ipaddress.ip_address("127.0.0.1")
    ours: list[x509.GeneralName] = [x509.IPAddress(loopback), x509.DNSName("localhost"), x509.DNSName("link")]
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return ours if address == loopback else [*ours, x509.IPAddress(address)]
    return [*ours, x509.DNSName(host)]


def _link_toml(host: str, port: int) -> str:
    return f'address = "{host}:{port}"\nroot_certificates = "../ca.crt"\nroster = "roster.toml"\n'


def _site_toml(name: str, roster: Roster, data: str | None) -> str:
    lines = [f'name = "{name}"', 'identity = "site.key"', 'roster = "roster.toml"', 'state = "site.state"']
    if data is not None:
        lines.append(f'data = "{data}"')
    pinned = [f'{member.name} = "{fingerprint(member.identity)}"' for member in roster.members]
    return "\n".join(
        [*lines, "", "[fingerprints]", *(f'"{p.split(" = ")[0]}" = {p.split(" = ")[1]}' for p in pinned), ""]
    )


def _commands(
    partial: Path, folder: Path, names: tuple[str, ...], host: str, port: int, node_port: int, study: Path
) -> None:
    """The README, and the same commands for systemd, nginx and containers."""
    here = Path(sys.executable).parent
    values = {"bin": shlex.quote(str(here)), "folder": shlex.quote(str(folder)), "host": host, "port": port}
    readme = [README_HEAD.format(**values, days=_DAYS)]
    compose = [COMPOSE_HEAD.format(port=port)]
    readme += [README_SITE.format(**values, name=name, node_port=node_port + i) for i, name in enumerate(names)]
    readme += [
        "## Run the study\n\n```sh\n"
        f"{values['bin']}/secagg run {shlex.quote(str(study))} --engine flower \\\n"
        f"  --link {values['folder']}/link/link.toml\n"
        "```\n"
    ]
    compose += [COMPOSE_SITE.format(name=name, port=port) for name in names]
    compose.append("volumes:\n" + "".join(f"  {name}:\n" for name in names))
    _write(partial / "README.md", "\n".join(readme))
    _write(partial / "compose.yaml", "".join(compose))
    _write(partial / "link" / "nginx.conf", NGINX.format(host=host, port=port))
    _write(partial / "link" / "secagg-link.service", LINK_UNIT.format(port=port))
    for name in names:
        _write(partial / name / "secagg-site.service", SITE_UNIT)
        _write(partial / name / "secagg-node.service", NODE_UNIT.format(host=host, node_port=node_port))
