"""Ctrl-C and its like, taken between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruption:
    """While active, turns a first SIGINT or SIGTERM into a request that the loop sees between two steps.

    The second one raises KeyboardInterrupt at once: the last checkpoint stays as it is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """What was requested: of this process, or, where the loop finds out and says so here, of another."""
        self._has_been = False
        self._previous: dict[int, object] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._has_been:
            raise KeyboardInterrupt
        self._has_been, self.signal = True, number

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._request:  # what has been set since stays
                signal.signal(number, handler)  # type: ignore[arg-type]
