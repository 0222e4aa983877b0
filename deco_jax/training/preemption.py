"""Being told to stop: SIGTERM (a preempted machine, a scheduler) and Ctrl-C."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Becomes true when the process has been asked to stop."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within it, SIGTERM and Ctrl-C raise a flag instead of ending the process; a second Ctrl-C ends it."""
    request = StopRequest()

    def handle(number: int, frame) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
