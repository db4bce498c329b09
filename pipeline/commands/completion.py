"""`scholiast completion`; what shells are offered for configurations, settings, teachers and students."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from pipeline.commands.setting_keys import offered

PROGRAM: Final = "scholiast"
VARIABLE: Final = "_SCHOLIAST_COMPLETE"
_MOST = 100  # configurations that are offered at once

# As click's own, but no space after what wants to be gone on with: a section's "." and a key's "=".
_BASH: Final = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response completion type value

    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \
%(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"

        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=($value)
            [[ $value == *[.=] ]] && compopt -o nospace
        fi
    done

    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
_ZSH: Final = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a described whole begun response
    local type key descr
    (( ! $+commands[%(prog_name)s] )) && return 1

    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s)}")

    for type key descr in ${response}; do
        if [[ "$type" == "plain" ]]; then
            if [[ "$descr" != "_" ]]; then
                described+=("$key":"$descr")
            elif [[ "$key" == *[.=] ]]; then
                begun+=("$key")
            else
                whole+=("$key")
            fi
        elif [[ "$type" == "dir" ]]; then
            _path_files -/
        elif [[ "$type" == "file" ]]; then
            _path_files -f
        fi
    done

    if [ -n "$described" ]; then _describe -V unsorted described -U; fi
    if [ -n "$whole" ]; then compadd -U -V unsorted -a whole; fi
    if [ -n "$begun" ]; then compadd -U -V unsorted -S '' -a begun; fi
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


@add_completion_class
class Bash(BashComplete):
    """Bash, which takes "=" for a word of its own: what it cut is joined, and what is offered after an
    "=" lacks what stands before it."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        words, at = split_arg_string(os.environ["COMP_WORDS"]), int(os.environ["COMP_CWORD"])
        joined: list[str] = []
        for i, word in enumerate(words[: at + 1]):
            if joined and (word == "=" or words[i - 1] == "="):
                joined[-1] += word
            else:
                joined.append(word)
        self._cut = at < len(words) and "=" in words[at - 1 : at + 1]
        incomplete = joined.pop() if at < len(words) else ""
        return joined[1:], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        found = super().get_completions(args, incomplete)
        typed = incomplete.partition("=")[2] if incomplete.startswith("-") else incomplete
        before = "".join(typed.rpartition("=")[:2]) if self._cut else ""
        for item in found:
            item.value = item.value.removeprefix(before)
        return found


class _WholeWord(ShellComplete):
    """A shell that replaces the whole word: what is offered for --option=value starts with --option=."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        found = super().get_completions(args, incomplete)
        option, equals, _ = incomplete.partition("=")
        for item in found if equals and option.startswith("-") else ():
            item.value = f"{option}={item.value}"
        return found


@add_completion_class
class Zsh(_WholeWord, ZshComplete):
    """Zsh, with a space less."""

    source_template = _ZSH


@add_completion_class
class Fish(_WholeWord, FishComplete):
    """Fish, which sets no space behind "." and "=" by itself."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that has a shell complete commands, options, configurations, settings and names.

    \b
    Example: scholiast completion bash > ~/.local/share/bash-completion/completions/scholiast
      scholiast completion zsh > ~/.zfunc/_scholiast        (a folder of $fpath)
      scholiast completion fish > ~/.config/fish/completions/scholiast.fish
    """
    found = get_completion_class(shell)
    assert found is not None  # click has all three
    click.echo(found(ctx.find_root().command, {}, PROGRAM, VARIABLE).source())


def config_files(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the YAML files that begin so, here and two folders deep; without any, whatever is there."""
    begun = glob.escape(incomplete)
    patterns = (f"{begun}*{deeper}.y*ml" for deeper in ("", "/*", "/*/*"))
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return [CompletionItem(path) for path in found[:_MOST]] or [
        CompletionItem(incomplete, type="file")
    ]


def settings(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the keys that may follow --set, a section at a time, and the values of those with few."""
    return [CompletionItem(one) for one in offered(incomplete, list(_configs()))]


def teacher_names(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the teachers of the configuration on the command line."""
    names = [name for config in _configs() for name in config.get("teachers") or ()]
    return [CompletionItem(name) for name in names if str(name).startswith(incomplete)]


def student_names(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the students that a run can have, and those that it has."""
    names = {"fused"}
    for config in _configs():
        if (config.get("train") or {}).get("baseline"):
            names.add("cross_entropy")
        names |= {path.name for path in Path(str(config.get("run_dir"))).glob("students/*/")}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _configs() -> Iterator[dict[str, Any]]:
    """Yields what the configurations on the line being completed say, if it can be read at all."""
    import yaml

    # Not from the context: an option that still lacks its value keeps click from parsing what follows.
    for word in split_arg_string(os.environ.get("COMP_WORDS", "")):
        if word.endswith((".yaml", ".yml")):
            try:
                said = yaml.safe_load(Path(word).expanduser().read_text())
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(said, dict):
                yield said
