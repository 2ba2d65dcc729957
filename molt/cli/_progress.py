"""How the commands show that they are at work."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

EVERY = 20.0  # seconds between lines, where there is no bar


class Progress:
    """A bar where stderr is a terminal, else a line every 20 seconds: what is being done, how far, how long still.

    Lines are written by a thread, so that nothing that takes long, as a network that is downloaded, is without one.

    Args:
        quiet: neither bar nor lines.
        bar: False leaves out the bar, where another one is there.
        clock: seconds.
    """

    def __init__(self, *, quiet: bool = False, bar: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        # A bar that cannot move, or goes to a file because colours are forced, would tell nothing.
        moves = self.console.is_terminal and not self.console.is_dumb_terminal and sys.stderr.isatty()
        self.lines = not (quiet or moves)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
        self._bars = Bars(
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            disable=quiet or self.lines or not bar,
        )
        self._bar: Any = None
        self._clock = clock
        self._over = threading.Event()
        self._name = ""
        self._said = ""
        self._done, self._total, self._first = 0, 0, 0
        self._began = self._last = clock()

    def __enter__(self) -> Progress:
        self._bars.start()
        if self.lines:
            threading.Thread(target=self._watch, name="molt-progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End bar and lines; no harm is done by doing so again."""
        self._over.set()
        self._bars.stop()

    def show(
        self,
        name: str,
        done: int = 0,
        total: int | None = None,
        things: str = "",
        said: str = "",
        *,
        ends: bool = False,
    ) -> None:
        """Take note of what is being done.

        Args:
            name: of it; another name begins something else.
            done: how much of it.
            total: of how much, if that is known.
            things: what is counted.
            said: more to say.
            ends: True writes a line at the beginning and at the end, too, where there is no bar.
        """
        if name != self._name:
            self._name, self._first, self._began = name, done, self._clock()
            if self._bar is not None:
                self._bars.remove_task(self._bar)
            self._bar = self._bars.add_task(name, total=total or None, said="")
        self._done, self._total = done, total or 0
        self._said = f"{done} of {total} {things}".rstrip() if total else ""
        self._said += (f", {said}" if self._said else said) if said else ""
        self._bars.update(self._bar, completed=done, total=total or None, said=self._said)
        if ends and done in (0, total):
            self._write()

    def begin(self, text: str, status: Any) -> None:
        """Say which row of a table is measured now: on a spinner, or in a line where there is no terminal."""
        self.show(text)
        if self.lines:
            print(text, file=sys.stderr, flush=True)
        else:
            status.update(text)
            status.start()

    def tick(self) -> None:
        """Write a line if the last one was some time ago."""
        if self._name and self._clock() - self._last >= EVERY:
            self._write()

    def _write(self) -> None:
        if not self.lines:
            return
        now = self._clock()
        self._last, took = now, now - self._began
        if self._done > self._first:
            left = f"{took / (self._done - self._first) * (self._total - self._done):.0f} s left"
        else:
            left = f"{took:.0f} s so far"
        parts = [": ".join(part for part in (self._name, self._said) if part), left]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._over.wait(1):
            self.tick()
