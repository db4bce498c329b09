"""What is to be made of a capture, and what was found in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.exchange.captured import refuse
from storage.errors import ConfigError


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a capture.

    Attributes:
        preset: of the cache's codecs.
        k: head entries; None: as many as every entry has.
        entropy_bound: whether the least entropy that a head allows is to stand for the entropy.
    """

    preset: str
    k: int | None
    entropy_bound: bool


@dataclass(frozen=True)
class Found:
    """What a capture came to.

    Attributes:
        sequences, entries: how many there are; candidates: (least, most) of an entry that has any.
        likelihood: mean logprob of the actual token with one less than the declared offset, with it, and
            one more, over likelihood_rows entries.
        mass: the largest of a head.
        rows: with a target; served: of them, and by a teacher that had read just what the block gives
            (same) or more (other).
        missing, bounds: as the layout names them.
    """

    sequences: int
    entries: int
    candidates: tuple[int, int]
    likelihood: dict[str, float]
    likelihood_rows: int
    mass: float
    k: int = 0
    rows: int = 0
    same: int = 0
    other: int = 0
    missing: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Tally:
    """What is counted while blocks are matched: rows with a target; served by a teacher that had read the
    same or other tokens; not served (lost); served with fewer than k candidates (thin)."""

    k: int
    rows: int = 0
    same: int = 0
    other: int = 0
    lost: int = 0
    thin: int = 0
    first_lost: str = ""
    first_thin: str = ""
    gold_known: bool = True
    entropy_known: bool = True

    def require(self, found: Found) -> None:
        """Refuses what is not covered; never are rows filled in."""
        if self.lost:
            raise refuse(
                f"the capture does not cover the corpus: {self.lost:,} of {self.rows:,} rows with a "
                "target have no distribution", f"the first: {self.first_lost}",
                expected="sequences that are the corpus's documents or blocks, whole, by its tokenizer",
                found=f"{found.sequences:,} sequences, which serve {self.rows - self.lost:,} rows",
            )  # fmt: skip
        if self.thin:
            raise ConfigError(
                f"{self.thin:,} rows have fewer candidates than k", where=f"the first: {self.first_thin}",
                expected=f"{self.k} or more", todo=f"give --k {found.candidates[0]}",
            )  # fmt: skip
