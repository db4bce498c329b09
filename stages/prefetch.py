"""Parts of remote stores, fetched into the local cache before the order reaches them.

Threads fetch the position's window of parts and the next one. What they cannot fetch is left to the
reader, which raises the error when it needs the part; what is fetched twice by several ranks or
workers is fetched once, by the cache's locks.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from stages.batches import BatchReader
from stages.order import WINDOW_PARTS, BlockOrder, Position
from storage.blocks import BlockReader
from storage.errors import ScholiastError
from storage.reader import CacheReader
from storage.remote import RemotePath


class Prefetcher:
    """Fetches ahead of a position; does nothing where all roots are local.

    Args:
        reader: whose parts.
        order: in which they will be read.
        threads: 0 fetches nothing.
    """

    def __init__(self, reader: BatchReader, order: BlockOrder, threads: int) -> None:
        self._order = order
        sources: list[BlockReader | CacheReader] = [reader.corpus, *reader.caches.values()]
        self._sources = [s for s in sources if isinstance(s.root, RemotePath)]
        caches = [s.root.cache for s in self._sources if isinstance(s.root, RemotePath)]
        # Fetching more than the cache keeps would evict what is about to be read.
        self._room = min((cache.limit for cache in caches), default=0) // 2
        self._asked: OrderedDict[int, None] = OrderedDict()
        self._largest = 0  # bytes of the largest part so far, of all sources together
        self._threads, self._wanted, self._lock = threads, list[int](), threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(threads, "fetch") if threads and self._sources else None

    def ahead_of(self, position: Position) -> None:
        """Begins to fetch what will be read from a position on."""
        if self._pool is None:
            return
        wanted = self._order.upcoming(position, WINDOW_PARTS + 1)
        with self._lock:
            self._wanted = wanted
            self._ask(self._pool)
            for part in [p for p in self._asked if p not in set(wanted)]:
                del self._asked[part]  # it may be wanted again an epoch later

    def _ask(self, pool: ThreadPoolExecutor) -> None:
        """Gives the threads what there is room for: as many parts as threads until a size is known."""
        most = self._room // self._largest if self._largest else self._threads
        for part in self._wanted[: max(1, most)]:
            if part not in self._asked:
                self._asked[part] = None
                pool.submit(self._fetch, part, pool)

    def close(self) -> None:
        """Stops after what is being fetched."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fetch(self, part: int, pool: ThreadPoolExecutor) -> None:
        if self._stopped.is_set():
            return
        with contextlib.suppress(ScholiastError):  # whoever reads the part meets it again
            size = sum(source.fetch(part) for source in self._sources)
            with self._lock, contextlib.suppress(RuntimeError):  # the pool has been closed
                self._largest = max(self._largest, size)
                self._ask(pool)
