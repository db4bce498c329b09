"""What continuations have in common with the text itself, and how varied they are.

BLEU and chrF are sacrebleu's corpus scores with its defaults (Post, arXiv 1804.08771): n-gram counts are
summed over the continuations, not scores averaged. ROUGE-L is the mean F1 of rouge-score with its default
tokenizer, which knows letters a to z and digits only. distinct-n (Li et al., arXiv 1510.03055) is the
number of different n-grams of token ids over the number of tokens, within all continuations together: it
falls with their number and has no interval, because a resample repeats whole continuations.

All of BLEU, chrF and ROUGE-L are functions of sums over the continuations, so that a bootstrap resample
costs one computation from counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from stages.bootstrap import interval, resampled
from stages.evaluate import OVERALL
from storage.types import Float64


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after one prompt.

    Attributes:
        domain: name.
        ids: that it wrote.
        text: of those.
        reference: the text itself.
    """

    domain: str
    ids: list[int]
    text: str
    reference: str


def text_scores(
    written: Sequence[Continuation], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Returns the scores by domain and overall.

    Returns:
        domain → {bleu, chrf (0 to 100), rouge_l (0 to 1), distinct_1, distinct_2, intervals}; a resample
        of the whole draws in each domain apart. A domain of one continuation tells no spread: it and the
        whole have no intervals.
    """
    domains = list(dict.fromkeys(one.domain for one in written))
    groups = {name: [one for one in written if one.domain == name] for name in domains}
    sums = {name: _statistics(group) for name, group in groups.items()}
    drawn = {n: resampled(x, resamples, seed + i) for i, (n, x) in enumerate(sums.items())}
    totals = {name: one.sum(0) for name, one in sums.items()}
    single = {name for name, group in groups.items() if len(group) == 1}
    if domains:
        single |= {OVERALL} if single else set()
        groups[OVERALL] = list(written)
        totals[OVERALL] = np.sum([*totals.values()], axis=0)
        drawn[OVERALL] = np.sum([*drawn.values()], axis=0)
    return {
        name: {
            **_scores(totals[name]), **_distinct(group),
            "intervals": _intervals(drawn[name]) if resamples and name not in single else {},
        }
        for name, group in groups.items()
    }  # fmt: skip


@cache
def _metrics() -> tuple[Any, Any, Any]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(), CHRF(), RougeScorer(["rougeL"])


def _statistics(group: Sequence[Continuation]) -> Float64:
    """Returns what each continuation adds, [N, F]: 1, its ROUGE-L, BLEU's counts, chrF's counts."""
    bleu, chrf, rouge = _metrics()
    texts, references = [one.text for one in group], [one.reference for one in group]
    shared = [rouge.score(r, t)["rougeL"].fmeasure for r, t in zip(references, texts, strict=True)]
    counts = [metric._extract_corpus_statistics(texts, [references]) for metric in (bleu, chrf)]
    return np.column_stack([np.ones(len(group)), shared, *map(np.array, counts)])


def _scores(sums_F: Float64) -> dict[str, float]:
    bleu, chrf, _ = _metrics()
    split = 4 + 2 * bleu.max_ngram_order
    return {
        "bleu": float(bleu._compute_score_from_stats(sums_F[2:split].tolist()).score),
        "chrf": float(chrf._compute_score_from_stats(sums_F[split:].tolist()).score),
        "rouge_l": float(sums_F[1] / sums_F[0]),
    }


def _intervals(drawn_RF: Float64) -> dict[str, list[float]]:
    rows = [_scores(sums) for sums in drawn_RF]
    return {name: interval(np.array([row[name] for row in rows])) for name in rows[0]}


def _distinct(group: Sequence[Continuation]) -> dict[str, float]:
    tokens = sum(len(one.ids) for one in group)
    found: Mapping[int, set[tuple[int, ...]]] = {
        n: {tuple(one.ids[i : i + n]) for one in group for i in range(len(one.ids) - n + 1)}
        for n in (1, 2)
    }
    return {f"distinct_{n}": len(grams) / max(tokens, 1) for n, grams in found.items()}
