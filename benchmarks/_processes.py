"""What this process and all that it has started take: CPU seconds and resident memory, from /proc. Linux only."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


def family() -> dict[int, list[str]]:
    """Processes that descend from this one, itself too, with the fields of their stat files after the name."""
    stats = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                # The name is in brackets and may hold anything.
                stats[int(folder.name)] = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue  # it has ended
    members = {os.getpid()}
    grown = True
    while grown:
        more = {pid for pid, fields in stats.items() if int(fields[1]) in members}
        grown = not more <= members
        members |= more
    return {pid: stats[pid] for pid in members if pid in stats}


def cpu_seconds() -> float:
    """User and system time of the family so far, with that of members that have ended and were waited for."""
    return sum(sum(map(int, fields[11:15])) for fields in family().values()) / TICKS


class PeakMemory:
    """Watches the family's resident memory in a thread; a context manager.

    Attributes:
        together: The largest sum of resident sizes, bytes. What processes share is in it once for each of them.
    """

    def __init__(self, every: float = 0.25) -> None:
        self.together = 0
        self._every, self._ended = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self.together = max(self.together, sum(int(fields[21]) for fields in family().values()) * PAGE)


def peak_of_self() -> int:
    """Bytes: the most that this process had resident."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
