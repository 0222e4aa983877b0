"""Being told to stop: SIGTERM (a scheduler, a preempted machine), Ctrl-C, and notices from Google's machines.

Google's metadata server tells a machine that it will be taken away: a spot machine 30 s before, one that needs
maintenance at least 60 s before. A signal comes later or, on a TPU VM without a scheduler, never.
"""

import contextlib
import os
import pathlib
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from deco_jax.errors import Stopped

PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")  # of the machine
# What is asked for, and the answer that the machine goes away. Others (NONE, FALSE, a live migration) do not matter.
NOTICES = {"instance/preempted": "TRUE", "instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
WAIT, PAUSE = 60, 5.0  # seconds: an answer is held back for so long while nothing changes; after an error


class StopRequest:
    """Becomes true when the process has been asked to stop; `by` says by what: "SIGTERM", or a notice."""

    def __init__(self):
        self.by = ""
        self.notice = False  # whether it was one: then nobody but this process knows that the machine goes away

    def __bool__(self) -> bool:
        return bool(self.by)

    def check(self) -> None:
        """Raises Stopped if it was asked to."""
        if self:
            raise Stopped


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within it, SIGTERM, Ctrl-C and notices raise a flag; a second Ctrl-C ends the process."""
    request, ended = StopRequest(), threading.Event()

    def handle(number: int, frame) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.by = request.by or signal.Signals(number).name

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    if host := _metadata_host():
        for name, bad in NOTICES.items():
            threading.Thread(target=_watch, args=(host, name, bad, request, ended), daemon=True, name=name).start()
    try:
        yield request
    finally:
        ended.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _metadata_host() -> str:
    """Where to ask, "" if this is none of Google's machines."""
    google = PRODUCT.is_file() and PRODUCT.read_text().strip() == "Google Compute Engine"
    return os.environ.get("GCE_METADATA_HOST", "metadata.google.internal" if google else "")


def _watch(host: str, name: str, bad: str, request: StopRequest, ended: threading.Event) -> None:
    """Raises the flag once the answer is the bad one. A server that does not know the question is not asked again."""
    first = True  # a maintenance that stands in the first answer was the reason for this start, and may be an hour away
    seen = "0"  # the mark of the answer; the server answers at once if it has another one by now
    while not ended.is_set():
        url = f"http://{host}/computeMetadata/v1/{name}?wait_for_change=true&timeout_sec={WAIT}&last_etag={seen}"
        question = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(question, timeout=WAIT + 10) as answer:
                seen, value = answer.headers.get("ETag", "0"), answer.read().decode().strip()
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return
            ended.wait(PAUSE)
            continue
        standing, first = first and name == "instance/maintenance-event", False
        if value == bad and not ended.is_set() and not standing:
            if not request:
                request.by, request.notice = f"the machine's notice {name.rpartition('/')[2]}", True
            return
