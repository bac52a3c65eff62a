"""A thread that looks for new releases while requests are served, and how patient it is with bad ones."""

import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Hashable

from tasks.errors import InvalidConfig, NoRelease

log = logging.getLogger("nightrank.ranker")
JITTER = 0.2
"""Share of the interval by which a poll comes earlier or later, so that a fleet does not ask the store at one time."""
LONGEST_S = 600.0
"""Seconds after which a refused release is tried again at the latest."""


class Refresher:
    """Calls a method every so often until it is stopped, or its object is gone.

    The object is held weakly: a ranker that nobody holds any more ends its thread. A process that forks takes no thread
    along, so that workers open their rankers after the fork.
    """

    def __init__(self, poll: Callable[[], object], every_s: float) -> None:
        """Start.

        Args:
            poll: a bound method; `NoRelease` from it ends the thread, anything else is logged and tried again.
            every_s: seconds from one poll to the next, but for the jitter. The first comes after a random part of it.

        Raises:
            InvalidConfig: not a positive number of seconds.
        """
        if not 0 < every_s < float("inf"):
            raise InvalidConfig(f"refresh_every is {every_s}; give seconds above 0, or None for no background refresh")
        self._poll = weakref.WeakMethod(poll)
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nightrank-refresher", daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = 1.0) -> None:
        """End it; a poll that hangs in the store is waited for that long, and then left to end by itself."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(patience_s)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        wait = self._every_s * random.random()
        while not self._stopped.wait(wait):
            poll = self._poll()
            if poll is None:
                return
            try:
                poll()
            except NoRelease:  # it was closed
                return
            except Exception:
                log.exception("a poll for new releases failed; the next one comes in about %g s", self._every_s)
            del poll  # or the object would live for as long as the thread waits
            wait = jittered(self._every_s)


def jittered(every_s: float) -> float:
    """Seconds to the next poll."""
    return every_s * random.uniform(1 - JITTER, 1 + JITTER)


class Patience:
    """When something that was refused is tried again: after one interval, two, four, and so on."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._what: Hashable = None
        self._wait_s = 0.0
        self._until = 0.0

    def due(self, what: Hashable) -> bool:
        """Whether it is to be tried now; what was never refused is."""
        return what != self._what or time.monotonic() >= self._until

    def refused(self, what: Hashable) -> None:
        """It was tried, and refused."""
        self._wait_s = min(2 * self._wait_s, LONGEST_S) if what == self._what else self._first_s
        self._what, self._until = what, time.monotonic() + self._wait_s
