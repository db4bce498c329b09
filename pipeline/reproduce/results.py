"""Raw rows → means, standard deviations, paired differences, and what they say of the paper's claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

PERPLEXITY, KD, BLEU, ROUGE = "perplexity/overall", "kd/overall", "bleu/overall", "rouge_l/overall"
BEST_SINGLE: Final = "best single"
DISTINCT: Final = 0.1  # a tenth of a greedy text's tokens: held-out text has more than a half
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
        perplexity: picked by the very text it is judged on, to its advantage.
        """
        if row == BEST_SINGLE:
            row = self.best_single(table) or row
        return self._found.get((table, row, metric), {})

    def spread(self, table: str, row: str, metric: str) -> Spread | None:
        """Returns the mean over the seeds, None where nothing was measured."""
        found = self.seeds(table, row, metric)
        return Spread.of(found.values()) if found else None

    def paired(self, table: str, row: str, other: str, metric: str) -> list[float]:
        """Returns row − other for each seed that both have."""
        a, b = self.seeds(table, row, metric), self.seeds(table, other, metric)
        return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]

    def best_single(self, table: str) -> str | None:
        """Returns the single teacher's row with the lowest mean held-out perplexity."""
        means = {
            row: found.mean
            for row in self.rows.get(table, [])
            if row.startswith(SINGLE) and (found := self.spread(table, row, PERPLEXITY))
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


_ALL = (PERPLEXITY, KD, BLEU, ROUGE)
_QUALITY = "{} has lower perplexity and distillation loss and better generations than {}"

CLAIMS: Final = (
    *(
        Claim(_QUALITY.format("the full method", than), APPROACHES, FULL, other, _ALL)
        for than, other in (
            ("cross-entropy alone", CE), ("the best single teacher", BEST_SINGLE),
            ("uniform weights (plain KD of all)", UNIFORM),
        )
    ),
    Claim(_QUALITY.format("entropy weighting", "uniform"), APPROACHES, ENTROPY, UNIFORM, _ALL),
    Claim("feature alignment helps on top of entropy weights", APPROACHES, FULL, ENTROPY, _ALL),
    Claim("the right layers help more than wrong ones", SENSITIVITY, "features 0.1",
          "features 0.1, wrong layers", _ALL),
    Claim("three teachers teach more than one", SENSITIVITY, "3 teachers", "1 teacher", _ALL),
    Claim("entropy weights cope with a weak teacher better than uniform ones", SENSITIVITY,
          "with a weak one", "with a weak one, uniform", _ALL),
    *(
        Claim(f"{where} of the mix the full method beats {than}", MULTITASK, FULL, other, metrics)
        for than, other in (("the best single teacher", BEST_SINGLE), ("uniform weights", UNIFORM))
        for where, metrics in (
            ("over all tasks", _ALL),
            ("in the instruction task",
             ("perplexity/docstrings", "kd/docstrings", "answer_rouge_l/docstrings")),
        )
    ),
)  # fmt: skip
"""What arXiv 2507.15198 says, as comparisons of rows."""


@dataclass(frozen=True)
class Answer:
    """What the numbers say of one claim by one metric.

    Attributes:
        difference: paired, better − worse.
        favour: seeds that have the claimed sign; seeds: all that both rows have.
        babble: whether it is a score of text, and a row's greedy text repeats itself (distinct-1 below
            DISTINCT): BLEU and ROUGE-L of such text say nothing.
    """

    claim: Claim
    metric: str
    difference: Spread
    favour: int
    seeds: int
    babble: bool

    @property
    def verdict(self) -> str:
        """Returns yes or no where all seeds agree and the mean exceeds the spread."""
        sd = self.difference.sd
        if self.babble:
            return "babble"
        if sd is None or abs(self.difference.mean) <= sd or self.favour not in (0, self.seeds):
            return "not told apart"
        return "yes" if self.favour else "no"


def answers(results: Results) -> list[Answer]:
    """Returns every claim's answers, as far as the rows were measured."""
    found = []
    for claim in CLAIMS:
        for metric in claim.metrics:
            apart = results.paired(claim.table, claim.better, claim.worse, metric)
            if apart:
                sign = -1 if lower_is_better(metric) else 1
                favour = sum(sign * x > 0 for x in apart)
                babble = metric in (BLEU, ROUGE) and _babbles(results, claim)
                found.append(Answer(claim, metric, Spread.of(apart), favour, len(apart), babble))
    return found


def _babbles(results: Results, claim: Claim) -> bool:
    told = [
        results.spread(claim.table, r, "distinct_1/overall") for r in (claim.better, claim.worse)
    ]
    return any(one is not None and one.mean < DISTINCT for one in told)


def lower_is_better(metric: str) -> bool:
    return metric.split("/")[0] in LOWER
