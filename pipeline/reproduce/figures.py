"""One run's figures: a student's by what is measured for any student, the teachers' from their notes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.reproduce.answers import answer_scores
from pipeline.workspace import Workspace


def figures_of(work: Workspace, model_folder: Path) -> dict[str, float]:
    """Returns a trained student's figures, metric → value.

    Args:
        work: the yardstick: corpus, caches and fused target that it is measured with.
        model_folder: of the exported student.
    """
    import torch

    from pipeline.evaluation import student_figures
    from pipeline.heldout_text import sample_prompts
    from stages.device import choose_device
    from stages.teacher import load_causal_lm

    work._setup_torch()
    student, reader = work.config.student, work.heldout_reader()
    info = reader.corpus.info
    model = load_causal_lm(
        model_folder, "student", dtype=torch.float32, attention=student.attention,
        device=choose_device(work.config.device), trust_remote_code=student.trust_remote_code,
    )  # fmt: skip
    prompts = sample_prompts(work, reader, info)
    figures = student_figures(work, model, reader, info, prompts)
    return flat(figures) | answer_scores(work, model, reader.corpus)


def notes_figures(work: Workspace, name: str) -> dict[str, float]:
    """Returns the figures of a teacher, or of the ensemble ("fused"), on the held-out blocks."""
    from pipeline.evaluation import cached_figures
    from pipeline.heldout_text import sample_prompts

    reader = work.heldout_reader()
    info = reader.corpus.info
    found = cached_figures(work, reader, info, sample_prompts(work, reader, info))
    return flat({"domains": {**found["teachers"], "fused": found["fused"]}[name]})


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns figures as one level: "perplexity/code", "bleu/overall", "sampled_bleu/overall"."""
    found = {n: float(v) for n, v in figures.items() if _number(v)}
    for domain, table in figures.get("domains", {}).items():
        found |= {f"{n}/{domain}": float(v) for n, v in table.items() if _number(v)}
    for domain, by_mode in figures.get("generation", {}).items():
        for mode, table in by_mode.items():
            prefix = "" if mode == "greedy" else f"{mode}_"
            found |= {f"{prefix}{n}/{domain}": float(v) for n, v in table.items() if _number(v)}
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
