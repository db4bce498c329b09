"""One block of a cache as the rows of an export.

Columns of Parquet (a row a block; lists of T, one value a row of the block, null where it has no target):

    block, domain, split        which block, and of which source
    input_ids, document, offset, loss_mask    as in the corpus, T + 1 of each (the last looks ahead)
    head_ids, head_logprobs     [T][≤ K], most probable first, under the full softmax at temperature 1
    tail_mass                   of what the head does not keep
    entropy, gold_logprob       nats; no column where an imported cache does not hold them
    draw_ids, draw_logprobs     [T][S], if there are any (logprobs: if it has temperatures)
    log_z                       [T][Z], if it has temperatures
    feature_count, feature_<l>, feature_last_<l>    [G] and [G][D], if layers are pooled

Shapes: T tokens of a block, K head entries, S draws, Z temperatures, G segments, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.exchange.matching import pieces
from storage.blocks import BlockReader
from storage.layout import Layout
from storage.reader import CacheReader
from storage.types import LOG_ZERO, AnyArray, TeacherNotes, TokenBlocks

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class BlockRows:
    """One block of a cache, decoded.

    Attributes:
        layout: of the cache.
        place: block, domain, split.
        tokens: the block, [1, T + 1]. notes: on it, [1, T, …].
    """

    layout: Layout
    place: dict[str, Any]
    tokens: TokenBlocks
    notes: TeacherNotes

    def heads(self) -> list[tuple[list[int], AnyArray] | None]:
        """Returns each row's used entries, most probable first: ids and logprobs; None: no target."""
        scored = self.tokens.scored[0]
        found: list[tuple[list[int], AnyArray] | None] = [None] * len(scored)
        for t in np.flatnonzero(scored).tolist():
            ids, logprobs = self.notes.head.ids[0, t], self.notes.head.logprobs[0, t]
            order = np.lexsort((ids, -logprobs))
            kept = order[logprobs[order] > LOG_ZERO / 2]
            found[t] = (ids[kept].tolist(), logprobs[kept])
        return found

    def known(self, name: str) -> list[float | None]:
        """Returns a statistic, null at rows without a target."""
        values = getattr(self.notes.stats, name)[0]
        return self._spread(values)

    def _spread(self, values: AnyArray) -> list[Any]:
        rows = self.tokens.scored[0].tolist()
        return [v if s else None for v, s in zip(values.tolist(), rows, strict=True)]

    def columns(self) -> dict[str, Any]:
        """Returns the Parquet row."""
        layout, notes, tokens = self.layout, self.notes, self.tokens
        heads = self.heads()
        row: dict[str, Any] = {
            **self.place,
            "input_ids": tokens.tokens[0].tolist(), "document": tokens.document[0].tolist(),
            "offset": tokens.offset[0].tolist(), "loss_mask": tokens.loss_mask[0].tolist(),
            "head_ids": [h and h[0] for h in heads],
            "head_logprobs": [h and h[1].tolist() for h in heads],
            "tail_mass": self._spread(_tail_mass(notes.stats.log_tail_mass[0])),
        }  # fmt: skip
        row |= {n: self.known(n) for n in ("entropy", "gold_logprob") if n not in layout.missing}
        if notes.draws is not None:
            row["draw_ids"] = self._spread(notes.draws.ids[0])
            if notes.draws.logprobs is not None:
                row["draw_logprobs"] = self._spread(notes.draws.logprobs[0])
        if layout.temperatures:
            row["log_z"] = self._spread(notes.stats.log_z[0])
        if layout.feature_layers:
            row["feature_count"] = notes.features.count[0].tolist()
        for name, (pooling, layer) in layout.feature_names().items():
            row[name] = notes.features.pooled(pooling)[layer][0].tolist()
        return row


def _tail_mass(log_tail: AnyArray) -> AnyArray:
    mass: AnyArray = np.exp(log_tail)
    return mass


def block_rows(cache: CacheReader, corpus: BlockReader, block: int) -> BlockRows:
    """Returns one block of a cache, with where it lies in the corpus.

    Raises:
        IncompleteCache, MissingShard, CorruptShard
    """
    ids = np.array([block])
    source = next(
        s for s in corpus.info.sources if s.first_block <= block < s.first_block + s.blocks
    )
    place = {"block": block, "domain": source.domain, "split": source.split}
    return BlockRows(cache.layout, place, corpus.read(ids), cache.read(ids))


def parquet_schema(layout: Layout) -> pa.Schema:
    """Returns the columns of a cache's export."""
    import pyarrow as pa

    ints, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    columns: dict[str, Any] = {
        "block": pa.int64(), "domain": pa.string(), "split": pa.string(), "input_ids": ints,
        "document": pa.list_(pa.int64()), "offset": pa.list_(pa.int64()),
        "loss_mask": pa.list_(pa.bool_()), "head_ids": pa.list_(ints),
        "head_logprobs": pa.list_(floats), "tail_mass": floats,
    }  # fmt: skip
    columns |= {n: floats for n in ("entropy", "gold_logprob") if n not in layout.missing}
    if layout.draws:
        columns["draw_ids"] = pa.list_(ints)
    if layout.draws_tempered:
        columns["draw_logprobs"] = pa.list_(floats)
    if layout.temperatures:
        columns["log_z"] = pa.list_(floats)
    if layout.feature_layers:
        columns["feature_count"] = ints
    columns |= {name: pa.list_(floats) for name in layout.feature_names()}
    return pa.schema(columns)


def json_lines_of(rows: BlockRows) -> Iterator[str]:
    """Yields a line for each document's piece in the block that has a target.

    {"block", "document", "input_ids" (with the token that the last row predicts, if it is the
    document's), "start": 0, "logprobs": [{id: logprob} or null, …], "gold_logprobs", "entropy"}: entry j
    is the distribution of token j + 1. `scholiast import --format topk-jsonl` reads all of it. Tail
    draws, partition sums and features are left out.
    """
    heads, document = rows.heads(), rows.tokens.document[0]
    known = {
        {"gold_logprob": "gold_logprobs"}.get(n, n): rows.known(n)
        for n in ("gold_logprob", "entropy")
        if n not in (*rows.layout.missing, *rows.layout.bounds)
    }
    for start, stop in pieces(document[:-1]):
        mine = heads[start:stop]
        if not any(mine):
            continue
        end = stop + int(document[stop] == document[start])
        line = {
            "block": rows.place["block"], "document": int(document[start]),
            "input_ids": rows.tokens.tokens[0, start:end].tolist(), "start": 0,
            "logprobs": [h and {str(i): _short(v) for i, v in zip(*h, strict=True)} for h in mine],
            **{n: [v and _short(np.float32(v)) for v in values[start:stop]]
               for n, values in known.items()},
        }  # fmt: skip
        yield json.dumps(line, separators=(",", ":"))


def _short(value: Any) -> float:
    """Returns the shortest decimal that is the same float32."""
    return float(str(value))
