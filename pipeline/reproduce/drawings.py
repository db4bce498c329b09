"""Plots of the results: a file a table, SVG, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.reproduce.results import KD, PERPLEXITY, Results
from pipeline.reproduce.rows import APPROACHES, CE, ENCODINGS, MULTITASK, ONLINE, SENSITIVITY

CE_LOSS, BYTES = "ce/overall", "bytes_per_token"
LABELS: Final = {
    PERPLEXITY: "held-out perplexity", KD: "KL to the fused teachers, nats a token",
    CE_LOSS: "held-out cross-entropy, nats a token",
}  # fmt: skip


def draw(results: Results, folder: Path, groups: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Draws what there is; returns table → file name.

    Args:
        folder: for the files.
        groups: (table, row) → the group of a row.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "scholiast", "svg.fonttype": "none"})
    makers = {APPROACHES: _overview, SENSITIVITY: _overview, MULTITASK: _overview}
    makers[ENCODINGS] = _frontier
    drawn = {}
    for table, make in makers.items():
        figure = make(results, table, groups) if table in results.rows else None
        if figure is not None:
            name = f"results-{table}.svg"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, metadata={"Date": None})
            drawn[table] = name
    return drawn


def _overview(results: Results, table: str, groups: Mapping[tuple[str, str], str]) -> Any:
    """Perplexity and distillation loss; None if no row has them."""
    metrics = [m for m in (PERPLEXITY, KD) if m in results.metrics[table]]
    return dots(results, table, metrics, groups) if metrics else None


def dots(
    results: Results, table: str, metrics: Sequence[str], groups: Mapping[tuple[str, str], str]
) -> Any:
    """Returns a figure of every seed's value by row and the means, a panel a metric.

    Args:
        groups: (table, row) → what a row's colour stands for.
    """
    import matplotlib.pyplot as plt

    rows = [r for r in results.rows[table] if any(results.seeds(table, r, m) for m in metrics)]
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(9, 1.1 + 0.26 * len(rows)), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    colours = _colours([groups.get((table, row), "") for row in rows])
    for axes, metric in zip(panels[0], metrics, strict=True):
        for y, row in enumerate(reversed(rows)):
            found = list(results.seeds(table, row, metric).values())
            colour = colours[groups.get((table, row), "")]
            axes.plot(found, [y] * len(found), "o", color=colour, alpha=0.5, markersize=4)
            if found:
                axes.plot([sum(found) / len(found)], [y], "|", color="black", markersize=14)
        axes.set_xlabel(f"{LABELS[metric]}\n(points: seeds; bars: means)", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(rows)), list(reversed(rows)), fontsize=8)
    return figure


def _frontier(results: Results, table: str, groups: Mapping[tuple[str, str], str]) -> Any:
    """Held-out loss over bytes a token, a line an encoding; the bounds as levels."""
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for row in results.rows[table]:
        size, loss = results.spread(table, row, BYTES), results.spread(table, row, CE_LOSS)
        if size is not None and loss is not None and row not in (CE, ONLINE):
            points.setdefault(groups.get((table, row), ""), []).append(
                (size.mean, loss.mean, loss.sd or 0.0, row)
            )
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    colours = _colours(list(points))
    for group, found in points.items():
        sizes, losses, spreads, names = zip(*sorted(found), strict=True)
        axes.errorbar(
            sizes, losses, spreads, fmt="o-", label=group, color=colours[group], capsize=3
        )
        for size, loss, name in zip(sizes, losses, names, strict=True):
            short = name.rpartition(", ")[2].removesuffix(" draws")
            axes.annotate(
                short, (size, loss), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    for row, style in ((ONLINE, "--"), (CE, ":")):
        level = results.spread(table, row, CE_LOSS)
        if level is not None:
            axes.axhline(level.mean, color="black", linestyle=style, linewidth=1, label=row)
    axes.set_xlabel("bytes a token and teacher, everything counted")
    axes.set_ylabel(LABELS[CE_LOSS])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _colours(groups: list[str]) -> dict[str, str]:
    return {group: f"C{i}" for i, group in enumerate(dict.fromkeys(groups))}
