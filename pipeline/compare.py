"""Several evaluated runs side by side: `comparison.{html,md,json}`.

Runs over one corpus (by its fingerprint) share a table; a teacher, an ensemble or an untrained student
that several of them measured alike stands there once. Figures of different corpora cannot be compared
and stand in tables of their own. Cost: a second for each run, mostly drawing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pipeline import figures, plots
from pipeline.cells import GENERATION, METRICS, Cell, Table, count, date
from pipeline.figures import BASELINE, BEFORE, ENSEMBLE, FUSED
from pipeline.page import render, write_files
from pipeline.plots import OVERALL, Line, perplexity
from pipeline.report import training_curves
from storage.errors import ConfigError

_COLOURS: Final = ("fused", "baseline", "teacher-1", "teacher-2", "teacher-3", "teacher-4",
                   "teacher-5", "teacher-6")  # fmt: skip
_STUDENTS: Final = {FUSED: ("fused", "solid"), BASELINE: ("cross-entropy", "dashed")}
_OWN_TO_A_RUN: Final = ("name", "run_dir")


@dataclass(frozen=True)
class Run:
    """An evaluated run.

    Attributes:
        label: its name; where two have one name, its folder.
        curves: student → curves (plots.training_curves).
        colour: CSS variable.
    """

    label: str
    folder: Path
    evaluation: dict[str, Any]
    curves: dict[str, Any]
    colour: str


@dataclass(frozen=True)
class Row:
    """A model of some runs: how it is shown, its figures by domain, and what it wrote."""

    runs: list[str]
    line: Line
    table: Mapping[str, Any]
    generation: Mapping[str, Any]
    student: bool


@dataclass(frozen=True)
class Group:
    """The runs over one corpus.

    Attributes:
        corpus: its fingerprint.
        table: perplexities and the like, a row a model.
        overall: every overall figure.
        generation: kind of continuation → its scores, overall.
        costs: of caches and trainings.
    """

    corpus: str
    runs: list[str]
    table: Table
    overall: Table
    generation: dict[str, Table]
    costs: Table


@dataclass(frozen=True)
class Comparison:
    """What the page shows: groups, the configuration where it differs, and what it comes to."""

    groups: list[Group]
    differences: Table
    verdict: str
    notes: list[str]


def write_comparison(folders: Sequence[Path], out: Path) -> tuple[dict[str, Path], Comparison]:
    """Writes comparison.html, .md and .json into `out`.

    Returns:
        "html", "md", "json" → path, and what they show.

    Raises:
        ConfigError: a run is named twice.
        IncompleteCache, CorruptShard: a run is not evaluated, or a file of it is damaged.
    """
    runs = read_runs(folders)
    grouped = _grouped(runs)
    comparison = compare(runs)
    view = {"runs": runs, "comparison": comparison, "groups": comparison.groups,
            "created": date(datetime.now(UTC).isoformat()),
            "dates": {run.label: date(run.evaluation["created"]) for run in runs}}  # fmt: skip
    page = view | {"plots": [_plots(mine) for mine in grouped.values()]}
    kept = [
        {"label": r.label, "folder": str(r.folder), "curves": r.curves,
         "evaluation": {k: v for k, v in r.evaluation.items() if k != "tokens"}} for r in runs
    ]  # fmt: skip
    every = {"format": 1, "comparison": asdict(comparison), "runs": kept}
    contents = {
        "html": render("compare.html.j2", page, ("sort.js",)),
        "md": render("compare.md.j2", view),
        "json": json.dumps(every, allow_nan=False) + "\n",
    }
    return write_files(out, "comparison", contents), comparison


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs in the order given.

    Raises:
        ConfigError: a run is named twice.
        IncompleteCache, CorruptShard
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise ConfigError(
                "the same run is named twice", where=folder, found=seen[folder.resolve()],
                todo="name each run once",
            )  # fmt: skip
        seen[folder.resolve()] = folder
    evaluations = [figures.read_evaluation(folder) for folder in folders]
    return [
        Run(label, folder, evaluation, training_curves(folder, evaluation), _COLOURS[i % 8])
        for i, (label, folder, evaluation) in enumerate(
            zip(_labels(folders, evaluations), folders, evaluations, strict=True)
        )
    ]


def compare(runs: Sequence[Run]) -> Comparison:
    """Returns runs side by side."""
    groups = [_group(corpus, mine) for corpus, mine in _grouped(runs).items()]
    notes = [f"{r.label}: {note}" for r in runs if (note := figures.gold_note(r.evaluation))]
    return Comparison(groups, differences(runs), _verdict(runs), notes)


def _grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.evaluation["fingerprints"]["corpus"], []).append(run)
    return groups


def _labels(folders: Sequence[Path], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [str(evaluation["name"]) for evaluation in evaluations]
    last = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else short if last.count(short) == 1 else str(folder)
        for name, short, folder in zip(names, last, folders, strict=True)
    ]


def _verdict(runs: Sequence[Run]) -> str:
    groups = _grouped(runs)
    if len(groups) > 1:
        return (
            f"The {len(runs)} runs are over {len(groups)} different corpora. Figures of different "
            f"corpora cannot be compared, so they stand in {len(groups)} tables."
        )
    students = [
        (row.table[OVERALL]["perplexity"], row)
        for row in _rows(runs)
        if row.student and row.table.get(OVERALL, {}).get("perplexity") is not None
    ]
    if not students:
        return "No student was measured on held-out data, so nothing can be concluded."
    students.sort(key=lambda pair: pair[0])
    (best, row), others = students[0], students[1:]
    text = (
        f"{row.line.label} of {row.runs[0]} has the lowest overall held-out perplexity of "
        f"{len(students)} trained students: {perplexity(best)}"
    )
    if others:
        next_best, second = others[0]
        text += f", before {perplexity(next_best)} of {second.runs[0]} ({second.line.label})"
    steps = {cost["steps"] for run in runs for cost in run.evaluation["training"].values()}
    unequal = " They did not all take the same number of steps." if len(steps) > 1 else ""
    return f"{text[0].upper()}{text[1:]}.{unequal}"


# -- tables


def _rows(runs: Sequence[Run]) -> list[Row]:
    """Returns the models of runs over one corpus: teachers, ensembles, then students."""
    found: dict[tuple[str, ...], Row] = {}

    def add(run: Run, key: tuple[str, ...], line: Line, entry: Any, table: Any) -> None:
        if table and key in found:
            found[key].runs.append(run.label)
        elif table:
            written = entry.get("generation") or {}
            found[key] = Row([run.label], line, table, written, key[0] == "student")

    for run in runs:
        caches = run.evaluation["fingerprints"]["caches"]
        for name, table in run.evaluation["teachers"].items():
            key = ("teacher", name, str(caches.get(name)))
            add(run, key, Line(name, "muted"), table, table)
    for run in runs:
        fused = run.evaluation["fused"]
        add(run, ("fused", _alike(fused)), ENSEMBLE, {}, fused)
    for run in runs:
        for name, line in figures.student_lines(run.evaluation).items():
            entry = run.evaluation["students"].get(name, {})
            table = entry.get("domains")
            key = ("before", _alike(table)) if name == BEFORE else ("student", name, run.label)
            add(run, key, line, entry, table)
    return list(found.values())


def _alike(table: Mapping[str, Any] | None) -> str:
    """Returns what two models have in common that are the same by all that was measured."""
    return json.dumps({d: row.get("ce") for d, row in (table or {}).items() if "ce" in row})


def _group(corpus: str, runs: Sequence[Run]) -> Group:
    rows = _rows(runs)
    domains = list(dict.fromkeys(d for run in runs for d in figures.domains(run.evaluation)))
    names = [*(d for d in domains if d != OVERALL), *([OVERALL] if domains else [])]
    measured = [k for k in METRICS if any(k in r.table.get(OVERALL, {}) for r in rows)]
    more = [key for key in ("bits_per_byte", "kd", "accuracy") if key in measured]
    head = [[_shared(row.runs, len(runs)), row.line.label] for row in rows]
    perplexities = [
        [METRICS["perplexity"].cell(r.table.get(d), "perplexity") for d in names] for r in rows
    ]
    every = {k: [METRICS[k].cell(r.table.get(OVERALL), k) for r in rows] for k in measured}
    table = Table(
        ["run", "model", *(f"perplexity\n{d}" for d in names), *(METRICS[k].label for k in more)],
        [
            [*head[i], *perplexities[i], *(every[key][i] for key in more)]
            for i in range(len(rows))
        ],
    )  # fmt: skip
    overall = Table(
        ["run", "model", *(METRICS[key].label for key in measured)],
        [[*head[i], *(every[key][i] for key in measured)] for i in range(len(rows))],
    )
    labels = [run.label for run in runs]
    return Group(corpus, labels, table, overall, _generation(rows, len(runs)), _costs(runs))


def _shared(labels: Sequence[str], runs: int) -> str:
    return "all" if len(labels) == runs > 1 else ", ".join(labels)


def _generation(rows: Sequence[Row], runs: int) -> dict[str, Table]:
    tables = {}
    for mode in ("greedy", "sampled"):
        scored = [(row, row.generation.get(OVERALL, {}).get(mode)) for row in rows]
        cells = [
            [_shared(row.runs, runs), row.line.label,
             *(metric.cell(scores, key) for key, metric in GENERATION.items())]
            for row, scores in scored if scores
        ]  # fmt: skip
        if cells:
            headers = ["run", "model", *(metric.label for metric in GENERATION.values())]
            tables[f"{mode} continuations"] = Table(headers, cells)
    return tables


def _costs(runs: Sequence[Run]) -> Table:
    """Returns what caches (each once) and trainings took."""
    caches: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for run in runs:
        fingerprints = run.evaluation["fingerprints"]["caches"]
        for name, cache in run.evaluation["cache"].items():
            key = (name, str(fingerprints.get(name)))
            caches.setdefault(key, ([], figures.cache_row(name, cache)))[0].append(run.label)
    rows = [
        [_shared(labels, len(runs)), *row[:3], Cell("–"), *row[3:]]
        for labels, row in caches.values()
    ]
    for run in runs:
        for name, line in figures.student_lines(run.evaluation).items():
            if usage := run.evaluation["training"].get(name):
                parameters = run.evaluation["students"].get(name, {}).get("parameters")
                row = figures.training_row(line.label, usage, parameters)
                rows.append([run.label, *row[:3], count(usage["steps"]), *row[3:]])
    headers = ["run", "stage", "device", "parameters", "steps", "tokens", "tokens/s", "time",
               "peak memory"]  # fmt: skip
    return Table(headers, rows)


def differences(runs: Sequence[Run]) -> Table:
    """Returns the keys of configuration and environment in which runs differ, a column a run."""
    facts = []
    for run in runs:
        own = {k: v for k, v in run.evaluation["config"].items() if k not in _OWN_TO_A_RUN}
        around = {key: run.evaluation[key] for key in ("device", "threads")}
        facts.append({**_flat(own), **_flat({"versions": run.evaluation["versions"], **around})})
    keys = dict.fromkeys(key for one in facts for key in one)
    rows = [[key, *(one.get(key, "–") for one in facts)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return Table(["key", *(run.label for run in runs)], differing)


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Returns the leaves of a configuration by dotted key, as text."""
    inner: dict[str, Any] = {}
    if isinstance(value, Mapping):
        inner = {str(name): one for name, one in value.items()}
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        inner = {str(i): one for i, one in enumerate(value)}
    if inner:
        prefix = f"{key}." if key else ""
        return {k: v for name, one in inner.items() for k, v in _flat(one, prefix + name).items()}
    return {key: json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}


# -- plots


def _plots(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the panels of each plot and its legend."""
    lines: dict[str, Line] = {}
    curves: dict[str, Any] = {}
    for run in runs:
        for name, mine in run.curves.items():
            short, dash = _STUDENTS.get(name, (name, "dotted"))
            key = f"{run.label}/{name}"
            curves[key], lines[key] = mine, Line(f"{run.label} · {short}", run.colour, dash)
    domains = list(dict.fromkeys(d for run in runs for d in run.evaluation["domains"]))
    heldout = [OVERALL, *domains] if len(domains) > 1 else domains
    rows = _rows(runs)
    fused = [row for row in rows if row.line == ENSEMBLE]
    level = _perplexities(fused[0], heldout) if len(fused) == 1 else {}
    legend = list(lines.values())
    return {
        "losses": (plots.loss_panels(curves, lines), legend),
        "heldout": (plots.heldout_panels(curves, lines, heldout, level),
                    [*legend, ENSEMBLE] if level else legend),
        "bars": (plots.bar_panels(_bars(runs, rows, heldout), heldout), []),
    }  # fmt: skip


def _bars(
    runs: Sequence[Run], rows: Sequence[Row], domains: Sequence[str]
) -> list[tuple[Line, dict[str, float]]]:
    """Returns how each bar is shown and its length; not of untrained students, in their millions."""
    colours, labels = {run.label: run.colour for run in runs}, {}
    for run in runs:
        for name, line in figures.student_lines(run.evaluation).items():
            labels[line.label] = _STUDENTS.get(name, (name, ""))[0]
    untrained = figures.STUDENTS[BEFORE].label
    bars = []
    for row in rows:
        if row.line.label == untrained:
            continue
        line = row.line
        if row.student:
            line = Line(f"{row.runs[0]} · {labels[line.label]}", colours[row.runs[0]])
        elif len(row.runs) < len(runs):
            line = line._replace(label=f"{line.label} ({', '.join(row.runs)})")
        bars.append((line, _perplexities(row, domains)))
    return bars


def _perplexities(row: Row, domains: Sequence[str]) -> dict[str, float]:
    found = {d: (row.table.get(d) or {}).get("perplexity") for d in domains}
    return {domain: value for domain, value in found.items() if value}
