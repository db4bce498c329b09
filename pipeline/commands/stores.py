"""The commands that look after what is stored: verify, repair, inspect."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.commands.completion import config_files
from pipeline.commands.options import common_options, dry_run_option, json_option
from storage.errors import ConfigError, IncompleteCache
from storage.remote import require_local

if TYPE_CHECKING:
    from pipeline.block_view import BlockView
    from pipeline.console import Console
    from storage.verify import Report

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Target:
    """What a CACHE argument names.

    Attributes:
        stores: name → folder of each cache and corpus that is there.
        tokenizer: (folder or hub name, revision), if a configuration tells.
    """

    stores: dict[str, Path]
    tokenizer: tuple[str, str | None] | None = None


def cache_options(command: F) -> F:
    """CACHE (to which --set applies if it is a configuration), --json and the common options."""
    cache = click.argument("cache", type=click.Path(path_type=Path), shell_complete=config_files)
    return cache(common_options(json_option(command)))


def check_options(command: F) -> F:
    """--deep and --workers: how to check."""
    for decorator in (
        click.option(
            "--workers",
            default=4,
            show_default=True,
            type=click.IntRange(1),
            help="Files read at once, by threads of this one process.",
        ),
        click.option("--deep", is_flag=True, help="Also decode every chunk, as training would."),
    ):
        command = decorator(command)
    return command


def find_target(path: Path, overrides: Sequence[str]) -> Target:
    """Returns the caches and the corpus that a folder or a configuration names.

    Raises:
        ConfigError: no such path, or a wrong configuration.
        IncompleteCache: there is nothing to look at.
    """
    from storage.stores import find_stores, kind_of

    if path.is_dir():
        if overrides:
            raise ConfigError("--set goes with a configuration", where=path,
                              todo="name the run's YAML file, or leave --set out")  # fmt: skip
        target = Target(find_stores(path))
    elif not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            "there is no such folder or configuration", where=path,
            todo="name a cache, a corpus, a run's folder or its YAML file",
        )  # fmt: skip
    else:
        from pipeline.config import load_config

        config = load_config(path, overrides)
        folders = {"corpus": require_local(config.corpus_folder, "corpus_dir")}
        caches = require_local(config.cache_folder, "cache_dir")
        for name in config.teachers:  # a teacher may be called "corpus"
            folders[f"cache/{name}" if name in folders else name] = caches / name
        stores = {name: folder for name, folder in folders.items() if kind_of(folder)}
        target = Target(stores, (config.corpus.tokenizer, config.corpus.tokenizer_revision))
    if not target.stores:
        raise IncompleteCache(
            "there is neither a cache nor a corpus", where=path,
            todo="name a teacher's cache folder, a folder of several, a corpus folder, or the "
            "configuration of a run that has been begun",
        )  # fmt: skip
    return target


def open_console(quiet: bool) -> Console:
    """Returns the console of a command that has no configuration."""
    from pipeline.console import Console

    console = Console(quiet)
    click.get_current_context().find_root().obj = console
    return console


def _verify_all(target: Target, deep: bool, workers: int, console: Console) -> dict[str, Report]:
    from storage.verify import verify as verify_store

    reports = {}
    for name, root in target.stores.items():

        def tell(parts: int, total: int, name: str = name) -> None:
            if parts:
                console.advance(parts)
            else:
                console.start(f"verify {name}", total, "part")

        reports[name] = verify_store(root, workers, deep, tell)
        console.finish()
    return reports


@click.command()
@check_options
@cache_options
@click.pass_context
def verify(
    ctx: click.Context, cache: Path, overrides: Sequence[str], quiet: bool, debug: bool,
    as_json: bool, deep: bool, workers: int,
) -> None:  # fmt: skip
    """Check every byte of a cache or corpus, and list what is bad.

    CACHE is a teacher's cache folder, a folder of several, a corpus folder, a run's folder, or a
    run's configuration (then all of that run). Ends with exit code 1 if anything is bad; parts that
    are not done yet are no fault.

    \b
    Example: scholiast verify runs/mine/cache/code --deep
    """
    from pipeline.verify_text import arguments, report_json, show_reports, verdict

    console = open_console(quiet)
    reports = _verify_all(find_target(cache, overrides), deep, workers, console)
    sound = all(report.sound for report in reports.values())
    if as_json:
        stores = {name: report_json(report) for name, report in reports.items()}
        click.echo(json_module.dumps({"sound": sound, "stores": stores}, indent=1))
    else:
        show_reports(reports, console)
        click.echo(f"\n{verdict(reports, arguments(cache, overrides))}")
    ctx.exit(0 if sound else 1)


@click.command()
@dry_run_option
@click.option("--clean", is_flag=True, help="Also delete files that stopped writers left behind.")
@check_options
@cache_options
@click.pass_context
def repair(
    ctx: click.Context, cache: Path, overrides: Sequence[str], quiet: bool, debug: bool,
    as_json: bool, deep: bool, workers: int, dry_run: bool, clean: bool,
) -> None:  # fmt: skip
    """Drop what `verify` finds bad, so that just those parts are made anew.

    Verifies first. Run it while nothing writes to the same folders. Ends with exit code 1 if
    something is bad that a person has to decide on.

    \b
    Example: scholiast repair my.yaml --dry-run
    """
    from pipeline.verify_text import arguments, next_command, report_json, show_actions
    from storage.repair import plan_repair, unmended
    from storage.repair import repair as repair_store

    console = open_console(quiet)
    reports = _verify_all(find_target(cache, overrides), deep, workers, console)
    act = plan_repair if dry_run else repair_store
    actions = {name: act(report, clean) for name, report in reports.items()}
    left = {name: unmended(report) for name, report in reports.items()}
    if as_json:
        stores = {
            name: {
                **report_json(report), "actions": [asdict(a) for a in actions[name]],
                "next": next_command(report),
            }
            for name, report in reports.items()
        }  # fmt: skip
        click.echo(json_module.dumps({"dry_run": dry_run, "stores": stores}, indent=1))
    else:
        config = None if cache.is_dir() else arguments(cache, overrides)
        show_actions(reports, actions, dry_run, config)
    ctx.exit(1 if any(left.values()) else 0)


@click.command()
@click.option("--block", type=click.IntRange(0),
              help="Whose notes are shown; the first that all have done if not given.")  # fmt: skip
@click.option("--rows", metavar="A:B", help="Rows of the block; the first 12 if not given.")
@click.option(
    "--top", default=4, show_default=True, type=click.IntRange(1), help="Candidates shown."
)
@click.option("--sample", default=64, show_default=True, type=click.IntRange(1),
              help="Blocks read for the figures, evenly spread.")  # fmt: skip
@click.option("--corpus", type=click.Path(file_okay=False, path_type=Path),
              help="Corpus folder, to show what was read.")  # fmt: skip
@click.option("--tokenizer", type=click.Path(file_okay=False, path_type=Path),
              help="Tokenizer folder, to show text for ids.")  # fmt: skip
@cache_options
def inspect(
    cache: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, block: int | None,
    rows: str | None, top: int, sample: int, corpus: Path | None, tokenizer: Path | None,
) -> None:  # fmt: skip
    """Say what a cache is, how large, what its numbers look like, and show one block's notes.

    CACHE is as for `verify`; a configuration or a run's folder gives the corpus too, and a
    configuration the tokenizer.

    \b
    Example: scholiast inspect my.yaml --block 17 --rows 0:20
    """
    from pipeline.inspect import describe_cache, describe_corpus, first_common_block
    from pipeline.inspect_text import show_block, show_caches, show_corpus
    from storage.stores import CACHE, kind_of

    console, target = open_console(quiet), find_target(cache, overrides)
    caches = {name: root for name, root in target.stores.items() if kind_of(root) == CACHE}
    corpora = {name: root for name, root in target.stores.items() if name not in caches}
    facts = {name: describe_cache(root, name, sample) for name, root in caches.items()}
    if corpus is not None:
        corpora = {corpus.name: corpus}
    corpus_facts = {name: describe_corpus(root) for name, root in corpora.items()}
    if block is None:
        block = first_common_block(caches)
    shown = None
    if block is not None:
        view = _block_view(caches, corpora, target, tokenizer)
        shown = view.rows(block, *_row_range(rows, view.block_length), top)
    if as_json:
        result = {"corpora": corpus_facts, "caches": facts, "block": shown}
        click.echo(json_module.dumps(result, indent=1))
        return
    for name, one in corpus_facts.items():
        show_corpus(name, one, console)
    if facts:
        show_caches(facts, console)
    if shown:
        show_block(shown, console)


def _row_range(rows: str | None, block_length: int) -> tuple[int, int]:
    if rows is None:
        return 0, min(12, block_length)
    try:
        first, last = (int(x) for x in rows.split(":"))
    except ValueError:
        raise ConfigError(
            "no range of rows", where="--rows", expected="A:B, e.g. 0:12", found=rows,
            todo="give the first row and one past the last",
        ) from None  # fmt: skip
    return first, last


def _block_view(
    caches: dict[str, Path], corpora: dict[str, Path], target: Target, tokenizer: Path | None
) -> BlockView:
    from pipeline.block_view import BlockView, Vocabulary
    from storage.blocks import BlockReader
    from storage.reader import CacheReader

    if tokenizer is None and target.tokenizer is not None:
        from stages.model_files import locate

        tokenizer = locate(*target.tokenizer, "corpus.tokenizer", weights=False)
    readers = {name: CacheReader(root, name) for name, root in caches.items()}
    corpus = next(iter(corpora.values()), None)
    return BlockView(
        readers,
        BlockReader(corpus) if corpus else None,
        Vocabulary.read(tokenizer) if tokenizer else None,
    )
