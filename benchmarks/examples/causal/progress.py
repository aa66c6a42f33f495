"""Progress of a loop: a bar on a terminal, one line at the end in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Progress", "progress"]


class Progress:
    """Counts steps; draws them with tqdm, if it is installed and the output is a terminal."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done, self.first = what, total, done, done
        self.started, self.note = time.perf_counter(), ""
        self._bar = _bar(what, total, done)

    def step(self, note: str = "") -> None:
        """One more is done; the note says how it goes."""
        self.done += 1
        self.note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """End the bar; in a file, say in a line how far it came and how fast."""
        if self._bar is not None:
            self._bar.close()
            return
        seconds = time.perf_counter() - self.started
        pace = seconds / max(1, self.done - self.first)
        note = f", {self.note}" if self.note else ""
        text = f"{self.what}: {self.done}/{self.total} steps in {seconds:.0f} s, {pace:.2f} s/step"
        print(text + note, file=sys.stderr, flush=True)


def _bar(what: str, total: int, done: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, desc=what, unit="step", dynamic_ncols=True)


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A Progress that is closed whatever happens."""
    made = Progress(what, total, done)
    try:
        yield made
    finally:
        made.close()
