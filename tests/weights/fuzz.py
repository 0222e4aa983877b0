"""What do damaged and hostile weight files do to us? Each must end in success or in a UsageError.

    python tests/weights/fuzz.py --files 20000        (prints counts by kind of mutation and outcome)

Files are made from small seeds by seeded random mutations (mutations.py): the same command makes the same files. They
are read in child processes that cap their own memory, stop after SECONDS per file, and watch Python's audit events: an
import, a program started, a file opened other than the one being read, anything not in QUIET_EVENTS is a defect, as is
every exception but UsageError, and the file CANARY that the hostile pickles try to make.
"""

import argparse
import codecs
import collections
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from mutations import MUTATIONS, seeds, truncate

SECONDS, MEMORY = 5, 768 * 2**20  # per file; beyond what the process has after its imports
BATCH = 1000
QUIET_EVENTS = {"open", "mmap.__new__", "mmap.__enter__", "os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob"}
QUIET_EVENTS |= {"object.__getattr__", "sys._getframe", "array.__new__", "builtins.id"}


def write(case: pathlib.Path, content) -> pathlib.Path:
    """Puts a case on disk; returns what to open."""
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    if isinstance(content, bytes):
        (case / "weights.pt").write_bytes(content)
        return case / "weights.pt"
    for name, part in content.items():
        (case / name).write_bytes(part)
    os.symlink(".", case / "loop")
    return case


class Overtime(BaseException):
    """A file took longer than SECONDS."""


def read(path: pathlib.Path) -> str:
    """Opens `path`, reads every tensor and walks the rest; "read" or "refused", anything else is raised."""
    from deco_jax.errors import UsageError
    from deco_jax.weights.files import open_weights

    try:
        weights = open_weights(path)
        for tensor in weights.tensors.values():
            tensor.numpy()
        repr((weights.rest, weights.metadata, weights.config)).encode()
    except UsageError as e:
        message = str(e)
        message.encode()
        assert message.startswith(str(path.parent)) and len(message) < 1500 and "\n" not in message, message
        return "refused"
    return "read"


def child(first: int, last: int, seed: int, workdir: pathlib.Path) -> None:
    """Reads the cases `first` to `last`; prints {"counts": …, "defects": …, "slowest": …, "peak": …}."""
    canary, case, found = workdir / "CANARY", workdir / "case", seeds()
    events, armed = [], False

    def watch(event, arguments):
        if armed and (
            event not in QUIET_EVENTS
            or (event == "open" and (not str(arguments[0]).startswith(str(case)) or "w" in str(arguments[1])))
        ):
            events.append(f"{event}{arguments}"[:200])

    def overtime(*_):
        raise Overtime

    for content in [*found.values(), b"", *(truncate(random.Random(i), found, "") for i in range(20))]:
        read(write(case, content))  # imports what is imported late
    codecs.lookup("raw_unicode_escape")  # Python loads it when it meets the opcode UNICODE
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, overtime)
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    counts, defects, slowest = collections.Counter(), [], (0.0, "")
    for number in range(first, last):
        rng = random.Random(f"{seed}-{number}")
        mutation = MUTATIONS[number % len(MUTATIONS)]
        path = write(case, mutation(rng, found, str(canary)))
        events.clear()
        start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            armed = True
            outcome = read(path)
        except (Exception, Overtime) as e:
            outcome = f"DEFECT {type(e).__name__}"
            defects.append(f"case {number} ({mutation.__name__}): {type(e).__name__}: {str(e)[:300]}")
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, (time.perf_counter() - start, f"case {number} ({mutation.__name__})"))
        if events or canary.exists():
            outcome = "DEFECT event"
            defects.append(f"case {number} ({mutation.__name__}): canary {canary.exists()}, events {events[:3]}")
        counts[f"{mutation.__name__}/{outcome}"] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"counts": counts, "defects": defects, "slowest": slowest, "peak": peak}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    last = options.first + options.files
    if options.child:
        child(options.first, last, options.seed, pathlib.Path(options.child))
        return 0

    counts, defects, slowest, peak = collections.Counter(), [], (0.0, ""), 0
    with tempfile.TemporaryDirectory(prefix="deco_fuzz_") as workdir:
        for first in range(options.first, last, BATCH):
            number = min(BATCH, last - first)
            arguments = ["--first", first, "--files", number, "--seed", options.seed, "--child", workdir]
            command = [sys.executable, __file__, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 + number * SECONDS, check=False)
            if done.returncode:
                defects.append(f"cases {first} to {first + number}: exit {done.returncode}: {done.stderr[-500:]}")
                continue
            report = json.loads(done.stdout)
            counts.update(report["counts"])
            defects += report["defects"]
            slowest, peak = max(slowest, tuple(report["slowest"])), max(peak, report["peak"])
    outcomes = sorted({key.split("/")[1] for key in counts}, reverse=True)
    print(f"{'mutation':20}" + "".join(f"{outcome:>24}" for outcome in outcomes))
    for mutation in (m.__name__ for m in MUTATIONS):
        print(f"{mutation:20}" + "".join(f"{counts[f'{mutation}/{outcome}']:24}" for outcome in outcomes))
    totals = {o: sum(n for key, n in counts.items() if key.endswith(f"/{o}")) for o in outcomes}
    print(f"{'all':20}" + "".join(f"{totals[outcome]:24}" for outcome in outcomes))
    print(f"{sum(totals.values())} files, {len(defects)} defects; peak {peak} MiB")
    print(f"slowest {slowest[0]:.2f} s ({slowest[1]})")
    print("\n".join(defects[:40]))
    return 1 if defects or sum(totals.values()) != options.files else 0


if __name__ == "__main__":
    sys.exit(main())
