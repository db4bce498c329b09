"""A training's metrics as curves, whatever its length.

A curve keeps at most 400 points, each the mean of equally many logged steps, weighted by their
tokens; the smoothed line is a centred mean over a tenth of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

Curve = dict[str, list[float]]  # step, value, smoothed: three lists of one length
Points = list[tuple[int, float, float]]  # (step, value, weight)

MOST_POINTS: Final = 400
TERMS: Final = {
    "ce": ("Cross-entropy to the true token", "cross-entropy, nats/token"),
    "kd": ("Distillation loss", "distillation loss, nats/token"),
    "features": ("Feature alignment", "loss of a segment"),
    "total": ("Total, as each student weights its terms", "loss"),
}


def curve(points: Points) -> Curve:
    """Returns a curve of at most MOST_POINTS points from (step, value, weight)."""
    points = [p for p in points if p[2] > 0 and math.isfinite(p[1])]
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    steps, values, weights = list[float](), list[float](), list[float]()
    for i in range(0, len(points), size):
        part = points[i : i + size]
        weights.append(sum(w for _, _, w in part))
        values.append(sum(v * w for _, v, w in part) / weights[-1])
        steps.append(part[-1][0])
    return {"step": steps, "value": values, "smoothed": smoothed(values, weights)}


def smoothed(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Returns weighted means over a centred tenth of the points, over fewer at the ends."""
    half = len(values) // 20
    means = []
    for i in range(len(values)):
        # Symmetric where losses fall steeply; at the end that would leave the noise of one point.
        window = slice(i - min(half, i), i + min(half, i) + 1)
        total = sum(v * w for v, w in zip(values[window], weights[window], strict=True))
        means.append(total / sum(weights[window]))
    return means


def training_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what one student's metrics show.

    Args:
        rows: of metrics.jsonl, in the order of their steps.

    Returns:
        losses: term → curve (a term that is 0 throughout is left out); weights: domain → teacher →
        curve; heldout: domain or "overall" → {step, perplexity}.
    """
    steps = [row for row in rows if "total" in row]
    losses = {term: _points(steps, term) for term in TERMS}
    weights: dict[str, dict[str, Points]] = {}
    heldout: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for domain, by_teacher in row.get("weights", {}).items():
            for teacher, weight in by_teacher.items():
                points = weights.setdefault(domain, {}).setdefault(teacher, [])
                if weight is not None:
                    points.append((row["step"], weight, 1.0))
        for domain, measured in row.get("heldout", {}).items():
            series = heldout.setdefault(domain, {"step": [], "perplexity": []})
            if measured["perplexity"] is not None:
                series["step"].append(row["step"])
                series["perplexity"].append(measured["perplexity"])
    return {
        "losses": {k: curve(p) for k, p in losses.items() if any(value for _, value, _ in p)},
        "weights": {d: {t: curve(p) for t, p in w.items()} for d, w in weights.items()},
        "heldout": heldout,
    }


def _points(rows: Sequence[Mapping[str, Any]], term: str) -> Points:
    found = ((row["step"], row.get(term), float(row.get("rows", 1))) for row in rows)
    return [(step, float(value), weight) for step, value, weight in found if value is not None]
