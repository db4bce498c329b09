"""What the caches of several teachers must have in common, and what all of them can serve."""

from __future__ import annotations

from collections.abc import Mapping

from stages.options import Tail
from stages.target_options import LossOptions
from storage.errors import ConfigError
from storage.reader import CacheReader
from storage.writer import is_imported


def common_tail(options: LossOptions, caches: Mapping[str, CacheReader]) -> Tail:
    """Returns what the options let stand for the tail of these caches: of `auto`, draws only where each
    has some, as what stands for it is the same for all. Draws that are asked for stay asked for:
    BatchReader says whose cache has none."""
    return "draws" if options.target == "draws" else options.tail(least_draws(caches))


def least_draws(caches: Mapping[str, CacheReader]) -> int:
    """Returns S of the cache that has the fewest draws a token; an imported one has none."""
    return min((cache.layout.draws for cache in caches.values()), default=0)


def require_alike(caches: Mapping[str, CacheReader], temperature: float) -> None:
    """Refuses caches whose notes cannot be put side by side.

    At temperature 1 nobody looks at the grids, which an imported cache does not have.

    Raises:
        ConfigError
    """
    imported = [name for name, c in caches.items() if is_imported(c.identity)]
    if temperature != 1.0 and imported:
        raise ConfigError(
            f"the cache of teacher {imported[0]!r} was imported: a capture at temperature 1 does not "
            "tell other temperatures' partition sums", where="loss.temperature", expected=1.0,
            found=temperature, todo="set loss.temperature: 1.0, or leave the teacher out of "
            "fusion.teachers",
        )  # fmt: skip
    kinds = {
        name: (
            c.layout.temperatures if temperature != 1.0 or not imported else (),
            c.layout.vocab_size,
            c.layout.segments,
        )
        for name, c in caches.items()
    }
    pooled = {c.layout.segments for c in caches.values() if c.layers}
    if len({kind[:2] for kind in kinds.values()}) > 1 or len(pooled) > 1:
        raise ConfigError(
            "the teachers' caches differ in temperatures, vocabulary or segments", where="store",
            found="; ".join(f"{name}: {kind}" for name, kind in kinds.items()),
            todo="cache all teachers with one configuration",
        )  # fmt: skip
