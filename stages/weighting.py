"""How much each teacher counts, token by token: the literal table of weightings.

Nothing here imports torch: names and marks are asked for where no tensor is (options, report).

Shapes: M teachers, R rows (tokens with a target). Weights are ≥ 0 and sum to 1 over the teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from stages.evidence import Evidence
    from stages.target_options import FusionOptions

Gold = Literal["", "token", "calibration"]

SINGLE = "single"
"""Written with the teacher's name, single:NAME."""


@dataclass(frozen=True)
class Weighting:
    """One row of the table.

    Attributes:
        function: (what the teachers noted, options) → weights [M, R]; pure.
        gold: which gold tokens it looks at. "token": the one that is to be predicted; such weights leak
            it into the target, and an ensemble so weighted cannot be had at inference. "calibration":
            those of some training blocks, once. "": none.
        source: where it comes from.
        needs: the statistic without which it cannot be had; an imported cache may lack it.
    """

    function: Callable[[Evidence, FusionOptions], Tensor]
    gold: Gold
    source: str
    needs: str = ""


def uniform(evidence: Evidence, options: FusionOptions) -> Tensor:
    """w_m = 1/M."""
    return evidence.constant([1.0 / len(evidence.notes)] * len(evidence.notes))


def static(evidence: Evidence, options: FusionOptions) -> Tensor:
    """w_m = s_m / Σ s, the same for every token."""
    total = sum(options.static.values())
    return evidence.constant([options.static[name] / total for name in evidence.notes])


def entropy(evidence: Evidence, options: FusionOptions) -> Tensor:
    """w_m ∝ exp(−H_m/τ), H_m the exact entropy of teacher m's distribution; H_m / log V if
    `normalise`.

    The entropy-driven weights of arXiv 2507.15198 as a softmax over teachers: τ → ∞ is uniform,
    τ → 0 takes the surest teacher.
    """
    scale = evidence.log_vocab if options.normalise else 1.0
    return (-evidence.entropy / (options.tau * scale)).softmax(0)


def max_prob(evidence: Evidence, options: FusionOptions) -> Tensor:
    """w_m ∝ P_m^(1/τ), P_m the largest probability of teacher m's distribution (at temperature 1).

    The confidence of Hendrycks and Gimpel, arXiv 1610.02136, as the weight of a vote; with τ → 0
    the surest teacher takes all.
    """
    return (evidence.largest.log() / options.tau).softmax(0)


def confidence(evidence: Evidence, options: FusionOptions) -> Tensor:
    """w_m = (1 − exp L_m / Σ_j exp L_j) / (M − 1), L_m = −log p_m(gold); 1 for a single teacher.

    CA-MKD, arXiv 2201.00007: the less a teacher errs beside the others, the more it
    counts, and none more than 1/(M − 1).
    """
    loss = evidence.gold_loss
    if len(loss) == 1:
        return loss.new_ones(loss.shape)
    return (1.0 - loss.softmax(0)) / (len(loss) - 1)


def min_ce(evidence: Evidence, options: FusionOptions) -> Tensor:
    """The teacher of least −log p_m(gold) takes all; equals share equally.

    MinCE of FuseLLM, arXiv 2401.10491 (which takes it a sequence at a time).
    """
    loss = evidence.gold_loss
    best = (loss == loss.amin(0)).to(loss.dtype)
    return best / best.sum(0)


def em(evidence: Evidence, options: FusionOptions) -> Tensor:
    """The row's domain's weights, which maximise Σ log Σ_m w_m p_m(gold) on calibration blocks.

    Fitted by expectation–maximisation (`mixture_em.py`): the mixture weights of Jelinek and Mercer's
    deleted interpolation (1980). A row's own gold token counts only if it is calibrated on.
    """
    assert evidence.fitted_MR is not None, "em needs fitted weights"
    return evidence.fitted_MR


def single(evidence: Evidence, options: FusionOptions) -> Tensor:
    """One teacher takes all: `single:NAME`."""
    _, chosen = parsed(options.weights)
    return evidence.constant([float(name == chosen) for name in evidence.notes])


WEIGHTINGS: dict[str, Weighting] = {
    "uniform": Weighting(uniform, "", "mean of the teachers"),
    "static": Weighting(static, "", "numbers of the user"),
    "entropy": Weighting(entropy, "", "arXiv 2507.15198", "entropy"),
    "max_prob": Weighting(max_prob, "", "arXiv 1610.02136"),
    "confidence": Weighting(confidence, "token", "CA-MKD, arXiv 2201.00007", "gold_logprob"),
    "min_ce": Weighting(min_ce, "token", "FuseLLM, arXiv 2401.10491", "gold_logprob"),
    "em": Weighting(
        em, "calibration", "deleted interpolation, Jelinek and Mercer 1980", "gold_logprob"
    ),
    SINGLE: Weighting(single, "", "one teacher alone"),
}
"""fusion.weights, without a teacher's name → what it is."""

NAMES = ", ".join(f"{name}:NAME" if name == SINGLE else name for name in WEIGHTINGS)
"""What fusion.weights may be, for messages."""


def parsed(weights: str) -> tuple[str, str]:
    """Returns (key of `WEIGHTINGS`, a teacher's name or nothing).

    Raises:
        ValueError: there is no such weighting.
    """
    kind, _, name = weights.partition(":")
    if kind not in WEIGHTINGS or (kind == SINGLE) != bool(name) or (":" in weights and not name):
        raise ValueError(f"fusion.weights {weights!r} is none of {NAMES}")
    return kind, name


def looks_at_gold(weights: str) -> Gold:
    """Returns which gold tokens the weights look at (see Weighting.gold).

    Raises:
        ValueError: there is no such weighting.
    """
    return WEIGHTINGS[parsed(weights)[0]].gold


def possible(missing: Collection[str]) -> str:
    """Returns the weightings that need none of the missing statistics, for messages."""
    names = [name for name, one in WEIGHTINGS.items() if not one.needs or one.needs not in missing]
    return ", ".join(f"{name}:NAME" if name == SINGLE else name for name in names)


def weigh(evidence: Evidence, options: FusionOptions) -> Tensor:
    """Returns the weights [M, R] that are used: the table's, times the prior, above the floor.

    w ← w·prior / Σ w·prior,  w ← floor + (1 − M·floor)·w
    """
    weights = WEIGHTINGS[parsed(options.weights)[0]].function(evidence, options)
    if options.prior:
        prior = evidence.constant([options.prior.get(name, 1.0) for name in evidence.notes])
        weights = weights * prior
        weights = weights / weights.sum(0)
    if options.floor:
        weights = options.floor + (1.0 - len(weights) * options.floor) * weights
    return weights


def first_weights(names: Sequence[str], options: FusionOptions) -> list[float]:
    """Returns where `ramp` begins: what `weigh` makes of uniform weights, the prior and the floor."""
    prior = [options.prior.get(name, 1.0) for name in names]
    share = 1.0 - len(names) * options.floor
    return [options.floor + share * each / sum(prior) for each in prior]
