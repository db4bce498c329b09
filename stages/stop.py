"""SIGTERM and SIGUSR1: the handler only sets a flag, which the training looks at after a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the signals that arrive inside the block; in a thread other than the main one, none."""

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for each in SIGNALS:
                self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)

    def flags(self) -> list[float]:
        """Returns, for each of SIGNALS, 1 if it has arrived, else 0: numbers that ranks can add."""
        return [float(each in self._received) for each in SIGNALS]


def names(flags: list[float]) -> str:
    """Returns the names of the signals whose (added) flag is set; empty if none is."""
    return " and ".join(s.name for s, flag in zip(SIGNALS, flags, strict=True) if flag)


def ignore_in_worker(_: int) -> None:
    """Lets a process that reads batches live on: the training ends it after the step."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
