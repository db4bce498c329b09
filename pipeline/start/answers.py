"""What `scholiast init` must know: from flags, or asked at a terminal; looked at once it is said."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.start.choices import spread_layers
from pipeline.start.models import ModelFacts, common_tokenizer, look_at, look_at_config
from pipeline.start.sources import UNTOLD, Found, find
from pipeline.start.sources import look_at as look_at_source
from pipeline.terminal import harmless
from stages.options import SourceOptions
from storage.errors import ConfigError, ScholiastError

T = TypeVar("T")
Say = Callable[[str], None]

_RESERVED = ("before", "fused", "cross_entropy")


def at_terminal() -> bool:
    """Returns whether somebody can be asked."""
    return sys.stdin.isatty()


@dataclass(frozen=True)
class Flags:
    """What the command line said.

    Attributes:
        teachers: NAME=MODEL or MODEL each.
        student: a model, or a config.json for random weights.
        keep_layers: a number, or layers by commas.
        sources, heldout: DOMAIN=PATH or PATH each.
        fields: domain → column.
        base: of a ready configuration; empty without one.
        asking: whether what is missing may be asked.
    """

    teachers: Sequence[str]
    student: str | None
    keep_layers: str | None
    sources: Sequence[str]
    heldout: Sequence[str]
    fields: Mapping[str, str]
    base: Mapping[str, Any]
    asking: bool


@dataclass
class Answers:
    """What was said and found.

    Attributes:
        teachers: name → what it is.
        student: what it is.
        keep_layers: decoder layers kept of it; None for all.
        sources: of both splits.
        faults: what of the flags cannot be, where nobody can be asked.
    """

    say: Say
    teachers: dict[str, ModelFacts] = field(default_factory=dict)
    student: ModelFacts | None = None
    keep_layers: list[int] | None = None
    sources: list[Found] = field(default_factory=list)
    faults: list[ScholiastError] = field(default_factory=list)

    @contextlib.contextmanager
    def looking(self, asking: bool) -> Iterator[None]:
        """Keeps what is wrong with a flag until all have been looked at; whoever sits at a terminal is
        told at once, before a question more."""
        try:
            yield
        except ScholiastError as error:
            if asking:
                raise
            self.faults.append(error)

    def models(self) -> dict[str, ModelFacts]:
        """Returns name for messages → facts, the student last."""
        named = {f"teacher {name!r}": facts for name, facts in self.teachers.items()}
        return named | ({"the student": self.student} if self.student else {})


def gather(flags: Flags, say: Say) -> Answers:
    """Returns all answers, looked at.

    Args:
        say: is told what was found.

    Raises:
        ConfigError: something is missing and nobody can be asked, or is not possible.
        TeacherError, VocabularyMismatch, CorpusError: what was named cannot be used. Of several faults
            the last is raised, and the others are printed.
    """
    answers = Answers(say)
    for step in (_teachers, _student, _sources):
        with answers.looking(flags.asking):
            step(flags, answers)
    if answers.faults:
        *others, last = answers.faults
        for error in others:
            click.echo(harmless(f"error: {error}\n"), err=True)
        raise last
    return answers


def missing(flag: str, what: str) -> ConfigError:
    """Returns the error of an answer that is missing where nobody can be asked."""
    return ConfigError(
        f"{what} must be given, since there is no terminal to ask at (or --yes was given)",
        where=flag.split()[0], todo=f"give {flag}",
    )  # fmt: skip


def ask(question: str, take: Callable[[str], T], default: str | None = None) -> T:
    """Asks until the answer can be taken; what is wrong with one is shown."""
    while True:
        text: str = click.prompt(question, default=default, show_default=bool(default), err=True)
        try:
            return take(text.strip())
        except ScholiastError as error:
            click.echo(harmless(f"{error}\n"), err=True)


def _teachers(flags: Flags, answers: Answers) -> None:
    ready: Mapping[str, Any] = flags.base.get("teachers", {})
    given = list(flags.teachers) or [f"{name}={one['model']}" for name, one in ready.items()]
    for text in given:
        with answers.looking(flags.asking):
            _add_teacher(text, answers)
    if given:
        return
    if not flags.asking:
        raise missing("--teacher NAME=MODEL (repeatable), or --family", "the teachers")
    answers.say(
        "Teachers: folders or hub names of models with one tokenizer (NAME=MODEL to name one yourself)."
    )
    ask("Teacher 1", lambda text: _add_teacher(text, answers))
    while ask(
        f"Teacher {len(answers.teachers) + 1} (empty: no more)",
        lambda text: bool(text) and _add_teacher(text, answers), "",
    ):  # fmt: skip
        pass


def _add_teacher(text: str, answers: Answers) -> bool:
    name, equals, model = text.partition("=")
    if not equals:
        model, name = text, _name_of(text, answers.teachers)
    if name in answers.teachers:
        raise ConfigError(
            "two teachers have one name", where="--teacher", found=name,
            todo="name them apart: --teacher NAME=MODEL",
        )  # fmt: skip
    facts = look_at(model, None, f"--teacher {name}")
    common_tokenizer({**answers.models(), f"teacher {name!r}": facts}, False)
    answers.teachers[name] = facts
    answers.say(f"  {name}: {facts.about}")
    return True


def _name_of(model: str, taken: Mapping[str, object]) -> str:
    """Returns a teacher's name, made of the last part of its model's."""
    base = re.sub(r"[^\w.-]", "-", Path(model).name, flags=re.ASCII).strip(".-_") or "teacher"
    while base in taken or base in _RESERVED:
        base += "-2"
    return base


def _student(flags: Flags, answers: Answers) -> None:
    ready: Mapping[str, Any] = flags.base.get("student", {})
    first = next(iter(answers.teachers.values()), None)
    given = flags.student or ready.get("model")
    if given is not None:
        _set_student(given, answers)
    elif flags.keep_layers is not None:
        if answers.faults:  # of a teacher, maybe of the one that would be cut
            return
        answers.student = first
    elif flags.asking and first is not None:
        answers.say(
            "Student: a folder or hub name; a config.json for random weights; empty to cut it from the "
            "first teacher."
        )
        ask("Student", lambda text: _set_student(text or first.model, answers), "")
        if answers.student is not None and answers.student.model == first.model:
            _ask_layers(answers, first)
            return
    else:
        raise missing("--student MODEL, or --keep-layers N to cut it from the first teacher",
                      "the student")  # fmt: skip
    if flags.keep_layers is not None:
        _set_layers(flags.keep_layers, answers)
    elif flags.student is None and ready.get("keep_layers"):
        answers.keep_layers = list(ready["keep_layers"])


def _ask_layers(answers: Answers, first: ModelFacts) -> None:
    proposed = max(1, first.layers // 4)
    ask(
        f"Layers to keep of its {first.layers}: a number, or which by commas (0 is the first)",
        lambda text: _set_layers(text, answers), str(proposed),
    )  # fmt: skip


def _set_student(model: str, answers: Answers) -> None:
    key = "--student"
    facts = look_at_config(model, key) if model.endswith(".json") else look_at(model, None, key)
    models = {**answers.models(), "the student": facts}
    if any(one.tokenizer is not None for one in models.values()):  # no teacher could be looked at
        common_tokenizer(models, False)
    answers.student = facts
    answers.say(f"  student: {facts.about}")


def _set_layers(text: str, answers: Answers) -> None:
    assert answers.student is not None
    layers = answers.student.layers
    if answers.student.tokenizer is None:
        raise ConfigError(
            "a student of random weights has no layers to keep", where="--keep-layers", found=text,
            todo="leave it out, or name a checkpoint as the student",
        )  # fmt: skip
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    kept = spread_layers(numbers[0], layers) if len(numbers) == 1 else numbers
    if not kept or not all(0 <= layer < layers for layer in kept) or len(set(kept)) < len(kept):
        raise ConfigError(
            "these are no layers to keep", where="--keep-layers", found=text,
            expected=f"a number from 1 to {layers}, or some of 0 to {layers - 1} by commas",
            todo="name other layers",
        )  # fmt: skip
    answers.keep_layers = kept
    answers.say(f"  keeps layers {', '.join(map(str, kept))}")


def _sources(flags: Flags, answers: Answers) -> None:
    given = [(text, "--source", "train") for text in flags.sources]
    given += [(text, "--heldout", "heldout") for text in flags.heldout]
    before = len(answers.faults)
    for text, key, split in given:
        with answers.looking(flags.asking):
            _add_source(text, key, split, flags, answers)
    if not flags.sources:
        _ask_sources(flags, answers)
    if len(answers.faults) == before:  # of a source with a fault the domain may not be known
        _require_domains(flags.fields, answers.sources)


def _require_domains(fields: Mapping[str, str], sources: Sequence[Found]) -> None:
    domains = list(dict.fromkeys(one.options.domain for one in sources))
    unknown = [domain for domain in fields if domain not in domains]
    if unknown:
        raise ConfigError(
            "no source has this domain", where=f"--field {unknown[0]}={fields[unknown[0]]}",
            expected=f"one of {', '.join(domains)}", found=unknown[0],
            todo="name the column of one of these",
        )  # fmt: skip


def _ask_sources(flags: Flags, answers: Answers) -> None:
    if not flags.asking:
        raise missing("--source DOMAIN=PATH (repeatable)", "the text")
    answers.say(
        "Text: .jsonl, .parquet, .txt or .md files (a glob, or a folder of them), or\n"
        "hub:NAME[:CONFIG[:SPLIT]]; DOMAIN=PATH to name its domain yourself."
    )
    ask("Text 1", lambda text: _add_source(text, "--source", "train", flags, answers))
    number = 2
    while ask(
        f"Text {number} (empty: no more)",
        lambda text: bool(text) and _add_source(text, "--source", "train", flags, answers), "",
    ):  # fmt: skip
        number += 1


def _add_source(text: str, key: str, split: str, flags: Flags, answers: Answers) -> bool:
    def look(source: SourceOptions, where: str, field: str | None) -> Found:
        try:
            return look_at_source(source, where, field)
        except ConfigError as error:
            if not flags.asking or error.what != UNTOLD:
                raise
            click.echo(harmless(f"{error}\n"), err=True)
        return ask(
            f"Column with the text of {source.domain}",
            lambda name: look_at_source(source, where, name),
        )

    found = find(text, key, flags.fields, split, look)
    answers.sources += found
    for one in found:
        column = one.options.messages_field or one.options.text_field
        answers.say(
            f"  {one.options.domain}: {one.options.format}, {one.how_sure}"
            f"{one.documents:,} document{'' if one.documents == 1 else 's'} in {one.options.path}"
            f"{'' if one.options.format == 'text' else f', column {column}'}"
        )
    return True
