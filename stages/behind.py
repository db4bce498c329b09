"""One thread that works behind its caller, in order: a teacher reads on while its notes are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Behind:
    """A thread that does what it is given, first in, first out; a context that ends when all is done.

    Once a task has failed no later one is begun; its error is raised by the next `submit`, or at the
    end. Where the context ends by an error, what has not begun is left undone.

    Args:
        depth: tasks given and not done, beyond which `submit` waits: it bounds memory.
    """

    def __init__(self, depth: int) -> None:
        self._depth, self._failed = depth, False
        self._given: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")

    def submit(self, work: Callable[..., object], *arguments: Any) -> None:
        """Gives it a task; raises what an earlier one has raised."""
        while self._given and (self._given[0].done() or len(self._given) >= self._depth):
            self._given.popleft().result()
        self._given.append(self._pool.submit(self._do, work, arguments))

    def _do(self, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while self._given and kind is None:
            self._given.popleft().result()
