"""Raw rows → means, standard deviations, paired differences, and what they say of the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Final

from pipeline.reproduce.rows import (
    APPROACHES,
    CE,
    ENTROPY,
    FULL,
    MULTITASK,
    SENSITIVITY,
    SINGLE,
    UNIFORM,
)

PERPLEXITY, KD, CE_LOSS = "perplexity/overall", "kd/overall", "ce/overall"
BLEU, ROUGE = "sampled_bleu/overall", "sampled_rouge_l/overall"
"""Of sampled text: what a weak student writes greedily repeats itself, and its scores say nothing."""
ANSWERS: Final = "answer_rouge_l/docstrings"
BEST_SINGLE, MEAN_SINGLE = "best single", "mean of the single teachers"
DISTINCT: Final = 0.1  # a tenth of a text's tokens: held-out text has more than a half
SEEDS: Final = 3
"""What a verdict needs at least."""
T975: Final = (
    math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
    2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t that is not exceeded with probability 0.975, by degrees of freedom, from 0 to 20."""
LOWER: Final = ("perplexity", "kd", "ce", "ece", "bits_per_byte")
"""Metrics of which less is better; of all others more is."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and their standard deviation (n − 1; None of one seed)."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(mean(found), stdev(found) if len(found) > 1 else None)


class Results:
    """The raw rows, by table, row, metric and seed.

    Args:
        raw: a list of {table, row, seed, metric, value}.
    """

    def __init__(self, raw: Iterable[Mapping[str, Any]]) -> None:
        self._found: dict[tuple[str, str, str], dict[int, float]] = {}
        self.rows: dict[str, list[str]] = {}
        self.metrics: dict[str, list[str]] = {}
        for one in raw:
            table, row, metric = one["table"], one["row"], one["metric"]
            self._found.setdefault((table, row, metric), {})[one["seed"]] = one["value"]
            for known, name in ((self.rows, row), (self.metrics, metric)):
                if name not in known.setdefault(table, []):
                    known[table].append(name)

    def seeds(self, table: str, row: str, metric: str) -> dict[int, float]:
        """Returns seed → value, empty where nothing was measured.

        The row "best single" is the single teacher whose students have the lowest mean held-out
        perplexity: picked by the very text it is judged on, to its advantage. The row "mean of the
        single teachers" is what a teacher that is picked blindly gives on average.
        """
        if row == BEST_SINGLE:
            row = self.best_single(table) or row
        if row == MEAN_SINGLE:
            each = [self.seeds(table, name, metric) for name in self.singles(table)]
            shared = set.intersection(*map(set, each)) if each else set()
            return {seed: mean(one[seed] for one in each) for seed in sorted(shared)}
        return self._found.get((table, row, metric), {})

    def spread(self, table: str, row: str, metric: str) -> Spread | None:
        """Returns the mean over the seeds, None where nothing was measured."""
        found = self.seeds(table, row, metric)
        return Spread.of(found.values()) if found else None

    def paired(self, table: str, row: str, other: str, metric: str) -> list[float]:
        """Returns row − other for each seed that both have."""
        a, b = self.seeds(table, row, metric), self.seeds(table, other, metric)
        return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]

    def singles(self, table: str) -> list[str]:
        """Returns the rows that learn from one teacher."""
        return [row for row in self.rows.get(table, []) if row.startswith(SINGLE)]

    def best_single(self, table: str) -> str | None:
        """Returns the single teacher's row with the lowest mean held-out perplexity."""
        means = {
            row: found.mean
            for row in self.singles(table)
            if (found := self.spread(table, row, PERPLEXITY))
        }
        return min(means, key=means.__getitem__) if means else None


@dataclass(frozen=True)
class Claim:
    """A claim, and the rows that it is tried on.

    Attributes:
        text: what is claimed; better: the row that is to be better than `worse`.
        metrics: by which.
    """

    text: str
    table: str
    better: str
    worse: str
    metrics: tuple[str, ...]


_TEXT = (BLEU, ROUGE)
_ALL = (CE_LOSS, KD, *_TEXT)
_OTHER_WEIGHTS = (CE_LOSS, *_TEXT)
"""For rows of other weights than the distillation loss is measured by: it would favour its own."""
_QUALITY = "{} has lower held-out loss and better generations than {}"

CLAIMS: Final = (
    Claim("the full method has lower held-out and distillation loss and better generations than "
          "cross-entropy alone", APPROACHES, FULL, CE, _ALL),
    *(
        Claim(_QUALITY.format("the full method", than), APPROACHES, FULL, other, _OTHER_WEIGHTS)
        for than, other in (
            ("the best single teacher", BEST_SINGLE),
            ("a single teacher, on the average of them", MEAN_SINGLE),
            ("uniform weights (plain KD of all)", UNIFORM),
        )
    ),
    Claim(_QUALITY.format("fusing with uniform weights", "a single teacher, on the average of them"),
          APPROACHES, UNIFORM, MEAN_SINGLE, _OTHER_WEIGHTS),
    Claim(_QUALITY.format("entropy weighting", "uniform"), APPROACHES, ENTROPY, UNIFORM,
          _OTHER_WEIGHTS),
    Claim("feature alignment helps on top of entropy weights", APPROACHES, FULL, ENTROPY, _ALL),
    Claim("the right layers help more than wrong ones", SENSITIVITY, "features 0.1",
          "features 0.1, wrong layers", _ALL),
    Claim("entropy weights cope with a weak teacher better than uniform ones", SENSITIVITY,
          "with a weak one", "with a weak one, uniform", _OTHER_WEIGHTS),
    *(
        Claim(f"{where} of the mix the full method beats {than}", MULTITASK, FULL, other, metrics)
        for than, other in (("the best single teacher", BEST_SINGLE), ("uniform weights", UNIFORM))
        for where, metrics in (
            ("over all tasks", _OTHER_WEIGHTS),
            ("in the instruction task", ("ce/docstrings", ANSWERS)),
        )
    ),
)  # fmt: skip
"""What arXiv 2507.15198 says, as comparisons of rows."""


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, and its 95 % confidence interval by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, apart: Sequence[float]) -> Interval:
        middle, half = mean(apart), math.inf
        if len(apart) > 1:
            t = T975[min(len(apart), len(T975)) - 1]
            half = t * stdev(apart) / math.sqrt(len(apart))
        return cls(middle, middle - half, middle + half)


@dataclass(frozen=True)
class Answer:
    """What the numbers say of one claim by one metric.

    Attributes:
        difference: paired, better − worse.
        favour: seeds that have the claimed sign; seeds: all that both rows have.
        babble: whether it is a score of text that repeats itself (distinct-1 below DISTINCT): BLEU and
            ROUGE-L of such text say nothing.
    """

    claim: Claim
    metric: str
    difference: Interval
    favour: int
    seeds: int
    babble: bool

    @property
    def judged(self) -> bool:
        """Whether there are seeds enough and something to judge."""
        return self.seeds >= SEEDS and not self.babble

    @property
    def verdict(self) -> str:
        """Returns yes or no where the interval leaves zero out."""
        if self.babble:
            return "babble"
        if self.seeds < SEEDS:
            return "too few seeds"
        if self.difference.low <= 0 <= self.difference.high:
            return "not told apart"
        return "yes" if (self.difference.mean < 0) == lower_is_better(self.metric) else "no"


def answers(results: Results) -> list[Answer]:
    """Returns every claim's answers, as far as the rows were measured."""
    found = []
    for claim in CLAIMS:
        for metric in claim.metrics:
            apart = results.paired(claim.table, claim.better, claim.worse, metric)
            if apart:
                sign = -1 if lower_is_better(metric) else 1
                favour = sum(sign * x > 0 for x in apart)
                babble = _babbles(results, claim, metric)
                found.append(Answer(claim, metric, Interval.of(apart), favour, len(apart), babble))
    return found


def _babbles(results: Results, claim: Claim, metric: str) -> bool:
    """Returns whether the text that a score is of repeats itself in one of the rows."""
    if metric not in (*_TEXT, ANSWERS):
        return False
    prefix, _, domain = metric.partition("/")
    distinct = f"{prefix.partition('_')[0]}_distinct_1/{domain}"
    told = [results.spread(claim.table, r, distinct) for r in (claim.better, claim.worse)]
    return any(one is not None and one.mean < DISTINCT for one in told)


def lower_is_better(metric: str) -> bool:
    return metric.split("/")[0] in LOWER
