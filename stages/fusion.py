"""M teachers' notes + weights → one fused target for the rows that have one.

Forward KL is linear in the target, so Σ_m w_m KL(t_m‖q) has the gradient of KL(Σ_m w_m t_m‖q), and
fusing sparse targets is putting their weighted entries side by side. What stands for a teacher's tail
is one of four: a bucket of the ids outside that teacher's own head; the cache's draws, which estimate
each id's probability without bias, so that no bucket is left; nothing; or the gold token. Geometric
mixing (`mixing.py`) makes one target of all teachers, with one bucket.

Shapes: M teachers, R rows, K entries (head and draws), S draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.evidence import Evidence
from stages.mixing import geometric
from stages.options import Tail
from stages.target_options import FusionOptions
from stages.weighting import weigh
from storage.errors import ConfigError
from storage.types import LOG_ZERO, Bool, TeacherNotes


@dataclass(frozen=True)
class FusedTarget:
    """The fused target of R rows at one temperature.

    Attributes:
        ids: int64 [M, R, K], K the most entries that a teacher has. An id may stand twice; one of the
            entries then has p = 0.
        logp: [M, R, K], log of `p`.
        p: [M, R, K], tempered probabilities of head and draws.
        tail: [M, R], tempered mass of the bucket; p summed over K, plus tail, is 1 (with draws at a
            temperature other than 1: on average).
        weights: [M, R], ≥ 0, summing to 1 over M.
        vocab_size: V; a student's logits beyond it are padding and get target 0.
        temperature: of target and student.
        spent: [teachers, R], the teachers' weights where mixing has used them up and M is 1
            (geometric); None where `weights` are the teachers'.
    """

    ids: Tensor
    logp: Tensor
    p: Tensor
    tail: Tensor
    weights: Tensor
    vocab_size: int
    temperature: float
    spent: Tensor | None = None

    @property
    def teacher_weights(self) -> Tensor:
        """[teachers, R]: how much each teacher counts, however they are mixed."""
        return self.weights if self.spent is None else self.spent

    def rows(self, start: int, stop: int) -> FusedTarget:
        """Returns the target of rows [start, stop)."""
        return FusedTarget(
            self.ids[:, start:stop], self.logp[:, start:stop], self.p[:, start:stop],
            self.tail[:, start:stop], self.weights[:, start:stop], self.vocab_size, self.temperature,
            None if self.spent is None else self.spent[:, start:stop],
        )  # fmt: skip


@dataclass(frozen=True)
class NoteRows:
    """One teacher's notes on R rows, on any device: what fusion needs of them.

    Attributes:
        ids, logprobs: [R, K], int64 and float32, the head.
        entropy, log_tail, gold_logprob: float32 [R].
        log_z: float32 [R, Z].
        draw_ids, draw_logprobs: [R, S], int64 and float32; None where there are none.
    """

    ids: Tensor
    logprobs: Tensor
    entropy: Tensor
    log_tail: Tensor
    log_z: Tensor
    gold_logprob: Tensor
    draw_ids: Tensor | None = None
    draw_logprobs: Tensor | None = None


def temper(
    logprobs: Tensor, log_tail: Tensor, log_z: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Brings a head at temperature 1 to temperature τ.

    p_τ = exp(ℓ/τ − log_z(τ)) on the head. At τ = 1 the tail's own mass is stored and the head is
    scaled to what remains, which undoes the rounding of its logprobs on average; a tail beyond a
    half, and every tail at τ ≠ 1 (but one that is 0 at τ = 1), is what the head leaves, 1 − Σ p_τ,
    never below 0.

    Args:
        logprobs: [..., K].
        log_tail: [...].
        log_z: log Σ_v p_v^(1/τ) [...], None at τ = 1.

    Returns:
        (logp [..., K], p [..., K], tail [...]); p and tail sum to 1.
    """
    logp = logprobs if log_z is None else logprobs / temperature - log_z[..., None]
    p = logp.exp()
    mass = p.sum(-1)
    left = (1.0 - mass).clamp_min(0.0)
    if log_z is None:
        # Of a tail beyond a half the head says more: 1 − t would be a small difference of rounded t.
        tail = torch.where(log_tail > -math.log(2.0), left, log_tail.exp())
    else:
        tail = left.masked_fill(log_tail <= LOG_ZERO / 2, 0.0)
    scale = (1.0 - tail) / mass
    logp = (logp + scale.log()[..., None]).clamp_min(LOG_ZERO)
    return logp, p * scale[..., None], tail


def spread_tail(
    ids: Tensor, logprobs: Tensor | None, log_tail: Tensor, log_z: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gives the tail's mass to its draws.

    An id drawn c times of S estimates its probability, without bias, by c·t/S, with t the tail's mass;
    at τ ≠ 1 by c·t/S · p^(1/τ − 1)/Σ_v p_v^(1/τ), which is the same id's tempered probability on
    average. These sum to the tail at τ = 1, and to the tempered tail on average elsewhere.

    Args:
        ids: int64 [..., S]; equal ids stand side by side.
        logprobs: [..., S] at temperature 1; needed at τ ≠ 1.
        log_tail, log_z: [...], as for `temper`.

    Returns:
        (logp [..., S], p [..., S]): the first of equal ids carries all of them, the others nothing.
    """
    count = ids.shape[-1]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    run = first.cumsum(-1) - 1
    times = torch.zeros_like(log_tail[..., None].expand(ids.shape)).contiguous()
    times.scatter_add_(-1, run, torch.ones_like(times))
    logp = log_tail[..., None] - math.log(count) + times.gather(-1, run).log()
    if log_z is not None and logprobs is not None:
        logp = logp + logprobs * (1.0 / temperature - 1.0) - log_z[..., None]
    empty = (log_tail <= LOG_ZERO / 2)[..., None] | ~first
    logp = logp.masked_fill(empty, LOG_ZERO)
    return logp, logp.exp()


def renormalise(logprobs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns (log p', p') of a head scaled to sum to 1, p'_i = p_i^(1/τ) / Σ_head p^(1/τ), [..., K].

    The tail is left out, so the student is taught that it is empty: the bias of every top-k method
    without a bucket.
    """
    unused = logprobs <= LOG_ZERO / 2
    logp = torch.log_softmax((logprobs / temperature).masked_fill(unused, LOG_ZERO), -1)
    logp = logp.clamp_min(LOG_ZERO)
    return logp, logp.exp()


def give_to_gold(
    ids_RK: Tensor, p_RK: Tensor, tail_R: Tensor, gold_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (ids, log p, p), each [R, K + 1]: the head with the tail's mass on the gold token.

    p'_i = p_i + t·[i = gold]. It looks at the gold token: in the tail's share this is cross-entropy.
    The gold token's own entry takes the mass where the head has it, else the entry that is added.
    """
    hit = ids_RK == gold_R[:, None]
    at = torch.where(hit, p_RK, -1.0).argmax(-1, keepdim=True)  # an id may also fill unused entries
    inside, tail = hit.any(-1, keepdim=True), tail_R[:, None]
    p = p_RK.scatter_add(-1, at, torch.where(inside, tail, 0.0))
    p = torch.cat([p, torch.where(inside, 0.0, tail)], -1)
    return torch.cat([ids_RK, gold_R[:, None]], -1), p.log().clamp_min(LOG_ZERO), p


NOTES = (
    "ids", "logprobs", "entropy", "log_tail_mass", "gold_logprob", "log_z", "draw_ids",
    "draw_logprobs",
)  # fmt: skip
"""What a teacher's notes on a row are called where they travel as tensors."""


def note_tensors(note: TeacherNotes) -> dict[str, Tensor]:
    """Returns a teacher's notes on some blocks as tensors [N, T, …] that share their memory; draws
    only where there are any."""
    head, stats, draws = note.head, note.stats, note.draws
    arrays = {
        "ids": head.ids, "logprobs": head.logprobs, "entropy": stats.entropy,
        "log_tail_mass": stats.log_tail_mass, "gold_logprob": stats.gold_logprob,
        "log_z": stats.log_z,
    }  # fmt: skip
    if draws is not None:
        arrays["draw_ids"] = draws.ids
        if draws.logprobs is not None:
            arrays["draw_logprobs"] = draws.logprobs
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def note_rows(notes: Mapping[str, Tensor], scored_NT: Tensor) -> NoteRows:
    """Returns the notes on the scored rows of some blocks, on their device.

    Args:
        notes: NOTES → [N, T, …], as `note_tensors` gives them; others are passed over.
        scored_NT: bool.
    """
    rows = {name: notes[name][scored_NT] for name in NOTES if name in notes}
    draw_ids = rows.get("draw_ids")
    return NoteRows(
        ids=rows["ids"].long(), logprobs=rows["logprobs"], entropy=rows["entropy"],
        log_tail=rows["log_tail_mass"], log_z=rows["log_z"], gold_logprob=rows["gold_logprob"],
        draw_ids=None if draw_ids is None else draw_ids.long(),
        draw_logprobs=rows.get("draw_logprobs"),
    )  # fmt: skip


def rows_of(note: TeacherNotes, scored: Bool) -> NoteRows:
    """Returns the notes on the scored rows of some blocks, on the CPU.

    Args:
        scored: bool [N, T].
    """
    return note_rows(note_tensors(note), torch.from_numpy(scored))


def fuse(
    notes: Mapping[str, NoteRows],
    grid: tuple[float, ...],
    vocab_size: int,
    temperature: float,
    options: FusionOptions,
    tail: Tail | None = None,
    gold_R: Tensor | None = None,
    sequence_R: Tensor | None = None,
    fitted_MR: Tensor | None = None,
) -> FusedTarget:
    """Returns the fused target of some rows, on the device of the notes.

    Args:
        notes: teacher → notes on the same rows.
        grid: temperatures whose log_z the caches hold.
        vocab_size: V.
        temperature: wanted.
        tail: what stands for it; draws if there are any, else the bucket, if not given.
        gold_R: int64; `residual` alone looks at it.
        sequence_R: int64, number of each row's sequence; needed for weights per sequence.
        fitted_MR: each row's fitted weights; needed for em.

    Raises:
        ConfigError: the caches cannot serve this temperature, tail or mixing.
    """
    column = temperature_column(temperature, grid)
    pieces = [_target(note, column, temperature, tail, gold_R) for note in notes.values()]
    by_sequence = options.per == "sequence"
    assert not by_sequence or sequence_R is not None, "weights per sequence need the sequences"
    evidence = Evidence(notes, vocab_size, sequence_R if by_sequence else None, fitted_MR)
    weights = weigh(evidence, options).contiguous()
    ids, logp, p = _side_by_side([piece[:3] for piece in pieces])
    mass = torch.stack([piece[3] for piece in pieces])
    if options.mixing == "arithmetic":
        return FusedTarget(ids, logp, p, mass, weights, vocab_size, temperature)
    if tail != "bucket" and (tail or any(note.draw_ids is not None for note in notes.values())):
        raise ConfigError(
            "geometric mixing needs the tail as a bucket: a product of powers of sampled or cut "
            "estimates is biased", where="fusion.mixing", expected="loss.target: bucket",
            found=tail or "draws", todo="set loss.target: bucket, or fusion.mixing: arithmetic",
        )  # fmt: skip
    used = torch.zeros_like(ids, dtype=torch.bool)
    for mine, note in zip(
        used, notes.values(), strict=True
    ):  # as stored: a tempered logp tells less
        mine[:, : note.logprobs.shape[-1]] = note.logprobs > LOG_ZERO / 2
    ids, logp, p, mass = geometric(ids, logp, used, mass, weights, vocab_size)
    return FusedTarget(
        ids, logp, p, mass, torch.ones_like(mass), vocab_size, temperature, spent=weights
    )


def _side_by_side(
    pieces: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (ids, logp, p), each [M, R, K], of teachers with up to K entries [R, ≤ K]: what a teacher
    has less repeats its first id with p = 0, as the entries that a top-p cut left unused do."""
    rows, k = len(pieces[0][0]), max(ids.shape[-1] for ids, _, _ in pieces)
    if all(ids.shape[-1] == k for ids, _, _ in pieces):
        ids, logp, p = (torch.stack(parts) for parts in zip(*pieces, strict=True))
        return ids, logp, p
    shape = (len(pieces), rows, k)
    ids = torch.stack([mine[:, :1].expand(rows, k) for mine, _, _ in pieces])
    logp, p = pieces[0][1].new_full(shape, LOG_ZERO), pieces[0][2].new_zeros(shape)
    for m, piece in enumerate(pieces):
        for whole, mine in zip((ids, logp, p), piece, strict=True):
            whole[m, :, : mine.shape[-1]] = mine
    return ids, logp, p


def _target(
    note: NoteRows, column: int | None, temperature: float, kind: Tail | None, gold: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns one teacher's (ids, logp, p, tail)."""
    log_z = None if column is None else note.log_z[:, column]
    logp, p, tail = temper(note.logprobs, note.log_tail, log_z, temperature)
    if kind == "renormalised":
        return note.ids, *renormalise(note.logprobs, temperature), torch.zeros_like(tail)
    if kind == "residual":
        assert gold is not None, "residual needs the gold tokens"
        return *give_to_gold(note.ids, p, tail, gold), torch.zeros_like(tail)
    if kind == "bucket" or (kind is None and note.draw_ids is None):
        return note.ids, logp, p, tail
    if note.draw_ids is None:
        raise ConfigError(
            "the caches hold no draws", where="loss.target",
            expected="auto, bucket, renormalised or residual", found=kind,
            todo="choose one of these, or set store.draws and cache again",
        )  # fmt: skip
    more = spread_tail(note.draw_ids, note.draw_logprobs, note.log_tail, log_z, temperature)
    return (
        torch.cat([note.ids, note.draw_ids], -1), torch.cat([logp, more[0]], -1),
        torch.cat([p, more[1]], -1), torch.zeros_like(tail),
    )  # fmt: skip


def temperature_column(temperature: float, grid: tuple[float, ...]) -> int | None:
    """Returns the grid's column for a temperature, None for 1.

    Raises:
        ConfigError: the caches hold no log_z for it.
    """
    if temperature == 1.0:
        return None
    if temperature not in grid:
        raise ConfigError(
            "the caches cannot serve this temperature", where="loss.temperature",
            expected=f"one of {', '.join(str(t) for t in (1.0, *grid))}", found=temperature,
            todo="choose one of these, or add it to store.temperatures and cache again",
        )  # fmt: skip
    return grid.index(temperature)
