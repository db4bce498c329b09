"""The figures of an evaluation over all domains, a row a model, as `scholiast evaluate` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OVERALL = "overall"
HEADERS = [
    "over all domains", "perplexity (95 %)", "bits/byte", "KL", "ECE", "accuracy", "agreement",
    "BLEU", "chrF", "ROUGE-L", "distinct-1", "distinct-2", "parameters", "tokens/s",
]  # fmt: skip


def overall(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns headers and rows: teachers, ensemble, students; scores of text are of greedy
    continuations, KL and perplexity per token in nats, shares in per cent."""
    loaded = evaluation["teacher_models"]
    rows = [_row(n, table, loaded[n]) for n, table in evaluation["teachers"].items()]
    if evaluation["fused"]:
        rows.append(_row("fused ensemble", evaluation["fused"], {}))
    rows += [_row(n, model["domains"], model) for n, model in evaluation["students"].items()]
    return HEADERS, rows


def _row(name: str, domains: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    losses = domains.get(OVERALL, {})
    text = model.get("generation", {}).get(OVERALL, {}).get("greedy", {})
    return [
        name, _perplexity(losses), _fixed(losses.get("bits_per_byte"), 3),
        _fixed(losses.get("kd"), 3), _fixed(losses.get("ece"), 1, 100),
        _fixed(losses.get("accuracy"), 1, 100), _fixed(losses.get("agreement"), 1, 100),
        _fixed(text.get("bleu"), 1), _fixed(text.get("chrf"), 1),
        _fixed(text.get("rouge_l"), 1, 100), _fixed(text.get("distinct_1"), 2),
        _fixed(text.get("distinct_2"), 2), _fixed(model.get("parameters"), 0),
        _fixed(model.get("tokens_per_s"), 0),
    ]  # fmt: skip


def _perplexity(losses: Mapping[str, Any]) -> str:
    value, limits = losses.get("perplexity"), losses.get("intervals", {}).get("perplexity")
    if value is None:
        return "–"
    return f"{value:,.4g}" + (f" ({limits[0]:,.4g} to {limits[1]:,.4g})" if limits else "")


def _fixed(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"
