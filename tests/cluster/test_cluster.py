"""Real jobs of the real command line on a private Slurm, through every fault a cluster has.

Each scenario ends in the bits (stage one) or the curve (stage two) of an undisturbed run in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_run import PARTS, Run
from conftest import Lab
from private_slurm import PrivateSlurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateSlurm]:
    """Started once; stopped by its own process ids whatever happens, SIGTERM to pytest included."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = PrivateSlurm(root)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 143))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def _clean(slurm: PrivateSlurm) -> Iterator[None]:
    yield
    slurm.cancel_all()


@pytest.fixture
def run(lab: Lab, slurm: PrivateSlurm, cli: Callable[..., Any]) -> Run:
    return Run(lab, slurm, cli)


# -- stage one


def test_array_gives_the_bits_of_a_local_run(run: Run, slurm: PrivateSlurm) -> None:
    """Four tasks over twelve parts, two at a time; launching again submits nothing."""
    run.slowed(batch=0.05)
    array = run.launch("--cache-only")["cache-one"]
    most = 0

    def over() -> bool:
        nonlocal most
        states = slurm.queue()
        most = max(most, list(states.values()).count("RUNNING"))
        return not states

    slurm.wait_for(over, 300)
    assert slurm.states(array) == ["COMPLETED"] * 4 and 1 <= most <= 2
    run.require_whole()
    assert sorted(run.computed()) == list(range(PARTS))
    assert run.logs("cache-one").count("(from the Slurm array)") >= 4
    assert run.launch("--cache-only") == {} and "nothing is missing" in run.output


def test_told_ahead_of_the_time_limit_it_goes_on_where_it_was(
    run: Run, slurm: PrivateSlurm
) -> None:
    run.slowed(batch=1.3)
    run.lab.config["cluster"]["defaults"]["time"] = "2"
    run.launch("--cache-only", cluster__tasks=1, cluster__warning=50, cluster__grace=0.0)
    slurm.settle(400)
    log = run.logs("cache-one")
    assert "restart=1" in log and "why=USR1" in log and "stopped by SIGUSR1" in log
    run.require_whole()


def test_preempted_it_is_requeued(run: Run, slurm: PrivateSlurm) -> None:
    run.slowed(batch=0.4)
    run.launch("--cache-only")
    run.in_the_middle()
    slurm.ask("sbatch", "--partition=prod", "--nodes=2", "--exclusive", "--time=2",
              f"--output={slurm.root}/log/prod", "--wrap=sleep 3")  # fmt: skip
    slurm.wait_for(lambda: "stopped by" in run.logs("cache-one"), 120)
    slurm.settle()
    assert "restart=1" in run.logs("cache-one")
    run.require_whole()


def test_requeued_by_hand_it_goes_on(run: Run, slurm: PrivateSlurm) -> None:
    run.slowed(batch=0.4)
    array = run.launch("--cache-only", cluster__tasks=1)["cache-one"]
    run.in_the_middle()
    slurm.ask("scontrol", "requeue", f"{array}_0")
    slurm.settle()
    assert "restart=1" in run.logs("cache-one")
    run.require_whole()


def test_cancelled_it_stays_cancelled(run: Run, slurm: PrivateSlurm) -> None:
    run.slowed(batch=0.4)
    array = run.launch("--cache-only")["cache-one"]
    run.in_the_middle()
    slurm.ask("scancel", array)
    slurm.wait_for(lambda: not slurm.queue(), 60)
    kept = run.manifests()
    time.sleep(4)
    assert set(slurm.states(array)) == {"CANCELLED"} and not slurm.queue()
    assert kept == run.manifests() < PARTS
    run.launch("--cache-only")
    slurm.settle()
    run.require_whole()


def test_a_killed_task_is_reported_and_its_part_done_elsewhere(
    run: Run, slurm: PrivateSlurm
) -> None:
    run.slowed(batch=0.4)
    run.launch("--cache-only")
    run.in_the_middle()
    os.kill(run.workers()[0], signal.SIGKILL)
    slurm.settle()
    if run.manifests() < PARTS:
        shown = run.cli("status", run.lab.write()).output
        assert "killed by signal 9" in shown and "teachers.one.batch_blocks" in shown
        run.launch("--cache-only")
        slurm.settle()
    assert "end code=137" in run.logs("cache-one")
    run.require_whole(again=1)


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup in which importing torch alone is killed by the kernel."""
    group = Path("/sys/fs/cgroup/memory") / f"scholiast-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("120M")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here (version 1, as root): {error}")
    yield group
    group.rmdir()


def test_out_of_memory_is_reported_with_what_to_change(
    run: Run, slurm: PrivateSlurm, small_memory: Path
) -> None:
    """The kernel's own kill, not one of ours."""
    setup = run.lab.config["cluster"]["setup"]
    setup.append(f"echo $$ > {small_memory}/cgroup.procs")
    run.launch("--cache-only", cluster__tasks=1)
    slurm.settle()
    assert "oom_kill 1" in (small_memory / "memory.oom_control").read_text()
    assert run.manifests() == 0
    shown = run.cli("status", run.lab.write()).output
    assert "killed by signal 9, most often for memory" in shown
    assert "teachers.one.batch_blocks" in shown and "cluster.teachers.one.memory" in shown
    setup.pop()
    run.launch("--cache-only")
    slurm.settle()
    run.require_whole()


def test_a_killed_nodes_parts_are_done_elsewhere(run: Run, slurm: PrivateSlurm) -> None:
    run.slowed(batch=0.4)
    run.launch("--cache-only")
    run.in_the_middle()
    worker = run.workers()[0]
    environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    node = next(v for v in environment if v.startswith(b"SLURMD_NODENAME=")).split(b"=")[1].decode()
    slurm.kill_node(node, worker)
    try:
        slurm.settle()
    finally:
        slurm.start_node(node)
    if run.manifests() < PARTS:
        run.launch("--cache-only")
        slurm.settle()
    run.require_whole(again=1)


# -- the whole of it


def curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / "students/fused/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def require_same_curve(found: Path, expected: Path) -> None:
    mine, theirs = curve(found), curve(expected)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        for key in ("total", "ce", "kd"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)


def stage_two(run: Run, **layout: int) -> None:
    run.lab.config["train"] |= {
        "steps": 12, "batch_blocks": 1, "accumulate": 4, "precision": "fp32", "eval_every": 6,
        "checkpoint_every": 3,
    }  # fmt: skip
    run.lab.config["cluster"]["train"] = layout


def undisturbed(run: Run) -> Path:
    folder = run.lab.root / "undisturbed"
    run.lab.workspace(run_dir=str(folder), cache_dir=str(run.cache)).train_students()
    return folder


def test_array_then_two_ranks_then_report(run: Run, slurm: PrivateSlurm) -> None:
    """One node, two ranks; each step after what it needs; then there is nothing left to submit."""
    stage_two(run, nodes=1, ranks=2)
    jobs = run.launch()
    assert list(jobs) == ["cache-one", "train", "evaluate"]
    assert run.launch() == jobs and "in the queue already" in run.output
    slurm.settle(400)
    for name, job in jobs.items():
        assert set(slurm.states(job)) == {"COMPLETED"}, run.logs(name)
    assert (run.lab.root / "run/report/report.html").exists()
    run.require_whole()
    require_same_curve(run.lab.root / "run", undisturbed(run))
    assert run.launch() == {} and "nothing is missing" in run.output


def test_stage_two_preempted_and_resumed_on_other_ranks(run: Run, slurm: PrivateSlurm) -> None:
    """Two nodes of one rank each; preempted in the middle, cancelled, launched again on one rank."""
    assert run.cli("cache-teachers", run.lab.write()).exit_code == 0
    run.slowed(step=1.0)
    stage_two(run, nodes=2, ranks=1)
    first = run.launch()
    assert list(first) == ["train", "evaluate"]
    folder = run.lab.root / "run"
    slurm.wait_for(lambda: (folder / "students/fused/metrics.jsonl").exists(), 180)
    slurm.wait_for(lambda: len(curve(folder)) > 4, 120)
    slurm.ask("sbatch", "--partition=prod", "--nodes=2", "--exclusive", "--time=2",
              f"--output={slurm.root}/log/prod", "--wrap=sleep 1")  # fmt: skip
    slurm.wait_for(lambda: "stopped by" in run.logs("train"), 120)
    slurm.wait_for(lambda: slurm.queue().get(first["train"]) == "PENDING", 60)
    slurm.ask("scancel", first["train"])
    slurm.wait_for(lambda: not slurm.queue(), 60)  # the evaluation goes with what it needed
    stage_two(run, nodes=1, ranks=1)
    second = run.launch()
    slurm.settle(400)
    for name, job in second.items():
        assert set(slurm.states(job)) == {"COMPLETED"}, run.logs(name)
    assert "going on from step" in run.logs("train")
    require_same_curve(folder, undisturbed(run))
