"""Who works in a folder? One run at a time, or one for each part of the work, wherever the folder lies.

    FOLDER/.lease/<claim>.json   host, process, since when, which part; renewed while the run lives

Network folders, mounted buckets and buckets have no locks, or none that other hosts see. What all have is that a file
which was written is then listed. So a run writes its claim first and lists the others afterwards: of two that start
together, at least one sees the other. A claim whose run is dead is taken over: its process is known to be gone, or it
was not renewed for DEAD seconds, by the clock of the storage.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from deco_jax.errors import TransientError, UsageError
from deco_jax.storage.paths import AnyPath, is_remote
from deco_jax.storage.retry import retried
from deco_jax.storage.writing import write_bytes, writing

FOLDER = ".lease"
RENEW, DEAD, POLL = 20.0, 90.0, 2.0  # seconds
GOODBYE = 10.0  # seconds for which removing a claim is tried; otherwise it is dead by itself soon


class Lease:
    """The claim of this run on a folder. `lost` is "" while it holds, afterwards why it does not."""

    def __init__(self, folder: AnyPath, part: tuple[int, int]):
        self.folder = folder / FOLDER
        self.path = self.folder / f"{uuid.uuid4().hex}.json"
        self.content = _about_this_process() | {"part": list(part), "holds": False, "renewals": 0}
        self.lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {folder}", daemon=True)

    def write(self) -> None:
        """Claims, or renews the claim."""
        self.content["renewals"] += 1
        content = json.dumps(self.content, indent=1).encode()
        retried(f"writing {self.path}", lambda: write_bytes(self.path, content))  # nobody may see half of it

    def remove(self) -> None:
        """Gives the claim up."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(GOODBYE)  # it may just be writing
        try:
            retried(f"removing {self.path}", lambda: self.path.unlink(missing_ok=True), GOODBYE)
        except Exception as error:
            logging.warning("%s cannot be removed (%s); it counts as dead in %.0f s.", self.path, error, DEAD)

    def start_renewing(self) -> None:
        """From now on this run holds the folder."""
        self.content["holds"] = True
        self.write()
        self._thread.start()

    def rivals(self) -> tuple[int | None, list["Claim"]]:
        """When the storage last saw this claim (None: it does not list it), and other runs' claims on the same part."""
        claims = retried(f"reading {self.folder}", self._list)
        mine = next((claim.renewed for claim in claims if claim.path.name == self.path.name), None)
        index, count = self.content["part"]
        return mine, [
            claim
            for claim in claims
            if claim.path.name != self.path.name and (claim.part[0] == index or claim.part[1] != count)
        ]

    def _list(self) -> list["Claim"]:
        claims = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its run ended meanwhile
                if path.suffix == ".json":
                    claims.append(Claim(path, epath.Path(path).stat().mtime, _read(path)))
        return claims

    def _keep(self) -> None:
        """Renews until the lease is lost or given up. No error ends the run: the next renewal may succeed."""
        while not self._ended.wait(RENEW):
            try:
                self.lost = self._renew()
            except Exception as error:
                logging.warning("The claim %s cannot be renewed (%s); tried again.", self.path, error)
            if self.lost:
                logging.error("%s", self.lost)
                return

    def _renew(self) -> str:
        if not retried(f"reading {self.path}", self.path.exists):
            return f"another run has taken {self.folder.parent} over: {self.path} was removed"
        self.write()
        for claim in self.rivals()[1]:
            if claim.content.get("holds"):
                self.remove()
                return f"another run has taken {self.folder.parent} over: {claim}"
        return ""


@dataclasses.dataclass
class Claim:
    """Another run's claim."""

    path: AnyPath
    renewed: int  # seconds, by the clock of the storage; 0 if that does not say
    content: dict[str, Any]  # {} while it is being written

    @property
    def part(self) -> tuple[int, int]:
        """(index, count); (-1, -1), which conflicts with every part, if it cannot be read."""
        return tuple(self.content.get("part", (-1, -1)))

    def process_lives(self) -> bool | None:
        """Whether its process lives, None if that is on another machine."""
        ours = _about_this_process()
        if any(self.content.get(key) != ours[key] for key in ("host", "boot", "pids")):
            return None
        return _start_of(self.content["pid"]) == self.content["start"]

    def __str__(self) -> str:
        about = "process {pid} on {host} since {since} ({command})".format_map(
            {
                **dict.fromkeys(("pid", "host", "since", "command"), "unknown"),
                **self.content,
            }
        )
        return f"{about}, {self.path}"


@contextlib.contextmanager
def hold(folder: AnyPath, name: str, part: tuple[int, int] = (0, 1)) -> Iterator[Lease]:
    """Within it, no other run holds `folder`, or this part of the work in it.

    What a dead run left is waited for, at most DEAD seconds, and taken over. A thread renews the claim; look at
    `Lease.lost` now and then, as another run may take over from one that the storage has not heard of for that long.

    Args:
      folder: is made if it is not there.
      name: of the folder in messages, "--workdir=gs://bucket/run".
      part: (index, count) of a worker that shares the folder with others; all must have the same count.

    Raises:
      UsageError: a living run holds it, or it cannot be written.
      TransientError: the storage fails.
    """
    lease = Lease(folder, part)
    with writing(folder):
        if not is_remote(folder):
            lease.folder.mkdir(parents=True, exist_ok=True)
        lease.write()
    try:
        with writing(folder):
            _wait_until_free(lease, name)
            lease.start_renewing()
        yield lease
    finally:
        lease.remove()


def _wait_until_free(lease: Lease, name: str) -> None:
    first_seen: dict[str, tuple[Claim, float]] = {}  # and when that was, by this host's steady clock
    said, start = False, time.monotonic()
    while True:
        now, rivals = lease.rivals()
        waited_for = []
        for claim in rivals:
            before, since = first_seen.setdefault(claim.path.name, (claim, time.monotonic()))
            lives = claim.process_lives()
            if lives is None and claim != before:
                lives = True
            elif lives is None and max((now or 0) - claim.renewed, time.monotonic() - since) > DEAD:
                lives = False
            if lives is False:
                logging.warning("%s: taken over from a run that is dead: %s.", name, claim)
                retried(f"removing {claim.path}", functools.partial(claim.path.unlink, missing_ok=True))
            elif lives and (claim.content.get("holds") or claim.path.name < lease.path.name):
                raise UsageError(
                    f"{name} is in use by another run: {claim}. Use another folder or wait for its end. If that run is "
                    f"dead, remove this file, or start again {DEAD:.0f} s after its death."
                )
            else:  # perhaps dead; or it lives, asks as well, and withdraws since this one goes first
                waited_for.append(claim)
        if now is not None and not waited_for:
            return
        if now is None and time.monotonic() - start > DEAD:
            raise TransientError(f"{lease.folder} does not list {lease.path.name}, which was written there")
        if waited_for and not said:
            logging.warning(
                "%s: waiting, at most %.0f s, for what may be left of a dead run: %s.", name, DEAD, waited_for[0]
            )
            said = True
        time.sleep(POLL)
        lease.write()  # the storage's time, and the sign that this one lives


def _read(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError:  # just being written
        return {}


def _about_this_process() -> dict[str, Any]:
    """Which process this is. Containers on one machine may share a host name, and have process numbers of their own."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pids": os.readlink("/proc/self/ns/pid") if boot.exists() else "",
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
        "since": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        "command": " ".join(sys.argv)[:200],
    }


def _start_of(pid: int) -> str | None:
    """When process `pid` of this machine began, since numbers are used again; None if it does not live."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except OSError:
        return None
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux
        return ""
    return None if fields[0] in "ZX" else fields[19]
