"""`make fuzz`: every target for its share of the time, then a table of what came of it.

    python tests/fuzz/run.py --seconds 600 [--seed 1] [--only NAME]

Each target runs in a process of its own, which may die: the case under way is kept then, as is every
case that ended in an error that is not one of ours, below --crashes. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.artefacts import build
from fuzz.cases import Tally, bound_memory, run_cases
from fuzz.decoders import DECODERS, seeds
from fuzz.targets import TARGETS, ground_at

NAMES = list(TARGETS)
ATHERIS_SHARE = 0.4
"""Of the time, for all decoders together."""
_BATCH = 40  # cases after which a process looks at the clock, and hypothesis begins anew
_START = 8.0  # seconds that a process takes to begin
_LIMIT = 60.0  # seconds beyond its time after which a process is taken for one that hangs


def main() -> int:
    """Runs all, or one target as a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", choices=[*NAMES, *DECODERS])
    parser.add_argument("--crashes", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.made:
        return _work(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.crashes.mkdir(parents=True, exist_ok=True)
    begun, room = time.monotonic(), _scratch()
    try:
        build(room / "made")
        named = [options.only] if options.only else [*NAMES, *DECODERS]
        weights, tallies = _weights(named), dict[str, Tally]()
        print(
            f"seed {options.seed}; artefacts made in {time.monotonic() - begun:.0f} s", flush=True
        )
        for i, name in enumerate(named):
            left = options.seconds - (time.monotonic() - begun)
            share = weights[name] / sum(weights[other] for other in named[i:])
            run = _cases if name in NAMES else _decoder
            tallies[name] = run(name, max(1.0, left * share - _START), options, room)
            told = f"{tallies[name].cases:,} cases, {len(tallies[name].crashes)} crashes"
            print(f"  {name}: {told}", flush=True)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return _summary(tallies, time.monotonic() - begun, options.crashes)


def _weights(names: list[str]) -> dict[str, float]:
    whole = sum(target.share for target in TARGETS.values())
    own = {
        n: (1 - ATHERIS_SHARE) * TARGETS[n].share / whole if n in TARGETS
        else ATHERIS_SHARE / len(DECODERS)
        for n in names
    }  # fmt: skip
    return {n: share / sum(own.values()) for n, share in own.items()}


def _scratch() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="scholiast-fuzz-", dir=memory if memory.is_dir() else None))


def _work(options: argparse.Namespace) -> int:
    """Runs one target's cases until its time is over; prints its tally."""
    ground = ground_at(options.made, options.made.parent / "ground")
    os.chdir(ground.root)
    bound_memory()
    until = time.monotonic() + options.seconds
    total, batch = Tally(), 0
    while time.monotonic() < until:
        tally = run_cases(
            ground, options.only, options.seed + batch, _BATCH, options.crashes / ".last"
        )
        total.outcomes += tally.outcomes
        total.crashes |= {k: v for k, v in tally.crashes.items() if k not in total.crashes}
        total.slowest, batch = max(total.slowest, tally.slowest), batch + 1
    print("TALLY " + json.dumps(vars(total)))
    return 0


def _cases(name: str, seconds: float, options: argparse.Namespace, room: Path) -> Tally:
    """Runs a target in a process of its own."""
    words = [sys.executable, __file__, "--made", str(room / "made"), "--only", name,
             "--seconds", f"{seconds}", "--seed", f"{options.seed}",
             "--crashes", str(options.crashes.resolve())]  # fmt: skip
    last = options.crashes / ".last"
    shutil.rmtree(room / "ground", ignore_errors=True)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + _LIMIT)
        found = re.search(r"^TALLY (.*)$", done.stdout, re.M)
        if found:
            stated = json.loads(found[1])
            tally = Tally(Counter(stated["outcomes"]), stated["crashes"], stated["slowest"])
        else:
            told = done.stderr.strip().splitlines()[-1:] or [""]
            tally = Tally(
                Counter(CRASH=1),
                {f"the process died: {done.returncode}: {told[0]:.200}": _text(last)},
            )
    except subprocess.TimeoutExpired:
        tally = Tally(Counter(CRASH=1), {"the process hangs": _text(last)})
    last.unlink(missing_ok=True)
    for i, example in enumerate(tally.crashes.values()):
        (options.crashes / f"{name.replace(' ', '-')}-{i}.json").write_text(example)
    return tally


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _decoder(name: str, seconds: float, options: argparse.Namespace, room: Path) -> Tally:
    """Runs a decoder under atheris."""
    corpus = room / f"corpus-{name}"
    corpus.mkdir()
    for i, data in enumerate(seeds(name)):
        (corpus / f"seed-{i}").write_bytes(data)
    prefix = f"{options.crashes.resolve()}/{name}-"
    words = [sys.executable, str(Path(__file__).with_name("decoders.py")), name, str(corpus),
             f"-max_total_time={max(1, round(seconds))}", f"-seed={options.seed % 2**31 + 1}",
             "-timeout=20", "-rss_limit_mb=4096", "-max_len=4096", "-print_final_stats=1",
             f"-artifact_prefix={prefix}"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    units = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    count = (
        int(units[1])
        if units
        else max(map(int, re.findall(r"^#(\d+)", done.stderr, re.M)), default=0)
    )
    if done.returncode == 0:
        return Tally(Counter(ended=count))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"[A-Za-z.]+(Error|Exception)\b|==\d+==", line)]
    return Tally(
        Counter(ended=count, CRASH=1),
        {(said or lines or ["died"])[0][:300]: "\n".join(lines[-30:])},
    )


def _summary(tallies: dict[str, Tally], seconds: float, folder: Path) -> int:
    """Prints cases by target, errors by class, crashes."""
    print(f"\n{'target':<24}{'cases':>10}{'read':>9}{'refused':>9}{'crashes':>9}{'slowest':>9}")
    for name, tally in tallies.items():
        refused = sum(
            n for key, n in tally.outcomes.items() if key not in ("read", "ended", "CRASH")
        )
        told = [f"{tally.outcomes['read']:,}", f"{refused:,}"] if name in NAMES else ["", ""]
        slow = f"{tally.slowest:.2f} s" if name in NAMES else ""
        print(
            f"{name:<24}{tally.cases:>10,}{told[0]:>9}{told[1]:>9}{len(tally.crashes):>9}{slow:>9}"
        )
    errors = sum((t.outcomes for t in tallies.values()), Counter[str]())
    print(
        "\nerrors: "
        + (
            ", ".join(
                f"{key} {n:,}"
                for key, n in errors.most_common()
                if key not in ("read", "ended", "CRASH")
            )
            or "none"
        )
    )
    cases = sum(t.cases for t in tallies.values())
    crashes = [(name, place) for name, t in tallies.items() for place in t.crashes]
    print(f"{cases:,} cases in {seconds:.0f} s; {len(crashes)} distinct crashes")
    for name, place in crashes:
        print(f"  {name}: {place}")
    if crashes:
        print(f"the inputs: {folder}")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
