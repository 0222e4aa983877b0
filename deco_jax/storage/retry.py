"""Which errors pass by themselves, and trying again until they have.

A network folder that was remounted, a bucket that asks for patience, a connection that broke: such an error says
nothing about what was asked for. It is tried again with growing pauses, and said. What still fails then is a
`TransientError`, which ends a run with exit code 75.
"""

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from absl import logging

from deco_jax.errors import TransientError, UsageError

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds
# fmt: off
ERRNOS = {  # that every Unix has
    errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EPIPE, errno.ENOTCONN, errno.ENOLINK,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ESHUTDOWN,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
}
# fmt: on
STATUSES = {408, 425, 429, *range(500, 505)}  # of HTTP
LIBRARIES = ("aiohttp", "requests", "urllib3", "httpx", "httpcore", "google.auth")
CLASSES = re.compile("Connection|Connect|Timeout|Disconnected|Transport|Protocol|Proxy|Network|Payload|Chunked|SSL|DNS")
# In messages of libraries that have no classes for it (TensorStore, ArrayRecord): their status, or the system's words.
WORDS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b|\bHTTP\D{0,20}(408|429|50[0-4])\b|Stale file handle|Input/output error|"
    r"Connection reset|Connection refused|Temporary failure in name resolution"
)


def patience() -> float:
    """For how many seconds something is tried again: the environment variable DECO_RETRY_SECONDS, or 300."""
    text = os.environ.get("DECO_RETRY_SECONDS", "300")
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"DECO_RETRY_SECONDS={text} must be a number of seconds.") from error


def is_transient(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, may pass by itself."""
    return any(_is_transient(one) for one in with_causes(error))


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and what it was raised from, back to the first."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, UsageError):
        return False
    if isinstance(error, TransientError | TimeoutError | ConnectionError):
        return True
    for holder in (error, getattr(error, "response", None)):
        status = next((s for name in ("status_code", "status", "code") if (s := getattr(holder, name, None))), None)
        if str(status).isdigit() and int(status) in STATUSES:
            return True
    if isinstance(error, OSError) and error.errno in ERRNOS:
        return True
    kind = type(error)
    if kind.__module__.startswith(LIBRARIES) and CLASSES.search(kind.__name__):
        return True
    return isinstance(error, Exception) and bool(WORDS.search(str(error)[:2000]))


def retried(what: str, action: Callable[[], T], seconds: float | None = None) -> T:
    """`action()`, again after errors that may pass, for `seconds` in all (None: see `patience`).

    Args:
      what: is done, for the log: "reading gs://bucket/file".

    Raises:
      TransientError: it still fails.
    """
    end, pause = time.monotonic() + (patience() if seconds is None else seconds), FIRST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            if isinstance(error, TransientError) or not is_transient(error):
                raise
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            left = end - time.monotonic()
            if left <= 0:
                raise TransientError(f"{what} still fails ({reason})") from error
            wait = min(pause * random.uniform(0.5, 1.5), left)
            logging.warning("%s failed (%s); tried again in %.1f s.", what[:1].upper() + what[1:], reason, wait)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
