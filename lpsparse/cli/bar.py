"""Progress: a bar on a terminal, lines elsewhere, nothing when quiet."""

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from lpsparse.cli.output import Voice, has_terminal, tell
from lpsparse.parallel.environment import is_rank_0
from lpsparse.parallel.progress import Position, told_to
from lpsparse.reporting.text import cells, clean, shorten, size

_SILENCE = 15.0  # seconds between lines where there is no terminal
_BLINK = 0.1  # seconds between two drawings, so that they slow nothing down
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_MARKS = 200  # of a phase, from which its speed is known
_BAR = (6, 24)  # fewest and most columns of the bar itself


class Pace:
    """How fast a phase goes, by the later half of what was done of it here: a slow first step soon counts no
    more, nor does what was done before a resume, and steps may take minutes."""

    def __init__(self, done: int, total: int, seconds: float) -> None:
        self.total, self.began = total, seconds
        self._marks = deque([(done, seconds)])
        self._first, self._now = done, (done, seconds)

    def move(self, done: int, seconds: float) -> None:
        """`done` units are done by now, a time in seconds."""
        self._now = done, seconds
        if done - self._marks[-1][0] >= max(1, self.total // _MARKS):
            self._marks.append(self._now)
        half = (self._first + done) / 2
        while len(self._marks) > 1 and self._marks[1][0] <= half:
            self._marks.popleft()

    @property
    def per_second(self) -> float | None:
        """Units a second; None before the first one is done."""
        (done, seconds), (before, at) = self._now, self._marks[0]
        return (done - before) / (seconds - at) if done > before and seconds > at else None

    def left(self, seconds: float) -> float | None:
        """Seconds until the end, seen from a moment after the last move; None where that is not known."""
        rate, (done, at) = self.per_second, self._now
        return None if rate is None else max(0.0, (self.total - done) / rate - (seconds - at))


class Bar:
    """Listens to `checkpoint.progress`. Steps and rows are stages of minutes: each is announced by a line."""

    def __init__(self, voice: Voice) -> None:
        self.quiet = voice.quiet or not is_rank_0()
        self.live = not self.quiet and has_terminal()
        self._at: Position | None = None
        self._pace = Pace(0, 0, 0.0)
        self._drawn = 0.0  # when
        self._said = time.monotonic()
        self._shown: Any = None  # rich's Progress
        self._cells: Any = None  # the bar itself

    def update(self, at: Position | None) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if at is None:
            self.close()
            self._at = None
            return
        begins = self._at is None
        self._at = at
        if begins:
            self._pace, self._drawn = Pace(at.done, at.total, now), 0.0
            if at.unit != "steps" and not at.unit.startswith("bytes"):
                tell(f"{clean(at.what)}: {at.total:,} {at.unit}")
        else:
            self._pace.move(at.done, now)
        if self.live:
            self._draw(now)
        elif now - self._said >= _SILENCE or (at.unit == "steps" and not begins and at.done == at.total):
            self._said = now
            tell(": ".join((clean(at.what), ", ".join((_count(at), *self._words(now))))))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._shown is not None:
            with suppress(OSError):  # it may have gone
                self._shown.stop()
            self._shown = None

    def _draw(self, now: float) -> None:
        assert self._at is not None
        if now - self._drawn < _BLINK and self._at.done < self._at.total:
            return
        self._drawn = now
        try:
            self._shown = self._shown or self._start()
            total = None if self._is_one_piece() else max(self._at.total, 1)  # None: a bar that pulses
            self._shown.update(0, completed=self._at.done, total=total, refresh=True)
        except OSError:  # the terminal has gone: the work goes on
            self.quiet = True

    def _is_one_piece(self) -> bool:
        """Whether nothing is done that could be counted: some work ends all at once."""
        at = self._at
        return at is not None and not at.done and at.unit != "steps" and not at.unit.startswith("bytes")

    def _start(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn
        from rich.text import Text

        class Words(ProgressColumn):
            """What `text` gives at the moment of drawing: time goes on between two steps."""

            def __init__(self, text: Any) -> None:
                super().__init__()
                self.text = text

            def render(self, task: Any) -> Text:
                return Text(self.text(), no_wrap=True)

        console = Console(stderr=True)
        self._cells = BarColumn()
        columns = (Words(lambda: self._head(console.width)), self._cells, Words(lambda: self._tail))
        shown = Progress(*columns, console=console, transient=True, refresh_per_second=1)
        shown.add_task("")
        shown.start()
        return shown

    def _head(self, width: int) -> str:
        """What is done and how far, by which the rest has its room."""
        assert self._at is not None
        count = _count(self._at).replace(" of ", "/")
        count = count.removesuffix(" steps") if self._at.unit == "steps" else count
        count = f"{self._at.total:,} {self._at.unit}" if self._is_one_piece() else count
        least = _BAR[0] + 2
        head = f"{shorten(clean(self._at.what), max(1, width - least - cells(count) - 1))} {count}"
        tail, room = "", width - 1 - cells(head) - least
        for words in self._words(time.monotonic()):
            more = f"{tail}  {words}" if tail else words
            if cells(more) > room:
                break
            tail = more
        self._tail = tail
        self._cells.bar_width = max(1, min(_BAR[1], width - 1 - cells(head) - cells(tail) - 2))
        return head

    _tail = ""

    def _words(self, now: float) -> list[str]:
        """Time left, loss, speed, time taken: what is missed most first."""
        assert self._at is not None
        left, rate = self._pace.left(now), self._pace.per_second
        facts = [clean(fact) for fact in self._at.facts]
        words = [] if left is None or self._at.done == self._at.total else [f"{_clock(left)} left"]
        words += facts[:1]
        if rate is not None:
            unit = "it" if self._at.unit == "steps" else self._at.unit
            words.append(f"{size(rate)}/s" if unit.startswith("bytes") else f"{rate:.3g} {unit}/s")
        return [*words, f"{_clock(now - self._pace.began)} so far", *facts[1:]]


def _count(at: Position) -> str:
    if at.unit.startswith("bytes"):
        return f"{size(at.done)} of {size(at.total)}"
    return f"{at.done:,} of {at.total:,} {at.unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def showing(voice: Voice) -> Generator[None]:
    """Show the progress of what is inside."""
    bar = Bar(voice)
    try:
        with told_to(bar.update):
            yield
    finally:
        bar.close()


@contextmanager
def working(voice: Voice) -> Generator[None]:
    """What a command does on a checkpoint: shared among processes, and its progress shown."""
    from lpsparse.parallel.environment import together

    _keep_freed_memory()
    with together(), showing(voice):
        yield


def _keep_freed_memory() -> None:
    """Have malloc keep what arrays of megabytes give back: each of millions of pages that it returns and asks
    for again is a fault. 7 % of the time of `prune` (docs/experiments.md). All threads share what is kept:
    each with its own would keep 15 to 25 MiB more. A command's process alone: a program that calls our
    functions has memory of its own to think of."""
    import ctypes  # which --help can do without

    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(_ARENA_MAX, 1)
