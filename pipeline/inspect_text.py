"""The tables of `scholiast inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import click

from pipeline.block_view import visible
from pipeline.console import Console, human_bytes
from pipeline.terminal import harmless

Facts = Mapping[str, dict[str, Any]]

_FIGURES = (("head_mass", "head mass"), ("tail_mass", "tail mass"),
            ("entropy", "entropy (nats)"), ("gold_logprob", "gold logprob"))  # fmt: skip


def show_corpus(name: str, facts: dict[str, Any], console: Console) -> None:
    """Prints what a corpus is."""
    told = (
        f"{name}: {facts['tokens']:,} tokens in {facts['blocks']:,} blocks of "
        f"{facts['block_length']:,}, {facts['parts']:,} parts, {human_bytes(facts['bytes'])}\n"
        f"  fingerprint {_short(facts['fingerprint'])}, tokenizer {_short(facts['tokenizer'])} with "
        f"{facts['vocab_size']:,} ids\n"
    )
    click.echo(harmless(told))
    console.table(
        ["source", "split", "first block", "blocks", "documents", "tokens"],
        [
            [s["domain"], s["split"], *(f"{s[n]:,}" for n in ("first_block", "blocks", "documents",
                                                              "tokens"))]
            for s in facts["sources"]
        ],
    )  # fmt: skip
    click.echo("")


def show_caches(facts: Facts, console: Console) -> None:
    """Prints what caches are, side by side: identity, sizes, figures."""
    own = {name: {"root": one["root"], "format": one["format"], "fingerprint": one["fingerprint"],
                  "parts done": f"{one['parts_done']:,} of {one['parts']:,}",
                  "tokens": one["tokens"], **_flat(one["identity"]), **_cut(one)}
           for name, one in facts.items()}  # fmt: skip
    keys = dict.fromkeys(key for one in own.values() for key in one)
    names = list(facts)
    rows = [[key, *(_short(own[name].get(key, "–")) for name in names)] for key in keys]
    console.table(["cache", *names], rows, left=range(len(names) + 1))
    _show_sizes(facts, console)
    _show_figures(facts, console)


def _show_sizes(facts: Facts, console: Console) -> None:
    arrays = dict.fromkeys(name for one in facts.values() for name in one["arrays"])
    rows = []
    for array in arrays:
        some = next(one["arrays"][array] for one in facts.values() if array in one["arrays"])
        shape = "×".join(f"{n}" for n in some["shape"])
        cells = [_per_token(one["arrays"].get(array)) for one in facts.values()]
        rows.append([array, some["dtype"], shape, *cells])
    manifests = [one["manifest_bytes"] / max(1, one["tokens"]) for one in facts.values()]
    rows.append(["manifests", "", "", *(f"{size:.2f}" for size in manifests)])
    other = [one["other_bytes"] / max(1, one["tokens"]) for one in facts.values()]
    rows.append(["of the whole", "", "", *(f"{size:.2f}" for size in other)])
    rows.append(["all", "", "", *(f"{one['bytes_per_token']:.2f}" for one in facts.values())])
    rows.append(["on disk", "", "", *(human_bytes(one["bytes"]) for one in facts.values())])
    read = min(one["manifests_read"] for one in facts.values())
    done = min(one["parts_done"] for one in facts.values())
    click.echo(f"\nbytes per token{'' if read >= done else f', from {read:,} of {done:,} parts'}")
    console.table(["array", "dtype", "shape", *facts], rows, left=(0, 1))


def _show_figures(facts: Facts, console: Console) -> None:
    rows = []
    for key, label in _FIGURES:
        for name, one in facts.items():
            if one["figures"]:
                row, marks = one["figures"][key], ("mean", "p10", "p50", "p90")
                bound = ", a lower bound" if key in one["layout"].get("bounds", ()) else ""
                cells = ["missing" if row is None else f"{row[m]:.4f}" for m in marks]
                rows.append([f"{label}{bound}", name, *cells])
    sampled = next((one["figures"] for one in facts.values() if one["figures"]), None)
    if sampled is None:
        click.echo("\nno rows to take figures from yet")
        return
    click.echo(f"\nfigures over {sampled['rows']:,} rows of {sampled['blocks']:,} blocks")
    console.table(["figure", "cache", "mean", "10 %", "median", "90 %"], rows, left=(0, 1))
    perplexities = [f"{name} {_fixed(one['figures']['perplexity'])}"
                    for name, one in facts.items() if one["figures"]]  # fmt: skip
    click.echo(harmless(f"perplexity on the next token: {', '.join(perplexities)}"))


def show_block(block: dict[str, Any], console: Console) -> None:
    """Prints one block's rows: a line a teacher."""
    place = f" ({block['domain']}, {block['split']})" if "domain" in block else ""
    told = f"\nblock {block['block']:,}{place}: row t reads a token and predicts the next\n"
    click.echo(harmless(told))
    table = []
    for row in block["rows"]:
        reads = [_quoted(row["token"]), _quoted(row["next"])] if "token" in row else ["", ""]
        head = [str(row["row"]), *reads]
        if not row["scored"]:
            table.append([*head[:2], "–", "", "", "", "", "no target"])
        for name, notes in row["teachers"].items():
            table.append([*head, name, *_cells(notes)])
            head = ["", "", ""]
    headers = ["row", "reads", "next", "teacher", "entropy", "tail", "p(next)", "candidates"]
    console.table(headers, table, left=(0, 1, 2, 3, 7))


def _cells(notes: dict[str, Any]) -> list[str]:
    candidates = "  ".join(f"{_quoted(c)} {_p(c['p'])}" for c in notes["candidates"])
    drawn = "  ".join(_times(d) for d in notes["drawn"][: len(notes["candidates"])])
    more = len(notes["drawn"]) - len(notes["candidates"])
    drawn += f"  and {more} more" if more > 0 else ""
    return [
        _fixed(notes["entropy"]), f"{notes['tail_mass']:.3f}",
        "–" if notes["gold_logprob"] is None else _p(math.exp(notes["gold_logprob"])),
        f"{candidates}  drawn: {drawn}" if drawn else candidates,
    ]  # fmt: skip


def _fixed(value: float | None) -> str:
    """Returns a figure with two digits, a dash where the cache does not tell it."""
    return "–" if value is None else f"{value:.2f}"


def _times(drawn: dict[str, Any]) -> str:
    return _quoted(drawn) + (f" ×{drawn['times']}" if drawn["times"] > 1 else "")


def _p(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.0005 else f"{probability:.0e}"


def _quoted(token: dict[str, Any]) -> str:
    known = token["text"] != f"#{token['id']}"
    return f"'{visible(token['text'])}'" if known else str(token["text"])


def _per_token(size: dict[str, Any] | None) -> str:
    return "–" if size is None else f"{size['bytes_per_token']:.2f}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict's leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping):
            leaves |= _flat(one, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = one
    return leaves


def _cut(facts: dict[str, Any]) -> dict[str, Any]:
    """What the layout states beyond the identity: how the arrays are cut."""
    named = {key.rsplit(".", 1)[-1] for key in _flat(facts["identity"])}
    layout = {**facts["layout"], "generations": len(facts["layout"].get("generations", ())) or 1}
    return {f"layout.{k}": v for k, v in layout.items() if k not in named}


def _short(value: Any) -> str:
    """A cell of a fact: hashes by their first 16 digits."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    text = str(value)
    hexadecimal = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:16] if hexadecimal else text
