"""Feed a decoder with what nobody would send.

    python tests/fuzz/fuzz.py TARGET --seconds 60 [--seed 0] [--memory 2048]

With atheris (`pip install atheris`) the inputs are guided by the coverage of our own code; without, they are the seeds
changed at random. Exits 0 if every input decoded or was a `DecodeError`. An input that was neither is written to the
folder `--crashes` (the current one unless told) and its traceback shown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import resource
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

if not __package__:  # run as a script: then its own folder comes first, and the packages are not to be found
    sys.path[0] = str(Path(__file__).resolve().parents[2])

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None


def built_in(target, seeds, *, seconds=None, inputs=None, seed=0, crashes=None):
    """Mutate the seeds for so long or so many; gives how many inputs there were. An error ends it and names the input.

    Raises:
        AssertionError: An input neither decoded nor was a `DecodeError`; the cause is what it raised.
    """
    from tests.fuzz.mutate import mutants

    until = None if seconds is None else time.monotonic() + seconds
    stream = mutants(seeds, seed)
    for done in count():
        if (inputs is not None and done >= inputs) or (until is not None and time.monotonic() >= until):
            return done
        data = seeds[done] if done < len(seeds) else next(stream)
        try:
            target(data)
        except BaseException as error:
            if crashes is not None:
                Path(crashes, f"crash-{seed}-{done}").write_bytes(data)
            raise AssertionError(f"input {done}: {data.hex()} raised {error!r}") from error
    raise AssertionError("unreachable")


def guided(name, seconds, seed, memory, crashes):
    """Fuzz with atheris; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["secagg", "protocols.messages", "protocols.site", "protocols.fedavg"]):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.make_seeds import SEEDS

    _check(name, TARGETS)
    with tempfile.TemporaryDirectory() as corpus:
        options = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=4096", f"-rss_limit_mb={memory}"]
        options += [f"-artifact_prefix={crashes}/", "-print_final_stats=1", "-timeout=10"]
        atheris.Setup([sys.argv[0], *options, corpus, str(SEEDS / name)], TARGETS[name])
        atheris.Fuzz()


def _check(name, targets):
    if name not in targets:
        sys.exit(f"expected one of {', '.join(targets)}, got {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=2048, help="MiB that the process may hold")
    parser.add_argument("--crashes", type=Path, default=Path(), help="where to write an input that broke the target")
    parser.add_argument("--built-in", action="store_true", help="do without atheris")
    options = parser.parse_args()
    if HAS_ATHERIS and not options.built_in:
        guided(options.target, options.seconds, options.seed, options.memory, options.crashes)
        return
    from tests.fuzz.make_seeds import read_seeds
    from tests.fuzz.targets import TARGETS

    _check(options.target, TARGETS)
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        mapped = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + (options.memory << 20), resource.RLIM_INFINITY))
    done = built_in(
        TARGETS[options.target],
        read_seeds(options.target),
        seconds=options.seconds,
        seed=options.seed,
        crashes=options.crashes,
    )
    print(f"{options.target}: {done} inputs, all decoded or refused")


if __name__ == "__main__":
    main()
