"""Whether a student taught from the cache learns what one taught online does.

    python tests/benchmarks/faithful.py [FOLDER] [--seeds 3] [--steps 49]      (make bench-step)

Six rows of `scholiast reproduce` (pipeline/reproduce/rows.py) over the demonstration: features left
out, STEPS optimizer steps (49 are one pass over its training blocks). Rows differ in the target:

    cross-entropy only              α = 0
    online, whole distributions     the three teachers in memory
    entropy                         the demonstration's cache: 64 entries and a bucket (preset balanced)
    16 + 16 draws                   which stand for the tail without bias (preset compact)
    bucket, k = 16                  16 entries
    renormalised, k = 16            the same without a tail: the biased target of many systems

A seed decides the order of blocks and is the same for all rows. Given is the held-out loss, nats a
token: cross-entropy over all held-out blocks after the last step, its mean and standard deviation
(n − 1) over the seeds. The runs are those of `make reproduce`, kept in runs/reproduce and not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from step import CONFIG, save, shown

from pipeline.console import Console
from pipeline.reproduce.drawings import dots
from pipeline.reproduce.harness import Harness
from pipeline.reproduce.results import Results
from pipeline.reproduce.rows import APPROACHES, CE, ENCODINGS, ENTROPY, ONLINE
from pipeline.reproduce.runs import collect, perform, tasks_of

RUNS = Path("runs/reproduce")
COMPACT, HELDOUT = "16 + 16 draws", "ce/overall"
ROWS = {CE: APPROACHES, ONLINE: APPROACHES, ENTROPY: APPROACHES, COMPACT: ENCODINGS,
        "bucket, k = 16": ENCODINGS, "renormalised, k = 16": ENCODINGS}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/bench"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=49)
    asked = parser.parse_args()
    print(__doc__)
    harness = Harness(CONFIG, [], RUNS, asked.steps, Console())
    chosen = [row for row in harness.rows if ROWS.get(row.name) == row.table]
    for task in tasks_of(harness, chosen, asked.seeds):
        perform(harness, task, keep=False)
    raw = collect(harness, chosen, asked.seeds)
    results = Results({**one, "table": ""} for one in raw)
    rows = []
    for name in ROWS:
        loss = results.spread("", name, HELDOUT)
        if loss is not None:
            rows.append(
                {"name": name, "seeds": asked.seeds, "loss_mean": loss.mean, "loss_std": loss.sd}
            )
    save(asked.folder, faithful=rows)
    figure = dots(results, "", [HELDOUT], {})
    figure.savefig(asked.folder / "faithful.png", dpi=110)
    print(shown(rows, {"name": "", "seeds": "", "loss_mean": ".4f", "loss_std": ".4f"}))
    ce, online, compact = (results.seeds("", n, HELDOUT) for n in (CE, ONLINE, COMPACT))
    apart = sum(compact[s] - online[s] for s in online) / sum(ce[s] - online[s] for s in online)
    print(f"\ncompact is {apart:+.1%} of the way from online to cross-entropy")
    found = results.paired("", ENTROPY, ONLINE, HELDOUT)
    print(f"entropy − online, seed by seed: {', '.join(f'{x:+.4f}' for x in found)}")


if __name__ == "__main__":
    main()
