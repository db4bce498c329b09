"""How an artefact is changed: bytes flipped, cut, spliced; numbers that are sizes; values of JSON.

Every choice is drawn from hypothesis, so that a seed gives the same cases again.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from storage.fingerprint import canonical_json, fingerprint

Draw = Callable[[st.SearchStrategy[Any]], Any]

STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 255, 65_536, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30),
    0.0, 1.5, -0.5, 1e308, "", "x", "0", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[31m\u202e",
    "0" * 64, "f" * 64, "\ud800", "x" * 5000, [], {}, [[]], {"a": {"b": []}}, [0, 0], [-1, 1], [1.5],
    ["x"], [None], list(range(50)), {"sha256": "x"},
]  # fmt: skip
_SIZES = [0, 1, 4, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
_index = st.integers(0, 2**31)


def bytes_changed(draw: Draw, data: bytes) -> bytes:
    """Returns the bytes after one to four changes."""
    for _ in range(draw(st.integers(1, 4))):
        data = draw(st.sampled_from(_CHANGES))(draw, data) if data else draw(st.binary(max_size=64))
    return data


def _at(draw: Draw, data: bytes) -> int:
    if draw(st.booleans()):  # headers and indices lie at the ends
        edge = min(len(data), 64)
        place = draw(_index) % edge
        return place if draw(st.booleans()) else len(data) - 1 - place
    return int(draw(_index)) % len(data)


def _bit(draw: Draw, data: bytes) -> bytes:
    at = _at(draw, data)
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]


def _some(draw: Draw, data: bytes) -> bytes:
    at, new = _at(draw, data), draw(st.binary(min_size=1, max_size=12))
    return data[:at] + new + data[at + len(new) :]


def _cut(draw: Draw, data: bytes) -> bytes:
    return data[: _at(draw, data)]


def _removed(draw: Draw, data: bytes) -> bytes:
    at = _at(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 40)) :]


def _spliced(draw: Draw, data: bytes) -> bytes:
    at, source = _at(draw, data), _at(draw, data)
    return data[:at] + data[source : source + draw(st.integers(1, 200))] + data[at:]


def _longer(draw: Draw, data: bytes) -> bytes:
    return data + draw(st.binary(min_size=1, max_size=40))


def _size(draw: Draw, data: bytes) -> bytes:
    form = draw(st.sampled_from(["<Q", "<I", "<H", ">I"]))
    width = struct.calcsize(form)
    new = struct.pack(form, draw(st.sampled_from(_SIZES)) & (1 << 8 * width) - 1)
    at = _at(draw, data)
    return data[:at] + new + data[at + width :]


_CHANGES = [_bit, _some, _cut, _removed, _spliced, _longer, _size]


def json_changed(draw: Draw, data: bytes, sign: bool) -> bytes:
    """Returns a JSON text with one to three of its values changed.

    Args:
        sign: write its sha256 anew, as whoever means it would.
    """
    value = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        value = value_changed(draw, value)
    if not sign:
        return json.dumps(value).encode()
    if isinstance(value, dict):
        value.pop("sha256", None)
        value["sha256"] = fingerprint(value)
    return canonical_json(value)


def value_changed(draw: Draw, value: Any) -> Any:
    """Returns plain values with one of them replaced, left out, added or moved a little."""
    places = list(_places(value))
    if not places:
        return _strange(draw)
    holder, key = places[draw(_index) % len(places)]
    how = draw(st.sampled_from(["other", "other", "gone", "more", "near", "deep", "again"]))
    if how == "other":
        holder[key] = _strange(draw)
    elif how == "gone":
        del holder[key]
    elif how == "more" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["", "x", "format", "../y", "__proto__"]))] = _strange(draw)
    elif how == "near" and isinstance(holder[key], int | float):
        holder[key] = holder[key] * draw(st.sampled_from([1, 2, 10, 1000, 10**7, -1])) + draw(
            st.sampled_from([-1, 0, 1])
        )
    elif how == "deep":
        deep: Any = holder[key]
        for _ in range(draw(st.sampled_from([3, 300]))):
            deep = [deep]
        holder[key] = deep
    elif isinstance(holder, list):
        holder.append(holder[key])
    return value


def _strange(draw: Draw) -> Any:
    return copy.deepcopy(draw(st.sampled_from(STRANGE)))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every (holder, key) of nested lists and dicts, what is above first."""
    for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)
                         if isinstance(value, list) else ()):  # fmt: skip
        yield value, key
        yield from _places(one)
