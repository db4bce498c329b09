"""The commands `import` and `export-cache`."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import (
    common_options,
    json_option,
    open_workspace,
    run_options,
)

FORMATS = ("distillkit", "topk-jsonl", "vllm")


@click.command("import")
@click.option("--teacher", required=True, metavar="NAME", help="Whose cache it becomes.")
@click.option("--from", "source", required=True, type=click.Path(path_type=Path),
              help="A file, a folder of them, or a glob.")  # fmt: skip
@click.option("--format", "kind", required=True, type=click.Choice(FORMATS), help="Which tool's.")
@click.option("--layout", type=click.Path(dir_okay=False, path_type=Path),
              help="distillkit: the compression configuration; compression_config.yaml beside the "
              "captures if not given.")  # fmt: skip
@click.option("--tokens", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="topk-jsonl: a file with the sequence of each line, input_ids or text.")  # fmt: skip
@click.option("--tokenizer", type=click.Path(file_okay=False, path_type=Path),
              help="The captured teacher's, to be compared with the corpus's.")  # fmt: skip
@click.option("--values", type=click.Choice(["logprobs", "probabilities"]), default="logprobs",
              show_default=True, help="topk-jsonl: what its numbers are.")  # fmt: skip
@click.option("--keys", type=click.Choice(["ids", "tokens"]), default="ids", show_default=True,
              help="topk-jsonl: what its keys are.")  # fmt: skip
@click.option("--offset", type=click.IntRange(-1, 2),
              help="Entry j of a sequence is the distribution of token j + OFFSET; what the tool writes "
              "if not given.")  # fmt: skip
@click.option("--k", type=click.IntRange(1), help="Head entries a token; all if not given.")
@click.option("--entropy", type=click.Choice(["lower-bound"]),
              help="Store the least entropy that each head allows, marked as such.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check and report; write nothing.")
@json_option
@run_options
def import_cache(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, teacher: str,
    source: Path, kind: str, layout: Path | None, tokens: Path | None, tokenizer: Path | None,
    values: str, keys: str, offset: int | None, k: int | None, entropy: str | None, dry_run: bool,
) -> None:  # fmt: skip
    """Read another tool's capture into a cache of a teacher, over the configuration's corpus.

    Checks tokenizer, numbers, shift and coverage before anything is written. What a capture does not
    tell (entropies, logprobs of actual tokens outside the head, other temperatures, features) the cache
    does not hold, and what needs it says so. The teacher's model is not looked at.

    \b
    Example: scholiast import my.yaml --teacher large --from captures/ --format distillkit
      scholiast import my.yaml --teacher large --from "dump-*.jsonl" --format vllm --dry-run
    """
    from pipeline.exchange.run_import import Request, run_import

    work, console = open_workspace(config, overrides, quiet, dry_run)
    request = Request(
        teacher, source, kind, layout, tokens, tokenizer, values, keys, offset, k,  # type: ignore[arg-type]
        entropy is not None, dry_run,
    )  # fmt: skip
    result = run_import(work, request)
    if as_json:
        click.echo(json_module.dumps(result, indent=1))
        return
    _show(result, console)


def _show(result: dict[str, Any], console: Any) -> None:
    found, likelihood = result["found"], result["found"]["likelihood"]
    least, most = found["candidates"]
    rows = [
        ["sequences", f"{found['sequences']:,}"],
        ["distributions", f"{found['entries']:,}, of {least} to {most} candidates"],
        ["rows of the corpus", f"{found['rows']:,}, all served"],
        ["read as in the block", f"{found['same']:,}"],
        ["read with more before", f"{found['other']:,}"],
        ["head", f"{found['k']} entries, {found['mass']:.4f} the largest mass"],
        ["logprob of the next token", f"{likelihood['declared']:.3f} nats; one token before "
         f"{likelihood['before']:.3f}, after {likelihood['after']:.3f}"],
        ["missing", ", ".join(found["missing"]) or "nothing but temperatures and features"],
        ["lower bounds", ", ".join(found["bounds"]) or "none"],
    ]  # fmt: skip
    console.table(["capture", ""], rows, left=(0, 1))
    if result["dry_run"]:
        click.echo("\ndry run: nothing was written")
    else:
        click.echo(f"\ncache complete: {result['written']:,} parts written to {result['cache']}")


@click.command("export-cache")
@click.option("--format", "kind", required=True, type=click.Choice(["parquet", "topk-jsonl"]),
              help="What the files are.")  # fmt: skip
@click.option("--teacher", "teachers", multiple=True, metavar="NAME",
              help="This teacher's cache alone. Repeatable.")  # fmt: skip
@click.option("--corpus", type=click.Path(file_okay=False, path_type=Path),
              help="Corpus folder, where CACHE does not hold it.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@json_option
@common_options
def export_cache(
    cache: Path, out: Path, overrides: Sequence[str], quiet: bool, debug: bool,
    as_json: bool, kind: str, teachers: Sequence[str], corpus: Path | None, dry_run: bool,
) -> None:  # fmt: skip
    """Write caches as Parquet or JSON lines: OUT/TEACHER/part-000000.parquet, a file a part.

    CACHE is as for `verify`. Parts that are there already are kept, so that a stopped export goes on.

    \b
    Example: scholiast export-cache my.yaml exported --format parquet
      scholiast export-cache runs/mine exported --format topk-jsonl --teacher code
    """
    from pipeline.commands.stores import find_target, open_console
    from pipeline.console import human_bytes
    from pipeline.exchange.exporting import export_all

    console = open_console(quiet)
    result = export_all(
        find_target(cache, overrides), out, kind, teachers, corpus, console, dry_run
    )
    if as_json:
        click.echo(json_module.dumps({"dry_run": dry_run, "teachers": result}, indent=1))
        return
    for name, one in result.items():
        verb = "to write" if dry_run else "written"
        click.echo(
            f"{name}: {one['written']:,} of {one['parts']:,} parts {verb}, {human_bytes(one['bytes'])} "
            f"in {one['folder']}"
        )
