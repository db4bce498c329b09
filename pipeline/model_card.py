"""The model card of an exported student: where it comes from, what it learned, what it reaches.

README.md beside the weights, with the hub's metadata. It depends on what the run is, not on when or
where it ran: no dates, and of a local folder only its last name. `evaluate` makes it anew with the
figures, unless it was edited by hand, which its last line tells.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.config import FUSED
from pipeline.gguf import conversion
from pipeline.licences import NOT_STATED, Licence, stated
from pipeline.reporting.cells import METRICS
from pipeline.reporting.page import render
from pipeline.reporting.plots import OVERALL
from stages.model_files import parameters
from stages.target_options import LossOptions
from stages.teacher_jobs import TeacherJob
from storage import durable
from storage.corpus_info import CorpusInfo
from storage.fingerprint import bytes_sha256, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipeline.workspace import Workspace
    from stages.progress import Progress
    from stages.run import Run

FILE: Final = "README.md"
_MARK: Final = re.compile(r"<!-- scholiast ([0-9a-f]{64}) -->\n\Z")
_SHOWN: Final = ("perplexity", "bits_per_byte", "accuracy")


def model_card(
    work: Workspace, name: str, loss: LossOptions, info: CorpusInfo, jobs: list[TeacherJob], folder: Path
) -> str:  # fmt: skip
    """Returns the card of a student.

    Args:
        name: the student's; the fused one has teachers, the baseline none.
        loss: that it was trained on.
        folder: where it is saved: config.json, weights, scholiast.json.
    """
    config = work.config
    facts = json.loads((folder / "scholiast.json").read_text())
    teachers = [
        {**_teacher(job), **_notes(job, config.fusion.k)}
        for job in jobs
        if name == FUSED and job.name in config.fused_teachers
    ]
    start = _start(work)
    title = f"{config.name}-{name}"
    figures = read_figures(work, name, facts)
    licences = [one["licence"] for one in (*([start] if start else []), *teachers)]
    architecture, command = conversion(folder, "path/to/this/folder", title)
    view = {
        "title": title, "name": name, "start": start, "teachers": teachers,
        "metadata": _metadata(work, title, start, licences, figures),
        "parameters": parameters(folder, f"student {name}"), "architecture": architecture,
        "steps": facts["steps"], "loss": loss, "config": config, "kept": config.student.keep_layers,
        "corpus": info, "figures": figures, "licences": sorted({one.name for one in licences}),
        "not_stated": NOT_STATED, "gguf": command, "fingerprints": _fingerprints(facts),
        "rows": _rows(figures or {}),
    }  # fmt: skip
    text = render("model_card.md.j2", view)
    return f"{text}<!-- scholiast {bytes_sha256(text.encode())} -->\n"


def refresh(folder: Path, card: Callable[[Path], str]) -> bool:
    """Makes a saved student's card anew; returns False, and leaves it, if it was edited by hand."""
    path = folder / FILE
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        mark = _MARK.search(text)
        if mark is None or bytes_sha256(text[: mark.start()].encode()) != mark[1]:
            return False
    durable.write_bytes(path, card(folder).encode())
    return True


def refresh_cards(runs: Mapping[str, Run], progress: Progress) -> None:
    """Puts new figures into the cards of finished students; says which cards stay as they are."""
    for run in runs.values():
        if run.card is not None and not refresh(run.model_folder, run.card):
            progress.say(
                f"{run.model_folder / FILE} was edited by hand and stays as it is; "
                "delete it and evaluate again for one with these figures"
            )


def read_figures(work: Workspace, name: str, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what evaluation.json says of exactly this student; None if it says nothing.

    Args:
        facts: scholiast.json of the student: identity and steps.

    Returns:
        domains: domain → {student, fused}, each of that domain's figures; overall comes last, of several.
    """
    try:
        found = json.loads((work.config.run / "evaluation.json").read_text())
        same = found["fingerprints"]["students"][name] == fingerprint(facts["identity"])
        domains = found["students"][name]["domains"]
        if not same or found["training"][name]["steps"] != facts["steps"]:
            return None
        order = [domain for domain in domains if domain != OVERALL]
        order += [OVERALL] if len(order) > 1 else []
        return {one: {"student": domains[one], "fused": found["fused"][one]} for one in order}
    except (OSError, ValueError, KeyError):  # not evaluated, or by an earlier version
        return None


def _teacher(job: TeacherJob) -> dict[str, Any]:
    """Returns what is told of a teacher; of an imported cache's there are no files to ask."""
    if job.imported:
        model = f"{job.options.model}, captured by another tool"
        return {"name": job.name, "model": model, "parameters": None, "licence": Licence()}
    return {
        "name": job.name, **_origin(job.options.model, job.options.revision),
        "parameters": parameters(job.folder, f"teachers.{job.name}.model"), "licence": stated(job.folder),
    }  # fmt: skip


def _notes(job: TeacherJob, used: int | None) -> dict[str, Any]:
    """Returns what a student had of a teacher's cache, which need not be as `store` says: one that was
    imported has its own k, and no draws.

    Args:
        used: fusion.k.
    """
    layout = job.layout
    kept = layout.k if used is None else min(used, layout.k)
    return {"kept": kept, "draws": layout.draws, "preset": layout.preset}


def _start(work: Workspace) -> dict[str, Any] | None:
    """Returns what the student's weights began as, None if they were random."""
    student = work.config.student
    if student.model is None:
        return None
    return {**_origin(student.model, student.revision), "licence": stated(work.student_folder())}


def _origin(model: str, revision: str | None) -> dict[str, Any]:
    """Returns where a model comes from: a hub name, or of a folder its last name alone."""
    if Path(model).is_dir():
        return {"hub": None, "model": f"{Path(model).resolve().name} (a local folder)"}
    return {"hub": model, "model": model + (f" at {revision}" if revision else "")}


def _metadata(
    work: Workspace, title: str, start: dict[str, Any] | None, licences: list[Licence],
    figures: dict[str, Any] | None,
) -> str:  # fmt: skip
    """Returns the front matter as YAML. A licence stands there only if all that is built upon have it."""
    import yaml

    made: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if start and start["hub"]:
        made["base_model"] = [start["hub"]]
    if licences and licences[0].identifier and len({one.name for one in licences}) == 1:
        made["license"] = licences[0].name
    sets = [one.path for one in work.config.corpus.sources if one.format == "hub"]
    if sets:
        made["datasets"] = list(dict.fromkeys(sets))
    made["tags"] = ["distillation", "knowledge-distillation", "scholiast", "arxiv:2507.15198"]
    if figures:
        made["model-index"] = [{"name": title, "results": _results(figures)}]
    return yaml.safe_dump(made, sort_keys=False, allow_unicode=True)


def _results(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"held-out blocks, {domain}", "type": "held-out"},
            "metrics": [
                {"type": key, "value": round(found["student"][key], 6)}
                for key in _SHOWN
                if found["student"].get(key) is not None and math.isfinite(found["student"][key])
            ],
        }
        for domain, found in figures.items()
    ]


def _rows(figures: dict[str, Any]) -> list[list[str]]:
    return [
        [
            domain, *(METRICS[key].cell(found["student"], key) for key in _SHOWN),
            METRICS["perplexity"].cell(found["fused"], "perplexity"),
        ]
        for domain, found in figures.items()
    ]  # fmt: skip


def _fingerprints(facts: dict[str, Any]) -> dict[str, str]:
    """Returns what the student belongs to: name → sha256."""
    identity = facts["identity"]
    caches = {f"cache of {name}": value for name, value in identity["caches"].items()}
    return {"student": fingerprint(identity), "corpus": identity["corpus"], **caches}
