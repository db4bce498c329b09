"""results.json → RESULTS.md: tables with spreads, paired differences, claims, commands, machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.reproduce.results import (
    ANSWERS,
    BEST_SINGLE,
    BLEU,
    CE_LOSS,
    DISTINCT,
    KD,
    MEAN_SINGLE,
    PERPLEXITY,
    ROUGE,
    SEEDS,
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
    REFERENCE,
    SENSITIVITY,
    UNIFORM,
)
from storage import durable

NAMES: Final = {
    "perplexity": "perplexity", "kd": "distillation loss", "ce": "held-out loss", "ece": "ECE",
    "answer_rouge_l": "ROUGE-L of answers",
    "accuracy": "accuracy",
    "sampled_bleu": "BLEU", "sampled_rouge_l": "ROUGE-L", "bytes_per_token": "bytes a token",
    "training_seconds": "training, s",
}  # fmt: skip
FORMS: Final = {
    "perplexity": ".1f", "kd": ".3f", "ce": ".3f", "ece": ".3f",
    "sampled_bleu": ".2f", "sampled_rouge_l": ".3f", "answer_rouge_l": ".3f", "accuracy": ".3f",
    "bytes_per_token": ".1f", "training_seconds": ".0f",
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
    "τ = 1, temperature 1, α = 0.9, no features). 2 teachers are the first two of table 1. The weak "
    "teacher, a further one, is the first without a sixth of its layers. Wrong layers: the student's "
    "first layer is aligned in place of the configured one.",
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
    parts += [_settings(results, about), _machines(about)]
    durable.write_bytes(path, ("\n\n".join(part for part in parts if part) + "\n").encode())


def _head(about: Mapping[str, Any]) -> str:
    commands = "\n".join(about["commands"])
    return (
        f"Written by `scholiast reproduce` from {about['runs']} runs; nothing here is typed by hand but "
        "the section on findings, if there is one. Values are means ± standard deviations (n − 1) over "
        f"up to {about['seeds']} seeds, {about['steps']} optimizer steps each; a seed decides the order "
        "of blocks and is the same for all rows. All students are measured on the same held-out blocks "
        "against one target, the teachers fused by entropy weights at temperature 1, whatever they were "
        "taught from. The distillation loss is Σ_m w_m KL(teacher m ‖ student) with those weights, what "
        "lies outside a teacher's stored entries as one event; nats a token. It favours students taught "
        "by entropy weights, and its least is not 0 but how much the teachers differ. BLEU and ROUGE-L "
        "are of sampled continuations (greedy ones are in the raw runs: weak students repeat "
        "themselves). † its "
        "weights look at the gold token of the rows trained on; ‡ at those of a calibration part.\n\n"
        f"```\n{commands}\n```"
    )


# -- tables


def _table(results: Results, about: Mapping[str, Any], table: str) -> str:
    columns = _columns(results, table)
    rows = []
    for row in [*results.rows[table], *_of_singles(results, table)]:
        name = row + MARKS[about["gold"].get(row, "")]
        if row == BEST_SINGLE and (best := results.best_single(table)):
            name = f"{BEST_SINGLE}: {best.partition(': ')[2]}, picked on the held-out text"
        seeds = max(len(results.seeds(table, row, m)) for m in columns)
        if seeds < about["seeds"] and row not in _constant(results, table):
            name += f" ({seeds} of {about['seeds']} seeds)"
        rows.append([name, *(_cell(results.spread(table, row, m), m) for m in columns)])
    return markdown(["", *(_heading(m) for m in columns)], rows)


def _columns(results: Results, table: str) -> list[str]:
    """Returns the metrics shown, as far as the table has them."""
    there = results.metrics[table]
    by_domain = [m for m in there if m.startswith("perplexity/") and m != PERPLEXITY]
    wanted = [*by_domain, PERPLEXITY, KD, "ece/overall", BLEU, ROUGE]
    if table == MULTITASK:
        wanted += ["kd/docstrings", "accuracy/docstrings", ANSWERS]
    if table == ENCODINGS:
        wanted = ["bytes_per_token", CE_LOSS, PERPLEXITY, KD, "ece/overall"]
    return [m for m in wanted if m in there]


def _differences(results: Results, table: str) -> str:
    """Returns paired differences to cross-entropy, uniform weights and the online bound; of table 2 to
    the reference."""
    rivals = (REFERENCE,) if table == SENSITIVITY else (CE, UNIFORM, ONLINE)
    others = [o for o in rivals if o in results.rows[table]]
    metrics = [m for m in (CE_LOSS, KD) if m in results.metrics[table]]
    columns = [(o, m) for o in others for m in metrics]
    rows = []
    for row in [*results.rows[table], *_of_singles(results, table)]:
        cells = [
            "–" if row == o else _difference(results.paired(table, row, o, m), m)
            for o, m in columns
        ]
        if row not in _constant(results, table) and any(cell != "–" for cell in cells):
            rows.append([row, *cells])
    if not rows:
        return ""
    text = markdown(["", *(f"{_heading(m)} − that of {o}" for o, m in columns)], rows)
    return f"Paired differences, seed by seed (in brackets: seeds in which the row is better):\n\n{text}"


def _of_singles(results: Results, table: str) -> list[str]:
    """Returns the rows that sum up the single teachers' students."""
    return [BEST_SINGLE, MEAN_SINGLE] if results.best_single(table) else []


def _constant(results: Results, table: str) -> list[str]:
    """Returns the rows that no seed changes."""
    return [row for row in results.rows[table] if row == ENSEMBLE or row.startswith(ALONE)]


def _difference(apart: Sequence[float], metric: str) -> str:
    if not apart:
        return "–"
    sign = -1 if lower_is_better(metric) else 1
    favour = sum(sign * x > 0 for x in apart)
    return f"{_cell(Spread.of(apart), metric, '+')} ({favour}/{len(apart)})"


def _claims(results: Results) -> str:
    """Returns a row a claim, a column a kind of metric."""
    found: dict[Claim, dict[str, str]] = {}
    asked = answers(results)
    for one in asked:
        form, apart = _form(one.metric), one.difference
        numbers = f"{apart.mean:+{form}} ({apart.low:+{form}} to {apart.high:+{form}})"
        found.setdefault(one.claim, {})[_kind(one.metric)] = (
            f"{one.verdict}: {numbers}, {one.favour} of {one.seeds}"
        )
    if not found:
        return ""
    kinds = list(dict.fromkeys(kind for cells in found.values() for kind in cells))
    rows = [
        [claim.text, f"{claim.better} − {claim.worse}", *(cells.get(kind, "–") for kind in kinds)]
        for claim, cells in found.items()
    ]
    table = markdown(["claim", "rows", *(NAMES[kind] for kind in kinds)], rows, 2)
    return (
        "## The claims\n\nWhat arXiv 2507.15198 claims, answered by differences paired by seed: the "
        "mean, in brackets its 95 % interval by Student's t, and in how many seeds the claim holds. "
        f'"Yes" and "no" need {SEEDS} seeds and an interval that leaves zero out: chance alone gives one '
        f"answer in twenty, and there are {sum(one.judged for one in asked)}. Held-out loss "
        "is the cross-entropy in nats a token, the logarithm of perplexity, in which no seed outweighs "
        "the others. Rows of different weights are not compared by distillation loss, as its target has "
        "entropy weights. BLEU and ROUGE-L are of sampled text; seeds do not vary the prompts, so their "
        'intervals leave out the spread of texts. "Babble": the text that is scored repeats itself '
        f"(distinct-1 below {DISTINCT}).\n\n" + table
    )


def _kind(metric: str) -> str:
    return metric.split("/")[0]


def _cell(found: Spread | None, metric: str, sign: str = "") -> str:
    if found is None:
        return "–"
    form = _form(metric)
    spread = "" if found.sd is None else f" ± {found.sd:{form}}"
    return f"{found.mean:{sign}{form}}{spread}"


def _form(metric: str) -> str:
    return FORMS.get(metric.split("/")[0], ".3g")


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


def _settings(results: Results, about: Mapping[str, Any]) -> str:
    rows = [
        [
            row["table"],
            row["row"],
            " ".join(f"`{text}`" for text in row["settings"]) or "the reference",
        ]
        for row in about["rows"]
        if row["row"] in results.rows.get(row["table"], [])
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
