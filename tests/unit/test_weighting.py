"""Every weighting against its formula in plain Python, and what is laid over all of them."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stages.evidence import Evidence, sequence_means
from stages.fusion import NoteRows, fuse
from stages.schedule import weights_share
from stages.target_options import FusionOptions
from stages.weighting import NAMES, WEIGHTINGS, first_weights, looks_at_gold, parsed, weigh

TOP = Path(__file__).resolve().parents[2]
V, K, R, TEACHERS = 50, 6, 11, ["a", "b", "c"]
SEQUENCE = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 3, 7, 9])  # numbers may be missing
GOLD = {"confidence": "token", "min_ce": "token", "em": "calibration"}
PER = ["entropy", "max_prob", "confidence", "min_ce"]


def note(seed: int) -> NoteRows:
    """Whole distributions of V ids, noted with a head of K."""
    generator = torch.Generator().manual_seed(seed)
    logp = (torch.randn(R, V, generator=generator) * 2).log_softmax(-1)
    top = logp.topk(K)
    gold = logp.gather(-1, torch.randint(0, V, (R, 1), generator=generator))[:, 0]
    tail = (1 - top.values.exp().sum(-1)).log()
    return NoteRows(
        top.indices, top.values, -(logp.exp() * logp).sum(-1), tail, torch.zeros(R, 0), gold
    )


def evidence(names: list[str] = TEACHERS, sequence: Tensor | None = None) -> Evidence:
    fitted = torch.rand(len(names), R, generator=torch.Generator().manual_seed(5))
    notes = {name: note(seed) for seed, name in enumerate(names)}
    return Evidence(notes, V, sequence, fitted / fitted.sum(0))


def options(weights: str, **others: Any) -> FusionOptions:
    static = {"a": 1.0, "b": 3.0, "c": 0.0}
    return FusionOptions(weights=f"{weights}:b" if weights == "single" else weights,
                         **{"static": static, **others})  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("over", [{}, {"prior": {"b": 5.0}}, {"floor": 0.2}, {"per": "sequence"}],
                         ids=str)  # fmt: skip
def test_weights_are_a_distribution(name: str, over: dict[str, Any]) -> None:
    per = "per" in over
    weights = weigh(evidence(sequence=SEQUENCE if per else None), options(name, **over))
    assert weights.shape == (3, R) and weights.dtype == torch.float32
    assert float(weights.min()) >= over.get("floor", 0.0)
    torch.testing.assert_close(weights.sum(0), torch.ones(R))


def test_entropy_weights_follow_the_formula_and_its_limits() -> None:
    given = evidence()
    found = weigh(given, options("entropy", tau=0.7))
    plain = torch.exp(-given.entropy / 0.7)
    torch.testing.assert_close(found, plain / plain.sum(0))
    far = weigh(given, options("entropy", tau=1e6))
    torch.testing.assert_close(far, torch.full((3, R), 1 / 3), atol=1e-5, rtol=0)
    near = weigh(given, options("entropy", tau=1e-4))
    assert torch.equal(near.argmax(0), given.entropy.argmin(0)) and float(near.amax(0).min()) > 0.99
    normalised = weigh(given, options("entropy", tau=0.3, normalise=True))
    torch.testing.assert_close(normalised, weigh(given, options("entropy", tau=0.3 * math.log(V))))


def test_max_prob_is_the_share_of_the_largest_probability() -> None:
    given = evidence()
    found = weigh(given, options("max_prob"))
    for r in range(R):
        largest = [math.exp(max(n.logprobs[r].tolist())) for n in given.notes.values()]
        assert found[:, r].tolist() == pytest.approx([p / sum(largest) for p in largest], rel=1e-5)
    near = weigh(given, options("max_prob", tau=1e-4))
    assert torch.equal(near.argmax(0), given.largest.argmax(0))
    far = weigh(given, options("max_prob", tau=1e6))
    torch.testing.assert_close(far, torch.full((3, R), 1 / 3), atol=1e-5, rtol=0)


def test_confidence_is_ca_mkds_formula() -> None:
    given = evidence()
    found = weigh(given, options("confidence"))
    for r in range(R):
        powers = [math.exp(-float(n.gold_logprob[r])) for n in given.notes.values()]
        plain = [(1 - each / sum(powers)) / 2 for each in powers]
        assert found[:, r].tolist() == pytest.approx(plain, rel=1e-4, abs=1e-6)
    one = weigh(evidence(["a"]), FusionOptions(weights="confidence"))
    assert torch.equal(one, torch.ones(1, R))
    huge = {name: replace(n, gold_logprob=n.gold_logprob - 1e4) for name, n in given.notes.items()}
    shifted = weigh(Evidence(huge, V), options("confidence"))
    torch.testing.assert_close(shifted, found, atol=2e-3, rtol=0)  # −1e4 rounds to 1e-3


def test_min_ce_takes_the_least_loss_and_equals_share() -> None:
    given = evidence()
    found = weigh(given, options("min_ce"))
    for r in range(R):
        losses = [-float(n.gold_logprob[r]) for n in given.notes.values()]
        assert found[:, r].tolist() == [float(loss == min(losses)) for loss in losses]
    equal = {**given.notes, "b": given.notes["a"]}
    shared = weigh(Evidence(equal, V), options("min_ce"))
    for a, b, c in shared.t().tolist():
        assert (a, b, c) in ((0.5, 0.5, 0.0), (0.0, 0.0, 1.0))
    assert {tuple(row) for row in shared.t().tolist()} == {(0.5, 0.5, 0.0), (0.0, 0.0, 1.0)}


def test_constant_weights() -> None:
    given = evidence()
    assert torch.equal(
        weigh(given, options("single")), torch.tensor([0.0, 1.0, 0.0])[:, None].expand(3, R)
    )
    static = weigh(given, options("static"))
    assert torch.equal(static, torch.tensor([0.25, 0.75, 0.0])[:, None].expand(3, R))
    assert torch.equal(weigh(given, options("em")), given.fitted_MR)


@pytest.mark.parametrize("name", PER)
def test_per_sequence_is_the_weighting_of_the_sequences_means(name: str) -> None:
    given, chosen = evidence(), options(name, tau=0.5)
    found = weigh(evidence(sequence=SEQUENCE), chosen)
    for number in set(SEQUENCE.tolist()):
        rows = [r for r in range(R) if SEQUENCE[r] == number]
        means = {}
        for teacher, one in given.notes.items():
            h, g, top = (
                sum(float(values[r]) for r in rows) / len(rows)
                for values in (one.entropy, one.gold_logprob, one.logprobs.amax(-1).exp())
            )
            means[teacher] = NoteRows(
                one.ids[:1], torch.tensor([[math.log(top)]]), torch.tensor([h]), one.log_tail[:1],
                one.log_z[:1], torch.tensor([g]),
            )  # fmt: skip
        plain = weigh(Evidence(means, V), chosen)
        torch.testing.assert_close(found[:, rows], plain.expand(3, len(rows)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, weigh(given, chosen))


def test_sequence_means_of_no_rows() -> None:
    assert sequence_means(torch.empty(2, 0), torch.empty(0, dtype=torch.int64)).shape == (2, 0)


def test_prior_and_floor() -> None:
    given = evidence()
    bare = weigh(given, options("entropy"))
    prior = weigh(given, options("entropy", prior={"a": 2.0, "c": 0.5}))
    plain = bare * torch.tensor([2.0, 1.0, 0.5])[:, None]
    torch.testing.assert_close(prior, plain / plain.sum(0))
    both = weigh(given, options("entropy", prior={"a": 2.0, "c": 0.5}, floor=0.1))
    torch.testing.assert_close(both, 0.1 + 0.7 * prior)
    assert sorted(weigh(given, options("min_ce", floor=0.25))[:, 0].tolist()) == pytest.approx(
        [0.25, 0.25, 0.5]
    )
    first = first_weights(TEACHERS, options("entropy", prior={"a": 2.0}, floor=0.1))
    assert first == pytest.approx([0.1 + 0.7 * 0.5, 0.1 + 0.7 * 0.25, 0.1 + 0.7 * 0.25])
    same = weigh(given, options("uniform", prior={"a": 2.0}, floor=0.1))
    torch.testing.assert_close(torch.tensor(first)[:, None].expand(3, R), same)


def test_fuse_weighs_by_sequence_only_if_asked() -> None:
    given = evidence()
    for per in ("token", "sequence"):
        chosen = options("entropy", per=per)
        target = fuse(given.notes, (), V, 1.0, chosen, sequence_R=SEQUENCE)
        sequence = SEQUENCE if per == "sequence" else None
        assert torch.equal(target.weights, weigh(evidence(sequence=sequence), chosen))


def test_ramp_reaches_both_ends() -> None:
    assert [weights_share(s, 10, 0.0) for s in (0, 9)] == [1.0, 1.0]
    half = [weights_share(s, 10, 0.5) for s in range(10)]
    assert half == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    whole = [weights_share(s, 5, 1.0) for s in range(5)]
    assert whole == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert weights_share(0, 1, 1.0) == 1.0


def test_those_that_look_at_the_gold_token_are_marked_and_no_others_change_with_it() -> None:
    given = evidence()
    other = {
        n: replace(one, gold_logprob=one.gold_logprob.flip(0)) for n, one in given.notes.items()
    }
    for name, one in WEIGHTINGS.items():
        chosen = options(name)
        same = torch.equal(
            weigh(given, chosen), weigh(Evidence(other, V, None, given.fitted_MR), chosen)
        )
        assert one.gold == GOLD.get(name, "") == looks_at_gold(chosen.weights), name
        assert same is (one.gold != "token"), name  # em looks when it is fitted
        assert one.source and (one.function.__doc__ or "").strip()
    described = FusionOptions.model_fields["weights"].description or ""
    before, after = described.split("These look at the gold token:")
    assert {name for name in WEIGHTINGS if f"{name}:" in after} == set(GOLD)
    assert all(name in before for name in WEIGHTINGS if name not in GOLD)


def test_names_and_marks_need_no_torch() -> None:
    code = (
        "import sys; from stages.weighting import looks_at_gold; import stages.options;"
        "print(looks_at_gold('min_ce'), bool(looks_at_gold('single:x')), 'torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["token", "False", "False"]


@pytest.mark.parametrize("wrong", ["entropi", "single", "single:", "uniform:a", "uniform:", ""])
def test_an_unknown_weighting_is_refused_with_those_there_are(wrong: str) -> None:
    with pytest.raises(ValidationError, match="is none of " + NAMES):
        FusionOptions(weights=wrong)
    assert parsed("single:a:b") == ("single", "a:b")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"weights": "single:z"}, r"names no fused teacher: NAME is one of \['a', 'b', 'c'\]"),
        ({"weights": "static", "static": {"a": 1.0}}, r"fusion\.static must give each of"),
        ({"weights": "static", "static": dict.fromkeys(TEACHERS, 0.0)}, "one of them positive"),
        ({"prior": {"z": 1.0}}, r"fusion\.prior names \['z'\]"),
        ({"floor": 0.34}, r"fusion\.floor 0\.34 must be below 1/3"),
    ],
)
def test_what_does_not_fit_the_teachers_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FusionOptions(**given).require_teachers(TEACHERS)
    FusionOptions(weights="single:a", prior={"b": 2.0}, floor=0.33).require_teachers(TEACHERS)


def test_a_ramp_is_refused_with_geometric_mixing() -> None:
    with pytest.raises(ValidationError, match="not linear in the weights"):
        FusionOptions(ramp=0.5, mixing="geometric")
