"""How does the page get to browsers? `deco demo` serves it, by default on this machine alone.

Nothing is sent anywhere else: the page's policy forbids browsers to load from other hosts, Gradio's statistics are off,
and the only files that are served are Gradio's own and the pictures of the last hour.
"""

import contextlib
import os
import pathlib
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from deco_jax.demo.desk import CSS, make_page
from deco_jax.demo.studio import Studio, open_studio
from deco_jax.demo.wishes import Limits
from deco_jax.errors import UsageError

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def serve(
    source: str,
    weights: str = "ema",
    dtype: str | None = None,
    text_encoder: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_images: int = 4,
    max_side: int = 1024,
    queue: int = 16,
) -> None:
    """Opens a trained network and serves its page until Ctrl-C or SIGTERM.

    Args:
      source, weights, dtype, text_encoder: see `open_studio`.
      host: an address of this machine; 0.0.0.0 = all of them, so that others may come.
      port: 0 = any that is free.
      max_images, max_side: of one drawing.
      queue: how many may wait for their turn; one drawing runs at a time.

    Raises:
      UsageError: the network cannot be opened, or the address not be had; a number is out of range; Gradio is missing.
    """
    _require_gradio()
    if queue < 1:
        raise UsageError(f"--queue={queue} must be at least 1.")
    limits = Limits(max_images, max_side)
    with listen(host, port) as listening, _sigterm_as_interrupt():
        studio = open_studio(source, weights, dtype, text_encoder, limits)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        run_page(studio, queue, listening, lambda: print(f"{studio.name}: {address} (Ctrl-C ends it)", flush=True))


def listen(host: str, port: int) -> socket.socket:
    """A socket that browsers can come to.

    Raises:
      UsageError: there is no such address, or somebody else has it.
    """
    if not 0 <= port < 2**16:
        raise UsageError(f"--port={port} must be from 0 to {2**16 - 1}; 0 is any that is free.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host={host} --port={port} cannot be served ({error}); choose others.") from error


def run_page(studio: Studio, queue: int, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serves the page on a socket until a signal; `ready` is called when browsers may come."""
    import uvicorn

    with tempfile.TemporaryDirectory(prefix="deco_demo_") as served, tempfile.TemporaryDirectory() as drafts:
        os.environ["GRADIO_TEMP_DIR"] = served  # beside the drafts: of files elsewhere Gradio takes a copy
        application = make_application(studio, queue, pathlib.Path(drafts))
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=3)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                ready()

        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run([listening])


def make_application(studio: Studio, queue: int, folder: pathlib.Path) -> Any:
    """The page as an ASGI application; new pictures go through `folder`."""
    import fastapi
    import gradio

    application = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @application.middleware("http")
    async def forbid_other_hosts(request: fastapi.Request, proceed: Callable[..., Any]) -> fastapi.Response:
        response = await proceed(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    page = make_page(studio, folder).queue(max_size=queue, default_concurrency_limit=1, api_open=False)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gradio.mount_gradio_app(
        application,
        page,
        path="/",
        theme=theme,
        css=CSS,
        max_file_size="1b",  # nothing on the page takes files
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
    )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt, so that files are removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_gradio() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError(f"The page needs {error.name}: pip install -e '.[demo]' in the repository.") from error
