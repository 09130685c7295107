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


class Processes:
    """Processes that a test starts, each with a log, a name and a folder. `with` ends all of them by their ids."""

    def __init__(self, base, environment=None):
        self.base = Path(base)
        self.running = {}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in reversed(list(self.running)):
            self.end(name)

    def done(self, command, folder=None, seconds=600):
        """What a shell command told that came to a proper end."""
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
            env=self.environment,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{self.tails()}"
        return done.stdout

    def start(self, name, command, folder=None):
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                ["bash", "-ec", command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment,
            )

    def log(self, name):
        return self.base / f"{name}.log"

    def told(self, name):
        return self.log(name).read_text(errors="replace") if self.log(name).exists() else ""

    def tails(self):
        return "\n".join(f"--- {name}\n{self.told(name)[-1500:]}" for name in self.running)

    def wait_for(self, name, pattern, seconds=120):
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if found := re.search(pattern, self.told(name)):
                return found
            if name in self.running and self.running[name].poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"{name} did not say {pattern!r}:\n{self.told(name)[-3000:]}\n{self.tails()}")

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
        for pid in started:  # a shell ends, and leaves what it waits for
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        ends = time.monotonic() + 10
        while time.monotonic() < ends and any(alive(pid) for pid in (process.pid, *started)):
            process.poll()
            time.sleep(0.05)
        for pid in (process.pid, *started):
            if alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()

    def ended(self, name, seconds=240):
        """The exit code of a process that ends by itself."""
        try:
            code = self.running[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end:\n{self.told(name)[-3000:]}\n{self.tails()}") from None
        del self.running[name]
        return code


class Deployment(Processes):
    """Four hospitals and a link, by the commands of the README that `secagg deploy init` writes."""

    def __init__(self, *, rounds=2, more="", patience="", sites=SITES):
        # Not below pytest's folder: the path of a socket is short.
        self._home = tempfile.TemporaryDirectory(prefix="secagg-")
        super().__init__(self._home.name)
        self.folder = self.base / "d"
        self.study = self.base / "study.toml"
        self.study.write_text(STUDY.format(rounds=rounds, more=more))
        port = free_ports(6)
        deploy(self.folder, self.study, port=port, node_port=port + 1)
        self.link_toml = self.folder / "link" / "link.toml"
        patience = patience or "gather = 60.0\nstage = 60.0\nresend = 20.0\nabsent = 5.0\n"
        self.link_toml.write_text(self.link_toml.read_text() + "\n[patience]\n" + patience)
        self.sites = sites
        self.runs = 0

    def __enter__(self):
        try:
            self.start("link", self.commands("The link")[0])
            self.wait_for("link", "Uvicorn running on")
            for site in self.sites:
                self.done(self.commands(site)[0])
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
        super().__exit__()
        self._home.cleanup()

    def commands(self, heading):
        """The shell blocks under a heading of the README."""
        text = (self.folder / "README.md").read_text()
        section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)

    def start_site(self, site):
        self.start(f"{site}-site", self.commands(site)[1])

    def start_node(self, site):
        self.start(f"{site}-node", self.commands(site)[2])

    def run(self, *arguments, out=None):
        """Start `secagg run` on the link; gives its name, to wait for."""
        self.runs += 1
        name = f"run{self.runs}"
        out = out or self.base / f"out{self.runs}"
        command = self.commands("Run the study")[0].rstrip()
        self.start(name, f"exec {command} --out {out} {' '.join(arguments)}")
        return name, out

    def server_app(self):
        """The process of the server app, which the link has started."""
        for pid in children(self.running["link"].pid):
            with contextlib.suppress(OSError):
                if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        raise AssertionError("no server app runs")
