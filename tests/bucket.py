"""A bucket for tests: a storage emulator in a process of its own, which fails and dawdles on request.

As a program (`python tests/bucket.py`) it is the emulator: it prints its port and serves until it is killed. Beside
`gs://bucket` there are `gs://readonly`, which takes no writes, and `gs://private`, which asks for credentials; every
other bucket does not exist, and answers so (the emulator alone would drop the connection).
"""

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.parse
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("bucket", "readonly", "private")
FAULTS = ("429", "503", "reset")


class Bucket:
    """The emulator as a test sees it."""

    url = "gs://bucket"

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"
        self.settings = {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google, with credentials
            "NO_GCE_CHECK": "true",
        }
        self.env = self.settings | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/quick_retries"), str(ROOT)])}

    def faults(self, share: float = 0.0, delay: float = 0.0) -> None:
        """From now on this share of requests fails (429, 503, connection reset in turn), each after `delay` seconds."""
        self._ask(f"faults?share={share}&delay={delay}")

    def counts(self) -> dict[str, int]:
        """{"requests": of all kinds, "429": so many answered like that, "503": …, "reset": …} since the start."""
        return json.loads(self._ask("counts"))

    def _ask(self, what: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}/_test/{what}", timeout=30) as answer:
            return answer.read()


@pytest.fixture(scope="session")
def emulator():
    process = subprocess.Popen(
        [sys.executable, __file__], stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT, text=True
    )
    yield Bucket(int(process.stdout.readline()))
    process.kill()
    process.wait()


@pytest.fixture
def bucket(emulator, monkeypatch):
    """`bucket.url` is gs://bucket for this process and its children; `bucket.env` makes the children retry quickly."""
    for name, value in emulator.settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(*_quick_retries())
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        monkeypatch.setitem(context, "gcs_request_retries", {"initial_delay": "20ms", "max_delay": "1s"})
    yield emulator
    emulator.faults()


def _quick_retries() -> tuple:
    import gcsfs.retry

    return gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))


def retry_quickly() -> None:
    """gcsfs waits a fiftieth of the usual time before it tries again."""
    setattr(*_quick_retries())


class Faults:
    """What the emulator is asked to do wrong, and what it has done."""

    def __init__(self):
        self.share, self.delay = 0.0, 0.0
        self.counts = dict.fromkeys(("requests", *FAULTS), 0)
        self.random = random.Random(0)
        self.lock = threading.Lock()

    def next(self) -> str:
        with self.lock:
            self.counts["requests"] += 1
            if self.random.random() >= self.share:
                return ""
            fault = FAULTS[sum(self.counts[name] for name in FAULTS) % len(FAULTS)]
            self.counts[fault] += 1
            return fault


def serve() -> None:
    """The emulator with faults, on a free port, which is printed."""
    from http import server as http

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    logging.disable(logging.ERROR)  # it logs what is not found
    storage, faults, one_at_a_time = Storage(use_memory_fs=True), Faults(), threading.Lock()
    for name in NAMES:
        buckets.create_bucket(name, storage)

    class Handler(server.RequestHandler):
        generation = ""

        def __init__(self, *args):
            super().__init__(storage, *args)

        def answer(self, method: str) -> None:
            url = urllib.parse.urlparse(self.path)
            if url.path.startswith("/_test/"):
                return self.obey(url)
            time.sleep(faults.delay)
            request = _Whole(self)
            fault = faults.next()
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return None
            if fault:
                return self.refuse(int(fault), "try again later")
            name = re.search(r"/b/([^/?]+)", self.path)
            name = name.group(1) if name else url.path.strip("/").split("/")[0]
            if name and name not in NAMES and not url.path.startswith("/batch/"):
                return self.refuse(404, "The specified bucket does not exist.")
            if name == "private":
                return self.refuse(401, "Anonymous caller does not have storage.objects.get access to the bucket.")
            if name == "readonly" and method != "GET":
                return self.refuse(403, "this account does not have storage.objects.create access to the bucket.")
            if "/moveTo/" in self.path:  # the emulator cannot; gcsfs then copies and deletes
                return self.refuse(400, "not here")
            found = re.search(r"/b/([^/]+)/o/([^/?]+)", self.path)
            with one_at_a_time:
                if found and method == "GET":
                    self.generation = self.generation_of(found[1], urllib.parse.unquote(found[2]))
                server.Router(request).handle(method)

        def generation_of(self, name: str, file: str) -> str:
            with contextlib.suppress(NotFound):
                return storage.get_file_obj(name, file)["generation"]
            return ""

        def end_headers(self) -> None:
            if self.generation:  # TensorStore asks for it when it reads a file again; the emulator does not say it
                self.send_header("x-goog-generation", self.generation)
            super().end_headers()

        def obey(self, url) -> None:
            for key, (value,) in urllib.parse.parse_qs(url.query).items():
                setattr(faults, key, float(value))
            self.reply(200, faults.counts)

        def refuse(self, status: int, message: str) -> None:
            self.reply(status, {"error": {"code": status, "message": message}})

        def reply(self, status: int, content) -> None:
            content = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", lambda self, method=method: self.answer(method))

    class Server(http.ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request, address):
            """Clients that went away, killed by a test, are no error."""

    with contextlib.suppress(KeyboardInterrupt), Server(("127.0.0.1", 0), Handler) as running:
        print(running.server_port, flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # the test is gone
        running.serve_forever()


class _Whole:
    """A request of which the body was read, so that slow clients hold up nobody but themselves."""

    def __init__(self, handler):
        import io

        from gcp_storage_emulator import server

        self.handler = handler
        body = server._read_raw_data(handler)
        self.rfile = io.BytesIO(body or b"")
        self.headers = handler.headers
        if self.headers.get("Transfer-Encoding"):
            del self.headers["Transfer-Encoding"]
            self.headers["Content-Length"] = str(len(body or b""))

    def __getattr__(self, name):
        return getattr(self.handler, name)


if __name__ == "__main__":
    serve()
