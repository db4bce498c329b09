"""A plan for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from pipeline.console import Console, about, duration, human_bytes
from pipeline.planning.calibration import STUDENT


def show_plan(console: Console, plan: dict[str, Any]) -> None:
    """Prints a plan from `whole_plan`: steps, arrays, memory, parts, warnings."""
    tokens, blocks, parts = (
        about(plan[name], plan["estimated"]) for name in ("tokens", "blocks", "parts")
    )
    click.echo(
        f"{tokens} tokens in {blocks} blocks of {plan['block_length']:,}, "
        f"{parts} parts of {plan['blocks_per_part']:,} blocks\n"
    )
    _steps(console, plan)
    _arrays(console, plan)
    _memory(console, plan)
    _parts(console, plan)
    totals, price = plan["totals"], plan["device"]["price_per_hour"]
    gpu = "GPU hours" if plan["device"]["gpu"] else "hours of this machine"
    cost = "" if price is None else f", {totals['cost']:,.2f} at {price:g} an hour"
    click.echo(
        f"\nin all: {human_bytes(totals['size_bytes'])} on disk ({human_bytes(totals['bytes_left'])} "
        f"still to write), {_hours(totals['hours'])} {gpu} to go{cost}"
    )
    for warning in plan["warnings"]:
        click.echo(f"warning: {warning}")


def _steps(console: Console, plan: dict[str, Any]) -> None:
    priced = plan["device"]["price_per_hour"] is not None
    unit = "GPU hours" if plan["device"]["gpu"] else "hours"
    rows = []
    for step in plan["steps"]:
        row = [
            step["step"], f"{step['done']:,}", about(step["total"], step["estimated"]),
            human_bytes(step["size_bytes"]),
            "–" if step["seconds"] is None else duration(step["seconds"]),
            "–" if step["hours"] is None else _hours(step["hours"]),
        ]  # fmt: skip
        if priced:
            row.append("–" if step["cost"] is None else f"{step['cost']:,.2f}")
        rows.append([*row, step["basis"]])
    cost = ["cost"] if priced else []
    headers = ["step", "done", "of", "on disk", "time left", unit, *cost, "basis"]
    console.table(headers, rows, left=(0, len(headers) - 1))


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def _arrays(console: Console, plan: dict[str, Any]) -> None:
    """Bytes by array, a column a teacher; the largest first."""
    teachers = {s["step"].removeprefix("cache "): s["arrays"] for s in plan["steps"] if s["arrays"]}
    total: dict[str, float] = {}
    for arrays in teachers.values():
        for name, size in arrays.items():
            total[name] = total.get(name, 0.0) + size
    click.echo("\non disk by array")
    tokens = max(1, plan["tokens"]) * max(1, len(teachers))
    rows = [
        [name, *(human_bytes(arrays.get(name, 0.0)) for arrays in teachers.values()),
         human_bytes(total[name]), f"{total[name] / tokens:.2f}"]
        for name in sorted(total, key=lambda name: -total[name])
    ]  # fmt: skip
    console.table(["array", *teachers, "all", "bytes a token"], rows)


def _memory(console: Console, plan: dict[str, Any]) -> None:
    device = plan["device"]
    there = "" if device["memory_bytes"] is None else f" of {human_bytes(device['memory_bytes'])}"
    click.echo(f"\npeak memory on {device['name']}{there}")
    teachers = [peak for peak in plan["memory"] if peak["what"] != STUDENT]
    for stage, peaks in (
        ("stage one", teachers),
        ("stage two", [peak for peak in plan["memory"] if peak["what"] == STUDENT]),
    ):
        if peaks:
            _terms(console, stage, peaks, device["gpu"])


def _terms(console: Console, stage: str, peaks: Sequence[dict[str, Any]], gpu: bool) -> None:
    """Prints a row a term, a column a model; the largest first, then what they come to, and of a GPU
    when that is."""
    shared = [f" ({peak['ranks']} pieces)" if peak["ranks"] > 1 else "" for peak in peaks]
    names = [peak["what"].removeprefix("teachers.") for peak in peaks]
    largest: dict[str, int] = {}
    for peak in peaks:
        for term, size in peak["terms"].items():
            largest[term] = max(size, largest.get(term, 0))
    rows = [
        [term, *(human_bytes(p["terms"][term]) if term in p["terms"] else "–" for p in peaks)]
        for term in sorted(largest, key=lambda term: -largest[term])
    ]
    rows.append(["in all, estimated", *(human_bytes(peak["bytes"]) for peak in peaks)])
    if any(peak["measured"] is not None for peak in peaks):
        sizes = [peak["measured"] for peak in peaks]
        rows.append(
            ["in all, measured", *("–" if size is None else human_bytes(size) for size in sizes)]
        )
    if gpu:
        rows.append(["at its largest", *(peak["moment"] for peak in peaks)])
    headers = [name + pieces for name, pieces in zip(names, shared, strict=True)]
    click.echo()
    console.table([stage, *headers], rows)


def _parts(console: Console, plan: dict[str, Any]) -> None:
    rows = []
    for name, parts in plan["teachers"].items():
        if not parts["parts_left"]:
            continue
        each, task = parts["part_seconds"], parts["task_seconds"]
        rows.append([
            name, about(parts["parts_left"], plan["estimated"]), "–" if each is None else duration(each),
            human_bytes(parts["part_bytes"]), human_bytes(parts["shard_bytes"]), f"{parts['tasks']:,}",
            "–" if task is None else duration(task),
        ])  # fmt: skip
    if rows:
        click.echo("\nparts left, and an array for them")
        headers = ["teacher", "parts", "a part", "on disk", "largest shard", "tasks", "a task"]
        console.table(headers, rows)
