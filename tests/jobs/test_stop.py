"""Signals and notices become a flag, once; then they are what they were."""

import contextlib
import http.server
import os
import signal
import threading
import time
import urllib.parse

import pytest

from deco_jax.errors import Stopped, TransientError
from deco_jax.jobs import open_job, stop
from deco_jax.jobs.stop import stop_request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_the_flag_only(number):
    before = signal.getsignal(number)
    with stop_request() as request:
        request.check()
        assert not request
        os.kill(os.getpid(), number)
        assert request and request.by == number.name and not request.notice
        with pytest.raises(Stopped):
            request.check()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_the_process():
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def metadata_server(monkeypatch, answers):
    """Answers as Google's: at once if the client has not seen the answer, else when it changes. Fails at first."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            url = urllib.parse.urlparse(self.path)
            name, query = url.path.removeprefix("/computeMetadata/v1/"), dict(urllib.parse.parse_qsl(url.query))
            asked.append(name)
            if asked.count(name) == 1:
                return self.send_error(503)
            if name not in answers or self.headers["Metadata-Flavor"] != "Google":
                return self.send_error(404)
            for _ in range(1000):
                if query["last_etag"] != f"mark of {answers[name]}":
                    break
                time.sleep(0.01)
            self.send_response(200)
            self.send_header("ETag", f"mark of {answers[name]}".replace(" ", "%20"))
            self.end_headers()
            self.wfile.write(answers[name].encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(stop, "PAUSE", 0.1)
        yield asked
        server.shutdown()


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


@pytest.mark.parametrize(
    "name, answer",
    [("instance/preempted", "TRUE"), ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_ends_the_job_to_be_started_again(monkeypatch, tmp_path, name, answer):
    """With exit code 75: after a 0, nobody would go on with it, since nobody else knows why it ended."""
    answers = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
    with (
        metadata_server(monkeypatch, answers) as asked,
        pytest.raises(TransientError, match=f"stopped by the machine's notice {name.rpartition('/')[2]}"),
        open_job("--out", str(tmp_path)) as job,
    ):
        turns = job.shards(range(10))
        assert next(turns) == 0
        wait_for(lambda: asked.count(name) >= 3)  # an error, the answer, and waiting for the next
        assert not job.stop
        answers["instance/maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # one does not notice
        answers[name] = answer
        wait_for(lambda: job.stop)
        assert list(turns) == [] and job.stopped
        assert not job.finish(lambda: range(1, 10), lambda: None)


def test_a_maintenance_that_was_told_before_the_start_does_not_end_it(monkeypatch):
    """It may be an hour away, and was why this process was started again."""
    answers = {"instance/preempted": "FALSE", "instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    with metadata_server(monkeypatch, answers) as asked, stop_request() as request:
        wait_for(lambda: asked.count("instance/maintenance-event") >= 3)
        time.sleep(0.1)
        assert not request
        answers["instance/preempted"] = "TRUE"
        wait_for(lambda: request)


def test_a_server_that_does_not_know_is_not_asked_again(monkeypatch):
    with metadata_server(monkeypatch, {}) as asked, stop_request() as request:
        wait_for(lambda: len(asked) == 4)
        time.sleep(0.3)
        assert len(asked) == 4 and not request


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(stop, "PRODUCT", tmp_path / "product_name")
    assert stop._metadata_host() == ""
    stop.PRODUCT.write_text("Google Compute Engine\n")
    assert stop._metadata_host() == "metadata.google.internal"
