"""Whether a capture's numbers are logprobs of ids that exist, and of which token each entry tells.

The shift is told by likelihood: with the right one the text is more probable than with one token to
either side. On a sample of every sequence's entries the actual token's logprob is taken with the declared
shift and with one less and one more; where one of these is larger by more than chance the capture is
refused.

Shapes: m entries of a sequence, c candidates of all of them, W the most of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.exchange.captured import CapturedSequence, refuse
from storage.errors import VocabularyMismatch
from storage.types import Bool, Float32, Float64, Int32, Int64

SHIFTS = (-1, 0, 1)
_SAMPLED = 16  # entries of a sequence that are asked
_SIGMAS, _NATS = 4.0, 0.5
"""By which another shift must be better to contradict the declared one: more than chance, and more than a
model that has learned nothing prefers the token it has just read (0.1 nats). Trained ones tell the right
shift by several nats."""


@dataclass(frozen=True)
class Tolerance:
    """What another tool's rounding may do to a capture.

    Attributes:
        logprob: how far above 0 a logprob may lie; it is then 0.
        mass: how far above 1 a head's mass may lie; its tail is then empty.
        entropy: how far, in nats, an entropy may lie below 0 or above log V; it is then that.
    """

    logprob: float = 1e-3
    mass: float = 1e-2
    entropy: float = 1e-2


TOLERANCES = {"distillkit": Tolerance(0.05, 0.1), "topk-jsonl": Tolerance(), "vllm": Tolerance()}
"""DistillKit's polynomials miss by more than a float's rounding."""


@dataclass(frozen=True)
class CleanHeads:
    """Checked candidates: entry by entry, most probable first, no logprob above 0.

    Attributes:
        ids, logprobs: int32 and float32 [c].
        mass: the largest of an entry.
        entropy, gold: float32 [m], nats in [0, log V] and the actual tokens' logprobs, none above 0; NaN
            where not known.
    """

    ids: Int32
    logprobs: Float32
    mass: float
    entropy: Float32
    gold: Float32


def clean(one: CapturedSequence, vocab_size: int, tolerance: Tolerance) -> CleanHeads:
    """Returns a sequence's candidates, checked and sorted.

    Raises:
        CorruptShard: a logprob that is NaN, infinite or positive; an id twice in an entry; more mass
            than 1; an entropy that no distribution over the vocabulary has.
        VocabularyMismatch: an id beyond the vocabulary, or more candidates than it has ids.
    """
    entry = np.repeat(np.arange(len(one.counts)), one.counts)
    _require_ids(one, entry, vocab_size)
    values = one.logprobs
    _refuse_where(~np.isfinite(values), entry, one, "a logprob is NaN or infinite", values)
    positive = values > tolerance.logprob
    _refuse_where(
        positive,
        entry,
        one,
        "a logprob is positive: maybe these are probabilities or logits",
        values,
    )
    order = np.lexsort((one.ids, -values, entry))
    by_id = np.lexsort((one.ids, entry))
    twice = np.zeros(len(values), bool)
    twice[by_id[1:]] = (np.diff(one.ids[by_id]) == 0) & (np.diff(entry[by_id]) == 0)
    _refuse_where(twice, entry, one, "an id stands twice in an entry", one.ids)
    mass = np.bincount(entry, np.exp(values.astype(np.float64)), len(one.counts))
    if (mass > 1 + tolerance.mass).any():
        j = int(mass.argmax())
        raise refuse("the candidates' probabilities exceed 1", f"{one.where}, entry {j}",
                     expected=f"at most {1 + tolerance.mass}", found=f"{mass[j]:.4f}")  # fmt: skip
    zero = np.float32(0)
    entropy, gold = _clean_statistics(one, vocab_size, tolerance)
    return CleanHeads(
        one.ids[order], np.minimum(values[order], zero), float(mass.max(initial=0.0)), entropy, gold
    )


def _clean_statistics(
    one: CapturedSequence, vocab_size: int, tolerance: Tolerance
) -> tuple[Float32, Float32]:
    """Returns an entry's entropy and its actual token's logprob, NaN where not known."""
    entry, largest = np.arange(len(one.counts)), math.log(vocab_size)
    unknown = np.full(len(entry), np.nan, np.float32)
    entropy = unknown if one.entropy is None else one.entropy
    gold = unknown if one.gold is None else one.gold
    beyond = (entropy < -tolerance.entropy) | (entropy > largest + tolerance.entropy)
    _refuse_where(
        beyond, entry, one, "an entropy is negative or above that of even odds", entropy,
        f"0 to {largest:.3f} nats, log {vocab_size:,}",
    )  # fmt: skip
    _refuse_where(
        np.isinf(gold) | (gold > tolerance.logprob), entry, one,
        "an actual token's logprob is infinite or positive", gold, "a finite number, 0 or less",
    )  # fmt: skip
    return np.clip(entropy, 0, np.float32(largest)), np.minimum(gold, np.float32(0))


def _require_ids(one: CapturedSequence, entry: Int64, vocab_size: int) -> None:
    todo = "use the capture of a teacher with the corpus's tokenizer"
    expected = f"below {vocab_size:,}, the corpus's vocabulary"
    if one.tokens.size and int(one.tokens.max()) >= vocab_size:
        at = int((one.tokens >= vocab_size).argmax())
        raise VocabularyMismatch(
            "a token of a captured sequence is beyond the vocabulary", where=f"{one.where}, token {at}",
            expected=expected, found=int(one.tokens[at]), todo=todo,
        )  # fmt: skip
    if int(one.counts.max(initial=0)) > vocab_size:
        raise VocabularyMismatch(
            "an entry has more candidates than the vocabulary has ids", where=one.where,
            expected=f"at most {vocab_size:,}", found=int(one.counts.max()), todo=todo,
        )  # fmt: skip
    beyond = (one.ids < 0) | (one.ids >= vocab_size)
    if beyond.any():
        at = int(beyond.argmax())
        raise VocabularyMismatch(
            "a candidate is beyond the vocabulary", where=f"{one.where}, entry {int(entry[at])}",
            expected=expected, found=int(one.ids[at]), todo=todo,
        )  # fmt: skip


def _refuse_where(
    bad: Bool, entry: Int64, one: CapturedSequence, what: str, values: Any, expected: Any = None
) -> None:
    if bad.any():
        at = int(bad.argmax())
        raise refuse(
            what, f"{one.where}, entry {int(entry[at])}", expected=expected, found=values[at]
        )


@dataclass
class ShiftCheck:
    """Collects how probable the actual token is with the declared shift and with its neighbours."""

    vocab_size: int
    rows: int = 0
    sums: Float64 = field(default_factory=lambda: np.zeros(3))
    # of what a neighbour is better by than the declared shift: sum and sum of squares
    gains: Float64 = field(default_factory=lambda: np.zeros((2, 3)))
    first_told: str = ""

    def add(self, one: CapturedSequence, heads: CleanHeads) -> None:
        """Looks at a sample of a sequence's entries, evenly taken."""
        if one.first == 0 and len(one.counts) and one.counts[0] and not self.first_told:
            self.first_told = one.where
        starts = np.concatenate([[0], np.cumsum(one.counts)])
        of = one.first + np.arange(len(one.counts))  # which token each entry is said to tell of
        usable = np.flatnonzero((one.counts > 0) & (of >= 1) & (of + 1 < len(one.tokens)))
        every = max(1, len(usable) // _SAMPLED)
        for j in usable[::every].tolist():
            span = slice(int(starts[j]), int(starts[j + 1]))
            ids, logprobs = heads.ids[span], heads.logprobs[span]
            found = np.array(
                [self._score(ids, logprobs, int(one.tokens[of[j] + s])) for s in SHIFTS]
            )
            self.rows += 1
            self.sums += found
            gain = found - found[1]
            self.gains += np.stack([gain, gain * gain])

    def _score(self, ids: Int32, logprobs: Float32, token: int) -> float:
        """Returns a token's logprob: its own, or an even share of the tail."""
        hit = np.flatnonzero(ids == token)
        if len(hit):
            return float(logprobs[hit[0]])
        tail = max(1e-6, 1.0 - float(np.exp(logprobs.astype(np.float64)).sum()))
        share = math.log(tail / max(1, self.vocab_size - len(ids)))
        return min(float(logprobs[-1]), share)

    @property
    def means(self) -> dict[str, float]:
        """Mean logprob of the actual token, nats: with one less, the declared, one more."""
        names = ("before", "declared", "after")
        return {n: float(s) / max(1, self.rows) for n, s in zip(names, self.sums, strict=True)}

    def require(self, offset: int) -> None:
        """Refuses the declared shift where the capture contradicts it.

        Raises:
            CorruptShard: shows the figures of the declared shift and of the other.
        """
        means = self.means
        if self.first_told:
            raise refuse(
                "the first entry tells of a sequence's first token, before which nothing was read: "
                f"entries are not of token j + {offset}", self.first_told, expected=_told(means),
                found=f"a distribution at entry 0, offset {offset}",
            )  # fmt: skip
        if self.rows < 2:
            return
        mean = self.gains[0] / self.rows
        spread = np.sqrt(np.maximum(self.gains[1] / self.rows - mean**2, 0) / self.rows)
        best = int(mean.argmax())
        if mean[best] > max(_NATS, _SIGMAS * float(spread[best])):
            right = offset + SHIFTS[best]
            raise refuse(
                f"the capture is shifted: over {self.rows:,} entries the text is more probable if entry "
                f"j is the distribution of token j + {right} than of j + {offset}", f"--offset {offset}",
                expected=f"the declared shift gives the text the largest logprob: {_told(means)}",
                found=f"offset {offset}: {means['declared']:.3f} nats a token; offset {right}: "
                f"{list(means.values())[best]:.3f}",
            )  # fmt: skip


def _told(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())
