"""What a command would do and where it would write, told without doing it (`--dry-run`).

Each function refuses what its command would refuse at once, and reads what it must; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import human_bytes
from pipeline.workspace import Workspace
from storage import manifest
from storage.remote import require_local


@dataclass(frozen=True)
class Action:
    """One thing that would be done.

    Attributes:
        what: an infinitive with its object, or what is done already.
        writes: files and folders it would write to, or URLs.
        done: whether there is nothing to do.
    """

    what: str
    writes: tuple[str, ...] = ()
    done: bool = False

    def __str__(self) -> str:
        head = "done already" if self.done else "would"
        return "\n".join([f"{head}: {self.what}", *(f"  writes {place}" for place in self.writes)])


def done(what: str) -> Action:
    """Returns the action that nothing is to be done, and why."""
    return Action(what, done=True)


def prepare(work: Workspace) -> list[Action]:
    """Returns what is left of stage zero.

    Raises:
        StaleCache, CorpusError, TeacherError, ConfigError: as the command would.
    """
    corpus, actions = work.config.corpus, _assets(work)
    if not (
        work.config.assets or work.there(corpus.tokenizer, corpus.tokenizer_revision, weights=False)
    ):
        actions.append(_download("tokenizer", corpus.tokenizer))
    return actions + _corpus(work)


def _corpus(work: Workspace) -> list[Action]:
    config = work.config
    folder = require_local(config.corpus_folder, "corpus_dir")
    info, _ = work.looked_at()
    if info is not None:
        return [done(f"the corpus, {info.parts} parts in {folder}")]
    work.require_tokenizers()
    there = len(manifest.listing(folder))
    kept = f", keeping the {there} parts that are there" if there else ""
    what = (
        f"prepare {len(config.corpus.sources)} sources into blocks of {config.corpus.block_length}"
    )
    return [Action(what + kept, (str(folder),))]


def cache_teachers(work: Workspace, teachers: Sequence[str] = (), share: str = "") -> list[Action]:
    """Returns what is left of stages zero and one.

    Args:
        teachers: these alone, if any are named.
        share: which share of the parts one task does, for people; all of them if empty.

    Raises:
        StaleCache, CorpusError, TeacherError, ConfigError: as the command would.
    """
    work.require_teachers(teachers)
    work.require_models()
    actions = [action for action in prepare(work) if not action.done]
    actions += [] if work.config.assets else [
        _download("model", options.model)
        for name, options in work.config.teachers.items()
        if name in (teachers or work.config.teachers)
        and not (work.imported(name) or work.there(options.model, options.revision))
    ]  # fmt: skip
    caches = _caches(work, teachers, share)
    if not actions and any(not one.done for one in caches):  # else `prepare` has looked
        work.require_tokenizers()
    return actions + caches


def append(work: Workspace) -> list[Action]:
    """Returns what `append` would add.

    Raises:
        IncompleteCache, StaleCache, CorpusError, TeacherError: as the command would.
    """
    from stages.corpus_identity import require_appendable

    corpus = work.config.corpus
    root = require_local(work.config.corpus_folder, "corpus_dir")
    identity, before = require_appendable(corpus, root, work.memo)
    if identity == before.identity:
        return [done(f"the corpus, {before.parts} parts in {root}"), *_caches(work)]
    added = len(corpus.sources) - len(before.identity["sources"])
    actions = [Action(f"prepare {added} added sources", (str(root),))]
    for name in work.config.teachers:
        place = (str(work.config.cache_folder / name),)
        actions.append(
            Action(f"cache teacher {name!r}: the added parts, and what else is missing", place)
        )
    return actions


def train_student(work: Workspace) -> list[Action]:
    """Returns what is left to train.

    Raises:
        IncompleteCache, StaleCache, CheckpointError: as the command would.
    """
    from stages.checkpoint import latest_checkpoint
    from stages.run import finished, require_identity

    actions = []
    for name, run in work.runs(*work.finished_jobs()).items():
        if finished(run):
            actions.append(done(f"student {name!r}, {run.steps} steps in {run.model_folder}"))
            continue
        begun, first = latest_checkpoint(run.folder / "checkpoints"), 1
        if begun is not None:
            folder, facts = begun
            require_identity(run, facts.get("identity"), folder)
            first += int(facts["step"])
        places = ("metrics.jsonl", "checkpoints", "model")
        left = f"train student {name!r}: steps {first} to {run.steps}"
        if first > run.steps:
            left = f"export student {name!r}, which is trained"
        actions.append(Action(left, tuple(str(run.folder / place) for place in places)))
    return actions


def evaluate(work: Workspace, models: Mapping[str, Path]) -> list[Action]:
    """Returns what would be measured, and which model cards get the figures.

    Raises:
        IncompleteCache, ConfigError, VocabularyMismatch, TeacherError: as the command would.
    """
    from pipeline.config import BEFORE

    _, _, runs = work.measurable(models)
    names = [*work.config.fused_teachers, "their ensemble", BEFORE, *runs, *models]
    cards = tuple(str(run.model_folder / "README.md") for run in runs.values())
    places = (str(work.config.run / "evaluation.json"), *cards)
    return [Action(f"measure {', '.join(names)} on the held-out blocks", places)]


def _assets(work: Workspace) -> list[Action]:
    """Returns what must be built or fetched before anything else."""
    config = work.config
    if config.assets:
        from pipeline.demo import missing

        folder = config.run / "assets"
        names = ", ".join(missing(folder))
        return [Action(f"build {names}", (str(folder),))] if names else []
    return []


def _download(kind: str, name: str) -> Action:
    return Action(f"download the {kind} {name}", ("the hub's cache on this machine",))


def _caches(work: Workspace, teachers: Sequence[str] = (), share: str = "") -> list[Action]:
    config, actions = work.config, []
    require_local(config.cache_folder, "cache_dir")
    jobs = {job.name: job for job in work.looked_at()[1]}
    for name in teachers or config.teachers:
        job = jobs.get(name)
        place = str(config.cache_folder / name)
        if job is None:
            what = "every part"
        elif job.pending:
            size = human_bytes(job.expected_bytes())
            what = f"{len(job.pending)} of {job.layout.parts} parts, about {size}"
        else:
            actions.append(done(f"teacher {name!r}, {job.layout.parts} parts in {place}"))
            continue
        actions.append(Action(f"cache teacher {name!r}: {what}{share}", (place,)))
    return actions
