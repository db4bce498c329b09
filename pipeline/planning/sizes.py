"""What a cache will take on disk, by array, before any of it is written.

The figures are of SmolLM2-135M's notes on prose, code and scripture (V = 49,152, blocks of 512):
measured bytes an entry, index and checksums included. Other vocabularies and texts differ by some.
"""

from __future__ import annotations

import numpy as np

from storage.layout import Layout

_LOGPROB = {"exact": 3.0, "balanced": 0.68, "compact": 0.53}  # bytes an entry of a long head
_LOGPROB_EXTRA = {"exact": 0.0, "balanced": 3.0, "compact": 2.8}  # bytes a token on top
_STATISTIC = {"exact": 3.3, "balanced": 1.55, "compact": 1.3}
_LOG_Z = {"exact": 3.2, "balanced": 1.4, "compact": 1.2}
_HEAD_ID, _HEAD_ID_EXTRA = 0.73, 4.0
_DRAW_ID, _FLOOR, _CLASS = 1.35, 0.85, 0.4
_DRAW_LOGPROB = 0.48
_FEATURE, _FEATURE_COUNT = 1.48, 42.0  # bytes a value; bytes a block


def bytes_by_array(layout: Layout) -> dict[str, float]:
    """Returns the bytes that a token is expected to take in each array of a layout."""
    preset, each = layout.preset, {}
    for name, spec in layout.arrays().items():
        values = float(np.prod(spec.shape[1:], dtype=np.int64))
        each[name] = _FEATURE * values / layout.block_length
    each["head_ids"] = _HEAD_ID * layout.k + _HEAD_ID_EXTRA
    each["head_logprobs"] = _LOGPROB[preset] * layout.k + _LOGPROB_EXTRA[preset]
    each |= dict.fromkeys(("entropy", "log_tail_mass", "gold_logprob"), _STATISTIC[preset])
    others = {
        "id_class": _CLASS, "head_floor": _FLOOR, "draw_ids": _DRAW_ID * layout.draws,
        "draw_logprobs": (4.0 if layout.codecs.exact else _DRAW_LOGPROB) * layout.draws,
        "log_z": _LOG_Z[preset] * len(layout.temperatures),
        "feature_count": _FEATURE_COUNT / layout.block_length,
    }  # fmt: skip
    return each | {name: size for name, size in others.items() if name in each}
