"""The processes that train one student together, and how they agree.

torchrun (or whatever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts one process
a rank. Gradients go over nccl on GPUs and gloo on CPUs; the few numbers and texts that ranks agree on
go over gloo. In one process everything here does nothing.

An error is told to all: what ranks can foresee to fail apart (reading, writing) runs in `together`; any
other error is left in the rendezvous' store for those that then find a closed connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stages.device import choose_device
from storage.errors import ConfigError, OtherRank, ScholiastError, Stopped

T = TypeVar("T")

_FAILED = "scholiast/failed"
_LINGER = 2.0  # seconds that the store's own process gives the others to read it


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        device: of this rank.
        rank, world: which of how many.
        group: the gloo group that numbers and texts go over; None in one process.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def apart(self) -> Ranks:
        """Returns the same ranks over a group of their own, for another thread."""
        if self.world == 1:
            return self
        return Ranks(self.device, self.rank, self.world, dist.new_group(backend="gloo"))

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Returns the numbers added up over the ranks, float64."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def sums(self, lists: Sequence[Sequence[float]]) -> list[list[float]]:
        """Returns lists of numbers, each as long on every rank, added up in one go."""
        added = iter(self.sum([number for numbers in lists for number in numbers]))
        return [[next(added) for _ in numbers] for numbers in lists]

    def largest(self, number: float) -> float:
        """Returns the largest of the ranks' numbers."""
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, operation, group=self.group)
        return values.tolist()

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, task: Callable[[], T]) -> T:
        """Returns what a task gives on this rank; if it fails on any, it fails on all.

        Raises:
            OtherRank: it failed elsewhere, with that error's text.
        """
        if self.world == 1:
            return task()
        try:
            result = task()
        except BaseException as error:  # DCP's own is no Exception
            self.fail(error)
            raise
        self.fail(None)
        return result

    def on_first(self, task: Callable[[], T]) -> T:
        """Returns what a task gives on rank 0, on every rank."""
        result = self.together(lambda: task() if self.first else None)
        return self.gather(result)[0]  # type: ignore[return-value]

    def fail(self, error: BaseException | None) -> None:
        """Ends all ranks if one of them has an error; every rank calls this at the same point.

        Raises:
            OtherRank: this rank has none, another one has.
        """
        told = self.gather(None if error is None else (self.rank, _text(error), _code(error)))
        if error is None:
            for found in told:
                if found is not None:
                    raise OtherRank(*found)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the ranks that the environment names, for the length of the block.

    Args:
        device: "auto", "cpu", "cuda" (this rank's GPU), or "cuda:n" in one process.

    Raises:
        ConfigError: a device that the ranks cannot share.
        OtherRank: the block failed because another rank did.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(choose_device(device))
        return
    mine = _device_of_rank(device)
    backend = "cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    ranks = Ranks(mine, rank, world, dist.new_group(backend="gloo"))
    try:
        yield ranks
    except Stopped:  # on all ranks
        dist.destroy_process_group()
        raise
    except Exception as error:
        cause = _first_error(store, ranks, error)
        if cause is None:
            raise
        raise cause from error
    dist.destroy_process_group()


def _device_of_rank(device: str) -> torch.device:
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen
    if chosen.index is not None:
        raise ConfigError(
            "several ranks cannot share one GPU", where="device", found=device,
            todo="set device: auto or cuda; each rank then takes the GPU of its LOCAL_RANK",
        )  # fmt: skip
    mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(mine)
    return mine


def _first_error(store: Any, ranks: Ranks, error: Exception) -> ScholiastError | None:
    """Leaves this rank's error for the others, or returns the one that was there before it."""
    if isinstance(error, OtherRank):
        return None
    if isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE):
        return _told(store) or ScholiastError(
            f"another rank is gone and left no message: {str(error).splitlines()[0]}",
            where=f"seen from rank {ranks.rank}", todo="see whether it was killed (memory, a signal) and "
            "run the same command again: finished steps are kept",
        )  # fmt: skip
    mine = json.dumps([ranks.rank, _text(error), _code(error)])
    try:
        found = store.compare_set(_FAILED, "", mine).decode()
    except Exception:  # the store went with its process: this rank's own error must do
        return None
    if found != mine:
        return OtherRank(*json.loads(found))
    if ranks.device.type == "cpu" and "TORCHELASTIC_RUN_ID" not in os.environ and ranks.first:
        dist.destroy_process_group()  # those that wait for this rank find a closed connection
        time.sleep(_LINGER)
    return None


def _told(store: Any) -> OtherRank | None:
    """Returns the error that another rank has left in the store, if it has."""
    with contextlib.suppress(Exception):  # the store may be gone with its process
        found = store.compare_set(_FAILED, "", "").decode()
        return OtherRank(*json.loads(found)) if found else None
    return None


def _text(error: BaseException) -> str:
    if isinstance(error, ScholiastError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, ScholiastError) else 1
