"""Errors a user can meet. Each says what is wrong, where, which two values disagree, and what to do.

Each class says what brings it about (`cause`) and what to do (`remedy`): pipeline/ERRORS.md is made of
these by `python -m pipeline.error_catalogue`, with a message of each that was really provoked.
"""

from __future__ import annotations

from typing import ClassVar


class ScholiastError(Exception):
    """Base of every error that is the user's to read; shown without a traceback.

    Args:
        what: one sentence that names the problem.
        where: file, configuration key, teacher, block or position.
        expected: the value that was required, if two values disagree.
        found: the value that stands in its way.
        todo: what to do now.

    Attributes:
        cause, remedy: of errors of this class, for the catalogue.
        exit_code: the process's.
    """

    exit_code = 1
    cause: ClassVar[str] = (
        "Something outside failed: the scheduler, a task of a pool, a process of the same training."
    )
    remedy: ClassVar[str] = (
        "Read what it said, mend it, and run the same command again: what is finished is kept."
    )

    def __init__(
        self,
        what: str,
        *,
        where: object = "",
        expected: object = None,
        found: object = None,
        todo: str = "",
    ) -> None:
        self.what, self.where, self.expected, self.found, self.todo = (
            what, str(where), expected, found, todo,
        )  # fmt: skip
        lines = [what]
        if self.where:
            lines.append(f"  where:     {self.where}")
        sides = {"expected:  ": expected, "found:     ": found}
        lines += [f"  {side}{value}" for side, value in sides.items() if value is not None]
        if todo:
            lines.append(f"  to do:     {todo}")
        super().__init__("\n".join(lines))


class ConfigError(ScholiastError):
    """The configuration or the command line is wrong (exit code 2: usage)."""

    exit_code = 2
    cause: ClassVar[str] = (
        "A key is unknown or missing, a value is out of its bounds, two keys contradict each "
        "other, or an option names what is not there."
    )
    remedy: ClassVar[str] = (
        "Mend the key or option named; the reference in pipeline/README.md and "
        "configs/schema.json say what is valid."
    )


class CorpusError(ScholiastError):
    """The corpus is missing, unreadable, empty, or cannot be cut as asked."""

    cause: ClassVar[str] = (
        "A source has no files, no such column or no text, the tokenizer cannot end documents, "
        "or no block is left to train on."
    )
    remedy: ClassVar[str] = (
        "Mend the source named (path, format, text_field), or choose a smaller corpus.block_length."
    )


class TeacherError(ScholiastError):
    """A model cannot be loaded, or does not do what a teacher must do."""

    cause: ClassVar[str] = (
        "A folder or hub name is wrong, the hub cannot be reached, weights are not safetensors, "
        "or the model's head or attention is not what a teacher's must be."
    )
    remedy: ClassVar[str] = (
        "Give the folder of a transformers checkpoint with its tokenizer, or a hub name that "
        "can be reached."
    )


class NonFiniteLogits(TeacherError):
    """A teacher returned NaN or infinite logits."""

    cause: ClassVar[str] = (
        "The weights are damaged, or the model overflows in its data type (often float16, some "
        "models in bfloat16)."
    )
    remedy: ClassVar[str] = (
        "Set teachers.NAME.dtype: float32; if that does not help, fetch or make the checkpoint "
        "again."
    )


class VocabularyMismatch(ScholiastError):
    """Two models that must share a tokenizer do not."""

    cause: ClassVar[str] = (
        "Ids mean other tokens to one model than to another, or the same text is cut differently."
    )
    remedy: ClassVar[str] = (
        "Use teachers and a student of one tokenizer family; vocabularies that are only padded "
        "differently are fine."
    )


class StaleCache(ScholiastError):
    """What lies on disk was made from something else."""

    cause: ClassVar[str] = (
        "Corpus, tokenizer, teacher or what is stored was changed after the cache was begun."
    )
    remedy: ClassVar[str] = (
        "Restore what it was made from, or name another folder, or delete it to make it anew; "
        "for sources added at the end, run `scholiast append`."
    )


class IncompleteCache(ScholiastError):
    """An earlier step has not been finished."""

    cause: ClassVar[str] = (
        "A command needs what an earlier one makes, and that one was not run, or was stopped "
        "before its end."
    )
    remedy: ClassVar[str] = (
        "Run the command named, with the same configuration; it goes on where it stopped."
    )


class MissingShard(ScholiastError):
    """A manifest vouches for a file that is not there."""

    cause: ClassVar[str] = "A file was deleted, or a copy did not take it along."
    remedy: ClassVar[str] = (
        "Run `scholiast repair`, then the command that made it: just those parts are made "
        "again. Of a store: `scholiast push --verify`."
    )


class CorruptShard(ScholiastError):
    """A file's bytes are not those that were written."""

    cause: ClassVar[str] = "A disk, a copy or an editor has changed bytes."
    remedy: ClassVar[str] = (
        "Run `scholiast verify` to see what is bad and `scholiast repair` to drop it, then the "
        "command that made it."
    )


def unreadable(what: str, error: OSError, where: object, todo: str = "") -> CorruptShard:
    """Returns the error of a file that is there and cannot be read: a directory, a failing disk."""
    reason = error.strerror or type(error).__name__
    return CorruptShard(f"{what} cannot be read: {reason}", where=where, todo=todo)


class DiskFull(ScholiastError):
    """Too little free space, before or during a write."""

    cause: ClassVar[str] = (
        "The device or a quota is exhausted, or would be before the work is done."
    )
    remedy: ClassVar[str] = (
        "Free some space, or name a folder on another disk, and run the same command again: "
        "finished parts are kept."
    )


class FailingFolder(ScholiastError):
    """A folder gave the errors of a failing or restarting file system, again and again."""

    cause: ClassVar[str] = "A file server restarts or is gone, or a disk fails."
    remedy: ClassVar[str] = (
        "Mend the mount and run the same command again: finished parts are kept."
    )


class RemoteError(ScholiastError):
    """A remote store cannot be reached, or refuses us."""

    cause: ClassVar[str] = (
        "No network, a wrong endpoint, bucket or repository name, or credentials that do not "
        "reach so far."
    )
    remedy: ClassVar[str] = (
        "Check the network, the name and the credentials (AWS_… for a store, HF_TOKEN for the "
        "hub), and run the same command again."
    )


class CheckpointError(ScholiastError):
    """A training checkpoint cannot be used by this run."""

    cause: ClassVar[str] = (
        "The folder holds the training of another configuration, another training is at work "
        "there, a checkpoint is damaged, or the one asked for is not kept."
    )
    remedy: ClassVar[str] = (
        "Restore the settings or name another run_dir; name a checkpoint that is there; a "
        "damaged one may be deleted."
    )


class DemoAssetError(ScholiastError):
    """A model or text of the demonstration could not be fetched or made."""

    cause: ClassVar[str] = (
        "No network or package index, a mirror with other files, a full disk, a missing package, or a "
        "Python without its library's sources."
    )
    remedy: ClassVar[str] = (
        "Mend what the message names and run the same command again: finished assets are kept. Your own "
        "configuration needs none of them."
    )


class OtherRank(ScholiastError):
    """Another process of the same training failed, and this one ends with it.

    Args:
        rank: which.
        text: that error's.
        exit_code: that error's.
    """

    cause: ClassVar[str] = (
        "One process of a training met an error; all end, so that none waits for ever."
    )
    remedy: ClassVar[str] = "Mend what that rank says and run the same command again."

    def __init__(self, rank: int, text: str, exit_code: int = 1) -> None:
        super().__init__(f"rank {rank} failed: {text}")
        self.exit_code = exit_code


class Stopped(ScholiastError):
    """A signal ended the work; what is finished is saved (exit code 75: run it again)."""

    exit_code = 75
    cause: ClassVar[str] = (
        "The process was told to end (SIGTERM, SIGUSR1) by a scheduler, torchrun or a person."
    )
    remedy: ClassVar[str] = (
        "Run the same command again: it goes on where it stopped. Schedulers do so on exit code 75."
    )
