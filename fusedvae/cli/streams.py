"""What a command prints, on streams that may be closed, full, or without a letter for what is to be said."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Tolerant:
    """A stream that takes everything: once the system has refused something, the rest is dropped.

    Args:
        stream: the one that is written to.
        goes_on: also when its reader has gone, which is otherwise a BrokenPipeError: who asked for a table has seen
            enough of it, but nobody wants the end of a training run for the end of its log.
    """

    def __init__(self, stream: TextIO, *, goes_on: bool) -> None:
        self.stream, self.goes_on = stream, goes_on
        self.failure: OSError | None = None
        """Why the stream takes nothing any more, if so."""

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except OSError as error:
            if isinstance(error, BrokenPipeError) and not self.goes_on:
                raise
            self.failure = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def tolerant(*, goes_on: bool) -> Iterator[list[Tolerant]]:
    """A block in which standard output and error are tolerant streams, which are given, in that order."""
    before = sys.stdout, sys.stderr
    streams = [Tolerant(_usable(stream), goes_on=goes_on) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        for stream in streams:
            stream.goes_on = True
            stream.flush()
            if stream.failure is not None:
                _discard(stream.stream)
        sys.stdout, sys.stderr = before


def _usable(stream: TextIO | None) -> TextIO:
    """The stream, with escapes for letters that it has not; a bottomless one in the place of one that is closed."""
    if stream is None or stream.closed:
        return open(os.devnull, "w")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _discard(stream: TextIO) -> None:
    """Lead what a stream still holds nowhere: Python would write it once more when it ends, and complain."""
    with suppress(OSError, ValueError):  # it may be no file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
