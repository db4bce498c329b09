"""Joined blocks for torch's DataLoader: a map-style data set, an endless stream that can be resumed.

A batch is a plain dict of tensors whose first dimension counts blocks, so that any trainer can move
it; the notes are nested by teacher. Fusing them is left to the loss, where the device is and where
the options may change from step to step.

Shapes: B blocks, T tokens, K head entries, S draws, Z temperatures, G segments, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from stages.batches import Batch, BatchReader
from stages.fusion import note_rows, note_tensors
from stages.order import BlockOrder, Position
from stages.stream import Share
from storage.errors import ConfigError
from storage.layout import feature_name
from storage.types import Int64, TeacherNotes, TokenBlocks

if TYPE_CHECKING:
    from pipeline.api.cache import Cache

IGNORED = -100
"""What transformers and torch leave out of a loss."""


class BlockDataset(Dataset[dict[str, Any]]):
    """A split's blocks, joined with all teachers' notes. Made by `Cache.dataset`.

    Item i is a dict of one block's tensors; `collate` makes of several a batch, with B in front:

        block_id, domain   int64 []      its number; index into Cache.domains
        input_ids          int64 [T]     the tokens
        position_ids       int64 [T]     position in the document's piece, restarting at 0: this is what
                                         keeps packed documents apart in attention
        document_ids       int64 [T]     number of the document in the corpus; −1 is padding
        loss_mask          bool [T]      rows that have a target: R of them in a batch
        shift_labels       int64 [T]     row t's target, token t + 1, where loss_mask; else −100. The last
                                         row's is the next block's first token, so it has one too
        labels             int64 [T]     the same unshifted, as transformers' models take them
        notes              teacher → ids int32 and logprobs float32 [T, K]; entropy, log_tail_mass,
                           gold_logprob float32 [T]; log_z [T, Z]; draw_ids, draw_logprobs [T, S] where
                           they are stored; feature_LAYER, feature_last_LAYER float32 [G, D]

    There is no attention mask: padding stands at a block's end, is a document of its own, and has no
    target.

    Args:
        cache: from `open_cache`.
        split: "train" or "heldout".
        seed: of our own trainings' order (`train.seed`), which reads few parts at a time; item i is
            then the order's i-th sample, to be read in sequence. Without it the blocks are ascending.
        samples: length; one epoch if not given. A longer one runs on into the next epochs, each in a
            new order.

    Raises (by indexing):
        IncompleteCache, MissingShard, CorruptShard, RemoteError
    """

    def __init__(
        self, cache: Cache, split: str = "train", *, seed: int | None = None,
        samples: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self._ascending = cache, cache.block_ids(split) if seed is None else None
        self._order = None if seed is None else order_of(cache, split, seed)
        blocks = len(self._ascending) if self._ascending is not None else len(self._order or ())
        _require_blocks(blocks, split)
        self._samples = blocks if samples is None else samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples and no number {index}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns several items, read together: what a DataLoader asks for."""
        ids = np.concatenate([self._ids(index, 1) for index in indices])
        return examples(self.cache, ids)

    def _ids(self, start: int, count: int) -> Int64:
        if self._order is not None:
            return self._order.take(self._order.after(Position(), start), count)[0]
        assert self._ascending is not None
        return self._ascending[np.arange(start, start + count) % len(self._ascending)]

    @property
    def block_ids(self) -> Int64:
        """int64 [len]: which block each item is."""
        return self._ids(0, len(self))

    def as_datasets(self) -> Any:
        """Returns a `datasets.Dataset` of the same items, for trainers that take nothing else (TRL's).

        It holds block ids alone; the notes are read from the cache when an item is asked for.
        """
        from datasets import Dataset as Table

        return Table.from_dict({"block_id": self.block_ids}).with_transform(_Columns(self.cache))


class _Columns:
    """Block ids → columns, as `datasets` wants its transforms."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __call__(self, rows: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        items = examples(self._cache, np.asarray(rows["block_id"], np.int64))
        return {key: [item[key] for item in items] for key in items[0]}


class BlockStream(IterableDataset[dict[str, Any]]):
    """Batches of a split without end, in the order of our own trainings. Made by `Cache.stream`.

    Give it to a DataLoader with `batch_size=None`; with workers these read batches in turn, and they
    come out in the same order. Each batch also holds `state`, the position after it: {epoch, consumed,
    seed}. A stream that has loaded it goes on with the very next batch, whatever the number of workers
    or ranks was (as long as the batches of all ranks together are as large).

    Args:
        cache: from `open_cache`.
        batch_blocks: B.
        seed: of the order.
        split: "train" or "heldout".
        rank, world: which of how many processes this is; they take batches in turn.
    """

    def __init__(
        self, cache: Cache, batch_blocks: int, *, seed: int = 0, split: str = "train",
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.cache, self._order = cache, order_of(cache, split, seed)
        self._share = Share(batch_blocks, 1, rank, world)
        self._position = Position()
        _require_blocks(len(self._order), split)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next iteration begin where a batch's `state` says.

        Raises:
            CheckpointError: it is of another seed's order.
        """
        self._position = self._order.resume(dict(state))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        order, samples = self._order.copy(), self._share.samples
        position = order.after(self._position, worker * samples)
        while True:
            [ids] = self._share.of_step(order, position)
            state = order.state(order.after(position, samples))
            yield {**collate(examples(self.cache, ids)), "state": state}
            position = order.after(position, workers * samples)


def order_of(cache: Cache, split: str, seed: int) -> BlockOrder:
    """Returns the order in which a training with this seed takes a split's blocks."""
    info = cache.corpus.info
    return BlockOrder(info.ranges(split), info.blocks_per_part, seed, info.fingerprint)


def _require_blocks(blocks: int, split: str) -> None:
    if not blocks:
        raise ConfigError(
            "the corpus has no blocks of this split", where="split", found=split,
            todo='name another of "train" and "heldout", or add a source to the corpus',
        )  # fmt: skip


def examples(cache: Cache, block_ids: Int64) -> list[dict[str, Any]]:
    """Returns one dict a block (see BlockDataset), read together."""
    blocks, notes = cache.tokens(block_ids), cache.notes(block_ids)
    columns = _tokens(blocks, cache.corpus.info.domain_of(block_ids))
    by_teacher = {name: _notes(note) for name, note in notes.items()}
    return [
        {
            **{key: column[i] for key, column in columns.items()},
            "notes": {
                name: {key: column[i] for key, column in each.items()}
                for name, each in by_teacher.items()
            },
        }
        for i in range(len(block_ids))
    ]


def _tokens(blocks: TokenBlocks, domains: Int64) -> dict[str, Tensor]:
    inputs = torch.from_numpy(blocks.inputs.astype(np.int64))
    scored = torch.from_numpy(blocks.scored)
    gold = torch.from_numpy(blocks.gold.astype(np.int64))
    labels = torch.full_like(inputs, IGNORED)
    labels[:, 1:] = inputs[:, 1:].where(scored[:, :-1], IGNORED)
    return {
        "block_id": torch.from_numpy(blocks.block_ids), "domain": torch.from_numpy(domains),
        "input_ids": inputs, "position_ids": torch.from_numpy(blocks.positions),
        "document_ids": torch.from_numpy(blocks.document[:, :-1]), "loss_mask": scored,
        "shift_labels": gold.where(scored, IGNORED), "labels": labels,
    }  # fmt: skip


def _notes(note: TeacherNotes) -> dict[str, Tensor]:
    features = {
        feature_name(pooling, layer): torch.from_numpy(values)
        for pooling in ("mean", "last")
        for layer, values in note.features.pooled(pooling).items()
    }
    return {**note_tensors(note), **features}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a batch: the items' tensors stacked, B in front, the notes still nested by teacher.

    Raises:
        ConfigError: a trainer has taken the notes out of the items.
    """
    if "notes" not in items[0]:
        raise ConfigError(
            "the items have no notes: a trainer has removed what its model does not take",
            where="remove_unused_columns", expected=False, found=sorted(items[0]),
            todo="set remove_unused_columns=False in the trainer's arguments",
        )  # fmt: skip
    batch: dict[str, Any] = default_collate(list(items))
    return batch


def as_batch(reader: BatchReader, batch: Mapping[str, Any], pooled: str = "mean") -> Batch:
    """Returns what our own losses take: the batch's rows with the fused target of the reader's teachers.

    Args:
        reader: of the cache that the batch is from.
        pooled: which of the stored features.

    Raises:
        ConfigError: the notes of a teacher are missing.
    """
    notes, scored = batch.get("notes", {}), batch["loss_mask"]
    missing = [name for name in reader.caches if name not in notes]
    if missing:
        raise ConfigError(
            "the batch has no notes of a teacher", where="batch['notes']", expected=missing,
            found=sorted(notes), todo="take batches and targets from one cache",
        )  # fmt: skip
    plain = Batch(
        inputs=batch["input_ids"], positions=batch["position_ids"],
        present=batch["document_ids"] >= 0, scored=scored, gold=batch["shift_labels"][scored],
        domain=batch["domain"], target=None, features={}, segment_weights={},
    )  # fmt: skip
    features = {
        (name, layer): notes[name][feature_name(pooled, layer)]
        for name, cache in reader.caches.items()
        for layer in cache.layers
        if pooled in cache.layout.pooling
    }
    return reader.fused(
        plain, {name: note_rows(notes[name], scored) for name in reader.caches}, features
    )
