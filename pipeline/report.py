"""What a run came to: one HTML file that needs nothing else, Markdown, and all figures as JSON.

Everything is read from `evaluation.json` and `students/*/metrics.jsonl`; no model is loaded. First
the numbers are gathered into one plain dict, which is `report.json`; the templates lay out tables
made from it, and `pipeline/plots.py` draws it. Cost: 3 s and 300 kB of HTML for three domains,
9 s and 1 MB for ten domains and six teachers, whatever the number of steps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from pipeline import plots
from pipeline.plots import OVERALL, Line, perplexity
from storage import durable
from storage.errors import CorruptShard, IncompleteCache

NONE: Final = "–"
BEFORE, FUSED, BASELINE = "before", "fused", "cross_entropy"
ENSEMBLE: Final = Line("fused ensemble", "ensemble")
STUDENTS: Final = {
    BEFORE: Line("student before", "before"),
    FUSED: Line("student, fused teachers", "fused"),
    BASELINE: Line("student, cross-entropy only", "baseline"),
}
KL: Final = "KL to the fused teachers (nats/token)"
ACCURACY: Final = "top-1 accuracy (%)"


@dataclass(frozen=True)
class Summary:
    """The head of the report: a table with one row a model, and what it comes to."""

    headers: list[str]
    rows: list[list[str]]
    verdict: str


@dataclass(frozen=True)
class Table:
    """A table as shown: the first cell of a row names it."""

    headers: list[str]
    rows: list[list[str]]


def write_report(run_dir: Path) -> dict[str, Path]:
    """Writes report.html, report.md and report.json into `run_dir/report`.

    Returns:
        "html", "md", "json" → path.

    Raises:
        IncompleteCache: the run has not been evaluated.
        CorruptShard: a file of the run is not the JSON that it should be.
    """
    path = run_dir / "evaluation.json"
    if not path.exists():
        todo = "run `scholiast evaluate`"
        raise IncompleteCache("the run has not been evaluated", where=path, todo=todo)
    evaluation = _parse(path.read_text(), path, "delete it and run `scholiast evaluate`")
    metrics = {p.parent.name: read_metrics(p) for p in run_dir.glob("students/*/metrics.jsonl")}
    # In the order of the tables, so that colours and legends follow it.
    curves = {s: plots.training_curves(metrics[s]) for s in STUDENTS if s in metrics}
    view = _view(evaluation)
    head = {"summary": asdict(view["summary"]), "comparison": _comparison(evaluation)}
    figures = {"format": 1, **head, **evaluation, "curves": curves}
    contents = {
        "html": _render("report.html.j2", view | {"plots": _plots(evaluation, curves)}),
        "md": _render("report.md.j2", view),
        "json": json.dumps(figures, allow_nan=False) + "\n",
    }
    paths = {kind: run_dir / "report" / f"report.{kind}" for kind in contents}
    for kind, text in contents.items():
        # Text of a corpus may hold half a surrogate pair; the report is not to fail on it.
        durable.write_bytes(paths[kind], text.encode("utf-8", errors="replace"))
    return paths


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a last line that a crash has cut is left out."""
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parse(line, f"{path}:{number}", "remove that line"))
        except CorruptShard:
            if number < len(lines):
                raise
    return rows


def _parse(text: str, where: object, todo: str) -> dict[str, Any]:
    """Returns a JSON object; NaN and infinities, which JSON does not have, become None."""
    try:
        parsed: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    except ValueError as error:
        raise CorruptShard(f"not JSON: {error}", where=where, todo=todo) from error
    return parsed


# -- the summary


def summary(evaluation: Mapping[str, Any]) -> Summary:
    """Returns the table of all models and a sentence on whether the fused teachers helped."""
    domains = _domains(evaluation)
    rows = []
    for line, table in _models(evaluation):
        values = [table.get(domain, {}).get("perplexity") for domain in domains]
        overall = table.get(OVERALL, {})
        kl, accuracy = _fixed(overall.get("kd"), 3), _fixed(overall.get("accuracy"), 1, 100)
        rows.append([line.label, *map(perplexity, values), kl, accuracy])
    headers = ["model", *(f"perplexity: {domain}" for domain in domains), KL, ACCURACY]
    return Summary(headers, rows, _verdict(evaluation))


def _verdict(evaluation: Mapping[str, Any]) -> str:
    compared = _comparison(evaluation)
    fused, baseline = compared[FUSED], compared[BASELINE]
    if not _models(evaluation):
        return "There was no held-out data, so nothing was measured and nothing can be concluded."
    if fused is None:
        return "The student taught by the fused teachers was not evaluated."
    if baseline is None:
        return (
            "The student taught by the fused teachers has an overall held-out perplexity of "
            f"{perplexity(fused)}, from {perplexity(compared[BEFORE])} before training; there is "
            "no cross-entropy-only student to compare it with, so this run does not tell whether "
            "the teachers helped."
        )
    percent = compared["difference_percent"]
    verb = "beats" if fused < baseline else "does not beat"
    size = f"{abs(percent):.1f}" if abs(percent) >= 0.95 else f"{abs(percent):.2g}"
    difference = f"{size} per cent {'lower' if percent < 0 else 'higher'}"
    return (
        f"The student taught by the fused teachers {verb} the one trained on cross-entropy alone: "
        f"overall held-out perplexity {perplexity(fused)} against {perplexity(baseline)}"
        f"{_steps_taken(evaluation)}, {difference if percent else 'no difference'}."
    )


def _steps_taken(evaluation: Mapping[str, Any]) -> str:
    fused, baseline = (evaluation["training"][student]["steps"] for student in (FUSED, BASELINE))
    if fused == baseline:
        return f" after {fused:,} steps each"
    return f" after {fused:,} and {baseline:,} steps, which is no fair comparison"


def _comparison(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns overall perplexities of the students, and how far fused is above the baseline."""
    found = {s: _student(evaluation, s).get(OVERALL, {}).get("perplexity") for s in STUDENTS}
    percent = None
    if found[FUSED] is not None and found[BASELINE]:
        percent = (found[FUSED] / found[BASELINE] - 1) * 100
    return {**found, "difference_percent": percent}


def _student(evaluation: Mapping[str, Any], name: str) -> dict[str, Any]:
    domains: dict[str, Any] = evaluation["students"].get(name, {}).get("domains", {})
    return domains


def _models(evaluation: Mapping[str, Any]) -> list[tuple[Line, dict[str, Any]]]:
    """Returns every measured model and its results by domain, in the tables' order."""
    models = [(line, evaluation["teachers"].get(t)) for t, line in _teachers(evaluation).items()]
    models.append((ENSEMBLE, evaluation["fused"]))
    models += [(line, _student(evaluation, name)) for name, line in STUDENTS.items()]
    return [(line, table) for line, table in models if table]


def _teachers(evaluation: Mapping[str, Any]) -> dict[str, Line]:
    names = dict.fromkeys([*evaluation["teachers"], *evaluation["cache"]])
    return {name: Line(name, f"teacher-{i % 6 + 1}") for i, name in enumerate(names)}


def _domains(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns the columns of every table of held-out results."""
    return [*evaluation["domains"], OVERALL] if _models(evaluation) else []


# -- everything else


def _view(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what both templates lay out."""
    overall = evaluation["fused"].get(OVERALL) or _student(evaluation, FUSED).get(OVERALL, {})
    return {
        "run": evaluation,
        "created": _date(evaluation["created"]),
        "summary": summary(evaluation),
        "tokens": overall.get("rows"),
        "temperature": evaluation["config"].get("loss", {}).get("temperature"),
        "fused_label": STUDENTS[FUSED].label,
        "students": {name: line.label for name, line in STUDENTS.items()},
        "colours": {name: line.colour for name, line in STUDENTS.items()},
        "weights": _by_domain(evaluation, "weight"),
        "entropies": _by_domain(evaluation, "entropy"),
        "stages": _stages(evaluation),
        "arrays": _arrays(evaluation),
        "sources": _sources(evaluation),
        "config": yaml.safe_dump(evaluation["config"], sort_keys=False, allow_unicode=True),
    }


def _by_domain(evaluation: Mapping[str, Any], field: str) -> Table:
    domains, teachers = _domains(evaluation), evaluation["teachers"]
    raw = {n: [table.get(d, {}).get(field) for d in domains] for n, table in teachers.items()}
    rows = [[name, *(_fixed(value, 2) for value in values)] for name, values in raw.items()]
    return Table(["teacher", *domains], rows)


def _stages(evaluation: Mapping[str, Any]) -> Table:
    rows = []
    for name, cache in evaluation["cache"].items():
        speed, peak = _count(cache["tokens_per_second"]), _bytes(cache["peak_bytes"])
        sizes = [_count(cache["parameters"]), _count(cache["tokens"])]
        rows.append([f"cache: {name}", cache["device"] or NONE, *sizes, speed, NONE, peak])
    for student, line in STUDENTS.items():
        if usage := evaluation["training"].get(student):
            parameters = evaluation["students"].get(student, {}).get("parameters")
            speed, peak = _count(usage["tokens_per_second"]), _bytes(usage["peak_bytes"])
            sizes, time = [_count(parameters), _count(usage["tokens"])], _time(usage["seconds"])
            rows.append([f"train: {line.label}", NONE, *sizes, speed, time, peak])
    headers = ["stage", "device", "parameters", "tokens", "tokens/s", "time", "peak memory"]
    return Table(headers, rows)


def _arrays(evaluation: Mapping[str, Any]) -> Table:
    caches = evaluation["cache"]
    names = dict.fromkeys(name for cache in caches.values() for name in cache["arrays"])
    rows = [[n, *(_fixed(c["arrays"].get(n), 2) for c in caches.values())] for n in names]
    rows.append(["whole cache", *(_fixed(c["bytes_per_token"], 2) for c in caches.values())])
    rows.append(["on disk", *(_bytes(c["bytes"]) for c in caches.values())])
    return Table(["bytes/token", *caches], rows)


def _sources(evaluation: Mapping[str, Any]) -> Table:
    rows = [
        [s["domain"], s["split"], *(_count(s[n]) for n in ("blocks", "documents", "tokens"))]
        for s in evaluation["corpus"]["sources"]
    ]
    return Table(["domain", "split", "blocks", "documents", "tokens"], rows)


def _plots(evaluation: Mapping[str, Any], curves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the panels of each plot and its legend."""
    measured = {
        line: {domain: row["perplexity"] for domain, row in table.items() if row["perplexity"]}
        for line, table in _models(evaluation)
    }
    measured.pop(STUDENTS[BEFORE], None)  # millions: it is in the table, and would flatten the rest
    ensemble = measured.get(ENSEMBLE, {})
    domains, teachers = evaluation["domains"], _teachers(evaluation)
    heldout = [OVERALL, *domains] if len(domains) > 1 else domains
    weights = curves.get(FUSED, {}).get("weights", {})
    students = [STUDENTS[student] for student in curves]
    heldout_lines = [*students, ENSEMBLE] if ensemble else students
    return {
        "losses": (plots.loss_panels(curves, STUDENTS), students),
        "heldout": (plots.heldout_panels(curves, STUDENTS, heldout, ensemble), heldout_lines),
        "weights": (plots.weight_panels(weights, domains, teachers), list(teachers.values())),
        "bars": (plots.bar_panels(list(measured.items()), heldout), []),
    }


def _render(template: str, view: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _markdown, "fence": _fence, "count": _count}
    return environment.get_template(template).render(view)


# -- text


def _fixed(value: float | None, digits: int, scale: float = 1.0) -> str:
    return NONE if value is None or math.isnan(value) else f"{value * scale:,.{digits}f}"


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.{0 if value >= 100 or value % 1 == 0 else 1}f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 1e9:,.2f} GB" if value >= 999.5e6 else f"{value / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _date(created: str) -> str:
    return datetime.fromisoformat(created).astimezone(UTC).strftime("%-d %B %Y, %H:%M UTC")


def _markdown(text: object) -> str:
    """Returns text as it can stand in a Markdown line or table cell: nothing in it is markup."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*\[\]|#>~])", r"\\\1", line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def _fence(text: str) -> str:
    """Returns text as a block of code, behind a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
