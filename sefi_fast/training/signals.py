"""SIGTERM, SIGHUP and SIGINT end a run between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended training after a whole step; a KeyboardInterrupt, so nothing swallows it.

    Attributes:
        signal: the number of the signal: 1 (SIGHUP), 2 (SIGINT) or 15 (SIGTERM).
        step: steps done.
    """

    def __init__(self, message: str, signal_number: int, step: int) -> None:
        super().__init__(message)
        self.signal = signal_number
        self.step = step


@dataclass(eq=False)
class Stop:
    """The number of the signal that asked the run to end, if one did."""

    received: int | None = None


_current: Stop | None = None


@contextmanager
def graceful() -> Iterator[Stop]:
    """Inside, signals only set `received`: SIGTERM, SIGINT and, on POSIX systems, SIGHUP.

    A second SIGINT raises KeyboardInterrupt at once. The handlers of before come back on the way
    out. A signal that is ignored, as SIGHUP is under nohup, stays ignored. Handlers that the
    program set itself stay in charge, and so does everything outside of the main thread, where
    Python has no signals. Inside another `graceful` the outer one's `Stop` is shared.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Stop()
        return
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.received = stop.received or number

    wanted = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        wanted[signal.SIGHUP] = signal.SIG_DFL
    before = {n: usual for n, usual in wanted.items() if signal.getsignal(n) is usual}
    _current = stop
    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
        _current = None
