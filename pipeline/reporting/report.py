"""What a run came to: one HTML file that needs nothing else, Markdown, and all figures as JSON.

Everything is read from `evaluation.json` and `students/*/metrics.jsonl`; no model is loaded. First
the numbers are gathered into one plain dict, which is `report.json`; the templates lay out tables
made from it, and `pipeline/plots.py` draws it. Cost: 3 s and 300 kB of HTML for three domains, plus
some 80 kB a domain for the view of single tokens; 9 s and 1 MB for ten domains and six teachers
without it, whatever the number of steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from pipeline.config import BASELINE, BEFORE, FUSED
from pipeline.reporting import curves, plots, report_tables
from pipeline.reporting.cells import date
from pipeline.reporting.page import render, write_files
from pipeline.reporting.plots import OVERALL, perplexity
from pipeline.reporting.report_tables import ENSEMBLE, STUDENTS, Evaluation
from storage.errors import CorruptShard

_SCRIPTS: Final = ("sort.js", "tokens.js")


@dataclass(frozen=True)
class Summary:
    """The head of the report: a table with one row a model, and what it comes to.

    Attributes:
        headers: of the table; a line break is where they may break.
        note: what the reader must know about the figures; "" for nothing.
    """

    headers: list[str]
    rows: list[list[str]]
    verdict: str
    note: str = ""


def write_report(run_dir: Path, out: Path | None = None) -> dict[str, Path]:
    """Writes report.html, report.md and report.json into `out`, by default `run_dir/report`.

    Returns:
        "html", "md", "json" → path.

    Raises:
        IncompleteCache: the run has not been evaluated.
        CorruptShard: a file of the run is not the JSON that it should be.
    """
    evaluation = report_tables.read_evaluation(run_dir)
    drawn = training_curves(run_dir, evaluation)
    view = _view(evaluation)
    head = {"summary": asdict(view["summary"]), "comparison": _comparison(evaluation)}
    every = {"format": 1, **head, **evaluation, "curves": drawn}
    page = view | {"plots": _plots(evaluation, drawn), "tokens": _island(evaluation)}
    contents = {
        "html": render("report.html.j2", page, _SCRIPTS),
        "md": render("report.md.j2", view),
        "json": json.dumps(every, allow_nan=False) + "\n",
    }
    return write_files(out or run_dir / "report", "report", contents)


def training_curves(run_dir: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Returns student → curves (curves.training_curves), in the order of the tables."""
    found = {p.parent.name: p for p in run_dir.glob("students/*/metrics.jsonl")}
    return {
        name: curves.training_curves(read_metrics(found[name]))
        for name in report_tables.student_lines(evaluation)
        if name in found
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a last line that a crash has cut is left out."""
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(report_tables.parse(line, f"{path}:{number}", "remove that line"))
        except CorruptShard:
            if number < len(lines):
                raise
    return rows


# -- the summary


def summary(evaluation: Evaluation) -> Summary:
    """Returns the table of all models and a sentence on whether the fused teachers helped."""
    table = report_tables.perplexities(evaluation)
    note = report_tables.gold_note(evaluation)
    verdict = " ".join(filter(None, (_verdict(evaluation), _ensemble_warning(evaluation))))
    return Summary(table.headers, table.rows, verdict, note)


def _ensemble_warning(evaluation: Evaluation) -> str:
    """Returns what to think of where one teacher alone is better than the ensemble taught from."""
    fused = evaluation["fused"].get(OVERALL, {}).get("perplexity")
    alone = {
        name: of_it[OVERALL]["perplexity"]
        for name, of_it in evaluation["teachers"].items()
        if of_it.get(OVERALL, {}).get("perplexity") is not None
    }
    if fused is None or not alone:
        return ""
    best = min(alone, key=alone.__getitem__)
    if alone[best] >= fused:
        return ""
    return (
        f"The ensemble ({perplexity(fused)}) is worse than the teacher {best} alone "
        f"({perplexity(alone[best])}): on this text try fusion.weights=single:{best}, em or others."
    )


def _verdict(evaluation: Evaluation) -> str:
    compared = _comparison(evaluation)
    fused, baseline = compared[FUSED], compared[BASELINE]
    if not report_tables.models(evaluation):
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
    apart = (evaluation.get("fused_less_baseline") or {}).get("interval")
    verb = "beats" if fused < baseline else "does not beat"
    told = ""
    if apart:
        low, high = (100.0 * math.expm1(bound) for bound in apart)
        if low <= 0.0 <= high:
            verb, between = "is not told apart from", f"{-low:.1f} lower to {high:.1f} higher"
        else:
            least, most = sorted((abs(low), abs(high)))
            between = f"{least:.1f} to {most:.1f}"
        told = f" (95\u00a0% interval over held-out blocks: {between})"
    size = f"{abs(percent):.1f}" if abs(percent) >= 0.95 else f"{abs(percent):.2g}"
    difference = f"{size} per cent {'lower' if percent < 0 else 'higher'}"
    return (
        f"The student taught by the fused teachers {verb} the one trained on cross-entropy alone: "
        f"overall held-out perplexity {perplexity(fused)} against {perplexity(baseline)}"
        f"{_steps_taken(evaluation)}, {difference if percent else 'no difference'}{told}."
    )


def _steps_taken(evaluation: Evaluation) -> str:
    fused, baseline = (evaluation["training"][student]["steps"] for student in (FUSED, BASELINE))
    if fused == baseline:
        return f" after {fused:,} steps each"
    return f" after {fused:,} and {baseline:,} steps, which is no fair comparison"


def _comparison(evaluation: Evaluation) -> dict[str, Any]:
    """Returns overall perplexities of the students, and how far fused is above the baseline."""
    found = {
        s: report_tables.student(evaluation, s).get(OVERALL, {}).get("perplexity") for s in STUDENTS
    }
    percent = None
    if found[FUSED] is not None and found[BASELINE]:
        percent = (found[FUSED] / found[BASELINE] - 1) * 100
    return {**found, "difference_percent": percent}


# -- everything else


def _view(evaluation: Evaluation) -> dict[str, Any]:
    """Returns what both templates lay out."""
    overall = evaluation["fused"].get(OVERALL) or report_tables.student(evaluation, FUSED).get(
        OVERALL
    )
    teachers, students = (
        report_tables.teacher_lines(evaluation),
        report_tables.student_lines(evaluation),
    )
    table = summary(evaluation)
    return {
        "run": evaluation,
        "created": date(evaluation["created"]),
        "summary": table,
        "rows": (overall or {}).get("rows"),
        "distillation": report_tables.distillation_note(evaluation),
        "fused_label": STUDENTS[FUSED].label,
        "writers": {**teachers, **students},
        "intervals": any(getattr(c, "interval", "") for row in table.rows for c in row),
        "overall": report_tables.overall(evaluation),
        "several": report_tables.several(evaluation),
        "metrics": report_tables.by_metric(evaluation),
        "prompts": evaluation["config"].get("evaluate", {}).get("prompts"),
        "generation": report_tables.generation(evaluation),
        "weights": report_tables.of_teachers(evaluation, "weight"),
        "entropies": report_tables.of_teachers(evaluation, "entropy"),
        "stages": report_tables.stages(evaluation),
        "arrays": report_tables.arrays(evaluation),
        "sources": report_tables.sources(evaluation),
        "trusted": report_tables.trusted(evaluation),
        "config": yaml.safe_dump(evaluation["config"], sort_keys=False, allow_unicode=True),
    }


def _island(evaluation: Evaluation) -> dict[str, Any] | None:
    """Returns what the view of single tokens shows, with how its models are shown."""
    tokens = evaluation.get("tokens")
    if not tokens:
        return None
    lines: dict[str, Any] = {
        "teachers": report_tables.teacher_lines(evaluation),
        "fused": ENSEMBLE,
        "students": report_tables.student_lines(evaluation),
    }
    passages = [
        {**one, "students": {n: one["students"][n] for n in lines["students"] if n in one["students"]}}
        for one in tokens["passages"]
    ]  # fmt: skip
    return {**tokens, "passages": passages, "lines": lines}


def _plots(evaluation: Evaluation, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the panels of each plot and its legend."""
    domains, teachers = evaluation["domains"], report_tables.teacher_lines(evaluation)
    heldout = [OVERALL, *domains] if len(domains) > 1 else domains
    measured = {
        line: {d: table[d]["perplexity"] for d in heldout if table.get(d, {}).get("perplexity")}
        for line, table in report_tables.models(evaluation)
    }
    measured.pop(STUDENTS[BEFORE], None)  # millions: it is in the table, and would flatten the rest
    ensemble = measured.get(ENSEMBLE, {})
    weights = drawn.get(FUSED, {}).get("weights", {})
    lines = report_tables.student_lines(evaluation)
    students = [lines[student] for student in drawn]
    heldout_lines = [*students, ENSEMBLE] if ensemble else students
    return {
        "losses": (plots.loss_panels(drawn, lines), students),
        "heldout": (plots.heldout_panels(drawn, lines, heldout, ensemble), heldout_lines),
        "weights": (plots.weight_panels(weights, domains, teachers), list(teachers.values())),
        "bars": (plots.bar_panels(list(measured.items()), heldout), []),
    }
