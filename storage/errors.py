"""Errors a user can meet. Each says what is wrong, where, which two values disagree, and what to do."""

from __future__ import annotations


class ScholiastError(Exception):
    """Base of every error that is the user's to read; shown without a traceback.

    Args:
        what: one sentence that names the problem.
        where: file, configuration key, teacher, block or position.
        expected: the value that was required, if two values disagree.
        found: the value that stands in its way.
        todo: what to do now.
    """

    exit_code = 1

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


class CorpusError(ScholiastError):
    """The corpus is missing, unreadable, empty, or cannot be cut as asked."""


class TeacherError(ScholiastError):
    """A model cannot be loaded, or does not do what a teacher must do."""


class NonFiniteLogits(TeacherError):
    """A teacher returned NaN or infinite logits."""


class VocabularyMismatch(ScholiastError):
    """Two models that must share a tokenizer do not."""


class StaleCache(ScholiastError):
    """What lies on disk was made from something else."""


class IncompleteCache(ScholiastError):
    """An earlier step has not been finished."""


class MissingShard(ScholiastError):
    """A manifest vouches for a file that is not there."""


class CorruptShard(ScholiastError):
    """A file's bytes are not those that were written."""


def unreadable(what: str, error: OSError, where: object, todo: str = "") -> CorruptShard:
    """Returns the error of a file that is there and cannot be read: a directory, a failing disk."""
    reason = error.strerror or type(error).__name__
    return CorruptShard(f"{what} cannot be read: {reason}", where=where, todo=todo)


class DiskFull(ScholiastError):
    """Too little free space, before or during a write."""


class FailingFolder(ScholiastError):
    """A folder gave the errors of a failing or restarting file system, again and again."""


class RemoteError(ScholiastError):
    """A remote store cannot be reached, or refuses us."""


class CheckpointError(ScholiastError):
    """A training checkpoint cannot be used by this run."""


class OtherRank(ScholiastError):
    """Another process of the same training failed, and this one ends with it.

    Args:
        rank: which.
        text: that error's.
        exit_code: that error's.
    """

    def __init__(self, rank: int, text: str, exit_code: int = 1) -> None:
        super().__init__(f"rank {rank} failed: {text}")
        self.exit_code = exit_code


class Stopped(ScholiastError):
    """A signal ended the work; what is finished is saved (exit code 75: run it again)."""

    exit_code = 75
