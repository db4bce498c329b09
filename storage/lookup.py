"""Memory and table look-ups by Arrow.

glibc gives freed arrays of a megabyte back to the kernel and is then given zeroed pages, one fault for
every 4 kB: reading a cache spent up to 40 per cent of its time so. Arrow's pool keeps what is freed. Its
look-ups take 16- and 32-bit indices as they are, where NumPy widens them to 64 bits first: a third
less time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.types import AnyArray

_UNCHECKED = pc.TakeOptions(boundscheck=False)
_INDEX = {np.dtype(np.uint16): pa.uint16(), np.dtype(np.uint32): pa.uint32()}


def empty(shape: tuple[int, ...], dtype: Any) -> AnyArray:
    """Returns an array of any content; its memory goes back to Arrow's pool."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer(pa.allocate_buffer(size), dtype).reshape(shape)


class Table:
    """A table of numbers.

    Args:
        values: [n], without missing ones.
    """

    def __init__(self, values: AnyArray) -> None:
        self._values, self._dtype = pa.array(values), values.dtype

    def __getitem__(self, index: AnyArray) -> AnyArray:
        """Returns the values at `index`, uint16 or uint32, C-contiguous, of any shape.

        Raises:
            IndexError: an index beyond the table.
        """
        if not index.size:
            return np.empty(index.shape, self._dtype)
        if (largest := int(index.max())) >= len(self._values):  # as the kernel would, but quicker
            raise IndexError(f"{largest} in a table of {len(self._values)}")
        index = np.ascontiguousarray(index)
        places = pa.Array.from_buffers(_INDEX[index.dtype], index.size, [None, pa.py_buffer(index)])
        found = pc.call_function("take", [self._values, places], _UNCHECKED)
        return np.frombuffer(found.buffers()[1], self._dtype).reshape(index.shape)
