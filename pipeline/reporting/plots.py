"""Plots as inline SVG that takes its colours from the page.

Matplotlib draws with stand-in colours; each is then replaced by a CSS variable, so one drawing
serves light and dark. Panels are small (420 units wide) and titled by the page, which lays them out
side by side or one below the other; nothing in a panel shrinks beyond reading on a telephone.

Cost: 0.2 s a panel.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pipeline.reporting.curves import TERMS, Curve

OVERALL: Final = "overall"
VARIABLES: Final = (
    "ink", "muted", "rule", "before", "fused", "baseline", "ensemble",
    "teacher-1", "teacher-2", "teacher-3", "teacher-4", "teacher-5", "teacher-6",
    "student-1", "student-2", "student-3",
)  # fmt: skip
WIDTH: Final = 420.0
LABEL: Final = 28
"""Characters of a bar's label."""


class Line(NamedTuple):
    """One thing of a legend: its name, the CSS variable of its colour, and how it is drawn.

    `dash` is solid, dashed or dotted: words that matplotlib and CSS share.
    """

    label: str
    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Panel:
    """A drawing.

    Attributes:
        title: plain text, for the page to escape.
        svg: markup; all text in it is escaped.
    """

    title: str
    svg: str


# -- panels


def loss_panels(curves: Mapping[str, Any], lines: Mapping[str, Line]) -> list[Panel]:
    """Returns a panel per term of the loss.

    Args:
        curves: student → training_curves.
        lines: student → how it is shown.
    """
    panels = []
    for term, (title, unit) in TERMS.items():
        mine = {s: c["losses"][term] for s, c in curves.items() if term in c["losses"]}
        if not mine:
            continue
        with _axes(f"loss {term}", 230) as (axes, drawn):
            for student, values in mine.items():
                _faint_and_strong(axes, values, lines[student])
            _steps(axes, unit)
        panels.append(Panel(title, drawn[0]))
    return panels


def heldout_panels(
    curves: Mapping[str, Any],
    lines: Mapping[str, Line],
    domains: Sequence[str],
    ensemble: Mapping[str, float],
) -> list[Panel]:
    """Returns a panel per domain, the students' perplexity over steps on a log axis.

    Where the perplexity before training is far off, the axis leaves it out and the title tells it.

    Args:
        ensemble: domain → perplexity of the fused ensemble, a dashed line.
    """
    panels = []
    for domain in domains:
        mine = {s: c["heldout"][domain] for s, c in curves.items() if domain in c["heldout"]}
        level = ensemble.get(domain)
        pairs = [p for c in mine.values() for p in zip(c["step"], c["perplexity"], strict=True)]
        if not pairs:
            continue
        trained = [p for step, p in pairs if step > 0]
        every = [p for _, p in pairs]
        off = bool(trained) and max(every) > 5 * max(trained)
        shown = (trained if off else every) + ([level] if level else [])
        with _axes(f"held-out {domain}", 230) as (axes, drawn):
            axes.set_yscale("log")
            for student, series in mine.items():
                values = _drawable(series["perplexity"])
                _strong(axes, series["step"], values, lines[student], len(values) <= 30)
            if level:
                axes.axhline(level, color=_ink("ensemble"), linewidth=1, linestyle=(0, (4, 3)))
            _perplexity_axis(axes.yaxis, *_drawable((min(shown) / 1.08, max(shown) * 1.08)))
            _steps(axes, "perplexity (log)")
        note = f"; {perplexity(max(every))} before training" if off else ""
        panels.append(Panel(domain + note, drawn[0]))
    return panels


def weight_panels(
    curves: Mapping[str, Mapping[str, Curve]], domains: Sequence[str], lines: Mapping[str, Line]
) -> list[Panel]:
    """Returns a panel per domain, a line per teacher.

    Args:
        curves: domain → teacher → curve.
        lines: teacher → how it is shown.
    """
    panels = []
    for domain in domains:
        if domain not in curves:
            continue
        with _axes(f"weights {domain}", 200) as (axes, drawn):
            for teacher, values in curves[domain].items():
                _faint_and_strong(axes, values, lines[teacher])
            axes.set_ylim(-0.02, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
            _steps(axes, "mean weight (sum is 1)")
        panels.append(Panel(domain, drawn[0]))
    return panels


def bar_panels(
    models: Sequence[tuple[Line, Mapping[str, float]]], domains: Sequence[str]
) -> list[Panel]:
    """Returns a panel per domain, a bar per model, from perplexity 1 on a log axis.

    A bar's length is therefore the cross-entropy in nats: no cut axis, nothing exaggerated.

    Args:
        models: how each is shown, and its perplexity by domain.
    """
    panels = []
    for domain in domains:
        bars = [(line, table[domain]) for line, table in models if domain in table]
        if not bars:
            continue
        with _axes(f"bars {domain}", 48 + 19 * len(bars)) as (axes, drawn):
            axes.set_xscale("log")
            values = _drawable([value for _, value in bars])
            colours = [_ink(line.colour) for line, _ in bars]
            widths = [value - 1 for value in values]
            axes.barh(range(len(bars)), widths, left=1, height=0.62, color=colours)
            for i, (_, true) in enumerate(bars):
                axes.annotate(
                    perplexity(true), (values[i], i), (4, 0), textcoords="offset points",
                    va="center", color=_ink("ink"), fontsize=9.5, annotation_clip=False,
                )  # fmt: skip
            labels = [
                b.label if len(b.label) <= LABEL else f"{b.label[: LABEL - 1]}…" for b, _ in bars
            ]
            axes.set_yticks(range(len(bars)), labels)
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0, labelcolor=_ink("ink"))
            axes.grid(visible=False, axis="y")
            axes.spines["bottom"].set_visible(False)
            _perplexity_axis(axes.xaxis, 1.0, max(1.5, *values) ** 1.25)
            axes.set_xlabel("perplexity (log, from 1)")
        panels.append(Panel(domain, drawn[0]))
    return panels


# -- numbers


def perplexity(value: float | None) -> str:
    """Returns e.g. 12.34, 123.4, 12,345, 4.7e6; – for none."""
    if value is None or math.isnan(value):
        return "–"
    if not value < 99_999.5:
        return "∞" if math.isinf(value) else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.{2 if value < 99.995 else 1 if value < 999.95 else 0}f}"


def _drawable(values: Sequence[float]) -> list[float]:
    """Returns values that a log axis can bear."""
    return [min(max(v, 1e-3), 1e60) if not math.isnan(v) else v for v in values]


# -- drawing


def _ink(variable: str) -> str:
    """Returns the stand-in colour of a CSS variable."""
    return f"#fe00{VARIABLES.index(variable):02x}"


@contextmanager
def _axes(name: str, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Yields axes to draw on, and a list that then holds the SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.parse_math": False,
        "axes.edgecolor": _ink("rule"), "axes.labelcolor": _ink("muted"),
        "xtick.color": _ink("rule"), "xtick.labelcolor": _ink("muted"), "xtick.major.size": 3,
        "ytick.color": _ink("rule"), "ytick.labelcolor": _ink("muted"), "ytick.major.size": 0,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": _ink("rule"),
        "grid.linewidth": 0.6, "axes.spines.left": False, "axes.spines.top": False,
        "axes.spines.right": False, "text.color": _ink("ink"), "lines.solid_capstyle": "round",
    }  # fmt: skip
    drawn: list[str] = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw it
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        yield axes, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn.append(_inline(buffer.getvalue()))


def _inline(svg: str) -> str:
    """Returns the drawing as it can stand in a page: coloured by it, as wide as it allows."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*"', "", svg, count=2)  # of the root, which comes first
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # not unique, not referred to
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
    for variable in VARIABLES:
        svg = svg.replace(_ink(variable), f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _faint_and_strong(axes: Any, values: Curve, line: Line) -> None:
    steps = values["step"]
    faint = {"alpha": 0.28, "linewidth": 0.8, "linestyle": line.dash}
    axes.plot(steps, values["value"], color=_ink(line.colour), **faint)
    _strong(axes, steps, values["smoothed"], line, len(steps) == 1)


def _strong(axes: Any, x: list[float], y: list[float], line: Line, dots: bool) -> None:
    marker = "o" if dots else None
    axes.plot(
        x, y, color=_ink(line.colour), linewidth=1.6, linestyle=line.dash, marker=marker,
        markersize=3.2,
    )  # fmt: skip


def _steps(axes: Any, ylabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)


def _perplexity_axis(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    few = decades < 0.7  # a log locator may find no tick at all
    axis.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=subs, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.0+$", "", perplexity(x))))
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
