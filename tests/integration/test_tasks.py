"""Stage one by many tasks: who does what, who is believed at work, what signals and faults leave."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab, digests
from test_faults import memory, warm  # noqa: F401

from pipeline.launch.options import ClusterOptions
from pipeline.tasks import Task, find_task
from stages.shares import Dropped, Grace, Share
from stages.stop import StopSignals
from storage import durable, leases
from storage.holders import Holder
from storage.leases import Leases
from storage.verify import verify

Cli = Callable[..., Any]


def one_teacher(lab: Lab, blocks: int = 3, **changes: Any) -> Path:
    lab.config |= {"teachers": {"one": {"model": f"{lab.root}/a"}}, "loss": {}}
    return lab.write(corpus__blocks_per_part=blocks, store__chunk_tokens=256, **changes)


def computed(folder: Path) -> list[int]:
    return [json.loads(line)["part"] for line in (folder / "log.jsonl").read_text().splitlines()]


# -- which task


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ((None, None), {}, None),
        ((1, 3), {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, (1, 3)),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5",
                        "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1",
                        "SLURM_ARRAY_TASK_STEP": "4", "SLURM_ARRAY_TASK_COUNT": "3"}, (2, 3)),
        ((None, 6), {"JOB_COMPLETION_INDEX": "5"}, (5, 6)),
        ((None, None), {"JOB_COMPLETION_INDEX": "5", "SCHOLIAST_TASKS": "8"}, (5, 8)),
        ((None, None), {"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ((None, None), {"RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)  # fmt: skip
def test_a_task_knows_its_place(
    options: tuple[int | None, int | None], env: dict[str, str], expected: tuple[int, int] | None
) -> None:
    found = find_task(*options, env)
    assert (found and (found.index, found.count)) == expected


@pytest.mark.parametrize("arguments", [("--task", 1), ("--task", 4, "--tasks", 4), ("--tasks", 2)])
def test_half_a_place_is_refused(lab: Lab, cli: Cli, arguments: tuple[object, ...]) -> None:
    result = cli("cache-teachers", lab.write(), *arguments)
    assert result.exit_code == 2 and "task" in result.output


def test_a_requeued_task_has_the_same_name() -> None:
    env = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    first = find_task(None, None, {**env, "SLURM_JOB_ID": "15"})
    again = find_task(None, None, {**env, "SLURM_JOB_ID": "19", "SLURM_RESTART_COUNT": "1"})
    other = find_task(None, None, {**env, "SLURM_ARRAY_TASK_ID": "2"})
    assert isinstance(first, Task) and isinstance(again, Task) and isinstance(other, Task)
    assert first.job == again.job != other.job
    steps = [find_task(one, 2, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) for one in (0, 1)]
    assert steps[0] and steps[1] and steps[0].job != steps[1].job, "two `srun`s of one allocation"


# -- leases


def holder(host: str = "elsewhere", job: str | None = None, lifetime: float = 60.0) -> Holder:
    return Holder(host, os.getpid(), 0, job, lifetime)


def test_a_lease_keeps_others_away_until_it_is_given_up(tmp_path: Path) -> None:
    with Leases(tmp_path, holder("a")) as mine, Leases(tmp_path, holder("b")) as other:
        assert mine.take(3) and not other.take(3) and other.take(4)
        mine.drop(3)
        assert other.take(3)
    assert not (tmp_path / leases.FOLDER).exists()


def test_an_expired_lease_is_taken_over_whatever_the_hosts_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks an hour ahead and behind: ages are told by the file system's own."""
    gone, late = (
        Leases(tmp_path, holder("a", lifetime=5)),
        Leases(tmp_path, holder("b", lifetime=5)),
    )
    assert gone.take(0)
    real = time.time
    for skew in (3600.0, -3600.0):
        monkeypatch.setattr(time, "time", lambda skew=skew: real() + skew)
        monkeypatch.setattr(time, "time_ns", lambda skew=skew: int((real() + skew) * 1e9))
        assert not late.take(0)
    path = tmp_path / leases.FOLDER / "000000"
    os.utime(path, (real() - 6, real() - 6))
    assert late.take(0)
    gone.drop(0)  # it is another's now
    assert path.exists() and not gone.take(0)


def test_a_lease_of_the_same_job_or_of_a_dead_process_is_taken_at_once(tmp_path: Path) -> None:
    before = Leases(tmp_path, holder("node1", job="7.0"))
    assert before.take(0) and before.take(1)
    assert not Leases(tmp_path, holder("node2", job="8.0")).take(0)
    assert Leases(tmp_path, holder("node2", job="7.0")).take(0), "requeued on another node"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    alive = Holder.here("9.0", 60.0)
    dead = Holder(alive.host, child.pid, 1, None, 60.0)
    assert Leases(tmp_path, dead).take(2) and Leases(tmp_path, alive).take(2)
    twin = Holder.here("9.0", 60.0)
    assert not Leases(tmp_path, twin).take(2), "the same job, and its process is alive"
    elsewhere = replace(dead, space="another container of this name", token="other")
    assert Leases(tmp_path, elsewhere).take(3) and not Leases(tmp_path, alive).take(3)
    alive_too = Leases(tmp_path, holder("node3"))
    assert alive_too.take(4)
    alive_too.abandon()
    assert Leases(tmp_path, alive).take(4), "what is given up is free"


def test_tasks_of_one_job_have_names_of_their_own() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    tasks = [find_task(index, 2, job) for index in (0, 1)]
    names = {task.job for task in tasks if task is not None}
    assert len(names) == 2 and all(str(name).startswith("7.") for name in names)


def test_leases_are_touched_while_they_are_held(tmp_path: Path) -> None:
    with Leases(tmp_path, holder("a", lifetime=0.3)) as mine:
        mine.take(0)
        first = mine.look(0)
        time.sleep(0.5)
        now = mine.look(0)
        assert first and now and now.touched > first.touched and not now.expired


def test_leases_are_shown_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Leases(tmp_path, holder("a")).take(0)

    def full(folder: Path) -> int:
        raise OSError(errno.EDQUOT, "injected")

    monkeypatch.setattr(leases, "clock", full)
    [lease] = leases.leases(tmp_path)
    assert lease.part == 0 and not lease.expired


def test_leases_are_no_content(lab: Lab, cli: Cli) -> None:
    config = one_teacher(lab, 8)
    assert cli("cache-teachers", config).exit_code == 0
    cache = lab.root / "run/cache/one"
    Leases(cache, holder()).take(0)
    report = verify(cache)
    assert report.sound and [(x.path, x.ours) for x in report.leftovers] == [
        (".leases/000000", True)
    ]
    assert cli("push", config, f"file://{lab.root}/pushed").exit_code == 0
    assert not list((lab.root / "pushed").rglob("*lease*"))
    assert cli("cache-teachers", config).exit_code == 0, "swept by the next run"
    assert not (cache / leases.FOLDER).exists()


# -- tasks


def test_tasks_begin_apart_and_help(lab: Lab, cli: Cli) -> None:
    """Each of two, one after the other: the first does all, from its own place; the second nothing."""
    config = one_teacher(lab)
    result = cli("cache-teachers", config, "--task", 1, "--tasks", 2, "--teacher", "one")
    assert result.exit_code == 0, result.output
    parts = computed(lab.root / "run/cache/one")
    count = len(parts)
    assert parts == [*range(count // 2, count), *range(count // 2)]
    assert f"task 1 of 2 (from --task and --tasks): one: {count} parts written" in result.output
    code = (
        "import sys; from pipeline.cli import main\n"
        f"main(['cache-teachers', '{config}', '--task', '0', '--tasks', '2'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stderr


def test_a_part_of_a_living_task_is_left_to_it(lab: Lab, cli: Cli) -> None:
    config = one_teacher(lab, 8, cluster={"lease": 1.2})
    lab.workspace().prepare()
    cache = lab.root / "run/cache/one"
    with Leases(cache, holder(lifetime=1.2)) as others:
        others.take(2)
        assert re.search(r"^cache one +running ", cli("status", config).output, re.M)
        [state] = [r["state"] for r in json.loads(cli("status", config, "--json").output)
                   if r["step"] == "cache one"]  # fmt: skip
        assert state == "running", "though no part is done"
        result = cli("cache-teachers", config, "--task", 0, "--tasks", 1)
        assert result.exit_code == 0 and "1 left to tasks that are at work" in result.output
        assert 2 not in computed(cache)
        others.fail(2, "out of luck")
    status = json.loads(cli("status", config, "--json").output)
    row = next(row for row in status if row["step"] == "cache one")
    assert (row["running"], row["failed"], row["stale"]) == (0, 1, 0)


def test_a_part_of_another_job_is_waited_for(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after this job would begin without it."""
    config = one_teacher(lab, 8, cluster={"lease": 0.6})
    lab.workspace().prepare()
    cache = lab.root / "run/cache/one"
    monkeypatch.setenv("SCHOLIAST_JOB", "9")
    with (
        Leases(cache, holder("a", "8.0", lifetime=0.6)) as others,
        Leases(cache, holder("b", "9.1", lifetime=0.6)) as sibling,
    ):
        assert others.take(2) and sibling.take(3)
        threading.Timer(2.5, others.drop, [2]).start()
        result = cli("cache-teachers", config, "--task", 0, "--tasks", 1)
        assert result.exit_code == 0 and "1 left to tasks" in result.output
        assert computed(cache)[-1] == 2 and 3 not in computed(cache)


def test_a_dead_task_of_another_host_is_waited_for(lab: Lab, cli: Cli) -> None:
    config = one_teacher(lab, 8, cluster={"lease": 5.0})
    lab.workspace().prepare()
    cache = lab.root / "run/cache/one"
    Leases(cache, holder(lifetime=5.0)).take(2)
    result = cli("cache-teachers", config, "--task", 0, "--tasks", 1)
    assert result.exit_code == 0 and "left to" not in result.output
    assert computed(cache)[-1] == 2, "done last, once its lease had expired"
    assert not (cache / leases.FOLDER).exists()


@pytest.mark.long
def test_thirty_two_tasks_race_on_eight_parts(lab: Lab, memory: Path) -> None:  # noqa: F811
    config = one_teacher(lab, 8, cluster={"lease": 6})
    parts = json.loads(warm("race", config, memory, 32))["parts"]
    assert 7 <= parts <= 9
    assert digests(memory / "raced") == digests(memory / "alone")
    done = computed(memory / "raced/one")
    assert set(done) == set(range(parts)) and len(done) <= parts + 2
    report = verify(memory / "raced/one")
    assert report.sound and report.complete and not report.leftovers


# -- signals


def test_grace_lets_a_nearly_finished_part_end() -> None:
    with StopSignals() as stop:
        begun, short = Grace(stop, 30.0, 100), Grace(stop, 0.0, 100)
        begun.advance(10)
        os.kill(os.getpid(), signal.SIGUSR1)
        begun.advance(10)
        begun.advance(80)
        with pytest.raises(Dropped):
            short.advance(50)
        short.advance(50)  # the last batch: it is finished


@pytest.mark.parametrize(("grace", "dropped"), [(0.0, True), (1000.0, False)])
def test_a_signal_ends_a_task_with_75(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch, grace: float, dropped: bool
) -> None:
    from stages.annotate import PartAnnotator

    config = one_teacher(lab, 8, cluster={"grace": grace})
    batches, real = [], PartAnnotator._batch

    def batch(self: PartAnnotator, *arguments: Any) -> Any:
        batches.append(None)
        if len(batches) == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, *arguments)

    monkeypatch.setattr(PartAnnotator, "_batch", batch)
    result = cli("cache-teachers", config, "--set", "teachers.one.batch_blocks=1")
    assert result.exit_code == 75 and "stopped by SIGUSR1" in result.output
    assert ("given up" in result.output) == dropped
    cache = lab.root / "run/cache/one"
    done = len(list((cache / "manifests").glob("*.json")))
    assert f"{done} parts written" in result.output and not (cache / leases.FOLDER).exists()
    assert cli("cache-teachers", config, "--set", "teachers.one.batch_blocks=1").exit_code == 0
    assert len(set(computed(cache))) == len(computed(cache)), (
        "nothing that was written is done again"
    )


def test_a_failed_write_gives_up_every_lease_and_waits_for_no_one(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that wait for each other's failed parts would wait for good."""
    from storage.writer import CacheWriter

    config, real = one_teacher(lab, 8, cluster={"lease": 0.6}), CacheWriter.write_part
    last = lab.workspace(corpus__blocks_per_part=8).prepare().parts - 1
    cache = lab.root / "run/cache/one"

    def write_part(self: CacheWriter, part: int, *arguments: Any) -> Any:
        if part == last:
            time.sleep(0.3)  # until the other part is waited for
            raise OSError(errno.EIO, "injected")
        return real(self, part, *arguments)

    monkeypatch.setattr(CacheWriter, "write_part", write_part)
    with Leases(cache, holder(lifetime=0.6)) as others:
        assert others.take(1)
        rescue = threading.Timer(20.0, others.drop, [1])
        rescue.start()
        result = cli("cache-teachers", config)
        assert rescue.is_alive(), "it waited for a task that is alive"
        rescue.cancel()
        assert result.exit_code != 0 and [x.part for x in leases.leases(cache)] == [1]


# -- a shared folder that fails at times


class Shaky:
    """Lets file operations below a folder fail at random, or for good."""

    def __init__(self, folder: Path, share: float) -> None:
        self.folder, self.share, self.failed = str(folder), share, 0
        self._random = random.Random(5)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in (
            "open",
            "replace",
            "rename",
            "fsync",
            "listdir",
            "stat",
            "unlink",
            "utime",
            "mkdir",
        ):
            patch.setattr(os, name, self._shaken(getattr(os, name)))
        # Many tries: to begin a cache is one action of many operations.
        patch.setattr(durable, "PAUSES", (0.001,) * 60)

    def _shaken(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(target: Any, *arguments: Any, **named: Any) -> Any:
            where = f"/proc/self/fd/{target}" if isinstance(target, int) else str(target)
            inside = (os.readlink(where) if isinstance(target, int) else where).startswith(
                self.folder
            )
            if inside and self._random.random() < self.share:
                self.failed += 1
                raise OSError(random.choice([errno.EIO, errno.ESTALE]), "injected", where)
            return real(target, *arguments, **named)

        return operation


def test_a_folder_that_fails_at_times_loses_nothing(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = one_teacher(lab, 8)
    assert cli("cache-teachers", config).exit_code == 0
    expected = digests(lab.root / "run/cache")
    shaken = lab.write("shaken.yaml", **{"cache_dir": f"{lab.root}/shaken"}, corpus__blocks_per_part=8,
                       store__chunk_tokens=256)  # fmt: skip
    shaky = Shaky(lab.root / "shaken", 0.01)
    with monkeypatch.context() as patch:
        shaky.install(patch)
        result = cli("cache-teachers", shaken, "--debug")
    assert result.exit_code == 0, result.output
    assert shaky.failed > 10 and digests(lab.root / "shaken") == expected
    report = verify(lab.root / "shaken/one")
    assert report.sound and report.complete and all(x.ours for x in report.leftovers)


def test_a_folder_that_goes_on_failing_is_reported_and_nothing_is_lost(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.writer import CacheWriter

    config = one_teacher(lab, 8, cluster={"lease": 1.2})  # this process lives on, unlike a real one
    shaky, real = Shaky(lab.root / "run/cache", 1.0), CacheWriter.write_part

    def write_part(self: CacheWriter, part: int, *arguments: Any) -> Any:
        if part == 3:
            shaky.install(monkeypatch)
        return real(self, part, *arguments)

    monkeypatch.setattr(CacheWriter, "write_part", write_part)
    result = cli("cache-teachers", config)
    monkeypatch.undo()
    assert result.exit_code == 1 and "the folder keeps failing" in result.output
    assert "Traceback" not in result.output and "run the same command again" in result.output
    cache = lab.root / "run/cache/one"
    kept = len(list((cache / "manifests").glob("*.json")))
    assert kept >= 3
    assert cli("cache-teachers", config).exit_code == 0
    assert verify(cache).complete and set(computed(cache)) == set(range(verify(cache).checked))


def test_defaults_of_a_task_are_the_clusters() -> None:
    assert (Share().lifetime, Share().grace) == (ClusterOptions().lease, ClusterOptions().grace)
