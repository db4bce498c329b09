"""How every command ends: errors as one message, exit codes, interruption."""

from __future__ import annotations

import difflib
import os
import resource
import sys
from collections.abc import Iterable
from typing import Any, Final

import click

from pipeline.terminal import harmless
from storage.errors import ConfigError, ScholiastError, Stopped

INTERRUPTED = 130
EXIT_CODES: Final = {
    0: "done",
    1: "failure; of doctor, verify and repair: something is bad",
    ConfigError.exit_code: "usage: a wrong option, key or value",
    Stopped.exit_code: "stopped by SIGTERM or SIGUSR1, all saved: run it again",
    INTERRUPTED: "interrupted (Ctrl-C): run it again to go on",
}
"""What each exit code means; 128 + N, from a shell, is that signal N killed the process."""
EPILOG: Final = "\b\nExit codes:\n" + "\n".join(
    f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()
)
MOST_FILES = 65_536
_MOST_HINTS = 3


class HintingGroup(click.Group):
    """Names the commands that may have been meant where there is none of that name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.get_command(ctx, name) is not None
        if not known and not name.startswith("-") and not ctx.resilient_parsing:
            near = near_commands(name, self.commands)
            hint = f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
            ctx.fail(f"No such command {harmless(name)!r}.{hint}")
        return super().resolve_command(ctx, args)


def near_commands(name: str, commands: Iterable[str]) -> list[str]:
    """Returns the commands that a mistyped or shortened name may mean, the likeliest first: one of whose
    words begins so ("train": train-student), then those spelled much like it, whole or in a word."""
    given, words = name.lower().replace("_", "-"), dict[str, list[str]]()
    for one in sorted(commands):
        for word in dict.fromkeys((one, *one.split("-"))):
            words.setdefault(word, []).append(one)
    begun = sorted(word for word in words if given and word.startswith(given))
    like = difflib.get_close_matches(given, words, _MOST_HINTS, 0.6)
    return list(dict.fromkeys(one for word in begun or like for one in words[word]))[:_MOST_HINTS]


class ScholiastGroup(HintingGroup):
    """Shows errors as one message without a traceback, unless --debug is given."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        self._debug = "--debug" in (kwargs.get("args") or sys.argv)
        allow_open_files()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke_with_bar(ctx)
        except KeyboardInterrupt:
            click.echo(
                "\ninterrupted; what is finished is kept: run the same command again to go on",
                err=True,
            )
            ctx.exit(INTERRUPTED)
        except Stopped as stopped:
            if first_rank():
                click.echo(harmless(stopped), err=True)
            ctx.exit(stopped.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends quietly where nobody reads on (| head)
        except Exception as error:
            if self._debug:
                raise
            click.echo(harmless(f"error: {_message(error)}"), err=True)
            ctx.exit(error.exit_code if isinstance(error, ScholiastError) else 1)

    def _invoke_with_bar(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        finally:  # a bar left open would hide the cursor and run into the message
            if ctx.obj is not None:
                ctx.obj.stop_bar()


def allow_open_files() -> None:
    """Takes as many descriptors as the system allows: readers keep a shard of each array open, of each
    part in the order's window and each teacher, and the usual 1,024 would have them opened again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def first_rank() -> bool:
    """Returns whether this process speaks for all ranks of a training."""
    return os.environ.get("RANK", "0") == "0"


def _message(error: Exception) -> str:
    if isinstance(error, ScholiastError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return (
            "the device's memory is exhausted\n"
            "  to do:     lower teachers.NAME.batch_blocks or train.batch_blocks (and raise "
            "train.accumulate),\n             store.chunk_tokens or loss.chunk_bytes, or set "
            "train.gradient_checkpointing: true"
        )
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}\n  to do:     check that path"
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        "  to do:     run again with --debug for the traceback, and report it"
    )
