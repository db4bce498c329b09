"""Which layer of the student is aligned with which of a teacher: by hand, or by relative depth.

No torch here: a run's identity names its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.target_options import FeatureOptions, FeaturePair
from storage.errors import ConfigError

Pair = tuple[int, str, int]
"""(student layer, teacher, teacher layer), layers from 1."""

Layers = Mapping[str, Sequence[int]]
"""Teacher → layers its cache holds."""


def resolve_pairs(
    options: FeatureOptions, stored: Layers, depths: Mapping[str, int], student_depth: int
) -> list[Pair]:
    """Returns every pair the options ask for.

    Args:
        depths: teacher → how many decoder layers it has; asked for `auto` alone.
        student_depth: how many the student has; the same.

    Raises:
        ConfigError: a weight without pairs, an unknown teacher, or a layer that is not stored.
    """
    if options.weight == 0:
        return []
    if not isinstance(options.pairs, str):
        return _by_hand(options.pairs, stored)
    if not any(stored.values()):
        raise ConfigError(
            "feature alignment has a weight but no teacher's features are stored",
            where="loss.features.pairs",
            todo="name layers in teachers.*.feature_layers and cache again, or set "
            "loss.features.weight: 0",
        )  # fmt: skip
    return [
        (at_depth(layer, depths[teacher], student_depth), teacher, layer)
        for teacher, layers in stored.items()
        for layer in layers
    ]


def at_depth(layer: int, depth: int, student_depth: int) -> int:
    """Returns the student's layer at a teacher layer's relative depth: l/L_t·L_s to the nearest
    integer (halves up), at least 1."""
    return max(1, (2 * layer * student_depth + depth) // (2 * depth))


def wanted_layers(options: FeatureOptions, stored: Layers) -> dict[str, tuple[int, ...]]:
    """Returns which stored layers of each teacher the pairs name; depths are not asked for.

    Raises:
        ConfigError: as `resolve_pairs`.
    """
    if options.weight and isinstance(options.pairs, str):
        return {teacher: tuple(sorted(layers)) for teacher, layers in stored.items()}
    pairs = resolve_pairs(options, stored, {}, 0)
    return {
        name: tuple(sorted({layer for _, teacher, layer in pairs if teacher == name}))
        for name in stored
    }


def _by_hand(named_pairs: Sequence[FeaturePair], stored: Layers) -> list[Pair]:
    if not named_pairs:
        raise ConfigError(
            "feature alignment has a weight but no layers", where="loss.features.pairs",
            todo="say auto, add a pair such as {student: 5, teacher: 29}, or set "
            "loss.features.weight: 0",
        )  # fmt: skip
    pairs: list[Pair] = []
    for i, pair in enumerate(named_pairs):
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
