"""How far is a job, how fast, and how long will it take? A bar in a terminal, lines elsewhere."""

import time

from tqdm import tqdm

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds between lines; each pause is twice the one before


class Progress:
    """Items of a job that are done, with rate and time left: a bar in a terminal, elsewhere lines. To be closed."""

    def __init__(self, total: int, unit: str, done: int = 0, active: bool = True):
        """`unit`: "image". `done`: of them, before this start. One that is not `active` says nothing."""
        self.total, self.unit, self.active, self.done = total, unit, active, done
        self.since: tuple[int, float] | None = None  # items done and when, at the first update: before it all compiles
        self.last_line, self.pause = time.monotonic(), FIRST_PAUSE
        self.bar = tqdm(
            total=total, initial=done, unit=unit, dynamic_ncols=True, smoothing=0.05, disable=None if active else True
        )  # None: unless stderr is a terminal

    def update(self, done: int) -> None:
        """So many items are done. Shows it with rate and time left, in lines after growing pauses and at the end."""
        now, self.done = time.monotonic(), done
        first_done, first_at = self.since = self.since or (done, now)
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif now - self.last_line >= self.pause or done >= self.total:
            self.last_line, self.pause = now, min(2 * self.pause, LONGEST_PAUSE)
            if done == first_done:
                return self._line("", None)
            rate = (done - first_done) / (now - first_at)
            self._line(f"{rate:,.{0 if rate > 10 else 2}f} {self.unit}s/s", (self.total - done) / rate)

    def show(self, done: int, shown: str, item_seconds: float | None) -> None:
        """So many items are done, about which `shown` is said at once; an item takes so long from here on, if known."""
        self.done = done
        if not self.bar.disable:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(done - self.bar.n)
        else:
            self._line(shown, None if item_seconds is None else (self.total - done) * item_seconds)

    def _line(self, shown: str, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        rest = ", ".join(part for part in (shown, left) if part)
        self.say(f"{self.unit} {self.done}/{self.total}" + (f": {rest}" if rest else ""))

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.active:
            say(text)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def say(text: str) -> None:
    """Prints a line, above any bar there is."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
