"""A deployment on loopback, started by the very commands that its README gives, and ended process by process."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protocols.deploy import deploy

STUDY = """\
name = "heart"
rounds = {rounds}
sites = [{{ name = "cleveland" }}, {{ name = "hungarian" }}, {{ name = "switzerland" }}, {{ name = "va" }}]
{more}
"""
SITES = ("cleveland", "hungarian", "switzerland", "va")


def free_ports(count):
    """A run of ports that nobody listens on."""
    for _ in range(50):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    """A process's descendants."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdecimal() and int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(entry.name), *children(int(entry.name))]
    return found


class Deployment:
    """Four hospitals and a link. `with` ends whatever was started, by its id."""

    def __init__(self, *, rounds=2, more="", patience="", sites=SITES):
        # Not below pytest's folder: the path of a socket is short.
        self._home = tempfile.TemporaryDirectory(prefix="secagg-")
        self.base = Path(self._home.name)
        self.folder = self.base / "d"
        self.study = self.base / "study.toml"
        self.study.write_text(STUDY.format(rounds=rounds, more=more))
        port = free_ports(6)
        deploy(self.folder, self.study, port=port, node_port=port + 1)
        self.link_toml = self.folder / "link" / "link.toml"
        patience = patience or "gather = 60.0\nstage = 60.0\nresend = 20.0\nabsent = 5.0\n"
        self.link_toml.write_text(self.link_toml.read_text() + "\n[patience]\n" + patience)
        self.sites = sites
        self.running = {}
        self.runs = 0

    def __enter__(self):
        try:
            self.start("link", self.commands("The link")[0])
            self.wait_for("link", "Application startup complete|running on|Uvicorn")
            for site in self.sites:
                self.register(site)
            for site in self.sites:
                self.start_site(site)
                self.start_node(site)
            for site in self.sites:
                self.wait_for(f"{site}-site", "answers on")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in reversed(list(self.running)):
            self.end(name)
        if keep := os.environ.get("KEEP_LOGS"):
            import shutil

            shutil.copytree(self.base, keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
        self._home.cleanup()

    def commands(self, heading):
        """The shell blocks under a heading of the README."""
        text = (self.folder / "README.md").read_text()
        section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)

    def register(self, site):
        done = subprocess.run(
            ["bash", "-ec", self.commands(site)[0]], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start_site(self, site, command=None):
        self.start(f"{site}-site", command or self.commands(site)[1])

    def start_node(self, site):
        self.start(f"{site}-node", self.commands(site)[2])

    def start(self, name, command):
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                ["bash", "-ec", command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def log(self, name):
        return self.base / f"{name}.log"

    def told(self, name):
        return self.log(name).read_text(errors="replace") if self.log(name).exists() else ""

    def wait_for(self, name, pattern, seconds=60):
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if found := re.search(pattern, self.told(name)):
                return found
            if name in self.running and self.running[name].poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"{name} did not say {pattern!r}:\n{self.told(name)[-3000:]}")

    def kill(self, name):
        """kill -9, as when the power fails: the process and what it started, each by its id."""
        process = self.running.pop(name)
        for pid in (process.pid, *children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def end(self, name):
        process = self.running.pop(name)
        started = children(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in (process.pid, *started):
            if alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()

    def run(self, *arguments, out=None):
        """Start `secagg run` on the link; gives its name, to wait for."""
        self.runs += 1
        name = f"run{self.runs}"
        out = out or self.base / f"out{self.runs}"
        command = [
            str(Path(sys.executable).with_name("secagg")),
            *("run", str(self.study), "--engine", "flower", "--link", str(self.link_toml), "--out", str(out)),
            *arguments,
        ]
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return name, out

    def ended(self, name, seconds=240):
        """The exit code of a run."""
        try:
            return self.running[name].wait(seconds)
        except subprocess.TimeoutExpired:
            tails = "\n".join(f"--- {part}\n{self.told(part)[-1500:]}" for part in [name, *self.running])
            raise AssertionError(f"{name} did not end:\n{tails}") from None
        finally:
            if self.running[name].poll() is not None:
                del self.running[name]

    def server_app(self):
        """The process of the server app, which the link has started."""
        for pid in children(self.running["link"].pid):
            with contextlib.suppress(OSError):
                if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        raise AssertionError("no server app runs")
