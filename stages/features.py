"""Alignment of pooled hidden states: projections, and the distance to each teacher's features.

Shapes: B blocks, G segments, N segments of a batch (B·G), D hidden, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, linear, normalize

from stages.layer_pairs import Pair
from stages.target_options import FeatureOptions
from storage.errors import ConfigError


def cosine_loss(ours_ND: Tensor, theirs_ND: Tensor, weight_N: Tensor) -> Tensor:
    """Returns Σ_i w_i·(1 − cos(LN(ours_i), LN(theirs_i))), in [0, 2·Σ w].

    LN is LayerNorm (arXiv 1607.06450) without affine parameters. A cosine does not see its scale, so
    this is 1 − Pearson's correlation over the hidden dimensions.
    """
    size = ours_ND.shape[-1:]
    alike = cosine_similarity(layer_norm(ours_ND, size), layer_norm(theirs_ND, size), dim=-1)
    return (weight_N * (1.0 - alike)).sum()


def mse_loss(ours_ND: Tensor, theirs_ND: Tensor, weight_N: Tensor) -> Tensor:
    """Returns Σ_i w_i·mean over D of (ours_i − theirs_i)² (FitNets, arXiv 1412.6550)."""
    return (weight_N * (ours_ND - theirs_ND).square().mean(-1)).sum()


def gram_loss(ours_ND: Tensor, theirs_ND: Tensor, weight_N: Tensor) -> Tensor:
    """Returns Σ_i w_i·d_i, d_i = Σ_{j≠i} w_j (S_ij − T_ij)² / Σ_{j≠i} w_j.

    S and T are the Gram matrices of the L2-normalised rows, each of its own size D: cosines between
    the segments. Similarity-preserving distillation (arXiv 1907.09682) compares Gram matrices of a
    batch so, but normalises their rows. A segment without company (all other weights 0) adds 0.
    Memory O(N²).
    """
    ours, theirs = (normalize(x, dim=-1) for x in (ours_ND, theirs_ND))
    squares = (ours @ ours.T - theirs @ theirs.T).square()
    others = weight_N * (1.0 - torch.eye(len(weight_N), device=ours.device, dtype=ours.dtype))
    company = others.sum(1).clamp_min(torch.finfo(ours.dtype).tiny)
    return (weight_N * ((others * squares).sum(1) / company)).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cosine": cosine_loss,
    "mse": mse_loss,
    "gram": gram_loss,
}
"""`loss.features.kind` → Σ over segments of weight·distance; both sides of one size but for gram."""


class FixedProjection(nn.Module):
    """A linear map that is not trained: entries N(0, 1/D_out), so that lengths are kept on average
    (Johnson–Lindenstrauss). It is a buffer: checkpoints hold it, an optimizer does not see it.

    Args:
        inputs, outputs: D of student and teacher.
        generator: of the entries.
    """

    weight: Tensor

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs, generator=generator) / outputs**0.5
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class FeatureAligner(nn.Module):
    """One projection a pair, student → teacher, left behind when the student is exported.

    Args:
        pairs: from `resolve_pairs`.
        options: `kind` and `projection`; gram has no use for one.
        student_size: D of the student.
        teacher_sizes: teacher → D.
        seed: of frozen random projections.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        options: FeatureOptions,
        student_size: int,
        teacher_sizes: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pairs, self._loss = list(pairs), LOSSES[options.kind]
        generator = torch.Generator().manual_seed(seed)

        def projection(size: int) -> nn.Module:
            if options.kind == "gram":
                return nn.Identity()
            if options.projection == "random":
                return FixedProjection(student_size, size, generator)
            return nn.Linear(student_size, size)

        self.projections = nn.ModuleList(projection(teacher_sizes[t]) for _, t, _ in pairs)

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(sorted({student for student, _, _ in self.pairs}))

    def forward(
        self,
        pooled: Mapping[int, Tensor],
        features: Mapping[tuple[str, int], Tensor],
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """Returns Σ over blocks, segments and pairs of weight·distance, divided by student layers.

        Args:
            pooled: student layer → its pooled states [B, G, D].
            features: (teacher, layer) → those of the teacher, pooled alike [B, G, D_m].
            weights: teacher → fused weight of each segment [B, G]; 0 for an empty one.
        """
        total = torch.zeros((), device=next(iter(pooled.values())).device)
        for (student, teacher, layer), projection in zip(self.pairs, self.projections, strict=True):
            ours = projection(pooled[student]).float().flatten(0, 1)
            theirs = features[teacher, layer].flatten(0, 1)
            total = total + self._loss(ours, theirs, weights[teacher].flatten())
        return total / len(self.student_layers)


def require_same_batches(options: FeatureOptions, configured: int, shared: int) -> None:
    """Refuses ranks that cut a step into other micro-batches than one process does, where that
    would be another loss: a Gram matrix compares the segments of one micro-batch.

    Args:
        configured, shared: blocks of a micro-batch in the configuration, and of each rank.

    Raises:
        ConfigError
    """
    if options.weight and options.kind == "gram" and configured != shared:
        raise ConfigError(
            "with loss.features.kind gram each rank must take whole micro-batches",
            where="train.accumulate", expected=f"micro-batches of {configured} blocks",
            found=f"{shared} blocks with this number of ranks",
            todo="set train.accumulate to a multiple of the ranks, or choose another kind",
        )  # fmt: skip
