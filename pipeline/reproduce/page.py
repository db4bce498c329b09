"""results.json → RESULTS.md: tables with spreads, paired differences, claims, commands, machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.reproduce.results import (
    BEST_SINGLE,
    BLEU,
    DISTINCT,
    KD,
    PERPLEXITY,
    ROUGE,
    Claim,
    Results,
    Spread,
    answers,
    lower_is_better,
)
from pipeline.reproduce.rows import (
    ALONE,
    APPROACHES,
    CE,
    ENCODINGS,
    ENSEMBLE,
    MULTITASK,
    ONLINE,
    SENSITIVITY,
    UNIFORM,
)
from storage import durable

NAMES: Final = {
    "perplexity": "perplexity", "kd": "distillation loss", "ce": "cross-entropy", "ece": "ECE",
    "bleu": "BLEU", "rouge_l": "ROUGE-L", "answer_rouge_l": "ROUGE-L of answers", "accuracy": "accuracy",
    "bytes_per_token": "bytes a token",
    "training_seconds": "training, s",
}  # fmt: skip
FORMS: Final = {
    "perplexity": ".1f", "kd": ".3f", "ce": ".3f", "ece": ".3f", "bleu": ".2f", "rouge_l": ".3f",
    "answer_rouge_l": ".3f", "accuracy": ".3f", "bytes_per_token": ".1f", "training_seconds": ".0f",
}  # fmt: skip
MARKS: Final = {"": "", "token": " †", "calibration": " ‡"}
HEADINGS: Final = {
    APPROACHES: "What to learn from", SENSITIVITY: "Sensitivity", ENCODINGS: "What to keep of a teacher",
    MULTITASK: "Two kinds of tasks at once",
}  # fmt: skip
INTRODUCTIONS: Final = {
    APPROACHES: "Every student is the same model with the same steps, blocks and order of blocks; rows "
    "differ in what stands in the loss. The ensemble and the teachers alone are not trained: they are "
    "measured from their notes.",
    SENSITIVITY: "One setting is changed at a time; the others are the reference's (entropy weights with "
    "τ = 1, temperature 1, α = 0.9, no features). The weak teacher is the first one without a sixth of "
    "its layers. Wrong layers: the student's first layer is aligned in place of the configured one.",
    ENCODINGS: "Bytes a token and teacher are those of caches really made, everything counted, of the "
    "distributions alone (no features, no sums for other temperatures). 1 + S draws, one exact entry and "
    "S samples of the rest, is the nearest that the format has to sampling alone. Heads alone are stored "
    "with `balanced`'s finer logprobs, heads with draws with `compact`'s: a few of the bytes between "
    "them are that.",
    MULTITASK: "The corpus's text mixed with a task in chat form (say what a function of Python's "
    "library does: domain `docstrings`), whose answers alone are targets. It takes {mixed_steps} steps, "
    "as there is more text.",
}  # fmt: skip


def write_page(
    results: Results, about: Mapping[str, Any], path: Path, pictures: Mapping[str, str]
) -> None:
    """Writes the page.

    Args:
        about: of `describe` (see command.py).
        path: of the page; what people found stands beside it, in STEM-findings.md, if it does.
        pictures: table → file name of its plot, beside the page.
    """
    parts = ["# Results", _head(about)]
    findings = path.with_name(f"{path.stem}-findings.md")
    if findings.exists():
        parts.append(findings.read_text(encoding="utf-8").strip())
    if any(results.rows):
        parts.append(_claims(results))
    for table in HEADINGS:
        if table in results.rows:
            parts += [
                f"## {HEADINGS[table]}",
                INTRODUCTIONS[table].format(**about),
                _table(results, about, table),
            ]
            if table in pictures:
                parts.append(f"![{HEADINGS[table]}]({pictures[table]})")
            parts.append(_differences(results, table))
    parts += [_settings(about), _machines(about)]
    durable.write_bytes(path, ("\n\n".join(part for part in parts if part) + "\n").encode())


def _head(about: Mapping[str, Any]) -> str:
    commands = "\n".join(about["commands"])
    return (
        f"Written by `scholiast reproduce` from {about['runs']} runs; nothing here is typed by hand but "
        "the section on findings, if there is one. Values are means ± standard deviations (n − 1) over "
        f"up to {about['seeds']} seeds, {about['steps']} optimizer steps each; a seed decides the order "
        "of blocks and is the same for all rows. All students are measured on the same held-out blocks "
        "against one target, the teachers fused by entropy weights at temperature 1, whatever they were "
        "taught from; the distillation loss is the KL to that target, nats a token. † its weights look "
        "at the gold token of the rows trained on; ‡ at those of a calibration part.\n\n"
        f"```\n{commands}\n```"
    )


# -- tables


def _table(results: Results, about: Mapping[str, Any], table: str) -> str:
    columns = _columns(results, table)
    rows = []
    for row in [*results.rows[table], BEST_SINGLE]:
        name = row + MARKS[about["gold"].get(row, "")]
        if row == BEST_SINGLE:
            best = results.best_single(table)
            if best is None:
                continue
            name = f"{BEST_SINGLE}: {best.partition(': ')[2]}, picked on the held-out text"
        rows.append([name, *(_cell(results.spread(table, row, m), m) for m in columns)])
    return markdown(["", *(_heading(m) for m in columns)], rows)


def _columns(results: Results, table: str) -> list[str]:
    """Returns the metrics shown, as far as the table has them."""
    there = results.metrics[table]
    by_domain = [m for m in there if m.startswith("perplexity/") and m != PERPLEXITY]
    wanted = [*by_domain, PERPLEXITY, KD, "ece/overall", BLEU, ROUGE]
    if table == MULTITASK:
        wanted += ["kd/docstrings", "accuracy/docstrings", "answer_rouge_l/docstrings"]
    if table == ENCODINGS:
        wanted = ["bytes_per_token", "ce/overall", PERPLEXITY, KD, "ece/overall"]
    return [m for m in wanted if m in there]


def _differences(results: Results, table: str) -> str:
    """Returns paired differences to cross-entropy, uniform weights and the online bound."""
    others = [o for o in (CE, UNIFORM, ONLINE) if o in results.rows[table]]
    single = [BEST_SINGLE] if results.best_single(table) else []
    metrics = [m for m in (PERPLEXITY, KD) if m in results.metrics[table]]
    columns = [(o, m) for o in others for m in metrics]
    constant = [row for row in results.rows[table] if row == ENSEMBLE or row.startswith(ALONE)]
    rows = []
    for row in [*results.rows[table], *single]:
        cells = [
            "–" if row == o else _difference(results.paired(table, row, o, m), m)
            for o, m in columns
        ]
        if row not in constant and any(cell != "–" for cell in cells):
            rows.append([row, *cells])
    if not rows:
        return ""
    text = markdown(["", *(f"{_heading(m)} − that of {o}" for o, m in columns)], rows)
    return f"Paired differences, seed by seed (in brackets: seeds in which the row is better):\n\n{text}"


def _difference(apart: Sequence[float], metric: str) -> str:
    if not apart:
        return "–"
    sign = -1 if lower_is_better(metric) else 1
    favour = sum(sign * x > 0 for x in apart)
    return f"{_cell(Spread.of(apart), metric, '+')} ({favour}/{len(apart)})"


def _claims(results: Results) -> str:
    """Returns a row a claim, a column a kind of metric."""
    found: dict[Claim, dict[str, str]] = {}
    for one in answers(results):
        cells = found.setdefault(one.claim, {})
        difference = _cell(one.difference, one.metric, "+")
        cells[_kind(one.metric)] = f"{one.verdict}: {difference} ({one.favour}/{one.seeds})"
    if not found:
        return ""
    kinds = list(dict.fromkeys(kind for cells in found.values() for kind in cells))
    rows = [
        [claim.text, f"{claim.better} − {claim.worse}", *(cells.get(kind, "–") for kind in kinds)]
        for claim, cells in found.items()
    ]
    table = markdown(["claim", "rows", *(NAMES[kind] for kind in kinds)], rows, 2)
    return (
        "## The claims\n\nWhat arXiv 2507.15198 claims, answered by paired differences over the seeds "
        '(in brackets: seeds in favour). "Yes" and "no" need all seeds to agree and a mean beyond one '
        "standard deviation; with three seeds chance alone does the former once in four times. Seeds do "
        "not vary the prompts, so the spread of BLEU and ROUGE-L leaves out that of the text; where the "
        "greedy text of a row repeats itself (distinct-1 below "
        f'{DISTINCT}) they say nothing: "babble".\n\n' + table
    )


def _kind(metric: str) -> str:
    return metric.split("/")[0].removeprefix("answer_")


def _cell(found: Spread | None, metric: str, sign: str = "") -> str:
    if found is None:
        return "–"
    form = FORMS.get(metric.split("/")[0], ".3g")
    spread = "" if found.sd is None else f" ± {found.sd:{form}}"
    return f"{found.mean:{sign}{form}}{spread}"


def _heading(metric: str) -> str:
    name, _, domain = metric.partition("/")
    return f"{NAMES.get(name, name)}{f', {domain}' if domain and domain != 'overall' else ''}"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table; the first `left` columns to the left, others to the right."""
    rule = [":--"] * left + ["--:"] * (len(headers) - left)
    lines = [headers, rule, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


# -- how it was made


def _settings(about: Mapping[str, Any]) -> str:
    rows = [
        [
            row["table"],
            row["row"],
            " ".join(f"`{text}`" for text in row["settings"]) or "the reference",
        ]
        for row in about["rows"]
    ]
    common = " ".join(f"`{text}`" for text in about["common"])
    return (
        f"## Settings\n\nOver `{about['config']}`, for all rows: {common}; over these, by row (equal "
        f"settings are one run):\n\n{markdown(['table', 'row', 'settings'], rows, 3)}"
    )


def _machines(about: Mapping[str, Any]) -> str:
    lines = [f"- {', '.join(f'{k} {v}' for k, v in one.items())}" for one in about["machines"]]
    if not lines:
        return ""
    return "## Machine and versions\n\n" + "\n".join(lines)


def load_results(folder: Path) -> tuple[Results, dict[str, Any]]:
    """Returns results.json and about.json of a folder."""
    return (
        Results(json.loads((folder / "results.json").read_text())),
        json.loads((folder / "about.json").read_text()),
    )
