"""Static mixture weights of the teachers, fitted to gold tokens by expectation–maximisation.

log Σ_m w_m p_m(gold), summed over the calibration rows, is concave in w, so the maximum is the same
from any start inside; here it is uniform, and nothing is random. Each iteration is

    r_mt = w_m p_m(t) / Σ_j w_j p_j(t)        w_m ← mean over t of r_mt

and never lowers the sum (Dempster, Laird and Rubin 1977).

Shapes: M teachers, R rows, N domains.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from storage.blocks import BlockReader
from storage.corpus_info import CorpusInfo
from storage.errors import CorpusError
from storage.reader import CacheReader
from storage.types import Float64, Int64

TOLERANCE = 1e-8  # gain of an iteration, nats a row, at which it ends
_AT_ONCE = 16  # blocks read together


def fit(gold_MR: npt.NDArray[np.floating], tolerance: float = TOLERANCE) -> Float64:
    """Returns the weights [M] that maximise the mean of log Σ_m w_m p_m(gold).

    Args:
        gold_MR: log p_m(gold), R ≥ 1 rows.
        tolerance: the first iteration that gains no more, in nats a row, is the last one.
    """
    wide = gold_MR.astype(np.float64)
    p = np.exp(wide - wide.max(0))  # a factor a row changes no responsibility
    weights = np.full(len(p), 1.0 / len(p))
    before = -np.inf
    while True:
        mixed = weights @ p
        now = float(np.log(mixed).mean())
        if now - before <= tolerance:
            return weights
        before = now
        weights = weights * (p / mixed).mean(1)
        weights /= weights.sum()


def calibration_blocks(info: CorpusInfo, domain: str, most: int) -> Int64:
    """Returns the ids of at most `most` training blocks of a domain, evenly spread over them."""
    ranges = [
        (s.first_block, s.blocks) for s in info.sources if s.split == "train" and s.domain == domain
    ]
    total = sum(count for _, count in ranges)
    wanted = min(most, total)
    index = (np.arange(wanted, dtype=np.int64) * 2 + 1) * total // max(1, 2 * wanted)
    starts = np.cumsum([0, *(count for _, count in ranges)])
    which = np.searchsorted(starts, index, side="right") - 1
    first = np.array([first for first, _ in ranges], np.int64)
    ids: Int64 = first[which] + index - starts[which] if wanted else index
    return ids


def domain_weights(corpus: BlockReader, caches: Mapping[str, CacheReader], most: int) -> Float64:
    """Returns each domain's weights [N, M]; one without training rows has those fitted on all.

    Args:
        corpus: of N domains.
        caches: teacher → cache, in the order of M.
        most: training blocks of a domain, at most.

    Raises:
        CorpusError: no training block has a target.
        MissingShard, CorruptShard, IncompleteCache, RemoteError: what reading them raises.
    """
    info = corpus.info
    gold = [_gold(corpus, caches, calibration_blocks(info, name, most)) for name in info.domains]
    together = np.concatenate(gold, axis=1)
    if not together.shape[1]:
        raise CorpusError(
            "no training block to fit the weights on has a target", where="fusion.weights", found="em",
            todo="give a source with split: train, raise fusion.calibration_blocks, or choose other "
            "weights",
        )  # fmt: skip
    every = fit(together)
    return np.stack([fit(one) if one.shape[1] else every for one in gold])


def _gold(
    corpus: BlockReader, caches: Mapping[str, CacheReader], block_ids: Int64
) -> npt.NDArray[np.float32]:
    """Returns log p_m(gold) of the blocks' scored rows, float32 [M, R]."""
    found = [np.empty((len(caches), 0), np.float32)]
    for start in range(0, len(block_ids), _AT_ONCE):
        ids = block_ids[start : start + _AT_ONCE]
        scored = corpus.read(ids).scored
        found.append(np.stack([each.stats(ids).gold_logprob[scored] for each in caches.values()]))
    return np.concatenate(found, axis=1)
