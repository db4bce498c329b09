"""Alignment of pooled hidden states: projections, and the distance to each teacher's features.

Shapes: B blocks, G segments, D hidden, M teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from stages.options import FeatureOptions
from storage.errors import ConfigError

Pair = tuple[int, str, int]
"""(student layer, teacher, teacher layer), layers from 1."""


def resolve_pairs(options: FeatureOptions, stored: Mapping[str, Sequence[int]]) -> list[Pair]:
    """Returns every pair the options ask for.

    Args:
        stored: teacher → layers its cache holds.

    Raises:
        ConfigError: a weight without pairs, an unknown teacher, or a layer that is not stored.
    """
    if options.weight == 0:
        return []
    if not options.pairs:
        raise ConfigError(
            "feature alignment has a weight but no layers", where="loss.features.pairs",
            todo="add a pair such as {student: 5, teacher: 29}, or set loss.features.weight: 0",
        )  # fmt: skip
    pairs: list[Pair] = []
    for i, pair in enumerate(options.pairs):
        named = (
            pair.teacher if isinstance(pair.teacher, dict) else dict.fromkeys(stored, pair.teacher)
        )
        for teacher, layer in named.items():
            if layer not in stored.get(teacher, ()):
                raise ConfigError(
                    f"the cache of teacher {teacher!r} holds no features of layer {layer}"
                    if teacher in stored else f"there is no teacher {teacher!r}",
                    where=f"loss.features.pairs.{i}",
                    expected="; ".join(f"{n}: {list(s) or 'none'}" for n, s in stored.items()),
                    found=f"{teacher}: {layer}",
                    todo="choose a stored layer, or add it to teachers.*.feature_layers and cache again",
                )  # fmt: skip
            pairs.append((pair.student, teacher, layer))
    return pairs


class FeatureAligner(nn.Module):
    """One linear projection a pair, student → teacher, trained with the student and then left behind.

    Args:
        pairs: from `resolve_pairs`.
        kind: "cosine" (1 − cos) or "mse" (mean over D).
        student_size: D of the student.
        teacher_sizes: teacher → D.
    """

    def __init__(
        self, pairs: Sequence[Pair], kind: str, student_size: int, teacher_sizes: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.pairs, self.kind = list(pairs), kind
        self.projections = nn.ModuleList(
            nn.Linear(student_size, teacher_sizes[teacher]) for _, teacher, _ in pairs
        )

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
            pooled: student layer → means [B, G, D].
            features: (teacher, layer) → its means [B, G, D_m].
            weights: teacher → fused weight of each segment [B, G]; 0 for an empty one.
        """
        total = torch.zeros((), device=next(iter(pooled.values())).device)
        for (student, teacher, layer), projection in zip(self.pairs, self.projections, strict=True):
            projected = projection(pooled[student]).float()
            theirs = features[teacher, layer]
            if self.kind == "cosine":
                distance = 1.0 - cosine_similarity(projected, theirs, dim=-1)
            else:
                distance = (projected - theirs).square().mean(-1)
            total = total + (weights[teacher] * distance).sum()
        return total / len(self.student_layers)
