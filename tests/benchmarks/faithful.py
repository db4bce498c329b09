"""Whether a student taught from the cache learns what one taught online does.

    python tests/benchmarks/faithful.py [FOLDER] [--seeds 3] [--steps 49]      (make bench-step)

The demonstration's student, corpus and teachers; α, schedule and batches as there, features left
out, STEPS optimizer steps (49 are one pass over its training blocks). Rows differ in the target:

    cross-entropy           α = 0
    online                  the three teachers in memory, whole distributions (online.py)
    balanced                the cache as it is by default: 64 entries and a bucket
    compact                 16 entries and 16 draws, which stand for the tail without bias
    16 entries + bucket     of the balanced cache
    16, renormalised        the same without a tail: the biased target that many systems train on

A seed decides the order of blocks and is the same for all rows. Given is the held-out loss, nats a
token: cross-entropy over all held-out blocks after the last step, its mean and standard deviation
(n − 1) over the seeds. Finished runs are kept in FOLDER/faithful and not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from online import OnlineStudent
from step import CONFIG, save, shown

from pipeline.config import load_config
from pipeline.workspace import FUSED, Workspace
from stages.progress import Silent
from stages.ranks import Ranks
from stages.stop import StopSignals
from stages.student import build_student
from stages.teacher import TransformersTeacher
from stages.train_student import Trainer

ROWS: dict[str, list[str]] = {
    "cross-entropy": ["loss.alpha=0.0"],
    "online": [],
    "balanced": [],
    "compact": ["store.preset=compact"],
    "16 entries + bucket": ["fusion.k=16"],
    "16, renormalised": ["fusion.k=16", "loss.target=renormalised"],
}
COMPACT = ("cross-entropy", "online", "compact")  # what "compact" is judged by


def workspace(folder: Path, name: str, seed: int, steps: int) -> Workspace:
    """Returns the run of one row and seed; corpus and caches are the demonstration's."""
    cache = folder / "faithful/cache" if name == "compact" else Path("runs/demo/cache")
    settings = {
        "run_dir": folder / "faithful" / f"{name.replace(' ', '-')}-{seed}-{steps}",
        "corpus_dir": "runs/demo/corpus", "cache_dir": cache, "assets": "null",
        "loss.features.weight": 0, "train.baseline": "false", "train.seed": seed,
        "train.epochs": "null", "train.steps": steps, "train.eval_every": steps,
        "train.checkpoint_every": steps,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return Workspace(load_config(CONFIG, overrides + ROWS[name]), Silent())


def train_online(work: Workspace) -> None:
    """Trains the student with the teachers beside it, by the same Trainer."""
    info, jobs = work.finished_jobs()
    run = work.runs(info, jobs)[FUSED]
    torch.manual_seed(run.train.seed)
    cpu, config = torch.device("cpu"), work.config
    model = build_student(config.student, work.student_folder(), cpu, run.train.seed)
    teachers = [
        TransformersTeacher(name, Path(options.model), options, cpu)
        for name, options in config.teachers.items()
    ]
    student = OnlineStudent(model, run.loss, True, teachers, config.fusion.tau)
    with StopSignals() as stop:
        Trainer(
            run, student, work._student_tokenizer(), work.batch_reader(False), work.batch_reader(),
            Silent(), Ranks(cpu), stop,
        ).train()  # fmt: skip


def heldout(folder: Path, name: str, seed: int, steps: int) -> float:
    """Returns the held-out cross-entropy of one row and seed, training it if need be."""
    work = workspace(folder, name, seed, steps)
    metrics = work.config.run / "students" / FUSED / "metrics.jsonl"
    model = metrics.parent / "model/scholiast.json"
    if not model.exists():
        work.cache_teachers()
        if name == "online":
            train_online(work)
        else:
            work.train_students()
    last = json.loads(metrics.read_text().splitlines()[-1])
    found: float = last["heldout"]["overall"]["ce"]
    return found


def plot(rows: list[dict[str, Any]], losses: dict[str, list[float]], path: Path) -> None:
    """Draws every seed's loss and the means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        found = losses[row["name"]]
        axes.plot(found, [y] * len(found), "o", color="tab:blue", alpha=0.5)
        axes.plot([row["loss_mean"]], [y], "|", color="black", markersize=22)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axes.set_xlabel("held-out cross-entropy, nats a token (points: seeds; bars: means)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/bench"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=49)
    asked = parser.parse_args()
    print(__doc__)
    demo = Workspace(load_config(CONFIG), Silent())
    demo.ensure_assets()
    demo.cache_teachers()
    losses: dict[str, list[float]] = {name: [] for name in ROWS}
    for seed in range(asked.seeds):
        for name in ROWS:
            losses[name].append(heldout(asked.folder, name, seed, asked.steps))
            print(f"seed {seed}  {name:22} {losses[name][-1]:.4f}", flush=True)
    rows = [
        {"name": name, "seeds": len(found), "loss_mean": mean(found),
         "loss_std": stdev(found) if len(found) > 1 else None}
        for name, found in losses.items()
    ]  # fmt: skip
    save(asked.folder, faithful=rows)
    plot(rows, losses, asked.folder / "faithful.png")
    print(shown(rows, {"name": "", "seeds": "", "loss_mean": ".4f", "loss_std": ".4f"}))
    ce, online, compact = (mean(losses[name]) for name in COMPACT)
    print(
        f"\ncompact is {(compact - online) / (ce - online):+.1%} of the way from online to cross-entropy"
    )
    apart = [a - b for a, b in zip(losses["balanced"], losses["online"], strict=True)]
    print(f"balanced − online, seed by seed: {', '.join(f'{x:+.4f}' for x in apart)}")


if __name__ == "__main__":
    main()
