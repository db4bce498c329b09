"""Annotation against plain formulas in float64, and the draws against what they promise."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.annotate import annotate_rows
from stages.row_notes import NoteRule, RowNotes, annotate_logits
from stages.tail_draws import DEPTH, draw, group_of, sum_groups
from stages.top_k import top_k
from storage.errors import ConfigError
from storage.layout import Layout
from storage.sampling import uniforms
from storage.types import LOG_ZERO

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="store.compile needs g++")

Float64 = npt.NDArray[np.float64]
V = 1003  # neither the groups of top-k nor those of the draws divide it
TEMPERATURES = (0.5, 0.7, 1.0, 1.5, 2.0, 4.0)


def random(rows: int, width: int = V, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * scale


def hashed(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, np.int64(3), np.arange(rows)))


def noted(logits: torch.Tensor, rule: NoteRule, gold: int = 5) -> RowNotes:
    golds = torch.full((len(logits),), gold)
    return annotate_logits(logits.clone(), golds, rule, hashed(len(logits)))


@pytest.mark.parametrize("width", [97, 1003, 4096, 49_152, 50_257])
@pytest.mark.parametrize("k", [1, 16, 64])
def test_top_k_is_torchs(width: int, k: int) -> None:
    values = random(5, width)
    found, ids = top_k(values, k)
    expected = values.topk(k)
    torch.testing.assert_close(found, expected.values, rtol=0, atol=0)
    assert bool((torch.diff(expected.values) < 0).all())  # no ties, so the ids are told
    assert torch.equal(ids, expected.indices)


@pytest.mark.parametrize("width", [1003, 4096])
@pytest.mark.parametrize("k", [1, 16, 30])
def test_top_k_among_ties(width: int, k: int) -> None:
    values = random(9, width, 1.0).round()
    values[0] = 2.0
    found, ids = top_k(values, k)
    torch.testing.assert_close(found, values.topk(k).values, rtol=0, atol=0)
    torch.testing.assert_close(values.gather(-1, ids), found, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())
    alone = torch.cat([top_k(values[i : i + 1], k)[1] for i in range(9)])
    assert torch.equal(alone, ids)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("draws", [0, 4])
def test_no_tensor_is_larger_than_a_chunk_of_logits(draws: int) -> None:
    """However many rows there are; tests/benchmarks/annotation.py measures the process."""
    rows, chunk, layout = 256, 16, Layout(1, 1, 256, V, "exact", 8, (1.5,), (), 1, 0, draws=draws)
    hidden, weight = random(rows, 4), random(4, V)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is asked for is seen in this thread only
    try:
        with Largest() as largest:
            annotate_rows(
                hidden, torch.zeros(rows, dtype=torch.int64), hashed(rows), lambda x: x @ weight,
                layout, chunk,
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert largest.elements == chunk * V


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("temperatures", [(1.5, 2.0), (0.7, 4.0)])
def test_compiled_passes_give_the_eager_notes(temperatures: tuple[float, ...]) -> None:
    """As powers of one exponential (1.5 and 2.0) and not (0.7), one row and several."""
    for rows, draws, top_p, scale in ((11, 5, 0.6, 3.0), (1, 5, 0.6, 3.0), (11, 5, 1.0, 60.0)):
        logits, rule = random(rows, scale=scale), NoteRule(8, temperatures, top_p, draws)
        eager, fused = noted(logits, rule), noted(logits, replace(rule, compiled=True))
        for field in fields(RowNotes):
            torch.testing.assert_close(
                getattr(fused, field.name), getattr(eager, field.name), rtol=1e-5, atol=1e-5
            )


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    with pytest.raises(ConfigError, match=r"cannot be compiled[\s\S]*store.compile: false"):
        noted(random(3), NoteRule(3, (1.7,), compiled=True))


@pytest.mark.parametrize("temperatures", [TEMPERATURES, (2.0,), (0.7,), ()])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_statistics_are_the_plain_formulas(temperatures: tuple[float, ...], scale: float) -> None:
    """At scale 60 most exponentials underflow; what is left of them must still be right."""
    logits = random(11, scale=scale)
    notes = noted(logits, NoteRule(8, temperatures))
    logp = logits.double().log_softmax(-1)
    ordered = logp.sort(descending=True)
    close = {"rtol": 2e-5, "atol": 2e-5}

    def same(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, **close)

    assert torch.equal(notes.ids, ordered.indices[:, :8])
    same(notes.logprobs, ordered.values[:, :8])
    same(notes.entropy, -(logp.exp() * logp).sum(-1))
    same(notes.gold_logprob, logp[:, 5])
    tail = ordered.values[:, 8:].logsumexp(-1)
    seen = tail > -80.0  # float32 sums no smaller terms
    same(notes.log_tail_mass[seen], tail[seen])
    assert notes.log_z.shape == (11, len(temperatures))
    for z, t in enumerate(temperatures):
        same(notes.log_z[:, z], (logp / t).logsumexp(-1))


def test_small_tail_does_not_cancel() -> None:
    logits = torch.zeros(1, V, dtype=torch.float32)
    logits[0, 7] = 40.0
    found = float(noted(logits, NoteRule(1)).log_tail_mass)
    assert found == pytest.approx(np.log(V - 1) - 40.0, rel=1e-6)


def layout(k: int, draws: int, top_p: float) -> Layout:
    return Layout(
        1, 1, V, V, "exact", k, (2.0,), (), 1, 0, draws=draws, top_p=top_p, seed=0
    )  # fmt: skip


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_rows_notes_depend_on_the_row_alone(top_p: float) -> None:
    logits, gold = random(37), torch.arange(37)
    rule = layout(8, 6, top_p)

    def run(chunk: int) -> RowNotes:
        return annotate_rows(logits, gold, hashed(37), lambda rows: rows.clone(), rule, chunk)

    together = run(100)
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((1, 1), (5, 2), (100, 2), (100, 3)):
            torch.set_num_threads(count)
            other = run(chunk)
            assert torch.get_num_threads() == count
            for field in fields(RowNotes):
                assert torch.equal(getattr(other, field.name), getattr(together, field.name))
    finally:
        torch.set_num_threads(threads)


def drawn(weights: torch.Tensor, uniform: torch.Tensor, draws: int) -> torch.Tensor:
    """Draws from a table of weights."""

    def at(ids: torch.Tensor) -> torch.Tensor:
        return weights.gather(-1, ids)

    return draw(sum_groups(weights), at, weights.shape[-1], uniform, draws)


@pytest.mark.parametrize("width", [1, 31, 33, 97, 1003])
def test_a_group_is_the_column_that_an_ids_weight_is_summed_in(width: int) -> None:
    columns = sum_groups(torch.eye(width)).nonzero()
    assert torch.equal(columns, torch.stack([ids := torch.arange(width), group_of(ids, width)], -1))


def plain_draws(weights: Float64, u: float, draws: int) -> list[int]:
    """Inverts one running sum over all ids, in the documented order (v mod G, v ÷ G)."""
    groups = len(weights) // DEPTH
    v = np.arange(len(weights))
    order = np.concatenate([
        np.lexsort((v[: groups * DEPTH] // groups, v[: groups * DEPTH] % groups)),
        v[groups * DEPTH :],
    ])  # fmt: skip
    ends = weights[order].cumsum()
    points = (u + np.arange(draws)) / draws * ends[-1]
    return order[np.searchsorted(ends, points, side="right")].tolist()


@pytest.mark.parametrize("width", [64, 97, 1003])
def test_draws_are_those_of_one_running_sum(width: int) -> None:
    weights = random(20, width).double().exp()
    weights[:, ::3] = 0.0
    uniform = hashed(20)
    found = drawn(weights, uniform, 7)
    for row in range(20):
        assert found[row].tolist() == plain_draws(weights[row].numpy(), float(uniform[row]), 7)


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 97])
def test_draws_never_fall_on_nothing(width: int, u: float) -> None:
    """One id alone has weight, wherever it stands and however small it is."""
    for weight in (1e-44, 1.0, 3e38):
        weights = torch.eye(width) * weight
        found = drawn(weights, torch.full((width,), u, dtype=torch.float64), 3)
        assert found.tolist() == [[v] * 3 for v in range(width)]


def looks_unbiased(drawn: npt.NDArray[np.int64], p: Float64, kept: list[int], draws: int) -> bool:
    """Whether head + (tail/S)·counts has the mean p, by the standard errors of systematic draws.

    An id's count is ⌊f⌋ or ⌈f⌉ with f = S·p/tail, so its variance is that of frac(f). Ids that
    are expected fewer than ten times in all are judged together.

    Args:
        drawn: [N, S], draws of N rows of the same distribution p.
        kept: ids of the head, taken as exact.
    """
    rows, tail = len(drawn), 1.0 - p[kept].sum()
    expected = draws * p / tail
    expected[kept] = 0.0
    counts = np.bincount(drawn.ravel(), minlength=len(p)).astype(float)
    if counts[kept].any():
        return False
    fraction = expected % 1.0
    often = expected * rows >= 10.0
    error = np.sqrt(rows * fraction * (1.0 - fraction))[often]
    z = (counts - rows * expected)[often] / np.maximum(error, 1e-6)
    rare = rows * expected[~often].sum()
    z_rare = (counts[~often].sum() - rare) / np.sqrt(max(rare, 1.0))
    return bool(np.abs(z).max() < 5.0 and (z**2).mean() < 1.4 and abs(z_rare) < 5.0)


@pytest.mark.parametrize(
    ("scale", "top_p"),
    [
        (0.5, 1.0),
        (2.0, 0.2),
        *(pytest.param(*one, marks=pytest.mark.long) for one in ((0.5, 0.2), (2.0, 1.0))),
    ],
)
def test_head_and_draws_estimate_the_distribution_without_bias(scale: float, top_p: float) -> None:
    rows, draws = 20_000, 4
    row = random(1, 203, scale, seed=1)
    p = row[0].double().softmax(-1).numpy()
    notes = noted(row.expand(rows, -1), NoteRule(8, (), top_p, draws))
    kept = sorted(set(notes.ids[0].tolist()))
    assert looks_unbiased(notes.draw_ids.numpy(), p, kept, draws)
    expected = np.log(p)[notes.draw_ids.numpy()]
    np.testing.assert_allclose(notes.draw_logprobs, expected, atol=1e-5)

    # The check tells biased draws from these.
    tail = np.setdiff1d(np.arange(203), kept)
    generator = np.random.default_rng(0)
    assert not looks_unbiased(generator.choice(tail, (rows, draws)), p, kept, draws)
    largest = tail[np.argsort(-p[tail])][:draws]
    assert not looks_unbiased(np.tile(largest, (rows, 1)), p, kept, draws)
    sharper = p[tail] ** 1.1 / (p[tail] ** 1.1).sum()
    weights = torch.zeros(203, dtype=torch.float64)
    weights[tail] = torch.from_numpy(sharper)
    near = drawn(weights.expand(rows, -1), hashed(rows), draws).numpy()
    assert not looks_unbiased(near, p, kept, draws)
    dense = drawn(torch.from_numpy(p).expand(rows, -1), hashed(rows), draws).numpy()
    assert not looks_unbiased(dense, p, kept, draws)


def test_draws_where_the_tail_is_empty() -> None:
    logits = torch.full((2, V), -500.0)
    logits[:, 3] = 500.0
    for k in (1, 4, V):
        notes = noted(logits, NoteRule(k, (2.0,), 1.0, 5))
        assert notes.draw_ids.tolist() == [[3] * 5] * 2
        assert notes.draw_logprobs.tolist() == [[LOG_ZERO] * 5] * 2
        assert notes.log_tail_mass.tolist() == [LOG_ZERO] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [8, V])
def test_non_finite_logits_show_in_the_entropy_of_their_row_alone(value: float, k: int) -> None:
    logits = random(9)
    logits[4, 11] = value
    notes = noted(logits, NoteRule(k, (1.5, 2.0), 0.9, 4))
    assert torch.isfinite(notes.entropy).tolist() == [row != 4 for row in range(9)]
    assert int(notes.draw_ids.min()) >= 0 and int(notes.draw_ids.max()) < V


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.6, 0.999])
def test_top_p_keeps_the_fewest_entries_that_reach_it(top_p: float) -> None:
    logits, k = random(40), 16
    notes, whole = noted(logits, NoteRule(k, (2.0,), top_p, 3)), noted(logits, NoteRule(k, (2.0,)))
    logp = logits.double().log_softmax(-1)
    sizes = set()
    for row in range(40):
        p = logp[row].sort(descending=True).values.exp().numpy()
        n = min(int(np.searchsorted(p.cumsum(), top_p)) + 1, k)
        sizes.add(n)
        assert torch.equal(notes.ids[row, :n], whole.ids[row, :n])
        assert torch.equal(notes.logprobs[row, :n], whole.logprobs[row, :n])
        assert notes.ids[row, n:].tolist() == [int(whole.ids[row, 0])] * (k - n)
        assert notes.logprobs[row, n:].tolist() == [LOG_ZERO] * (k - n)
        assert float(notes.log_tail_mass[row]) == pytest.approx(np.log(p[n:].sum()), abs=1e-5)
        assert not set(notes.draw_ids[row].tolist()) & set(notes.ids[row].tolist())
    assert {1e-9: sizes == {1}, 0.999: sizes == {k}}.get(top_p, len(sizes) > 3)
    torch.testing.assert_close(notes.entropy, whole.entropy, rtol=1e-5, atol=1e-6)
    assert torch.equal(notes.log_z, whole.log_z)


def test_uniforms_follow_their_definition() -> None:
    """The arithmetic again in Python's integers, and the values that its description states."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def u(*words: int) -> float:
        h = 0
        for word in words:
            h = mix((h + word + 0x9E3779B97F4A7C15) % 2**64)
        return (h >> 11) / 2**53

    zero = np.zeros(1, np.int64)
    assert uniforms(0, zero, zero).tolist() == [0.13870941014555427]
    assert uniforms(1, zero + 2, zero + 3).tolist() == [0.4175580595044027]
    for seed in (0, 1, -1, 2**63 + 5):
        found = uniforms(seed, np.array([[0], [7], [2**40]]), np.arange(5))
        expected = [[u(seed % 2**64, b, t) for t in range(5)] for b in (0, 7, 2**40)]
        assert found.tolist() == expected
    many = uniforms(1, np.arange(300)[:, None], np.arange(300))
    assert len(np.unique(many)) == many.size and 0.0 <= many.min() and many.max() < 1.0
    assert np.abs(np.histogram(many, 50)[0] / many.size * 50 - 1.0).max() < 0.12
