"""Plots of the results: a file a table, SVG, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.reproduce.results import CE_LOSS, KD, PERPLEXITY, Results, Spread
from pipeline.reproduce.rows import APPROACHES, CE, ENCODINGS, MULTITASK, ONLINE, SENSITIVITY

BYTES = "bytes_per_token"
LABELS: Final = {
    PERPLEXITY: "held-out perplexity", KD: "distillation loss, nats a token",
    CE_LOSS: "held-out loss, nats a token",
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
    """Held-out loss over bytes a token, a line an encoding, the bounds as levels; beside it, where whole
    distributions were learnt online, the distance to them: what pairing by seed leaves of the spread."""
    import matplotlib.pyplot as plt

    rows: dict[str, list[tuple[float, str]]] = {}
    for row in results.rows[table]:
        size = results.spread(table, row, BYTES)
        if size is not None and row not in (CE, ONLINE) and results.seeds(table, row, CE_LOSS):
            rows.setdefault(groups.get((table, row), ""), []).append((size.mean, row))
    if not rows:
        return None
    online = bool(results.seeds(table, ONLINE, CE_LOSS))
    figure, panels = plt.subplots(
        1, 1 + online, figsize=(10, 4.5), layout="constrained", squeeze=False
    )
    whole, *apart = panels[0]
    _lines(whole, rows, lambda row: list(results.seeds(table, row, CE_LOSS).values()))
    for row, style in ((ONLINE, "--"), (CE, ":")):
        level = results.spread(table, row, CE_LOSS)
        if level is not None:
            whole.axhline(level.mean, color="black", linestyle=style, linewidth=1, label=row)
    whole.set_ylabel(LABELS[CE_LOSS])
    whole.legend(fontsize=8)
    for axes in apart:
        _lines(axes, rows, lambda row: results.paired(table, row, ONLINE, CE_LOSS))
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel("less that of whole distributions online, seed by seed")
    return figure


def _lines(
    axes: Any, rows: Mapping[str, list[tuple[float, str]]], values: Callable[[str], list[float]]
) -> None:
    """Means and standard deviations of `values` of a row over its bytes a token, a line a group."""
    colours = _colours(list(rows))
    for group, found in rows.items():
        points = [(size, Spread.of(values(row)), row) for size, row in sorted(found) if values(row)]
        axes.errorbar(
            [size for size, _, _ in points], [spread.mean for _, spread, _ in points],
            [spread.sd or 0.0 for _, spread, _ in points],
            fmt="o-", label=group, color=colours[group], capsize=3,
        )  # fmt: skip
        for size, spread, row in points:
            short = row.rpartition(", ")[2].removeprefix("k = ").removesuffix(" draws")
            axes.annotate(
                short, (size, spread.mean), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axes.set_xlabel("bytes a token and teacher, everything counted")
    axes.margins(x=0.12)  # room for the last label
    axes.grid(alpha=0.3)


def _colours(groups: list[str]) -> dict[str, str]:
    return {group: f"C{i}" for i, group in enumerate(dict.fromkeys(groups))}
