"""A stand-in for Hugging Face on 127.0.0.1: one model, whose answers fail on request, and a count of what was asked."""

import collections
import contextlib
import hashlib
import http.server
import json
import threading

NAME, COMMIT = "facebook/dinov2-base", "0" * 40


class Hub:
    """What the server has and has done. `fails`: so many requests are answered 503; `damaged`: so many weights."""

    def __init__(self, files):
        self.files, self.asked = files, collections.Counter()
        self.fails, self.damaged, self.status = 0, 0, 503
        self.url = ""

    def info(self):
        files = []
        for name, content in self.files.items():
            lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            about = {"rfilename": name, "size": len(content), "blobId": "1" * 40}
            files.append(about | ({"lfs": lfs} if name.endswith(".safetensors") else {}))
        return {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": files, "private": False, "tags": []}


@contextlib.contextmanager
def serve(files):
    """A `Hub` with {name: bytes}; its `url` is what HF_ENDPOINT has to be."""
    hub = Hub(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.partition("?")[0].rpartition("/")[2]
            hub.asked[f"{self.command} {name}"] += 1
            if hub.fails > 0:
                hub.fails -= 1
                return self.reply(hub.status, b"", {})
            if NAME not in self.path:
                return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            if "/api/" in self.path:
                return self.reply(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            content = hub.files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if self.command == "GET" and hub.damaged and name.endswith(".safetensors"):
                hub.damaged -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.reply(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def reply(self, status, content, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
