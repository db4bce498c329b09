"""Several evaluated runs side by side, as tables.

Runs over one corpus (by its fingerprint) share a table; a teacher, an ensemble or an untrained student
that several of them measured alike stands there once. Figures of different corpora cannot be compared
and stand in tables of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.config import BASELINE, BEFORE, FUSED
from pipeline.reporting import report_tables
from pipeline.reporting.cells import GENERATION, METRICS, Cell, Table, count
from pipeline.reporting.plots import OVERALL, Line, perplexity
from pipeline.reporting.report import training_curves
from pipeline.reporting.report_tables import ENSEMBLE
from storage.errors import ConfigError

_COLOURS: Final = ("fused", "baseline", "teacher-1", "teacher-2", "teacher-3", "teacher-4",
                   "teacher-5", "teacher-6")  # fmt: skip
STUDENT: Final = "student"
SHORT: Final = {FUSED: ("fused", "solid"), BASELINE: ("cross-entropy", "dashed")}
_OWN_TO_A_RUN: Final = ("name", "run_dir")


@dataclass(frozen=True)
class Run:
    """An evaluated run.

    Attributes:
        label: its name; where two have one name, its folder.
        curves: student → curves (curves.training_curves).
        colour: CSS variable.
    """

    label: str
    folder: Path
    evaluation: dict[str, Any]
    curves: dict[str, Any]
    colour: str


@dataclass(frozen=True)
class Row:
    """A model of some runs.

    Attributes:
        kind: teacher, ensemble, untrained or student.
        line: how it is shown.
        table: its figures, by domain.
        generation: scores of what it wrote, by domain.
    """

    runs: list[str]
    kind: str
    name: str
    line: Line
    table: Mapping[str, Any]
    generation: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The runs over one corpus.

    Attributes:
        corpus: its fingerprint.
        table: perplexities and the like, a row a model.
        several: whether there is more than one domain.
        overall: every overall figure.
        generation: kind of continuation → its scores, overall.
        costs: of caches and trainings.
    """

    corpus: str
    runs: list[str]
    table: Table
    several: bool
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
    evaluations = [report_tables.read_evaluation(folder) for folder in folders]
    return [
        Run(label, folder, evaluation, training_curves(folder, evaluation), _COLOURS[i % 8])
        for i, (label, folder, evaluation) in enumerate(
            zip(_labels(folders, evaluations), folders, evaluations, strict=True)
        )
    ]


def compare(runs: Sequence[Run]) -> Comparison:
    """Returns runs side by side."""
    groups = [_group(corpus, mine) for corpus, mine in by_corpus(runs).items()]
    notes = [f"{r.label}: {note}" for r in runs if (note := report_tables.gold_note(r.evaluation))]
    return Comparison(groups, differences(runs), _verdict(runs), notes)


def by_corpus(runs: Sequence[Run]) -> dict[str, list[Run]]:
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
    groups = by_corpus(runs)
    if len(groups) > 1:
        return (
            f"The {len(runs)} runs are over {len(groups)} different corpora. Figures of different "
            f"corpora cannot be compared, so they stand in {len(groups)} tables."
        )
    students = [
        (row.table[OVERALL]["perplexity"], short_name(row))
        for row in rows_of(runs)
        if row.kind == STUDENT and row.table.get(OVERALL, {}).get("perplexity") is not None
    ]
    if not students:
        return "No trained student was measured on held-out data, so nothing can be concluded."
    (best, name), *others = sorted(students)
    text = f"{name} has an overall held-out perplexity of {perplexity(best)}"
    if others:
        text = (
            f"{name} has the lowest overall held-out perplexity of {len(students)} trained "
            f"students, {perplexity(best)}; next is {others[0][1]} with {perplexity(others[0][0])}"
        )
    steps = {cost["steps"] for run in runs for cost in run.evaluation["training"].values()}
    unequal = " They did not all take the same number of steps." if len(steps) > 1 else ""
    return f"{text}.{unequal}"


def short_name(row: Row, longest: int | None = None) -> str:
    """Returns a student's name as legends have it; the run's is cut where it gets too long."""
    run, student = row.runs[0], SHORT.get(row.name, (row.name, ""))[0]
    room = len(run) if longest is None else max(4, longest - len(student) - 3)
    return f"{run if len(run) <= room else run[: room - 1] + '…'} · {student}"


# -- tables


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Returns the models of runs over one corpus: teachers, ensembles, then students."""
    found: list[tuple[str, Row]] = []

    def add(
        run: Run, kind: str, name: str, origin: str, line: Line, entry: Any, table: Any
    ) -> None:
        row = Row([run.label], kind, name, line, table or {}, entry.get("generation") or {})
        for its_origin, one in found if table else ():
            if (one.kind, one.name, its_origin) == (kind, name, origin) and _agree(one, row):
                one.runs.append(run.label)
                return
        if table:
            found.append((origin, row))

    for run in runs:
        caches = run.evaluation["fingerprints"]["caches"]
        for name, table in run.evaluation["teachers"].items():
            model = report_tables.teacher_model(run.evaluation, name)
            add(run, "teacher", name, str(caches.get(name)), Line(name, "muted"), model, table)
    for run in runs:
        add(run, "ensemble", FUSED, "", ENSEMBLE, {}, run.evaluation["fused"])
    for run in runs:
        for name, line in report_tables.student_lines(run.evaluation).items():
            entry = run.evaluation["students"].get(name, {})
            kind, origin = ("untrained", "") if name == BEFORE else (STUDENT, run.label)
            add(run, kind, name, origin, line, entry, entry.get("domains"))
    return [row for _, row in found]


def _agree(one: Row, other: Row) -> bool:
    """Returns whether two models' figures and texts are the same, as far as both were measured: a teacher
    agrees with another ensemble in another run, and may have continued other prompts."""
    told = [
        (one.table[domain].get(key), other.table[domain].get(key))
        for domain in one.table.keys() & other.table.keys()
        for key in ("ce", "kd", "agreement")
    ]
    told.append((one.generation or None, other.generation or None))
    return all(a is None or b is None or a == b for a, b in told)


def _group(corpus: str, runs: Sequence[Run]) -> Group:
    rows = rows_of(runs)
    domains = list(dict.fromkeys(d for run in runs for d in report_tables.domains(run.evaluation)))
    names = [domain for domain in domains if domain != OVERALL]
    names += [OVERALL] if len(names) > 1 else []  # of one domain it says nothing more
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
    return Group(
        corpus, labels, table, len(names) > 1, overall, _generation(rows, len(runs)), _costs(runs)
    )


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
            caches.setdefault(key, ([], report_tables.cache_row(name, cache)))[0].append(run.label)
    rows = [
        [_shared(labels, len(runs)), *row[:3], Cell("–"), *row[3:]]
        for labels, row in caches.values()
    ]
    for run in runs:
        for name, line in report_tables.student_lines(run.evaluation).items():
            if usage := run.evaluation["training"].get(name):
                parameters = run.evaluation["students"].get(name, {}).get("parameters")
                row = report_tables.training_row(line.label, usage, parameters)
                rows.append([run.label, *row[:3], count(usage["steps"]), *row[3:]])
    headers = ["run", "stage", "device", "parameters", "steps", "tokens", "tokens/s", "time",
               "peak memory"]  # fmt: skip
    return Table(headers, rows)


def differences(runs: Sequence[Run]) -> Table:
    """Returns the keys of configuration and environment in which runs differ, a column a run."""
    configs, surroundings = [], []
    for run in runs:
        config = {k: v for k, v in run.evaluation["config"].items() if k not in _OWN_TO_A_RUN}
        configs.append(_flat(config))
        around = {key: run.evaluation[key] for key in ("device", "threads", "versions")}
        surroundings.append(_flat(around))
    rows = [
        [key, *(one.get(key, "–") for one in facts)]
        for facts in (configs, surroundings)
        for key in dict.fromkeys(key for one in facts for key in one)
    ]
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
