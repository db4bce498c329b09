"""evaluation.json read as tables: who was measured, under which name, with which figures.

What later versions measure more (intervals, bits per byte, generation) is shown where it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.config import BASELINE, BEFORE, FUSED
from pipeline.reporting.cells import (
    GENERATION,
    METRICS,
    NONE,
    Cell,
    Table,
    count,
    fixed,
    size,
    time,
)
from pipeline.reporting.plots import OVERALL, Line
from stages.weighting import looks_at_gold
from storage.errors import CorruptShard, IncompleteCache

Evaluation = Mapping[str, Any]

ENSEMBLE: Final = Line("fused ensemble", "ensemble", "dashed")
STUDENTS: Final = {
    BEFORE: Line("student before", "before"),
    FUSED: Line("student, fused teachers", "fused"),
    BASELINE: Line("student, cross-entropy only", "baseline"),
}
_NEEDED = ("name", "created", "config", "fingerprints", "corpus", "domains", "teachers", "fused",
           "students", "samples", "cache", "training", "versions", "device", "threads")  # fmt: skip
_MODES = {"greedy": "greedy continuations", "sampled": "sampled continuations"}


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    """Returns a run's evaluation.json.

    Raises:
        IncompleteCache: the run has not been evaluated.
        CorruptShard: the file is not what `scholiast evaluate` writes.
    """
    path = run_dir / "evaluation.json"
    if not path.exists():
        todo = "run `scholiast evaluate`"
        raise IncompleteCache("the run has not been evaluated", where=path, todo=todo)
    todo = "delete it and run `scholiast evaluate`"
    evaluation = parse(path.read_text(errors="replace"), path, todo)
    missing = [key for key in _NEEDED if key not in evaluation]
    if missing:
        raise CorruptShard("not an evaluation", where=path, expected=", ".join(_NEEDED),
                           found=f"no {', '.join(missing)}", todo=todo)  # fmt: skip
    return evaluation


def parse(text: str, where: object, todo: str) -> dict[str, Any]:
    """Returns a JSON object; NaN and infinities, which JSON does not have, become None."""
    try:
        parsed = json.loads(text, parse_constant=lambda _: None)
    except ValueError as error:
        raise CorruptShard(f"not JSON: {error}", where=where, todo=todo) from error
    if not isinstance(parsed, dict):
        raise CorruptShard("not a JSON object", where=where, todo=todo)
    return parsed


# -- who was measured


def student(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Returns a student's figures by domain; empty if it was not measured."""
    domains: dict[str, Any] = evaluation["students"].get(name, {}).get("domains", {})
    return domains


def teacher_model(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Returns what a teacher was loaded for: speed and scores of what it wrote; empty if it was not."""
    model: dict[str, Any] = evaluation.get("teacher_models", {}).get(name, {})
    return model


def student_lines(evaluation: Evaluation) -> dict[str, Line]:
    """Returns how each student is shown: the usual ones, then those that were named."""
    others = [name for name in evaluation["students"] if name not in STUDENTS]
    named = {n: Line(f"student {n}", f"student-{i % 3 + 1}") for i, n in enumerate(others)}
    return {**STUDENTS, **named}


def teacher_lines(evaluation: Evaluation) -> dict[str, Line]:
    """Returns how each teacher is shown."""
    names = dict.fromkeys([*evaluation["teachers"], *evaluation["cache"]])
    return {name: Line(name, f"teacher-{i % 6 + 1}") for i, name in enumerate(names)}


def models(evaluation: Evaluation) -> list[tuple[Line, dict[str, Any]]]:
    """Returns every measured model and its results by domain, in the tables' order."""
    found = [(line, evaluation["teachers"].get(n)) for n, line in teacher_lines(evaluation).items()]
    found.append((ENSEMBLE, evaluation["fused"]))
    found += [(line, student(evaluation, n)) for n, line in student_lines(evaluation).items()]
    return [(line, table) for line, table in found if table]


def domains(evaluation: Evaluation) -> list[str]:
    """Returns the columns of every table of held-out results; of one domain overall says nothing more."""
    if not models(evaluation):
        return []
    return [*evaluation["domains"], OVERALL] if several(evaluation) else [*evaluation["domains"]]


def several(evaluation: Evaluation) -> bool:
    """Returns whether figures by domain differ from those over all domains."""
    return len(evaluation["domains"]) > 1


def gold_note(evaluation: Evaluation) -> str:
    """Returns a warning where the weights or the target look at gold tokens, else ""."""
    weights = evaluation["config"].get("fusion", {}).get("weights", "uniform")
    notes = {
        "": "",
        "token": f"The teachers are weighted by {weights}: these weights look at the gold token, so the "
        "fused ensemble's figures use the answer and are not those of a model that could be run.",
        "calibration": f"The teachers are weighted by {weights}: one weight a teacher and domain, fitted "
        "to the gold tokens of some blocks that are trained on; held-out text plays no part in it.",
    }
    found = [notes[looks_at_gold(weights)]]
    if evaluation["config"].get("loss", {}).get("target") == "residual":
        found.append(
            "The target (residual) gives the gold token what the teachers' entries leave over, on "
            "held-out text too: the distillation loss uses the answer."
        )
    return " ".join(filter(None, found))


def distillation_note(evaluation: Evaluation) -> str:
    """Returns what the distillation loss of this run is, in a sentence."""
    loss, fusion = (evaluation["config"].get(key, {}) for key in ("loss", "fusion"))
    temperature = f", at temperature {loss['temperature']}" if "temperature" in loss else ""
    said = {
        "divergence": loss.get("divergence", "forward_kl"), "target": loss.get("target", "auto"),
        "mixing": fusion.get("mixing", "arithmetic"),
    }  # fmt: skip
    plain = said["target"] in ("auto", "draws", "bucket") and said["mixing"] == "arithmetic"
    if said["divergence"] == "forward_kl" and plain:
        return (
            "The distillation loss is Σ w KL(teacher ‖ student), the mean over tokens, as far as the "
            f"caches keep the teachers{temperature}; where teachers differ it cannot reach 0."
        )
    how = ", ".join(f"{key} {value}" for key, value in said.items())
    return f"The distillation loss is the run's own ({how}){temperature}, the mean over tokens."


def trusted(evaluation: Evaluation) -> str:
    """Returns whose own code was run (trust_remote_code), in words; "" for nobody's."""
    config = evaluation["config"]
    named = [(f"teacher {n}", options) for n, options in (config.get("teachers") or {}).items()]
    named.append(("student", config.get("student") or {}))
    return ", ".join(name for name, options in named if options.get("trust_remote_code"))


# -- tables


def perplexities(evaluation: Evaluation) -> Table:
    """Returns the summary's table: a row a model, narrow enough for a terminal."""
    names, measured = domains(evaluation), models(evaluation)
    more = [key for key in ("bits_per_byte", "kd", "accuracy") if _measured(evaluation, key)]
    headers = ["model", *(f"perplexity\n{name}" for name in names)]
    return Table(
        headers + [METRICS[key].label for key in more],
        [
            [
                line.label,
                *(METRICS["perplexity"].cell(table.get(name), "perplexity") for name in names),
                *(METRICS[key].cell(table.get(OVERALL), key) for key in more),
            ]
            for line, table in measured
        ],
    )


def overall(evaluation: Evaluation) -> Table:
    """Returns every overall figure of every model; the students with parameters and speed."""
    keys = [key for key in METRICS if _measured(evaluation, key)]
    sizes = _sizes(evaluation)
    fast = any(speed is not None for _, speed in sizes.values())
    speeds = ["forward\ntokens/s"] if fast else []
    rows = []
    for line, table in models(evaluation):
        parameters, speed = sizes.get(line.label, (None, None))
        figures = [METRICS[key].cell(table.get(OVERALL), key) for key in keys]
        rows.append([line.label, count(parameters), *([count(speed)] if fast else []), *figures])
    return Table(["model", "parameters", *speeds, *(METRICS[key].label for key in keys)], rows)


def _sizes(evaluation: Evaluation) -> dict[str, tuple[float | None, float | None]]:
    """Returns label → (parameters, tokens/s of a forward)."""
    teachers = {
        line.label: (
            evaluation["cache"].get(name, {}).get("parameters"),
            teacher_model(evaluation, name).get("tokens_per_s"),
        )
        for name, line in teacher_lines(evaluation).items()
    }
    students = {
        line.label: (one.get("parameters"), one.get("tokens_per_s"))
        for name, line in student_lines(evaluation).items()
        for one in [evaluation["students"].get(name, {})]
    }
    return {**teachers, **students}


def by_metric(evaluation: Evaluation) -> dict[str, Table]:
    """Returns a table of models and domains for every figure but perplexity, by its name; none where
    there is one domain, of which `overall` says it."""
    if not several(evaluation):
        return {}
    names = domains(evaluation)
    return {
        metric.label.replace("\n", " "): Table(
            ["model", *names],
            [
                [line.label, *(metric.cell(table.get(name), key) for name in names)]
                for line, table in models(evaluation)
                if any(key in (table.get(name) or {}) for name in names)
            ],
        )
        for key, metric in METRICS.items()
        if key != "perplexity" and _measured(evaluation, key)
    }


def _measured(evaluation: Evaluation, key: str) -> bool:
    return any(key in (table.get(OVERALL) or {}) for _, table in models(evaluation))


def generation(evaluation: Evaluation) -> dict[str, dict[str, Table]]:
    """Returns, by kind of continuation, the quality of what is written: overall and by domain, if there
    are several."""
    written = _written(evaluation)
    domains = [OVERALL, *(evaluation["domains"] if several(evaluation) else ())]
    tables: dict[str, dict[str, Table]] = {}
    for mode, title in _MODES.items():
        found: dict[str, Table] = {}
        for domain in domains:
            rows = [
                [label, *(m.cell(scores[domain][mode], key) for key, m in GENERATION.items())]
                for label, scores in written.items()
                if scores.get(domain, {}).get(mode)
            ]
            if rows:
                headers = ["model", *(metric.label for metric in GENERATION.values())]
                found[domain] = Table(headers, rows)
        if found:
            tables[title] = found
    return tables


def _written(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Returns label → domain → mode → scores, of the models whose writing was scored."""
    students = evaluation["students"]
    found = {
        line.label: teacher_model(evaluation, name)
        for name, line in teacher_lines(evaluation).items()
    }
    found |= {line.label: students.get(n, {}) for n, line in student_lines(evaluation).items()}
    return {label: one["generation"] for label, one in found.items() if one.get("generation")}


def of_teachers(evaluation: Evaluation, field: str) -> Table:
    """Returns the teachers' means of one field, by domain."""
    names, teachers = domains(evaluation), evaluation["teachers"]
    rows = [
        [name, *(fixed((table.get(d) or {}).get(field), 2) for d in names)]
        for name, table in teachers.items()
    ]
    return Table(["teacher", *names], rows)


def stages(evaluation: Evaluation) -> Table:
    """Returns what each teacher's pass and each training took."""
    rows = [cache_row(name, cache) for name, cache in evaluation["cache"].items()]
    for name, line in student_lines(evaluation).items():
        if usage := evaluation["training"].get(name):
            parameters = evaluation["students"].get(name, {}).get("parameters")
            rows.append(training_row(line.label, usage, parameters))
    headers = ["stage", "device", "parameters", "tokens", "tokens/s", "time", "peak memory"]
    return Table(headers, rows)


def cache_row(name: str, cache: Mapping[str, Any]) -> list[str]:
    """Returns what a teacher's pass over the corpus took; its time on one device, from the rate."""
    rate = cache["tokens_per_second"]
    sizes = [count(cache["parameters"]), count(cache["tokens"]), count(rate)]
    took = time(cache["tokens"] / rate) if rate else Cell(NONE)
    return [f"cache: {name}", cache["device"] or NONE, *sizes, took, size(cache["peak_bytes"])]


def training_row(label: str, usage: Mapping[str, Any], parameters: float | None) -> list[str]:
    """Returns what a training took."""
    sizes = [count(parameters), count(usage["tokens"]), count(usage["tokens_per_second"])]
    peak = size(usage["peak_bytes"])
    return [f"train: {label}", usage.get("device") or NONE, *sizes, time(usage["seconds"]), peak]


def arrays(evaluation: Evaluation) -> Table:
    """Returns the caches' bytes per token, by array."""
    caches = evaluation["cache"]
    names = dict.fromkeys(name for cache in caches.values() for name in cache["arrays"])
    rows = [[n, *(fixed(c["arrays"].get(n), 2) for c in caches.values())] for n in names]
    rows.append(["whole cache", *(fixed(c["bytes_per_token"], 2) for c in caches.values())])
    rows.append(["on disk", *(size(c["bytes"]) for c in caches.values())])
    return Table(["bytes/token", *caches], rows)


def sources(evaluation: Evaluation) -> Table:
    """Returns what the corpus was made of."""
    rows = [
        [s["domain"], s["split"], *(count(s[n]) for n in ("blocks", "documents", "tokens"))]
        for s in evaluation["corpus"]["sources"]
    ]
    return Table(["domain", "split", "blocks", "documents", "tokens"], rows)
