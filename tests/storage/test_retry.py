"""What may pass is tried again; what may not is raised at once."""

import errno

import pytest

from deco_jax import storage
from deco_jax.errors import TransientError, UsageError


class Status(Exception):
    def __init__(self, code):
        self.code = code


def caused(error):
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError(),
        ConnectionResetError(),
        Status(429),
        Status("503"),
        ValueError("UNAVAILABLE: HTTP response code: 503"),
        caused(OSError(errno.ESTALE, "Stale file handle")),
    ],
)
def test_what_may_pass_is_tried_again(error, caplog):
    errors = iter([error, error])

    def action():
        for one in errors:
            raise one
        return "done"

    assert storage.retried("reading it", action) == "done"
    assert caplog.text.count("Reading it failed") == 2


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "full"), Status(404), UsageError("HTTP 503")],
)
def test_what_may_not_pass_is_raised_at_once(error):
    calls = []

    def action():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        storage.retried("reading it", action)
    assert len(calls) == 1


def test_what_stays_ends_as_transient(monkeypatch):
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.2")

    def action():
        raise ConnectionResetError("by peer")

    with pytest.raises(TransientError, match=r"reading it still fails \(ConnectionResetError: by peer\)"):
        storage.retried("reading it", action)
