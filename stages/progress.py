"""How long work tells of itself, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One bar at a time: `start`, any number of `advance`, `finish`. `say` prints a plain line."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int, **numbers: float) -> None: ...

    def finish(self) -> None: ...

    def say(self, text: str) -> None: ...


class Silent:
    """Tells nobody."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        pass

    def advance(self, amount: int, **numbers: float) -> None:
        pass

    def finish(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass
