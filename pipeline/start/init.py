"""`scholiast init`: a few questions, and a commented configuration that runs as it is."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.options import common_options, json_option
from storage.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.start.answers import Answers, Say
    from pipeline.start.choices import Job
    from pipeline.start.machine import Machine

_FAMILY_SECTIONS = ("store", "fusion", "loss")
_TOKENS_OF_A_STEP = (
    "train.batch_blocks",
    "train.accumulate",
    "corpus.block_length",
    "train.epochs",
)
_NEXT = ("doctor", "plan", "cache-teachers", "train-student", "evaluate", "report")


def _pairs(
    context: click.Context, option: click.Parameter, values: Sequence[str]
) -> dict[str, str]:
    """Returns DOMAIN=COLUMN options as a dict."""
    found = {}
    for value in values:
        domain, equals, column = value.partition("=")
        if not (domain and equals and column):
            raise click.BadParameter(f"{value!r} is not DOMAIN=COLUMN", context, option)
        found[domain] = column
    return found


@click.command()
@click.option("--family", metavar="NAME",
              help="Start from a ready configuration: chat, llama3, qwen2.5 or smollm2.")  # fmt: skip
@click.option("--teacher", "teachers", multiple=True, metavar="NAME=MODEL",
              help="A folder or hub name. Repeatable.")  # fmt: skip
@click.option("--student", metavar="MODEL",
              help="A folder or hub name, or a config.json for random weights.")  # fmt: skip
@click.option("--keep-layers", metavar="N|I,J,…",
              help="How many of its layers the student keeps, or which; without --student it is cut from "
              "the first teacher.")  # fmt: skip
@click.option("--source", "sources", multiple=True, metavar="DOMAIN=PATH",
              help="Text: .jsonl, .parquet, .txt or .md, a glob, a folder, or a hub's data set, "
              "hub:NAME[:CONFIG[:SPLIT]][@REVISION]. Repeatable.")  # fmt: skip
@click.option("--heldout", multiple=True, metavar="DOMAIN=PATH",
              help="Text to measure on, in place of a share of the sources. Repeatable.")  # fmt: skip
@click.option("--field", "fields", multiple=True, metavar="DOMAIN=COLUMN", callback=_pairs,
              help="Column of a source's text or chats, if it cannot be told; DOMAIN as in --source, "
              "or the file's name. Repeatable.")  # fmt: skip
@click.option("--block-length", type=click.IntRange(2), help="Tokens of a block.")
@click.option("--run-dir", metavar="FOLDER", help="Where the run will be; runs/NAME if not given.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]",
              help="What will run it.")  # fmt: skip
@click.option("--device-memory", type=click.FloatRange(0, min_open=True), metavar="GB",
              help="The device's memory in 10^9 bytes, in place of this machine's.")  # fmt: skip
@click.option("--yes", "-y", is_flag=True, help="Ask nothing; take what is proposed.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@click.option("--dry-run", is_flag=True, help="Print the configuration; write nothing.")
@json_option
@common_options
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default="scholiast.yaml")
def init(
    file: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
    family: str | None, teachers: Sequence[str], student: str | None, keep_layers: str | None,
    sources: Sequence[str], heldout: Sequence[str], fields: dict[str, str],
    block_length: int | None, run_dir: str | None, device: str, device_memory: float | None, yes: bool,
    force: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Write a configuration for your teachers, text, student and machine, into FILE (scholiast.yaml).

    Asks for what no option gives, if there is a terminal. Models and their tokenizers are looked at, and
    so is the text; nothing large is loaded or downloaded. Fewer than twenty texts will be cut into
    passages, so that some can be held out.

    \b
    Example: scholiast init mine.yaml
      scholiast init mine.yaml --yes --teacher a=models/a --teacher b=org/b --student org/small \\
        --source docs="data/*.jsonl" --source notes=notes/
      scholiast init mine.yaml --family smollm2 --source docs=data/docs.jsonl --dry-run
      scholiast init mine.yaml --source docs=hub:org/set:en:train --heldout docs=hub:org/set:en:test
    """
    from pipeline.cache_workspace import quiet_transformers
    from pipeline.start.answers import Flags, at_terminal, gather
    from pipeline.start.families import family as read_family
    from pipeline.start.machine import look

    if file.exists() and not (force or dry_run):
        raise ConfigError(
            "the file is there already", where=file, todo="name another, or give --force"
        )
    base = read_family(family) if family else {}
    quiet_transformers()
    asking = at_terminal() and not yes

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    machine = look(device, None if device_memory is None else int(device_memory * 1e9))
    say(f"Machine: {machine.about}")
    answers = gather(
        Flags(teachers, student, keep_layers, sources, heldout, fields, base, asking), say
    )
    job = _job(answers, file, run_dir, device, machine, block_length, asking)
    config, text = _compose(job, base, family, file, overrides)
    _finish(job, config, text, file, dry_run, as_json, asking, say)


def _job(
    answers: Answers, file: Path, run_dir: str | None, device: str, machine: Machine,
    block_length: int | None, asking: bool,
) -> Job:  # fmt: skip
    """Returns all that is known; asks for length and folder."""
    from pipeline.start.answers import ask
    from pipeline.start.choices import Job
    from pipeline.start.choices import block_length as choose_length
    from pipeline.start.heldout import prepared
    from pipeline.start.models import common_tokenizer
    from stages.tokenizer import vocab_size

    assert answers.student is not None
    name, proposed = file.stem, f"runs/{file.stem}"
    folder = run_dir or (ask("Folder of the run", str, proposed) if asking else proposed)
    chat = any(found.options.messages_field for found in answers.sources)
    models = answers.models()
    tokenizer = models[common_tokenizer(models, chat)]
    sources = prepared(answers.sources, tokenizer.tokenizer)
    job = Job(
        name, folder, device, answers.teachers, answers.student, answers.keep_layers,
        tokenizer.model, vocab_size(tokenizer.tokenizer), tokenizer.tokenizer.eos_token_id is not None,
        sources, block_length, machine,
    )  # fmt: skip
    if block_length is None and asking:
        job = ask(
            "Tokens of a block", lambda text: _with_length(job, text), str(choose_length(job))
        )
    return job


def _with_length(job: Job, text: str) -> Job:
    from pipeline.start.choices import block_length

    if not text.isdecimal() or int(text) < 2:
        raise ConfigError("this is no length", where="--block-length", found=text,
                          todo="give a number of tokens")  # fmt: skip
    changed = replace(job, block_length=int(text))
    block_length(changed)
    return changed


def _compose(
    job: Job, base: dict[str, Any], family: str | None, file: Path, overrides: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Returns the configuration, checked, and its text.

    Raises:
        ConfigError
    """
    from pipeline.config import override, validated
    from pipeline.start.choices import compose
    from pipeline.start.models import human_count
    from pipeline.start.writing import render

    config, comments = compose(job)
    for section in (name for name in _FAMILY_SECTIONS if name in base):
        for key, value in base[section].items():
            if config[section].get(key) != value:
                comments.pop(f"{section}.{key}", None)
        config[section] = {**config[section], **base[section]}
    if base:
        config["train"]["lr"] = base["train"]["lr"]
        comments["train.lr"] = "of the ready configuration"
    for text in overrides:
        override(config, text)
        key = text.partition("=")[0]
        for stale in (key, *(_TOKENS_OF_A_STEP if key in _TOKENS_OF_A_STEP else ())):
            comments.pop(stale, None)
    validated(config, file, overrides)
    shown = shlex.quote(str(file))
    header = [
        f"{job.name}: {', '.join(job.teachers)} → a student of "
        f"{human_count(job.student.parameters_with(job.student_layers))} parameters",
        f"Written by `scholiast init`{f' from the ready configuration {family}' if family else ''}; "
        "yours to edit. Every key: pipeline/README.md.",
        "", *(f"  scholiast {command} {shown}" for command in _NEXT[1:]), "",
        "Sizes and numbers of steps below are estimates; `scholiast plan` knows more.",
    ]  # fmt: skip
    return config, render(config, comments, header)


def _finish(
    job: Job, config: dict[str, Any], text: str, file: Path, dry_run: bool, as_json: bool, asking: bool,
    say: Say,
) -> None:  # fmt: skip
    """Shows or writes what was made."""
    from pipeline.start.choices import problems
    from storage import durable

    unfit = problems(job, config)
    for problem in unfit:
        say(f"Will not fit: {problem}")
    if asking and not dry_run:
        say(f"\n{text}")
        click.confirm(f"Write {file}?", default=True, abort=True, err=True)
    if not dry_run:
        durable.write_bytes(file.absolute(), text.encode())
    if as_json:
        click.echo(json_module.dumps(_facts(job, config, file, dry_run, unfit), indent=1))
    elif dry_run:
        click.echo(text, nl=False)
    else:
        shown = shlex.quote(str(file))
        click.echo(f"written: {file}\n\nnext:")
        click.echo("\n".join(f"  scholiast {command} {shown}" for command in _NEXT))


def _facts(
    job: Job, config: dict[str, Any], file: Path, dry_run: bool, unfit: list[str]
) -> dict[str, Any]:
    return {
        "file": str(file), "written": not dry_run, "config": config,
        "machine": job.machine.about,
        "models": {
            **{f"teachers.{name}": facts.about for name, facts in job.teachers.items()},
            "student": job.student.about,
        },
        "tokens": job.tokens, "problems": unfit,
    }  # fmt: skip
