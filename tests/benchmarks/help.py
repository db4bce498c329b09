"""How long `--help` of every command takes: a table, wall-clock of a fresh process, best of several.

python tests/benchmarks/help.py [TURNS]
"""

from __future__ import annotations

import subprocess
import sys
import time

import click

from pipeline.cli import main

TURNS = int(sys.argv[1]) if len(sys.argv) > 1 else 3


def seconds(words: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words], stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - begun


def rows(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [prefix]
    for name, command in sorted(group.commands.items()):
        inner = (*prefix, name)
        found += rows(command, inner) if isinstance(command, click.Group) else [inner]
    return found


print(f"{'command':<32} best, s   (of {TURNS})")
for words in rows(main):
    best = min(seconds([*words, "--help"]) for _ in range(TURNS))
    print(f"{' '.join(('scholiast', *words)):<32} {best:.3f}")
